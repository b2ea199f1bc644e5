"""Checks of the values of counts; every message names the cell and gene at fault, and a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import h5py
import numpy as np
import zarr
from anndata.abc import CSCDataset, CSRDataset
from scipy import sparse

from scvae_tools._data import conversion
from scvae_tools._messages import inform, warn

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData
    from scipy.sparse import csr_matrix

#: Largest count: float32 holds every integer up to here and only some above.
LARGEST_COUNT = 2**24
#: log1p of three million; a non-integer matrix below it looks log-transformed.
LOG_MAXIMUM = 15


class CountsError(ValueError):
    """Error for counts of an AnnData, or genes chosen from it, that cannot be modelled."""


def name_of(layer: str | None) -> str:
    return "adata.X" if layer is None else f"adata.layers[{layer!r}]"


def layer_names(adata: AnnData) -> list[str]:
    return [name for name in adata.layers if name is not None]  # None is X itself since anndata 0.13


@dataclass(frozen=True)
class Found:
    """Counts before the checks, with the names that the user knows them by."""

    counts: csr_matrix
    where: str
    adata: AnnData
    mask: np.ndarray | None
    first_cell: int | None = None  #: place of the first of these cells among all, where they are a part

    def describe(self, is_bad: Callable[[np.ndarray], np.ndarray], kind: str) -> str | None:
        """Say how many stored values are bad, and where the first is; ``None`` if there are none."""
        number, first = 0, -1
        for start in range(0, self.counts.nnz, conversion.BLOCK):
            bad = np.flatnonzero(is_bad(self.counts.data[start : start + conversion.BLOCK]))
            if len(bad) and not number:
                first = start + bad[0]
            number += len(bad)
        if not number:
            return None
        values = "value" if number == 1 else "values, the first"
        least = "" if self.first_cell is None else "at least "
        return f"{least}{number:,} {kind} {values} {self.counts.data[first]:.8g} in {self._place(first)}"

    def _place(self, position: int) -> str:
        row = np.searchsorted(self.counts.indptr, position, side="right") - 1 + (self.first_cell or 0)
        column = self.counts.indices[position]
        genes = self.adata.var_names if self.mask is None else self.adata.var_names[self.mask]
        return f"cell {self.adata.obs_names[row]!r}, gene {genes[column]!r}"


def check_values(found: Found, layer: str | None) -> None:
    """Refuse NaN, infinite, negative and too large values, in this order, as the first may explain the others."""
    _refuse(found, np.isnan, "NaN", "Remove those cells or genes, or read the counts from their source again.")
    _refuse(found, np.isinf, "infinite", "Look for a division by 0, or read the counts from their source again.")
    if (message := found.describe(lambda values: values < 0, "negative")) is not None:
        raise CountsError(
            f"{found.where} must hold counts; found {message}. Has it been scaled (sc.pp.scale) or batch-corrected? "
            f"{_where_counts_are(found.adata, layer)}"
        )
    _refuse(
        found,
        lambda values: values > LARGEST_COUNT,
        "too large",
        f"float32 holds integers exactly up to 2**24 = {LARGEST_COUNT:,}: remove those genes or cells.",
    )


def _refuse(found: Found, is_bad: Callable[[np.ndarray], np.ndarray], kind: str, remedy: str) -> None:
    if (message := found.describe(is_bad, kind)) is not None:
        raise CountsError(f"{found.where} must hold counts; found {message}. {remedy}")


def check_integers(found: Found, layer: str | None, *, allow: bool) -> None:
    """Refuse non-integer values, or warn of them if they are allowed."""
    if found.counts.dtype.kind != "f":
        return
    message = found.describe(lambda values: values != np.rint(values), "non-integer")
    if message is None:
        return
    looks = (
        f"; it looks log-transformed, with a maximum of {found.counts.data.max():.3g}"
        if _looks_log_transformed(found, layer)
        else ""
    )
    if allow:
        text = f"{found.where} holds {message}{looks}. They are modelled as estimated counts (allow_non_integer=True)."
        warn(text)
        return
    raise CountsError(
        f"{found.where} must hold integer counts; found {message}{looks}. {_where_counts_are(found.adata, layer)} "
        "If these are estimated counts (salmon, RSEM, ambient RNA removed), pass allow_non_integer=True."
    )


def _looks_log_transformed(found: Found, layer: str | None) -> bool:
    noted = layer is None and "log1p" in found.adata.uns  # what sc.pp.log1p leaves, for X
    return noted or found.counts.data.max() < LOG_MAXIMUM


def _where_counts_are(adata: AnnData, layer: str | None) -> str:
    """Say in which other place of the AnnData there are integer counts, as far as its first values tell."""
    for name in layer_names(adata):
        if name != layer and _seem_counts(adata.layers[name]):
            return f"adata.layers[{name!r}] holds integer counts: pass layer={name!r}."
    if layer is not None and _seem_counts(adata.X):
        return "adata.X holds integer counts: pass layer=None."
    if adata.raw is not None and _seem_counts(adata.raw.X):
        return "adata.raw holds integer counts: pass adata.raw.to_adata()."
    return "Pass the raw counts, or name the layer that holds them with `layer`."


def _seem_counts(matrix: object) -> bool:
    """Whether the first values are non-negative integers, not all 0."""
    if sparse.issparse(matrix):
        values = matrix.data[:100_000]
    elif isinstance(matrix, np.ndarray | h5py.Dataset | zarr.Array | CSRDataset):
        values = matrix[:50]
    elif isinstance(matrix, CSCDataset):
        values = matrix[:, :50]
    else:
        return False
    values = values.data if sparse.issparse(values) else np.asarray(values)
    if values.dtype.kind not in "buif":
        return False
    return bool(np.any(values > 0) and np.all(values >= 0) and np.all(values == np.rint(values)))


def check_every_cell_has_counts(
    counts: csr_matrix, adata: AnnData, where: str, mask_var: str | np.ndarray | None
) -> None:
    empty = np.flatnonzero(np.diff(counts.indptr) == 0)
    if len(empty) == 0:
        return
    kept = "" if mask_var is None else f" of the {counts.shape[1]:,} kept"
    raise CountsError(
        f"{where} must have at least one count in every cell; found {len(empty):,} of {adata.n_obs:,} cells without a "
        f"count in any gene{kept}: {first_cells(adata, empty)}. {_remedy_for_empty_cells(where, mask_var)}"
    )


def _remedy_for_empty_cells(where: str, mask_var: str | np.ndarray | None) -> str:
    if where == "adata.X" and mask_var is None:
        return "Remove them with sc.pp.filter_cells(adata, min_counts=1)."
    genes = "" if mask_var is None else f"[:, {_mask_code(mask_var)}]"
    return (
        "sc.pp.filter_cells(adata, min_counts=1) looks at all genes of adata.X; remove them with "
        f"adata = adata[np.asarray({where}{genes}.sum(axis=1)).ravel() > 0].copy()"
        + ", or keep more genes."
        * bool(genes)
    )


def _mask_code(mask_var: str | np.ndarray) -> str:
    return f"adata.var[{mask_var!r}].to_numpy()" if isinstance(mask_var, str) else "mask_var"


def log_genes_without_counts(counts: csr_matrix, where: str) -> None:
    number = int(np.count_nonzero(np.asarray(counts.sum(0)) == 0))
    if number:
        inform("%s: %d of %d genes have no count in any cell.", where, number, counts.shape[1])


def first_cells(adata: AnnData, positions: np.ndarray) -> str:
    shown = ", ".join(repr(adata.obs_names[position]) for position in positions[:3])
    return shown + (", ..." if len(positions) > 3 else "")
