"""Simulated cells from known components."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.special import log_softmax, logit

from scvae_tools._checks import check_numbers, checked, whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scvae_tools.likelihoods import Head, Likelihood

# Cells times genes drawn at once: 64 MB for each float32 tensor. Not smaller: glibc keeps arrays below 32 MB in its
# heap, and the sparse chunks between them keep the heap from shrinking. 20,000 × 27,998 counts took 7 GB of memory with
# tensors of 16 MB, and 1 GB with 64 MB.
CHUNK_ENTRIES = 2**24


@checked(n_components=whole())
def simulate(
    n_cells: int = 1000,
    n_genes: int = 500,
    n_components: int = 5,
    *,
    likelihood: str = "nb",
    proportions: Sequence[float] | None = None,
    separation: float = 1.0,
    share_changed: float = 0.2,
    gene_sd: float = 1.5,
    median_counts: float = 2000.0,
    size_factor_sd: float = 0.3,
    n_batches: int = 1,
    batch_effect: float = 0.2,
    dispersion: float = 2.0,
    dispersion_sd: float = 0.5,
    zero_inflation: float = 0.1,
    random_state: int = 0,
    gene_random_state: int | None = None,
) -> ad.AnnData:
    """Simulate the counts of cells from known components.

    With size factor s_c, component k and batch b of cell c,

        λ_cg = s_c softmax_g(component_log_mean_gk + batch_log_effect_gb),

    and the count x_cg is drawn from the likelihood with mean λ_cg before zero inflation. The component log means are
    ``gene_sd`` times a standard normal for each gene, plus ``separation`` times another for the genes that a component
    changes, normalised to shares.

    Cells are drawn in chunks, so memory grows with the non-zero counts and not with ``n_cells * n_genes``.
    ``gene_sd=2.3`` leaves about 93 % zeros for 27,998 genes with ``median_counts=4400``.

    Parameters
    ----------
    n_cells, n_genes, n_components
        Sizes; at least 1.
    likelihood
        Name of a likelihood, a key of ``scvae_tools.likelihoods.LIKELIHOODS``; not a density, which gives no counts.
    proportions
        Share of the cells in each component, of length ``n_components``; equal if None. Rounded to whole cells, not
        drawn at random.
    separation
        Standard deviation of the log-fold changes (natural logarithm) that tell the components apart.
    share_changed
        Expected share of the genes that each component changes, between 0 and 1.
    gene_sd
        Standard deviation of the log mean over the genes; the larger, the more zeros.
    median_counts
        Median size factor, in counts a cell before zero inflation.
    size_factor_sd
        Standard deviation of the log size factor over the cells.
    n_batches
        Number of equally large batches, independent of the components.
    batch_effect
        Standard deviation of the log effect that each batch but the first has on each gene.
    dispersion
        Median over the genes of the inverse dispersion r, for likelihoods that have one.
    dispersion_sd
        Standard deviation of log r over the genes.
    zero_inflation
        Probability of an excess zero, in [0, 1), for likelihoods with a gate.
    random_state
        Seed. Global random states are neither read nor changed.
    gene_random_state
        Seed of what belongs to the genes: means, components, batch effects and dispersions. None to draw them by
        ``random_state`` too. Calls that differ in ``n_cells`` and ``random_state`` alone then draw cells of the same
        populations, so that data larger than memory can be made in parts.

    Returns
    -------
    AnnData
        Of shape (n_cells, n_genes), with the fields

        - ``X``: counts, CSR float32
        - ``obs["component"]``, ``obs["batch"]``: categorical, ``"0"``, ``"1"``, ...
        - ``obs["size_factor"]``: s_c, in counts: λ of the cell sums to it over the genes
        - ``var["log_r"]``, ``var["gate"]``: where the likelihood has them, as any other head but the rate
        - ``varm["component_log_mean"]``: (n_genes, n_components), log of the share of the counts that is expected for
          each gene in each component, before batch effects and zero inflation
        - ``varm["batch_log_effect"]``: (n_genes, n_batches), 0 for the first batch
        - ``uns["simulate"]``: the arguments, without those that are None

    Raises
    ------
    ValueError
        If there is no likelihood of that name or it is a density, an argument is out of range, or a component would get
        no cell.

    Notes
    -----
    Split the cells by another seed: ``np.random.default_rng(random_state).permutation(n_cells)`` is what the components
    were shuffled by.

    Examples
    --------
    Two parts of one data set:

    >>> parts = [svt.datasets.simulate(500, gene_random_state=0, random_state=seed) for seed in (1, 2)]
    """
    # The arguments only, as long as nothing is assigned or imported before.
    arguments = {name: value for name, value in locals().items() if value is not None}
    from scvae_tools.likelihoods import get_likelihood

    law = get_likelihood(likelihood)
    if law.is_density:
        raise ValueError(
            f"`likelihood` must be one that counts can be drawn from; found {likelihood!r}, a density. Simulate with "
            "another, such as 'nb': a model of any likelihood can be trained on its counts."
        )
    _check_batches(n_batches, n_cells)
    arguments["proportions"] = _check_proportions(proportions, n_components)

    rng = np.random.default_rng(random_state)
    component = _assign_components(n_cells, arguments["proportions"], rng)
    batch = rng.permutation(n_cells) % n_batches
    size_factor = median_counts * np.exp(size_factor_sd * rng.standard_normal(n_cells))
    # Of two numbers, so that no draw is that of a cell under the same seed.
    gene_rng = rng if gene_random_state is None else np.random.default_rng([gene_random_state, 1])
    component_log_mean = _component_log_means(n_components, n_genes, gene_sd, separation, share_changed, gene_rng)
    # A first batch without effect keeps `component_log_mean` the truth where there is one batch only.
    batch_log_effect = batch_effect * gene_rng.standard_normal((n_batches, n_genes))
    batch_log_effect[0] = 0.0
    log_share = log_softmax(component_log_mean[:, None] + batch_log_effect, axis=-1)  # (K, n_batches, n_genes)
    log_r = math.log(dispersion) + dispersion_sd * gene_rng.standard_normal(n_genes)
    heads = _head_values(law.heads, n_genes, log_r=log_r, gate=logit(zero_inflation))

    profile = component * n_batches + batch
    counts = _draw(law, log_share.reshape(-1, n_genes), profile, np.log(size_factor), heads, rng)
    adata = _name(counts)
    adata.obs["component"] = _categorical(component, n_components)
    adata.obs["batch"] = _categorical(batch, n_batches)
    adata.obs["size_factor"] = size_factor
    for head, values in heads.items():
        adata.var[head] = values
    adata.varm["component_log_mean"] = component_log_mean.T.copy()
    adata.varm["batch_log_effect"] = batch_log_effect.T.copy()
    adata.uns["simulate"] = arguments
    return adata


@checked()
def mouse_brain_20k_like(n_cells: int = 20_000, *, random_state: int = 0) -> ad.AnnData:
    """Simulate counts as many and as sparse as those of ``mouse_brain_20k``: no real cell or gene is among them.

    Ten equally large components and negative binomial counts of 27,998 genes. At any number of cells 92.8 % of them are
    zeros (92.6 to 93.0 % over seeds), and the median cell has about 4,500 counts. Meant for measuring time and memory
    where the file cannot be downloaded; how well the components are told apart says nothing about the real cells. All
    20,000 cells take about a minute and 1.2 GB.

    Parameters
    ----------
    n_cells
        Number of cells; at least 10.
    random_state
        Seed. Global random states are neither read nor changed.

    Returns
    -------
    AnnData
        Of shape (n_cells, 27998), with the fields of ``simulate``, the true component of each cell,
        ``obs["component"]``, among them, and ``uns["source"]``, which is ``"simulated"``.

    Raises
    ------
    ValueError
        If ``n_cells`` is not an integer of at least 10 or ``random_state`` not one of at least 0.
    """
    adata = simulate(n_cells, 27_998, 10, gene_sd=2.15, median_counts=4500.0, random_state=random_state)
    adata.uns["source"] = "simulated"
    return adata


@checked()
def poisson_toy(n_cells: int = 2000, *, random_state: int = 0) -> ad.AnnData:
    """Simulate ten independent genes, gene j being Poisson with mean j + 1: no latent structure to find.

    Parameters
    ----------
    n_cells
        Number of cells; at least 1.
    random_state
        Seed. Global random states are neither read nor changed.

    Returns
    -------
    AnnData
        Of shape (n_cells, 10): ``X`` holds the counts, CSR float32, ``var["lambda"]`` their means 1, 2, ..., 10.

    Raises
    ------
    ValueError
        If ``n_cells`` is not an integer of at least 1 or ``random_state`` not one of at least 0.
    """
    adata = _poisson_mixture(n_cells, np.arange(1.0, 11.0)[None], random_state)
    adata.var["lambda"] = adata.varm.pop("lambda")[:, 0]
    del adata.obs["component"]
    return adata


@checked()
def poisson_mixture_toy(n_cells: int = 10_000, *, random_state: int = 0) -> ad.AnnData:
    """Simulate ten Poisson genes of cells from five equally large components.

    The means of a component are those of the one before it, moved on by two genes, and 1, 2, ..., 10 for the first. All
    components have 55 counts a cell on average, so that the total says nothing about the component.

    Parameters
    ----------
    n_cells
        Number of cells; at least 5.
    random_state
        Seed. Global random states are neither read nor changed.

    Returns
    -------
    AnnData
        Of shape (n_cells, 10): ``X`` holds the counts, CSR float32, ``obs["component"]`` the component of each cell,
        ``"0"`` to ``"4"``, and ``varm["lambda"]``, (10, 5), the mean of each gene in each component.

    Raises
    ------
    ValueError
        If ``n_cells`` is not an integer of at least 5 or ``random_state`` not one of at least 0.

    Notes
    -----
    Split the cells by another seed: ``np.random.default_rng(random_state).permutation(n_cells)`` is what the components
    were shuffled by, and the cells where it is below ``n_cells / 5`` are all those of the first one.
    """
    rates = np.stack([np.roll(np.arange(1.0, 11.0), 2 * component) for component in range(5)])
    return _poisson_mixture(n_cells, rates, random_state)


def _check_batches(n_batches: int, n_cells: int) -> None:
    if n_batches > n_cells:
        raise ValueError(
            f"Every batch needs a cell; found `n_batches={n_batches}` for `n_cells={n_cells}`. Ask for fewer batches "
            "or more cells."
        )


def _check_proportions(proportions: Sequence[float] | None, n_components: int) -> np.ndarray:
    """Proportions as an array (n_components,), equal ones for None."""
    if proportions is None:
        return np.full(n_components, 1 / n_components)
    shares = check_numbers("proportions", proportions)
    if shares.shape != (n_components,):
        raise ValueError(
            f"`proportions` must have `n_components={n_components}` entries; found an array of shape {shares.shape}. "
            "Pass one share for each component, or None for equal ones."
        )
    if not ((shares > 0).all() and math.isclose(shares.sum(), 1, abs_tol=1e-6)):
        raise ValueError(
            f"`proportions` must be positive and sum to 1; found {shares.tolist()} with sum {shares.sum():g}. "
            "Divide them by their sum and leave components without cells out."
        )
    return shares


def _assign_components(n_cells: int, proportions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Component of each cell, (n_cells,), in random order; their numbers are within one of the proportions."""
    # Each cell takes the component in whose stretch of the unit interval its midpoint lies.
    midpoints = (np.arange(n_cells) + 0.5) / n_cells
    component = np.searchsorted(np.cumsum(proportions)[:-1], midpoints)
    sizes = np.bincount(component, minlength=len(proportions))
    if not sizes.all():
        raise ValueError(
            f"Every component needs a cell; found component {sizes.argmin()} with none among `n_cells={n_cells}`, "
            f"proportion {proportions[sizes.argmin()]:g}. Ask for more cells, fewer components or a larger proportion."
        )
    return rng.permutation(component)


def _component_log_means(
    n_components: int,
    n_genes: int,
    gene_sd: float,
    separation: float,
    share_changed: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Log of the share of each gene in the counts of each component, (n_components, n_genes)."""
    shape = (n_components, n_genes)
    log_mean = gene_sd * rng.standard_normal(n_genes)
    log_fold_change = separation * rng.standard_normal(shape)
    changed = rng.random(shape) < share_changed
    return log_softmax(log_mean + changed * log_fold_change, axis=1)


def _head_values(heads: Sequence[Head], n_genes: int, **known: float | np.ndarray) -> dict[str, np.ndarray]:
    """Value for every gene, (n_genes,), of every head but the rate; its initial one where it is not ``known``."""
    return {
        head.name: np.broadcast_to(known.get(head.name, head.initial), (n_genes,)).astype(np.float64)
        for head in heads
        if head.name != "log_rate"
    }


def _poisson_mixture(n_cells: int, rates: np.ndarray, random_state: int) -> ad.AnnData:
    """Cells from equally large Poisson components with the rates (n_components, n_genes), in counts."""
    from scvae_tools.likelihoods import get_likelihood

    rng = np.random.default_rng(random_state)
    component = _assign_components(n_cells, _check_proportions(None, len(rates)), rng)
    adata = _name(_draw(get_likelihood("poisson"), np.log(rates), component, np.zeros(n_cells), {}, rng))
    adata.obs["component"] = _categorical(component, len(rates))
    adata.varm["lambda"] = rates.T.copy()
    return adata


def _draw(
    law: Likelihood,
    log_profiles: np.ndarray,
    profile: np.ndarray,
    log_size: np.ndarray,
    heads: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> sparse.csr_matrix:
    """Draw the counts, (n_cells, n_genes), a chunk of cells at a time so that no dense matrix of all cells exists.

    Parameters
    ----------
    law
        Likelihood to draw from.
    log_profiles
        Log of λ over the size factor, (n_profiles, n_genes).
    profile
        Row of ``log_profiles`` that each cell follows, (n_cells,).
    log_size
        Log size factor, (n_cells,).
    heads
        The other parameters, (n_genes,) each.
    rng
        Seeds the generator of torch, the only one that the likelihoods take.
    """
    import torch

    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    log_profiles, log_size = (torch.as_tensor(values, dtype=torch.float32) for values in (log_profiles, log_size))
    params = {name: torch.as_tensor(values, dtype=torch.float32) for name, values in heads.items()}
    chunk = max(1, CHUNK_ENTRIES // log_profiles.shape[1])
    blocks = []
    for start in range(0, len(profile), chunk):
        cells = slice(start, start + chunk)
        log_rate = log_profiles[profile[cells]] + log_size[cells, None]  # (chunk, n_genes)
        counts = law.sample({"log_rate": log_rate, **params}, generator)
        blocks.append(sparse.csr_matrix(counts.numpy()))
    return sparse.vstack(blocks, format="csr", dtype=np.float32)


def _name(counts: sparse.csr_matrix) -> ad.AnnData:
    """AnnData with the cells named cell0, cell1, ... and the genes gene0, gene1, ..."""
    n_cells, n_genes = counts.shape
    return ad.AnnData(
        counts,
        obs=pd.DataFrame(index=[f"cell{cell}" for cell in range(n_cells)]),
        var=pd.DataFrame(index=[f"gene{gene}" for gene in range(n_genes)]),
    )


def _categorical(codes: np.ndarray, n_categories: int) -> pd.Categorical:
    """Categories "0", "1", ... in numerical order, those without cells included."""
    return pd.Categorical.from_codes(codes, categories=[str(code) for code in range(n_categories)])
