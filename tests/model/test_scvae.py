"""The model class: every public method for every likelihood and kind, saving, new data, minified data, scArches."""

from __future__ import annotations

import gc
import inspect
import random
import weakref
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scipy import stats

import scvae_tools as svt
from scvae_tools._keys import LATENT_MEAN, LATENT_PROBABILITIES, LATENT_VARIANCE
from scvae_tools._module.covariates import Covariates
from scvae_tools.likelihoods import LIKELIHOODS
from scvae_tools.model._scvae import SCVAE

KINDS = [False, "gmvae", "vade"]
N_CELLS, N_GENES, N_COMPONENTS, N_LATENT = 120, 30, 3, 4
SMALL = {"n_latent": N_LATENT, "n_hidden": 16}


def make_data(n_cells=N_CELLS, *, seed=0, n_batches=2):
    adata = svt.datasets.simulate(n_cells, N_GENES, N_COMPONENTS, n_batches=n_batches, random_state=seed)
    rng = np.random.default_rng(seed)
    adata.obs["donor"] = pd.Categorical(rng.choice(["a", "b", "c"], n_cells))
    adata.obs["percent"] = rng.uniform(size=n_cells)
    return adata


def make_model(adata=None, *, train=True, max_epochs=3, setup=None, **options):
    adata = make_data() if adata is None else adata
    SCVAE.setup_anndata(adata, **(setup or {}))
    if options.get("mixture", True):
        options = {"n_components": N_COMPONENTS} | options
    model = SCVAE(adata, **(SMALL | options))
    if train:
        model.train(max_epochs, batch_size=32, progress=False)
    return model


#: Likelihoods with categories, by a name.
PIECEWISE = {"zip above 2": {"likelihood": "zip", "k_max": 2}}


@pytest.fixture(scope="module")
def trained():
    """Models by likelihood and kind, trained once."""
    models = {}

    def get(likelihood, mixture):
        if (likelihood, mixture) not in models:
            options = PIECEWISE.get(likelihood, {"likelihood": likelihood})
            models[likelihood, mixture] = make_model(mixture=mixture, setup={"batch_key": "batch"}, **options)
        return models[likelihood, mixture]

    return get


@pytest.fixture(params=KINDS, ids=str)
def mixture(request):
    return request.param


#: Likelihood and kind of `model`: all kinds of the first likelihoods, one of each other, to save time.
MODELS = [(name, kind) for name in ("poisson", "nb", "zip", "zinb") for kind in KINDS]
MODELS += [(name, "gmvae") for name in [*LIKELIHOODS, *PIECEWISE] if (name, "gmvae") not in MODELS]


def pytest_generate_tests(metafunc):
    if "model" in metafunc.fixturenames:
        metafunc.parametrize(("likelihood", "mixture"), MODELS)


@pytest.fixture
def model(likelihood, mixture, trained):
    return trained(likelihood, mixture)


# -- every method for every likelihood and kind ----------------------------------------------------------------------


@pytest.mark.parametrize(("mixture", "covariance"), [(False, "full"), ("gmvae", "diag")])
def test_kl_of_the_dimensions_adds_up_where_they_are_independent(mixture, covariance):
    model = make_model(mixture=mixture, covariance=covariance)
    each = model.get_kl_by_dimension(indices=np.arange(50), batch_size=7)
    assert each.shape == (N_LATENT,)
    assert each.sum() == pytest.approx(model.get_elbo_terms(indices=np.arange(50))["kl_z"].mean(), rel=1e-4)


@pytest.mark.parametrize("mixture", ["gmvae", "vade"])
def test_kl_of_a_dimension_is_that_of_the_marginals(mixture, trained):
    model = trained("nb", mixture)
    prior = model.get_prior()
    (tensors,) = model._batches(None, np.arange(20), None)
    with torch.inference_mode():
        posterior = model.module.posterior(model.module.encode(*model.module.data(tensors)))
        weight = model.module.probabilities(posterior).numpy()
    expected = np.zeros(N_LATENT)
    for component, (mean, covariance) in enumerate(zip(prior["means"], prior["covariances"], strict=True)):
        row = component if len(posterior.mean) > 1 else 0
        q = torch.distributions.Normal(posterior.mean[row], (0.5 * posterior.log_var[row]).exp())
        p = torch.distributions.Normal(torch.tensor(mean), torch.tensor(np.sqrt(np.diag(covariance))))
        expected += (weight[:, [component]] * torch.distributions.kl_divergence(q, p).numpy()).mean(0)
    np.testing.assert_allclose(model.get_kl_by_dimension(indices=np.arange(20)), expected, rtol=1e-4)


def test_the_prior_is_that_of_the_log_density(model):
    prior, z = model.get_prior(), np.random.default_rng(0).normal(size=(5, N_LATENT))
    each = [
        np.log(weight) + stats.multivariate_normal(mean, covariance).logpdf(z)
        for weight, mean, covariance in zip(*prior.values(), strict=True)
    ]
    with torch.no_grad():
        found = model.module.prior.log_prob(torch.tensor(z, dtype=torch.float32)[None])[0]
    np.testing.assert_allclose(found, np.logaddexp.reduce(each, axis=0), rtol=1e-4)


def test_latent_representation_is_finite_and_one_row_a_cell(model):
    latent = model.get_latent_representation()
    assert latent.shape == (N_CELLS, N_LATENT)
    assert latent.dtype == np.float32
    assert np.isfinite(latent).all()


def test_latent_moments_are_those_of_many_draws(model):
    mean, variance = model.get_latent_representation(return_dist=True)
    draws = np.stack([model.get_latent_representation(give_mean=False, random_state=s) for s in range(200)])
    error = np.sqrt(variance / 200)
    assert np.mean(np.abs(draws.mean(0) - mean) < 4 * error) > 0.99
    assert np.allclose(draws.var(0).mean(), variance.mean(), rtol=0.1)


def test_elbo_is_the_sum_of_its_terms_and_the_mean_over_cells(model):
    terms = model.get_elbo_terms()
    expected = terms["log_likelihood"] - terms["kl_z"] - terms["kl_y"]
    np.testing.assert_allclose(terms["elbo"], expected, rtol=1e-5)
    assert model.get_elbo() == pytest.approx(terms["elbo"].mean())
    np.testing.assert_array_equal(model.get_elbo(return_mean=False), terms["elbo"])
    assert model.get_reconstruction_error()["reconstruction_loss"] == pytest.approx(-terms["log_likelihood"].mean())
    assert (terms["kl_y"] > -1e-5).all()


def test_importance_weighted_bound_rises_with_the_samples_and_is_above_the_elbo(model):
    elbo = model.get_elbo(n_samples=20)
    one, many = (model.get_marginal_ll(n_mc_samples=n) for n in (1, 200))
    assert many > max(one, elbo)
    assert model.get_marginal_ll(n_mc_samples=4, return_mean=False).shape == (N_CELLS,)


def test_the_bound_does_not_depend_on_how_cells_are_batched(model):
    # KL z is free of Monte Carlo noise but for VaDE, where 100 draws leave a few per cent.
    whole, parts = (model.get_elbo_terms(batch_size=size, n_samples=100)["kl_z"] for size in (N_CELLS, 7))
    is_vade = type(model.module).__name__ == "VaDE"
    np.testing.assert_allclose(whole, parts, rtol=1e-4 if not is_vade else 0, atol=0 if not is_vade else 1.0)
    assert whole.mean() == pytest.approx(parts.mean(), rel=0.05, abs=0.02)


def test_lambda_has_the_total_of_each_cell_and_selects_genes(model):
    rate = model.get_lambda()
    assert rate.shape == (N_CELLS, N_GENES)
    assert rate.dtype == np.float32
    assert (rate > 0).all()
    genes = ["gene7", "gene2"]
    np.testing.assert_allclose(model.get_lambda(gene_list=genes), rate[:, [7, 2]], rtol=1e-4)
    np.testing.assert_allclose(np.concatenate(list(model.iter_lambda(batch_size=50))), rate, rtol=1e-4)
    out = np.zeros((3, N_GENES), dtype=np.float32)
    assert model.get_lambda(indices=[5, 1, 8], out=out) is out
    np.testing.assert_allclose(out, rate[[5, 1, 8]], rtol=1e-4)


def test_normalized_expression_is_lambda_over_the_size_factor(model):
    size = np.asarray(model.adata.X.sum(1))
    table = model.get_normalized_expression(n_samples=50)
    assert list(table.columns) == list(model.adata.var_names)
    ratio = table.to_numpy() * size / model.get_lambda()
    assert np.median(ratio) == pytest.approx(1, abs=0.15)  # the mean over draws against the value at the mean
    assert model.get_normalized_expression(gene_list=["gene3"]).shape == (N_CELLS, 1)


def test_normalized_expression_can_be_asked_for_another_batch(model):
    here, there = (model.get_normalized_expression(transform_batch=b).to_numpy() for b in ("0", "1"))
    assert not np.allclose(here, there)


def test_differential_expression_ranks_genes_and_leaves_no_column(model):
    columns = list(model.adata.obs)
    table = model.differential_expression(groupby="component", group1="0", group2="1", mode="change", silent=True)
    assert len(table) == N_GENES
    assert {"proba_de", "lfc_mean"} <= set(table)
    assert np.isfinite(table["lfc_mean"]).all()
    assert list(model.adata.obs) == columns


NEW = [{"likelihood": name} for name in ("constrained_poisson", "bernoulli", "gaussian", "log_normal", "lomax")]


@pytest.mark.parametrize(
    "options", [*NEW, *PIECEWISE.values()], ids=lambda options: " ".join(map(str, options.values()))
)
def test_training_improves_the_bound_of_cells_that_are_held_out(options):
    """From where it starts, which is at the means of the genes."""
    adata = svt.datasets.simulate(200, 40, 3, separation=2.0, median_counts=60, random_state=0)
    model = make_model(adata, max_epochs=25, mixture=False, **options)
    elbo = model.history["elbo_validation"]
    assert np.isfinite(elbo).all()
    assert elbo.iloc[-1] > elbo.iloc[0] + 1


def test_posterior_predictive_samples_are_like_the_counts(model):
    counts = model.posterior_predictive_sample(n_samples=3)
    assert counts.shape == (N_CELLS, N_GENES, 3)
    values = counts.todense()
    assert model.module.likelihood.support.check(torch.tensor(values)).all()
    seen = model.adata.X > 0 if model.module.likelihood.measures == "detection" else model.adata.X
    assert values.mean() == pytest.approx(seen.mean(), rel=0.5)
    assert model.posterior_predictive_sample().shape == (N_CELLS, N_GENES)


def test_likelihood_parameters_are_those_that_the_likelihood_declares(model):
    parameters = model.get_likelihood_parameters()
    names = {"log_rate": "mean", "log_r": "dispersions", "gate": "dropout"}
    assert set(parameters) == {names.get(head, head) for head in model.module.likelihood.head_names}
    for value in parameters.values():
        assert value.shape == (N_CELLS, N_GENES)
        assert np.isfinite(value).all()
    if "dropout" in parameters:
        assert ((parameters["dropout"] > 0) & (parameters["dropout"] < 1)).all()
    assert model.get_likelihood_parameters(n_samples=2)["mean"].shape == (2, N_CELLS, N_GENES)
    assert model.get_likelihood_parameters(n_samples=2, give_mean=True)["mean"].shape == (N_CELLS, N_GENES)


def test_sampled_cells_are_counts_with_the_sizes_of_the_data(model):
    new = model.sample(400)
    assert new.shape == (400, N_GENES)
    assert isinstance(new.X, sp.csr_matrix)
    assert model.module.likelihood.support.check(torch.tensor(new.X.data)).all()
    assert set(new.obs["batch"].unique()) == {"0", "1"}
    data_sizes = np.asarray(model.adata.X.sum(1)).ravel()
    assert set(new.obs["size_factor"]) <= set(data_sizes.astype(np.float32))
    assert (model.sample(20, batch="1").obs["batch"] == "1").all()


def test_prediction_and_probabilities_agree(model, mixture):
    if not mixture:
        with pytest.raises(ValueError, match="needs a mixture; this model has none"):
            model.predict()
        return
    soft = model.predict(soft=True)
    assert list(soft.columns) == ["0", "1", "2"]
    assert list(soft.index) == list(model.adata.obs_names)
    np.testing.assert_allclose(soft.sum(1), 1, rtol=1e-5)
    hard = model.predict()
    np.testing.assert_array_equal(hard, soft.columns[soft.to_numpy().argmax(1)])
    assert sorted(pd.Series(hard).value_counts().tolist(), reverse=True) == [
        (hard == name).sum() for name in soft.columns if (hard == name).any()
    ]
    np.testing.assert_array_equal(model.predict(indices=[3, 1]), hard[[3, 1]])


def test_new_data_with_the_same_genes_give_the_same_results(model, mixture):
    new = model.adata[:40].copy()
    for key in list(new.uns):
        del new.uns[key]
    np.testing.assert_allclose(model.get_latent_representation(new), model.get_latent_representation()[:40], atol=1e-5)
    np.testing.assert_allclose(model.get_lambda(new), model.get_lambda()[:40], rtol=1e-4)
    if mixture:
        np.testing.assert_array_equal(model.predict(new), model.predict()[:40])


def test_saved_models_load_without_data_and_agree(model, mixture, tmp_path):
    model.save(tmp_path / "model")
    loaded = SCVAE.load(tmp_path / "model")
    assert loaded.adata is None
    pd.testing.assert_frame_equal(loaded.history, model.history)
    np.testing.assert_array_equal(loaded.sample(5).X.toarray(), model.sample(5).X.toarray())
    data = make_data()
    np.testing.assert_allclose(loaded.get_latent_representation(data), model.get_latent_representation(), atol=1e-5)
    assert loaded.get_elbo(data) == pytest.approx(model.get_elbo(), rel=1e-5)
    if mixture:
        np.testing.assert_array_equal(loaded.predict(data), model.predict())


def test_minified_data_keep_latent_space_and_clusters(model, mixture, tmp_path):
    model.save(tmp_path / "model")
    mini = SCVAE.load(tmp_path / "model", make_data())
    original = mini.adata
    keys = set(original.obsm)
    latent, before = mini.get_latent_representation(), mini.predict(soft=True) if mixture else None
    mini.minify_adata()
    assert set(original.obsm) == keys
    assert {LATENT_MEAN, LATENT_VARIANCE, LATENT_PROBABILITIES} <= set(mini.adata.obsm)
    assert mini.adata.X.nnz == 0
    np.testing.assert_allclose(mini.get_latent_representation(), latent, atol=1e-6)
    assert np.isfinite(mini.get_normalized_expression().to_numpy()).all()
    assert mini.posterior_predictive_sample().shape == (N_CELLS, N_GENES)
    if mixture:
        pd.testing.assert_frame_equal(mini.predict(soft=True), before, check_exact=False, atol=1e-6)
    with pytest.raises(ValueError, match="counts"):
        mini.get_elbo()
    with pytest.raises(ValueError, match="cannot be trained"):
        mini.train(1)
    mini.save(tmp_path / "mini", save_anndata=True)
    again = SCVAE.load(tmp_path / "mini")
    np.testing.assert_allclose(again.get_latent_representation(), latent, atol=1e-6)


def test_query_data_of_a_new_batch_can_be_mapped_and_trained(model, mixture, tmp_path):
    query = make_data(60, seed=1)
    query.obs["batch"] = pd.Categorical(["new"] * 60)
    mapped = SCVAE.load_query_data(query, model)
    assert mapped.module.sizes.n_batch == 3
    prior = {k: v.clone() for k, v in mapped.module.state_dict().items() if "mixture" in k or "head" in k}
    mapped.train(2, batch_size=32, progress=False)
    assert mapped.get_latent_representation().shape == (60, N_LATENT)
    for name, value in prior.items():
        assert torch.equal(mapped.module.state_dict()[name], value), name
    old = make_data()
    np.testing.assert_allclose(mapped.get_lambda(old), model.get_lambda(), rtol=1e-4)
    if mixture:
        assert len(mapped.predict()) == 60
    model.save(tmp_path / "reference")
    from_disk = SCVAE.load_query_data(query.copy(), tmp_path / "reference")
    assert from_disk.module.sizes.n_batch == 3


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-cell"])
def test_dispersion_varies_where_it_is_said_to(dispersion):
    model = make_model(dispersion=dispersion, setup={"batch_key": "batch"}, max_epochs=4)
    r = model.get_likelihood_parameters()["dispersions"]
    first = (model.adata.obs["batch"] == "0").to_numpy()
    within = np.ptp(r[first], axis=0).max()
    between = np.abs(r[first][0] - r[~first][0]).max()
    assert (within > 0) == (dispersion == "gene-cell")
    assert (between > 0) == (dispersion != "gene")


def test_all_covariates_together_reach_the_model(tmp_path):
    setup = {
        "batch_key": "batch",
        "labels_key": "component",
        "size_factor_key": "size_factor",
        "categorical_covariate_keys": ["donor"],
        "continuous_covariate_keys": ["percent"],
    }
    model = make_model(setup=setup, encode_covariates=True)
    assert np.isfinite(model.get_elbo())
    assert model.sample(10).n_obs == 10
    other = model.adata.copy()
    other.obs["percent"] += 5
    assert not np.allclose(model.get_lambda(other), model.get_lambda())
    model.save(tmp_path / "model")
    loaded = SCVAE.load(tmp_path / "model", make_data())
    assert loaded.get_elbo() == pytest.approx(model.get_elbo(), rel=1e-5)


def test_query_of_a_reference_with_covariates_leaves_old_batches_unchanged():
    setup = {"batch_key": "batch", "categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["percent"]}
    reference = make_model(setup=setup, encode_covariates=True)
    query = make_data(40, seed=2)
    query.obs["batch"] = pd.Categorical(["new"] * 40)
    mapped = SCVAE.load_query_data(query, reference)
    np.testing.assert_allclose(mapped.get_lambda(make_data()), reference.get_lambda(), rtol=1e-4)


def test_query_of_a_reference_with_one_batch_leaves_it_unchanged():
    reference = make_model(make_data(n_batches=1), setup={"batch_key": "batch"})
    query = make_data(40, seed=2, n_batches=1)
    query.obs["batch"] = pd.Categorical(["new"] * 40)
    mapped = SCVAE.load_query_data(query, reference)
    np.testing.assert_allclose(mapped.get_lambda(make_data(n_batches=1)), reference.get_lambda(), rtol=1e-4)


def test_training_a_query_changes_no_old_batch():
    setup = {"batch_key": "batch", "categorical_covariate_keys": ["donor"]}
    reference = make_model(setup=setup)
    query = make_data(40, seed=2)
    query.obs["batch"] = pd.Categorical(["new"] * 40)
    mapped = SCVAE.load_query_data(query, reference)
    mapped.train(2, batch_size=20, progress=False)
    np.testing.assert_allclose(mapped.get_lambda(make_data()), reference.get_lambda(), rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"posterior_variance": "shared"},
        {"encoder_input": "log1p"},
        {"encoder_input": "counts"},
        {"use_size_factor": False},
        {"normalization": "batch"},
        {"normalization": "none"},
        {"covariance": "diag"},
        {"covariance": "tied"},
        {"weights": "uniform"},
        {"n_layers": 2, "dropout_rate": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("mixture", ["gmvae", "vade"])
def test_options_train_and_survive_saving(options, mixture, tmp_path):
    model = make_model(mixture=mixture, **options)
    assert np.isfinite(model.get_elbo())
    model.save(tmp_path / "model")
    assert SCVAE.load(tmp_path / "model", make_data()).get_elbo() == pytest.approx(model.get_elbo(), rel=1e-5)


def test_chosen_components_are_sampled_around_their_means():
    model = make_model(max_epochs=10)
    latent = model.sample(3000, components="1").obsm["X_latent"]
    mean = model.module.mixture.means[1].detach().numpy()
    covariance = model.module.mixture.covariances()[1].detach().numpy()
    np.testing.assert_allclose(latent.mean(0), mean, atol=4 * np.sqrt(covariance.max() / 3000))
    np.testing.assert_allclose(np.cov(latent.T), covariance, atol=0.15 * covariance.max())
    with pytest.raises(ValueError, match="must be among 0, 1, 2; found '7'"):
        model.sample(4, components="7")
    with pytest.raises(ValueError, match="one for each of 4 cells; found 2"):
        model.sample(4, components=["0", "1"])


def test_components_can_be_counted_by_the_model_and_are_saved(tmp_path):
    model = make_model(n_components=None)
    assert model.n_components >= 1
    model.save(tmp_path / "model")
    loaded = SCVAE.load(tmp_path / "model", make_data())
    np.testing.assert_array_equal(loaded.predict(), model.predict())


# -- training --------------------------------------------------------------------------------------------------------


def test_history_has_a_row_an_epoch_and_names_the_stages():
    model = make_model(max_epochs=10)
    history = model.history
    assert list(history["epoch"]) == list(range(1, 11))
    assert list(dict.fromkeys(history["stage"])) == ["warm-up", "vae", "mixture"]
    assert (history.loc[history["stage"] != "warm-up", "kl_weight"] == 1).all()
    weights = history.loc[history["stage"] == "warm-up", "kl_weight"]
    n_train = len(model.train_indices)
    assert weights.iloc[0] == pytest.approx((1 + np.sqrt(model.adata.n_vars / n_train)) ** 2)
    assert weights.is_monotonic_decreasing
    for subset in ("train", "validation"):
        terms = [history[f"{name}_{subset}"] for name in ("elbo", "log_likelihood", "kl_z", "kl_y")]
        np.testing.assert_allclose(terms[0], terms[1] - terms[2] - terms[3], rtol=1e-6)


@pytest.mark.parametrize(("n_cells", "batch_size"), [(5, 128), (100, 128), (3_000, 128), (1_000_000, 128)])
def test_the_kl_weight_rises_evenly_to_one_for_any_number_of_cells(n_cells, batch_size):
    from scvae_tools._train.plan import TrainingPlan
    from scvae_tools._train.stages import default_max_epochs, plan_stages

    warm_up, after = plan_stages(default_max_epochs(n_cells), mixture=True)[:2]
    n_batches = -(-n_cells // batch_size)
    steps = np.arange(warm_up.max_epochs * n_batches + 1)
    plan = SimpleNamespace(stage=warm_up, trainer=SimpleNamespace(num_training_batches=n_batches, global_step=0))
    plan.share_done = lambda: TrainingPlan.share_done(plan)
    weights = []
    for plan.trainer.global_step in steps.tolist():
        weights.append(TrainingPlan.warm_up_share(plan))
    np.testing.assert_allclose(weights, steps / steps[-1])
    plan.stage = after
    assert TrainingPlan.warm_up_share(plan) == 1


def test_training_again_goes_on_from_the_mixture():
    model = make_model(max_epochs=4)
    model.train(2, progress=False)
    assert list(model.history["epoch"]) == list(range(1, 7))
    assert list(model.history["stage"][4:]) == ["mixture"] * 2
    assert not model.module.training


def test_training_goes_on_after_loading(tmp_path):
    model = make_model(mixture=False)
    model.save(tmp_path / "model")
    loaded = SCVAE.load(tmp_path / "model", make_data())
    loaded.train(2, progress=False)
    assert list(loaded.history["stage"][-2:]) == ["vae"] * 2


def test_early_stopping_ends_a_stage_and_keeps_the_best_weights():
    model = make_model(mixture=False, train=False, n_hidden=64)
    model.train(300, lr=0.02, patience=5, progress=False, batch_size=32, random_state=1)
    rows = model.history[model.history["stage"] == "vae"]
    assert len(rows) < 225
    best = rows["elbo_validation"].max()
    assert len(rows) - 1 - int(np.argmax(rows["elbo_validation"])) == 5
    assert model.get_elbo(indices=model.validation_indices, n_samples=50) == pytest.approx(best, abs=1.5)
    assert best > rows["elbo_validation"].iloc[-1]


def test_held_out_cells_can_be_named():
    model = make_model(train=False)
    model.train(3, validation_indices=[1, 5, 9], progress=False)
    assert list(model.validation_indices) == [1, 5, 9]
    assert len(model.train_indices) == N_CELLS - 3
    assert len(set(model.train_indices) & {1, 5, 9}) == 0


def test_held_out_cells_can_be_a_mask_and_must_leave_some_to_train_on():
    model, mask = make_model(train=False), np.arange(N_CELLS) % 10 == 3
    model.train(2, validation_indices=mask, progress=False)
    np.testing.assert_array_equal(model.validation_indices, np.flatnonzero(mask))
    with pytest.raises(ValueError, match="must leave cells to train on; found all 120 held out"):
        model.train(1, validation_indices=range(N_CELLS), progress=False)
    with pytest.raises(ValueError, match=r"`validation_indices` must be positions among 120 cells; found 120"):
        model.train(1, validation_indices=[120], progress=False)


def test_cells_can_be_chosen_by_a_mask_wherever_by_position(trained):
    model, positions = trained("nb", "gmvae"), [7, 50, 119]
    mask = np.isin(np.arange(N_CELLS), positions)
    methods = (
        model.get_lambda,
        model.get_latent_representation,
        model.get_elbo_terms,
        model.predict,
        lambda indices: model.predict(indices=indices, soft=True),
        model.get_normalized_expression,
        lambda indices: model.get_marginal_ll(indices=indices, n_mc_samples=2, return_mean=False),
        lambda indices: model.get_likelihood_parameters(indices=indices)["mean"],
    )
    for method in methods:
        by_position = method(indices=positions)
        assert len(by_position) == 3
        for chosen in (mask, mask.tolist(), [-113, -70, -1]):
            np.testing.assert_array_equal(method(indices=chosen), by_position)
        with pytest.raises(ValueError, match=r"one boolean per cell, shape \(120,\); found shape \(5,\)"):
            method(indices=mask[:5])
        with pytest.raises(ValueError, match="must be positions among 120 cells; found 700"):
            method(indices=[0, 700])


def test_the_same_seed_gives_the_same_model_and_leaves_the_global_state():
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    torch.manual_seed(5)
    before = random.random(), np.random.rand(), float(torch.rand(1))  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    torch.manual_seed(5)
    first, second = make_model(), make_model()
    np.testing.assert_array_equal(first.get_lambda(), second.get_lambda())
    first.sample(3), first.get_elbo(), first.get_normalized_expression()
    assert (random.random(), np.random.rand(), float(torch.rand(1))) == before  # noqa: NPY002
    other = make_data()
    SCVAE.setup_anndata(other)
    third = SCVAE(other, n_components=N_COMPONENTS, random_state=1, **SMALL)
    assert not torch.equal(third.module.z_mean.weight, first.module.z_mean.weight)


# -- errors, names, memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"likelihood": "negative_binomial"}, "'poisson', 'nb', 'zip', 'zinb', .*; found 'negative_binomial'"),
        ({"mixture": "gmm"}, "must be False, True, 'gmvae' .* found 'gmm'"),
        ({"mixture": 2}, "must be False, True"),
        ({"dispersion": "cell"}, "`dispersion` must be one of 'gene', 'gene-batch', 'gene-cell'; found 'cell'"),
        ({"n_latent": 0}, "`n_latent` must be a whole number of at least 1; found 0"),
        ({"n_layers": 1.5}, "`n_layers` must be a whole number"),
        ({"dropout_rate": 1.0}, r"`dropout_rate` must be in \[0, 1\); found 1.0"),
        ({"n_components": 0}, "`n_components` must be a whole number of at least 1, .* or None; found 0"),
        ({"n_components": (5, 2)}, r"`n_components` must be .*; found \(5, 2\)"),
        ({"n_components": 121}, "found 121 components for 120 cells"),
        ({"covariance": "spherical"}, "`covariance` must be one of"),
        ({"weights": "given"}, "`weights` must be one of"),
        ({"encoder_input": "raw"}, "`encoder_input` must be one of"),
    ],
)
def test_unknown_options_are_refused_with_the_choices(options, match):
    with pytest.raises(ValueError, match=match):
        make_model(train=False, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_epochs": 0}, "`max_epochs` must be a whole number of at least 1"),
        ({"batch_size": 0}, "`batch_size` must be a whole number of at least 1; found 0"),
        ({"train_size": 1.2}, r"`train_size` must be in \(0, 1\]; found 1.2"),
        ({"lr": -1}, "`lr` must be a finite number above 0; found -1"),
        ({"gradient_clip": -1.0}, "`gradient_clip` must be a finite number above 0, or None; found -1.0"),
        ({"gradient_clip": 0}, "`gradient_clip` must be a finite number above 0, or None; found 0"),
        ({"gradient_clip": float("nan")}, "`gradient_clip` must be a finite number above 0, or None; found nan"),
        ({"gradient_clip": "a"}, "`gradient_clip` must be a finite number above 0, or None; found 'a'"),
        ({"patience": -3}, "`patience` must be a whole number of at least 0, or None; found -3"),
        ({"patience": 2.5}, "`patience` must be a whole number of at least 0, or None; found 2.5"),
        ({"weight_decay": -1.0}, "`weight_decay` must be a finite number of at least 0; found -1.0"),
        ({"precision": "bf16-mixed"}, "`precision` must be '32-true'.*found 'bf16-mixed'.*matmul_precision='medium'"),
        (
            {"matmul_precision": "low"},
            "`matmul_precision` must be one of None, 'highest', 'high', 'medium'; found 'low'",
        ),
    ],
)
def test_unfit_training_arguments_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        make_model(train=False).train(**options)


def test_data_with_other_genes_are_refused_with_the_first_missing():
    model = make_model()
    with pytest.raises(ValueError, match="1 of the model's 30 genes are missing, the first 'gene0'"):
        model.predict(make_data()[:, 1:].copy())
    with pytest.raises(ValueError, match="in another order or among others"):
        model.predict(make_data()[:, ::-1].copy())
    with pytest.raises(ValueError, match="the first 'GENE'"):
        model.get_lambda(gene_list=["gene1", "GENE"])


def test_new_data_are_checked_like_the_first():
    model = make_model()
    bad = make_data()
    bad.X = bad.X * 0.5
    with pytest.raises(ValueError, match="integer"):
        model.get_latent_representation(bad)


ALL_COLUMNS = {
    "batch_key": "batch",
    "labels_key": "component",
    "size_factor_key": "size",
    "categorical_covariate_keys": ["donor"],
    "continuous_covariate_keys": ["percent"],
}


@pytest.mark.parametrize("is_loaded", [False, True])
def test_new_data_must_have_the_columns_and_categories_of_the_model(is_loaded, tmp_path):
    def data(**changed):
        adata = make_data()
        adata.obs = adata.obs.assign(size=1.0, component=adata.obs["component"].astype(str)).assign(**changed)
        return adata

    model = make_model(data(), setup=ALL_COLUMNS, max_epochs=1, y_term="kl")
    expected = model.get_latent_representation(data())
    if is_loaded:
        model.save(tmp_path / "model")
        model = SCVAE.load(tmp_path / "model")
    for role, keys in ALL_COLUMNS.items():
        key = keys if isinstance(keys, str) else keys[0]
        bad = data()
        del bad.obs[key]
        with pytest.raises(ValueError, match=rf"must have the column '{key}' in adata\.obs, which was its `{role}`"):
            model.get_latent_representation(bad)
    batches = make_data().obs["batch"].cat.categories.tolist()
    for changed, message in {
        "batch": rf"knows, '{batches[0]}', '{batches[1]}'; found 'new'\. .*load_query_data",
        "donor": r"knows, 'a', 'b', 'c'; found 'new'\. Train a model on cells of these",
        "component": r"found 'new'\. No result depends on it: any known label does, adata\.obs\['component'\] = '0'",
    }.items():
        with pytest.raises(ValueError, match=message):
            model.get_latent_representation(data(**{changed: "new"}))
    with pytest.raises(ValueError, match=r"`size_factor_key`\) must be above 0"):
        model.get_latent_representation(data(size=0.0))
    np.testing.assert_allclose(model.get_latent_representation(data(component="0")), expected, rtol=1e-5, atol=1e-6)


def test_a_batch_is_named_by_its_number_or_by_its_text():
    adata = make_data()
    adata.obs["run"] = np.where(adata.obs["batch"] == adata.obs["batch"].iloc[0], 10, 9)
    model = make_model(adata, setup={"batch_key": "run"}, mixture=False, max_epochs=1)
    for batch in (10, np.int64(10), "10"):
        assert set(model.sample(5, batch=batch).obs["batch"]) == {10}
    with pytest.raises(ValueError, match="must be one of '9', '10'; found '1'"):
        model.sample(5, batch=1)


def test_results_before_training_warn():
    model = make_model(train=False)
    with pytest.warns(UserWarning, match="not trained|untrained"):
        model.get_elbo()
    with pytest.raises(ValueError, match="has not been trained"):
        model.predict()


def test_models_and_data_are_freed():
    adata = make_data()
    model = make_model(adata)
    SCVAE._setup_adata_manager_store.clear()
    references = weakref.ref(adata), weakref.ref(model)
    del adata, model
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_saving_does_not_overwrite_and_cannot_execute_code(tmp_path):
    model = make_model()
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="exists already"):
        model.save(tmp_path / "model")
    model.save(tmp_path / "model", overwrite=True)
    saved = torch.load(tmp_path / "model" / "model.pt", weights_only=True)
    assert saved["scvae_tools_version"] == svt.__version__
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["model.pt"]
    with pytest.raises(FileNotFoundError, match="No saved model"):
        SCVAE.load(tmp_path / "nowhere")


def test_public_methods_are_documented():
    for name, method in inspect.getmembers(SCVAE, inspect.isroutine):
        if not name.startswith("_") and method.__module__.startswith("scvae_tools"):
            assert method.__doc__, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mixture", KINDS, ids=str)
def test_a_gpu_trains_and_evaluates_like_the_processor(mixture):
    model = make_model(mixture=mixture)
    on_gpu = model.get_elbo(n_samples=50)
    model.to_device("cpu")
    assert model.get_elbo(n_samples=50) == pytest.approx(on_gpu, abs=1.0)


def test_lambda_and_normalized_expression_of_a_piecewise_categorical_are_of_the_counts():
    adata = svt.datasets.simulate(300, 30, 2, median_counts=60, random_state=0)
    SCVAE.setup_anndata(adata)
    model = SCVAE(adata, mixture=False, likelihood="poisson", k_max=2, n_hidden=16, n_latent=2)
    model.train(20, progress=False)
    assert model.get_lambda().sum() == pytest.approx(adata.X.sum(), rel=0.1)
    typical = float(model.module.reference_size.median())
    z, size = torch.zeros(2, 2), torch.tensor([[typical], [3 * typical]])
    covariates = Covariates(torch.zeros(2, 1, dtype=torch.long))
    px = model.module.decode(z, size, covariates)
    np.testing.assert_allclose(px.scale[0], px.mean[0] / typical, rtol=1e-5)
    np.testing.assert_allclose(px.scale[1], px.scale[0], rtol=1e-5)  # the same whatever the size of the cell
    with pytest.raises(ValueError, match="k_max above 0"):
        SCVAE(adata, mixture=False, k_max=2, linear_decoder=True).get_loadings()
