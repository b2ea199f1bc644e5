"""tl.cluster_stability: Jaccard indices by sets of cells, the runs and their arguments, and what is left as it was."""

from __future__ import annotations

import functools
import random
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from trees import snapshot

import scvae_tools as svt
from scvae_tools._results.cluster_stability import jaccard_of_most_similar, means_of_runs, verdicts
from scvae_tools.model._scvae import SCVAE
from scvae_tools.tl._stability_runs import planned_runs
from scvae_tools.tl._training_of_result import TrainingOfResult, noted_beside

N_CELLS, N_GENES = 90, 12
SMALL = {"n_components": 3, "n_latent": 2, "n_hidden": 4, "max_epochs": 2, "batch_size": 64, "progress": False}
GROUP = np.arange(N_CELLS) % 3
TRAIN = "scvae_tools.tl._cluster_stability.train_to_the_end"


def make_cells(n_cells: int = N_CELLS, rate: float = 8.0) -> ad.AnnData:
    """Cells of three groups, one after the other, each with four genes of its own."""
    rng, group = np.random.default_rng(0), np.arange(n_cells) % 3
    means = np.where(np.arange(N_GENES) // 4 == group[:, None], rate, 0.3)
    adata = ad.AnnData(rng.poisson(means).astype(np.float32))
    adata.X[:, 0] += 1  # no cell without a count
    adata.obs["batch"] = pd.Categorical(np.where(np.arange(n_cells) % 2, "a", "b"))
    adata.obs["group"] = pd.Categorical(group.astype(str))
    adata.obs["age"] = rng.normal(size=n_cells)
    adata.var["kept"] = np.arange(N_GENES) != 5
    return adata


@pytest.fixture(scope="module")
def _trained():
    adata = make_cells()
    svt.tl.scvae(adata, **SMALL, batch_key="batch", write_lambda=False)
    return adata


@pytest.fixture
def adata(_trained):
    """Result whose clusters are the groups, whatever was trained."""
    copy = _trained.copy()
    copy.obs["scvae"] = copy.obs["group"].copy()
    return copy


@pytest.fixture
def runs(monkeypatch):
    """Runs that train nothing, and find the groups: the model and the arguments of the training of each."""
    seen, own = [], SCVAE.predict

    def train(model, bar, what, **options):
        seen.append((model, options))

    def predict(model, *args, **kwargs):
        is_run = any(model is each for each, _ in seen)
        return GROUP[model.adata.obs_names.astype(int)].astype(str) if is_run else own(model, *args, **kwargs)

    monkeypatch.setattr(TRAIN, train)
    monkeypatch.setattr(SCVAE, "predict", predict)
    return seen


def stability(adata, **options):
    return svt.tl.cluster_stability(adata, **{"progress": False} | options)


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_jaccard_indices_are_those_of_sets_of_cells(seed):
    rng = np.random.default_rng(seed)
    clusters, others = rng.integers(-1, 5, 200), rng.integers(0, 7, 200)
    clusters[clusters == 3] = 2  # a cluster without cells
    counted = {cell for cell in range(200) if clusters[cell] >= 0}
    of_others = [{cell for cell in counted if others[cell] == code} for code in range(7)]
    found = jaccard_of_most_similar(clusters, others, 5)
    for code in range(5):
        own = {cell for cell in counted if clusters[cell] == code}
        expected = max(len(own & other) / len(own | other) for other in of_others) if own else np.nan
        np.testing.assert_allclose(found[code], expected)


def test_without_a_cell_that_is_counted_nothing_is_known():
    assert np.isnan(jaccard_of_most_similar(np.full(4, -1), np.zeros(4, dtype=int), 2)).all()


def test_means_leave_out_what_is_missing_and_verdicts_are_by_the_lower_one():
    values = np.array([[1.0, np.nan], [0.4, 0.6], [np.nan, np.nan]])
    means = means_of_runs(values)
    np.testing.assert_array_equal(means, [1.0, 0.5, np.nan])
    assert verdicts(means, np.array([0.75, 0.9, np.nan])) == ["stable", "dissolved", "unknown"]
    assert verdicts(np.array([0.7499, 0.5001]), np.array([np.nan, 1])) == ["uncertain", "uncertain"]
    assert verdicts(means_of_runs(np.empty((2, 0))), np.array([0.8, 0.1])) == ["stable", "dissolved"]


def test_the_table_has_the_means_and_uns_all_values(adata, runs):
    adata.obs["scvae"] = pd.Categorical(np.where(np.arange(N_CELLS) < 9, "2", GROUP.astype(str)))
    table = stability(adata, n_seeds=2, n_halves=3)
    stored = adata.uns["scvae"]["stability"]
    pd.testing.assert_frame_equal(table, stored["table"])
    assert stored["jaccard"].shape == (3, 5)
    np.testing.assert_allclose(table["jaccard_seeds"], stored["jaccard"][:, :2].mean(1))
    np.testing.assert_allclose(table["jaccard_halves"], stored["jaccard"][:, 2:].mean(1))
    assert table["n_cells"].tolist() == adata.obs["scvae"].value_counts(sort=False).tolist() == [27, 27, 36]
    np.testing.assert_allclose(table["jaccard_seeds"], [27 / 30, 27 / 30, 30 / 36])
    assert stored["runs"]["kind"].tolist() == ["seed", "seed", "half", "half", "half"]
    assert stored["runs"]["pair"].tolist() == [-1, -1, 0, 0, 1]
    assert stored["runs"]["n_cells"].tolist() == [90, 90, 45, 45, 45]
    assert stored["runs"]["n_clusters"].tolist() == [3] * 5
    np.testing.assert_allclose(stored["runs"]["ari"].iloc[0], svt.metrics.ari(adata.obs["scvae"], adata.obs["group"]))
    for place, (model, _) in enumerate(runs):
        cells = set(model.adata.obs_names)
        own = {name for name in cells if adata.obs["scvae"][name] == "2"}
        found = [{name for name in cells if GROUP[int(name)] == each} for each in range(3)]
        expected = max(len(own & each) / len(own | each) for each in found)
        assert stored["jaccard"][2, place] == pytest.approx(expected)


def test_a_population_cut_at_random_is_said_to_be_dissolved(adata, runs):
    cut = np.where(GROUP == 1, np.random.default_rng(0).permutation(N_CELLS) % 2 + 10, GROUP)
    adata.obs["scvae"] = pd.Categorical(cut.astype(str))
    with pytest.warns(UserWarning, match=r"of 4 clusters dissolve .*'1[01]' \(0\.\d\d over seeds, 0\.\d\d over"):
        table = stability(adata)
    assert "dissolved" in table["verdict"][["10", "11"]].tolist()
    assert table["verdict"][["0", "2"]].tolist() == ["stable", "stable"]
    np.testing.assert_array_equal(table.loc[["0", "2"], ["jaccard_seeds", "jaccard_halves"]], 1)


def test_trained_models_find_separate_groups_and_no_random_cut():
    adata = make_cells(240, rate=30.0)
    svt.tl.scvae(adata, **SMALL | {"max_epochs": 40, "batch_size": 32, "n_hidden": 16}, lr=1e-2, write_lambda=False)
    group = np.arange(240) % 3
    adata.obs["scvae"] = pd.Categorical(np.where(group == 2, np.arange(240) // 3 % 2 + 2, group).astype(str))
    with pytest.warns(UserWarning, match="2 of 4 clusters dissolve"):
        table = stability(adata, n_seeds=1, n_halves=2)
    assert (table.loc[["0", "1"], ["jaccard_seeds", "jaccard_halves"]] > 0.9).all(axis=None)
    assert table["verdict"].tolist() == ["stable", "stable", "dissolved", "dissolved"]


def test_cells_without_a_cluster_are_trained_on_and_not_counted(adata, runs):
    adata.obs["scvae"] = adata.obs["scvae"].mask(np.arange(N_CELLS) < 30)
    table = stability(adata, n_seeds=1, n_halves=0)
    assert table["n_cells"].tolist() == [20, 20, 20]
    assert table["jaccard_seeds"].tolist() == [1, 1, 1]
    assert table["jaccard_halves"].isna().all()
    assert runs[0][0].adata.n_obs == N_CELLS


def test_a_single_cluster_comes_back(adata, runs, caplog):
    adata.obs["scvae"] = pd.Categorical(["all"] * N_CELLS)
    with caplog.at_level("INFO", logger="scvae_tools"), pytest.warns(UserWarning, match="1 of 1 clusters dissolve"):
        table = stability(adata, n_seeds=1, n_halves=0)
    assert table["jaccard_seeds"].tolist() == [pytest.approx(1 / 3)]
    assert "There is one cluster" in caplog.text


# -- runs --------------------------------------------------------------------------------------------------------------


def test_halves_share_no_cell_and_more_runs_begin_with_the_same_ones():
    few, many = planned_runs(21, 2, 3, 5, 0), planned_runs(21, 4, 6, 5, 0)
    assert [run.random_state for run in few[:2]] == [run.random_state for run in many[:2]]
    assert len({run.random_state for run in many}) == 10
    for one, other in zip(few[2:], many[4:], strict=False):
        np.testing.assert_array_equal(one.positions, other.positions)
        assert (one.name, one.pair, one.random_state) == (other.name, other.pair, other.random_state)
    for pair in range(3):
        first, second = (run.positions for run in many if run.pair == pair)
        assert sorted([*first, *second]) == list(range(21))


def test_runs_have_the_arguments_of_the_result_and_other_seeds(adata, runs):
    params = adata.uns["scvae"]["params"]
    params |= {"lr": 0.01, "validation_indices": [0, 1, -1]} | noted_beside(
        (2, 4), {"gradient_clip": None}, n_genes=N_GENES, allow_non_integer=False
    )
    params |= {"given_as_none": ["gradient_clip"], "continuous_covariate_keys": ["age"]}
    adata.uns["scvae"]["components"]["curve"] = pd.DataFrame({"n_components": [3]})
    stability(adata, n_seeds=1, n_halves=2)
    seeds = [options["random_state"] for _, options in runs]
    assert len({0, *seeds}) == 4
    for model, options in runs:
        given = model.init_params_["non_kwargs"]
        assert (given["n_components"], given["n_hidden"], given["n_latent"]) == ((2, 4), 4, 2)
        assert given["random_state"] == options["random_state"]
        assert model.registry["setup_args"]["batch_key"] == "batch"
        assert model.registry["setup_args"]["continuous_covariate_keys"] == ["age"]
        assert (options["lr"], options["gradient_clip"], options["max_epochs"]) == (0.01, None, 2)
        held_out = set(model.adata.obs_names[options["validation_indices"]])
        assert held_out == {"0", "1", "89"} & set(model.adata.obs_names)


def test_params_of_a_call_tell_all_that_a_run_needs(tmp_path):
    adata = make_cells()
    adata.layers["counts"] = adata.X + 0.5
    adata.X = None
    options = SMALL | {"max_epochs": 1, "n_components": (2, 3), "layer": "counts", "mask_var": "kept"}
    unusual = {"gradient_clip": None, "allow_non_integer": True, "dropout_rate": {"input": 0.1}, "write_lambda": False}
    with pytest.warns(UserWarning, match="non-integer"):
        svt.tl.scvae(adata, **options, **unusual)
    adata.write_h5ad(tmp_path / "a.h5ad")
    training = TrainingOfResult.read(ad.read_h5ad(tmp_path / "a.h5ad"), "scvae")
    assert training == TrainingOfResult.read(adata, "scvae")
    assert training.of_model["n_components"] == (2, 3)
    assert training.of_model["dropout_rate"] == {"input": 0.1}
    assert training.of_training["gradient_clip"] is None
    assert (training.layer, training.mask_var, training.n_genes) == ("counts", "kept", 11)
    assert training.allow_non_integer


def test_genes_of_an_array_are_those_of_the_model_or_are_to_be_given(runs, tmp_path):
    adata = make_cells()
    kept = adata.var["kept"].to_numpy()
    svt.tl.scvae(adata, **SMALL | {"max_epochs": 1}, mask_var=kept, write_lambda=False)
    stability(adata, n_seeds=1, n_halves=0)
    adata.write_h5ad(tmp_path / "a.h5ad")
    read = ad.read_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match=r"`mask_var` must choose the 11 genes .*; found 12"):
        stability(read)
    stability(read, n_seeds=1, n_halves=0, mask_var=kept)
    assert all(model.adata.var_names.equals(adata.var_names[kept]) for model, _ in runs)
    assert len(runs) == 2


def test_the_same_seed_gives_the_same_table_also_from_a_file(adata, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    other = ad.read_h5ad(tmp_path / "a.h5ad")
    states = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    for each in (adata, other):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # two epochs find nothing that is stable
            stability(each, n_seeds=1, n_halves=1, random_state=3)
    assert states[0] == random.getstate()
    np.testing.assert_array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    one, two = (each.uns["scvae"]["stability"] for each in (adata, other))
    np.testing.assert_array_equal(one["jaccard"], two["jaccard"])
    pd.testing.assert_frame_equal(one["runs"], two["runs"])
    assert one["params"] == {"n_seeds": 1, "n_halves": 1, "random_state": 3}


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_results_survive_a_file(adata, runs, kind, tmp_path):
    stability(adata, n_seeds=1, n_halves=2)
    path = tmp_path / f"a.{kind}"
    getattr(adata, f"write_{kind}")(path)
    read = getattr(ad, f"read_{kind}")(path).uns["scvae"]["stability"]
    stored = adata.uns["scvae"]["stability"]
    for name in ("table", "runs"):
        pd.testing.assert_frame_equal(read[name].astype(stored[name].dtypes), stored[name], check_index_type=False)
    np.testing.assert_array_equal(read["jaccard"], stored["jaccard"])
    assert {name: int(value) for name, value in read["params"].items()} == stored["params"]


def test_the_rest_of_the_result_is_kept_and_a_new_result_has_no_stability(adata, runs):
    before = dict(adata.uns["scvae"])
    stability(adata, n_seeds=1, n_halves=0)
    after = adata.uns["scvae"]
    assert set(after) == {*before, "stability"}
    assert all(after[name] is before[name] for name in before)


def test_a_view_becomes_an_anndata_of_its_own(adata, runs):
    view = adata[:80]
    table = stability(view, n_seeds=1, n_halves=0)
    assert not view.is_view
    assert table["n_cells"].sum() == 80
    assert "stability" in view.uns["scvae"]
    assert "stability" not in adata.uns["scvae"]


def test_a_backed_anndata_is_read_in_parts_and_its_view_refused(adata, runs, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    assert stability(backed, n_seeds=1, n_halves=0)["jaccard_seeds"].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="found a view of a backed AnnData"):
        stability(backed[:50])


def test_labels_that_train_components_are_warned_of(runs):
    adata = make_cells()
    svt.tl.scvae(adata, **SMALL | {"max_epochs": 1}, labels_key="group")
    with pytest.warns(UserWarning, match=r"labels in adata.obs\['group'\] train the components"):
        stability(adata, n_seeds=1, n_halves=0)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("full")], ids=["Ctrl-C", "error"])
def test_adata_is_as_it_was_after_an_error(adata, runs, error, monkeypatch):
    calls = []

    def train(model, bar, what, **options):
        calls.append(what)
        runs.append((model, options))
        if len(calls) == 2:
            raise error

    monkeypatch.setattr(TRAIN, train)
    before = snapshot(adata)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        stability(adata)
    assert calls == ["seed 1", "seed 2"]
    assert snapshot(adata) == before


def test_an_interrupted_training_ends_the_call(adata, monkeypatch):
    @functools.wraps(SCVAE.train)
    def train(model, *args, **options):
        model._state.is_interrupted = True

    monkeypatch.setattr(SCVAE, "train", train)
    before = snapshot(adata)
    with pytest.raises(KeyboardInterrupt):
        stability(adata)
    assert snapshot(adata) == before


def _without(name):
    def change(adata):
        del adata.uns[name]

    return change


def _params(**params):
    return lambda adata: adata.uns["scvae"]["params"].update(params)


def _one_cell_batch(adata):
    adata.obs["batch"] = pd.Categorical(["a"] * (N_CELLS - 3) + ["b", "c", "c"])
    adata.obs.loc["0", "batch"] = "b"


REFUSED = {
    "no result": (_without("scvae"), {}, r"must hold a result of svt.tl.scvae, .*; found none in adata"),
    "other key": (lambda adata: None, {"key": "mine"}, r"found results under 'scvae'\. .* or pass key='scvae'"),
    "of predict": (lambda adata: adata.uns["scvae"]["params"].pop("n_genes"), {}, "as svt.tl.predict and earlier"),
    "plain VAE": (_params(mixture=False), {}, "found a result with mixture=False .* mixture=True"),
    "no column": (lambda adata: adata.obs.pop("scvae"), {}, "`key` must name a column of adata.obs; found 'scvae'"),
    "no runs": (lambda adata: None, {"n_seeds": 0, "n_halves": 0}, "must be at least 1; found 0 for both"),
    "tiny halves": (_params(n_components=50), {}, "found 40 training cells among the 45 of a half, for 50 components"),
    "rare batch": (_one_cell_batch, {}, r"half \d is not: .*at least two cells in every batch.*n_halves=0"),
    "column gone": (lambda adata: adata.obs.pop("batch"), {}, r"`batch_key` must name a column.*found 'batch'"),
    "fewer genes": (lambda adata: adata._inplace_subset_var(np.arange(9)), {}, "the 12 genes .*; found 9"),
    "no device": (lambda adata: None, {"accelerator": "abacus"}, "`accelerator` must be one of .*; found 'abacus'"),
    "no counts": (lambda adata: adata.X.__iadd__(0.5), {}, "must hold integer counts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_any_training_and_changes_nothing(adata, runs, case):
    change, options, message = REFUSED[case]
    change(adata)
    before = snapshot(adata)
    with pytest.raises(ValueError, match=message):
        stability(adata, **options)
    assert runs == []
    assert snapshot(adata) == before


def test_a_column_without_clusters_is_refused(adata, runs):
    adata.obs["scvae"] = pd.Categorical([None] * N_CELLS, categories=["0"])
    with pytest.raises(ValueError, match="must hold the cluster of some cells; found none in 90"):
        stability(adata)


def test_progress_is_one_bar(adata, runs, capsys):
    svt.tl.cluster_stability(adata, n_seeds=1, n_halves=2, progress=True)
    shown = capsys.readouterr().err
    assert "cluster stability: 100%" in shown
    assert "3/3" in shown
