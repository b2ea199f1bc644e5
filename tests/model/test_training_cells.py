"""Trainings on counts that stay in a file, and on more cells than an epoch has."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from anndata import AnnData
from lightning.pytorch.callbacks import Callback
from scipy import sparse
from sklearn.metrics import adjusted_rand_score

import scvae_tools as svt
from scvae_tools._data import conversion, host_windows, loader, stored
from scvae_tools._data.stored import StoredCounts
from scvae_tools.model import _training_cells

N_CELLS, N_GENES = 400, 150


@pytest.fixture
def _counts_stay(monkeypatch):
    monkeypatch.setattr(stored, "LARGEST_WHOLE", 0)
    monkeypatch.setattr(conversion, "BLOCK", 3000)
    monkeypatch.setattr(host_windows, "WINDOW_BYTES", 8 * 160 * N_GENES)


def make_adata():
    adata = svt.datasets.simulate(N_CELLS, N_GENES, 3, n_batches=2, random_state=0)
    adata.X = sparse.csr_matrix(adata.X)
    adata.obs["age"] = np.linspace(20, 80, N_CELLS)
    return adata


def in_h5ad(adata, path):
    adata.write_h5ad(path / "a.h5ad")
    return anndata.read_h5ad(path / "a.h5ad", backed="r")


def in_zarr(adata, path):
    adata.write_zarr(path / "a.zarr")
    matrix = anndata.io.sparse_dataset(zarr.open_group(path / "a.zarr", mode="r")["X"])
    return AnnData(matrix, obs=adata.obs.copy(), var=adata.var.copy())


IN_FILE = {"h5ad": in_h5ad, "zarr": in_zarr}
OPTIONS = {"n_latent": 3, "n_hidden": 16, "max_epochs": 12, "progress": False, "lr": 5e-3, "batch_size": 64}


@pytest.mark.usefixtures("_counts_stay")
def test_the_main_call_on_a_file_finds_what_it_finds_in_memory(tmp_path):
    adata = make_adata()
    in_file = in_h5ad(adata, tmp_path)
    options = OPTIONS | {
        "max_epochs": 80,
        "lr": 1e-2,
        "n_components": 3,
        "batch_key": "batch",
        "continuous_covariate_keys": ["age"],
    }
    model = svt.tl.scvae(in_file, return_model=True, **options)
    svt.tl.scvae(adata, **options)
    assert isinstance(model.adata.X, StoredCounts)
    found, expected = in_file.uns["scvae"]["elbo"], adata.uns["scvae"]["elbo"]
    assert found["validation"]["elbo"] == pytest.approx(expected["validation"]["elbo"], abs=6)  # as of seeds
    assert adjusted_rand_score(in_file.obs["scvae"], adata.obs["scvae"]) > 0.95
    np.testing.assert_allclose(in_file.layers["scvae_lambda"].sum(), adata.layers["scvae_lambda"].sum(), rtol=0.02)
    assert in_file.obsm["X_scvae"].shape == (N_CELLS, 3)


@pytest.mark.usefixtures("_counts_stay")
@pytest.mark.parametrize("likelihood", svt.likelihoods.LIKELIHOODS)
def test_a_model_reads_a_file_as_it_reads_the_same_counts_in_memory(likelihood, tmp_path):
    adata = make_adata()
    in_file = in_h5ad(adata, tmp_path)
    svt.SCVAE.setup_anndata(in_file, batch_key="batch")
    model = svt.SCVAE(in_file, likelihood=likelihood, n_components=3, n_latent=3, n_hidden=16)
    model.train(2, progress=False)
    indices = np.random.default_rng(0).permutation(N_CELLS)[:123]
    for read in (
        lambda data: model.get_latent_representation(data, indices=indices),
        lambda data: model.get_latent_representation(data, batch_size=50),
        lambda data: model.predict(data, soft=True).to_numpy(),
        lambda data: model.get_kl_by_dimension(data, indices=indices),
        lambda data: model.get_lambda(data, indices=indices[:20]),
    ):
        np.testing.assert_allclose(np.asarray(read(None)), np.asarray(read(adata)), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_counts_stay")
def test_the_same_counts_in_another_kind_of_file_give_the_same_to_the_bit(tmp_path):
    histories = []
    for kind in IN_FILE.values():
        data = kind(make_adata(), tmp_path)
        svt.tl.scvae(data, mixture=False, write_lambda=False, **OPTIONS)
        histories.append(data.uns["scvae"]["history"])
    pd.testing.assert_frame_equal(*histories, check_exact=True)


@pytest.mark.usefixtures("_counts_stay")
def test_genes_can_be_chosen_of_a_file(tmp_path):
    adata = make_adata()
    mask = np.arange(N_GENES) % 2 == 0
    in_file = in_zarr(adata, tmp_path)
    model = svt.tl.scvae(in_file, mask_var=mask, mixture=False, return_model=True, write_lambda=False, **OPTIONS)
    assert model.adata.shape == (N_CELLS, mask.sum())
    np.testing.assert_array_equal(model.adata.X[:10].toarray(), adata.X[:10][:, mask].toarray())


class DiedError(BaseException):
    """Stands for what ends a process: nothing catches it."""


class Die(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
        if pl_module.row["epoch"] == 5 and index == 2:
            raise DiedError


@pytest.mark.usefixtures("_counts_stay")
def test_a_training_on_a_file_that_was_killed_in_an_epoch_goes_on_to_the_bit(tmp_path):
    def train(checkpoint, **options):
        data = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
        svt.SCVAE.setup_anndata(data)
        model = svt.SCVAE(data, mixture=False, n_latent=3, n_hidden=16)
        model.train(8, checkpoint=checkpoint, progress=False, batch_size=64, **options)
        return model

    make_adata().write_h5ad(tmp_path / "a.h5ad")
    whole = train(tmp_path / "whole")
    with pytest.raises(DiedError):
        train(tmp_path / "broken", callbacks=[Die()])
    resumed = train(tmp_path / "broken")
    pd.testing.assert_frame_equal(whole.history, resumed.history, check_exact=True)
    for name, weight in whole.module.state_dict().items():
        assert torch.equal(weight, resumed.module.state_dict()[name]), name


@pytest.mark.usefixtures("_counts_stay")
def test_a_checkpoint_of_a_file_that_has_changed_since_is_refused(tmp_path):
    def train():
        data = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
        svt.SCVAE.setup_anndata(data)
        svt.SCVAE(data, mixture=False, n_latent=3, n_hidden=8).train(2, checkpoint=tmp_path / "c", progress=False)
        data.file.close()

    adata = make_adata()
    adata.write_h5ad(tmp_path / "a.h5ad")
    train()
    adata.X[7, adata.X[7].indices[0]] += 1
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match=r"found other ones: counts \(others\)"):
        train()


@pytest.mark.parametrize("in_file", [False, True])
def test_an_epoch_and_the_held_out_cells_that_it_ends_with_have_a_largest_size(in_file, tmp_path, monkeypatch):
    seen = {"train": 0, "validation": 0}

    class Count(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
            seen["train"] += len(batch["labels"])

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, index):
            seen["validation"] += len(batch["labels"])

    monkeypatch.setattr(loader, "LARGEST_EPOCH", 100)
    monkeypatch.setattr(_training_cells, "LARGEST_WATCHED", 11)
    data = make_adata()
    if in_file:
        monkeypatch.setattr(stored, "LARGEST_WHOLE", 0)
        monkeypatch.setattr(host_windows, "FEWEST_RUNS", 40)
        data = in_h5ad(data, tmp_path)
    svt.SCVAE.setup_anndata(data)
    model = svt.SCVAE(data, mixture=False, n_latent=2, n_hidden=8)
    model.train(3, n_warm_up_epochs=0, batch_size=25, progress=False, callbacks=[Count()])
    assert len(model.history) == 3
    assert 270 <= seen["train"] <= 300
    assert seen["validation"] == 33
    assert len(model.validation_indices) == N_CELLS // 10


@pytest.mark.usefixtures("_counts_stay")
def test_differential_expression_of_a_file_is_that_of_the_same_counts_in_memory(tmp_path):
    adata = make_adata()
    in_file = in_h5ad(adata, tmp_path)
    svt.SCVAE.setup_anndata(in_file)
    model = svt.SCVAE(in_file, mixture=False, n_latent=3, n_hidden=16)
    model.train(2, progress=False)
    options = {"groupby": "component", "mode": "change", "random_state": 0}
    found, expected = (model.differential_expression(data, **options) for data in (None, adata))
    columns = [name for name in found if name.startswith(("raw_", "non_zeros"))]
    assert len(columns) == 6
    one, other = (each.set_index("group1", append=True)[columns].sort_index() for each in (found, expected))
    pd.testing.assert_frame_equal(one, other, rtol=1e-5)
    first = (adata.obs["component"] == found["group1"].iloc[0]).to_numpy()
    own = found[found["group1"] == found["group1"].iloc[0]]
    np.testing.assert_allclose(own.loc[adata.var_names, "raw_mean1"], adata.X[first].toarray().mean(0), rtol=1e-5)


@pytest.mark.usefixtures("_counts_stay")
def test_a_copy_of_a_backed_anndata_leaves_its_file_to_the_model(tmp_path):
    in_file = in_h5ad(make_adata(), tmp_path)
    copied, model = svt.tl.scvae(in_file, mixture=False, copy=True, return_model=True, **OPTIONS)
    assert not copied.isbacked
    np.testing.assert_allclose(model.get_latent_representation(), copied.obsm["X_scvae"], rtol=1e-5)


@pytest.mark.usefixtures("_counts_stay")
@pytest.mark.parametrize("genes", ["as they are", "in another order, among others"])
def test_new_cells_in_a_file_are_mapped_as_those_in_memory(genes, tmp_path):
    adata = make_adata()
    own = adata if genes == "as they are" else adata[:, np.arange(N_GENES) % 3 > 0].copy()
    model = svt.tl.scvae(own, n_components=3, return_model=True, write_lambda=False, **OPTIONS)
    if genes != "as they are":
        adata = adata[:, ::-1].copy()
    in_file = in_zarr(adata, tmp_path)
    for data in (adata, in_file):
        svt.tl.predict(data, model, key_added="new")
    np.testing.assert_allclose(in_file.obsm["X_new"], adata.obsm["X_new"], rtol=1e-4, atol=1e-5)
    assert (in_file.obs["new"] == adata.obs["new"]).all()


@pytest.mark.usefixtures("_counts_stay")
def test_labels_and_query_cells_are_read_from_files(tmp_path):
    adata = make_adata()
    adata.obs["label"] = np.where(np.arange(N_CELLS) % 3 == 0, adata.obs["component"].astype(str), "?")
    in_file = in_h5ad(adata, tmp_path)
    options = OPTIONS | {"max_epochs": 40}
    svt.tl.scvae(in_file, labels_key="label", unlabeled_category="?", write_lambda=False, **options)
    known = in_file.obs["scvae"].astype(str) == adata.obs["component"].astype(str)
    assert known.mean() > 0.9
    (tmp_path / "model").mkdir()
    svt.SCVAE.setup_anndata(in_file, batch_key="batch")
    model = svt.SCVAE(in_file, mixture=False, n_latent=3, n_hidden=16)
    model.train(2, progress=False)
    model.save(tmp_path / "model", overwrite=True)
    other = svt.SCVAE.load(tmp_path / "model", in_file)
    np.testing.assert_allclose(other.get_latent_representation(), model.get_latent_representation(), rtol=1e-5)
