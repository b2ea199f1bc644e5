"""Writing of results into an AnnData, used by all tools.

What the results of a model are, such as ``obsm["X_scvae"]``, is in ``tl/_results_of_model.py``; their names are in
``_keys.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from scvae_tools._messages import inform
from scvae_tools._results.predictive_check import is_ppc

if TYPE_CHECKING:
    from anndata import AnnData

    from scvae_tools._keys import Keys


def require_writable(adata: AnnData, *, copy: bool = False) -> None:
    """Raise a ValueError if ``adata`` cannot hold results."""
    if adata.isbacked and adata.is_view and not copy:
        raise ValueError(
            "`adata` must be able to hold the results; found a view of a backed AnnData. Pass copy=True, or "
            "adata.to_memory()."
        )


def copy_in_memory(adata: AnnData) -> AnnData:
    """Copy an AnnData in memory; `AnnData.copy` fails with arrays on disk."""
    mappings = (adata.layers, adata.obsm, adata.varm, adata.obsp, adata.varp)
    arrays = [adata.X, *(array for mapping in mappings for key, array in mapping.items() if key is not None)]
    is_on_disk = any(array is not None and not hasattr(array, "copy") for array in arrays)
    return adata.to_memory(copy=True) if adata.isbacked or is_on_disk else adata.copy()


def write(adata: AnnData, results: dict[str, dict[str, Any]]) -> None:
    """Write results, by slot and key; a view becomes an AnnData of its own first."""
    if adata.is_view:
        inform("Received a view of an AnnData. Making a copy of it.")
        adata._init_as_actual(adata.copy())  # what anndata itself does; no public method does it in place
    for slot, values in results.items():
        for key, value in values.items():
            getattr(adata, slot)[key] = value


def write_uns(adata: AnnData, key: str, value: dict) -> None:
    """Write one result into ``uns``."""
    write(adata, {"uns": {key: value}})


def replace_results(adata: AnnData, results: dict[str, dict[str, Any]], keys: Keys) -> None:
    """Write results, and delete results of an earlier model under the same keys that are not overwritten."""
    earlier = adata.uns.get(keys.uns)
    write(adata, results)
    for slot, names in keys.by_model.items():
        for name in names:
            if name not in results.get(slot, {}) and _is_earlier(earlier, adata, slot, name, keys):
                del getattr(adata, slot)[name]


def _is_earlier(earlier: object, adata: AnnData, slot: str, name: str, keys: Keys) -> bool:
    """Whether a result of ours is stored under a name, not a column or entry of the user with the same name."""
    if not (isinstance(earlier, Mapping) and {"params", "history", "version"} <= set(earlier)):
        return False
    noted = {keys.component: "components", keys.fit: "fit"}.get(name) if slot == "obs" else None
    if name not in getattr(adata, slot) or (noted is not None and noted not in earlier):
        return False
    return name != keys.ppc or is_ppc(adata.uns[name])
