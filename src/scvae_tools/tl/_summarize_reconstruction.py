"""Summarize what a trained model reconstructs, beside the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvae_tools._checks import check_whole
from scvae_tools._data.counts import require_anndata
from scvae_tools._random import as_seed
from scvae_tools.tl._models import require_encoder_of_counts
from scvae_tools.tl._ppc import Totals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from scvae_tools.model._scvae import SCVAE


def summarize_reconstruction(
    adata: AnnData,
    model: SCVAE,
    *,
    indices: Sequence[int] | Sequence[bool] | None = None,
    by_gene: bool = False,
    n_samples: int = 10,
    layer: str | None = None,
    random_state: int | np.random.RandomState | np.random.Generator | None = 0,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Summarize counts as the model reconstructs them, and the data: mean, spread and zeros.

    Parameters
    ----------
    adata
        Annotated data with raw counts and the genes of the model; not changed.
    model
        Trained `SCVAE`, as ``svt.tl.scvae(adata, return_model=True)`` returns it.
    indices
        Positions of the cells, or one boolean per cell; None for all. ``model.validation_indices`` are those that the
        model was not trained on, where ``adata`` has the cells of the training.
    by_gene
        Whether to summarize each gene over the cells, or all cells and genes together.
    n_samples
        Draws of z from q(z|x) per cell.
    layer
        Layer with the counts; None for ``adata.X``, or for the layer that `SCVAE.setup_anndata` was given.
    random_state
        Seed, or generator to draw one from. The global random states are left as they were.
    batch_size
        Cells encoded at a time.

    Returns
    -------
    A table with the rows

    ``"data"``
        The counts; whether they are above 0 for ``likelihood="bernoulli"``, which is of this alone.
    ``"posterior mean"``
        E[x|x_cell], the mean of E[x|z] over the draws of z. It varies less than counts do, and is hardly ever 0.
    ``"posterior predictive"``
        Counts drawn from p(x|z) at draws of z, in expectation over the counts: what `svt.tl.ppc` draws.

    and the columns

    ``mean``
        In counts.
    ``sd``
        Standard deviation, in counts, with n and not n − 1 in the denominator.
    ``dispersion``
        Variance over mean, in counts; 1 for a Poisson distribution. Missing where the mean is 0.
    ``share_of_zeros``
        Between 0 and 1. Missing for the posterior predictive of likelihoods that are densities (``"gaussian"``,
        ``"log_normal"``, ``"lomax"``), which give no single value a probability.

    With ``by_gene``, a row for each gene of the model and the columns ``mean_data``, ``sd_data``, ``dispersion_data``,
    ``share_of_zeros_data``, ``mean_posterior_mean``, ..., ``mean_posterior_predictive``, ....

    Raises
    ------
    TypeError
        If ``adata`` is not an AnnData or ``model`` not an `SCVAE`.
    CountsError
        If the counts are not raw counts, with the cell and the gene.
    ValueError
        If the model is not trained or holds minified data; ``adata`` lacks genes of the model, or columns
        of ``obs`` that it was trained with; or an argument is out of range.

    Notes
    -----
    No counts are drawn: the variance is E[Var[x|z]] + Var[E[x|z]] and the share of zeros E[p(0|z)], over cells and
    draws of z. The posterior mean is one of ``n_samples`` draws, of which its variance holds a small part.

    Memory is bounded: as many cells are decoded at a time as take about 256 MB, of which only sums are kept.

    Examples
    --------
    >>> svt.tl.summarize_reconstruction(adata, model, indices=model.validation_indices)
    """
    require_anndata(adata)
    require_encoder_of_counts(model, "svt.tl.summarize_reconstruction")
    n_samples = check_whole("n_samples", n_samples)
    batch_size = check_whole("batch_size", batch_size, or_none=True)
    seed = as_seed(random_state, None)
    cells = model.other_cells(adata, indices=indices, layer=layer, any_labels=True)
    with model.shown(cells) as shown:
        mean, predictive = _decoded_sums(model, shown, n_samples, batch_size, seed)
    observed = model.module.likelihood.observed(cells.counts)
    summaries = {"data": _sums_of(observed), "posterior mean": mean, "posterior predictive": predictive}
    if not by_gene:
        return pd.DataFrame({name: each.together().statistics() for name, each in summaries.items()}).T
    columns = {
        f"{statistic}_{name.replace(' ', '_')}": value
        for name, each in summaries.items()
        for statistic, value in each.statistics().items()
    }
    return pd.DataFrame(columns, index=pd.Index(model.var_names.astype(object)))


@dataclass
class _Sums:
    """Sums of E[x], E[x²] and p(0) over ``n_entries`` entries, for each gene, (n_genes,) float64, or for all."""

    n_entries: int
    first: np.ndarray
    second: np.ndarray
    zeros: np.ndarray

    @classmethod
    def empty(cls, n_entries: int, n_genes: int) -> _Sums:
        return cls(n_entries, *np.zeros((3, n_genes)))

    def add(self, part: slice, first: Any, second: Any, zeros: Any) -> None:
        """Add the sums of some genes, from tensors (..., n_genes of the part)."""
        for total, value in ((self.first, first), (self.second, second), (self.zeros, zeros)):
            total[part] += value.flatten(end_dim=-2).double().sum(0).cpu().numpy()

    def together(self) -> _Sums:
        """Sums over all genes together."""
        return _Sums(self.n_entries * len(self.first), self.first.sum(), self.second.sum(), self.zeros.sum())

    def statistics(self) -> dict[str, Any]:
        mean = self.first / self.n_entries
        variance = np.maximum(self.second / self.n_entries - np.square(mean), 0)
        with np.errstate(invalid="ignore"):
            dispersion = np.divide(variance, mean)
        zeros = self.zeros / self.n_entries
        return {"mean": mean, "sd": np.sqrt(variance), "dispersion": dispersion, "share_of_zeros": zeros}


def _sums_of(counts: csr_matrix) -> _Sums:
    n_cells, n_genes = counts.shape
    totals = Totals(1, n_genes)
    totals.add_sparse(counts)
    return _Sums(n_cells, totals.sum[0], totals.squares[0], n_cells - totals.positive[0])


def _decoded_sums(
    model: SCVAE, adata: AnnData, n_samples: int, batch_size: int | None, seed: int
) -> tuple[_Sums, _Sums]:
    """Sums of the posterior mean, the mean over the draws, and of the posterior predictive."""
    n_cells, n_genes, is_density = adata.n_obs, len(model.var_names), model.module.likelihood.is_density
    mean, predictive = _Sums.empty(n_cells, n_genes), _Sums.empty(n_cells * n_samples, n_genes)
    # Measured: moments, p(0) and their sums in float64 take twice as much again as what they are made of.
    decoded = model.iter_decoded(adata, None, n_samples, batch_size, overhead=3, random_state=seed)
    for _, genes, px in decoded:
        each = px.mean if n_samples > 1 else px.mean[None]  # (s, n, genes)
        average = each.mean(0)
        mean.add(genes, average, average.square(), average == 0)
        zeros = each.new_full((1, each.shape[-1]), np.nan) if is_density else _probability_of_zero(px)
        predictive.add(genes, each, px.variance.expand(px.batch_shape) + each.square(), zeros)
    return mean, predictive


def _probability_of_zero(px: Any) -> Any:
    """Probability of a zero, of the shape of the counts."""
    return px.likelihood.log_prob_zero(px.params).exp().expand(px.batch_shape)
