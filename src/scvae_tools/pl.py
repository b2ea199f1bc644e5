"""Plots of what `scvae_tools.tl` stored in an AnnData, or of a model's history; they compute no results.

Every function returns an array of Axes, shows nothing unless asked (``show=True``) and draws on given Axes
(``axes=``), so that a figure can be composed and changed afterwards. matplotlib and scanpy load on first use.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from scvae_tools._keys import Keys

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame, Series

__all__ = ["clusters", "training"]

#: Eight colours that all common kinds of colour blindness tell apart (Okabe and Ito 2008).
OKABE_ITO = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#000000")
_SPLITS = {"train": "#0072b2", "validation": "#d55e00"}
_PANELS = {"elbo": "ELBO", "log_likelihood": "Log-likelihood", "kl_z": "KL of z", "kl_y": "KL of y"}
_POINTS_PER_INCH = 72
_STAGE_FONT = 8  # points
_FEW_EPOCHS = 20  # up to here each epoch has a marker, since a line of one point is invisible
_LARGEST_POINT = 100  # points squared; scanpy's 120,000 / n_cells covers the picture where there are few cells
_LARGEST_LEGEND = 20  # components; beyond, colours are too alike and the numbers are written on the cells


def training(
    data: AnnData | Any,
    *,
    key: str = "scvae",
    axes: Axes | Sequence[Axes] | np.ndarray | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> np.ndarray:
    """Plot ELBO, log-likelihood and KL terms by epoch, for training and validation cells.

    Vertical lines mark where one stage of the training ends and the next begins. The limits of the y-axes leave out
    the steep first epochs, but contain the last epoch and the best validation ELBO. The ELBO is not weighted by the
    warm-up, so that all epochs are comparable.

    Parameters
    ----------
    data
        AnnData with a result of :func:`scvae_tools.tl.scvae`, or a trained model.
    key
        Key of the result, the ``key_added`` of :func:`scvae_tools.tl.scvae`. Not used for a model.
    axes
        Axes to draw on, as many as there are panels: 4 for a mixture, 3 for a plain VAE. By default of a new figure.
    show
        Whether to show the figure.
    save
        Path of a file to write; its suffix is the format.

    Returns
    -------
    Array of Axes: ELBO, log-likelihood, KL of z and, for a mixture, KL of y; in nats per cell.

    Raises
    ------
    ValueError
        If there is no history, or if the number of ``axes`` is not the number of panels.
    """
    history = _history(data, key)
    panels = _panels(history)
    axes = _new_grid(len(panels)) if axes is None else _given_axes(axes, panels)
    for ax, name in zip(axes, panels, strict=True):
        _draw_curves(ax, history, name)
    _mark_best(axes[0], history)
    axes[0].legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)
    _finish(axes[0].figure, show=show, save=save)
    return axes


def clusters(
    adata: AnnData,
    *,
    key: str = "scvae",
    labels: str | Sequence[str] | None = None,
    basis: str | None = None,
    axes: Axes | Sequence[Axes] | np.ndarray | None = None,
    show: bool = False,
    save: str | Path | None = None,
    **kwargs: Any,
) -> np.ndarray:
    """Scatter the cells by component of the mixture, and by labels beside it.

    Drawn by :func:`scanpy.pl.embedding`, which takes colours from ``adata.uns[f"{column}_colors"]`` and, where there
    are none, writes there those that it used: colours safe for colour-blind readers for up to 8 categories, scanpy's
    own for more. More than 20 components are numbered on the cells instead of in a legend. Points are drawn as
    pixels in vector formats too, so that figures of a million cells stay small.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scvae_tools.tl.scvae`.
    key
        Key of the result, the ``key_added`` of :func:`scvae_tools.tl.scvae`.
    labels
        One or more columns of ``adata.obs``, a panel each. Without a mixture only these are drawn.
    basis
        Key of ``adata.obsm`` with at least two columns, with or without its ``X_``. By default ``"X_umap"`` or, if
        there is none, the first two latent dimensions, ``f"X_{key}"``.
    axes
        Axes to draw on, as many as there are panels. By default of a new figure.
    show
        Whether to show the figure.
    save
        Path of a file to write; its suffix is the format.
    **kwargs
        To :func:`scanpy.pl.embedding`, for every panel: for example ``size``, ``palette``, ``groups``, ``frameon``,
        ``legend_loc``, ``dimensions=(2, 3)``; ``title`` may be a list with one title per panel.

    Returns
    -------
    Array of Axes: the components, if there is a mixture, then the labels in the order given.

    Raises
    ------
    ValueError
        If the result, a label or the basis is not in ``adata``, if the basis has one column only, or if the number
        of ``axes`` is not the number of panels.
    """
    columns = _columns(adata, key, labels)
    basis = _find_basis(adata, key, basis)
    options = [
        _embedding_options(adata, column, kwargs, is_component=column == Keys(key).component) for column in columns
    ]
    legends = [_legend_width(adata.obs[column], option) for column, option in zip(columns, options, strict=True)]
    titles = _titles(columns, kwargs.get("title"))
    axes = _new_row(legends) if axes is None else _given_axes(axes, columns)
    for ax, column, title, option in zip(axes, columns, titles, options, strict=True):
        _draw_cells(ax, adata, basis, column, **option | {"title": title})
        if basis == Keys(key).latent:
            _name_latent_axes(ax, key)
    _finish(axes[0].figure, show=show, save=save)
    return axes


# ---------------------------------------------------------------------------------------------------------------
# Finding what to draw
# ---------------------------------------------------------------------------------------------------------------


def _missing(adata: AnnData, key: str, looked_for: str) -> ValueError:
    """Return the error for a result that is not there; it names those that are."""
    stored = _stored_results(adata)
    found = f"adata holds results under {stored}" if stored else "adata holds no results of svt.tl.scvae"
    other = f", or pass key={stored[0]!r}" if stored else ""
    return ValueError(
        f"There is no {looked_for} in adata; {found}. Run svt.tl.scvae(adata, key_added={key!r}) first{other}."
    )


def _stored_results(adata: AnnData) -> list[str]:
    """List the keys of results, by the history in ``uns`` or, where ``uns`` was lost, the probabilities in ``obsm``."""
    in_uns = [key for key, value in adata.uns.items() if isinstance(value, Mapping) and "history" in value]
    in_obsm = [key for key in adata.obs if {Keys(key).latent, Keys(key).probabilities} <= set(adata.obsm)]
    return sorted({*in_uns, *in_obsm})


def _history(data: AnnData | Any, key: str) -> DataFrame:
    """Return the history of an AnnData or of a model, and check that it is one of ours."""
    if hasattr(data, "uns"):
        result = data.uns.get(Keys(key).uns)
        if not isinstance(result, Mapping) or "history" not in result:
            raise _missing(data, key, f"uns[{Keys(key).uns!r}]['history']")
        history, remedy = result["history"], f"Run svt.tl.scvae(adata, key_added={key!r}) again."
    else:
        history, remedy = getattr(data, "history", None), "Call model.train() first."
    return _check_history(history, type(data).__name__, remedy)


def _check_history(history: DataFrame | None, owner: str, remedy: str) -> DataFrame:
    if not hasattr(history, "columns"):
        raise ValueError(
            "svt.pl.training needs an AnnData, or a model whose `history` is a table with a row per epoch; "
            f"the history of this {owner} is {type(history).__name__}. {remedy}"
        )
    needed = ["epoch", "stage", *(f"{name}_train" for name in _PANELS if name != "kl_y")]
    missing = [column for column in needed if column not in history.columns]
    if missing or len(history) == 0:
        finding = f"lacks the columns {missing}" if missing else "has no epochs"
        raise ValueError(f"svt.pl.training needs one row per epoch; the history of this {owner} {finding}. {remedy}")
    return history


def _panels(history: DataFrame) -> list[str]:
    """List the panels to draw: KL of y only where there has been a mixture."""
    has_mixture = any(np.nan_to_num(values).any() for values in _splits(history, "kl_y").values())
    return [name for name in _PANELS if name != "kl_y" or has_mixture]


def _splits(history: DataFrame, name: str) -> dict[str, np.ndarray]:
    """Return the values by epoch of one term, (n_epochs,), for each split that has any."""
    columns = {split: history.get(f"{name}_{split}") for split in _SPLITS}
    values = {split: np.asarray(column, dtype=float) for split, column in columns.items() if column is not None}
    return {split: column for split, column in values.items() if np.isfinite(column).any()}


def _columns(adata: AnnData, key: str, labels: str | Sequence[str] | None) -> list[str]:
    """List the columns of ``obs`` to colour by: the components first."""
    labels = [labels] if isinstance(labels, str) else list(labels or [])
    absent = [label for label in labels if label not in adata.obs]
    if absent:
        raise ValueError(
            f"labels must be columns of adata.obs; {absent} are not among {list(adata.obs)}. Pass one of those."
        )
    component, latent = Keys(key).component, Keys(key).latent
    if component in adata.obs:
        return [component, *labels]
    if latent not in adata.obsm:
        raise _missing(adata, key, f"obs[{component!r}] nor obsm[{latent!r}]")
    if not labels:
        raise ValueError(
            f"Components need a mixture; obsm[{latent!r}] is there, but obs[{component!r}] is not. "
            f"Run svt.tl.scvae(adata, mixture=True, key_added={key!r}), or pass labels= to draw only these."
        )
    return labels


def _find_basis(adata: AnnData, key: str, basis: str | None) -> str:
    """Return the key of ``obsm`` that holds the coordinates."""
    latent = Keys(key).latent
    if basis is None:
        basis = "X_umap" if "X_umap" in adata.obsm else latent
        if basis not in adata.obsm:
            raise _missing(adata, key, f"obsm['X_umap'] nor obsm[{basis!r}]")
    found = next((name for name in (basis, f"X_{basis}") if name in adata.obsm), None)
    if found is None:
        raise ValueError(
            f"basis must be a key of adata.obsm; {basis!r} is not among {list(adata.obsm)}. Pass one of those, "
            f"or make a UMAP: sc.pp.neighbors(adata, use_rep={latent!r}); sc.tl.umap(adata)."
        )
    if adata.obsm[found].shape[1] < 2:
        raise ValueError(
            f"basis must have at least two columns; obsm[{found!r}] has {adata.obsm[found].shape[1]}. Make a UMAP: "
            f"sc.pp.neighbors(adata, use_rep={latent!r}); sc.tl.umap(adata), or pass another basis=."
        )
    return found


# ---------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------


def _given_axes(axes: Axes | Sequence[Axes] | np.ndarray, panels: list[str]) -> np.ndarray:
    """Return the user's Axes as a flat array, one per panel."""
    axes = np.asarray(axes, dtype=object).ravel()
    if len(axes) != len(panels):
        raise ValueError(
            f"axes must hold one Axes per panel; there are {len(axes)} for {len(panels)} panels ({', '.join(panels)}). "
            f"Pass {len(panels)}, or axes=None for a new figure."
        )
    return axes


def _new_grid(n_panels: int) -> np.ndarray:
    """Return the Axes of a new figure: a row of up to three, or two by two."""
    from matplotlib import pyplot as plt

    n_rows, n_columns = (2, 2) if n_panels == 4 else (1, n_panels)
    figsize = (4.6 * n_columns, 3.4 * n_rows)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=figsize, layout="constrained", squeeze=False)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches
    figure.align_ylabels(axes)
    return axes.ravel()


def _new_row(legends: list[float]) -> np.ndarray:
    """Return the Axes of a new figure, wide enough for a legend of the given inches beside each."""
    from matplotlib import pyplot as plt

    figsize = (4.2 * len(legends) + sum(legends), 4.2)
    figure, axes = plt.subplots(1, len(legends), figsize=figsize, layout="constrained", squeeze=False)
    figure.get_layout_engine().set(w_pad=0.1)  # inches
    return axes.ravel()


def _finish(figure: Figure, *, show: bool, save: str | Path | None) -> None:
    """Save and show, where asked."""
    from matplotlib import pyplot as plt

    if save is not None:
        figure.savefig(save, dpi=150, bbox_inches="tight")
    if show:
        plt.show()


# ---------------------------------------------------------------------------------------------------------------
# Panels of `training`
# ---------------------------------------------------------------------------------------------------------------


class _Stage(NamedTuple):
    name: str
    start: float  # epochs, half an epoch before the first
    end: float


def _draw_curves(ax: Axes, history: DataFrame, name: str) -> None:
    """Draw one term by epoch, a line for each split."""
    epoch = history["epoch"].to_numpy()
    splits = _splits(history, name)
    for split, values in splits.items():
        # Validation may run only every few epochs: a line must bridge the NaNs between.
        known = np.isfinite(values)
        marker = "o" if known.sum() <= _FEW_EPOCHS else None
        ax.plot(epoch[known], values[known], color=_SPLITS[split], label=split, lw=1.6, marker=marker, ms=3.5)
    ax.set(xlabel="epoch", ylabel="nats per cell", xlim=(epoch[0] - 0.5, epoch[-1] + 0.5))
    _limit_y(ax, splits, keep_highest=name == "elbo")
    n_rows = _mark_stages(ax, _stages(history))
    ax.set_title(_PANELS[name], loc="left", fontsize=11, fontweight="bold", pad=6 + 1.35 * _STAGE_FONT * n_rows)
    _tidy(ax)


def _tidy(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    ax.ticklabel_format(axis="y", useOffset=False, style="plain")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)


def _limit_y(ax: Axes, splits: dict[str, np.ndarray], *, keep_highest: bool) -> None:
    """Set limits that the steep first epochs do not stretch; the highest ELBO, which is marked, stays inside."""
    if not splits:
        return
    columns = [values[np.isfinite(values)] for values in splits.values()]
    low, high = _robust_range(columns)
    high = max(high, *(column.max() for column in columns)) if keep_highest else high
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    ax.set_ylim(low - margin, high + margin)


def _robust_range(columns: list[np.ndarray]) -> tuple[float, float]:
    """Return the range of the values (n_epochs,) after the first tenth, without their tails, with the last quarter."""
    settled = np.concatenate([column[len(column) // 10 :] for column in columns])
    last = np.concatenate([column[3 * len(column) // 4 :] for column in columns])
    low = min(np.quantile(settled, 0.03), last.min())
    high = max(np.quantile(settled, 0.97), last.max())
    # Peaks that go little beyond are let in; only a tail that would press the rest together is cut.
    reach = 0.35 * (high - low)
    values = np.concatenate(columns)
    return values[values >= low - reach].min(), values[values <= high + reach].max()


def _stages(history: DataFrame) -> list[_Stage]:
    """Return the runs of epochs that share a stage, in order."""
    epoch, stage = history["epoch"].to_numpy(), history["stage"].astype(str).to_numpy()
    first = np.flatnonzero(np.r_[True, stage[1:] != stage[:-1]])
    edges = [*(epoch[first] - 0.5), epoch[-1] + 0.5]
    return [_Stage(stage[i], *span) for i, span in zip(first, pairwise(edges), strict=True)]


def _mark_stages(ax: Axes, stages: list[_Stage]) -> int:
    """Draw a line at each change of stage and write the names above; return the rows of names. One stage needs none."""
    if len(stages) == 1:
        return 0
    for stage in stages[1:]:
        ax.axvline(stage.start, color="0.55", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    places = _place_names(stages, width=_width_in_points(ax))
    for stage, (x, row) in zip(stages, places, strict=True):
        ax.annotate(
            stage.name,
            xy=(x, 1.0),
            xycoords="axes fraction",
            xytext=(0, 3 + 1.35 * _STAGE_FONT * row),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=_STAGE_FONT,
            color="0.35",
        )
    return 1 + max(row for _, row in places)


def _width_in_points(ax: Axes) -> float:
    return ax.get_position().width * ax.figure.get_figwidth() * _POINTS_PER_INCH


def _place_names(stages: list[_Stage], width: float) -> list[tuple[float, int]]:
    """Return for each name its centre, as a fraction of the axis, and the lowest row in which it overlaps no other."""
    start, end = stages[0].start, stages[-1].end
    row_ends: list[float] = []
    places = []
    for stage in stages:
        half = 0.5 * 0.62 * _STAGE_FONT * (len(stage.name) + 1) / width  # letters are about 0.6 of their height wide
        centre = (0.5 * (stage.start + stage.end) - start) / (end - start)
        centre = min(max(centre, half), max(1.0 - half, half))
        row = next((i for i, taken in enumerate(row_ends) if taken <= centre - half), len(row_ends))
        row_ends[row : row + 1] = [centre + half]
        places.append((centre, row))
    return places


def _mark_best(ax: Axes, history: DataFrame) -> None:
    """Mark the highest validation ELBO; its value is in the legend, which finds its own place."""
    validation = _splits(history, "elbo").get("validation")
    if validation is None:
        return
    best = int(np.nanargmax(np.where(np.isfinite(validation), validation, np.nan)))
    epoch, value = history["epoch"].to_numpy()[best], validation[best]
    label = f"best: {value:,.1f} (epoch {epoch})".replace("-", "\N{MINUS SIGN}")
    colour = _SPLITS["validation"]
    ax.plot(epoch, value, "o", ms=7, mfc="white", mec=colour, mew=1.6, ls="none", label=label, zorder=4)


# ---------------------------------------------------------------------------------------------------------------
# Panels of `clusters`
# ---------------------------------------------------------------------------------------------------------------


def _draw_cells(ax: Axes, adata: AnnData, basis: str, column: str, **options: Any) -> None:
    """Let scanpy draw one panel; its points are pixels in vector formats, since a million shapes open in no viewer."""
    import scanpy as sc

    # scanpy writes "UMAP1" for "umap" but "X_umap1" for "X_umap".
    short = basis.removeprefix("X_")
    basis = basis if short in adata.obsm else short
    sc.pl.embedding(adata, basis, color=column, ax=ax, show=False, **options)
    for points in ax.collections:
        points.set_rasterized(True)


def _embedding_options(adata: AnnData, column: str, given: dict[str, Any], *, is_component: bool) -> dict[str, Any]:
    """Return the options of `scanpy.pl.embedding`: the user's, and our defaults for the others."""
    options: dict[str, Any] = {"size": min(120_000 / max(adata.n_obs, 1), _LARGEST_POINT)}
    n_categories = len(_categories(adata.obs[column]))
    if len(adata.uns.get(f"{column}_colors", ())) < n_categories:
        options["palette"] = _safe_palette(n_categories)
    if is_component and n_categories > _LARGEST_LEGEND:
        options |= {"legend_loc": "on data", "legend_fontsize": 8, "legend_fontoutline": 2}
    if "s" in given:  # scanpy reads `s` only where there is no `size`
        del options["size"]
    return options | given


def _safe_palette(n_categories: int) -> list[str] | None:
    """Return colours that colour-blind readers tell apart, as far as there are enough; else None, scanpy's own."""
    from scanpy.plotting.palettes import default_20  # adjusted for colour blindness, unlike matplotlib's ten

    return next((list(palette) for palette in (OKABE_ITO, default_20) if n_categories <= len(palette)), None)


def _categories(column: Series) -> list[str]:
    """List the categories that scanpy will colour by; none for numbers, which get a colour bar."""
    if hasattr(column, "cat"):
        return [str(category) for category in column.cat.categories]
    is_number = column.dtype.kind in "iufc"
    return [] if is_number else [str(value) for value in column.dropna().unique()]


def _legend_width(column: Series, options: dict[str, Any]) -> float:
    """Estimate the inches that scanpy's legend needs beside the panel; a colour bar needs less than one."""
    names = _categories(column)
    if not names:
        return 0.8
    if options.get("legend_loc", "right margin") != "right margin":
        return 0.0
    n_legend_columns = 1 if len(names) <= 14 else 2 if len(names) <= 30 else 3  # as scanpy has them
    return n_legend_columns * (0.4 + 0.08 * max(map(len, names)))


def _titles(columns: list[str], given: str | Sequence[str] | None) -> list[str]:
    """Return a title per panel: the user's as far as they go, then the names of the columns."""
    given = [given] if isinstance(given, str) else list(given or [])[: len(columns)]
    return [column if title is None else title for column, title in zip_longest(columns, given)]


def _name_latent_axes(ax: Axes, key: str) -> None:
    """Call the axes "latent 1" where scanpy calls them "scvae1" or "X_scvae1"."""
    for axis in (ax.xaxis, ax.yaxis):
        dimension = axis.get_label_text().removeprefix("X_").removeprefix(key)
        axis.set_label_text(f"latent {dimension}")
