"""Counts that were checked once are the counts that are read later, or it is said."""

from __future__ import annotations

import numpy as np
import pytest
import scanpy as sc
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
