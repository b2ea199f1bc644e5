"""Plots of what `scvae_tools.tl` stored in an AnnData, or of a model's history; they store no results.

Every function returns its Axes (an array of them where there may be several panels), shows nothing unless asked
(``show=True``) and draws on given Axes (``ax=`` or ``axes=``), so that a figure can be composed and changed afterwards.
matplotlib and scanpy load on first use.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from scvae_tools._calibration import ambiguity_of_components, component_probabilities
from scvae_tools._calibration import calibration as reliability
from scvae_tools._keys import Keys
from scvae_tools._start import LARGEST_OVERLAP

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame, Series

__all__ = ["ambiguous", "calibration", "clusters", "components", "training"]

#: Eight colours that all common kinds of colour blindness tell apart (Okabe and Ito 2008).
OKABE_ITO = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#000000")
_SPLITS = {"train": "#0072b2", "validation": "#d55e00"}
_PANELS = {"elbo": "ELBO", "log_likelihood": "Log-likelihood", "kl_z": "KL of z", "kl_y": "KL of y"}
_POINTS_PER_INCH = 72
_STAGE_FONT = 8  # points
_FEW_EPOCHS = 20  # up to here each epoch has a marker, since a line of one point is invisible
_LARGEST_POINT = 100  # points squared; scanpy's 120,000 / n_cells covers the picture where there are few cells
_LARGEST_LEGEND = 20  # components; beyond, colours are too alike and the numbers are written on the cells
_ABOUT_ONE = (-0.03, 1.08)  # limits of an axis from 0 to 1 that do not cut its points, as multiples of its highest
_LINE, _ACCENT, _PALE, _TEXT = OKABE_ITO[0], OKABE_ITO[3], "0.86", "0.35"
_LARGEST_BIN, _SMALLEST_BIN = 280, 12  # points squared of the bins with the most and the fewest cells


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


def components(
    adata: AnnData,
    *,
    key: str = "scvae",
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes:
    """Plot why the mixture has as many components as it has.

    The line is the largest overlap of two components, by the number of components: parts of one type overlap, types do
    not. Each run takes the largest number whose overlap is below the threshold, the dashed line; the pale bars, on the
    right axis, are the shares of runs that took each number. Their median is chosen, within ``n_components`` if that is
    a range, and marked.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scvae_tools.tl.scvae` that found the number of components itself.
    key
        Key of the result, the ``key_added`` of :func:`scvae_tools.tl.scvae`.
    ax
        Axes to draw on; the axis of the shares is added to its figure. By default of a new figure.
    show
        Whether to show the figure.
    save
        Path of a file to write; its suffix is the format.

    Returns
    -------
    Axes of the overlap, in nats per cell of the smaller component of the two.

    Raises
    ------
    ValueError
        If there is no result, or if the number of components was given rather than found.
    """
    curve = _component_curve(adata, key)
    ax = _new_axes(5.6, 3.6) if ax is None else ax
    _draw_overlap(ax, curve)
    _draw_shares(ax, curve)
    _mark_chosen(ax, curve)
    _finish(ax.figure, show=show, save=save)
    return ax


def ambiguous(
    adata: AnnData,
    *,
    key: str = "scvae",
    threshold: float = 0.9,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes:
    """Plot how many cells of each component might as well be of another, and of which.

    A bar is the share of the component's cells whose top probability is below the threshold. Beside it is the component
    that is most often the second most probable one of these. The cells themselves are listed by
    :func:`scvae_tools.tl.ambiguous_cells`.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scvae_tools.tl.scvae`, with a mixture.
    key
        Key of the result, the ``key_added`` of :func:`scvae_tools.tl.scvae`.
    threshold
        A cell is ambiguous if the probability of its most probable component is below; above 0 and up to 1.
    ax
        Axes to draw on. By default of a new figure, high enough for all components.
    show
        Whether to show the figure.
    save
        Path of a file to write; its suffix is the format.

    Returns
    -------
    Axes with a bar per component, the first one on top, in the colours of :func:`scvae_tools.pl.clusters`.

    Raises
    ------
    ValueError
        If there are no probabilities, or if ``threshold`` is not above 0 and up to 1.
    """
    table = ambiguity_of_components(adata, key=key, threshold=threshold)
    if ax is None:
        longest = max(
            len(name) + len(_confusion(row)) for name, row in zip(table.index, table.itertuples(), strict=True)
        )
        ax = _new_axes(3.6 + 0.075 * longest, 1.1 + 0.3 * len(table))  # 0.075 inches for a letter
    _draw_ambiguity(ax, table, _component_colours(adata, key, list(table.index)))
    share = table["n_ambiguous"].sum() / table["n_cells"].sum()
    ax.set_title(f"{_percent(share)} of cells: top probability below {threshold:g}", loc="left", fontsize=11)
    _finish(ax.figure, show=show, save=save)
    return ax


def calibration(
    adata: AnnData,
    labels_key: str,
    *,
    key: str = "scvae",
    n_bins: int = 10,
    pool: bool = False,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes:
    """Plot how often the most probable component is right about known labels, by its probability.

    A component stands for the label that most of its cells have. On the diagonal the probabilities are what they say;
    below it the mixture is too sure. The area of a point is proportional to the number of its cells. The title has the
    expected calibration error, the mean over cells of the distance from the diagonal [Guo17]_.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scvae_tools.tl.scvae`, with a mixture.
    labels_key
        Column of ``adata.obs`` with known labels. Cells without one are left out.
    key
        Key of the result, the ``key_added`` of :func:`scvae_tools.tl.scvae`.
    n_bins
        Number of bins of equal width of the probability; those without cells have no point.
    pool
        Whether components that stand for one label count as one, with the sum of their probabilities.
    ax
        Axes to draw on. By default of a new figure.
    show
        Whether to show the figure.
    save
        Path of a file to write; its suffix is the format.

    Returns
    -------
    Axes with the mean top probability of each bin and the share of its cells that are right.

    Raises
    ------
    ValueError
        If the labels or the probabilities are not there, if all labels are missing, or if ``n_bins`` is not a whole
        number of at least 1.

    References
    ----------
    .. [Guo17] Guo, Pleiss, Sun, Weinberger (2017) On calibration of modern neural networks. ICML, arXiv:1706.04599.
    """
    if labels_key not in adata.obs:
        raise ValueError(
            f"labels_key must be a column of adata.obs; {labels_key!r} is not among {list(adata.obs)}. "
            "Pass one of those."
        )
    probs, _ = component_probabilities(adata, key)
    found = reliability(probs, adata.obs[labels_key], n_bins, pool=pool)
    ax = _new_axes(4.2, 4.2) if ax is None else ax
    _draw_reliability(ax, found.table[found.table["n_cells"] > 0])
    error = f"{found.expected_error:.3f}" if found.expected_error >= 0.0005 else "< 0.001"
    ax.set_title(f"Expected calibration error {error}", loc="left", fontsize=11)
    _finish(ax.figure, show=show, save=save)
    return ax


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


def _component_curve(adata: AnnData, key: str) -> DataFrame:
    """Return the overlap by number of components, or say why there is none."""
    result = adata.uns.get(Keys(key).uns)
    name = f"uns[{Keys(key).uns!r}]['components']['curve']"
    if not isinstance(result, Mapping):
        raise _missing(adata, key, name)
    found = result.get("components")
    curve = None if found is None else found.get("curve")
    remedy = f"Run svt.tl.scvae(adata, n_components=None, key_added={key!r})"
    if not result.get("params", {}).get("mixture", True):
        raise ValueError(
            f"Components need a mixture; {key!r} is the result of a plain VAE, without {name}. "
            f"Run svt.tl.scvae(adata, mixture=True, key_added={key!r})."
        )
    if found is None:
        raise _missing(adata, key, name)
    if curve is None:
        raise ValueError(
            f"svt.pl.components shows how the number of components was found; there is no {name}, since the number was "
            f"given ({found.get('n_components', 'unknown')}, by n_components= or by the labels of labels_key=). "
            f"{remedy} to have it found."
        )
    needed = ["n_components", "overlap", "share_of_runs", "chosen"]
    missing = [column for column in needed if column not in getattr(curve, "columns", ())]
    if missing or len(curve) == 0:
        finding = f"lacks the columns {missing}" if missing else "has no rows"
        raise ValueError(f"svt.pl.components needs one row per number of components; {name} {finding}. {remedy} again.")
    return curve.sort_values("n_components")


def _component_colours(adata: AnnData, key: str, names: list[str]) -> list[str]:
    """Return the colours that `clusters` used or would use, by component; it alone writes them to ``uns``."""
    column = adata.obs.get(Keys(key).component)
    categories = names if column is None else _categories(column)
    stored = list(adata.uns.get(f"{key}_colors", ()))
    colours = stored if len(stored) >= len(categories) else _safe_palette(len(categories)) or []
    by_name = dict(zip(categories, colours, strict=False))
    return [by_name.get(name, "0.6") for name in names]


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


def _new_axes(width: float, height: float) -> Axes:
    """Return the Axes of a new figure of the given inches."""
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


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


# ---------------------------------------------------------------------------------------------------------------
# The panel of `components`
# ---------------------------------------------------------------------------------------------------------------


def _draw_overlap(ax: Axes, curve: DataFrame) -> None:
    """Draw the overlap by number of components, and the threshold below which a number is taken."""
    number, overlap = curve["n_components"].to_numpy(), curve["overlap"].to_numpy(dtype=float)
    ax.plot(number, overlap, color=_LINE, lw=1.6, marker="o", ms=4, label="overlap")
    ax.axhline(LARGEST_OVERLAP, color=_TEXT, lw=1, ls=(0, (4, 3)), label="threshold")
    # The line rises through the threshold near the number chosen: the name is where it does not.
    is_free_left = np.nanmax(overlap[: -(-len(overlap) // 3)], initial=0) < LARGEST_OVERLAP
    ax.annotate(
        f"threshold {LARGEST_OVERLAP:g}",
        xy=(0 if is_free_left else 1, LARGEST_OVERLAP),
        xycoords=("axes fraction", "data"),
        xytext=(4 if is_free_left else -4, 2),
        textcoords="offset points",
        ha="left" if is_free_left else "right",
        va="bottom",
        fontsize=8,
        color=_TEXT,
    )
    ax.set_xlabel("number of components")
    ax.set_ylabel("largest overlap of two components\n(nats per cell of the smaller)")
    _tidy(ax)
    highest = max(np.nanmax(overlap, initial=0), 2 * LARGEST_OVERLAP)
    ax.set(xlim=(number[0] - 0.7, number[-1] + 0.7), ylim=(_ABOUT_ONE[0] * highest, _ABOUT_ONE[1] * highest))
    ax.yaxis.label.set_color(_LINE)


def _draw_shares(ax: Axes, curve: DataFrame) -> None:
    """Draw the shares of runs as bars behind the line, on an axis of their own."""
    from matplotlib.ticker import PercentFormatter

    right = ax.twinx()
    right.bar(curve["n_components"], curve["share_of_runs"], width=0.8, color=_PALE)
    right.set_ylim(*_ABOUT_ONE)
    right.set_yticks([0, 0.25, 0.5, 0.75, 1])
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    right.set_ylabel("share of runs", color="0.5")
    right.tick_params(axis="y", colors="0.5")
    right.spines[["top", "left", "right"]].set_visible(False)
    # The axis made last is drawn on top, unless it is told otherwise; its bars would then be under an opaque patch.
    ax.set_zorder(right.get_zorder() + 1)
    ax.patch.set_visible(False)


def _mark_chosen(ax: Axes, curve: DataFrame) -> None:
    """Mark the number that was chosen by a line, and name it above, where nothing else is."""
    for number in curve["n_components"][curve["chosen"].astype(bool)]:
        ax.axvline(number, color=_ACCENT, lw=1.4, label="chosen", zorder=1.5)
        ax.annotate(
            f"{number} component{'s' * (number != 1)}",
            xy=(number, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=10,
            color=_ACCENT,
        )


# ---------------------------------------------------------------------------------------------------------------
# The panel of `ambiguous`
# ---------------------------------------------------------------------------------------------------------------


def _draw_ambiguity(ax: Axes, table: DataFrame, colours: list[str]) -> None:
    """Draw a bar per component, with the component that its cells might be of beside it."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    share = (table["n_ambiguous"] / table["n_cells"]).to_numpy()
    place = np.arange(len(table))
    ax.barh(place, share, height=0.72, color=colours, edgecolor="0.3", linewidth=0.5)
    # In a column beside the panel, where long names cover nothing and have the room they need.
    for at, row in zip(place, table.itertuples(), strict=True):
        ax.annotate(
            _confusion(row),
            xy=(1, at),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=_TEXT,
            annotation_clip=False,
        )
    ax.set_yticks(place, table.index)
    ax.set(xlabel="ambiguous cells", ylabel="component", ylim=(len(table) - 0.5, -0.5))
    ax.set_xlim(0, max(1.05 * share.max(), 0.01))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="x", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)


def _confusion(row: Any) -> str:
    """Say how many cells of a component are ambiguous, and what else they might be."""
    count = f"{row.n_ambiguous:,} of {row.n_cells:,}"
    if row.n_ambiguous == 0:
        return count
    if row.n_confused == row.n_ambiguous:
        return f"{count}, {'all ' * (row.n_ambiguous > 1)}with {row.confused_with}"
    return f"{count}, {_percent(row.n_confused / row.n_ambiguous)} of them with {row.confused_with}"


def _percent(share: float) -> str:
    """Write a share without decimals, unless it would be 0% or 100% and is not."""
    is_near_end = 0 < share < 0.01 or 0.99 < share < 1
    if not is_near_end:
        return f"{share:.0%}"
    return "< 0.1%" if share < 0.001 else "> 99.9%" if share > 0.999 else f"{share:.1%}"


# ---------------------------------------------------------------------------------------------------------------
# The panel of `calibration`
# ---------------------------------------------------------------------------------------------------------------


def _draw_reliability(ax: Axes, table: DataFrame) -> None:
    """Draw the accuracy by confidence of the bins that have cells, and their distance from the diagonal."""
    confidence, accuracy = table["confidence"].to_numpy(), table["accuracy"].to_numpy()
    n_cells = table["n_cells"].to_numpy()
    ax.plot([0, 1], [0, 1], color=_TEXT, lw=1, ls=(0, (4, 3)), label="calibrated", zorder=1)
    ax.vlines(
        confidence,
        np.minimum(confidence, accuracy),
        np.maximum(confidence, accuracy),
        color=_ACCENT,
        lw=1.2,
        label="error",
    )
    ax.plot(confidence, accuracy, color=_LINE, lw=1.4, zorder=2)
    area = np.maximum(_LARGEST_BIN * n_cells / n_cells.max(), _SMALLEST_BIN)
    ax.scatter(confidence, accuracy, s=area, color=_LINE, alpha=0.75, edgecolor="white", linewidth=0.6, zorder=3)
    ax.set(xlabel="probability of the most probable component", ylabel="share of cells that are right")
    ax.set(xlim=(-0.06, 1.06), ylim=(-0.06, 1.06), aspect="equal")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    _explain_areas(ax, n_cells)


def _explain_areas(ax: Axes, n_cells: np.ndarray) -> None:
    """Add a legend with the diagonal and the areas of round numbers of cells."""
    largest = int(n_cells.max())
    numbers = sorted({_round_down(largest / part) for part in (1, 10, 100) if largest >= part}, reverse=True)
    for number in numbers:
        area = max(_LARGEST_BIN * number / largest, _SMALLEST_BIN)
        name = f"{number:,} cell{'s' * (number != 1)}"
        ax.scatter([], [], s=area, color=_LINE, alpha=0.75, edgecolor="white", linewidth=0.6, label=name)
    ax.legend(loc="upper left", fontsize=9, framealpha=0.9, edgecolor="none", labelspacing=0.9, handletextpad=0.8)


def _round_down(value: float) -> int:
    """Return the largest of 1, 2, 5, 10, 20, 50, ... that is not above the value."""
    power = 10 ** int(np.floor(np.log10(value)))
    return int(power * max(digit for digit in (1, 2, 5) if digit * power <= value))
