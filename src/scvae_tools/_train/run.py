"""Run of one stage of a training: a fit by Lightning, tried again at a lower learning rate where it fails."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Self

import lightning.pytorch as lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.utilities.exceptions import SIGTERMException

from scvae_tools._interrupts import HeldInterrupts, interrupts_held
from scvae_tools._messages import warn
from scvae_tools._train.device_plan import DevicePlan
from scvae_tools._train.plan import NonFiniteError, Objective, TrainingPlan
from scvae_tools._train.processes import ALONE, Processes
from scvae_tools._train.versions import KeepBest, Version, copied

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from scvae_tools._data.resident import ResidentCells
    from scvae_tools._data.windows import CellWindows
    from scvae_tools._module.vae import VAE
    from scvae_tools._train.checkpoint import Checkpointer
    from scvae_tools._train.progress import Progress
    from scvae_tools._train.recorder import RateRecorder
    from scvae_tools._train.stages import Stage

LEARNING_RATE_CUT = 0.1
#: Steps after which several processes tell each other of Ctrl-C.
STEPS_BETWEEN_LOOKS = 20
#: What helps where numbers are not finite.
REMEDY = (
    "Try a lower `lr`, a smaller `gradient_clip`, likelihood='nb' (the most stable), or look for cells with extreme "
    "counts."
)


class Counters(NamedTuple):
    """Numbers of epochs and steps of the stages so far, from which Lightning's trainer goes on in the next stage.

    So loggers and callbacks of the user see one training.
    """

    epochs: int = 0
    steps: int = 0
    logged_steps: int = 0  #: by which Lightning tells loggers when it was; groups of steps on a device

    @classmethod
    def of(cls, trainer: lightning.Trainer) -> Self:
        """Numbers that a trainer has reached."""
        return cls(trainer.current_epoch, trainer.global_step, trainer.fit_loop.epoch_loop._batches_that_stepped)

    def set_in(self, trainer: lightning.Trainer) -> None:
        """Let a new trainer count from these numbers on."""
        loop = trainer.fit_loop
        # As if from a checkpoint: it would make an iterator of the first epoch twice otherwise, and draw for both.
        loop._resuming_from_checkpoint = self.epochs > 0
        for name in ("ready", "started", "processed", "completed"):
            setattr(loop.epoch_progress.current, name, self.epochs)
        loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = self.steps
        loop.epoch_loop._batches_that_stepped = self.logged_steps


@dataclass
class Settings:
    """Settings of a training, the same for all its stages."""

    lr: float = 1e-3
    weight_decay: float = 0.0
    objective: Objective = field(default_factory=Objective)
    gradient_clip: float = 100.0
    early_stopping: bool = True
    accelerator: str = "auto"
    devices: object = "auto"
    matmul_precision: str | None = None
    progress: Progress | None = None
    trainer_options: dict = field(default_factory=dict)
    cells: ResidentCells | CellWindows | None = (
        None  #: cells that are held on the device, whose positions are the batches
    )
    probe: RateRecorder | None = (
        None  #: cells of which λ is computed at the end of each stage, to see that it is finite
    )
    recorder: Callback | None = None  #: callback that adds columns to the history
    checkpoint: Checkpointer | None = None  #: callback that writes checkpoints
    counters: Counters = field(default_factory=Counters)  #: of the stages so far
    processes: Processes = ALONE  #: that train together

    def close(self) -> None:
        """End the bar, and leave the directory of the checkpoint to other trainings."""
        for each in (self.progress, self.checkpoint):
            if each is not None:
                each.close()


class Trained(NamedTuple):
    """Result of a stage, beside the weights in the module."""

    rows: list[dict]  #: rows of the history
    interrupted: bool  #: whether the user interrupted the stage
    versions: dict[str, Version]  #: versions of the weights


def run_stage(
    module: VAE, stage: Stage, loaders: tuple[Iterable, Iterable | None], settings: Settings, first_epoch: int
) -> Trained:
    """Train a stage; if a number became non-finite, once more at a tenth of the learning rate.

    Returns
    -------
    The rows of the history, whether the user interrupted the stage, and the versions of the weights. The module holds
    the weights of the best validation ELBO, or the last ones where there is no validation set or the KL terms were
    still warming up.

    Raises
    ------
    NonFiniteError
        If the second attempt fails too. The module is as before the stage.
    """
    before, lower = deepcopy(module.state_dict()), settings.lr * LEARNING_RATE_CUT
    checkpoint = settings.checkpoint
    if checkpoint is not None:
        checkpoint.before = before
        settings.counters = Counters(*checkpoint.begin_counting(settings.counters))
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
        error.args = (f"Training stopped: {error}, also with a learning rate of {lower:g}. {REMEDY}",)
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
    options["processes"] = settings.processes
    plan_of, clips = TrainingPlan, {"gradient_clip_val": settings.gradient_clip}
    if settings.cells is not None:
        plan_of = functools.partial(
            DevicePlan, cells=settings.cells, steps=loaders[0], gradient_clip=settings.gradient_clip
        )
        clips = {}  # Lightning clips only where it optimises
    plan = plan_of(module, stage, first_epoch=first_epoch, **options)
    has_validation = loaders[1] is not None and len(loaders[1]) > 0
    best = KeepBest(stage.patience) if has_validation and not stage.warms_up else None
    has_unused = settings.processes.are_several and _has_unused(module, stage, settings)
    clips |= settings.processes.trainer_options(has_unused=has_unused)
    trainer = _trainer(settings, stage.max_epochs, _callbacks(settings, best), clips)
    device = module.device
    with sigint_restored(), module.buffers.kept(), matmul_precision(settings.matmul_precision):
        loaders = loaders[0], loaders[1] if has_validation else None
        try:
            interrupted = _fit_or_interrupt(trainer, plan, loaders, settings)
        finally:
            plan.teardown("fit")  # which Lightning leaves out after an error or Ctrl-C
            module.to(device)  # Lightning leaves it on the CPU, where all that follows would be computed
    plan.exchange(average=True)
    settings.processes.average_norms(module)
    versions = _versions(module, plan, best, interrupted=interrupted)
    if best is not None:
        best.restore(module)
    module.eval()
    if settings.probe is not None and not interrupted:
        refuse_non_finite(module, settings.probe, stage, first_epoch + len(plan.history))
    settings.counters = Counters.of(trainer)
    if settings.progress is not None and not interrupted:
        settings.progress.skip(stage.max_epochs - len(plan.history))
    return Trained(plan.history, interrupted, versions)


@torch.no_grad()
def refuse_non_finite(module: VAE, probe: RateRecorder, stage: Stage, epoch: int) -> None:
    """Raise a NonFiniteError where a weight, the mixture, or q(z|x) or λ of some cells is NaN or infinite.

    The terms of the bound may be finite all the same, since they are computed from the logs of λ and of the variances.

    Parameters
    ----------
    module
        In evaluation mode.
    probe
        Cells to look at.
    stage, epoch
        Where the training is, for the message.
    """

    def check(term: str, *tensors: Tensor) -> None:
        if not all(bool(torch.isfinite(each).all()) for each in tensors):
            raise NonFiniteError(term, stage.name, epoch)

    check("a weight of the model", *module.parameters())
    try:
        check("a mean or variance of the mixture", *module.prior.marginals())
    except torch.linalg.LinAlgError:  # a covariance without an inverse
        check("a mean or variance of the mixture", torch.tensor(torch.nan))
    for _, batch in probe.batches(module):
        data = module.data(batch)
        check("q(z|x)", *module.posterior(module.encode(*data)).moments())
        check("λ", module.rate(*data))


def _has_unused(module: VAE, stage: Stage, settings: Settings) -> bool:
    """Whether the loss of a stage depends on some of the weights not at all; their gradients are not waited for."""
    module.eval()
    _, batch = next(settings.probe.batches(module))
    pull = stage.pull(0.0)
    with torch.random.fork_rng([] if module.device.type == "cpu" else [module.device]):
        _, loss = settings.objective.loss(module, batch, stage.kl_weight(0.0), pull)
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    return any(gradient is None for gradient in torch.autograd.grad(loss, weights, allow_unused=True))


def _trainer(settings: Settings, max_epochs: int, callbacks: list[Callback], own: dict) -> lightning.Trainer:
    """Lightning's trainer for a stage of so many epochs, with options of our own."""
    given, so_far = settings.trainer_options, settings.counters
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 10**9,
        "num_sanity_val_steps": 0,
    }
    options |= own | given | {"callbacks": callbacks}
    options |= {} if settings.checkpoint is None else settings.checkpoint.trainer_options(given)
    if options.get("max_steps", -1) != -1:
        options["max_steps"] += so_far.steps  # of each stage
    with settings.processes.environment():
        trainer = lightning.Trainer(
            max_epochs=so_far.epochs + max_epochs,
            accelerator=settings.accelerator,
            devices=settings.devices,
            **options,
        )
    so_far.set_in(trainer)
    return trainer


def _versions(module: VAE, plan: TrainingPlan, best: KeepBest | None, *, interrupted: bool) -> dict[str, Version]:
    elbo_of_epoch = {row["epoch"]: row.get("elbo_validation", np.nan) for row in plan.history}
    last = plan.first_epoch + len(plan.history)
    # Weights of an interrupted epoch were not validated.
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
            callbacks.append(EarlyStopping(KeepBest.monitor, mode="max", patience=best.patience))
    return callbacks if settings.checkpoint is None else [*callbacks, settings.checkpoint]


def _fit_or_interrupt(
    trainer: lightning.Trainer,
    plan: TrainingPlan,
    loaders: tuple[Iterable, Iterable | None],
    settings: Settings,
) -> bool:
    """Fit, from the checkpoint if there is one; return whether Ctrl-C ended the fit.

    Lightning turns Ctrl-C into an exit of the process, which is caught here.
    """
    (train, validation), checkpoint, is_ended = loaders, settings.checkpoint, False
    try:
        with interrupts_held() as held, _let_through(held, trainer, settings.processes):
            if checkpoint is None or checkpoint.found is None:
                trainer.fit(plan, train, validation)
            else:
                checkpoint.fit_on(trainer, plan, train, validation)
    except KeyboardInterrupt:  # before Lightning had begun to look out for it
        return True
    except SystemExit as error:
        if not trainer.interrupted:
            raise
        is_ended |= isinstance(error, SIGTERMException)  # by the first of several processes
    if is_ended or trainer.received_sigterm:  # a scheduler ends the process: exit, with a code of failure
        raise SystemExit(128 + signal.SIGTERM)
    return trainer.interrupted


@contextlib.contextmanager
def _let_through(held: HeldInterrupts, trainer: lightning.Trainer, processes: Processes) -> Iterator[None]:
    """Context in which Ctrl-C ends the fit: at once, or at a step on which all processes agree."""
    if processes.are_several:
        trainer.callbacks.insert(0, EndTogether(held, processes))
        yield
        return
    with held.let_through():
        yield


class EndTogether(Callback):
    """Lightning callback that ends the fit of all processes at the same step where Ctrl-C has reached one of them.

    Otherwise the others would wait for its gradients.
    """

    def __init__(self, held: HeldInterrupts, processes: Processes) -> None:
        self.held, self.processes = held, processes

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: TrainingPlan, outputs: object, batch: object, batch_index: int
    ) -> None:
        if batch_index % STEPS_BETWEEN_LOOKS == 0 and self.processes.any(self.held.take()):
            raise KeyboardInterrupt


@contextlib.contextmanager
def matmul_precision(precision: str | None) -> Iterator[None]:
    """Context with a precision of torch's matrix products; None keeps the present one."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision or before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def sigint_restored() -> Iterator[None]:
    """Context that restores the handler of Ctrl-C, since Lightning ignores the signal after the first interruption."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
