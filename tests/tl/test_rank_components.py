"""Markers and tree of the components: numbers known in closed form, by integration, by simulation; scanpy reads them.

The decoder of most tests is set by hand, so that log ρ = G z + c: fold changes of two Gaussian components are Gaussian.
The counts know nothing of it, and p-values are tested where they are taken, and on a model that was trained.
"""

from __future__ import annotations

import random

import anndata
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from anndata import AnnData
from independent import N_ERRORS
from scipy import integrate, stats
from scipy.cluster import hierarchy

import scvae_tools as svt
from scvae_tools._module import memory
from scvae_tools._module.gaussian_mixture import COVARIANCES, GaussianMixture
from scvae_tools.model._fold_changes import FoldChanges
from scvae_tools.model._scvae import SCVAE
from scvae_tools.tl import _rank_components as _rank
from scvae_tools.tl._dendrogram import bhattacharyya, dendrogram
from scvae_tools.tl._rank_components import rank_components, s_values

mpl.use("Agg")

N_GENES, N_LATENT, K = 12, 2, 3
N_CELLS = 60
OFFSET = 20.0  #: keeps the hidden units of the linear decoder above 0
SCALE = np.random.default_rng(0).normal(size=(N_GENES, N_LATENT))  #: G
WEIGHTS = np.array([0.5, 0.3, 0.2])
MEANS = np.array([[0.0, 1.0], [1.5, -0.5], [-1.0, 0.3]])
COVARIANCES_SET = np.array([[[0.5, 0.2], [0.2, 0.4]], [[0.3, 0.0], [0.0, 1.0]], [[0.8, -0.3], [-0.3, 0.6]]])
FIELDS = ["names", "scores", "logfoldchanges", "pvals", "pvals_adj"]
OF_DECODER = ["scores", "logfoldchanges", "false_sign_rates", "s_values"]


def make_adata() -> AnnData:
    rng = np.random.default_rng(1)
    adata = AnnData(rng.poisson(3.0, (N_CELLS, N_GENES)).astype(np.float32))
    adata.var_names = [f"gene{i}" for i in range(N_GENES)]
    adata.obs["batch"] = pd.Categorical(np.where(np.arange(N_CELLS) % 4 == 0, "b", "a"))
    adata.obs["sex"] = pd.Categorical(rng.choice(["f", "m"], N_CELLS))
    adata.obs["age"] = rng.normal(size=N_CELLS)
    adata.obs["scvae"] = pd.Categorical(np.arange(N_CELLS) % K, categories=range(K)).rename_categories(str)
    return adata


def set_mixture(model: SCVAE, weights=WEIGHTS, means=MEANS, covariances=COVARIANCES_SET) -> None:
    model.module.mixture.set(*(torch.tensor(value, dtype=torch.float32) for value in (weights, means, covariances)))
    model.module.mixture_is_set.fill_(True)
    model.module.is_mixture = model.is_trained_ = True


def make_model(adata: AnnData, *, n_hidden: int = N_LATENT, covariance: str = "full", **keys: object) -> SCVAE:
    """Log λ over the size factor is SCALE z + c; covariates have no effect."""
    SCVAE.setup_anndata(adata, **keys)
    options = {"n_components": K, "n_latent": N_LATENT, "n_hidden": n_hidden, "normalization": "none"}
    model = SCVAE(adata, mixture="vade", covariance=covariance, **options)
    set_mixture(model)
    first, head = model.module.decoder.px_decoder.fc_layers[0][0], model.module.decoder.heads["log_rate"]
    with torch.no_grad():
        first.weight.zero_()
        first.weight[:N_LATENT, :N_LATENT] = torch.eye(N_LATENT)
        first.bias.fill_(OFFSET)
        head.weight.zero_()
        head.weight[:, :N_LATENT] = torch.tensor(SCALE)
        head.bias -= OFFSET * head.weight.sum(1)
    return model


def ranked(adata: AnnData, model: SCVAE, **options: object) -> pd.DataFrame:
    """All results of the decoder, by group and gene in the order of the data."""
    rank_components(adata, model, **options)
    key = options.get("key_added", "rank_components")
    result, tables = adata.uns[key], {}
    for group in result["names"].dtype.names:
        columns = {name: result[name][group].astype(float) for name in OF_DECODER}
        table = pd.DataFrame(columns, index=result["names"][group])
        tables[group] = table.reindex(adata.var_names).dropna(how="all")
    return pd.concat(tables)


def pair(y: int, other: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the log fold changes of two components, (n_genes,)."""
    covariance = COVARIANCES_SET[y] + COVARIANCES_SET[other]
    return SCALE @ (MEANS[y] - MEANS[other]), np.sqrt(np.einsum("gi,ij,gj->g", SCALE, covariance, SCALE))


def snapshot(adata: AnnData) -> tuple:
    return set(adata.uns), set(adata.obs), set(adata.obsm), set(adata.layers), adata.X.tobytes()


@pytest.fixture
def adata():
    return make_adata()


@pytest.fixture
def model(adata):
    return make_model(adata.copy())


@pytest.fixture(scope="module")
def trained():
    """Simulated cells of three types, with one gene in five left out, and their model."""
    options = {"separation": 2.0, "share_changed": 0.3, "n_batches": 2, "median_counts": 1500, "random_state": 3}
    adata = svt.datasets.simulate(400, 40, 3, **options)
    adata.var["kept"] = np.arange(40) % 5 != 0
    options = {"n_components": 3, "n_latent": 4, "n_hidden": 32, "max_epochs": 60, "batch_size": 32, "lr": 5e-3}
    model = svt.tl.scvae(
        adata, **options, batch_key="batch", mask_var="kept", progress=False, return_model=True, write_lambda=False
    )
    rank_components(adata, model)
    dendrogram(adata, model)
    return adata, model


# -- fold changes ------------------------------------------------------------------------------------------------------


def test_fold_changes_against_one_component_are_those_of_two_gaussians(adata, model):
    n = 20_000
    found = ranked(adata, model, reference="1", n_samples=n, random_state=1)
    assert set(found.index.get_level_values(0)) == {"0", "2"}
    for y in (0, 2):
        table, (mean, deviation) = found.loc[str(y)], pair(y, 1)
        error = deviation / np.sqrt(n)
        assert (np.abs(table["logfoldchanges"] * np.log(2) - mean) < N_ERRORS * error).all()
        # Var(mean / sd) of a normal is (1 + score² / 2) / n.
        score = mean / deviation
        assert (np.abs(table["scores"] - score) < N_ERRORS * np.sqrt((1 + score**2 / 2) / n)).all()
        rate = stats.norm.cdf(-np.abs(score))
        assert (np.abs(table["false_sign_rates"] - rate) < N_ERRORS * np.sqrt(rate * (1 - rate) / n)).all()


def test_the_rest_is_the_mixture_of_the_other_components_by_their_weights(adata, model):
    n = 20_000
    found = ranked(adata, model, n_samples=n)
    for y in range(K):
        others = [other for other in range(K) if other != y]
        weight = WEIGHTS[others] / WEIGHTS[others].sum()
        mean, deviation = np.swapaxes([pair(y, other) for other in others], 0, 1)  # (2, n_genes) each
        total = weight @ mean
        spread = np.sqrt(weight @ (deviation**2 + (mean - total) ** 2))
        rate = weight @ stats.norm.cdf(-np.sign(total) * mean / deviation)
        table = found.loc[str(y)]
        np.testing.assert_allclose(table["logfoldchanges"] * np.log(2), total, atol=N_ERRORS * spread.max() / n**0.5)
        np.testing.assert_allclose(table["scores"], total / spread, atol=N_ERRORS * 1.5 / n**0.5)
        np.testing.assert_allclose(table["false_sign_rates"], rate, atol=N_ERRORS * 0.5 / n**0.5)


def test_a_component_without_cells_is_neither_ranked_nor_part_of_the_rest(adata, model):
    adata.obs["scvae"] = pd.Categorical(np.arange(N_CELLS) % 2, categories=range(K)).rename_categories(str)
    rest = ranked(adata, model)
    assert set(rest.index.get_level_values(0)) == {"0", "1"}
    alone = ranked(adata, model, reference="1")
    pd.testing.assert_frame_equal(rest.loc["0"], alone.loc["0"], rtol=1e-5)


def test_genes_are_ranked_by_score_and_n_genes_keeps_the_first(adata, model):
    whole = ranked(adata, model)
    rank_components(adata, model, n_genes=4, key_added="short")
    for group in adata.uns["short"]["names"].dtype.names:
        order = whole.loc[group].sort_values("scores", ascending=False)
        short = sc.get.rank_genes_groups_df(adata, group=group, key="short").set_index("names")
        assert short.index.tolist() == order.index[:4].tolist()
        # s-values and adjusted p-values of all genes, whatever is kept
        np.testing.assert_array_equal(adata.uns["short"]["s_values"][group], order["s_values"][:4])
        full = sc.get.rank_genes_groups_df(adata, group=group, key="rank_components").set_index("names")
        pd.testing.assert_frame_equal(short, full[:4])


def test_a_gene_that_nothing_changes_has_score_0_and_no_certain_sign(adata, model):
    with torch.no_grad():
        model.module.decoder.heads["log_rate"].weight[5] = 0
    found = ranked(adata, model).xs("gene5", level=1)
    assert (found["scores"] == 0).all()
    assert (found["logfoldchanges"] == 0).all()
    assert (found["false_sign_rates"] == 1).all()


def test_s_values_are_the_mean_rate_of_all_genes_that_are_no_worse():
    rates = np.random.default_rng(0).integers(0, 8, (3, 40)) / 8  # with ties
    expected = [[row[row <= rate].mean() for rate in row] for row in rates]
    np.testing.assert_allclose(s_values(rates), expected, rtol=1e-12)


def test_the_result_does_not_depend_on_how_many_genes_are_decoded_at_a_time(adata, model, monkeypatch):
    whole = ranked(adata, model)
    monkeypatch.setattr(memory, "CHUNK_BYTES", 100_000)
    pd.testing.assert_frame_equal(ranked(adata, model), whole, rtol=1e-4, atol=1e-5)


def test_each_component_and_each_cell_is_decoded_once(adata, model, monkeypatch):
    shapes, decode = [], type(model.module).decode

    def noted(self, *args, **kwargs):
        px = decode(self, *args, **kwargs)
        shapes.append(tuple(px.batch_shape))
        return px

    monkeypatch.setattr(type(model.module), "decode", noted)
    rank_components(adata, model, n_samples=50)
    assert shapes == [(N_CELLS, N_GENES), (K, 50, N_GENES)]


def test_a_trained_model_finds_the_genes_that_the_simulation_changed(trained):
    adata, model = trained
    truth = adata.varm["component_log_mean"] / np.log(2)
    share = adata.obs["component"].value_counts(normalize=True)
    majority = pd.crosstab(adata.obs["scvae"], adata.obs["component"]).idxmax(axis=1)
    assert majority.nunique() == 3
    names = model.var_names
    for component, label in majority.items():
        others = [other for other in share.index if other != label]
        weight = share[others] / share[others].sum()
        expected = pd.Series(truth[:, int(label)] - truth[:, list(map(int, others))] @ weight, adata.var_names)[names]
        found = sc.get.rank_genes_groups_df(adata, group=component, key="rank_components").set_index("names")
        assert set(found.index) == set(names)
        assert np.corrcoef(found["logfoldchanges"][names], expected)[0, 1] > 0.9
        assert expected[found.index[:3]].min() > 0.5
        sure = found[found["pvals_adj"] < 0.05]
        assert len(sure) > 3
        assert (np.sign(sure["logfoldchanges"]) == np.sign(expected[sure.index])).mean() > 0.9


# -- p-values ----------------------------------------------------------------------------------------------------------


def p_values(adata, model, **options):
    rank_components(adata, model, key_added="tested", **options)
    tables = {g: sc.get.rank_genes_groups_df(adata, group=g, key="tested").set_index("names") for g in ("0", "1", "2")}
    return pd.concat(tables).sort_index()


def test_genes_without_a_difference_are_hardly_ever_called(trained):
    adata, model = trained
    log_mean = adata.varm["component_log_mean"]
    label = pd.crosstab(adata.obs["scvae"], adata.obs["component"]).idxmax(axis=1)
    found = p_values(adata, model, delta=0.5)
    share = adata.obs["component"].value_counts(normalize=True)
    n_called = n_wrong = 0
    for component, own in label.items():
        others = share.drop(own) / share.drop(own).sum()
        truth = log_mean[:, int(own)] - log_mean[:, [int(each) for each in others.index]] @ others.to_numpy()
        table = found.loc[component]
        called = table.index[table["pvals_adj"] < 0.05]
        change = pd.Series(truth / np.log(2), adata.var_names)[called]
        n_called += len(called)
        n_wrong += int(((change.abs() < 0.5) | (np.sign(change) != np.sign(table["logfoldchanges"][called]))).sum())
    assert n_called > 15
    assert n_wrong <= 0.1 * n_called


def test_a_larger_delta_calls_fewer_genes(trained):
    numbers = [p_values(*trained, delta=delta)["pvals"] for delta in (0.0, 0.25, 1.0)]
    assert (numbers[0] <= numbers[1] + 1e-12).all()
    assert (numbers[1] <= numbers[2] + 1e-12).all()
    assert (numbers[1] < numbers[2]).mean() > 0.5
    assert trained[0].uns["tested"]["params"]["delta"] == 1.0


def test_a_gene_whose_counts_say_the_opposite_is_not_called():
    counts = FoldChanges(mean=np.array([[2.0, -2.0, 0.5]]), standard_error=np.array([[0.5, 0.5, 0.5]]))
    found = _rank._p_values(counts, np.array([[1.0, 1.0, 3.0]]), delta=0.0)["pvals"]
    np.testing.assert_allclose(found, [[2 * stats.norm.sf(4), 1.0, 2 * stats.norm.sf(1)]])


def test_p_values_are_nan_with_a_warning_where_there_are_no_counts(trained):
    adata, model = trained
    expected = p_values(adata, model)
    private = adata.copy()
    sc.pp.log1p(private)
    pd.testing.assert_frame_equal(p_values(private, model), expected)  # the model has the counts
    private.obs_names = [f"other{i}" for i in range(private.n_obs)]
    with pytest.warns(UserWarning, match="p-values need the counts of the cells, and are NaN"):
        found = p_values(private, model)
    assert found[["pvals", "pvals_adj"]].isna().all().all()
    pd.testing.assert_frame_equal(found[["scores", "logfoldchanges"]], expected[["scores", "logfoldchanges"]])
    private.layers["counts"] = adata.X
    pd.testing.assert_frame_equal(p_values(private, model, layer="counts"), expected)
    with pytest.raises(ValueError, match="layers"):
        p_values(private, model, layer="cuonts")


# -- batches and covariates --------------------------------------------------------------------------------------------


def test_what_batch_and_covariates_add_to_all_components_cancels():
    adata = make_adata()
    keys = {"batch_key": "batch", "categorical_covariate_keys": ["sex"], "continuous_covariate_keys": ["age"]}
    model = make_model(adata, **keys)
    without = ranked(adata, model)
    weight = model.module.decoder.px_decoder.fc_layers[0][0].weight
    with torch.no_grad():
        weight[:, N_LATENT:] = torch.tensor(np.random.default_rng(0).normal(size=(N_LATENT, weight.shape[1] - 2)))
    pd.testing.assert_frame_equal(ranked(adata, model), without, rtol=1e-3, atol=1e-4)


def test_a_fold_change_in_one_batch_counts_by_the_share_of_its_cells():
    adata = make_adata()  # a quarter of the cells is of batch b
    model = make_model(adata, n_hidden=3, batch_key="batch")
    set_mixture(model, covariances=np.tile(1e-10 * np.eye(N_LATENT), (K, 1, 1)))
    first, head = model.module.decoder.px_decoder.fc_layers[0][0], model.module.decoder.heads["log_rate"]
    with torch.no_grad():
        first.weight[2] = torch.tensor([1.0, 0.0, -2 * OFFSET, 0.0])  # z_0 in batch b, nothing in batch a
        head.weight[4] = torch.tensor([0.0, 0.0, 2.0])
    found = ranked(adata, model, reference="2", n_samples=40).xs("gene4", level=1)
    each = 2 * (MEANS[:2, 0] - MEANS[2, 0])
    np.testing.assert_allclose(found["logfoldchanges"] * np.log(2), each / 4, rtol=1e-3)
    np.testing.assert_allclose(found["scores"], 0.25 / np.sqrt(0.25 * 0.75), rtol=1e-3)  # of a Bernoulli variable
    np.testing.assert_allclose(found["false_sign_rates"], 0.75, atol=0.01)


def test_a_model_without_data_or_with_minified_data_ranks_as_before(tmp_path):
    adata = make_adata()
    model = make_model(adata.copy(), batch_key="batch", continuous_covariate_keys=["age"])
    before = ranked(adata, model)
    model.save(tmp_path / "model")
    loaded = SCVAE.load(tmp_path / "model")
    assert loaded.adata is None
    pd.testing.assert_frame_equal(ranked(adata, loaded), before, rtol=1e-3, atol=1e-4)
    model.minify_adata()
    with pytest.warns(UserWarning, match=r"p-values need the counts .* are minified"):
        pd.testing.assert_frame_equal(ranked(adata, model), before, rtol=1e-3, atol=1e-4)


# -- randomness --------------------------------------------------------------------------------------------------------


def test_a_seed_repeats_the_result_and_another_gives_another(adata, model):
    first, second, other = (ranked(adata, model, random_state=seed) for seed in (4, 4, 5))
    pd.testing.assert_frame_equal(first, second)
    assert (first["scores"] != other["scores"]).any()


def test_global_random_states_are_neither_read_nor_changed(adata, model):
    first = ranked(adata, model)
    random.seed(9), np.random.seed(9), torch.manual_seed(9)  # noqa: NPY002
    states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()  # noqa: NPY002
    second = ranked(adata, model)
    dendrogram(adata, model)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tobytes() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    pd.testing.assert_frame_equal(first, second)


# -- scanpy and files --------------------------------------------------------------------------------------------------


def test_the_result_has_the_layout_of_scanpy(trained):
    adata = trained[0].copy()
    sc.pp.log1p(adata)
    sc.tl.rank_genes_groups(adata, "component", method="t-test")
    ours, theirs = adata.uns["rank_components"], adata.uns["rank_genes_groups"]
    assert set(theirs) <= set(ours)
    assert set(theirs["params"]) <= set(ours["params"])
    for field in FIELDS:
        assert type(ours[field]) is type(theirs[field])
        assert ours[field].dtype == theirs[field].dtype


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("from_file", [False, True], ids=["in memory", "from a file"])
def test_scanpy_draws_markers_and_tree(trained, tmp_path, from_file):
    import matplotlib.pyplot as plt

    adata, model = trained
    if from_file:
        adata.write_h5ad(tmp_path / "a.h5ad")
        adata = anndata.read_h5ad(tmp_path / "a.h5ad")
    key = {"key": "rank_components", "show": False}
    panels = sc.pl.rank_genes_groups(adata, **key)
    assert [panel.get_title() for panel in panels] == ["0 vs. rest", "1 vs. rest", "2 vs. rest"]
    assert "mainplot_ax" in sc.pl.rank_genes_groups_dotplot(adata, n_genes=2, **key)
    ranked_genes = adata[:, model.var_names].copy()
    for values in ("logfoldchanges", "pvals_adj"):
        sc.pl.rank_genes_groups_matrixplot(ranked_genes, n_genes=2, values_to_plot=values, **key)
    drawn = sc.pl.dendrogram(adata, "scvae", show=False)
    assert sorted(tick.get_text() for tick in drawn.get_xticklabels()) == ["0", "1", "2"]
    axes = sc.pl.dotplot(adata, model.var_names[:2], "scvae", dendrogram=True, show=False)
    labels = [tick.get_text() for tick in axes["mainplot_ax"].get_yticklabels()]
    assert labels == list(adata.uns["dendrogram_scvae"]["categories_ordered"])
    plt.close("all")


def test_results_survive_a_file(trained, tmp_path):
    adata, _ = trained
    adata.write_h5ad(tmp_path / "a.h5ad")
    read = anndata.read_h5ad(tmp_path / "a.h5ad")
    before, after = (sc.get.rank_genes_groups_df(each, group=None, key="rank_components") for each in (adata, read))
    pd.testing.assert_frame_equal(before, after)
    for name in ("linkage", "correlation_matrix", "categories_ordered", "categories_idx_ordered"):
        np.testing.assert_array_equal(read.uns["dendrogram_scvae"][name], adata.uns["dendrogram_scvae"][name])


def test_names_of_clustering_and_results_are_free(adata, model):
    adata.obs["mine"] = adata.obs.pop("scvae")
    rank_components(adata, model, key="mine", key_added="markers")
    dendrogram(adata, model, key="mine")
    dendrogram(adata, model, key="mine", key_added="tree")
    assert set(adata.uns) == {"markers", "dendrogram_mine", "tree"}
    assert adata.uns["markers"]["params"]["groupby"] == "mine"
    assert adata.uns["tree"]["groupby"] == ["mine"]


@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")  # what newer pandas says to anndata
def test_a_view_becomes_a_copy_and_its_parent_stays(adata, model):
    before = snapshot(adata)
    view = adata[:50]
    rank_components(view, model)
    dendrogram(view, model)
    assert not view.is_view
    assert {"rank_components", "dendrogram_scvae"} <= set(view.uns)
    assert snapshot(adata) == before


# -- the tree ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("d", [1, 2])
def test_bhattacharyya_coefficients_are_integrals(d, covariance):
    mixture = GaussianMixture(K, d, covariance=covariance, weights="learned")
    rng = np.random.default_rng(d)
    root = rng.normal(size=(K, d, d))
    covariances = root @ root.swapaxes(1, 2) + 0.3 * np.eye(d)
    values = [WEIGHTS, rng.normal(size=(K, d)), covariances]
    mixture.set(*(torch.tensor(value, dtype=torch.float32) for value in values))
    means, covariances = (value.detach().double().numpy() for value in (mixture.means, mixture.covariances()))
    laws = [stats.multivariate_normal(mean, sigma) for mean, sigma in zip(means, covariances, strict=True)]
    found = np.exp(-bhattacharyya(mixture))
    np.testing.assert_array_equal(found, found.T)
    for i in range(K):
        for j in range(i + 1):

            def integrand(*z, i=i, j=j):
                return np.sqrt(laws[i].pdf(z) * laws[j].pdf(z))

            expected, _ = integrate.nquad(integrand, [(-15, 15)] * d, opts={"epsabs": 1e-6, "epsrel": 1e-6})
            np.testing.assert_allclose(found[i, j], expected, atol=2e-5)


def test_components_far_apart_have_a_finite_distance():
    mixture = GaussianMixture(2, 1, covariance="diag", weights="learned")
    mixture.set(torch.tensor([0.5, 0.5]), torch.tensor([[0.0], [200.0]]), torch.ones(2, 1, 1))
    np.testing.assert_allclose(bhattacharyya(mixture), 5000 * (1 - np.eye(2)))  # 200² / 8; the coefficient is 0


def test_equal_components_are_at_distance_0():
    mixture = GaussianMixture(3, 4, covariance="full", weights="learned")
    root = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    mixture.set(torch.ones(3) / 3, torch.ones(3, 4), (root @ root.T + torch.eye(4)).expand(3, -1, -1))
    distance = bhattacharyya(mixture)
    assert (distance >= 0).all()
    np.testing.assert_allclose(distance, 0, atol=1e-12)


def test_the_tree_joins_the_components_that_overlap_most(adata, model):
    set_mixture(model, means=np.array([[0.0, 0.0], [5.0, 0.0], [0.5, 0.0]]))
    dendrogram(adata, model)
    tree = adata.uns["dendrogram_scvae"]
    assert set(tree["linkage"][0, :2]) == {0, 2}
    height = -np.log(tree["correlation_matrix"])
    np.testing.assert_allclose(tree["linkage"][0, 2], height[0, 2])
    np.testing.assert_allclose(tree["linkage"][1, 2], (height[0, 1] + height[1, 2]) / 2)
    assert [list("012")[at] for at in tree["categories_idx_ordered"]] == tree["categories_ordered"]
    np.testing.assert_array_equal(hierarchy.leaves_list(tree["linkage"]), tree["categories_idx_ordered"])


def test_the_tree_has_the_fields_of_scanpy(adata, model):
    dendrogram(adata, model)
    theirs = sc.tl.dendrogram(adata, "scvae", use_rep="X", inplace=False)
    ours = adata.uns["dendrogram_scvae"]
    assert set(ours) == set(theirs)
    assert set(ours["dendrogram_info"]) == set(theirs["dendrogram_info"])
    assert {name: type(value) for name, value in ours.items() if name != "use_rep"} == {
        name: type(value) for name, value in theirs.items() if name != "use_rep"
    }


def test_the_tree_has_only_the_categories_of_the_column(adata, model):
    dendrogram(adata, model)
    whole = adata.uns["dendrogram_scvae"]["correlation_matrix"]
    some = adata[adata.obs["scvae"] != "1"].copy()
    dendrogram(some, model)
    tree = some.uns["dendrogram_scvae"]
    assert sorted(tree["categories_ordered"]) == ["0", "2"]
    np.testing.assert_array_equal(tree["correlation_matrix"], whole[np.ix_([0, 2], [0, 2])])


# -- errors ------------------------------------------------------------------------------------------------------------


def untrained(adata: AnnData, **options: object) -> SCVAE:
    adata = adata.copy()
    SCVAE.setup_anndata(adata)
    return SCVAE(adata, n_hidden=4, n_latent=2, **options)


#: What becomes of the column, and what is said of it.
BOTH = {
    "no_column": (lambda column: None, "found no such column. Pass the `key_added`"),
    "text": (lambda column: column.astype(object), "found the type object. Convert it"),
    "renamed": (
        lambda column: column.cat.rename_categories({"1": "B cell"}),
        r"components of the model \(0, 1, 2\); 1 of its 3 categories are none, the first 'B cell'. Keep other names",
    ),
    "one": (lambda column: pd.Categorical(["2"] * N_CELLS), r"at least two components to \w+; found 1 \(2\)"),
}


@pytest.mark.parametrize("function", [rank_components, dendrogram])
@pytest.mark.parametrize("change", BOTH)
def test_a_clustering_that_does_not_fit_is_refused(adata, model, function, change):
    change, message = BOTH[change]
    adata.obs["scvae"] = change(adata.obs["scvae"])
    if adata.obs["scvae"].isna().all():
        del adata.obs["scvae"]
    before = snapshot(adata)
    with pytest.raises(ValueError, match=message):
        function(adata, model)
    assert snapshot(adata) == before


@pytest.mark.parametrize("function", [rank_components, dendrogram])
def test_a_model_without_a_trained_mixture_is_refused(adata, function):
    before = snapshot(adata)
    with pytest.raises(ValueError, match=r"must have a trained mixture.*not trained. Call model.train\(\)"):
        function(adata, untrained(adata, n_components=2))
    with pytest.raises(ValueError, match=r"must have a trained mixture.*Train one with mixture=True"):
        function(adata, untrained(adata, mixture=False))
    with pytest.raises(TypeError, match=r"must be an SCVAE, or .*; found a int.*return_model=True"):
        function(adata, 3)
    assert snapshot(adata) == before


@pytest.mark.parametrize("function", [rank_components, dendrogram])
def test_only_an_anndata_is_taken(model, function):
    with pytest.raises(TypeError, match="`adata` must be an AnnData; found a ndarray"):
        function(np.ones((3, 2)), model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "7"}, r"'rest' or a component that has cells \(0, 1, 2\); found '7'"),
        ({"n_samples": 1}, "`n_samples` must be a whole number of at least 2; found 1"),
        ({"n_samples": 20.0}, "`n_samples` must be a whole number of at least 2; found 20.0"),
        ({"delta": -0.1}, "`delta` must be a finite number of at least 0; found -0.1"),
        ({"n_genes": 0}, "`n_genes` must be a whole number of at least 1, or None; found 0"),
        ({"random_state": -1}, "`random_state` must be a whole number of at least 0"),
    ],
)
def test_arguments_out_of_range_are_refused(adata, model, options, message):
    before = snapshot(adata)
    with pytest.raises(ValueError, match=message):
        rank_components(adata, model, **options)
    assert snapshot(adata) == before


def test_missing_genes_are_counted_and_named(adata, model):
    some = adata[:, ["gene0", "gene1"]].copy()
    with pytest.raises(ValueError, match=r"10 of 12 are missing, the first 'gene2'. Pass the AnnData"):
        rank_components(some, model)
    assert "rank_components" not in some.uns


def test_unused_categories_alone_are_no_components_to_rank(adata, model):
    adata.obs["scvae"] = pd.Categorical(["1"] * N_CELLS, categories=["0", "1"])
    with pytest.raises(ValueError, match=r"must have cells of at least two components to compare; found 1 \(1\)"):
        rank_components(adata, model)


def test_the_module_lists_its_fields_as_scanpy_orders_them():
    assert list(_rank.FIELDS) == FIELDS
    assert [*FIELDS[1:3], *_rank.OWN_FIELDS] == OF_DECODER
