"""Held-out ELBO and time by batch size and learning rate: the measurement behind the defaults of ``SCVAE.train``.

    python benchmarks/batch_size.py FILE.h5ad [--epochs 6]

A plain VAE, NB, with the same cells held out and the same epochs for all; without ``--epochs`` the default number.
"""

from __future__ import annotations

import argparse
import time
import warnings

import anndata

import scvae_tools as svt

SETTINGS = ((128, 1e-3), (128, 2e-3), (256, 1e-3), (256, 2e-3), (512, 1e-3), (512, 2e-3), (512, 4e-3))


def main() -> None:
    """Run and print a line for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--epochs", type=int)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    adata = anndata.read_h5ad(options.file)
    svt.SCVAE.setup_anndata(adata)
    for batch_size, lr in SETTINGS:
        model = svt.SCVAE(adata, mixture=False)
        start = time.perf_counter()
        model.train(options.epochs, batch_size=batch_size, lr=lr, progress=False)
        seconds = time.perf_counter() - start
        elbo = model.get_elbo(indices=model.validation_indices, n_samples=5)
        print(f"batch {batch_size}, lr {lr:g}: held-out ELBO {elbo:.1f}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
