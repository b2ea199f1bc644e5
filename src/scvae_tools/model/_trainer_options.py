"""Options of Lightning's trainer in `SCVAE.train`: which there are, which are refused, and the devices that train."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

import lightning.pytorch as lightning
import numpy as np
import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from scvae_tools._checks import check_choice, check_whole
from scvae_tools._messages import listed, warn
from scvae_tools._other_names import unknown_argument
from scvae_tools._train.processes import ALONE, STRATEGIES, Processes, join
from scvae_tools._upstream import parse_device_args

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from scvae_tools._data.resident import ResidentCells
    from scvae_tools._data.windows import CellWindows

_ONE_DEVICE = (
    "Each of these models is trained by one process on one device; `SCVAE.train` takes several. Leave it out. To train "
    "several models at a time, start a process for each, with a GPU of its own in CUDA_VISIBLE_DEVICES."
)
_ONE_STRATEGY = (
    "Several devices are trained by 'ddp', in which each has a process that runs the whole script. Pass devices=2, and "
    "leave this out; in a notebook, write the code to a file and run it as `!python train.py`."
)
#: Options that `SCVAE.train` cannot hand on, with the values that ask for nothing, and what to do in place of others.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "strategy": (("auto", "single_device", *STRATEGIES), _ONE_STRATEGY),
    "sync_batchnorm": (
        (False,),
        "Each process normalises by its own cells, and running means are averaged over all of them. Leave it out.",
    ),
    "use_distributed_sampler": ((True, False), "Each process reads its own share of the cells already. Leave it out."),
    "num_sanity_val_steps": ((0,), "The held-out cells are read at the end of each epoch. Leave it out."),
    "fast_dev_run": ((False, 0), "Pass max_epochs=1 for a short training."),
    "barebones": ((False,), "The training needs the callbacks that it would leave out. Leave it out."),
}
#: All options that the trainer takes, without those that are arguments of `SCVAE.train` itself.
TRAINER_OPTIONS = frozenset(inspect.signature(lightning.Trainer).parameters) - {"max_epochs", "accelerator", "devices"}


def check_trainer_options(options: Mapping[str, Any], train: Callable) -> dict[str, Any]:
    """Check further arguments of `SCVAE.train`, and return those to hand on to Lightning's trainer.

    Parameters
    ----------
    options
        Values by name, as the user gave them. ``strategy`` and ``num_nodes`` are for `join_processes`.
    train
        `SCVAE.train`, for the names of its own arguments.

    Raises
    ------
    UnknownArgument
        If the trainer does not know one.
    ValueError
        If one asks for what does not work here.
    """
    parameters = inspect.signature(train).parameters.values()
    own, kept = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD], {}
    for name, value in options.items():
        if name not in TRAINER_OPTIONS:
            takes = f"It takes {', '.join(own)}, and options of lightning.pytorch.Trainer."
            raise unknown_argument("train", name, [*own, *TRAINER_OPTIONS], takes)
        harmless, remedy = REFUSED.get(name, ((value,), ""))
        if not any(value is each or (type(value) is type(each) and value == each) for each in harmless):
            raise ValueError(f"`{name}` must be {' or '.join(map(repr, harmless))}; found {value!r}. {remedy}")
        if name not in REFUSED and name != "num_nodes":
            kept[name] = value
    if options.get("num_nodes") is not None:
        check_whole("num_nodes", options["num_nodes"])
    _check_precision(kept.get("precision"))
    if "callbacks" in kept:  # as Lightning takes them: one, several or None
        callbacks = kept["callbacks"]
        kept["callbacks"] = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks] * bool(callbacks)
    return kept


def _check_precision(precision: object) -> None:
    if precision is not None and str(precision) not in ("32", "32-true"):
        raise ValueError(
            f"`precision` must be '32-true', in which log-likelihood and KL are tested; found {precision!r}. Pass "
            "matmul_precision='medium' instead, which takes bfloat16 for the matrix products alone."
        )


def _are_several(devices: object) -> bool:
    """Whether devices are not one, in any of the ways in which Lightning takes them."""
    if isinstance(devices, list | tuple):
        return len(devices) != 1
    text = str(devices).strip()
    return "," in text.rstrip(",") or (text not in ("auto", "1") and "," not in text)


def join_processes(accelerator: str, devices: object, options: Mapping[str, Any]) -> Processes:
    """Processes of the devices that a training asks for, which are started if need be; `ALONE` for one device.

    Parameters
    ----------
    accelerator, devices
        As the user gave them.
    options
        Options of Lightning's trainer, of which ``strategy`` and ``num_nodes`` count.

    Raises
    ------
    ValueError
        If there are no such devices, or the processes cannot be started from here.
    """
    strategy, num_nodes = options.get("strategy", "auto"), options.get("num_nodes")
    are_several = _are_several(devices)
    if not (are_several or strategy in STRATEGIES or num_nodes not in (None, 1)):
        return ALONE
    if isinstance(devices, list | tuple) and len(devices) == 0:
        raise ValueError(
            f"`devices` must be 'auto', a number of devices, or their numbers in a list; found {devices!r}."
        )
    if strategy == "single_device":
        raise ValueError(f"`strategy` must be 'ddp' for several devices; found {strategy!r}. Leave it out.")
    _check_accelerator(accelerator)
    if str(devices).strip() == "auto" and accelerator == "cpu":
        devices = 1
    return join(accelerator, list(devices) if isinstance(devices, tuple) else devices, num_nodes)


def check_one_device(devices: object) -> None:
    """Refuse several devices, in any of the ways in which Lightning takes them."""
    if _are_several(devices):
        raise ValueError(
            f"`devices` must be 'auto', 1, or the number of one device in a list, such as [0]; found {devices!r}. "
            f"{_ONE_DEVICE}"
        )


def device_of(accelerator: str, devices: object) -> tuple[str, Any, torch.device]:
    """Accelerator and devices as Lightning takes them, and the device.

    Raises
    ------
    ValueError
        If there is no such device, or there are several.
    """
    _check_accelerator(accelerator)
    check_one_device(devices)
    try:
        return parse_device_args(accelerator, devices, return_device="torch")
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ValueError(
            f"`accelerator` and `devices` must be a device of this machine; found {accelerator!r} and {devices!r} "
            f"({error}). Leave both out for the best that there is."
        ) from error


def device_of_training(accelerator: str, devices: object, processes: Processes) -> tuple[str, Any, torch.device]:
    """Accelerator and devices as Lightning takes them, and the device of this process."""
    if processes.are_several:
        return accelerator, list(devices) if isinstance(devices, tuple) else devices, processes.device
    return device_of(accelerator, 1 if _are_several(devices) else devices)


def _check_accelerator(accelerator: object) -> None:
    if not isinstance(accelerator, Accelerator):
        known = ("auto", "gpu", *AcceleratorRegistry.available_accelerators())
        check_choice("accelerator", accelerator, known)


def warn_of_tasks() -> None:
    """Warn of further tasks of a job of SLURM."""
    n_tasks = os.environ.get("SLURM_NTASKS", "1")
    if n_tasks != "1":
        warn(
            f"This job of SLURM has {n_tasks} tasks (SLURM_NTASKS), and the model is trained by one process on one "
            "device: the other tasks are idle or, where srun has started them, train models of their own. Ask for "
            "--ntasks=1, and for more threads by --cpus-per-task; or pass the number of tasks on a machine as "
            "`devices`."
        )


#: Options of Lightning's trainer that leave the steps as they are.
OPTIONS_BESIDE_STEPS = {
    *("callbacks", "logger", "default_root_dir", "enable_checkpointing", "enable_model_summary"),
    *("precision", "enable_progress_bar", "log_every_n_steps", "benchmark", "deterministic", "inference_mode"),
}


def whether_to_hold(
    hold_on_device: bool | None,  # noqa: FBT001
    trainer_options: dict[str, Any],
    processes: Processes = ALONE,
) -> bool | None:
    """Return whether to hold the counts on the device, None for where there is room; see `TrainingMixin.train`."""
    hold_on_device = bool(hold_on_device) if isinstance(hold_on_device, np.bool_) else hold_on_device
    check_choice("hold_on_device", hold_on_device, (None, True, False))
    if processes.are_several and hold_on_device:
        raise ValueError(
            f"`hold_on_device=True` is for a training on one device; found {processes.number} processes. Leave it out: "
            "each process then reads its share of the cells."
        )
    others = [name for name in trainer_options if name not in OPTIONS_BESIDE_STEPS]
    if others and hold_on_device:
        raise ValueError(
            "`hold_on_device=True` takes the steps of the training by itself, so that options of Lightning's trainer "
            f"cannot change them; found {listed(others)}. Leave them out, or leave out `hold_on_device`."
        )
    return False if others or processes.are_several else hold_on_device


def no_memory(device: torch.device, cells: ResidentCells | CellWindows | None) -> str:
    """Message for a device whose memory is full."""
    free, total = (each / 1e9 for each in torch.cuda.mem_get_info(device))
    counts = "" if cells is None else f", or hold_on_device=False: the counts take {cells.n_bytes / 1e9:.2g} GB of it"
    return (
        f"Training needs more memory than {device} has; found {free:.1f} of {total:.1f} GB free. Pass a smaller "
        f"`batch_size` or `n_hidden`{counts}."
    )
