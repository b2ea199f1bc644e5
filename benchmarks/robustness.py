"""Odd arguments, kills and Ctrl-C: what becomes of results, files and inputs.

    python benchmarks/robustness.py [--seconds 300] [--seed 0]

Four parts, on small simulated data, in forked processes (Linux, macOS); the last three have a third of the time each:

* arguments: public functions and methods, each argument with each odd value once, about 20,000 calls in ten minutes;
  only with ``--part arguments``. Each call must return finite numbers, or end in an error of this package (raised in
  its own files, of the kinds that its documentation names) that leaves the AnnData as it was.
* calls: the same with one or two arguments drawn at random.
* kills: every writer of files, killed (SIGKILL) at a random moment while it replaces its own file. The file must be
  readable afterwards, and the next writer must leave nothing else behind.
* interrupts: `svt.tl.scvae`, sent Ctrl-C (SIGINT) once at a random moment. It must write all its results but λ, or
  raise KeyboardInterrupt and leave the AnnData as it was.

Prints a line for each failure with the code that makes it, and a table; the exit code is 1 if there was any.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import scvae_tools as svt

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData

PACKAGE = str(Path(svt.__file__).parent)
#: Values for any argument. None is so large that a call which rightly takes it would not end.
ODD = [
    *(None, True, False, 0, 1, 2, 7, -1, 0.5, 2.5, -0.1, float("nan"), float("inf"), -float("inf")),
    *(np.int64(2), np.float32(0.5), np.bool_(1), np.array([1, 2]), np.array([]), np.array("x")),
    *("", "a", "a/b", "λ", "label", "batch", "nb", "zinb", "vade", "cpu", "auto", "learned", b"bytes", 1j),
    *([], [1], [0, 1], ["label"], ["gene0", "gene1"], ("a", 1), (1, 2), {}, {"encoder": 0.1}, {1}, object(), int, len),
    *([True] * 60, range(3), slice(3), pd.Series([1.0, 2.0]), pd.NA, Path("nowhere")),
    *(pd.NaT, [pd.NA], pd.Series([True] * 60), pd.Series(["gene0"]), pd.Index(["label"])),
]
#: Arguments that no call is given: they would print, wait, or write where the user says.
LEFT_ALONE = {"self", "cls", "adata", "data", "model", "save", "show", "progress", "args", "kwargs", "checkpoint"}
LEFT_ALONE |= {
    "directory",
    "callbacks",
    "logger",
    "dataloader",
    "out",
    "silent",
    "verbose",
    "trainer_options",
    "ax",
    "axes",
}
#: Kinds of errors that wrong arguments may have.
EXPECTED = (ValueError, TypeError, NotImplementedError, FileNotFoundError, ArithmeticError)
SMALL = {"max_epochs": 1, "n_hidden": 4, "n_latent": 2, "n_components": 2, "progress": False}


def make_adata() -> AnnData:
    """60 cells of three types in two batches."""
    adata = svt.datasets.simulate(60, 12, 3, n_batches=2, random_state=0)
    adata.obs["label"] = np.array(["A", "B", "C"])[np.arange(60) % 3]
    return adata


def digest(adata: AnnData) -> str:
    """Digest of all that a call might change."""
    parts = [
        np.ascontiguousarray(adata.X.toarray()).tobytes(),
        adata.obs.to_csv().encode(),
        adata.var.to_csv().encode(),
    ]
    parts += [f"{slot}{sorted(map(str, getattr(adata, slot)))}".encode() for slot in ("obsm", "varm", "layers", "uns")]
    return hashlib.sha256(b"|".join(parts)).hexdigest()


def in_a_fork(function: Callable, *arguments: Any, seconds: float = 60.0, after: Callable | None = None) -> Any:
    """Outcome of a function in a forked process: what it returns, or a text that tells how the process ended.

    ``after(process)`` is called while it runs.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=lambda: theirs.send(function(*arguments)))
    process.start()
    theirs.close()
    if after is not None:
        after(process)
    try:
        outcome = ours.recv() if ours.poll(seconds) else "did not end"
    except EOFError:
        outcome = None
    process.kill()
    process.join()
    crashed = process.exitcode not in (0, 1, -signal.SIGKILL) and outcome is None
    return f"crashed with exit code {process.exitcode}" if crashed else outcome


# -- calls with odd arguments ------------------------------------------------------------------------------------------


def targets(adata: AnnData, model: Any) -> dict[str, tuple[Callable, dict]]:
    """Public functions and methods by name, with the arguments of a call that works."""
    import inspect

    own = {"adata": adata, "data": adata, "model": model}
    work = {
        "scvae": SMALL,
        "compare": {"grid": {"likelihood": ["nb"]}, **SMALL},
        "simulate": {"n_cells": 40, "n_genes": 8},
        "mouse_brain_20k_like": {"n_cells": 200, "n_genes": 20},
        "ppc": {"n_samples": 2},
        "rank_components": {"n_samples": 4},
        "cut": {"n_clusters": 2},
        "cluster_stability": {"n_seeds": 1, "n_halves": 0, "progress": False},
        "confusion": {"labels_key": "label"},
        "genes": {"genes": ["gene0"]},
        "differential_expression": {"groupby": "label", "silent": True},
        "differential_abundance": {"sample_key": "label"},
        "iter_component_expression": {"components": model.components, "n_samples": 2},
        "train": {"max_epochs": 1, "progress": False},
    }
    found = {}
    for module in (svt.tl, svt.pl, svt.datasets, svt.metrics):
        for name in module.__all__:
            if name in ("mouse_brain_20k", "stability", "loadings"):  # a download; results that are not there
                continue
            function = getattr(module, name)
            parameters = inspect.signature(function).parameters
            given = {each: own[each] for each in own if each in parameters}
            if module is svt.metrics:
                latent, groups = np.random.default_rng(0).normal(size=(60, 2)), adata.obs["label"]
                given = (
                    dict.fromkeys(parameters, groups)
                    if name != "silhouette"
                    else {"latent": latent, "clusters": groups}
                )
                given = {key: value for key, value in given.items() if parameters[key].default is parameters[key].empty}
            found[f"svt.{module.__name__.rpartition('.')[2]}.{name}"] = (function, given | work.get(name, {}))
    skipped = (
        "load",
        "save",
        "to_device",
        "prepare",
        "view_",
        "convert",
        "setup",
        "get_anndata",
        "register",
        "transfer",
    )
    skipped += ("deregister", "data_registry", "get_from_registry", "get_setup", "get_state", "get_var", "update_setup")
    skipped += ("has_cells", "find_columns", "other_cells", "shown")  # for functions that build on a model
    for name, method in inspect.getmembers(model, inspect.ismethod):
        if not name.startswith(("_", *skipped)):
            found[f"model.{name}"] = (method, work.get(name, {}))
    found["svt.SCVAE"] = (lambda **options: built(adata, options), {"n_hidden": 4, "n_latent": 2})
    found["svt.SCVAE"][0].__signature__ = inspect.signature(svt.SCVAE.__init__)
    return found


def built(adata: AnnData, options: dict) -> None:
    """Build a model and train it for an epoch."""
    copy = adata.copy()
    svt.SCVAE.setup_anndata(copy, batch_key="batch")
    svt.SCVAE(copy, **options).train(1, progress=False)


def is_finite(result: Any) -> bool:
    """Whether no number of a result is NaN or infinite."""
    if isinstance(result, pd.DataFrame):
        result = result.select_dtypes("number").to_numpy()
    if isinstance(result, float | np.floating | np.ndarray):
        values = np.asarray(result)
        return values.dtype.kind not in "fc" or bool(np.isfinite(values).all())
    if isinstance(result, tuple | list):
        return all(map(is_finite, result))
    if isinstance(result, dict):
        return all(map(is_finite, result.values()))
    return True


def asks_for_processes(options: dict) -> bool:
    """Whether Lightning would start this script again, once for each further device."""
    devices = options.get("devices")
    return np.size(devices) > 1 or (isinstance(devices, int | float | np.number) and devices > 1)


def called(name: str, options: dict, adata: AnnData, function: Callable, given: dict) -> str | None:
    """Make a call, and return what is wrong with its outcome; None if nothing is."""
    if asks_for_processes(options):
        return None
    before = digest(adata)
    try:
        result = function(**given | options)
        if hasattr(result, "__next__"):
            result = list(result)
    except EXPECTED as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        if digest(adata) != before:
            return f"changed the AnnData, and ended in {type(error).__name__}: {error}"
        is_ours = where.startswith(PACKAGE) or ("argument" in str(error) and isinstance(error, TypeError))
        return None if is_ours else f"foreign error: {type(error).__name__}: {error} ({where})"
    except Exception as error:  # noqa: BLE001  (which it is to find)
        return f"foreign error: {type(error).__name__}: {error}"
    if name.startswith("svt.tl.scvae") and "X_scvae" in adata.obsm:
        result = [adata.obsm["X_scvae"], adata.uns["scvae"]["elbo"]]
    may_be_missing = ("svt.pl", "svt.metrics", "model.differential", "svt.tl.scvae", "svt.tl.cluster_stability")
    checks = not name.startswith(may_be_missing) or "tl.scvae" in name
    return None if not checks or is_finite(result) else "returned numbers that are not finite"


def prepared() -> tuple[AnnData, dict[str, tuple[Callable, dict]]]:
    """Data with results, and what is called on them; see `targets`."""
    import matplotlib as mpl

    mpl.use("Agg")
    adata = make_adata()
    model = svt.tl.scvae(adata, **SMALL | {"max_epochs": 3}, return_model=True)
    svt.tl.tree(adata, min_cells=5)
    svt.tl.cluster_stability(adata, n_seeds=1, n_halves=2, progress=False)
    return adata, targets(adata, model)


def arguments_of(name: str, function: Callable) -> list[str]:
    """Names of the arguments that odd values are given for."""
    import inspect

    names = [each for each in inspect.signature(function).parameters if each not in LEFT_ALONE]
    if name == "svt.tl.scvae":
        of_model, of_train = (inspect.signature(each).parameters for each in (svt.SCVAE.__init__, svt.SCVAE.train))
        names += [each for each in {**of_model, **of_train} if each not in LEFT_ALONE | set(names) | {"registry"}]
    return names


def every_argument(_: float, __: random.Random) -> tuple[int, list[str]]:
    """Number of calls with each argument and each odd value, and failures."""
    adata, known = prepared()
    failures, n_calls = [], 0
    for name, (function, given) in sorted(known.items()):
        for argument in arguments_of(name, function):

            def outcomes(name: str = name, argument: str = argument, called_with: tuple = (function, given)) -> list:
                return [called(name, {argument: value}, adata, *called_with) for value in ODD]

            found = in_a_fork(outcomes, seconds=600)
            found = found if isinstance(found, list) else [f"the process {found or 'ended'}"]
            n_calls += len(ODD)
            wrong = [(value, each) for value, each in zip(ODD, found, strict=False) if each is not None]
            failures += [f"{name}({argument}={value!r}): {each}" for value, each in wrong]
            for each in failures[len(failures) - len(wrong) :]:
                print(each[:600], flush=True)
    return n_calls, failures


def fuzz(seconds: float, rng: random.Random, most: int | None = None) -> tuple[int, list[str]]:
    """Number of calls, and failures."""
    adata, known = prepared()
    failures, n_calls, end = [], 0, time.monotonic() + seconds
    while time.monotonic() < end and n_calls != most:
        name = rng.choice(sorted(known))
        function, given = known[name]
        names = arguments_of(name, function)
        options = {each: rng.choice(ODD) for each in rng.sample(names, min(len(names), rng.choice((1, 1, 2))))}
        wrong = in_a_fork(called, name, options, adata, function, given, seconds=120)
        n_calls += 1
        if wrong is not None:
            failures.append(f"{name}(**{options!r}): {wrong}")
            print(failures[-1][:600], flush=True)
    return n_calls, failures


# -- kills -------------------------------------------------------------------------------------------------------------


def writers(adata: AnnData, model: Any, folder: Path) -> dict[str, tuple[Callable, Callable]]:
    """Writers by name, with what reads their file."""
    import anndata

    from scvae_tools._adata_files import write_adata
    from scvae_tools._cli._writing import write_table

    table = pd.DataFrame({"a": np.arange(20_000)})

    return {
        "model and data": (
            lambda: model.save(folder / "model", overwrite=True, save_anndata=True),
            lambda: svt.SCVAE.load(folder / "model").get_elbo(),
        ),
        "h5ad": (lambda: write_adata(adata, folder / "a.h5ad"), lambda: anndata.read_h5ad(folder / "a.h5ad")),
        "zarr": (lambda: write_adata(adata, folder / "a.zarr"), lambda: anndata.read_zarr(folder / "a.zarr")),
        "table": (
            lambda: write_table(table, folder / "t.tsv"),
            lambda: pd.testing.assert_frame_equal(pd.read_csv(folder / "t.tsv", sep="\t"), table),
        ),
        "checkpoint": (lambda: trained(folder), lambda: trained(folder)),
    }


def trained(folder: Path) -> None:
    """Train with a checkpoint, from where it is."""
    adata = make_adata()
    svt.SCVAE.setup_anndata(adata)
    model = svt.SCVAE(adata, n_components=2, n_hidden=4, n_latent=2)
    model.train(20, progress=False, checkpoint=folder / "checkpoint")


def repeated(write: Callable) -> None:
    """Write for ever."""
    while True:
        write()


def outcome_of(function: Callable) -> str:
    """Empty if a function ends well, or its error."""
    try:
        function()
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return ""


def names_in(folder: Path) -> set[str]:
    """Names of the files and folders in a folder, and within its folders, but for those of zarr."""
    return {str(each.relative_to(folder)) for each in folder.rglob("*") if "a.zarr/" not in f"{each}"}


def kill(seconds: float, rng: random.Random, most: int | None = None) -> tuple[int, list[str]]:
    """Number of kills, and failures."""
    adata = make_adata()
    model = svt.tl.scvae(adata, **SMALL, return_model=True)
    failures, n_kills, end = [], 0, time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        known = writers(adata, model, Path(folder))
        for write, _ in known.values():
            in_a_fork(outcome_of, write)
        usual = names_in(Path(folder))
        while time.monotonic() < end and n_kills != most:
            name = rng.choice(sorted(known))
            write, read = known[name]
            delay = rng.uniform(0.0, 1.0)
            in_a_fork(repeated, write, seconds=delay)
            n_kills += 1
            wrong = in_a_fork(outcome_of, read)
            if wrong:
                failures.append(f"{name}, killed after {delay:.3f} s: {wrong}")
                print(failures[-1][:600], flush=True)
            time.sleep(1.1)  # so long a temporary folder may still be without its lock, and is left alone
            in_a_fork(outcome_of, write)
            if left := names_in(Path(folder)) - usual:
                failures.append(f"{name}, killed after {delay:.3f} s: left behind by the next writer: {sorted(left)}")
                print(failures[-1][:600], flush=True)
    return n_kills, failures


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


def interrupted(adata: AnnData) -> str:
    """Train under Ctrl-C, and say what is wrong with the outcome; empty if nothing is."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = digest(adata)
    try:
        svt.tl.scvae(adata, n_components=3, n_hidden=16, n_latent=3, max_epochs=40, progress=False)
    except KeyboardInterrupt:
        return "" if digest(adata) == before else "KeyboardInterrupt, and the AnnData is changed"
    except BaseException as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    expected = {"X_scvae", "scvae_probs"}
    is_whole = expected <= set(adata.obsm) and "scvae" in adata.obs and len(adata.uns["scvae"]["history"]) > 0
    return "" if is_whole and np.isfinite(adata.obsm["X_scvae"]).all() else "results are missing"


def interrupt(seconds: float, rng: random.Random, most: int | None = None) -> tuple[int, list[str]]:
    """Number of interruptions, and failures."""
    adata = make_adata()
    start = time.monotonic()
    in_a_fork(interrupted, adata)
    usual = time.monotonic() - start
    failures, n_presses, end = [], 0, time.monotonic() + seconds
    while time.monotonic() < end and n_presses != most:
        delay = rng.uniform(0.05, usual)

        def press(process: Any, delay: float = delay) -> None:
            process.join(delay)
            if process.is_alive():
                os.kill(process.pid, signal.SIGINT)

        wrong = in_a_fork(interrupted, adata, seconds=120, after=press)
        n_presses += 1
        if wrong:  # None: pressed before or after the call
            failures.append(f"Ctrl-C after {delay:.3f} s of {usual:.1f}: {wrong}")
            print(failures[-1][:600], flush=True)
    return n_presses, failures


def main() -> int:
    """Run the three parts, and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="of all parts together")
    parser.add_argument("--seed", type=int, default=0, help="of arguments and moments")
    parser.add_argument("--part", choices=("arguments", "calls", "kills", "interrupts"), help="only this part")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rng, parts = random.Random(options.seed), {"calls": fuzz, "kills": kill, "interrupts": interrupt}
    chosen = [options.part] if options.part else list(parts)
    parts |= {"arguments": every_argument}
    found = {name: parts[name](options.seconds / len(chosen), rng) for name in chosen}
    for name, (n, failures) in found.items():
        print(f"{name}: {n}, failures: {len(failures)}")
    return int(any(failures for _, failures in found.values()))


if __name__ == "__main__":
    sys.exit(main())
