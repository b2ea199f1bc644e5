"""Results of a trained model by slot and key, of its own cells or of others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.special import xlogy

from scvae_tools._version import __version__
from scvae_tools.tl._lambda_layer import among_all_genes
from scvae_tools.tl._models import keep_model

if TYPE_CHECKING:
    from anndata import AnnData

    from scvae_tools._keys import Keys
    from scvae_tools.model._scvae import SCVAE


#: Monte Carlo samples per cell for the ELBO that is stored: a validation set is small, so each cell gets more.
ELBO_SAMPLES = {"train": 1, "validation": 5}


def params_of(model: SCVAE) -> dict[str, Any]:
    """Arguments of the model, None for those that mean nothing to a plain VAE."""
    params = model.init_params_["non_kwargs"]
    return params if params["mixture"] else params | dict.fromkeys(("covariance", "weights", "n_components"))


def elbo_of(model: SCVAE) -> dict[str, dict[str, float]]:
    """Means of the bound and its terms over cells of the training and the validation, in nats per cell.

    They are the `SCVAE.evaluated_cells`.
    """
    return {
        subset: model.get_elbo_terms(indices=indices, n_samples=ELBO_SAMPLES[subset]).mean().to_dict()
        for subset, indices in model.evaluated_cells().items()
    }


def results_of(
    model: SCVAE, keys: Keys, params: dict, elbo: dict, adata: AnnData | None = None
) -> dict[str, dict[str, Any]]:
    """Results to write, all but λ, of the cells of the model or of others with its genes.

    The history has the model with it, by which other tools find it.
    """
    history = model.history.copy()
    history.index = history.index.astype(str)
    keep_model(history, model)
    # A path is none of what the results depend on, and AnnData writes none.
    params = {key: value for key, value in params.items() if value is not None and key not in ("adata", "checkpoint")}
    summary = {"params": params, "history": history, "elbo": elbo, "version": __version__}
    if adata is None and model.null_log_likelihood is not None:  # it is of the model's own cells
        summary["null_log_likelihood"] = model.null_log_likelihood
    results: dict[str, dict[str, Any]] = {
        "obs": {},
        "obsm": {keys.latent: model.get_latent_representation(adata)},
        "uns": {keys.uns: summary | {"kl_by_dimension": _kl_by_dimension(model, adata)}},
    }
    if model.is_mixture:
        probabilities = model.predict(adata, soft=True).to_numpy()
        component = probabilities.argmax(1)
        used, codes = np.unique(component, return_inverse=True)  # the model numbers them by size
        names = [model.components[c] for c in used]
        results["obs"][keys.component] = pd.Categorical.from_codes(codes, categories=names)
        results["obsm"][keys.probabilities] = probabilities
        results["uns"][keys.uns]["components"] = _summary_of_components(model, probabilities)
    return results


def _kl_by_dimension(model: SCVAE, adata: AnnData | None) -> np.ndarray:
    """Means over all cells, or over the `SCVAE.evaluated_cells` where these are fewer."""
    cells = None if adata is not None else np.sort(np.concatenate(list(model.evaluated_cells().values())))
    return model.get_kl_by_dimension(adata, indices=cells)


def loadings_of(model: SCVAE, keys: Keys, gene_places: np.ndarray | None, n_genes: int) -> dict[str, np.ndarray]:
    """Loadings of all genes by key; none where log λ is not linear in z. Arguments as in `write_rate`."""
    if not (model.module.decoder.is_linear and model.module.likelihood.rate_is_head):
        return {}
    loadings = model.get_loadings().to_numpy()
    if gene_places is not None:
        loadings = among_all_genes(loadings.T, gene_places, n_genes).T.copy()
    return {keys.loadings: loadings}


def _summary_of_components(model: SCVAE, probabilities: np.ndarray) -> dict[str, Any]:
    """Summary of the components: their number, used and effective, temperature, prior, how they were found."""
    share = probabilities.mean(0, dtype=np.float64)
    summary = {
        "n_components": len(share),
        "n_used": len(np.unique(probabilities.argmax(1))),
        "n_effective": float(np.exp(-xlogy(share, share).sum())),
        "temperature": model.temperature,
    } | model.get_prior()
    curve, p_values = model.component_curve_, model.valley_p_values_
    if curve is not None:
        summary["curve"] = curve.set_index(curve.index.astype(str))  # h5ad wants names
    return summary if p_values is None else summary | {"valley_p_values": p_values}
