"""Checkpoint of a training: the file from which a killed training continues.

Lightning writes and restores its own state: weights, optimiser, counters of epochs and steps, callbacks. This module
adds the rest: the random states, earlier stages, and the state at the beginning of the training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from scvi import REGISTRY_KEYS

from scvae_tools._data.stored import StoredCounts
from scvae_tools._files import (
    digest_of_names,
    lock_folder,
    require_room,
    short_digest,
    to_plain,
    unlock_folder,
)
from scvae_tools._messages import inform, warn
from scvae_tools._random import random_states, set_random_states
from scvae_tools._train.principal_codes import PRINCIPAL_CODES
from scvae_tools._train.processes import ALONE, Processes
from scvae_tools._train.torch_file import (
    damaged_otherwise,
    read_torch,
    require_format,
    require_types,
    require_versions,
    write_torch,
)
from scvae_tools._train.versions import State, copied, on_cpu, packed, unpacked
from scvae_tools._version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import lightning.pytorch as lightning

    from scvae_tools._data.loader import CountDataset
    from scvae_tools._module.vae import VAE
    from scvae_tools._train.plan import TrainingPlan
    from scvae_tools._train.state import TrainingState

CHECKPOINT_FILE = "checkpoint.pt"


FORMAT = 1


#: Name of the number of processes in `fingerprint`.
N_PROCESSES = "number of processes"
#: What a training did before there was an argument for it.
WITHOUT_ARGUMENT = {"train(kl_weight_start)": 0.0, "train(pca_start)": False, N_PROCESSES: 1}
#: Key of our part of a checkpoint of Lightning.
KEY = "scvae_tools"


#: What the file must be, and the remedy if it is not.
RULE = (
    "must be a checkpoint of `SCVAE.train`. Pass another directory as `checkpoint`, or delete the file to train from "
    "the beginning."
)


#: Keys of our part, and their types: always, after the last epoch, and before.
IN_ALL = {"identity": str, "is_finished": bool, "attributes": str}
IN_FINISHED = {"state": dict, "versions": dict}
IN_UNFINISHED = {
    "stage": int,
    "is_second_attempt": bool,
    "should_stop": bool,
    "rows": str,
    "before": dict,
    "random_states": dict,
    "log_base_measure": torch.Tensor,
}


#: Arguments of `SCVAE.train` without an effect on the result: where to compute, and what to show.
WITHOUT_EFFECT = ("self", "checkpoint", "progress", "accelerator", "devices", "hold_on_device", "trainer_options")


#: Name of the weights in `fingerprint`.
WEIGHTS = "weights at the beginning of this training"


class _Resumed:
    """Loader that sets given random states before it draws its first order of the cells.

    Lightning may ask for several iterators before it fetches a batch. The states are set when the first is fetched.
    With several processes, ``order`` is the state of the generator ``generator`` of the orders that they share.
    """

    def __init__(
        self,
        loader: Iterable,
        states: Mapping[str, Any],
        generator: torch.Generator | None = None,
        order: torch.Tensor | None = None,
    ) -> None:
        self.loader, self.states, self.generator, self.order = loader, states, generator, order

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        self.catch_up()
        yield from self.loader

    def catch_up(self) -> None:
        """Set the random states, once."""
        if self.states is not None:
            set_random_states(self.states)
            if self.generator is not None:
                self.generator.set_state(self.order)
            self.states = None


def fingerprint(
    dataset: CountDataset,
    module: VAE,
    state: TrainingState,
    *,
    registry: Mapping[str, Any],
    var_names: np.ndarray,
    held_out: np.ndarray,
    of_model: Mapping[str, Any],
    of_training: Mapping[str, Any],
    n_processes: int = 1,
) -> dict[str, Any]:
    """Description of data, model and arguments that must be the same for a training to continue from a checkpoint.

    Parameters
    ----------
    dataset
        Counts and covariates of all cells.
    module, state
        Module and state before the training.
    registry
        Registry of scvi-tools.
    var_names
        Names of the genes.
    held_out
        Positions of the validation cells.
    of_model, of_training
        Arguments of `SCVAE` and of `SCVAE.train`, by name.
    n_processes
        Number of processes that train together.
    """
    fields = {"batches": REGISTRY_KEYS.BATCH_KEY, "labels": REGISTRY_KEYS.LABELS_KEY}
    categories = {
        name: registry["field_registries"][key]["state_registry"]["categorical_mapping"] for name, key in fields.items()
    }
    options = of_training.get("trainer_options", {})
    columns = set(dataset.columns) - {PRINCIPAL_CODES}  # which follow from the rest, but for the last bits
    described = {
        "version of scvae-tools": __version__,
        "epochs before this training": state.n_epochs,
        N_PROCESSES: n_processes,
        "n_cells": len(dataset),
        "n_genes": len(var_names),
        "names of the genes": digest_of_names(var_names),
        **{f"names of the {name}": digest_of_names(names) for name, names in categories.items()},
        "held-out cells": short_digest(held_out.astype(np.int64)),
        "counts": _digest_of_counts(dataset),
        **{f"data in {name!r}": short_digest(dataset.columns[name]) for name in sorted(columns)},
        **{f"setup_anndata({name})": _described(value) for name, value in registry["setup_args"].items()},
        **{name: _described(value) for name, value in of_model.items()},
        **{f"train({name})": _described(v) for name, v in of_training.items() if name not in WITHOUT_EFFECT},
        **{f"train({name})": v for name, v in options.items() if isinstance(v, bool | int | float | str)},
        # The weights of a new model follow from the rest, but their last bits depend on the CPU too.
        WEIGHTS: None if state.history is None else _digest_of_weights(module),
    }
    described.pop("train(validation_indices)", None)  # the held-out cells tell the same
    return json.loads(json.dumps(described))


def _digest_of_counts(dataset: CountDataset) -> str:
    counts = dataset.counts
    if isinstance(counts, StoredCounts):
        return counts.digest
    # The integers of scipy vary in width.
    return short_digest(counts.indptr.astype(np.int64), counts.indices.astype(np.int32, copy=False), counts.data)


def _digest_of_weights(module: VAE) -> str:
    parts = ((name.encode(), value.numpy()) for name, value in copied(module).items())
    return short_digest(*(part for pair in parts for part in pair))


def _described(value: object) -> object:
    """Value as JSON can hold it; the name of its type where JSON cannot."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_described(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _described(each) for key, each in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__


def require_alike(identities: Sequence[Mapping[str, Any]]) -> None:
    """Refuse processes that would not train the same model on the same data.

    Parameters
    ----------
    identities
        `fingerprint` of the training in each process.

    Raises
    ------
    ValueError
        If they differ; it says in what.
    """
    for rank, identity in enumerate(identities):
        if differences := _differences(identities[0], identity, (f"in process {rank}", "in process 0")):
            raise ValueError(
                "Processes that train together must have the same data, model and arguments of `train`; found other "
                f"ones: {', '.join(differences)}. Seed what is drawn in the script, and read the same files in each."
            )


def _differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], places: tuple[str, str] = ("here", "there")
) -> list[str]:
    missing = object()
    names = [name for name in {**saved, **now} if saved.get(name, missing) != now.get(name, missing)]
    if len(names) > 1 and WEIGHTS in names:  # the other differences explain it
        names.remove(WEIGHTS)
    return [_difference(name, saved.get(name), now.get(name), places) for name in names]


def _difference(name: str, saved: object, now: object, places: tuple[str, str]) -> str:
    is_digest = any(isinstance(value, str) and value.startswith("#") for value in (saved, now))
    return f"{name} (others)" if is_digest else f"{name} ({saved!r} {places[1]}, {now!r} {places[0]})"


class AtomicIO(TorchCheckpointIO):
    """Files of Lightning, written atomically, and read without executing code in them.

    Parameters
    ----------
    ours
        Path of the checkpoint of the training, which is written with ``try_to``. Lightning lets one process write, and
        the others wait: an error must not keep it from telling them that it has done so.
    """

    def __init__(self, ours: Path, try_to: Callable[[Callable[[], None]], None]) -> None:
        super().__init__()
        self.ours, self.try_to = ours, try_to

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        if Path(path) == self.ours:
            self.try_to(lambda: write_torch(checkpoint, self.ours))
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_torch(checkpoint, Path(path))

    def load_checkpoint(self, path: str | Path, *_: object, **__: object) -> dict[str, Any]:
        return read_torch(Path(path), RULE)


class Checkpointer(Checkpoint):
    """Lightning callback that writes a checkpoint at the end of every epoch, and continues a training from it.

    Lightning calls callbacks of the class `Checkpoint` last, when early stopping has decided and the history has its
    row.

    Parameters
    ----------
    directory
        Folder of the file, which need not exist yet.
    identity
        `fingerprint` of the training.
    dataset
        Counts and covariates of all cells.
    processes
        Processes that train together, of which the first writes the file, and all read it.

    Raises
    ------
    ValueError
        If there is a checkpoint of another training, or one that cannot be read, or another training is running there.
    """

    def __init__(
        self,
        directory: str | Path,
        identity: dict[str, Any],
        dataset: CountDataset,
        processes: Processes = ALONE,
    ) -> None:
        self.directory, self.identity, self.dataset = Path(directory), identity, dataset
        self.processes = processes
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"`checkpoint` must be a directory; found the file {str(directory)!r}. Pass another path.")
        self.path = self.directory / CHECKPOINT_FILE
        self.stage, self.is_second_attempt, self.attributes = 0, False, "null"
        self.has_warned = False
        self.counters: tuple[int, ...] = ()  #: numbers of epochs and steps before the stage
        self.before: State = {}  #: weights at the beginning of the stage
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = processes.of_first(self._locked)
        self._lock = lock if processes.is_first else None
        try:
            self._require_to_be_shared()
            #: Content of the file that was found, until the training has continued from it.
            self.found = self._read() if self.path.exists() else None
        except BaseException:
            self.close()
            raise
        self._known = self._stamp()

    def _locked(self) -> int | None:
        """Lock of the directory, which ends with the process; None where the file system has none."""
        try:
            return lock_folder(self.directory)
        except BlockingIOError as error:
            raise ValueError(
                f"The checkpoint in {str(self.directory)!r} must be of one training at a time; found another one that "
                "is running. Pass another directory as `checkpoint`, or wait until that one has ended."
            ) from error
        except OSError:
            return None

    def _require_to_be_shared(self) -> None:
        seen = self.processes.gathered(self.path.exists())
        if len(set(seen)) > 1:
            raise ValueError(
                "`checkpoint` must be a directory that all processes see, on all machines; found a file in "
                f"{str(self.directory)!r} that {seen.count(False)} of {len(seen)} processes do not see. Pass a "
                "directory that the machines share."
            )

    def close(self) -> None:
        """Leave the directory to other trainings."""
        unlock_folder(self._lock)
        self._lock = None

    def _stamp(self) -> tuple[int, int] | None:
        """What changes with each writing of the file; None if there is none."""
        if not self.path.exists():
            return None
        status = self.path.stat()
        return status.st_ino, status.st_mtime_ns

    @property
    def is_finished(self) -> bool:
        """Whether the file holds the result of the whole training."""
        return self.found is not None and self.found[KEY]["is_finished"]

    def _read(self) -> dict[str, Any]:
        found = read_torch(self.path, RULE)
        with damaged_otherwise(self.path, RULE):
            require_types(found, {KEY: dict})
            ours = found[KEY]
            require_format(ours, FORMAT)
            require_types(ours, IN_ALL | (IN_FINISHED if ours.get("is_finished") else IN_UNFINISHED))
            saved = WITHOUT_ARGUMENT | json.loads(ours["identity"])
            require_types(saved, {"epochs before this training": int}, "identity")
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

    def resume(self, module: VAE, state: TrainingState) -> int:
        """Restore the beginning of the stage in which the file was written; return the position of this stage.

        Raises
        ------
        DiskFullError
            If there is no room for another file: weights, their average, twice as much of Adam, and the weights before
            the stage.
        """
        n_bytes = sum(value.nbytes for value in module.state_dict().values())
        n_needed = 5 * n_bytes + self.dataset.log_base_measure.nbytes
        self.processes.of_first(lambda: require_room(self.path, n_needed))
        if self.found is None:
            return 0
        ours = self.found[KEY]
        with damaged_otherwise(self.path, RULE):
            _take_over(module, state, ours, "before")
            self.dataset.log_base_measure[:] = ours["log_base_measure"].numpy()
            n_epochs = len(json.loads(ours["rows"]))
        inform("Going on from %s, after epoch %d of stage %d.", self.path, n_epochs, ours["stage"] + 1)
        return ours["stage"]

    def begin_stage(self, stage: int, module: VAE, state: TrainingState) -> None:
        """Note the state from which the next stage starts."""
        self.stage, self.attributes = stage, state.to_json(module.n_components)
        self.is_second_attempt = self.found is not None and self.found[KEY]["is_second_attempt"]

    def begin_counting(self, counters: tuple[int, ...]) -> tuple[int, ...]:
        """Note from which numbers of epochs and steps the stage counts on; return those of the file, if it has any."""
        found = None if self.found is None else self.found[KEY].get("counters")
        self.counters = counters if found is None else tuple(found)
        return self.counters

    def trainer_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Options that Lightning's trainer needs for checkpoints, beside those given by the user."""
        plugins = given.get("plugins") or []
        plugins = plugins if isinstance(plugins, list | tuple) else [plugins]
        return {"enable_checkpointing": True, "plugins": [*plugins, AtomicIO(self.path, self._try_to)]}

    def fit_on(
        self, trainer: lightning.Trainer, plan: TrainingPlan, train: Iterable, validation: Iterable | None
    ) -> None:
        """Continue the fit from the file that was found, which is not needed any more after that."""
        ours, rank, self.found = self.found[KEY], self.processes.rank, None
        states = [ours["random_states"], *ours.get("states_of_others", ())][rank]
        resumed = _Resumed(train, states, self.processes.share.generator, ours.get("state_of_orders"))
        trainer.fit(plan, resumed, validation, ckpt_path=str(self.path))
        resumed.catch_up()  # where the stage had ended, so that no batch was fetched

    def how_to_go_on(self) -> str:
        """Message that tells the user how to continue after an interruption."""
        if not self.path.exists():
            return f"No epoch had ended, so that {str(self.directory)!r} holds nothing to go on from."
        return (
            f"To go on after the last epoch that had ended, build the model anew and train it with the same arguments "
            f"and checkpoint={str(self.directory)!r}."
        )

    def n_epochs_done(self) -> int:
        """Number of finished epochs of the stage, in the file that was found."""
        return 0 if self.found is None else len(json.loads(self.found[KEY]["rows"]))

    def finish(self, module: VAE, state: TrainingState) -> None:
        """Write the result of the training in place of the checkpoint."""
        weights = on_cpu(module.state_dict())
        ours = {"format": FORMAT, "identity": json.dumps(self.identity), "is_finished": True}
        ours |= {"attributes": state.to_json(module.n_components), "state": weights}
        ours |= {"versions": packed(state.versions, state.version, weights)}
        if self.processes.is_first:
            self._try_to(lambda: write_torch({KEY: ours}, self.path))

    def _try_to(self, write: Callable[[], None]) -> None:
        """Write the file; if that cannot be, warn once: it is no reason to lose the training.

        It is not written over that of another training, such as one on another computer, where the lock is not seen.
        """
        try:
            if self._stamp() not in (None, self._known):
                raise OSError(f"another training has written to {str(self.path)!r} since.")
            write()
            self._known = self._stamp()
        except OSError as error:
            if not self.has_warned:
                former = "after the epoch that it holds" if self.path.exists() else "from the beginning"
                warn(
                    f"The checkpoint is not up to date: {error} The training goes on, and tries again each epoch. If "
                    f"it is killed before, it starts again {former}."
                )
            self.has_warned = True

    def restore_result(self, module: VAE, state: TrainingState) -> None:
        """Load the result of the finished training into module and state."""
        ours = self.found[KEY]
        with damaged_otherwise(self.path, RULE):
            require_versions(ours["versions"])
            _take_over(module, state, ours, "state")
            state.versions, state.version = unpacked(ours["versions"])
        inform("The training of %s is finished; its result was loaded.", self.path)

    # -- Lightning's side ----------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: TrainingPlan) -> None:
        trainer.save_checkpoint(self.path)  # which `AtomicIO` tries

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: TrainingPlan, checkpoint: dict[str, Any]
    ) -> None:
        own, *others = self.processes.gathered(random_states())
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
            "counters": list(self.counters),
            "random_states": own,
            # Its last bits depend on which cells were in one batch in the first epoch.
            "log_base_measure": torch.from_numpy(self.dataset.log_base_measure),
        }
        if self.processes.are_several:
            orders = self.processes.share.generator.get_state()
            checkpoint[KEY] |= {"states_of_others": others, "state_of_orders": orders}

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: TrainingPlan, checkpoint: dict[str, Any]
    ) -> None:
        ours = checkpoint[KEY]
        pl_module.history = json.loads(ours["rows"])
        trainer.should_stop = ours["should_stop"]


def _take_over(module: VAE, state: TrainingState, saved: Mapping[str, Any], weights: str) -> None:
    """Load a module and the state of its training from the content of a file."""
    n_components = state.update_from_json(saved["attributes"])
    if module.n_components != n_components:  # the training found the number
        module.build_mixture(n_components)
    module.load_state_dict(saved[weights])
