"""Ranking of compared models: paired differences from the best one, their standard errors, ties, and which to take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvae_tools._results.comparison import DIFFERENCE, DIFFERENCE_SE, IS_RECOMMENDED, IS_TIED, RANK, SEED, TIED_WITHIN
from scvae_tools.likelihoods import get_likelihood
from scvae_tools.tl._comparison_grid import as_json, describe

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Scored:
    """A finished model: its row and its arguments, and the bound of the test cells in nats per cell."""

    row: int
    combination: dict[str, Any]
    mean: float
    by_cell: np.ndarray | None  # (n_test_cells,); None where an earlier version kept the mean alone


@dataclass
class Setting:
    """Models that differ by their seed alone, and how they compare with the best setting of their kind."""

    models: dict[int, Scored]  # by seed
    rank: int = 0
    difference: float = 0.0
    difference_se: float = 0.0
    is_tied: bool | None = False  # None where it is not known
    is_recommended: bool = False

    @property
    def combination(self) -> dict[str, Any]:
        """Arguments that the models share; the seed is one of several."""
        return next(iter(self.models.values())).combination

    @property
    def mean(self) -> float:
        """Mean of the bound over cells and seeds, in nats per cell."""
        return float(np.mean([model.mean for model in self.models.values()]))

    @property
    def kind(self) -> str:
        """What the bound is of; bounds of different kinds are not ranked with each other."""
        return get_likelihood(self.combination["likelihood"]).measures

    @property
    def complexity(self) -> tuple[int, int]:
        """How many parameters the likelihood has for a gene; see `Likelihood.complexity`."""
        arguments = self.combination
        likelihood = get_likelihood(arguments["likelihood"], arguments["k_max"])
        return likelihood.complexity(arguments["dispersion"])


def rank_settings(scored: Sequence[Scored]) -> list[Setting]:
    """Settings with their places, in the order of their first models.

    Parameters
    ----------
    scored
        Finished models, of one comparison: the cells are the same for all, in the same order.
    """
    by_name: dict[str, Setting] = {}
    for model in scored:
        name = as_json({key: value for key, value in model.combination.items() if key != SEED})
        by_name.setdefault(name, Setting({})).models[model.combination[SEED]] = model
    settings = list(by_name.values())
    for kind in dict.fromkeys(setting.kind for setting in settings):
        _rank_one_kind([setting for setting in settings if setting.kind == kind])
    return settings


def _rank_one_kind(settings: list[Setting]) -> None:
    means = [setting.mean for setting in settings]
    best = settings[int(np.argmax(means))]
    for setting, mean in zip(settings, means, strict=True):
        setting.rank = 1 + sum(other > mean for other in means)
        if setting is not best:
            setting.difference, setting.difference_se = _difference(setting, best)
            is_known = not np.isnan(setting.difference_se)
            setting.is_tied = -setting.difference <= TIED_WITHIN * setting.difference_se if is_known else None
    others = [setting.is_tied for setting in settings if setting is not best]
    best.is_tied = True if True in others else None if None in others else False
    candidates = [setting for setting in settings if setting.is_tied] or [best]
    min(candidates, key=lambda setting: (*setting.complexity, setting.rank)).is_recommended = True


def _difference(setting: Setting, best: Setting) -> tuple[float, float]:
    """Mean of the bound less that of the best setting, over the seeds that both have, and its standard error."""
    seeds = [seed for seed in setting.models if seed in best.models]
    if not seeds:
        return setting.mean - best.mean, np.nan
    pairs = [(setting.models[seed], best.models[seed]) for seed in seeds]
    if any(model.by_cell is None for pair in pairs for model in pair):
        return float(np.mean([model.mean - other.mean for model, other in pairs])), np.nan
    return mean_and_error(np.array([model.by_cell - other.by_cell for model, other in pairs]))


def mean_and_error(differences: np.ndarray) -> tuple[float, float]:
    """Mean of paired differences, and its standard error over cells and seeds.

    The differences are taken as d_rc = μ + a_c + b_r + e_rc, with cells and seeds both drawn at random: all seeds share
    the cells, so cells and seeds each have a part of their own. The variance of the mean is then
    Var(a)/n + Var(b)/R + Var(e)/(nR), which is estimated by the mean squares of the two-way layout. One seed says
    nothing of Var(b): the error is then that of the cells alone.

    Parameters
    ----------
    differences
        In nats, (n_seeds, n_cells).

    Returns
    -------
    Mean and standard error, in nats per cell; the error is NaN for a single cell.
    """
    n_seeds, n_cells = differences.shape
    by_cell, by_seed, mean = differences.mean(0), differences.mean(1), differences.mean()
    if n_cells == 1:
        return float(mean), np.nan
    variance = by_cell.var(ddof=1) / n_cells  # of Var(a)/n + Var(e)/(nR)
    if n_seeds > 1:
        rest = differences - by_cell - by_seed[:, None] + mean
        of_rest = np.square(rest).sum() / ((n_seeds - 1) * (n_cells - 1)) / differences.size
        variance += max(0.0, by_seed.var(ddof=1) / n_seeds - of_rest)  # of Var(b)/R
    return float(mean), float(np.sqrt(variance))


def ranking_columns(settings: Sequence[Setting], n_rows: int) -> dict[str, pd.api.extensions.ExtensionArray]:
    """Columns `RANKING` of a table, by name; missing in rows that are in no setting, which failed."""
    found: list[Setting | None] = [None] * n_rows
    for setting in settings:
        for model in setting.models.values():
            found[model.row] = setting
    types = {
        RANK: "Int64",
        DIFFERENCE: "float64",
        DIFFERENCE_SE: "float64",
        IS_TIED: "boolean",
        IS_RECOMMENDED: "boolean",
    }
    columns = {}
    for name, dtype in types.items():
        missing = np.nan if dtype == "float64" else None
        column = [missing if each is None else getattr(each, name) for each in found]
        columns[name] = pd.array(column, dtype=dtype)
    return columns


def verdict(settings: Sequence[Setting], values: dict[str, list], bound: str) -> str:
    """Say which setting is the best, which are tied with it, and which to take; a sentence for each kind.

    Parameters
    ----------
    settings, bound
        Ranked settings, and the column that they were ranked by.
    values
        Values by argument of the grid, by which the settings are named.
    """
    names = {name: given for name, given in values.items() if name != SEED}
    said = []
    for kind in dict.fromkeys(setting.kind for setting in settings):
        ranked = sorted((s for s in settings if s.kind == kind), key=lambda setting: setting.rank)
        best, tied = ranked[0], [setting for setting in ranked[1:] if setting.is_tied]
        said.append(f"The best by {bound}: {describe(best.combination, names)}.")
        if tied:
            listed = "; ".join(f"{describe(each.combination, names)} ({_in_nats(each)})" for each in tied)
            chosen = next(setting for setting in ranked if setting.is_recommended)
            said.append(
                f"Tied with it, within {TIED_WITHIN:g} standard errors: {listed}. Recommended, as the simplest "
                f"likelihood among these: {describe(chosen.combination, names)}."
            )
    if all(len(setting.models) == 1 for setting in settings):
        said.append("Seeds are not in the errors: give `random_state` several values in the grid.")
    return " ".join(said)


def _in_nats(setting: Setting) -> str:
    return f"{setting.difference:+.2f} ± {setting.difference_se:.2f} nats per cell".replace("-", "\N{MINUS SIGN}")
