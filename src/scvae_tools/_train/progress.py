"""Progress that is shown: a bar over the epochs of a training, one over the parts of other work, and when it is."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, Self

import scvi
from lightning.pytorch.callbacks import Callback

from scvae_tools._messages import quiet_tqdm
from scvae_tools._module.mixture_vaes import MixtureVAE

if TYPE_CHECKING:
    from collections.abc import Iterable

    import lightning.pytorch as lightning

    from scvae_tools._train.plan import TrainingPlan
    from scvae_tools._train.stages import Stage

START_OF_MIXTURE = "start of the mixture"


def is_shown(*given: bool | None) -> bool:
    """Whether to show progress: where the user says so, and otherwise unless scanpy or scvi-tools are set to be quiet.

    scanpy is by ``scanpy.settings.verbosity = 0``, and scvi-tools by a ``scvi.settings.verbosity`` above INFO.
    """
    said = [each for each in given if each is not None]
    if said:
        return all(said)
    scanpy = sys.modules.get("scanpy")
    is_quiet = scanpy is not None and int(scanpy.settings.verbosity) <= 0
    return not is_quiet and scvi.settings.verbosity <= logging.INFO


class Progress(Callback):
    """One bar over all stages: epoch, ELBO and time left, and what is done between the epochs."""

    def __init__(self, stages: Iterable[Stage], *, enable: bool) -> None:
        self.bar = None
        self.total = sum(stage.max_epochs for stage in stages)
        self.enable = enable

    def start(self) -> None:
        """Show the bar, before the first epoch, which can take long."""
        if self.enable:
            self.bar = progress_bar(self.total)

    def say(self, what: str) -> None:
        """Name what is done outside the epochs."""
        if self.bar is not None:
            self.bar.set_postfix_str(what)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: TrainingPlan) -> None:
        if pl_module.epoch_of_stage == 0:
            self.say(f"stage={pl_module.stage.name}")

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: TrainingPlan) -> None:
        pl_module.close_training()  # with or without a bar, since other processes may have one
        if self.bar is None:
            return
        row = pl_module.row
        elbo = row.get("elbo_validation", row["elbo_train"])
        self.bar.set_postfix(stage=row["stage"], ELBO=f"{elbo:.1f}", refresh=False)
        self.bar.update(1)

    def skip(self, n_epochs: int) -> None:
        """Shorten the bar by epochs that early stopping saved, or that an earlier process has trained."""
        if self.bar is not None:
            self.bar.total -= n_epochs
            self.bar.refresh()

    def close(self) -> None:
        """End the bar's line."""
        if self.bar is not None:
            self.bar.close()


class EpochsInBar(Callback):
    """Epoch and stage of a training, written beside a bar that counts something else.

    Parameters
    ----------
    bar
        Bar of `progress_bar`.
    what
        Text that comes first.
    """

    def __init__(self, bar: Any, what: str) -> None:
        self.bar, self.what = bar, what

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: TrainingPlan) -> None:
        self.bar.set_postfix_str(f"{self.what}, epoch {trainer.current_epoch + 1}, {pl_module.stage.name}")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: TrainingPlan) -> None:
        if isinstance(pl_module.module, MixtureVAE) and not pl_module.stage.is_mixture:
            self.bar.set_postfix_str(f"{self.what}, {START_OF_MIXTURE}")


class Parts:
    """Bar over the parts of some work, each named while it is done; a context.

    Parameters
    ----------
    what
        Name of the work.
    total
        Number of its parts.
    enable
        Whether to show anything.
    """

    def __init__(self, what: str, total: int, *, enable: bool) -> None:
        self.bar = progress_bar(total, what, "part") if enable else None
        self.has_begun = False

    def begin(self, name: str) -> None:
        """End the part before, and name the next."""
        if self.bar is not None:
            self.bar.update(self.has_begun)
            self.bar.set_postfix_str(name)
            self.has_begun = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.bar is not None:
            self.bar.update(self.has_begun and kind is None)
            self.bar.close()


def progress_bar(total: int, what: str = "scvae", unit: str = "epoch") -> Any:
    """Bar of tqdm: in notebooks a widget, or text where these cannot be shown."""
    quiet_tqdm()
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=what, unit=unit)
