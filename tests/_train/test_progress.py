"""The progress bar, which is on by default."""

from __future__ import annotations

import pandas as pd
import pytest

import scvae_tools as svt


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
