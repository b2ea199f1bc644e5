"""Counts in batches against NumPy, SciPy and loops, from the AnnData to the first layer of the encoder.

What is only moved must be equal; tolerances are stated where something is added up.
"""

from __future__ import annotations

from itertools import chain, pairwise
from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from independent import array, log_base_measure, normal, seeded
from scipy import sparse
from scvi import REGISTRY_KEYS

import scvae_tools as svt
from scvae_tools._data.loader import CountLoader, counts_of_matrix
from scvae_tools._module.covariates import Covariates, Sizes
from scvae_tools._module.networks import Encoder
from scvae_tools._module.sparse import Compressed, Counts, rows_of_cells
from scvae_tools.likelihoods import LIKELIHOODS, NegativeBinomial

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

ignore_beta = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
N_CELLS, N_GENES = 23, 6
ROUNDING = 1e-6  #: of a sum of six terms in float32, a few times 6e-8 of them


# -- factories ---------------------------------------------------------------------------------------------------------


def make_dense(n_cells: int = N_CELLS, *, empty: bool = False) -> np.ndarray:
    """Counts, most of them zero, (n_cells, 6) float32; a count in every cell but, if ``empty``, the third and last."""
    rng = np.random.default_rng(0)
    x = rng.poisson(3, (n_cells, N_GENES)) * (rng.random((n_cells, N_GENES)) < 0.4)
    x[:, 4] = 0
    x[:, 0] += x.sum(1) == 0
    if empty:
        x[[2, n_cells - 1]] = 0
    return x.astype(np.float32)


def make_counts(n_cells: int = 9) -> tuple[Counts, np.ndarray]:
    """Counts with empty cells and an empty gene, and the same as an array."""
    x = make_dense(n_cells, empty=True)
    return Counts.of(torch.tensor(x)), x


def make_adata(matrix: object = None) -> AnnData:
    """Every kind of column that can be registered; ``position`` tells the cell."""
    rng = np.random.default_rng(1)
    obs = pd.DataFrame(
        {
            "donor": pd.Categorical(np.resize(["a", "b", "c"], N_CELLS)),
            "kind": pd.Categorical(np.resize(["x", "y"], N_CELLS)),
            "plate": pd.Categorical(np.resize(["p", "q", "r", "s"], N_CELLS)),
            "size": rng.uniform(0.5, 2, N_CELLS),
            "position": np.arange(N_CELLS, dtype=np.float64),
        },
        index=[f"cell{i}" for i in range(N_CELLS)],
    )
    return AnnData(sparse.csr_matrix(make_dense()) if matrix is None else matrix, obs=obs)


SETUP = {
    "batch_key": "donor",
    "labels_key": "kind",
    "size_factor_key": "size",
    "categorical_covariate_keys": ["plate", "kind"],
    "continuous_covariate_keys": ["position"],
}


def make_model(adata: AnnData | None = None, **setup: object) -> svt.SCVAE:
    adata = make_adata() if adata is None else adata
    svt.SCVAE.setup_anndata(adata, **(setup or SETUP))
    return svt.SCVAE(adata, mixture=False, n_hidden=4, n_latent=2)


def make_loader(model: svt.SCVAE, indices: np.ndarray | None = None, **options: object) -> CountLoader:
    return model._make_data_loader(model.adata, indices, **({"batch_size": 5} | options))


# -- independent numbers -----------------------------------------------------------------------------------------------


def looped(compressed: Compressed, n_columns: int) -> np.ndarray:
    """All entries of a compressed matrix, one at a time; an entry that is given twice fails."""
    start, column, value = map(array, compressed)
    assert start[0] == 0
    assert start[-1] == len(column) == len(value)
    dense = np.zeros((len(start) - 1, n_columns), value.dtype)
    for row, (begin, end) in enumerate(pairwise(start)):
        for at in range(begin, end):
            assert dense[row, column[at]] == 0
            dense[row, column[at]] = value[at]
    return dense


def assert_counts(found: Counts, expected: np.ndarray) -> None:
    """Both orders hold the non-zeros and nothing else, in the types with which torch computes."""
    n, g = expected.shape
    for compressed, dense in ((found.by_cell, expected), (found.by_gene, expected.T)):
        np.testing.assert_array_equal(looped(compressed, dense.shape[1]), dense)
        assert (compressed.value != 0).all()
        assert compressed.start.dtype == compressed.column.dtype == torch.int64
    assert found.shape == (n, g)
    assert len(found) == n
    np.testing.assert_array_equal(array(found.dense()), expected)


def positions(batches: Iterable[dict]) -> list[list[int]]:
    """Positions of the cells of each batch."""
    return [batch[REGISTRY_KEYS.CONT_COVS_KEY][:, 0].int().tolist() for batch in batches]


# -- counts of a batch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x",
    [make_dense(9, empty=True), np.zeros((3, N_GENES)), np.ones((2, 3)), make_dense(1), np.zeros((0, N_GENES))],
    ids=["mixed", "no count", "no zero", "one cell", "no cell"],
)
def test_counts_of_a_dense_tensor_are_its_nonzeros(x: np.ndarray) -> None:
    assert_counts(Counts.of(torch.tensor(x)), x)


@ignore_beta
def test_counts_of_a_sparse_tensor_are_its_nonzeros() -> None:
    x = make_dense(9, empty=True)
    assert_counts(Counts.of(torch.tensor(x).to_sparse_csr()), x)


@ignore_beta
def test_explicit_zeros_are_left_out() -> None:
    start, column, value = torch.tensor([0, 3, 3, 5]), torch.tensor([0, 1, 2, 0, 3]), torch.tensor([5.0, 0, 3, 7, 0])
    x = torch.sparse_csr_tensor(start, column, value, (3, 4), check_invariants=True)
    assert_counts(Counts.of(x), np.array([[5, 0, 3, 0], [0, 0, 0, 0], [7, 0, 0, 0]], np.float32))


@ignore_beta
def test_duplicates_are_added_up() -> None:
    """Two that make up a count, and two that cancel, in unsorted columns."""
    start, column = torch.tensor([0, 4, 4, 6]), torch.tensor([2, 0, 2, 1, 3, 3])
    value = torch.tensor([1.0, 5, 2, 4, 6, -6])
    x = torch.sparse_csr_tensor(start, column, value, (3, 4), check_invariants=False)
    assert_counts(Counts.of(x), np.array([[5, 4, 3, 0], [0, 0, 0, 0], [0, 0, 0, 0]], np.float32))


def test_counts_stay_as_they_are() -> None:
    counts, _ = make_counts()
    assert Counts.of(counts) is counts


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csr_array])
def test_counts_of_a_matrix_are_its_nonzeros(form: type, index: type) -> None:
    x = make_dense(9, empty=True)
    matrix = form(x)
    matrix.indptr, matrix.indices = matrix.indptr.astype(index), matrix.indices.astype(index)
    counts = counts_of_matrix(matrix, log_base_measure=np.arange(9, dtype=np.float32))
    assert_counts(counts, x)
    assert counts.by_cell.value.dtype == counts.by_gene.value.dtype == torch.float32
    np.testing.assert_array_equal(counts.log_base_measure, np.arange(9))


def test_the_base_measure_is_unknown_unless_given() -> None:
    counts, x = make_counts()
    assert counts.log_base_measure is None
    assert counts_of_matrix(sparse.csr_matrix(x)).log_base_measure is None


def test_totals_and_density_are_those_of_the_array() -> None:
    counts, x = make_counts()
    np.testing.assert_allclose(counts.total(), x.sum(1, keepdims=True), rtol=ROUNDING)
    assert counts.total().shape == (9, 1)
    assert counts.density == pytest.approx((x != 0).mean(), rel=1e-12)
    assert Counts.of(torch.zeros(0, 3)).density == 0


def test_map_changes_each_nonzero_by_its_value_and_cell() -> None:
    counts, x = make_counts()
    scale = torch.arange(9) + 10
    known = Counts(counts.by_cell, counts.by_gene, torch.ones(9))
    mapped = known.map(lambda value, cell: value * scale[cell] + 0.5)
    expected = (x * scale[:, None].numpy() + 0.5) * (x != 0)
    assert_counts(mapped, expected)
    assert mapped.log_base_measure is None  # that of other numbers
    assert_counts(known, x)


def test_every_part_goes_to_another_device() -> None:
    """``meta`` stands for one: its tensors have no memory."""
    counts, x = make_counts()
    for base in (None, torch.ones(len(x))):
        moved = Counts(counts.by_cell, counts.by_gene, base).to("meta")
        assert moved.device == torch.device("meta")
        parts = [*moved.by_cell, *moved.by_gene, *([] if base is None else [moved.log_base_measure])]
        assert all(part.device.type == "meta" for part in parts)
        assert moved.shape == counts.shape
    assert counts.device == torch.device("cpu")
    assert_counts(counts.to(torch.device("cpu"), non_blocking=True), x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_counts_reach_a_gpu_from_pinned_memory() -> None:
    counts, x = make_counts()
    pinned = counts.pin_memory()
    assert all(part.is_pinned() for part in (*pinned.by_cell, *pinned.by_gene))
    assert_counts(pinned.to("cuda", non_blocking=True).to("cpu"), x)


# -- compressed matrices -----------------------------------------------------------------------------------------------


def test_rows_of_the_nonzeros_are_those_of_numpy() -> None:
    counts, x = make_counts()
    np.testing.assert_array_equal(counts.by_cell.row(), np.nonzero(x)[0])
    np.testing.assert_array_equal(counts.by_gene.row(), np.nonzero(x.T)[0])


@pytest.mark.parametrize("n_rows", [1, 2, 4, 8, 9, 100])
def test_blocks_of_rows_are_those_of_the_array(n_rows: int) -> None:
    counts, x = make_counts()
    covered = 0
    for rows, part in counts.by_cell.blocks(n_rows):
        assert rows.start == covered
        assert rows.stop == min(covered + n_rows, 9)
        np.testing.assert_array_equal(looped(part, N_GENES), x[rows])
        covered = rows.stop
    assert covered == 9


# -- rows that repeat cells --------------------------------------------------------------------------------------------

ROWS = {
    "each once": list(range(9)),
    "another order": [4, 0, 8, 2, 1, 7, 3, 6, 5],
    "each twice, one after another": [cell for cell in range(9) for _ in range(2)],
    "each twice, all after all": [*range(9), *range(9)],
    "some missing, some often": [5, 5, 0, 5, 8, 0, 5],
    "empty cells alone": [2, 8, 2],
    "one": [3],
    "none": [],
    "many": np.random.default_rng(0).integers(9, size=200).tolist(),
}


@pytest.mark.parametrize("cells", ROWS)
def test_rows_that_repeat_cells_are_those_of_a_dense_index(cells: str) -> None:
    (counts, x), cell = make_counts(), torch.tensor(ROWS[cells], dtype=torch.int64)
    found, source = rows_of_cells(counts.by_gene, cell, 9)
    np.testing.assert_array_equal(looped(found, len(cell)), x[cell.numpy()].T)
    assert found.start.dtype == found.column.dtype == torch.int64
    repeated = counts.by_gene
    for ours, theirs in (
        (found.value, repeated.value),
        (found.row(), repeated.row()),
        (cell[found.column], repeated.column),
    ):
        assert torch.equal(ours, theirs[source])


def test_rows_of_cells_without_counts_are_empty() -> None:
    found, source = rows_of_cells(Counts.of(torch.zeros(3, N_GENES)).by_gene, torch.tensor([1, 1, 2]), 3)
    np.testing.assert_array_equal(looped(found, 3), np.zeros((N_GENES, 3)))
    assert len(source) == 0


# -- from the AnnData --------------------------------------------------------------------------------------------------


def _backed(matrix: object) -> object:
    def write(path: Path) -> AnnData:
        make_adata(matrix).write_h5ad(path / "counts.h5ad")
        return anndata.read_h5ad(path / "counts.h5ad", backed="r")

    return write


def _zarr(matrix: object) -> object:
    def write(path: Path) -> AnnData:
        zarr = pytest.importorskip("zarr")
        make_adata(matrix).write_zarr(path / "counts.zarr")
        return make_adata(anndata.io.sparse_dataset(zarr.open(path / "counts.zarr", mode="r")["X"]))

    return write


def _in_memory(matrix: object) -> object:
    return lambda _: make_adata(matrix)


def _messy() -> sparse.csr_matrix:
    """Unsorted indices, an explicit zero, and a count in two parts."""
    x = sparse.coo_matrix(make_dense())
    split = np.flatnonzero(x.data > 1)[0]
    row, column, value = np.r_[x.row, x.row[split], 7], np.r_[x.col, x.col[split], 4], np.r_[x.data, 1, 0]
    value[split] -= 1
    order = np.lexsort((-column, row))
    start = np.r_[0, np.cumsum(np.bincount(row, minlength=N_CELLS))]
    return sparse.csr_matrix((value[order], column[order], start), x.shape)


FORMS = {
    "csr_matrix": _in_memory(sparse.csr_matrix(make_dense())),
    "csr_array": _in_memory(sparse.csr_array(make_dense())),
    "csc_matrix": _in_memory(sparse.csc_matrix(make_dense())),
    "array": _in_memory(make_dense()),
    "int64 csr_matrix": _in_memory(sparse.csr_matrix(make_dense().astype(np.int64))),
    "float64 array": _in_memory(make_dense().astype(np.float64)),
    "backed csr_matrix": _backed(sparse.csr_matrix(make_dense())),
    "backed csc_matrix": _backed(sparse.csc_matrix(make_dense())),
    "backed array": _backed(make_dense()),
    "zarr csr_matrix": _zarr(sparse.csr_matrix(make_dense())),
    "zarr csc_matrix": _zarr(sparse.csc_matrix(make_dense())),
}


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_counts_ends_in_the_same_batches(form: str, tmp_path: Path) -> None:
    batches = list(make_loader(make_model(FORMS[form](tmp_path))))
    assert positions(batches) == [list(range(i, min(i + 5, N_CELLS))) for i in range(0, N_CELLS, 5)]
    for batch, cells in zip(batches, positions(batches), strict=True):
        assert batch[REGISTRY_KEYS.X_KEY].by_cell.value.dtype == torch.float32
        assert_counts(batch[REGISTRY_KEYS.X_KEY], make_dense()[cells])


def test_a_matrix_with_duplicates_and_zeros_ends_in_clean_batches() -> None:
    matrix = _messy()
    assert not matrix.has_canonical_format
    for batch, low in zip(make_loader(make_model(make_adata(matrix))), range(0, N_CELLS, 5), strict=True):
        assert_counts(batch[REGISTRY_KEYS.X_KEY], make_dense()[low : low + 5])


def test_counts_of_a_layer_are_those_of_the_batches() -> None:
    adata = make_adata(sparse.csr_matrix((N_CELLS, N_GENES), dtype=np.float32))
    adata.layers["counts"] = sparse.csr_matrix(make_dense())
    (batch,) = make_loader(make_model(adata, layer="counts"), batch_size=N_CELLS)
    assert_counts(batch[REGISTRY_KEYS.X_KEY], make_dense())


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csr_array])
def test_the_matrix_of_the_anndata_is_not_copied(form: type) -> None:
    adata = make_adata(form(make_dense()))
    held = make_loader(make_model(adata)).dataset.counts
    for part in ("data", "indices", "indptr"):
        assert np.shares_memory(getattr(held, part), getattr(adata.X, part))


def test_batches_leave_the_anndata_as_it_was() -> None:
    adata = make_adata()
    before = adata.X.copy()
    for batch in make_loader(make_model(adata)):
        batch[REGISTRY_KEYS.X_KEY].by_cell.value.zero_()
        batch[REGISTRY_KEYS.X_KEY].by_gene.value.zero_()
        batch[REGISTRY_KEYS.CONT_COVS_KEY].zero_()
    assert (before != adata.X).nnz == 0
    np.testing.assert_array_equal(adata.obs["position"], np.arange(N_CELLS))


def test_registered_columns_come_with_their_cells() -> None:
    adata = make_adata()
    indices = np.array([20, 3, 3, 11])
    (batch,) = make_loader(make_model(adata), indices)
    obs, x = adata.obs.iloc[indices], make_dense()[indices]
    expected = {
        REGISTRY_KEYS.BATCH_KEY: obs[["donor"]].apply(lambda column: column.cat.codes),
        REGISTRY_KEYS.LABELS_KEY: obs[["kind"]].apply(lambda column: column.cat.codes),
        REGISTRY_KEYS.CAT_COVS_KEY: obs[["plate", "kind"]].apply(lambda column: column.cat.codes),
        REGISTRY_KEYS.SIZE_FACTOR_KEY: obs[["size"]].astype(np.float32),
        REGISTRY_KEYS.CONT_COVS_KEY: obs[["position"]],
        REGISTRY_KEYS.OBSERVED_LIB_SIZE: x.sum(1, keepdims=True),
    }
    assert set(batch) == {*expected, REGISTRY_KEYS.X_KEY}
    assert_counts(batch[REGISTRY_KEYS.X_KEY], x)
    for key, values in expected.items():
        is_code = key in (REGISTRY_KEYS.BATCH_KEY, REGISTRY_KEYS.LABELS_KEY, REGISTRY_KEYS.CAT_COVS_KEY)
        assert batch[key].dtype == (torch.int64 if is_code else torch.float32), key
        np.testing.assert_array_equal(batch[key], values, err_msg=key)


def test_without_columns_there_is_one_batch_and_the_total_is_the_size() -> None:
    model = make_model(make_adata(), layer=None)
    for batch, low in zip(make_loader(model), range(0, N_CELLS, 5), strict=True):
        x = make_dense()[low : low + 5]
        _, size, covariates = model.module.data(batch)
        np.testing.assert_allclose(size, x.sum(1, keepdims=True), rtol=ROUNDING)
        np.testing.assert_array_equal(covariates.batch, np.zeros((len(x), 1)))
        assert covariates.categorical is covariates.continuous is None


# -- the base measure --------------------------------------------------------------------------------------------------


class Doubled(NegativeBinomial):
    """A likelihood with a base measure of its own."""

    def log_base_measure(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


@pytest.mark.parametrize("name", [*LIKELIHOODS, "of its own"])
def test_the_base_measure_of_each_cell_is_kept(name: str) -> None:
    """Epoch after epoch, also of cells that were seen before in other company."""
    model, x = make_model(), make_dense().astype(np.float64)
    likelihood = LIKELIHOODS.get(name, Doubled())
    each = 2 * x if name == "of its own" else log_base_measure(x, name)
    loader = CountLoader(
        model.adata_manager, likelihood=likelihood, indices=np.arange(N_CELLS), batch_size=4, shuffle=True
    )
    with seeded(0):
        for _ in range(3):
            for batch, cells in ((batch, positions([batch])[0]) for batch in loader):
                found = batch[REGISTRY_KEYS.X_KEY].log_base_measure
                assert found.dtype == torch.float32
                np.testing.assert_allclose(found, each[cells].sum(1), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("engine", ["blocked", "dense"])
def test_the_bound_of_a_batch_is_that_of_its_counts_in_a_dense_tensor(engine: str) -> None:
    """Tolerance: sums of six genes in float32, in another order."""
    model = make_model()
    model.module.engine = engine
    for batch in make_loader(model):
        dense = batch | {REGISTRY_KEYS.X_KEY: batch[REGISTRY_KEYS.X_KEY].dense()}
        with torch.no_grad():
            found, expected = (_seeded_bound(model.module, tensors) for tensors in (batch, dense))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def _seeded_bound(module: torch.nn.Module, tensors: dict) -> np.ndarray:
    with seeded(0):
        return array(module.bound(*module.data(tensors)).elbo)


# -- order and size of the batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("n_cells", "batch_size"), [(23, 5), (20, 5), (3, 5), (5, 5), (6, 1), (0, 5)])
def test_batches_take_the_cells_in_order(n_cells: int, batch_size: int, drop_last: bool) -> None:
    indices = np.random.default_rng(2).permutation(N_CELLS)[:n_cells]
    loader = make_loader(make_model(), indices, batch_size=batch_size, drop_last=drop_last)
    found = positions(loader)
    expected = [indices[i : i + batch_size].tolist() for i in range(0, n_cells, batch_size)]
    if drop_last:
        expected = [cells for cells in expected if len(cells) == batch_size]
    assert found == expected
    assert len(loader) == len(expected)


def test_cells_are_shuffled_anew_in_each_epoch() -> None:
    indices = np.arange(2, 20)
    loader = make_loader(make_model(), indices, shuffle=True)
    with seeded(0):
        epochs = [positions(loader) for _ in range(3)]
    for epoch in epochs:
        assert [len(cells) for cells in epoch] == [5, 5, 5, 3]
        cells = list(chain(*epoch))
        assert sorted(cells) == indices.tolist()
        assert cells != indices.tolist()
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_is_that_of_the_seed() -> None:
    loaders = [make_loader(make_model(), shuffle=True) for _ in range(2)]
    found = []
    for loader, seed in zip([*loaders, loaders[0]], [7, 7, 8], strict=True):
        with seeded(seed):
            found.append([positions(loader) for _ in range(2)])
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_shuffled_batches_leave_out_other_cells_in_each_epoch() -> None:
    loader = make_loader(make_model(), shuffle=True, drop_last=True)
    with seeded(0):
        epochs = [positions(loader) for _ in range(10)]
    assert all([len(cells) for cells in epoch] == [5] * 4 for epoch in epochs)
    assert len({frozenset(range(N_CELLS)).difference(*epoch) for epoch in epochs}) > 5


def test_an_unshuffled_loader_draws_nothing_but_a_seed_for_its_workers() -> None:
    """`DataLoader` draws that one whenever it is iterated."""
    loader = make_loader(make_model())
    with seeded(0):
        torch.empty((), dtype=torch.int64).random_()
        expected = torch.get_rng_state()
    with seeded(0):
        list(loader)
        assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_worker_makes_the_same_batches(shuffle: bool) -> None:
    model = make_model()
    found = []
    for n_workers in (0, 1):
        with seeded(0):
            found.append(list(make_loader(model, shuffle=shuffle, num_workers=n_workers)))
    ours, workers = found
    assert positions(ours) == positions(workers)
    for mine, other in zip(ours, workers, strict=True):
        assert set(mine) == set(other)
        x = other.pop(REGISTRY_KEYS.X_KEY)
        assert_counts(x, array(mine[REGISTRY_KEYS.X_KEY].dense()))
        np.testing.assert_array_equal(x.log_base_measure, mine[REGISTRY_KEYS.X_KEY].log_base_measure)
        for key, value in other.items():
            assert torch.equal(value, mine[key]), key


# -- the first layer of the encoder ------------------------------------------------------------------------------------

SIZES = Sizes(N_GENES, n_batch=3, n_categories=(2, 4), n_continuous=2)
EXACT = {"rtol": 1e-10, "atol": 1e-12}  #: a few hundred operations in float64
PATHS = {"sparse": 2.0, "dense": 0.0}  #: density below which a batch stays sparse
every_path = pytest.mark.parametrize("path", PATHS)


def make_encoder(sizes: Sizes = SIZES, **options: object) -> Encoder:
    """In float64, every parameter away from where it starts."""
    options = {"n_hidden": 5, "n_layers": 1, "dropout_rate": 0.0, "normalization": "layer"} | options
    with seeded(0):
        encoder = Encoder(sizes, **({"encode_covariates": True} | options)).double()
    with torch.no_grad():
        for seed, parameter in enumerate(filter(torch.Tensor.numel, encoder.parameters())):
            parameter.add_(0.4 * normal(*parameter.shape, seed=50 + seed))
    return encoder


def make_covariates(n_cells: int, sizes: Sizes = SIZES) -> Covariates:
    rng = np.random.default_rng(4)
    codes = [rng.integers(n, size=(n_cells, 1)) for n in (sizes.n_batch, *sizes.n_categories)]
    return Covariates(
        torch.tensor(codes[0]), torch.tensor(np.hstack(codes[1:])), normal(n_cells, sizes.n_continuous, seed=6)
    )


def encoded(encoder: Encoder, x: np.ndarray, covariates: Covariates) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Features, and the gradients of a weighted sum of them."""
    features = encoder(Counts.of(torch.tensor(x)), covariates)
    (features * normal(*features.shape, seed=7)).sum().backward()
    gradients = {name: array(p.grad).copy() for name, p in encoder.named_parameters() if p.numel()}
    encoder.zero_grad()
    return array(features), gradients


@pytest.fixture
def set_path(monkeypatch: pytest.MonkeyPatch) -> object:
    return lambda path: monkeypatch.setattr("scvae_tools._module.networks.LARGEST_SPARSE_DENSITY", PATHS[path])


@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("normalization", ["layer", "batch", "none"])
@pytest.mark.parametrize("encode_covariates", [False, True])
@pytest.mark.parametrize("x", [make_dense(9, empty=True), np.zeros((3, N_GENES)), np.ones((4, N_GENES))])
def test_a_sparse_batch_is_encoded_as_a_dense_one(
    set_path: object, x: np.ndarray, encode_covariates: bool, normalization: str, n_layers: int
) -> None:
    encoder = make_encoder(encode_covariates=encode_covariates, normalization=normalization, n_layers=n_layers)
    covariates = make_covariates(len(x))
    found = {}
    for path in PATHS:
        set_path(path)
        found[path] = encoded(encoder, x.astype(np.float64), covariates)
    np.testing.assert_allclose(found["sparse"][0], found["dense"][0], **EXACT)
    for name, gradient in found["sparse"][1].items():
        np.testing.assert_allclose(gradient, found["dense"][1][name], **EXACT, err_msg=name)


@every_path
def test_the_first_layer_is_a_product_with_a_gradient_that_is_one(set_path: object, path: str) -> None:
    """Without covariates, norm and, where the features are positive, ReLU."""
    set_path(path)
    x = make_dense(9, empty=True).astype(np.float64)
    encoder = make_encoder(encode_covariates=False, normalization="none")
    features, gradients = encoded(encoder, x, make_covariates(9))
    weight, first = array(encoder.gene_weight), encoder.layers.fc_layers[0][0]
    linear = x @ weight + array(first.bias)
    np.testing.assert_allclose(features, np.maximum(linear, 0), **EXACT)
    by_linear = array(normal(9, 5, seed=7)) * (linear > 0)
    np.testing.assert_allclose(gradients["gene_weight"], x.T @ by_linear, **EXACT)
    np.testing.assert_allclose(gradients[f"layers.{_name_of(encoder, first)}.bias"], by_linear.sum(0), **EXACT)


def _name_of(encoder: Encoder, layer: torch.nn.Module) -> str:
    return next(name for name, module in encoder.layers.named_modules() if module is layer)


@pytest.mark.parametrize("entries", [1, 7, 12, 10**6])
def test_the_gradient_of_many_genes_is_computed_in_parts(
    set_path: object, monkeypatch: pytest.MonkeyPatch, entries: int
) -> None:
    set_path("sparse")
    x, encoder = make_dense(9, empty=True).astype(np.float64), make_encoder()
    _, expected = encoded(encoder, x, make_covariates(9))
    monkeypatch.setattr("scvae_tools._module.sparse.GATHERED_ENTRIES", entries, raising=False)
    _, found = encoded(encoder, x, make_covariates(9))
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, expected[name], **EXACT, err_msg=name)


@every_path
def test_gradients_of_the_first_layer_are_finite_differences(set_path: object, path: str) -> None:
    """Tolerance: those of `torch.autograd.gradcheck` in float64, central differences of step 1e-6."""
    set_path(path)
    x, covariates = Counts.of(torch.tensor(make_dense(5)).double()), make_covariates(5)
    encoder = make_encoder(normalization="layer")
    names = [name for name, parameter in encoder.named_parameters() if parameter.numel()]

    def features(*parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(encoder, dict(zip(names, parameters, strict=True)), (x, covariates))

    parameters = [encoder.get_parameter(name) for name in names]
    assert torch.autograd.gradcheck(features, parameters)


@every_path
def test_a_frozen_first_layer_gets_no_gradient(set_path: object, path: str) -> None:
    set_path(path)
    encoder = make_encoder()
    encoder.gene_weight.requires_grad_(False)
    encoder(Counts.of(torch.tensor(make_dense(5)).double()), make_covariates(5)).sum().backward()
    assert encoder.gene_weight.grad is None
    assert all(p.grad is not None for name, p in encoder.named_parameters() if p.numel() and name != "gene_weight")
