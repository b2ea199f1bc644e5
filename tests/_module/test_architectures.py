"""Widths, linear networks, dropout by part, and a decoder that sees the size: against NumPy and dense masks.

Tolerance. Modules run in float64 unless a test trains, so formulas agree to `EXACT`; a trained model is compared with
itself in float32, to `ROUNDED`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from independent import array, normal, seeded
from scipy import sparse
from torch import nn

import scvae_tools as svt
from scvae_tools._data.loader import counts_of_matrix
from scvae_tools._module import networks as _networks
from scvae_tools._module.covariates import Covariates, Sizes
from scvae_tools._module.mixture_vaes import GMVAE, VaDE
from scvae_tools._module.networks import DROPOUT_PARTS, dropout_rates, hidden_widths
from scvae_tools._module.vae import VAE

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData

EXACT = {"rtol": 1e-9, "atol": 1e-10}
ROUNDED = {"rtol": 2e-4, "atol": 1e-6}
N_CELLS, N_GENES, N_LATENT = 9, 6, 2
SIZES = Sizes(N_GENES, n_batch=3, n_categories=(2,), n_continuous=2)
KINDS = [False, "gmvae", "vade"]


def make(kind: type[VAE] = VAE, sizes: Sizes = SIZES, **options: object) -> VAE:
    """In float64, every parameter away from where it starts, in evaluation mode."""
    with seeded(0):
        mixture = {} if kind is VAE else {"n_components": 3}
        module = kind(sizes, **{"n_latent": N_LATENT, "n_hidden": 5} | mixture | options).double()
        if kind is not VAE:
            means = 3 * torch.eye(3, N_LATENT, dtype=torch.float64)
            eye = torch.eye(N_LATENT, dtype=torch.float64)
            module.set_mixture(torch.full((3,), 1 / 3), means, eye, 0.2 * torch.ones(N_LATENT))
    with torch.no_grad():
        for seed, parameter in enumerate(filter(torch.Tensor.numel, module.parameters())):
            parameter.add_(0.3 * normal(*parameter.shape, seed=seed))
    return module.eval()


def make_cells(sizes: Sizes = SIZES, n_cells: int = N_CELLS) -> tuple[torch.Tensor, torch.Tensor, Covariates]:
    rng = np.random.default_rng(0)
    x = rng.poisson(3, (n_cells, sizes.n_genes)) * (rng.random((n_cells, sizes.n_genes)) < 0.5)
    codes = [torch.tensor(rng.integers(n, size=(n_cells, 1))) for n in (*sizes.n_categories, sizes.n_batch)]
    continuous = torch.tensor(rng.normal(size=(n_cells, sizes.n_continuous))) if sizes.n_continuous else None
    covariates = Covariates(codes[-1], torch.cat(codes[:-1], 1) if codes[:-1] else None, continuous)
    return torch.tensor(x, dtype=torch.float64), torch.tensor(rng.uniform(3, 30, (n_cells, 1))), covariates


def columns(covariates: Covariates, sizes: Sizes = SIZES) -> np.ndarray:
    """Continuous covariates, then the categories one-hot, the batch last, (n, c)."""
    codes = [*covariates.categorical.T.numpy(), covariates.batch[:, 0].numpy()]
    one_hot = [np.eye(n)[code] for n, code in zip([*sizes.n_categories, sizes.n_batch], codes, strict=True)]
    return np.hstack([covariates.continuous.numpy(), *one_hot])


def weights_of(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: array(value).copy() for name, value in module.state_dict().items()}


def hidden(
    inputs: np.ndarray, weights: dict[str, np.ndarray], prefix: str, first: np.ndarray | None = None
) -> np.ndarray:
    """Layers [linear, layer norm, ReLU] by hand; ``first`` is the product of the first layer, if it is known."""
    for i in range(sum(f"{prefix}.fc_layers.Layer {j}.0.weight" in weights for j in range(9))):
        name = f"{prefix}.fc_layers.Layer {i}.0"
        product = first if i == 0 and first is not None else inputs @ weights[f"{name}.weight"].T
        h = product + weights[f"{name}.bias"]
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
        inputs = np.maximum(h, 0)
    return inputs


def log_inputs(x: torch.Tensor, size: torch.Tensor) -> np.ndarray:
    return np.log1p(x.numpy() * 1000 / size.numpy())


def make_data(n_cells: int = 100, seed: int = 0) -> AnnData:
    adata = svt.datasets.simulate(n_cells, 30, 3, n_batches=2, random_state=seed)
    adata.obs["percent"] = np.random.default_rng(seed).uniform(size=n_cells)
    return adata


def train(adata: AnnData | None = None, *, epochs: int = 3, setup: dict | None = None, **options: object) -> svt.SCVAE:
    adata = make_data() if adata is None else adata
    svt.SCVAE.setup_anndata(adata, **({"batch_key": "batch"} if setup is None else setup))
    components = {"n_components": 3} if options.get("mixture", True) else {}
    model = svt.SCVAE(adata, **{"n_latent": 3, "n_hidden": 8} | components | options)
    model.train(epochs, batch_size=32, progress=False, accelerator="cpu")
    return model


# -- widths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_hidden", "n_layers", "expected"),
    [
        (128, None, (128,)),
        (128, 3, (128, 128, 128)),
        ((250, 100), None, (250, 100)),
        ([250, 100], 2, (250, 100)),
        (np.array([4, 3, 2]), None, (4, 3, 2)),
        ([7], None, (7,)),
    ],
)
def test_widths_are_those_of_the_encoder_from_first_to_last(n_hidden, n_layers, expected) -> None:
    assert hidden_widths(n_hidden, n_layers) == expected


@pytest.mark.parametrize(
    ("n_hidden", "n_layers", "match"),
    [
        ((250, 100), 3, r"`n_layers` must be the number of widths.*n_layers=3 for 2 widths, \(250, 100\)\. Leave"),
        ((250, 0), None, r"`n_hidden` must be a whole number of at least 1 for each hidden layer; found \(250, 0\)"),
        ((), None, r"`n_hidden` must be a whole number of at least 1 for each hidden layer; found \(\)"),
        ("128", None, r"`n_hidden` must be a whole number of at least 1; found '128'"),
        (128, 0, r"`n_layers` must be a whole number of at least 1, or None; found 0"),
    ],
)
def test_widths_that_do_not_fit_are_refused(n_hidden, n_layers, match) -> None:
    with pytest.raises(ValueError, match=match):
        svt.SCVAE(make_registered(), mixture=False, n_hidden=n_hidden, n_layers=n_layers)


def make_registered() -> AnnData:
    adata = make_data(20)
    svt.SCVAE.setup_anndata(adata)
    return adata


def test_each_layer_has_its_width_and_the_decoder_has_them_reversed() -> None:
    module, (x, size, covariates) = make(n_hidden=(7, 5, 4)), make_cells()
    weights = weights_of(module)
    first = log_inputs(x, size) @ weights["encoder.gene_weight"]
    features = hidden(None, weights, "encoder.layers", first)
    assert features.shape == (N_CELLS, 4)
    np.testing.assert_allclose(array(module.encode(x, size, covariates)), features, **EXACT)
    z = normal(N_CELLS, N_LATENT, seed=9)
    decoded = hidden(np.hstack([z.numpy(), columns(covariates)]), weights, "decoder.px_decoder")
    assert decoded.shape == (N_CELLS, 7)
    expected = decoded @ weights["decoder.heads.log_rate.weight"].T + weights["decoder.heads.log_rate.bias"]
    found = module.decoder(z, torch.zeros_like(size), covariates)["log_rate"]
    np.testing.assert_allclose(array(found), expected, **EXACT)


def test_a_model_of_one_width_has_the_weights_and_names_of_before() -> None:
    """Names of 0.1.0 and of the units of the covariates; the same start from one width and from the same one twice."""
    one, each = make(n_hidden=5, n_layers=2).state_dict(), make(n_hidden=[5, 5]).state_dict()
    assert list(one) == list(each)
    assert all(torch.equal(one[name], each[name]) for name in one)
    layers = [f"{part}.fc_layers.Layer {i}.0" for part in ("encoder.layers", "decoder.px_decoder") for i in range(2)]
    weights = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    heads = ["z_mean", "z_variance", "decoder.heads.log_rate"]
    weights += [f"{head}.{kind}" for head in heads for kind in ("weight", "bias")]
    buffers = ["input_scale", *(f"reference_{name}" for name in ("size", "batch", "categorical", "continuous"))]
    buffers += [f"continuous_{name}" for name in ("mean", "sd", "is_set")]
    assert set(one) == {*weights, *buffers, "encoder.gene_weight", "decoder.shared.log_r"}


# -- linear networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [VAE, GMVAE, VaDE])
@pytest.mark.parametrize("normalization", ["layer", "batch"])
def test_a_linear_encoder_is_a_product_of_matrices(kind: type[VAE], normalization: str) -> None:
    options = {"normalization": normalization, "dropout_rate": 0.5}
    module, (x, size, covariates) = make(kind, linear_encoder=True, encode_covariates=True, **options), make_cells()
    weights, seen = weights_of(module), log_inputs(x, size)
    layer = "encoder.layers.fc_layers.Layer 0.0"
    known = columns(covariates)
    for training in (False, True):  # no statistics of the batch, no dropout
        posterior = module.train(training).single_posterior(module.encode(x, size, covariates))
        for name, found in {"z_mean": posterior.mean, "z_variance": posterior.log_var}.items():
            by_gene = weights["encoder.gene_weight"] @ weights[f"{name}.weight"].T
            by_covariate = weights[f"{layer}.weight"].T @ weights[f"{name}.weight"].T
            offset = weights[f"{layer}.bias"] @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
            expected = seen @ by_gene + known @ by_covariate + offset
            np.testing.assert_allclose(array(found)[0], expected, **EXACT)


@pytest.mark.parametrize("n_hidden", [1, 50])
def test_a_linear_encoder_is_wide_enough_for_mean_and_variance(n_hidden: int) -> None:
    module = make(linear_encoder=True, n_hidden=n_hidden)
    weights = weights_of(module)
    heads = np.vstack([weights["z_mean.weight"], weights["z_variance.weight"]])
    assert np.linalg.matrix_rank(weights["encoder.gene_weight"] @ heads.T) == 2 * N_LATENT
    assert module.encoder.n_features == max(n_hidden, 2 * N_LATENT)


@pytest.mark.parametrize("likelihood", ["poisson", "zinb"])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_a_linear_decoder_is_linear_in_codes_and_covariates(likelihood: str, leading: tuple[int, ...]) -> None:
    module = make(linear_decoder=True, likelihood=likelihood, dispersion="gene-cell", dropout_rate=0.5).train()
    _, size, covariates = make_cells()
    z, weights = normal(*leading, N_CELLS, N_LATENT, seed=4), weights_of(module)
    known = np.broadcast_to(columns(covariates), (*leading, N_CELLS, 2 + 2 + 3))
    inputs = np.concatenate([z.numpy(), known], axis=-1)
    found = module.decoder(z, size.log(), covariates)
    for name in module.likelihood.head_names:
        expected = inputs @ weights[f"decoder.heads.{name}.weight"].T + weights[f"decoder.heads.{name}.bias"]
        expected = expected + np.log(size.numpy()) if name == "log_rate" else expected
        np.testing.assert_allclose(array(found[name]), expected, **EXACT)


@pytest.mark.parametrize("kind", [VAE, GMVAE, VaDE])
@pytest.mark.parametrize(
    "options", [{"linear_decoder": True, "linear_encoder": True}, {"n_hidden": (7, 4)}, {"decode_size": True}], ids=str
)
def test_both_engines_have_one_bound_and_gradient(kind: type[VAE], options: dict) -> None:
    found = {}
    for engine in ("blocked", "dense"):
        module = make(kind, engine=engine, likelihood="zinb", dispersion="gene-batch", **options)
        with seeded(1):
            bound = module.bound(*make_cells(), n_samples=2, is_averaged=True)
        bound.loss().backward()
        found[engine] = bound.elbo, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    np.testing.assert_allclose(array(found["blocked"][0]), array(found["dense"][0]), **EXACT)
    assert set(found["blocked"][1]) == set(found["dense"][1])
    for name, gradient in found["dense"][1].items():
        np.testing.assert_allclose(found["blocked"][1][name], gradient, rtol=1e-7, atol=1e-9, err_msg=name)


# -- loadings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["nb", "constrained_poisson"])
def test_loadings_are_the_derivatives_of_the_log_of_lambda(likelihood: str) -> None:
    """By differences of two codes; where rates add up to the size, of log λ less its mean over the genes."""
    model = train(linear_decoder=True, mixture=False, likelihood=likelihood)
    loadings = model.get_loadings()
    assert list(loadings.index) == list(model.adata.var_names)
    assert list(loadings.columns) == ["0", "1", "2"]
    module, covariates = model.module, Covariates(torch.tensor([[0], [1]]))
    at_zero, z = torch.zeros(2, 3), torch.tensor(np.random.default_rng(0).normal(size=(2, 3)), dtype=torch.float32)
    size = torch.tensor([[10.0], [500.0]])
    change = [np.log(module.decode(code, size, covariates).mu.numpy().astype(float)) for code in (z, at_zero)]
    change = change[0] - change[1]
    if likelihood == "constrained_poisson":
        change -= change.mean(1, keepdims=True)
        np.testing.assert_allclose(loadings.mean(), 0, atol=1e-6)
    np.testing.assert_allclose(change, z.numpy() @ loadings.to_numpy().T, rtol=1e-3, atol=1e-5)


def test_loadings_of_a_decoder_with_hidden_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"linear in z; .*hidden layers\. Build it with linear_decoder=True"):
        train(mixture=False, epochs=1).get_loadings()


def test_loadings_find_the_directions_of_a_log_linear_model() -> None:
    """λ = exp(a + z·W) of known W: the loadings span the same space, as their principal angles tell."""
    rng = np.random.default_rng(0)
    true = rng.normal(size=(2, 40))
    adata = svt.datasets.simulate(200, 40, 1)
    adata.X = sparse.csr_matrix(rng.poisson(np.exp(1 + 0.6 * rng.normal(size=(200, 2)) @ true)).astype(np.float32))
    svt.SCVAE.setup_anndata(adata)
    options = {"mixture": False, "likelihood": "poisson", "use_size_factor": False, "n_latent": 2, "dropout_rate": 0.0}
    model = svt.SCVAE(adata, linear_decoder=True, n_hidden=16, **options)
    model.train(30, lr=1e-2, batch_size=32, progress=False, accelerator="cpu")
    bases = [np.linalg.qr(each)[0] for each in (true.T, model.get_loadings().to_numpy())]
    assert np.linalg.svd(bases[0].T @ bases[1], compute_uv=False).min() > 0.95


def test_tl_stores_the_loadings_of_a_linear_decoder_alone(tmp_path) -> None:
    adata = make_data()
    adata.var["used"] = np.arange(adata.n_vars) % 5 != 2
    options = {"mixture": False, "n_latent": 3, "max_epochs": 2, "progress": False, "mask_var": "used"}
    before = set(adata.varm)
    model = svt.tl.scvae(adata, linear_decoder=True, key_added="fa", return_model=True, **options)
    stored = adata.varm["fa_loadings"]
    assert stored.shape == (30, 3)
    assert stored.dtype == np.float32
    assert np.isnan(stored[~adata.var["used"]]).all()
    np.testing.assert_array_equal(stored[adata.var["used"]], model.get_loadings())
    svt.tl.scvae(adata, dropout_rate={"input": 0.1, "latent": 0.2}, n_hidden=(9, 5), **options)
    assert set(adata.varm) == before | {"fa_loadings"}
    adata.write_h5ad(tmp_path / "cells.h5ad")
    read = anndata.read_h5ad(tmp_path / "cells.h5ad")
    np.testing.assert_array_equal(read.varm["fa_loadings"], stored)
    params = read.uns["scvae"]["params"]
    assert params["dropout_rate"] == {"input": 0.1, "latent": 0.2}
    assert list(params["n_hidden"]) == [9, 5]
    assert params["n_layers"] == 2


# -- dropout -----------------------------------------------------------------------------------------------------------


def test_one_rate_is_that_of_the_hidden_layers() -> None:
    assert dropout_rates(0.3) == {"hidden": 0.3, "input": 0.0, "latent": 0.0, "y": 0.0}
    assert dropout_rates({"y": 0.1, "input": 0.2}) == {"hidden": 0.0, "input": 0.2, "latent": 0.0, "y": 0.1}
    assert tuple(dropout_rates(0)) == DROPOUT_PARTS


@pytest.mark.parametrize(
    ("dropout_rate", "match"),
    [
        ({"z": 0.1}, r"rates of 'hidden', 'input', 'latent', 'y'; found 'z'"),
        ({"input": 1}, r"`dropout_rate\['input'\]` must be in \[0, 1\); found 1"),
        ({"latent": -0.1}, r"`dropout_rate\['latent'\]` must be in \[0, 1\); found -0.1"),
        ({"hidden": "0.1"}, r"`dropout_rate\['hidden'\]` must be in \[0, 1\); found '0.1'"),
        (1.5, r"`dropout_rate` must be in \[0, 1\); found 1.5"),
        (float("nan"), r"`dropout_rate` must be in \[0, 1\); found nan"),
    ],
)
def test_rates_that_are_none_are_refused_with_the_parts(dropout_rate, match) -> None:
    with pytest.raises(ValueError, match=match):
        VAE(SIZES, dropout_rate=dropout_rate)


@pytest.mark.parametrize("kind", [VAE, VaDE])
def test_dropout_of_y_needs_a_posterior_by_component(kind: type[VAE]) -> None:
    assert make(kind, dropout_rate={"y": 0}).dropout_rates["y"] == 0
    with pytest.raises(ValueError, match=r"only mixture='gmvae' has; found 0.2.*pass mixture='gmvae'"):
        make(kind, dropout_rate={"y": 0.2})


def masks(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What a layer of dropout returned at each call, in place."""
    seen, forward = [], module.forward
    monkeypatch.setattr(module, "forward", lambda value: seen.append(forward(value)) or seen[-1])
    return seen


@pytest.mark.parametrize("is_sparse", [True, False])
@pytest.mark.parametrize("linear_encoder", [True, False])
def test_dropout_of_the_input_is_that_of_the_dense_input(
    is_sparse: bool, linear_encoder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features and gradients of the weights, both sparse orders; cells of the CSR matrix list their genes unsorted."""
    monkeypatch.setattr(_networks, "LARGEST_SPARSE_DENSITY", 1.1 if is_sparse else 0.0)
    module = make(dropout_rate={"input": 0.4}, linear_encoder=linear_encoder).train()
    x, size, covariates = make_cells()
    matrix = sparse.csr_matrix(x.numpy())
    for start, end in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True):
        matrix.indices[start:end], matrix.data[start:end] = (
            matrix.indices[start:end][::-1],
            matrix.data[start:end][::-1],
        )
    matrix.has_sorted_indices = False
    factors = masks(module.encoder.input_dropout, monkeypatch)
    counts = counts_of_matrix(matrix)
    features = module.encode(counts, size, covariates)
    weighting = normal(*features.shape, seed=7)
    (features * weighting).sum().backward()
    found = {name: p.grad.clone() for name, p in module.encoder.named_parameters() if p.numel()}
    (factor,) = factors
    assert set(np.round(factor.tolist(), 12)) == {0.0, round(1 / 0.6, 12)}
    mask = np.zeros(matrix.shape)
    mask[np.repeat(np.arange(N_CELLS), np.diff(matrix.indptr)), matrix.indices] = factor.numpy()
    assert (mask[x.numpy() == 0] == 0).all()  # a zero times any mask is zero

    leaf = {name: torch.tensor(array(p), requires_grad=True) for name, p in module.encoder.named_parameters()}
    h = torch.tensor(log_inputs(x, size) * mask) @ leaf["gene_weight"] + leaf["layers.fc_layers.Layer 0.0.bias"]
    expected = h if linear_encoder else torch.relu(nn.functional.layer_norm(h, h.shape[1:]))
    np.testing.assert_allclose(array(features), array(expected), **EXACT)
    (expected * weighting).sum().backward()
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, leaf[name].grad, **EXACT, err_msg=name)


def test_dropout_of_the_latent_code_leaves_the_covariates(monkeypatch: pytest.MonkeyPatch) -> None:
    module, (_, size, covariates) = make(dropout_rate={"latent": 0.5}).train(), make_cells()
    dropped, z = masks(module.decoder.latent_dropout, monkeypatch), normal(4, N_CELLS, N_LATENT, seed=3)
    found = array(module.decoder(z, torch.zeros_like(size), covariates)["log_rate"])
    code, weights = dropped[0].numpy(), weights_of(module)
    assert set(np.round(np.unique(code / z.numpy()), 9)) == {0.0, 2.0}
    known = np.broadcast_to(columns(covariates), (4, N_CELLS, 7))
    h = hidden(np.concatenate([code, known], axis=-1), weights, "decoder.px_decoder")
    expected = h @ weights["decoder.heads.log_rate.weight"].T + weights["decoder.heads.log_rate.bias"]
    np.testing.assert_allclose(found, expected, **EXACT)


def test_dropout_of_y_drops_the_row_of_a_component(monkeypatch: pytest.MonkeyPatch) -> None:
    module, cells = make(GMVAE, dropout_rate={"y": 0.5}).train(), make_cells()
    factors, features = masks(module.y_dropout, monkeypatch), module.encode(*cells)
    posterior = module.posterior(features)
    (factor,), weights, h = factors, weights_of(module), array(features)
    assert factor.shape == (3, N_CELLS, 1)
    assert set(factor.flatten().tolist()) == {0.0, 2.0}
    for y in range(3):
        row = factor[y].numpy() * weights["y_embedding"][y]
        hidden_of_y = np.maximum(h @ weights["y_features.weight"].T + weights["y_features.bias"] + row, 0)
        expected = h @ weights["z_mean.weight"].T + weights["z_mean.bias"] + hidden_of_y @ weights["y_mean.weight"].T
        np.testing.assert_allclose(array(posterior.mean)[y], expected, **EXACT)


@pytest.mark.parametrize("part", DROPOUT_PARTS)
def test_each_part_drops_out_its_share_and_nothing_in_evaluation(part: str) -> None:
    """Five standard errors of a binomial share."""
    module = make(GMVAE, dropout_rate={part: 0.3})
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Dropout) and layer.p > 0}
    names = {"input": ["encoder.input_dropout"], "latent": ["decoder.latent_dropout"], "y": ["y_dropout"]}
    hidden_names = [f"{layers}.fc_layers.Layer 0.4" for layers in ("encoder.layers", "decoder.px_decoder")]
    assert sorted(layers) == sorted(names.get(part, hidden_names))
    for layer in layers.values():
        dropped = layer.train()(torch.ones(20_000)) == 0
        assert abs(dropped.double().mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 20_000)
    cells = make_cells()
    with seeded(0):
        module.train()
        trained = module.bound(*cells).elbo
    with seeded(0):
        module.drop_out(enable=False)
        off = module.bound(*cells).elbo
    with seeded(0):
        evaluated = module.eval().bound(*cells).elbo
    np.testing.assert_allclose(array(off), array(evaluated), **EXACT)
    assert not np.allclose(array(trained), array(off))
    module.drop_out(enable=True)
    assert [layer.p for layer in layers.values()] == [0.3] * len(layers)


def rates_by_epoch(model: svt.SCVAE, monkeypatch: pytest.MonkeyPatch, epochs: int) -> list[tuple[str, float]]:
    """Stage of each epoch, and the highest rate that acts in it."""
    seen, drop_out = [], VAE.drop_out

    def recorded(module: VAE, **options: bool) -> None:
        drop_out(module, **options)
        seen.append(max(layer.p for layer in module.modules() if isinstance(layer, nn.Dropout)))

    monkeypatch.setattr(VAE, "drop_out", recorded)
    n_before = 0 if model.history is None else len(model.history)
    model.train(epochs, batch_size=32, progress=False, accelerator="cpu", early_stopping=False)
    return list(zip(model.history["stage"].iloc[n_before:], seen, strict=True))


@pytest.mark.parametrize("part", DROPOUT_PARTS)
def test_every_part_drops_out_in_the_last_stage_alone(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = svt.SCVAE(make_registered(), n_components=2, n_hidden=4, n_latent=2, dropout_rate={part: 0.3})
    for stage, rate in rates_by_epoch(model, monkeypatch, 8):
        assert rate == (0.3 if stage == "mixture" else 0.0), stage


def test_dropout_that_scarches_froze_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = train(mixture=False, dropout_rate={"hidden": 0.2, "latent": 0.2})
    query = make_data(40, seed=1)
    query.obs["batch"] = pd.Categorical(["new"] * 40)
    mapped = svt.SCVAE.load_query_data(query, reference, freeze_dropout=True)
    assert {rate for _, rate in rates_by_epoch(mapped, monkeypatch, 2)} == {0.0}


# -- the decoder sees the size -----------------------------------------------------------------------------------------


def test_the_decoder_is_given_the_log_of_size_over_the_median() -> None:
    module, (x, size, covariates) = make(decode_size=True, use_size_factor=False), make_cells()
    module.reference_size.copy_(torch.linspace(1, 40, len(module.reference_size)).double())
    relative = np.log(size.numpy() / np.sort(module.reference_size.numpy())[(len(module.reference_size) - 1) // 2])
    z, weights = normal(N_CELLS, N_LATENT, seed=3), weights_of(module)
    known = columns(covariates)
    inputs = np.hstack([z.numpy(), known[:, :2], relative, known[:, 2:]])  # categories last, for scArches
    h = hidden(inputs, weights, "decoder.px_decoder")
    expected = h @ weights["decoder.heads.log_rate.weight"].T + weights["decoder.heads.log_rate.bias"]
    np.testing.assert_allclose(module.decode(z, size, covariates).params["log_rate"], expected, **EXACT)
    features = array(module.encode(x, size, covariates))  # the encoder is not given it
    assert weights["encoder.layers.fc_layers.Layer 0.0.weight"].shape == (5, 0)
    np.testing.assert_allclose(features, array(module.encode(x, size, module.with_size(covariates, size))), **EXACT)


@pytest.mark.parametrize("use_size_factor", [True, False])
@pytest.mark.parametrize("linear_decoder", [True, False])
def test_every_evaluation_sees_the_size_of_each_cell(use_size_factor: bool, linear_decoder: bool) -> None:
    """λ of each method against the decoder called with the size by hand; a cell's alone is that among others."""
    options = {"decode_size": True, "use_size_factor": use_size_factor, "linear_decoder": linear_decoder}
    model = train(mixture=False, **options)
    adata, module = model.adata, model.module
    size = torch.tensor(np.asarray(adata.X.sum(1)).reshape(-1, 1), dtype=torch.float32)
    relative = (size / module.reference_size.median()).log()
    covariates = Covariates(torch.tensor(adata.obs["batch"].cat.codes.to_numpy()[:, None].astype(int)))
    log_size = size.log() if use_size_factor else torch.zeros_like(size)

    def by_hand(relative: torch.Tensor) -> np.ndarray:
        z = torch.tensor(model.get_latent_representation())
        with torch.no_grad():
            log_rate = module.decoder(z, log_size, covariates._replace(relative_size=relative))["log_rate"]
        return log_rate.exp().numpy()

    found = model.get_lambda()
    np.testing.assert_allclose(found, by_hand(relative), **ROUNDED)
    assert np.abs(found / by_hand(torch.zeros_like(relative)) - 1).max() > 1e-3  # the size does matter
    np.testing.assert_allclose(model.get_lambda(adata[5:9].copy()), found[5:9], **ROUNDED)  # W10 of the original
    assert np.isfinite(model.get_marginal_ll(n_mc_samples=3))
    assert model.posterior_predictive_sample(n_samples=2).shape == (100, 30, 2)
    assert model.sample(20).n_obs == 20


def rank(model: svt.SCVAE) -> None:
    model.adata.obs["scvae"] = pd.Categorical(model.predict(), categories=model.components)
    svt.tl.rank_components(model.adata, model, n_samples=20)


AS_IF_OF_ONE_SIZE = {
    "rank_components": rank,
    "get_normalized_expression": lambda model: model.get_normalized_expression(n_samples=2),
    "differential_expression": lambda model: model.differential_expression(groupby="batch", silent=True),
    "get_feature_correlation_matrix": lambda model: model.get_feature_correlation_matrix(n_samples=2, silent=True),
}
AS_IF_BESIDE_COUNTS = [AS_IF_OF_ONE_SIZE[name] for name in ("rank_components", "differential_expression")]


@pytest.mark.parametrize("evaluate", AS_IF_OF_ONE_SIZE.values(), ids=AS_IF_OF_ONE_SIZE)
def test_expression_as_if_all_cells_had_one_size_is_that_at_the_typical_size(
    evaluate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = train(decode_size=True, epochs=6)
    seen, features = [], model.module.decoder.features
    monkeypatch.setattr(
        model.module.decoder, "features", lambda z, covariates: seen.append(covariates) or features(z, covariates)
    )
    evaluate(model)
    assert seen
    others = [each.relative_size for each in seen if not (each.relative_size == 0).all()]
    assert len(others) < len(seen)
    if evaluate not in AS_IF_BESIDE_COUNTS:
        assert not others
    # Beside the counts a cell has the size that it has.
    total = np.asarray(model.adata.X.sum(1)).ravel()
    known = np.log(total / float(model.module.reference_size.median()))
    for each in others:
        np.testing.assert_allclose(np.abs(each.numpy().ravel()[:, None] - known).min(1), 0, atol=1e-5)


def test_a_query_and_minified_data_see_the_size_as_the_reference_does(tmp_path) -> None:
    reference = train(decode_size=True, linear_decoder=False, mixture="vade")
    old = make_data()
    query = make_data(40, seed=1)
    query.obs["batch"] = pd.Categorical(["new"] * 40)
    mapped = svt.SCVAE.load_query_data(query, reference)
    assert torch.equal(mapped.module.reference_size, reference.module.reference_size)
    mapped.train(2, batch_size=20, progress=False, accelerator="cpu")
    np.testing.assert_allclose(mapped.get_lambda(old), reference.get_lambda(), **ROUNDED)
    before = reference.get_lambda()
    reference.minify_adata()
    np.testing.assert_allclose(reference.get_lambda(), before, **ROUNDED)


# -- scArches of other architectures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"linear_decoder": True, "likelihood": "zinb"},
        {"linear_decoder": True, "linear_encoder": True, "encode_covariates": True, "dispersion": "gene-batch"},
        {"n_hidden": (9, 6), "encode_covariates": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("n_batches", [1, 2])
def test_a_query_of_a_new_batch_trains_its_columns_alone(options: dict, n_batches: int) -> None:
    adata = svt.datasets.simulate(100, 30, 3, n_batches=n_batches, random_state=0)
    reference = train(adata, mixture="gmvae", **options)
    query = make_data(40, seed=1)
    query.obs["batch"] = pd.Categorical(["new"] * 40)
    mapped = svt.SCVAE.load_query_data(query, reference)
    old = svt.datasets.simulate(100, 30, 3, n_batches=n_batches, random_state=0)
    np.testing.assert_allclose(mapped.get_lambda(old), reference.get_lambda(), **ROUNDED)
    start = {name: value.clone() for name, value in mapped.module.state_dict().items()}
    mapped.train(3, batch_size=20, progress=False, accelerator="cpu")
    np.testing.assert_allclose(mapped.get_lambda(old), reference.get_lambda(), **ROUNDED)
    n_new = 1 if n_batches > 1 else 2
    changed = {name for name, value in mapped.module.state_dict().items() if not torch.equal(value, start[name])}
    changed -= {"log_temperature"}  # of the probabilities, by the query's own held-out cells
    heads = [f"decoder.heads.{name}.weight" for name in mapped.module.decoder.heads]
    firsts = heads if options.get("linear_decoder") else ["decoder.px_decoder.fc_layers.Layer 0.0.weight"]
    firsts = firsts + ["encoder.layers.fc_layers.Layer 0.0.weight"] * bool(options.get("encode_covariates"))
    assert changed == set(firsts)
    for name in firsts:
        value = mapped.module.state_dict()[name]
        assert torch.equal(value[:, :-n_new], start[name][:, :-n_new])
        assert not torch.equal(value[:, -n_new:], start[name][:, -n_new:])


# -- together ----------------------------------------------------------------------------------------------------------

#: As the original has them, beside what only the sizes change.
ORIGINAL = {
    "use_size_factor": False,
    "encoder_input": "counts",
    "dispersion": "gene-cell",
    "normalization": "batch",
    "decode_size": True,
    "dropout_rate": {"hidden": 0.1, "input": 0.1, "latent": 0.1},
    "n_hidden": (12, 8),
}
#: Without a norm raw counts are too large.
BOTH_LINEAR = {"linear_encoder": True, "linear_decoder": True, "encoder_input": "log1p"}
OF_MIXTURES = {"covariance": "diag", "weights": "uniform"}


@pytest.mark.parametrize("mixture", KINDS, ids=str)
@pytest.mark.parametrize("linear", [{}, {"linear_decoder": True}, BOTH_LINEAR], ids=len)
def test_the_settings_of_the_original_train_and_survive_saving(mixture, linear: dict, tmp_path) -> None:
    options = ORIGINAL | (OF_MIXTURES if mixture else {}) | linear
    if mixture == "gmvae":
        options["dropout_rate"] = options["dropout_rate"] | {"y": 0.1}
    model = train(mixture=mixture, epochs=5, **options)
    assert np.isfinite(model.history["elbo_train"]).all()
    log_likelihood = model.history["log_likelihood_train"]
    assert log_likelihood.max() > log_likelihood.iloc[0]
    model.save(tmp_path / "model")
    loaded = svt.SCVAE.load(tmp_path / "model", make_data(), accelerator="cpu")
    assert loaded.module.dropout_rates == model.module.dropout_rates
    assert loaded.get_elbo() == pytest.approx(model.get_elbo(), rel=1e-5)
    without_data = svt.SCVAE.load(tmp_path / "model", accelerator="cpu")
    np.testing.assert_allclose(without_data.get_lambda(make_data()), model.get_lambda(), **ROUNDED)
    loaded.train(1, batch_size=32, progress=False, accelerator="cpu")
