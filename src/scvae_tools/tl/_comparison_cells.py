"""Cells of a comparison: their counts, what is known of them, and which part each is in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from scvae_tools._files import digest
from scvae_tools.tl._trainable_cells import TrainableCells


@dataclass(frozen=True, kw_only=True)
class Cells(TrainableCells):
    """Cells of a comparison, and which part each is in."""

    labels: pd.Series | None
    train: np.ndarray  # positions
    validation: np.ndarray
    test: np.ndarray

    @property
    def seen(self) -> np.ndarray:
        """Positions of the cells that a model is made from; all but those of the test."""
        return np.sort(np.concatenate([self.train, self.validation]))

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
