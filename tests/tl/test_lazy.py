"""Lazily read data, dask arrays and files that change: the main call, the model class and new cells."""

from __future__ import annotations

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr

import scvae_tools as svt
from scvae_tools._data import stored

OPTIONS = {"mixture": False, "n_hidden": 8, "n_latent": 2, "max_epochs": 2, "progress": False}
N_CELLS = 90


def make_adata():
    adata = svt.datasets.simulate(N_CELLS, 20, 2, n_batches=2, random_state=0)
    adata.layers["dense"] = adata.X.toarray()
    return adata


def read_lazily(path):
    pytest.importorskip("dask.array")
    pytest.importorskip("xarray")
    return ad.experimental.read_lazy(path)


@pytest.fixture(params=["h5ad", "zarr"])
def path(request, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "LARGEST_WHOLE", 0)
    path = tmp_path / f"a.{request.param}"
    (make_adata().write_zarr if request.param == "zarr" else make_adata().write_h5ad)(path)
    return path


@pytest.mark.parametrize("layer", [None, "dense"])
def test_lazily_read_data_get_the_results_of_the_same_counts_in_a_file(layer, path):
    lazy = read_lazily(path)
    model = svt.tl.scvae(lazy, layer=layer, batch_key="batch", return_model=True, **OPTIONS)
    assert type(lazy.X).__module__ == type(lazy.layers["dense"]).__module__ == "dask.array.core"
    assert isinstance(lazy.obs, pd.DataFrame)
    np.testing.assert_array_equal(np.asarray(lazy.X.compute().toarray()), make_adata().layers["dense"])
    file = h5py.File(path) if path.suffix == ".h5ad" else zarr.open_group(path, mode="r")
    own = ad.AnnData(ad.io.sparse_dataset(file["X"]), obs=make_adata().obs, var=make_adata().var)
    svt.tl.scvae(own, batch_key="batch", **OPTIONS)
    np.testing.assert_allclose(lazy.obsm["X_scvae"], own.obsm["X_scvae"], rtol=1e-5, atol=1e-6)
    new = read_lazily(path)
    svt.tl.predict(new, model, layer=layer)
    np.testing.assert_allclose(new.obsm["X_scvae"], lazy.obsm["X_scvae"], rtol=1e-4, atol=1e-5)


def test_the_model_class_takes_lazily_read_data(path):
    lazy = read_lazily(path)
    svt.SCVAE.setup_anndata(lazy, batch_key="batch")
    model = svt.SCVAE(lazy, mixture=False, n_hidden=8, n_latent=2)
    model.train(1, progress=False)
    assert model.get_latent_representation().shape == (N_CELLS, 2)
    assert np.isfinite(model.get_elbo())


def test_new_cells_in_a_file_may_have_their_genes_in_another_order(path, monkeypatch):
    adata = make_adata()
    model = svt.tl.scvae(adata, return_model=True, **OPTIONS)
    order = np.random.default_rng(0).permutation(adata.n_vars)
    adata[:, order].copy().write_h5ad(path.with_name("b.h5ad"))
    new = ad.read_h5ad(path.with_name("b.h5ad"), backed="r")
    monkeypatch.setattr(type(new.X), "to_memory", lambda _: pytest.fail("all counts are read"))
    svt.tl.predict(new, model)
    np.testing.assert_allclose(new.obsm["X_scvae"], adata.obsm["X_scvae"], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_a_file_that_was_changed_since_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "LARGEST_WHOLE", 0)
    make_adata().write_h5ad(tmp_path / "a.h5ad")
    options = OPTIONS | {"checkpoint": tmp_path / "state"}
    adata = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    svt.tl.scvae(adata, **options)
    adata.file.close()
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        file["X/data"][100] += 1
    changed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    with pytest.raises(ValueError, match="counts"):
        svt.tl.scvae(changed, **options | {"max_epochs": 3})
    assert "X_scvae" not in changed.obsm
