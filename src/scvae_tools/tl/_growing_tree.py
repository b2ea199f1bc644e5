"""Tree of clusters while it grows: from the root down to the components, and below them."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit, xlogy

from scvae_tools._checks import is_number
from scvae_tools._results.tree import Tree, in_parts, name_of_group
from scvae_tools._threads import considerate_threads
from scvae_tools._train.mixture_start import Split, merges, split_in_two

#: Test of a split: positions of the cells of both children, (n_first,) and (n_second,), to a p value, or NaN for none.
SplitTest = Callable[[np.ndarray, np.ndarray], float]


@dataclass
class _Node:
    """A cluster; see `scvae_tools.tl.tree`."""

    parent: int = -1
    children: tuple[int, int] | None = None
    name: str = ""
    is_component: bool = False
    n_clusters: int = 0
    overlap: float = np.nan
    p_value: float = np.nan
    #: Rule of a split below the components.
    rule: Split | None = None
    #: Places of its components among those that have cells, above the components and for these.
    members: list[int] = field(default_factory=list)


class GrowingTree:
    """Tree that has its components from the start.

    Parameters
    ----------
    probs, latent
        Probabilities of the components (n_cells, k), and latent means (n_cells, d).
    names
        Names of the components.
    """

    def __init__(self, probs: np.ndarray, latent: np.ndarray, names: list[str]) -> None:
        self._latent = latent
        component = probs.argmax(1)
        used = np.unique(component)
        joined = np.searchsorted(used, _joined_components(probs, used))  # place among those with cells, (k,)
        self._probs, self._used = probs, used
        if len(used) < len(names):
            self._probs = np.column_stack([probs[:, joined == i].sum(1) for i in range(len(used))])
        self._nodes = [_Node(members=list(range(len(used))))]
        at = self._split_to_components()
        for node in self._nodes:
            node.is_component = len(node.members) == 1
            node.name = name_of_group([names[used[i]] for i in node.members])
        self._component_nodes = at[joined]
        #: Node without children of each cell, (n_cells,).
        self.node_of_cells = self._component_nodes[component]

    def _split_to_components(self) -> np.ndarray:
        """Make the nodes down to the components, the last merge first, and return the node of each component."""
        at = np.zeros(self._probs.shape[1], dtype=np.int64)
        for first, second, overlap in reversed(merges(self._probs)):
            at[first], at[second] = self._split(int(at[first]), overlap)
        for node, members in ((node, [i]) for i, node in enumerate(at)):
            while node > 0:
                self._nodes[node].members = sorted({*self._nodes[node].members, *members})
                node = self._nodes[node].parent
        return at

    def _split(self, node: int, overlap: float, rule: Split | None = None) -> tuple[int, int]:
        """Give a node two children, and return their numbers."""
        n = len(self._nodes)
        whole = self._nodes[node]
        whole.children, whole.overlap, whole.rule = (n, n + 1), overlap, rule
        whole.n_clusters = 2 + n // 2  # n = 1 + 2 x the splits so far
        self._nodes += [_Node(node), _Node(node)]
        return n, n + 1

    # -- below the components ------------------------------------------------------------------------------------------

    @considerate_threads()
    def split_components(self, max_depth: int, min_cells: int, seed: int) -> None:
        """Split each component and its parts, those whose parts overlap least first."""
        queue: list[tuple[float, int, int, Split]] = []
        found = [(node, 0) for node, each in enumerate(self._nodes) if each.is_component]
        while found or queue:
            for node, depth in found:
                rule = self._rule(node, min_cells, seed) if depth < max_depth else None
                if rule is not None:
                    heapq.heappush(queue, (self._overlap(node, rule), node, depth, rule))
            found = []
            if queue:
                overlap, node, depth, rule = heapq.heappop(queue)
                children = self._split(node, overlap, rule)
                for number, child in enumerate(children):
                    self._nodes[child].name = f"{self._nodes[node].name},{number}"
                cells = np.flatnonzero(self.node_of_cells == node)
                self.node_of_cells[cells] = np.where(_log_odds(rule, self._latent[cells]) > 0, *reversed(children))
                found = [(child, depth + 1) for child in children]

    def _rule(self, node: int, min_cells: int, seed: int) -> Split | None:
        """Best split of the cells of a node."""
        return split_in_two(self._latent[self.node_of_cells == node], min_cells, random_state=seed)

    def _overlap(self, node: int, rule: Split) -> float:
        """Overlap of the two parts of a node in nats per cell of the smaller: Σ p H(r) / min(Σ p r, Σ p (1 − r))."""
        lost, sizes = 0.0, np.zeros(2)
        for cells in in_parts(len(self._latent)):
            log_odds = _log_odds(rule, self._latent[cells])
            whole, second, first = self._probability(node, cells), expit(log_odds), expit(-log_odds)
            # −log expit(t) = log(1 + exp(−t))
            entropy = second * np.logaddexp(0, -log_odds) + first * np.logaddexp(0, log_odds)
            lost += float(whole @ entropy)
            sizes += whole @ first, whole @ second
        return lost / max(sizes.min(), np.finfo(float).tiny)

    def _probability(self, node: int, cells: slice) -> np.ndarray:
        """Probability of a component or a part of it for some cells, (m,) float64."""
        each = self._nodes[node]
        if each.is_component:
            return self._probs[cells, each.members[0]].astype(np.float64)
        whole = self._nodes[each.parent]
        log_odds = _log_odds(whole.rule, self._latent[cells])
        return self._probability(each.parent, cells) * expit(log_odds if node == whole.children[1] else -log_odds)

    # -- what is known of all nodes ------------------------------------------------------------------------------------

    def _cells_of(self) -> list[np.ndarray]:
        """Positions of the cells of each node."""
        order = np.argsort(self.node_of_cells, kind="stable")
        bounds = np.searchsorted(self.node_of_cells[order], np.arange(len(self._nodes) + 1))
        cells = [order[start:end] for start, end in itertools.pairwise(bounds)]
        for node in range(len(self._nodes) - 1, -1, -1):  # children have higher numbers
            if self._nodes[node].children is not None:
                cells[node] = np.sort(np.concatenate([cells[child] for child in self._nodes[node].children]))
        return cells

    def test_splits(self, test: SplitTest) -> None:
        """Test each split, from the root down.

        Raises
        ------
        ValueError
            If the test returns no p value.
        """
        cells = self._cells_of()
        for node in sorted(self._nodes, key=lambda each: each.n_clusters):
            if node.children is not None:
                found = test(*(cells[child] for child in node.children))
                if not is_number(found) or found < 0 or found > 1:
                    raise ValueError(
                        f"`test` must return a p value, a number from 0 to 1, or NaN; found {found!r} for the split of "
                        f"{node.name!r}."
                    )
                node.p_value = float(found)

    def take_p_values(self, p_values: np.ndarray) -> None:
        """Give each split above the components the largest p value of a component on each side, of those (k, k)."""
        own = p_values[np.ix_(self._used, self._used)]
        for node in self._nodes:
            if node.children is not None and len(node.members) > 1:
                first, second = (self._nodes[child].members for child in node.children)
                node.p_value = float(own[np.ix_(first, second)].max())

    def tree(self, params: dict[str, Any]) -> Tree:
        """Tree as it is stored.

        Raises
        ------
        ValueError
            If two nodes have one name.
        """
        nodes = pd.DataFrame(
            {
                "name": np.array([node.name for node in self._nodes], dtype=object),
                "parent": [node.parent for node in self._nodes],
                "first": [-1 if node.children is None else node.children[0] for node in self._nodes],
                "second": [-1 if node.children is None else node.children[1] for node in self._nodes],
                "is_component": [node.is_component for node in self._nodes],
                "n_cells": [len(cells) for cells in self._cells_of()],
                "n_clusters": [node.n_clusters for node in self._nodes],
                "overlap": [node.overlap for node in self._nodes],
                "p_value": [node.p_value for node in self._nodes],
            },
            index=[str(node) for node in range(len(self._nodes))],
        )
        if nodes["name"].duplicated().any():
            name = nodes["name"][nodes["name"].duplicated()].iloc[0]
            raise ValueError(
                f"Clusters of the tree are named by the components, as '0+3' for two that are merged and '3,0' for a "
                f"part; found {name!r} twice. Rename that category of the components."
            )
        direction = np.zeros((len(nodes), self._latent.shape[1]))
        offset = np.zeros(len(nodes))
        for number, node in enumerate(self._nodes):
            if node.rule is not None:
                direction[number], offset[number] = node.rule
        return Tree(nodes, self._component_nodes, direction, offset, params)


def _log_odds(rule: Split, latent: np.ndarray) -> np.ndarray:
    """Log odds of the second part for latent means (m, d), (m,), in nats."""
    return latent @ rule.direction + rule.offset


def _joined_components(probs: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Component with cells that each component counts as, (k,): itself, or the one that it overlaps most."""
    joined = np.arange(probs.shape[1])
    unused = np.setdiff1d(joined, used)
    lost, size = np.zeros((len(unused), len(used))), np.zeros(probs.shape[1])
    for cells in in_parts(len(probs)):
        part = probs[cells].astype(np.float64)
        size += part.sum(0)
        for place, component in enumerate(unused):
            one, others = part[:, [component]], part[:, used]
            lost[place] += (xlogy(one + others, one + others) - xlogy(one, one) - xlogy(others, others)).sum(0)
    overlap = lost / np.minimum(size[unused][:, None], size[used]).clip(min=np.finfo(float).tiny)
    joined[unused] = used[overlap.argmax(1)]
    return joined
