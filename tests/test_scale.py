"""The files of benchmarks/scale.py: the same cells in both formats and both orders, made in parts."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from anndata.abc import CSRDataset

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture(scope="module")
def files():
    sys.path.insert(0, BENCHMARKS)
    try:
        import _scale_files

        yield _scale_files
    finally:
        sys.path.remove(BENCHMARKS)


@pytest.fixture(scope="module")
def folders(files, tmp_path_factory):
    """Folders of the files in random order, made in two parts, and sorted, in many."""
    recipe = files.Recipe(1_101, 30)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PART_CELLS", 600)
        for own in (recipe, replace(recipe, is_sorted=True)):
            found[own.is_sorted] = tmp_path_factory.mktemp(own.name)
            parts = files.in_order(files.opened(found[False], "zarr")) if own.is_sorted else files.simulated(own)
            assert files.write(parts, found[own.is_sorted])["cells"] == 1_101
    return found


@pytest.mark.parametrize("way", ["zarr", "h5ad"])
@pytest.mark.parametrize("is_sorted", [False, True])
def test_counts_stay_in_the_file_and_are_those_in_memory(files, folders, way, is_sorted):
    adata = files.opened(folders[is_sorted], way)
    read = files.opened(folders[is_sorted], "memory")
    assert isinstance(adata.X, CSRDataset)
    assert adata.shape == read.shape == (1_101, 30)
    assert (adata.X.to_memory() != read.X).nnz == 0
    assert adata.obs.equals(read.obs)
    assert adata.obs_names.is_unique


def test_sorted_file_has_the_same_cells_by_type_and_batch(files, folders):
    shuffled, in_order = (files.opened(folders[is_sorted], "memory") for is_sorted in (False, True))
    codes = 2 * in_order.obs["cell_type"].cat.codes + in_order.obs["batch"].cat.codes
    assert codes.is_monotonic_increasing
    assert codes.nunique() == 12  # all types in both batches
    same = shuffled[in_order.obs["number"].to_numpy()]
    assert (same.X != in_order.X).nnz == 0
    assert same.obs.equals(in_order.obs)


def test_the_same_cells_are_held_out_in_both_orders(files, folders):
    obs = [files.opened(folders[is_sorted], "memory").obs for is_sorted in (False, True)]
    one, other = (each["number"].iloc[files.held_out(each, 0.1)] for each in obs)
    assert len(one) == 110
    assert np.array_equal(np.sort(one), np.sort(other))
