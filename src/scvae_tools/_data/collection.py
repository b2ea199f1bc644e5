"""Collections of annbatch, several AnnData in a zarr group, opened as one AnnData whose counts stay in the files."""

from __future__ import annotations

import re
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import zarr
from anndata.io import read_elem, sparse_dataset

from scvae_tools._checks import checked
from scvae_tools._data.joined import JoinedCounts
from scvae_tools._messages import inform, listed

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Names of the data sets of a collection.
NAME = re.compile(r"dataset_(\d+)")


@checked()
def read_collection(path: str | PathLike[str] | zarr.Group) -> ad.AnnData:
    """AnnData of all cells of a collection that annbatch has written, with the counts left in the files.

    `svt.tl.scvae`, `SCVAE` and `svt.tl.predict` take it as any other large file. annbatch need not be installed: a
    collection is a zarr group that holds the AnnData ``dataset_0``, ``dataset_1``, ...

    Parameters
    ----------
    path
        Folder of the collection, as given to ``annbatch.DatasetCollection``, or its zarr group.

    Returns
    -------
    AnnData with the cells of the data sets one after another. ``X`` and the layers that are stored by cell (CSR) in all
    data sets stay in the files; ``obs`` and ``obsm`` are read. ``var`` has the columns that are the same in all. Other
    parts are left out.

    Raises
    ------
    TypeError
        If ``path`` is no path and no zarr group.
    FileNotFoundError
        If there is no zarr group.
    ValueError
        If it holds no data sets, these have other genes than the first, or their X is not stored by cell.
    """
    if not isinstance(path, str | PathLike | zarr.Group):
        raise TypeError(
            f"`path` must be the folder of a collection of annbatch, or its zarr group; found a {type(path).__name__}."
        )
    group = path if isinstance(path, zarr.Group) else _opened(Path(fspath(path)))
    where = f"The collection {fspath(path)!r}" if not isinstance(path, zarr.Group) else "The collection"
    names = sorted((name for name in group.group_keys() if NAME.fullmatch(name)), key=_number)
    if not names:
        raise ValueError(
            f"{where} must hold the data sets 'dataset_0', 'dataset_1', ... of annbatch.DatasetCollection; found "
            f"{listed(sorted(group.keys()))}. For a single AnnData in zarr see the page on large data."
        )
    sets = {name: group[name] for name in names}
    tables = [_tables(each) for each in sets.values()]
    _check_genes(where, dict(zip(names, tables, strict=True)))
    whole = ad.concat(tables, join="outer", merge="same") if len(tables) > 1 else tables[0]
    _check_by_cell(where, sets)
    joined = ad.AnnData(_joined(list(sets.values()), "X"), obs=whole.obs, var=whole.var, obsm=dict(whole.obsm))
    for layer in sorted(sets[names[0]].get("layers", ())):
        if all(_is_by_cell(each, f"layers/{layer}") for each in sets.values()):
            joined.layers[layer] = _joined(list(sets.values()), f"layers/{layer}")
        else:
            inform("The layer %r is left out, since not all data sets of the collection have it by cell (CSR).", layer)
    return joined


def _number(name: str) -> int:
    return int(NAME.fullmatch(name)[1])


def _opened(path: Path) -> zarr.Group:
    if not path.is_dir():
        raise FileNotFoundError(
            f"`path` must be the folder of a collection of annbatch; found none at {str(path)!r}. Check the path."
        )
    try:
        return zarr.open_group(str(path), mode="r")
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise FileNotFoundError(
            f"`path` must be a collection of annbatch in zarr; found no zarr group in {str(path)!r}. A collection of "
            "h5ad files is not read: write it as zarr, by annbatch.DatasetCollection('....zarr')."
        ) from error


def _tables(group: zarr.Group) -> ad.AnnData:
    obsm = read_elem(group["obsm"]) if "obsm" in group else None
    return ad.AnnData(obs=read_elem(group["obs"]), var=read_elem(group["var"]), obsm=obsm)


def _check_genes(where: str, tables: dict[str, ad.AnnData]) -> None:
    (first, own), *others = tables.items()
    for name, other in others:
        if not other.var_names.equals(own.var_names):
            odd = own.var_names.symmetric_difference(other.var_names)
            found = f"{len(odd):,} genes in one alone, such as {odd[0]!r}" if len(odd) else "another order"
            raise ValueError(
                f"{where} must have the same genes in all data sets; found {found}, of {first!r} and {name!r}. "
                "Write it anew from the files that it was made of, by annbatch.DatasetCollection(...).add_adatas(...)."
            )


def _check_by_cell(where: str, sets: dict[str, zarr.Group]) -> None:
    for name, group in sets.items():
        if not _is_by_cell(group, "X"):
            kind = group["X"].attrs.get("encoding-type") if "X" in group else None
            raise ValueError(
                f"{where} must have X stored by cell (csr_matrix) in each data set; found {kind!r} in {name!r}. "
                "Write it anew with load_adata=, which makes X a CSR matrix of the counts."
            )


def _is_by_cell(group: zarr.Group, name: str) -> bool:
    return name in group and group[name].attrs.get("encoding-type") == "csr_matrix"


def _joined(sets: Sequence[zarr.Group], name: str) -> JoinedCounts:
    return JoinedCounts([sparse_dataset(each[name]) for each in sets])
