"""The AnnData at both ends of `scvae_tools.tl`: a private one for the model, and results into the user's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from scvae_tools._messages import inform, said_before

if TYPE_CHECKING:
    import numpy as np
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from scvae_tools.model import SCVAE


def build_model(
    adata: AnnData,
    counts: csr_matrix,
    mask: np.ndarray | None,
    obs_keys: dict,
    options: dict,
    *,
    allow_non_integer: bool,
) -> SCVAE:
    """Make a model of a private AnnData, so that the user's holds no trace of scvi-tools and is not kept alive."""
    from anndata import AnnData as PrivateData

    from scvae_tools._counts import check_obs
    from scvae_tools.model import SCVAE

    check_obs(adata, **obs_keys)
    by_role = [value for role, value in obs_keys.items() if value and role != "unlabeled_category"]
    columns = [key for value in by_role for key in ([value] if isinstance(value, str) else value)]
    names = adata.var_names if mask is None else adata.var_names[mask]
    obs = adata.obs[list(dict.fromkeys(columns))].copy()
    private = PrivateData(counts, obs=obs, var=pd.DataFrame(index=names))
    with said_before():
        SCVAE.setup_anndata(private, **obs_keys, allow_non_integer=allow_non_integer)
    try:
        return SCVAE(private, **options)
    finally:
        SCVAE._setup_adata_manager_store.pop(private.uns["_scvi_uuid"], None)


def write(adata: AnnData, results: dict[str, dict[str, Any]]) -> None:
    """Write results, by slot and key; a view becomes an AnnData of its own first."""
    if adata.is_view:
        inform("Received a view of an AnnData. Making a copy of it.")
        adata._init_as_actual(adata.copy())
    for slot, values in results.items():
        for key, value in values.items():
            getattr(adata, slot)[key] = value


def write_uns(adata: AnnData, key: str, value: dict) -> None:
    """Write one result into ``uns``."""
    write(adata, {"uns": {key: value}})
