"""Plot of the training by epoch, and the parts of such plots that others use."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from scvae_tools._checks import checked
from scvae_tools._keys import Keys
from scvae_tools._other_names import answers_other_names
from scvae_tools.pl._figures import finish, given_axes, missing_result, new_grid, tidy

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from pandas import DataFrame

_SPLITS = {"train": "#0072b2", "validation": "#d55e00"}
_PANELS = {"elbo": "ELBO", "log_likelihood": "Log-likelihood", "kl_z": "KL of z", "kl_y": "KL of y"}
_POINTS_PER_INCH = 72
_STAGE_FONT = 8  # points
FEW_EPOCHS = 20  # up to here each epoch has a marker, since a line of one point is invisible


@answers_other_names
@checked()
def training(
    data: AnnData | DataFrame | Any,
    *,
    key: str = "scvae",
    axes: Axes | Sequence[Axes] | np.ndarray | None = None,
    show: bool = False,
    save: str | Path | bool | None = None,
) -> np.ndarray:
    """Plot ELBO, log-likelihood and KL terms by epoch, for training and validation cells.

    Vertical lines mark where one stage of the training ends and the next begins. The limits of the y-axes leave out
    the steep first epochs, but contain the last epoch and the best validation ELBO. The ELBO is not weighted by the
    warm-up, so that all epochs are comparable.

    The dotted line is the log-likelihood of the validation cells under a model without latent variables. What the ELBO
    is above it, the latent space explains.

    Dropout acts in the last stage only, and the curve of the training cells is measured with it: where dropout begins,
    which the legend says, that curve falls by what the dropped units contribute. The validation cells are measured
    without dropout in all stages.

    Parameters
    ----------
    data
        AnnData with a result of :func:`scvae_tools.tl.scvae`, a trained model, or its ``history``.
    key
        Key of the result, the ``key_added`` of :func:`scvae_tools.tl.scvae`. Not used for a model or a history.
    axes
        Axes to draw on, as many as there are panels: 4 for a mixture, 3 for a plain VAE. By default of a new figure.
    show
        Whether to show the figure.
    save
        Path of a file to write; its suffix is the format. True for one in ``scanpy.settings.figdir``, with the name of
        the plot.

    Returns
    -------
    Array of Axes: ELBO, log-likelihood, KL of z and, for a mixture, KL of y; in nats per cell.

    Raises
    ------
    ValueError
        If there is no history, or if the number of ``axes`` is not the number of panels.
    """
    history = history_of(data, key)
    panels = _panels(history)
    axes = new_grid(len(panels), height=3.7) if axes is None else given_axes(axes, panels)
    for ax, name in zip(axes, panels, strict=True):
        _draw_curves(ax, history, name)
    _mark_best(axes[0], history)
    _mark_null(axes[0], _null_log_likelihood(data, key))
    _add_legend(axes[0], _first_epoch_with_dropout(data, key, history))
    finish(axes[0].figure, "training", show=show, save=save)
    return axes


def history_of(data: AnnData | DataFrame | Any, key: str, plot: str = "training") -> DataFrame:
    """Return the history of an AnnData or of a model, or one given, if it is one of ours; errors name the plot."""
    if hasattr(data, "uns"):
        result = data.uns.get(Keys(key).uns)
        if not isinstance(result, Mapping) or "history" not in result:
            raise missing_result(data, key, f"uns[{Keys(key).uns!r}]['history']")
        history, remedy = result["history"], f"Run svt.tl.scvae(adata, key_added={key!r}) again."
    else:
        history = data if hasattr(data, "columns") else getattr(data, "history", None)
        remedy = "Call model.train() first."
    return _check_history(history, f"svt.pl.{plot}", type(data).__name__, remedy)


def _check_history(history: DataFrame | None, plot: str, owner: str, remedy: str) -> DataFrame:
    if not hasattr(history, "columns"):
        raise ValueError(
            f"{plot} needs an AnnData, or a model whose `history` is a table with a row per epoch; "
            f"the history of this {owner} is {type(history).__name__}. {remedy}"
        )
    needed = ["epoch", "stage", *(f"{name}_train" for name in _PANELS if name != "kl_y")]
    missing = [column for column in needed if column not in history.columns]
    if missing or len(history) == 0:
        finding = f"lacks the columns {missing}" if missing else "has no epochs"
        raise ValueError(f"{plot} needs one row per epoch; the history of this {owner} {finding}. {remedy}")
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
        marker = "o" if known.sum() <= FEW_EPOCHS else None
        ax.plot(epoch[known], values[known], color=_SPLITS[split], label=split, lw=1.6, marker=marker, ms=3.5)
    _limit_y(ax, splits, keep_highest=name == "elbo")
    stage_frame(ax, history, title=_PANELS[name], ylabel="nats per cell")


def stage_frame(ax: Axes, history: DataFrame, *, title: str, ylabel: str) -> None:
    """Set the common parts of panels by epoch: labels, limits of the epochs, stages, and the title above these."""
    epoch = history["epoch"].to_numpy()
    ax.set(xlabel="epoch", ylabel=ylabel, xlim=(epoch[0] - 0.5, epoch[-1] + 0.5))
    n_rows = _mark_stages(ax, _stages(history))
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=6 + 1.35 * _STAGE_FONT * n_rows)
    tidy(ax)


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
    # Values little beyond the range are let in; only a tail that would compress the rest is cut.
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
    """Mark the highest validation ELBO; its value is in the legend."""
    validation = _splits(history, "elbo").get("validation")
    if validation is None:
        return
    best = int(np.nanargmax(np.where(np.isfinite(validation), validation, np.nan)))
    epoch, value = history["epoch"].to_numpy()[best], validation[best]
    label = f"best: {value:,.1f} (epoch {epoch})".replace("-", "\N{MINUS SIGN}")
    colour = _SPLITS["validation"]
    ax.plot(epoch, value, "o", ms=7, mfc="white", mec=colour, mew=1.6, ls="none", label=label, zorder=4)


def _null_log_likelihood(data: AnnData | Any, key: str) -> float | None:
    """Return the log-likelihood of the validation cells without latent variables, in nats per cell, if it is known."""
    if hasattr(data, "uns"):
        known = data.uns[Keys(key).uns].get("null_log_likelihood")
    else:
        known = getattr(data, "null_log_likelihood", None)
    return known.get("validation") if isinstance(known, Mapping) else None


def _mark_null(ax: Axes, value: float | None) -> None:
    """Draw the log-likelihood without latent variables, as far down as the axis must go for it."""
    if value is None:
        return
    label = f"without latent variables: {value:,.1f}".replace("-", "\N{MINUS SIGN}")
    low, high = ax.get_ylim()
    margin = 0.04 * (high - low)
    ax.axhline(value, color="0.35", linewidth=1.2, linestyle=":", label=label, zorder=1)
    ax.set_ylim(min(low, value - margin), max(high, value + margin))


def _first_epoch_with_dropout(data: AnnData | Any, key: str, history: DataFrame) -> int | None:
    """Return the epoch from which on dropout acted, by the arguments of the model; None if it did not, or none says."""
    if hasattr(data, "uns"):
        params = data.uns[Keys(key).uns].get("params", {})
    else:
        params = getattr(data, "init_params_", {}).get("non_kwargs", {})
    rate = params.get("dropout_rate", 0)
    rates = list(rate.values()) if isinstance(rate, Mapping) else [rate]
    last_stage = "mixture" if params.get("mixture", False) else "vae"
    epochs = history["epoch"][history["stage"].astype(str) == last_stage]
    return int(epochs.iloc[0]) if any(rates) and len(epochs) else None


def _add_legend(ax: Axes, first_with_dropout: int | None) -> None:
    """Add the legend below the panel, where it hides no curve; it says where dropout begins."""
    lines, names = ax.get_legend_handles_labels()
    if first_with_dropout is not None:
        with_dropout = f"train (with dropout from epoch {first_with_dropout})"
        names = [with_dropout if name == "train" else name for name in names]
    ax.legend(lines, names, loc="upper left", bbox_to_anchor=(0, -0.22), frameon=False, fontsize=9, borderaxespad=0)
