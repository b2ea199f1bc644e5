"""Results of a trained model for other cells: those of the model's own methods, under the keys of the main job."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

import scvae_tools as svt

N_GENES = 20
OPTIONS = {"n_latent": 2, "n_hidden": 6, "max_epochs": 6, "progress": False, "return_model": True}


def cells(seed=0, n_cells=80):
    adata = svt.datasets.simulate(n_cells, N_GENES, 2, separation=2.0, n_batches=2, random_state=seed)
    adata.obs_names = [f"{seed}-{cell}" for cell in range(n_cells)]
    return adata


def fitted(adata=None, **options):
    adata = cells() if adata is None else adata
    return adata, svt.tl.scvae(adata, **{"n_components": 2} | OPTIONS | options)


@pytest.fixture(scope="module")
def trained():
    return fitted(batch_key="batch")


@pytest.mark.parametrize("mixture", [False, "gmvae", "vade"])
def test_the_cells_of_the_training_get_the_results_of_the_training(mixture):
    adata, model = fitted(mixture=mixture, n_components=2 if mixture else None)
    new = cells()
    svt.tl.predict(new, model, write_lambda=True)
    for slot in ("obs", "obsm", "layers", "varm"):
        assert set(getattr(new, slot)) - {"scvae_fit"} == set(getattr(adata, slot))
    for name in new.obsm:
        np.testing.assert_allclose(new.obsm[name], adata.obsm[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new.layers["scvae_lambda"], adata.layers["scvae_lambda"], rtol=1e-4, atol=1e-5)
    if mixture:
        assert (new.obs["scvae"] == adata.obs["scvae"]).all()
    stored = new.uns["scvae"]
    assert stored["elbo"] == {}
    pd.testing.assert_frame_equal(stored["history"], adata.uns["scvae"]["history"])
    assert stored["params"]["likelihood"] == "nb"


def test_genes_in_any_order_and_among_others_are_found_by_their_names(trained):
    _, model = trained
    new = cells(1)
    svt.tl.predict(new, model, write_lambda=True)
    others = AnnData(
        sparse.csr_matrix(np.ones((new.n_obs, 3), dtype=np.float32)),
        obs=new.obs[["batch"]],
        var=pd.DataFrame(index=["a", "b", "b"]),
    )
    mixed = anndata.concat([others, new[:, ::-1]], axis="var", merge="first")
    svt.tl.predict(mixed, model, write_lambda=True)
    np.testing.assert_array_equal(mixed.obsm["X_scvae"], new.obsm["X_scvae"])
    np.testing.assert_array_equal(mixed.obsm["scvae_probs"], new.obsm["scvae_probs"])
    rate = mixed.layers["scvae_lambda"]
    assert np.isnan(rate[:, :3]).all()
    np.testing.assert_array_equal(rate[:, 3:], new.layers["scvae_lambda"][:, ::-1])


def test_genes_that_are_missing_are_refused_or_filled(trained):
    _, model = trained
    zeroed = cells(1)
    dense = zeroed.X.toarray()
    dense[:, [2, 7]] = 0
    zeroed.X = sparse.csr_matrix(dense)
    fewer = zeroed[:, [*range(19, 7, -1), 6, 5, 4, 3, 1, 0]].copy()
    message = r"must have the genes of the model; 2 of 20 are missing, the first 'gene2'.*fill_missing=True"
    with pytest.raises(ValueError, match=message):
        svt.tl.predict(fewer, model)
    assert "X_scvae" not in fewer.obsm
    svt.tl.predict(fewer, model, fill_missing=True, write_lambda=True)
    svt.tl.predict(zeroed, model, write_lambda=True)
    np.testing.assert_array_equal(fewer.obsm["X_scvae"], zeroed.obsm["X_scvae"])
    known = zeroed.to_df("scvae_lambda")[fewer.var_names]
    np.testing.assert_array_equal(fewer.layers["scvae_lambda"], known)
    with pytest.raises(ValueError, match=r"20 of 20 are missing.*Names such as '0'"):
        svt.tl.predict(AnnData(np.ones((3, 2), dtype=np.float32)), model, fill_missing=True)


def test_no_cells_and_repeated_genes_are_refused_with_what_to_do(trained):
    _, model = trained
    with pytest.raises(svt.CountsError, match=r"at least one cell and one gene; found 0 cells.*Check the last filter"):
        svt.tl.predict(cells(1)[:0].copy(), model)
    new = cells(1)
    new.var_names = ["gene1", *new.var_names[1:]]
    with pytest.raises(ValueError, match="1 of 20 are missing"):
        svt.tl.predict(new, model)
    with pytest.raises(ValueError, match=r"found 'gene1' more than once.*var_names_make_unique"):
        svt.tl.predict(new, model, fill_missing=True)


def test_a_mask_of_the_training_leaves_the_other_genes_out():
    adata = cells()
    adata.var["kept"] = np.arange(N_GENES) % 3 > 0
    _, model = fitted(adata, mask_var="kept", linear_decoder=True)
    new = cells(1)
    svt.tl.predict(new, model, write_lambda=True)
    np.testing.assert_array_equal(np.isnan(new.layers["scvae_lambda"]).all(0), ~adata.var["kept"])
    np.testing.assert_array_equal(new.varm["scvae_loadings"], adata.varm["scvae_loadings"])


def halved(adata, layer):
    """Counts in a layer alone."""
    adata.layers[layer] = adata.X.copy()
    adata.X = adata.X.toarray() * 0.5
    return adata


def test_counts_come_from_the_layer_of_the_set_up_or_the_one_that_is_named():
    adata = halved(cells(), "raw")
    svt.SCVAE.setup_anndata(adata, layer="raw")
    model = svt.SCVAE(adata, n_components=2, n_latent=2, n_hidden=6)
    model.train(3, progress=False)
    expected, new, other = cells(1), halved(cells(1), "raw"), halved(cells(1), "counts")
    _, of_tool = fitted(halved(cells(), "raw"), layer="raw")
    svt.tl.predict(new, model)
    svt.tl.predict(other, model, layer="counts")
    np.testing.assert_array_equal(new.obsm["X_scvae"], other.obsm["X_scvae"])
    svt.tl.predict(expected, of_tool)
    svt.tl.predict(new, of_tool, layer="raw")
    np.testing.assert_array_equal(new.obsm["X_scvae"], expected.obsm["X_scvae"])


def test_cells_need_no_labels_that_the_model_knows():
    _, model = fitted(labels_key="component", n_components=3)
    new = cells(1)
    del new.obs["component"]
    svt.tl.predict(new, model)
    other = cells(1)
    other.obs["component"] = "quite another"
    svt.tl.predict(other, model)
    np.testing.assert_array_equal(new.obsm["scvae_probs"], other.obsm["scvae_probs"])
    assert set(new.obs["scvae"]) <= {"0", "1", "new 0"}
    assert list(other.obs["component"].unique()) == ["quite another"]


def test_a_copy_leaves_the_cells_as_they_were(trained):
    _, model = trained
    new = cells(1)
    copied = svt.tl.predict(new, model, copy=True, key_added="old")
    assert "X_old" in copied.obsm
    assert not new.obsm.keys()
    assert svt.tl.predict(new, model) is None


def test_results_of_an_earlier_model_are_replaced_as_a_whole(trained):
    _, model = trained
    _, plain = fitted(mixture=False, n_components=None)
    new = cells(1)
    svt.tl.predict(new, model, write_lambda=True)
    svt.tl.predict(new, plain)
    assert "scvae" not in new.obs
    assert set(new.obsm) == {"X_scvae"}
    assert "scvae_lambda" not in new.layers


def test_the_model_forgets_the_cells(trained):
    _, model = trained
    own, n_managers = model.adata, len(model._per_instance_manager_store[model.id])
    svt.tl.predict(cells(1), model)
    assert model.adata is own
    assert len(model._per_instance_manager_store[model.id]) == n_managers


def test_a_loaded_model_without_data_predicts_and_adopts_none(trained, tmp_path):
    _, model = trained
    model.save(tmp_path / "model", overwrite=True)
    loaded = svt.SCVAE.load(tmp_path / "model")
    new, same = cells(1), cells(1)
    svt.tl.predict(new, loaded)
    assert loaded.adata is None
    svt.tl.predict(same, model)
    np.testing.assert_allclose(new.obsm["X_scvae"], same.obsm["X_scvae"], rtol=1e-5, atol=1e-6)


def test_what_it_writes_can_be_saved(trained, tmp_path):
    _, model = trained
    new = cells(1)
    svt.tl.predict(new, model)
    new.write_h5ad(tmp_path / "new.h5ad")
    assert "X_scvae" in anndata.read_h5ad(tmp_path / "new.h5ad").obsm


BAD = {
    "no AnnData": (lambda new: new.to_df(), TypeError, "`adata` must be an AnnData"),
    "no batch": (lambda new: AnnData(new.X, var=new.var), ValueError, r"must have the column .* its `batch_key`"),
    "an unknown batch": (lambda new: with_batch(new, "z"), ValueError, r"must hold categories that the model knows"),
    "no counts": (lambda new: AnnData(new.X * 0.3, obs=new.obs, var=new.var), svt.CountsError, "integer counts"),
}


def with_batch(adata, batch):
    adata.obs["batch"] = batch
    return adata


@pytest.mark.parametrize("case", BAD)
def test_bad_cells_are_refused_and_stay_as_they_were(case, trained):
    change, error, message = BAD[case]
    bad = change(cells(1))
    with pytest.raises(error, match=message):
        svt.tl.predict(bad, trained[1])
    if isinstance(bad, AnnData):
        assert not bad.obsm.keys()
        assert not bad.uns.keys() - {"simulate"}


def test_a_model_must_be_trained():
    adata = cells()
    svt.SCVAE.setup_anndata(adata)
    with pytest.raises(ValueError, match=r"must be trained for svt.tl.predict"):
        svt.tl.predict(cells(1), svt.SCVAE(adata))
    with pytest.raises(TypeError, match="must be an SCVAE"):
        svt.tl.predict(cells(1), 3)


# -- none of these -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out():
    """Model of which 40 cells were held out."""
    return fitted(train_size=0.5)[1]


def test_the_fit_is_that_of_the_model_and_cells_below_a_limit_are_none(held_out):
    plain, limited = cells(), cells()
    svt.tl.predict(plain, held_out)
    svt.tl.predict(limited, held_out, none_below=0.2)
    expected = held_out.get_fit(cells())
    np.testing.assert_array_equal(plain.obs["scvae_fit"], expected)
    np.testing.assert_array_equal(limited.obs["scvae_fit"], expected)
    assert "none" not in plain.obs["scvae"].cat.categories
    assert limited.obs["scvae"].cat.categories[-1] == "none"
    is_none = expected < 0.2
    assert 0 < is_none.sum() < 40
    svt.tl.predict(other := cells(1), held_out, none_below=0.2)  # other types
    assert np.mean(other.obs["scvae"] == "none") > 0.9
    np.testing.assert_array_equal(limited.obs["scvae"] == "none", is_none)
    kept = [each.obs["scvae"].astype(str)[~is_none].tolist() for each in (limited, plain)]
    assert kept[0] == kept[1]
    np.testing.assert_array_equal(limited.obsm["scvae_probs"], plain.obsm["scvae_probs"])
    assert plain.uns["scvae"]["fit"] == {"n_reference": 40}
    assert limited.uns["scvae"]["fit"] == {"n_reference": 40, "none_below": 0.2}


def test_the_fit_of_an_earlier_prediction_is_deleted_and_a_column_of_the_user_is_not(held_out, tmp_path):
    held_out.save(tmp_path / "model")
    content = torch.load(tmp_path / "model" / "model.pt", weights_only=True)
    attributes = json.loads(content["attributes"])
    del attributes["fit_"]
    torch.save(content | {"attributes": json.dumps(attributes)}, tmp_path / "model" / "model.pt")
    new = cells()
    new.obs["scvae_fit"] = "good"
    svt.tl.predict(new, tmp_path / "model")
    assert (new.obs["scvae_fit"] == "good").all()
    svt.tl.predict(new, held_out)
    assert new.obs["scvae_fit"].dtype == np.float64
    svt.tl.predict(new, tmp_path / "model")
    assert "scvae_fit" not in new.obs
    with pytest.raises(ValueError, match="saved without what is needed"):
        svt.tl.predict(new, tmp_path / "model", none_below=0.1)


def test_a_limit_that_no_cell_could_be_below_is_refused(held_out):
    new = cells()
    with pytest.raises(ValueError, match=r"must be above 0\.024, the smallest fit by 40 reference.*found 0\.02"):
        svt.tl.predict(new, held_out, none_below=0.02)
    with pytest.raises(ValueError, match=r"`none_below` needs a mixture.*obs\[\"scvae_fit\"\]"):
        svt.tl.predict(new, fitted(mixture=False, n_components=None)[1], none_below=0.5)
    named = cells()
    named.obs["type"] = np.where(named.obs["component"] == "0", "none", "some")
    with pytest.raises(ValueError, match="which must be no component; found one of this name"):
        svt.tl.predict(new, fitted(named, labels_key="type")[1], none_below=0.5)
    assert not new.obsm.keys()
