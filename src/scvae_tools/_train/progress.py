"""Progress bars of the training."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import Callback

if TYPE_CHECKING:
    from collections.abc import Iterable

    import lightning.pytorch as lightning

    from scvae_tools._train.plan import TrainingPlan
    from scvae_tools._train.stages import Stage


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
            self.bar = progress_bar(self.total)
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


def progress_bar(total: int) -> object:
    from tqdm import TqdmExperimentalWarning, TqdmWarning
    from tqdm.auto import tqdm

    with warnings.catch_warnings():
        # Without ipywidgets tqdm falls back to text, and says so each time.
        warnings.simplefilter("ignore", TqdmWarning)
        warnings.simplefilter("ignore", TqdmExperimentalWarning)
        return tqdm(total=total, desc="scvae", unit="epoch")
