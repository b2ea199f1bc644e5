"""Principal components of the counts, to which the latent means of a VAE are drawn while it warms up.

From random weights, a dimension that holds a small difference between cells grows slowly or not at all: at first its
gradient is that of the noise, and the KL term switches it off. Principal components find such a difference at once,
where it is above the noise. So they tell the encoder where to begin; the bound alone decides what is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import ArpackError, LinearOperator, svds
from scvi import REGISTRY_KEYS

if TYPE_CHECKING:
    from scvae_tools._data.loader import CountDataset

#: Name of the column of a batch with the principal codes of its cells.
PRINCIPAL_CODES = "principal_codes"
#: Largest number of cells of which the components are computed; the codes are those of all cells.
LARGEST_SAMPLE = 10_000
#: Residuals count as so many standard deviations at most: a few large counts are no direction.
LARGEST_RESIDUAL = 10.0
#: Sizes of cells between which the mean residual of a count of 0 is interpolated.
N_SIZES = 32
#: Quantile 0.95 of the distribution of Tracy and Widom for real matrices.
TRACY_WIDOM = 0.9793
#: Accuracy of the components, relative to the largest. They are a start, and need not be exact.
TOLERANCE = 1e-3


class PrincipalCodes(NamedTuple):
    """Principal components of cells, and which of them are above the noise."""

    codes: np.ndarray  #: (n_cells, n_latent) float32; 0 for dimensions without a component
    variances: np.ndarray  #: of the components in the sample, relative to the noise of one gene, descending
    n_used: int  #: number of components above the noise


def principal_codes(
    dataset: CountDataset, cells: np.ndarray, n_latent: int, *, use_size_factor: bool, random_state: int
) -> PrincipalCodes:
    """Codes of cells on the principal components of their Pearson residuals that are above the noise.

    The residual of a count is its distance from the mean of the gene at the size of the cell, in standard deviations of
    a negative binomial (Lause et al. 2021, doi:10.1186/s13059-021-02451-7); without size factors, from the mean of the
    gene. What covariates explain linearly is taken out. A component is used where its variance is above that of noise
    (`largest_of_noise`). Its codes have the variance of the means of q(z|x) in a linear VAE: 1 − noise / variance.

    Parameters
    ----------
    dataset
        Counts and covariates.
    cells
        Positions of the cells that are trained on; all others have the code 0.
    n_latent
        Number of latent dimensions.
    use_size_factor
        Whether means are proportional to the size factor.
    random_state
        Seed of the sample of cells and of the start of the algorithm. The global random state is not used.
    """
    rng = np.random.default_rng(random_state)
    sample = np.sort(rng.choice(cells, LARGEST_SAMPLE, replace=False)) if len(cells) > LARGEST_SAMPLE else cells
    residuals = _Residuals(dataset.counts[sample], _sizes(dataset, sample, use_size_factor=use_size_factor))
    design = _design(dataset, sample)
    codes = np.zeros((len(dataset), n_latent), dtype=np.float32)
    n, g = len(sample), residuals.n_genes
    n_components = min(n_latent, min(n, g) - 1)
    if n_components < 1:
        return PrincipalCodes(codes, np.zeros(0), 0)
    directions, singular = _components(residuals, design, n_components, rng)
    variances = singular**2 / n
    n_used = int((variances > largest_of_noise(n, g)).sum())
    if n_used:
        used = variances[:n_used]
        directions = directions[:, :n_used] * np.sqrt((1 - 1 / used) / used)
        projected = residuals.dot(directions)
        coefficient = np.linalg.pinv(design) @ projected
        codes[sample, :n_used] = projected - design @ coefficient
        others = np.setdiff1d(cells, sample)
        for start in range(0, len(others), LARGEST_SAMPLE):
            part = others[start : start + LARGEST_SAMPLE]
            own = residuals.of_other_cells(dataset.counts[part], _sizes(dataset, part, use_size_factor=use_size_factor))
            codes[part, :n_used] = own.dot(directions) - _design(dataset, part) @ coefficient
    return PrincipalCodes(codes, variances, n_used)


def largest_of_noise(n_cells: int, n_genes: int) -> float:
    """Variance that the first principal component of Gaussian noise exceeds once in twenty times.

    The largest eigenvalue is close to the noise edge, and has the distribution of Tracy and Widom (Johnstone 2001,
    doi:10.1214/aos/1009210544).
    """
    # The mean takes one degree of freedom.
    cells, genes = np.sqrt(max(n_cells - 2, 1)), np.sqrt(n_genes)
    scale = (cells + genes) * (1 / cells + 1 / genes) ** (1 / 3)
    return ((cells + genes) ** 2 + TRACY_WIDOM * scale) / n_cells


def _components(
    residuals: _Residuals, design: np.ndarray, n_components: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Directions (g, n_components) and singular values of residuals without what a design explains, largest first."""
    left, values, _ = np.linalg.svd(design, full_matrices=False)
    explained = left[:, values > 1e-6 * values[0]]

    def rest(columns: np.ndarray) -> np.ndarray:
        return columns - explained @ (explained.T @ columns)

    operator = LinearOperator(
        residuals.shape,
        dtype=np.float64,
        matvec=lambda v: rest(residuals.dot(v.ravel())),
        rmatvec=lambda v: residuals.transposed_dot(rest(v.ravel())),
    )
    start = rng.standard_normal(min(residuals.shape))
    try:
        _, singular, directions = svds(operator, k=n_components, tol=TOLERANCE, v0=start)
    except ArpackError:  # cells that do not differ, or directions that do not: there is none to begin with
        return np.zeros((residuals.shape[1], n_components)), np.zeros(n_components)
    order = np.argsort(-singular)
    return directions[order].T, singular[order]


class _Residuals:
    """Pearson residuals of counts (n, g) as a sparse matrix less one of low rank, so that zeros cost nothing.

    The residual of a count of 0 depends on the gene and on the size of the cell; between `N_SIZES` sizes it is
    interpolated.

    Parameters
    ----------
    counts
        Counts, (n, g).
    size
        Size factors, (n,); None where means do not depend on them.
    model
        Residuals of other cells, with whose rates and variances these are computed; None for their own.
    """

    def __init__(self, counts: sparse.csr_matrix, size: np.ndarray | None, model: _Residuals | None = None) -> None:
        counts = sparse.csr_matrix(counts, dtype=np.float64)
        self.shape, self.has_size = counts.shape, size is not None
        size = np.ones(counts.shape[0]) if size is None else size
        if model is None:
            self.rate = np.asarray(counts.sum(0)).ravel() / size.sum()
            self.n_genes = len(np.unique(counts.indices))  # that have any counts
            self.spread = self._spread(counts, size)
            self.knots = np.unique(np.quantile(np.log(size), np.linspace(0, 1, N_SIZES)))
        else:
            self.rate, self.n_genes, self.spread, self.knots = model.rate, model.n_genes, model.spread, model.knots
        self.weights = _interpolation(np.log(size), self.knots)  # (n, knots)
        self.of_zeros = self._mean_in_sd(np.exp(self.knots)[:, None], slice(None))  # (knots, g)
        row = np.repeat(np.arange(len(size)), np.diff(counts.indptr))
        gene, at = counts.indices, size[row]
        mean_in_sd = self._mean_in_sd(at, gene)
        sd = np.sqrt(self._variance(at, gene))
        residual = np.clip(counts.data / sd - mean_in_sd, -LARGEST_RESIDUAL, LARGEST_RESIDUAL)
        self.sparse = sparse.csr_matrix((residual + mean_in_sd, gene, counts.indptr), shape=counts.shape)

    def of_other_cells(self, counts: sparse.csr_matrix, size: np.ndarray | None) -> _Residuals:
        """Residuals of other cells from the same rates."""
        return _Residuals(counts, size, self)

    def dot(self, columns: np.ndarray) -> np.ndarray:
        return self.sparse @ columns - self.weights @ (self.of_zeros @ columns)

    def transposed_dot(self, columns: np.ndarray) -> np.ndarray:
        return self.sparse.T @ columns - self.of_zeros.T @ (self.weights.T @ columns)

    def _spread(self, counts: sparse.csr_matrix, size: np.ndarray) -> np.ndarray:
        """Inverse dispersion parameter 1/r of each gene by moments, or its variance where there are no sizes, (g,)."""
        square = np.asarray(counts.multiply(counts).sum(0)).ravel()
        if not self.has_size:
            return np.maximum(square / len(size) - self.rate**2, np.finfo(float).tiny)
        crossed = np.asarray(counts.T @ size).ravel() * self.rate
        of_mean = self.rate**2 * np.square(size).sum()
        above_poisson = square - 2 * crossed + of_mean - self.rate * size.sum()
        return np.maximum(above_poisson / np.maximum(of_mean, np.finfo(float).tiny), 0)

    def _variance(self, size: np.ndarray, gene: np.ndarray | slice) -> np.ndarray:
        if not self.has_size:
            return self.spread[gene] + 0 * size
        mean = size * self.rate[gene]
        return np.maximum(mean + self.spread[gene] * mean**2, np.finfo(float).tiny)

    def _mean_in_sd(self, size: np.ndarray, gene: np.ndarray | slice) -> np.ndarray:
        return size * self.rate[gene] / np.sqrt(self._variance(size, gene))


def _interpolation(values: np.ndarray, knots: np.ndarray) -> sparse.csr_matrix:
    """Weights (n, knots) of a linear interpolation; the nearest knot beyond the ends."""
    if len(knots) == 1:
        return sparse.csr_matrix(np.ones((len(values), 1)))
    upper = np.clip(np.searchsorted(knots, values), 1, len(knots) - 1)
    width = knots[upper] - knots[upper - 1]
    share = np.clip((values - knots[upper - 1]) / width, 0, 1)
    row = np.arange(len(values))
    parts = np.r_[1 - share, share], (np.r_[row, row], np.r_[upper - 1, upper])
    return sparse.csr_matrix(parts, shape=(len(values), len(knots)))


def _sizes(dataset: CountDataset, cells: np.ndarray, *, use_size_factor: bool) -> np.ndarray | None:
    """Size factors of cells, (n,); None where they are not used."""
    if not use_size_factor:
        return None
    keys = (REGISTRY_KEYS.SIZE_FACTOR_KEY, REGISTRY_KEYS.OBSERVED_LIB_SIZE)
    size = next(dataset.columns[key] for key in keys if key in dataset.columns)[cells].ravel().astype(np.float64)
    return np.maximum(size, np.finfo(np.float32).tiny)


def _design(dataset: CountDataset, cells: np.ndarray) -> np.ndarray:
    """Constant and covariates of cells, (n, n_columns): a column for each category, and the continuous ones."""
    columns = [np.ones((len(cells), 1))]
    for key in (REGISTRY_KEYS.BATCH_KEY, REGISTRY_KEYS.CAT_COVS_KEY):
        for code in dataset.columns[key].T if key in dataset.columns else ():
            n_categories = int(code.max()) + 1
            if n_categories > 1:
                columns.append(np.eye(n_categories)[code[cells]])
    if REGISTRY_KEYS.CONT_COVS_KEY in dataset.columns:
        values = dataset.columns[REGISTRY_KEYS.CONT_COVS_KEY].astype(np.float64)
        spread = values.std(0)
        columns.append((values[cells] - values.mean(0)) / np.where(spread > 0, spread, 1))
    return np.concatenate(columns, axis=1)
