"""Experiments of the report on data: the tables say which data they are of, and hold what was measured."""

from __future__ import annotations

import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score

import scvae_tools as svt
from scvae_tools._train import mixture_start as _start

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
THE_FOUR = ["poisson", "nb", "zip", "zinb"]
SEEDS = [0, 1]


@pytest.fixture(scope="module")
def report_data():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import report_data

        yield report_data
    for name in ("report_data", "clustering"):
        sys.modules.pop(name, None)


def small_cells(n_cells=120, random_state=0):
    return svt.datasets.simulate(n_cells, 40, 3, median_counts=200, random_state=random_state)


@pytest.fixture
def folder(tmp_path):
    """Of one file with labels, two of which are missing."""
    cells = small_cells()
    label = cells.obs["component"].astype(str).to_numpy(dtype=object)
    label[:2] = "unknown"
    obs = pd.DataFrame({"cell_type": label}, index=cells.obs_names)
    ad.AnnData(cells.X, obs=obs).write_h5ad(tmp_path / "small.h5ad")
    return tmp_path


@pytest.fixture
def offline(monkeypatch):
    def mouse_brain_20k():
        raise OSError("`mouse_brain_20k` needs 1M_neurons_neuron20k.h5: found no file, and could not download it")

    def mouse_brain_20k_like(n_cells, *, random_state):
        asked.append(n_cells)
        return small_cells(random_state=random_state)

    asked = []
    monkeypatch.setattr(svt.datasets, "mouse_brain_20k", mouse_brain_20k)
    monkeypatch.setattr(svt.datasets, "mouse_brain_20k_like", mouse_brain_20k_like)
    return asked


def test_without_a_network_the_mouse_brain_is_simulated_and_every_title_says_so(report_data, offline):
    tables = report_data.EXPERIMENTS["mouse-brain"](quick=True)
    assert offline == [2_000]
    for title, _ in tables:
        assert "simulated in the same shape, not real: 120 cells × 40 genes" in title
        assert "only the order can be compared" in title


def test_the_bounds_of_the_mouse_brain_are_beside_those_of_the_report(report_data, offline):
    (first, one), (last, two) = report_data.mouse_brain(cells=120, epochs=2)
    assert "; 1 epoch at most" in first
    assert "; 2 epochs at most" in last
    for table in (one, two):
        assert table["likelihood"].tolist() == 2 * THE_FOUR
        assert table["latent"].tolist() == 2 * [50, 100, 50, 100]
        assert table["held-out ELBO"].notna().all()
    # Tables 2 and 3 of the report.
    assert one["report, 1 epoch"].tolist() == 2 * [-12743.27, -6992.24, -12492.06, -10834.93]
    assert two["report, 500 epochs"].tolist() == 2 * [-7178.45, -6568.23, -7176.42, -7181.14]


def test_real_cells_are_called_real_and_a_subset_of_them_is_taken(report_data, monkeypatch):
    whole = small_cells()
    monkeypatch.setattr(svt.datasets, "mouse_brain_20k", lambda: whole)
    some, kind = report_data.mouse_brain_cells(30, seed=0)
    assert kind == "real"
    assert some.n_obs == 30
    assert (some.X != whole[some.obs_names].X).nnz == 0
    assert report_data.mouse_brain_cells(None, seed=0)[0].n_obs == 120


def test_a_damaged_file_of_the_mouse_brain_is_not_replaced_by_simulated_cells(report_data, monkeypatch):
    def damaged():
        raise ValueError("must be 1M_neurons_neuron20k.h5")

    monkeypatch.setattr(svt.datasets, "mouse_brain_20k", damaged)
    with pytest.raises(ValueError, match="must be 1M_neurons"):
        report_data.mouse_brain_cells(30, seed=0)


def test_the_difference_from_nb_is_taken_seed_by_seed(report_data, folder, monkeypatch):
    case = next(report_data.labelled_sets(False, folder, [0], ["small"]))
    # A difference of 3 with every seed, though the seeds differ by 100: no deviation.
    rows = [
        {"likelihood": name, "random_state": seed, "elbo_test": 100.0 * seed + 3 * (name == "zinb")}
        for name in THE_FOUR
        for seed in SEEDS
    ]
    table = pd.DataFrame(rows).assign(importance_weighted_test=lambda rows: 2 * rows["elbo_test"])
    less = report_data._less_nb([case], [table]).iloc[0]
    assert less["zinb, held-out ELBO"] == "3.00 ± 0.00"
    assert less["zinb, importance-weighted bound"] == "6.00 ± 0.00"
    assert less["zip, held-out ELBO"] == "0.00 ± 0.00"


def test_likelihoods_are_compared_on_the_files_of_a_folder_and_the_data_are_named(report_data, folder):
    tables = report_data.likelihoods(folder=folder, only=["small"], epochs=2)
    assert all("small (120 × 40)" in title for title, _ in tables)
    (_, bounds), (_, less) = tables
    assert bounds["likelihood"].tolist() == THE_FOUR
    assert bounds["failed"].tolist() == 4 * [0]
    mean = bounds.set_index("likelihood")["held-out ELBO"].str.split().str[0].astype(float)
    of_zinb = float(less["zinb, held-out ELBO"].iloc[0].split()[0])
    assert of_zinb == pytest.approx(mean["zinb"] - mean["nb"], abs=0.011)  # each is rounded to 0.01


def test_quick_runs_take_the_shipped_cells_and_one_file(report_data, folder):
    (folder / "small.h5ad").rename(folder / "pbmc_10x_4k.h5ad")
    names = [case.name for case in report_data.labelled_sets(True, folder, [0], None)]
    assert names == ["pbmc68k_reduced", "pbmc_10x_4k"]


def test_every_method_has_a_row_in_each_setting_that_it_knows(report_data, folder, monkeypatch):
    monkeypatch.setattr(_start, "N_RUNS", 2)  # rows are to be there, not good
    # Another that finds its own number: that of scanpy compiles for ten seconds.
    monkeypatch.setattr(report_data, "leiden", lambda latent, _, seed: report_data.k_means(latent, 4, seed))
    (known_title, known), (unknown_title, unknown) = report_data.latent_spaces(
        quick=True, folder=folder, only=["small"], epochs=4
    )
    assert known["method"].tolist() == ["VAE + k-means", "GMVAE", "VaDE"]
    assert unknown["method"].tolist() == ["VAE + Leiden", "GMVAE", "VaDE"]
    assert known["labels"].tolist() == [3, 3, 3]
    assert unknown["found"].iloc[0] == "4.0"
    assert "is given to every method" in known_title
    assert "it is given to none" in unknown_title


def test_agreement_leaves_out_cells_without_a_label(report_data, folder, monkeypatch):
    case = next(report_data.labelled_sets(False, folder, [0], ["small"]))
    cluster = np.where(case.is_labelled, case.label, "0").astype(str)
    cluster[2:30] = "2"
    monkeypatch.setattr(report_data, "_partitions", lambda case, epochs: [("some", True, cluster)])
    (row,) = report_data._agreements(case, None)
    assert row["ARI"] == adjusted_rand_score(case.label[2:].astype(str), cluster[2:])
    assert row["ARI"] < 1
