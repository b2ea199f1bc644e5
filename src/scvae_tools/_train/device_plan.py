"""Training plan for cells that are held on a device: the host hands over positions, and repeats a recorded step."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scvae_tools._messages import inform, warn
from scvae_tools._train.plan import TrainingPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from scvae_tools._data.resident import DeviceCells, ResidentCells, StepLoader
    from scvae_tools._data.windows import CellWindows

#: Steps that are taken before a step is recorded, as torch asks for, so that all memory it keeps is there.
N_STEPS_BEFORE = 3
#: Whether steps are recorded where they can be.
RECORDS_STEPS = True


class DevicePlan(TrainingPlan):
    """Training plan whose "batches" are the positions of the cells of many steps, (n_steps, batch_size).

    The steps are those of `TrainingPlan`. Lightning, which takes part of a millisecond for each batch, sees one of many
    steps, so the plan optimises by itself.

    Parameters
    ----------
    cells
        Cells on the device that trains, or windows of them.
    steps
        Loader of the groups of steps, from ``cells.steps``.
    gradient_clip
        Largest norm of the gradient; None for any.
    options
        Module, stage and options of `TrainingPlan`.
    """

    def __init__(
        self,
        *options: Any,
        cells: ResidentCells | CellWindows,
        steps: StepLoader,
        gradient_clip: float | None,
        **named: Any,
    ) -> None:
        super().__init__(*options, **named)
        self.automatic_optimization = False
        self.cells, self.steps, self.gradient_clip = cells, steps, gradient_clip
        self.n_steps_of_epoch = 0
        self._share: Tensor | None = None  #: of the KL weight, on the device
        self._pull: Tensor | None = None  #: weight of the distance from the principal codes, on the device
        self._recorded: dict[DeviceCells, RecordedStep] = {}  #: a step for each place of a window

    def share_done(self) -> float:
        done = self.epoch_of_stage * self.steps.n_steps + self.n_steps_of_epoch
        return done / max(self.steps.n_steps * self.stage.max_epochs, 1)

    def on_train_epoch_start(self) -> None:
        self.n_steps_of_epoch = 0
        super().on_train_epoch_start()
        if self._share is None:
            self._share = torch.ones((), device=self.device)
            self._pull = None if self.stage.pull(0.0) is None else torch.zeros((), device=self.device)

    def teardown(self, stage: str) -> None:
        # Lightning's trainer and this plan refer to each other: without this, memory of the device would be free late.
        self._recorded.clear()
        self.cells = self.steps = None

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Context in which a step can be recorded."""
        self.cells.settle()  # copies that run beside it could become part of it
        groups = self.optimizers(use_pl_optimizer=False).param_groups
        try:
            for group in groups:
                group["capturable"] = True  # otherwise Adam refuses; its count of steps is on the device anyway
            yield
        finally:
            for group in groups:
                group["capturable"] = False  # otherwise Adam warns in steps that are not recorded

    def training_step(self, group: tuple[int, Tensor], batch_index: int) -> None:
        number, positions = group
        cells = self.cells.of_window(self.steps.windows, number)
        if cells not in self._recorded:
            step = functools.partial(self._step, cells)
            self._recorded[cells] = RecordedStep(step, self.steps.n_cells_of_step, self.device, self.recording)
        for own in positions:
            if self.stage.warms_up:
                self._share.fill_(self.warm_up_share())
                if self._pull is not None:
                    self._pull.fill_(self.stage.pull(self.share_done()))
            self._recorded[cells](own)
            self._n_cells += len(own)
            self.n_steps_of_epoch += 1

    def _step(self, cells: DeviceCells, positions: Tensor) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        bound, loss = self.objective.loss(self.module, cells[positions], self._share, self._pull)
        loss.backward()
        self.configure_gradient_clipping(optimizer, self.gradient_clip, None)
        optimizer.step()
        self._average()
        self._add_terms(bound)

    def on_train_batch_end(self, *_: object) -> None:
        pass  # a batch is of many steps, each of which has been averaged


class RecordedStep:
    """Function of the positions of cells that is recorded as a CUDA graph, and then repeated.

    On other devices than a CUDA device, and for another number of cells, the function is called. So it is where it
    cannot be recorded; a warning says why.

    Parameters
    ----------
    function
        Function of positions (batch_size,) without a result, all of whose effects are on the device.
    batch_size
        Number of cells of a step.
    device
        Device of the positions.
    recording
        Context in which the function can be recorded.
    """

    def __init__(
        self,
        function: Callable[[Tensor], None],
        batch_size: int,
        device: torch.device,
        recording: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        self.function, self.batch_size, self.recording = function, batch_size, recording
        self.can_record, self.n_before, self.graph = RECORDS_STEPS and device.type == "cuda", 0, None
        self.positions = torch.zeros(batch_size, dtype=torch.long, device=device)
        # One for the steps before and for the recording: torch keeps freed memory by stream.
        self.stream = torch.cuda.Stream(device) if self.can_record else None

    def __call__(self, positions: Tensor) -> None:
        if not self.can_record or len(positions) != self.batch_size:
            self.function(positions)
            return
        if self.graph is None and self.n_before < N_STEPS_BEFORE:
            self.n_before += 1
            self._on_own_stream(positions)
            return
        if self.graph is None and not self._record():
            self.function(positions)
            return
        self.positions.copy_(positions)
        self.graph.replay()

    def _on_own_stream(self, positions: Tensor) -> None:
        current = torch.cuda.current_stream(self.positions.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                self.function(positions)
        finally:
            current.wait_stream(self.stream)

    def _record(self) -> bool:
        """Record the function, which changes nothing; return whether that was possible."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.positions.device)
        try:
            # Other threads may use the device meanwhile.
            options = {"stream": self.stream, "capture_error_mode": "thread_local"}
            with self.recording(), torch.cuda.graph(graph, **options):
                self.function(self.positions)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # where the end of the recording fails too, torch does not come back to it
            self.can_record = False
            reason = str(error).splitlines()[0]
            warn(f"A training step cannot be recorded as a CUDA graph ({reason}); training goes on without, slower.")
            return False
        self.graph = graph
        inform("The training step is recorded as a CUDA graph, and repeated.")
        return True
