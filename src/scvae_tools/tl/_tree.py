"""Build the tree of clusters of a trained mixture: components merged up to one, and split further below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scvae_tools._checks import check_key, check_random_source, checked
from scvae_tools._keys import Keys
from scvae_tools._other_names import answers_other_names
from scvae_tools._random import as_seed
from scvae_tools._results.tree import stored_cells
from scvae_tools._results.writing import require_writable, write
from scvae_tools.tl._growing_tree import GrowingTree
from scvae_tools.tl._models import components_of, find_model

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

    from scvae_tools.model._scvae import SCVAE
    from scvae_tools.tl._growing_tree import SplitTest


@answers_other_names
@checked(random_state=check_random_source)
def tree(
    adata: AnnData,
    model: SCVAE | str | Path | None = None,
    *,
    key: str = "scvae",
    max_depth: int = 2,
    min_cells: int = 20,
    test: SplitTest | None = None,
    random_state: int | np.random.RandomState | np.random.Generator | None = 0,
    key_added: str = "scvae_tree",
) -> None:
    """Build the tree of clusters of a trained mixture, which `cut` cuts into fewer or more clusters without training.

    Above the components, the two clusters that overlap most become one until one is left: the rule by which the
    components were found. Below, each component is split in two in the latent space, and its parts again.

    Parameters
    ----------
    adata
        Annotated data with the results of :func:`scvae_tools.tl.scvae` or `predict`: the components of the model in
        ``adata.obs[key]``, their probabilities and the latent means in ``obsm``; never changed but for the keys below.
    model
        Trained `SCVAE` with a mixture, or the folder where one is saved, which must be that of the results: it names
        their components. None for the names in ``adata.obs[key]``; no model is needed, as after reading a file.
    key
        Key of the results, the ``key_added`` of `scvae`.
    max_depth
        How often a component is split at most, 0 for not at all: it has up to 2^``max_depth`` parts.
    min_cells
        Smallest number of cells of a part of a component.
    test
        Function that tests a split. It is called with the positions of the cells of both children in ``adata``, whole
        numbers (n_first,) and (n_second,), and returns a p value, from 0 to 1, or NaN for none. None for the p values
        of valleys by which the components were found (`SCVAE.valley_p_values_`), where the results have them.
    random_state
        Seed, or generator to draw one from. The global random states are left as they were.
    key_added
        Name of the result.

    Returns
    -------
    None. Sets

    ``adata.obs["scvae_tree"]`` : categorical
        The cluster of the cell at the ends of the tree, by name. A cell is in a part of its most probable component.
    ``adata.uns["scvae_tree"]`` : dict
        ``nodes``, the table below; ``component_nodes``, the node of each component (k,); ``direction`` and ``offset``
        of the splits below components, (n_nodes, n_latent) and (n_nodes,): the log odds of the second child are
        direction · z + offset; ``params``.

    A row of ``nodes``, indexed by the number of the node as text, is a cluster:

    ``name``
        Component; ``"0+3"`` for two or three that are merged, ``"0 and 4 more"`` for more; ``"3,0"`` and ``"3,1"`` for
        the parts of component ``"3"``, the larger one first.
    ``parent``, ``first``, ``second``
        Numbers of parent and children, −1 where there is none.
    ``is_component``
        Whether it is a component of the mixture.
    ``n_cells``
        Number of cells.
    ``n_clusters``
        Number of clusters that there are once this one is split, 0 if it is not.
    ``overlap``
        Overlap of its children in nats per cell of the smaller one, NaN where there are none: 0 if they share no cell,
        2 log 2 if they are two halves of one (docs/clustering.md).
    ``p_value``
        Of its split: the result of ``test``; or, above the components, the largest p value of a component of the one
        child and one of the other, the probability that these are one population. NaN without.

    Raises
    ------
    TypeError
        If ``adata`` is not an AnnData, ``model`` not an `SCVAE` or ``test`` no function.
    ValueError
        If the results are not there or not those of the model, an argument is out of range, or ``test`` returns no p
        value.

    Notes
    -----
    Overlaps are of q(y|x) of all cells. The probability of a merged cluster is the sum of those of its components; that
    of a part is that of its parent times p(part|z, parent), by the mixture of two Gaussians with one covariance that
    splits the parent. Below the components the split whose parts overlap least comes first. Every component is split if
    it has the cells: that a split is there does not say that it is real, its overlap and p value do.

    Components that are no cell's most probable one are no nodes: their probability is added to the component that they
    overlap most.

    Splits are fitted to 4,000 cells of a cluster at most, in 16 runs as at the start of the mixture.

    Examples
    --------
    >>> svt.tl.tree(adata)
    >>> svt.pl.tree(adata)
    >>> svt.tl.cut(adata, n_clusters=5)
    """
    check_key("key_added", key_added)
    probs, latent, names = _cells(adata, model, key)
    if test is not None and not callable(test):
        raise TypeError(
            f"`test` must be a function of the cells of both children, or None; found a {type(test).__name__}."
        )
    if key_added == key:
        raise ValueError(f"`key_added` must not be the key of the results themselves; found {key!r} for both.")
    require_writable(adata)
    seed = as_seed(random_state, None)
    growing = GrowingTree(probs, latent, names)
    growing.split_components(max_depth, min_cells, seed)
    if test is not None:
        growing.test_splits(test)
    elif (p_values := _valley_p_values(adata, key, probs.shape[1])) is not None:
        growing.take_p_values(p_values)
    found = growing.tree({"key": key, "max_depth": max_depth, "min_cells": min_cells, "random_state": seed})
    leaves = found.leaves_of(0)
    place = np.zeros(len(found.nodes), dtype=np.int64)
    place[leaves] = np.arange(len(leaves))
    column = pd.Categorical.from_codes(place[growing.node_of_cells], [found.names[leaf] for leaf in leaves])
    write(adata, {"obs": {key_added: column}, "uns": {key_added: found.stored()}})


def _valley_p_values(adata: AnnData, key: str, n_components: int) -> np.ndarray | None:
    """P values of each two components, (k, k), as the results have them; None where they have none of these."""
    summary = adata.uns.get(Keys(key).uns)
    components = summary.get("components") if isinstance(summary, Mapping) else None
    found = components.get("valley_p_values") if isinstance(components, Mapping) else None
    is_of_these = isinstance(found, np.ndarray) and found.shape == (n_components, n_components)
    return found if is_of_these and np.issubdtype(found.dtype, np.floating) else None


def _cells(adata: AnnData, model: SCVAE | str | Path | None, key: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Probabilities (n_cells, k), latent means (n_cells, d), and names of the components."""
    if model is not None:
        model = find_model(adata, model, key)
        components_of(adata, model, key)
    probs, names, latent = stored_cells(adata, key)
    if model is None:
        return probs, latent, names
    if probs.shape[1] != len(model.components):
        raise ValueError(
            f"`model` must be that of the results in adata, with {probs.shape[1]} components; found one with "
            f"{len(model.components)}. Leave it out, or run svt.tl.predict(adata, model, key_added={key!r}) first."
        )
    return probs, latent, list(model.components)
