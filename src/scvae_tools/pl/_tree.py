"""Plot of the tree of clusters, with a cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from scvae_tools._checks import check_choice, checked
from scvae_tools._other_names import answers_other_names
from scvae_tools._results.colours import safe_palette
from scvae_tools._results.tree import Tree
from scvae_tools.pl._figures import FONT, TEXT, component_colours, finish, new_axes, width_of, write_names

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes

ABOVE = "0.6"  # colour of branches that are split by the cut
THIN, THICK = 1.0, 6.0  # points, of a branch without cells and of one with all of them
SMALL = 6.5  # points, of the numbers at the splits
#: What stands at a split, by the column of the table of nodes.
VALUES = {
    "overlap": "at a split: overlap of its parts, nats per cell of the smaller",
    "p_value": "at a split: its p value",
}


@answers_other_names
@checked()
def tree(
    adata: AnnData,
    *,
    key: str = "scvae_tree",
    cut: str | None = None,
    parts: bool = False,
    values: Literal["overlap", "p_value"] | None = None,
    markers: str | None = None,
    n_markers: int = 3,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | bool | None = None,
) -> Axes:
    """Plot the tree of clusters, with the clusters of a cut.

    All cells are at the left; from there to the right clusters are split, one after the other: above a number on the
    axis there are so many branches. The width of a branch stands for its cells. Branches of the clusters of the cut
    begin with a point, and have their colours; grey branches are split by the cut.

    Parameters
    ----------
    adata
        AnnData with a tree of :func:`scvae_tools.tl.tree`.
    key
        Key of the tree, the ``key_added`` of :func:`scvae_tools.tl.tree`.
    cut
        Key of the cut, the ``key_added`` of :func:`scvae_tools.tl.cut`. None for the latest one; the components if
        there is none.
    parts
        Whether to draw all parts of components, or only those into which the cut splits.
    values
        What stands at the splits: ``"overlap"`` or ``"p_value"``; None for p values if the splits were tested, and
        overlaps if not.
    markers
        Key of a result of :func:`scvae_tools.tl.rank_components`, whose top genes are written beside the components.
        None for ``"rank_components"``, if that is there.
    n_markers
        Number of these genes.
    ax
        Axes to draw on. By default of a new figure, with room for all splits.
    show
        Whether to show the figure.
    save
        Path of a file to write; its suffix is the format. True for one in ``scanpy.settings.figdir``, with the name of
        the plot.

    Returns
    -------
    Axes with the tree: at the right the names at its ends, with numbers of cells.

    Raises
    ------
    ValueError
        If there is no such tree, cut or ranking, or the cut is of another tree; or if the splits have no p values.
    """
    drawn = _Drawn(Tree.read(adata, key), adata, key, cut, parts=parts)
    values = _values(drawn.tree, values)
    names = _names_of_ends(drawn, _markers(adata, markers, n_markers))
    if ax is None:
        longest = max(width_of(name) for name in names) / 72
        ax = new_axes(1.4 + max(2.2, 0.3 * len(drawn.splits)) + longest, 1.1 + 0.24 * max(len(names), 3))
    _draw_branches(ax, drawn)
    _write_values(ax, drawn, values)
    _finish_axes(ax, drawn, names, values)
    ax.set_title(drawn.title, loc="left", fontsize=11)
    finish(ax.figure, "tree", show=show, save=save)
    return ax


class _Drawn:
    """Part of a tree that is drawn, with the places of its nodes.

    Parameters
    ----------
    tree, adata, key
        The tree, and where it is.
    cut, parts
        As in `tree`.
    """

    def __init__(self, tree: Tree, adata: AnnData, key: str, cut: str | None, *, parts: bool) -> None:
        self.tree = tree
        cut = adata.uns[key].get("cut") if cut is None else cut
        if cut is None:
            self.clusters, of_results = tree.clusters(_to_components(tree)), tree.params["key"]
            colours = component_colours(adata, of_results, [tree.names[node] for node in self.clusters])
            self.title = f"{len(self.clusters)} component{'s' * (len(self.clusters) != 1)}"
        else:
            self.clusters = _clusters_of_cut(adata, tree, key, cut)
            colours = _colours_of_cut(adata, cut, len(self.clusters))
            by = ", ".join(f"{name}={value}" for name, value in adata.uns[cut].get("params", {}).items())
            self.title = f"{cut}: {len(self.clusters)} cluster{'s' * (len(self.clusters) != 1)} ({by})"
        above = {node for cluster in self.clusters for node in tree.above(cluster)[1:]}
        shown = set(tree.splits) if parts else _to_components(tree) | above
        #: Nodes whose splits are drawn, in order; and where: that which makes n clusters is left of n.
        self.splits = [node for node in tree.splits if node in shown]
        self.at = {node: 1.5 + place for place, node in enumerate(self.splits)}
        #: Ends of what is drawn, from top to bottom, and the height of each node.
        self.ends = tree.leaves_of(0, lambda node: node not in shown)
        self.height = {node: float(place) for place, node in enumerate(self.ends)}
        for node in reversed(self.splits):
            self.height[node] = float(np.mean([self.height[child] for child in tree.children[node]]))
        #: Colour of each node from the cut on.
        self.colour = {}
        for cluster, colour in zip(self.clusters, colours, strict=True):
            for end in tree.leaves_of(cluster, lambda node: node not in shown):
                way = tree.above(end)
                self.colour |= dict.fromkeys(way[: way.index(cluster) + 1], colour)

    @property
    def has_all_splits(self) -> bool:
        """Whether all splits up to the last one drawn are drawn, so that branches can be counted."""
        return self.splits == self.tree.splits[: len(self.splits)]

    @property
    def right(self) -> float:
        """Where the branches end."""
        return 1.5 + len(self.splits)

    def start(self, node: int) -> float:
        """Where the branch of a node begins."""
        return 0.5 if node == 0 else self.at[self.tree.parent[node]]


def _to_components(tree: Tree) -> set[int]:
    """Nodes that are split down to the components."""
    return {node for node in tree.splits if not tree.is_below[node]} - set(tree.components)


def _clusters_of_cut(adata: AnnData, tree: Tree, key: str, cut: str) -> list[int]:
    """Nodes of the clusters of a cut."""
    stored = adata.uns.get(cut)
    is_cut = isinstance(stored, Mapping) and {"tree", "clusters", "nodes"} <= set(stored)
    if not is_cut:
        known = [name for name, value in adata.uns.items() if isinstance(value, Mapping) and value.get("tree") == key]
        raise ValueError(
            f"`cut` must be the key of a cut of the tree {key!r}; found {cut!r}. "
            + (f"Pass one of {known}." if known else "Run svt.tl.cut(adata, n_clusters=...) first.")
        )
    nodes = [int(node) for node in stored["nodes"]]
    if stored["tree"] != key or [tree.names[n] for n in nodes if n < len(tree.names)] != list(stored["clusters"]):
        raise ValueError(
            f"`cut` must be of the tree in adata.uns[{key!r}]; found {cut!r}, which is of another. Run svt.tl.cut "
            "again."
        )
    return nodes


def _colours_of_cut(adata: AnnData, cut: str, n_clusters: int) -> list[str]:
    """Colour of each cluster, as `scvae_tools.tl.cut` wrote them."""
    stored = [str(colour) for colour in adata.uns.get(f"{cut}_colors", ())]
    return stored if len(stored) == n_clusters else safe_palette(n_clusters) or ["0.4"] * n_clusters


def _values(tree: Tree, values: str | None) -> str:
    """Column whose values stand at the splits."""
    check_choice("values", values, (None, *VALUES))
    is_tested = tree.nodes["p_value"].notna().any()
    if values == "p_value" and not is_tested:
        raise ValueError(
            "`values` can be 'p_value' where the splits of the tree were tested; found no p values. Run "
            "svt.tl.tree(adata, test=...), or pass values='overlap'."
        )
    return values or ("p_value" if is_tested else "overlap")


def _markers(adata: AnnData, key: str | None, n_markers: int) -> dict[str, list[str]]:
    """Top genes of each component that is ranked."""
    ranked = adata.uns.get("rank_components" if key is None else key)
    names = ranked.get("names") if isinstance(ranked, Mapping) else None
    components = getattr(getattr(names, "dtype", None), "names", None)
    if components is None:
        if key is None:
            return {}
        raise ValueError(
            f"`markers` must be the key of a result of svt.tl.rank_components; there is none in adata.uns[{key!r}]. "
            f"Run svt.tl.rank_components(adata, key_added={key!r}) first."
        )
    return {component: [str(gene) for gene in names[component][:n_markers]] for component in components}


def _names_of_ends(drawn: _Drawn, markers: Mapping[str, list[str]]) -> list[str]:
    """Text beside each end: name, number of cells, genes."""
    names, n_cells = drawn.tree.names, drawn.tree.nodes["n_cells"].tolist()
    return [
        "  ".join(filter(None, (f"{names[end]}  ({n_cells[end]:,})", " ".join(markers.get(names[end], ())))))
        for end in drawn.ends
    ]


def _draw_branches(ax: Axes, drawn: _Drawn) -> None:
    """Draw the branch of each node, and the line that joins both children at a split."""
    n_cells = drawn.tree.nodes["n_cells"].to_numpy()
    widths = THIN + (THICK - THIN) * np.sqrt(n_cells / max(n_cells[0], 1))
    for node, height in drawn.height.items():
        colour = drawn.colour.get(node, ABOVE)
        end = drawn.at.get(node, drawn.right)
        ax.plot([drawn.start(node), end], [height] * 2, color=colour, lw=widths[node], solid_capstyle="butt", zorder=2)
        if node in drawn.at:
            heights = [drawn.height[child] for child in drawn.tree.children[node]]
            ax.plot([end, end], heights, color=colour, lw=THIN, solid_capstyle="projecting", zorder=1.5)
    for cluster in drawn.clusters:
        place = drawn.start(cluster), drawn.height[cluster]
        ax.plot(*place, "o", color=drawn.colour[cluster], ms=THICK + 1, mec="0.2", mew=0.6, zorder=3, clip_on=False)


def _write_values(ax: Axes, drawn: _Drawn, column: str) -> None:
    """Write a number above the end of each branch that is split."""
    for node in drawn.splits:
        value = drawn.tree.nodes[column].iloc[node]
        if np.isfinite(value):
            ax.annotate(
                _short(value),
                xy=(drawn.at[node], drawn.height[node]),
                xytext=(-5, 3),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=SMALL,
                color=TEXT,
                zorder=4,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.3},
            )


def _short(value: float) -> str:
    """Write a number with up to three decimals."""
    return f"{value:.3f}".rstrip("0").rstrip(".") if value >= 0.0005 or value == 0 else "<.001"


def _finish_axes(ax: Axes, drawn: _Drawn, names: list[str], values: str) -> None:
    """Write the names at the right, and the number of clusters below."""
    from matplotlib.ticker import MaxNLocator

    ax.set(xlim=(0.5, drawn.right), ylim=(len(names) - 0.4, -0.75))
    ax.yaxis.tick_right()
    ax.tick_params(axis="y", length=0)
    what = "number of clusters" if drawn.has_all_splits else "splits, in order"
    ax.set_xlabel(f"{what}\n({VALUES[values]})", fontsize=FONT + 1)
    if drawn.has_all_splits:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    else:
        ax.set_xticks([])
    ax.tick_params(axis="x", labelsize=FONT)
    ax.spines[["top", "right", "left"]].set_visible(False)
    write_names(ax.yaxis, np.arange(len(names)), names)
