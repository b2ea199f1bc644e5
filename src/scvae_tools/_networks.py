"""Encoder and decoder stacks: cells or latent codes in, features or likelihood parameters out."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from scvi.nn import FCLayers
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, linear, one_hot

from scvae_tools._blocked import Heads
from scvae_tools._memory import Buffers

if TYPE_CHECKING:
    from scvae_tools._batches import Compressed, Counts
    from scvae_tools.likelihoods import Likelihood, Params

NORMALIZATIONS = ("layer", "batch", "none")
DISPERSIONS = ("gene", "gene-batch", "gene-cell")

#: The first layer of the encoder gathers the weights of a cell's non-zeros where these are a smaller share of the genes
#: than this, and else makes the batch dense: from about there on that is as fast (benchmarks/choices.py).
LARGEST_SPARSE_DENSITY = 0.7
#: Entries of its gradient that are computed at a time, before they are put in their place.
GATHERED_ENTRIES = 2**19


class Covariates(NamedTuple):
    """What is known of the cells beside their counts.

    The batch comes last among the categories: scArches appends the columns of new batches at the end of a weight.
    """

    batch: Tensor  # (n, 1) integer codes
    categorical: Tensor | None = None  # (n, n_categorical) integer codes
    continuous: Tensor | None = None  # (n, n_continuous)

    def categories(self) -> tuple[Tensor, ...]:
        """Codes (n, 1) of each categorical covariate, the batch last."""
        extra = () if self.categorical is None else torch.split(self.categorical, 1, dim=1)
        return (*extra, self.batch)

    def rows(self, at: Tensor) -> Covariates:
        """Those of the cells at some positions."""
        return Covariates(*(None if value is None else value[at] for value in self))

    def beside(self, features: Tensor) -> Tensor:
        """Features (..., n, f) with the continuous covariates appended, (..., n, f + n_continuous)."""
        if self.continuous is None:
            return features
        return torch.cat([features, self.continuous.expand(*features.shape[:-2], -1, -1)], dim=-1)


class Sizes(NamedTuple):
    """The sizes that the data decide."""

    n_genes: int
    n_batch: int = 1
    n_categories: tuple[int, ...] = ()
    n_continuous: int = 0


def stack(
    n_in: int, sizes: Sizes, *, n_hidden: int, n_layers: int, dropout_rate: float, normalization: str, covariates: bool
) -> FCLayers:
    """Fully connected layers [linear, norm, ReLU, dropout]; covariates, if any, enter the first."""
    return FCLayers(
        n_in=n_in + (sizes.n_continuous if covariates else 0),
        n_out=n_hidden,
        n_cat_list=[*sizes.n_categories, sizes.n_batch] if covariates else None,
        n_layers=n_layers,
        n_hidden=n_hidden,
        dropout_rate=dropout_rate,
        use_batch_norm=normalization == "batch",
        use_layer_norm=normalization == "layer",
        inject_covariates=False,
    )


@torch.no_grad()
def extend_batches(layers: FCLayers, n_batch: int, n_before: int, *, freeze: bool) -> None:
    """Let the columns of batches added by scArches start as those of the others are on average.

    scArches appends them with random values, which would change a model that had one batch, and so no column. With
    ``freeze`` these columns alone are trained: scArches would train those of the other covariates too.
    """
    weight = layers.fc_layers[0][0].weight
    n_known = n_before if n_before > 1 else 0
    n_new = (n_batch if n_batch > 1 else 0) - n_known
    if n_new > 0:
        known = weight[:, weight.shape[1] - n_new - n_known : weight.shape[1] - n_new]
        weight[:, weight.shape[1] - n_new :] = known.mean(1, keepdim=True) if n_known else 0.0
    if freeze:
        is_new = torch.arange(weight.shape[1], device=weight.device) >= weight.shape[1] - n_new
        weight.register_hook(lambda gradient: gradient * is_new)


class _SparseProduct(torch.autograd.Function):
    """x W of sparse x (n, g) and W (g, h), (n, h): sums of the rows of W at the non-zeros of each cell.

    Its gradient by W sums the rows of the incoming gradient at the non-zeros of each gene, which is the same operation
    in the other order. x is data and has none.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, by_cell: Compressed, by_gene: Compressed, buffers: Buffers) -> Tensor:
        ctx.by_gene, ctx.buffers = by_gene, buffers
        ctx.save_for_backward(weight)
        return _sums_of_rows(by_cell, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        (weight,) = ctx.saved_tensors
        by_weight = ctx.buffers.empty_like(weight)
        is_host = weight.device.type == "cpu"  # elsewhere the bounds of blocks would have to be waited for
        n_rows = max(1, GATHERED_ENTRIES // weight.shape[1]) if is_host else len(weight)
        for rows, part in ctx.by_gene.blocks(n_rows):
            by_weight[rows] = _sums_of_rows(part, gradient.contiguous())
        return by_weight, None, None, None


def _sums_of_rows(factor: Compressed, table: Tensor) -> Tensor:
    """Product of a compressed matrix with a dense one."""
    value = factor.value.to(table.dtype)
    return embedding_bag(
        factor.column, table, factor.start, mode="sum", per_sample_weights=value, include_last_offset=True
    )


class Encoder(nn.Module):
    """x (n, g), in the encoder's scale, to features (n, n_hidden).

    The first layer has two matrices, one for the counts and one for the covariates, if they are encoded: that of the
    counts is held by gene, so that the few rows which the non-zeros of a cell need can be gathered, and that of the
    covariates where scArches looks for it.
    """

    def __init__(
        self, sizes: Sizes, *, encode_covariates: bool, buffers: Buffers | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.buffers = buffers or Buffers()
        self.encode_covariates = encode_covariates
        self.n_categories = [*sizes.n_categories, sizes.n_batch]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            self.layers = stack(0, sizes, covariates=encode_covariates, **options)
        first = self.layers.fc_layers[0][0]
        self.gene_weight = nn.Parameter(torch.empty(sizes.n_genes, first.out_features))  # (g, n_hidden)
        bound = (sizes.n_genes + first.in_features) ** -0.5  # as torch starts a linear layer of both
        for parameter in (self.gene_weight, first.weight, first.bias):
            nn.init.uniform_(parameter, -bound, bound) if parameter.numel() else None

    def forward(self, x: Counts, covariates: Covariates) -> Tensor:
        (first, *rest), *layers = self.layers.fc_layers
        if x.density < LARGEST_SPARSE_DENSITY:
            features = _SparseProduct.apply(self.gene_weight, x.by_cell, x.by_gene, self.buffers)
        else:
            features = x.dense().to(self.gene_weight) @ self.gene_weight
        features = features + first(self._encoded(covariates))
        for module in filter(None, (*rest, *(module for layer in layers for module in layer))):
            features = module(features)
        return features

    def _encoded(self, covariates: Covariates) -> Tensor:
        """Continuous covariates, then indicators of the categories, as `FCLayers` orders them; (n, 0) for none."""
        if not self.encode_covariates:
            return self.gene_weight.new_zeros(len(covariates.batch), 0)
        codes = zip(covariates.categories(), self.n_categories, strict=True)
        indicators = [one_hot(code[:, 0].long(), n).to(self.gene_weight) for code, n in codes if n > 1]
        continuous = [] if covariates.continuous is None else [covariates.continuous.to(self.gene_weight)]
        return torch.cat([*continuous, *indicators, self.gene_weight.new_zeros(len(covariates.batch), 0)], dim=1)


class Decoder(nn.Module):
    """z (..., n, d) to the parameters of the likelihood (..., n, g).

    Never batch-normalised: in the Gaussian mixture, codes of components that a cell hardly belongs to pass through here
    too, and would fill the running statistics.
    """

    def __init__(
        self, n_latent: int, sizes: Sizes, likelihood: Likelihood, *, dispersion: str, **options: object
    ) -> None:
        super().__init__()
        self.n_batch, self.dispersion = sizes.n_batch, dispersion
        # The name by which scArches recognises a decoder's first layer.
        self.px_decoder = stack(n_latent, sizes, covariates=True, **options)
        shared = [head for head in likelihood.heads if head.is_dispersion and dispersion != "gene-cell"]
        # The batches come last, as scArches wants them.
        shape = (sizes.n_genes, sizes.n_batch) if dispersion == "gene-batch" else (sizes.n_genes,)
        self.shared = nn.ParameterDict({head.name: torch.full(shape, head.initial) for head in shared})
        self.heads = nn.ModuleDict(
            {
                head.name: nn.Linear(options["n_hidden"], sizes.n_genes)
                for head in likelihood.heads
                if head not in shared
            }
        )
        with torch.no_grad():
            for head in likelihood.heads:
                if head.name in self.heads:
                    self.heads[head.name].bias.fill_(head.initial)

    @torch.no_grad()
    def extend_batches(self, n_before: int, *, freeze: bool) -> None:
        """Let batches added behind the first ``n_before`` start as those are on average; see `extend_batches`."""
        extend_batches(self.px_decoder, self.n_batch, n_before, freeze=freeze)
        for value in self.shared.values():
            if value.ndim == 2 and self.n_batch > n_before:
                value[:, n_before:] = value[:, :n_before].mean(1, keepdim=True)

    def features(self, z: Tensor, covariates: Covariates) -> Tensor:
        """Last hidden layer, (..., n, n_hidden)."""
        flat = z.reshape(-1, *z.shape[-2:])
        return self.px_decoder(covariates.beside(flat), *covariates.categories()).reshape(*z.shape[:-1], -1)

    def all_heads(self) -> Heads:
        """What the blocked sum over genes needs."""
        return Heads({name: (head.weight, head.bias) for name, head in self.heads.items()}, dict(self.shared))

    def params(self, features: Tensor, log_size: Tensor, batch: Tensor, genes: Tensor | None = None) -> Params:
        """Parameters of the likelihood of all genes, or of those with the given positions.

        ``log_size`` is (n, 1) and ``batch`` (n, 1). A dispersion shared by all cells stays (g,).
        """
        rows = slice(None) if genes is None else genes
        params = {name: linear(features, head.weight[rows], head.bias[rows]) for name, head in self.heads.items()}
        params["log_rate"] = params["log_rate"] + log_size
        for name, value in self.shared.items():
            value = value[rows]
            params[name] = one_hot(batch[:, 0], self.n_batch).to(value) @ value.T if value.ndim == 2 else value
        return params

    def forward(self, z: Tensor, log_size: Tensor, covariates: Covariates, genes: Tensor | None = None) -> Params:
        return self.params(self.features(z, covariates), log_size, covariates.batch, genes)
