"""What the mixture may start from: Leiden at several resolutions, and the spread of the starts of the tied mixture.

    python benchmarks/starts.py FILE.h5ad --n-components 8 [--labels cell_type] [--seeds 0 1] [--max-epochs 84]

For the latent space of a VAE per seed: the number of communities by resolution, with the ARI of the mixture that has as
many components; then, at the given number of components, the ARI of single starts and of the likeliest of many.
"""

from __future__ import annotations

import argparse
import warnings

import anndata
import numpy as np
from scipy.stats import multivariate_normal
from sklearn.metrics import adjusted_rand_score

import scvae_tools as svt
from scvae_tools import _start


def components(latent: np.ndarray, start: _start.MixtureStart) -> tuple[np.ndarray, float]:
    """Most probable component of each cell, and the mean log-likelihood of the mixture."""
    log_joint = np.stack(
        [np.log(w) + multivariate_normal(m, start.covariance).logpdf(latent) for w, m in zip(*start[:2], strict=True)]
    )
    return log_joint.argmax(0), float(np.logaddexp.reduce(log_joint).mean())


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--n-components", type=int, required=True)
    parser.add_argument("--labels", default="cell_type")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--max-epochs", type=int, default=84)
    parser.add_argument("--n-starts", type=int, default=100)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for seed in options.seeds:
        adata = anndata.read_h5ad(options.file)
        known = ~adata.obs[options.labels].astype(str).isin(["NA", "ambiguous", "unknown"]).to_numpy()
        labels = adata.obs.loc[known, options.labels]
        svt.SCVAE.setup_anndata(adata)
        model = svt.SCVAE(adata, mixture=False, random_state=seed)
        model.train(options.max_epochs, random_state=seed, progress=False)
        latent = model.get_latent_representation().astype(np.float64)

        def agreement(found: np.ndarray, labels=labels, known=known) -> float:
            return adjusted_rand_score(labels, found[known])

        for resolution in (0.25, 0.5, 1.0):
            _start.RESOLUTION = resolution
            k = _start.count_communities(latent, random_state=seed)
            found, _ = components(latent, _start.fit_mixture(latent, k, random_state=seed))
            print(f"seed {seed}: resolution {resolution}: {k} communities, ARI of the mixture {agreement(found):.3f}")
        singles = []
        for start in range(options.n_starts):
            fitted = _start.fit_mixture(latent, options.n_components, random_state=start, n_starts=1)
            found, likelihood = components(latent, fitted)
            singles.append((likelihood, agreement(found)))
        likelihoods, aris = np.array(singles).T
        best = likelihoods > likelihoods.max() - 1e-3
        print(
            f"seed {seed}: k = {options.n_components}: single starts ARI {aris.mean():.3f} ({aris.min():.3f} to "
            f"{aris.max():.3f}); {best.sum()} of {len(best)} reach the best likelihood, ARI {aris[best].mean():.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
