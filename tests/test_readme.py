"""The README says what is true: its code runs, its files exist."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl
import pytest

mpl.use("Agg")

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
def test_the_examples_run_in_the_order_in_which_they_stand(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for example in PYTHON:
        exec(compile(example, "README.md", "exec"), names)
    adata = names["adata"]
    assert {"X_scvae", "scvae_probs", "X_umap"} <= set(adata.obsm)
    assert "scvae_lambda" in adata.layers
    assert (tmp_path / "model" / "model.pt").exists()
    plt.close("all")


def test_the_first_example_has_about_ten_lines():
    assert len(PYTHON[0].strip().splitlines()) <= 10


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", README))))
def test_links_lead_to_files(target):
    assert (ROOT / target).exists()


def test_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"\bmake (\w+)", README):
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE), command
