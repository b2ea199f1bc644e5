"""Rank the genes that mark each component, by what the decoder makes of the components, and test them on the counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvae_tools._checks import check_key, check_random_source, checked, whole
from scvae_tools._messages import warn
from scvae_tools._other_names import answers_other_names
from scvae_tools._random import as_seed
from scvae_tools._results.writing import write_uns
from scvae_tools.model._count_evidence import count_evidence
from scvae_tools.model._fold_changes import FoldChanges, adjusted_p_values, fold_changes
from scvae_tools.tl._models import components_of, find_model, positions_of, require_two

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

    from scvae_tools.model._scvae import SCVAE

#: float64 numbers in memory at once for each value that is decoded, beside those of decoding itself: the value and its
#: distance from the mean, of component and reference.
COMPARED_NUMBERS = 4


#: The fields that scanpy reads, in its types.
FIELDS = {"names": "O", "scores": "float32", "logfoldchanges": "float32", "pvals": "float64", "pvals_adj": "float64"}
#: Fields of ours beside them.
OWN_FIELDS = {"false_sign_rates": "float64", "s_values": "float64"}


@answers_other_names
@checked(random_state=check_random_source, n_samples=whole(least=2))
def rank_components(
    adata: AnnData,
    model: SCVAE | str | Path | None = None,
    *,
    reference: str = "rest",
    n_genes: int | None = None,
    n_samples: int = 200,
    delta: float = 0.25,
    layer: str | None = None,
    key: str = "scvae",
    key_added: str = "rank_components",
    random_state: int | np.random.RandomState | np.random.Generator | None = 0,
) -> None:
    """Rank the genes that tell each component from the others, by the decoder, and test them on the counts.

    Cells of each component are imagined: z is drawn from p(z|y) and decoded to normalized expression, λ over the size
    factor. Fold changes are those between two such cells, one of the component and one of the reference, so that their
    spread is that of the component and of the reference, as the model sees them, and not the error of a mean, which
    vanishes with the number of cells. By them genes are ranked.

    The decoder's weights have errors too, which make genes of few counts look different. So the difference of each gene
    is tested on the counts of the cells, and its p-value is what calls of genes are to be based on.

    The result has the layout of :func:`scanpy.tl.rank_genes_groups`, for :func:`scanpy.get.rank_genes_groups_df` and
    the plots ``scanpy.pl.rank_genes_groups*`` with ``key=key_added``.

    Parameters
    ----------
    adata
        Annotated data with the components of the model in ``adata.obs[key]``; never changed but for the key below.
    model
        Trained `SCVAE` with a mixture, or the folder where one is saved. None for that of the results under ``key``,
        which stays in memory, without its cells, as long as these results do; no file holds it.
    reference
        ``"rest"`` for the mixture of the other components that have cells, in proportion to p(y); or one component,
        which is then not ranked itself.
    n_genes
        Number of genes to store for each component; None for all genes of the model.
    n_samples
        Draws of z from each component, at least 2.
    delta
        Largest mean log fold change, base 2 and in either direction, that does not count as a difference. 0 tests for
        any difference; with many cells that is nearly every gene.
    layer
        Layer of the counts; None for that of the model.
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
        p-value of the hypothesis that the mean log fold change between the cells is within ±``delta``, two-sided; 1 if
        the counts differ in the other direction than ``logfoldchanges``. NaN, with a warning, if neither ``adata`` nor
        the model has the counts.
    ``pvals_adj``
        The same, adjusted for all genes of the model (Benjamini and Hochberg): of the genes with at most 0.05, 5 % are
        expected to have no difference beyond ``delta``, or fewer.
    ``false_sign_rates``
        Share of the pairs of imagined cells whose fold change is 1 or has the other sign than ``logfoldchanges``; 0
        means less than about 1 / ``n_samples``. What the decoder says, as if its weights were known.
    ``s_values``
        s-value [Stephens17]_: mean of these rates over all genes of the model whose own is not larger; the share of
        wrong signs to be expected among these genes, as if the weights were known.
    ``params``
        ``groupby`` (``key``), ``reference``, ``method``, ``use_raw``, ``layer``, ``corr_method``, ``n_samples``,
        ``delta`` and ``random_state``.

    Raises
    ------
    TypeError
        If ``adata`` is not an AnnData or ``model`` not an `SCVAE`.
    ValueError
        If the model has no trained mixture; ``adata`` has no such column, other categories than the components, fewer
        than two of them, or not the genes of the model; an argument is out of range, or ``layer`` holds no counts.

    Notes
    -----
    With D = log ρ(z_s) − log ρ(z'_s), where z_s ~ p(z|y), z'_s ~ p(z|y'), and ρ is λ over the size factor, the mean,
    standard deviation and sign of D are taken over the draws s and, with y' of the reference summed out exactly, over
    Σ_y' π_y'. The k components are decoded once each, in parts of about 256 MB.

    Batch and covariates of draw s are the same for all components, so that what they add to all of them cancels in D.
    They are those of cells of the model's data, each batch as often as its share of the cells. (A model that was
    loaded without data takes those of the cells that it keeps, as `SCVAE.sample` does.)

    The test is of the cells as `scvae` assigned them, in ``adata.obs[key]``. The difference is that of the means over
    the cells of log ρ, at the same covariates for all, corrected by the factor by which the counts of each component
    are above the decoder's λ. Its standard error is from the information of the counts about log λ under the
    likelihood, more where they vary more than it says. Batches are terms of their own, so that components are compared
    within batches. What the other covariates do is taken as the decoder says.

    Cells are taken as independent. Those of one donor are not, and p-values for differences between donors are too
    small. The components were found in the same counts as are tested: among components that cut one population in two,
    genes of differences that the cut itself has made have small p-values too, but not small s-values. No p-value says
    whether a component is real.

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
    model = find_model(adata, model, key)
    check_key("key_added", key_added)
    components = components_of(adata, model, key)
    used = [component for component in components if (adata.obs[key] == component).any()]
    require_two(used, f"`adata.obs[{key!r}]` must have cells of at least two components to compare")
    groups, references = _compared(used, reference)
    _require_genes(adata, model)
    seed = as_seed(random_state, None)

    weights = _reference_weights(model, groups, references)
    tested = _changes_in_counts(adata, model, key, layer, _contrasts(groups, references, weights), seed)
    mean, deviation, wrong_sign = _log_fold_changes(model, groups, references, weights, n_samples, seed)
    score = np.divide(mean, deviation, out=np.copysign(np.inf, mean), where=deviation > 0)
    score[(deviation == 0) & (mean == 0)] = 0.0
    values = {"scores": score, "logfoldchanges": mean / np.log(2)} | _p_values(tested, mean, delta)
    values |= {"false_sign_rates": wrong_sign, "s_values": s_values(wrong_sign)}
    order = np.argsort(-score, axis=1, kind="stable")[:, :n_genes]
    ranked = {"names": model.var_names.astype(object)[order]}
    ranked |= {name: np.take_along_axis(value, order, axis=1) for name, value in values.items()}
    params: dict[str, Any] = {"groupby": key, "reference": str(reference), "method": "scvae", "use_raw": False}
    params |= {"layer": None, "corr_method": "benjamini-hochberg", "n_samples": n_samples}
    params |= {"delta": delta, "random_state": seed}
    records = {n: _records(ranked[n], groups, kind) for n, kind in (FIELDS | OWN_FIELDS).items()}
    write_uns(adata, key_added, {"params": params} | records)


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
    log_weights = log_weights[positions_of(model, references)]
    is_itself = np.array(groups)[:, None] == np.array(references)
    log_weights = np.where(is_itself, -np.inf, log_weights)
    return np.exp(log_weights - np.logaddexp.reduce(log_weights, axis=1, keepdims=True))


def _contrasts(groups: list[str], references: list[str], weights: np.ndarray) -> pd.DataFrame:
    """Weight of the mean of each component in the comparison of each group, (n_groups, n_components)."""
    names = [*dict.fromkeys([*groups, *references])]
    contrasts = pd.DataFrame(0.0, index=groups, columns=names)
    contrasts[references] -= weights
    contrasts[groups] += np.eye(len(groups))
    return contrasts


def _changes_in_counts(
    adata: AnnData, model: SCVAE, key: str, layer: str | None, contrasts: pd.DataFrame, seed: int
) -> FoldChanges | None:
    """Differences between the cells of components, (n_groups, n_genes); None, with a warning, without counts."""
    code = pd.Categorical(adata.obs[key].astype(object), categories=contrasts.columns).codes
    has_cells = model.adata is not None and model.minified_data_type is None and model.has_cells(adata.obs_names)
    try:
        if model.minified_data_type is not None:
            raise ValueError("The data of `model` are minified. Pass the model as it was saved before.")
        if has_cells and layer is None:
            evidence = count_evidence(model, model.adata, code, contrasts.shape[1], adjusts=True, random_state=seed)
        else:
            with model.shown(model.other_cells(adata, layer=layer, any_labels=True)) as shown:
                evidence = count_evidence(model, shown, code, contrasts.shape[1], adjusts=True, random_state=seed)
    except ValueError as error:
        if layer is not None:
            raise
        warn(f"p-values need the counts of the cells, and are NaN. {error}")
        return None
    return fold_changes(evidence, contrasts.to_numpy())


def _p_values(tested: FoldChanges | None, mean: np.ndarray, delta: float) -> dict[str, np.ndarray]:
    """p-values of differences beyond ``delta`` (log2) with the sign of ``mean``, and adjusted for all genes."""
    if tested is None:
        return dict.fromkeys(("pvals", "pvals_adj"), np.full(mean.shape, np.nan))
    p_values = np.where(tested.mean * mean > 0, tested.p_values(delta * np.log(2)), 1.0)
    return {"pvals": p_values, "pvals_adj": adjusted_p_values(p_values)}


def _log_fold_changes(
    model: SCVAE, groups: list[str], references: list[str], weights: np.ndarray, n_samples: int, seed: int
) -> tuple[np.ndarray, ...]:
    """Mean and standard deviation of the natural log fold changes, and the share without their mean's sign.

    Each (n_groups, n_genes) float64. All draws of a part of the genes are decoded at a time.
    """
    decoded = sorted({*groups, *references}, key=model.components.index)
    left, right = ([decoded.index(name) for name in names] for names in (groups, references))
    # And a byte for the sign of each fold change.
    n_bytes = 8 * COMPARED_NUMBERS * len(decoded) + len(left) * len(right)
    expression = model.iter_component_expression(decoded, n_samples, bytes_beside=n_bytes, random_state=seed)
    parts = [_moments(each[left], each[right], weights[..., None]) for _, each in expression]
    return tuple(np.concatenate(value, axis=1) for value in zip(*parts, strict=True))


def _moments(left: np.ndarray, right: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, ...]:
    """Moments of left (a, n, g) minus right (b, n, g), draw by draw, with weights (a, b, 1); each (a, g)."""
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


def _records(values: np.ndarray, groups: list[str], dtype: str) -> np.recarray:
    """Record array as scanpy stores it, a field for each group, from values (n_groups, n_genes)."""
    table = pd.DataFrame(values.T, columns=groups)
    return table.to_records(index=False, column_dtypes=dict.fromkeys(groups, dtype))


def _require_genes(adata: AnnData, model: SCVAE) -> None:
    missing = model.var_names[~pd.Index(model.var_names).isin(adata.var_names.astype(str))]
    if len(missing) > 0:
        raise ValueError(
            f"`adata` must have the genes of the model, which are ranked; {len(missing)} of {len(model.var_names)} are "
            f"missing, the first {str(missing[0])!r}. Pass the AnnData that the model was trained on, with all genes."
        )
