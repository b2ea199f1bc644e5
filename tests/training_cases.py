"""Small models whose training steps differ: a row each in `CASES`, which every test of a way to train runs on."""

from __future__ import annotations

import numpy as np
import pandas as pd

import scvae_tools as svt
from scvae_tools.likelihoods import LIKELIHOODS

N_CELLS, N_GENES, BATCH_SIZE = 110, 25, 32  # an epoch ends with a smaller step


def cells():
    adata = svt.datasets.simulate(N_CELLS, N_GENES, 3, n_batches=2, random_state=0)
    adata.obs["age"] = np.linspace(20, 80, N_CELLS)
    adata.obs["donor"] = pd.Categorical(np.where(np.arange(N_CELLS) % 3 == 0, "a", "b"))
    adata.obs["label"] = np.where(np.arange(N_CELLS) % 2 == 0, "unknown", adata.obs["component"].astype(str))
    return adata


def new_model(*, mixture=False, setup=(), **options):
    adata = cells()
    svt.SCVAE.setup_anndata(adata, **dict(setup))
    if mixture and "n_components" not in options:
        options["n_components"] = 3
    options = {"dropout_rate": 0.0, "n_latent": 3, "n_hidden": 8} | options
    return svt.SCVAE(adata, mixture=mixture, **options)


COVARIATES = {
    "batch_key": "batch",
    "size_factor_key": "size_factor",
    "categorical_covariate_keys": ["donor"],
    "continuous_covariate_keys": ["age"],
}
LABELS = {"labels_key": "label", "unlabeled_category": "unknown"}
#: What a step does differently. Whatever draws random numbers is as large in both ways.
CASES = {
    **{name: {"likelihood": name} for name in LIKELIHOODS},
    "gmvae": {"mixture": "gmvae"},
    "vade": {"mixture": "vade"},
    "k unknown": {"mixture": "gmvae", "n_components": None},
    "tied covariance": {"mixture": "gmvae", "covariance": "tied"},
    "covariates": {"setup": COVARIATES, "encode_covariates": True, "decode_size": True, "dispersion": "gene-batch"},
    "covariates of a mixture": {"mixture": "gmvae", "setup": COVARIATES, "dispersion": "gene-batch"},
    "dispersion of each cell": {"likelihood": "zinb", "dispersion": "gene-cell"},
    "small counts apart": {"likelihood": "nb", "k_max": 2},
    "labels": {"mixture": "gmvae", "setup": LABELS, "y_term": "cross-entropy"},
    "labels of VaDE": {"mixture": "vade", "setup": LABELS, "y_term": "cross-entropy"},
    "batch norm": {"normalization": "batch"},
    "linear networks": {"linear_encoder": True, "linear_decoder": True},
    "free nats": {"mixture": "gmvae", "training": {"free_nats_z": 0.5, "free_nats_y": 0.1}},
    "importance weights": {"training": {"n_importance_samples": 3}},
    "importance weights of a mixture": {"mixture": "gmvae", "training": {"n_importance_samples": 3}},
    "several draws": {"mixture": "vade", "training": {"n_samples": 2, "kl_weight": 0.5, "weight_decay": 1e-3}},
    "gradients that are clipped": {"training": {"gradient_clip": 0.1}},
    "no validation": {"training": {"train_size": 1.0}},
    "all epochs warm up": {"training": {"n_warm_up_epochs": 6}},
}
