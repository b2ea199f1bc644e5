"""Processes that train one model together, each on a device of its own; Lightning starts and connects them."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import lightning.pytorch as lightning
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import distributed, nn

from scvae_tools._data.shares import WHOLE, Share
from scvae_tools._upstream import one_process, quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

Value = TypeVar("Value")

#: Strategies of Lightning in which each process runs the whole script of the user. The second is what scvi-tools asks
#: for; here both are the same.
STRATEGIES = ("ddp", "ddp_find_unused_parameters_true")


class Processes:
    """Processes that train one model together. By default it is one, which has nobody to wait for.

    All of them must call a method that combines something, and in the same order.

    Parameters
    ----------
    rank, number
        Which of how many processes this is, from 0 on.
    device
        Device of this process.
    options
        Options of Lightning's trainer that connect the processes, without the strategy.
    """

    def __init__(
        self,
        rank: int = 0,
        number: int = 1,
        device: torch.device | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.rank, self.number, self.device, self.options = rank, number, device, options or {}
        self.share = WHOLE  #: of the cells of each epoch

    @property
    def are_several(self) -> bool:
        """Whether there are others."""
        return self.number > 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    # -- what they compute together ------------------------------------------------------------------------------------

    def total(self, values: Tensor) -> Tensor:
        """Sum of a tensor over the processes."""
        if self.are_several:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def any(self, is_so: bool) -> bool:  # noqa: FBT001
        """Whether something is so in any of the processes."""
        if not self.are_several:
            return is_so
        return bool(self.total(torch.tensor(int(is_so), device=self.device)))

    def of_first(self, make: Callable[[], Value]) -> Value:
        """Result of a function that the first process alone calls.

        Raises
        ------
        RuntimeError
            In the others, if the function failed in the first.
        """
        if not self.are_several:
            return make()
        result, error = None, None
        if self.is_first:
            try:
                result = make()
            except Exception as failure:  # noqa: BLE001  (raised below, when the others know)
                error = failure
        sent = [(result, None if error is None else f"{type(error).__name__}: {error}")]
        distributed.broadcast_object_list(sent, src=0)
        if error is not None:
            raise error
        result, failed = sent[0]
        if failed is not None:
            raise RuntimeError(f"The first process could not go on, so this one ends too ({failed})")
        return result

    def gathered(self, value: Value) -> list[Value]:
        """Value of each process."""
        if not self.are_several:
            return [value]
        values: list = [None] * self.number
        distributed.all_gather_object(values, value)
        return values

    def by_parts(self, function: Callable[[np.ndarray], np.ndarray], positions: np.ndarray) -> np.ndarray:
        """Result of a function with a row for each of some cells, (n, ...), of which each process computes a part."""
        if len(positions) < self.number:  # some have none
            return function(positions)
        part = np.array_split(positions, self.number)[self.rank]
        return np.concatenate(self.gathered(function(part)))

    def part_of(self, cells: np.ndarray) -> np.ndarray:
        """Cells of which this process adds its part to a mean: all, in each process, where some would have none."""
        return cells if len(cells) < self.number else cells[self.rank :: self.number]

    @torch.no_grad()
    def average_norms(self, module: nn.Module) -> None:
        """Give the batch norms of all processes the mean of their running means and variances."""
        for norm in module.modules() if self.are_several else ():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
                for value in (norm.running_mean, norm.running_var):
                    value.copy_(self.total(value) / self.number)

    def wait(self) -> None:
        """Wait until all are here."""
        if self.are_several:
            on_device = {} if self.device.type == "cpu" else {"device_ids": [self.device.index]}
            distributed.barrier(**on_device)

    # -- a training ----------------------------------------------------------------------------------------------------

    def begin(self, seed: int) -> None:
        """Draw the same orders of the cells in all processes from now on, and other random numbers in each."""
        if self.are_several:
            self.share = Share(self.rank, self.number, seed)
            torch.manual_seed(int(np.random.SeedSequence([seed, self.rank]).generate_state(1, np.uint64)[0] >> 1))

    def trainer_options(self, *, has_unused: bool) -> dict[str, Any]:
        """Options that each of Lightning's trainers needs to be one of these processes.

        With ``has_unused``, some weights are not used in the stage, such as those of a mixture that comes later.
        """
        if not self.are_several:
            return {}
        # Buffers are the same in all processes, or averaged.
        strategy = DDPStrategy(find_unused_parameters=has_unused, broadcast_buffers=False)
        return {**self.options, "strategy": strategy, "use_distributed_sampler": False}

    @contextlib.contextmanager
    def environment(self) -> Iterator[None]:
        """Context in which Lightning's trainer is made: it finds these processes, and no further ones."""
        with contextlib.nullcontext() if self.are_several and _are_tasks_of_slurm() else one_process():
            yield


#: One process that trains alone.
ALONE = Processes()
#: Processes that were joined in this one; there is one group of them for the rest of the script.
_joined = ALONE


def present() -> Processes:
    """Processes that this one has joined; `ALONE` where it has joined none."""
    return _joined if distributed.is_available() and distributed.is_initialized() else ALONE


def join(accelerator: object, devices: object, num_nodes: int | None = None) -> Processes:
    """Start the processes of a training, unless something else has or they are there already, and connect them.

    Lightning starts the script of the user once more for each further device of this machine. Under SLURM, ``srun``
    has started it for all of them; so have ``torchrun`` and the like.

    Parameters
    ----------
    accelerator, devices
        As Lightning takes them; the devices of one machine.
    num_nodes
        Number of machines; None for those of the job of SLURM, or one.

    Returns
    -------
    `ALONE` where there is one device only.

    Raises
    ------
    ValueError
        If there are no such devices, or the processes cannot be started from here.
    """
    global _joined  # one for the process, like the group of torch
    if sys.flags.interactive or hasattr(sys, "ps1"):
        raise ValueError(_NEEDS_SCRIPT)
    by_slurm = _are_tasks_of_slurm()
    if num_nodes is None:
        num_nodes = int(os.environ.get("SLURM_NNODES", "1")) if by_slurm else 1
    options = {"accelerator": accelerator, "devices": devices, "num_nodes": num_nodes}
    if by_slurm:  # before Lightning looks at the job, which says less
        _require_srun()
    strategy = _strategy(options, by_slurm=by_slurm)
    if strategy.world_size == 1:
        return ALONE
    _require_to_be_startable(strategy)
    if distributed.is_initialized() and distributed.get_world_size() != strategy.world_size:
        raise ValueError(
            f"`devices` must be as many as in an earlier training of this script, {distributed.get_world_size()} "
            f"processes in all; found {strategy.world_size}. Pass the same number, or train in another script."
        )
    with quiet(), _unseeded():
        strategy.launcher.launch(strategy.setup_environment)
    options = {"num_nodes": num_nodes}
    _joined = Processes(strategy.global_rank, strategy.world_size, strategy.root_device, options)
    return _joined


def _strategy(options: dict[str, Any], *, by_slurm: bool) -> DDPStrategy:
    """Strategy of Lightning with all that it knows of the machine and the job."""
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    try:
        with quiet(), contextlib.nullcontext() if by_slurm else one_process():
            return lightning.Trainer(strategy=DDPStrategy(), **options, **silent).strategy
    except (TypeError, ValueError, MisconfigurationException, RuntimeError) as error:
        raise ValueError(
            f"`accelerator`, `devices` and `num_nodes` must be devices of this machine, as many on each; found "
            f"{', '.join(map(repr, options.values()))} ({error}). Pass `devices=1` for one process, or as many devices "
            "as there are."
        ) from error


_NEEDS_SCRIPT = (
    "`devices` must be one in a notebook or another interactive session: each further device has a process of its own, "
    "which runs the same script from its beginning. Write the code to a file, run it as `python train.py`, in a "
    "notebook as `!python train.py`, and load the model that it saves with `SCVAE.load`; or leave out `devices`."
)


def _require_srun() -> None:
    """Refuse to wait for tasks that nothing has started."""
    if "SLURM_STEP_ID" not in os.environ:
        raise ValueError(
            f"Several devices in a job of SLURM with {os.environ['SLURM_NTASKS']} tasks (SLURM_NTASKS) need a process "
            "for each, started by srun; found one that srun has not started. Call `srun python train.py` in the job, "
            "or ask for --ntasks=1: then the script starts the other processes itself."
        )


def _require_to_be_startable(strategy: DDPStrategy) -> None:
    """Refuse to wait for processes that nothing would start."""
    main = sys.modules["__main__"]
    starts = not strategy.cluster_environment.creates_processes_externally
    if starts and getattr(main, "__spec__", None) is None and not Path(sys.argv[0]).is_file():
        raise ValueError(
            "`devices` must be one where there is no script that further processes could run; found Python started "
            f"as {sys.argv[0] or 'an interactive session'!r}. Write the code to a file and run it as `python train.py`."
        )


def _are_tasks_of_slurm() -> bool:
    """Whether the processes are tasks of a job of SLURM, of which it starts more than one."""
    is_interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return os.environ.get("SLURM_NTASKS", "1") != "1" and not is_interactive


@contextlib.contextmanager
def _unseeded() -> Iterator[None]:
    """Context in which Lightning does not seed all generators anew, by ``seed_everything`` of the user."""
    seed = os.environ.pop("PL_GLOBAL_SEED", None)
    try:
        yield
    finally:
        if seed is not None:
            os.environ["PL_GLOBAL_SEED"] = seed
