"""Sum of log p(x | h) over the genes of dense counts, and its gradients, at shapes that do not depend on the counts.

It has the interface of the sum over the non-zeros in `gene_sum`, which chooses between them.

Symbols: n cells, p rows (cells, or pairs of cell and component, or samples of them), b genes of a block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import one_hot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from scvae_tools._module.decoded import DecodedRows, Heads
    from scvae_tools._module.memory import Buffers
    from scvae_tools.likelihoods import Likelihood, Params


class DenseSweep:
    """One pass over blocks of genes of dense counts; see `gene_sum.log_likelihood`, whose interface it has."""

    needs_log_size = False  #: whether the gradient by the log of the size factors is asked for

    def __init__(
        self, likelihood: Likelihood, rows: DecodedRows, heads: Heads, block_genes: int, buffers: Buffers
    ) -> None:
        self.likelihood, self.heads, self.block_genes, self.buffers = likelihood, heads, block_genes, buffers
        self.x, self.cell, self.log_size = rows.counts, rows.cell, rows.log_size.detach()
        self.batch_of_cell = rows.batch
        self.batch = rows.batch if rows.cell is None else rows.batch[rows.cell]
        self.n_batch = rows.n_batch

    @torch.no_grad()
    def values(self, features: Tensor) -> Tensor:
        """Log-likelihood of each row, (p,)."""
        total = features.new_zeros(len(features))
        for _, x, params, constants in self._blocks(features):
            log_kernel = self.likelihood.log_kernel(x, params | constants)
            total += torch.where(x > 0, log_kernel, self.likelihood.log_prob_zero(params)).sum(1)
        return total

    @torch.no_grad()
    def values_and_gradients(self, features: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
        """Log-likelihood of each row, (p,), and the gradients of its weighted sum; see `gene_sum`."""
        total, by_features = features.new_zeros(len(features)), torch.zeros_like(features)
        by_log_size = torch.zeros_like(total) if self.needs_log_size else None
        gradients = self.heads.like(tuple(map(self.buffers.empty_like, self.heads.tensors())))
        weighted = weight[:, None] * features
        for genes, x, params, constants in self._blocks(features):
            value, by_head = differentiate_log_prob(self.likelihood, x, params, constants)
            total += value.sum(1)
            for name, by_value in by_head.items():
                if name == "log_rate" and by_log_size is not None:
                    by_log_size += by_value.sum(1)
                if name in self.heads.shared:
                    self._reduce(by_value, weight, out=gradients.shared[name][genes])
                    continue
                by_weight, by_bias = gradients.decoded[name]
                torch.mm(by_value.T, weighted, out=by_weight[genes])
                torch.mv(by_value.T, weight, out=by_bias[genes])
                by_features.addmm_(by_value, self.heads.decoded[name][0][genes])
        if by_log_size is not None:
            by_log_size *= weight
        return total, by_log_size, by_features.mul_(weight[:, None]), *gradients.tensors()

    def _reduce(self, by_value: Tensor, weight: Tensor, out: Tensor) -> None:
        """Weighted sum over the rows, or over the rows of each batch, written to ``out``."""
        if out.ndim == 1:
            torch.mv(by_value.T, weight, out=out)
        else:
            torch.mm(by_value.T, weight[:, None] * one_hot(self.batch, self.n_batch).to(weight), out=out)

    def _blocks(self, features: Tensor) -> Iterator[tuple[slice, Tensor, Params, Params]]:
        """Genes of each block, their counts (p, b), their parameters, (p, b) or (b,), and constants, (p, b)."""
        n_genes = self.x.shape[1]
        step = max(1, min(n_genes, self.block_genes))
        for low in range(0, n_genes, step):
            genes = slice(low, min(low + step, n_genes))
            x = self.x[:, genes].to(features.dtype)
            constants = self.likelihood.kernel_constants(x, self._shared(genes, self.batch_of_cell))
            if self.cell is not None:
                x = x.index_select(0, self.cell)
                constants = {name: value.index_select(0, self.cell) for name, value in constants.items()}
            yield genes, x, self._params(features, genes), constants

    def _shared(self, genes: slice, batch: Tensor) -> Params:
        """Values of the heads that cells share, (b,), or (rows, b) where they differ between batches."""
        each = {name: value[genes] for name, value in self.heads.shared.items()}
        return {name: value.T[batch] if value.ndim == 2 else value for name, value in each.items()}

    def _params(self, features: Tensor, genes: slice) -> Params:
        params = {}
        for name, (weight, bias) in self.heads.decoded.items():
            offset = bias[genes] + self.log_size[:, None] if name == "log_rate" else bias[genes]
            params[name] = torch.addmm(offset, features, weight[genes].T)
        return params | self._shared(genes, self.batch)


def differentiate_log_prob(
    likelihood: Likelihood, x: Tensor, params: Params, constants: Params
) -> tuple[Tensor, Params]:
    """Log p(x) − log b(x) of counts x (p, b), and its derivative by each head, (p, b) each.

    Parameters
    ----------
    likelihood
        Declaration of the likelihood.
    x, params
        Counts and parameters.
    constants
        What `Likelihood.kernel_constants` returns for the heads that rows share.
    """
    is_count = x > 0
    zero, by_head_of_zero = likelihood.differentiate_zero(params)
    kernel, by_head_of_kernel = likelihood.differentiate_kernel(x, params | constants)
    by_head = {
        name: torch.where(is_count, by_head_of_kernel[name], by_value).expand(x.shape)
        for name, by_value in by_head_of_zero.items()
    }
    return torch.where(is_count, kernel, zero), by_head
