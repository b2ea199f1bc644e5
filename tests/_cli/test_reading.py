"""Files that are written here byte by byte, or by other packages, are read as the counts that they hold."""

from __future__ import annotations

import gzip
import warnings

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.io import mmwrite

from scvae_tools._cli import _reading
from scvae_tools._cli._reading import READERS, ReadingError, format_of, read

COUNTS = np.array([[0, 3, 0, 1], [2, 0, 0, 0], [0, 0, 7, 12], [1, 1, 0, 0], [0, 400, 0, 5]])
CELLS = [f"AAAC-{i}" for i in range(5)]
GENES = ["CD3E", "NKG7", "MS4A1", "LYZ"]
IDS = ["ENSG1", "ENSG2", "ENSG3", "ENSG4"]


def gzipped(path, text):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


def lines(*rows):
    return "".join(f"{row}\n" for row in rows)


def text(separator, corner=""):
    rows = [separator.join(map(str, [cell, *values])) for cell, values in zip(CELLS, COUNTS, strict=True)]
    return lines(separator.join([corner, *GENES] if corner is not None else GENES), *rows)


def csc(group):
    """Genes in rows and cells in columns, by column: the arrays that Cell Ranger writes."""
    matrix = sparse.csc_matrix(COUNTS.T)
    group["data"], group["indices"], group["indptr"] = matrix.data, matrix.indices, matrix.indptr
    group["shape"] = np.array(matrix.shape)
    group["barcodes"] = np.array(CELLS, dtype="S")


def write_h5ad(folder):
    ad.AnnData(COUNTS.astype(np.float32), pd.DataFrame(index=CELLS), pd.DataFrame(index=GENES)).write_h5ad(
        folder / "x.h5ad"
    )
    return folder / "x.h5ad"


def write_h5ad_named_h5(folder):
    return write_h5ad(folder).rename(folder / "x.h5")


def write_zarr(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the next version of zarr
        ad.read_h5ad(write_h5ad(folder)).write_zarr(folder / "x.zarr")
    return folder / "x.zarr"


def write_10x_v3(folder, types=("Gene Expression",) * 4):
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as file:
        group = file.create_group("matrix")
        csc(group)
        features = group.create_group("features")
        columns = {"id": IDS, "name": GENES, "feature_type": types, "genome": ["GRCh38"] * 4}
        for name, values in columns.items():
            features[name] = np.array(values, dtype="S")
        features["_all_tag_keys"] = np.array(["genome"], dtype="S")
    return folder / "filtered_feature_bc_matrix.h5"


def write_10x_v2(folder, genomes=("hg19",)):
    with h5py.File(folder / "filtered_gene_bc_matrices_h5.h5", "w") as file:
        for genome in genomes:
            group = file.create_group(genome)
            csc(group)
            group["gene_names"], group["genes"] = np.array(GENES, dtype="S"), np.array(IDS, dtype="S")
    return folder / "filtered_gene_bc_matrices_h5.h5"


def write_mtx_v2(folder):
    """Cell Ranger 2: not compressed, two columns, a folder for each genome."""
    genome = folder / "filtered_gene_bc_matrices" / "hg19"
    genome.mkdir(parents=True)
    mmwrite(genome / "matrix.mtx", sparse.coo_matrix(COUNTS.T))
    (genome / "genes.tsv").write_text(lines(*(f"{a}\t{b}" for a, b in zip(IDS, GENES, strict=True))))
    (genome / "barcodes.tsv").write_text(lines(*CELLS))
    return genome.parent


def write_mtx_v3(folder, prefix="", types=("Gene Expression",) * 4):
    """Cell Ranger 3: compressed, three columns; GEO puts the sample's name before those of the files."""
    folder = folder / f"mtx{prefix}"
    folder.mkdir()
    entries = [f"{g + 1} {c + 1} {COUNTS[c, g]}" for c, g in zip(*COUNTS.nonzero(), strict=True)]
    header = ["%%MatrixMarket matrix coordinate integer general", f"4 5 {len(entries)}"]
    gzipped(folder / f"{prefix}matrix.mtx.gz", lines(*header, *entries))
    features = zip(IDS, GENES, types, strict=True)
    gzipped(folder / f"{prefix}features.tsv.gz", lines(*map("\t".join, features)))
    gzipped(folder / f"{prefix}barcodes.tsv.gz", lines(*CELLS))
    return folder


def write_mtx_of_geo(folder):
    return write_mtx_v3(folder, prefix="GSM1_")


def write_one_mtx_file(folder):
    return write_mtx_v3(folder, prefix="GSM2_") / "GSM2_matrix.mtx.gz"


def write_mtx_of_starsolo(folder):
    """As Cell Ranger 3, but not compressed."""
    compressed = write_mtx_v3(folder)
    for file in list(compressed.iterdir()):
        (compressed / file.name.removesuffix(".gz")).write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    return compressed


def write_loom(folder, names=("CellID", "Gene")):
    """The parts that http://linnarssonlab.org/loompy/format requires."""
    with h5py.File(folder / "x.loom", "w") as file:
        file["matrix"] = COUNTS.T.astype(np.float32)
        file["layers/spliced"] = COUNTS.T.astype(np.uint16) // 2
        file[f"col_attrs/{names[0]}"] = np.array(CELLS, dtype=h5py.string_dtype())
        file["col_attrs/Age"] = np.arange(5)
        file["col_attrs/Pair"] = np.ones((5, 2))
        file[f"row_attrs/{names[1]}"] = np.array(GENES, dtype="S")
        file.create_group("row_graphs")
    return folder / "x.loom"


def write_csv(folder):
    (folder / "x.csv").write_text(text(","))
    return folder / "x.csv"


def write_tsv_gz(folder):
    return gzipped(folder / "x.tsv.gz", text("\t", corner="cell"))


def write_table_of_r(folder):
    """``write.table`` of R: no field above the names of the rows, and names in quotes."""
    rows = [f'"{cell}"\t' + "\t".join(map(str, values)) for cell, values in zip(CELLS, COUNTS, strict=True)]
    (folder / "x.txt").write_text(lines("\t".join(f'"{gene}"' for gene in GENES), *rows))
    return folder / "x.txt"


WRITERS = {
    write_h5ad: "h5ad",
    write_h5ad_named_h5: "h5ad",
    write_zarr: "zarr",
    write_10x_v3: "10x h5",
    write_10x_v2: "10x h5",
    write_mtx_v2: "mtx",
    write_mtx_v3: "mtx",
    write_mtx_of_geo: "mtx",
    write_one_mtx_file: "mtx",
    write_mtx_of_starsolo: "mtx",
    write_loom: "loom",
    write_csv: "text",
    write_tsv_gz: "text",
    write_table_of_r: "text",
}


def assert_counts(adata):
    values = adata.X.toarray() if sparse.issparse(adata.X) else adata.X
    np.testing.assert_array_equal(values, COUNTS)
    assert list(adata.obs_names) == CELLS
    assert list(adata.var_names) == GENES


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__.removeprefix("write_"))
def test_every_format_is_told_by_name_or_content_and_read_as_cells_by_genes(write, tmp_path):
    path = write(tmp_path)
    assert format_of(path) == WRITERS[write]
    adata = read(path)
    assert_counts(adata)
    adata.write_h5ad(tmp_path / "again.h5ad")


def test_every_reader_is_tested():
    assert set(WRITERS.values()) == set(READERS)


@pytest.mark.parametrize("write", [write_csv, write_mtx_v3, write_loom, write_10x_v3])
def test_what_is_not_of_anndata_is_compressed_by_rows(write, tmp_path):
    assert isinstance(read(write(tmp_path)).X, sparse.csr_matrix)


def test_identifiers_and_types_of_features_are_kept(tmp_path):
    var = read(write_mtx_v3(tmp_path)).var
    assert list(var["gene_ids"]) == IDS
    assert set(var["feature_types"]) == {"Gene Expression"}
    assert list(read(write_10x_v3(tmp_path)).var["gene_ids"]) == IDS


@pytest.mark.parametrize("write", [write_mtx_v3, write_10x_v3])
def test_antibodies_are_left_out(write, tmp_path):
    types = ("Gene Expression", "Antibody Capture", "Gene Expression", "Gene Expression")
    adata = read(write(tmp_path, types=types))
    assert list(adata.var_names) == ["CD3E", "MS4A1", "LYZ"]
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS[:, [0, 2, 3]])


@pytest.mark.parametrize("write", [write_mtx_v3, write_10x_v3])
def test_a_file_without_genes_is_refused_with_the_types_of_its_features(write, tmp_path):
    path = write(tmp_path, types=("Antibody Capture",) * 3 + ("CRISPR Guide Capture",))
    with pytest.raises(ReadingError, match="found 4 of the type 'Antibody Capture', 'CRISPR Guide Capture' alone"):
        read(path)


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("orientation", _reading.ORIENTATIONS)
def test_a_table_of_pandas_without_names_is_refused_and_loses_no_gene_or_cell(index, header, orientation, tmp_path):
    table = pd.DataFrame(COUNTS, CELLS, GENES)
    table = table if orientation == "cells-by-genes" else table.T
    table.to_csv(tmp_path / "x.csv", index=index, header=header)
    if index and header:
        assert_counts(read(tmp_path / "x.csv", orientation=orientation))
        return
    rows, columns = ("cells", "genes") if orientation == "cells-by-genes" else ("genes", "cells")
    message = (
        "names in its first row and in its first column; found the number"
        if not (index or header)
        else (
            f"first row must hold the names of the {columns}; found numbers that repeat, .*header=True"
            if index
            else f"first column must hold the names of the {rows}; found numbers that repeat, .*index=True"
        )
    )
    with pytest.raises(ReadingError, match=message):
        read(tmp_path / "x.csv", orientation=orientation)


def test_rows_that_pandas_numbers_are_names(tmp_path):
    pd.DataFrame(COUNTS, columns=GENES).to_csv(tmp_path / "x.csv")
    adata = read(tmp_path / "x.csv")
    assert list(adata.obs_names) == ["0", "1", "2", "3", "4"]
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)


def test_attributes_and_layers_of_loom_are_kept(tmp_path):
    adata = read(write_loom(tmp_path))
    assert list(adata.obs["Age"]) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(adata.layers["spliced"].toarray(), COUNTS // 2)


def test_cells_and_genes_of_loom_without_names_are_numbered(tmp_path):
    adata = read(write_loom(tmp_path, names=("Nickname", "Symbol")))
    assert list(adata.obs_names) == ["0", "1", "2", "3", "4"]
    assert list(adata.var["Symbol"]) == GENES


def test_text_with_genes_in_rows_is_turned_when_told_so(tmp_path):
    rows = [",".join(map(str, [gene, *values])) for gene, values in zip(GENES, COUNTS.T, strict=True)]
    (tmp_path / "x.csv").write_text(lines(",".join(["", *CELLS]), *rows))
    assert_counts(read(tmp_path / "x.csv", orientation="genes-by-cells"))
    assert read(tmp_path / "x.csv").shape == (4, 5)


@pytest.mark.parametrize("write", [write_csv, write_loom])
def test_blocks_of_one_row_are_put_together_in_order(write, tmp_path, monkeypatch):
    monkeypatch.setattr(_reading, "BLOCK_VALUES", 5)
    assert_counts(read(write(tmp_path)))


def test_a_gene_named_na_keeps_its_name_and_repeated_names_get_numbers(tmp_path, caplog):
    caplog.set_level("INFO", "scvae_tools")
    (tmp_path / "x.csv").write_text("cell,NA,A,A\nc,1,2,3\nNA,4,5,6\nc,7,8,9\n")
    adata = read(tmp_path / "x.csv")
    assert list(adata.var_names) == ["NA", "A", "A-1"]
    assert list(adata.obs_names) == ["c", "NA", "c-1"]
    assert "names of the genes are not unique: -1, -2, ... is appended to 'A'" in caplog.text


def test_a_genome_is_chosen_by_name(tmp_path):
    path = write_10x_v2(tmp_path, genomes=("hg19", "mm10"))
    assert_counts(read(path, genome="mm10"))
    for genome in (None, "hg38"):
        with pytest.raises(ReadingError, match=r"must be one of those in .*'hg19', 'mm10'; found"):
            read(path, genome=genome)


def test_a_file_named_demo_is_reached_by_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_h5ad(tmp_path).rename(tmp_path / "demo")
    assert_counts(read("./demo"))
    assert read("demo").shape == (700, 765)


# -- refused -----------------------------------------------------------------------------------------------------------


def of(name, content):
    def write(folder):
        (folder / name).write_text(content)
        return folder / name

    return write


def of_hdf5(folder):
    with h5py.File(folder / "x.h5", "w") as file:
        file["values"] = [1]
    return folder / "x.h5"


def without_features(folder):
    path = write_mtx_v3(folder)
    (path / "features.tsv.gz").unlink()
    return path


def with_two_matrices(folder):
    path = write_mtx_v3(folder)
    (path / "other_matrix.mtx").touch()
    return path


def with_a_barcode_too_many(folder):
    path = write_mtx_v3(folder)
    gzipped(path / "barcodes.tsv.gz", lines(*CELLS, "one more"))
    return path


REFUSED = {
    "missing names": (of("x.csv", "1,2,3\n4,5,6\n"), "found the number '1' where they meet. Add names"),
    "other separator": (of("x.tsv", "cell,A\nc,1\n"), "must be separated by tabs"),
    "empty": (of("x.csv", ""), "must be separated by commas"),
    "ragged": (of("x.csv", "cell,A,B,C\nc,1\n"), "found 4 names for 1 columns"),
    "words": (of("x.csv", "cell,A\nc,high\n"), "cannot be read as text: .*high"),
    "no format": (of("x.xlsx", "PK"), "found 'x.xlsx', which is no HDF5 file .* Convert it to h5ad"),
    "other hdf5": (of_hdf5, "holds 'values'. Convert it"),
    "no matrix": (lambda folder: folder, "holds? .*matrix.mtx .* found neither"),
    "no features": (without_features, "there must be features.tsv or genes.tsv"),
    "two matrices": (with_two_matrices, "found 'matrix.mtx.gz', 'other_matrix.mtx'"),
    "a barcode too many": (with_a_barcode_too_many, "has 5 and 4; there are 6 barcodes and 4 features"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_the_reason(name, tmp_path):
    write, message = REFUSED[name]
    with pytest.raises(ReadingError, match=message):
        read(write(tmp_path))


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no .*gone.h5ad'. Pass a file or folder"):
        read(tmp_path / "gone.h5ad")


def test_options_that_mean_nothing_to_a_format_are_refused(tmp_path):
    with pytest.raises(ReadingError, match="orientation is asked of text alone; found h5ad"):
        read(write_h5ad(tmp_path), orientation="genes-by-cells")
    with pytest.raises(ReadingError, match="genome is asked of files of 10x Genomics alone; found text"):
        read(write_csv(tmp_path), genome="hg19")
