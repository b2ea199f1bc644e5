"""Stored results of posterior predictive checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from scvae_tools._keys import Keys

if TYPE_CHECKING:
    from anndata import AnnData

#: Statistics of each gene that are compared.
STATISTICS = ("mean", "variance", "share_of_zeros")


def find_ppc(adata: AnnData, key: str) -> Mapping[str, Any]:
    """Return the result that `ppc` stored, by its ``key`` or, if it was given one, its ``key_added``.

    Raises
    ------
    ValueError
        If there is no such result.
    """
    for name in (Keys(key).ppc, key):
        if is_ppc(adata.uns.get(name)):
            return adata.uns[name]
    stored = sorted(name for name, value in adata.uns.items() if is_ppc(value))
    found = f"adata.uns holds those under {', '.join(map(repr, stored))}" if stored else "adata.uns holds none"
    other = f", or pass key={stored[0]!r}" if stored else ""
    raise ValueError(
        f"There is no posterior predictive check under adata.uns[{Keys(key).ppc!r}]; {found}. Run "
        f"svt.tl.ppc(adata, model, key={key!r}) first{other}."
    )


def is_ppc(value: object) -> bool:
    return isinstance(value, Mapping) and "share_of_zeros_model" in getattr(value.get("genes"), "columns", ())
