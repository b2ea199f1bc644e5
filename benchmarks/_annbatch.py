"""Reading of the windows of a training by annbatch, beside our own, for benchmarks/scale.py."""

from __future__ import annotations

import importlib.util
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from anndata import AnnData
from anndata.io import read_elem, sparse_dataset
from throughput import take_turns

import scvae_tools as svt
from scvae_tools._data.conversion import canonical, to_csr, to_float32
from scvae_tools._data.host_windows import WindowTrainingLoader
from scvae_tools._data.loader import CountDataset
from scvae_tools._data.stored import marks_of
from scvae_tools._data.structure import check_structure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from scipy.sparse import csr_matrix

    from scvae_tools._data.stored import StoredCounts


def lacking(pipeline: str) -> str | None:
    """Name of a package that is needed for a pipeline of codecs, and is not there; None if all are."""
    needed = ["annbatch"] + (["zarrs"] if pipeline == "zarrs" else [])
    return next((name for name in needed if importlib.util.find_spec(name) is None), None)


def as_annbatch_writes(folder: Path) -> str:
    """Path of the cells of a folder in one data set of a collection in the order of the file, made if need be."""
    from annbatch import write_sharded  # not everywhere there

    path = folder / "collection.zarr"
    if not path.exists():
        source = zarr.open_group(folder / "cells.zarr", mode="r")
        adata = adata_of(source, sparse_dataset(source["X"]).to_memory())
        write_sharded(zarr.open_group(path, mode="w", zarr_format=3), adata, key="dataset_0")
    return str(path / "dataset_0")


def adata_of(group: zarr.Group, matrix: Any) -> AnnData:
    """AnnData of a group with a matrix as its X."""
    return AnnData(matrix, read_elem(group["obs"]), read_elem(group["var"]))


def windows_of(dataset: CountDataset) -> list[np.ndarray]:
    """Windows of an epoch of a training on all cells."""
    loader = WindowTrainingLoader(dataset, np.arange(len(dataset)), 128, drop_single=True)
    list(loader.steps.draw())
    return list(loader.steps.windows)


def by_annbatch(group: zarr.Group, windows: list[np.ndarray]) -> Callable[[], Iterator[csr_matrix]]:
    """Reader of the windows by the loader of annbatch, which is asked for exactly their runs."""
    from annbatch import Loader
    from annbatch.abc import Sampler

    class Runs(Sampler):
        batch_size, shuffle = None, False

        def n_batches(self, n_obs: int) -> int:
            return len(windows)

        def validate(self, n_obs: int) -> None:
            pass

        def _sample(self, n_obs: int) -> Iterator[dict]:
            for window in windows:
                cuts = [0, *(np.flatnonzero(np.diff(window) != 1) + 1), len(window)]
                runs = [slice(int(window[low]), int(window[high - 1]) + 1) for low, high in pairwise(cuts)]
                yield {"requests": runs, "splits": [np.arange(len(window))]}

    loader = Loader(batch_sampler=Runs(), preload_to_gpu=False).add_datasets([sparse_dataset(group["X"])])
    return lambda: (batch["X"] for batch in loader)


def checked(counts: StoredCounts, rows: csr_matrix, cells: np.ndarray) -> csr_matrix:
    """Rows of another reader in the form of our own, after the same checks."""
    check_structure(rows, "annbatch")
    rows = to_float32(canonical(to_csr(rows, None)))
    if (marks_of(rows) != counts.mark[cells]).any():
        raise ValueError("annbatch has read other counts")
    return rows


def compare_reading(files: str, pipeline: str, form: str, repeats: int) -> dict[str, list[float]]:
    """Cells a second of reading all windows of an epoch, turn by turn: our own, and annbatch with the same checks.

    Parameters
    ----------
    files
        Folder of the files.
    pipeline
        Codecs of zarr: "zarr", its own, or "zarrs".
    form
        "anndata", as anndata has written the file, or "annbatch", in its chunks and shards.
    repeats
        Turns of each.
    """
    if pipeline == "zarrs":
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    path = as_annbatch_writes(Path(files)) if form == "annbatch" else str(Path(files) / "cells.zarr")
    group = zarr.open_group(path, mode="r")
    adata = adata_of(group, sparse_dataset(group["X"]))
    svt.SCVAE.setup_anndata(adata)
    model = svt.SCVAE(adata, mixture=False)
    dataset = CountDataset(model.adata_manager, model.module.likelihood)
    windows, counts = windows_of(dataset), dataset.counts
    read = by_annbatch(group, windows)
    for window, rows in zip(windows, read(), strict=True):
        if (checked(counts, rows, window) != counts[window]).nnz:
            raise ValueError("annbatch has read other counts")

    def own() -> float:
        return timed(lambda: [counts[window].nnz for window in windows])

    def of_annbatch(*, checks: bool) -> float:
        def pass_over() -> None:
            for window, rows in zip(windows, read(), strict=True):
                if checks:
                    checked(counts, rows, window)

        return timed(pass_over)

    sides = {
        "own": own,
        "annbatch, checked": lambda: of_annbatch(checks=True),
        "annbatch": lambda: of_annbatch(checks=False),
    }
    n_cells = sum(map(len, windows))
    return {name: (n_cells / seconds).tolist() for name, seconds in take_turns(sides, repeats).items()}


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
