"""Fit of cells to a model: cells of types that it knows, of a type that it has not seen, and of files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import stats

import scvae_tools as svt
from scvae_tools.likelihoods import LIKELIHOODS

N_GENES = 60
#: Likelihoods of whether a gene is detected, in which the types of these tests hardly differ.
OF_DETECTION = {"bernoulli"}
OPTIONS = {"n_latent": 3, "n_hidden": 16}


def cells():
    """Cells of three types, and of a fourth one, shallow and deep ones among them."""
    options = {"separation": 1.3, "share_changed": 0.5, "median_counts": 300, "size_factor_sd": 0.6}
    adata = svt.datasets.simulate(2000, N_GENES, 4, proportions=[0.3, 0.25, 0.25, 0.2], random_state=0, **options)
    is_unknown = (adata.obs["component"] == "3").to_numpy()
    return adata[~is_unknown].copy(), adata[is_unknown].copy()


def trained(adata, max_epochs=25, **options):
    svt.SCVAE.setup_anndata(adata)
    model = svt.SCVAE(adata, **{"n_components": 3} | OPTIONS | options)
    model.train(max_epochs, progress=False, train_size=0.7)
    return model


@pytest.fixture(scope="module")
def split():
    """Cells to train on, new cells of the same types, and cells of another."""
    known, unknown = cells()
    return known[::2].copy(), known[1::2].copy(), unknown


@pytest.fixture(scope="module")
def model(split):
    return trained(split[0])


def auc(lower, higher):
    return stats.mannwhitneyu(higher, lower).statistic / (len(lower) * len(higher))


def test_a_type_that_was_not_trained_on_is_told_from_new_cells_of_the_others(model, split):
    known, unknown = model.get_fit(split[1]), model.get_fit(split[2])
    assert auc(unknown, known) > 0.95
    by_bound = auc(model.get_elbo(split[2], return_mean=False), model.get_elbo(split[1], return_mean=False))
    assert auc(unknown, known) > by_bound + 0.05


def test_new_cells_of_known_types_are_below_0_05_as_often_as_that_at_any_depth(model, split):
    fit, total = model.get_fit(split[1]), np.asarray(split[1].X.sum(1)).ravel()
    third = np.searchsorted(np.quantile(total, [1 / 3, 2 / 3]), total)
    n_reference, error = model.n_fit_cells(), np.sqrt(0.05 * 0.95)
    assert abs(np.mean(fit <= 0.05) - 0.05) < 3 * error * np.sqrt(1 / n_reference + 1 / len(fit))
    for each in range(3):
        assert abs(np.mean(fit[third == each] <= 0.05) - 0.05) < 3 * error * np.sqrt(3 / n_reference + 3 / len(fit))
    assert abs(np.median(fit) - 0.5) < 0.1


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_fit_is_there_with_every_likelihood(likelihood, split):
    model = trained(split[0][:300].copy(), 10, likelihood=likelihood, n_hidden=8)
    known, unknown = model.get_fit(split[1]), model.get_fit(split[2])
    assert np.isfinite(known).all()
    assert 0 < known.min() <= known.max() <= 1
    assert np.mean(known <= 0.05) < 0.16  # of 90 reference cells
    assert auc(unknown, known) > 0.6 or likelihood in OF_DETECTION


# -- where the reference comes from ------------------------------------------------------------------------------------


def small(prefix="cell", batch="a", **options):
    adata = svt.datasets.simulate(80, 15, 2, separation=2.0, random_state=0)
    adata.obs_names = [f"{prefix}{i}" for i in range(80)]
    adata.obs["batch"] = batch
    svt.SCVAE.setup_anndata(adata, batch_key="batch")
    model = svt.SCVAE(adata, **{"n_components": 2, "n_latent": 2, "n_hidden": 4} | options)
    model.train(3, progress=False, train_size=0.5)
    return model


def new_cells(batch="a"):
    adata = svt.datasets.simulate(50, 15, 2, separation=2.0, random_state=1)
    adata.obs_names = [f"new{i}" for i in range(50)]
    adata.obs["batch"] = batch
    return adata


def without_fit(folder):
    """Take the reference out of a saved model, as if an earlier version had written it."""
    content = torch.load(folder / "model.pt", weights_only=True)
    attributes = json.loads(content["attributes"])
    assert attributes.pop("fit_")["by_version"]
    torch.save(content | {"attributes": json.dumps(attributes)}, folder / "model.pt")


@pytest.mark.parametrize("mixture", [False, "gmvae", "vade"])
def test_the_reference_is_of_held_out_cells_and_is_saved_with_the_model(mixture, tmp_path):
    model = small(mixture=mixture, n_components=2 if mixture else None)
    model.save(tmp_path / "model")
    assert model.n_fit_cells() == len(model.validation_indices) == 40
    loaded = svt.SCVAE.load(tmp_path / "model")
    np.testing.assert_allclose(loaded.get_fit(new_cells()), model.get_fit(new_cells()), atol=1 / 41)
    loaded.save(tmp_path / "again")
    again = svt.SCVAE.load(tmp_path / "again", new_cells())
    assert again.n_fit_cells() == 40
    np.testing.assert_array_equal(again.get_fit(), loaded.get_fit(new_cells()))


def test_values_are_the_same_before_and_after_saving_and_in_any_order_of_calls(tmp_path):
    model, other = small(), small()
    before = model.get_fit(new_cells())
    other.save(tmp_path / "model")
    np.testing.assert_array_equal(other.get_fit(new_cells()), before)
    np.testing.assert_array_equal(other.get_fit(new_cells(), np.arange(10), batch_size=3), before[:10])


def test_training_cells_are_the_reference_where_none_were_held_out():
    adata = small().adata
    model = svt.SCVAE(adata, n_components=2, n_latent=2, n_hidden=4)
    model.train(2, progress=False, train_size=1.0)
    assert model.n_fit_cells() == 80
    assert abs(np.median(model.get_fit()) - 0.5) < 0.1  # they are compared with themselves


def test_a_model_that_is_trained_again_has_another_reference():
    model = small()
    before = model.get_fit(new_cells())
    model.train(3, progress=False, train_size=0.25)
    assert model.n_fit_cells() == 60
    assert (model.get_fit(new_cells()) != before).any()


def test_each_version_of_the_weights_has_its_own(tmp_path):
    model = small()
    best = model.get_fit(new_cells())
    model.use_version("end")
    end = model.get_fit(new_cells())
    model.save(tmp_path / "model")
    loaded = svt.SCVAE.load(tmp_path / "model", version="best")
    np.testing.assert_allclose(loaded.get_fit(new_cells()), best, atol=1 / 41)
    np.testing.assert_allclose(svt.SCVAE.load(tmp_path / "model").get_fit(new_cells()), end, atol=1 / 41)


def test_a_minified_model_keeps_its_reference(tmp_path):
    model = small()
    expected = model.get_fit(new_cells())
    model = small()
    model.minify_adata()
    model.save(tmp_path / "model", save_anndata=True)
    assert svt.SCVAE.load(tmp_path / "model").n_fit_cells() == 40
    full = svt.SCVAE.load(tmp_path / "model", new_cells())
    np.testing.assert_allclose(full.get_fit(), expected, atol=1 / 41)
    with pytest.raises(ValueError, match="The fit of cells needs the counts"):
        svt.SCVAE.load(tmp_path / "model").get_fit()


def test_a_model_from_before_takes_the_reference_from_its_data_or_says_what_to_do(tmp_path):
    model = small()
    model.save(tmp_path / "model")
    without_fit(tmp_path / "model")
    bare = svt.SCVAE.load(tmp_path / "model")
    assert bare.n_fit_cells() == 0
    message = r"saved without what is needed.*Load it with its training data, SCVAE\.load\(folder, adata\)"
    for _ in range(2):  # the model does not take the cells for its own
        with pytest.raises(ValueError, match=message):
            bare.get_fit(new_cells())
    with pytest.raises(ValueError, match=message):
        svt.SCVAE.load(tmp_path / "model", new_cells()).get_fit()
    whole = svt.SCVAE.load(tmp_path / "model", small().adata)
    np.testing.assert_allclose(whole.get_fit(new_cells()), model.get_fit(new_cells()), atol=1 / 41)


def test_a_model_that_is_not_trained_has_no_fit_and_is_saved_all_the_same(tmp_path):
    adata = small().adata
    model = svt.SCVAE(adata, n_components=2, n_latent=2, n_hidden=4)
    with pytest.raises(ValueError, match=r"not trained\. Call train\(\)"):
        model.get_fit()
    model.save(tmp_path / "model")
    assert svt.SCVAE.load(tmp_path / "model", adata).n_fit_cells() == 0


def test_a_model_whose_cells_have_changed_is_saved_without_a_reference(tmp_path):
    model = small()
    model.adata.X = model.adata.X * 0.5
    model.save(tmp_path / "model")
    assert svt.SCVAE.load(tmp_path / "model").n_fit_cells() == 0


def test_a_reference_of_another_model_in_the_file_is_refused(tmp_path):
    small().save(tmp_path / "model")
    content = torch.load(tmp_path / "model" / "model.pt", weights_only=True)
    attributes = json.loads(content["attributes"])
    attributes["fit_"]["by_version"]["best"]["residuals"] = []
    torch.save(content | {"attributes": json.dumps(attributes)}, tmp_path / "model" / "model.pt")
    with pytest.raises(ValueError, match=r"must be a model that `SCVAE\.save` wrote"):
        svt.SCVAE.load(tmp_path / "model")


def test_cells_mapped_onto_a_model_are_compared_with_the_cells_of_that_model(tmp_path):
    model = small()
    query = svt.SCVAE.load_query_data(new_cells("b"), model)
    before = query.get_fit()
    assert query.n_fit_cells() == 40
    query.train(2, progress=False)
    assert query.n_fit_cells() == 40
    query.save(tmp_path / "query")
    loaded = svt.SCVAE.load(tmp_path / "query", new_cells("b"))
    np.testing.assert_array_equal(loaded.get_fit(), query.get_fit())
    assert np.isfinite(before).all()
    free = svt.SCVAE.load_query_data(new_cells("b"), model, unfrozen=True)
    free.train(2, progress=False)
    assert free.n_fit_cells() == len(free.validation_indices)
