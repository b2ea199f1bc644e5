from __future__ import annotations

import matplotlib as mpl
import pytest

mpl.use("Agg")

from matplotlib import pyplot as plt


@pytest.fixture(autouse=True)
def nothing_is_shown_and_all_is_closed(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *_, **__: pytest.fail("a figure was shown"))
    plt.close("all")
    yield
    plt.close("all")


def pytest_collection_modifyitems(items):
    # scanpy 1.11 calls a method that newer matplotlib will deprecate.
    for item in items:
        if "/pl/" in item.path.as_posix():
            item.add_marker(pytest.mark.filterwarnings("ignore:The set_bad function:PendingDeprecationWarning"))
