"""The progress bar, which is on by default."""

from __future__ import annotations

import logging
import subprocess
import sys

import pandas as pd
import pytest
import scanpy as sc
import scvi

import scvae_tools as svt
from scvae_tools._train import progress as shown


@pytest.mark.parametrize("mixture", [False, "vade"])
@pytest.mark.parametrize(
    "training",
    [
        {},
        {"train_size": 1.0},
        {"train_size": 1.0, "record_rates": True},
        {"validation_indices": []},
        {"max_steps": 3},  # of two an epoch: Lightning cuts the second epoch short
        {"max_steps": 3, "train_size": 1.0},
        {"limit_train_batches": 1, "train_size": 1.0},
    ],
    ids=str,
)
def test_the_progress_bar_which_is_on_by_default_changes_nothing(mixture, training, capsys):
    def history(**progress):
        adata = svt.datasets.simulate(60, 12, 2, random_state=0)
        svt.SCVAE.setup_anndata(adata)
        model = svt.SCVAE(adata, mixture=mixture, n_hidden=4, n_latent=2, n_components=2 if mixture else None)
        model.train(6, batch_size=32, **training, **progress)
        return model.history

    shown = history()
    bar = capsys.readouterr().err
    pd.testing.assert_frame_equal(shown, history(progress=False))
    assert capsys.readouterr().err == ""
    last = shown.iloc[-1]
    elbo = last["elbo_train"] if pd.isna(last.get("elbo_validation")) else last["elbo_validation"]
    assert f"ELBO={elbo:.1f}" in bar


@pytest.mark.parametrize("train_size", [0.9, 1.0])
def test_the_main_job_runs_with_its_default_bar(train_size, capsys):
    adata = svt.datasets.simulate(60, 12, 2, random_state=0)
    svt.tl.scvae(adata, train_size=train_size, max_epochs=4, n_latent=2)
    assert len(adata.uns["scvae"]["history"]) == 4
    assert "4/4" in capsys.readouterr().err


# -- what is named, and when -----------------------------------------------------------------------------------------

SMALL = {"n_components": 2, "n_latent": 2, "n_hidden": 4, "max_epochs": 6}


class Bar:
    """Stand-in for the bar of tqdm, which notes what happens to it."""

    def __init__(self, total, what="scvae", unit="epoch"):
        self.total, self.n, self.seen = total, 0, [what]
        BARS.append(self)

    def set_postfix_str(self, text):
        self.seen.append((self.n, text))

    def set_postfix(self, *, refresh, **values):
        self.seen.append((self.n, values["stage"]))

    def update(self, n):
        self.n += n

    def refresh(self):
        pass

    def close(self):
        self.seen.append("closed")


BARS: list[Bar] = []


@pytest.fixture
def bars(monkeypatch):
    BARS.clear()
    monkeypatch.setattr(shown, "progress_bar", Bar)
    monkeypatch.setattr("scvae_tools.tl._comparison.progress_bar", Bar)
    return BARS


def test_the_bar_is_there_before_the_first_epoch_and_names_what_is_between_and_after(bars):
    svt.tl.scvae(svt.datasets.simulate(60, 12, 2, random_state=0), **SMALL)
    training, results = bars
    assert training.seen[:2] == ["scvae", (0, "stage=warm-up")]
    assert (4, "start of the mixture") in training.seen
    assert training.seen[-3:] == [(6, "order of the components"), (6, "calibration"), "closed"]
    assert results.seen == ["results", (0, "bounds"), (1, "latent codes"), (2, "λ"), "closed"]
    assert (results.n, results.total) == (3, 3)


def test_a_comparison_names_epoch_stage_and_what_is_between(bars):
    options = {name: value for name, value in SMALL.items() if name != "n_components"}
    adata = svt.datasets.simulate(60, 12, 2, random_state=0)
    svt.tl.compare(adata, {"n_components": [2, 3]}, **options, n_importance_samples=2)
    (bar,) = bars
    assert bar.seen[:3] == [
        "compare",
        (0, "n_components=2"),
        (0, "n_components=2, epoch 1, warm-up"),
    ]
    assert (0, "n_components=2, start of the mixture") in bar.seen
    assert (0, "n_components=2, scores") in bar.seen
    assert (1, "n_components=3, epoch 6, mixture") in bar.seen
    assert bar.n == 2


def test_a_bar_is_closed_when_the_training_fails(bars):
    with pytest.raises(svt.CountsError):
        svt.tl.scvae(svt.datasets.simulate(60, 12, 2).copy()[:, :0].copy(), **SMALL)
    assert all(bar.seen[-1] == "closed" for bar in bars)


# -- whether anything is shown ---------------------------------------------------------------------------------------


@pytest.fixture
def verbosity():
    """Setter of the verbosity of scanpy, which comes out as it went in."""
    before = sc.settings.verbosity
    yield lambda value: setattr(sc.settings, "verbosity", value)
    sc.settings.verbosity = before


def test_nothing_is_shown_where_scanpy_is_set_to_be_quiet(capfd, verbosity):
    verbosity(0)
    adata = svt.datasets.simulate(60, 12, 2, random_state=0)
    svt.tl.scvae(adata, **SMALL)
    assert capfd.readouterr() == ("", "")
    svt.tl.scvae(adata, **SMALL, progress=True)
    assert "6/6" in capfd.readouterr().err


def test_nothing_is_shown_where_scvi_tools_is_set_to_be_quiet(monkeypatch):
    monkeypatch.setattr(scvi.settings, "_verbosity", logging.WARNING)
    assert not shown.is_shown(None)
    assert shown.is_shown(True)


@pytest.mark.parametrize("given", [(True,), (None,), (True, None), (None, True)])
def test_progress_is_shown_by_default_and_where_said(given):
    assert shown.is_shown(*given)
    assert not shown.is_shown(*given, False)


@pytest.mark.parametrize(("level", "is_said"), [(1, False), (2, True), (3, True)])
def test_messages_are_shown_where_scanpy_shows_its_own(level, is_said, verbosity, monkeypatch):
    said = []
    monkeypatch.setattr(sc.logging, "info", said.append)
    verbosity(level)
    adata = svt.datasets.simulate(60, 12, 2, random_state=0)
    svt.tl.scvae(adata[:50], **SMALL, progress=False)
    assert ("Received a view of an AnnData. Making a copy of it." in said) == is_said


def test_a_notebook_without_widgets_gets_text_and_no_warning():
    code = """
import sys, types, warnings
sys.modules["IPython"] = types.SimpleNamespace(
    get_ipython=lambda: types.SimpleNamespace(config={"IPKernelApp": 1}), version_info=(8,), __spec__=None
)
sys.modules["ipywidgets"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import scvae_tools
    from scvae_tools.tl import scvae
    from scvae_tools._train.progress import progress_bar
    progress_bar(3).close()
print([str(each.message) for each in caught if "IProgress" in str(each.message)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr
    assert "0/3" in done.stderr
