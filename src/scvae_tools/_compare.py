"""Comparison of models: every combination of given arguments, trained and scored on one split of the cells.

`scvae_tools.tl` exports `compare`.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvae_tools._adata import build_model, write_uns
from scvae_tools._arguments import check_at_least, require_writable
from scvae_tools._grid import (
    OBS_KEYS,
    as_json,
    check_combinations,
    check_names,
    combine,
    defaults_of_models,
    describe,
    distinct,
    obs_keys_of,
    options_of,
)
from scvae_tools._messages import inform, said_before, warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from scvae_tools.model import SCVAE

#: Columns of the table after those of the parameters; ``ari`` only where there are labels.
RESULTS = (
    "epochs",
    "seconds",
    "elbo_train",
    "elbo_validation",
    "elbo_test",
    "log_likelihood_test",
    "kl_z_test",
    "kl_y_test",
    "importance_weighted_test",
    "components_used",
    "ari",
)
WHOLE_NUMBERS = ("epochs", "components_used")
STATE, FINISHED = "state", "finished"
#: Arguments of `SCVAE` that mean nothing to a plain VAE.
OF_MIXTURES = {"n_components", "covariance", "weights", "y_term"}


def compare(
    adata: AnnData,
    grid: Mapping[str, Sequence[Any]],
    *,
    layer: str | None = None,
    mask_var: str | np.ndarray | None = None,
    batch_key: str | None = None,
    size_factor_key: str | None = None,
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    labels_key: str | None = None,
    max_epochs: int | None = None,
    train_size: float = 0.8,
    test_size: float = 0.1,
    n_importance_samples: int = 100,
    accelerator: str = "auto",
    random_state: int | np.random.RandomState | np.random.Generator | None = 0,
    key_added: str = "scvae_compare",
    directory: str | Path | None = None,
    allow_non_integer: bool = False,
    verbose: bool = True,
    **kwargs: Any,
) -> pd.DataFrame:
    """Train a model for every combination of arguments, and compare them on cells that none of them has seen.

    The cells are divided once, for all models: those of the training, those of the validation, which choose the best
    weights and tell when to stop, and those of the test, which nothing of a model was made from. The bounds of the test
    cells are what likelihoods, mixtures and sizes can be compared by.

    Parameters
    ----------
    adata
        Annotated data, cells x genes, with raw counts; never changed but for the key below.
    grid
        Values to combine, by the name of the argument: those of `SCVAE` (``"likelihood"``, ``"mixture"``,
        ``"n_components"``, ``"n_latent"``, ...) and `SCVAE.train` (``"lr"``, ``"batch_size"``, ``"max_epochs"``, ...),
        ``"random_state"`` for the seeds of the models, and ``"batch_key"``, ``"size_factor_key"``,
        ``"categorical_covariate_keys"`` and ``"continuous_covariate_keys"``. What takes several numbers has them as one
        value: ``{"n_hidden": [128, (250, 100)], "dropout_rate": [0.2, {"input": 0.1}]}``.
    layer, mask_var
        Layer of the counts, and genes to use, as in `scvae`; the same for all models, since likelihoods of other counts
        cannot be compared.
    batch_key, size_factor_key, categorical_covariate_keys, continuous_covariate_keys
        Columns of ``obs``, as in `scvae`, where ``grid`` does not name them.
    labels_key
        Column of ``obs`` with labels to score the clusters by. No model is trained on them. Cells whose label is
        missing are not scored.
    max_epochs
        Most epochs of a model; None for about 4,000 steps of 128 cells.
    train_size, test_size
        Shares of the cells to train on and to test on; the others are those of the validation.
    n_importance_samples
        Samples per test cell for the importance-weighted bound.
    accelerator
        ``"auto"``, ``"cpu"``, ``"gpu"``, ``"mps"``.
    random_state
        Seed of the split, and of the models where ``grid`` does not name ``"random_state"``; or a generator to draw it
        from. The global random states are left as they were.
    key_added
        Name of the result.
    directory
        Where to keep a small file for each finished combination, so that what was interrupted goes on there, also
        after a crash. None to go on from the result of a former call in ``adata.uns``.
    allow_non_integer
        Accept estimated (non-integer) counts, with a warning.
    verbose
        Whether to show a progress bar.
    **kwargs
        Arguments of `SCVAE` and `SCVAE.train` that are the same for all models, such as ``likelihood="zinb"``.

    Returns
    -------
    A table with a row per combination, the last argument of ``grid`` varying fastest, and the columns

    arguments of ``grid`` : number, bool or str
        Their values; written as text (``"(250, 100)"``) where they are not all numbers or all of True and False.
    ``epochs``, ``seconds``
        Length of the training.
    ``elbo_train``, ``elbo_validation``, ``elbo_test``
        Evidence lower bound, nats per cell.
    ``log_likelihood_test``, ``kl_z_test``, ``kl_y_test``
        Its terms, on the test cells.
    ``importance_weighted_test``
        Importance-weighted bound of log p(x), tighter than the ELBO, nats per cell.
    ``components_used``
        Components that are the most probable one of any cell; missing without a mixture.
    ``ari``
        Adjusted Rand index of these components and the labels, over all cells. Only with ``labels_key``.
    ``state`` : str
        ``"finished"``, or the error that ended this combination; its results are then missing.

    Sets ``adata.uns["scvae_compare"]``, a dict with this ``table``; ``grid``, the values as text by argument;
    ``params``, the arguments that are the same for all; ``split``, with the positions ``train_indices``,
    ``validation_indices`` and ``test_indices`` and what they were drawn by; ``hashes``, by which a later call finds
    what is finished; and ``version``.

    Raises
    ------
    CountsError
        If the counts are not raw counts, with the cell and the gene.
    ValueError
        If a name of ``grid`` or another argument is unknown, or a combination cannot be built; before any is trained.

    Notes
    -----
    A combination is trained once for each set of arguments, split, data and version of the package: one that is
    finished, also in a call with another ``grid``, is not trained again. A combination that failed is.

    Without a mixture, the arguments of mixtures (``n_components``, ``covariance``, ``weights``, ``y_term``) mean
    nothing: combinations that differ by them alone share one training.

    Ctrl-C stores the combinations that are finished, and ends the call.

    Models are trained one after the other. On many machines, `SCVAE` is a model class for Ray Tune by way of
    ``scvi.autotune.run_autotune``, with ``metrics="elbo_validation"`` and ``mode="max"``.

    Only models of the same counts have comparable bounds, and only likelihoods of the same kind: those of counts, of
    detection (``"bernoulli"``), and densities (``"gaussian"``, ``"log_normal"``, ``"lomax"``). A warning names the
    kinds that a grid mixes. The seeds show how large a difference has to be to mean something: give
    ``"random_state"`` several values.

    Examples
    --------
    >>> grid = {"likelihood": ["poisson", "nb", "zinb"], "n_latent": [5, 10, 20], "random_state": [0, 1, 2]}
    >>> svt.tl.compare(adata, grid, directory="comparison")
    >>> svt.pl.compare(adata)
    """
    from scvae_tools._counts import check_obs, read_counts, require_anndata, resolve_mask_var
    from scvae_tools._random import as_seed

    require_anndata(adata)
    require_writable(adata)
    seed = as_seed(random_state, None)
    _check_sizes(train_size, test_size, n_importance_samples)
    obs_keys = (batch_key, size_factor_key, categorical_covariate_keys, continuous_covariate_keys)
    named = dict(zip(OBS_KEYS, obs_keys, strict=True)) | {"max_epochs": max_epochs, "accelerator": accelerator}
    defaults = defaults_of_models()
    shared = set(inspect.signature(compare).parameters)
    values, fixed = check_names(grid, named, kwargs, defaults, shared)
    combinations = combine(values, defaults | {"random_state": seed} | fixed)
    mask = resolve_mask_var(adata, mask_var)
    counts = read_counts(adata, layer=layer, mask_var=mask, allow_non_integer=allow_non_integer)
    for keys in distinct(obs_keys_of(combination) for combination in combinations):
        check_obs(adata, **keys)
    labels = _labels(adata, labels_key)
    names = adata.var_names if mask is None else adata.var_names[mask]
    parts = _split(adata.n_obs, train_size, test_size, seed)
    cells = Cells(counts, adata.obs, names, labels, *parts, allow_non_integer)
    check_combinations(cells, combinations, values, defaults)
    _warn_of_kinds({combination["likelihood"] for combination in combinations})

    store = Store(adata.uns.get(key_added), directory)
    fixed |= {"layer": layer, "mask_var": mask_var if isinstance(mask_var, str) else None, "labels_key": labels_key}
    fixed |= {"n_importance_samples": n_importance_samples, "allow_non_integer": allow_non_integer}
    split = {"random_state": seed, "train_size": float(train_size), "test_size": float(test_size)}
    comparison = Comparison(cells, values, combinations, n_importance_samples, store)
    try:
        comparison.run(verbose=verbose)
    except BaseException:  # Ctrl-C, the end of the process, a full disk
        if comparison.rows:
            _write_result(adata, key_added, comparison, fixed, split)
            warn(
                f"The comparison was ended early. The {len(comparison.rows)} of {len(combinations)} combinations that "
                f"are done are in adata.uns[{key_added!r}]; the same call goes on from there."
            )
        raise
    return _write_result(adata, key_added, comparison, fixed, split)


#: What the bound of a likelihood is of, by `Likelihood.measures`.
KINDS = {"counts": "probabilities of counts", "detection": "probabilities of x > 0", "density": "densities"}


def _warn_of_kinds(likelihoods: set[str]) -> None:
    """Say which of the likelihoods cannot be compared with each other."""
    from scvae_tools.likelihoods import get_likelihood

    by_kind: dict[str, list[str]] = {}
    for name in sorted(likelihoods):
        by_kind.setdefault(get_likelihood(name).measures, []).append(repr(name))
    if len(by_kind) > 1:
        found = ", ".join(f"{KINDS[kind]} ({', '.join(by_kind[kind])})" for kind in KINDS if kind in by_kind)
        warn(
            "Bounds can only be compared between likelihoods of the same kind: a density has no upper bound, and "
            f"whether a count is above 0 says less than the count. The grid has {found}. Compare bounds within each "
            "kind, and the kinds by `ari`."
        )


# -- the cells ---------------------------------------------------------------------------------------------------------


def _check_sizes(train_size: float, test_size: float, n_importance_samples: int) -> None:
    if not (train_size > 0 and test_size > 0 and train_size + test_size < 1 - 1e-9):
        raise ValueError(
            "`train_size` and `test_size` must be positive, and leave cells for the validation, which chooses the "
            f"weights: their sum must be below 1; found {train_size!r} and {test_size!r}. Pass, for example, 0.8 and "
            "0.1."
        )
    check_at_least("n_importance_samples", n_importance_samples, 1)


def _split(n_cells: int, train_size: float, test_size: float, seed: int) -> tuple[np.ndarray, ...]:
    """Positions of the cells of training, validation and test, ascending."""
    n_train, n_test = round(train_size * n_cells), round(test_size * n_cells)
    n_validation = n_cells - n_train - n_test
    if min(n_train, n_validation, n_test) < 1:
        raise ValueError(
            f"`train_size` and `test_size` must leave cells in each of the three parts; found {n_train} to train on, "
            f"{n_validation} for the validation and {n_test} for the test, of {n_cells}. Pass other shares, or more "
            "cells."
        )
    order = np.random.default_rng(seed).permutation(n_cells)
    return tuple(np.sort(part) for part in np.split(order, [n_train, n_train + n_validation]))


def _labels(adata: AnnData, labels_key: str | None) -> pd.Series | None:
    from scvae_tools._counts import _column_of_obs

    if labels_key is None:
        return None
    labels = _column_of_obs(adata, labels_key, "labels_key")
    if labels.isna().all():
        raise ValueError(
            f"adata.obs[{labels_key!r}] (`labels_key`) must hold labels to score by; found none. Leave it out."
        )
    return labels


@dataclass(frozen=True)
class Cells:
    """Counts of all cells, what is known of them, and which part each is in."""

    counts: csr_matrix  # (n_cells, n_genes)
    obs: pd.DataFrame
    names: pd.Index  # of the genes
    labels: pd.Series | None
    train: np.ndarray  # positions
    validation: np.ndarray
    test: np.ndarray
    allow_non_integer: bool

    @property
    def seen(self) -> np.ndarray:
        """Positions of the cells that a model is made from; all but those of the test."""
        return np.sort(np.concatenate([self.train, self.validation]))

    def part(self, positions: np.ndarray, obs_keys: dict[str, Any]) -> AnnData:
        """AnnData of some cells, with what a model is given."""
        from anndata import AnnData

        obs = self.obs.iloc[positions][_columns(obs_keys)].copy()
        return AnnData(self.counts[positions], obs=obs, var=pd.DataFrame(index=self.names))

    def build(self, obs_keys: dict[str, Any], options: dict[str, Any]) -> SCVAE:
        """Model of the cells of training and validation."""
        seen = self.part(self.seen, obs_keys)
        keys = {"labels_key": None, "unlabeled_category": None, **obs_keys}
        return build_model(seen, seen.X, None, keys, options, allow_non_integer=self.allow_non_integer)

    def check_categories(self, obs_keys: dict[str, Any]) -> None:
        """Refuse categories that too few training cells have: the model knows nothing of them."""
        categorical = {"batch_key": [obs_keys["batch_key"]] if obs_keys["batch_key"] else []}
        categorical["categorical_covariate_keys"] = obs_keys["categorical_covariate_keys"] or []
        for argument, columns in categorical.items():
            for column in columns:
                values = self.obs[column].astype(str)
                n_train = values.iloc[self.train].value_counts().reindex(values.unique(), fill_value=0)
                if n_train.min() < 2:
                    raise ValueError(
                        f"Every category of adata.obs[{column!r}] (`{argument}`) must have at least two training "
                        f"cells; found {n_train.min()} in {n_train.idxmin()!r}. Merge it with another, remove its "
                        "cells, or pass another `random_state` for another split."
                    )

    def digest(self) -> str:
        """Fingerprint of the counts, the labels and the split."""
        found = hashlib.sha256(repr(self.counts.shape).encode())
        for values in (self.counts.indptr, self.counts.indices, self.counts.data, self.train, self.validation):
            found.update(np.ascontiguousarray(values).view(np.uint8))
        if self.labels is not None:
            found.update(_hash_of_columns(self.labels.to_frame()))
        return found.hexdigest()


def _columns(obs_keys: dict[str, Any]) -> list[str]:
    names = [[value] if isinstance(value, str) else value for value in obs_keys.values() if value]
    return list(dict.fromkeys(itertools.chain.from_iterable(names)))


def _hash_of_columns(table: pd.DataFrame) -> bytes:
    return pd.util.hash_pandas_object(table, index=False).to_numpy().tobytes()


def _hash(cells: Cells, combination: dict[str, Any], n_importance_samples: int, digest: str) -> str:
    """Name of everything that the results of a combination depend on."""
    from scvae_tools import __version__

    plain = combination["mixture"] is False
    params = {name: value for name, value in combination.items() if not (plain and name in OF_MIXTURES)}
    params |= obs_keys_of(combination) | {"mixture": "gmvae" if params["mixture"] is True else params["mixture"]}
    obs = _hash_of_columns(cells.obs[columns]).hex() if (columns := _columns(obs_keys_of(combination))) else ""
    named = {"params": params, "cells": digest, "obs": hashlib.sha256(obs.encode()).hexdigest()}
    named |= {"n_importance_samples": n_importance_samples, "version": __version__}
    return hashlib.sha256(as_json(named).encode()).hexdigest()


# -- training and scores -----------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """All combinations, and what is known of them so far."""

    cells: Cells
    values: dict[str, list]
    combinations: list[dict[str, Any]]
    n_importance_samples: int
    store: Store

    def __post_init__(self) -> None:
        digest = self.cells.digest()
        self.hashes = [_hash(self.cells, each, self.n_importance_samples, digest) for each in self.combinations]
        #: Results by the place of the combination, or the error that it ended with.
        self.rows = {i: self.store[name] for i, name in enumerate(self.hashes) if name in self.store}

    def run(self, *, verbose: bool) -> None:
        """Train what is not finished, one after the other."""
        if self.rows:
            inform("%d of %d combinations are finished from a former call.", len(self.rows), len(self.hashes))
        bar = _progress_bar(len(self.hashes), len(self.rows)) if verbose else None
        try:
            for i, (combination, name) in enumerate(zip(self.combinations, self.hashes, strict=True)):
                if i in self.rows:
                    continue
                if bar is not None:
                    bar.set_postfix_str(describe(combination, self.values))
                # Without a mixture, another combination may have been the same but for the arguments of mixtures.
                self.rows[i] = self.store[name] if name in self.store else self._result(combination, name)
                if bar is not None:
                    bar.update(1)
        finally:
            if bar is not None:
                bar.close()

    def _result(self, combination: dict[str, Any], name: str) -> dict[str, Any]:
        """Results of a model trained now, or the error that it ended with."""
        description = describe(combination, self.values)
        try:
            result = _train_and_score(self.cells, combination, self.n_importance_samples)
        except Exception as error:  # noqa: BLE001  (whatever it is, the other combinations go on)
            message = f"{type(error).__name__}: {error}"
            warn(f"{description} failed, and has no results in the table. {message}")
            return {STATE: message}
        self.store.add(name, result, description)
        return result

    def table(self) -> pd.DataFrame:
        """Combinations that are done, as a table that anndata can write."""
        done = sorted(self.rows)
        rows, index = [self.rows[i] for i in done], [str(i) for i in range(len(done))]
        table = pd.DataFrame(index=index)
        for name, given in self.values.items():
            column = [self.combinations[i][name] for i in done]
            table[name] = column if _are_alike(given) else pd.array(list(map(_text, column)), dtype=object)
        for name in RESULTS:
            if name != "ari" or self.cells.labels is not None:
                numbers = pd.Series([row.get(name) for row in rows], index=index, dtype=object).astype(float)
                table[name] = numbers.astype("Int64") if name in WHOLE_NUMBERS else numbers
        table[STATE] = pd.array([row[STATE] for row in rows], dtype=object)
        return table


def _progress_bar(total: int, n_done: int) -> Any:
    from scvae_tools import _training

    bar = _training._progress_bar(total)
    bar.unit = "model"
    bar.set_description("compare", refresh=False)
    bar.update(n_done)
    return bar


def _train_and_score(cells: Cells, combination: dict[str, Any], n_importance_samples: int) -> dict[str, Any]:
    model, seconds = _train(cells, combination)
    scores = _scores(model, cells, combination, n_importance_samples)
    return {"epochs": len(model.history), "seconds": seconds, **scores, STATE: FINISHED}


def _train(cells: Cells, combination: dict[str, Any]) -> tuple[SCVAE, float]:
    """Model of a combination, and the seconds that its training took."""
    from lightning.pytorch.callbacks import LambdaCallback

    from scvae_tools.model import SCVAE

    model = cells.build(obs_keys_of(combination), options_of(SCVAE.__init__, combination))
    errors: list[BaseException] = []
    # The training itself goes on from Ctrl-C to a usable model; here it must not count as finished.
    callback = LambdaCallback(on_exception=lambda _trainer, _module, error: errors.append(error))
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Training was interrupted")
        model.train(
            validation_indices=np.searchsorted(cells.seen, cells.validation),
            progress=False,
            callbacks=[callback],
            **options_of(SCVAE.train, combination),
        )
    if any(isinstance(error, KeyboardInterrupt) for error in errors):
        raise KeyboardInterrupt
    return model, time.perf_counter() - start


def _scores(model: SCVAE, cells: Cells, combination: dict[str, Any], n_importance_samples: int) -> dict[str, Any]:
    """Bounds in nats per cell, and what the clusters are like."""
    from sklearn.metrics import adjusted_rand_score

    from scvae_tools.tl import ELBO_SAMPLES

    test = cells.part(cells.test, obs_keys_of(combination))
    with said_before():
        parts = {
            "train": model.get_elbo_terms(indices=model.train_indices, n_samples=ELBO_SAMPLES["train"]),
            "validation": model.get_elbo_terms(indices=model.validation_indices, n_samples=ELBO_SAMPLES["validation"]),
            "test": model.get_elbo_terms(test, n_samples=ELBO_SAMPLES["validation"]),
        }
        found = {f"elbo_{part}": float(terms["elbo"].mean()) for part, terms in parts.items()}
        found |= {f"{term}_test": float(parts["test"][term].mean()) for term in ("log_likelihood", "kl_z", "kl_y")}
        found["importance_weighted_test"] = model.get_marginal_ll(test, n_mc_samples=n_importance_samples)
        if not model.is_mixture:
            return found
        component = np.empty(len(cells.obs), dtype=object)
        component[cells.seen], component[cells.test] = model.predict(), model.predict(test)
    found["components_used"] = len(set(component))
    if cells.labels is not None:
        known = cells.labels.notna().to_numpy()
        labels = cells.labels[known].astype(str)
        found["ari"] = float(adjusted_rand_score(labels, component[known].astype(str)))
    return found


# -- what is kept ------------------------------------------------------------------------------------------------------


class Store:
    """Results of finished combinations, by the hash of all they depend on.

    Parameters
    ----------
    former
        Result of a former call, if there is one.
    directory
        Where each combination has a file, or None.
    """

    def __init__(self, former: object, directory: str | Path | None) -> None:
        self.directory = None if directory is None else Path(directory)
        self.results = _read_table(former)
        if self.directory is None:
            return
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"`directory` must be a directory; {str(directory)!r} is a file. Pass another path.")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.results |= _read_files(self.directory)

    def __contains__(self, name: str) -> bool:
        return name in self.results

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self.results[name]

    def add(self, name: str, result: dict[str, Any], description: str) -> None:
        """Keep a result: under a temporary name until it is on the disk, so that no file is ever half written."""
        self.results[name] = result
        if self.directory is None:
            return
        temporary = self.directory / f".{name}.{os.getpid()}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"combination": description, "hash": name, "result": result}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.directory / f"{name}.json")


def _read_files(directory: Path) -> dict[str, dict[str, Any]]:
    results = {}
    for path in sorted(directory.glob("*.json")):
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            results[saved["hash"]] = dict(saved["result"])
        except (ValueError, KeyError, TypeError):
            warn(f"{str(path)!r} is not a result of svt.tl.compare, and is not read.")
    return results


def _read_table(former: object) -> dict[str, dict[str, Any]]:
    """Finished rows of a result in ``uns``, by their hashes."""
    if not isinstance(former, Mapping) or not {"table", "hashes"} <= set(former):
        return {}
    table = former["table"]
    names = [name for name in (*RESULTS, STATE) if name in table]
    rows = table[names].astype(object).where(table[names].notna(), None).to_dict("records")
    return {name: row for name, row in zip(former["hashes"], rows, strict=True) if row[STATE] == FINISHED}


def _are_alike(values: list) -> bool:
    """Whether a column can hold them as they are."""
    are_bool = [isinstance(value, bool) for value in values]
    return all(are_bool) or (all(isinstance(value, int | float) for value in values) and not any(are_bool))


def _text(value: object) -> str:
    return value if isinstance(value, str) else repr(value)


def _writable(value: object) -> object:
    """A value that anndata can write."""
    is_plain = isinstance(value, str | bool | int | float | np.ndarray | np.generic)
    return value if is_plain else _text(value)


def _write_result(
    adata: AnnData, key: str, comparison: Comparison, fixed: dict[str, Any], split: dict[str, Any]
) -> pd.DataFrame:
    """Write what is done into ``uns``, and return its table."""
    from scvae_tools import __version__

    cells, table = comparison.cells, comparison.table()
    indices = {"train_indices": cells.train, "validation_indices": cells.validation, "test_indices": cells.test}
    result = {
        "table": table,
        "grid": {name: np.array(list(map(_text, given)), dtype=object) for name, given in comparison.values.items()},
        "params": {name: _writable(value) for name, value in fixed.items() if value is not None},
        "split": split | indices,
        "hashes": np.array([comparison.hashes[i] for i in sorted(comparison.rows)], dtype=object),
        "version": __version__,
    }
    write_uns(adata, key, result)
    return table.copy()
