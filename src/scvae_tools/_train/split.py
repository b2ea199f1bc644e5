"""Split of the cells into those that are trained on and those that are held out for the validation."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from scvae_tools._checks import cell_positions

if TYPE_CHECKING:
    from collections.abc import Sequence


class Split(NamedTuple):
    """Positions of the training and validation cells, ascending."""

    train: np.ndarray
    validation: np.ndarray

    def held_out(self, component: np.ndarray | None) -> dict[int, int]:
        """Components of labels whose cells are all held out, each with the position of its first cell.

        ``component`` is the component of the label of each cell, (n_cells,), −1 where the label is not known; None
        where no component starts from labels.
        """
        if component is None:
            return {}
        lost = np.setdiff1d(component[self.validation], component[self.train])
        first = {each: self.validation[component[self.validation] == each][0] for each in lost.tolist()}
        return {each: int(cell) for each, cell in first.items() if each >= 0}


def evenly(cells: np.ndarray, most: int) -> np.ndarray:
    """Cells, or so many of them at equal distances where there are more."""
    return cells if len(cells) <= most else cells[np.linspace(0, len(cells) - 1, most).round().astype(int)]


def split_cells(
    n_cells: int, train_size: float, validation_indices: Sequence[int] | None, component: np.ndarray | None
) -> Split:
    """Divide cells into training and validation cells, at random or as given.

    Parameters
    ----------
    n_cells
        Number of cells.
    train_size
        Share to train on.
    validation_indices
        Positions of the cells to hold out, or one boolean per cell, in place of a random draw.
    component
        As in `Split.held_out`. A random draw leaves a cell of each component to train on.

    Raises
    ------
    ValueError
        If ``validation_indices`` are no positions of cells, or leave no cell to train on.
    """
    if validation_indices is not None:
        validation = np.unique(cell_positions(validation_indices, n_cells, "validation_indices", may_be_none=True))
        train = np.setdiff1d(np.arange(n_cells), validation)
        if len(train) == 0:
            raise ValueError(f"`validation_indices` must leave cells to train on; found all {n_cells} held out.")
        return Split(train, validation)
    order = torch.randperm(n_cells).numpy()
    n_train = max(1, round(train_size * n_cells))
    split = Split(order[:n_train], order[n_train:])
    # The component of a label starts from the training cells with this label: the draw must not hold out all of them.
    kept = np.array([*split.held_out(component).values()], dtype=int)
    return Split(np.sort(np.r_[split.train, kept]), np.setdiff1d(split.validation, kept))
