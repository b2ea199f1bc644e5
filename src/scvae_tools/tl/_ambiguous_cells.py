"""List the cells whose most probable component is not clearly theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.special import entr

from scvae_tools._results.probabilities import ambiguous_positions, component_probabilities, two_most_probable

if TYPE_CHECKING:
    from anndata import AnnData


def ambiguous_cells(adata: AnnData, *, key: str = "scvae", threshold: float = 0.9) -> pd.DataFrame:
    """List the cells whose most probable component is not clearly theirs.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scvae_tools.tl.scvae`, with a mixture.
    key
        Key of the result, the ``key_added`` of :func:`scvae_tools.tl.scvae`.
    threshold
        A cell is ambiguous if the probability of its most probable component is below; above 0 and up to 1.

    Returns
    -------
    One row per ambiguous cell, the least certain first, indexed by ``adata.obs_names``, with columns

    ``first``, ``second`` : categorical
        The two most probable components, by their names in ``adata.obs[key]``.
    ``probability``, ``second_probability`` : float
        Their probabilities.
    ``entropy`` : float
        −Σ p log p over all components, in nats: 0 for a certain cell, log k for one that may be in any of k.

    Raises
    ------
    ValueError
        If the result is not there or holds no probabilities, or if ``threshold`` is not above 0 and up to 1.

    Examples
    --------
    >>> svt.tl.scvae(adata)
    >>> svt.tl.ambiguous_cells(adata).head()
    >>> adata.obs["is_ambiguous"] = adata.obs_names.isin(svt.tl.ambiguous_cells(adata).index)
    """
    probs, names = component_probabilities(adata, key)
    cells = ambiguous_positions(probs, threshold)
    cells = cells[np.argsort(probs[cells].max(1), kind="stable")]
    first, second = two_most_probable(probs[cells])
    each = np.arange(len(cells))
    few = probs[cells].astype(np.float64)  # only of these cells, of which there are few among a million
    return pd.DataFrame(
        {
            "first": pd.Categorical.from_codes(first, names),
            "probability": few[each, first],
            "second": pd.Categorical.from_codes(second, names),
            "second_probability": few[each, second],
            "entropy": entr(few).sum(1),
        },
        index=adata.obs_names[cells],
    )
