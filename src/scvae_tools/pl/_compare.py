"""Plot of compared models: a score by likelihood, mixture or any other argument, and by the sizes of the networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from scvae_tools._checks import checked
from scvae_tools._other_names import answers_other_names
from scvae_tools._results.comparison import (
    DIFFERENCE_SE,
    FINISHED,
    IS_RECOMMENDED,
    IS_TIED,
    RANK,
    RANKING,
    RESULTS,
    SEED,
    STATE,
    TIED_WITHIN,
    ranked_by,
)
from scvae_tools.pl._figures import TEXT, finish, given_axes, safe_palette, tidy

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from pandas import DataFrame, Series

#: Arguments that a heat map is drawn over, by column and by row.
SIZES = ("n_latent", "n_hidden")
UNITS = {
    "epochs": "epochs",
    "seconds": "seconds of training",
    "components_used": "components in use",
    "ari": "adjusted Rand index",
    "elbo_train": "ELBO of training cells\n(nats per cell)",
    "elbo_validation": "ELBO of validation cells\n(nats per cell)",
    "elbo_test": "ELBO of test cells\n(nats per cell)",
    "log_likelihood_test": "log-likelihood of test cells\n(nats per cell)",
    "kl_z_test": "KL of z, test cells\n(nats per cell)",
    "kl_y_test": "KL of y, test cells\n(nats per cell)",
    "importance_weighted_test": "importance-weighted bound\nof test cells (nats per cell)",
}
MARKERS = "osD^vP<X>"
MEAN_WIDTH = 0.7  # as a share of the room of one colour
MAX_LEVEL_WORDS = 6  # beside more bars, words are upright


@answers_other_names
@checked()
def compare(
    data: AnnData | DataFrame,
    *,
    key: str = "scvae_compare",
    y: str | None = None,
    x: str | None = None,
    hue: str | None = None,
    axes: Axes | Sequence[Axes] | np.ndarray | None = None,
    show: bool = False,
    save: str | Path | bool | None = None,
) -> np.ndarray:
    """Plot how the models of a comparison score.

    The first panel has a point per model and a bar at the mean of those that share position and colour: models that
    differ by their seed, or by arguments which the panel does not show; it names these. Where both the size of the
    latent space and the width of the networks vary, heat maps follow, one for each position and colour: means over all
    other arguments, on one colour scale. Combinations that failed are left out, and counted.

    Where y is the bound that the models are ranked by, rings are round the models to take, ``is_recommended``. Where
    each bar is one setting, a dotted line is at the best, the others have two standard errors of their difference from
    it, and those that reach it are called tied.

    Parameters
    ----------
    data
        AnnData with a result of :func:`scvae_tools.tl.compare`, or the table that it returned.
    key
        Key of the result, the ``key_added`` of :func:`scvae_tools.tl.compare`. Not used for a table.
    y
        Column of the table to plot: ``"elbo_test"``, ``"importance_weighted_test"``, ``"ari"``, ``"seconds"``, ...
        None for the bound that the models are ranked by: the importance-weighted one if it was computed, else the ELBO.
    x
        Argument along the axis. None for the likelihood if it varies, else for the first that varies.
    hue
        Argument to colour by. None for the mixture if it varies, else for the next that varies.
    axes
        Axes to draw on, as many as there are panels. By default of a new figure.
    show
        Whether to show the figure.
    save
        Path of a file to write; its suffix is the format. True for one in ``scanpy.settings.figdir``, with the name of
        the plot.

    Returns
    -------
    Array of Axes: the points, and the heat maps if any.

    Raises
    ------
    ValueError
        If there is no result, no finished combination, no such column, or if the number of ``axes`` is not the number
        of panels.
    """
    table = _table(data, key)
    parameters = [column for column in table if column not in (*RESULTS, *RANKING, STATE)]
    y = ranked_by(table) if y is None else y
    models = _models_with(table, y, parameters)
    varying = [name for name in parameters if table[name].nunique() > 1]
    x, hue = _choose(parameters, varying, x, hue)
    maps = _heat_maps(models, varying, [name for name in (x, hue) if name is not None])
    panels = [y, *(f"heat map {heat_map.title}".strip() for heat_map in maps)]
    axes = _new_axes(models, x, hue, len(panels)) if axes is None else given_axes(axes, panels)
    _draw_points(axes[0], models, y, x, hue)
    said = [_what_else(varying, x, hue, n_failed=len(table) - len(models))]
    if set(RANKING) <= set(table) and y == ranked_by(table):
        has_one_setting = SEED not in (x, hue) and set(varying) <= {x, hue, SEED}
        said += [_draw_ranking(axes[0], models, y, x, hue, has_one_setting=has_one_setting)]
    axes[0].set_title("\n".join(filter(None, said)), loc="left", fontsize=9, color=TEXT)
    _draw_heat_maps(axes[1:], maps, y)
    finish(axes[0].figure, "compare", show=show, save=save)
    return axes


# -- the table ---------------------------------------------------------------------------------------------------------


def _table(data: AnnData | DataFrame, key: str) -> DataFrame:
    if hasattr(data, "uns"):
        result = data.uns.get(key)
        if not isinstance(result, Mapping) or "table" not in result:
            stored = [name for name, value in data.uns.items() if isinstance(value, Mapping) and "hashes" in value]
            found = f"adata holds comparisons under {stored}" if stored else "adata holds no comparison"
            other = f", or pass key={stored[0]!r}" if stored else ""
            raise ValueError(
                f"There is no uns[{key!r}]['table'] in adata; {found}. Run svt.tl.compare(adata, grid, "
                f"key_added={key!r}) first{other}."
            )
        data = result["table"]
    if STATE not in getattr(data, "columns", ()):
        raise ValueError(
            "svt.pl.compare needs an AnnData with a result of svt.tl.compare, or the table that it returned; found a "
            f"{type(data).__name__} without the column {STATE!r}."
        )
    return data


def _models_with(table: DataFrame, y: str, parameters: list[str]) -> DataFrame:
    """Models that have a value of y."""
    results = [column for column in table if column in RESULTS]
    if y not in results:
        raise ValueError(f"y must be a result in the table; {y!r} is not among {results}. Pass one of those.")
    finished = table[table[STATE] == FINISHED]
    if len(finished) == 0:
        why = f"; the first: {table[STATE].iloc[0].rstrip('.')}" if len(table) else ""
        raise ValueError(
            f"svt.pl.compare needs a finished combination; found none of {len(table)}{why}. Run svt.tl.compare again."
        )
    models = finished[finished[y].notna()]
    if len(models) == 0:
        raise ValueError(
            f"{y!r} is missing for all {len(finished)} finished models: it is that of the clusters, which a plain VAE "
            "does not have. Pass another y=, or compare mixtures."
        )
    return models.assign(**{name: models[name].astype(object) for name in parameters})


def _choose(parameters: list[str], varying: list[str], x: str | None, hue: str | None) -> tuple[str, str | None]:
    """Arguments along the axis and by colour."""
    for role, name in {"x": x, "hue": hue}.items():
        if name is not None and name not in parameters:
            raise ValueError(f"{role} must be an argument of the grid; {name!r} is not among {parameters}.")
    # The seed only where there is nothing else; sizes that have heat maps only where they are asked for.
    has_maps = set(SIZES) <= set(varying)
    order = sorted(varying, key=lambda name: (name == SEED, has_maps and name in SIZES))
    if x is None:
        left = [name for name in order if name != hue]
        x = "likelihood" if "likelihood" in left else (left or [n for n in parameters if n != hue] or parameters)[0]
    if hue is None:
        left = [name for name in order if name not in (x, SEED) and not (has_maps and name in SIZES)]
        hue = "mixture" if "mixture" in left else left[0] if left else None
    return x, None if hue == x else hue


def _levels(column: Series) -> list:
    """Return the values of an argument: numbers ascending, names in the order of the grid."""
    levels = list(dict.fromkeys(column))
    are_numbers = all(isinstance(level, int | float | np.number) for level in levels)
    return sorted(levels) if are_numbers else levels


# -- points ------------------------------------------------------------------------------------------------------------


def _draw_points(ax: Axes, models: DataFrame, y: str, x: str, hue: str | None) -> None:
    positions, groups = _levels(models[x]), [None] if hue is None else _levels(models[hue])
    room, places = 0.8 / len(groups), _places(models, x, hue)
    for group, colour, marker in zip(groups, _colours(len(groups)), _markers(len(groups)), strict=True):
        is_chosen = np.ones(len(models), dtype=bool) if group is None else (models[hue] == group).to_numpy()
        place, value = places[is_chosen], models[y].to_numpy(dtype=float)[is_chosen]
        label = None if group is None else str(group)
        ax.scatter(place, value, s=28, color=colour, marker=marker, alpha=0.75, lw=0, label=label, zorder=3)
        centres = np.unique(place)
        means = [value[place == centre].mean() for centre in centres]
        half = MEAN_WIDTH * room / 2
        ax.hlines(means, centres - half, centres + half, color=colour, lw=2, zorder=2)
    tidy(ax)
    ax.set_xticks(range(len(positions)), [str(position) for position in positions])
    ax.set(xlabel=x, ylabel=UNITS[y], xlim=(-0.6, len(positions) - 0.4))
    if max(len(str(position)) for position in positions) > 8:
        ax.tick_params(axis="x", rotation=30)
    if hue is not None:
        ncols = _n_legend_columns(len(groups))
        ax.legend(title=hue, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9, ncols=ncols)


def _places(models: DataFrame, x: str, hue: str | None) -> np.ndarray:
    """Places of the models along the axis, (n_models,)."""
    positions, groups = _levels(models[x]), [None] if hue is None else _levels(models[hue])
    offsets = (np.arange(len(groups)) - (len(groups) - 1) / 2) * 0.8 / len(groups)
    group = [0] * len(models) if hue is None else [groups.index(value) for value in models[hue]]
    return np.array([positions.index(value) for value in models[x]]) + offsets[group]


def _draw_ranking(ax: Axes, models: DataFrame, y: str, x: str, hue: str | None, *, has_one_setting: bool) -> str:
    """Ring the models to take; where each bar is one setting, draw errors of differences and name ties.

    Returns what the marks mean, and nothing if there is one setting only, or none is known to be the best.
    """
    places, values = _places(models, x, hue), models[y].to_numpy(dtype=float)
    # As text: in a table read from a file, what is missing makes True an object.
    is_recommended, is_tied = ((models[name].astype(str) == "True").to_numpy() for name in (IS_RECOMMENDED, IS_TIED))
    if is_recommended.all() or not is_recommended.any():
        return ""
    ax.scatter(places[is_recommended], values[is_recommended], s=90, color="none", edgecolors=TEXT, lw=1, zorder=4)
    if not has_one_setting:
        return "ring: recommended"
    is_upright = len(np.unique(places)) > MAX_LEVEL_WORDS
    ax.margins(y=0.12)  # room for the words
    rank, error = models[RANK].to_numpy(dtype=float), TIED_WITHIN * models[DIFFERENCE_SE].to_numpy(dtype=float)
    for place in np.unique(places):
        at = places == place
        mean, first = values[at].mean(), int(np.flatnonzero(at)[0])
        if rank[first] == 1:
            ax.axhline(mean, color=TEXT, lw=0.8, ls=":", zorder=1)
        elif np.isfinite(error[first]):
            ax.errorbar(place, mean, error[first], color=TEXT, capsize=3, lw=1, zorder=5)
        if is_tied[first]:
            height = max(values[at].max(), mean + np.nan_to_num(error[first]))
            style = {"ha": "center", "va": "bottom", "fontsize": 8, "color": TEXT, "rotation": 90 * is_upright}
            ax.annotate("tied", (place, height), (0, 6), textcoords="offset points", **style)
    return f"ring: recommended; error: {TIED_WITHIN:g} SE of\nthe difference from the best (dotted)"


def _colours(n_groups: int) -> list[Any]:
    from matplotlib import colormaps

    return safe_palette(n_groups) or list(colormaps["viridis"](np.linspace(0, 0.95, n_groups)))


def _n_legend_columns(n_groups: int) -> int:
    """Return how many columns a legend beside the panel needs, not to be higher than it."""
    return -(-n_groups // 12)


def _markers(n_groups: int) -> list[str]:
    return [MARKERS[i % len(MARKERS)] for i in range(n_groups)]


def _what_else(varying: list[str], x: str, hue: str | None, *, n_failed: int) -> str:
    """Name what the points differ by, and how many are not there."""
    others = [name for name in varying if name not in (x, hue)]
    said = [f"points differ by {', '.join(others)}"] if others else []
    said += [f"{n_failed} without a value"] if n_failed else []
    return "; ".join(said)


# -- heat maps ---------------------------------------------------------------------------------------------------------


class _HeatMap(NamedTuple):
    title: str
    models: DataFrame
    columns: list  # sizes of the latent space
    rows: list  # widths


def _heat_maps(models: DataFrame, varying: list[str], shown: list[str]) -> list[_HeatMap]:
    """List the heat maps, where both sizes vary and the points do not show them already."""
    if not set(SIZES) <= set(varying):
        return []
    by = [name for name in shown if name in varying and name not in (*SIZES, SEED)]
    sizes = [_levels(models[name]) for name in SIZES]
    if not by:
        return [_HeatMap("", models, *sizes)]
    groups = models.groupby(by, sort=False)
    return [_HeatMap(_title(by, values), group, *sizes) for values, group in groups]


def _title(names: list[str], values: tuple) -> str:
    named = zip(names, values, strict=True)
    return ", ".join(str(value) if name == "likelihood" else f"{name} {value}" for name, value in named)


def _draw_heat_maps(axes: np.ndarray, maps: list[_HeatMap], y: str) -> None:
    if not maps:
        return
    means = [_means(heat_map, y) for heat_map in maps]
    known = np.concatenate([mean[np.isfinite(mean)] for mean in means])
    low, high = known.min(), known.max()
    n_decimals = 0 if high == low else int(np.clip(1 - np.floor(np.log10(high - low)), 0, 4))
    for ax, heat_map, mean in zip(axes, maps, means, strict=True):
        image = ax.imshow(mean, cmap="viridis", vmin=low, vmax=high, aspect="auto", origin="lower")
        ax.set_xticks(range(len(heat_map.columns)), [str(value) for value in heat_map.columns])
        ax.set_yticks(range(len(heat_map.rows)), [str(value) for value in heat_map.rows])
        ax.set(xlabel=SIZES[0], ylabel=SIZES[1])
        ax.set_title(heat_map.title.replace(", ", "\n"), loc="left", fontsize=11)  # in one line wider than the panel
        for row, column in np.argwhere(np.isfinite(mean)):
            is_dark = mean[row, column] < low + 0.6 * (high - low)
            text = f"{mean[row, column]:,.{n_decimals}f}".replace("-", "\N{MINUS SIGN}")
            ax.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if is_dark else "black")
    axes[0].figure.colorbar(image, ax=list(axes), label=UNITS[y])


def _means(heat_map: _HeatMap, y: str) -> np.ndarray:
    """Return the means of y, (n_widths, n_latent_sizes); NaN where there is no model."""
    mean = np.full((len(heat_map.rows), len(heat_map.columns)), np.nan)
    for (latent, hidden), group in heat_map.models.groupby(list(SIZES)):
        values = group[y].to_numpy(dtype=float)
        mean[heat_map.rows.index(hidden), heat_map.columns.index(latent)] = values.mean()
    return mean


def _new_axes(models: DataFrame, x: str, hue: str | None, n_panels: int) -> np.ndarray:
    """Return the Axes of a new figure: the points above, the heat maps below them in rows of up to four."""
    from matplotlib import pyplot as plt

    n_groups = 0 if hue is None else len(_levels(models[hue]))
    n_bars = len(_levels(models[x])) * max(n_groups, 1)
    n_maps = n_panels - 1
    n_columns = min(max(n_maps, 1), 4)
    n_rows = -(-n_maps // n_columns)
    width = max(3.2 + 0.25 * n_bars + 1.2 * _n_legend_columns(n_groups), (3.4 * n_columns + 1) * (n_maps > 0))
    figure = plt.figure(figsize=(width, 3.8 + 3 * n_rows), layout="constrained")
    grid = figure.add_gridspec(1 + n_rows, n_columns)
    below = [figure.add_subplot(grid[1 + i // n_columns, i % n_columns]) for i in range(n_maps)]
    return np.array([figure.add_subplot(grid[0, :]), *below], dtype=object)
