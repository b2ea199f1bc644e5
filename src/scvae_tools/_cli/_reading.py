"""Reading of files of counts into AnnData: one reader for each format, which is found by the name or the content."""

from __future__ import annotations

import csv
import gzip
import warnings
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata
import h5py
import numpy as np
import pandas as pd
import psutil
from anndata import AnnData
from anndata.abc import CSCDataset
from scipy import sparse

from scvae_tools._data import stored
from scvae_tools._data.structure import check_structures
from scvae_tools._files import in_words, put_back
from scvae_tools._messages import inform, listed
from scvae_tools._on_disk import (
    is_on_disk,
    is_present_format,
    matrices_in,
    missing_chunks,
    n_bytes_on_disk,
    open_adata,
    open_file,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Word to pass in place of a file, for the 700 cells that scanpy ships.
DEMO = "demo"
CELLS_BY_GENES, GENES_BY_CELLS = ORIENTATIONS = ("cells-by-genes", "genes-by-cells")
#: Values of a text or loom file that are in memory at once as a dense block: 128 MB as float32.
BLOCK_VALUES = 2**25
GENES_AND_CELLS = ("genes", "cells")
TEXT = {".csv": ",", ".tsv": "\t", ".txt": "\t", ".tab": "\t"}
MATRIX = "matrix.mtx"


class ReadingError(ValueError):
    """Error for a file that cannot be read; the message says why."""


def read(
    path: str | Path, *, orientation: str | None = None, genome: str | None = None, may_stay: bool = False
) -> AnnData:
    """Read counts from a file or a folder.

    Parameters
    ----------
    path
        File or folder in one of the formats of ``READERS``; or ``"demo"``, for `scvae_tools.datasets.pbmc68k_reduced`
        (a file of that name is ``"./demo"``).
    orientation
        Orientation of a text file: ``"cells-by-genes"``, also for None, or ``"genes-by-cells"``. It is never guessed.
    genome
        Genome to take where 10x Genomics files hold several.
    may_stay
        Whether X, layers and raw of an h5ad or zarr file stay there, if they are large (`stored.LARGEST_WHOLE`).

    Returns
    -------
    Cells x genes, with unique names; CSR unless an h5ad or zarr file holds them otherwise.

    Raises
    ------
    FileNotFoundError
        If there is nothing of that name.
    ReadingError
        If the file cannot be read; the message says why.
    """
    if str(path) == DEMO:
        from scvae_tools.datasets._pbmc import pbmc68k_reduced

        return pbmc68k_reduced()
    path = Path(path)
    put_back(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no {str(path)!r}. Pass a file or folder of counts, or {DEMO!r}.")
    kind = format_of(path)
    options = _options_of(kind, orientation, genome) | ({"may_stay": may_stay} if kind in ("h5ad", "zarr") else {})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # names that are not unique are dealt with here
            adata = READERS[kind](path, **options)
            check_structures(adata, ReadingError)
    except ReadingError:
        raise
    except Exception as error:
        raise ReadingError(f"{str(path)!r} cannot be read as {kind}: {error}") from error
    _make_unique(adata)
    inform("Read %s as %s: %s cells x %s genes.", path, kind, f"{adata.n_obs:,}", f"{adata.n_vars:,}")
    return adata


def format_of(path: Path) -> str:
    """Key of ``READERS`` for a file or a folder.

    Raises
    ------
    ReadingError
        If the file is in none of the formats.
    """
    if path.is_dir():
        is_zarr = any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zattrs"))
        return "zarr" if is_zarr else "mtx"
    if h5py.is_hdf5(path):
        return _format_of_hdf5(path)
    name = path.name.removesuffix(".gz")
    if name.endswith(".mtx"):
        return "mtx"
    if Path(name).suffix in TEXT:
        return "text"
    raise ReadingError(
        f"The format of a file must be known; found {path.name!r}, which is no HDF5 file and has none of the endings "
        f"{', '.join([*TEXT, '.mtx'])} (with .gz or without). Convert it to h5ad with scanpy, or unpack it."
    )


def _format_of_hdf5(path: Path) -> str:
    try:
        file = h5py.File(path)
    except OSError as error:
        raise ReadingError(
            f"{str(path)!r} cannot be opened: {error}. It may be cut short or in use: copy it from its source again."
        ) from error
    with file:
        if "row_attrs" in file:
            return "loom"
        if isinstance(file.get("matrix"), h5py.Group) or _genomes(file):
            return "10x h5"
        if "obs" in file and "var" in file:
            return "h5ad"
        found = listed(file)
    raise ReadingError(
        f"An HDF5 file must be an h5ad file, one of 10x Genomics, or a loom file; {str(path)!r} holds {found}. Convert "
        "it to h5ad with scanpy."
    )


def _options_of(kind: str, orientation: str | None, genome: str | None) -> dict[str, Any]:
    """Arguments of the reader; refuse those that mean nothing to it."""
    if orientation is not None and kind != "text":
        raise ReadingError(f"The orientation is asked of text alone; found {kind}, which tells it. Leave it out.")
    if genome is not None and kind not in ("10x h5", "mtx"):
        raise ReadingError(f"The genome is asked of files of 10x Genomics alone; found {kind}. Leave it out.")
    if kind == "text":
        return {"is_transposed": orientation == GENES_BY_CELLS}
    return {"genome": genome} if kind in ("10x h5", "mtx") else {}


def _make_unique(adata: AnnData) -> None:
    for axis, names in (("genes", adata.var_names), ("cells", adata.obs_names)):
        if not names.is_unique:
            inform("The names of the %s are not unique: -1, -2, ... is appended to %s.", axis, _repeated(names))
    adata.var_names_make_unique()
    adata.obs_names_make_unique()


def _repeated(names: pd.Index) -> str:
    return listed(names[names.duplicated()].unique())


# -- AnnData -----------------------------------------------------------------------------------------------------------


def _read_anndata(path: Path, *, may_stay: bool) -> AnnData:
    """Read an h5ad or zarr file, but for its matrices where they are large and may stay in it."""
    file = open_file(path)
    is_known = is_present_format(file)
    matrices = matrices_in(file) if is_known else {}
    for name, matrix in matrices.items():
        if (lacking := missing_chunks(matrix)) is not None:
            raise ReadingError(f"{name} must be complete; found {lacking}. Copy it from its source again.")
    n_bytes = sum(map(stored.n_bytes_as_csr, matrices.values()))
    if not may_stay or n_bytes <= stored.LARGEST_WHOLE:
        if isinstance(file, h5py.File):
            file.close()
        return anndata.read_h5ad(path) if path.is_file() else anndata.read_zarr(path)
    matrices = {name: matrix for name, matrix in matrices.items() if not _is_read_whole(matrix)}
    adata = open_adata(file, matrices)
    inform(
        "%s of %s stay in the file and are read in parts, since they are large, %s as CSR. --in-memory reads them all.",
        listed(matrices),
        path.name,
        in_words(n_bytes),
    )
    return adata


def _is_read_whole(matrix: Any) -> bool:
    """Whether a matrix is stored by gene, so that cells cannot be read from it, and there is room for it in memory."""
    return isinstance(matrix, CSCDataset) and 4 * n_bytes_on_disk(matrix) < psutil.virtual_memory().available


def from_raw(adata: AnnData) -> AnnData:
    """AnnData of the counts in ``adata.raw`` and their genes; they stay in the file if they are there."""
    raw = adata.raw
    if not is_on_disk(raw.X):
        return raw.to_adata()
    mappings = {name: dict(getattr(adata, name)) for name in ("obsm", "obsp", "uns")}
    return AnnData(raw.X, obs=adata.obs.copy(), var=raw.var.copy(), varm=dict(raw.varm), **mappings)


# -- 10x Genomics ------------------------------------------------------------------------------------------------------


def _genomes(file: h5py.File) -> list[str]:
    """Groups of a file of Cell Ranger 1 or 2, one for each genome."""
    return [
        name for name, group in file.items() if isinstance(group, h5py.Group) and {"barcodes", "indptr"} <= {*group}
    ]


def _read_10x_h5(path: Path, genome: str | None) -> AnnData:
    import scanpy as sc

    with h5py.File(path) as file:
        genomes = _genomes(file) if "matrix" not in file else []
    if genomes:
        genome = _chosen_genome(genomes, genome, path)
    adata = sc.read_10x_h5(path, genome=genome, gex_only=False)
    check_structures(adata, ReadingError)
    return _gene_expression(adata)


def _chosen_genome(genomes: list[str], genome: str | None, path: Path) -> str:
    if genome in genomes:
        return genome
    if genome is None and len(genomes) == 1:
        return genomes[0]
    found = "no `--genome`" if genome is None else f"`--genome {genome}`"
    raise ReadingError(f"`--genome` must be one of those in {str(path)!r}, {listed(genomes)}; found {found}.")


def _read_mtx(path: Path, genome: str | None) -> AnnData:
    """Read a folder of a matrix with genes in rows, its features and its barcodes, as of Cell Ranger and STARsolo."""
    from scipy.io import mmread

    matrix = path if path.is_file() else _matrix_of(path, genome)
    prefix = matrix.name.removesuffix(".gz").removesuffix(MATRIX)
    features = _read_names(_beside(matrix, prefix, "features.tsv", "genes.tsv"))
    barcodes = _read_names(_beside(matrix, prefix, "barcodes.tsv"))
    counts = sparse.csr_matrix(mmread(matrix).T, dtype=np.float32)
    if counts.shape != (len(barcodes), len(features)):
        raise ReadingError(
            f"The matrix must have a column for each barcode and a row for each feature; {str(matrix)!r} has "
            f"{counts.shape[0]:,} and {counts.shape[1]:,}; there are {len(barcodes):,} barcodes and {len(features):,} "
            "features."
        )
    adata = AnnData(counts, obs=pd.DataFrame(index=barcodes[0].to_numpy()), var=_described(features))
    return _gene_expression(adata)


def _matrix_of(folder: Path, genome: str | None) -> Path:
    """Path of the matrix in a folder, or in its subfolder that is named by the genome."""
    found = _matrices(folder)
    if not found:
        by_genome = {each.name: each for each in sorted(folder.iterdir()) if each.is_dir() and _matrices(each)}
        if not by_genome:
            raise ReadingError(
                f"A folder must hold a zarr store or a {MATRIX} (or .gz) with its features and barcodes; found neither "
                f"in {str(folder)!r}. Pass the folder with the matrix."
            )
        found = _matrices(by_genome[_chosen_genome(list(by_genome), genome, folder)])
    if len(found) > 1:
        raise ReadingError(
            f"A folder must hold one matrix; found {listed(file.name for file in found)} in {str(folder)!r}. Pass one "
            "of these files."
        )
    return found[0]


def _matrices(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.name.removesuffix(".gz").endswith(MATRIX))


def _beside(matrix: Path, prefix: str, *names: str) -> Path:
    """Path of the first of several files that exists beside the matrix, compressed or not."""
    candidates = [matrix.with_name(f"{prefix}{name}{end}") for name in names for end in (".gz", "")]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise ReadingError(
        f"Beside {str(matrix)!r} there must be {' or '.join(f'{prefix}{name}' for name in names)} (or .gz); found none."
    )


def _read_names(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t", header=None, dtype=str, na_filter=False, quoting=csv.QUOTE_NONE)


def _described(features: pd.DataFrame) -> pd.DataFrame:
    """``var`` from the columns ID, name and type, of which the last two may be missing."""
    var = pd.DataFrame({"gene_ids": features[0].to_numpy()}, index=features[min(1, features.shape[1] - 1)].to_numpy())
    if features.shape[1] > 2:
        var["feature_types"] = features[2].to_numpy()
    return var


def _gene_expression(adata: AnnData) -> AnnData:
    """Leave antibodies, guides and other features out, as scanpy does.

    Raises
    ------
    ReadingError
        If no feature is a gene.
    """
    if "feature_types" not in adata.var:
        return adata
    types = adata.var["feature_types"].astype(str)
    is_gene = (types == "Gene Expression").to_numpy()
    if is_gene.all():
        return adata
    if not is_gene.any():
        raise ReadingError(
            f"The features must be genes, of the type 'Gene Expression'; found {adata.n_vars:,} of the type "
            f"{listed(types.unique())} alone. Take the matrix of gene expression, or, if these are to be modelled, "
            "convert the file to h5ad with scanpy (gex_only=False)."
        )
    inform("Left out %s features that are not of the type 'Gene Expression'.", f"{(~is_gene).sum():,}")
    return adata[:, is_gene].copy()


# -- loom --------------------------------------------------------------------------------------------------------------


def _read_loom(path: Path) -> AnnData:
    """Read a loom file (http://linnarssonlab.org/loompy/format), genes in rows; in blocks, without loompy."""
    with h5py.File(path) as file:
        obs, var = _attributes(file["col_attrs"]), _attributes(file["row_attrs"])
        adata = AnnData(
            _transposed(file["matrix"]),
            obs=_named(obs, ("CellID", "Cell", "obs_names"), file["matrix"].shape[1]),
            var=_named(var, ("Gene", "var_names", "Accession"), file["matrix"].shape[0]),
        )
        for name, layer in file.get("layers", {}).items():
            adata.layers[name] = _transposed(layer)
    return adata


def _transposed(dataset: h5py.Dataset) -> sparse.csr_matrix:
    n_rows, n_columns = dataset.shape
    starts = range(0, n_rows, max(1, BLOCK_VALUES // max(n_columns, 1)))
    blocks = [sparse.csr_matrix(dataset[a:b], dtype=np.float32) for a, b in pairwise([*starts, n_rows])]
    return sparse.vstack(blocks).T.tocsr()


def _attributes(group: h5py.Group) -> dict[str, np.ndarray]:
    """Attributes with one value for each gene or cell; strings as str."""
    values = {name: dataset for name, dataset in group.items() if dataset.ndim == 1}
    is_text = {name: dataset.dtype.kind in "OS" for name, dataset in values.items()}
    return {name: (dataset.asstr() if is_text[name] else dataset)[:] for name, dataset in values.items()}


def _named(attributes: dict[str, np.ndarray], candidates: tuple[str, ...], length: int) -> pd.DataFrame:
    name = next((name for name in candidates if name in attributes), None)
    index = attributes.pop(name) if name is not None else np.arange(length)
    return pd.DataFrame(attributes, index=pd.Index(index).astype(str))


# -- text --------------------------------------------------------------------------------------------------------------


def _read_text(path: Path, *, is_transposed: bool) -> AnnData:
    """Read a table with names in its first row and column, some rows at a time, so that it is never dense in memory."""
    separator = TEXT[Path(path.name.removesuffix(".gz")).suffix]
    columns = _names_of_columns(path, separator)
    _check_names(columns, "row", GENES_AND_CELLS[is_transposed], path)
    rows, blocks = [], []
    for chunk in _chunks(path, separator, len(columns)):
        rows.extend(chunk[0])
        blocks.append(sparse.csr_matrix(chunk.iloc[:, 1:].to_numpy(dtype=np.float32)))
    _check_names(rows, "column", GENES_AND_CELLS[not is_transposed], path)
    counts = sparse.vstack(blocks)
    rows, columns = (pd.DataFrame(index=pd.Index(names, dtype=str)) for names in (rows, columns))
    return AnnData(counts.T.tocsr(), columns, rows) if is_transposed else AnnData(counts.tocsr(), rows, columns)


def _chunks(path: Path, separator: str, n_columns: int) -> Iterator[pd.DataFrame]:
    types = {0: str} | dict.fromkeys(range(1, n_columns + 1), np.float32)
    options: dict[str, Any] = {"header": None, "skiprows": 1, "dtype": types, "na_filter": False}
    size = max(1, BLOCK_VALUES // n_columns)
    with pd.read_csv(path, sep=separator, chunksize=size, **options) as chunks:
        yield from chunks


def _names_of_columns(path: Path, separator: str) -> list[str]:
    """Names in the first row, with or without a field above the names of the rows.

    Raises
    ------
    ReadingError
        If the first row or column are no names, or the separator is another one.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file, delimiter=separator)
        header, first = next(lines, []), next(lines, [])
    named = {",": "commas", "\t": "tabs"}[separator]
    if len(first) < 2:
        raise ReadingError(
            f"The values of {path.name!r} must be separated by {named}, below a row of names; found {len(first)} in "
            "the second row. Name a file with commas .csv and one with tabs .tsv."
        )
    if len(header) not in (len(first), len(first) - 1):
        raise ReadingError(
            f"The first row of {path.name!r} must have a name for each column; found {len(header)} names for "
            f"{len(first) - 1} columns of values."
        )
    if len(header) == len(first) and _is_number(header[0]):
        raise ReadingError(
            f"{path.name!r} must have names in its first row and in its first column; found the number {header[0]!r} "
            "where they meet. Add names of the cells and the genes."
        )
    return header[len(header) - len(first) + 1 :]


def _check_names(names: list[str], line: str, axis: str, path: Path) -> None:
    """Refuse counts in place of names; names that are numbers, such as 0, 1, ... of pandas, do not repeat."""
    repeated = pd.Index(names)[pd.Index(names).duplicated()].unique()
    if len(repeated) == 0 or not all(map(_is_number, names)):
        return
    option = "header" if line == "row" else "index"
    raise ReadingError(
        f"{path.name!r}: the first {line} must hold the names of the {axis}; found numbers that repeat, "
        f"{listed(repeated)}, as counts do. Write the table with its names (with pandas, to_csv(..., {option}=True))."
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# -- table -------------------------------------------------------------------------------------------------------------

READERS: dict[str, Callable[..., AnnData]] = {
    "h5ad": _read_anndata,
    "zarr": _read_anndata,
    "10x h5": _read_10x_h5,
    "mtx": _read_mtx,
    "loom": _read_loom,
    "text": _read_text,
}
