"""How far two populations that differ in a few genes are apart in the latent space, by the start of the VAE.

    python benchmarks/small_differences.py [--seeds 0 1 2]

1,000 simulated cells of two populations (500 genes, `_split_data.py`), a VAE with the defaults of `svt.tl.scvae` but no
mixture and no dropout, trained without and with ``pca_start``. "apart": distance of the two means, in
standard deviations within, on the linear discriminant of the true populations, each cell by that of the other cells
(five folds). "gain": best validation ELBO over the log-likelihood without latent variables, in nats per cell.
"""

from __future__ import annotations

import argparse
import time
import warnings

import _split_data as data
import numpy as np
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from splits import oracle

import scvae_tools as svt

DIFFERENCES = [data.Difference(20, 2.5, 0.05), data.Difference(10, 2.5, 0.5), data.Difference(50, 2.5, 0.05)]


def apart(latent: np.ndarray, is_second: np.ndarray, seed: int) -> float:
    """Distance of two populations in standard deviations."""
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    discriminant = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    score = cross_val_predict(discriminant, latent, is_second, cv=folds, method="decision_function")
    first, second = score[~is_second], score[is_second]
    within = np.sqrt((len(first) * first.var() + len(second) * second.var()) / len(score))
    return float(abs(second.mean() - first.mean()) / within)


def main() -> None:
    """Train, and print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for seed in options.seeds:
        for difference in DIFFERENCES:
            rng = np.random.default_rng([seed, 100 + data.DIFFERENCES.index(difference)])
            x, is_second, genes = data.two_populations(difference, rng)
            adata = data.as_adata(x, is_second)
            svt.SCVAE.setup_anndata(adata)
            print(f"seed {seed}  {difference}  ARI of an oracle {oracle(x, is_second, genes):.2f}")
            for pca_start in (False, True):
                model = svt.SCVAE(adata, likelihood="nb", mixture=False, dropout_rate=0.0, random_state=seed)
                start = time.perf_counter()
                model.train(280, pca_start=pca_start, random_state=seed, progress=False)
                seconds = time.perf_counter() - start
                cells = model.train_indices
                distance = apart(model.get_latent_representation(indices=cells), is_second[cells], seed)
                gain = model.history["elbo_validation"].max() - model.null_log_likelihood["validation"]
                print(
                    f"    pca_start={pca_start!s:5}  apart {distance:.2f}  gain {gain:6.2f}  "
                    f"{len(model.history)} epochs  {seconds:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
