"""Tree of clusters: its nodes as they are stored, cuts of it, and the probabilities of the clusters of a cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.special import expit

from scvae_tools._keys import Keys
from scvae_tools._results.probabilities import component_probabilities

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from anndata import AnnData

#: Columns of the table of nodes: of whole numbers, of text, of numbers, of truth values.
COLUMNS = {
    "name": object,
    "parent": np.int64,
    "first": np.int64,
    "second": np.int64,
    "is_component": np.bool_,
    "n_cells": np.int64,
    "n_clusters": np.int64,
    "overlap": np.float64,
    "p_value": np.float64,
}
#: Components whose names a cluster of several is named by; of more, it is named by the first and how many others.
MOST_NAMED = 3
#: Cells whose probabilities are computed at a time.
CELLS_AT_ONCE = 2**16


@dataclass(frozen=True)
class Tree:
    """Binary tree of clusters, from all cells to the parts of components.

    Node 0 is the root. The split that makes n clusters out of n − 1 makes the nodes 2n − 3 and 2n − 2, so that a
    child's number is above its parent's.
    """

    #: A row for each node, by its number as text, with the `COLUMNS`; see `scvae_tools.tl.tree`.
    nodes: pd.DataFrame
    #: Node of each component of the mixture, in the order of the probabilities, (k,).
    component_nodes: np.ndarray
    #: Log odds of the second child below components are direction · z + offset, (n_nodes, d) and (n_nodes,), in nats.
    direction: np.ndarray
    offset: np.ndarray
    #: Arguments of `scvae_tools.tl.tree`.
    params: dict[str, Any]

    # -- storage -------------------------------------------------------------------------------------------------------

    def stored(self) -> dict[str, Any]:
        """Contents of ``uns``, in types that h5ad files hold."""
        rules = {"direction": self.direction, "offset": self.offset}
        return {"nodes": self.nodes, "component_nodes": self.component_nodes, "params": self.params} | rules

    @classmethod
    def read(cls, adata: AnnData, key: str) -> Tree:
        """Tree that `scvae_tools.tl.tree` stored under a key.

        Raises
        ------
        ValueError
            If there is none.
        """
        stored = adata.uns.get(key)
        if not is_tree(stored):
            others = [name for name, value in adata.uns.items() if is_tree(value)]
            found = f"trees are under {others}" if others else "adata holds no tree"
            other = f", or pass that of another, such as {others[0]!r}" if others else ""
            raise ValueError(
                f"There is no tree of clusters in adata.uns[{key!r}]; {found}. Run svt.tl.tree(adata, "
                f"key_added={key!r}) first{other}."
            )
        nodes = pd.DataFrame(stored["nodes"])
        nodes = nodes.assign(**{name: nodes[name].astype(kind) for name, kind in COLUMNS.items()})
        arrays = {name: np.asarray(stored[name]) for name in ("component_nodes", "direction", "offset")}
        return cls(nodes, params=dict(stored["params"]), **arrays)

    # -- nodes ---------------------------------------------------------------------------------------------------------

    @cached_property
    def names(self) -> list[str]:
        """Name of each node."""
        return self.nodes["name"].tolist()

    @cached_property
    def parent(self) -> list[int]:
        """Parent of each node, −1 for the root."""
        return self.nodes["parent"].tolist()

    @cached_property
    def children(self) -> dict[int, tuple[int, int]]:
        """Both children of each node that is split."""
        pairs = zip(self.nodes["first"].tolist(), self.nodes["second"].tolist(), strict=True)
        return {node: pair for node, pair in enumerate(pairs) if pair[0] >= 0}

    @cached_property
    def splits(self) -> list[int]:
        """Nodes that are split, in the order in which they are."""
        return sorted(self.children, key=self.nodes["n_clusters"].tolist().__getitem__)

    def splits_of(self, node: int) -> list[int]:
        """Nodes that are split among a node and those below it, in order."""
        return [each for each in self.splits if node in self.above(each)]

    @cached_property
    def is_below(self) -> list[bool]:
        """Whether each node is a part of a component."""
        found: list[bool] = []
        is_component = self.nodes["is_component"].tolist()
        for parent in self.parent:
            found.append(parent >= 0 and (found[parent] or is_component[parent]))
        return found

    @property
    def components(self) -> list[int]:
        """Nodes that are components."""
        return np.flatnonzero(self.nodes["is_component"]).tolist()

    def above(self, node: int) -> list[int]:
        """Nodes on the way from a node to the root, itself first."""
        way = [node]
        while self.parent[way[-1]] >= 0:
            way.append(self.parent[way[-1]])
        return way

    def leaves_of(self, node: int, is_end: Callable[[int], bool] = lambda node: False) -> list[int]:
        """Nodes below a node, or itself, that are not split or for which ``is_end`` holds; first children first."""
        if node not in self.children or is_end(node):
            return [node]
        return [leaf for child in self.children[node] for leaf in self.leaves_of(child, is_end)]

    def node_named(self, name: str) -> int:
        """Number of the node of a name.

        Raises
        ------
        ValueError
            If there is none.
        """
        if name not in self.names:
            known = [self.names[node] for node in self.components]
            raise ValueError(
                f"There must be a node {name!r} in the tree; found none of that name. Its components are "
                f"{', '.join(map(repr, known[:20]))}{', ...' if len(known) > 20 else ''}; uns[...]['nodes'] has the "
                "names of all nodes."
            )
        return self.names.index(name)

    # -- cuts: sets of nodes that are split, each with all above it ----------------------------------------------------

    def split_to_number(self, n_clusters: int, node: int = 0) -> set[int]:
        """Nodes that are split where there are so many clusters of a node."""
        return set(self.splits_of(node)[: n_clusters - 1])

    def largest_overlaps(self, node: int = 0) -> np.ndarray:
        """Largest overlap of two clusters of a node for each number of them from 1 to the largest, in nats per cell.

        Down to the components it is that of any two, of those two that are merged next. Below, only the parts of one
        node are compared.
        """
        overlap = np.r_[0.0, self.nodes["overlap"].to_numpy()[self.splits_of(node)]]
        n = len(self.components_of(node))
        overlap[n - 1 :] = np.maximum.accumulate(overlap[n - 1 :])
        return overlap

    def split_by_overlap(self, max_overlap: float, node: int = 0) -> set[int]:
        """Nodes that are split for the largest number of clusters of which no two overlap by so much or more."""
        is_small = self.largest_overlaps(node) < max_overlap
        return self.split_to_number(int(np.flatnonzero(is_small)[-1]) + 1, node)

    def split_by_test(self, alpha: float, node: int = 0) -> set[int]:
        """Nodes whose split is significant, as are all from a node down to them.

        The p value of a split is at most α (n − 1) / (N − 1), where n cells are split, of the N of the node. So the
        probability of any split within cells that are one cluster is at most α (Meinshausen 2008,
        doi:10.1093/biomet/asn007; Kimes et al. 2017, doi:10.1111/biom.12647).
        """
        n_cells, p_value = self.nodes["n_cells"].to_numpy(), self.nodes["p_value"].to_numpy()
        level = alpha * (n_cells - 1) / max(n_cells[node] - 1, 1)
        split: set[int] = set()
        for each in self.splits_of(node):
            if p_value[each] <= level[each] and (each == node or self.parent[each] in split):
                split.add(each)
        return split

    def clusters(self, split: Iterable[int]) -> list[int]:
        """Clusters of a cut, by their first component, and the larger of two parts first."""
        split = set(split)
        order = {node: place for place, node in enumerate(dict.fromkeys(self.component_nodes.tolist()))}
        found = self.leaves_of(0, lambda node: node not in split)
        firsts = [min(order[part] for part in self.components_of(node)) for node in found]
        return [found[i] for i in np.argsort(firsts, kind="stable")]

    def components_of(self, node: int) -> list[int]:
        """Components that a node consists of, or the one that it is part of."""
        if self.is_below[node]:
            return [next(each for each in self.above(node) if self.nodes["is_component"].iloc[each])]
        return self.leaves_of(node, lambda each: bool(self.nodes["is_component"].iloc[each]))

    def cluster_of_leaves(self, clusters: list[int]) -> dict[str, int]:
        """Place among the clusters of each leaf, by its name."""
        return {self.names[leaf]: place for place, node in enumerate(clusters) for leaf in self.leaves_of(node)}

    # -- cells ---------------------------------------------------------------------------------------------------------

    def share(self, node: int, latent: np.ndarray) -> np.ndarray:
        """Probability of a part of a component for the cells of the component, (n,) float64, of latent means (n, d)."""
        share = np.ones(len(latent))
        while not self.nodes["is_component"].iloc[node]:
            parent = self.parent[node]
            log_odds = latent @ self.direction[parent] + self.offset[parent]
            share *= expit(log_odds if node == self.children[parent][1] else -log_odds)
            node = parent
        return share

    def probabilities(self, clusters: list[int], probs: np.ndarray, latent: np.ndarray | None) -> np.ndarray:
        """Probability of each cluster, (n_cells, n_clusters) float32.

        Parameters
        ----------
        clusters
            Nodes of a cut.
        probs
            Probability of each component, (n_cells, k).
        latent
            Latent means, (n_cells, d); not read where no cluster is a part of a component.
        """
        found = np.empty((len(probs), len(clusters)), dtype=np.float32)
        columns = [np.flatnonzero(np.isin(self.component_nodes, self.components_of(node))) for node in clusters]
        for cells in in_parts(len(probs)):
            for place, node in enumerate(clusters):
                each = probs[cells][:, columns[place]].sum(1, dtype=np.float64)
                found[cells, place] = each * self.share(node, latent[cells]) if self.is_below[node] else each
        return found


def is_tree(stored: object) -> bool:
    """Whether a value of ``uns`` is a tree of `scvae_tools.tl.tree`."""
    return isinstance(stored, Mapping) and {"nodes", "component_nodes", "direction", "params"} <= set(stored)


def in_parts(n_cells: int) -> Iterator[slice]:
    """Slices of `CELLS_AT_ONCE` cells."""
    for start in range(0, n_cells, CELLS_AT_ONCE):
        yield slice(start, start + CELLS_AT_ONCE)


def name_of_group(names: list[str]) -> str:
    """Name of a cluster of several components."""
    return "+".join(names) if len(names) <= MOST_NAMED else f"{names[0]} and {len(names) - 1} more"


def stored_cells(adata: AnnData, key: str) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Probabilities (n_cells, k), names of the components, and latent means (n_cells, d) of the results under a key.

    Raises
    ------
    ValueError
        If they are not there.
    """
    probs, names = component_probabilities(adata, key)
    slot = Keys(key).latent
    if slot not in adata.obsm:
        raise ValueError(
            f"Clusters are split by the latent means; adata.obsm[{slot!r}] is not among {list(adata.obsm)}. Run "
            f"svt.tl.scvae(adata, key_added={key!r}) or svt.tl.predict(adata, model, key_added={key!r}) again."
        )
    return probs, names, np.asarray(adata.obsm[slot])
