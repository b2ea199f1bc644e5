"""Models with a Gaussian mixture as their prior: GMVAE and VaDE, which infer the component in two ways."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from scvi import REGISTRY_KEYS
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from scvae_tools._checks import check_choice, check_whole
from scvae_tools._module.bounds import LOG_2PI, Posterior, cross_entropy, observe
from scvae_tools._module.gaussian_mixture import COVARIANCES, WEIGHTS, GaussianMixture
from scvae_tools._module.vae import VAE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scvae_tools._module.covariates import Sizes
    from scvae_tools._module.sparse import Counts

#: Term of q(y|x) in the loss, beside the bound's other terms; docs/clustering.md compares the three.
Y_TERMS = ("kl", "none", "cross-entropy")


#: Draws of z for q(y|x) = E p(y|z) in VaDE, outside the bound. Their noise is fixed, so that the probabilities of a
#: cell depend only on the cell.
N_PREDICTION_DRAWS = 64


class MixtureVAE(VAE):
    """Base class of GMVAE and VaDE: a VAE until its mixture is set, then a mixture model.

    Parameters
    ----------
    n_components
        Number k of components; None to build the mixture later, when training has found the number in the latent space.
    covariance, weights
        Covariance and weights of the prior; see `GaussianMixture`.
    y_term
        One of `Y_TERMS`.
    component_of_label
        Component that each code of the labels stands for, −1 for none; None if labels are not used.
    options
        Options of `VAE`.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        n_components: int | None = None,
        covariance: str = "full",
        weights: str | Sequence[float] = "learned",
        y_term: str = "kl",
        component_of_label: Sequence[int] | None = None,
        **options: object,
    ) -> None:
        super().__init__(sizes, **options)
        check_choice("covariance", covariance, COVARIANCES)
        check_choice("y_term", y_term, Y_TERMS)
        if isinstance(weights, str):
            check_choice("weights", weights, WEIGHTS)
        self.y_term, self.weights = y_term, weights
        self.component_of_label = component_of_label
        codes = None if component_of_label is None else torch.as_tensor(component_of_label)
        self.register_buffer("component_codes", codes, persistent=False)  # the same, on the device of the module
        self.n_components = None
        self._mixture_options = {"covariance": covariance, "weights": weights}
        # A buffer, so that it is saved; mirrored in a plain bool, so that no step has to read it from the device.
        self.register_buffer("mixture_is_set", torch.zeros((), dtype=torch.bool))
        self.is_mixture = False  #: whether the mixture has been set; before, the model is a VAE
        self.register_load_state_dict_post_hook(_mirror_is_mixture)
        # log T of the probabilities that are shown; no bound depends on it.
        self.register_buffer("log_temperature", torch.zeros(()))
        self.register_load_state_dict_pre_hook(_keep_earlier_probabilities)
        if n_components is not None:
            self.build_mixture(n_components)

    def build_mixture(self, n_components: int) -> None:
        """Add the parameters whose number depends on k."""
        self.n_components = n_components = check_whole("n_components", n_components)
        self.mixture = GaussianMixture(n_components, self.n_latent, **self._mixture_options)
        self.mixture.to(self.z_mean.weight)

    @property
    def prior(self) -> nn.Module:
        """Prior p(y) p(z|y) in use: N(0, I) until the mixture has been set."""
        return self.mixture if self.is_mixture else self.standard_normal

    @torch.no_grad()
    def set_mixture(self, weights: Tensor, means: Tensor, covariance: Tensor, posterior_variance: Tensor) -> None:
        """Set the prior to a Gaussian mixture that was fitted to the latent means of the VAE.

        Parameters
        ----------
        weights, means
            π (k,) and μ (k, d).
        covariance
            Σ (d, d) of the latent means within a component, shared by all.
        posterior_variance
            Mean over cells of the variances of q(z|x), (d,). p(z) models z, so its covariance is that of the latent
            means plus this variance.
        """
        spread = (covariance + torch.diag(posterior_variance)).expand(self.n_components, -1, -1)
        self.mixture.set(weights, means, spread)
        self.mixture_is_set.fill_(True)  # noqa: FBT003
        self.is_mixture = True

    def label(self, tensors: dict[str, Counts | Tensor]) -> Tensor | None:
        if self.component_of_label is None or self.y_term != "cross-entropy" or not self.is_mixture:
            return None
        code = self.moved(tensors)[REGISTRY_KEYS.LABELS_KEY][:, 0].long()
        component = self.component_codes
        return torch.where(code < len(component), component[code.clamp(max=len(component) - 1)], -1)

    @torch.no_grad()
    def set_temperature(self, temperature: float) -> None:
        """Set the temperature T of `calibrated`, above 0."""
        self.log_temperature.fill_(math.log(temperature))

    def calibrated(self, probabilities: Tensor) -> Tensor:
        """Probabilities of the components that are proportional to q(y|x)^(1/T), (n, k), from q(y|x) (n, k).

        T is found after the training (`_train/temperature.py`). The bounds have q(y|x) itself.
        """
        if self.log_temperature == 0:  # to the last bit
            return probabilities
        log_odds = probabilities.double().log() * math.exp(-float(self.log_temperature))
        return torch.softmax(log_odds, dim=1).to(probabilities)

    def permute_components(self, order: Tensor) -> None:
        """Renumber the components: the new component i is the old ``order[i]``."""
        self.mixture.permute(order)

    def sample_latent(self, n_cells: int, components: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self.is_mixture:
            return super().sample_latent(n_cells, components)
        if components is None:
            probabilities = self.mixture.log_weights().exp()
            components = torch.multinomial(probabilities, n_cells, replacement=True)
        return self.mixture.sample(components), components


def _keep_earlier_probabilities(module: MixtureVAE, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Set T = 1 in weights from before there was a temperature."""
    if prefix + "mixture_is_set" in state:
        state.setdefault(prefix + "log_temperature", torch.zeros_like(module.log_temperature))


def _mirror_is_mixture(module: MixtureVAE, _: object) -> None:
    module.is_mixture = bool(module.mixture_is_set)


class GMVAE(MixtureVAE):
    """Gaussian-mixture VAE of the scVAE paper: posterior q(y|x) q(z|x,y), y summed out exactly.

    y enters q(z|x,y) after the last norm of the encoder, where no batch statistic can subtract it again. At the start y
    has no effect, so that training continues from the VAE. The effect of y is not linear, also after a linear encoder.
    """

    has_component_posterior = True

    def build_mixture(self, n_components: int) -> None:
        super().build_mixture(n_components)
        n_hidden = self.z_mean.in_features
        self.y_logits = nn.Linear(n_hidden, n_components)
        self.y_embedding = nn.Parameter(0.1 * torch.randn(n_components, n_hidden))
        self.y_dropout = nn.Dropout(self.dropout_rates["y"])
        self.y_features = nn.Linear(n_hidden, n_hidden)
        self.y_mean = _zero_linear(n_hidden, self.z_mean.out_features)
        self.y_variance = _zero_linear(n_hidden, self.z_variance.out_features)
        self.to(self.z_mean.weight)

    @torch.no_grad()
    def set_mixture(self, weights: Tensor, means: Tensor, covariance: Tensor, posterior_variance: Tensor) -> None:
        super().set_mixture(weights, means, covariance, posterior_variance)
        # With one Σ for all components the responsibilities are a linear softmax of the latent mean, which is itself
        # linear in the features: q(y|x) can start exactly at them.
        slope = torch.linalg.solve(covariance, means.T).T  # (k, d)
        offset = weights.log() - 0.5 * (slope * means).sum(1)
        self.y_logits.weight.copy_(slope @ self.z_mean.weight)
        self.y_logits.bias.copy_(slope @ self.z_mean.bias + offset)

    @torch.no_grad()
    def permute_components(self, order: Tensor) -> None:
        super().permute_components(order)
        for parameter in (self.y_logits.weight, self.y_logits.bias, self.y_embedding):
            parameter.copy_(parameter[order])

    def posterior(self, features: Tensor) -> Posterior:
        if not self.is_mixture:
            return self.single_posterior(features)
        single = self.single_posterior(features)
        embedding = self.y_embedding[:, None]  # (k, 1, n_hidden)
        if self.training and self.y_dropout.p > 0:  # as a whole, for each cell and component
            embedding = embedding * self.y_dropout(embedding.new_ones(len(embedding), len(features), 1))
        by_component = torch.relu(self.y_features(features) + embedding)  # (k, n, n_hidden)
        return Posterior(
            log_softmax(self.y_logits(features), dim=1),
            single.mean + self.y_mean(by_component),
            single.log_var + self.y_variance(by_component),
        )


def _zero_linear(n_in: int, n_out: int) -> nn.Linear:
    layer = nn.Linear(n_in, n_out, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


class VaDE(MixtureVAE):
    """VaDE: one q(z|x), y summed out of the prior (Jiang et al. 2017, arXiv:1611.05148). One decoder pass a cell."""

    def __init__(self, sizes: Sizes, *, n_components: int | None = None, **options: object) -> None:
        super().__init__(sizes, n_components=n_components, **options)
        noise = torch.randn(N_PREDICTION_DRAWS, 1, self.n_latent, generator=torch.Generator().manual_seed(0))
        self.register_buffer("prediction_noise", noise)

    def kl_terms(self, posterior: Posterior, z: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """KL(q(z|x) ‖ Σ_y π_y p(z|y)) by Monte Carlo, as a term for z and one for y.

        log p(z) = Σ_y γ_y [log p(z|y) − log γ_y/π_y] with γ = p(y|z), so the KL splits exactly: the term for
        y is E KL(γ ‖ π).
        """
        if not self.is_mixture:
            return super().kl_terms(posterior, z, label)
        log_each = self.mixture.log_prob_each(z[:, 0])  # (s, k, n)
        log_prior = self.mixture.log_weights()[:, None]
        log_gamma = log_softmax(log_prior + log_each, dim=1)
        surprise = None
        if label is not None:
            surprise = cross_entropy(log_gamma.mT, label).mean(0)
            log_gamma = observe(log_gamma.mT, label).mT
        gamma = log_gamma.exp()
        negative_entropy = -0.5 * (posterior.log_var[0] + 1 + LOG_2PI).sum(-1)
        kl_z = negative_entropy - (gamma * log_each).sum(1).mean(0)
        kl_y = (gamma * (log_gamma - log_prior)).sum(1).mean(0)
        return kl_z, kl_y, surprise

    def probabilities(self, posterior: Posterior) -> Tensor:
        if not self.is_mixture:
            return super().probabilities(posterior)
        z = posterior.mean[0] + (0.5 * posterior.log_var[0]).exp() * self.prediction_noise  # (s, n, d)
        log_joint = self.mixture.log_weights()[:, None] + self.mixture.log_prob_each(z)
        return log_joint.softmax(dim=1).mean(0).T
