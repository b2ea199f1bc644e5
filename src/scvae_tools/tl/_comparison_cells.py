"""Cells of a comparison: their counts, what is known of them, and which part each is in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scvae_tools._data.roles import columns_in
from scvae_tools._files import digest
from scvae_tools.model._build import build_model

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from scvae_tools.model._scvae import SCVAE


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
        obs = self.obs.iloc[positions][columns_in(obs_keys)].copy()
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
        counts = self.counts
        arrays = counts.indptr, counts.indices, counts.data, self.train, self.validation
        labels = () if self.labels is None else (hash_of_columns(self.labels.to_frame()),)
        return digest(repr(counts.shape).encode(), *arrays, *labels)


def hash_of_columns(table: pd.DataFrame) -> bytes:
    """Hash of each row of a table, in order."""
    return pd.util.hash_pandas_object(table, index=False).to_numpy().tobytes()
