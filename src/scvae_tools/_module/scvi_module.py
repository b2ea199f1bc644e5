"""Module interface of scvi-tools: takes batches by registry keys, and returns what scvi-tools expects of a module.

The size factor of a cell is the registered one, or else its total count (`ScviModule.data`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from scvi import REGISTRY_KEYS
from scvi.module.base import BaseMinifiedModeModuleClass, LossOutput, auto_move_data
from torch import Tensor
from torch.distributions import Normal

from scvae_tools._module.sparse import Counts

if TYPE_CHECKING:
    from scvae_tools._module.covariates import Covariates
    from scvae_tools.likelihoods import CountDistribution


class ScviModule(BaseMinifiedModeModuleClass):
    """Methods that scvi-tools calls on a module, written with the methods of `VAE`.

    A batch is a dict of tensors by their registry keys, with `Counts` under the key of the counts.
    """

    def moved(self, tensors: dict[str, Counts | Tensor]) -> dict[str, Counts | Tensor]:
        """Batch with all its values on the device of the module; all methods get their data through it.

        ``auto_move_data`` of scvi-tools moves only tensors, and leaves `Counts` where they are.
        """
        device = self.z_mean.weight.device
        return {name: value if value.device == device else value.to(device) for name, value in tensors.items()}

    def _covariates(self, tensors: dict[str, Counts | Tensor]) -> Covariates:
        """Covariates of a batch that `moved` has returned."""
        return self.covariates_of(
            tensors[REGISTRY_KEYS.BATCH_KEY].long(),
            tensors.get(REGISTRY_KEYS.CAT_COVS_KEY),
            tensors.get(REGISTRY_KEYS.CONT_COVS_KEY),
        )

    def covariates(self, tensors: dict[str, Counts | Tensor]) -> Covariates:
        """Covariates of the cells of a batch, on any device."""
        return self._covariates(self.moved(tensors))

    def data(self, tensors: dict[str, Counts | Tensor]) -> tuple[Counts, Tensor, Covariates]:
        """Counts (n, g), size factors (n, 1) and covariates of a batch, on any device."""
        tensors = self.moved(tensors)
        x = Counts.of(tensors[REGISTRY_KEYS.X_KEY])
        size = tensors.get(REGISTRY_KEYS.SIZE_FACTOR_KEY)
        if size is None:
            size = tensors.get(REGISTRY_KEYS.OBSERVED_LIB_SIZE)
        return x, x.total() if size is None else size, self._covariates(tensors)

    @auto_move_data
    def forward(
        self,
        tensors: dict[str, Tensor],
        get_inference_input_kwargs: dict | None = None,
        get_generative_input_kwargs: dict | None = None,
        inference_kwargs: dict | None = None,
        generative_kwargs: dict | None = None,
        loss_kwargs: dict | None = None,
        compute_loss: bool = True,  # noqa: FBT001, FBT002
    ) -> tuple:
        """Loss of a batch, with y summed out; without a loss, z drawn from q(z|x) and p(x|z), as scvi-tools expects."""
        if compute_loss:
            loss = self.loss(tensors, **(loss_kwargs or {}))
            return {}, {}, loss
        return super().forward(
            tensors,
            get_inference_input_kwargs,
            get_generative_input_kwargs,
            inference_kwargs,
            generative_kwargs,
            loss_kwargs,
            compute_loss=False,
        )

    def loss(self, tensors: dict[str, Tensor], kl_weight: float = 1.0, n_samples: int = 1) -> LossOutput:
        """Negative bound of a batch, and its terms per cell."""
        is_averaged = torch.is_grad_enabled()
        bound = self.bound(*self.data(tensors), n_samples=n_samples, is_averaged=is_averaged)
        return LossOutput(
            loss=bound.loss(kl_weight),
            reconstruction_loss=-bound.log_likelihood,
            kl_local={"kl_z": bound.kl_z, "kl_y": bound.kl_y},
        )

    def _get_inference_input(self, tensors: dict[str, Tensor], full_forward_pass: bool = False) -> dict:  # noqa: FBT001, FBT002
        if self.minified_data_type is not None and not full_forward_pass:
            tensors = self.moved(tensors)
            return {
                "qzm": tensors[REGISTRY_KEYS.LATENT_QZM_KEY],
                "qzv": tensors[REGISTRY_KEYS.LATENT_QZV_KEY],
                "size": self.data(tensors)[1],
            }
        x, size, covariates = self.data(tensors)
        return {"x": x, "size": size, "covariates": covariates}

    def _regular_inference(self, x: Counts | Tensor, size: Tensor, covariates: Covariates, n_samples: int = 1) -> dict:
        posterior = self.posterior(self.encode(x, size, covariates))
        mean, variance = posterior.moments()
        z = posterior.sample(n_samples)
        return {"posterior": posterior, "qz": normal(mean, variance), "z": drop_single(z), "size": size}

    def _cached_inference(self, qzm: Tensor, qzv: Tensor, size: Tensor, n_samples: int = 1) -> dict:
        qz = normal(qzm, qzv)
        return {"qz": qz, "z": drop_single(qz.sample((n_samples,))), "size": size}

    def _get_generative_input(self, tensors: dict[str, Tensor], inference_outputs: dict) -> dict:
        return {"z": inference_outputs["z"], "size": inference_outputs["size"], "covariates": self.covariates(tensors)}

    @auto_move_data
    def generative(
        self, z: Tensor, size: Tensor, covariates: Covariates, transform_batch: int | None = None
    ) -> dict[str, CountDistribution]:
        """Distribution p(x|z), in the given batch if any."""
        if transform_batch is not None:
            covariates = covariates._replace(batch=torch.full_like(covariates.batch, transform_batch))
        return {"px": self.decode(z, size, covariates)}

    @torch.inference_mode()
    def sample(self, tensors: dict[str, Tensor], n_samples: int = 1, generative_kwargs: dict | None = None) -> Tensor:
        """Posterior predictive counts, (n, g) or (n, g, n_samples)."""
        _, outputs = self.forward(
            tensors,
            inference_kwargs={"n_samples": n_samples},
            generative_kwargs=generative_kwargs,
            compute_loss=False,
        )
        counts = outputs["px"].sample().cpu()
        return counts.permute(1, 2, 0) if n_samples > 1 else counts

    @torch.inference_mode()
    @auto_move_data
    def marginal_ll(self, tensors: dict[str, Tensor], n_mc_samples: int = 100, chunk: int = 32) -> Tensor:
        """Importance-weighted estimate of log p(x), (n,)."""
        return self.importance_weighted_bound(*self.data(tensors), n_samples=n_mc_samples, chunk=chunk).cpu()

    def label(self, tensors: dict[str, Counts | Tensor]) -> Tensor | None:
        """Component that the label of each cell stands for, −1 where it is not known; None if labels are not used."""
        return None


def normal(mean: Tensor, variance: Tensor) -> Normal:
    """Normal distributions; a variance so small that float32 has 0 for it is no error."""
    return Normal(mean, variance.sqrt(), validate_args=False)


def drop_single(samples: Tensor) -> Tensor:
    """Drop the sample axis of a single draw, (1, n, d) to (n, d), as scvi-tools does."""
    return samples[0] if len(samples) == 1 else samples
