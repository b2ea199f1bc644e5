"""Published counts: a file is found or downloaded, checked, and read through scanpy. Each file has a declaration."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import Request, urlopen

import h5py
import numpy as np
import pandas as pd

from scvae_tools._data.counts import load_counts
from scvae_tools._files import digest_of_file, replacing
from scvae_tools._messages import listed, warn

if TYPE_CHECKING:
    from http.client import HTTPResponse

    from anndata import AnnData
    from scipy.sparse import csr_matrix

TIMEOUT = 30  # seconds without an answer, not for the whole download
MEMBERS = {"barcodes", "data", "gene_names", "genes", "indices", "indptr", "shape"}  #: of the group of a genome


@dataclass(frozen=True)
class Published:
    """A published file in the HDF5 layout of Cell Ranger 1 and 2: one group a genome, a column of the matrix a cell."""

    loader: str  #: the function of `scvae_tools.datasets` that reads it
    file_name: str
    url: str
    md5: str  #: as published by others; the comment at the declaration tells how reliable it is
    genome: str  #: name of the group
    shape: tuple[int, int]  #: (n_cells, n_genes)
    stand_in: str  #: function to call where the file cannot be downloaded


# The MD5 is what TENxBrainData of Bioconductor (inst/scripts/make-metadata.R) gives as the version of this URL. It is
# not called an MD5 there, none by 10x Genomics was found, and it was not recomputed from the file: so a file that
# differs is read, with a warning.
MOUSE_BRAIN_20K = Published(
    loader="mouse_brain_20k",
    file_name="1M_neurons_neuron20k.h5",
    url="https://cf.10xgenomics.com/samples/cell-exp/1.3.0/1M_neurons/1M_neurons_neuron20k.h5",
    md5="7696db0199a30a36f857e86a1ad1da8d",
    genome="mm10",
    shape=(20_000, 27_998),
    stand_in="svt.datasets.mouse_brain_20k_like(), simulated counts as svt.datasets.simulate(20_000, 27_998, ...) "
    "makes them",
)


def mouse_brain_20k(path: str | Path | None = None, *, cache_dir: str | Path | None = None) -> AnnData:
    """Raw counts of 20,000 cells × 27,998 genes, sampled by 10x Genomics from 1.3 million brain cells of E18 mice.

    The cells are of the cortex, hippocampus and ventricular zone of two embryonic mice. Their types are not known:
    there are no labels. The file is downloaded once, and read from the cache folder from then on.

    The file must be of the published layout and shape, and its matrix must hold counts. No checksum by 10x Genomics
    was found. So the download is compared with the MD5 that Bioconductor's TENxBrainData notes for it, which was not
    recomputed here, and a difference is a warning, not an error; and the SHA-256 of the download is written beside the
    file, so that later reads notice if the file has changed since. A download that was cut off is never read.

    Parameters
    ----------
    path
        The file, if it is there already. Nothing is downloaded then.
    cache_dir
        Folder in which the file is looked for, as ``1M_neurons_neuron20k.h5``, and to which it is downloaded otherwise;
        ``scanpy.settings.datasetdir`` if None, which is ``./data`` unless set.

    Returns
    -------
    AnnData
        Of shape (20000, 27998), with the fields

        - ``X``: counts, CSR float32
        - ``obs_names``: barcodes
        - ``obs["library"]``: the library of each cell, categorical: the number at the end of its barcode. Left out if
          the barcodes have none
        - ``var_names``: gene names, made unique by ``-1``, ``-2``, ...
        - ``var["gene_ids"]``: Ensembl identifiers
        - ``uns["source"]``: the URL

    Raises
    ------
    FileNotFoundError
        If there is no file at ``path``.
    OSError
        If the file is neither in the folder nor can be downloaded. The message says where to put it by hand.
    ValueError
        If the file is not the published one, or has changed since it was downloaded.

    Warns
    -----
    UserWarning
        If the MD5 is another one, at every read: a note beside the file proves nothing to those who can write both.

    See Also
    --------
    mouse_brain_20k_like : simulated counts of the same shape, for where there is no network.

    References
    ----------
    10x Genomics (2017), 1.3 Million Brain Cells from E18 Mice,
    https://support.10xgenomics.com/single-cell-gene-expression/datasets/1.3.0/1M_neurons
    """
    return _load(MOUSE_BRAIN_20K, path, cache_dir)


def _load(published: Published, path: str | Path | None, cache_dir: str | Path | None) -> AnnData:
    if path is not None:
        file = _existing(Path(path).expanduser(), published)
    else:
        file = _cache_folder(cache_dir) / published.file_name
        if not file.is_file():
            _download(published, file)
            return _read(file, published)
    _check_bytes(file, published)
    return _read(file, published)


def _existing(file: Path, published: Published) -> Path:
    if not file.is_file():
        raise FileNotFoundError(
            f"`path` must be the file {published.file_name}; found none at {file.absolute()}. Correct it, or leave it "
            "out to have the file downloaded."
        )
    return file


def _cache_folder(cache_dir: str | Path | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    import scanpy as sc

    return Path(sc.settings.datasetdir)


# ---------------------------------------------------------------------------------------------------------------------
# Download
# ---------------------------------------------------------------------------------------------------------------------


def _download(published: Published, file: Path) -> None:
    """Put the file there whole and checked, or not at all."""
    request = Request(published.url, headers={"User-Agent": "scvae-tools"})  # some servers refuse Python's own name
    try:
        with urlopen(request, timeout=TIMEOUT) as response:
            file.parent.mkdir(parents=True, exist_ok=True)  # not before: without a connection no folder is left behind
            with replacing(file) as part:
                _receive(response, part, published.file_name)
                source = f"The download from {published.url}"
                _check_layout(part, published, source)
                _check_md5(part, published, source)
                _write_note(file, digest_of_file(part))  # before the file, which so is never without its note
    except (OSError, HTTPException) as error:
        raise OSError(
            f"`{published.loader}` needs {published.file_name}: found no file at {file.absolute()}, and could not "
            f"download it from {published.url} ({type(error).__name__}: {error}). Download it by hand where there is a "
            f"connection and put it at {file.absolute()}, or pass its place as `path`. As a stand-in there is "
            f"{published.stand_in}."
        ) from error


def _receive(response: HTTPResponse, part: Path, name: str) -> None:
    from tqdm.auto import tqdm

    length = response.headers.get("Content-Length")
    size = None if length is None else int(length)  # bytes
    with tqdm.wrapattr(response, "read", total=size, desc=name) as stream, part.open("wb") as to:
        shutil.copyfileobj(stream, to)
    received = part.stat().st_size
    if size is not None and received != size:
        raise OSError(f"the connection ended after {received:,} of {size:,} bytes")


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def _check_bytes(file: Path, published: Published) -> None:
    """Compare with the published MD5, and with the SHA-256 of the download, if it was one.

    The note of the SHA-256 tells damage. Whoever can change the file can change the note beside it, so that it cannot
    stand for the MD5.
    """
    _check_md5(file, published, str(file))
    note = _note_of(file)
    if not note.is_file():
        return
    noted, found = note.read_text(encoding="utf-8").partition(" ")[0].strip(), digest_of_file(file)
    if found != noted:
        raise ValueError(
            f"{file} must have the SHA-256 {noted or '(none)'}, noted in {note.name} when it was downloaded; found "
            f"{found}: one of the two has changed since. Delete both and call `{published.loader}()` again."
        )


def _check_md5(file: Path, published: Published, name: str) -> None:
    found = digest_of_file(file, "md5")
    if found != published.md5:
        warn(
            f"{name} should have the MD5 {published.md5}; found {found}. It is used if its layout and shape are right. "
            "Another version may have been published, or the file be damaged."
        )


def _note_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _write_note(file: Path, sha256: str) -> None:
    """Note the digest beside the file, in the format of ``sha256sum --check``."""
    with replacing(_note_of(file)) as temporary:
        temporary.write_text(f"{sha256}  {file.name}\n", encoding="utf-8")


def _check_layout(file: Path, published: Published, name: str) -> None:
    """Refuse another file before its matrix is read: the matrix of all 1.3 million cells takes tens of GB."""
    try:
        with h5py.File(file, "r") as content:
            if published.genome not in content:
                raise _not_the_file(published, name, f"the groups {listed(content)}")
            group = content[published.genome]
            if missing := MEMBERS - set(group):
                raise _not_the_file(published, name, f"{published.genome!r} without {listed(sorted(missing))}")
            shape = tuple(reversed(group["shape"][:].tolist()))  # the file has genes × cells
    except OSError as error:
        raise _not_the_file(published, name, f"what HDF5 cannot open ({error})") from error
    if shape != published.shape:
        raise _not_the_file(published, name, _in_words(shape))


def _check_counts(counts: csr_matrix, published: Published, name: str) -> None:
    values = counts.data
    if values.min(initial=0) < 0 or not np.array_equal(values, np.rint(values)):
        raise _not_the_file(published, name, "a matrix with values that are no counts")


def _not_the_file(published: Published, name: str, found: str) -> ValueError:
    return ValueError(
        f"{name} must be {published.file_name}: HDF5 with a group {published.genome!r} of "
        f"{_in_words(published.shape)}, as Cell Ranger 1 and 2 write it; found {found}. Delete the file if it is "
        f"damaged, and have it downloaded again by `{published.loader}()`, or by hand from {published.url}."
    )


def _in_words(shape: tuple[int, ...]) -> str:
    return " × ".join(f"{size:,} {axis}" for size, axis in zip(shape, ["cells", "genes"], strict=False))


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def _read(file: Path, published: Published) -> AnnData:
    import scanpy as sc

    _check_layout(file, published, str(file))
    with warnings.catch_warnings():  # several genes have the same name, and get unique ones here
        warnings.filterwarnings("ignore", message=".*not unique")
        try:
            adata = sc.read_10x_h5(file, genome=published.genome)
            adata.X.check_format(full_check=True)
        except (OSError, ValueError) as error:
            raise _not_the_file(published, str(file), f"a matrix that cannot be read ({error})") from error
        adata.var_names_make_unique()
    adata.X = load_counts(adata.X)
    _check_counts(adata.X, published, str(file))
    _add_library(adata)
    adata.uns["source"] = published.url
    return adata


def _add_library(adata: AnnData) -> None:
    """Write the number after the last hyphen of every barcode, if all have one, as ``obs["library"]``."""
    number = adata.obs_names.to_series().str.extract(r"-(\d+)$", expand=False)
    if number.isna().any():
        return
    categories = sorted(number.unique(), key=int)
    adata.obs["library"] = pd.Categorical(number, categories=categories)
