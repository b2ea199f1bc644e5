"""Log fold changes between groups of cells with their standard errors, and tests of them.

Symbols: k groups, b batches, g genes, c comparisons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from scvae_tools.model._count_evidence import CountEvidence

#: Information in units of Poisson counts that stands for what the decoder says of the expression of a group beside the
#: counts, and of a batch: a standard deviation of about 0.5 nats for what a batch adds to all groups.
OF_GROUP, OF_BATCH = 0.5, 4.0
#: Sweeps over groups and batches, and the change in nats below which they end.
N_SWEEPS, LEAST_CHANGE = 200, 1e-4
#: Least information, so that a log rate that nothing is known of has a variance.
LEAST_INFORMATION = 1e-12


class FoldChanges(NamedTuple):
    """Differences between groups of the mean of log expression over the cells, in nats, (c, g) each."""

    mean: np.ndarray
    standard_error: np.ndarray

    def p_values(self, delta: float = 0.0) -> np.ndarray:
        """p-values of the hypothesis that the difference is within ±delta nats, (c, g); 1 where nothing is known.

        Largest probability, under this hypothesis, of an estimate that is as far from 0.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            above, below = ((np.abs(self.mean) + sign * delta) / self.standard_error for sign in (-1, 1))
        return np.nan_to_num(np.minimum(stats.norm.sf(above) + stats.norm.sf(below), 1), nan=1.0)


def fold_changes(evidence: CountEvidence, contrasts: np.ndarray) -> FoldChanges:
    """Differences between groups, as decoded and then corrected by the counts.

    Parameters
    ----------
    evidence
        Sums over the cells.
    contrasts
        Weight of each group in each comparison, (c, k); rows sum to 0.

    Notes
    -----
    log E[x] of a cell is taken as what is decoded, plus a term of its group, plus one of its batch. The counts fix both
    (`log_ratios`), so that errors that the decoder makes for all cells of a group do not matter. The standard error is
    that of these terms, and of the mean over the cells.
    """
    estimate = evidence.log_expression + log_ratios(evidence.observed, evidence.expected)  # (k, g)
    from_counts = variances(evidence.information, contrasts) * evidence.dispersion
    from_cells = np.square(contrasts) @ evidence.cell_variance
    return FoldChanges(contrasts @ estimate, np.sqrt(from_counts + from_cells))


def log_ratios(observed: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Terms a of groups in observed = expected · exp(a + e), with terms e of batches, (k, g) of (k, b, g).

    Solved for the terms of the groups and of the batches in turn. `OF_GROUP` and `OF_BATCH` are added to both sides.
    """
    by_group = observed.sum(1) + OF_GROUP
    batch = np.zeros((1, *observed.shape[1:]))
    group = np.log(by_group / (expected.sum(1) + OF_GROUP))
    for _ in range(N_SWEEPS if observed.shape[1] > 1 else 0):
        before = group
        of_batch = (expected * np.exp(group)[:, None]).sum(0, keepdims=True) + OF_BATCH
        batch = np.log((observed.sum(0, keepdims=True) + OF_BATCH) / of_batch)
        group = np.log(by_group / ((expected * np.exp(batch)).sum(1) + OF_GROUP))
        if np.abs(group - before).max(initial=0) < LEAST_CHANGE:
            break
    return group


def variances(information: np.ndarray, contrasts: np.ndarray) -> np.ndarray:
    """Variances of comparisons (c, k) of the terms of groups, where those of batches are not known, (c, g).

    The information (k, b, g) is that of each group in each batch. What a batch has of it is in part about the term of
    the batch, and groups that share no batch are compared by `OF_BATCH` alone.
    """
    total = np.maximum(information.sum(1), LEAST_INFORMATION)  # (k, g)
    if information.shape[1] == 1:
        return np.square(contrasts) @ (1 / total)
    n_groups = len(total)
    shared = np.einsum("kbg,lbg->gkl", information / (information.sum(0) + OF_BATCH), information)
    precision = np.eye(n_groups) * total.T[:, :, None] - shared
    precision += np.eye(n_groups) * (LEAST_INFORMATION + 1e-9 * total.max(0)[:, None, None])
    solved = np.linalg.solve(precision, np.broadcast_to(contrasts.T, (len(precision), *contrasts.T.shape)))
    return np.maximum(np.einsum("ck,gkc->cg", contrasts, solved), 0)


def adjusted_p_values(p_values: np.ndarray) -> np.ndarray:
    """p-values adjusted for the number of genes, (..., g): the false discovery rate by Benjamini and Hochberg."""
    return stats.false_discovery_control(p_values, axis=-1)
