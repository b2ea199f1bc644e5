"""Order the components by their overlap in the latent space, as a tree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scvae_tools._checks import check_key, checked
from scvae_tools._keys import Keys
from scvae_tools._other_names import answers_other_names
from scvae_tools._results.writing import write_uns
from scvae_tools.tl._models import components_of, find_model, positions_of, require_two

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

    from scvae_tools._module.gaussian_mixture import GaussianMixture
    from scvae_tools.model._scvae import SCVAE


@answers_other_names
@checked()
def dendrogram(
    adata: AnnData, model: SCVAE | str | Path | None = None, *, key: str = "scvae", key_added: str | None = None
) -> None:
    """Order the components by how much they overlap in the latent space, as a tree.

    The result has the layout of :func:`scanpy.tl.dendrogram`: :func:`scanpy.pl.dendrogram` draws it, and the plots with
    ``dendrogram=True``, such as :func:`scanpy.pl.dotplot`, order the components by it.

    Parameters
    ----------
    adata
        Annotated data with the components of the model in ``adata.obs[key]``; never changed but for the key below.
    model
        Trained `SCVAE` with a mixture, or the folder where one is saved. None for that of the results under ``key``,
        which stays in memory, without its cells, as long as these results do; no file holds it.
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

    model = find_model(adata, model, key)
    check_key("key_added", key_added, or_none=True)
    components = components_of(adata, model, key)
    require_two(components, f"`adata.obs[{key!r}]` must have at least two components to join")
    at = positions_of(model, components)
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
