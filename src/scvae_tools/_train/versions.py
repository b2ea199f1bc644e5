"""Versions of the weights that a training leaves: at its end, the best, and those at early stopping.

The module keeps the best: those of the highest validation ELBO in the last stage, or the last weights where there is no
validation set or the KL terms were still being warmed up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from lightning.pytorch.callbacks import Callback
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import lightning.pytorch as lightning

    from scvae_tools._module.vae import VAE
    from scvae_tools._train.plan import TrainingPlan

State = dict[str, Tensor]


#: Names of the versions; and why one may be missing.
VERSIONS = {
    "end": "there is none before a training has ended",
    "best": "it needs held-out cells (`train_size` below 1, or `validation_indices`), and a finished epoch of the last "
    "stage in which the KL terms have their full weight",
    "early_stop": "it needs held-out cells, and `patience` epochs of the last stage without a better validation ELBO",
}


class Version(NamedTuple):
    """Weights as they were after an epoch."""

    epoch: int  #: number of the epoch in the history
    elbo: float  #: ELBO of the validation cells, in nats per cell; NaN where it is not known
    state: State  #: weights, on the CPU


def copied(module: VAE) -> State:
    """Weights of a module on the CPU, in memory of their own."""
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def renumbered(module: VAE, versions: Mapping[str, Version], order: Tensor) -> dict[str, Version]:
    """Versions with renumbered components: the new component i is the old ``order[i]``. The module stays as it is."""
    return changed(module, versions, lambda: module.permute_components(order))


def changed(module: VAE, versions: Mapping[str, Version], change: Callable[[], object]) -> dict[str, Version]:
    """Versions with weights that ``change`` has changed, while the module had them. The module stays as it is."""
    before = copied(module)
    states = {}
    for state in {id(version.state): version.state for version in versions.values()}.values():
        module.load_state_dict(state)
        change()
        states[id(state)] = copied(module)
    module.load_state_dict(before)
    return {name: version._replace(state=states[id(version.state)]) for name, version in versions.items()}


def packed(versions: Mapping[str, Version], in_use: str | None, state: State) -> dict[str, Any]:
    """Versions in a form for files.

    The version in use, and all that share its weights, refer to ``state`` and take no further room.
    """
    used = versions[in_use].state if in_use in versions else None
    return {
        "in_use": in_use,
        "versions": {
            name: version._asdict() | {"state": state if version.state is used else version.state}
            for name, version in versions.items()
        },
    }


def unpacked(saved: Mapping[str, Any] | None) -> tuple[dict[str, Version], str | None]:
    """Versions in a file, and the name of the version in use; none for files from before there were versions."""
    if saved is None:
        return {}, None
    return {name: Version(**version) for name, version in saved["versions"].items()}, saved["in_use"]


class KeepBest(Callback):
    """Lightning callback that keeps the weights of the best validation ELBO, and those of early stopping.

    The weights of early stopping are those that were the best when the patience first ran out.

    Parameters
    ----------
    patience
        Number of epochs without a better validation ELBO.
    """

    monitor = "elbo_validation"

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best, self.epoch, self.weights = -np.inf, None, None
        self.n_since = 0  #: epochs since the best
        self.early_stop: tuple[float, int, State] | None = None

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: TrainingPlan) -> None:
        value = float(trainer.callback_metrics.get(self.monitor, -np.inf))
        if value > self.best:
            self.best, self.epoch, self.n_since = value, pl_module.row["epoch"], 0
            self.weights = {k: v.detach().clone() for k, v in pl_module.module.state_dict().items()}
            return
        self.n_since += 1
        if self.early_stop is None and self.weights is not None and self.n_since >= self.patience:
            self.early_stop = self.best, self.epoch, self.weights

    def restore(self, module: VAE) -> None:
        """Load the best weights, if there are any."""
        if self.weights is not None:
            module.load_state_dict(self.weights)

    def versions(self, elbo_of_epoch: Mapping[int, float]) -> dict[str, Version]:
        """Versions ``"best"`` and ``"early_stop"``, as far as they exist."""
        if self.weights is None:
            return {}
        best = self.best, self.epoch, self.weights
        kept = {"best": best} | ({} if self.early_stop is None else {"early_stop": self.early_stop})
        states = {id(state): on_cpu(state) for _, _, state in kept.values()}
        return {
            name: Version(epoch, elbo_of_epoch.get(epoch, elbo), states[id(state)])
            for name, (elbo, epoch, state) in kept.items()
        }

    def state_dict(self) -> dict[str, Any]:
        names = ("best", "epoch", "weights", "n_since", "early_stop")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)


def on_cpu(state: State) -> State:
    return {name: value.cpu() for name, value in state.items()}
