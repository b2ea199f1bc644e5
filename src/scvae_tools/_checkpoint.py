"""What outlives an epoch: versions of the weights to choose from, and a file from which a killed training goes on.

Lightning writes and restores what is its own: weights, optimiser, counters of epochs and steps, callbacks. Added here
is what it does not know: the random states, earlier stages, and what the training began with.
"""

from __future__ import annotations

import json
import random
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from scvi import REGISTRY_KEYS

from scvae_tools._messages import inform
from scvae_tools._saving import digest, digest_of_names, from_plain, to_plain, write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import lightning.pytorch as lightning
    from torch import Tensor

    from scvae_tools._batches import CountDataset
    from scvae_tools._training import TrainingPlan
    from scvae_tools._vae import VAE
    from scvae_tools.model import SCVAE

    State = dict[str, Tensor]

CHECKPOINT_FILE = "checkpoint.pt"
FORMAT = 1
#: Where a checkpoint of Lightning holds ours.
KEY = "scvae_tools"
#: Arguments of `SCVAE.train` that say where and how visibly to compute, not what.
WITHOUT_EFFECT = ("self", "checkpoint", "progress", "accelerator", "devices", "trainer_options")
#: What `fingerprint` calls the weights.
WEIGHTS = "weights at the beginning of this training"


# -- versions of the weights -------------------------------------------------------------------------------------------

#: Names of the versions; and why one may be missing.
VERSIONS = {
    "end": "there is none before a training has ended",
    "best": "it needs held-out cells (`train_size` below 1, or `validation_indices`), and a finished epoch of the last "
    "stage in which the KL terms have their full weight",
    "early_stop": "it needs held-out cells, and `patience` epochs of the last stage without a better validation ELBO",
}


class Version(NamedTuple):
    """Weights as they were after an epoch."""

    epoch: int  #: as the history counts
    elbo: float  #: of the validation cells, in nats per cell; NaN where it is not known
    state: State  #: on the CPU


def copied(module: VAE) -> State:
    """Weights of a module on the CPU, in memory of their own."""
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def renumbered(module: VAE, versions: Mapping[str, Version], order: Tensor) -> dict[str, Version]:
    """Versions with their components numbered anew: the first is what was ``order[0]``. The module stays as it is."""
    before = copied(module)
    states = {}
    for state in {id(version.state): version.state for version in versions.values()}.values():
        module.load_state_dict(state)
        module.permute_components(order)
        states[id(state)] = copied(module)
    module.load_state_dict(before)
    return {name: version._replace(state=states[id(version.state)]) for name, version in versions.items()}


def packed(versions: Mapping[str, Version], in_use: str | None, state: State) -> dict[str, Any]:
    """What a file holds of the versions; that in use, and all that share its weights, take no further room."""
    used = versions[in_use].state if in_use in versions else None
    return {
        "in_use": in_use,
        "versions": {
            name: version._asdict() | {"state": state if version.state is used else version.state}
            for name, version in versions.items()
        },
    }


def unpacked(saved: Mapping[str, Any] | None) -> tuple[dict[str, Version], str | None]:
    """Versions of a file, and the name of that in use; none for files that were written before there were any."""
    if saved is None:
        return {}, None
    return {name: Version(**version) for name, version in saved["versions"].items()}, saved["in_use"]


class KeepBest(Callback):
    """Keep the weights of the best validation ELBO, and those that were the best when the patience first ran out.

    Parameters
    ----------
    patience
        Number of epochs without a better one.
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
        """``"best"`` and ``"early_stop"``, as far as there are such."""
        if self.weights is None:
            return {}
        best = self.best, self.epoch, self.weights
        kept = {"best": best} | ({} if self.early_stop is None else {"early_stop": self.early_stop})
        states = {id(state): _on_cpu(state) for _, _, state in kept.values()}
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


def _on_cpu(state: State) -> State:
    return {name: value.cpu() for name, value in state.items()}


# -- random states -----------------------------------------------------------------------------------------------------


def random_states() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's global generators, as a file can hold them."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put the generators where `random_states` found them."""
    name, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)


class _Resumed:
    """A loader whose first order of the cells is drawn from given random states.

    Lightning may ask a loader for an iterator as often as it likes before it fetches a batch: nothing is drawn until
    then.
    """

    def __init__(self, loader: Iterable, states: Mapping[str, Any]) -> None:
        self.loader, self.states = loader, states

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        self.catch_up()
        yield from self.loader

    def catch_up(self) -> None:
        """Set the random states, once."""
        if self.states is not None:
            set_random_states(self.states)
            self.states = None


# -- what a checkpoint belongs to --------------------------------------------------------------------------------------


def fingerprint(model: SCVAE, dataset: CountDataset, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a training to go on from a checkpoint: data, model, arguments of the training.

    Parameters
    ----------
    model
        As it is before the training, its cells divided.
    dataset
        Counts and covariates of all cells.
    arguments
        Those of `SCVAE.train`, by name.
    """
    history, registry = model.history_, model.registry
    fields = {"batches": REGISTRY_KEYS.BATCH_KEY, "labels": REGISTRY_KEYS.LABELS_KEY}
    categories = {
        name: registry["field_registries"][key]["state_registry"]["categorical_mapping"] for name, key in fields.items()
    }
    options = arguments.get("trainer_options", {})
    described = {
        "version of scvae-tools": metadata.version("scvae-tools"),
        "epochs before this training": 0 if history is None else len(history),
        "n_cells": len(dataset),
        "n_genes": len(model.var_names),
        "names of the genes": digest_of_names(model.var_names),
        **{f"names of the {name}": digest_of_names(names) for name, names in categories.items()},
        "held-out cells": digest(model.validation_indices.astype(np.int64)),
        "counts": _digest_of_counts(dataset),
        **{f"data in {name!r}": digest(values) for name, values in sorted(dataset.columns.items())},
        **{f"setup_anndata({name})": _described(value) for name, value in registry["setup_args"].items()},
        **{name: _described(value) for name, value in model.init_params_["non_kwargs"].items()},
        **{f"train({name})": _described(v) for name, v in arguments.items() if name not in WITHOUT_EFFECT},
        **{f"train({name})": v for name, v in options.items() if isinstance(v, bool | int | float | str)},
        # Those of a new model follow from the rest; to the last bit, they also depend on the processor.
        WEIGHTS: None if history is None else _digest_of_weights(model.module),
    }
    described.pop("train(validation_indices)", None)  # said by the held-out cells
    return json.loads(json.dumps(described))


def _digest_of_counts(dataset: CountDataset) -> str:
    counts = dataset.counts  # scipy takes the width of its integers as it likes
    return digest(counts.indptr.astype(np.int64), counts.indices.astype(np.int32, copy=False), counts.data)


def _digest_of_weights(module: VAE) -> str:
    parts = ((name.encode(), value.numpy()) for name, value in copied(module).items())
    return digest(*(part for pair in parts for part in pair))


def _described(value: object) -> object:
    """Value as JSON holds it; of what it cannot hold, the type."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_described(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _described(each) for key, each in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    missing = object()
    names = [name for name in {**saved, **now} if saved.get(name, missing) != now.get(name, missing)]
    if len(names) > 1 and WEIGHTS in names:  # what else differs says why
        names.remove(WEIGHTS)
    return [_difference(name, saved.get(name), now.get(name)) for name in names]


def _difference(name: str, saved: object, now: object) -> str:
    is_digest = any(isinstance(value, str) and value.startswith("#") for value in (saved, now))
    return f"{name} (others)" if is_digest else f"{name} ({saved!r} there, {now!r} here)"


# -- the file ----------------------------------------------------------------------------------------------------------


class AtomicIO(TorchCheckpointIO):
    """Files of Lightning that are complete whenever they exist, and that cannot execute code when they are read."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(checkpoint, Path(path))

    def load_checkpoint(self, path: str | Path, *_: object, **__: object) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", weights_only=True)


class Checkpointer(Checkpoint):
    """Write, at the end of every epoch, all that the training needs to go on; and take it up again.

    A `Checkpoint` of Lightning: it is called last, when early stopping has decided and the history has its row.

    Parameters
    ----------
    directory
        Where the file is, or will be.
    identity
        `fingerprint` of the training.
    dataset
        Counts and covariates of all cells.

    Raises
    ------
    ValueError
        If there is a checkpoint of another training, or one that cannot be read.
    """

    def __init__(self, directory: str | Path, identity: dict[str, Any], dataset: CountDataset) -> None:
        self.directory, self.identity, self.dataset = Path(directory), identity, dataset
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"`checkpoint` must be a directory; found the file {str(directory)!r}. Pass another path.")
        self.path = self.directory / CHECKPOINT_FILE
        self.stage, self.is_second_attempt, self.attributes = 0, False, "null"
        self.before: State = {}  #: weights at the beginning of the stage
        #: Of the file that was found, until it has been taken up.
        self.found = self._read() if self.path.exists() else None
        self.directory.mkdir(parents=True, exist_ok=True)

    @property
    def is_finished(self) -> bool:
        """Whether the file holds the result of the whole training."""
        return self.found is not None and self.found[KEY]["is_finished"]

    def _read(self) -> dict[str, Any]:
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
            ours = found[KEY]
        except Exception as error:  # the ways in which a file can be something else are many
            raise ValueError(
                f"{str(self.path)!r} must be a checkpoint of `SCVAE.train`; it cannot be read. Pass another directory "
                "as `checkpoint`, or delete the file to train from the beginning."
            ) from error
        saved = json.loads(ours["identity"])
        differences = _differences(saved, self.identity)
        if differences:
            further = (
                " To train a finished model further, call `train` on it again, with another directory or none."
                if ours["is_finished"]
                else " A model that was trained since, or interrupted, has to be built anew."
                if saved["epochs before this training"] != self.identity["epochs before this training"]
                else ""
            )
            raise ValueError(
                f"The checkpoint in {str(self.directory)!r} must be of the same data, model and arguments of `train`; "
                f"found other ones: {', '.join(differences)}. Pass another directory as `checkpoint`, or the same data "
                f"and arguments.{further}"
            )
        return found

    # -- the model's side ----------------------------------------------------------------------------------------------

    def resume(self, model: SCVAE) -> int:
        """Bring a model to the beginning of the stage in which the file was written; return which stage that is."""
        if self.found is None:
            return 0
        ours = self.found[KEY]
        _set_attributes(model, ours["attributes"])
        model.module.load_state_dict(ours["before"])
        self.dataset.log_base_measure[:] = ours["log_base_measure"].numpy()
        n_epochs = len(json.loads(ours["rows"]))
        inform("Going on from %s, after epoch %d of stage %d.", self.path, n_epochs, ours["stage"] + 1)
        return ours["stage"]

    def begin_stage(self, stage: int, model: SCVAE) -> None:
        """Note what the next stage starts from."""
        self.stage, self.attributes = stage, _attributes(model)
        self.is_second_attempt = self.found is not None and self.found[KEY]["is_second_attempt"]

    def trainer_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Options that Lightning's trainer needs for this, beside those given by the user."""
        plugins = given.get("plugins") or []
        plugins = plugins if isinstance(plugins, list | tuple) else [plugins]
        return {"enable_checkpointing": True, "plugins": [*plugins, AtomicIO()]}

    def fit_on(
        self, trainer: lightning.Trainer, plan: TrainingPlan, train: Iterable, validation: Iterable | None
    ) -> None:
        """Fit from where the file was written; the file that was found is done with then."""
        resumed, self.found = _Resumed(train, self.found[KEY]["random_states"]), None
        trainer.fit(plan, resumed, validation, ckpt_path=str(self.path))
        resumed.catch_up()  # where the stage had been at its end

    def how_to_go_on(self) -> str:
        """What an interrupted user may do."""
        if not self.path.exists():
            return f"No epoch had ended, so that {str(self.directory)!r} holds nothing to go on from."
        return (
            f"To go on after the last epoch that had ended, build the model anew and train it with the same arguments "
            f"and checkpoint={str(self.directory)!r}."
        )

    def n_epochs_done(self) -> int:
        """Number of finished epochs of the stage, in the file that was found."""
        return 0 if self.found is None else len(json.loads(self.found[KEY]["rows"]))

    def finish(self, model: SCVAE) -> None:
        """Write the result in place of what is needed to go on."""
        state = _on_cpu(model.module.state_dict())
        ours = {"format": FORMAT, "identity": json.dumps(self.identity), "is_finished": True}
        ours |= {"attributes": _attributes(model), "state": state}
        ours |= {"versions": packed(model._versions, model.version, state)}
        write_atomically({KEY: ours}, self.path)

    def restore_result(self, model: SCVAE) -> None:
        """Give a model the result of the finished training."""
        ours = self.found[KEY]
        _set_attributes(model, ours["attributes"])
        model.module.load_state_dict(ours["state"])
        model._versions, model._version = unpacked(ours["versions"])
        inform("The training of %s is finished; its result was loaded.", self.path)

    # -- Lightning's side ----------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: TrainingPlan) -> None:
        trainer.save_checkpoint(self.path)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: TrainingPlan, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[KEY] = {
            "format": FORMAT,
            "identity": json.dumps(self.identity),
            "is_finished": False,
            "stage": self.stage,
            "is_second_attempt": self.is_second_attempt,
            "should_stop": trainer.should_stop,
            "attributes": self.attributes,
            "rows": json.dumps(to_plain(pl_module.history, "history")),
            "before": self.before,
            "random_states": random_states(),
            # It depends in the last bit on which cells were together in the first epoch.
            "log_base_measure": torch.from_numpy(self.dataset.log_base_measure),
        }

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: TrainingPlan, checkpoint: dict[str, Any]
    ) -> None:
        ours = checkpoint[KEY]
        pl_module.history = json.loads(ours["rows"])
        trainer.should_stop = ours["should_stop"]


def _attributes(model: SCVAE) -> str:
    """What a training changes of a model beside the weights, as JSON."""
    return json.dumps(
        {
            "history_": to_plain(model.history_, "history"),
            "component_curve_": to_plain(model.component_curve_, "component_curve"),
            "is_trained_": model.is_trained_,
            "n_components": model.n_components,
            "init_n_components": to_plain(model.init_params_["non_kwargs"]["n_components"], "n_components"),
        }
    )


def _set_attributes(model: SCVAE, saved: str) -> None:
    attributes = json.loads(saved)
    model.init_params_["non_kwargs"]["n_components"] = from_plain(attributes.pop("init_n_components"))
    n_components = attributes.pop("n_components")
    if model.n_components != n_components:  # as many as were found
        model.module.build_mixture(n_components)
    for name, value in attributes.items():
        setattr(model, name, from_plain(value))
