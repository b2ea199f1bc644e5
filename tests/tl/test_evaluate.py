"""Evaluation against the model's own numbers cell by cell, scikit-learn, and closed forms for decoders set by hand."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from independent import N_ERRORS
from scipy import stats
from sklearn import metrics as sk
from sklearn.cluster import DBSCAN, AgglomerativeClustering, KMeans
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import scvae_tools as svt
from scvae_tools._module import memory
from scvae_tools.model._scvae import SCVAE

N_CELLS, N_GENES = 240, 20
COLUMNS = ["subset", "clustering", "n_cells", "elbo", "log_likelihood", "kl_z", "kl_y"]
SCORES = ["accuracy", "ari", "ami"]


def make_adata(n_cells=N_CELLS, random_state=0) -> anndata.AnnData:
    adata = svt.datasets.simulate(n_cells, N_GENES, 3, n_batches=2, separation=2.0, random_state=random_state)
    adata.obs["kind"] = "type " + adata.obs["component"].astype(str).astype(object)
    adata.obs["coarse"] = np.where(adata.obs["kind"] == "type 0", "many", "few")
    return adata


def make_model(adata, *, likelihood="nb", mixture=False, epochs=6, **keys) -> SCVAE:
    SCVAE.setup_anndata(adata, **keys)
    options = {"n_components": 3} if mixture else {}
    model = SCVAE(adata, likelihood=likelihood, mixture=mixture, n_latent=3, n_hidden=16, **options)
    model.train(epochs, train_size=0.75, progress=False, lr=5e-3, batch_size=32, kl_weight_start=0)
    return model


@pytest.fixture
def adata():
    return make_adata()


@pytest.fixture(scope="module")
def mixture():
    return make_model(make_adata(), mixture="vade", batch_key="batch", epochs=60)


@pytest.fixture(scope="module")
def plain():
    return make_model(make_adata())


def new_cells(n_cells=60) -> anndata.AnnData:
    adata = make_adata(n_cells)
    adata.obs_names = [f"new{i}" for i in range(n_cells)]
    return adata


def assert_scores(row, clusters, labels, prefix="") -> None:
    assert row[f"{prefix}ari"] == pytest.approx(sk.adjusted_rand_score(labels, clusters))
    assert row[f"{prefix}ami"] == pytest.approx(sk.adjusted_mutual_info_score(labels, clusters))


def transferred(clusters, labels, fitted, at) -> float:
    """Accuracy of the majority of some cells on others, counted."""
    right = 0
    for i in at:
        votes = pd.Series(labels[fitted][clusters[fitted] == clusters[i]]).value_counts().sort_index()
        right += len(votes) > 0 and votes.idxmax() == labels[i]
    return right / len(at)


# -- bounds and subsets ------------------------------------------------------------------------------------------------


def test_the_rows_are_the_subsets_of_the_models_own_cells(adata, mixture):
    table = svt.tl.evaluate(adata, mixture)
    assert table.columns.tolist() == [*COLUMNS, "n_scored", "n_clusters", "silhouette"]
    assert table["subset"].tolist() == ["train", "validation"]
    assert table["clustering"].tolist() == ["model", "model"]
    assert table["n_cells"].tolist() == [180, 60] == table["n_scored"].tolist()


def test_bounds_are_means_over_the_cells_of_the_subset(adata, mixture):
    table = svt.tl.evaluate(adata, mixture, n_samples=2, n_importance_samples=5, random_state=3, batch_size=50)
    for row, indices in zip(table.to_dict("records"), (mixture.train_indices, mixture.validation_indices), strict=True):
        options = {"indices": indices, "batch_size": 50, "random_state": 3}
        terms = mixture.get_elbo_terms(n_samples=2, **options)
        for name in terms:
            assert row[name] == pytest.approx(terms[name].mean())
        assert row["elbo"] == pytest.approx(row["log_likelihood"] - row["kl_z"] - row["kl_y"])
        each = mixture.get_marginal_ll(n_mc_samples=5, return_mean=False, **options)
        assert row["importance_weighted"] == pytest.approx(each.mean())


def test_test_cells_are_a_subset_where_the_model_has_some(adata, plain, monkeypatch):
    monkeypatch.setattr(plain, "validation_indices", plain.validation_indices)
    test, plain.validation_indices = plain.validation_indices[:20], plain.validation_indices[20:]
    monkeypatch.setattr(plain, "test_indices", test)
    table = svt.tl.evaluate(adata, plain)
    assert table["subset"].tolist() == ["train", "validation", "test"]
    assert table["n_cells"].tolist() == [180, 40, 20]
    assert table["elbo"].iloc[2] == pytest.approx(plain.get_elbo(indices=test))


def test_new_cells_are_one_subset_with_their_own_bound(plain):
    cells = new_cells()
    table = svt.tl.evaluate(cells, plain)
    assert table["subset"].tolist() == ["new"]
    assert table["clustering"].tolist() == ["none"]
    assert table["elbo"].iloc[0] == pytest.approx(plain.get_elbo(new_cells()))
    assert np.isnan(table["silhouette"].iloc[0])
    assert pd.isna(table["n_clusters"].iloc[0])


def test_cells_with_the_names_of_the_models_but_other_counts_are_new(plain):
    assert svt.tl.evaluate(make_adata(random_state=1), plain)["subset"].tolist() == ["new"]


def test_the_models_cells_are_known_after_normalization_and_by_their_own_object(adata, plain):
    adata.X = np.log1p(adata.X.toarray() / 3)
    with pytest.warns(UserWarning, match="have the names of those that it was trained on, and are taken for these"):
        assert svt.tl.evaluate(adata, plain)["subset"].tolist() == ["train", "validation"]
    with pytest.raises(ValueError, match="cuonts"):
        svt.tl.evaluate(adata, plain, layer="cuonts")
    assert svt.tl.evaluate(plain.adata, plain)["subset"].tolist() == ["train", "validation"]
    del plain.adata.uns["scvae_evaluation"]


def test_numbers_are_no_names_that_tell_the_models_cells(adata):
    adata.obs_names = [str(i) for i in range(adata.n_obs)]
    SCVAE.setup_anndata(adata)
    model = SCVAE(adata, mixture=False, n_hidden=8)
    model.train(1, progress=False)
    other = make_adata(random_state=1)
    other.obs_names = adata.obs_names
    other.X = np.log1p(other.X.toarray() / 3)
    with pytest.raises(ValueError, match="counts"):
        svt.tl.evaluate(other, model)


def test_the_cells_that_tl_trained_on_are_the_models(adata):
    adata.var["used"] = np.arange(N_GENES) > 3
    adata.layers["counts"], adata.X = adata.X, None
    model = svt.tl.scvae(
        adata, mixture=False, mask_var="used", layer="counts", max_epochs=1, progress=False, return_model=True
    )
    assert svt.tl.evaluate(adata, model, layer="counts")["subset"].tolist() == ["train", "validation"]
    cells = new_cells()
    cells.layers["counts"], cells.X = cells.X, None
    found = svt.tl.evaluate(cells, model, layer="counts")["elbo"].iloc[0]
    genes = new_cells()[:, N_GENES - 16 :].copy()
    assert found == pytest.approx(model.get_elbo(genes))


def test_a_model_that_was_loaded_without_data_finds_all_cells_new(adata, plain, tmp_path):
    plain.save(tmp_path / "model")
    model = SCVAE.load(tmp_path / "model")
    assert svt.tl.evaluate(adata, model)["subset"].tolist() == ["new"]
    assert model.adata is None


# -- scores ------------------------------------------------------------------------------------------------------------


def test_scores_of_the_components_are_those_of_scikit_learn_on_each_subset(adata, mixture):
    table = svt.tl.evaluate(adata, mixture, labels_key="kind", superset="coarse")
    clusters, latent = mixture.predict(), mixture.get_latent_representation()
    labels, coarse = adata.obs["kind"].to_numpy(), adata.obs["coarse"].to_numpy()
    assert len(set(clusters)) > 1
    for row, at in zip(table.to_dict("records"), (mixture.train_indices, mixture.validation_indices), strict=True):
        assert_scores(row, clusters[at], labels[at])
        assert_scores(row, clusters[at], coarse[at], "superset_")
        assert row["accuracy"] == pytest.approx(transferred(clusters, labels, mixture.train_indices, at))
        assert row["superset_accuracy"] == pytest.approx(transferred(clusters, coarse, mixture.train_indices, at))
        assert row["silhouette"] == pytest.approx(sk.silhouette_score(latent[at], clusters[at]), rel=1e-5)
        assert row["n_clusters"] == len(set(clusters[at]))


def test_excluded_and_unlabelled_cells_are_left_out_of_the_scores_alone(adata, mixture):
    whole = svt.tl.evaluate(adata, mixture, labels_key="kind")
    adata.obs["kind"] = pd.Categorical(adata.obs["kind"])
    adata.obs.loc[adata.obs_names[:30], "kind"] = np.nan
    superset = {"type 0": "a", "type 2": "b"}
    table = svt.tl.evaluate(adata, mixture, labels_key="kind", excluded="type 1", superset=superset)
    clusters, latent = mixture.predict(), mixture.get_latent_representation()
    scored = adata.obs["kind"].notna() & (adata.obs["kind"] != "type 1")
    for row, at in zip(table.to_dict("records"), (mixture.train_indices, mixture.validation_indices), strict=True):
        kept = at[scored.to_numpy()[at]]
        assert row["n_scored"] == len(kept) < len(at) == row["n_cells"]
        assert_scores(row, clusters[kept], adata.obs["kind"].to_numpy()[kept])
        assert row["superset_ari"] == pytest.approx(row["ari"])  # the same two groups under other names
        assert row["silhouette"] == pytest.approx(sk.silhouette_score(latent[kept], clusters[kept]), rel=1e-5)
    pd.testing.assert_series_equal(table["elbo"], whole["elbo"])


def test_a_superset_of_none_leaves_its_cells_out(adata, mixture):
    superset = {"type 0": "a", "type 1": "b", "type 2": None}
    table = svt.tl.evaluate(adata, mixture, labels_key="kind", superset=superset)
    at = mixture.validation_indices[adata.obs["kind"].to_numpy()[mixture.validation_indices] != "type 2"]
    assert_scores(table.iloc[1], mixture.predict()[at], adata.obs["kind"].to_numpy()[at], "superset_")


def test_labels_may_be_numbers(adata, mixture):
    expected = svt.tl.evaluate(adata, mixture, labels_key="kind", excluded=["type 1"])
    adata.obs["number"] = adata.obs["component"].astype(str).astype(int)
    found = svt.tl.evaluate(adata, mixture, labels_key="number", excluded=[1], superset={0: 10, 2: 20})
    pd.testing.assert_frame_equal(found[SCORES], expected[SCORES])


def test_the_majority_of_new_cells_is_their_own(mixture):
    cells = new_cells()
    row = svt.tl.evaluate(cells, mixture, labels_key="kind").iloc[0]
    clusters, everyone = mixture.predict(new_cells()), np.arange(60)
    assert row["accuracy"] == pytest.approx(transferred(clusters, cells.obs["kind"].to_numpy(), everyone, everyone))


def test_the_unlabelled_category_of_the_model_is_no_label():
    adata = make_adata()
    adata.obs["known"] = np.where(np.arange(N_CELLS) % 3 == 0, "?", adata.obs["kind"])
    model = make_model(adata.copy(), mixture="vade", labels_key="known", unlabeled_category="?")
    table = svt.tl.evaluate(adata, model, labels_key="known")
    assert table["n_scored"].sum() == (adata.obs["known"] != "?").sum()
    # New cells may have labels that the model has never seen, or no column of them.
    cells = new_cells()
    cells.obs["known"] = "another type"
    found = svt.tl.evaluate(cells, model, labels_key="known")
    assert found["accuracy"].iloc[0] == 1
    del cells.obs["known"]
    assert svt.tl.evaluate(cells, model)["elbo"].iloc[0] == pytest.approx(found["elbo"].iloc[0])


# -- clusterers --------------------------------------------------------------------------------------------------------


def test_a_clusterer_is_fitted_on_the_training_cells_and_predicts_the_others(adata, plain):
    own = KMeans(4)
    table = svt.tl.evaluate(adata, plain, labels_key="kind", clusterers={"four": own}, random_state=7)
    assert own.random_state is None
    assert not hasattr(own, "labels_")
    latent = plain.get_latent_representation().astype(float)
    clusters = KMeans(4, random_state=7).fit(latent[plain.train_indices]).predict(latent)
    assert table["clustering"].tolist() == ["four", "four"]
    for row, at in zip(table.to_dict("records"), (plain.train_indices, plain.validation_indices), strict=True):
        assert_scores(row, clusters[at], adata.obs["kind"].to_numpy()[at])


@pytest.mark.parametrize("estimator", [AgglomerativeClustering(3), DBSCAN(eps=0.8)], ids=repr)
def test_a_clusterer_that_cannot_predict_clusters_all_cells_together(adata, plain, estimator):
    table = svt.tl.evaluate(adata, plain, labels_key="kind", clusterers={"other": estimator})
    clusters = estimator.fit_predict(plain.get_latent_representation().astype(float))
    at = plain.validation_indices
    assert_scores(table.iloc[1], clusters[at], adata.obs["kind"].to_numpy()[at])


def test_k_means_by_name_has_as_many_clusters_as_labels_or_else_components(adata, mixture):
    estimators = []
    for options in ({"labels_key": "kind", "excluded": ["type 1"]}, {"labels_key": "kind"}, {}):
        table = svt.tl.evaluate(adata, mixture, clusterers="k-means", **options)
        assert table["clustering"].tolist() == ["model", "k-means"] * 2
        estimators += adata.uns["scvae_evaluation"]["params"]["estimators"].tolist()
    expected = [repr(KMeans(n, random_state=0)) for n in (2, 3, 3)]
    assert estimators == expected


def test_the_seed_reaches_steps_of_a_pipeline_and_no_global_state_changes(adata, plain):
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    pipeline = make_pipeline(StandardScaler(), KMeans(3, init="random", n_init=1))
    tables = [svt.tl.evaluate(adata, plain, clusterers={"scaled": pipeline}, random_state=5) for _ in range(2)]
    pd.testing.assert_frame_equal(*tables)
    assert "random_state=5" in adata.uns["scvae_evaluation"]["params"]["estimators"][0]
    assert (np.random.get_state()[1] == before[0]).all()  # noqa: NPY002
    assert (torch.get_rng_state() == before[1]).all()


# -- what is written ---------------------------------------------------------------------------------------------------


def test_nothing_but_the_result_is_written_and_it_survives_a_file(adata, mixture, tmp_path):
    before = adata.copy()
    table = svt.tl.evaluate(
        adata,
        mixture,
        labels_key="kind",
        superset={f"type {i}": "all" for i in range(3)},
        clusterers="k-means",
        key_added="mine",
    )
    assert list(adata.uns) == [*before.uns, "mine"]
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert (adata.X != before.X).nnz == 0
    assert not adata.obsm
    adata.write_h5ad(tmp_path / "adata.h5ad")
    read = anndata.read_h5ad(tmp_path / "adata.h5ad").uns["mine"]
    pd.testing.assert_frame_equal(read["table"], table, check_dtype=False)  # of texts, by version of pandas
    assert read["params"]["labels_key"] == "kind"
    assert read["params"]["clusterers"].tolist() == ["k-means"]
    assert read["version"] == svt.__version__


def test_a_model_forgets_the_new_cells(plain):
    own = plain.adata
    svt.tl.evaluate(new_cells(), plain)
    assert plain.adata is own
    assert len(plain._setup_adata_manager_store) <= len(SCVAE._setup_adata_manager_store)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels_key": "knd"}, "Did you mean 'kind'"),
        ({"superset": "coarse"}, "`superset` is about labels, and needs `labels_key`"),
        ({"excluded": ["type 1"]}, "`excluded` is about labels, and needs `labels_key`"),
        ({"labels_key": "kind", "excluded": ["typ 1"]}, "'typ 1' is none. There are 'type 0', 'type 1', 'type 2'"),
        ({"labels_key": "kind", "excluded": [f"type {i}" for i in range(3)]}, "Exclude fewer"),
        ({"labels_key": "kind", "superset": {"type 0": "a"}}, "it has none for 'type 1', 'type 2'"),
        ({"labels_key": "kind", "superset": "coars"}, "`superset` must name a column"),
        ({"clusterers": "leiden"}, "found 'leiden'"),
        ({"clusterers": [KMeans(2)]}, "found a list"),
        ({"clusterers": {"model": KMeans(2)}}, "names other than 'model' and 'none'"),
        ({"clusterers": {"k": KMeans}}, "found the class KMeans"),
        ({"clusterers": {"k": StandardScaler()}}, "found a StandardScaler"),
        ({"clusterers": {"k": KMeans(1000)}}, r"clusterers\['k'\] must cluster 180 cells"),
        ({"clusterers": "k-means"}, 'Pass the number: {"k-means": KMeans'),
        ({"n_samples": 0}, "`n_samples` must be a whole number of at least 1"),
        ({"n_importance_samples": -1}, "`n_importance_samples` must be a whole number of at least 0"),
        ({"batch_size": 0}, "`batch_size` must be a whole number of at least 1"),
    ],
)
def test_errors_come_before_anything_is_written(adata, plain, options, message):
    with pytest.raises(ValueError, match=message):
        svt.tl.evaluate(adata, plain, **options)
    assert "scvae_evaluation" not in adata.uns


@pytest.mark.parametrize("function", [svt.tl.evaluate, svt.tl.summarize_reconstruction])
def test_the_model_must_be_a_trained_one_with_counts(adata, function):
    with pytest.raises(TypeError, match="`model` must be an SCVAE"):
        function(adata, 3)
    SCVAE.setup_anndata(adata)
    model = SCVAE(adata, mixture=False, n_hidden=4, n_latent=2)
    with pytest.raises(ValueError, match="must be trained"):
        function(adata, model)
    model.train(1, progress=False)
    model.minify_adata()
    with pytest.raises(ValueError, match="found one of minified data"):
        function(make_adata(), model)


def test_new_cells_must_have_the_genes_of_the_model(plain):
    cells = new_cells()[:, 3:].copy()
    with pytest.raises(ValueError, match="3 of 20 are missing, the first 'gene0'"):
        svt.tl.evaluate(cells, plain)


# -- reconstruction ----------------------------------------------------------------------------------------------------


def with_a_constant_decoder(model: SCVAE) -> SCVAE:
    """λ is the size factor times a number for each gene, whatever z."""
    with torch.no_grad():
        for head in model.module.decoder.heads.values():
            head.weight.zero_()
    return model


def bias(model: SCVAE, head: str) -> np.ndarray:
    return model.module.decoder.heads[head].bias.detach().double().numpy()


def spread(mean, variance, zeros) -> dict[str, np.ndarray]:
    """Statistics over the first axis from moments of each entry, by the law of total variance."""
    total = variance.mean(0) + mean.var(0)
    return {
        "mean": mean.mean(0),
        "sd": np.sqrt(total),
        "dispersion": total / mean.mean(0),
        "share_of_zeros": zeros.mean(0),
    }


def test_the_data_have_the_moments_of_their_counts(adata, plain):
    counts = adata.X.toarray().astype(float)
    expected = spread(counts, np.zeros_like(counts), counts == 0)
    table = svt.tl.summarize_reconstruction(adata, plain, by_gene=True, n_samples=1)
    assert table.index.tolist() == adata.var_names.tolist()
    for name, value in expected.items():
        np.testing.assert_allclose(table[f"{name}_data"], value, rtol=1e-6)
    row = svt.tl.summarize_reconstruction(adata, plain, n_samples=1).loc["data"]
    for name, value in spread(counts.ravel(), np.zeros(counts.size), counts.ravel() == 0).items():
        assert row[name] == pytest.approx(value)


@pytest.mark.parametrize("chunk_bytes", [2**28, 20_000, 300])
@pytest.mark.parametrize("likelihood", ["poisson", "zinb"])
def test_moments_of_the_predictive_are_those_of_scipy_where_the_decoder_is_constant(
    adata, likelihood, chunk_bytes, monkeypatch
):
    model = with_a_constant_decoder(make_model(adata.copy(), likelihood=likelihood, epochs=1))
    monkeypatch.setattr(memory, "CHUNK_BYTES", chunk_bytes)
    at = np.arange(40)
    rate = adata.X.toarray().sum(1, dtype=float)[at, None] * np.exp(bias(model, "log_rate"))
    if likelihood == "poisson":
        base, kept = stats.poisson(rate), 1.0
    else:
        r = np.exp(model.module.decoder.shared["log_r"].detach().double().numpy().reshape(1, -1))
        base = stats.nbinom(r, r / (r + rate))
        kept = 1 / (1 + np.exp(bias(model, "gate")))
    mean = kept * base.mean()
    variance = kept * (base.var() + base.mean() ** 2) - mean**2
    zeros = 1 - kept + kept * base.pmf(0)
    table = svt.tl.summarize_reconstruction(adata, model, indices=at, by_gene=True, n_samples=3)
    for name, value in spread(mean, variance, zeros).items():
        np.testing.assert_allclose(table[f"{name}_posterior_predictive"], value, rtol=1e-4, atol=1e-20)
    for name, value in spread(mean, 0 * mean, mean == 0).items():
        np.testing.assert_allclose(table[f"{name}_posterior_mean"], value, rtol=1e-4, atol=1e-20)
    together = svt.tl.summarize_reconstruction(adata, model, indices=at, n_samples=3)
    assert together.index.tolist() == ["data", "posterior mean", "posterior predictive"]
    for name, value in spread(mean.ravel(), variance.ravel(), zeros.ravel()).items():
        assert together.loc["posterior predictive", name] == pytest.approx(value, rel=1e-4)


def test_the_predictive_has_the_moments_of_drawn_counts(adata, mixture):
    indices, n_samples = np.arange(60), 200
    draws = mixture.posterior_predictive_sample(indices=indices, n_samples=n_samples, random_state=1).todense()
    draws = np.moveaxis(draws.astype(float), 2, 0).reshape(n_samples, -1)  # a row is a replicate
    row = svt.tl.summarize_reconstruction(adata, mixture, indices=indices, n_samples=n_samples)
    row = row.loc["posterior predictive"]
    for name, each in {"mean": draws.mean(1), "share_of_zeros": (draws == 0).mean(1)}.items():
        # Its own draws of z have an error as well, smaller than that of counts.
        assert abs(row[name] - each.mean()) < N_ERRORS * np.sqrt(2) * each.std() / np.sqrt(n_samples)
    second = np.square(draws).mean(1)
    found = row["sd"] ** 2 + row["mean"] ** 2
    assert abs(found - second.mean()) < N_ERRORS * np.sqrt(2) * second.std() / np.sqrt(n_samples)


def test_the_posterior_mean_is_averaged_over_the_draws_of_a_cell(adata, plain):
    few, many = (svt.tl.summarize_reconstruction(adata, plain, n_samples=n) for n in (1, 100))
    # Of one draw, the variance of E[x|z] is that over cells and draws; the mean over draws has less.
    assert few.loc["posterior mean", "sd"] > many.loc["posterior mean", "sd"]
    total = few.loc["posterior predictive", "sd"]
    assert many.loc["posterior predictive", "sd"] == pytest.approx(total, rel=0.05)
    assert (many["share_of_zeros"]["posterior mean"]) == 0


@pytest.mark.parametrize("likelihood", ["gaussian", "lomax"])
def test_a_density_has_no_share_of_zeros(adata, likelihood):
    model = make_model(adata.copy(), likelihood=likelihood, epochs=1)
    table = svt.tl.summarize_reconstruction(adata, model, n_samples=2)
    assert table["share_of_zeros"].isna().tolist() == [False, False, True]
    assert np.isfinite(table.loc["posterior predictive", "mean"])


def test_data_of_a_bernoulli_are_whether_counts_are_above_zero(adata):
    model = make_model(adata.copy(), likelihood="bernoulli", epochs=1)
    table = svt.tl.summarize_reconstruction(adata, model, n_samples=2)
    assert table.loc["data", "mean"] == pytest.approx((adata.X.toarray() > 0).mean())
    # Of 0 and 1, the variance is p (1 − p), however p differs between entries.
    mean, sd = table.loc["posterior predictive", ["mean", "sd"]]
    assert sd == pytest.approx(np.sqrt(mean * (1 - mean)), rel=1e-4)
    assert table.loc["posterior predictive", "share_of_zeros"] == pytest.approx(1 - mean, rel=1e-4)


def test_the_data_stay_as_they_were_and_the_same_seed_gives_the_same_table(adata, plain):
    before = json.dumps(sorted(adata.uns))
    tables = [svt.tl.summarize_reconstruction(adata, plain, random_state=seed) for seed in (0, 0, 1)]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert not tables[0].equals(tables[2])
    assert json.dumps(sorted(adata.uns)) == before
