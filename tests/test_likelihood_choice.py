"""Benchmark of the choice of a likelihood: what is counted, by hand, and the rows of a small run."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest

import scvae_tools as svt

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def likelihood_choice():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import likelihood_choice

        yield likelihood_choice
    sys.modules.pop("likelihood_choice", None)


def test_the_true_likelihood_is_counted_where_it_is_found(likelihood_choice):
    rows = [
        ("poisson", 0, "poisson", -5.0, 2, -0.1, 0.2, True, True),  # tied, and the simplest of the two
        ("poisson", 0, "nb", -4.0, 1, 0.0, 0.0, True, False),
        ("nb", 0, "poisson", -9.0, 2, -3.0, 0.2, False, False),
        ("nb", 0, "nb", -4.0, 1, 0.0, 0.0, False, True),  # by every count
        ("nb", 1, "poisson", -4.0, 1, 0.0, 0.0, False, True),
        ("nb", 1, "nb", -4.5, 2, -0.5, 0.2, False, False),  # by none
    ]
    names = ["truth", "seed", "likelihood", "elbo", "rank", "difference", "difference_se", "is_tied", "is_recommended"]
    table = pd.DataFrame(rows, columns=names).assign(components=1)
    assert list(likelihood_choice.counted(table).values()) == ["1 of 3", "2 of 3", "2 of 3", "2 of 3", "1 of 3"]
    shown = likelihood_choice.differences(table)
    assert list(shown["by the ELBO"]) == ["nb", "nb", "poisson"]
    assert list(shown["poisson"]) == ["-0.10 ± 0.20 *", "-3.00 ± 0.20", "+0.00 ± 0.00 *"]


def test_each_data_set_is_compared_with_every_likelihood(likelihood_choice, monkeypatch):
    monkeypatch.setattr(likelihood_choice, "LIKELIHOODS", ("poisson", "nb"))
    small = {"n_cells": 100, "n_genes": 20, "n_hidden": 8, "n_latent": 2, "n_importance_samples": 3, "max_epochs": 2}
    table = likelihood_choice.likelihood_choice(False, (0, 2), **small, model_seeds=2)
    assert list(table["likelihood"]) == ["poisson", "nb"] * 4
    assert list(table["components"]) == [1] * 4 + [4] * 4
    adata = svt.datasets.simulate(100, 20, 4, likelihood="nb", random_state=2)
    options = {name: value for name, value in small.items() if name not in ("n_cells", "n_genes")}
    grid = {"likelihood": ["poisson", "nb"], "random_state": [0, 1]}
    found = svt.tl.compare(adata, grid, mixture=False, random_state=2, progress=False, **options)
    row = table[(table["truth"] == "nb") & (table["seed"] == 2) & (table["likelihood"] == "nb")].iloc[0]
    assert row["elbo"] == pytest.approx(found.loc[found["likelihood"] == "nb", "elbo_test"].mean())
    assert row["difference_se"] == found.loc[found["likelihood"] == "nb", "difference_se"].iloc[0]
