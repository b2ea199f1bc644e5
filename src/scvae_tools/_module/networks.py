"""Encoder and decoder stacks: cells or latent codes in, features or likelihood parameters out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scvi.nn import FCLayers
from torch import Tensor, nn
from torch.nn.functional import linear, one_hot

from scvae_tools._checks import check_whole, is_number, is_whole
from scvae_tools._module.decoded import Heads
from scvae_tools._module.gene_sum import log_sum_exp
from scvae_tools._module.memory import Buffers
from scvae_tools._module.sparse import Counts, SparseProduct

if TYPE_CHECKING:
    from scvae_tools._module.covariates import Covariates, Sizes
    from scvae_tools._module.dense_counts import DenseCounts
    from scvae_tools.likelihoods import Likelihood, Params

NORMALIZATIONS = ("layer", "batch", "none")


DISPERSIONS = ("gene", "gene-batch", "gene-cell")


#: Share of torch's initial weights at which a linear decoder starts. The full weights stayed in the loadings as noise,
#: and the held-out ELBO was 1.4 and 1.8 nats lower (700 PBMC, two seeds).
LINEAR_START = 0.1


#: Parts that dropout can act on: hidden layers of both networks, the encoder's x and the decoder's z, all in this file,
#: and the effect of y on q(z|x,y), in `GMVAE.posterior`. It acts in the stages of which `Stage` says so.
DROPOUT_PARTS = ("hidden", "input", "latent", "y")


#: Share of non-zero counts below which the first layer of the encoder gathers the weights of the non-zeros. From about
#: this share on it is as fast to make the batch dense, which is done then (benchmarks/choices.py).
LARGEST_SPARSE_DENSITY = 0.7


#: Largest width of a hidden layer, far above what is of use.
LARGEST_WIDTH = 100_000


def hidden_widths(n_hidden: int | Sequence[int], n_layers: int | None = None) -> tuple[int, ...]:
    """Widths of the encoder's hidden layers from first to last; the decoder has them from last to first.

    Parameters
    ----------
    n_hidden
        Width of all layers, or one for each.
    n_layers
        Number of hidden layers; None for 1, or for as many as there are widths.

    Raises
    ------
    ValueError
        If a number is not a whole number of at least 1, or there are not ``n_layers`` widths.
    """
    is_each = isinstance(n_hidden, Sequence | np.ndarray) and not isinstance(n_hidden, str)
    widths = list(n_hidden) if is_each else [n_hidden]
    if not widths or not all(is_whole(width) and width >= 1 for width in widths):
        rule = "a whole number of at least 1" + " for each hidden layer" * is_each
        raise ValueError(f"`n_hidden` must be {rule}; found {n_hidden!r}.")
    check_whole("n_hidden", max(widths), most=LARGEST_WIDTH)
    n = (len(widths) if is_each else 1) if n_layers is None else n_layers
    n = check_whole("n_layers", n)
    if is_each and n != len(widths):
        raise ValueError(
            f"`n_layers` must be the number of widths in `n_hidden`; found n_layers={n_layers} for "
            f"{len(widths)} widths, {n_hidden!r}. Leave `n_layers` out."
        )
    return tuple(map(int, widths if is_each else widths * n))


def dropout_rates(dropout_rate: float | Mapping[str, float]) -> dict[str, float]:
    """Dropout rate of each part in `DROPOUT_PARTS`, from one rate for the hidden layers or from rates of some parts.

    Raises
    ------
    ValueError
        If a part is unknown or a rate not in [0, 1).
    """
    is_each = isinstance(dropout_rate, Mapping)
    given = dict(dropout_rate) if is_each else {"hidden": dropout_rate}
    for part, rate in given.items():
        if part not in DROPOUT_PARTS:
            raise ValueError(
                f"`dropout_rate` must be one rate, or rates of {', '.join(map(repr, DROPOUT_PARTS))}; found {part!r}."
            )
        if not is_number(rate) or not 0 <= rate < 1:
            name = f"dropout_rate[{part!r}]" if is_each else "dropout_rate"
            raise ValueError(f"`{name}` must be in [0, 1); found {rate!r}.")
    return dict.fromkeys(DROPOUT_PARTS, 0.0) | {part: float(rate) for part, rate in given.items()}


def stack(
    n_in: int,
    sizes: Sizes,
    *,
    widths: Sequence[int],
    dropout_rate: float,
    normalization: str,
    covariates: bool,
    is_linear: bool = False,
) -> FCLayers:
    """Fully connected layers [linear, norm, ReLU, dropout], or linear alone; covariates, if any, enter the first."""

    def layer(n_in: int, n_out: int, n_cat_list: list[int] | None = None) -> FCLayers:
        return FCLayers(
            n_in=n_in,
            n_out=n_out,
            n_cat_list=n_cat_list,
            n_layers=1,
            dropout_rate=0.0 if is_linear else dropout_rate,
            use_batch_norm=normalization == "batch" and not is_linear,
            use_layer_norm=normalization == "layer" and not is_linear,
            use_activation=not is_linear,
            inject_covariates=False,
        )

    n_continuous, n_cat_list = (sizes.n_continuous, sizes.n_each()) if covariates else (0, None)
    layers = layer(n_in + n_continuous, widths[0], n_cat_list)
    # All layers of `FCLayers` have one width: layers of other widths are appended, under the names that it uses.
    for i, (before, width) in enumerate(pairwise(widths), start=1):
        layers.fc_layers.add_module(f"Layer {i}", layer(before, width).fc_layers[0])
    return layers


@torch.no_grad()
def extend_batches(weight: nn.Parameter, n_batch: int, n_before: int, *, freeze: bool) -> None:
    """Start the columns of batches added by scArches at the average of the columns of the other batches.

    scArches appends these columns at the end, with random values. They would change a model that had one batch, and so
    no column. With ``freeze``, only the new columns are trained: scArches would also train the columns of the other
    covariates, and no column of a head.
    """
    n_known = n_before if n_before > 1 else 0
    n_new = (n_batch if n_batch > 1 else 0) - n_known
    if n_new > 0:
        known = weight[:, weight.shape[1] - n_new - n_known : weight.shape[1] - n_new]
        weight[:, weight.shape[1] - n_new :] = known.mean(1, keepdim=True) if n_known else 0.0
    if freeze:
        weight.requires_grad_()
        is_new = torch.arange(weight.shape[1], device=weight.device) >= weight.shape[1] - n_new
        weight.register_hook(lambda gradient: gradient * is_new)


class Encoder(nn.Module):
    """Network from x (n, g), in the encoder's scale, to features (n, n_features).

    The first layer has two matrices, one for the counts and one for the covariates, if they are encoded. The matrix of
    the counts is held by gene, so that the few rows for the non-zeros of a cell can be gathered. The matrix of the
    covariates is held where scArches looks for it.

    Parameters
    ----------
    sizes
        Numbers of genes, batches and covariates.
    encode_covariates
        Whether the first layer takes batch and covariates.
    n_hidden, n_layers
        See `hidden_widths`. ``n_features`` is the last width.
    is_linear
        Whether the layers are linear, without norm, ReLU and dropout.
    input_dropout
        Share of the non-zeros that are dropped while training.
    options
        ``dropout_rate`` and ``normalization`` of the hidden layers.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        encode_covariates: bool,
        n_hidden: int | Sequence[int],
        n_layers: int | None = None,
        is_linear: bool = False,
        input_dropout: float = 0.0,
        buffers: Buffers | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.buffers = buffers or Buffers()
        self.encode_covariates = encode_covariates
        self.n_categories = sizes.n_each()
        widths = hidden_widths(n_hidden, n_layers)
        self.n_features = widths[-1]
        self.input_dropout = nn.Dropout(input_dropout)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            self.layers = stack(0, sizes, widths=widths, covariates=encode_covariates, is_linear=is_linear, **options)
        first = self.layers.fc_layers[0][0]
        self.gene_weight = nn.Parameter(torch.empty(sizes.n_genes, first.out_features))  # (g, n_hidden)
        bound = (sizes.n_genes + first.in_features) ** -0.5  # as torch starts one linear layer for both
        for parameter in (self.gene_weight, first.weight, first.bias):
            nn.init.uniform_(parameter, -bound, bound) if parameter.numel() else None

    def forward(self, x: Counts | DenseCounts, covariates: Covariates) -> Tensor:
        (first, *rest), *layers = self.layers.fc_layers
        if self.training and self.input_dropout.p > 0:  # a zero stays zero, dropped or not
            x = x.thinned(self.input_dropout)
        if x.density < LARGEST_SPARSE_DENSITY:
            features = SparseProduct.apply(self.gene_weight, x.by_cell, x.by_gene, self.buffers)
        else:
            features = x.dense().to(self.gene_weight) @ self.gene_weight
        features = features + first(self._encoded(covariates))
        for module in filter(None, (*rest, *(module for layer in layers for module in layer))):
            features = module(features)
        return features

    def _encoded(self, covariates: Covariates) -> Tensor:
        """Continuous covariates, then indicators of the categories, as `FCLayers` orders them; (n, 0) for none."""
        nothing = self.gene_weight.new_zeros(len(covariates.batch), 0)
        if not self.encode_covariates:
            return nothing
        continuous = [] if covariates.continuous is None else [covariates.continuous]
        columns = [*continuous, *covariates.indicators(self.n_categories), nothing]
        return torch.cat([column.to(self.gene_weight) for column in columns], dim=1)


class Decoder(nn.Module):
    """Network from z (..., n, d) to the parameters of the likelihood (..., n, g).

    The decoder has no batch norm: in the Gaussian mixture it also gets codes of components that a cell hardly belongs
    to, and these would distort the running statistics.

    Parameters
    ----------
    n_latent
        Number d of latent dimensions.
    sizes
        Numbers of genes, batches and covariates.
    likelihood
        Declaration of the likelihood.
    dispersion
        One of `DISPERSIONS`.
    n_hidden, n_layers
        See `hidden_widths`.
    is_linear
        Whether the heads are linear functions of z and the covariates themselves, with no hidden layer.
    decode_size
        Whether the decoder is given ``Covariates.relative_size``.
    latent_dropout
        Share of the latent codes' entries that are dropped while training.
    options
        ``dropout_rate`` and ``normalization`` of the hidden layers.
    """

    def __init__(
        self,
        n_latent: int,
        sizes: Sizes,
        likelihood: Likelihood,
        *,
        dispersion: str,
        n_hidden: int | Sequence[int],
        n_layers: int | None = None,
        is_linear: bool = False,
        decode_size: bool = False,
        latent_dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.n_batch, self.dispersion = sizes.n_batch, dispersion
        self.normalizes_rates = likelihood.normalizes_rates
        self.n_latent, self.is_linear, self.n_categories = n_latent, is_linear, sizes.n_each()
        self.latent_dropout = nn.Dropout(latent_dropout)
        n_in, widths = n_latent + decode_size, hidden_widths(n_hidden, n_layers)[::-1]
        if is_linear:
            n_features = n_in + sizes.n_continuous + sum(n for n in self.n_categories if n > 1)
        else:
            # The name by which scArches recognises a decoder's first layer.
            self.px_decoder = stack(n_in, sizes, widths=widths, covariates=True, **options)
            n_features = widths[-1]
        shared = likelihood.shared_heads(dispersion)
        # The batches come last, as scArches wants them.
        shape = (sizes.n_genes, sizes.n_batch) if dispersion == "gene-batch" else (sizes.n_genes,)
        self.shared = nn.ParameterDict({head.name: torch.full(shape, head.initial) for head in shared})
        self.heads = nn.ModuleDict(
            {head.name: nn.Linear(n_features, sizes.n_genes) for head in likelihood.heads if head not in shared}
        )
        with torch.no_grad():
            for head in likelihood.heads:
                if head.name in self.heads:
                    self.heads[head.name].bias.fill_(head.initial)
                    self.heads[head.name].weight.mul_(LINEAR_START if is_linear else 1)

    @torch.no_grad()
    def extend_batches(self, n_before: int, *, freeze: bool) -> None:
        """Start the batches after the first ``n_before`` at the average of these; see the function `extend_batches`."""
        heads = [head.weight for head in self.heads.values()]
        for weight in heads if self.is_linear else [self.px_decoder.fc_layers[0][0].weight]:
            extend_batches(weight, self.n_batch, n_before, freeze=freeze)
        for value in self.shared.values():
            if value.ndim == 2 and self.n_batch > n_before:
                value[:, n_before:] = value[:, :n_before].mean(1, keepdim=True)

    @torch.no_grad()
    def start(self, values: Params) -> None:
        """Start heads at a value for each gene, (g,), the same for all cells except for the effect of the weights."""
        for name, value in values.items():
            start = self.heads[name].bias if name in self.heads else self.shared[name]
            start.copy_(value[:, None] if start.ndim == 2 else value)

    def features(self, z: Tensor, covariates: Covariates) -> Tensor:
        """Input of the heads, (..., n, n_features): the last hidden layer, or z and the covariates themselves."""
        flat = covariates.beside(self.latent_dropout(z).reshape(-1, *z.shape[-2:]))
        if self.is_linear:
            known = covariates.indicators(self.n_categories)
            features = torch.cat([flat, *(each.to(flat).expand(len(flat), -1, -1) for each in known)], dim=-1)
        else:
            features = self.px_decoder(flat, *covariates.categories())
        return features.reshape(*z.shape[:-1], -1)

    def all_heads(self) -> Heads:
        """Weights, biases and shared values of all heads, for `gene_sum.log_likelihood`."""
        return Heads({name: (head.weight, head.bias) for name, head in self.heads.items()}, dict(self.shared))

    def log_factor(self, features: Tensor, log_size: Tensor) -> Tensor:
        """Offset of log λ from f, (..., n, 1): the log of the size factor (n, 1), that is λ = size · exp(f).

        Where the rates of a cell add up to its size factor, log Σ_g exp(f) is subtracted. The sum is over all genes,
        also where only some are decoded.
        """
        if not self.normalizes_rates:
            return log_size
        head = self.heads["log_rate"]
        return log_size - log_sum_exp(features, head.weight, head.bias)[..., None]

    def params(self, features: Tensor, log_size: Tensor, batch: Tensor, genes: Tensor | None = None) -> Params:
        """Parameters of the likelihood of all genes, or of those with the given positions.

        ``log_size`` is (n, 1) and ``batch`` (n, 1). A dispersion shared by all cells stays (g,).
        """
        rows = slice(None) if genes is None else genes
        params = {name: linear(features, head.weight[rows], head.bias[rows]) for name, head in self.heads.items()}
        params["log_rate"] = params["log_rate"] + self.log_factor(features, log_size)
        for name, value in self.shared.items():
            value = value[rows]
            params[name] = one_hot(batch[:, 0], self.n_batch).to(value) @ value.T if value.ndim == 2 else value
        return params

    def forward(self, z: Tensor, log_size: Tensor, covariates: Covariates, genes: Tensor | None = None) -> Params:
        return self.params(self.features(z, covariates), log_size, covariates.batch, genes)
