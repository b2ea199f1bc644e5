"""Training on counts that stay in a file: memory, speed, and whether the result is that of the counts in memory.

    python benchmarks/scale.py [--cells 1000000] [--quick] [--only NAME ...] [--folder FOLDER] [--json FILE]

Cells are simulated in parts and appended to a zarr and an h5ad file (CSR): 2,000 genes, about 300 counts a cell that
are not 0, two batches, types of 40, 30, 20, 9, 0.9 and 0.1 % of the cells (the small sets of five: 40, 30, 20, 9, 1 %).
``--folder`` keeps the files for the next run, which must be deleted where `svt.datasets.simulate` has changed.

Each measurement is a process of its own. Memory is its peak above what it holds with everything imported, before the
file is opened; 1 GB is 10^9 bytes. It is that of the whole main call, `svt.tl.scvae(adata, batch_key="batch")` without
λ. Cells a second are those of the epochs of a VAE without held-out cells, but for the first epoch of each turn; the
ways to hold the counts take turns in one process, and the ratio is the median over the turns. They need a machine with
nothing else to do; the ratio of cells a second of a processor beside it does not see how long a file is waited for.

Rows:

* memory: peak of N cells from zarr and from h5ad, and over that of N/4 cells.
* speed, speed-wide: cells a second from the file over in memory, for N cells and for 100,000 with 27,998 genes.
* clusters: adjusted Rand index (ARI) of the clusters from the file and in memory, with the same seed.
* sorted: held-out ELBO of N/4 cells from a file that is sorted by type and batch, less that of the same cells from a
  file in random order; the same cells are held out.
* rare: recall and precision of the component that has the type of 0.1 % of N cells as its own: the one of the highest
  F1 score.
* killed: a training that is killed in the middle of an epoch (SIGKILL), first of the VAE and then of the mixture, and
  called again, against one that was not: arrays of the results that are not the same to the bit.
* annbatch: cells a second of reading the windows of an epoch of N cells, by the loader of annbatch over our own: the
  same runs of the same zarr with the same checks, by the codecs of zarr and by those of zarrs, from a file as anndata
  writes it and as annbatch does. It says so where a package is not installed, and has no target.

``--quick`` takes 40,000 cells and fewer of the others, and few epochs. It shows that all rows run: few epochs are not
enough for clusters, and of sets that are hardly larger than what is read at once the larger one needs more memory.
``--max-epochs`` is for all trainings but those of the rows on speed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as lightning
import numpy as np
import psutil
import torch
from _annbatch import compare_reading, lacking
from _scale_files import FIVE_TYPES, Recipe, held_out, in_order, opened, simulated, wide, write
from sklearn.metrics import adjusted_rand_score
from throughput import GB, facts, peak_memory, take_turns

import scvae_tools as svt
from scvae_tools._data import stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FILES = ("zarr", "h5ad")
LEAST_CELLS = 4_000


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Parameters
    ----------
    n_cells
        N of the rows.
    n_wide, n_few
        Cells of the set with all genes, and of the set for clusters and kills.
    repeats
        Turns of each way in the rows on speed.
    epochs
        Largest number of epochs of the main call in each row; None for its default.
    """

    n_cells: int
    n_wide: int = 100_000
    n_few: int = 20_000
    repeats: int = 3
    epochs: dict[str, int | None] = field(
        default_factory=lambda: {"memory": 4, "clusters": None, "sorted": None, "rare": None, "killed": 8}
    )

    def but(self, *, max_epochs: int | None) -> Settings:
        """Settings with no set larger than N, and a number of epochs for all, if one is given."""
        epochs = self.epochs if max_epochs is None else dict.fromkeys(self.epochs, max_epochs)
        most = {name: min(getattr(self, name), self.n_cells) for name in ("n_wide", "n_few")}
        return replace(self, epochs=epochs, **most)


QUICK_CELLS = 40_000
QUICK = {
    "n_wide": 4_000,
    "n_few": 6_000,
    "repeats": 2,
    "epochs": {"memory": 4, "clusters": 12, "sorted": 8, "rare": 6, "killed": 6},
}


@dataclass(frozen=True)
class Target:
    """What a row is to reach: at least, at most, or both."""

    least: float = -np.inf
    most: float = np.inf

    def is_met(self, value: float) -> bool:
        return self.least <= value <= self.most

    def __str__(self) -> str:
        if np.isfinite(self.least) and np.isfinite(self.most):
            return f"{self.least:g} to {self.most:g}"
        return f">= {self.least:g}" if np.isfinite(self.least) else f"<= {self.most:g}"


@dataclass(frozen=True)
class Result:
    """A number, its unit, the target of the issue if there is one, and what else was measured."""

    what: str
    value: float
    unit: str = ""
    target: Target | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def is_reached(self) -> bool | None:
        return None if self.target is None else self.target.is_met(self.value)

    def __str__(self) -> str:
        target = "" if self.target is None else f"  (target {self.target}: {'yes' if self.is_reached else 'no'})"
        return f"{self.what}: {self.value:.4g} {self.unit}".rstrip() + target

    def record(self) -> dict[str, Any]:
        """All of it, for the JSON file."""
        return asdict(self) | {"target": self.target and str(self.target), "reached": self.is_reached}


# -- in a process of its own -------------------------------------------------------------------------------------------


class Clock(lightning.Callback):
    """Seconds of a training: for each epoch when it began, how long held-out cells took, and when it ended.

    ``of_processors`` are the seconds that all threads computed in each epoch.
    """

    def __init__(self) -> None:
        self.epochs: list[tuple[float, float, float]] = []
        self.of_processors: list[float] = []

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._start, self._held_out, self._start_of_work = time.perf_counter(), 0.0, time.process_time()

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._start_of_held_out = time.perf_counter()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._held_out += time.perf_counter() - self._start_of_held_out

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.epochs.append((self._start, self._held_out, time.perf_counter()))
        self.of_processors.append(time.process_time() - self._start_of_work)

    def training(self) -> list[float]:
        """Seconds of training in each epoch."""
        return [end - start - held_out for start, held_out, end in self.epochs]

    def parts(self, begin: float, end: float) -> dict[str, float]:
        """Seconds of the parts of a call."""
        between = [after[0] - before[2] for before, after in zip(self.epochs, self.epochs[1:], strict=False)]
        return {
            "before the epochs": self.epochs[0][0] - begin,
            "epochs": sum(self.training()),
            "held-out cells": sum(held_out for _, held_out, _ in self.epochs),
            "between the epochs": sum(between),
            "after the epochs": end - self.epochs[-1][2],
        }


class Killer(lightning.Callback):
    """Ends the process as `kill -9` does, in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: dict, batch_idx: int
    ) -> None:
        if trainer.current_epoch == self.epoch and batch_idx >= trainer.num_training_batches // 2:
            os.kill(os.getpid(), signal.SIGKILL)


def idle_memory() -> int:
    """Bytes that the process holds with everything imported, from which its peak starts anew."""
    torch.rand(200, 200) @ torch.rand(200, 200)  # starts the threads
    svt.SCVAE, svt.tl.scvae  # noqa: B018, imports all that they need
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # give back what imports have freed, or it would be used unseen
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew; elsewhere it includes the imports
    return psutil.Process().memory_info().rss


def make(recipe: dict[str, Any], folder: str) -> dict[str, Any]:
    """Make the files of a recipe; those of a sorted one from those in random order, which must be there."""
    idle = idle_memory()
    own = Recipe(**recipe | {"proportions": tuple(recipe["proportions"])})
    started, target = Path(f"{folder}/{own.name}.started"), Path(folder, own.name)
    shutil.rmtree(started, ignore_errors=True)  # of a run that was killed
    started.mkdir(parents=True)
    shuffled = Path(folder, replace(own, is_sorted=False).name)
    parts = in_order(opened(shuffled, "zarr")) if own.is_sorted else simulated(own)
    found = write(parts, started)
    started.rename(target)
    return found | {"peak_gb": (peak_memory() - idle) / GB}


def train(
    files: str,
    way: str,
    *,
    share_held_out: float | None = None,
    killed_in: int | None = None,
    results: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train by the main call.

    Parameters
    ----------
    files
        Folder of the files.
    way
        How the counts are held: "zarr", "h5ad" or "memory".
    share_held_out
        Share of the cells that are held out, the same whatever the order of the file; None to leave it to the call.
    killed_in
        Epoch, from 0, in which the process is killed.
    results
        File for the results of the cells.
    **options
        Of `svt.tl.scvae`.
    """
    idle, begin = idle_memory(), time.perf_counter()
    adata = opened(Path(files), way)
    clock = Clock()
    callbacks = [clock] + ([] if killed_in is None else [Killer(killed_in)])
    if share_held_out is not None:
        options["validation_indices"] = held_out(adata.obs, share_held_out)
    common = {"batch_key": "batch", "write_lambda": False, "accelerator": "cpu", "progress": False}
    svt.tl.scvae(adata, callbacks=callbacks, **common, **options)
    peak, end = peak_memory(), time.perf_counter()
    summary = adata.uns["scvae"]
    if results is not None:
        np.savez(
            results,
            latent=adata.obsm["X_scvae"],
            clusters=adata.obs["scvae"].astype(str).to_numpy(dtype=str),
            probabilities=np.asarray(adata.obsm["scvae_probs"]),
            history=summary["history"].select_dtypes("number").to_numpy(),
            types=adata.obs["cell_type"].astype(str).to_numpy(dtype=str),
        )
    return {
        "peak_gb": (peak - idle) / GB,
        "idle_gb": idle / GB,
        "seconds": clock.parts(begin, end),
        "epochs": len(clock.epochs),
        "clusters": int(adata.obs["scvae"].nunique()),
        "elbo": summary["elbo"]["validation"]["elbo"],
    }


class Turn:
    """A side that trains a VAE for two epochs in each turn, and gives the seconds a cell of the second.

    ``of_processors`` are those that all threads computed, turn by turn.
    """

    def __init__(self, files: str, way: str) -> None:
        adata = opened(Path(files), way)
        svt.SCVAE.setup_anndata(adata, batch_key="batch")
        self.model, self.n_cells = svt.SCVAE(adata, mixture=False), adata.n_obs
        self.of_processors: list[float] = []

    def __call__(self) -> float:
        clock = Clock()
        self.model.train(2, train_size=1.0, accelerator="cpu", progress=False, callbacks=[clock])
        self.of_processors.append(clock.of_processors[-1] / self.n_cells)
        return clock.training()[-1] / self.n_cells


def compare_speed(files: str, ways: list[str], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Cells of each way in a second, and in a second of a processor, turn by turn, side by side."""
    sides = {way: Turn(files, way) for way in ways}
    seconds = {way: {"cells/s": each} for way, each in take_turns(sides, repeats).items()}
    for way, side in sides.items():
        seconds[way]["cells/s of a processor"] = np.array(side.of_processors)
    return {way: {unit: (1 / each).tolist() for unit, each in own.items()} for way, own in seconds.items()}


MEASUREMENTS: dict[str, Callable[..., dict]] = {
    "make": make,
    "train": train,
    "speed": compare_speed,
    "reading": compare_reading,
}


# -- processes and files -----------------------------------------------------------------------------------------------


class MeasurementError(RuntimeError):
    """Error for a process that has measured nothing."""


def start(name: str, arguments: dict[str, Any]) -> subprocess.CompletedProcess:
    """Run one of `MEASUREMENTS` in a process of its own."""
    command = [sys.executable, __file__, "--measure", name, json.dumps(arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)


def measured(name: str, **arguments: Any) -> dict[str, Any]:
    """What one of `MEASUREMENTS` returns.

    Raises
    ------
    MeasurementError
        If its process fails.
    """
    run = start(name, arguments)
    if run.returncode != 0:
        raise MeasurementError(f"the process of {name!r} ended with {run.returncode}; its error is above")
    return json.loads(run.stdout.splitlines()[-1])


class Files:
    """Files of recipes in a folder, each made when it is first asked for.

    Parameters
    ----------
    folder
        Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, dict[str, Any]] = {}  #: what was measured while they were made

    def of(self, recipe: Recipe) -> str:
        """Folder of the files of a recipe."""
        path = self.folder / recipe.name
        if not path.exists():
            if recipe.is_sorted:
                self.of(replace(recipe, is_sorted=False))
            begin = time.perf_counter()
            found = measured("make", recipe=asdict(recipe), folder=str(self.folder))
            self.made[recipe.name] = found | {"seconds": time.perf_counter() - begin}
            text = "{seconds:.0f} s, {peak_gb:.2f} GB above an idle import, {values_per_cell:g} counts a cell above 0"
            print(f"  made {recipe.name}: {text.format(**self.made[recipe.name])}", flush=True)
        return str(path)

    def train(self, recipe: Recipe, way: str, max_epochs: int | None, **arguments: Any) -> dict[str, Any]:
        """What `train` returns, and "results" with those of the cells."""
        files = self.of(recipe)  # before the process, which is not to make them
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            results = Path(folder, "results.npz")
            options = {"max_epochs": max_epochs, "results": str(results)} | arguments
            found = measured("train", files=files, way=way, **options)
            with np.load(results) as arrays:
                return found | {"results": dict(arrays)}


def about(found: dict[str, Any]) -> dict[str, Any]:
    """What a training measured, without the results of the cells."""
    return {name: value for name, value in found.items() if name != "results"}


# -- rows --------------------------------------------------------------------------------------------------------------


def memory(settings: Settings, files: Files, *, target: Target, target_ratio: Target) -> Iterator[Result]:
    """Peak memory of the main call."""
    recipe = Recipe(settings.n_cells)
    fewer = replace(recipe, n_cells=settings.n_cells // 4)
    for way in FILES:
        many, few = (files.train(each, way, settings.epochs["memory"]) for each in (recipe, fewer))
        of_many, of_few = many["peak_gb"], few["peak_gb"]
        yield Result(f"peak memory, {recipe}, {way}", of_many, "GB", target, about(many))
        what = f"peak memory, {recipe} over {fewer} ({of_few:.3f} GB), {way}"
        yield Result(what, of_many / of_few, "", target_ratio, about(few))


def speed(
    settings: Settings, files: Files, *, recipe: Callable[[Settings], Recipe], ways: tuple[str, ...], target: Target
) -> Iterator[Result]:
    """Cells a second from files over in memory; and a second of a processor, which depends less on other work."""
    own = recipe(settings)
    found = measured("speed", files=files.of(own), ways=["memory", *ways], repeats=settings.repeats)
    for way in ways:
        for unit, values in found[way].items():
            beside = found["memory"][unit]
            ratios = np.divide(values, beside)
            numbers = f"{np.median(values):,.0f} / {np.median(beside):,.0f}, {ratios.min():.2f}-{ratios.max():.2f}"
            aim = target if unit == "cells/s" else None
            what = f"{unit}, {own}, {way} over in memory ({numbers})"
            yield Result(what, float(np.median(ratios)), "", aim, {way: values, "memory": beside})


def clusters(settings: Settings, files: Files, *, target: Target) -> Iterator[Result]:
    """Clusters from a file and in memory."""
    recipe = Recipe(settings.n_few, proportions=FIVE_TYPES)
    of_file, of_memory = (files.train(recipe, way, settings.epochs["clusters"]) for way in ("zarr", "memory"))
    found = {"zarr": about(of_file), "memory": about(of_memory)}
    one, other = (each["results"]["clusters"] for each in (of_file, of_memory))
    yield Result(f"ARI of clusters, {recipe}, zarr and in memory", adjusted_rand_score(one, other), "", target, found)
    for way, each in (("zarr", of_file), ("in memory", of_memory)):
        results = each["results"]
        what = f"ARI of {each['clusters']} clusters and types, {recipe}, {way}"
        yield Result(what, adjusted_rand_score(results["types"], results["clusters"]))


def order(settings: Settings, files: Files, *, target: Target) -> Iterator[Result]:
    """Held-out ELBO from a sorted file less that from a shuffled one."""
    shuffled = Recipe(settings.n_cells // 4)
    both = {}
    for name, recipe in (("shuffled", shuffled), ("sorted", replace(shuffled, is_sorted=True))):
        both[name] = about(files.train(recipe, "zarr", settings.epochs["sorted"], share_held_out=0.1))
    elbo = {name: found["elbo"] for name, found in both.items()}
    what = f"held-out ELBO, {shuffled}, sorted ({elbo['sorted']:.2f}) less shuffled ({elbo['shuffled']:.2f})"
    yield Result(what, elbo["sorted"] - elbo["shuffled"], "nats per cell", target, both)


def rare(settings: Settings, files: Files, *, target: Target, target_precision: Target) -> Iterator[Result]:
    """The component of the rare type."""
    recipe = Recipe(settings.n_cells)
    found = files.train(recipe, "zarr", settings.epochs["rare"])
    results = found["results"]
    is_rare = results["types"] == f"type{len(recipe.proportions) - 1}"
    recall, precision = best_component(is_rare, results["clusters"])
    what = f"component of the {is_rare.sum():,} cells of the rare type, {recipe}, {found['clusters']} clusters"
    yield Result(f"{what}: recall", recall, "", target, about(found))
    yield Result(f"{what}: precision", precision, "", target_precision)


def best_component(is_rare: np.ndarray, cluster: np.ndarray) -> tuple[float, float]:
    """Recall and precision of the cluster with the highest F1 score."""
    names, codes = np.unique(cluster, return_inverse=True)
    own, sizes = (np.bincount(codes[chosen], minlength=len(names)) for chosen in (is_rare, slice(None)))
    best = np.argmax(2 * own / (is_rare.sum() + sizes))
    return float(own[best] / is_rare.sum()), float(own[best] / sizes[best])


def killed(settings: Settings, files: Files, *, target: Target) -> Iterator[Result]:
    """Arrays that differ between a training that was killed twice and went on, and one that was not."""
    recipe, max_epochs = Recipe(settings.n_few, proportions=FIVE_TYPES), settings.epochs["killed"]
    path, epochs = files.of(recipe), (max_epochs // 3, max_epochs - 1)
    with tempfile.TemporaryDirectory(dir=files.folder) as checkpoint:
        for epoch in epochs:
            arguments = {"files": path, "way": "zarr", "max_epochs": max_epochs, "checkpoint": checkpoint}
            run = start("train", arguments | {"killed_in": epoch})
            if run.returncode != -signal.SIGKILL:
                raise MeasurementError(f"a training was to be killed in epoch {epoch}, and ended with {run.returncode}")
        continued = files.train(recipe, "zarr", max_epochs, checkpoint=checkpoint)
    whole = files.train(recipe, "zarr", max_epochs)
    differ = [name for name, values in whole["results"].items() if not is_same(values, continued["results"][name])]
    what = f"arrays that differ after kills in epochs {epochs[0]} and {epochs[1]} of {max_epochs}, {recipe}"
    yield Result(what, len(differ), "", target, {"differ": differ, "whole": about(whole), "last": about(continued)})


def reading(settings: Settings, files: Files) -> Iterator[Result]:
    """Cells a second of reading by annbatch over our own."""
    recipe = Recipe(settings.n_cells)
    for pipeline in ("zarr", "zarrs"):
        if (package := lacking(pipeline)) is not None:
            yield Result(f"cells/s of reading with {pipeline}: did not run, {package} is not installed", np.nan)
            continue
        for form in ("anndata", "annbatch"):
            options = {"pipeline": pipeline, "form": form, "repeats": settings.repeats}
            found = measured("reading", files=files.of(recipe), **options)
            own, other, bare = (np.array(found[name]) for name in ("own", "annbatch, checked", "annbatch"))
            numbers = f"{np.median(other):,.0f} / {np.median(own):,.0f}, {np.median(bare):,.0f} without checks"
            what = f"cells/s of reading, {recipe}, {pipeline}, file of {form}, annbatch over own ({numbers})"
            yield Result(what, float(np.median(other / own)), "", None, found)


def is_same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are the same to the bit, NaN included."""
    return one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes()


# -- the table ---------------------------------------------------------------------------------------------------------

ROWS: dict[str, Callable[[Settings, Files], Iterator[Result]]] = {
    "memory": partial(memory, target=Target(most=1.0), target_ratio=Target(0.9, 1.1)),
    "speed": partial(speed, recipe=lambda settings: Recipe(settings.n_cells), ways=FILES, target=Target(least=0.8)),
    "speed-wide": partial(
        speed, recipe=lambda settings: wide(settings.n_wide), ways=("zarr",), target=Target(least=0.8)
    ),
    "clusters": partial(clusters, target=Target(least=0.97)),
    "sorted": partial(order, target=Target(-0.5, 0.5)),
    # More than half of its cells: it is a component of the rare type, not one of another type that holds it.
    "rare": partial(rare, target=Target(least=0.9), target_precision=Target(least=0.5)),
    "killed": partial(killed, target=Target(most=0)),
    "annbatch": reading,
}


def run(options: argparse.Namespace, settings: Settings, files: Files) -> bool:
    """Measure the rows, print each result as it comes, and return whether all could be measured."""
    record = {"about": facts(settings), "settings": asdict(settings), "rows": [], "failed": {}}
    print(", ".join(f"{name} {value}" for name, value in record["about"].items()), flush=True)
    for name in options.only or ROWS:
        begin = time.perf_counter()
        try:
            for result in ROWS[name](settings, files):
                print(f"{name}: {result}", flush=True)
                record["rows"].append({"row": name, **result.record()})
        except MeasurementError as error:
            print(f"{name}: not measured, {error}", flush=True)
            record["failed"][name] = str(error)
        print(f"  ({time.perf_counter() - begin:.0f} s)", flush=True)
        if options.json is not None:  # after each row: all of them take long
            options.json.write_text(json.dumps(record | {"files": files.made}, indent=1) + "\n")
    return not record["failed"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, help=f"N, 1,000,000 by default, at least {LEAST_CELLS:,}")
    parser.add_argument("--quick", action="store_true", help="small sets and few epochs, less than ten minutes")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="NAME", help=f"rows: {', '.join(ROWS)}")
    parser.add_argument("--repeats", type=int, help="turns of each way in the rows on speed")
    parser.add_argument("--max-epochs", type=int, help="of all trainings but those of the rows on speed")
    parser.add_argument("--folder", type=Path, help="for the files, which are kept there; otherwise a temporary one")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # one of `MEASUREMENTS`, and its arguments
    options = parser.parse_args()
    if options.cells is not None and options.cells < LEAST_CELLS:
        parser.error(f"--cells must be at least {LEAST_CELLS:,}, so that N/4 has a cell of the rare type")
    return options


def main() -> int:
    options = parse()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    if options.measure is not None:
        name, arguments = options.measure
        stored.LARGEST_WHOLE = 0  # small files, too, are not read as a whole
        print(json.dumps(MEASUREMENTS[name](**json.loads(arguments))))
        return 0
    n_cells = options.cells or (QUICK_CELLS if options.quick else 1_000_000)
    chosen = (QUICK if options.quick else {}) | ({"repeats": options.repeats} if options.repeats else {})
    settings = Settings(n_cells, **chosen).but(max_epochs=options.max_epochs)
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        return int(not run(options, settings, Files(options.folder)))
    with tempfile.TemporaryDirectory() as folder:
        return int(not run(options, settings, Files(Path(folder))))


if __name__ == "__main__":
    sys.exit(main())
