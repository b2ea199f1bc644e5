"""Plot of the KL of each latent dimension, and so of the dimensions in use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scvae_tools._checks import checked
from scvae_tools._keys import Keys
from scvae_tools._other_names import answers_other_names
from scvae_tools.pl._figures import LINE, finish, missing_result, new_axes, write_names

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes

_LEAST_USED = 0.01  # nats per cell
_UNUSED = "0.6"


@answers_other_names
@checked()
def kl(
    data: AnnData | Any,
    *,
    key: str = "scvae",
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | bool | None = None,
) -> Axes:
    """Plot how much each latent dimension says about a cell, and so which of them the model uses.

    A bar is KL(q(z_d|x) ‖ p(z_d)) of one dimension d, the mean over cells: the nats of information that its code holds
    about a cell beyond what the prior knows. For a mixture it is Σ_y q(y|x) KL(q(z_d|x,y) ‖ p(z_d|y)), what the
    dimension adds to the component; the information about which component it is, is not in it. A dimension of
    (almost) 0 has collapsed: its posterior is the prior of every cell, and the decoder does without it. If none has,
    a larger ``n_latent`` may help; if many have, a smaller one does as well. The bars add up to the KL of z of a plain
    VAE and of a GMVAE with ``covariance="diag"``; where the dimensions of the prior are correlated, they do not
    (:meth:`scvae_tools.SCVAE.get_kl_by_dimension`).

    Parameters
    ----------
    data
        AnnData with a result of :func:`scvae_tools.tl.scvae`, or a trained model, which evaluates its own cells.
    key
        Key of the result, the ``key_added`` of :func:`scvae_tools.tl.scvae`. Not used for a model.
    ax
        Axes to draw on. By default of a new figure, wide enough for all dimensions.
    show
        Whether to show the figure.
    save
        Path of a file to write; its suffix is the format. True for one in ``scanpy.settings.figdir``, with the name of
        the plot.

    Returns
    -------
    Axes with a bar per dimension, the largest first, named by its number from 1 (``adata.obsm["X_scvae"][:, 0]`` is
    dimension 1); grey, with its number, below 0.01 nats, where it
    counts as unused.

    Raises
    ------
    ValueError
        If there is no result, if it holds no KL by dimension, or if the model is not trained.
    """
    values = _kl_by_dimension(data, key)
    order = np.argsort(-values, kind="stable")
    is_used = values[order] >= _LEAST_USED
    ax = new_axes(min(max(1.2 + 0.26 * len(values), 4.2), 18), 3.2) if ax is None else ax
    place = np.arange(len(values))
    ax.bar(place, values[order], width=0.78, color=np.where(is_used, LINE, _UNUSED))
    ax.set(xlabel="latent dimension", ylabel="KL (nats per cell)", xlim=(-0.7, len(values) - 0.3))
    ax.set_ylim(0, max(1.05 * values.max(), _LEAST_USED))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.set_title(
        f"{is_used.sum()} of {len(values)} dimension{'s' * (len(values) != 1)} in use", loc="left", fontsize=11
    )
    write_names(ax.xaxis, place, [str(dimension + 1) for dimension in order])
    ax.tick_params(axis="x", length=0)
    for at, name in zip(ax.get_xticks(), ax.get_xticklabels(), strict=True):
        name.set_color("black" if is_used[int(at)] else _UNUSED)  # their bars are too low to show a colour
    finish(ax.figure, "kl", show=show, save=save)
    return ax


def _kl_by_dimension(data: AnnData | Any, key: str) -> np.ndarray:
    """Return the KL of an AnnData's result or of a model, (n_latent,), or say what is missing."""
    if hasattr(data, "uns"):
        values, owner = _stored(data, key), f"uns[{Keys(key).uns!r}]['kl_by_dimension']"
    else:
        values, owner = _of_model(data), f"get_kl_by_dimension() of this {type(data).__name__}"
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"svt.pl.kl needs a finite number for each latent dimension; found in {owner} the shape {values.shape} "
            f"with {int((~np.isfinite(values)).sum())} that are not finite. Train the model again."
        )
    return values


def _stored(adata: AnnData, key: str) -> np.ndarray:
    result = adata.uns.get(Keys(key).uns)
    name = f"uns[{Keys(key).uns!r}]['kl_by_dimension']"
    if not isinstance(result, Mapping):
        raise missing_result(adata, key, name)
    if "kl_by_dimension" not in result:
        raise ValueError(
            f"There is no {name}; the result under {key!r} holds {list(result)}, as of an earlier version. "
            f"Run svt.tl.scvae(adata, key_added={key!r}) again, or pass the trained model."
        )
    return result["kl_by_dimension"]


def _of_model(model: Any) -> np.ndarray:
    if not hasattr(model, "get_kl_by_dimension"):
        raise ValueError(
            f"svt.pl.kl needs an AnnData or a trained SCVAE; found {type(model).__name__}. Pass one of these."
        )
    if not getattr(model, "is_trained_", True):
        raise ValueError(f"svt.pl.kl needs a trained model; this {type(model).__name__} is not. Call model.train().")
    return model.get_kl_by_dimension()
