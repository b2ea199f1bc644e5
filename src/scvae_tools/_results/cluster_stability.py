"""Stability of clusters: how alike clusters of two clusterings are, verdicts by that, and the stored result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvae_tools._keys import Keys
from scvae_tools._results.probabilities import count_pairs

if TYPE_CHECKING:
    from anndata import AnnData

#: Name of the result within ``uns[key]``.
STABILITY = "stability"
#: Mean Jaccard index up to which a cluster is called dissolved, and from which on stable (Hennig 2007, 2008).
DISSOLVED_UP_TO, STABLE_FROM = 0.5, 0.75
DISSOLVED, BETWEEN, STABLE, UNKNOWN = "dissolved", "uncertain", "stable", "unknown"
#: Kinds of runs.
SEED, HALF = "seed", "half"


@dataclass(frozen=True)
class Stability:
    """Stability of the clusters of a result; see `scvae_tools.tl.cluster_stability`."""

    #: A row for each cluster, by its name: ``n_cells``, means over seeds and halves, ``verdict``.
    table: pd.DataFrame
    #: Jaccard index of each cluster with the most similar one of each run, (n_clusters, n_runs).
    jaccard: np.ndarray
    #: A row for each run.
    runs: pd.DataFrame
    params: dict[str, Any]

    def stored(self) -> dict[str, Any]:
        """Contents of ``uns[key]["stability"]``, in types that files hold."""
        return {"table": self.table, "jaccard": self.jaccard, "runs": self.runs, "params": self.params}

    @classmethod
    def read(cls, adata: AnnData, key: str) -> Stability:
        """Stability of the clusters of the result under a key.

        Raises
        ------
        ValueError
            If it was not measured.
        """
        known = [name for name, value in adata.uns.items() if _has_stability(value)]
        if Keys(key).uns not in known:
            found = f"it is there for the results under {known}" if known else "adata holds none"
            other = f", or pass key={known[0]!r}" if known else ""
            raise ValueError(
                f"There is no stability of clusters in adata.uns[{key!r}]; {found}. Run svt.tl.cluster_stability("
                f"adata, key={key!r}) first{other}."
            )
        stored = adata.uns[Keys(key).uns][STABILITY]
        tables = {name: pd.DataFrame(stored[name]) for name in ("table", "runs")}
        return cls(jaccard=np.asarray(stored["jaccard"]), params=dict(stored["params"]), **tables)

    def values(self, kind: str) -> np.ndarray:
        """Jaccard indices of the runs of a kind, (n_clusters, n_runs)."""
        return self.jaccard[:, (self.runs["kind"] == kind).to_numpy()]


def _has_stability(value: object) -> bool:
    stored = value.get(STABILITY) if isinstance(value, Mapping) else None
    return isinstance(stored, Mapping) and {"table", "jaccard", "runs"} <= set(stored)


def jaccard_of_most_similar(clusters: np.ndarray, others: np.ndarray, n_clusters: int) -> np.ndarray:
    """Jaccard index of each cluster with the most similar one of another clustering, (n_clusters,).

    It is the number of cells in both over the number in either, from 0 to 1. NaN for a cluster without cells.

    Parameters
    ----------
    clusters, others
        Codes of the clusters of the cells, from 0 on, (n_cells,); −1 in ``clusters`` for cells that are not counted.
    n_clusters
        Number of clusters, those without cells included.
    """
    is_counted = clusters >= 0
    if not is_counted.any():
        return np.full(n_clusters, np.nan)
    clusters, others = clusters[is_counted], others[is_counted]
    both = count_pairs(clusters, others, (n_clusters, int(others.max()) + 1))
    sizes = both.sum(1)
    either = sizes[:, None] + both.sum(0) - both
    found = (both / np.maximum(either, 1)).max(1)
    return np.where(sizes > 0, found, np.nan)


def means_of_runs(values: np.ndarray) -> np.ndarray:
    """Mean over the runs in which a cluster has cells, (n_clusters,), of values (n_clusters, n_runs); NaN for none."""
    n_runs = np.isfinite(values).sum(1)
    return np.where(n_runs > 0, np.nansum(values, axis=1) / np.maximum(n_runs, 1), np.nan)


def verdicts(*means: np.ndarray) -> list[str]:
    """Verdict of each cluster by the lowest of its means; those that are NaN say nothing."""
    lowest = np.fmin.reduce(means)
    choices = [(np.isnan(lowest), UNKNOWN), (lowest <= DISSOLVED_UP_TO, DISSOLVED), (lowest < STABLE_FROM, BETWEEN)]
    return np.select(*map(list, zip(*choices, strict=True)), default=STABLE).tolist()
