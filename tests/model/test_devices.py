"""Batches reach the module on its device, whichever public method reads them: held here without a second device.

A loader whose batches are on no device of the module: all that can be done with them is to move them.
"""

import dataclasses
import inspect
import pickle
import random
from collections.abc import Iterator

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

import scvae_tools as svt
from scvae_tools._data.loader import CountDataset
from scvae_tools._data.resident import ResidentCells
from scvae_tools._random import random_states
from scvae_tools._train.plan import TrainingPlan

N_CELLS, N_GENES = 60, 12


class Elsewhere:
    """A tensor, or counts, of another device: it can be moved and asked for its length, and nothing else."""

    device = torch.device("meta")

    def __init__(self, value):
        self._value = value

    def __len__(self):
        return len(self._value)

    def to(self, device, **options):
        assert torch.device(device).type == "cpu"
        return self._value.to(device, **options)


@pytest.fixture
def batches_elsewhere(monkeypatch):
    original = CountDataset.__getitem__

    def elsewhere(self, positions):
        return {name: Elsewhere(value) for name, value in original(self, positions).items()}

    monkeypatch.setattr(CountDataset, "__getitem__", elsewhere)


def cells(seed=0):
    adata = svt.datasets.simulate(N_CELLS, N_GENES, 2, n_batches=2, random_state=seed)
    adata.obs["age"] = np.linspace(20, 80, N_CELLS)
    adata.obs["donor"] = pd.Categorical(np.where(np.arange(N_CELLS) % 3 == 0, "a", "b"))
    adata.obs["label"] = np.where(np.arange(N_CELLS) % 2 == 0, "unknown", adata.obs["component"].astype(str))
    return adata


def new_model(mixture, adata=None, **options):
    adata = cells() if adata is None else adata
    svt.SCVAE.setup_anndata(
        adata,
        batch_key="batch",
        labels_key="label",
        unlabeled_category="unknown",
        size_factor_key="size_factor",
        categorical_covariate_keys=["donor"],
        continuous_covariate_keys=["age"],
    )
    options = {"encode_covariates": True, "decode_size": True} | options
    return svt.SCVAE(adata, mixture=mixture, n_components=2 if mixture else None, n_latent=2, n_hidden=4, **options)


@pytest.fixture(scope="module", params=[False, "gmvae", "vade"])
def trained(request):
    model = new_model(request.param)
    model.train(3, progress=False)
    return model


#: Every public method that reads cells.
READS_CELLS = {
    "differential_abundance": lambda m: m.differential_abundance(sample_key="donor", num_cells_posterior=5),
    "differential_expression": lambda m: m.differential_expression(idx1=np.arange(20), idx2=np.arange(20, 40)),
    "get_aggregated_posterior": lambda m: m.get_aggregated_posterior(),
    "get_elbo": lambda m: m.get_elbo(),
    "get_elbo_terms": lambda m: m.get_elbo_terms(),
    "get_feature_correlation_matrix": lambda m: m.get_feature_correlation_matrix(n_samples=2),
    "get_fit": lambda m: m.get_fit(),
    "get_kl_by_dimension": lambda m: m.get_kl_by_dimension(),
    "get_lambda": lambda m: m.get_lambda(),
    "get_latent_representation": lambda m: m.get_latent_representation(return_dist=True),
    "get_likelihood_parameters": lambda m: m.get_likelihood_parameters(),
    "get_marginal_ll": lambda m: m.get_marginal_ll(n_mc_samples=3),
    "get_normalized_expression": lambda m: m.get_normalized_expression(n_samples=2, transform_batch="1"),
    "get_reconstruction_error": lambda m: m.get_reconstruction_error(),
    "iter_component_expression": lambda m: list(m.iter_component_expression(m.components, 4)) if m.is_mixture else None,
    "iter_decoded": lambda m: list(m.iter_decoded()),
    "iter_lambda": lambda m: list(m.iter_lambda()),
    "iter_samples": lambda m: list(m.iter_samples()),
    "n_fit_cells": lambda m: m.n_fit_cells(),
    "posterior_predictive_sample": lambda m: m.posterior_predictive_sample(n_samples=2),
    "predict": lambda m: m.predict(soft=True) if m.is_mixture else None,
    "sample": lambda m: m.sample(10, batch="1"),
}
#: Every public method that reads no cells, or is tested below.
READS_NO_CELLS = {
    *("convert_legacy_save", "load", "load_query_data", "load_registry", "prepare_query_anndata"),
    *("prepare_query_mudata", "save", "save_for_hub", "view_setup_args"),
    *("data_registry", "deregister_manager", "get_anndata_manager", "get_from_registry", "get_setup_arg"),
    *("get_state_registry", "get_var_names", "register_manager", "setup_anndata", "transfer_fields"),
    *("update_setup_method_args", "view_anndata_setup", "view_registry", "view_setup_method_args"),
    *(
        "counts_of_model",
        "evaluated_cells",
        "find_columns_in",
        "has_cells",
        "other_cells",
        "shown",
    ),  # of AnnData, nothing is decoded
    "setup_annbatch",  # of scvi-tools 1.5
    *("get_loadings", "get_prior", "to_device", "use_version", "minify_adata", "train"),
    *("get_importance_weights", "get_latent_library_size"),  # of scvi-tools' own prior and sizes
}


def test_every_public_method_is_in_one_of_the_two_tables():
    public = {
        name
        for name, value in inspect.getmembers(svt.SCVAE, callable)
        if not name.startswith("_") and not inspect.isclass(value)
    }
    assert set(READS_CELLS) | READS_NO_CELLS >= public
    assert not set(READS_CELLS) & READS_NO_CELLS


@pytest.mark.parametrize("name", READS_CELLS)
def test_a_public_method_moves_what_it_reads_to_the_device_of_the_model(name, trained, batches_elsewhere):
    READS_CELLS[name](trained)


@pytest.mark.parametrize("where", [(CountDataset, "__getitem__"), "encode", "decode"])
@pytest.mark.parametrize("name", READS_CELLS)
def test_ctrl_c_inside_a_public_method_leaves_what_is_global_as_it_was(name, where, trained, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    def found():
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), trained.module.training
        return modes, pickle.dumps(random_states()["numpy"][2:]), torch.get_rng_state().tolist(), random.getstate()

    before = found()
    owner, method = where if isinstance(where, tuple) else (type(trained.module), where)
    monkeypatch.setattr(owner, method, interrupt)
    try:
        READS_CELLS[name](trained)
    except KeyboardInterrupt as error:
        kept = error  # with the frames in which it was raised, as a notebook keeps it
        assert found() == before, kept
    assert found() == before


def as_numbers(result):
    """All numbers of a result of a method, one after the other, however it is put together."""
    if result is None or isinstance(result, str):
        return np.zeros(0)
    if isinstance(result, pd.DataFrame | pd.Series):
        result = result.select_dtypes("number").to_numpy() if isinstance(result, pd.DataFrame) else result.to_numpy()
    if isinstance(result, anndata.AnnData):
        result = result.X
    if hasattr(result, "todense"):  # of SciPy, or of the package sparse
        result = np.asarray(result.todense())
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, list | tuple | Iterator):
        return np.concatenate([as_numbers(each) for each in result] or [np.zeros(0)])
    if dataclasses.is_dataclass(result):
        return as_numbers(list(vars(result).values()))
    if isinstance(result, torch.distributions.Distribution):
        return as_numbers(result.mean)
    values = np.asarray(result.detach() if isinstance(result, torch.Tensor) else result)
    return values.astype(np.float64).ravel() if values.dtype.kind in "fiub" else np.zeros(0)


@pytest.mark.parametrize("name", READS_CELLS)
def test_cells_that_are_held_on_the_device_give_the_same_results(name, trained, monkeypatch):
    """As on a GPU, here on the CPU: `DenseCounts` in place of `Counts`, by every public method."""
    expected, reads = as_numbers(READS_CELLS[name](trained)), []

    def hold(model, adata, indices):
        reads.append(name)
        return ResidentCells(CountDataset(model.get_anndata_manager(adata), model.module.likelihood), "cpu")

    monkeypatch.setattr(svt.SCVAE, "_cells_on_device", hold)
    found = as_numbers(READS_CELLS[name](trained))
    read_otherwise = ("sample", "iter_component_expression", "get_aggregated_posterior", "n_fit_cells")  # or once
    assert reads or name in read_otherwise or len(expected) == 0
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mixture", [False, "gmvae", "vade"])
def test_training_and_writing_of_results_move_what_they_read(mixture, batches_elsewhere):
    adata = cells()
    model = svt.tl.scvae(
        adata,
        mixture=mixture,
        n_components=2 if mixture else None,
        labels_key="label" if mixture else None,
        unlabeled_category="unknown" if mixture else None,
        continuous_covariate_keys=["age"],
        n_latent=2,
        n_hidden=4,
        max_epochs=3,
        record_rates=True,
        return_model=True,
    )
    assert np.isfinite(adata.obsm["X_scvae"]).all()
    svt.tl.ppc(adata, model, n_samples=2)
    svt.tl.evaluate(adata, model, n_importance_samples=2)
    svt.tl.summarize_reconstruction(adata, model, n_samples=2)
    if mixture and adata.obs["scvae"].nunique() > 1:
        svt.tl.rank_components(adata, model, n_samples=5)


def test_methods_of_minified_data_move_what_they_read(batches_elsewhere):
    model = new_model("gmvae")
    model.train(3, progress=False)
    model.minify_adata()
    assert np.isfinite(model.get_latent_representation()).all()
    assert np.isfinite(model.predict(soft=True).to_numpy()).all()
    assert np.isfinite(model.get_normalized_expression().to_numpy()).all()
    model.posterior_predictive_sample()


def test_the_module_moves_a_batch_that_it_is_given(trained, batches_elsewhere):
    batch = CountDataset(trained.adata_manager, trained.module.likelihood)[np.arange(10)]
    module = trained.module
    assert torch.isfinite(module.loss(batch).loss)
    assert torch.isfinite(module.marginal_ll(batch, n_mc_samples=2)).all()
    assert module.sample(batch).shape == (10, N_GENES)
    *_, loss = module.forward(batch)
    assert torch.isfinite(loss.loss)


def test_all_that_a_prior_returns_is_on_the_device_of_the_module():
    module = new_model("gmvae").module.to("meta")
    for value in (module.prior.log_weights(), module.prior.entropy_of_y(), *module.prior.marginals()):
        assert value.device.type == "meta"


@pytest.mark.parametrize("mixture", [False, "vade"])
def test_every_stage_leaves_the_module_on_its_device(mixture, monkeypatch):
    """Lightning moves it to the CPU at the end of a fit; the mixture would be started there, and results computed."""
    events, model = [], new_model(mixture)
    monkeypatch.setattr(TrainingPlan, "cpu", lambda self: events.append("moved to the CPU"))
    original = type(model.module).to
    monkeypatch.setattr(
        type(model.module), "to", lambda self, *args: events.append("moved back") or original(self, *args)
    )
    model.train(3, progress=False)
    ends = [at for at, event in enumerate(events) if event == "moved to the CPU"]
    assert len(ends) >= 2
    assert all(events[at + 1] == "moved back" for at in ends)
