"""Training on a GPU: cells a second beside scVI, the main call, a million cells, and the start of the mixture.

    python benchmarks/gpu.py [--only NAME ...] [--data FOLDER] [--repeats 3] [--json FILE]

Ours and scVI take turns in one process, after one epoch each as a warm-up, in which our step is recorded. A turn is a
call of ``train`` without validation, of which the first epoch is left out; figures are medians over the turns. Both
models have one hidden layer of 128 and 10 latent dimensions. Simulated cells are as in benchmarks/throughput.py; they
are repeated to fill `N_CELLS`. Each row is printed when it is there. It has not been run on a GPU yet.

Where there is no GPU, nothing is measured, and the last line says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anndata
import lightning.pytorch as lightning
import numpy as np
import torch
from throughput import BUILDERS, SILENT, build_ours, cells, make_uniform, simulated, take_turns

import scvae_tools as svt
from scvae_tools._data import windows
from scvae_tools._train import device_plan
from scvae_tools._train.mixture_start import start_mixture

if TYPE_CHECKING:
    from collections.abc import Callable

#: Cells of a timed epoch, and those that are simulated for it.
N_CELLS, N_SIMULATED = 20_480, 2_048
MILLION, N_EPOCHS_OF_MILLION, N_CELLS_IN_WINDOWS = 1_000_000, 20, 200_000
#: Genes and median counts of the simulated sets.
FEW, MANY = (2_000, 1_500.0), (27_998, 4_400.0)
#: How a step of ours may be taken: recorded and repeated, launched each time, or with batches from the host.
WAYS = {
    "": {"n_epochs": 5},
    " (not recorded)": {"n_epochs": 2, "recorded": False},
    " (batches from the host)": {"n_epochs": 1, "hold_on_device": False},
}


class EpochTimer(lightning.Callback):
    """Seconds of the epochs of a ``fit`` but for its first, the device included."""

    def __init__(self) -> None:
        self.seconds, self.n_epochs = 0.0, 0

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        torch.cuda.synchronize()
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        torch.cuda.synchronize()
        if trainer.current_epoch > 0:
            self.seconds += time.perf_counter() - self._start
            self.n_epochs += 1


class Training:
    """A side that trains: a turn of it gives the cells a second."""

    def __init__(
        self,
        side: str,
        model: object,
        n_epochs: int,
        *,
        recorded: bool = True,
        room: float | None = None,
        **options: object,
    ) -> None:
        self.model, self.n_epochs, self.recorded, self.room = model, n_epochs, recorded, room
        self.options = {"train_size": 1.0, "accelerator": "gpu", **SILENT[side], **options}
        if side == "ours":
            self.options["early_stopping"] = False
        self(1)

    def __call__(self, n_epochs: int | None = None) -> float:
        timer, before = EpochTimer(), (device_plan.RECORDS_STEPS, windows.free_memory)
        device_plan.RECORDS_STEPS = self.recorded
        if self.room is not None:
            windows.free_memory = lambda _: self.room / windows.LARGEST_SHARE
        try:
            self.model.train(1 + (n_epochs or self.n_epochs), callbacks=[timer], **self.options)
        finally:
            device_plan.RECORDS_STEPS, windows.free_memory = before
        return timer.n_epochs * self.model.adata.n_obs / timer.seconds


def repeated(shape: tuple[int, float], n_cells: int = N_CELLS) -> anndata.AnnData:
    return cells(simulated(N_SIMULATED, *shape), n_cells)


def beside_scvi(repeats: int, shape: tuple[int, float], batch_size: int, **options: object) -> dict:
    """Ours, in each of the `WAYS`, and scVI at the same batch."""
    adata, likelihood = repeated(shape), options.get("likelihood", "nb")
    sides = {
        f"ours{way}": Training("ours", build_ours(adata.copy(), likelihood), batch_size=batch_size, **how)
        for way, how in WAYS.items()
    }
    sides["scVI"] = Training("scvi", BUILDERS["scvi"](adata.copy(), likelihood), n_epochs=1, batch_size=batch_size)
    return with_ratio(take_turns(sides, repeats), "scVI")


def precisions(repeats: int, shape: tuple[int, float], batch_size: int) -> dict:
    """Matrix products in float32 and in TF32."""
    adata = repeated(shape)
    sides = {
        name: Training("ours", build_ours(adata.copy()), 3, batch_size=batch_size, matmul_precision=name)
        for name in ("high", "highest")
    }
    return with_ratio(take_turns(sides, repeats), "highest")


def likelihoods(repeats: int, shape: tuple[int, float], batch_size: int) -> dict:
    """ZINB beside NB."""
    adata = repeated(shape)
    sides = {
        name: Training("ours", build_ours(adata.copy(), name), 3, batch_size=batch_size) for name in ("zinb", "nb")
    }
    return with_ratio(take_turns(sides, repeats), "nb")


def mixtures(repeats: int, shape: tuple[int, float], batch_size: int) -> dict:
    """GMVAE and VaDE, k = 8 with components all alike, beside the VAE."""
    adata = repeated(shape)
    sides = {}
    for mixture in ("gmvae", "vade", False):
        model = build_ours(adata.copy(), mixture=mixture, **({"n_components": 8} if mixture else {}))
        if mixture:
            make_uniform(model)
        sides[mixture or "vae"] = Training("ours", model, 3, batch_size=batch_size)
    return with_ratio(take_turns(sides, repeats), "vae")


def with_ratio(found: dict[str, np.ndarray], beside: str) -> dict:
    """Median cells a second of each side, and of its ratio to one of them, turn by turn."""
    medians = {name: round(float(np.median(values))) for name, values in found.items()}
    ratios = {
        f"{name} / {beside}": round(float(np.median(values / found[beside])), 2)
        for name, values in found.items()
        if name != beside
    }
    return medians | ratios


def in_windows(repeats: int) -> dict:
    """Cells in windows of an eighth each beside cells that are all there."""
    adata = repeated(FEW, N_CELLS_IN_WINDOWS)
    room = adata.X.nnz * 5 / 4  # for two windows
    sides = {
        name: Training("ours", build_ours(adata.copy()), n_epochs=2, batch_size=1024, room=each)
        for name, each in (("windows", room), ("all there", None))
    }
    return with_ratio(take_turns(sides, repeats), "all there")


def main_call(repeats: int, folder: Path) -> dict:
    """Seconds of ``svt.tl.scvae`` with its defaults, ZINB and k unknown; the first call of a process apart."""
    adata = anndata.read_h5ad(folder / "pbmc_10x_4k.h5ad")
    seconds, model = [], None
    for seed in range(max(2, repeats)):
        own = adata.copy()
        start = time.perf_counter()
        model = svt.tl.scvae(own, likelihood="zinb", mixture=True, random_state=seed, progress=False, return_model=True)
        seconds.append(time.perf_counter() - start)
    return {
        "first call, s": round(seconds[0], 1),
        "later calls, s": round(float(np.median(seconds[1:])), 1),
        "held-out ELBO": round(float(model.get_elbo(indices=model.validation_indices)), 1),
        "components": model.n_components,
    }


def a_million(repeats: int) -> dict:
    """Seconds of 20 epochs of VaDE, k = 20, on 1,000,000 cells of 2,000 genes, and the memory of the device, GB."""
    adata = repeated(FEW, MILLION)
    model = build_ours(adata, mixture="vade", n_components=20)
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model.train(N_EPOCHS_OF_MILLION, accelerator="gpu", progress=False, early_stopping=False)
    seconds, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated() / 1e9
    held = adata.X.nnz * 5 / 1e9
    return {"s": round(seconds, 1), "peak, GB": round(peak, 2), "counts, GB": round(held, 2)}


def start_of_mixture(repeats: int) -> dict:
    """Seconds of the start of a mixture from 10,000 latent codes, k unknown, on the GPU and on the CPU."""
    rng = np.random.default_rng(0)
    latent = 2 * rng.normal(size=(12, 10))[rng.integers(12, size=10_000)] + rng.normal(size=(10_000, 10))
    found = {}
    for device in ("cuda", "cpu"):
        seconds = []
        for _ in range(2 if device == "cuda" else 1):  # the first one loads kernels
            begin = time.perf_counter()
            start, _, _ = start_mixture(latent, None, random_state=0, device=device)
            seconds.append(time.perf_counter() - begin)
        found |= {f"{device}, s": round(seconds[-1], 2), f"{device}, components": len(start.weights)}
    return found


def rows(folder: Path) -> dict[str, Callable[[int], dict]]:
    """Measurements by name."""
    return {
        "start": start_of_mixture,
        "2,000 genes, batch 128": partial(beside_scvi, shape=FEW, batch_size=128),
        "27,998 genes, batch 128": partial(beside_scvi, shape=MANY, batch_size=128),
        "27,998 genes, batch 1,024": partial(beside_scvi, shape=MANY, batch_size=1024),
        "main": partial(main_call, folder=folder),
        "TF32, 27,998 genes, batch 1,024": partial(precisions, shape=MANY, batch_size=1024),
        "ZINB, 27,998 genes, batch 128": partial(likelihoods, shape=MANY, batch_size=128),
        "mixtures, 2,000 genes, batch 128": partial(mixtures, shape=FEW, batch_size=128),
        "mixtures, 27,998 genes, batch 128": partial(mixtures, shape=MANY, batch_size=128),
        "windows, 2,000 genes, batch 1,024": in_windows,
        "million": a_million,
    }


def main() -> None:
    """Run, print each row when it is there, and write the file."""
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=rows(root), metavar="NAME", help=f"rows: {list(rows(root))}")
    parser.add_argument("--data", type=Path, default=root.parent / "shared" / "data", help="directory of the .h5ad")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if not torch.cuda.is_available():
        print("There is no GPU: nothing was measured.")
        return
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    print(json.dumps(about), flush=True)
    found = {}
    for name, row in rows(options.data).items():
        if options.only and name not in options.only:
            continue
        begin = time.perf_counter()
        try:
            found[name] = row(options.repeats)
        except (RuntimeError, ValueError, OSError, ArithmeticError) as error:  # the others are still to be measured
            found[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        print(json.dumps({name: found[name], "seconds": round(time.perf_counter() - begin)}), flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps({"about": about, "rows": found}, indent=1) + "\n")
        gc.collect()  # memory of a row is free for the next
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
