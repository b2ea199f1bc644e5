"""Sums over the genes: of log p(x | h), in blocks or with all parameters at once, and of the rates; with gradients.

`log_likelihood` never holds the whole matrix of parameters, rows x genes. For each block of genes it evaluates the
heads, log p(0) everywhere and log p(x) at the non-zeros. It passes the gradient on at once to weights, biases and
features, while the block is in the cache of the CPU. This takes three matrix products a head, as many as any
implementation needs. The code is the same for every likelihood; see `Likelihood.differentiate_zero` and
`Likelihood.differentiate_kernel`.

Where the rates of a row add up to its size factor, they are divided by their sum over the genes. `log_sum_exp` gives
the log of this sum, in the same blocks. The log is subtracted from the log of the size factor of the row, so the
log-likelihood must be differentiable by the log of the size factor too.

`sum_over_genes` holds all parameters at once.

Symbols: p rows (cells, or pairs of cell and component, or samples of them), g genes, h features of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from scvae_tools._module.dense_sweep import DenseSweep
from scvae_tools._module.memory import Buffers, keep_freed_memory
from scvae_tools._module.sparse import Compressed, rows_of_cells

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scvae_tools._module.decoded import DecodedRows, Heads
    from scvae_tools.likelihoods import Likelihood, Params

#: Entries of a block, rows x genes, by kind of device. On the CPU a few such matrices fit into the cache, and starting
#: an operation costs little compared with the operation. On other devices the limit is memory.
BLOCK_ENTRIES = {"cpu": 2**19}
BLOCK_ENTRIES_ELSEWHERE = 2**26


def log_likelihood(
    likelihood: Likelihood,
    rows: DecodedRows,
    heads: Heads,
    features: Tensor,
    expected_gradient: Tensor | None = None,
    *,
    block_entries: int | None = None,
    buffers: Buffers | None = None,
) -> Tensor:
    """Log-likelihood of each row without its base measure, Σ_g log p(x_g | h) − log b(x_g), (p,).

    The result is differentiable by features, heads and ``rows.log_size``.

    Parameters
    ----------
    likelihood
        Declaration of the likelihood.
    rows, heads
        Data and parameters.
    features
        h, (p, n_hidden).
    expected_gradient
        Gradient of the loss by each value, up to one common factor, (p,). With it, the gradients are computed in the
        forward pass, and `backward` only scales them. None if it is not known beforehand: `backward` then evaluates
        everything once more.
    block_entries
        Entries of a block, rows x genes; None for the default of the device.
    buffers
        Source of the memory of the gradients; None to allocate it.

    Raises
    ------
    RuntimeError
        In `backward`, if the expected gradient was not the actual one, up to a common factor.
    """
    n_genes = _n_genes_of_a_block(features, block_entries)
    sweep_of = _Sweep if isinstance(rows.counts, Compressed) else DenseSweep
    sweep = sweep_of(likelihood, rows, heads, n_genes, buffers or Buffers())
    expected_gradient = expected_gradient if torch.is_grad_enabled() else None
    return _LogLikelihood.apply(sweep, expected_gradient, rows.log_size, features, *heads.tensors())


def _n_genes_of_a_block(features: Tensor, block_entries: int | None) -> int:
    """Number of genes of a block for features (p, h), at least 1."""
    if features.device.type == "cpu":
        keep_freed_memory()
    if block_entries is None:
        block_entries = BLOCK_ENTRIES.get(features.device.type, BLOCK_ENTRIES_ELSEWHERE)
    return max(1, block_entries // max(1, len(features)))


class _LogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        sweep: _Sweep | DenseSweep,
        expected_gradient: Tensor | None,
        log_size: Tensor,
        features: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        sweep.needs_log_size = ctx.needs_input_grad[2]
        ctx.sweep = sweep
        if expected_gradient is None or not any(ctx.needs_input_grad):
            ctx.save_for_backward(features, *tensors)
            ctx.is_done = False
            return sweep.values(features)
        values, *gradients = sweep.values_and_gradients(features, expected_gradient)
        ctx.save_for_backward(expected_gradient, *gradients)
        ctx.is_done = True
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        if not ctx.is_done:
            features, *_ = ctx.saved_tensors
            _, *gradients = ctx.sweep.values_and_gradients(features, gradient)
            return None, None, *gradients
        expected_gradient, *gradients = ctx.saved_tensors
        factor = _common_factor(gradient, expected_gradient)
        if factor is not None:
            gradients = [None if each is None else factor * each for each in gradients]
        return None, None, *gradients


def _common_factor(gradient: Tensor, expected_gradient: Tensor) -> Tensor | None:
    """Number by which the expected gradient has to be multiplied to be the actual one; None for 1."""
    smallest = torch.finfo(gradient.dtype).tiny  # below it numbers are rounded to multiples of about 10⁻⁴⁵
    if expected_gradient.device.type == "cpu" and torch.allclose(gradient, expected_gradient, rtol=1e-5, atol=smallest):
        return None
    square = expected_gradient.square().sum()
    factor = torch.where(square > 0, (gradient * expected_gradient).sum() / square, 0.0)
    # A loss that is NaN is no error here: the training plan looks for NaN, and names the term.
    is_close = torch.isclose(gradient, factor * expected_gradient, rtol=1e-4, atol=smallest).all()
    message = "The gradient of the loss by the log-likelihoods must be the expected gradient; it is another one."
    torch._assert_async(is_close | gradient.isnan().any(), message)
    return factor


class _Sweep:
    """One pass over the blocks of genes of sparse counts."""

    needs_log_size = False  #: whether the gradient by the log of the size factors is asked for

    @torch.no_grad()
    def __init__(
        self, likelihood: Likelihood, rows: DecodedRows, heads: Heads, block_genes: int, buffers: Buffers
    ) -> None:
        self.likelihood, self.heads, self.block_genes, self.buffers = likelihood, heads, block_genes, buffers
        self.log_size, self.batch, self.n_batch = rows.log_size.detach(), rows.batch, rows.n_batch
        self.by_gene = rows.counts._replace(value=rows.counts.value.to(heads.tensors()[0].dtype))
        gene = self.by_gene.row()
        constants = self._constants(rows, gene)
        if rows.cell is not None:
            self.batch = rows.batch[rows.cell]
            self.by_gene, source = rows_of_cells(self.by_gene, rows.cell, len(rows.batch))
            gene = gene.index_select(0, source)
            constants = {name: value.index_select(0, source) for name, value in constants.items()}
        self.constants = constants  # one value of each for every non-zero
        # Index of every non-zero in a flattened (g, p) matrix.
        self.position = gene.mul_(len(self.log_size)).add_(self.by_gene.column)

    def _constants(self, rows: DecodedRows, gene: Tensor) -> Params:
        """Terms of the likelihood at the non-zeros of the cells that need no decoder, (nnz,) each."""
        if not self.heads.shared:
            return {}
        shared = {
            name: value[gene, rows.batch[self.by_gene.column]] if value.ndim == 2 else value.index_select(0, gene)
            for name, value in self.heads.shared.items()
        }
        return self.likelihood.kernel_constants(self.by_gene.value, shared)

    @torch.no_grad()
    def values(self, features: Tensor) -> Tensor:
        """Log-likelihood of each row, (p,)."""
        total = features.new_zeros(len(features))
        for block in self._blocks(features):
            log_prob = self.likelihood.log_prob_zero(block.params).expand(block.shape).contiguous()
            block.put(log_prob, self.likelihood.log_kernel(block.x, block.at_nonzeros()))
            total += log_prob.sum(0)
        return total

    @torch.no_grad()
    def values_and_gradients(self, features: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
        """Log-likelihood of each row, (p,), and the gradients of its weighted sum.

        The gradients are by the log of the size factors (None unless needed), the features, and the tensors of the
        heads.
        """
        total, by_features = features.new_zeros(len(features)), torch.zeros_like(features)
        by_log_size = torch.zeros_like(total) if self.needs_log_size else None
        gradients = self.heads.like(tuple(map(self.buffers.empty_like, self.heads.tensors())))
        weighted = weight[:, None] * features
        for block in self._blocks(features):
            log_prob, by_head = self.likelihood.differentiate_zero(block.params)
            log_kernel, by_head_at = self.likelihood.differentiate_kernel(block.x, block.at_nonzeros())
            block.put(log_prob, log_kernel)
            total += log_prob.sum(0)
            for name, by_value in by_head.items():
                block.put(by_value, by_head_at[name])
                if name == "log_rate" and by_log_size is not None:
                    by_log_size += by_value.sum(0)
                if name in self.heads.shared:
                    self._reduce(by_value, weight, out=gradients.shared[name][block.genes])
                    continue
                by_weight, by_bias = gradients.decoded[name]
                torch.mm(by_value, weighted, out=by_weight[block.genes])
                torch.mv(by_value, weight, out=by_bias[block.genes])
                by_features.addmm_(by_value.T, self.heads.decoded[name][0][block.genes])
        if by_log_size is not None:
            by_log_size *= weight
        return total, by_log_size, by_features.mul_(weight[:, None]), *gradients.tensors()

    def _reduce(self, by_value: Tensor, weight: Tensor, out: Tensor) -> None:
        """Weighted sum over the rows, or over the rows of each batch, written to ``out``."""
        if out.ndim == 1:
            torch.mv(by_value, weight, out=out)
        else:
            torch.mm(by_value, weight[:, None] * one_hot(self.batch, self.n_batch).to(weight), out=out)

    def _blocks(self, features: Tensor) -> Iterator[_Block]:
        n_rows, start = len(features), self.by_gene.start
        n_genes = len(start) - 1
        step = max(1, min(n_genes, self.block_genes))
        first = range(0, n_genes, step)
        bounds = start[::step].tolist() if step < n_genes else [0]
        for low, begin, end in zip(first, bounds, [*bounds[1:], len(self.position)], strict=False):
            genes, at = slice(low, min(low + step, n_genes)), slice(begin, end)
            position = self.position[at] - low * n_rows if low else self.position[at]
            constants = {name: value[at] for name, value in self.constants.items()}
            yield _Block(genes, self._params(features, genes), position, self.by_gene.value[at], constants, n_rows)

    def _params(self, features: Tensor, genes: slice) -> Params:
        """Parameters of the genes of a block, (b, p), or (b, 1) where all rows share them."""
        params = {}
        for name, (weight, bias) in self.heads.decoded.items():
            offset = bias[genes, None]
            if name == "log_rate":
                params[name] = (offset + self.log_size).addmm_(weight[genes], features.T)
            else:
                params[name] = torch.addmm(offset, weight[genes], features.T)
        for name, value in self.heads.shared.items():
            params[name] = value[genes][:, self.batch] if value.ndim == 2 else value[genes, None]
        return params


@dataclass(frozen=True)
class _Block:
    genes: slice
    params: Params
    position: Tensor  # indices of the non-zeros in a flattened (b, p) matrix, (nnz,)
    x: Tensor  # (nnz,)
    constants: Params  # (nnz,) each
    n_rows: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.genes.stop - self.genes.start, self.n_rows

    def at_nonzeros(self) -> Params:
        """Parameters and constants of the non-zeros, (nnz,) each."""
        gene = torch.div(self.position, self.n_rows, rounding_mode="floor")
        at = {
            name: value[:, 0].index_select(0, gene)
            if value.shape[1] == 1
            else value.reshape(-1).index_select(0, self.position)
            for name, value in self.params.items()
        }
        return at | self.constants

    def put(self, matrix: Tensor, values: Tensor) -> None:
        """Overwrite a (b, p) matrix at the non-zeros."""
        matrix.view(-1).scatter_(0, self.position, values)


# -- the sum of the rates ----------------------------------------------------------------------------------------------


def log_sum_exp(features: Tensor, weight: Tensor, bias: Tensor, *, block_entries: int | None = None) -> Tensor:
    """Log Σ_g exp(w_g · h + b_g) of features h (..., h), (...), differentiable by features, weight and bias.

    Parameters
    ----------
    features
        h, (..., h).
    weight, bias
        (g, h) and (g,).
    block_entries
        As in `log_likelihood`.
    """
    flat = features.flatten(0, -2)
    total = _LogSumExp.apply(flat, weight, bias, _n_genes_of_a_block(flat, block_entries))
    return total.reshape(features.shape[:-1])


class _LogSumExp(torch.autograd.Function):
    """Autograd function of `log_sum_exp`.

    The gradient of log Σ_g exp(a_g) by a_g is exp(a_g) / Σ_g exp(a_g), the share of gene g in the sum. `backward`
    computes these shares again, so that they need not be kept.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, block_genes: int) -> Tensor:
        total = features.new_full((len(features),), -torch.inf)
        for w, b in zip(weight.split(block_genes), bias.split(block_genes), strict=True):
            total = torch.logaddexp(total, torch.addmm(b[:, None], w, features.T).logsumexp(0))
        ctx.save_for_backward(features, weight, bias, total)
        ctx.block_genes = block_genes
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        features, weight, bias, total = ctx.saved_tensors
        by_features, by_weight, by_bias = torch.zeros_like(features), torch.empty_like(weight), torch.empty_like(bias)
        weighted = gradient[:, None] * features
        parts = (tensor.split(ctx.block_genes) for tensor in (weight, bias, by_weight, by_bias))
        for w, b, into_weight, into_bias in zip(*parts, strict=True):
            share = torch.addmm(b[:, None] - total, w, features.T).exp_()  # (b, p)
            torch.mm(share, weighted, out=into_weight)
            torch.mv(share, gradient, out=into_bias)
            by_features.addmm_(share.T, w)
        return by_features.mul_(gradient[:, None]), by_weight, by_bias, None


def sum_over_genes(likelihood: Likelihood, x: Tensor, params: Params) -> Tensor:
    """Σ_g log p(x_g), (..., n), of counts x (n, g) and parameters that broadcast to (..., n, g).

    Counts are mostly zeros, so log p(0) is summed over all genes and corrected where x > 0 (docs/likelihoods.md): the
    expensive terms are evaluated at the non-zeros alone.
    """
    cell, gene = torch.nonzero(x, as_tuple=True)
    at = {name: _take(value, cell, gene) for name, value in params.items()}  # (..., nnz)
    excess = likelihood.log_prob_positive(x[cell, gene], at) - likelihood.log_prob_zero(at)
    total = likelihood.log_prob_zero(params).sum(-1)  # (..., n)
    return total.index_add(-1, cell, excess.expand(*total.shape[:-1], -1))


def _take(value: Tensor, cell: Tensor, gene: Tensor) -> Tensor:
    """Entries at (cell, gene) of a (..., n, g) tensor, or at gene of a (g,) one."""
    if value.ndim == 1:
        return value[gene]
    return value.flatten(-2).index_select(-1, cell * value.shape[-1] + gene)
