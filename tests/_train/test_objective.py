"""What training maximises: warm-up, weights, free nats, more draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import scvae_tools as svt
from scvae_tools._module.bounds import LABEL_WEIGHT, Bound
from scvae_tools._module.gaussian_mixture import GaussianMixture
from scvae_tools._train.plan import Objective
from scvae_tools._train.stages import plan_stages

N_EPOCHS = 20


@pytest.fixture(scope="module")
def adata():
    adata = svt.datasets.simulate(300, 40, 3, random_state=0)
    svt.SCVAE.setup_anndata(adata)
    return adata


def train(adata, *, mixture=False, n_epochs=N_EPOCHS, y_term=None, **options):
    of_mixture = {"n_components": 3, "y_term": y_term} if mixture else {}
    model = svt.SCVAE(adata, mixture=mixture, n_hidden=16, n_latent=3, **of_mixture)
    model.train(n_epochs, progress=False, early_stopping=False, **options)
    return model


# -- the loss ----------------------------------------------------------------------------------------------------------

BOUND = Bound(torch.tensor([-10.0, -20.0]), torch.tensor([1.0, 4.0]), torch.tensor([0.2, 0.4]))  # means -15, 2.5, 0.3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 15 + 2.5 + 0.3),
        ({"kl_weight": 0.5}, 15 + 0.5 * 2.8),
        ({"y_term": "none"}, 15 + 2.5),
        ({"free_nats_z": 3.0}, 15 + 3.0 + 0.3),
        ({"free_nats_z": 2.0}, 15 + 2.5 + 0.3),
        ({"free_nats_y": 1.0, "kl_weight": 2.0}, 15 + 2 * (2.5 + 1.0)),
        ({"free_nats_y": 1.0, "y_term": "none"}, 15 + 2.5),
    ],
)
def test_the_loss_is_the_sum_of_its_weighted_terms(options, expected):
    np.testing.assert_allclose(BOUND.loss(**options), expected, rtol=1e-6)


def test_labels_add_their_cross_entropy_to_the_loss():
    bound = Bound(BOUND.log_likelihood, BOUND.kl_z, BOUND.kl_y, torch.tensor([0.5, 0.0]))
    np.testing.assert_allclose(bound.loss(), 17.8 + LABEL_WEIGHT * 0.25, rtol=1e-6)


def test_a_kl_below_its_free_nats_has_no_gradient():
    kl_z, kl_y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    Bound(torch.zeros(2), kl_z, kl_y).loss(free_nats_z=1.5, free_nats_y=0.5).backward()
    assert kl_z.grad.tolist() == [0.0, 0.0]
    assert kl_y.grad.tolist() == [0.5, 0.5]


def test_the_entropy_of_y_is_that_of_its_weights():
    mixture = GaussianMixture(3, 2, covariance="diag", weights=[0.5, 0.25, 0.25])
    mixture.set(torch.ones(3) / 3, torch.zeros(3, 2), torch.eye(2).expand(3, 2, 2))
    np.testing.assert_allclose(mixture.entropy_of_y(), 1.5 * np.log(2), rtol=1e-6)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixture", [False, True])
def test_the_warm_up_takes_the_epochs_asked_for(adata, mixture):
    history = train(adata, mixture=mixture, n_warm_up_epochs=4, kl_weight_start=0, kl_weight=0.6).history
    assert history["stage"].eq("warm-up").sum() == 4
    np.testing.assert_allclose(history["kl_weight"], [0, 0.15, 0.3, 0.45] + [0.6] * (N_EPOCHS - 4), atol=1e-12)


def test_no_warm_up_is_zero_epochs():
    assert [stage.name for stage in plan_stages(10, mixture=True, n_warm_up_epochs=0)] == ["vae", "mixture"]


def test_the_history_holds_the_unweighted_bound(adata):
    history = train(adata, kl_weight=0.1).history
    for subset in ("train", "validation"):
        terms = [history[f"{name}_{subset}"] for name in ("log_likelihood", "kl_z", "kl_y")]
        np.testing.assert_allclose(history[f"elbo_{subset}"], terms[0] - terms[1] - terms[2])


def test_a_larger_weight_makes_the_kl_smaller(adata):
    kl = [train(adata, kl_weight=weight).history["kl_z_train"].iloc[-1] for weight in (0.0, 1.0, 5.0)]
    assert kl[0] > 1.2 * kl[1] > 1.2**2 * kl[2]


def test_free_nats_of_z_are_spent(adata):
    without, with_them = (train(adata, free_nats_z=nats).history["kl_z_train"].iloc[-1] for nats in (0.0, 2.0))
    assert without < 0.3
    assert with_them > 1.0


@pytest.mark.parametrize("mixture", ["gmvae", "vade"])
def test_free_nats_of_y_are_a_share_of_the_entropy_of_its_prior(adata, mixture):
    model = train(adata, mixture=mixture)
    (batch,) = model._make_data_loader(adata, batch_size=len(adata))
    losses = []
    for share in (0.0, 2.0):  # twice the entropy, which the KL from equal weights cannot reach
        torch.manual_seed(0)
        bound, loss = Objective(kl_weight=0.5, free_nats_y=share).loss(model.module, batch, 0.5)
        losses.append(loss.item())
    weights = model.get_prior()["weights"].astype(float)
    free = -2.0 * (weights * np.log(weights)).sum()
    np.testing.assert_allclose(losses[1] - losses[0], 0.25 * (free - bound.kl_y.mean().item()), rtol=1e-3)


@pytest.mark.parametrize("mixture", [False, "gmvae", "vade"])
@pytest.mark.parametrize("options", [{"n_samples": 3}, {"n_importance_samples": 5}], ids=str)
def test_more_draws_train_to_a_like_bound(adata, mixture, options):
    plain, other = train(adata, mixture=mixture), train(adata, mixture=mixture, **options)
    bounds = [model.get_marginal_ll(n_mc_samples=200) for model in (plain, other)]
    assert abs(bounds[0] - bounds[1]) < 0.02 * abs(bounds[0])


def test_an_importance_weighted_bound_lets_the_posterior_be_wider(adata):
    """It is tight for a wide q(z|x) too, and so trains the log marginal likelihood, not the ELBO."""
    plain, tight = train(adata, n_epochs=60), train(adata, n_epochs=60, n_importance_samples=10)
    gaps = [model.get_marginal_ll(n_mc_samples=200) - model.get_elbo(n_samples=5) for model in (plain, tight)]
    assert gaps[1] > gaps[0] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_weight": -1.0}, "`kl_weight` must be a finite number of at least 0; found -1.0"),
        ({"free_nats_z": np.inf}, "`free_nats_z` must be a finite number of at least 0; found inf"),
        ({"n_samples": 0}, "`n_samples` must be a whole number of at least 1; found 0"),
        ({"n_warm_up_epochs": -1}, "`n_warm_up_epochs` must be a whole number of at least 0, or None; found -1"),
        ({"n_warm_up_epochs": 21}, "at most the number of epochs of the VAE, 20 of the 20 in `max_epochs`; found 21"),
        ({"free_nats_y": 0.5}, "`free_nats_y` is of the KL of y, which a model with mixture=False has not"),
        ({"free_nats_y": 0.5, "mixture": True, "y_term": "none"}, "which a model with y_term='none' has not"),
        ({"n_importance_samples": 5, "free_nats_z": 1.0}, "found also 'free_nats_z'"),
        ({"n_importance_samples": 5, "n_samples": 2}, "found also 'n_samples'"),
        ({"n_importance_samples": 5, "mixture": True, "y_term": "none"}, "found also 'y_term'.*y_term='kl'"),
    ],
)
def test_what_cannot_be_trained_is_refused(adata, options, message):
    with pytest.raises(ValueError, match=message):
        train(adata, **options)


def test_a_mixture_that_goes_on_has_no_warm_up(adata):
    model = train(adata, mixture=True, n_epochs=5)
    with pytest.raises(ValueError, match="found one that was trained before"):
        model.train(5, n_warm_up_epochs=2, progress=False)
