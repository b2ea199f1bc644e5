"""tl.compare: rows are those of models trained by hand, test cells stay unseen, what is finished is not done again."""

from __future__ import annotations

import functools
import itertools
import json
import random
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import stats
from scipy.special import comb

import scvae_tools as svt
from scvae_tools._results.comparison import RANKING, RESULTS
from scvae_tools._train import null_model
from scvae_tools._train import plan as _training
from scvae_tools.model._scvae import SCVAE

N_CELLS, N_GENES = 120, 20
SMALL = {"n_hidden": 8, "n_latent": 2, "max_epochs": 3, "batch_size": 32, "n_importance_samples": 3, "progress": False}
GRID = {"likelihood": ["poisson", "nb"], "random_state": [0, 1]}
BOUNDS = [name for name in RESULTS if name.startswith("elbo") or name.endswith("test")]


@functools.cache
def _simulated() -> AnnData:
    adata = svt.datasets.simulate(N_CELLS, N_GENES, 2, n_batches=2, median_counts=200, separation=2, random_state=1)
    adata.obs["sex"] = pd.Categorical(np.where(np.arange(N_CELLS) % 2, "f", "m"))
    adata.obs["total"] = np.asarray(adata.X.sum(1)).ravel()
    adata.var["kept"] = np.arange(N_GENES) % 4 != 1
    return adata


def make_adata() -> AnnData:
    return _simulated().copy()


def compare(adata: AnnData, grid: dict | None = None, **options: object) -> pd.DataFrame:
    grid = GRID if grid is None else grid
    fixed = SMALL | ({} if "mixture" in grid else {"mixture": False})
    return svt.tl.compare(adata, grid, **(fixed | options))


def split_of(adata: AnnData, key: str = "scvae_compare") -> tuple[np.ndarray, ...]:
    return tuple(adata.uns[key]["split"][f"{part}_indices"] for part in ("train", "validation", "test"))


def by_hand(adata: AnnData, seed: int, setup: dict | None = None, **options: object) -> tuple[SCVAE, AnnData]:
    """Model trained on the split of the comparison in adata, without its help; and the test cells."""
    train, validation, test = split_of(adata)
    seen = adata[np.sort(np.r_[train, validation])].copy()
    SCVAE.setup_anndata(seen, **(setup or {}))
    model = SCVAE(seen, **({"n_hidden": 8, "n_latent": 2, "random_state": seed} | options))
    held_out = seen.obs_names.isin(adata.obs_names[validation])
    model.train(3, batch_size=32, validation_indices=held_out, random_state=seed, progress=False)
    return model, adata[test].copy()


def rand_index(a: np.ndarray, b: np.ndarray) -> float:
    """Adjusted Rand index by its definition (Hubert and Arabie 1985), over pairs of cells."""
    together = sum(comb((a[b == name] == value).sum(), 2) for name in set(b) for value in set(a))
    in_a, in_b = (sum(comb((c == value).sum(), 2) for value in set(c)) for c in (a, b))
    expected = in_a * in_b / comb(len(a), 2)
    return (together - expected) / ((in_a + in_b) / 2 - expected)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Likelihoods of the models that were trained, in order."""
    train, seen = SCVAE.train, []

    @functools.wraps(train)
    def counted(self: SCVAE, *args: object, **kwargs: object) -> None:
        train(self, *args, **kwargs)
        seen.append(self.module.gene_likelihood)

    monkeypatch.setattr(SCVAE, "train", counted)
    return seen


def train_instead(monkeypatch: pytest.MonkeyPatch, what: object) -> None:
    """Call ``what(model)`` in place of the training of the model; it trains if that returns True."""
    train = SCVAE.train

    @functools.wraps(train)
    def replaced(self: SCVAE, *args: object, **kwargs: object) -> None:
        if what(self):
            train(self, *args, **kwargs)

    monkeypatch.setattr(SCVAE, "train", replaced)


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixture", [False, "gmvae", "vade"])
def test_a_row_is_the_model_trained_by_hand_on_the_same_cells(mixture):
    adata = make_adata()
    grid = {"random_state": [0, 3], "mixture": [mixture], "n_components": [2]}
    options = {"likelihood": "zinb", "batch_key": "batch", "labels_key": "component"}
    table = svt.tl.compare(adata, grid, **SMALL, **options)
    row = table.set_index("random_state").loc[3]
    model, test = by_hand(adata, 3, {"batch_key": "batch"}, likelihood="zinb", mixture=mixture, n_components=2)
    terms = model.get_elbo_terms(test, n_samples=5).mean()
    assert row["epochs"] == 3
    assert row["elbo_test"] == pytest.approx(terms["elbo"], rel=1e-6)
    for term in ("log_likelihood", "kl_z", "kl_y"):
        assert row[f"{term}_test"] == pytest.approx(terms[term], rel=1e-5, abs=1e-6)
    assert row["elbo_train"] == pytest.approx(model.get_elbo(indices=model.train_indices), rel=1e-6)
    assert row["importance_weighted_test"] == pytest.approx(model.get_marginal_ll(test, n_mc_samples=3), rel=1e-6)
    if not mixture:
        assert pd.isna(row["components_used"])
        assert np.isnan(row["ari"])
        return
    component = model.predict(adata.copy())
    assert row["components_used"] == len(set(component))
    expected = rand_index(component, adata.obs["component"].to_numpy()) if len(set(component)) > 1 else 0
    assert row["ari"] == pytest.approx(expected, abs=1e-9)


def test_a_row_has_what_the_latent_space_explains(monkeypatch):
    monkeypatch.setattr(null_model, "N_STEPS", 4)
    adata = make_adata()
    table = svt.tl.compare(adata, {"random_state": [0, 3]}, **SMALL, likelihood="nb", n_components=2)
    model, _ = by_hand(adata, 3, {}, likelihood="nb", n_components=2)
    row = table.set_index("random_state").loc[3]
    found = row["elbo_validation"] - row["elbo_above_null"]
    assert found == pytest.approx(model.null_log_likelihood["validation"], rel=1e-6)
    monkeypatch.setattr(null_model, "N_STEPS", 10**6)
    assert svt.tl.compare(adata, {"random_state": [1]}, **SMALL)["elbo_above_null"].isna().all()


def test_rows_are_all_combinations_in_the_order_of_the_grid():
    table = compare(make_adata())
    assert list(zip(table["likelihood"], table["random_state"], strict=True)) == list(itertools.product(*GRID.values()))
    assert (table["state"] == "finished").all()
    assert (table["seconds"] > 0).all()
    assert table["elbo_test"].nunique() == len(table)  # no row is another's
    terms = table["log_likelihood_test"] - table["kl_z_test"] - table["kl_y_test"]
    np.testing.assert_allclose(table["elbo_test"], terms, rtol=1e-6)


# -- the ranking -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_importance_samples", [3, None])
def test_differences_are_those_of_models_trained_by_hand_cell_by_cell(n_importance_samples):
    adata = make_adata()
    table = compare(adata, {"likelihood": ["poisson", "nb"]}, n_importance_samples=n_importance_samples)
    bounds = []
    for name in table["likelihood"]:
        model, test = by_hand(adata, 0, likelihood=name, mixture=False)
        if n_importance_samples is None:
            bounds.append(model.get_elbo_terms(test, n_samples=5)["elbo"].to_numpy())
        else:
            bounds.append(model.get_marginal_ll(test, n_mc_samples=n_importance_samples, return_mean=False))
    best = int(np.argmax([bound.mean() for bound in bounds]))
    paired = bounds[1 - best] - bounds[best]
    assert table["rank"].tolist() == [1 + (best != 0), 1 + (best != 1)]
    assert table["difference"].tolist()[1 - best] == pytest.approx(paired.mean(), rel=1e-4)
    assert table["difference_se"].tolist()[1 - best] == pytest.approx(stats.sem(paired), rel=1e-4)
    assert table["difference"].tolist()[best] == table["difference_se"].tolist()[best] == 0
    np.testing.assert_allclose(adata.uns["scvae_compare"]["bound_by_cell"], bounds, rtol=1e-6)


def test_without_importance_samples_models_are_ranked_by_the_elbo():
    adata = make_adata()
    table = compare(adata, n_importance_samples=None)
    assert table["importance_weighted_test"].isna().all()
    assert adata.uns["scvae_compare"]["ranked_by"] == "elbo_test"
    by_setting = table.groupby("likelihood")[["elbo_test", "rank"]].mean()
    assert by_setting["elbo_test"].idxmax() == by_setting["rank"].idxmin()
    weighted = compare(make_adata())
    np.testing.assert_array_equal(weighted["elbo_test"], table["elbo_test"])
    assert weighted["importance_weighted_test"].notna().all()


@pytest.mark.parametrize(("n_test", "n_draws"), [(12, 1000), (400, 500), (5000, 100)])
def test_fewer_test_cells_get_more_draws(n_test, n_draws, monkeypatch):
    asked, adata = [], svt.datasets.poisson_toy(2 * n_test)

    def record(self, *args, n_mc_samples, **kwargs):
        asked.append(n_mc_samples)
        return np.zeros(n_test)

    monkeypatch.setattr(SCVAE, "get_marginal_ll", record)
    fixed = {**SMALL, "n_importance_samples": "auto", "max_epochs": 1, "batch_size": 2500, "mixture": False}
    svt.tl.compare(adata, {"likelihood": ["nb"]}, **fixed, train_size=0.3, test_size=0.5)
    assert asked == [n_draws]
    assert adata.uns["scvae_compare"]["params"]["n_importance_samples"] == n_draws


def test_models_that_differ_by_their_seed_share_a_place():
    table = compare(make_adata())
    for _, rows in table.groupby("likelihood"):
        assert all(rows[name].nunique() == 1 for name in RANKING)
    means = table.groupby("likelihood")["importance_weighted_test"].mean()
    lower = table["likelihood"] == means.idxmin()
    assert set(table["rank"][lower]) == {2}
    np.testing.assert_allclose(table["difference"][lower], means.min() - means.max(), rtol=1e-4)


def test_the_best_model_is_said(caplog):
    with caplog.at_level("INFO", "scvae_tools"):
        table = compare(make_adata(), {"likelihood": ["poisson", "nb"]})
    best = table.set_index("rank").loc[1, "likelihood"]
    assert f"The best by importance_weighted_test: likelihood='{best}'." in caplog.text


def test_what_an_earlier_version_finished_is_ranked_by_its_means_and_not_trained_again(trained):
    adata, grid = make_adata(), {"likelihood": ["poisson", "nb"]}
    first = compare(adata, grid)
    former = adata.uns["scvae_compare"]
    former["table"] = former["table"].drop(columns=list(RANKING))
    for name in ("bound_by_cell", "ranked_by"):
        del former[name]
    svt.pl.compare(adata)
    again = compare(adata, grid)
    assert trained == ["poisson", "nb"]
    assert again["rank"].tolist() == first["rank"].tolist()
    np.testing.assert_allclose(again["difference"], first["difference"], rtol=1e-4)
    assert again["difference_se"].isna().sum() == 1
    assert again["is_tied"].isna().all()
    more = compare(adata, {"likelihood": ["poisson", "nb", "zip"]})
    assert trained == ["poisson", "nb", "zip"]
    assert more["rank"].notna().all()


def test_the_result_is_read_from_a_file_as_it_was(tmp_path):
    adata = make_adata()
    grid = {"mixture": [False, "vade"], "n_components": [2, None], "lr": [1e-3, 0.01], "early_stopping": [True]}
    table = svt.tl.compare(adata, grid, labels_key="sex", **SMALL)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    found = anndata.read_h5ad(tmp_path / "cells.h5ad").uns["scvae_compare"]
    pd.testing.assert_frame_equal(found["table"], table, check_index_type=False)
    assert table["lr"].dtype == float
    assert table["early_stopping"].dtype == bool
    assert list(table["n_components"][:3]) == ["2", "2", "None"]
    assert list(found["grid"]["mixture"]) == ["False", "vade"]
    assert found["params"]["labels_key"] == "sex"
    assert found["version"] == svt.__version__


def test_models_may_differ_by_what_the_decoder_is_given():
    table = compare(make_adata(), {"batch_key": [None, "batch"], "categorical_covariate_keys": [None, ["sex"]]})
    assert list(table["batch_key"]) == ["None", "None", "batch", "batch"]
    assert list(table["categorical_covariate_keys"]) == ["None", "['sex']"] * 2
    assert table["elbo_test"].nunique() == 4


def test_several_numbers_are_one_value_of_the_grid(trained, tmp_path):
    grid = {"n_hidden": [(6, 4), 8], "n_layers": [None], "dropout_rate": [{"hidden": 0.1, "input": 0.2}, 0.2]}
    fixed = {name: value for name, value in SMALL.items() if name not in grid} | {"mixture": False}
    adata = make_adata()
    table = svt.tl.compare(adata, grid, **fixed)
    assert list(table["n_hidden"]) == ["(6, 4)"] * 2 + ["8"] * 2
    assert list(table["n_layers"]) == ["None"] * 4
    assert list(table["dropout_rate"]) == ["{'hidden': 0.1, 'input': 0.2}", "0.2"] * 2
    assert table["elbo_test"].nunique() == len(trained) == 4
    adata.write_h5ad(tmp_path / "cells.h5ad")
    read = anndata.read_h5ad(tmp_path / "cells.h5ad")
    as_arrays = grid | {"n_hidden": [8, np.array([6, 4])]}  # equal values, in another order
    again = svt.tl.compare(read, as_arrays, **fixed)
    assert len(trained) == 4
    assert list(again["elbo_test"]) == list(table["elbo_test"].iloc[[2, 3, 0, 1]])
    svt.pl.compare(read)


def test_several_numbers_may_be_the_same_for_all_models():
    adata = make_adata()
    compare(adata, {"likelihood": ["nb"]}, n_hidden=(6, 4), dropout_rate={"hidden": 0.1})
    model, test = by_hand(adata, 0, mixture=False, n_hidden=(6, 4), dropout_rate={"hidden": 0.1})
    expected = model.get_elbo_terms(test, n_samples=5)["elbo"].mean()
    assert adata.uns["scvae_compare"]["table"]["elbo_test"].iloc[0] == pytest.approx(expected, rel=1e-6)
    assert adata.uns["scvae_compare"]["params"]["n_hidden"] == "(6, 4)"


def test_genes_that_are_left_out_do_not_count():
    whole, part = make_adata(), make_adata()
    found = compare(whole, {"likelihood": ["nb"]}, mask_var="kept")
    expected = compare(part[:, part.var["kept"]].copy(), {"likelihood": ["nb"]})
    np.testing.assert_array_equal(found[BOUNDS], expected[BOUNDS])


# -- the split ---------------------------------------------------------------------------------------------------------


def test_every_cell_is_in_one_part_of_the_split():
    adata = make_adata()
    compare(adata, {"likelihood": ["nb"]}, train_size=0.7, test_size=0.2)
    parts = split_of(adata)
    assert [len(part) for part in parts] == [84, 12, 24]
    assert sorted(np.concatenate(parts)) == list(range(N_CELLS))


def test_the_split_is_that_of_the_comparison_and_not_of_the_model():
    one, other, third = make_adata(), make_adata(), make_adata()
    compare(one, {"random_state": [0]}, random_state=5)
    compare(other, {"random_state": [7]}, random_state=5)
    compare(third, {"random_state": [0]}, random_state=6)
    for a, b in zip(split_of(one), split_of(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert set(split_of(one)[2]) != set(split_of(third)[2])


@pytest.mark.parametrize("mixture", [False, "gmvae"])
def test_nothing_of_a_model_depends_on_the_test_cells(mixture):
    adata = make_adata()
    options = {"mixture": mixture, "batch_key": "batch"} | ({"n_components": 2} if mixture else {})
    before = compare(adata, {"likelihood": ["nb"]}, **options)
    other = make_adata()
    dense = other.X.toarray()
    dense[split_of(adata)[2]] = 10 * dense[split_of(adata)[2]][:, ::-1] + 1
    other.X = dense
    after = compare(other, {"likelihood": ["nb"]}, **options)
    assert after["elbo_train"].item() == before["elbo_train"].item()
    assert after["elbo_validation"].item() == before["elbo_validation"].item()
    assert after["elbo_test"].item() < before["elbo_test"].item()


def test_labels_train_nothing():
    one, other = make_adata(), make_adata()
    other.obs["component"] = other.obs["component"].to_numpy()[::-1]
    options = {"mixture": "gmvae", "n_components": 2, "labels_key": "component"}
    a, b = (compare(adata, {"likelihood": ["nb"]}, **options) for adata in (one, other))
    np.testing.assert_array_equal(a[BOUNDS], b[BOUNDS])


def test_cells_without_a_label_are_not_scored():
    adata = make_adata()
    adata.obs["part"] = adata.obs["component"].astype(object).where(np.arange(N_CELLS) % 3 > 0, None)
    found = compare(adata, {"mixture": ["gmvae"], "n_components": [2]}, labels_key="part", likelihood="poisson")
    model, _ = by_hand(adata, 0, likelihood="poisson", mixture="gmvae", n_components=2)
    known = adata.obs["part"].notna().to_numpy()
    component = model.predict(adata.copy())[known]
    expected = rand_index(component, adata.obs["part"][known].to_numpy())
    assert abs(expected) > 1e-3  # a score that tells
    assert found["ari"].item() == pytest.approx(expected, abs=1e-9)


# -- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_directory", [False, True])
def test_what_is_finished_is_not_trained_again(with_directory, trained, tmp_path):
    options = {"directory": tmp_path / "results"} if with_directory else {}
    adata = make_adata()
    first = compare(adata, **options)
    assert trained == ["poisson", "poisson", "nb", "nb"]
    again = make_adata() if with_directory else adata  # a directory needs no result in uns
    pd.testing.assert_frame_equal(compare(again, **options), first)
    assert len(trained) == 4
    more = compare(again, {"likelihood": ["zinb", "nb"], "random_state": [1, 2]}, **options)
    assert trained[4:] == ["zinb", "zinb", "nb"]
    assert list(more["elbo_test"])[2] == list(first["elbo_test"])[3]


def test_a_result_that_was_read_from_a_file_is_gone_on_from(trained, tmp_path):
    adata = make_adata()
    options = {"mixture": "vade", "n_components": 2, "labels_key": "sex"}
    first = compare(adata, **options)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    trained.clear()
    found = compare(anndata.read_h5ad(tmp_path / "cells.h5ad"), **options)
    pd.testing.assert_frame_equal(found, first)
    assert trained == []


@pytest.mark.parametrize(
    "changed",
    [
        {"random_state": 1},
        {"train_size": 0.7},
        {"n_latent": 3},
        {"n_importance_samples": 4},
        {"n_importance_samples": None},
        {"labels_key": "sex"},
        {"mask_var": "kept"},
        {"size_factor_key": "total"},
    ],
    ids=lambda changed: "_".join(map(str, next(iter(changed.items())))),
)
def test_other_arguments_are_another_result(changed, trained):
    adata = make_adata()
    grid = {"likelihood": ["nb"]}
    compare(adata, grid)
    compare(adata, grid, **changed)
    assert len(trained) == 2


def test_other_counts_covariates_and_versions_are_another_result(trained, monkeypatch, tmp_path):
    grid, options = {"likelihood": ["nb"]}, {"directory": tmp_path, "size_factor_key": "total"}
    compare(make_adata(), grid, **options)
    counts, factors = make_adata(), make_adata()
    counts.X[0, 0] += 1
    factors.obs["total"] *= 2
    for adata in (counts, factors):
        compare(adata, grid, **options)
    monkeypatch.setattr("scvae_tools.tl._comparison.__version__", "0.0.0")
    compare(make_adata(), grid, **options)
    assert len(trained) == 4


def test_a_plain_vae_is_trained_once_whatever_the_mixture_is_like(trained):
    table = svt.tl.compare(make_adata(), {"mixture": [False, "vade"], "n_components": [2, 3]}, **SMALL)
    assert len(trained) == 3
    assert table["elbo_test"].nunique() == 3


def test_ctrl_c_keeps_what_is_finished_and_ends(trained, monkeypatch):
    adata = make_adata()

    def interrupt_third(model):
        if len(trained) == 2:
            raise KeyboardInterrupt
        return True

    with monkeypatch.context() as patch:
        train_instead(patch, interrupt_third)
        with pytest.warns(UserWarning, match=r"The 2 of 4 combinations"), pytest.raises(KeyboardInterrupt):
            compare(adata)
    assert list(adata.uns["scvae_compare"]["table"]["likelihood"]) == ["poisson", "poisson"]
    table = compare(adata)
    assert trained == ["poisson", "poisson", "nb", "nb"]
    np.testing.assert_array_equal(table[BOUNDS], compare(make_adata())[BOUNDS])


def test_a_training_that_ctrl_c_ended_does_not_count(monkeypatch, recwarn):
    """SCVAE.train itself goes on from an interruption, to a usable model."""
    hook = _training.TrainingPlan.on_train_epoch_end

    def interrupt(plan):
        hook(plan)
        if plan.module.gene_likelihood == "nb" and plan.row["epoch"] == 2:
            raise KeyboardInterrupt

    adata = make_adata()
    monkeypatch.setattr(_training.TrainingPlan, "on_train_epoch_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare(adata, {"likelihood": ["poisson", "nb", "zinb"]})
    assert list(adata.uns["scvae_compare"]["table"]["likelihood"]) == ["poisson"]
    assert not any("Training was interrupted" in str(warning.message) for warning in recwarn)


def test_an_interruption_keeps_what_a_former_call_had_finished(monkeypatch):
    adata = make_adata()
    compare(adata, {"likelihood": ["nb", "zinb"]})

    def interrupt(model):
        raise KeyboardInterrupt

    train_instead(monkeypatch, interrupt)
    with pytest.warns(UserWarning, match=r"The 2 of 3"), pytest.raises(KeyboardInterrupt):
        compare(adata, {"likelihood": ["poisson", "nb", "zinb"]})
    assert list(adata.uns["scvae_compare"]["table"]["likelihood"]) == ["nb", "zinb"]


def test_an_interruption_before_anything_is_finished_leaves_the_former_result(monkeypatch):
    adata = make_adata()
    compare(adata, {"likelihood": ["nb"]})
    before = adata.uns["scvae_compare"]

    def interrupt(model):
        raise KeyboardInterrupt

    train_instead(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare(adata, {"likelihood": ["poisson"]})
    assert adata.uns["scvae_compare"] is before


def test_a_process_that_is_killed_while_it_writes_leaves_whole_results_only(trained, tmp_path):
    code = f"""
        import os, signal, stat, sys
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
        import test_compare
        fsync, written = os.fsync, []
        def kill_at_the_third(descriptor):
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                written.append(descriptor)
            if len(written) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)
        os.fsync = kill_at_the_third
        test_compare.compare(test_compare.make_adata(), directory={str(tmp_path)!r})
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, check=False)
    assert run.returncode == -9, run.stderr.decode()
    assert len(list(tmp_path.glob("*.tmp/*.json"))) == 1
    assert len(list(tmp_path.glob("*.json"))) == 2
    (tmp_path / "0.0123456789ab.tmp.json").write_text("{")  # as former versions left them
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # what is unfinished is not read
        table = compare(make_adata(), directory=tmp_path)
    assert trained == ["nb", "nb"]
    assert (table["state"] == "finished").all()
    np.testing.assert_array_equal(table[BOUNDS], compare(make_adata())[BOUNDS])


def test_other_files_in_the_directory_are_named_and_left_alone(trained, tmp_path):
    compare(make_adata(), directory=tmp_path)
    whole, broken = sorted(tmp_path.glob("*.json"))[:2]
    broken.write_text(broken.read_text()[:40])
    (tmp_path / "notes.json").write_text("[1]")
    trained.clear()
    with pytest.warns(UserWarning, match=r"is not a result of svt.tl.compare") as caught:
        compare(make_adata(), directory=tmp_path)
    assert len([w for w in caught if "is not a result" in str(w.message)]) == 2
    assert len(trained) == 1
    assert json.loads(broken.read_text())["result"]["state"] == "finished"
    assert "combination" in json.loads(whole.read_text())


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_combination_that_fails_is_a_row_with_its_error(monkeypatch, trained, tmp_path):
    adata = make_adata()

    def fail_with_nb(model):
        if model.module.gene_likelihood == "nb":
            raise svt.NonFiniteError("kl_z", "vae", 4)
        return True

    grid = {"likelihood": ["poisson", "nb", "zinb"]}
    with monkeypatch.context() as patch:
        train_instead(patch, fail_with_nb)
        with pytest.warns(UserWarning, match=r"likelihood='nb' failed, .* kl_z became NaN"):
            table = compare(adata, grid)
    message = "NonFiniteError: kl_z became NaN or infinite in epoch 4 (stage 'vae')"
    assert list(table["state"]) == ["finished", message, "finished"]
    assert table[BOUNDS].isna().all(axis=1).tolist() == [False, True, False]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert (compare(anndata.read_h5ad(tmp_path / "cells.h5ad"), grid)["state"] == "finished").all()
    assert trained == ["poisson", "zinb", "nb"]


@pytest.mark.parametrize(
    ("grid", "options", "match"),
    [
        ({"likelihod": ["nb"]}, {}, r"no argument 'likelihod'\. Did you mean 'likelihood'"),
        ({"likelihood": ["nb"]}, {"n_latnt": 3}, r"no argument 'n_latnt'\. Did you mean 'n_latent'"),
        ({"likelihood": ["nb", "nbb"]}, {}, r"likelihood='nbb'\. `likelihood` must be one of 'poisson'"),
        ({"n_latent": [3], "mixture": ["gmm"]}, {}, r"n_latent=3, mixture='gmm'\. `mixture` must be"),
        ({"mixture": [True, "gmvae"]}, {}, r"each value once; found 'gmvae' again \(True is 'gmvae'\)"),
        ({"n_layers": [1, 2, 1]}, {}, r"each value once; found 1 again"),
        ({"n_layers": []}, {}, r"at least one value"),
        ({"n_layers": 2}, {}, r"must be a list of values; found 2\. Pass \[2\]"),
        ({"likelihood": "nb"}, {}, r"must be a list of values; found 'nb'"),
        ({}, {}, r"`grid` must be a dict"),
        (["nb"], {}, r"`grid` must be a dict"),
        ({"n_components": [5, 97]}, {}, r"number of training cells; found 97 components for 96"),
        ({"n_components": [5, 500]}, {}, r"found 500 components"),
        ({"n_hidden": [8, 0]}, {}, r"n_hidden=0\. `n_hidden` must be"),
        ({"n_hidden": [8.5]}, {}, r"`n_hidden` must be a whole number"),
        ({"n_hidden": [(8, 0)]}, {}, r"n_hidden=\(8, 0\)\. `n_hidden` must be a whole number .* for each hidden layer"),
        ({"n_hidden": [(8, 4), [8, 4]]}, {}, r"each value once; found \[8, 4\] again"),
        ({"n_hidden": ["8"]}, {}, r"`n_hidden` must be a number"),
        ({"dropout_rate": [{"all": 0.1}]}, {}, r"rates of 'hidden', 'input', 'latent', 'y'; found 'all'"),
        ({"lr": [0.1, -1]}, {}, r"lr=-1\. `lr` must be a finite number above 0"),
        ({"lr": ["fast"]}, {}, r"`lr` must be a number"),
        ({"patience": [-1]}, {}, r"`patience` must be a whole number of at least 0"),
        ({"early_stopping": ["no"]}, {}, r"`early_stopping` must be True or False"),
        ({"max_epochs": [0]}, {}, r"`max_epochs` must be"),
        ({"random_state": [None]}, {}, r"`random_state` must be a number"),
        ({"random_state": [-1]}, {}, r"`random_state` must be a whole number"),
        ({"accelerator": ["quantum"]}, {}, r"accelerator='quantum'"),
        ({"matmul_precision": ["low"]}, {}, r"`matmul_precision` must be one of"),
        ({"hold_on_device": ["no"]}, {}, r"`hold_on_device` must be one of"),
        ({"max_epochs": [5]}, {"max_epochs": 3}, r"'max_epochs' in both"),
        ({"lr": [0.1]}, {"lr": 0.1}, r"'lr' in both"),
        ({"layer": ["a"]}, {}, r"'layer' is not what models can differ by"),
        ({"train_size": [0.5]}, {}, r"'train_size' is not what models can differ by"),
        ({"validation_indices": [[0]]}, {}, r"'validation_indices' is not what models can differ by"),
        ({"y_term": ["cross-entropy"]}, {}, r"trains on labels"),
        ({"lr": [0.1]}, {"weights": "labels"}, r"trains on labels"),
        ({"batch_key": ["nope"]}, {}, r"`batch_key` must name a column"),
        ({"lr": [0.1]}, {"labels_key": "nope"}, r"`labels_key` must name a column"),
        ({"lr": [0.1]}, {"train_size": 0.9}, r"their sum must be below 1; found 0.9 and 0.1"),
        ({"lr": [0.1]}, {"train_size": 0.899, "test_size": 0.1}, r"0 for the validation"),
        ({"lr": [0.1]}, {"n_importance_samples": 0}, r"`n_importance_samples` must be"),
        ({"lr": [0.1]}, {"layer": "nope"}, r"nope"),
    ],
)
def test_what_cannot_be_trained_is_said_before_any_training(grid, options, match, monkeypatch, tmp_path):
    train_instead(monkeypatch, lambda model: pytest.fail("the training began"))
    adata = make_adata()
    fixed = {name: value for name, value in SMALL.items() if name not in grid}
    with pytest.raises(ValueError, match=match):
        svt.tl.compare(adata, grid, directory=tmp_path / "new", **(fixed | options))
    assert "scvae_compare" not in adata.uns
    assert not (tmp_path / "new").exists()


def test_a_category_that_is_not_trained_on_is_said_before_any_training(monkeypatch):
    train_instead(monkeypatch, lambda model: pytest.fail("the training began"))
    adata = make_adata()
    compare_split = np.random.default_rng(0).permutation(N_CELLS)[-12:]  # as the default seed draws the test cells
    adata.obs["batch"] = np.where(np.isin(np.arange(N_CELLS), compare_split[:3]), "rare", "common")
    with pytest.raises(ValueError, match=r"\['batch'\] \(`batch_key`\) .* two training cells; found 0 in 'rare'"):
        compare(adata, batch_key="batch")


def test_a_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match=r"`directory` must be a directory; .*taken"):
        compare(make_adata(), directory=tmp_path / "taken")


# -- traces ------------------------------------------------------------------------------------------------------------


def test_the_global_random_states_are_left_as_they_were():
    random.seed(4), np.random.seed(4), torch.manual_seed(4)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    compare(make_adata(), {"mixture": ["vade"], "n_components": [2]})
    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_one_key_is_added_and_nothing_is_kept_alive():
    adata = make_adata()
    before, n_managers = adata.copy(), len(SCVAE._setup_adata_manager_store)
    compare(adata, key_added="mine")
    assert set(adata.uns) - set(before.uns) == {"mine"}
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert (adata.X != before.X).nnz == 0
    assert (set(adata.obsm), set(adata.layers)) == (set(before.obsm), set(before.layers))
    assert len(SCVAE._setup_adata_manager_store) == n_managers


def test_estimated_counts_are_warned_of_once():
    adata = make_adata()
    adata.X = adata.X.toarray() + 0.25 * (adata.X.toarray() > 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compare(adata, allow_non_integer=True)
    assert len([warning for warning in caught if "integer" in str(warning.message)]) == 1


def test_a_grid_of_bounds_that_cannot_be_compared_is_warned_of_once_before_any_training(trained):
    adata, grid = make_adata(), {"likelihood": ["nb", "bernoulli", "poisson", "lomax"]}
    match = r"counts \('nb', 'poisson'\), probabilities of x > 0 \('bernoulli'\), densities \('lomax'\)\. Compare"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # not what the newest pandas says to anndata
        with pytest.raises(UserWarning, match=match):
            compare(adata, grid)
    assert trained == []
    with pytest.warns(UserWarning, match=match) as said:
        compare(adata, grid)
    assert sum(issubclass(warning.category, UserWarning) for warning in said) == 1
    assert trained == grid["likelihood"]


@pytest.mark.parametrize(
    "likelihoods",
    [["nb", "constrained_poisson"], ["gaussian", "log_normal"], ["bernoulli"]],
    ids=["counts", "densities", "one"],
)
def test_bounds_of_one_kind_are_compared_without_a_warning(likelihoods, trained):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # not what the newest pandas says to anndata
        compare(make_adata(), {"likelihood": likelihoods})


def test_the_bar_counts_models(capsys):
    compare(make_adata(), {"likelihood": ["nb"], "random_state": [0, 1]}, progress=True)
    assert "2/2" in capsys.readouterr().err
