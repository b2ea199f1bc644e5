"""Posterior predictive checks: are counts that the model draws like those it was given? By gene, in bounded memory.

`scvae_tools.tl` exports `ppc`; `scvae_tools.pl.ppc` draws what it stores.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from scvae_tools._adata import write_uns
from scvae_tools._arguments import check_at_least, require_encoder_of_counts, require_writable
from scvae_tools._keys import Keys
from scvae_tools._messages import said_before

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from scvae_tools.model import SCVAE

#: Most bins of a histogram, beside the first one (zeros) and the last one (all larger counts).
N_BINS = 40
#: Share of the cells that these bins hold where there are more different counts than bins.
SHARE_IN_BINS = 0.995
#: Non-zeros of the data that are summed at a time.
_BLOCK = 2**20
#: What is compared of each gene.
STATISTICS = ("mean", "variance", "share_of_zeros")


def ppc(
    adata: AnnData,
    model: SCVAE,
    *,
    genes: str | Sequence[str] | None = None,
    n_samples: int = 10,
    indices: Sequence[int] | Sequence[bool] | None = None,
    key: str = "scvae",
    key_added: str | None = None,
    layer: str | None = None,
    random_state: int | np.random.RandomState | np.random.Generator | None = 0,
) -> None:
    """Compare the counts with counts that the model draws for the same cells: a posterior predictive check.

    For each cell, z is drawn from q(z|x) and counts from p(x|z), with the size factor, batch and covariates of the
    cell [Gelman96]_. Done for all cells, this is a replicate of the data. Where the likelihood fits, the data are like
    one more replicate: they have as many zeros, and their variance rises with the mean in the same way.

    Parameters
    ----------
    adata
        Annotated data with raw counts and the genes of the model; never changed but for the key below.
    model
        Trained `SCVAE`, as ``svt.tl.scvae(adata, return_model=True)`` returns it.
    genes
        Names of genes whose counts are to be stored as histograms; None for none.
    n_samples
        Number of replicates, at least 2.
    indices
        Positions of the cells, or one boolean per cell; None for all. The honest choice is
        ``model.validation_indices``, where ``adata`` has the cells of the training: what the model has learned by heart
        from the other cells does not help it there. They are fewer, too, and time grows with their number.
    key
        Key of the result of `scvae`, its ``key_added``; the check is stored beside it.
    key_added
        Name of the result; None for ``f"{key}_ppc"``.
    layer
        Layer with the counts; None for ``adata.X``, or for the layer that `SCVAE.setup_anndata` was given.
    random_state
        Seed, or generator to draw one from. The global random states are left as they were.

    Returns
    -------
    None. Sets ``adata.uns["scvae_ppc"]``, a dict with

    ``genes``
        Table of the genes of the model. ``mean``, ``variance`` and ``share_of_zeros`` are those of the data over the
        cells, in counts, counts squared, and between 0 and 1. ``mean_model``, ``variance_model`` and
        ``share_of_zeros_model`` are the means, over the replicates, of the same numbers of a replicate, and
        ``mean_model_sd``, ... their standard deviations over the replicates.
    ``histograms``
        Table of the bins of each of ``genes``, if there are any: ``gene``; ``first`` and ``last`` count of the bin;
        ``cells``, the number of cells with such a count; ``cells_model`` and ``cells_model_sd``, mean and standard
        deviation of this number over the replicates. There is a bin for each count up to the largest of the data, and
        a last one for all above, up to infinity. Of genes with larger counts than 40, they end where 99.5% of the cells
        do, and are wider where that is beyond 40; zeros are always alone. What is drawn from a density and is no whole
        number is in the bin of the count below it, and what is below 0 in that of the zeros.
    ``params``
        ``n_samples``, ``n_cells``, ``likelihood``, ``random_state``, and ``layer`` if it is not ``adata.X``.

    Raises
    ------
    TypeError
        If ``adata`` is not an AnnData or ``model`` not an `SCVAE`.
    CountsError
        If the counts are not raw counts, with the cell and the gene.
    ValueError
        If the model is not trained or holds minified data; ``adata`` has not the genes of the model, or not the columns
        of ``obs`` that it was trained with; or an argument is out of range.

    Notes
    -----
    The mean of a gene says little: the posterior of a cell has seen the very counts that are compared. Zeros and
    variance are not given to the model as such; they tell likelihoods apart.

    Replicates are drawn in chunks of cells of about 256 MB, of which only sums are kept. The draws are those of
    `SCVAE.posterior_predictive_sample` and, like these, depend on the number of cells at a time. Variances are those of
    the cells as they are, with n and not n − 1 in the denominator. Nearly all of the time goes into drawing: 10
    replicates of 1,000 cells and 28,000 genes took 45 s with ``"nb"`` on one core.

    References
    ----------
    .. [Gelman96] Gelman, Meng, Stern (1996) Posterior predictive assessment of model fitness via realized
       discrepancies. Statistica Sinica 6:733.

    Examples
    --------
    >>> model = svt.tl.scvae(adata, return_model=True)
    >>> svt.tl.ppc(adata, model, genes=["CD3D", "LYZ"], indices=model.validation_indices)
    >>> svt.pl.ppc(adata)
    """
    from scvae_tools._counts import require_anndata
    from scvae_tools._random import as_seed, seeded

    require_anndata(adata)
    require_encoder_of_counts(model, "svt.tl.ppc")
    require_writable(adata)
    check_at_least("n_samples", n_samples, 2)
    genes = _check_genes(model, genes)
    cells = _check_cells(indices, adata.n_obs)
    seed = as_seed(random_state, None)
    layer = model._layer if layer is None else layer
    counts, private = _data_for(model, adata, cells, layer)
    counts = _observed(model, counts)

    n_cells, n_genes = counts.shape
    data, model_totals = Totals(1, n_genes), Totals(n_samples, n_genes)
    data.add_sparse(counts)
    histograms = [Histogram(name, at, counts[:, [at]], n_samples) for name, at in genes.items()]
    with seeded(seed):
        for first, draws in _replicates(model, private, n_samples):
            model_totals.add(first, draws)
            for histogram in histograms:
                histogram.add(first, draws[:, :, histogram.position])
    params = {"n_samples": int(n_samples), "n_cells": n_cells, "random_state": seed}
    params |= {"likelihood": model.init_params_["non_kwargs"]["likelihood"]}
    result: dict[str, Any] = {"genes": _table_of_genes(model.var_names, data, model_totals, n_cells)}
    if histograms:
        result["histograms"] = _joined([histogram.table() for histogram in histograms])
    result["params"] = params | ({} if layer is None else {"layer": layer})
    write_uns(adata, Keys(key).ppc if key_added is None else key_added, result)


def find_ppc(adata: AnnData, key: str) -> Mapping[str, Any]:
    """Return what `ppc` stored, by its ``key`` or, if it was given one, its ``key_added``.

    Raises
    ------
    ValueError
        If there is none.
    """
    for name in (Keys(key).ppc, key):
        if _is_ppc(adata.uns.get(name)):
            return adata.uns[name]
    stored = sorted(name for name, value in adata.uns.items() if _is_ppc(value))
    found = f"adata.uns holds those under {', '.join(map(repr, stored))}" if stored else "adata.uns holds none"
    other = f", or pass key={stored[0]!r}" if stored else ""
    raise ValueError(
        f"There is no posterior predictive check under adata.uns[{Keys(key).ppc!r}]; {found}. Run "
        f"svt.tl.ppc(adata, model, key={key!r}) first{other}."
    )


def _is_ppc(value: object) -> bool:
    return isinstance(value, Mapping) and "share_of_zeros_model" in getattr(value.get("genes"), "columns", ())


# -- what is summed ----------------------------------------------------------------------------------------------------


class Totals:
    """Sums over cells of the counts, of their squares, and of how many are not zero, by replicate and gene.

    All are kept in float64, which holds sums of whole numbers exactly up to 2^53: neither the order in which the cells
    come nor how many come at a time makes a difference.
    """

    def __init__(self, n_samples: int, n_genes: int) -> None:
        self.sum, self.squares, self.positive = np.zeros((3, n_samples, n_genes))

    def add(self, first: int, draws: np.ndarray) -> None:
        """Add counts (s, n, g) of some cells, of the replicates from ``first`` on."""
        for sample, counts in enumerate(draws, first):  # one by one: the products are in float64
            wide = counts.astype(np.float64)
            self.sum[sample] += wide.sum(0)
            self.positive[sample] += np.count_nonzero(wide, axis=0)
            self.squares[sample] += np.square(wide, out=wide).sum(0)

    def add_sparse(self, counts: csr_matrix) -> None:
        """Add counts (n, g) without explicit zeros, to the only replicate."""
        for start in range(0, counts.nnz, _BLOCK):
            part = slice(start, start + _BLOCK)
            gene, value = counts.indices[part], counts.data[part].astype(np.float64)
            self.sum[0] += np.bincount(gene, value, self.sum.shape[1])
            self.squares[0] += np.bincount(gene, np.square(value), self.sum.shape[1])
            self.positive[0] += np.bincount(gene, minlength=self.sum.shape[1])

    def statistics(self, n_cells: int) -> dict[str, np.ndarray]:
        """`STATISTICS` of each replicate, (n_samples, n_genes) each."""
        mean = self.sum / n_cells
        variance = np.maximum(self.squares / n_cells - np.square(mean), 0)
        return dict(zip(STATISTICS, (mean, variance, 1 - self.positive / n_cells), strict=True))


class Histogram:
    """How many cells have each count of one gene, in the data and in the replicates.

    Parameters
    ----------
    gene, position
        Name and place of the gene.
    counts
        Of the data, (n, 1).
    n_samples
        Number of replicates.
    """

    def __init__(self, gene: str, position: int, counts: csr_matrix, n_samples: int) -> None:
        self.gene, self.position = gene, position
        values = counts.toarray().ravel()
        self.first = first_counts(values)
        self.cells = np.bincount(self._bins(values), minlength=len(self.first))
        self.replicates = np.zeros((n_samples, len(self.first)))

    def _bins(self, values: np.ndarray) -> np.ndarray:
        # What is below 0, which only densities draw, is in the lowest bin.
        return np.maximum(np.searchsorted(self.first, values, side="right") - 1, 0)

    def add(self, first: int, draws: np.ndarray) -> None:
        """Add counts (s, n) of some cells, of the replicates from ``first`` on."""
        for sample, values in enumerate(draws, first):
            self.replicates[sample] += np.bincount(self._bins(values), minlength=len(self.first))

    def table(self) -> pd.DataFrame:
        """A row for each bin."""
        columns = {"gene": self.gene, "first": self.first, "last": np.append(self.first[1:] - 1.0, np.inf)}
        model = {"cells_model": self.replicates.mean(0), "cells_model_sd": self.replicates.std(0, ddof=1)}
        return pd.DataFrame(columns | {"cells": self.cells} | model)


def first_counts(values: np.ndarray) -> np.ndarray:
    """First count of each bin for counts (n,): 0, 1, and on by a width of 1 or more, up to the one that never ends."""
    largest = int(values.max())
    if largest > N_BINS:
        largest = max(N_BINS, int(np.quantile(values, SHARE_IN_BINS, method="higher")))
    width = -(-largest // N_BINS) if largest > N_BINS else 1
    # A multiple of the width, so that no bin but the last one is cut.
    return np.concatenate([[0], np.arange(1, 1 + width * -(-largest // width) + 1, width)])


def _table_of_genes(names: np.ndarray, data: Totals, model: Totals, n_cells: int) -> pd.DataFrame:
    """A row for each gene, in the order of the model."""
    table = {name: value[0] for name, value in data.statistics(n_cells).items()}
    for name, value in model.statistics(n_cells).items():
        table |= {f"{name}_model": value.mean(0), f"{name}_model_sd": value.std(0, ddof=1)}
    return pd.DataFrame(table, index=pd.Index(names.astype(object)))


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    table = pd.concat(tables, ignore_index=True)
    return table.set_index(table.index.astype(str))  # h5ad wants names


# -- draws -------------------------------------------------------------------------------------------------------------


def _replicates(model: SCVAE, private: AnnData, n_samples: int) -> Iterator[tuple[int, np.ndarray]]:
    """Counts (s, n, n_genes) of a few cells at a time, and the number of the first of their replicates.

    The loop of `SCVAE.posterior_predictive_sample`, which would keep all that are not zero: tens of gigabytes for what
    is often asked.
    """
    from scvi import settings

    with _shown(model, private):
        fit = model._cells_at_once(private, n_samples * model._drawn_bytes())
        for tensors in model._batches(private, None, min(settings.batch_size, fit)):
            for first, n in model._draws_at_once(tensors, n_samples):
                counts = model._predictive_counts(tensors, n, [None], None, silent=True)  # (n, n_genes, s)
                yield first, np.moveaxis(counts, 2, 0)


@contextmanager
def _shown(model: SCVAE, private: AnnData) -> Iterator[None]:
    """Let the model read data and forget them: it would keep them alive, and a model without data adopt them."""
    own = model._adata, model._adata_manager
    try:
        with said_before():  # the counts have been checked
            model._validate_anndata(private)
        yield
    finally:
        model._adata, model._adata_manager = own
        for store in (model._setup_adata_manager_store, model._per_instance_manager_store.get(model.id, {})):
            store.pop(private.uns.get("_scvi_uuid"), None)


# -- what is asked for -------------------------------------------------------------------------------------------------


class _Data(NamedTuple):
    counts: csr_matrix
    private: AnnData


def _observed(model: SCVAE, counts: csr_matrix) -> csr_matrix:
    """What p(x|z) is of: the counts, or whether they are above 0."""
    return counts.sign() if model.module.likelihood.measures == "detection" else counts


def _data_for(model: SCVAE, adata: AnnData, cells: np.ndarray, layer: str | None) -> _Data:
    """Counts of the chosen cells and the model's genes, checked, (n_cells, n_genes); and an AnnData of them."""
    from anndata import AnnData as PrivateData

    from scvae_tools._counts import read_counts

    genes = _gene_positions(model, adata)
    obs = _columns(model, adata)
    if len(cells) < adata.n_obs:
        adata, obs = adata[cells], obs.iloc[cells]
    setup = model.registry["setup_args"]
    mask = None if genes is None else np.isin(np.arange(adata.n_vars), genes)
    counts = read_counts(adata, layer=layer, mask_var=mask, allow_non_integer=setup.get("allow_non_integer", False))
    if genes is not None and (np.diff(genes) < 0).any():
        counts = counts[:, np.argsort(np.argsort(genes))]
        counts.sort_indices()
    layers = {} if model._layer is None else {model._layer: counts}
    private = PrivateData(counts, obs=obs.copy(), var=pd.DataFrame(index=model.var_names.astype(object)), layers=layers)
    return _Data(counts, private)


def _gene_positions(model: SCVAE, adata: AnnData) -> np.ndarray | None:
    """Places of the model's genes among those of the data; None if they are the same."""
    wanted, names = model.var_names, pd.Index(adata.var_names.astype(str))
    if len(wanted) == len(names) and (wanted == names).all():
        return None
    missing = wanted[~pd.Index(wanted).isin(names)]
    if len(missing) > 0:
        raise ValueError(
            f"`adata` must have the genes of the model, whose counts are drawn; {len(missing)} of {len(wanted)} are "
            f"missing, the first {str(missing[0])!r}. Pass the AnnData that the model was trained on, with all genes."
        )
    repeated = names[names.duplicated() & names.isin(wanted)]
    if len(repeated) > 0:
        raise ValueError(
            f"`adata` must have each gene of the model once; found {repeated[0]!r} more than once. Pass only the genes "
            "that the model was trained on, in their order, for example adata[:, mask_var]."
        )
    return names.get_indexer_for(wanted)


def _columns(model: SCVAE, adata: AnnData) -> pd.DataFrame:
    """Columns of ``obs`` that the model reads, (n_cells, n_columns), checked."""
    from scvae_tools._counts import _check_categories, check_obs

    setup = model.registry["setup_args"]
    roles = ("labels_key", "size_factor_key", "categorical_covariate_keys", "continuous_covariate_keys")
    keys = {role: setup.get(role) for role in roles}
    if (batch := setup.get("batch_key")) is not None:
        _check_categories(adata, batch, "batch_key")  # a batch may have a single cell here
    check_obs(adata, **keys)
    names = [batch, *(name for value in keys.values() for name in ([value] if isinstance(value, str) else value or ()))]
    return adata.obs[list(dict.fromkeys(name for name in names if name is not None))]


def _check_genes(model: SCVAE, genes: str | Sequence[str] | None) -> dict[str, int]:
    """Places of the genes in the model, each once."""
    names = [] if genes is None else [genes] if isinstance(genes, str) else list(dict.fromkeys(genes))
    known = model.var_names.tolist()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"`genes` must name genes of the model; {len(unknown)} of {len(names)} are not, the first {unknown[0]!r}. "
            "`model.var_names` lists them."
        )
    return {str(name): known.index(name) for name in names}


def _check_cells(indices: Sequence[int] | Sequence[bool] | None, n_cells: int) -> np.ndarray:
    """Positions of the chosen cells, each once, in order."""
    from scvae_tools._counts import cell_positions

    cells = np.unique(cell_positions(indices, n_cells))
    if len(cells) == 0:
        raise ValueError("`indices` must choose at least one cell; found none. Pass None for all cells.")
    return cells
