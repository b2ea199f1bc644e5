"""The variational auto-encoder and its bounds. A plain VAE is the mixture of one standard-normal component.

Symbols and shapes (docs/model.md): n cells, g genes, d latent dimensions, k components, s samples; x (n, g),
z (s, k, n, d), log q(y|x) (n, k). Bounds and their terms are in nats per cell.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from scvae_tools._checks import check_choice, checked
from scvae_tools._module import gene_sum
from scvae_tools._module.bounds import Bound, Decoded, Posterior, StandardNormal, cross_entropy, log_softplus
from scvae_tools._module.covariates import Covariates, Sizes
from scvae_tools._module.decoded import DecodedRows
from scvae_tools._module.dense_counts import DenseCounts
from scvae_tools._module.gene_sum import sum_over_genes
from scvae_tools._module.memory import Buffers
from scvae_tools._module.networks import (
    DISPERSIONS,
    NORMALIZATIONS,
    Decoder,
    Encoder,
    dropout_rates,
    extend_batches,
    hidden_widths,
)
from scvae_tools._module.scvi_module import ScviModule
from scvae_tools._module.sparse import Counts
from scvae_tools.likelihoods import CountDistribution, Likelihood, Params, get_likelihood

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Transformations of the non-zero counts for the encoder. A count of 0 stays 0, so that a sparse batch stays sparse.
#: ``size`` is the size factor in the units of a cell's total count.
ENCODER_INPUTS = {
    "log1p-normalized": lambda x, size: torch.log1p(x * (1000 / size)),
    "log1p": lambda x, size: torch.log1p(x),
    "counts": lambda x, size: x,
}


POSTERIOR_VARIANCES = ("per-dimension", "shared")


#: How log p(x|z) is summed over the genes: block by block (`gene_sum`), or with all parameters in memory.
ENGINES = ("auto", "blocked", "dense")


#: Number of joint rows (size factor and covariates) kept in the model so that new cells can be sampled without data.
N_REFERENCE_CELLS = 1024


class VAE(ScviModule):
    """VAE with any declared count likelihood, behind the module interface of scvi-tools.

    Parameters
    ----------
    sizes
        Numbers of genes, batches and covariates.
    likelihood
        Name in `scvae_tools.likelihoods.LIKELIHOODS`.
    k_max
        Number of counts, from 0 on, that get a probability of their own; see `PiecewiseCategorical`.
    n_latent, n_hidden, n_layers
        Architecture; see `hidden_widths`. The decoder has the hidden layers of the encoder in reverse.
    dropout_rate
        Dropout rate of the hidden layers, or rates of the parts of the model by name; see `DROPOUT_PARTS`.
    linear_encoder, linear_decoder
        Whether the parameters of q(z|x) are linear functions of the encoder's input, and those of p(x|z) of z, before
        their links.
    decode_size
        Whether the decoder is given the log of the size factor, relative to the typical one of the data.
    dispersion
        ``"gene"``, ``"gene-batch"`` or ``"gene-cell"``.
    normalization
        Norm in the hidden layers of the encoder: ``"layer"``, ``"batch"`` or ``"none"``. The decoder takes a layer
        norm unless ``"none"``.
    posterior_variance
        ``"per-dimension"``, or ``"shared"``: one variance per cell, softplus of one number.
    encoder_input
        Key of ``ENCODER_INPUTS``.
    encode_covariates
        Whether the encoder sees the covariates too.
    use_size_factor
        Whether λ is multiplied by the size factor; otherwise λ = exp(f), as in the original scVAE.
    engine
        How log p(x|z) is summed over the genes: ``"blocked"`` never holds all parameters of a batch, ``"dense"`` does,
        ``"auto"`` is ``"blocked"``, which is the faster but for a few genes. The results are the same but for rounding.
    """

    n_components = 1
    y_term = "kl"
    has_component_posterior = False  #: whether y enters q(z|x,y)

    @checked()
    def __init__(
        self,
        sizes: Sizes,
        *,
        likelihood: str = "nb",
        k_max: int = 0,
        n_latent: int = 10,
        n_hidden: int | Sequence[int] = 128,
        n_layers: int | None = None,
        dropout_rate: float | Mapping[str, float] = 0.0,
        linear_encoder: bool = False,
        linear_decoder: bool = False,
        decode_size: bool = False,
        dispersion: str = "gene",
        normalization: str = "layer",
        posterior_variance: str = "per-dimension",
        encoder_input: str = "log1p-normalized",
        encode_covariates: bool = False,
        use_size_factor: bool = True,
        engine: str = "auto",
    ) -> None:
        super().__init__()
        self._check_choices(engine, dispersion, normalization, posterior_variance, encoder_input)
        widths, rates = hidden_widths(n_hidden, n_layers), self._checked_rates(dropout_rate)
        self.sizes, self.n_latent, self.normalization = sizes, n_latent, normalization
        self.likelihood: Likelihood = get_likelihood(likelihood, k_max)
        if self.likelihood.normalizes_rates and not use_size_factor:
            raise ValueError(
                f"With likelihood={likelihood!r} the rates of a cell add up to its size factor, so it needs one; found "
                "use_size_factor=False. Leave that out, or pass likelihood='poisson'."
            )
        self.gene_likelihood = likelihood  # the name under which scvi-tools looks for it
        self.latent_distribution = "normal"
        self.dropout_rates, self.decode_size = rates, decode_size
        self.encoder_input, self.use_size_factor, self.engine = encoder_input, use_size_factor, engine
        self.block_entries: int | None = None  #: rows x genes that the engine takes at a time; None for its default
        self.buffers = Buffers()
        self._build_encoder(widths, is_linear=linear_encoder, encode_covariates=encode_covariates)
        n_variances = self.n_latent if posterior_variance == "per-dimension" else 1
        self.z_mean = nn.Linear(self.encoder.n_features, self.n_latent)
        self.z_variance = nn.Linear(self.encoder.n_features, n_variances)
        self._build_decoder(widths, is_linear=linear_decoder, dispersion=dispersion)
        self.standard_normal = StandardNormal()
        self._register_reference()

    def _check_choices(
        self, engine: str, dispersion: str, normalization: str, posterior_variance: str, encoder_input: str
    ) -> None:
        check_choice("engine", engine, ENGINES)
        check_choice("dispersion", dispersion, DISPERSIONS)
        check_choice("normalization", normalization, NORMALIZATIONS)
        check_choice("posterior_variance", posterior_variance, POSTERIOR_VARIANCES)
        check_choice("encoder_input", encoder_input, tuple(ENCODER_INPUTS))

    def _checked_rates(self, dropout_rate: float | Mapping[str, float]) -> dict[str, float]:
        """Dropout rate of each part of the model."""
        rates = dropout_rates(dropout_rate)
        if rates["y"] > 0 and not self.has_component_posterior:
            raise ValueError(
                "`dropout_rate['y']` drops the effect of y on q(z|x,y), which only mixture='gmvae' has; found "
                f"{rates['y']!r} for a model without. Leave it out, or pass mixture='gmvae'."
            )
        return rates

    def _build_encoder(self, widths: tuple[int, ...], *, is_linear: bool, encode_covariates: bool) -> None:
        self.encoder = Encoder(
            self.sizes,
            encode_covariates=encode_covariates,
            # One linear layer, so that the non-zeros of x are read once for all heads, and wide enough for mean and
            # variance to be any linear functions.
            n_hidden=max(widths[-1], 2 * self.n_latent) if is_linear else widths,
            is_linear=is_linear,
            normalization=self.normalization,
            dropout_rate=self.dropout_rates["hidden"],
            input_dropout=self.dropout_rates["input"],
            buffers=self.buffers,
        )

    def _build_decoder(self, widths: tuple[int, ...], *, is_linear: bool, dispersion: str) -> None:
        self.decoder = Decoder(
            self.n_latent,
            self.sizes,
            self.likelihood,
            dispersion=dispersion,
            n_hidden=widths,
            is_linear=is_linear,
            decode_size=self.decode_size,
            normalization="none" if self.normalization == "none" else "layer",
            dropout_rate=self.dropout_rates["hidden"],
            latent_dropout=self.dropout_rates["latent"],
        )

    def drop_out(self, *, enable: bool) -> None:
        """Switch dropout in training on, each part at its rate, or off."""
        for layer in self.modules():
            if isinstance(layer, nn.Dropout):
                layer.rate = getattr(layer, "rate", layer.p)  # as it was built, or as scArches froze it
                layer.p = layer.rate if enable else 0.0

    @property
    def prior(self) -> nn.Module:
        """Prior p(y) p(z|y) in use."""
        return self.standard_normal

    # -- the data's scale ------------------------------------------------------------------------------------------

    def _register_reference(self) -> None:
        m = N_REFERENCE_CELLS
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("reference_size", torch.ones(m))
        self.register_buffer("reference_batch", torch.zeros(m, 1, dtype=torch.long))
        self.register_buffer("reference_categorical", torch.zeros(m, len(self.sizes.n_categories), dtype=torch.long))
        self.register_buffer("reference_continuous", torch.zeros(m, self.sizes.n_continuous))
        if self.sizes.n_continuous > 0:
            self.register_buffer("continuous_mean", torch.zeros(self.sizes.n_continuous))
            self.register_buffer("continuous_sd", torch.ones(self.sizes.n_continuous))
            self.register_buffer("continuous_is_set", torch.zeros((), dtype=torch.bool))
            self.register_load_state_dict_pre_hook(_keep_units_of_earlier_models)

    @torch.no_grad()
    def standardize_continuous(self, mean: Tensor, sd: Tensor) -> None:
        """Set mean and standard deviation of the continuous covariates, (n_continuous,) each, in their own units.

        From then on the networks get (c − mean) / sd of all cells. In raw units, a column with values in the thousands
        would dominate z.
        """
        self.continuous_mean.copy_(mean)
        self.continuous_sd.copy_(sd)
        self.continuous_is_set.fill_(True)  # noqa: FBT003

    def covariates_of(self, batch: Tensor, categorical: Tensor | None, continuous: Tensor | None) -> Covariates:
        """Covariates for the networks, from codes (n, 1) and (n, n_categorical) and numbers in their own units."""
        if continuous is not None:
            continuous = (continuous - self.continuous_mean) / self.continuous_sd
        return Covariates(batch, categorical, continuous)

    @torch.no_grad()
    def set_reference(
        self, mean_fraction: Tensor, total_over_size: float, size: Tensor, covariates: Covariates
    ) -> None:
        """Start the decoder at the data's means, and keep what is needed to sample cells like these.

        Parameters
        ----------
        mean_fraction
            Mean over cells of x over the size factor, (g,), positive.
        total_over_size
            Mean total count over mean size factor: 1 for the default size factor. Brings any size factor to the units
            of a cell's total count, for the encoder.
        size, covariates
            Size factors and covariates of `N_REFERENCE_CELLS` cells drawn from the data; continuous covariates in
            their own units.
        """
        mean = mean_fraction * size.mean() if self.use_size_factor else mean_fraction  # counts of each gene
        self.decoder.start(self.likelihood.start(mean) | {"log_rate": mean_fraction.log()})
        self.input_scale.fill_(total_over_size)
        self.reference_size.copy_(size)
        self.reference_batch.copy_(covariates.batch)
        if covariates.categorical is not None:
            self.reference_categorical.copy_(covariates.categorical)
        if covariates.continuous is not None:
            self.reference_continuous.copy_(covariates.continuous)

    def reference(self, rows: Tensor) -> tuple[Tensor, Covariates]:
        """Size factors (n, 1) and covariates of some of the reference cells."""
        categorical = self.reference_categorical[rows] if self.sizes.n_categories else None
        continuous = self.reference_continuous[rows] if self.sizes.n_continuous else None
        return self.reference_size[rows, None], self.covariates_of(self.reference_batch[rows], categorical, continuous)

    def with_size(self, covariates: Covariates, size: Tensor) -> Covariates:
        """Covariates with the relative size factor, if the decoder takes it and they do not hold it already.

        The relative size factor of a cell is log(size / typical size). The typical size is the median size factor of
        the data that the model was built on. So the number means the same for other cells, and is about 0. ``size`` is
        (n, 1).
        """
        if not self.decode_size or covariates.relative_size is not None:
            return covariates
        return covariates._replace(relative_size=(size / self.reference_size.median()).log())

    def at_typical_size(self, covariates: Covariates) -> Covariates:
        """Covariates with the relative size factor of the typical size, whatever size factor is used for decoding."""
        return self.with_size(covariates, self.reference_size.median().expand(len(covariates.batch), 1))

    def extend_batches(self, n_before: int, *, freeze: bool) -> None:
        """Start batches added by scArches at the average of the others; with ``freeze``, train nothing else."""
        self.decoder.extend_batches(n_before, freeze=freeze)
        if self.encoder.encode_covariates:
            weight = self.encoder.layers.fc_layers[0][0].weight
            extend_batches(weight, self.sizes.n_batch, n_before, freeze=freeze)

    # -- inference -------------------------------------------------------------------------------------------------

    def encode(self, x: Counts | DenseCounts | Tensor, size: Tensor, covariates: Covariates) -> Tensor:
        """Features of the encoder, (n, n_features)."""
        scaled, seen = (size * self.input_scale)[:, 0], ENCODER_INPUTS[self.encoder_input]
        return self.encoder(Counts.of(x).map(lambda value, cell: seen(value, scaled[cell])), covariates)

    def single_posterior(self, features: Tensor) -> Posterior:
        """Posterior q(z|x) of one component."""
        mean, raw = self.z_mean(features), self.z_variance(features)
        log_var = log_softplus(raw).expand_as(mean) if raw.shape[-1] < mean.shape[-1] else raw
        return Posterior(mean.new_zeros(len(mean), 1), mean[None], log_var[None])

    def posterior(self, features: Tensor) -> Posterior:
        """Posterior q(y|x) and q(z|x,y)."""
        return self.single_posterior(features)

    def probabilities(self, posterior: Posterior) -> Tensor:
        """Probability of each component, (n, k)."""
        return posterior.q_y

    # -- bounds ----------------------------------------------------------------------------------------------------

    def log_likelihood(
        self,
        x: Counts | DenseCounts | Tensor,
        z: Tensor,
        log_size: Tensor,
        covariates: Covariates,
        cell: Tensor | None = None,
        expected_gradient: Tensor | None = None,
    ) -> Tensor:
        """Log p(x|z) of z (..., p, d), (..., p).

        Parameters
        ----------
        x, log_size, covariates
            Counts, log size factors and covariates of the n cells.
        z
            Latent codes.
        cell
            Cell of each of the p codes; None for one code a cell, p = n.
        expected_gradient
            Gradient of the loss by each value, (..., p); None if it is not known. See `gene_sum.log_likelihood`.
        """
        x = Counts.of(x)
        own_covariates, own_size = (covariates, log_size) if cell is None else (covariates.rows(cell), log_size[cell])
        if self.engine == "dense":
            dense = x.dense() if cell is None else x.dense()[cell]
            return sum_over_genes(self.likelihood, dense, self.decoder(z, own_size, own_covariates))
        features = self.decoder.features(z, own_covariates)  # (..., p, n_hidden)
        log_factor = self.decoder.log_factor(features, own_size).expand(*z.shape[:-1], 1)
        n_copies = math.prod(z.shape[:-2])
        own = torch.arange(len(x), device=z.device) if cell is None else cell
        rows = DecodedRows(
            x.value if isinstance(x, DenseCounts) else x.by_gene,
            log_factor.flatten(),
            covariates.batch[:, 0],
            self.sizes.n_batch,
            None if cell is None and n_copies == 1 else own.repeat(n_copies),
        )
        kernel = gene_sum.log_likelihood(
            self.likelihood,
            rows,
            self.decoder.all_heads(),
            features.flatten(0, -2),
            None if expected_gradient is None else expected_gradient.flatten(),
            block_entries=self.block_entries,
            buffers=self.buffers,
        )
        return kernel.reshape(z.shape[:-1]) + self.log_base_measure(x).to(kernel)[own]

    def log_base_measure(self, x: Counts | DenseCounts) -> Tensor:
        """Σ_g log b(x_g) of each cell, (n,), without the zeros, where b is 1."""
        if x.log_base_measure is not None:
            return x.log_base_measure
        return x.sum_over_counts(lambda value: self.likelihood.log_base_measure(value.to(self.z_mean.weight)))

    def decode_draws(
        self,
        x: Counts | DenseCounts,
        z: Tensor,
        posterior: Posterior,
        log_size: Tensor,
        covariates: Covariates,
        *,
        is_averaged: bool = False,
    ) -> Decoded:
        """Log p(x|z) of draws z (s, k, n, d) from q(z|x,y).

        Only pairs of cell and component with q(y|x) above the machine epsilon of float32 are decoded. The other pairs
        change the result by less than its rounding error. They would cost as much as the rest, and fill the gradients
        with denormal numbers, on which a CPU is fifty times slower. Of `DenseCounts` all pairs are decoded, since their
        number must not depend on the data; those others have no weight.
        """
        s, k, n, _ = z.shape
        if k == 1:
            expected = z.new_full((s, n), -1 / (s * n)) if is_averaged else None
            log_likelihood = self.log_likelihood(x, z[:, 0], log_size, covariates, expected_gradient=expected)
            cell = torch.arange(n, device=z.device)
            return Decoded(z[:, 0], log_likelihood, cell, torch.zeros_like(cell), z.new_ones(n))
        is_decoded = posterior.q_y > torch.finfo(torch.float32).eps
        if isinstance(x, DenseCounts):
            pair = torch.arange(n * k, device=z.device)
            cell, component = pair // k, pair % k  # (p,)
        else:
            cell, component = torch.nonzero(is_decoded, as_tuple=True)
        weight = torch.where(is_decoded, posterior.q_y, 0.0)[cell, component]
        weight = weight / weight.new_zeros(n).index_add(0, cell, weight)[cell]
        expected = (-weight.detach() / (s * n)).expand(s, -1) if is_averaged else None
        z = z[:, component, cell]
        log_likelihood = self.log_likelihood(x, z, log_size, covariates, cell, expected)
        return Decoded(z, log_likelihood, cell, component, weight)

    def kl_terms(self, posterior: Posterior, z: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """KL of z, KL of y and cross-entropy of the labels, if there are any, (n,) each.

        ``z`` are draws (s, k, n, d), for models that have no closed form.
        """
        surprise = None
        if label is not None:
            surprise, posterior = cross_entropy(posterior.log_q_y, label), posterior.observed(label)
        kl_z = self.prior.kl(posterior.mean, posterior.log_var)  # (k, n)
        log_prior = self.prior.log_weights().to(posterior.log_q_y)
        kl_y = (posterior.q_y * (posterior.log_q_y - log_prior)).sum(1)
        return (posterior.q_y.T * kl_z).sum(0), kl_y, surprise

    def bound(
        self,
        x: Counts | DenseCounts | Tensor,
        size: Tensor,
        covariates: Covariates,
        n_samples: int = 1,
        *,
        is_averaged: bool = False,
        label: Tensor | None = None,
        importance_kl_weight: float | Tensor | None = None,
        code: Tensor | None = None,
    ) -> Bound:
        """ELBO = Σ_y q(y|x) [E log p(x|z) − KL(q(z|x,y) ‖ p(z|y))] − KL(q(y|x) ‖ p(y)), the sum over y exact.

        Parameters
        ----------
        x, size, covariates
            Counts (n, g), size factors (n, 1) and covariates of the cells.
        n_samples
            Monte Carlo samples of z per cell (and component).
        is_averaged
            Whether the caller differentiates `Bound.loss`, in which all cells have the same weight. The gradient is
            then computed together with the value, which saves a third of the time. A loss with other weights is an
            error in `backward`.
        label
            Component of each cell, (n,), −1 where it is not known. Where it is known, the bound is of x and y,
            log p(x, y) ≥ E log p(x|z) − KL(q(z|x,y) ‖ p(z|y)) + log p(y) (Kingma et al. 2014, arXiv:1406.5298). None
            to use no labels.
        importance_kl_weight
            Weight of the KL terms in `importance_weighted`; None to leave that bound out. That bound uses no labels.
        code
            Point (n, d) whose distance from the mean of q(z|x) is computed; None for none. Not for a mixture.
        """
        x, covariates = Counts.of(x), self.with_size(covariates, size)
        posterior = self.posterior(self.encode(x, size, covariates))
        z = posterior.sample_each(n_samples)
        is_averaged = is_averaged and importance_kl_weight is None  # importance weights depend on the values
        decoded_of = posterior if label is None or len(posterior.mean) == 1 else posterior.observed(label)
        decoded = self.decode_draws(x, z, decoded_of, self.log_size(size), covariates, is_averaged=is_averaged)
        tight = None
        if importance_kl_weight is not None:
            tight = self.importance_weighted(decoded, posterior, importance_kl_weight)
        distance = None if code is None else (posterior.mean[0] - code).square().sum(1)
        return Bound(decoded.expected(len(x)), *self.kl_terms(posterior, z, label), tight, distance)

    def importance_weighted(self, decoded: Decoded, posterior: Posterior, kl_weight: float | Tensor = 1.0) -> Tensor:
        """Log 1/S Σ_s Σ_y q(y|x) p(x|z) [p(z) / q(z|x)]^w with z ~ q(z|x,y), s draws each, (n,).

        At w = 1 the expectation of the sum is p(x), so that its log is a lower bound of log p(x) on average (Burda et
        al. 2016, arXiv:1509.00519). p(z) and q(z|x) are the mixtures themselves. With y summed out instead of drawn,
        the bound can be differentiated by q(y|x).
        """
        own = posterior.rows(decoded.cell)
        log_weight = decoded.log_likelihood + kl_weight * (self.prior.log_prob(decoded.z) - own.log_prob(decoded.z))
        log_weight = log_weight + posterior.log_q_y[decoded.cell, decoded.component]
        s, (n, k) = len(log_weight), posterior.log_q_y.shape
        each = log_weight.new_full((s, n * k), -math.inf)
        each = each.index_copy(1, decoded.cell * k + decoded.component, log_weight)
        return each.reshape(s, n, k).logsumexp((0, 2)) - math.log(s)

    def importance_weighted_bound(
        self, x: Counts | DenseCounts | Tensor, size: Tensor, covariates: Covariates, n_samples: int, chunk: int = 32
    ) -> Tensor:
        """Log 1/S Σ_s p(x|z_s) p(z_s) / q(z_s|x) with z_s ~ q(z|x): a lower bound of log p(x), (n,).

        The bound becomes tight for large S. Prior and posterior are the mixtures themselves (Burda et al. 2016,
        arXiv:1509.00519).
        """
        x, covariates = Counts.of(x), self.with_size(covariates, size)
        posterior = self.posterior(self.encode(x, size, covariates))
        log_weights = []
        for start in range(0, n_samples, chunk):
            z = posterior.sample(min(chunk, n_samples - start))  # (s, n, d)
            log_p_x = self.log_likelihood(x, z, self.log_size(size), covariates)
            log_weights.append(log_p_x + self.prior.log_prob(z) - posterior.log_prob(z))
        return torch.logsumexp(torch.cat(log_weights), dim=0) - math.log(n_samples)

    # -- sampling --------------------------------------------------------------------------------------------------

    def sample_latent(self, n_cells: int, components: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draw z (n, d) and y (n,) from the prior, or z from p(z|y) for given components."""
        device = self.z_mean.weight.device
        y = torch.zeros(n_cells, dtype=torch.long, device=device) if components is None else components
        return torch.randn(n_cells, self.n_latent, device=device), y

    @torch.no_grad()
    def decode(self, z: Tensor, size: Tensor, covariates: Covariates, genes: Tensor | None = None) -> CountDistribution:
        """Distribution p(x|z) of z (..., n, d)."""
        log_size, covariates = self.log_size(size), self.with_size(covariates, size)
        params = {name: value.detach() for name, value in self.decoder(z, log_size, covariates, genes).items()}
        return CountDistribution(self.likelihood, params, scale=self._scale(params, log_size))

    def _scale(self, params: Params, log_size: Tensor) -> Tensor:
        """λ over the size factor; where λ is not proportional to it, λ of a cell of the typical size over that size."""
        log_share = params["log_rate"] - log_size
        if self.likelihood.rate_is_head:
            return log_share.exp()
        typical = self.log_size(self.reference_size.median())
        return self.likelihood.rate(params | {"log_rate": log_share + typical}) * (-typical).exp()

    def rate(
        self, x: Counts | DenseCounts | Tensor, size: Tensor, covariates: Covariates, genes: Tensor | None = None
    ) -> Tensor:
        """λ at the posterior means, Σ_y q(y|x) λ(E[z|x,y]), in counts, (n, g)."""
        covariates = self.with_size(covariates, size)
        posterior = self.posterior(self.encode(x, size, covariates))
        params = self.decoder(posterior.mean, self.log_size(size), covariates, genes)
        return torch.einsum("nk,kng->ng", posterior.q_y, self.likelihood.rate(params))  # of λ (k, n, g)

    def log_size(self, size: Tensor) -> Tensor:
        """Log of the size factor (n, 1), or zeros where the model has none."""
        return size.log() if self.use_size_factor else torch.zeros_like(size)


def _keep_units_of_earlier_models(module: VAE, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Set mean 0 and standard deviation 1 in weights from before continuous covariates were standardised.

    The networks of these models were trained on covariates in their own units.
    """
    if prefix + "z_mean.weight" not in state:  # these are not the weights of a model
        return
    former = {"continuous_mean": 0.0, "continuous_sd": 1.0, "continuous_is_set": True}
    for name, value in former.items():
        state.setdefault(prefix + name, torch.full_like(getattr(module, name), value))
