"""Training plan for Lightning: objective, optimiser, warm-up, history, and the check for non-finite numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as lightning
import torch
from torch import Tensor

from scvae_tools._messages import listed
from scvae_tools._module.mixture_vaes import MixtureVAE
from scvae_tools._train.principal_codes import PRINCIPAL_CODES
from scvae_tools._train.processes import ALONE, Processes

if TYPE_CHECKING:
    from scvae_tools._module.bounds import Bound
    from scvae_tools._module.vae import VAE
    from scvae_tools._train.stages import Stage

#: Terms of the bound, in the order of the accumulators; their names in the history and in messages.
TERMS = ("log_likelihood", "kl_z", "kl_y")


#: Learning rate of the dispersions that cells share, as a multiple of that of the networks. Adam moves a parameter by
#: about the learning rate a step: at the same rate log r would hardly leave its start, and where r should be large a
#: negative binomial would end below the Poisson that it contains (docs/report.md).
DISPERSION_RATE = 10.0


#: Share of the newest weights in the average of the weights: 9 / (9 + t) in step t, so that it is a tenth of the steps
#: old, and at least this much, for an age of a hundred steps at most.
LEAST_SHARE = 0.01


class NonFiniteError(ArithmeticError):
    """Error for a term of the bound, or another number of a model, that became NaN or infinite."""

    def __init__(self, term: str, stage: str, epoch: int) -> None:
        super().__init__(f"{term} became NaN or infinite in epoch {epoch} (stage {stage!r})")
        self.term, self.stage, self.epoch = term, stage, epoch


@dataclass(frozen=True)
class Objective:
    """Objective that is maximised: the bound, unless one of these parameters is changed.

    Parameters
    ----------
    kl_weight
        Weight of both KL terms after the warm-up.
    free_nats_y
        Part of the entropy H[p(y)] up to which the KL of y costs nothing.
    free_nats_z
        Nats per cell up to which the KL of z costs nothing.
    n_samples
        Draws of z per cell and component, whose bounds are averaged.
    n_importance_samples
        Draws for one importance-weighted bound, which is used instead; 1 for none.
    """

    kl_weight: float = 1.0
    free_nats_y: float = 0.0
    free_nats_z: float = 0.0
    n_samples: int = 1
    n_importance_samples: int = 1

    def check(self, module: VAE) -> None:
        """Check that the parts fit each other and a model.

        Raises
        ------
        ValueError
            If they do not.
        """
        is_mixture = isinstance(module, MixtureVAE)
        if self.free_nats_y and (module.y_term == "none" or not is_mixture):
            found = "y_term='none'" if is_mixture else "mixture=False"
            raise ValueError(f"`free_nats_y` is of the KL of y, which a model with {found} has not. Leave it out.")
        if self.n_importance_samples == 1:
            return
        others = {"n_samples": self.n_samples > 1, "y_term": module.y_term != "kl"}
        others |= {name: getattr(self, name) > 0 for name in ("free_nats_y", "free_nats_z")}
        clashing = [name for name, is_set in others.items() if is_set]
        if clashing:
            raise ValueError(
                f"`n_importance_samples` above 1 trains one bound that has no KL terms of its own; found also "
                f"{listed(clashing)}. Leave one or the other at its default"
                + (", that is y_term='kl'." if "y_term" in clashing else ".")
            )

    def loss(
        self, module: VAE, batch: dict[str, Tensor], warm_up_share: float, pull: float | Tensor | None = None
    ) -> tuple[Bound, Tensor]:
        """Bound of the cells of a batch, and the loss, with ``warm_up_share`` of the weight of the KL terms.

        With ``pull``, the loss has this weight on the distance of the latent means from the principal codes in the
        batch.
        """
        weight, tightens = warm_up_share * self.kl_weight, self.n_importance_samples > 1
        batch = module.moved(batch)
        bound = module.bound(
            *module.data(batch),
            n_samples=self.n_importance_samples if tightens else self.n_samples,
            is_averaged=True,
            label=module.label(batch),
            importance_kl_weight=weight if tightens else None,
            code=None if pull is None else batch[PRINCIPAL_CODES],
        )
        free_nats_y = self.free_nats_y * module.prior.entropy_of_y() if self.free_nats_y else 0.0
        free_nats = {"free_nats_z": self.free_nats_z, "free_nats_y": free_nats_y}
        loss = bound.loss(weight, y_term=module.y_term, **free_nats, pull=0.0 if pull is None else pull)
        return bound, loss


class TrainingPlan(lightning.LightningModule):
    """Lightning module that trains a `VAE` or a mixture in one stage.

    The terms of the bound are added up on the device, and logged once an epoch. After the warm-up, the weights that are
    validated and kept are means over the last steps (Polyak and Juditsky 1992, doi:10.1137/0330046): Adam moves each
    weight by about the learning rate in every step, to and fro at the end, and the mean is without that noise.

    Parameters
    ----------
    module
        `VAE` or a mixture.
    stage
        Stage to train.
    first_epoch
        Number of epochs in the history so far.
    lr, weight_decay
        Learning rate and weight decay of Adam.
    objective
        Objective that is maximised; None for the bound.
    processes
        Processes that train together: the terms of the bound are those of the cells of all.
    """

    def __init__(
        self,
        module: VAE,
        stage: Stage,
        *,
        first_epoch: int,
        lr: float,
        weight_decay: float,
        objective: Objective | None = None,
        processes: Processes = ALONE,
    ) -> None:
        super().__init__()
        self.module, self.stage, self.first_epoch = module, stage, first_epoch
        self.objective = objective or Objective()
        self.lr, self.weight_decay, self.processes = lr, weight_decay, processes
        self.history: list[dict] = []
        self.row: dict = {}
        self._sums: Tensor | None = None  #: of the terms over the cells so far
        self._first_bad: Tensor | None = None  #: which terms were not finite in the first batch with any
        self._trained = [] if stage.warms_up else [each for each in module.parameters() if each.requires_grad]
        for number, weight in enumerate(self._trained):  # buffers, so that checkpoints hold them
            self.register_buffer(f"average_{number}", weight.detach().clone())
        self.register_buffer("n_averaged", torch.zeros(()))
        self._has_average = False  #: whether the average is in the module, and the newest weights in the buffers

    def configure_optimizers(self) -> torch.optim.Optimizer:
        shared = {id(parameter) for parameter in self.module.decoder.shared.parameters()}
        groups = [
            {"params": [], "lr": self.lr},
            {"params": [], "lr": self.lr * DISPERSION_RATE},
        ]
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                groups[id(parameter) in shared]["params"].append(parameter)
        groups = [group for group in groups if group["params"]]
        return torch.optim.Adam(groups, weight_decay=self.weight_decay, fused=True)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None, gradient_clip_algorithm: str | None
    ) -> None:
        """Clip the gradients by their norm.

        On the CPU, gradients with a smaller norm are left untouched. On other devices, comparing the norm would wait.
        """
        if gradient_clip_algorithm not in (None, "norm") or gradient_clip_val is None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if norm.device.type != "cpu" or norm > gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let a checkpoint without averages, of an earlier version, begin them."""
        for name, value in self.state_dict().items():
            checkpoint["state_dict"].setdefault(name, value)

    def on_train_batch_end(self, *_: object) -> None:
        self._average()

    @torch.no_grad()
    def _average(self) -> None:
        """Take the newest weights into the average."""
        self.n_averaged += 1
        share = (9 / (9 + self.n_averaged)).clamp(min=LEAST_SHARE)
        for number, weight in enumerate(self._trained):
            getattr(self, f"average_{number}").lerp_(weight, share)

    @torch.no_grad()
    def exchange(self, *, average: bool) -> None:
        """Put the average of the weights into the module, or the newest weights, in place of the others."""
        if self._has_average == average:
            return
        for number, weight in enumerate(self._trained):
            other = getattr(self, f"average_{number}")
            before = weight.clone()
            weight.copy_(other)
            other.copy_(before)
        self._has_average = average

    @property
    def epoch_of_stage(self) -> int:
        """Number of epochs of this stage that have ended."""
        return len(self.history)

    def share_done(self) -> float:
        """Share of the steps of this stage that is done."""
        steps = self.trainer.num_training_batches * self.stage.max_epochs
        return self.trainer.global_step / max(steps, 1)

    def warm_up_share(self) -> float:
        """Share of the KL weight in use, which may be above 1 in the warm-up."""
        return self.stage.kl_weight(self.share_done())

    def on_train_epoch_start(self) -> None:
        self.module.train()
        self.module.drop_out(enable=self.stage.drops_out)
        self._reset()
        self.row = {"epoch": self.first_epoch + self.epoch_of_stage + 1, "stage": self.stage.name}
        self.row["kl_weight"] = self.warm_up_share() * self.objective.kl_weight

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        pull = self.stage.pull(self.share_done())
        bound, loss = self.objective.loss(self.module, batch, self.warm_up_share(), pull)
        self._add(bound)
        return loss

    def close_training(self) -> None:
        """Put the means of the training terms into the row of the epoch, once.

        The first hook that needs the row calls this method. Which one is first varies: Lightning validates before the
        end of the epoch, callbacks get that end before the plan does, an epoch may be cut short, and there may be no
        validation cells.
        """
        if "elbo_train" not in self.row:
            self._close("train")
            self.processes.average_norms(self.module)

    def on_validation_epoch_start(self) -> None:
        self.close_training()
        self._reset()
        self.exchange(average=True)

    def on_validation_end(self) -> None:
        self.exchange(average=False)  # after the callbacks, of which one keeps the best weights

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        self._add(self.module.bound(*self.module.data(batch)))

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self._close("validation"), batch_size=1)

    def on_train_epoch_end(self) -> None:
        self.close_training()
        self.log_dict({name: self.row[name] for name in self._names("train")}, batch_size=1)
        self.history.append(self.row)

    def _reset(self) -> None:
        if self._sums is None:
            self._sums = torch.zeros(len(TERMS), device=self.device)
            self._first_bad = torch.zeros(len(TERMS), dtype=torch.bool, device=self.device)
        self._sums.zero_()  # the memory stays the same, for a step that was recorded
        self._first_bad.zero_()
        self._n_cells = 0

    def _add(self, bound: Bound) -> None:
        self._add_terms(bound)
        self._n_cells += len(bound.kl_z)

    @torch.no_grad()
    def _add_terms(self, bound: Bound) -> None:
        sums = torch.stack([getattr(bound, term).sum() for term in TERMS])
        # Only the first bad batch tells which term it was: after it, the weights are not finite either.
        self._first_bad |= ~torch.isfinite(sums) & ~self._first_bad.any()
        self._sums += sums

    def _close(self, subset: str) -> dict[str, float]:
        """Put the means of the terms into the row; return them by their names in the row."""
        sums, first_bad, n_cells = self._sums, self._first_bad, self._n_cells
        if self.processes.are_several:  # in float64, which holds all numbers of cells
            values = torch.cat([sums.double(), first_bad.double(), sums.new_full((1,), n_cells, dtype=torch.float64)])
            sums, first_bad, n_cells = self.processes.total(values).split([len(TERMS), len(TERMS), 1])
        if first_bad.any():
            term = TERMS[int((first_bad > 0).int().argmax())]
            raise NonFiniteError(term, self.stage.name, self.row["epoch"])
        *terms, elbo = self._names(subset)
        log_likelihood, kl_z, kl_y = means = (sums / n_cells).tolist()
        named = dict(zip(terms, means, strict=True)) | {elbo: log_likelihood - kl_z - kl_y}
        self.row |= named
        return named

    @staticmethod
    def _names(subset: str) -> list[str]:
        """Columns of the history with the terms of a subset of the cells, and last with their bound."""
        return [f"{name}_{subset}" for name in (*TERMS, "elbo")]
