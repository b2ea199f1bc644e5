"""Plot of the cells and the components of the prior in the latent space."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from scvae_tools._keys import Keys
from scvae_tools._messages import listed
from scvae_tools._results.probabilities import component_probabilities
from scvae_tools.pl._embedding import draw_cells, embedding_options, legend_width, name_components, name_groups
from scvae_tools.pl._figures import (
    FONT,
    TEXT,
    component_colours,
    finish,
    missing_result,
    new_axes,
    size_in_points,
    width_of,
)

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes

_BASIS = "X_latent"  # of the private AnnData that is drawn
#: Standard deviations of the ellipses, and the width of their lines in points.
_ELLIPSES = {1: 1.5, 2: 0.8}
_FEW = 6  # components with two ellipses each; of more, the picture would show nothing else
_THINNEST = 0.7  # points, of the only ellipse of a component with hardly any cell
_NEUTRAL = "0.35"  # where colours mean something else than components


class _Prior(NamedTuple):
    """Components of the prior in the two dimensions drawn."""

    names: list[str]
    means: np.ndarray  # (n_used, 2)
    covariances: np.ndarray  # (n_used, 2, 2)
    n_cells: np.ndarray  # (n_used,), of which it is the most probable one


def latent(
    adata: AnnData,
    *,
    key: str = "scvae",
    dimensions: tuple[int, int] = (1, 2),
    color: str | None = None,
    ellipses: bool = True,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
    **kwargs: Any,
) -> Axes:
    """Scatter the cells in two dimensions of the latent space, with the components of the prior on top.

    A component p(z|y) is drawn as the cross of its mean and the ellipses of its marginal covariance in the two
    dimensions at one standard deviation (thick line) and two (thin line), with its name at the mean: of a Gaussian in
    two dimensions, 39 % and 86 % are inside. More than 6 components have the first ellipse only, the thinner the fewer
    cells they have. The cross and the ellipses have the colour of the component, or are grey where the cells are
    coloured by another column. Components that are no cell's most probable one are left out. Without a mixture the
    prior is N(0, I), of which the circles of radius 1 and 2 are drawn, in grey.

    A point is the mean of q(z|x) of a cell, so that the cells spread less than the prior, by the variance of q(z|x);
    dimensions that the model does not use hold all cells near one point.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scvae_tools.tl.scvae`; nothing is written into it.
    key
        Key of the result, the ``key_added`` of :func:`scvae_tools.tl.scvae`.
    dimensions
        The latent dimensions of the two axes, counted from 1. ``adata.uns[key]["kl_by_dimension"]`` tells how much each
        one holds.
    color
        Column of ``adata.obs`` to colour the cells by. By default the component, in the colours of
        :func:`scvae_tools.pl.clusters`; without a mixture all cells are grey.
    ellipses
        Whether to draw the components. Without them, their names are on the cells and, up to 20, in a legend.
    ax
        Axes to draw on. By default of a new figure.
    show
        Whether to show the figure.
    save
        Path of a file to write; its suffix is the format. The cells are pixels in vector formats too.
    **kwargs
        To :func:`scanpy.pl.embedding`: for example ``size``, ``palette``, ``groups``, ``legend_loc``, ``title``.

    Returns
    -------
    Axes in the units of z, in which N(0, I) has standard deviation 1.

    Raises
    ------
    ValueError
        If there is no result, the dimensions are not two of the latent space, ``color`` is no column of ``adata.obs``,
        or the components are to be drawn and are not in ``adata.uns``.
    """
    cells = _private_cells(adata, key, dimensions)
    column = _column(adata, key, color)
    prior = _prior(adata, key, dimensions) if ellipses else None
    is_component = column == Keys(key).component
    given = ({"alpha": 0.5} if ellipses else {}) | ({"na_color": "0.7"} if column is None else {})
    given |= {"legend_loc": None} if ellipses and is_component else {}  # the names are on the cells
    options = embedding_options(cells, column, given | kwargs, is_component=is_component)
    if ax is None:
        side = 4.6 if prior is None or len(prior.names) <= 2 * _FEW else 5.6  # inches
        ax = new_axes(side + 0.4 + (0 if column is None else legend_width(cells.obs[column], options)), side)
    draw_cells(ax, cells, _BASIS, column, **options)
    _scale_axes(ax, dimensions)
    if prior is not None:
        colours = component_colours(cells, key, prior.names) if is_component else [_NEUTRAL] * len(prior.names)
        _draw_components(ax, prior, colours)
    elif is_component and "legend_loc" not in kwargs:
        name_components(ax, cells.obsm[_BASIS], cells.obs[column], kwargs.get("groups"))
    finish(ax.figure, show=show, save=save)
    return ax


def _private_cells(adata: AnnData, key: str, dimensions: tuple[int, int]) -> AnnData:
    """Return an AnnData with what is drawn of the cells; a new one, since scanpy writes colours into it."""
    from anndata import AnnData

    slot = Keys(key).latent
    if slot not in adata.obsm:
        raise missing_result(adata, key, f"obsm[{slot!r}]")
    coordinates = np.asarray(adata.obsm[slot])
    n_latent = coordinates.shape[1]
    chosen = tuple(np.ravel(np.asarray(dimensions, dtype=object)))
    is_valid = len(chosen) == 2 and all(isinstance(number, Integral) and 1 <= number <= n_latent for number in chosen)
    if not is_valid or chosen[0] == chosen[1]:
        remedy = "Pass dimensions=(1, 2)" if n_latent > 1 else "Train with n_latent=2 or more"
        raise ValueError(
            f"`dimensions` must be two different latent dimensions, counted from 1 to {n_latent}, the columns of "
            f"obsm[{slot!r}]; found {dimensions!r}. {remedy}."
        )
    return AnnData(obs=adata.obs, obsm={_BASIS: coordinates[:, _positions(dimensions)]}, uns=dict(adata.uns))


def _positions(dimensions: tuple[int, int]) -> list[int]:
    return [dimension - 1 for dimension in dimensions]


def _column(adata: AnnData, key: str, color: str | None) -> str | None:
    """Return the column of ``obs`` to colour by."""
    component = Keys(key).component
    if color is None:
        return component if component in adata.obs else None
    if color not in adata.obs:
        close = get_close_matches(str(color), [str(name) for name in adata.obs], n=1)
        remedy = f"Did you mean {close[0]!r}?" if close else f"Pass one of {listed(adata.obs)}."
        raise ValueError(f"`color` must be a column of adata.obs; found {color!r}, which is not one. {remedy}")
    return color


def _is_mixture(adata: AnnData, key: str) -> bool:
    return Keys(key).probabilities in adata.obsm or Keys(key).component in adata.obs


def _prior(adata: AnnData, key: str, dimensions: tuple[int, int]) -> _Prior:
    """Return the components that some cell is most probably of, in the dimensions drawn."""
    if not _is_mixture(adata, key):
        return _Prior([""], np.zeros((1, 2)), np.eye(2)[None], np.array([adata.n_obs]))
    probs, names = component_probabilities(adata, key)
    means, covariances = _stored_prior(adata, key, n_components=len(names))
    used, n_cells = np.unique(probs.argmax(1), return_counts=True)
    two = _positions(dimensions)
    return _Prior([names[i] for i in used], means[used][:, two], covariances[used][:, two][:, :, two], n_cells)


def _stored_prior(adata: AnnData, key: str, n_components: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the means (k, d) and covariances (k, d, d) of all components, or say why there are none."""
    result = adata.uns.get(Keys(key).uns)
    components = result.get("components") if isinstance(result, Mapping) else None
    stored = components if isinstance(components, Mapping) else {}
    name = f"uns[{Keys(key).uns!r}]['components']"
    remedy = f"Run svt.tl.scvae(adata, key_added={key!r}) again, or pass ellipses=False."
    missing = [field for field in ("means", "covariances") if field not in stored]
    if missing:
        raise ValueError(f"Ellipses need the means and covariances of the components; {name} lacks {missing}. {remedy}")
    means, covariances = np.asarray(stored["means"]), np.asarray(stored["covariances"])
    d = adata.obsm[Keys(key).latent].shape[1]
    if means.shape != (n_components, d) or covariances.shape != (n_components, d, d):
        raise ValueError(
            f"Ellipses need a mean and a covariance of each of the {n_components} components in {d} dimensions; "
            f"{name} holds means of shape {means.shape} and covariances of shape {covariances.shape}. {remedy}"
        )
    return means, covariances


def _scale_axes(ax: Axes, dimensions: tuple[int, int]) -> None:
    """Name the axes, and restore the ticks, which scanpy removes: z has the units of the prior."""
    from matplotlib.ticker import MaxNLocator

    for axis, dimension in zip((ax.xaxis, ax.yaxis), dimensions, strict=True):
        axis.set_label_text(f"latent {dimension}")
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))


def _draw_components(ax: Axes, prior: _Prior, colours: list[str]) -> None:
    """Draw means, ellipses and names, with a white edge that separates them from cells of the same colour."""
    from matplotlib.patches import Ellipse
    from matplotlib.patheffects import withStroke

    lines = _lines_of_ellipses(prior.n_cells)
    size = 8 if len(lines) <= _FEW else 6  # points
    for name, mean, covariance, colour, line in zip(*prior[:3], colours, lines, strict=True):
        width, height, angle = _axes_of_ellipse(covariance)
        for deviations, lw in line.items():
            lw = lw if colour != _NEUTRAL else 0.6 * lw  # many thick lines of one colour hide much
            edge = [withStroke(linewidth=lw + 1.4, foreground="white")]
            ellipse = Ellipse(
                mean, deviations * width, deviations * height, angle=angle, fill=False, ec=colour, lw=lw, zorder=3
            )
            ellipse.set(path_effects=edge, label=f"{name} at {deviations} SD", gid=f"ellipse {name}")
            ax.add_patch(ellipse)
        ax.plot(*mean, "P", color=colour, markersize=size, mec="white", mew=1, zorder=4, label=f"mean {name}")
    ax.autoscale_view()
    _say_what_ellipses_are(ax, list(lines[0]))
    name_groups(ax, prior.names, prior.means, np.zeros_like(prior.means))


def _lines_of_ellipses(n_cells: np.ndarray) -> list[dict[int, float]]:
    """Return the ellipses of each component: their standard deviations and the width of their lines in points."""
    if len(n_cells) <= _FEW:
        return [_ELLIPSES] * len(n_cells)
    share = np.sqrt(n_cells / n_cells.max())
    return [{1: _THINNEST + (_ELLIPSES[1] - _THINNEST) * of} for of in share]


def _say_what_ellipses_are(ax: Axes, deviations: list[int]) -> None:
    """Say it above the panel on the right, where the title leaves room."""
    text = f"ellipses: {' and '.join(map(str, deviations))} SD"
    size = ax.title.get_fontsize()
    if width_of(ax.get_title(), size) / 2 + width_of(text) + size < size_in_points(ax)[0] / 2:
        ax.set_title(text, loc="right", fontsize=FONT, color=TEXT)


def _axes_of_ellipse(covariance: np.ndarray) -> tuple[float, float, float]:
    """Return width and height of the ellipse at one standard deviation, and its rotation in degrees."""
    variances, directions = np.linalg.eigh(np.asarray(covariance, dtype=np.float64))
    width, height = 2 * np.sqrt(np.maximum(variances, 0))
    return width, height, np.rad2deg(np.arctan2(directions[1, 0], directions[0, 0]))
