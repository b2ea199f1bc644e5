"""Speed and memory of training, beside scVI and beside the bare matrix products, in one run.

    python benchmarks/throughput.py [--quick] [--only NAME ...] [--repeats 3] [--threads 2] [--json FILE]

The sides of a row take turns, after one epoch each as a warm-up. A turn is a call of ``train`` without validation, of
which the first epoch is left out. Times are medians over the turns; so is the ratio, which is taken in each turn, of
times measured one after the other. Both models have one hidden layer of 128 and 10 latent dimensions unless a row says
otherwise, and train on the same cells with the same threads.

The bare matrix products are three for each head that is decoded, the least that any implementation needs: features
(n, h) by weight (h, g), gradient (g, n) by features, and gradient (n, g) by weight, each of full size and into memory
that exists already; the median time of each. n is the batch, for the GMVAE the pairs of cell and component that are
decoded.

Simulated cells have the shape of the mouse-brain set: 27,998 genes, 12 components, a median of 4,400 counts, 93 %
zeros. Where a row takes more of them than were simulated, they are repeated: neither time nor memory depends on that.

The rows ``beside-work`` need a machine that has nothing else to do: they compare a training alone and beside processes
that never rest, which they start and end. ``GOMP_SPINCOUNT=300000`` before the
command lets threads wait as libgomp would by itself.
Memory is the peak of a process of its own, above what it held with everything imported and the AnnData read; 1 GB is
10^9 bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import inspect
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import anndata
import joblib
import lightning.pytorch as lightning
import numpy as np
import pandas as pd
import psutil
import torch

import scvae_tools as svt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

N_GENES, N_HIDDEN, BATCH_SIZE, N_COMPONENTS = 27_998, 128, 128, 8
#: Cells of the simulated set, for rows whose batch size depends on that number.
N_CELLS_OF_SET = 20_000
GB = 1e9


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Parameters
    ----------
    data
        Directory of the real data.
    repeats
        Turns of each side.
    n_steps
        Steps an epoch, where the number of cells is free.
    sizes
        Numbers of cells that the time per cell is compared for.
    memory
        Numbers of cells that the memory is compared for.
    start_epochs
        Epochs before the mixture of a row is trained; None for the default of ``train``.
    """

    data: Path
    repeats: int
    n_steps: int = 20
    sizes: tuple[int, ...] = (5_000, 20_000, 50_000, 200_000)
    memory: tuple[int, ...] = (5_000, 20_000)
    start_epochs: int | None = None

    @property
    def n_cells(self) -> int:
        """Simulated cells of the rows beside scVI, and of scVI's process."""
        return self.n_steps * BATCH_SIZE


QUICK = {"n_steps": 8, "sizes": (5_000, 20_000), "memory": (1_280, 2_560), "start_epochs": 20}


@dataclass(frozen=True)
class Target:
    """What a row is to reach: "ratio" or "ours", at least or at most a number."""

    of: str
    relation: str
    value: float

    def is_met(self, result: Result) -> bool:
        found = getattr(result, f"median_{self.of}")
        return found >= self.value if self.relation == ">=" else found <= self.value

    def __str__(self) -> str:
        return f"{self.of} {self.relation} {self.value:g}"


@dataclass(frozen=True)
class Result:
    """A line of the table; each list has one number a turn.

    Parameters
    ----------
    what, unit
        What was measured, and the unit of ``ours`` and ``beside``.
    ours, beside
        The two sides of the ratio.
    beside_is
        What the second one is.
    target
        Of the issue, if any.
    step, bare
        Milliseconds of a training step, and of its bare matrix products.
    data
        Shape and zeros of the cells.
    """

    what: str
    unit: str
    ours: list[float]
    beside: list[float]
    beside_is: str
    target: Target | None = None
    step: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    data: dict = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        """Ours over what is beside it, turn by turn."""
        return [a / b for a, b in zip(self.ours, self.beside, strict=True)]

    @property
    def median_ratio(self) -> float:
        return float(np.median(self.ratios))

    @property
    def median_ours(self) -> float:
        return float(np.median(self.ours))

    @property
    def step_over_bare(self) -> float | None:
        """Median over the turns; None where the row has no step."""
        return float(np.median(np.divide(self.step, self.bare))) if self.bare else None

    def line(self) -> dict[str, str]:
        """Cells of the table."""
        over_bare = [f"{np.median(self.step):.3g}", f"{np.median(self.bare):.3g}", f"{self.step_over_bare or 0:.2f}"]
        return {
            "what": self.what,
            "ours": f"{self.median_ours:.4g} {self.unit}",
            "beside": f"{np.median(self.beside):.4g} ({self.beside_is})",
            "ratio": f"{self.median_ratio:.2f}",
            "range": f"{min(self.ratios):.2f}-{max(self.ratios):.2f}" if len(self.ratios) > 1 else "",
            **dict(zip(("step ms", "bare ms", "step/bare"), over_bare if self.bare else [""] * 3, strict=True)),
            "target": "" if self.target is None else f"{self.target}: {'yes' if self.target.is_met(self) else 'no'}",
        }

    def record(self) -> dict:
        """All of it, for the JSON file."""
        reached = None if self.target is None else self.target.is_met(self)
        computed = {"ratio": self.median_ratio, "step_over_bare": self.step_over_bare, "reached": reached}
        return asdict(self) | {"target": self.target and str(self.target)} | computed


# -- data and models ---------------------------------------------------------------------------------------------------


@functools.cache
def simulated(n_cells: int, n_genes: int, median_counts: float) -> anndata.AnnData:
    return svt.datasets.simulate(n_cells, n_genes, n_components=12, median_counts=median_counts, gene_sd=2.2)


def cells(adata: anndata.AnnData, n: int) -> anndata.AnnData:
    """The first n cells, from the first on again where there are fewer; nothing but their counts."""
    return anndata.AnnData(adata.X[np.arange(n) % adata.n_obs])


def mouse_brain(settings: Settings, n_cells: int | None = None) -> anndata.AnnData:
    """Cells in the shape of the mouse-brain set; ``settings.n_cells`` for None."""
    return cells(simulated(settings.n_cells, N_GENES, 4_400), n_cells or settings.n_cells)


def real(settings: Settings, *, name: str, batch_size: int = BATCH_SIZE) -> anndata.AnnData:
    """Cells of a file, as many as fill whole batches."""
    path = settings.data / f"{name}.h5ad"
    if not path.exists():
        raise FileNotFoundError(f"no {path.name} in the directory of --data")
    adata = anndata.read_h5ad(path)
    return cells(adata, adata.n_obs // batch_size * batch_size)


def described(adata: anndata.AnnData) -> dict:
    """Shape and share of zeros."""
    zeros = 1 - adata.X.nnz / (adata.n_obs * adata.n_vars)
    return {"cells": adata.n_obs, "genes": adata.n_vars, "zeros": round(zeros, 3)}


def build_ours(adata: anndata.AnnData, likelihood: str = "nb", **options: object) -> svt.SCVAE:
    svt.SCVAE.setup_anndata(adata)
    return svt.SCVAE(adata, likelihood=likelihood, **{"mixture": False, "n_hidden": N_HIDDEN} | options)


def build_scvi(adata: anndata.AnnData, likelihood: str = "nb") -> object:
    import scvi

    scvi.settings.verbosity = logging.ERROR
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.model.SCVI.setup_anndata(adata)
    return scvi.model.SCVI(adata, gene_likelihood=likelihood, n_hidden=N_HIDDEN, n_layers=1, n_latent=10)


BUILDERS = {"ours": build_ours, "scvi": build_scvi}
SILENT = {"ours": {"progress": False}, "scvi": {"enable_progress_bar": False}}


def start_mixture(model: svt.SCVAE, settings: Settings, batch_size: int) -> None:
    """Train as users do, until the mixture has been started from the latent space and trained a little."""
    model.train(settings.start_epochs, batch_size=batch_size, accelerator="cpu", progress=False)


def make_uniform(model: svt.SCVAE) -> None:
    """Set a mixture of components that are all alike, so that every one of them is decoded for every cell."""
    k, d = model.module.n_components, model.module.n_latent
    model.module.set_mixture(torch.full((k,), 1 / k), torch.zeros(k, d), torch.eye(d), torch.zeros(d))


def decoded_pairs(model: svt.SCVAE) -> float:
    """Components a cell whose probability float32 can tell from 0 beside 1: those that training decodes."""
    return float((model.predict(soft=True).to_numpy() > np.finfo(np.float32).eps).sum(1).mean())


# -- time --------------------------------------------------------------------------------------------------------------


class EpochTimer(lightning.Callback):
    """Seconds and cells of the epochs of a ``fit`` but for its first; and its largest batch."""

    def __init__(self) -> None:
        self.seconds, self.n_cells, self.batch_size = 0.0, 0, 0

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._n_cells, self._start = 0, time.perf_counter()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: dict, batch_idx: int
    ) -> None:
        self._n_cells += len(batch["X"])
        self.batch_size = max(self.batch_size, len(batch["X"]))

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.current_epoch > 0:
            self.seconds += time.perf_counter() - self._start
            self.n_cells += self._n_cells


class Training:
    """A side that trains: a turn of it goes on with the training, and gives the seconds a cell.

    Parameters
    ----------
    side
        "ours" or "scvi".
    model
        Is trained for one epoch at once.
    n_epochs
        Timed epochs of a turn.
    **options
        Of ``train``.
    """

    def __init__(self, side: str, model: object, n_epochs: int = 1, **options: object) -> None:
        self.model, self.n_epochs = model, n_epochs
        self.options = {"train_size": 1.0, "accelerator": "cpu", **SILENT[side], **options}
        self.batch_size = self._train(1).batch_size

    def _train(self, n_epochs: int) -> EpochTimer:
        timer = EpochTimer()
        self.model.train(n_epochs, callbacks=[timer], **self.options)
        return timer

    def __call__(self) -> float:
        timer = self._train(1 + self.n_epochs)
        return timer.seconds / timer.n_cells


class BareProducts:
    """A side that multiplies matrices as a step must, and gives the seconds of a step."""

    def __init__(self, n_rows: int, n_genes: int, n_hidden: int, likelihood: str = "nb") -> None:
        features, weight = torch.rand(n_rows, n_hidden), torch.rand(n_genes, n_hidden)
        gradient = torch.rand(n_rows, n_genes)
        pairs = ((features, weight.T), (gradient.T, features), (gradient, weight))
        self.products = [partial(torch.mm, a, b, out=torch.empty(len(a), b.shape[1])) for a, b in pairs]
        heads = svt.likelihoods.get_likelihood(likelihood).heads
        self.n_heads = sum(not head.is_dispersion for head in heads)

    def __call__(self, n_times: int = 7) -> float:
        return self.n_heads * sum(
            float(np.median([timed(product) for _ in range(n_times)])) for product in self.products
        )


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def take_turns(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, np.ndarray]:
    """What each side gives, turn by turn; the order is turned round each time."""
    found = {name: [] for name in sides}
    names = list(sides)
    for _ in range(repeats):
        for name in names:
            found[name].append(sides[name]())
        names.reverse()
    return {name: np.array(values) for name, values in found.items()}


def milliseconds(seconds: np.ndarray) -> list[float]:
    return (1e3 * seconds).tolist()


# -- rows --------------------------------------------------------------------------------------------------------------


def beside_scvi(
    settings: Settings,
    *,
    what: str,
    data: Callable[[Settings], anndata.AnnData],
    likelihood: str = "nb",
    n_epochs: int = 1,
    target: Target | None = None,
) -> list[Result]:
    """Cells a second of both, at the same batch."""
    adata = data(settings)
    sides = {
        side: Training(side, build(adata.copy(), likelihood), n_epochs, batch_size=BATCH_SIZE)
        for side, build in BUILDERS.items()
    }
    sides["bare"] = BareProducts(BATCH_SIZE, adata.n_vars, N_HIDDEN, likelihood)
    found = take_turns(sides, settings.repeats)
    return [_cells_a_second(f"{what}, batch {BATCH_SIZE}", found, BATCH_SIZE, target, adata)]


def at_default_batch(settings: Settings, *, target: Target) -> list[Result]:
    """Cells a second of both, each at its own default batch, and ours as for a set of 20,000 cells."""
    default = inspect.signature(svt.SCVAE.train).parameters["batch_size"].default
    n_ours = N_CELLS_OF_SET if default is None else settings.n_steps * default
    adata = mouse_brain(settings, n_ours)
    ours = Training("ours", build_ours(adata))
    scvi = Training("scvi", build_scvi(mouse_brain(settings)))
    sides = {"ours": ours, "scvi": scvi, "bare": BareProducts(ours.batch_size, N_GENES, N_HIDDEN)}
    found = take_turns(sides, settings.repeats)
    what = f"VAE NB, {N_GENES:,} genes, default batches {ours.batch_size} and {scvi.batch_size}"
    return [_cells_a_second(what, found, ours.batch_size, target, adata)]


def _cells_a_second(
    what: str, found: dict[str, np.ndarray], batch_size: int, target: Target | None, adata: anndata.AnnData
) -> Result:
    ours, scvi = (1 / found["ours"]).tolist(), (1 / found["scvi"]).tolist()
    step, bare = milliseconds(found["ours"] * batch_size), milliseconds(found["bare"])
    return Result(what, "cells/s", ours, scvi, "scVI", target, step, bare, described(adata))


def over_bare_products(settings: Settings, *, batch_size: int, target: Target | None = None) -> list[Result]:
    """A whole step over its bare matrix products."""
    adata = mouse_brain(settings, settings.n_steps * batch_size)
    ours = Training("ours", build_ours(adata), batch_size=batch_size)
    sides = {"ours": ours, "bare": BareProducts(batch_size, N_GENES, N_HIDDEN)}
    found = take_turns(sides, settings.repeats)
    step, bare = milliseconds(found["ours"] * batch_size), milliseconds(found["bare"])
    what = f"whole step, NB, {N_GENES:,} genes, batch {batch_size}"
    return [Result(what, "ms", step, bare, "bare products", target, step, bare, described(adata))]


def gmvae(settings: Settings, *, target: Target, batch_size: int = 100) -> list[Result]:
    """A batch of the exact GMVAE: with all components alike, the worst case, and started from a VAE, as in use."""
    adata = real(settings, name="pbmc_10x_4k", batch_size=batch_size)
    size = {"n_hidden": 100, "n_layers": 2}
    mixture = {"mixture": "gmvae", "n_components": N_COMPONENTS}
    alike, in_use = (build_ours(adata.copy(), **size, **mixture) for _ in range(2))
    make_uniform(alike)
    start_mixture(in_use, settings, batch_size)
    train = partial(Training, "ours", n_epochs=3, batch_size=batch_size)
    sides = {
        "alike": train(alike, n_epochs=1, lr=1e-12),  # so that they stay alike
        "in use": train(in_use),
        "vae": train(build_ours(adata.copy(), **size)),
    }
    pairs = {"alike": decoded_pairs(alike), "in use": decoded_pairs(in_use)}
    bare = {key: BareProducts(round(n * batch_size), adata.n_vars, size["n_hidden"]) for key, n in pairs.items()}
    found = take_turns(sides | {f"bare {key}": side for key, side in bare.items()}, settings.repeats)
    results = []
    for key, n in pairs.items():
        what = f"GMVAE, k {N_COMPONENTS}, components {key} ({n:.1f} a cell decoded), {adata.n_vars:,} genes, batch 100"
        step, vae = (milliseconds(found[side] * batch_size) for side in (key, "vae"))
        bare_step = milliseconds(found[f"bare {key}"])
        results.append(Result(what, "ms", step, vae, "VAE", target, step, bare_step, described(adata)))
    return results


def vade(settings: Settings, *, target: Target) -> list[Result]:
    """A step of VaDE's mixture over one of the VAE."""
    adata = real(settings, name="pbmc_10x_4k")
    mixture = build_ours(adata.copy(), mixture="vade", n_components=N_COMPONENTS)
    start_mixture(mixture, settings, BATCH_SIZE)
    train = partial(Training, "ours", n_epochs=3, batch_size=BATCH_SIZE)
    sides = {
        "vade": train(mixture),
        "vae": train(build_ours(adata.copy())),
        "bare": BareProducts(BATCH_SIZE, adata.n_vars, N_HIDDEN),
    }
    found = take_turns(sides, settings.repeats)
    step, vae = (milliseconds(found[side] * BATCH_SIZE) for side in ("vade", "vae"))
    what = f"VaDE, k {N_COMPONENTS}, {adata.n_vars:,} genes, batch {BATCH_SIZE}"
    return [Result(what, "ms", step, vae, "VAE", target, step, milliseconds(found["bare"]), described(adata))]


def number_of_cells(settings: Settings, *, target: Target, n_genes: int = 2_000) -> list[Result]:
    """Time a cell for more and more cells, over that for the fewest; about 400 steps a turn, or more in one epoch."""
    whole = simulated(max(settings.sizes), n_genes, 500)
    sides = {}
    for size in settings.sizes:
        n_steps = size // BATCH_SIZE  # whole batches
        model = build_ours(cells(whole, n_steps * BATCH_SIZE))
        sides[size] = Training("ours", model, max(1, round(400 / n_steps)), batch_size=BATCH_SIZE)
    sides["bare"] = BareProducts(BATCH_SIZE, n_genes, N_HIDDEN)
    found = take_turns(sides, settings.repeats)
    first, *others = settings.sizes
    bare, results = milliseconds(found["bare"]), []
    for size in others:
        what = f"time a cell, {size:,} simulated cells, {n_genes:,} genes, batch {BATCH_SIZE}"
        ours, beside = ((1e6 * found[n]).tolist() for n in (size, first))
        step = milliseconds(found[size] * BATCH_SIZE)
        results.append(Result(what, "µs", ours, beside, f"{first:,} cells", target, step, bare, described(whole)))
    return results


@contextmanager
def busy_processes(n: int) -> Iterator[None]:
    """Context beside which n processes compute without rest, in sessions of their own, as other programs are."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command, start_new_session=True) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def beside_work(settings: Settings, *, n_genes: int, n_epochs: int, target: Target) -> list[Result]:
    """Time a step beside busy processes, one for every two processors and then one for each, over that alone."""
    adata = cells(simulated(settings.n_cells, n_genes, n_genes / 6), settings.n_cells)
    training = Training("ours", build_ours(adata), n_epochs, batch_size=BATCH_SIZE)

    def loaded(n: int) -> float:
        with busy_processes(n):
            return training()

    n_processors = joblib.cpu_count()
    numbers = sorted({max(1, n_processors // 2), n_processors})
    found = take_turns({n: partial(loaded, n) for n in (0, *numbers)}, settings.repeats)
    alone, *beside = (milliseconds(found[n] * BATCH_SIZE) for n in (0, *numbers))
    what = f"a step, VAE NB, {n_genes:,} genes, {torch.get_num_threads()} threads, {n_processors} processors"
    return [
        Result(f"{what}, {n} busy processes", "ms", each, alone, "alone", target, data=described(adata))
        for n, each in zip(numbers, beside, strict=True)
    ]


def memory(settings: Settings, *, target: Target, target_ratio: Target) -> list[Result]:
    """Peak memory of training, each in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        ours = {n: _measure_memory("ours", mouse_brain(settings, n), directory) for n in settings.memory}
        scvi = _measure_memory("scvi", mouse_brain(settings), directory)
    few, many = settings.memory
    above = {n: [found["above"]] for n, found in ours.items()}
    what, beside = f"{many:,} x {N_GENES:,}, NB, batch {BATCH_SIZE}", f"scVI, {settings.n_cells:,} cells"
    over = f"memory above the AnnData, {many:,} cells over {few:,}"
    whole = [ours[many]["whole"]], [scvi["whole"]]
    return [
        Result(f"memory above the AnnData, {what}", "GB", above[many], [scvi["above"]], beside, target),
        Result(over, "GB", above[many], above[few], f"{few:,} cells", target_ratio),
        Result(f"memory of the whole process, {what}", "GB", *whole, beside),
    ]


# -- memory ------------------------------------------------------------------------------------------------------------


def _measure_memory(side: str, adata: anndata.AnnData, directory: str) -> dict[str, float]:
    """Peak memory of a process that reads the cells and trains on them, in GB."""
    path = Path(directory) / "cells.h5ad"
    adata.write_h5ad(path)
    threads = str(torch.get_num_threads())
    command = [sys.executable, __file__, "--memory", side, str(path), "--threads", threads]
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


def report_memory(side: str, path: str) -> None:
    """What such a process does: print its peak, and that above what it held before the model was made."""
    torch.rand(200, 200) @ torch.rand(200, 200)  # starts the threads
    if side == "ours":
        svt.SCVAE  # noqa: B018, imports all that it needs
    else:
        import scvi.model  # noqa: F401
    adata = anndata.read_h5ad(path)
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # give back what reading has freed, or it would be used unseen
    before = psutil.Process().memory_info().rss
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew; elsewhere it includes reading
    model = BUILDERS[side](adata)
    model.train(2, batch_size=BATCH_SIZE, accelerator="cpu", **SILENT[side])
    peak = peak_memory()
    print(json.dumps({"above": (peak - before) / GB, "whole": peak / GB}))


def peak_memory() -> int:
    """Largest memory of this process so far, in bytes."""
    # Not what `getrusage` says: a process starts with the peak of the one that started it.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


# -- the table ---------------------------------------------------------------------------------------------------------

ROWS: dict[str, Callable[[Settings], list[Result]]] = {
    "nb": partial(beside_scvi, what=f"VAE NB, {N_GENES:,} genes", data=mouse_brain, target=Target("ratio", ">=", 3.5)),
    "default": partial(at_default_batch, target=Target("ratio", ">=", 4.5)),
    "zinb": partial(
        beside_scvi,
        what=f"VAE ZINB, {N_GENES:,} genes",
        data=mouse_brain,
        likelihood="zinb",
        target=Target("ratio", ">=", 3),
    ),
    "poisson": partial(beside_scvi, what=f"VAE Poisson, {N_GENES:,} genes", data=mouse_brain, likelihood="poisson"),
    "pbmc": partial(
        beside_scvi,
        what="VAE NB, pbmc_10x_4k, 2,000 genes",
        data=partial(real, name="pbmc_10x_4k"),
        n_epochs=3,
        target=Target("ratio", ">=", 3),
    ),
    "worm": partial(beside_scvi, what="VAE NB, worm_neuron, 13,488 genes", data=partial(real, name="worm_neuron")),
    "baron": partial(
        beside_scvi, what="VAE NB, baron_human1, 20,125 genes", data=partial(real, name="baron_human1"), n_epochs=2
    ),
    "step-128": partial(over_bare_products, batch_size=128),
    "step-512": partial(over_bare_products, batch_size=512, target=Target("ratio", "<=", 1.7)),
    "gmvae": partial(gmvae, target=Target("ours", "<=", 12)),
    "vade": partial(vade, target=Target("ratio", "<=", 1.15)),
    "cells": partial(number_of_cells, target=Target("ratio", "<=", 1.1)),
    "beside-work-small": partial(beside_work, n_genes=765, n_epochs=10, target=Target("ratio", "<=", 2)),
    "beside-work-large": partial(beside_work, n_genes=13_488, n_epochs=3, target=Target("ratio", "<=", 2)),
    "memory": partial(memory, target=Target("ours", "<=", 0.4), target_ratio=Target("ratio", "<=", 1.05)),
}
QUICK_ROWS = ("nb", "pbmc", "step-512", "gmvae", "cells", "memory")


def facts(settings: Settings) -> dict:
    """What the times depend on, but for the machine."""
    packages = ("scvae-tools", "scvi-tools", "torch", "lightning", "anndata", "numpy")
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "threads": torch.get_num_threads(),
        "repeats": settings.repeats,
    }


def run(names: Sequence[str], settings: Settings) -> list[tuple[str, Result]]:
    """Measure the rows, and say of each what came out."""
    results = []
    for name in names:
        start = time.perf_counter()
        try:
            found = ROWS[name](settings)
        except FileNotFoundError as error:
            print(f"{name}: left out, {error}", flush=True)
            continue
        results += [(name, result) for result in found]
        for result in found:
            print(f"{name}: " + "; ".join(f"{key} {value}" for key, value in result.line().items() if value))
        print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)
    return results


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parent.parent
    parser.add_argument("--data", type=Path, default=root.parent / "shared" / "data", help="directory of the .h5ad")
    parser.add_argument("--quick", action="store_true", help="fewer rows and cells, 3 to 5 minutes")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="NAME", help=f"rows: {', '.join(ROWS)}")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side")
    parser.add_argument("--threads", type=int, help="of torch; its own choice if not given")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)  # side and file: see `report_memory`
    return parser.parse_args()


def main() -> None:
    """Run, print the table and write the file."""
    options = parse()
    warnings.simplefilter("ignore")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.memory is not None:
        report_memory(*options.memory)
        return
    settings = Settings(options.data, options.repeats, **(QUICK if options.quick else {}))
    about = facts(settings)
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    results = run(options.only or (QUICK_ROWS if options.quick else ROWS), settings)
    print("\n", pd.DataFrame([result.line() for _, result in results]).to_string(index=False), sep="")
    if options.json is not None:
        rows = [{"row": name, **result.record()} for name, result in results]
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
