"""Cut the tree of clusters: another resolution of a trained mixture, without training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvae_tools._checks import check_key, checked
from scvae_tools._data.counts import require_anndata
from scvae_tools._keys import Keys
from scvae_tools._other_names import answers_other_names
from scvae_tools._results.colours import safe_palette, shades
from scvae_tools._results.tree import Tree, in_parts, stored_cells
from scvae_tools._results.writing import require_writable, write

if TYPE_CHECKING:
    from anndata import AnnData


@answers_other_names
@checked()
def cut(
    adata: AnnData,
    *,
    n_clusters: int | None = None,
    max_overlap: float | None = None,
    alpha: float | None = None,
    below: str | None = None,
    tree_key: str = "scvae_tree",
    key_added: str | None = None,
) -> None:
    """Cut the tree of clusters: write another resolution of a trained mixture, without training.

    Give one of ``n_clusters``, ``max_overlap`` and ``alpha``; or ``below``, alone or with one of them.

    Clusters of different cuts nest: of any two, one is within the other, cell by cell, or they share no cell.

    Parameters
    ----------
    adata
        Annotated data with a tree of :func:`scvae_tools.tl.tree` and the results that it was made of; never changed but
        for the keys below.
    n_clusters
        Number of clusters. That of the components gives these.
    max_overlap
        The largest number of clusters of which no two overlap by as much, in nats per cell of the smaller one; 0.1 is
        the limit by which the components are found. Below the components, only the parts of one cluster are compared.
    alpha
        Probability of a split that is none, from 0 to 1: a cluster is split as long as the p value of its split is at
        most ``alpha`` times its share of the cells, as are those above it. The p values are those of the tree.
    below
        Component, or a part of one, by name: the clusters are the components, and only this one is split, in two; with
        another argument, into so many parts, or as far as it says.
    tree_key
        Name of the tree, the ``key_added`` of `tree`.
    key_added
        Name of the result; None for that of the components with ``"_cut"``, or with ``"_R"`` for ``below``, as scanpy
        names clusters that are found in one cluster.

    Returns
    -------
    None. Sets

    ``adata.obs["scvae_cut"]`` : categorical
        Cluster of each cell, by its name in the tree: ``"0+3"`` where components are merged, ``"3,0"`` for a part.
    ``adata.obsm["scvae_cut_probs"]`` : (n_cells, n_clusters) float32
        Probability of each cluster, in the order of the categories: the sum over merged components; that of a part is
        of its parent times p(part|z, parent).
    ``adata.uns["scvae_cut_colors"]``
        Colours by category: a component keeps its own, a merged cluster has that of its largest component, and parts
        have shades of theirs.
    ``adata.uns["scvae_cut"]`` : dict
        ``clusters``, their names; ``nodes``, their numbers in the tree; ``tree``; ``params``.

    `svt.pl.clusters`, `svt.pl.probs`, `ambiguous_cells` and others read the result with ``key="scvae_cut"``.

    Raises
    ------
    TypeError
        If ``adata`` is not an AnnData.
    ValueError
        If there is no tree, or it is of other results than ``adata`` now holds; a number or name is none that the tree
        has; or its splits have no p values, for ``alpha``.

    Notes
    -----
    A cell is in the cluster that holds its most probable component, or the part of this that is more probable. So a
    few cells are not in the cluster of the largest sum of probabilities: that would not nest.

    With ``alpha``, a split of n of all N cells needs p ≤ ``alpha`` (n − 1) / (N − 1), so that the probability of any
    split within what is one cluster is at most ``alpha`` [Meinshausen08]_ [Kimes17]_. N counts the cells of ``below``
    where that is given.

    References
    ----------
    .. [Meinshausen08] Meinshausen (2008) Hierarchical testing of variable importance. Biometrika 95:265,
       doi:10.1093/biomet/asn007.
    .. [Kimes17] Kimes, Liu, Hayes, Marron (2017) Statistical significance for hierarchical clustering. Biometrics
       73:811, doi:10.1111/biom.12647.

    Examples
    --------
    >>> svt.tl.tree(adata)
    >>> svt.tl.cut(adata, n_clusters=5)
    >>> svt.tl.cut(adata, below="3")
    >>> sc.pl.umap(adata, color=["scvae", "scvae_cut", "scvae_R"])
    """
    check_key("key_added", key_added, or_none=True)
    require_anndata(adata)
    wanted = {"n_clusters": n_clusters, "max_overlap": max_overlap, "alpha": alpha}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    _require_one(wanted, below)
    tree = Tree.read(adata, tree_key)
    node = 0 if below is None else _component_named(tree, str(below))
    split = _split(tree, wanted or {"n_clusters": 2}, node)
    if below is not None:
        split |= {each for each in tree.splits if not tree.is_below[each] and each not in tree.components}
        split |= set(tree.above(node)[1:])
    key = tree.params["key"]
    if key_added is None:
        key_added = f"{key}_cut" if below is None else f"{key}_R"
    _require_free(adata, key_added, key, tree_key)
    require_writable(adata)
    clusters = tree.clusters(split)
    probs, latent = _cells(adata, tree, tree_key)
    names = [tree.names[cluster] for cluster in clusters]
    place = tree.cluster_of_leaves(clusters)
    column = adata.obs[tree_key].cat
    code = np.array([place[name] for name in column.categories])[column.codes.to_numpy()]
    params = wanted | ({} if below is None else {"below": str(below)})
    stored = {"clusters": np.array(names, dtype=object), "nodes": np.array(clusters), "tree": tree_key}
    colours = np.array(_colours(adata, tree, clusters, key), dtype=object)
    write(
        adata,
        {
            "obs": {key_added: pd.Categorical.from_codes(code, names)},
            "obsm": {Keys(key_added).probabilities: tree.probabilities(clusters, probs, latent)},
            "uns": {
                key_added: stored | {"params": params},
                f"{key_added}_colors": colours,
                tree_key: dict(adata.uns[tree_key]) | {"cut": key_added},
            },
        },
    )


def _require_one(wanted: Mapping[str, Any], below: str | None) -> None:
    """Raise a ValueError if it is not clear where to cut."""
    if len(wanted) == 1 or (below is not None and not wanted):
        return
    found = ", ".join(f"{name}={value}" for name, value in wanted.items()) or "none of them"
    raise ValueError(
        f"A cut is by one of `n_clusters`, `max_overlap` and `alpha`, or of one component, `below`; found {found}. "
        "Pass, for example, n_clusters=5."
    )


def _component_named(tree: Tree, name: str) -> int:
    """Component, or part of one, of a name; it must be split in the tree."""
    node = tree.node_named(name)
    if not tree.is_below[node] and node not in tree.components:
        raise ValueError(
            f"`below` must name a component, or a part of one, to split; found {name!r}, several components. Pass one "
            f"of {', '.join(repr(tree.names[each]) for each in tree.components_of(node))}."
        )
    if node not in tree.children:
        params, n_cells = tree.params, int(tree.nodes["n_cells"].iloc[node])
        raise ValueError(
            f"`below` must name a component, or a part of one, that the tree splits; found {name!r} with {n_cells:,} "
            f"cells, which it does not: it was made with max_depth={params['max_depth']} and min_cells="
            f"{params['min_cells']}. Run svt.tl.tree with a larger max_depth or a smaller min_cells."
        )
    return node


def _split(tree: Tree, wanted: Mapping[str, Any], node: int) -> set[int]:
    """Nodes that are split, of a node and those below it."""
    ((name, value),) = wanted.items()
    if name == "max_overlap":
        return tree.split_by_overlap(value, node)
    if name == "n_clusters":
        most = len(tree.splits_of(node)) + 1
        if value > most:
            of = f" of {tree.names[node]!r}" if node > 0 else f", {len(tree.components)} components and their parts"
            raise ValueError(
                f"`n_clusters` must be at most {most}, the number of ends of the tree{of}; found {value}. Run "
                f"svt.tl.tree with a larger max_depth than {tree.params['max_depth']} or a smaller min_cells than "
                f"{tree.params['min_cells']}, or train with more components."
            )
        return tree.split_to_number(value, node)
    splits = tree.splits_of(node)
    if splits and tree.nodes["p_value"].iloc[splits].isna().all():
        raise ValueError(
            "`alpha` needs a tree whose splits have p values; found none. Run svt.tl.tree(adata, test=...) with a "
            "function that tests a split, or cut by n_clusters or max_overlap. Above the components, splits have p "
            "values without one if the model was trained without labels, by this version or a later one."
        )
    return tree.split_by_test(value, node)


def _require_free(adata: AnnData, key_added: str, key: str, tree_key: str) -> None:
    """Raise a ValueError if the result would overwrite what is none of a cut."""
    stored = adata.uns.get(key_added)
    is_cut = isinstance(stored, Mapping) and {"tree", "clusters"} <= set(stored)
    if key_added in (key, tree_key) or (stored is not None and not is_cut):
        raise ValueError(
            f"`key_added` must not be the name of another result, which would be lost; found {key_added!r}. Pass "
            f"another, such as key_added='{key}_cut'."
        )


def _cells(adata: AnnData, tree: Tree, tree_key: str) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (n_cells, k) and latent means (n_cells, d) of the results that the tree is of."""
    key = tree.params["key"]
    probs, _, latent = stored_cells(adata, key)
    remedy = f"Run svt.tl.tree(adata, key={key!r}, key_added={tree_key!r}) again."
    column = adata.obs.get(tree_key)
    if not hasattr(column, "cat") or column.isna().any() or not set(column.cat.categories) <= set(tree.names):
        raise ValueError(
            f"adata.obs[{tree_key!r}] must hold the cluster of each cell at the ends of the tree, by name; found other "
            f"values or none. {remedy}"
        )
    shape = len(tree.component_nodes), tree.direction.shape[1]
    is_same = (probs.shape[1], latent.shape[1]) == shape
    if is_same:
        owner = np.array([tree.components_of(tree.node_named(name))[0] for name in column.cat.categories])
        codes = column.cat.codes.to_numpy()
        is_same = all(
            (tree.component_nodes[probs[cells].argmax(1)] == owner[codes[cells]]).all()
            for cells in in_parts(len(codes))
        )
    if not is_same:
        raise ValueError(
            f"The tree in adata.uns[{tree_key!r}] must be of the results under {key!r}; found other probabilities of "
            f"the components than it was made of. {remedy}"
        )
    return probs, latent


def _colours(adata: AnnData, tree: Tree, clusters: list[int], key: str) -> list[str]:
    """Colour of each cluster."""
    column = adata.obs.get(Keys(key).component)
    components = [tree.names[node] for node in tree.components]
    categories = list(map(str, column.cat.categories)) if hasattr(column, "cat") else components
    stored = list(adata.uns.get(f"{key}_colors", ()))
    palette = stored if len(stored) >= len(categories) else safe_palette(len(categories)) or []
    by_name = dict(zip(categories, palette, strict=False))
    n_cells = tree.nodes["n_cells"].tolist()
    owners = [max(tree.components_of(cluster), key=n_cells.__getitem__) for cluster in clusters]
    parts = {}
    for owner in dict.fromkeys(owners):
        parts[owner] = iter(shades(by_name.get(tree.names[owner], "0.6"), owners.count(owner)))
    return [next(parts[owner]) for owner in owners]
