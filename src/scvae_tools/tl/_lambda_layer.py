"""Layer of λ: where it is written, whether it fits into memory, and how it is filled in chunks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scvae_tools._files import require_room
from scvae_tools._interrupts import interrupts_held
from scvae_tools._messages import InterruptedTraining, inform, warn
from scvae_tools._module import memory
from scvae_tools._train.processes import present

if TYPE_CHECKING:
    from collections.abc import Iterator

    import h5py
    from anndata import AnnData

    from scvae_tools.model._scvae import SCVAE

#: λ is dense: it is left out where it would take more than this share of the free memory.
LARGEST_SHARE_OF_MEMORY = 0.25
#: Bytes up to which λ is written unless the user says otherwise: it does not compress, and counts of 5 MB in a file may
#: have λ of 300.
LARGEST_BY_DEFAULT = 192 * 2**20


def require_place_for_rate(adata: AnnData, place: object, *, copy: bool) -> None:
    """Refuse, before any training, a file or an array into which λ cannot be written."""
    if place is None or isinstance(place, bool | np.bool_):
        if place and adata.isbacked and not copy:
            _require_writable_file(adata)
            require_room(Path(adata.filename), _n_bytes(adata))
        return
    rule = f"`write_lambda` must be True, False, None, or an array of shape {adata.shape} that takes rows of float32"
    remedy = f"Pass, for example, zarr.create_array(path, shape={adata.shape}, dtype='float32')."
    try:
        shape, dtype = tuple(place.shape), np.dtype(place.dtype)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        raise ValueError(f"{rule}; found {_kind(place)} without shape or type. {remedy}") from None
    if shape != adata.shape:
        raise ValueError(f"{rule}; found the shape {shape}. {remedy}")
    if dtype.kind != "f" or dtype.itemsize < 4:
        raise ValueError(f"{rule}; found the type {dtype}. {remedy}")
    _require_room_for_array(place)
    try:
        place[0:1] = np.asarray(place[0:1], dtype=dtype)  # stays as it is
    except Exception as error:
        raise ValueError(
            f"{rule}; found {_kind(place)} that takes none ({error}). Open it for writing. {remedy}"
        ) from error


def _require_room_for_array(place: Any) -> None:
    """Refuse an array in a file that has not its full size yet, where the disk has no room for it.

    A write into a memory map, or into HDF5, could end the process.
    """
    if isinstance(place, np.memmap) and place.filename is not None:
        status = Path(place.filename).stat()
        require_room(Path(place.filename), place.nbytes - 512 * getattr(status, "st_blocks", status.st_size))
    elif hasattr(place, "id") and hasattr(place, "file") and place.chunks is None:
        require_room(Path(place.file.filename), place.nbytes - place.id.get_storage_size())


def size_of_rate(adata: AnnData, place: object, *, has_all_genes: bool = True) -> int:
    """Bytes that λ takes in memory, and in a file of results; 0 where it is not written."""
    is_left_out = place is False or (place is None and _why_left_out(adata, has_all_genes=has_all_genes) is not None)
    return 0 if is_left_out else _n_bytes(adata)


def _n_bytes(adata: AnnData) -> int:
    return 4 * adata.n_obs * adata.n_vars


def _require_writable_file(adata: AnnData) -> None:
    if not adata.file.is_open:
        adata.file.open()
    if adata.file["obs"].file.mode == "r":
        raise ValueError(
            "write_lambda=True writes λ into the file of a backed AnnData, which must be open for writing; found "
            f"{adata.filename.name!r} open to be read. Open it with anndata.read_h5ad(path, backed='r+'), or pass "
            "write_lambda=np.empty(adata.shape, 'float32') for λ in memory, an array on disk, or False."
        )


def _kind(value: object) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")


def write_rate(
    adata: AnnData,
    model: SCVAE,
    key: str,
    place: Any,
    *,
    cells: AnnData | None = None,
    gene_places: np.ndarray | None = None,
) -> None:
    """Write λ of all genes, unless it is not wanted or too large, chunk by chunk.

    Parameters
    ----------
    adata
        Where the layer goes.
    model
        Whose λ.
    key
        Name of the layer.
    place
        The argument ``write_lambda`` of the tools.
    cells
        AnnData with the genes of the model, of the cells in ``adata``; None for that of the model.
    gene_places
        Position of each gene of the model among those of ``adata``, −1 where it lacks it; None if they are the same.
    """
    place = bool(place) if isinstance(place, np.bool_) else place
    rows = _rows(model, cells, gene_places, adata.n_vars)
    if (place is False) or (place is None and _is_left_out(adata, key, has_all_genes=gene_places is None)):
        return
    try:
        with interrupts_held() as held, held.let_through():
            _write(adata, key, place, rows)
    except KeyboardInterrupt:
        warn(
            f"layers[{key!r}] is left out: Ctrl-C ended its writing. All other results are written.",
            InterruptedTraining,
        )
        raise


def _write(adata: AnnData, key: str, place: Any, rows: Iterator[np.ndarray]) -> None:
    if place is None or place is True:
        in_file = bool(place) and adata.isbacked
        adata.layers[key] = _rate_in_file(adata, key, rows) if in_file else _rate(adata.shape, rows)
        return
    if isinstance(place, np.ndarray) and not isinstance(place, np.memmap):
        _fill(place, rows)
    else:  # in a file, which one of the processes that have trained together fills
        present().of_first(lambda: _fill(place, rows))
    try:
        # anndata writes plain arrays to files, and no memory maps; the plain one is the same memory.
        adata.layers[key] = np.asarray(place) if isinstance(place, np.ndarray) else place
    except ValueError:
        inform("λ is in the array passed as `write_lambda` alone: AnnData takes no %s as a layer.", _kind(place))


def _why_left_out(adata: AnnData, *, has_all_genes: bool) -> str | None:
    """Reason not to write λ by default; None if there is none."""
    n_bytes, free = _n_bytes(adata), _free_memory()
    if not has_all_genes:
        return "it would hold NaN for the genes that `mask_var` leaves out"
    if n_bytes > LARGEST_SHARE_OF_MEMORY * free:
        return f"it would take {_size(n_bytes)}, more than a quarter of the {_size(free)} of free memory"
    if n_bytes > LARGEST_BY_DEFAULT:
        most = _size(LARGEST_BY_DEFAULT)
        return f"it is dense and would take {_size(n_bytes)}, in files too (by default at most {most})"
    return None


def _is_left_out(adata: AnnData, key: str, *, has_all_genes: bool) -> bool:
    """Whether λ is not to be written by default; warn if so."""
    reason = _why_left_out(adata, has_all_genes=has_all_genes)
    if reason is None:
        return False
    warn(
        f"layers[{key!r}] is left out: {reason}. Pass write_lambda=True to write it all the same (of a backed AnnData "
        "into its file), write_lambda=False to say that it is not needed, an array on disk to write it there (zarr, "
        "h5py, or a memory map of NumPy), or call model.get_lambda(indices=..., gene_list=...) for a part, with the "
        "model that return_model=True returns."
    )
    return True


def _rate(shape: tuple[int, int], rows: Iterator[np.ndarray]) -> np.ndarray:
    rate = np.empty(shape, dtype=np.float32)
    _fill(rate, rows)
    return rate


def _rate_in_file(adata: AnnData, key: str, rows: Iterator[np.ndarray]) -> h5py.Dataset:
    """Write λ into the layers of a backed AnnData's file, in the format of anndata."""
    import h5py

    require_room(Path(adata.filename), _n_bytes(adata))  # HDF5 could end the process
    # A handle of its own: `AnnData.write` closes that of the AnnData before it reads the layers.
    file = h5py.File(adata.file["obs"].file.id.reopen())
    layers = file.require_group("layers")
    for name, value in {"encoding-type": "dict", "encoding-version": "0.1.0"}.items():
        layers.attrs.setdefault(name, value)
    # Without a name until it is complete: after an interruption nothing is left of it.
    rate = file.create_dataset(None, shape=adata.shape, dtype=np.float32)
    rate.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    _fill(rate, rows)
    if key in layers:
        del layers[key]
    layers[key] = rate
    file.flush()
    return layers[key]


def _fill(rate: Any, rows: Iterator[np.ndarray]) -> None:
    """Write λ into an array by slices of rows."""
    start = 0
    for part in rows:
        rate[start : start + len(part)] = part
        start += len(part)


def _rows(model: SCVAE, cells: AnnData | None, gene_places: np.ndarray | None, n_genes: int) -> Iterator[np.ndarray]:
    """λ of all genes, (n_cells of a part, n_genes); NaN for genes that the model does not have."""
    # A part of the memory: zarr holds several copies of what it is given.
    rows_at_once = max(1, memory.CHUNK_BYTES // (4 * 4 * n_genes))
    for chunk in model.iter_lambda(cells):
        for at in range(0, len(chunk), rows_at_once):
            rows = chunk[at : at + rows_at_once]
            yield rows if gene_places is None else among_all_genes(rows, gene_places, n_genes)


def among_all_genes(values: np.ndarray, gene_places: np.ndarray, n_genes: int) -> np.ndarray:
    """Values of the genes of a model, (n, n_genes of the model), among all genes, (n, n_genes); NaN for the others."""
    known = gene_places >= 0
    full = np.full((len(values), n_genes), np.nan, dtype=np.float32)
    full[:, gene_places[known]] = values[:, known]
    return full


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:.3g} MiB" if n_bytes < 2**30 else f"{n_bytes / 2**30:.1f} GiB"


def _free_memory() -> int:
    import psutil

    return psutil.virtual_memory().available
