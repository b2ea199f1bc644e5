"""What the counts say of the expression of groups of cells, beside what the decoder says: sums over the cells.

Symbols: k groups, b batches, g genes; x counts, m = E[x] and v = Var[x] at one draw of z of the cell, θ = log λ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scvi import REGISTRY_KEYS
from torch import Tensor

from scvae_tools._data.loader import registered_columns
from scvae_tools._random import RandomStream, seeded
from scvae_tools.likelihoods import RATE, differentiate
from scvae_tools.model._decoding import Codes, DecodingMixin, parts

if TYPE_CHECKING:
    from anndata import AnnData

    from scvae_tools._module.covariates import Covariates
    from scvae_tools.likelihoods import CountDistribution, Likelihood, Params

#: float32 numbers in memory at once for each count, beside those of decoding.
BESIDE_DECODING = 12


@dataclass(frozen=True)
class CountEvidence:
    """Sums over the cells of groups, from which `FoldChanges` are estimated; all are float64.

    Parameters
    ----------
    log_expression
        Mean over the cells of a group of log λ over the size factor, as decoded, in nats, (k, g).
    cell_variance
        Variance of that mean, over the cells: the variance of log λ over their number, (k, g).
    observed, expected
        Information about θ that a group has in a batch, as counted and as the decoder expects it, in units of Poisson
        counts, (k, b, g). Their ratio is the factor by which the counts are above the decoder's λ.
    information
        Expected information halfway between the cells' own λ and that of all cells, (k, b, g): 1 / information is the
        variance of a log rate.
    dispersion
        Variance of the counts over what the likelihood says, over all cells, at least 1, (g,).
    """

    log_expression: np.ndarray
    cell_variance: np.ndarray
    observed: np.ndarray
    expected: np.ndarray
    information: np.ndarray
    dispersion: np.ndarray


class _Weights(NamedTuple):
    """Terms of the quasi-score of θ of each count, (n, g)."""

    score: Tensor  # (x - m) m'/v, whose expectation is 0
    information: Tensor  # m'^2/v, the variance of the score and minus the expectation of its derivative


def count_evidence(
    model: DecodingMixin, adata: AnnData, groups: np.ndarray, n_groups: int, *, adjusts: bool, random_state: int = 0
) -> CountEvidence:
    """Sums over the cells of groups, of what is decoded at one draw of z of each cell, and of the counts.

    Parameters
    ----------
    model
        Trained model.
    adata
        Cells with counts, which the model can read.
    groups
        Group of each cell, (n_cells,), −1 for cells that are left out.
    n_groups
        Number of groups, k.
    adjusts
        Whether expression is decoded at the same covariates for all groups, and counts are compared within batches;
        otherwise each cell has its own covariates, and what they add is part of the difference.
    random_state
        Seed of the draws.
    """
    module, used = model.module, np.flatnonzero(groups >= 0)
    n_batches = module.sizes.n_batch if adjusts else 1
    sums = _Sums(n_groups, n_batches, len(model.var_names), _shared_rate(model, adata, used))
    common = _covariates_in_random_order(model, adata, used, random_state) if adjusts else None
    stream, batches, start = RandomStream(random_state), model._batches(adata, used, None), 0
    n_bytes = model._decoded_bytes(2) + 4 * BESIDE_DECODING
    while True:
        with stream.on(), torch.no_grad():
            tensors = next(batches, None)
            if tensors is None:
                return sums.result()
            x, size, covariates = module.data(tensors)
            codes = Codes(module.posterior(module.encode(x, size, covariates)).sample(1)[0], size, covariates)
        at, counts = slice(start, start + len(codes)), x.dense()
        group = torch.as_tensor(groups[used[at]], dtype=torch.long, device=codes.z.device)
        batch = covariates.batch[:, 0].long() if n_batches > 1 else torch.zeros_like(group)
        typical = _at_common_covariates(model, codes, None if common is None else common.rows(at))
        for cells, genes in parts(len(codes), len(model.var_names), n_bytes):
            px = model._decode(codes, None, cells, genes)
            shown = px if typical is None else model._decode(typical, None, cells, genes)
            log_size = module.log_size(size[cells])
            # No exponential in between, where log λ is what is decoded.
            is_log = px.likelihood.rate_is_head
            log_expression = shown.params[RATE.name] - log_size if is_log else shown.scale.log()
            sums.add(genes, group[cells], batch[cells], counts[cells, genes], px, log_expression, log_size)
        start = at.stop


class _Sums:
    """Sums over the cells, to which parts of the cells and genes are added."""

    def __init__(self, n_groups: int, n_batches: int, n_genes: int, shared_rate: Tensor) -> None:
        self.shared_rate, self.n_groups, self.n_batches = shared_rate, n_groups, n_batches
        # On the host, since not every device has float64; parts are added up where they are, in float32.
        self.n_cells, self.apart, self.square = torch.zeros(3, n_groups, n_genes, dtype=torch.float64)
        shape = n_groups * n_batches, n_genes
        self.score, self.expected, self.information = torch.zeros(3, *shape, dtype=torch.float64)
        self.squared_score = torch.zeros(n_genes, dtype=torch.float64)

    def add(
        self,
        genes: slice,
        group: Tensor,
        batch: Tensor,
        x: Tensor,
        px: CountDistribution,
        log_expression: Tensor,
        log_size: Tensor,
    ) -> None:
        """Add counts (n, g) of some genes, with p(x|z) and log expression (n, g), of groups and batches (n,)."""
        log_shared = self.shared_rate[genes].log()
        own = quasi_score(px.likelihood, x, px.params)
        halfway = _halfway(px.likelihood, px.params, log_shared + log_size)
        between = own if halfway is None else quasi_score(px.likelihood, x, halfway)
        apart = log_expression - log_shared  # small numbers, whose squares are exact enough
        place, n_places = group * self.n_batches + batch, self.n_groups * self.n_batches
        for total, index, n_rows, value in (
            (self.n_cells, group, self.n_groups, torch.ones_like(apart)),
            (self.apart, group, self.n_groups, apart),
            (self.square, group, self.n_groups, apart.square()),
            (self.score, place, n_places, own.score),
            (self.expected, place, n_places, own.information),
            (self.information, place, n_places, between.information),
        ):
            rows = value.new_zeros(n_rows, value.shape[1]).index_add_(0, index, value)
            total[:, genes] += rows.cpu()
        self.squared_score[genes] += own.score.square().sum(0).cpu()

    def result(self) -> CountEvidence:
        """All that was added, on the host."""
        n_cells = self.n_cells.clamp(min=1)  # of groups without cells, which have no weight
        mean = self.apart / n_cells
        variance = (self.square / n_cells - mean.square()).clamp(min=0) / n_cells
        dispersion = (self.squared_score / self.expected.sum(0)).nan_to_num(1.0, posinf=1.0).clamp(min=1)
        observed = (self.expected + self.score).clamp(min=0)
        by_batch = (each.unflatten(0, (-1, self.n_batches)) for each in (observed, self.expected, self.information))
        each = (mean + self.shared_rate.cpu().double().log(), variance, *by_batch, dispersion)
        return CountEvidence(*(value.numpy() for value in each))


def quasi_score(likelihood: Likelihood, x: Tensor, params: Params) -> _Weights:
    """Score of log λ of each count and its information, from mean and variance of the likelihood, (n, g) each.

    For Poisson, negative binomial, Bernoulli and a Gaussian these are score and information of the likelihood itself.
    For the others, such as zero-inflated ones, they are the best that mean and variance alone give; the information is
    then less than that of the likelihood, and right for counts of any law with this mean and variance.

    A likelihood whose λ is not e^θ (`Likelihood.rate_is_head`) is shifted by a factor of its mean.
    """
    if likelihood.rate_is_head:
        mean, by_head = differentiate(likelihood.mean, {name: params[name] for name in likelihood.head_names})
        slope = by_head[RATE.name]
    else:
        mean = slope = likelihood.mean(params)
    variance = likelihood.variance(params)
    # Without a finite variance, that of an exponential distribution: weights of any size do, by the dispersion.
    variance = torch.where(torch.isfinite(variance), variance, mean.square())
    weight = (slope / variance).nan_to_num(0.0, posinf=0.0, neginf=0.0)
    return _Weights((x - mean) * weight, slope * weight)


def _halfway(likelihood: Likelihood, params: Params, log_shared: Tensor) -> Params | None:
    """Parameters with θ halfway to that of all cells, (n, g); None where θ is not log λ."""
    if not likelihood.rate_is_head:
        return None
    return params | {RATE.name: (params[RATE.name] + log_shared) / 2}


def _shared_rate(model: DecodingMixin, adata: AnnData, used: np.ndarray) -> Tensor:
    """Mean count of each gene over the mean size factor, with half a count more, (g,)."""
    total, total_size = 0, 0
    for tensors in model._batches(adata, used, None):
        x, size, _ = model.module.data(tensors)
        total = total + x.dense().sum(0).cpu().double()
        total_size = total_size + model.module.log_size(size).exp().sum().cpu().double()
    return ((total + 0.5) / total_size).float().to(model.module.device)


def _covariates_in_random_order(
    model: DecodingMixin, adata: AnnData, used: np.ndarray, random_state: int
) -> Covariates | None:
    """Covariates of the cells, in another order for all groups alike; None if there are none that differ."""
    sizes = model.module.sizes
    if max(sizes.n_each()) == 1 and sizes.n_continuous == 0:
        return None
    columns = registered_columns(model.get_anndata_manager(adata, required=True))
    with seeded(random_state):
        order = used[torch.randperm(len(used)).numpy()]
    kinds = {REGISTRY_KEYS.BATCH_KEY: torch.long, REGISTRY_KEYS.CAT_COVS_KEY: torch.long}
    kinds[REGISTRY_KEYS.CONT_COVS_KEY] = torch.float32
    values = (
        torch.as_tensor(columns[key][order], dtype=kind, device=model.module.device) if key in columns else None
        for key, kind in kinds.items()
    )
    return model.module.covariates_of(*values)


def _at_common_covariates(model: DecodingMixin, codes: Codes, covariates: Covariates | None) -> Codes | None:
    """Codes to decode expression at; None where it is that at the cells' own covariates and size."""
    if covariates is None and not model.module.decode_size:
        return None
    covariates = codes.covariates if covariates is None else covariates
    return Codes(codes.z, codes.size, model.module.at_typical_size(covariates._replace(relative_size=None)))
