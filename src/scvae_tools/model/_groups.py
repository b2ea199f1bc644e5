"""Groups of cells to compare, as scvi-tools takes them, checked before it reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scvae_tools._checks import cell_positions, check_choice
from scvae_tools._data.roles import column_of_obs
from scvae_tools._messages import listed

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from anndata import AnnData


def compared_cells(adata: AnnData, given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the arguments of a comparison of groups, and return those that say which cells it is of.

    Parameters
    ----------
    adata
        Cells.
    given
        Arguments of ``differential_expression`` of scvi-tools by name: ``groupby`` with ``group1`` and ``group2``, or
        ``idx1`` and ``idx2``; and ``mode``.

    Raises
    ------
    ValueError
        If a column, a group or a cell is none of the data, or there are no cells to compare with.
    """
    check_choice("mode", given.get("mode", "vanilla"), ("vanilla", "change"))
    for name in ("batchid1", "batchid2"):
        if given.get(name) is not None and not given.get("batch_correction"):
            raise ValueError(f"`{name}` needs batch_correction=True; found {given[name]!r} without it. Pass both.")
    if given.get("idx1") is not None:
        chosen = {name: given[name] for name in ("idx1", "idx2") if given.get(name) is not None}
        cells = {name: _cells(adata, value, name) for name, value in chosen.items()}
        if "idx2" not in cells and len(np.unique(cells["idx1"])) == adata.n_obs:
            raise ValueError("`idx1` must leave cells to compare with; found all cells in it. Pass fewer.")
        return cells
    if given.get("groupby") is None:
        raise ValueError(
            "A comparison is of groups or of cells; found neither `groupby` nor `idx1`. Pass, for example, "
            f"groupby=... with one of the columns {listed(adata.obs.columns)}."
        )
    return _groups(column_of_obs(adata, given["groupby"], "groupby"), given)


def require_groups(column: pd.Series, groups: list, argument: str) -> None:
    """Refuse groups of which a column of ``obs`` holds no cell."""
    known = used_groups(column)
    if unknown := [group for group in groups if group not in known]:
        raise ValueError(
            f"`{argument}` must name groups that have cells in adata.obs[{column.name!r}]; found {unknown[0]!r}. There "
            f"are {', '.join(map(repr, known[:20]))}{', ...' if len(known) > 20 else ''}."
        )


def used_groups(column: pd.Series) -> list:
    """Groups of a column that have cells, in order."""
    return column.astype("category").cat.remove_unused_categories().cat.categories.tolist()


def _groups(column: pd.Series, given: Mapping[str, Any]) -> dict[str, Any]:
    used, group1, group2 = used_groups(column), given.get("group1"), given.get("group2")
    group1 = used if group1 is None else [group1] if np.isscalar(group1) else list(group1)
    if not group1:
        raise ValueError(f"`group1` must name at least one group of adata.obs[{column.name!r}]; found none.")
    require_groups(column, group1, "group1")
    if group2 is not None:
        require_groups(column, [group2], "group2")
    elif len(used) < 2 and not column.isna().any():
        raise ValueError(
            f"adata.obs[{column.name!r}] (`groupby`) must have cells of two groups to compare; found {used[0]!r} alone."
        )
    return {"group1": group1}


def _cells(adata: AnnData, chosen: Any, name: str) -> np.ndarray:
    """Positions of cells that are given as such, as a mask, or by a query of ``obs``."""
    if not isinstance(chosen, str):
        return cell_positions(chosen, adata.n_obs, name)
    try:
        found = adata.obs.query(chosen).index
    except Exception as error:  # of pandas and Python, by what is wrong in the query
        raise ValueError(
            f"`{name}` must be positions, a mask, or a query of adata.obs with {listed(adata.obs.columns)}; "
            f"found {chosen!r} ({error})."
        ) from error
    return cell_positions(adata.obs_names.isin(found), adata.n_obs, name)
