"""Experiments of a reviewed report: on synthetic counts here, on real ones in ``report_data.py``.

    python benchmarks/report.py [NAME ...] [--quick] [--json FILE]

``EXPERIMENTS`` has them by name; without a NAME all are run. Each prints markdown tables, and above each a sentence
that says of what data and how. Bounds are in nats per cell; higher is better. docs/report.md says what they mean.

toy: a plain VAE of ten independent Poisson genes, trained as in the report and otherwise, beside the best possible
log-likelihood. stability: how large λ becomes in deep Poisson models, whether the product of probabilities would be 0,
and whether our bound is finite. mixture-toy: a Gaussian-mixture VAE of cells of one population, labelled by k-means,
and of cells from five components, with three terms for q(y|x). backward: a step of the same model with one backward
pass, and with one for each component (``retain_graph``).

``--quick`` takes fewer cells, epochs and seeds: about 20 seconds each of the three on one core.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from report_data import EXPERIMENTS as DATA_EXPERIMENTS
from scipy import stats
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, confusion_matrix

import scvae_tools as svt
from scvae_tools.likelihoods import get_likelihood

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from anndata import AnnData

Tables = list[tuple[str, pd.DataFrame]]

#: The report's toys. λ = exp(f): the total of a cell is part of the noise.
TOY = {"likelihood": "poisson", "n_latent": 3, "dropout_rate": 0.0, "use_size_factor": False}
N_SAMPLES = 10


def trained(adata: AnnData, model: dict, training: dict, labels_key: str | None = None) -> svt.SCVAE:
    """Train on all cells, so that the last weights are kept, as in the report; none are held out to choose others."""
    svt.SCVAE.setup_anndata(adata, labels_key=labels_key)
    vae = svt.SCVAE(adata, **model)
    vae.train(train_size=1.0, progress=False, **training)
    return vae


# -- toy ---------------------------------------------------------------------------------------------------------------

REPORTED_NET = TOY | {"n_hidden": 7, "posterior_variance": "shared", "mixture": False}
#: Arguments of the model and of the training.
TOY_SETTINGS = {
    "the report's: lr 0.1, weight decay 0.05": (REPORTED_NET, {"lr": 0.1, "weight_decay": 0.05}),
    "lr 0.1": (REPORTED_NET, {"lr": 0.1}),
    "lr 0.001, weight decay 0.05": (REPORTED_NET, {"lr": 1e-3, "weight_decay": 0.05}),
    "lr 0.001": (REPORTED_NET, {"lr": 1e-3}),
    "our defaults without size factor": ({"likelihood": "poisson", "mixture": False, "use_size_factor": False}, {}),
    "our defaults, λ = total · exp(f)": ({"likelihood": "poisson", "mixture": False}, {}),
}


def toy(quick: bool = False) -> Tables:  # noqa: FBT001, FBT002
    """Report 3.2: the λ of ten independent Poisson genes."""
    n_cells, max_epochs, seeds = (1_000, 30, (0,)) if quick else (2_000, 150, (0, 1))
    adata = svt.datasets.poisson_toy(n_cells)
    rows = [measure_toy(adata, name, seed, max_epochs) for name in TOY_SETTINGS for seed in seeds]
    means = pd.DataFrame(rows).groupby("setting", sort=False).mean().reset_index()
    about = (
        f"{n_cells:,} cells × 10 independent Poisson genes, λ = 1, ..., 10. Plain VAE, {max_epochs} epochs on all "
        f"cells, mean over {len(seeds)} seed(s). First what no training beats but by learning noise: the true λ, and "
        "one λ for all cells, its best value being the mean count. In the last two rows the total of a cell is known."
    )
    return [(about, pd.concat([pd.DataFrame(best_of_toy(adata)), means], ignore_index=True))]


def best_of_toy(adata: AnnData) -> Iterator[dict[str, object]]:
    """Log-likelihoods that need no model, by SciPy; with the total of a cell known, and without."""
    x, rate = adata.X.toarray(), adata.var["lambda"].to_numpy()
    mean, total = x.mean(0, dtype=np.float64), x.sum(1, keepdims=True, dtype=np.float64)
    known = {"true λ": rate, "mean counts": mean, "true shares · total": total * rate / rate.sum()}
    for name, of_cells in known.items():
        log_likelihood = stats.poisson.logpmf(x, of_cells).sum(1).mean()
        yield {"setting": name, "ELBO": log_likelihood, "log-likelihood": log_likelihood, "KL": 0.0} | errors_of(
            np.broadcast_to(of_cells, x.shape), rate
        )


def measure_toy(adata: AnnData, name: str, seed: int, max_epochs: int) -> dict[str, object]:
    model, training = TOY_SETTINGS[name]
    vae = trained(adata, model | {"random_state": seed}, training | {"max_epochs": max_epochs, "random_state": seed})
    terms = vae.get_elbo_terms(n_samples=N_SAMPLES).mean()
    scores = {"ELBO": terms["elbo"], "log-likelihood": terms["log_likelihood"], "KL": terms["kl_z"]}
    return {"setting": name} | scores | errors_of(np.asarray(vae.get_lambda()), adata.var["lambda"].to_numpy())


def errors_of(rate: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """How far λ, (n_cells, n_genes), is from the true one, (n_genes,)."""
    mean = rate.mean(0, dtype=np.float64)
    return {
        "error of λ, % (mean over cells)": 100 * float(np.abs(mean / true - 1).mean()),
        "error of λ, % (of each cell)": 100 * float(np.abs(rate / true - 1).mean()),
        "λ of gene 10": float(mean[-1]),
    }


# -- stability ---------------------------------------------------------------------------------------------------------

DEEP = {"mixture": False, "n_layers": 4}
#: Arguments of the model and of the training.
DEEP_SETTINGS = {
    "our defaults": ({}, {}),
    "the report's": (
        {"n_hidden": 100, "normalization": "batch", "posterior_variance": "shared", "use_size_factor": False}
        | {"dropout_rate": 0.0},
        {"lr": 1e-4, "weight_decay": 5e-2},
    ),
}
#: x and log λ at which products of probabilities and sums of their logarithms part.
EXTREMES = [(0, np.log(50)), (0, np.log(400)), (1, np.log(400)), (1, -110.0)]
EXCESS_ZEROS = 0.93  # the sparsity, by which the report estimates ρ


def stability(quick: bool = False) -> Tables:  # noqa: FBT001, FBT002
    """Report 3.3.1: large λ in a deep Poisson model."""
    n_cells, n_genes, max_epochs = (500, 1_000, 10) if quick else (1_000, 4_000, 30)
    adata = svt.datasets.simulate(n_cells, n_genes, 5, gene_sd=3.0, median_counts=20_000.0)
    rows = [
        measure_deep(adata, likelihood, name, max_epochs) for likelihood in ("poisson", "zip") for name in DEEP_SETTINGS
    ]
    share = 100 * (1 - adata.X.nnz / np.prod(adata.shape))
    about = (
        f"Simulated counts, {n_cells:,} cells × {n_genes:,} genes, {share:.0f} % zeros, median total "
        f"{np.median(np.asarray(adata.X.sum(1))):,.0f}, largest count {adata.X.max():,.0f}. Four hidden layers, "
        f"{max_epochs} epochs. B: sum of λ over a cell's zeros, mean over cells; e^−B and e^−λ in float32."
    )
    formulas = (
        "log p(x) in float32. Products: log of e^−λ λ^x / x!, and of ρ + (1 − ρ) e^−λ or (1 − ρ) e^−λ λ^x / x! with "
        f"ρ = {EXCESS_ZEROS}. Ours: sums of logarithms. Exact: SciPy in float64."
    )
    return [(about, pd.DataFrame(rows)), (formulas, pd.DataFrame([formulas_at(*at) for at in EXTREMES]))]


def measure_deep(adata: AnnData, likelihood: str, name: str, max_epochs: int) -> dict[str, object]:
    model, training = DEEP_SETTINGS[name]
    svt.SCVAE.setup_anndata(adata)
    vae = svt.SCVAE(adata, likelihood=likelihood, **DEEP, **model)
    vae.train(max_epochs, early_stopping=False, record_rates=True, progress=False, **training)
    history = vae.history
    at_zeros, largest = history["rate_at_zeros"].to_numpy(np.float32), history["max_rate"].to_numpy(np.float32)
    log_likelihood = history[["log_likelihood_train", "log_likelihood_validation"]].to_numpy()
    return {
        "likelihood": likelihood,
        "training": name,
        "B, first and last epoch": f"{at_zeros[0]:,.0f}, {at_zeros[-1]:,.0f}",
        "largest λ": f"{largest[0]:,.0f}, {largest[-1]:,.0f}",
        "epochs with e^−B = 0, %": 100 * float((np.exp(-at_zeros) == 0).mean()),
        "epochs with e^−λ = 0, %": 100 * float((np.exp(-largest) == 0).mean()),
        "epochs with finite log-likelihood, %": 100 * float(np.isfinite(log_likelihood).all(1).mean()),
        "held-out ELBO": vae.get_elbo(indices=vae.validation_indices, n_samples=N_SAMPLES),
    }


def formulas_at(x: int, log_rate: float) -> dict[str, object]:
    """Log p(x) of one count by multiplying in float32, by torch, by us, and as it is."""
    count, log_rate_32 = torch.tensor(float(x)), torch.tensor(log_rate, dtype=torch.float32)
    rate = log_rate_32.exp()
    product = (-rate).exp() * rate.pow(count) / (count + 1).lgamma().exp()
    inflated = (1 - EXCESS_ZEROS) * product + (EXCESS_ZEROS if x == 0 else 0.0)
    gate = torch.tensor(np.log(EXCESS_ZEROS / (1 - EXCESS_ZEROS)), dtype=torch.float32)
    exact = x * log_rate - np.exp(log_rate) - float(torch.lgamma(count.double() + 1))
    exact_inflated = np.log1p(-EXCESS_ZEROS) + exact
    if x == 0:
        exact_inflated = np.logaddexp(np.log(EXCESS_ZEROS), exact_inflated)
    return {
        "x": x,
        "log λ": log_rate,
        "Poisson, product": float(product.log()),
        "torch's Poisson(λ)": float(torch.distributions.Poisson(rate, validate_args=False).log_prob(count)),
        "ours": float(get_likelihood("poisson").log_prob(count, {"log_rate": log_rate_32})),
        "exact": exact,
        "ZIP, product": float(inflated.log()),
        "ours, ZIP": float(get_likelihood("zip").log_prob(count, {"log_rate": log_rate_32, "gate": gate})),
        "exact, ZIP": exact_inflated,
    }


# -- mixture toy -------------------------------------------------------------------------------------------------------

N_COMPONENTS = 5
#: The encoder sees the totals too: the labels of k-means depend on them.
MIXTURE = TOY | {"n_hidden": 16, "encoder_input": "log1p"}
Y_TERMS = {"kl": None, "none": None, "cross-entropy": "label"}


def mixture_toy(quick: bool = False) -> Tables:  # noqa: FBT001, FBT002
    """Report 3.4.2: a Gaussian mixture where there is one population, and where there are five."""
    n_cells, max_epochs, lr = (2_000, 40, 3e-3) if quick else (10_000, 40, 2e-3)
    sets = toy_sets(n_cells)
    # Another seed than that of the data, whose first random numbers say which cell is of which component.
    is_test = np.random.default_rng(1).permutation(n_cells) < n_cells // 5
    about_labels = (
        f"{n_cells:,} cells × 10 Poisson genes, five labels. Halves: Rand index of k-means fitted to one half of the "
        "cells and to the other, on all. Linear: held-out accuracy of logistic regression on the counts."
    )
    about = (
        f"The same cells; {is_test.sum():,} of them held out, of which all scores are. GMVAE with five components, "
        f'{max_epochs} epochs. Accuracy: with "cross-entropy", for which the labels of the training cells are known, '
        "by name, else after matching one to one. In use: exp of the entropy of the mean q(y|x)."
    )
    labels = [{"cells": name} | describe_labels(adata, is_test) for name, adata in sets.items()]
    rows = [
        {"cells": name} | measure_mixture(adata, is_test, y_term, {"max_epochs": max_epochs, "lr": lr})
        for name, adata in sets.items()
        for y_term in (None, *Y_TERMS)
    ]
    return [(about_labels, pd.DataFrame(labels)), (about, pd.DataFrame(rows))]


def toy_sets(n_cells: int) -> dict[str, AnnData]:
    """One population with the labels of k-means, and five components with their own, in ``obs["label"]``."""
    one, mixed = svt.datasets.poisson_toy(n_cells), svt.datasets.poisson_mixture_toy(n_cells)
    one.obs["label"] = pd.Categorical(k_means(one.X.toarray()).labels_.astype(str))
    mixed.obs["label"] = mixed.obs["component"]
    return {"one population, k-means": one, "five components": mixed}


def k_means(counts: np.ndarray) -> KMeans:
    return KMeans(N_COMPONENTS, n_init=3, random_state=0).fit(counts)


def describe_labels(adata: AnnData, is_test: np.ndarray) -> dict[str, float]:
    """Whether the labels are there without k-means, and whether they can be learnt."""
    counts, label = adata.X.toarray(), adata.obs["label"].to_numpy().astype(str)
    halves = [k_means(counts[start::2]).predict(counts) for start in (0, 1)]
    linear = LogisticRegression(max_iter=1_000).fit(counts[~is_test], label[~is_test])
    return {
        "halves, ARI": adjusted_rand_score(*halves),
        "k-means and labels, ARI": adjusted_rand_score(label, k_means(counts).labels_),
        "linear": linear.score(counts[is_test], label[is_test]),
    }


def measure_mixture(adata: AnnData, is_test: np.ndarray, y_term: str | None, training: dict) -> dict[str, object]:
    """A plain VAE for ``y_term`` None, else the GMVAE."""
    train, test = adata[~is_test].copy(), adata[is_test].copy()
    kind = {"mixture": False} if y_term is None else {"n_components": N_COMPONENTS, "y_term": y_term}
    start = time.perf_counter()
    vae = trained(train, MIXTURE | kind, training, Y_TERMS.get(y_term))
    seconds = (time.perf_counter() - start) / len(vae.history)
    terms = vae.get_elbo_terms(test, n_samples=N_SAMPLES).mean()
    row = {"model": "VAE (k = 1)" if y_term is None else f"GMVAE, y_term={y_term!r}", "ELBO": terms["elbo"]}
    row |= {"log-likelihood": terms["log_likelihood"], "KL z": terms["kl_z"], "KL y": terms["kl_y"]}
    row |= {} if y_term is None else agreement(vae, test, by_name=y_term == "cross-entropy")
    return row | {"seconds an epoch": seconds}


def agreement(vae: svt.SCVAE, test: AnnData, *, by_name: bool) -> dict[str, float]:
    label, component = test.obs["label"].to_numpy().astype(str), vae.predict(test)
    share = vae.predict(test, soft=True).to_numpy().mean(0, dtype=np.float64)
    return {
        "ARI": adjusted_rand_score(label, component),
        "accuracy": float((label == component).mean()) if by_name else matched_accuracy(label, component),
        "in use": float(np.exp(stats.entropy(share))),
    }


def matched_accuracy(label: np.ndarray, component: np.ndarray) -> float:
    """Share of the cells on the diagonal when components and labels are matched so that it is largest."""
    table = confusion_matrix(label, component)
    return float(table[linear_sum_assignment(-table)].sum() / len(label))


# -- backward ----------------------------------------------------------------------------------------------------------


def backward(quick: bool = False) -> Tables:  # noqa: FBT001, FBT002
    """Report 3.4.2: what the second and later backward passes through one graph cost."""
    n_turns, batch_size = (20, 128) if quick else (300, 128)
    adata = svt.datasets.poisson_mixture_toy(2_000)
    vae = trained(adata, TOY | {"n_components": 5}, {"max_epochs": 2})
    batch = next(iter(vae._make_data_loader(adata, batch_size=batch_size)))
    cells, module = vae.module.data(batch), vae.module.train()
    gradients, times = {}, {name: [] for name in BACKWARDS}
    for turn in range(n_turns):
        for name, step in BACKWARDS.items():
            module.zero_grad()
            torch.manual_seed(turn)
            start = time.perf_counter()
            step(module, cells)
            times[name].append(1e3 * (time.perf_counter() - start))
            gradients[name] = module.z_mean.weight.grad.clone()
    one, many = gradients.values()
    difference = float((one - many).abs().max() / one.abs().max())
    rows = [{"backward passes": name, "ms a step, median": float(np.median(each))} for name, each in times.items()]
    about = (
        f"GMVAE of five components, {batch_size} cells × 10 genes, forward and backward, dense, {n_turns} turns each "
        f"in alternation. Largest difference between the two in a gradient, relative to the largest: {difference:.0e}."
    )
    return [(about, pd.DataFrame(rows))]


def backward_once(module: torch.nn.Module, cells: tuple) -> None:
    """As the training does it."""
    sum(terms_of_components(module, cells)).backward()


def backward_each(module: torch.nn.Module, cells: tuple) -> None:
    """The loss of one component after the other, through the encoder that they share."""
    terms = terms_of_components(module, cells)
    for term in terms[:-1]:
        term.backward(retain_graph=True)
    terms[-1].backward()


BACKWARDS: dict[str, Callable] = {"one": backward_once, "one per component, retain_graph": backward_each}


def terms_of_components(module: torch.nn.Module, cells: tuple) -> list[torch.Tensor]:
    """−q(y|x) [log p(x|z) − KL(q(z|x,y) ‖ p(z|y)) − log q(y|x)/p(y)], the mean over cells, for each y."""
    x, size, covariates = cells
    posterior = module.posterior(module.encode(x, size, covariates))
    params = module.decoder(posterior.sample_each(1)[0], module.log_size(size), covariates)
    log_likelihood = module.likelihood.log_prob(x.dense(), params).sum(-1)  # (k, n)
    kl_z = module.prior.kl(posterior.mean, posterior.log_var)
    ratio = (posterior.log_q_y - module.prior.log_weights()).T
    return list((-posterior.q_y.T * (log_likelihood - kl_z - ratio)).mean(1))


# -- the command -------------------------------------------------------------------------------------------------------

EXPERIMENTS: dict[str, Callable[..., Tables]] = {
    "toy": toy,
    "stability": stability,
    "mixture-toy": mixture_toy,
    "backward": backward,
    **DATA_EXPERIMENTS,
}


def as_markdown(table: pd.DataFrame) -> str:
    """Table with numbers of at most three digits after the point; nothing where there is no value."""
    lines = [list(map(str, table.columns)), ["---"] * table.shape[1]]
    lines += [[cell(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: object) -> str:
    if not isinstance(value, float | np.floating):
        return str(value)
    return "" if np.isnan(value) else f"{value:,.3f}".rstrip("0").rstrip(".") if abs(value) < 100 else f"{value:,.1f}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--quick", action="store_true", help="fewer cells, epochs and seeds")
    parser.add_argument("--json", type=Path, help="file to write, after each experiment anew")
    options = parser.parse_args()
    unknown = set(options.names) - set(EXPERIMENTS)
    if unknown:
        parser.error(f"NAME must be one of {', '.join(EXPERIMENTS)}; found {', '.join(sorted(unknown))}")
    return options


def main() -> None:
    """Run, print the tables and write the file."""
    options = parse()
    warnings.simplefilter("ignore")
    written = {}
    for name in options.names or EXPERIMENTS:
        start = time.perf_counter()
        tables = EXPERIMENTS[name](options.quick)
        print(f"\n## {name} ({time.perf_counter() - start:.0f} s)", flush=True)
        for about, table in tables:
            print(f"\n{about}\n\n{as_markdown(table)}", flush=True)
        written[name] = [
            {"about": about, "rows": json.loads(table.to_json(orient="records"))} for about, table in tables
        ]
        if options.json is not None:
            options.json.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
