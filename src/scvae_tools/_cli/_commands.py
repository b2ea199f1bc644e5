"""Commands of the command line: each turns arguments into one call of `tl`, `pl`, `datasets` or `SCVAE`, and files.

A command returns what is to be printed: a summary (dict) or a table (DataFrame).
"""

from __future__ import annotations

import inspect
import json
import tempfile
import time
import tomllib
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import psutil
from anndata import AnnData

from scvae_tools import datasets as data_sets
from scvae_tools import metrics, pl, tl
from scvae_tools._adata_files import n_bytes_of, write_adata
from scvae_tools._cli import _options, _reading
from scvae_tools._cli._writing import (
    ADATA,
    TABLE,
    check_model_folder,
    check_output,
    write_table,
)
from scvae_tools._files import in_words, require_room
from scvae_tools._interrupts import interrupts_held
from scvae_tools._keys import Keys
from scvae_tools._messages import listed
from scvae_tools._on_disk import is_on_disk
from scvae_tools._other_names import hint_for

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Callable, Iterable, Iterator

    from scvae_tools.model._scvae import SCVAE

#: Arguments that a command sets itself, since it relies on what the function returns or shows.
SET_HERE = {"adata", "data", "copy", "return_model", "progress", "show", "save", "ax", "axes"}


def fit(given: Namespace, parser: ArgumentParser) -> dict[str, Any]:
    """Train a model, and write the files that were asked for."""
    output, model_folder, score_key = (_get(given, name) for name in ("output", "model", "score_key"))
    if output is None and model_folder is None and given.data != _reading.DEMO:
        parser.error("nothing to write: pass -o FILE, --model DIR, or both")
    overwrite = _get(given, "overwrite", default=False)
    check_output(output, overwrite=overwrite, endings=ADATA)
    check_model_folder(model_folder, overwrite=overwrite)
    options = _arguments(given, _options.FIT, parser)
    adata = _read(given, may_stay=True)
    labels = None if score_key is None else _labels(adata, score_key, "--score-key")
    from scvae_tools.tl._lambda_layer import size_of_rate

    has_all_genes = options.get("mask_var") is None
    n_bytes_of_rate = size_of_rate(adata, options.get("write_lambda"), has_all_genes=has_all_genes)
    _require_memory_for_rate(adata, n_bytes_of_rate)
    _require_room(output, n_bytes_of(adata) + n_bytes_of_rate)
    start = time.perf_counter()
    with interrupts_held() as held:  # until what was trained is in a file
        model = tl.scvae(adata, return_model=True, progress=not _get(given, "quiet", default=False), **options)
        seconds = time.perf_counter() - start
        _write_fitted(adata, model, output, model_folder, overwrite=overwrite)
        held.take()
    summary = _summary(adata, model, Keys(options.get("key_added", "scvae")), labels)
    summary |= {"interrupted": True} if model.was_interrupted or held.was_pressed else {}
    written = {"output": output, "model": model_folder}
    return summary | {"seconds": seconds} | {name: str(path) for name, path in written.items() if path is not None}


def _write_fitted(adata: AnnData, model: SCVAE, output: Path | None, folder: Path | None, *, overwrite: bool) -> None:
    """Write model and results. Where one cannot be written, write the other, and the model at least somewhere."""
    lost = []
    if folder is not None:
        try:
            model.save(folder, overwrite=overwrite)
        except OSError as error:
            lost.append(error)
            folder = None
    if output is not None:
        try:
            write_adata(adata, output)
        except OSError as error:
            lost.append(error)
    if not lost:
        return
    kept = _saved_somewhere(model, output) if folder is None else folder
    remedy = (
        "The trained model is lost with it."
        if kept is None
        else f"The trained model is in {str(kept)!r}, from which `scvae-tools predict` makes the results."
    )
    raise OSError(f"{' '.join(map(str, lost))} {remedy}") from lost[0]


def _saved_somewhere(model: SCVAE, output: Path | None) -> Path | None:
    """Save a model in a new folder beside the output, or in that of the system for temporary files."""
    for place in ([] if output is None else [output.absolute().parent]) + [Path(tempfile.gettempdir())]:
        with suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="scvae-model-", dir=place))
            try:
                model.save(folder, overwrite=True, versions=False)
            except OSError:
                folder.rmdir()
                raise
            return folder
    return None


def _summary(adata: AnnData, model: SCVAE, keys: Keys, labels: pd.Series | None) -> dict[str, Any]:
    stored = adata.uns[keys.uns]
    summary: dict[str, Any] = {"cells": adata.n_obs, "genes": len(model.var_names), "epochs": len(stored["history"])}
    if model.is_mixture:
        found = stored["components"]
        summary |= {"components": int(found["n_components"]), "components_used": int(found["n_used"])}
    summary |= {f"elbo_{subset}": float(terms["elbo"]) for subset, terms in stored["elbo"].items()}
    if model.is_mixture and labels is not None:
        summary["ari"] = metrics.ari(adata.obs[keys.component], labels)
    return summary


def evaluate(given: Namespace, parser: ArgumentParser) -> pd.DataFrame | dict[str, Any]:
    """Compute bounds, and scores where there are labels."""
    output = _check_table(given)
    options = _arguments(given, _options.EVALUATE, parser)
    model = _load(given)
    cells = _cells_of_model(_read(given), model, given)
    return _tell_or_write(_call(tl.evaluate, cells, model, **options), output)


def predict(given: Namespace, parser: ArgumentParser) -> dict[str, Any]:
    """Write latent codes and components of new cells, under the keys of `tl.scvae`."""
    output = _check_adata(given, parser)
    keys = Keys(_get(given, "key_added", default="scvae"))
    model = _load(given)
    adata = _read(given, may_stay=True)
    layer, fill = _get(given, "layer"), _get(given, "fill_missing", default=False)
    options = {"fill_missing": fill, "key_added": keys.key_added, "none_below": _get(given, "none_below")}
    _check_genes(adata, model, fill=fill)
    _check_layer(adata, layer)
    _require_room(output, n_bytes_of(adata))
    with _model_layer_is_x(adata, model) if layer is None else nullcontext():
        tl.predict(adata, model, layer=layer, **options)
    adata.uns[keys.uns]["params"]["model"] = str(given.model)
    write_adata(adata, output)
    summary: dict[str, Any] = {"cells": adata.n_obs, "genes": len(model.var_names)}
    if model.is_mixture:
        summary |= adata.obs[keys.component].value_counts(sort=False).add_prefix("cells_in_").to_dict()
    return summary | {"output": str(output)}


def compare(given: Namespace, parser: ArgumentParser) -> pd.DataFrame | dict[str, Any]:
    """Compare the models of a grid."""
    output = _check_table(given)
    options = _arguments(given, _options.COMPARE, parser)
    grid = _read_grid(given.grid)
    table = tl.compare(_read(given), grid, progress=not _get(given, "quiet", default=False), **options)
    return _tell_or_write(table, output)


def sample(given: Namespace, parser: ArgumentParser) -> dict[str, Any]:
    """Write counts of new cells."""
    output = _check_adata(given, parser)
    adata = _load(given).sample(**_arguments(given, _options.SAMPLE, parser))
    write_adata(adata, output)
    return {"cells": adata.n_obs, "genes": adata.n_vars, "output": str(output)}


def plot(given: Namespace, parser: ArgumentParser) -> pd.DataFrame | dict[str, Any]:
    """Draw one of the pictures of `pl`."""
    if _get(given, "list", default=False):
        return _list(pl)
    output = _get(given, "output")
    if given.data is None or given.plot is None or output is None:
        parser.error("pass DATA, NAME and -o FILE; or --list")
    function = _one_of(pl, given.plot, "plot --list")
    _check_picture(output)
    check_output(output, overwrite=_get(given, "overwrite", default=False))
    options = _settings(given, parser)
    is_table = given.data.endswith(TABLE)
    data = pd.read_csv(given.data, sep="\t") if is_table else _reading.read(given.data)
    import matplotlib as mpl

    mpl.use("Agg")
    _call(function, data, **options, save=output)
    from matplotlib import pyplot as plt

    plt.close("all")
    return {"plot": given.plot, "output": str(output)}


def datasets(given: Namespace, parser: ArgumentParser) -> pd.DataFrame | dict[str, Any]:
    """List the data sets, or write one."""
    if given.dataset is None:
        return _list(data_sets)
    output = _check_adata(given, parser)
    adata = _call(_one_of(data_sets, given.dataset, "datasets"), **_settings(given, parser))
    write_adata(adata, output)
    return {"cells": adata.n_obs, "genes": adata.n_vars, "output": str(output)}


# -- arguments ---------------------------------------------------------------------------------------------------------


def _get(given: Namespace, name: str, *, default: Any = None) -> Any:
    """Value of an argument, or the default where it was not given."""
    return getattr(given, name, default)


def _arguments(given: Namespace, options: Iterable[_options.Option], parser: ArgumentParser) -> dict[str, Any]:
    """Arguments that were given, by their names in Python, with those of ``--set``."""
    named = _given(given, options)
    settings = _settings(given, parser)
    twice = sorted(set(named) & set(settings))
    if twice:
        parser.error(f"--set {twice[0]}=... says the same as an option that was given: leave one out")
    return named | settings


def _given(given: Namespace, options: Iterable[_options.Option]) -> dict[str, Any]:
    return {option.name: getattr(given, option.name) for option in options if hasattr(given, option.name)}


def _settings(given: Namespace, parser: ArgumentParser) -> dict[str, Any]:
    pairs = _get(given, "set", default=[])
    settings = dict(pairs)
    if len(settings) < len(pairs):
        parser.error("--set names an argument twice: leave one out")
    for name in sorted(SET_HERE & set(settings)):
        parser.error(f"--set {name}=... is for the command itself to decide: leave it out")
    return settings


def _check_adata(given: Namespace, parser: ArgumentParser) -> Path:
    output = _get(given, "output")
    if output is None:
        parser.error("nothing to write: pass -o FILE")
    check_output(output, overwrite=_get(given, "overwrite", default=False), endings=ADATA)
    return output


def _require_room(output: Path | None, n_bytes: int) -> None:
    """Refuse, before any work, results that the disk has no room for; how far zarr compresses them is not known."""
    if output is not None and output.suffix == ".h5ad":
        require_room(output, n_bytes)


def _require_memory_for_rate(adata: AnnData, n_bytes: int) -> None:
    """Refuse, before any work, λ that would not fit into memory, of counts that were left in their file for it."""
    free = psutil.virtual_memory().available
    if is_on_disk(adata.X) and n_bytes > free / 2:
        raise ValueError(
            f"--lambda takes {in_words(n_bytes)} of memory here; found {in_words(free)} free. Leave it out, or call "
            "svt.tl.scvae(adata, write_lambda=...) in Python with an array on disk."
        )


def _check_table(given: Namespace) -> Path | None:
    output = _get(given, "output")
    check_output(output, overwrite=_get(given, "overwrite", default=False), endings=TABLE)
    return output


def _check_picture(output: Path) -> None:
    """Refuse, before any work, a name whose ending is none that matplotlib writes."""
    from matplotlib.backend_bases import FigureCanvasBase

    endings = [f".{kind}" for kind in sorted(FigureCanvasBase.get_supported_filetypes())]
    if output.suffix.lower() not in endings:
        raise ValueError(f"A picture is written as {', '.join(endings)}; found {output.name!r}. Name it so.")


def _tell_or_write(table: pd.DataFrame, output: Path | None) -> pd.DataFrame | dict[str, Any]:
    """Return the table to be printed, or write it and return where it is."""
    if output is None:
        return table
    write_table(table, output)
    return {"rows": len(table), "output": str(output)}


def _read_grid(given: str) -> dict[str, Any]:
    """Read a grid from JSON text, or from a JSON or TOML file."""
    if given.lstrip().startswith("{"):
        return _parsed(given, json.loads, "--grid")
    path = Path(given)
    if path.suffix not in (".json", ".toml"):
        raise ValueError(f"--grid takes a .json or .toml file, or JSON in braces; found {given!r}.")
    return _parsed(path.read_text(encoding="utf-8"), tomllib.loads if path.suffix == ".toml" else json.loads, given)


def _parsed(text: str, parse: Callable[[str], dict[str, Any]], name: str) -> dict[str, Any]:
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {error}.") from error


# -- functions by name -------------------------------------------------------------------------------------------------


def _list(module: Any) -> pd.DataFrame:
    """Public functions of a module, and the first lines of their docstrings."""
    functions = {name: getattr(module, name) for name in sorted(module.__all__)}
    return pd.DataFrame(
        [(name, (inspect.getdoc(function) or "").splitlines()[0]) for name, function in functions.items()],
        columns=["name", "what"],
    )


def _one_of(module: Any, name: str, command: str) -> Callable[..., Any]:
    if name not in module.__all__:
        raise ValueError(
            f"There is no {name!r}; there are {listed(module.__all__)}. `scvae-tools {command}` lists them."
        )
    return getattr(module, name)


def _call(function: Callable[..., Any], *positional: Any, **options: Any) -> Any:
    """Call a function with arguments of the user; refuse those that it does not take before the call."""
    try:
        inspect.signature(function).bind(*positional, **options)
    except TypeError as error:
        takes = [name for name in inspect.signature(function).parameters if name not in ("adata", "data", "save")]
        hints = "".join(f" {hint}" for name in options if name not in takes and (hint := hint_for(name, takes)))
        raise ValueError(f"{function.__name__}: {error}.{hints} It takes, by --set, {listed(takes)}.") from error
    return function(*positional, **options)


# -- data and models ---------------------------------------------------------------------------------------------------


def _read(given: Namespace, *, may_stay: bool = False) -> AnnData:
    """Data that were asked for; counts of a large file stay there if they may, and ``--in-memory`` was not given."""
    may_stay = may_stay and not _get(given, "in_memory", default=False)
    options = {name: _get(given, name) for name in ("orientation", "genome")}
    adata = _reading.read(given.data, **options, may_stay=may_stay)
    if not _get(given, "raw", default=False):
        return adata
    if adata.raw is None:
        raise ValueError(f"--raw takes the counts from raw; {given.data!r} has none. Leave it out.")
    return _reading.from_raw(adata)


def _load(given: Namespace) -> SCVAE:
    from scvae_tools.model._scvae import SCVAE

    return SCVAE.load(given.model, **_given(given, _options.LOAD))


def _labels(adata: AnnData, key: str, option: str) -> pd.Series:
    from scvae_tools._data.roles import column_of_obs

    return column_of_obs(adata, key, option)


def _check_genes(adata: AnnData, model: SCVAE, *, fill: bool) -> np.ndarray:
    """Names of the model's genes that the data lack; an error unless they are to be filled."""
    names = model.var_names
    missing = names[~np.isin(names, adata.var_names.astype(str))]
    if len(missing) and not fill:
        raise ValueError(
            f"The data must have the model's genes; {len(missing):,} of {len(names):,} are missing: {listed(missing)}. "
            "Take data with these genes, or pass --fill-missing to take their counts as 0."
        )
    return missing


def _check_layer(adata: AnnData, layer: str | None) -> None:
    if layer is not None and layer not in adata.layers:
        raise ValueError(f"--layer must name a layer of the data; found {layer!r}, there are {listed(adata.layers)}.")


@contextmanager
def _model_layer_is_x(adata: AnnData, model: SCVAE) -> Iterator[None]:
    """Context in which a model that was set up with a layer reads ``adata.X``, as all commands do without --layer."""
    if model.layer is None:
        yield
        return
    own = adata.layers.get(model.layer)
    adata.layers[model.layer] = adata.X
    try:
        yield
    finally:
        del adata.layers[model.layer]
        if own is not None:
            adata.layers[model.layer] = own


def _cells_of_model(adata: AnnData, model: SCVAE, given: Namespace) -> AnnData:
    """Cells with the counts of the model's genes, in the order of the model, and with all of ``obs``."""
    from scvae_tools._upstream import quiet

    fill, layer = _get(given, "fill_missing", default=False), _get(given, "layer")
    missing = _check_genes(adata, model, fill=fill)
    _check_layer(adata, layer)
    counts = adata.X if layer is None else adata.layers[layer]
    cells = AnnData(counts, obs=adata.obs.copy(), var=pd.DataFrame(index=adata.var_names))
    with quiet():
        fitted = model.prepare_query_anndata(cells, model, inplace=False) if len(missing) else None
    cells = cells[:, model.var_names].copy() if fitted is None else fitted
    if model.layer is not None:
        cells.layers[model.layer] = cells.X
    return cells
