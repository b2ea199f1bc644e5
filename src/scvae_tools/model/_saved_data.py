"""Data beside a saved model: written so that a kill leaves the former two or the new two, and read again."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anndata

from scvae_tools._adata_files import mark_of, write_h5ad
from scvae_tools._files import flush, is_abandoned, replacing, take_out, temporary_paths
from scvae_tools.model._saved_file import read_saved

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from anndata import AnnData


def write_beside(
    write_model: Callable[[], None], adata: AnnData, data: Path, model: Path, mark: str, **options: Any
) -> None:
    """Write a model, and data with the mark that its file holds.

    When the file of the model is replaced, the new data are whole in a temporary folder, where `read_beside` finds
    them. Only then do they replace the former ones.

    Parameters
    ----------
    write_model
        Function that replaces the file of the model.
    adata, mark
        Data, and their mark.
    data, model
        Files.
    **options
        Of `write_h5ad`.
    """
    _settle(data, model)
    with replacing(data) as temporary:
        write_h5ad(adata, temporary, mark=mark, **options)
        flush(temporary)
        write_model()  # a full disk leaves the former two


def read_beside(data: Path, model: Path, mark: str | None) -> AnnData | None:
    """Data of a model that was saved with this mark; None if there are none, or those of an earlier model.

    Raises
    ------
    ValueError
        If the file is none, or the data are those of another model.
    """
    if mark is not None and (pending := _pending(data, mark)) is not None:
        return anndata.read_h5ad(pending)
    if not data.exists():
        return None
    remedy = "Save the model again, or pass `adata` to load it with data of your own: it is whole."
    try:
        found = mark_of(data)
        if found in (mark, None):  # none where others have written the file since
            return anndata.read_h5ad(data)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{str(data)!r} must be an AnnData; it cannot be read ({error}). {remedy}") from error
    if mark is None:
        return None
    raise ValueError(
        f"{str(data)!r} must be the data that {model.name} was saved with; found those of another model: one of the "
        f"two was copied. {remedy}"
    )


def _pending(data: Path, mark: str) -> Path | None:
    """Data with a mark that did not get to replace the former ones; None if there are none."""
    for folder in temporary_paths(data):
        with suppress(OSError, KeyError, ValueError):  # still being written, or cut off
            if mark_of(folder / data.name) == mark:
                return folder / data.name
    return None


def _settle(data: Path, model: Path) -> None:
    """Replace data by those of the model beside them, if a process was killed before it had done so."""
    if not temporary_paths(data):
        return
    with suppress(OSError, ValueError):  # no model, or none that can be read
        mark = read_saved(model).attributes.get("data_")
        pending = None if mark is None else _pending(data, mark)
        if pending is not None and is_abandoned(pending.parent):
            take_out(pending, data)
