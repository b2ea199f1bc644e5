"""Construction of a model on a private AnnData, and of one without data, for the tools."""

from __future__ import annotations

import copy
import weakref
from typing import TYPE_CHECKING
from uuid import uuid4

import pandas as pd
from anndata import AnnData

from scvae_tools._data.roles import check_obs, columns_in, warn_of_names_of_no_label
from scvae_tools._messages import said_before
from scvae_tools.model._scvae import SCVAE

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse import csr_matrix


def build_model(
    adata: AnnData,
    counts: csr_matrix,
    mask: np.ndarray | None,
    obs_keys: dict,
    options: dict,
    *,
    allow_non_integer: bool,
) -> SCVAE:
    """Build a model on an AnnData of its own, so that the user's holds no trace of scvi-tools and is not kept alive.

    Parameters
    ----------
    adata
        The user's.
    counts
        Of the genes used, (n_cells, n_genes), as `read_counts` returns them.
    mask
        Whether each gene of ``adata`` is used; None for all.
    obs_keys
        Columns of ``obs`` by their roles, as `obs_keys_of` returns them.
    options
        Arguments of `SCVAE`.
    allow_non_integer
        Accept estimated counts.
    """
    check_obs(adata, **obs_keys)
    warn_of_names_of_no_label(adata, obs_keys.get("labels_key"), obs_keys.get("unlabeled_category"))
    names = adata.var_names if mask is None else adata.var_names[mask]
    private = AnnData(counts, obs=adata.obs[columns_in(obs_keys)].copy(), var=pd.DataFrame(index=names))
    with said_before():
        SCVAE.setup_anndata(private, **obs_keys, allow_non_integer=allow_non_integer)
    try:
        return SCVAE(private, **options)
    finally:
        SCVAE._setup_adata_manager_store.pop(private.uns["_scvi_uuid"], None)


def without_data(model: SCVAE) -> SCVAE:
    """Model with the same networks and no cells of its own, as `SCVAE.load` returns one, but that knows its cells."""
    other = copy.copy(model)
    other.id = str(uuid4())
    weakref.finalize(other, SCVAE._per_instance_manager_store.pop, other.id, None)
    other._note_cells()
    other._adata = other._adata_manager = None
    return other
