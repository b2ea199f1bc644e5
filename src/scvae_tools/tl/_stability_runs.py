"""Runs by which the stability of clusters is measured: their seeds and cells, drawn and checked before any training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scvae_tools._messages import said_before
from scvae_tools._results.cluster_stability import HALF, SEED

if TYPE_CHECKING:
    from scvae_tools.tl._trainable_cells import TrainableCells
    from scvae_tools.tl._training_of_result import TrainingOfResult


@dataclass(frozen=True)
class Run:
    """A training by which clusters are compared with those of a result."""

    kind: str
    name: str
    random_state: int
    positions: np.ndarray | None = None  # of its cells, ascending; None for all
    pair: int = -1  # of the halves


def planned_runs(n_cells: int, n_seeds: int, n_halves: int, seed: int, seed_of_result: int) -> list[Run]:
    """Draw the runs on all cells, and those on halves, two by two without a cell in common.

    Parameters
    ----------
    n_cells, n_seeds, n_halves
        Numbers of cells and of runs.
    seed
        Seed of all draws. More runs begin with the same ones.
    seed_of_result
        Seed that the result was trained with, which no run has.
    """
    taken = {seed_of_result}

    def new_seed(rng: np.random.Generator) -> int:
        found = int(rng.integers(2**31))
        while found in taken:
            found = int(rng.integers(2**31))
        taken.add(found)
        return found

    # Streams of their own, so that the number of the ones leaves the others as they are.
    of_seeds, of_halves = (np.random.default_rng([seed, kind]) for kind in (0, 1))
    runs = [Run(SEED, f"seed {i + 1}", new_seed(of_seeds)) for i in range(n_seeds)]
    for pair in range(-(-n_halves // 2)):
        order = of_halves.permutation(n_cells)
        for positions in (order[: n_cells // 2], order[n_cells // 2 :]):
            number = len(runs) - n_seeds + 1
            if number <= n_halves:
                runs.append(Run(HALF, f"half {number}", new_seed(of_halves), np.sort(positions), pair))
    return runs


def check_halves(cells: TrainableCells, training: TrainingOfResult, runs: list[Run], n_clusters: int) -> None:
    """Refuse halves that the model cannot be trained on.

    Parameters
    ----------
    cells, training, runs
        The cells, how the model is trained, and the runs.
    n_clusters
        Number of clusters of the result, which the halves are to have where the number of components is not given.

    Raises
    ------
    ValueError
        If a half has fewer training cells than there are to be components, or `SCVAE` does not take its cells.
    """
    wanted = training.of_model.get("n_components")
    needed = wanted if isinstance(wanted, int) else max(n_clusters, *(wanted or (1,)))
    remedy = "Pass n_halves=0 to leave the halves out, or more cells."
    for run in runs:
        if run.positions is None:
            continue
        held_out = training.held_out(len(cells.obs), run.positions)
        n_cells = len(run.positions)
        n_train = round(training.of_training["train_size"] * n_cells) if held_out is None else n_cells - len(held_out)
        if n_train < needed:
            raise ValueError(
                f"A half of the cells must have at least as many training cells as there are to be components; found "
                f"{n_train} training cells among the {n_cells} of a half, for {needed} components. {remedy}"
            )
        try:
            with said_before():
                cells.build(run.positions, training.obs_keys, training.of_model)
        except ValueError as error:
            raise ValueError(
                f"Each half of the cells must be cells that the model can be trained on; {run.name} is not: {error} Or "
                "pass another `random_state` for other halves, or n_halves=0 to leave them out."
            ) from error
