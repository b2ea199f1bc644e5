"""Cells held on a device: their batches are those of the loader, from every kind of count, without a look at any."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from scvi import REGISTRY_KEYS

import scvae_tools as svt
from scvae_tools._data import resident
from scvae_tools._data.loader import Batches, CountDataset, smallest_type
from scvae_tools._data.resident import ResidentCells, n_bytes_on_device
from scvae_tools.likelihoods import LIKELIHOODS

N_CELLS, N_GENES = 30, 9


def make_counts(*, largest=5, share=0.4, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.integers(1, largest + 1, (N_CELLS, N_GENES)) * (rng.random((N_CELLS, N_GENES)) < share)
    x[0, 0] = largest
    x[[3, N_CELLS - 1]] = 0  # cells without counts
    return x.astype(np.float32)


def make_dataset(x, likelihood="nb"):
    adata = svt.datasets.simulate(N_CELLS, N_GENES, 2, n_batches=2, random_state=0)
    adata.obs["age"] = np.linspace(20, 80, N_CELLS)
    svt.SCVAE.setup_anndata(adata, batch_key="batch", labels_key="component", continuous_covariate_keys=["age"])
    dataset = CountDataset(svt.SCVAE(adata, mixture=False, n_hidden=4).adata_manager, LIKELIHOODS[likelihood])
    dataset.counts = sparse.csr_matrix(x)  # also such as are refused before
    return dataset


COUNTS = {
    "of one byte": make_counts(),
    "of two bytes": make_counts(largest=300),
    "of four bytes": make_counts(largest=40_000),
    "fractions": make_counts() / 4,
    "above all integers": make_counts(largest=2**40),
    "one cell has every gene": np.where(np.arange(N_CELLS)[:, None] == 7, 2, make_counts()).astype(np.float32),
    "a count in one cell": np.eye(N_CELLS, N_GENES, dtype=np.float32) * (np.arange(N_CELLS) == 4)[:, None],
}


@pytest.mark.parametrize("form", COUNTS)
@pytest.mark.parametrize("likelihood", ["nb", "bernoulli", "log_normal"])
def test_batches_are_those_of_the_loader(form, likelihood):
    dataset = make_dataset(COUNTS[form], likelihood)
    cells = ResidentCells(dataset, "cpu")
    for positions in (np.array([7, 3, 0, 29, 4]), np.array([3]), np.arange(N_CELLS), np.array([5, 5, 4])):
        found, expected = cells[positions], dataset[positions]
        assert set(found) == set(expected)
        counts, expected_counts = found.pop(REGISTRY_KEYS.X_KEY), expected.pop(REGISTRY_KEYS.X_KEY)
        torch.testing.assert_close(counts.dense(), expected_counts.dense(), rtol=0, atol=0)
        torch.testing.assert_close(counts.total(), expected_counts.total())
        torch.testing.assert_close(counts.log_base_measure, expected_counts.log_base_measure, rtol=1e-5, atol=1e-6)
        for name, value in found.items():
            assert value.dtype == expected[name].dtype
            assert torch.equal(value, expected[name])


def test_without_any_count_batches_are_zero():
    dataset = make_dataset(make_counts())
    dataset.counts = sparse.csr_matrix((N_CELLS, N_GENES), dtype=np.float32)
    batch = ResidentCells(dataset, "cpu")[np.array([0, 2])]
    assert torch.equal(batch[REGISTRY_KEYS.X_KEY].dense(), torch.zeros(2, N_GENES))
    assert torch.equal(batch[REGISTRY_KEYS.X_KEY].log_base_measure, torch.zeros(2))


def test_shapes_do_not_depend_on_the_cells():
    """All that is computed on the way has one shape: as many entries as the fullest cell has."""
    cells = ResidentCells(make_dataset(COUNTS["one cell has every gene"]), "cpu")
    assert cells.width == N_GENES
    assert {cells._entries(torch.tensor(own))[0].shape for own in ([3, 29], [7, 0], [4, 4])} == {(2, N_GENES)}


@pytest.mark.parametrize(
    ("largest", "expected"),
    [(255, torch.uint8), (256, torch.int16), (2**15, torch.int32), (2**31, torch.float32), (0.5, torch.float32)],
)
def test_counts_are_held_in_the_smallest_type_that_is_exact(largest, expected):
    counts = np.array([0, 1, largest], dtype=np.float32)
    assert smallest_type(counts) == expected
    np.testing.assert_array_equal(torch.from_numpy(counts).to(expected).float().numpy(), counts)


def test_the_size_that_is_asked_for_is_that_which_is_taken():
    dataset = make_dataset(make_counts())
    assert n_bytes_on_device(dataset) == pytest.approx(ResidentCells(dataset, "cpu").n_bytes, abs=16)


def test_the_base_measure_is_the_same_in_parts(monkeypatch):
    dataset = make_dataset(make_counts())
    whole = ResidentCells(dataset, "cpu").log_base_measure
    monkeypatch.setattr(resident, "GATHERED_ENTRIES", 1)
    assert torch.equal(ResidentCells(dataset, "cpu").log_base_measure, whole)


@pytest.mark.parametrize(
    ("n_cells", "batch_size", "drop_single", "shapes"),
    [
        (20, 5, False, [(3, 5), (1, 5)]),
        (22, 5, False, [(3, 5), (1, 5), (1, 2)]),
        (22, 5, True, [(3, 5), (1, 5), (1, 2)]),
        (21, 5, False, [(3, 5), (1, 5), (1, 1)]),
        (21, 5, True, [(3, 5), (1, 5)]),
        (17, 5, False, [(3, 5), (1, 2)]),
        (3, 5, False, [(1, 3)]),
    ],
)
def test_groups_of_steps_are_the_batches_in_their_order(n_cells, batch_size, drop_single, shapes, monkeypatch):
    monkeypatch.setattr(resident, "STEPS_AT_ONCE", 3)
    indices = np.random.default_rng(0).permutation(N_CELLS)[:n_cells]
    steps = ResidentCells(make_dataset(make_counts()), "cpu").steps(indices, batch_size, drop_single=drop_single)
    drops, groups, batches = drop_single and n_cells % batch_size == 1, [], []
    for into, source in ((groups, steps), (batches, Batches(indices, batch_size, shuffle=True, drop_last=drops))):
        torch.manual_seed(0)
        if source is steps:
            into.extend(source)
        else:
            torch.empty((), dtype=torch.int64).random_()  # a loader draws a seed for its workers
            into.extend(source)
    assert [(number, tuple(positions.shape)) for number, positions in groups] == [(0, shape) for shape in shapes]
    assert len(steps) == len(shapes)
    assert steps.n_steps == len(batches)
    found = [step.tolist() for _, group in groups for step in group]
    assert found == [batch.tolist() for batch in batches]
