"""Training: stages, KL warm-up, history, best weights, interruption and the guard against non-finite numbers.

Lightning runs the loop. A stage is one ``fit``; `run_stage` is what the model calls for each.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import warnings
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import lightning.pytorch as lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import Tensor

from scvae_tools._checkpoint import Checkpointer, KeepBest, Version, copied
from scvae_tools._messages import warn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from scvae_tools._bounds import Bound
    from scvae_tools._vae import VAE

#: Terms of the bound, in the order of the accumulators; their names in the history and in messages.
TERMS = ("log_likelihood", "kl_z", "kl_y")
LEARNING_RATE_CUT = 0.1
#: Learning rate of the dispersions that cells share, as a multiple of that of the networks. Adam moves a parameter by
#: about the learning rate a step: at the same rate log r would hardly leave its start, and where r should be large a
#: negative binomial would end below the Poisson that it contains (docs/report.md).
DISPERSION_RATE = 10.0


class NonFiniteError(ArithmeticError):
    """A term of the bound became NaN or infinite."""

    def __init__(self, term: str, stage: str, epoch: int) -> None:
        super().__init__(f"{term} became NaN or infinite in epoch {epoch} (stage {stage!r})")
        self.term, self.stage, self.epoch = term, stage, epoch


@dataclass(frozen=True)
class Stage:
    """A named part of the training.

    Parameters
    ----------
    name
        As the history shows it.
    max_epochs
        Upper limit.
    warms_up
        Whether the weight of the KL terms rises from 0 to 1 over the stage; such a stage never stops early.
    is_mixture
        Whether the mixture's bound is trained.
    drops_out
        Whether dropout acts.
    """

    name: str
    max_epochs: int
    warms_up: bool = False
    is_mixture: bool = False
    drops_out: bool = False


@dataclass(frozen=True)
class Objective:
    """What is maximised: the bound, unless one of these is changed.

    Parameters
    ----------
    kl_weight
        Of both KL terms, once they have warmed up.
    free_nats_y
        Part of the entropy H[p(y)] up to which the KL of y costs nothing.
    free_nats_z
        Nats per cell up to which the KL of z costs nothing.
    n_samples
        Draws of z per cell and component, whose bounds are averaged.
    n_importance_samples
        Draws that make one importance-weighted bound instead; 1 for none.
    """

    kl_weight: float = 1.0
    free_nats_y: float = 0.0
    free_nats_z: float = 0.0
    n_samples: int = 1
    n_importance_samples: int = 1

    def loss(self, module: VAE, batch: dict[str, Tensor], warmth: float) -> tuple[Bound, Tensor]:
        """Bound of the cells of a batch and what is minimised, the KL terms warmed up so far."""
        weight, tightens = warmth * self.kl_weight, self.n_importance_samples > 1
        bound = module.bound(
            *module.data(batch),
            n_samples=self.n_importance_samples if tightens else self.n_samples,
            is_averaged=True,
            label=module.label(batch),
            importance_kl_weight=weight if tightens else None,
        )
        free_nats_y = self.free_nats_y * module.prior.entropy_of_y() if self.free_nats_y else 0.0
        loss = bound.loss(weight, y_term=module.y_term, free_nats_z=self.free_nats_z, free_nats_y=free_nats_y)
        return bound, loss


def default_max_epochs(n_cells: int) -> int:
    """Epochs for about 4,000 steps of 128 cells, at least 20 and at most 400."""
    return int(np.clip(round(4_000 * 128 / n_cells), 20, 400))


def plan_stages(
    max_epochs: int,
    *,
    mixture: bool,
    resumes_vae: bool = False,
    resumes_mixture: bool = False,
    n_warm_up_epochs: int | None = None,
) -> list[Stage]:
    """Divide the epochs: KL warm-up (a quarter of the VAE's, unless given), VAE, mixture.

    The mixture starts from a trained VAE, since from random weights all but one or two components die
    (docs/model.md). Dropout acts in the last stage: it raises the held-out bound, yet a VAE that had it from the start
    may have a latent space in which the mixture finds worse components (docs/clustering.md). A model that was trained
    before goes on where it was.

    Raises
    ------
    ValueError
        If the warm-up is longer than the VAE is trained, or given for a mixture that goes on.
    """
    if resumes_mixture and n_warm_up_epochs:
        raise ValueError(
            "`n_warm_up_epochs` is of the VAE that a mixture starts from; found one that was trained before, and goes "
            "on. Leave it out."
        )
    if resumes_mixture:
        return [Stage("mixture", max_epochs, is_mixture=True, drops_out=True)]
    n_mixture = max(1, round(0.3 * max_epochs)) if mixture else 0
    n_vae = max_epochs - n_mixture
    n_warm_up = 0 if resumes_vae else round(0.25 * n_vae)
    if n_warm_up_epochs is not None:
        n_warm_up = n_warm_up_epochs
        if n_warm_up > n_vae:
            raise ValueError(
                f"`n_warm_up_epochs` must be at most the number of epochs of the VAE, {n_vae} of the {max_epochs} in "
                f"`max_epochs`{' before those of the mixture' if mixture else ''}; found {n_warm_up}. Pass fewer, or "
                "more `max_epochs`."
            )
    stages = [Stage("warm-up", n_warm_up, warms_up=True), Stage("vae", n_vae - n_warm_up, drops_out=not mixture)]
    stages.append(Stage("mixture", n_mixture, is_mixture=True, drops_out=True))
    return [stage for stage in stages if stage.max_epochs > 0]


class TrainingPlan(lightning.LightningModule):
    """The optimiser's view of a module: minibatch in, loss out; terms added up on the device, logged once an epoch.

    Parameters
    ----------
    module
        `VAE` or a mixture.
    stage
        What to train.
    first_epoch
        Number of epochs in the history so far.
    lr, weight_decay
        Of Adam.
    objective
        What is maximised; None for the bound.
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
    ) -> None:
        super().__init__()
        self.module, self.stage, self.first_epoch = module, stage, first_epoch
        self.objective = objective or Objective()
        self.lr, self.weight_decay = lr, weight_decay
        self.history: list[dict] = []
        self.row: dict = {}

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
        """Clip by the norm; where that can be asked without waiting for a device, leave shorter gradients untouched."""
        if gradient_clip_algorithm not in (None, "norm") or gradient_clip_val is None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if norm.device.type != "cpu" or norm > gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    def warmth(self) -> float:
        """Share of the KL terms that acts: 1, or the share of the warm-up that has passed."""
        if not self.stage.warms_up:
            return 1.0
        steps = self.trainer.num_training_batches * self.stage.max_epochs
        return min(1.0, self.trainer.global_step / max(steps, 1))

    def on_train_epoch_start(self) -> None:
        self.module.train()
        self.module.drop_out(enable=self.stage.drops_out)
        self._reset("train")
        self.row = {"epoch": self.first_epoch + self.current_epoch + 1, "stage": self.stage.name}
        self.row["kl_weight"] = self.warmth() * self.objective.kl_weight

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        bound, loss = self.objective.loss(self.module, batch, self.warmth())
        self._add(bound)
        return loss

    def close_training(self) -> None:
        """Put the means of the training terms into the row, once an epoch.

        Lightning validates before its end of the epoch, which callbacks see before the plan does; an epoch may be cut
        short, and there may be no validation cells. So whoever comes first calls this.
        """
        if "elbo_train" not in self.row:
            self._close("train")

    def on_validation_epoch_start(self) -> None:
        self.close_training()
        self._reset("validation")

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        self._add(self.module.bound(*self.module.data(batch)))

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self._close("validation"), batch_size=1)

    def on_train_epoch_end(self) -> None:
        self.close_training()
        self.log_dict({name: self.row[name] for name in self._names("train")}, batch_size=1)
        self.history.append(self.row)

    def _reset(self, subset: str) -> None:
        self._sums = torch.zeros(len(TERMS), device=self.device)
        self._n_cells = 0
        self._first_bad = torch.zeros(len(TERMS), dtype=torch.bool, device=self.device)
        self._subset = subset

    def _add(self, bound: Bound) -> None:
        with torch.no_grad():
            sums = torch.stack([getattr(bound, term).sum() for term in TERMS])
            # Only the first batch that went wrong tells the term: the weights are lost from then on.
            self._first_bad = torch.where(self._first_bad.any(), self._first_bad, ~torch.isfinite(sums))
            self._sums += sums
            self._n_cells += len(bound.kl_z)

    def _close(self, subset: str) -> dict[str, float]:
        """Put the means of the terms into the row; return them by their names there."""
        if self._first_bad.any():
            term = TERMS[int(self._first_bad.int().argmax())]
            raise NonFiniteError(term, self.stage.name, self.row["epoch"])
        *terms, elbo = self._names(subset)
        log_likelihood, kl_z, kl_y = means = (self._sums / self._n_cells).tolist()
        named = dict(zip(terms, means, strict=True)) | {elbo: log_likelihood - kl_z - kl_y}
        self.row |= named
        return named

    @staticmethod
    def _names(subset: str) -> list[str]:
        """Columns of the history with the terms of a subset of the cells, and last with their bound."""
        return [f"{name}_{subset}" for name in (*TERMS, "elbo")]


class Progress(Callback):
    """One bar over all stages: epoch, ELBO and time left."""

    def __init__(self, stages: Iterable[Stage], *, enable: bool) -> None:
        self.bar = None
        self.total = sum(stage.max_epochs for stage in stages)
        self.enable = enable

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: TrainingPlan) -> None:
        if not self.enable:
            return
        if self.bar is None:
            self.bar = _progress_bar(self.total)
        pl_module.close_training()
        row = pl_module.row
        elbo = row.get("elbo_validation", row["elbo_train"])
        self.bar.set_postfix(stage=row["stage"], ELBO=f"{elbo:.1f}", refresh=False)
        self.bar.update(1)

    def skip(self, n_epochs: int) -> None:
        """Shorten the bar by epochs that early stopping saved."""
        if self.bar is not None:
            self.bar.total -= n_epochs
            self.bar.refresh()

    def close(self) -> None:
        """End the bar's line."""
        if self.bar is not None:
            self.bar.close()


def _progress_bar(total: int) -> object:
    from tqdm import TqdmExperimentalWarning, TqdmWarning
    from tqdm.auto import tqdm

    with warnings.catch_warnings():
        # Without ipywidgets tqdm falls back to text, and says so each time.
        warnings.simplefilter("ignore", TqdmWarning)
        warnings.simplefilter("ignore", TqdmExperimentalWarning)
        return tqdm(total=total, desc="scvae", unit="epoch")


@dataclass
class Settings:
    """How stages are run; the same for all of a training."""

    lr: float = 1e-3
    weight_decay: float = 0.0
    objective: Objective = field(default_factory=Objective)
    gradient_clip: float = 100.0
    early_stopping: bool = True
    patience: int = 20
    accelerator: str = "auto"
    devices: object = "auto"
    matmul_precision: str | None = None
    progress: Progress | None = None
    trainer_options: dict = field(default_factory=dict)
    recorder: Callback | None = None  #: what adds columns to the history
    checkpoint: Checkpointer | None = None  #: what writes a file to go on from


class Trained(NamedTuple):
    """What a stage has left beside the weights in the module."""

    rows: list[dict]  #: of the history
    interrupted: bool  #: whether the user did
    versions: dict[str, Version]  #: of the weights


def run_stage(
    module: VAE, stage: Stage, loaders: tuple[Iterable, Iterable | None], settings: Settings, first_epoch: int
) -> Trained:
    """Train a stage, once more at a tenth of the learning rate if a number became non-finite.

    Returns
    -------
    The rows of the history, whether the user interrupted it, and the versions of the weights. The module holds those of
    the best validation ELBO, or the last ones where there is no validation set or the KL terms were still warming up.

    Raises
    ------
    NonFiniteError
        If the second attempt fails too. The module is as before the stage.
    """
    before, lower = deepcopy(module.state_dict()), settings.lr * LEARNING_RATE_CUT
    checkpoint = settings.checkpoint
    if checkpoint is not None:
        checkpoint.before = before
    if checkpoint is None or not checkpoint.is_second_attempt:
        try:
            return _fit(module, stage, loaders, settings, first_epoch, settings.lr)
        except NonFiniteError as error:
            module.load_state_dict(before)
            warn(f"{error}; trying this stage once more with lr={lower:g}.")
    if checkpoint is not None:
        checkpoint.is_second_attempt = True
    try:
        return _fit(module, stage, loaders, settings, first_epoch, lower)
    except NonFiniteError as error:
        module.load_state_dict(before)
        error.args = (
            f"Training stopped: {error}, also with a learning rate of {lower:g}. Try a lower `lr`, a smaller "
            "`gradient_clip`, likelihood='nb' (the most stable), or look for cells with extreme counts.",
        )
        raise


def _fit(
    module: VAE,
    stage: Stage,
    loaders: tuple[Iterable, Iterable | None],
    settings: Settings,
    first_epoch: int,
    lr: float,
) -> Trained:
    options = {"lr": lr, "weight_decay": settings.weight_decay, "objective": settings.objective}
    plan = TrainingPlan(module, stage, first_epoch=first_epoch, **options)
    has_validation = loaders[1] is not None and len(loaders[1]) > 0
    best = KeepBest(settings.patience) if has_validation and not stage.warms_up else None
    trainer = lightning.Trainer(
        max_epochs=stage.max_epochs,
        accelerator=settings.accelerator,
        devices=settings.devices,
        gradient_clip_val=settings.gradient_clip,
        callbacks=_callbacks(settings, best),
        num_sanity_val_steps=0,
        **{
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 10**9,
        }
        | {name: value for name, value in settings.trainer_options.items() if name != "callbacks"}
        | ({} if settings.checkpoint is None else settings.checkpoint.trainer_options(settings.trainer_options)),
    )
    with sigint_restored(), module.buffers.kept(), matmul_precision(settings.matmul_precision):
        loaders = loaders[0], loaders[1] if has_validation else None
        interrupted = _fit_or_interrupt(trainer, plan, loaders, settings.checkpoint)
    versions = _versions(module, plan, best, interrupted=interrupted)
    if best is not None:
        best.restore(module)
    module.eval()
    if settings.progress is not None and not interrupted:
        settings.progress.skip(stage.max_epochs - len(plan.history))
    return Trained(plan.history, interrupted, versions)


def _versions(module: VAE, plan: TrainingPlan, best: KeepBest | None, *, interrupted: bool) -> dict[str, Version]:
    elbo_of_epoch = {row["epoch"]: row.get("elbo_validation", np.nan) for row in plan.history}
    last = plan.first_epoch + len(plan.history)
    # What was interrupted is on the way to the next epoch.
    end = Version(last, np.nan if interrupted else elbo_of_epoch.get(last, np.nan), copied(module))
    return {"end": end} | ({} if best is None else best.versions(elbo_of_epoch))


def _callbacks(settings: Settings, best: KeepBest | None) -> list[Callback]:
    callbacks = list(settings.trainer_options.get("callbacks", ()))
    if settings.progress is not None:
        callbacks.append(settings.progress)
    if settings.recorder is not None:
        callbacks.append(settings.recorder)
    if best is not None:
        callbacks.append(best)
        if settings.early_stopping:
            callbacks.append(EarlyStopping(KeepBest.monitor, mode="max", patience=settings.patience))
    return callbacks if settings.checkpoint is None else [*callbacks, settings.checkpoint]


def _fit_or_interrupt(
    trainer: lightning.Trainer,
    plan: TrainingPlan,
    loaders: tuple[Iterable, Iterable | None],
    checkpoint: Checkpointer | None,
) -> bool:
    """Fit, from where the checkpoint is; whether Ctrl-C ended it. Lightning turns it into an exit of the process."""
    train, validation = loaders
    try:
        if checkpoint is None or checkpoint.found is None:
            trainer.fit(plan, train, validation)
        else:
            checkpoint.fit_on(trainer, plan, train, validation)
    except SystemExit:
        if not trainer.interrupted:
            raise
    if trainer.received_sigterm:  # a scheduler ends the process: it must end, and not look like a success
        raise SystemExit(128 + signal.SIGTERM)
    return trainer.interrupted


@contextlib.contextmanager
def matmul_precision(precision: str | None) -> Iterator[None]:
    """Set the precision of torch's matrix products inside; leave it alone for None."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision or before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def sigint_restored() -> Iterator[None]:
    """Put the handler of Ctrl-C back: Lightning ignores the signal from the first interruption on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what Lightning and scvi-tools say about devices, loaders and workers, inside only."""
    names = (
        "lightning.pytorch",
        "lightning.fabric",
        "lightning",
        "pytorch_lightning",
        "scvi",
        "lightning.pytorch.utilities.rank_zero",
    )
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", category=UserWarning, module=r"scvi\..*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
