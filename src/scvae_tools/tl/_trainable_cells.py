"""Cells that a tool trains several models on, in whole or in part, and the training of one of them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
from anndata import AnnData

from scvae_tools._data.roles import columns_in
from scvae_tools._messages import InterruptedTraining
from scvae_tools._train.progress import EpochsInBar
from scvae_tools.model._build import build_model

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse import csr_matrix

    from scvae_tools.model._scvae import SCVAE


@dataclass(frozen=True, kw_only=True)
class TrainableCells:
    """Counts of cells, and what is known of them."""

    counts: csr_matrix  # (n_cells, n_genes)
    obs: pd.DataFrame
    names: pd.Index  # of the genes
    allow_non_integer: bool

    def part(self, positions: np.ndarray | None, obs_keys: dict[str, Any]) -> AnnData:
        """AnnData of some cells, with what a model is given; None for all cells, whose counts are not copied."""
        columns = columns_in(obs_keys)
        counts = self.counts if positions is None else self.counts[positions]
        obs = (self.obs if positions is None else self.obs.iloc[positions])[columns].copy()
        return AnnData(counts, obs=obs, var=pd.DataFrame(index=self.names))

    def build(self, positions: np.ndarray | None, obs_keys: dict[str, Any], options: dict[str, Any]) -> SCVAE:
        """Model of some cells, or of all; ``options`` are arguments of `SCVAE`."""
        cells = self.part(positions, obs_keys)
        keys = {"labels_key": None, "unlabeled_category": None, **obs_keys}
        return build_model(cells, cells.X, None, keys, options, allow_non_integer=self.allow_non_integer)


def train_to_the_end(model: SCVAE, bar: Any, what: str, **options: Any) -> None:
    """Train one of several models.

    Parameters
    ----------
    model
        Model of `TrainableCells.build`.
    bar
        Bar that counts the models, and shows the epoch; None for none.
    what
        Name of the model in the bar.
    **options
        Arguments of `SCVAE.train`.

    Raises
    ------
    KeyboardInterrupt
        If Ctrl-C ended the training: alone it goes on to a usable model, but one of several must not count as finished.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InterruptedTraining)
        model.train(progress=False, callbacks=[] if bar is None else [EpochsInBar(bar, what)], **options)
    if model.was_interrupted:
        raise KeyboardInterrupt
