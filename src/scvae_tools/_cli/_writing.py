"""Writing of results into files: the path is checked before the work begins, and no half-written file is left."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from scvae_tools._files import put_back, replacing

if TYPE_CHECKING:
    from pathlib import Path

    from pandas import DataFrame

ADATA = (".h5ad", ".zarr")
TABLE = (".tsv", ".tsv.gz")


def check_output(path: Path | None, *, overwrite: bool, endings: tuple[str, ...] = ()) -> None:
    """Refuse, before any work, a file or folder that could not be written.

    Parameters
    ----------
    path
        File or folder to write; None for none.
    overwrite
        Whether the file or folder may exist.
    endings
        Endings that the name may have; none for any.

    Raises
    ------
    ValueError
        If the name has another ending, the path exists, or its folder does not exist or cannot be written to.
    """
    if path is None:
        return
    if endings and not path.name.endswith(endings):
        raise ValueError(f"The result is written as {' or '.join(endings)}; found {path.name!r}. Name it so.")
    put_back(path)
    if path.exists():
        if not overwrite:
            raise ValueError(f"{str(path)!r} exists already. Pass another name, or --overwrite.")
        if path.is_dir() and path.suffix != ".zarr":
            raise ValueError(f"{str(path)!r} is a folder, which no file can replace. Pass another name.")
        if path.is_dir() and not _is_zarr(path):
            raise ValueError(
                f"{str(path)!r} is a folder that holds no zarr store; it is left alone. Pass another name."
            )
    _check_folder(path.absolute().parent)


def check_model_folder(path: Path | None, *, overwrite: bool) -> None:
    """Refuse, before any work, a folder in which a model could not be saved.

    The files of a model are replaced one by one; other files in the folder are left as they are.
    """
    if path is None:
        return
    if path.exists() and not path.is_dir():
        raise ValueError(f"A model is saved in a folder; {str(path)!r} is a file. Pass another name.")
    if path.exists() and not overwrite:
        raise ValueError(f"{str(path)!r} exists already. Pass another name, or --overwrite.")
    _check_folder(path if path.exists() else path.absolute().parent)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"The folder of the result must exist; there is no {str(folder)!r}. Make it first.")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"The folder of the result must be open for writing; {str(folder)!r} is not.")


def _is_zarr(path: Path) -> bool:
    return any((path / name).exists() for name in ("zarr.json", ".zgroup"))


def write_table(table: DataFrame, path: Path) -> None:
    """Write tab-separated text, compressed if the name ends in .gz."""
    with replacing(path) as temporary:
        table.to_csv(temporary, sep="\t", index=has_names(table))


def has_names(table: DataFrame) -> bool:
    """Whether the index is more than the numbers of the rows."""
    return [str(name) for name in table.index] != [str(row) for row in range(len(table))]
