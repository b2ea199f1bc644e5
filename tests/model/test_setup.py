"""Set-up: counts that were checked once are those that are read later, or it is said; categories that have cells."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scvi
from scipy import sparse

import scvae_tools as svt
from scvae_tools._data.counts import CountsError, digest_of_counts

FORMS = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": lambda x: np.asarray(x.toarray(order="F"))}


def make_adata(form="csr", layer=None):
    adata = svt.datasets.simulate(60, 20, 2, n_batches=2, random_state=0)
    counts = FORMS[form](adata.X)
    if layer is None:
        adata.X = counts
    else:
        adata.layers[layer] = counts
    return adata


def make_model(adata, layer=None):
    svt.SCVAE.setup_anndata(adata, layer=layer)
    model = svt.SCVAE(adata, mixture=False, n_hidden=4, n_latent=2)
    model.train(2, progress=False)
    return model


def normalise(adata):
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)


def filter_cells(adata):
    adata._inplace_subset_obs(np.arange(adata.n_obs) != 7)


def other_counts(adata):
    if sparse.issparse(adata.X):
        adata.X.data[:] = adata.X.data[::-1].copy()
    else:
        adata.X[:] = adata.X[::-1].copy()


CHANGES = [normalise, sc.pp.log1p, filter_cells, other_counts]
READS = {
    "get_elbo": lambda m: m.get_elbo(),
    "get_latent_representation": lambda m: m.get_latent_representation(),
    "get_normalized_expression": lambda m: m.get_normalized_expression(),
    "differential_expression": lambda m: m.differential_expression(idx1=np.arange(20), idx2=np.arange(20, 40)),
    "train": lambda m: m.train(1, progress=False),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_counts_that_were_changed_in_place_are_refused(change, form):
    adata = make_adata(form)
    model = make_model(adata)
    change(adata)
    for name, read in READS.items():
        with pytest.raises(
            CountsError, match=r"^adata\.X must hold the counts that the model was built on; found other"
        ):
            pytest.fail(f"{name}: {read(model)}")


def test_counts_that_are_put_back_are_accepted_again():
    adata = make_adata()
    model, counts = make_model(adata), adata.X.copy()
    before = model.get_elbo(n_samples=20)
    normalise(adata)
    with pytest.raises(CountsError):
        model.get_elbo()
    adata.X = counts
    assert model.get_elbo(n_samples=20) == pytest.approx(before)


def test_a_layer_of_counts_lets_x_be_normalised():
    adata = make_adata(layer="counts")
    model = make_model(adata, "counts")
    before = model.get_elbo(n_samples=20)
    normalise(adata)
    assert model.get_elbo(n_samples=20) == pytest.approx(before)
    sc.pp.log1p(adata, layer="counts")
    with pytest.raises(CountsError, match=r"adata\.layers\['counts'\] must hold the counts that the model was"):
        model.get_elbo()


def test_a_copy_of_the_cells_is_checked_as_other_cells_are():
    adata = make_adata()
    model, copied = make_model(adata), adata.copy()
    assert np.isfinite(model.get_elbo(copied))
    normalise(copied)
    with pytest.raises(CountsError, match=r"adata\.X must hold integer counts"):
        model.get_elbo(copied)
    assert np.isfinite(model.get_elbo())


def test_other_cells_that_change_are_checked_again():
    adata, others = make_adata(), make_adata()[5:40].copy()
    model = make_model(adata)
    before = model.get_elbo(others, n_samples=20)
    others.X.data *= 2  # still counts
    assert model.get_elbo(others, n_samples=20) != pytest.approx(before)
    normalise(others)
    with pytest.raises(CountsError, match="must hold integer counts"):
        model.get_elbo(others)


def test_between_set_up_and_training_too():
    adata = make_adata()
    svt.SCVAE.setup_anndata(adata)
    sc.pp.log1p(adata)
    model = svt.SCVAE(adata, mixture=False, n_hidden=4)
    with pytest.raises(CountsError, match="must hold the counts that the model was built on"):
        model.train(1, progress=False)


def test_a_model_of_the_main_call_notices_it_and_goes_on_with_what_needs_no_counts():
    adata = make_adata()
    model = svt.tl.scvae(adata, n_components=2, max_epochs=6, progress=False, return_model=True)
    before = model.get_elbo(n_samples=20)
    sc.pp.normalize_total(adata)  # makes a matrix of its own: the model still has the counts
    assert model.get_elbo(n_samples=20) == pytest.approx(before)
    model.adata.X.data[:] = np.log1p(model.adata.X.data)
    with pytest.raises(CountsError, match="must hold the counts that the model was built on"):
        model.get_elbo()
    svt.tl.rank_components(adata, model)
    svt.tl.dendrogram(adata, model)


def test_a_loaded_model_reads_the_counts_that_it_is_given(tmp_path):
    adata = make_adata()
    make_model(adata).save(tmp_path / "model")
    loaded = svt.SCVAE.load(tmp_path / "model", adata)
    assert np.isfinite(loaded.get_elbo())
    normalise(adata)
    with pytest.raises(CountsError, match="must hold the counts that the model was built on"):
        loaded.get_elbo()


@pytest.mark.parametrize("form", FORMS)
def test_the_digest_is_of_values_places_and_shape(form):
    x = make_adata(form).X
    changed = x.copy()
    (changed.data if sparse.issparse(x) else changed.reshape(-1))[3] += 1
    assert digest_of_counts(x) == digest_of_counts(x.copy()) != digest_of_counts(changed)
    assert digest_of_counts(x) != digest_of_counts(x[:-1])
    assert digest_of_counts(x) != digest_of_counts(x.astype(np.float64))


def test_counts_in_files_have_no_digest():
    assert digest_of_counts(object()) is None


# -- columns of obs ----------------------------------------------------------------------------------------------------


def with_columns():
    adata = svt.datasets.simulate(60, 20, 2, n_batches=2, random_state=0)
    rng = np.random.default_rng(0)
    adata.obs["batch"] = rng.choice(["x", "y"], adata.n_obs)
    adata.obs["other"] = rng.choice(["p", "q", "r"], adata.n_obs)
    adata.obs["size"] = rng.uniform(10, 30, adata.n_obs)
    adata.obs["age"] = rng.uniform(20, 80, adata.n_obs)
    return adata


COLUMNS = {"batch_key": "batch", "size_factor_key": "size", "continuous_covariate_keys": ["age"]}


def built(adata):
    svt.SCVAE.setup_anndata(adata, **COLUMNS)
    return svt.SCVAE(adata, n_components=2, n_hidden=4, n_latent=2)


def change_columns(adata):
    adata.obs["batch"] = adata.obs["batch"].to_numpy()[::-1]
    adata.obs["size"] *= 100
    adata.obs["age"] = 50.0


def remove_columns(adata):
    del adata.obs["batch"], adata.obs["size"]


AFTERWARDS = {
    "another set-up of ours": lambda a: svt.SCVAE.setup_anndata(a, batch_key="other", labels_key="batch"),
    "a set-up of scvi-tools": lambda a: scvi.model.SCVI.setup_anndata(a, batch_key="other"),
    "other values in obs": change_columns,
    "columns that are gone": remove_columns,
    "all of it": lambda a: (
        change_columns(a),
        remove_columns(a),
        scvi.model.SCVI.setup_anndata(a, batch_key="other"),
    ),
}


@pytest.mark.parametrize("case", AFTERWARDS)
def test_a_model_reads_the_columns_that_it_was_built_with_whatever_becomes_of_obs(case):
    outcomes = []
    for happens in (False, True):
        adata = with_columns()
        model = built(adata)
        if happens:
            AFTERWARDS[case](adata)
        model.train(3, progress=False)
        found = [model.get_elbo_terms(), model.get_latent_representation(), model.predict(soft=True)]
        outcomes.append([*found, model.get_lambda(indices=[0, 1]), model.sample(5).X.toarray()])
    for plain, after in zip(*outcomes, strict=True):
        np.testing.assert_array_equal(plain, after)


def test_two_models_of_one_anndata_read_their_own_batch():
    adata = with_columns()
    first = built(adata)
    svt.SCVAE.setup_anndata(adata, batch_key="other")
    second = svt.SCVAE(adata, mixture=False, n_hidden=4, n_latent=2)
    for model, key in ((first, "batch"), (second, "other"), (first, "batch")):
        model.train(1, progress=False)
        names = np.unique(adata.obs[key])
        found = np.concatenate([each["batch"].ravel() for each in model._batches(None, None, None)])
        assert names[found].tolist() == adata.obs[key].tolist()


def test_columns_of_other_cells_are_read_anew_each_time():
    model = built(with_columns())
    model.train(2, progress=False)
    cells = with_columns()
    cells.obs_names = cells.obs_names + "-new"
    before = model.get_elbo(cells)
    cells.obs["batch"] = cells.obs["batch"].to_numpy()[::-1]
    fresh = cells.copy()
    for key in [key for key in fresh.uns if key.startswith("_scvi")]:
        del fresh.uns[key]
    assert model.get_elbo(cells) == model.get_elbo(fresh) != before


# -- categories --------------------------------------------------------------------------------------------------------

PLACES = np.arange(60) % 2
KINDS = {
    "text": np.array(["a", "b"])[PLACES],
    "string": pd.array(np.array(["a", "b"])[PLACES], dtype="string"),
    "bool": PLACES == 1,
    "boolean": pd.array(PLACES == 1, dtype="boolean"),
    "int8": PLACES.astype(np.int8),
    "Int64": pd.array(PLACES, dtype="Int64"),
    "float32": PLACES.astype(np.float32) / 10,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_knows_the_same_categories_again_in_every_role(kind, tmp_path):
    adata = svt.datasets.simulate(60, 20, 2, random_state=0)
    adata.obs["column"] = KINDS[kind]
    roles = {"batch_key": "column", "labels_key": "column", "categorical_covariate_keys": ["column"]}
    options = {"n_hidden": 4, "n_latent": 2, "max_epochs": 2, "progress": False, "return_model": True}
    model = svt.tl.scvae(adata, **roles, **options)
    model.save(tmp_path / "model")
    loaded = svt.SCVAE.load(tmp_path / "model", adata.copy())
    assert loaded.labels == model.labels == sorted(set(adata.obs["column"].astype(str)))
    first = adata.obs["column"].iloc[0]
    for batch in (first, str(first)):
        expected = model.get_normalized_expression(transform_batch=batch)
        np.testing.assert_array_equal(loaded.get_normalized_expression(transform_batch=batch), expected)
    new = adata[:30].copy()
    svt.tl.predict(new, loaded)
    np.testing.assert_allclose(new.obsm["X_scvae"], adata.obsm["X_scvae"][:30], rtol=1e-4, atol=1e-5)


def with_unused_categories():
    adata = svt.datasets.simulate(60, 20, 2, n_batches=2, random_state=0)
    for name in ("component", "batch"):
        used = adata.obs[name].cat.categories
        adata.obs[name] = adata.obs[name].cat.set_categories(["before", *used, "after"])
    return adata


@pytest.mark.parametrize("options", [{"weights": "labels"}, {"weights": "labels", "y_term": "kl"}, {}], ids=str)
def test_categories_without_cells_do_not_count(options, tmp_path):
    adata, plain = with_unused_categories(), svt.datasets.simulate(60, 20, 2, n_batches=2, random_state=0)
    roles = {"batch_key": "batch", "labels_key": "component", "categorical_covariate_keys": ["batch"]}
    common = {"n_hidden": 4, "n_latent": 2, "max_epochs": 3, "progress": False, "return_model": True}
    model = svt.tl.scvae(adata, **roles, **options, **common)
    expected = svt.tl.scvae(plain, **roles, **options, **common)
    assert model.labels == ["0", "1"]
    assert model.module.sizes == expected.module.sizes
    np.testing.assert_array_equal(adata.obsm["X_scvae"], plain.obsm["X_scvae"])
    assert list(adata.obs["batch"].cat.categories) == ["before", "0", "1", "after"]
    with pytest.raises(ValueError, match="`transform_batch` must be one of '0', '1'; found 'after'"):
        model.get_normalized_expression(transform_batch="after")
    model.save(tmp_path / "model")
    loaded = svt.SCVAE.load(tmp_path / "model", adata)
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())


def test_a_set_up_leaves_the_categories_of_the_user():
    adata = with_unused_categories()
    before = adata.obs["batch"].copy()
    svt.SCVAE.setup_anndata(adata, batch_key="batch", categorical_covariate_keys=["batch", "component"])
    pd.testing.assert_series_equal(adata.obs["batch"], before)
    model = svt.SCVAE(adata, mixture=False, n_hidden=4, n_latent=2)
    assert model.module.sizes.n_batch == 2
    assert model.module.sizes.n_categories == (2, 2)
    svt.SCVAE.setup_anndata(adata, batch_key="batch")
    assert svt.SCVAE(adata, mixture=False, n_hidden=4).module.sizes.n_batch == 2
