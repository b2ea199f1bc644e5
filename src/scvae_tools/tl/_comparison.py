"""Comparison of models: trains and scores each combination, and keeps the table of the finished ones."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvae_tools import metrics
from scvae_tools._data.roles import columns_in, obs_keys_of
from scvae_tools._files import digest
from scvae_tools._messages import inform, said_before, warn
from scvae_tools._results.comparison import (
    BOUND_BY_CELL,
    FINISHED,
    RESULTS,
    STATE,
    WHOLE_NUMBERS,
    ranked_by,
)
from scvae_tools._train.progress import progress_bar
from scvae_tools._version import __version__
from scvae_tools.model._scvae import SCVAE
from scvae_tools.tl._comparison_cells import Cells, hash_of_columns
from scvae_tools.tl._comparison_grid import as_json, as_text, describe, options_of
from scvae_tools.tl._comparison_ranking import Scored, Setting, rank_settings, ranking_columns
from scvae_tools.tl._results_of_model import ELBO_SAMPLES
from scvae_tools.tl._trainable_cells import train_to_the_end

if TYPE_CHECKING:
    from scvae_tools.tl._comparison_store import Store

#: Arguments of `SCVAE` that mean nothing to a plain VAE.
OF_MIXTURES = {"n_components", "covariance", "weights", "y_term"}


def _hash(cells: Cells, combination: dict[str, Any], n_importance_samples: int | None, digest_of_cells: str) -> str:
    """Digest of everything that the results of a combination depend on."""
    plain = combination["mixture"] is False
    params = {name: value for name, value in combination.items() if not (plain and name in OF_MIXTURES)}
    if params.get("hold_on_device") is None:  # so that results from before there was this argument are found
        params.pop("hold_on_device", None)
    obs_keys = obs_keys_of(combination, inputs_only=True)
    params |= obs_keys | {"mixture": "gmvae" if params["mixture"] is True else params["mixture"]}
    obs = hash_of_columns(cells.obs[columns]).hex() if (columns := columns_in(obs_keys)) else ""
    named = {"params": params, "cells": digest_of_cells, "obs": digest(obs.encode())}
    named |= {"n_importance_samples": n_importance_samples, "version": __version__}
    return digest(as_json(named).encode())


@dataclass
class Comparison:
    """Combinations of a comparison, and the results so far."""

    cells: Cells
    values: dict[str, list]
    combinations: list[dict[str, Any]]
    n_importance_samples: int | None
    store: Store

    def __post_init__(self) -> None:
        of_cells = self.cells.digest()
        self.hashes = [_hash(self.cells, each, self.n_importance_samples, of_cells) for each in self.combinations]
        #: Results by the place of the combination, or the error that it ended with.
        self.rows = {i: self.store[name] for i, name in enumerate(self.hashes) if name in self.store}

    def run(self, *, progress: bool) -> None:
        """Train what is not finished, one after the other."""
        if self.rows:
            inform("%d of %d combinations are finished from a former call.", len(self.rows), len(self.hashes))
        bar = progress_bar(len(self.hashes), "compare", "model") if progress else None
        if bar is not None:
            bar.update(len(self.rows))
        try:
            for i, (combination, name) in enumerate(zip(self.combinations, self.hashes, strict=True)):
                if i in self.rows:
                    continue
                # Without a mixture, another combination may have been the same but for the arguments of mixtures.
                self.rows[i] = self.store[name] if name in self.store else self._result(combination, name, bar)
                if bar is not None:
                    bar.update(1)
        finally:
            if bar is not None:
                bar.close()

    def _result(self, combination: dict[str, Any], name: str, bar: Any) -> dict[str, Any]:
        """Results of a model trained now, or the error that it ended with; the bar, if there is one, names it."""
        description = describe(combination, self.values)
        try:
            result = _train_and_score(self.cells, combination, self.n_importance_samples, description, bar)
        except Exception as error:  # noqa: BLE001  (whatever it is, the other combinations go on)
            message = f"{type(error).__name__}: {error}"
            warn(f"{description} failed, and has no results in the table. {message}")
            return {STATE: message}
        self.store.add(name, result, description)
        return result

    def table(self) -> tuple[pd.DataFrame, list[Setting]]:
        """Combinations that are done, as a table that anndata can write, and the ranked settings of its rows."""
        done = sorted(self.rows)
        rows, index = [self.rows[i] for i in done], [str(i) for i in range(len(done))]
        table = pd.DataFrame(index=index)
        for name, given in self.values.items():
            column = [self.combinations[i][name] for i in done]
            table[name] = column if _are_alike(given) else pd.array(list(map(as_text, column)), dtype=object)
        for name in RESULTS:
            if name != "ari" or self.cells.labels is not None:
                numbers = pd.Series([row.get(name) for row in rows], index=index, dtype=object).astype(float)
                table[name] = numbers.astype("Int64") if name in WHOLE_NUMBERS else numbers
        table[STATE] = pd.array([row[STATE] for row in rows], dtype=object)
        settings = rank_settings(self._scored(ranked_by(table)))
        for name, column in ranking_columns(settings, len(table)).items():
            table.insert(len(table.columns) - 1, name, column)
        return table, settings

    def _scored(self, bound: str) -> list[Scored]:
        """Finished models with the bound that they are ranked by."""
        found = []
        for place, i in enumerate(sorted(self.rows)):
            row = self.rows[i]
            if row[STATE] == FINISHED:
                by_cell = row.get(BOUND_BY_CELL)
                by_cell = None if by_cell is None else np.asarray(by_cell)
                found.append(Scored(place, self.combinations[i], row[bound], by_cell))
        return found

    def bound_by_cell(self) -> np.ndarray:
        """Bound of each test cell by the models that are done, in nats, (n_done, n_test_cells); NaN if unknown."""
        bounds = np.full((len(self.rows), len(self.cells.test)), np.nan, dtype=np.float32)  # as the models compute them
        for place, i in enumerate(sorted(self.rows)):
            if self.rows[i].get(BOUND_BY_CELL) is not None:
                bounds[place] = self.rows[i][BOUND_BY_CELL]
        return bounds


def _train_and_score(
    cells: Cells, combination: dict[str, Any], n_importance_samples: int | None, description: str, bar: Any
) -> dict[str, Any]:
    if bar is not None:
        bar.set_postfix_str(description)
    model, seconds = _train(cells, combination, description, bar)
    if bar is not None:
        bar.set_postfix_str(f"{description}, scores")
    scores = _scores(model, cells, combination, n_importance_samples)
    return {"epochs": len(model.history), "seconds": seconds, **scores, STATE: FINISHED}


def _train(cells: Cells, combination: dict[str, Any], description: str, bar: Any) -> tuple[SCVAE, float]:
    """Model of a combination, and the seconds that its training took."""
    obs_keys = obs_keys_of(combination, inputs_only=True)
    model = cells.build(cells.seen, obs_keys, options_of(SCVAE.__init__, combination))
    options = options_of(SCVAE.train, combination)
    start = time.perf_counter()
    held_out = np.searchsorted(cells.seen, cells.validation)
    train_to_the_end(model, bar, description, validation_indices=held_out, **options)
    return model, time.perf_counter() - start


def _scores(
    model: SCVAE, cells: Cells, combination: dict[str, Any], n_importance_samples: int | None
) -> dict[str, Any]:
    """Scores of a model: bounds in nats per cell, components used, and agreement with the labels."""
    test = cells.part(cells.test, obs_keys_of(combination, inputs_only=True))
    with said_before():
        parts = {
            "train": model.get_elbo_terms(indices=model.train_indices, n_samples=ELBO_SAMPLES["train"]),
            "validation": model.get_elbo_terms(indices=model.validation_indices, n_samples=ELBO_SAMPLES["validation"]),
            "test": model.get_elbo_terms(test, n_samples=ELBO_SAMPLES["validation"]),
        }
        found = {f"elbo_{part}": float(terms["elbo"].mean()) for part, terms in parts.items()}
        if model.null_log_likelihood is not None:
            found["elbo_above_null"] = found["elbo_validation"] - model.null_log_likelihood["validation"]
        found |= {f"{term}_test": float(parts["test"][term].mean()) for term in ("log_likelihood", "kl_z", "kl_y")}
        by_cell = parts["test"]["elbo"].to_numpy()
        if n_importance_samples is not None:
            by_cell = model.get_marginal_ll(test, n_mc_samples=n_importance_samples, return_mean=False)
            found["importance_weighted_test"] = float(by_cell.mean())
        found[BOUND_BY_CELL] = by_cell.tolist()
        if not model.is_mixture:
            return found
        component = np.empty(len(cells.obs), dtype=object)
        component[cells.seen], component[cells.test] = model.predict(), model.predict(test)
    found["components_used"] = len(set(component))
    if cells.labels is not None:
        known = cells.labels.notna().to_numpy()
        labels = cells.labels[known].astype(str)
        found["ari"] = metrics.ari(component[known].astype(str), labels)
    return found


def _are_alike(values: list) -> bool:
    """Whether values can be one column of a table as they are."""
    are_bool = [isinstance(value, bool) for value in values]
    return all(are_bool) or (all(isinstance(value, int | float) for value in values) and not any(are_bool))
