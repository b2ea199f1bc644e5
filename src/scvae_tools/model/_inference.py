"""Inference with a trained model: bounds, latent codes and components of cells, prior, loadings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scvi import settings

from scvae_tools import _keys
from scvae_tools._checks import cell_positions, checked
from scvae_tools._module.bounds import kl_of_marginals
from scvae_tools._module.mixture_vaes import MixtureVAE
from scvae_tools._random import seeded
from scvae_tools.model._expression import ExpressionMixin
from scvae_tools.model._sampling import SamplingMixin

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from anndata import AnnData


class InferenceMixin(ExpressionMixin, SamplingMixin):
    """Inference with `SCVAE`, in place of the methods of scvi-tools, which know one Gaussian prior only."""

    @checked()
    @torch.inference_mode()
    def get_elbo_terms(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        n_samples: int = 1,
        dataloader: Iterable | None = None,
        random_state: int = 0,
    ) -> pd.DataFrame:
        """Evidence lower bound of each cell and its terms, in nats.

        Parameters
        ----------
        adata
            Data with the model's genes; None for the data of the model.
        indices
            Positions of the cells, or one boolean per cell; None for all.
        batch_size
            Cells evaluated at a time.
        n_samples
            Monte Carlo samples of z per cell (and component).
        dataloader
            Batches, in place of ``adata``.
        random_state
            Seed of the samples.

        Returns
        -------
        One row per cell, with columns ``elbo``, ``log_likelihood``, ``kl_z`` and ``kl_y``.
        """
        names = ("elbo", "log_likelihood", "kl_z", "kl_y")
        rows = []
        with seeded(random_state):
            for tensors in self._batches(adata, indices, batch_size, dataloader, needs_counts="The ELBO"):
                bound = self.module.bound(*self.module.data(tensors), n_samples=n_samples)
                rows.append(torch.stack([getattr(bound, name) for name in names], dim=1).cpu())
        return pd.DataFrame(torch.cat(rows).double().numpy(), columns=list(names))

    @checked()
    def get_elbo(self, *args: Any, return_mean: bool = True, **kwargs: Any) -> float | np.ndarray:
        """Evidence lower bound in nats per cell; higher is better.

        Parameters
        ----------
        *args, **kwargs
            Those of `get_elbo_terms`.
        return_mean
            Whether to return the mean over cells, or each cell's, (n_cells,).
        """
        values = self.get_elbo_terms(*args, **kwargs)["elbo"].to_numpy()
        return float(values.mean()) if return_mean else values

    @checked()
    def get_reconstruction_error(
        self, *args: Any, return_mean: bool = True, **kwargs: Any
    ) -> dict[str, float | np.ndarray]:
        """Negative log-likelihood −E log p(x|z), in nats per cell, under the key of scvi-tools.

        Parameters
        ----------
        *args, **kwargs
            Those of `get_elbo_terms`.
        return_mean
            Whether to return the mean over cells, or each cell's, (n_cells,).
        """
        values = -self.get_elbo_terms(*args, **kwargs)["log_likelihood"].to_numpy()
        return {"reconstruction_loss": float(values.mean()) if return_mean else values}

    @checked()
    @torch.inference_mode()
    def get_kl_by_dimension(
        self, adata: AnnData | None = None, indices: Sequence[int] | None = None, batch_size: int | None = None
    ) -> np.ndarray:
        """KL divergence of each latent dimension, which tells which of them the model uses.

        Parameters
        ----------
        adata, indices, batch_size
            As in `get_elbo_terms`.

        Returns
        -------
        Mean over cells of Σ_y q(y|x) KL(q(z_d|x,y) ‖ p(z_d|y)), the marginals of dimension d; nats per cell,
        (n_latent,). They add up to ``kl_z`` for a plain VAE and for a GMVAE with ``covariance="diag"``; where the
        dimensions of p(z|y) are correlated, they do not.
        """
        total, n_cells = 0.0, 0
        for tensors in self._batches(adata, indices, batch_size, needs_counts="The KL of q(z|x,y)"):
            posterior = self.module.posterior(self.module.encode(*self.module.data(tensors)))
            each = kl_of_marginals(posterior, *self.module.prior.marginals())  # (k, n, d)
            weight = self.module.probabilities(posterior)  # (n, k)
            total = total + torch.einsum("nk,knd->d", weight.double(), each.double()).cpu()
            n_cells += len(weight)
        return (total / n_cells).numpy()

    @checked()
    @torch.inference_mode()
    def get_marginal_ll(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_mc_samples: int = 100,
        batch_size: int | None = None,
        return_mean: bool = True,  # noqa: FBT001, FBT002
        dataloader: Iterable | None = None,
        n_mc_samples_per_pass: int = 16,
        random_state: int = 0,
        **kwargs: Any,
    ) -> float | np.ndarray:
        """Importance-weighted lower bound of log p(x), in nats per cell; tight as the samples grow.

        The mixture's own prior and posterior are used: p(z) = Σ π_y p(z|y), q(z|x) = Σ q(y|x) q(z|x,y).

        Parameters
        ----------
        adata, indices, batch_size, dataloader, random_state
            As in `get_elbo_terms`.
        n_mc_samples, n_mc_samples_per_pass
            Importance samples per cell, and how many are evaluated at a time.
        return_mean
            Whether to return the mean over cells, or each cell's, (n_cells,).
        **kwargs
            Ignored; scvi-tools passes some.
        """
        values = []
        with seeded(random_state):
            for tensors in self._batches(adata, indices, batch_size or 128, dataloader, needs_counts="log p(x)"):
                data = self.module.data(tensors)
                values.append(self.module.importance_weighted_bound(*data, n_mc_samples, n_mc_samples_per_pass).cpu())
        values = torch.cat(values).double().numpy()
        return float(values.mean()) if return_mean else values

    @checked()
    @torch.inference_mode()
    def predict(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        soft: bool = False,
        calibrated: bool = True,
        batch_size: int | None = None,
    ) -> np.ndarray | pd.DataFrame:
        """Most probable component of each cell, or the probabilities of all.

        Parameters
        ----------
        adata, indices, batch_size
            As in `get_elbo_terms`.
        soft
            Whether to return probabilities.
        calibrated
            Whether these are proportional to q(y|x)^(1/T), with the `temperature` T, or q(y|x) as in the bound. The
            most probable component is the same.

        Returns
        -------
        Names of components, (n_cells,), or a table of probabilities, cells x components.

        Raises
        ------
        ValueError
            If the model has no mixture, or was not trained.
        """
        if not self.is_mixture:
            kind = "has none" if not isinstance(self.module, MixtureVAE) else "has not been trained"
            raise ValueError(
                f"`predict` needs a mixture; this model {kind}. Build it with mixture=True or 'vade' and train it."
            )
        probabilities = self._probabilities(adata, indices, batch_size)
        if not soft:
            return np.array(self.components)[probabilities.numpy().argmax(1)]
        if calibrated:
            probabilities = self.module.calibrated(probabilities)
        names = (self.adata if adata is None else adata).obs_names
        index = names[cell_positions(indices, len(names))]
        return pd.DataFrame(probabilities.numpy(), index=index, columns=self.components)

    @torch.inference_mode()
    def _probabilities(
        self, adata: AnnData | None = None, indices: Sequence[int] | None = None, batch_size: int | None = None
    ) -> torch.Tensor:
        """q(y|x), (n_cells, n_components), on the CPU."""
        found = torch.empty(self._n_cells(adata, indices, None), self.n_components, dtype=torch.float32)
        end = 0
        for tensors in self._batches(adata, indices, batch_size):
            rows = tensors.get(_keys.LATENT_PROBABILITIES)
            if rows is None:
                rows = self.module.probabilities(self.module.posterior(self.module.encode(*self.module.data(tensors))))
            start, end = end, end + len(rows)
            found[start:end] = rows
        return found

    @property
    def temperature(self) -> float:
        """Temperature T of the probabilities of the components, without a unit.

        `predict` returns probabilities that are proportional to q(y|x)^(1/T). The training finds T without labels, from
        the held-out cells (docs/clustering.md): above 1 where q(y|x) is too sure, below 1 where it is not sure enough.
        1 without held-out cells, for a model that was saved before there was a temperature, and for a plain VAE.
        """
        return float(self.module.log_temperature.exp()) if self.is_mixture else 1.0

    def get_prior(self) -> dict[str, np.ndarray]:
        """Weights, means and covariances of p(y) p(z|y).

        Returns
        -------
        ``weights`` (k,), ``means`` (k, n_latent) and ``covariances`` (k, n_latent, n_latent) of the components in the
        order of ``components``; those of N(0, I) for a plain VAE.
        """
        prior, d = self.module.prior, self.module.n_latent
        with torch.no_grad():
            weights = prior.log_weights().exp().cpu().numpy()
            if not self.is_mixture:
                return {
                    "weights": weights,
                    "means": np.zeros((1, d), np.float32),
                    "covariances": np.eye(d, dtype=np.float32)[None],
                }
            means, covariances = prior.means.cpu().numpy(), prior.covariances().cpu().numpy()
        return {"weights": weights, "means": means.copy(), "covariances": covariances.copy()}

    def get_loadings(self) -> pd.DataFrame:
        """Effect of each latent dimension on each gene, where the decoder is linear.

        Returns
        -------
        Derivatives of log λ by z, in nats per unit of z, the same for all cells: a row for each gene, and columns "0",
        "1", ..., the columns of `get_latent_representation`. A unit more of z multiplies λ by the exp of the loading.
        Where the rates of a cell add up to its size factor (``likelihood="constrained_poisson"``), log λ also holds a
        term that differs between cells but not between genes; the loadings are then the derivatives of log λ less its
        mean over the genes, so that each column has the mean 0.

        Raises
        ------
        ValueError
            If the decoder has hidden layers, or λ is not one of its heads (``k_max``).
        """
        decoder = self.module.decoder
        if not self.module.likelihood.rate_is_head:
            raise ValueError(
                "Loadings are derivatives of log λ, which must be linear in z; with k_max above 0 it is not. Train a "
                "model with k_max=0."
            )
        if not decoder.is_linear:
            raise ValueError(
                "Loadings are those of a decoder that is linear in z; that of this model has hidden layers. Build it "
                "with linear_decoder=True and train it."
            )
        self._check_if_trained(warn=True)
        loadings = decoder.heads["log_rate"].weight.detach()[:, : decoder.n_latent]  # (g, d)
        if decoder.normalizes_rates:
            loadings = loadings - loadings.mean(0)
        columns = [str(dimension) for dimension in range(decoder.n_latent)]
        return pd.DataFrame(loadings.cpu().numpy().copy(), index=self.var_names, columns=columns)

    @checked()
    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        give_mean: bool = True,  # noqa: FBT001, FBT002
        mc_samples: int = 5_000,
        batch_size: int | None = None,
        return_dist: bool = False,  # noqa: FBT001, FBT002
        dataloader: Iterable[dict[str, torch.Tensor]] | None = None,
        *,
        random_state: int = 0,
        **data_loader_kwargs: Any,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Latent codes: the mean of q(z|x); for a mixture the mean over q(y|x).

        Parameters
        ----------
        adata, indices
            As in `get_elbo_terms`.
        give_mean
            Whether to return the mean, or one draw of z per cell.
        mc_samples
            Ignored: scvi-tools needs it for posteriors without a mean in closed form.
        batch_size
            Cells encoded at a time, ``scvi.settings.batch_size`` (128) for None.
        return_dist
            Whether to return the variance of q(z|x) too.
        dataloader
            Batches, in place of ``adata``.
        random_state
            Seed of the draws.
        **data_loader_kwargs
            Further arguments of the loader that is made of ``adata``.

        Returns
        -------
        Means (or draws), (n_cells, n_latent) float32; with ``return_dist`` means and variances, each of that shape.
        """
        size = batch_size or settings.batch_size
        batches = self._batches(adata, indices, size, dataloader, **data_loader_kwargs)
        with seeded(random_state):
            return super().get_latent_representation(
                give_mean=give_mean, mc_samples=mc_samples, return_dist=return_dist, dataloader=batches
            )
