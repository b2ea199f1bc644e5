"""Writing of an AnnData as h5ad or zarr: whole or not at all, and in types that older packages read too."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from anndata.experimental import write_dispatched
from scipy import sparse

from scvae_tools._files import Sink, replacing
from scvae_tools._on_disk import copy_on_disk, is_on_disk, n_bytes_on_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import zarr
    from anndata import AnnData

#: Attribute of an h5ad file that tells which model it was saved with.
MARK = "scvae_tools_saved_with"


def write_adata(adata: AnnData, path: Path) -> None:
    """Write h5ad or zarr, by the ending, as `write_h5ad` does, but whole or not at all.

    What is in a file, such as the counts of a backed AnnData, is copied from file to file, a block at a time.

    Raises
    ------
    DiskFullError
        If there is no room.
    """
    with replacing(path) as temporary:
        if path.suffix == ".zarr":
            _write(_elements(adata), _new_zarr(temporary), {})
        else:
            write_h5ad(adata, temporary)


def write_h5ad(
    adata: AnnData,
    path: Path,
    *,
    mark: str | None = None,
    as_dense: Sequence[str] = (),
    convert_strings_to_categoricals: bool = True,
    **dataset_options: Any,
) -> None:
    """Write h5ad as ``AnnData.write_h5ad`` does; the AnnData stays as it was, and a full disk is an OSError.

    Strings of pandas 3 are written as plain ones, and zarr in its format 2: else anndata before 0.13 could not write
    again, or not even read, what newer packages have written.

    Parameters
    ----------
    adata, path, as_dense, convert_strings_to_categoricals
        As there; ``as_dense`` may be ``["X"]``.
    mark
        Text that `mark_of` reads.
    **dataset_options
        Of h5py, such as ``compression``.
    """
    elements = _elements(adata, as_dense, categories=convert_strings_to_categoricals)
    with Sink(path) as sink, h5py.File(sink, "w") as file:
        _write(elements, file, dataset_options)
        if mark is not None:
            file.attrs[MARK] = mark


def mark_of(path: Path) -> str | None:
    """Text that `write_h5ad` was given as ``mark``; None if there is none."""
    with h5py.File(path, "r") as file:
        return file.attrs.get(MARK)


def n_bytes_of(adata: AnnData) -> int:
    """Size of the matrices of an AnnData, below that of an h5ad file without compression."""
    layers = [layer for name, layer in adata.layers.items() if name is not None]  # None is X, in anndata 0.13
    matrices = [adata.X, *layers, *adata.obsm.values(), *adata.varm.values(), *adata.obsp.values()]
    if adata.raw is not None and is_on_disk(adata.raw.X):
        matrices.append(adata.raw.X)
    return sum(map(_n_bytes, matrices))


def _n_bytes(matrix: object) -> int:
    if _is_stored(matrix):
        return matrix.n_bytes
    if is_on_disk(matrix):
        return n_bytes_on_disk(matrix)
    parts = (matrix.data, matrix.indices, matrix.indptr) if sparse.issparse(matrix) else (matrix,)
    return sum(getattr(part, "nbytes", 0) for part in parts)


def _elements(adata: AnnData, as_dense: Sequence[str] = (), *, categories: bool = True) -> dict[str, Any]:
    """Parts of the AnnData by their names in files; those that have strings as categories are copies."""
    if set(as_dense) - {"X"}:
        raise ValueError(f"`as_dense` must be empty or ['X']; found {list(as_dense)!r}. Leave the others out.")
    frames = ad.AnnData(obs=adata.obs.copy(), var=adata.var.copy()) if categories else adata
    if categories:
        frames.strings_to_categoricals()
    names = ("obsm", "varm", "obsp", "varp", "layers", "uns")
    mappings = {name: {key: value for key, value in getattr(adata, name).items() if key is not None} for name in names}
    counts = adata.X.toarray() if "X" in as_dense and sparse.issparse(adata.X) else adata.X
    return {"X": counts, "raw": adata.raw, "obs": frames.obs, "var": frames.var} | mappings


def _new_zarr(folder: Path) -> zarr.Group:
    import zarr

    is_old = zarr.__version__.startswith("2.")  # which has no other format
    return zarr.open_group(str(folder), mode="w", **({} if is_old else {"zarr_format": 2}))


def _write(elements: dict[str, Any], group: h5py.Group | zarr.Group, options: Mapping[str, Any]) -> None:
    group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about future formats, which the user cannot change
        for name, value in elements.items():
            # anndata has no writer for counts that stay in a file; they are read and written a block at a time.
            stored = {key: each for key, each in value.items() if _is_stored(each)} if name == "layers" else {}
            if _is_stored(value):
                value.write_to(group, name)
            elif value is not None:
                value = {key: each for key, each in value.items() if key not in stored} if stored else value
                write_dispatched(group, name, value, callback=_write_plain, dataset_kwargs=options)
            for key, each in stored.items():
                each.write_to(group[name], key)


def _is_stored(value: object) -> bool:
    return hasattr(value, "write_to")


def _write_plain(
    write: Callable, group: h5py.Group | zarr.Group, name: str, value: Any, *, dataset_kwargs: Mapping, **_: Any
) -> None:
    """Write an element: strings of pandas as plain ones, or where some are missing as categories; copy one on disk."""
    if is_on_disk(value):
        copy_on_disk(value, group, name)
        return
    if not isinstance(getattr(value, "dtype", None), pd.StringDtype):
        write(group, name, value, dataset_kwargs=dataset_kwargs)
        return
    plain = np.asarray(value, dtype=object)
    plain = pd.Categorical(plain) if pd.isna(plain).any() else plain
    write_dispatched(group, name, plain, callback=_write_plain, dataset_kwargs=dataset_kwargs)
