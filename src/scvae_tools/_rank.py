"""After clustering: the genes that mark each component and how alike components are, by the model; for scanpy to read.

`scvae_tools.tl` exports both functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvae_tools._adata import write_uns
from scvae_tools._arguments import check_at_least, require_model, require_writable
from scvae_tools._keys import Keys

if TYPE_CHECKING:
    from anndata import AnnData
    from torch import Tensor

    from scvae_tools._gmvae import GaussianMixture
    from scvae_tools._networks import Covariates
    from scvae_tools.model import SCVAE

#: float64 numbers in memory at once for each value that is decoded, beside those of decoding itself: the value and its
#: distance from the mean, of component and reference.
COMPARED_NUMBERS = 4
#: The fields that scanpy reads, in its types.
FIELDS = {"names": "O", "scores": "float32", "logfoldchanges": "float32", "pvals": "float64", "pvals_adj": "float64"}


# -- genes -------------------------------------------------------------------------------------------------------------


def rank_components(
    adata: AnnData,
    model: SCVAE,
    *,
    reference: str = "rest",
    n_genes: int | None = None,
    n_samples: int = 200,
    key: str = "scvae",
    key_added: str = "rank_components",
    random_state: int | np.random.RandomState | np.random.Generator | None = 0,
) -> None:
    """Rank the genes that tell each component from the others, by what the decoder makes of the components.

    Cells of each component are imagined: z is drawn from p(z|y) and decoded to normalized expression, λ over the size
    factor. Fold changes are those between two such cells, one of the component and one of the reference, so that their
    spread is that of the component and of the reference, as the model sees them, and not the error of a mean, which
    vanishes with the number of cells.

    The result has the layout of :func:`scanpy.tl.rank_genes_groups`, for :func:`scanpy.get.rank_genes_groups_df` and
    the plots ``scanpy.pl.rank_genes_groups*`` with ``key=key_added``.

    Parameters
    ----------
    adata
        Annotated data with the components of the model in ``adata.obs[key]``; never changed but for the key below.
    model
        Trained `SCVAE` with a mixture, as ``svt.tl.scvae(adata, return_model=True)`` returns it.
    reference
        ``"rest"`` for the mixture of the other components that have cells, in proportion to p(y); or one component,
        which is then not ranked itself.
    n_genes
        Number of genes to store for each component; None for all genes of the model.
    n_samples
        Draws of z from each component, at least 2.
    key
        Key of the clustering, the ``key_added`` of `scvae`.
    key_added
        Name of the result.
    random_state
        Seed, or generator to draw one from. The global random states are left as they were.

    Returns
    -------
    None. Sets ``adata.uns["rank_components"]``, a dict of record arrays with a field for each component that has cells
    and a row for each gene, by decreasing score:

    ``names``
        Genes of the model; those that ``mask_var`` left out are not ranked. Plots with ``values_to_plot`` want all
        genes ranked: pass them ``adata[:, model.var_names]``.
    ``scores``
        Mean of the log fold changes over their standard deviation; ±inf where they do not vary, 0 if all are 0.
    ``logfoldchanges``
        Mean of the log fold changes, base 2.
    ``pvals``
        Local false sign rate: probability, under the model, of a fold change that is 1 or has the other sign than
        ``logfoldchanges``. Not a p-value, but scanpy reads it in this place. Estimated from ``n_samples`` draws: 0
        means less than about 1 / ``n_samples``.
    ``pvals_adj``
        s-value [Stephens17]_: mean of the local false sign rates over all genes of the model whose own is not larger;
        the share of wrong signs to be expected among these genes.
    ``params``
        ``groupby`` (``key``), ``reference``, ``method``, ``use_raw``, ``layer``, ``corr_method``, ``n_samples`` and
        ``random_state``.

    Raises
    ------
    TypeError
        If ``adata`` is not an AnnData or ``model`` not an `SCVAE`.
    ValueError
        If the model has no trained mixture; ``adata`` has no such column, other categories than the components, fewer
        than two of them, or not the genes of the model; or an argument is out of range.

    Notes
    -----
    With D = log ρ(z_s) − log ρ(z'_s), where z_s ~ p(z|y), z'_s ~ p(z|y'), and ρ is λ over the size factor, the mean,
    standard deviation and sign of D are taken over the draws s and, with y' of the reference summed out exactly, over
    Σ_y' π_y'. The k components are decoded once each, in parts of about 256 MB.

    Batch and covariates of draw s are the same for all components, so that what they add to all of them cancels in D.
    They are those of cells of the model's data, each batch as often as its share of the cells. (A model that was
    loaded without data takes those of the cells that it keeps, as `SCVAE.sample` does.)

    The weights of the networks and the components are taken as known: what another training would change is not in the
    standard deviation, and no rate says whether a component is real.

    References
    ----------
    .. [Stephens17] Stephens (2017) False discovery rates: a new deal. Biostatistics 18:275,
       doi:10.1093/biostatistics/kxw041.

    Examples
    --------
    >>> model = svt.tl.scvae(adata, return_model=True)
    >>> svt.tl.rank_components(adata, model)
    >>> sc.get.rank_genes_groups_df(adata, group="0", key="rank_components").head()
    >>> sc.pl.rank_genes_groups_dotplot(adata, key="rank_components", n_genes=5)
    """
    from scvae_tools._random import as_seed

    components = _components(adata, model, key)
    used = [component for component in components if (adata.obs[key] == component).any()]
    _require_two(used, f"`adata.obs[{key!r}]` must have cells of at least two components to compare")
    groups, references = _compared(used, reference)
    _require_genes(adata, model)
    check_at_least("n_samples", n_samples, 2)
    if n_genes is not None:
        check_at_least("n_genes", n_genes, 1)
    seed = as_seed(random_state, None)

    weights = _reference_weights(model, groups, references)
    mean, deviation, wrong_sign = _log_fold_changes(model, groups, references, weights, n_samples, seed)
    score = np.divide(mean, deviation, out=np.copysign(np.inf, mean), where=deviation > 0)
    score[(deviation == 0) & (mean == 0)] = 0.0
    values = {
        "scores": score,
        "logfoldchanges": mean / np.log(2),
        "pvals": wrong_sign,
        "pvals_adj": s_values(wrong_sign),
    }
    order = np.argsort(-score, axis=1, kind="stable")[:, :n_genes]
    ranked = {"names": model.var_names.astype(object)[order]}
    ranked |= {name: np.take_along_axis(value, order, axis=1) for name, value in values.items()}
    params: dict[str, Any] = {"groupby": key, "reference": str(reference), "method": "scvae", "use_raw": False}
    params |= {"layer": None, "corr_method": "s-value", "n_samples": int(n_samples), "random_state": seed}
    write_uns(adata, key_added, {"params": params} | {n: _records(ranked[n], groups, t) for n, t in FIELDS.items()})


def s_values(false_sign_rate: np.ndarray) -> np.ndarray:
    """Mean of the local false sign rates (..., n_genes) over those that are not larger than each, of the same shape."""
    order = np.argsort(false_sign_rate, axis=-1)
    ascending = np.take_along_axis(false_sign_rate, order, axis=-1)
    means = np.cumsum(ascending, axis=-1) / np.arange(1, ascending.shape[-1] + 1)
    # Of equal rates, all count for each: the mean up to the last of them, which is the largest and the next one to end.
    is_last = np.diff(ascending, axis=-1, append=np.inf) > 0
    means = np.minimum.accumulate(np.where(is_last, means, np.inf)[..., ::-1], axis=-1)[..., ::-1]
    result = np.empty_like(means)
    np.put_along_axis(result, order, means, axis=-1)
    return result


def _compared(used: list[str], reference: str) -> tuple[list[str], list[str]]:
    """Components to rank, and those they are compared with."""
    if reference == "rest":
        return used, used
    if str(reference) not in used:
        raise ValueError(
            f"`reference` must be 'rest' or a component that has cells ({', '.join(used)}); found {reference!r}."
        )
    return [component for component in used if component != str(reference)], [str(reference)]


def _reference_weights(model: SCVAE, groups: list[str], references: list[str]) -> np.ndarray:
    """Weight of each component in the reference of each other, (n_groups, n_references); rows sum to 1."""
    log_weights = model.module.mixture.log_weights().detach().double().cpu().numpy()
    log_weights = log_weights[_positions(model, references)]
    is_itself = np.array(groups)[:, None] == np.array(references)
    log_weights = np.where(is_itself, -np.inf, log_weights)
    return np.exp(log_weights - np.logaddexp.reduce(log_weights, axis=1, keepdims=True))


def _log_fold_changes(
    model: SCVAE, groups: list[str], references: list[str], weights: np.ndarray, n_samples: int, seed: int
) -> tuple[np.ndarray, ...]:
    """Mean and standard deviation of the natural log fold changes, and the share without their mean's sign.

    Each (n_groups, n_genes) float64. All draws of a part of the genes are decoded at a time.
    """
    import torch

    from scvae_tools import _decoding
    from scvae_tools._random import seeded

    module, n_genes = model.module, len(model.var_names)
    module.eval()
    decoded = sorted({*groups, *references}, key=model.components.index)
    left, right = ([decoded.index(name) for name in names] for names in (groups, references))
    device, k = module.device, len(decoded)
    with seeded(seed), torch.inference_mode():
        components = torch.as_tensor(_positions(model, decoded), device=device)
        z = module.mixture.sample(components.repeat_interleave(n_samples)).unflatten(0, (k, n_samples))
        # A size factor of 1 makes the log of λ that of normalized expression, with no exponential in between.
        codes = _decoding.Codes(z, torch.ones(n_samples, 1, device=device), _covariates(model, n_samples))
        # And a byte for the sign of each fold change.
        n_bytes = n_samples * (model._decoded_bytes(k) + 8 * COMPARED_NUMBERS * k + len(left) * len(right))
        step = max(1, _decoding.CHUNK_BYTES // n_bytes)
        parts = []
        for start in range(0, n_genes, step):
            part = slice(start, min(start + step, n_genes))
            px = model._decode(codes, None, slice(None), part)
            log_share = px.params["log_rate"] if px.likelihood.rate_is_head else px.scale.log()
            log_share = log_share.cpu().double().numpy()  # (k, n_samples, genes)
            parts.append(_moments(log_share[left], log_share[right], weights[..., None]))
    return tuple(np.concatenate(value, axis=1) for value in zip(*parts, strict=True))


def _moments(left: np.ndarray, right: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, ...]:
    """Those of left (a, n, g) minus right (b, n, g), draw by draw, the weights being (a, b, 1); each (a, g)."""
    n_draws = left.shape[1]
    # The differences themselves are never held: they are as many as the pairs of components times all that is decoded.
    left_mean, right_mean = left.mean(1), right.mean(1)
    left_apart, right_apart = left - left_mean[:, None], right - right_mean[:, None]
    covariance = np.moveaxis(left_apart.transpose(2, 0, 1) @ right_apart.transpose(2, 1, 0), 0, 2) / n_draws
    variance = np.square(left_apart).mean(1)[:, None] + np.square(right_apart).mean(1) - 2 * covariance
    mean = left_mean[:, None] - right_mean  # (a, b, g)
    total = (weight * mean).sum(1)
    spread = np.maximum(variance, 0) + np.square(mean - total[:, None])  # rounding may put a variance below 0
    not_positive = np.count_nonzero(left[:, None] <= right, axis=2)
    not_negative = np.count_nonzero(left[:, None] >= right, axis=2)
    wrong_sign = np.where(total[:, None] < 0, not_negative, not_positive) / n_draws
    return total, np.sqrt((weight * spread).sum(1)), (weight * wrong_sign).sum(1)


def _covariates(model: SCVAE, n_samples: int) -> Covariates:
    """Batch and covariates of cells of the model's data, each batch within one draw of its share of the cells."""
    import torch
    from scvi import REGISTRY_KEYS

    device = model.module.device
    if model.adata is None:
        _, known = model.module.reference(torch.arange(len(model.module.reference_batch), device=device))
    else:
        manager, registered = model.adata_manager, model.adata_manager.data_registry

        def column(key: str, dtype: torch.dtype) -> Tensor | None:
            if key not in registered:
                return None
            # A copy: pandas hands out arrays that must not be written to, and torch takes none of these.
            return torch.as_tensor(np.array(manager.get_from_registry(key)), dtype=dtype, device=device)

        known = model.module.covariates_of(
            column(REGISTRY_KEYS.BATCH_KEY, torch.long),
            column(REGISTRY_KEYS.CAT_COVS_KEY, torch.long),
            column(REGISTRY_KEYS.CONT_COVS_KEY, torch.float32),
        )
    batch = known.batch[:, 0].cpu()
    cells = torch.randperm(len(batch))
    cells = cells[torch.argsort(batch[cells], stable=True)]  # by batch, in random order within
    at = ((torch.rand((), dtype=torch.double) + torch.arange(n_samples)) * (len(batch) / n_samples)).long()
    known = known.rows(cells[at.clamp(max=len(batch) - 1)].to(device))
    return model.module.at_typical_size(known)  # not at the size factor of 1, with which they are decoded


def _records(values: np.ndarray, groups: list[str], dtype: str) -> np.recarray:
    """(n_groups, n_genes) as scanpy stores it, a field for each group."""
    table = pd.DataFrame(values.T, columns=groups)
    return table.to_records(index=False, column_dtypes=dict.fromkeys(groups, dtype))


# -- components --------------------------------------------------------------------------------------------------------


def dendrogram(adata: AnnData, model: SCVAE, *, key: str = "scvae", key_added: str | None = None) -> None:
    """Order the components by how much they overlap in the latent space, as a tree.

    The result has the layout of :func:`scanpy.tl.dendrogram`: :func:`scanpy.pl.dendrogram` draws it, and the plots with
    ``dendrogram=True``, such as :func:`scanpy.pl.dotplot`, order the components by it.

    Parameters
    ----------
    adata
        Annotated data with the components of the model in ``adata.obs[key]``; never changed but for the key below.
    model
        Trained `SCVAE` with a mixture, as ``svt.tl.scvae(adata, return_model=True)`` returns it.
    key
        Key of the clustering, the ``key_added`` of `scvae`.
    key_added
        Name of the result; None for ``f"dendrogram_{key}"``, where scanpy looks for it.

    Returns
    -------
    None. Sets ``adata.uns["dendrogram_scvae"]``, a dict with ``linkage``, ``groupby``, ``use_rep``, ``cor_method``,
    ``linkage_method``, ``categories_ordered``, ``categories_idx_ordered``, ``dendrogram_info`` (see
    :func:`scipy.cluster.hierarchy.dendrogram`), and ``correlation_matrix``, the Bhattacharyya coefficients of each two
    components, in the order of the categories: 1 for the same distribution, 0 for two without overlap.

    Raises
    ------
    TypeError
        If ``adata`` is not an AnnData or ``model`` not an `SCVAE`.
    ValueError
        If the model has no trained mixture, or ``adata`` no such column, other categories than the components, or fewer
        than two of them.

    Notes
    -----
    The height at which two components join is their Bhattacharyya distance in nats, −log ∫ √(p(z|i) p(z|j)) dz
    [Kailath67]_; that of two groups of components is the mean over all pairs. Of two equally large components, at most
    half of their coefficient, exp(−distance), is the share of cells that the best rule puts into the wrong one.

    References
    ----------
    .. [Kailath67] Kailath (1967) The divergence and Bhattacharyya distance measures in signal selection. IEEE
       Transactions on Communication Technology 15:52, doi:10.1109/TCOM.1967.1089532.

    Examples
    --------
    >>> svt.tl.dendrogram(adata, model)
    >>> sc.pl.dendrogram(adata, "scvae")
    """
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    components = _components(adata, model, key)
    _require_two(components, f"`adata.obs[{key!r}]` must have at least two components to join")
    at = _positions(model, components)
    distance = bhattacharyya(model.module.mixture)[np.ix_(at, at)]
    linkage = hierarchy.linkage(squareform(distance), method="average")
    info = hierarchy.dendrogram(linkage, labels=components, no_plot=True)
    result = {
        "linkage": linkage,
        "groupby": [key],
        "use_rep": Keys(key).latent,
        "cor_method": "bhattacharyya",
        "linkage_method": "average",
        "categories_ordered": info["ivl"],
        "categories_idx_ordered": info["leaves"],
        "dendrogram_info": info,
        "correlation_matrix": np.exp(-distance),
    }
    write_uns(adata, f"dendrogram_{key}" if key_added is None else key_added, result)


def bhattacharyya(mixture: GaussianMixture) -> np.ndarray:
    """Bhattacharyya distance of each two components, −log ∫ √(p(z|i) p(z|j)) dz, in nats, (k, k) float64.

    ⅛ (μ_i − μ_j)ᵀ Σ⁻¹ (μ_i − μ_j) + ½ log det Σ − ¼ log det Σ_i − ¼ log det Σ_j with Σ = (Σ_i + Σ_j) / 2 (Bhattacharyya
    1943; Kailath 1967, doi:10.1109/TCOM.1967.1089532).
    """
    import torch

    with torch.no_grad():
        means, inverse_factor = (value.detach().cpu().double() for value in (mixture.means, mixture.precision_factor()))
    factor = torch.linalg.inv(inverse_factor)
    covariance = (factor.mT @ factor).expand(len(means), -1, -1)
    middle = torch.linalg.cholesky((covariance[:, None] + covariance) / 2)  # (k, k, d, d)
    apart = torch.linalg.solve_triangular(middle, (means[:, None] - means)[..., None], upper=False)
    half_log_det = middle.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    own = -inverse_factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).expand(len(means))  # ½ log det Σ_i
    distance = apart.square().sum((-2, -1)) / 8 + half_log_det - (own[:, None] + own) / 2
    distance = (distance + distance.T) / 2
    distance.fill_diagonal_(0)
    return distance.clamp(min=0).numpy()  # rounding may put two that are the same below 0


# -- what both ask for -------------------------------------------------------------------------------------------------


def _components(adata: AnnData, model: SCVAE, key: str) -> list[str]:
    """Categories of the clustering, all of them components of the model."""
    from scvae_tools._counts import require_anndata
    from scvae_tools._gmvae import MixtureVAE

    require_anndata(adata)
    require_model(model)
    if not model.is_mixture:
        found, remedy = (
            ("one that is not trained", "Call model.train().")
            if isinstance(model.module, MixtureVAE)
            else ("a model without", "Train one with mixture=True.")
        )
        raise ValueError(f"`model` must have a trained mixture, whose components are compared; found {found}. {remedy}")
    require_writable(adata)
    rule = f"`adata.obs[{key!r}]` must be categorical, with the components of the model ({_listed(model.components)})"
    if key not in adata.obs:
        raise ValueError(f"{rule}; found no such column. Pass the `key_added` of svt.tl.scvae as `key`.")
    column = adata.obs[key]
    if not isinstance(column.dtype, pd.CategoricalDtype):
        raise ValueError(
            f"{rule}; found the type {column.dtype}. Convert it: "
            f"adata.obs[{key!r}] = adata.obs[{key!r}].astype(str).astype('category')."
        )
    names = column.cat.categories.tolist()
    unknown = [name for name in names if name not in model.components]
    if unknown:
        raise ValueError(
            f"{rule}; {len(unknown)} of its {len(names)} categories are none, the first {unknown[0]!r}. Keep other "
            "names in another column, and pass the model that wrote this one."
        )
    return names


def _require_two(components: list[str], rule: str) -> None:
    if len(components) < 2:
        raise ValueError(
            f"{rule}; found {len(components)} ({_listed(components) or 'none'}). Train with more, for example "
            "n_components=10, or pass all cells."
        )


def _require_genes(adata: AnnData, model: SCVAE) -> None:
    missing = model.var_names[~pd.Index(model.var_names).isin(adata.var_names.astype(str))]
    if len(missing) > 0:
        raise ValueError(
            f"`adata` must have the genes of the model, which are ranked; {len(missing)} of {len(model.var_names)} are "
            f"missing, the first {str(missing[0])!r}. Pass the AnnData that the model was trained on, with all genes."
        )


def _positions(model: SCVAE, components: list[str]) -> list[int]:
    """Places of components in the mixture."""
    return [model.components.index(name) for name in components]


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:2])}, ..., {names[-1]}"
