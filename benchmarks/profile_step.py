"""Where the time of a training step goes, by part, and how much of it are the bare matrix products.

    python benchmarks/profile_step.py [--file FILE.h5ad] [--likelihood nb] [--batch-size 128] [--mixture gmvae]

Trains on simulated cells in the shape of the mouse-brain set (27,998 genes, 93 % zeros) or on those of a file, first
without and then with ``torch.profiler``. Every operation counts for the innermost part that it belongs to: the
methods in ``METHODS`` are given a name from outside, so that the package needs no hooks, and within a part some
operations are told by their own name. What Python does between operations counts for the part too; what belongs to none
is Lightning and the rest. The profiler itself takes time, most of it where operations are short: the last lines say how
much.

A mixture is profiled after it has been started from a VAE of a few epochs. Under ``engine="dense"`` the backward pass
through the sum over genes counts for the rest of the networks.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import anndata
import pandas as pd
import torch
from throughput import (
    BATCH_SIZE,
    N_COMPONENTS,
    N_GENES,
    N_HIDDEN,
    BareProducts,
    EpochTimer,
    build_ours,
    cells,
    decoded_pairs,
    described,
    simulated,
)
from torch.profiler import ProfilerActivity, record_function

from scvae_tools._data import loader
from scvae_tools._module import sparse
from scvae_tools._train import plan

if TYPE_CHECKING:
    from collections.abc import Iterable

    import lightning.pytorch as lightning
    from torch.autograd.profiler_util import FunctionEvent

N_SIMULATED = 640

ROWS = "batch: rows of the matrix"
ORDER = "batch: order by gene"
FIRST = "first layer of the encoder"
BY_FIRST = "first layer of the encoder, gradient"
NETWORKS = "rest of the networks and of the bound"
BY_NETWORKS = "rest of the networks and of the bound, gradient"
PRODUCTS = "sum over genes: matrix products"
ZERO = "sum over genes: log p(0)"
NONZERO = "sum over genes: non-zeros"
OTHER = "sum over genes: other"
OPTIMISER = "optimiser"
CLIPPING = "gradient clipping"
REST = "Lightning and the rest"
PARTS = (ROWS, ORDER, FIRST, BY_FIRST, NETWORKS, BY_NETWORKS, PRODUCTS, ZERO, NONZERO, OTHER, OPTIMISER, CLIPPING, REST)

#: Where operations are told by their name; counts for `NETWORKS` otherwise.
ENCODER = "encoder"

#: Methods that are given the name of a part: owner as `owners` names it, attribute, part.
METHODS = (
    ("dataset", "__getitem__", ROWS),
    ("loader", "counts_of_matrix", ORDER),
    ("counts", "map", FIRST),
    ("counts", "dense", FIRST),
    ("encoder", "forward", ENCODER),
    ("decoder", "features", NETWORKS),
    ("module", "bound", NETWORKS),
    ("module", "log_likelihood", OTHER),
    ("likelihood", "differentiate_zero", ZERO),
    ("likelihood", "log_prob_zero", ZERO),
    ("likelihood", "differentiate_kernel", NONZERO),
    ("likelihood", "log_kernel", NONZERO),
    ("likelihood", "log_base_measure", NONZERO),
    ("plan", "training_step", REST),
    ("plan", "configure_gradient_clipping", CLIPPING),
)
#: Parts of what autograd and torch name themselves.
BACKWARD = "autograd::engine::evaluate_function: "
NAMED = {
    "SparseProduct": FIRST,
    BACKWARD + "SparseProductBackward": BY_FIRST,
    BACKWARD + "_LogLikelihoodBackward": OTHER,
}
#: The same by how the name begins, of what `NAMED` does not have.
BEGINNINGS = {BACKWARD: BY_NETWORKS, "Optimizer.zero_grad": OPTIMISER, "aten::_fused_adam": OPTIMISER}
#: Operations that are told apart directly under some parts. In the encoder all layers but a dense first one have a
#: bias, and so another operation.
PRODUCTS_OF_TORCH = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::matmul", "aten::linear")
AT_POSITIONS = ("aten::index_select", "aten::gather", "aten::scatter_", "aten::index_put_", "aten::index_add_")
OPERATIONS = {
    ENCODER: dict.fromkeys(("aten::mm", "aten::matmul"), FIRST),
    OTHER: dict.fromkeys(PRODUCTS_OF_TORCH, PRODUCTS) | dict.fromkeys(AT_POSITIONS, NONZERO),
}
PREFIX = "part: "


def owners(module: torch.nn.Module) -> dict[str, object]:
    """Classes, or the one object of a class, whose methods are named."""
    return {
        "dataset": loader.CountDataset,
        "loader": loader,
        "counts": sparse.Counts,
        "plan": plan.TrainingPlan,
        "module": module,
        "encoder": module.encoder,
        "decoder": module.decoder,
        "likelihood": module.likelihood,
    }


def name_methods(module: torch.nn.Module) -> None:
    """Let the profiler see the methods as parts; say which of them are no longer there."""
    known = owners(module)
    for name, attribute, part in METHODS:
        owner = known[name]
        if not hasattr(owner, attribute):
            print(f"No method {attribute!r} of the {name}: its time counts for the part around it.")
            continue
        named = _named(getattr(owner, attribute), part)
        is_classmethod = isinstance(inspect.getattr_static(owner, attribute), classmethod)
        setattr(owner, attribute, staticmethod(named) if is_classmethod else named)


def _named(function: object, part: str) -> object:
    @functools.wraps(function)
    def wrapped(*args: object, **kwargs: object) -> object:
        with record_function(PREFIX + part):
            return function(*args, **kwargs)

    return wrapped


def part_of(name: str, around: str, named: dict[str, str]) -> str:
    """Part of an event, by its name and the part that it is in."""
    if name.startswith(PREFIX):
        return name.removeprefix(PREFIX)
    if name in named:
        return named[name]
    for beginning, part in BEGINNINGS.items():
        if name.startswith(beginning):
            return part
    return OPERATIONS.get(around, {}).get(name, around)


def add_up(events: Iterable[FunctionEvent], around: str, named: dict[str, str], totals: Counter) -> None:
    """Add the time of events, and of those in them, to their parts, in microseconds.

    ``Optimizer.step`` contains the whole step, since Lightning passes it on as a closure; its own time is Lightning's.
    """
    for event in events:
        part = part_of(event.name, around, named)
        totals[part] += event.self_cpu_time_total
        add_up(event.cpu_children, part, named, totals)


class ProfiledEpoch(EpochTimer):
    """Profile the second epoch of a ``fit``."""

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.profile = torch.profiler.profile(activities=[ProfilerActivity.CPU], acc_events=True)
            self.profile.start()
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.current_epoch == 1:
            self.profile.stop()

    def parts(self) -> Counter:
        """Seconds of each part."""
        events, totals = self.profile.events(), Counter()
        is_sparse = any(event.name == "SparseProduct" for event in events)
        named = NAMED if is_sparse else NAMED | {BACKWARD + "MmBackward0": BY_FIRST}
        add_up((event for event in events if event.cpu_parent is None), REST, named, totals)
        totals[NETWORKS] += totals.pop(ENCODER, 0)
        seconds = Counter({part: value / 1e6 for part, value in totals.items()})
        seconds[REST] += self.seconds - sum(seconds.values())
        return seconds


def read(options: argparse.Namespace) -> anndata.AnnData:
    """Cells that fill whole batches."""
    file, n = options.file, options.n_steps * options.batch_size
    return cells(simulated(N_SIMULATED, options.n_genes, 4_400) if file is None else anndata.read_h5ad(file), n)


def build(adata: anndata.AnnData, options: argparse.Namespace) -> object:
    """A model that is ready to be profiled: trained for some epochs, its mixture started."""
    size = {"n_hidden": options.n_hidden, "n_layers": options.n_layers, "engine": options.engine}
    if options.mixture == "none":
        model = build_ours(adata, options.likelihood, **size)
    else:
        k = options.n_components
        model = build_ours(adata, options.likelihood, mixture=options.mixture, n_components=k, **size)
    train(model, options, 1 if options.mixture == "none" else 4)
    return model


def train(model: object, options: argparse.Namespace, n_epochs: int, *callbacks: object) -> None:
    settings = {"batch_size": options.batch_size, "train_size": 1.0, "accelerator": "cpu", "progress": False}
    model.train(n_epochs, callbacks=list(callbacks), **settings)


def table(parts: Counter, seconds_of_step: float, n_steps: int) -> str:
    """Milliseconds a step and share of each part."""
    rows = []
    for part in PARTS:
        seconds = parts[part] / n_steps
        rows.append({"part": part, "ms a step": 1e3 * seconds, "share": f"{seconds / seconds_of_step:.1%}"})
    rows.append({"part": "step", "ms a step": 1e3 * seconds_of_step, "share": ""})
    return pd.DataFrame(rows).to_string(index=False, float_format="{:.2f}".format)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help=".h5ad with counts in X; simulated cells if not given")
    parser.add_argument("--likelihood", default="nb")
    parser.add_argument("--mixture", choices=("none", "gmvae", "vade"), default="none")
    parser.add_argument("--n-components", type=int, default=N_COMPONENTS)
    parser.add_argument("--n-hidden", type=int, default=N_HIDDEN)
    parser.add_argument("--n-layers", type=int, default=1)
    parser.add_argument("--n-genes", type=int, default=N_GENES, help="of simulated cells")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--n-steps", type=int, default=10, help="to profile")
    parser.add_argument("--engine", choices=("auto", "blocked", "dense"), default="auto")
    parser.add_argument("--threads", type=int, help="of torch; its own choice if not given")
    return parser.parse_args()


def main() -> None:
    """Run and print the table."""
    options = parse()
    warnings.simplefilter("ignore")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's profiler says when it starts and stops
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    adata = read(options)
    model = build(adata, options)
    n_rows = options.batch_size
    if options.mixture == "gmvae":
        n_rows = round(n_rows * decoded_pairs(model))
    plain, profiled = EpochTimer(), ProfiledEpoch()
    train(model, options, 3, plain)
    name_methods(model.module)
    train(model, options, 2, profiled)
    bare = BareProducts(n_rows, adata.n_vars, options.n_hidden, options.likelihood)()
    steps = {timer: timer.seconds / (timer.n_cells / options.batch_size) for timer in (plain, profiled)}
    about = described(adata) | {
        "likelihood": options.likelihood,
        "mixture": options.mixture,
        "batch": options.batch_size,
        "rows decoded": n_rows,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()), end="\n\n")
    print(table(profiled.parts(), steps[profiled], options.n_steps))
    print(f"\nStep without the profiler: {1e3 * steps[plain]:.2f} ms.")
    print(f"Bare matrix products: {1e3 * bare:.2f} ms. Step over bare products: {steps[plain] / bare:.2f}.")


if __name__ == "__main__":
    main()
