"""Encoder and decoder against the same formulas in NumPy.

Tolerance. Modules run in float64 here, so formulas agree to `EXACT`; what float32 adds is seen in test_vae.py.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import nn

from scvae_tools._module.covariates import Covariates, Sizes
from scvae_tools._module.networks import DISPERSIONS, NORMALIZATIONS, Decoder, Encoder, extend_batches
from scvae_tools._module.sparse import Counts
from scvae_tools.likelihoods import LIKELIHOODS, get_likelihood

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scvi.nn import FCLayers

EXACT = {"rtol": 1e-10, "atol": 1e-12}  #: a few hundred operations in float64
N_CELLS, N_GENES, N_LATENT, N_HIDDEN = 6, 4, 2, 5
SIZES = Sizes(N_GENES, n_batch=3, n_categories=(2, 4), n_continuous=2)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
    return module.double()


def make_decoder(sizes: Sizes = SIZES, likelihood: str = "nb", **options: object) -> Decoder:
    options = {
        "dispersion": "gene",
        "n_hidden": N_HIDDEN,
        "n_layers": 1,
        "dropout_rate": 0.0,
        "normalization": "layer",
    } | options
    with seeded(0):
        return randomised(Decoder(N_LATENT, sizes, get_likelihood(likelihood), **options))


def make_encoder(**options: object) -> Encoder:
    options = {"n_hidden": N_HIDDEN, "n_layers": 1, "dropout_rate": 0.0, "normalization": "layer"} | options
    with seeded(0):
        return randomised(Encoder(SIZES, **options))


def make_covariates(sizes: Sizes = SIZES, n_cells: int = N_CELLS) -> Covariates:
    generator = torch.Generator().manual_seed(1)
    columns = [torch.randint(n, (n_cells, 1), generator=generator) for n in sizes.n_categories]
    return Covariates(
        torch.randint(sizes.n_batch, (n_cells, 1), generator=generator),
        torch.cat(columns, dim=1) if columns else None,
        torch.randn(n_cells, sizes.n_continuous, generator=generator, dtype=torch.float64)
        if sizes.n_continuous
        else None,
    )


def normal(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def array(value: torch.Tensor) -> np.ndarray:
    return value.detach().numpy()


def one_layer(inputs: np.ndarray, module: Encoder | FCLayers, normalization: str) -> np.ndarray:
    """[linear, norm, ReLU] of the first layer, by hand."""
    layers = module.layers if isinstance(module, Encoder) else module
    linear = layers.fc_layers[0][0]
    weight = array(linear.weight).T
    h = inputs @ (np.vstack([array(module.gene_weight), weight]) if isinstance(module, Encoder) else weight)
    h = h + array(linear.bias)
    if normalization == "layer":
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    elif normalization == "batch":  # fresh statistics: mean 0 and variance 1
        norm = layers.fc_layers[0][1]
        h = h / np.sqrt(1 + norm.eps) * array(norm.weight) + array(norm.bias)
    return np.maximum(h, 0)


def with_covariates(features: np.ndarray, covariates: Covariates, sizes: Sizes = SIZES) -> np.ndarray:
    """Features, continuous covariates, and the categories one-hot, the batch last."""
    codes = [*covariates.categorical.T.numpy(), covariates.batch[:, 0].numpy()]
    one_hot = [np.eye(n)[code] for n, code in zip([*sizes.n_categories, sizes.n_batch], codes, strict=True)]
    return np.concatenate([features, covariates.continuous.numpy(), *one_hot], axis=1)


# -- covariates --------------------------------------------------------------------------------------------------------


def test_categories_are_columns_with_the_batch_last() -> None:
    covariates = make_covariates()
    expected = [*covariates.categorical.T, covariates.batch[:, 0]]
    found = covariates.categories()
    assert all(code.shape == (N_CELLS, 1) for code in found)
    np.testing.assert_array_equal(torch.cat(found, dim=1).T, torch.stack(expected))


def test_the_batch_is_the_only_category_where_there_is_no_other() -> None:
    batch = torch.tensor([[1], [0]])
    (only,) = Covariates(batch).categories()
    np.testing.assert_array_equal(only, [[1], [0]])


def test_rows_picks_the_same_cells_everywhere() -> None:
    covariates, at = make_covariates()._replace(relative_size=normal(N_CELLS, 1)), [4, 0, 4]
    for found, value in zip(covariates.rows(torch.tensor(at)), covariates, strict=True):
        np.testing.assert_array_equal(found, value.numpy()[at])


def test_rows_keeps_absent_covariates_absent() -> None:
    assert set(Covariates(torch.zeros(3, 1)).rows(torch.tensor([0]))[1:]) == {None}


def test_continuous_covariates_are_repeated_along_leading_axes() -> None:
    covariates, features = make_covariates(), normal(3, 2, N_CELLS, N_LATENT)
    found = array(covariates.beside(features))
    for sample, component, cell in np.ndindex(3, 2, N_CELLS):
        expected = np.r_[features[sample, component, cell], covariates.continuous[cell]]
        np.testing.assert_array_equal(found[sample, component, cell], expected)


# -- encoder -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("encode_covariates", [False, True])
def test_encoder_equals_its_formula(encode_covariates: bool, normalization: str) -> None:
    encoder = make_encoder(encode_covariates=encode_covariates, normalization=normalization).eval()
    x, covariates = normal(N_CELLS, N_GENES), make_covariates()
    inputs = with_covariates(x.numpy(), covariates) if encode_covariates else x.numpy()
    np.testing.assert_allclose(
        array(encoder(Counts.of(x), covariates)), one_layer(inputs, encoder, normalization), **EXACT
    )


def test_a_second_layer_takes_the_first_as_input() -> None:
    encoder = make_encoder(encode_covariates=False, n_layers=2, normalization="none")
    x = normal(N_CELLS, N_GENES)
    hidden = one_layer(x.numpy(), encoder, "none")
    second = encoder.layers.fc_layers[1][0]
    expected = np.maximum(hidden @ array(second.weight).T + array(second.bias), 0)
    np.testing.assert_allclose(array(encoder(Counts.of(x), make_covariates())), expected, **EXACT)


def test_dropout_silences_its_share_of_features_in_training_and_none_in_evaluation() -> None:
    encoder = make_encoder(encode_covariates=False, dropout_rate=0.3, normalization="none", n_hidden=200)
    x = normal(50, N_GENES)
    clean = one_layer(x.numpy(), encoder, "none")
    covariates = make_covariates(n_cells=50)
    np.testing.assert_allclose(array(encoder.eval()(Counts.of(x), covariates)), clean, **EXACT)
    with seeded(0):
        dropped = array(encoder.train()(Counts.of(x), covariates))
    alive = clean > 0
    error = np.sqrt(0.3 * 0.7 / alive.sum())
    assert abs((dropped[alive] == 0).mean() - 0.3) < 5 * error  # five standard errors of a binomial fraction
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], clean[kept] / 0.7, **EXACT)


# -- decoder -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["layer", "none"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_decoder_equals_its_formula(likelihood: str, normalization: str) -> None:
    decoder = make_decoder(likelihood=likelihood, normalization=normalization)
    z, covariates, log_size = normal(N_CELLS, N_LATENT), make_covariates(), normal(N_CELLS, 1, seed=3)
    hidden = one_layer(with_covariates(z.numpy(), covariates), decoder.px_decoder, normalization)
    params = decoder(z, log_size, covariates)
    assert tuple(sorted(params)) == tuple(sorted(get_likelihood(likelihood).head_names))
    for name, head in decoder.heads.items():
        expected = hidden @ array(head.weight).T + array(head.bias)
        if name == "log_rate":
            expected = expected + log_size.numpy()
        if name == "log_rate" and likelihood == "constrained_poisson":
            f = hidden @ array(head.weight).T + array(head.bias)
            expected = expected - logsumexp(f, axis=1, keepdims=True)
        np.testing.assert_allclose(array(params[name]), expected, **EXACT)
    for name, value in decoder.shared.items():
        np.testing.assert_array_equal(array(params[name]), array(value))


@pytest.mark.parametrize("dispersion", DISPERSIONS)
@pytest.mark.parametrize("leading", [(3,), (2, 3)], ids=["samples", "samples and components"])
def test_leading_axes_equal_a_loop_over_them(leading: tuple[int, ...], dispersion: str) -> None:
    decoder = make_decoder(likelihood="zinb", dispersion=dispersion)
    z, covariates, log_size = normal(*leading, N_CELLS, N_LATENT), make_covariates(), normal(N_CELLS, 1)
    together = decoder(z, log_size, covariates)
    for at in np.ndindex(*leading):
        for name, alone in decoder(z[at], log_size, covariates).items():
            found = together[name].expand(*leading, N_CELLS, N_GENES)[at]
            np.testing.assert_allclose(array(found), array(alone.expand(N_CELLS, N_GENES)), **EXACT)


def test_dispersion_by_batch_is_that_of_the_batch_of_each_cell() -> None:
    decoder, covariates = make_decoder(dispersion="gene-batch"), make_covariates()
    log_r = array(decoder(normal(N_CELLS, N_LATENT), normal(N_CELLS, 1), covariates)["log_r"])
    table = array(decoder.shared["log_r"])  # (g, b)
    for cell in range(N_CELLS):
        np.testing.assert_array_equal(log_r[cell], table[:, int(covariates.batch[cell])])


@pytest.mark.parametrize("dispersion", DISPERSIONS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_only_dispersion_heads_are_shared_by_cells(likelihood: str, dispersion: str) -> None:
    decoder = make_decoder(likelihood=likelihood, dispersion=dispersion)
    names = {head.name for head in get_likelihood(likelihood).heads if head.is_dispersion}
    assert set(decoder.shared) == (set() if dispersion == "gene-cell" else names)
    shape = (N_GENES, SIZES.n_batch) if dispersion == "gene-batch" else (N_GENES,)
    assert all(value.shape == shape for value in decoder.shared.values())


@pytest.mark.parametrize("dispersion", DISPERSIONS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_parameters_start_at_the_declared_value(likelihood: str, dispersion: str) -> None:
    options = {"n_hidden": N_HIDDEN, "n_layers": 1, "dropout_rate": 0.0, "normalization": "layer"}
    declared = get_likelihood(likelihood)
    with seeded(0):
        decoder = Decoder(N_LATENT, SIZES, declared, dispersion=dispersion, **options)
    for head in declared.heads:
        start = decoder.heads[head.name].bias if head.name in decoder.heads else decoder.shared[head.name]
        np.testing.assert_array_equal(array(start), head.initial)


@pytest.mark.parametrize("dispersion", DISPERSIONS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_subset_of_genes_equals_the_columns_of_all(likelihood: str, dispersion: str) -> None:
    decoder, genes = make_decoder(likelihood=likelihood, dispersion=dispersion), [3, 0]
    inputs = normal(2, N_CELLS, N_LATENT), normal(N_CELLS, 1), make_covariates()
    everything = decoder(*inputs)
    for name, found in decoder(*inputs, genes=torch.tensor(genes)).items():
        np.testing.assert_allclose(array(found), array(everything[name])[..., genes], **EXACT)


def test_a_cell_decodes_the_same_in_any_company() -> None:
    """No batch statistics in the decoder, in training mode either."""
    decoder, covariates = make_decoder().train(), make_covariates()
    z, log_size = normal(N_CELLS, N_LATENT), normal(N_CELLS, 1)
    together = array(decoder(z, log_size, covariates)["log_rate"])
    alone = decoder(z[2:3], log_size[2:3], covariates.rows(torch.tensor([2])))["log_rate"]
    np.testing.assert_allclose(array(alone)[0], together[2], **EXACT)


# -- new batches -------------------------------------------------------------------------------------------------------


def grown(decoder: Decoder, n_before: int, sizes: Sizes, *, freeze: bool = False) -> Decoder:
    """A decoder of more batches whose known columns are those of ``decoder``, as scArches copies them."""
    larger = make_decoder(sizes, dispersion=decoder.dispersion, normalization="none")
    ours, theirs = larger.state_dict(), decoder.state_dict()
    for name, value in theirs.items():
        at = tuple(slice(n) for n in value.shape)
        ours[name][at] = value
    larger.load_state_dict(ours)
    larger.extend_batches(n_before, freeze=freeze)
    return larger


def decoded(decoder: Decoder, batch: int) -> dict[str, np.ndarray]:
    z = normal(N_CELLS, N_LATENT)
    covariates = Covariates(torch.full((N_CELLS, 1), batch))
    params = decoder(z, torch.zeros(N_CELLS, 1, dtype=torch.float64), covariates)
    return {name: array(value) for name, value in params.items()}


@pytest.mark.parametrize("dispersion", DISPERSIONS)
@pytest.mark.parametrize("n_new", [1, 2])
def test_known_batches_decode_as_before_new_ones_were_added(n_new: int, dispersion: str) -> None:
    before = make_decoder(Sizes(N_GENES, n_batch=3), dispersion=dispersion, normalization="none")
    after = grown(before, 3, Sizes(N_GENES, n_batch=3 + n_new))
    for batch in range(3):
        for name, value in decoded(before, batch).items():
            np.testing.assert_allclose(decoded(after, batch)[name], value, **EXACT)


@pytest.mark.parametrize("n_new", [1, 2])
def test_new_batches_start_at_the_mean_of_the_known(n_new: int) -> None:
    before = make_decoder(Sizes(N_GENES, n_batch=3), dispersion="gene-batch", normalization="none")
    after = grown(before, 3, Sizes(N_GENES, n_batch=3 + n_new))
    weight = array(before.px_decoder.fc_layers[0][0].weight)
    log_r = array(before.shared["log_r"])
    for new in range(3, 3 + n_new):
        column = array(after.px_decoder.fc_layers[0][0].weight)[:, N_LATENT + new]
        np.testing.assert_allclose(column, sum(weight[:, N_LATENT + b] for b in range(3)) / 3, **EXACT)
        np.testing.assert_allclose(decoded(after, new)["log_r"][0], sum(log_r[:, b] for b in range(3)) / 3, **EXACT)


@pytest.mark.parametrize("dispersion", DISPERSIONS)
def test_batches_added_to_a_single_one_decode_as_it_did(dispersion: str) -> None:
    before = make_decoder(Sizes(N_GENES), dispersion=dispersion, normalization="none")
    after = grown(before, 1, Sizes(N_GENES, n_batch=3))
    for batch in range(3):
        for name, value in decoded(before, 0).items():
            np.testing.assert_allclose(decoded(after, batch)[name], value, **EXACT)


def test_nothing_changes_without_new_batches() -> None:
    decoder = make_decoder(dispersion="gene-batch")
    before = {name: array(value).copy() for name, value in decoder.state_dict().items()}
    decoder.extend_batches(SIZES.n_batch, freeze=False)
    for name, value in decoder.state_dict().items():
        np.testing.assert_array_equal(array(value), before[name])


@pytest.mark.parametrize("n_before", [1, 2])
def test_a_frozen_first_layer_learns_new_batches_only(n_before: int) -> None:
    sizes = Sizes(N_GENES, n_batch=4)
    gradients = {}
    for freeze in (False, True):
        decoder = grown(make_decoder(Sizes(N_GENES, n_batch=n_before)), n_before, sizes, freeze=freeze)
        z, log_size = normal(N_CELLS, N_LATENT), normal(N_CELLS, 1)
        decoder(z, log_size, Covariates(torch.tensor([[0], [1], [2], [3], [3], [0]])))[
            "log_rate"
        ].square().sum().backward()
        gradients[freeze] = array(decoder.px_decoder.fc_layers[0][0].weight.grad)
    # A single batch had no column, so that all four are new.
    first_new = N_LATENT + (n_before if n_before > 1 else 0)
    assert (gradients[False] != 0).any(axis=0).all()
    np.testing.assert_array_equal(gradients[True][:, :first_new], 0)
    np.testing.assert_allclose(gradients[True][:, first_new:], gradients[False][:, first_new:], **EXACT)


def test_an_encoder_of_covariates_takes_new_batches_like_the_mean_of_the_known() -> None:
    encoder = make_encoder(encode_covariates=True, normalization="none")
    x, covariates = Counts.of(normal(N_CELLS, N_GENES)), make_covariates()
    extend_batches(encoder.layers.fc_layers[0][0].weight, SIZES.n_batch, 2, freeze=False)
    encoder.layers.fc_layers[0][3] = None  # no ReLU, so that the mean goes through
    each = [encoder(x, covariates._replace(batch=torch.full((N_CELLS, 1), b))) for b in range(3)]
    np.testing.assert_allclose(array(each[2]), array(each[0] + each[1]) / 2, **EXACT)
