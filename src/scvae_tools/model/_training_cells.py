"""Cells of a training: their split, what of them is held in memory or on a device, and their loaders."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from scvi import REGISTRY_KEYS

from scvae_tools._data.host_windows import HELD_OUT_BYTES, WindowTrainingLoader, n_cells_in
from scvae_tools._data.loader import (
    EVALUATION_BATCH_SIZE,
    LARGEST_EPOCH,
    CountDataset,
    HeldCells,
    kept_counts,
    loader_of,
    n_of_epoch,
    registered_columns,
)
from scvae_tools._data.stored import StoredCounts
from scvae_tools._data.windows import CellWindows, held_on_device
from scvae_tools._interrupts import interrupts_held
from scvae_tools._messages import inform, listed, said_before, warn
from scvae_tools._module.mixture_vaes import MixtureVAE
from scvae_tools._random import seeded
from scvae_tools._threads import considerate_threads
from scvae_tools._train.principal_codes import PRINCIPAL_CODES, principal_codes
from scvae_tools._train.processes import ALONE, Processes
from scvae_tools._train.split import evenly, split_cells
from scvae_tools._upstream import quiet
from scvae_tools.model._inference import InferenceMixin
from scvae_tools.model._trainer_options import no_memory, warn_of_tasks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from scvae_tools._train.stages import Stage


#: Training cells from whose latent means a mixture starts: 200 of a type of 0.1 % are among them.
LARGEST_START = 200_000
#: Cells of a label among them at least, if it has so many.
FEWEST_OF_LABEL = 1_000
#: Held-out cells that a training looks at after each epoch: their share in the default split, of the largest epoch.
LARGEST_WATCHED = LARGEST_EPOCH // 9


class TrainingCellsMixin(InferenceMixin):
    """Cells of a training of `SCVAE`."""

    _processes: Processes = ALONE  #: that train this model together, in a training

    def _require_data_to_train(self) -> None:
        if self.minified_data_type is not None:
            raise ValueError("A model of minified data cannot be trained: the counts are gone. Train before minifying.")
        if self.adata is None:
            raise ValueError("Training needs data; this model was loaded without. Pass them to `SCVAE.load`.")
        self._validate_anndata()

    def _with_codes(
        self,
        dataset: CountDataset,
        stages: list[Stage],
        pca_start: bool,  # noqa: FBT001
        random_state: int,
    ) -> CountDataset:
        """Give the data set the principal codes of the training cells, if a stage is to be drawn to them."""
        if pca_start and any(stage.warms_up for stage in stages):
            options = {"use_size_factor": self.module.use_size_factor, "random_state": random_state}
            with considerate_threads():
                found = principal_codes(dataset, self.train_indices, self.module.n_latent, **options)
            dataset.columns[PRINCIPAL_CODES] = found.codes
        return dataset

    @contextlib.contextmanager
    def _context_of_training(
        self, random_state: int, split: tuple[float, Sequence[int] | None], processes: Processes = ALONE
    ) -> Iterator[CountDataset]:
        """Context in which what is global is that of a training, and the cells are split."""
        if not processes.are_several:
            warn_of_tasks()
        says = contextlib.nullcontext() if processes.is_first else said_before()
        with interrupts_held(), seeded(random_state), quiet(), says, self._former_split_on_error():
            dataset = CountDataset(self.adata_manager, self.module.likelihood)
            self._split(*split)
            self._require_cells_for(processes)
            self._standardize_covariates()
            self._processes = processes
            processes.begin(random_state)
            try:
                yield dataset
            finally:
                self._processes = ALONE
                self.module.eval()

    def _require_cells_for(self, processes: Processes) -> None:
        # Batch norm cannot train on one cell.
        n_each = 2 if self.module.normalization == "batch" and processes.are_several else 1
        if len(self.train_indices) < n_each * processes.number:
            raise ValueError(
                f"`devices` must be at most as many as leave each {n_each} of the training cells; found "
                f"{processes.number} processes for {len(self.train_indices)} cells. Pass fewer."
            )

    @contextlib.contextmanager
    def _holding_cells(
        self,
        dataset: CountDataset,
        device: torch.device,
        hold: bool | None,  # noqa: FBT001
    ) -> Iterator[None]:
        """Context in which the cells are held on the device that trains, if they are; say which, unless the CPU."""
        self._held = held_on_device(dataset, device, hold=hold)
        if device.type != "cpu":
            in_windows = " in windows" if isinstance(self._held, CellWindows) else ""
            where = "stay in the memory of the host" if self._held is None else f"are held there{in_windows}"
            inform("Training on the device %s; the counts %s.", device, where)
        try:
            yield
        except torch.cuda.OutOfMemoryError as error:
            raise torch.cuda.OutOfMemoryError(no_memory(device, self._held)) from error
        finally:
            self._held = None

    @contextlib.contextmanager
    def _former_split_on_error(self) -> Iterator[None]:
        """Put the split back where an exception ends the training before a stage has ended."""
        former, n_epochs = (self.train_indices, self.validation_indices, self.test_indices), self._state.n_epochs
        units = {name: value.clone() for name, value in self.module.named_buffers() if name.startswith("continuous_")}
        try:
            yield
        except BaseException:
            if self._state.n_epochs == n_epochs:
                self.train_indices, self.validation_indices, self.test_indices = former
                self.module.load_state_dict(units, strict=False)  # those of the split
            raise

    def _split(self, train_size: float, validation_indices: Sequence[int] | None) -> None:
        """Divide the cells, and check that there are training cells for all components and labels."""
        component = self._components_of_labels() if self._starts_from_labels else None
        split = split_cells(self.adata.n_obs, train_size, validation_indices, component)
        if not self.is_mixture and (self.n_components or 1) > len(split.train):
            raise ValueError(
                f"`n_components` must be at most the number of training cells; found {self.n_components} components "
                f"for {len(split.train)} cells. Pass fewer, or a larger `train_size`."
            )
        self._refuse_held_out([self.labels[each] for each in split.held_out(component)])
        self.train_indices, self.validation_indices = split
        self.test_indices = np.array([], dtype=int)

    @property
    def _starts_from_labels(self) -> bool:
        """Whether components, or their weights, are still to be started from the labels of training cells."""
        return (self.is_supervised or self._takes_weights_of_labels) and not self.is_mixture

    @property
    def _takes_weights_of_labels(self) -> bool:
        return isinstance(self.module, MixtureVAE) and self.module.weights == "labels"

    def _components_of_labels(self) -> np.ndarray:
        codes = registered_columns(self.adata_manager)[REGISTRY_KEYS.LABELS_KEY].ravel().astype(int)
        return np.asarray(self.module.component_of_label)[codes]

    def _refuse_held_out(self, labels: list[str]) -> None:
        if not labels:
            return
        unlabeled = self._setup.get("unlabeled_category")
        hidden = "`unlabeled_category`" if unlabeled is None else repr(unlabeled)
        raise ValueError(
            "`validation_indices` must leave a cell of each label to train on, from which the component of the label "
            f"starts; found all cells labelled {listed(labels)} held out. Leave some of them out of "
            f"`validation_indices`, or give those cells {hidden} as their label."
        )

    def _standardize_covariates(self) -> None:
        """Standardise continuous covariates by the training cells of the first training, for good."""
        if self.module.sizes.n_continuous == 0 or self.module.continuous_is_set:
            return
        columns = registered_columns(self.adata_manager)[REGISTRY_KEYS.CONT_COVS_KEY]
        values = columns.astype(np.float64)[self.train_indices]  # (n_train, n_continuous)
        mean, sd = values.mean(0), values.std(0)
        # Up to rounding: float32, in which the networks see them, holds seven digits.
        is_constant = sd <= 1e-7 * np.abs(mean)
        if is_constant.any():
            names = np.array(self._setup["continuous_covariate_keys"])[is_constant]
            warn(
                f"`continuous_covariate_keys`: {listed(names)} has the same value in all training cells, from which "
                "nothing can be learnt, and is not used. Leave it out."
            )
        sd[is_constant] = np.inf
        self.module.standardize_continuous(torch.as_tensor(mean), torch.as_tensor(sd))

    def _loaders(self, batch_size: int, dataset: CountDataset, *, pin_memory: bool) -> tuple:
        """Loaders of training and validation cells, the latter None where there are none."""
        # Batch norm cannot train on one cell; the order changes each epoch, so that no cell is left out for good.
        drop_single, held = self.module.normalization == "batch", self._held
        processes, share = self._processes, self._processes.share
        # Larger batches than in training: where no gradient is needed nothing but memory speaks against them.
        size, watched = max(batch_size, EVALUATION_BATCH_SIZE), processes.part_of(self._watched())
        if held is not None:
            train = held.steps(self.train_indices, batch_size, drop_single=drop_single)
            return train, held.batches(watched, size) if len(watched) > 0 else None
        if isinstance(dataset.counts, StoredCounts):
            options = {"drop_single": drop_single, "share": share}
            train = WindowTrainingLoader(dataset, self.train_indices, batch_size, **options)
            return train, loader_of(HeldCells(dataset, watched), np.arange(len(watched)), size) if len(
                watched
            ) > 0 else None
        options = {"pin_memory": pin_memory, "dataset": dataset}
        drops = drop_single and n_of_epoch(len(self.train_indices)) // share.number % batch_size == 1
        of_steps = {"shuffle": True, "drop_last": drops, "batch_size": batch_size, "share": share}
        train = self._make_data_loader(self.adata, self.train_indices, **of_steps, **options)
        if len(watched) == 0:
            return train, None
        return train, self._make_data_loader(self.adata, watched, batch_size=size, **options)

    def _watched(self) -> np.ndarray:
        """Held-out cells that tell when to stop and which weights to keep: all, or as many as are looked at in no time.

        Where there are more, they are drawn evenly: so a training of any size looks at its held-out cells as often, and
        those of counts in a file stay in memory.
        """
        return evenly(self.validation_indices, self._n_watched())

    def _n_watched(self) -> int:
        stored = kept_counts(self.adata_manager)
        return LARGEST_WATCHED if stored is None else min(LARGEST_WATCHED, n_cells_in(stored, HELD_OUT_BYTES))

    def evaluated_cells(self) -> dict[str, np.ndarray]:
        """Positions of the cells by which a training is judged, of ``"train"`` and, if any are, ``"validation"``.

        All; or, where there are more than 44,444 of a kind, so many of them, at equal distances. Of counts in a file
        as many as take 64 MiB.
        """
        cells = {"train": evenly(self.train_indices, self._n_watched()), "validation": self._watched()}
        return {name: each for name, each in cells.items() if len(each) > 0}

    def _cells_to_start_from(self) -> np.ndarray:
        """Training cells from which the mixture starts: all, or `LARGEST_START` and some of each label."""
        chosen = evenly(self.train_indices, LARGEST_START)
        if len(chosen) == len(self.train_indices) or not self._starts_from_labels:
            return chosen
        label = self._components_of_labels()
        of_label = [self.train_indices[label[self.train_indices] == each] for each in range(len(self.labels))]
        return np.unique(np.concatenate([chosen, *(evenly(each, FEWEST_OF_LABEL) for each in of_label)]))
