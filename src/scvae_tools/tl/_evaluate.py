"""Evaluate a trained model on cells: bounds, and clusterings against labels."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvae_tools import metrics
from scvae_tools._checks import check_key, check_whole
from scvae_tools._data.counts import require_anndata
from scvae_tools._data.roles import column_of_obs, labels_to_score_by
from scvae_tools._messages import listed, warn
from scvae_tools._random import as_seed, isolated_random_state
from scvae_tools._results.writing import require_writable, write_uns
from scvae_tools._version import __version__
from scvae_tools.tl._models import require_encoder_of_counts

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix
    from sklearn.base import BaseEstimator

    from scvae_tools.model._cells import OtherCells
    from scvae_tools.model._scvae import SCVAE

K_MEANS = "k-means"
#: Names of clusterings that are not those of clusterers: the components, and none at all.
OF_MODEL, NO_CLUSTERING = "model", "none"
TERMS = ("elbo", "log_likelihood", "kl_z", "kl_y")


def evaluate(
    adata: AnnData,
    model: SCVAE,
    *,
    labels_key: str | None = None,
    superset: str | Mapping[Any, Any] | None = None,
    excluded: str | Collection[Any] = (),
    clusterers: str | Mapping[str, BaseEstimator] | None = None,
    n_samples: int = 1,
    n_importance_samples: int = 0,
    layer: str | None = None,
    key_added: str = "scvae_evaluation",
    random_state: int | np.random.RandomState | np.random.Generator | None = 0,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Evaluate a trained model: its bounds, and clusterings of its latent space against known labels.

    Parameters
    ----------
    adata
        Annotated data: that of the model, or new cells with its genes; never changed but for the key below. The cells
        are those of the model if the names in ``adata.obs_names`` are the same, in the same order, and so are the
        counts; they are then evaluated with the counts, batches and covariates that the model was trained on. Where
        ``adata`` holds no counts any more, the names decide, with a warning, unless they are mere numbers. A part of
        the cells of the model counts as new.
    model
        Trained `SCVAE`, as ``svt.tl.scvae(adata, return_model=True)`` returns it. One that was loaded without its data
        knows no cells: all are new.
    labels_key
        Column of ``obs`` with labels to score the clusters by. Cells without one, whose label is missing or the
        ``unlabeled_category`` of the model, are left out of the scores of clusterings.
    superset
        Coarser labels: a dict of them by label, or a column of ``obs``. Cells where it is missing (NaN or None) are
        left out of the scores by it.
    excluded
        Labels whose cells are left out of the scores of clusterings. The bounds are those of all cells.
    clusterers
        Clusterings of the latent space beside the components: estimators of scikit-learn, or any with their methods,
        by name, such as ``{"k-means": KMeans(8)}``; or ``"k-means"`` for one with as many clusters as there are labels
        (without labels, components). Copies are fitted, with a ``random_state`` where it was None.
    n_samples
        Monte Carlo samples of z per cell (and component) for the bound.
    n_importance_samples
        Samples per cell for the importance-weighted bound; 0 to leave it out.
    layer
        Layer with the counts of new cells; None for ``adata.X``, or for the layer that `SCVAE.setup_anndata` was given.
    key_added
        Name of the result.
    random_state
        Seed, or generator to draw one from. The global random states are left as they were.
    batch_size
        Cells evaluated at a time.

    Returns
    -------
    A table with a row for each subset of the cells and clustering, and the columns

    ``subset``
        ``"train"``, ``"validation"`` and, where ``model.test_indices`` holds any, ``"test"``; or ``"new"``.
    ``clustering``
        ``"model"``, the most probable components of a mixture, and the names of ``clusterers``; ``"none"`` if there is
        neither.
    ``n_cells``
        Number of cells of the subset.
    ``elbo``, ``log_likelihood``, ``kl_z``, ``kl_y``
        Evidence lower bound and its terms, means over all cells of the subset, in nats per cell.
    ``importance_weighted``
        Importance-weighted bound of log p(x), in nats per cell. Only with ``n_importance_samples``.
    ``n_scored``
        Number of cells that the clustering is scored on.
    ``n_clusters``
        Number of clusters that these are in.
    ``accuracy``
        Share of these whose label is that of most training cells in their cluster. The cells of a cluster in which no
        training cell has a label count as wrong. For new cells, the majority is that among themselves: it is then the
        purity, and rises with the number of clusters, as on the training cells. Only with ``labels_key``.
    ``ari``, ``ami``
        Adjusted Rand index and adjusted mutual information of clusters and labels. Only with ``labels_key``.
    ``silhouette``
        Mean silhouette of the clusters in the latent space, in Euclidean distances; over 20,000 cells drawn at random
        where there are more.
    ``superset_accuracy``, ``superset_ari``, ``superset_ami``
        The same by the coarser labels. Only with ``superset``.

    A score is missing where it is not defined, such as the silhouette of a single cluster.

    Sets ``adata.uns["scvae_evaluation"]``, a dict with this ``table``; ``params``, the arguments; and ``version``.

    Raises
    ------
    TypeError
        If ``adata`` is not an AnnData or ``model`` not an `SCVAE`.
    CountsError
        If the counts of new cells are not raw counts, with the cell and the gene.
    ValueError
        If the model is not trained or holds minified data; new cells lack genes of the model, or columns
        of ``obs`` that it was trained with; a label or another argument is unknown; or an estimator is not one that
        clusters, or fails.

    Notes
    -----
    Estimators that can ``predict`` are fitted on the latent means of the training cells, of new ones on all, and
    predict the clusters of all. Those that cannot (``AgglomerativeClustering``, ``DBSCAN``) cluster all cells together,
    the held-out ones too. Cells that an estimator calls noise (−1) are a cluster of their own.

    The original scVAE takes the majority among the evaluated cells themselves, so that its accuracy rises with the
    number of clusters on any set.

    See Also
    --------
    scvae_tools.metrics : The scores, for any clusters and labels.

    Examples
    --------
    >>> model = svt.tl.scvae(adata, return_model=True)
    >>> svt.tl.evaluate(adata, model, labels_key="cell_type", clusterers="k-means")
    """
    require_anndata(adata)
    check_key("key_added", key_added)
    require_encoder_of_counts(model, "svt.tl.evaluate")
    require_writable(adata)
    n_samples = check_whole("n_samples", n_samples)
    n_importance_samples = check_whole("n_importance_samples", n_importance_samples, least=0)
    batch_size = check_whole("batch_size", batch_size, or_none=True)
    seed = as_seed(random_state, None)
    truth = _truth(adata, model, labels_key, superset, excluded)
    estimators = _estimators(clusterers, truth, model, seed)
    cells = _cells(adata, model, layer)
    with cells.shown(model) as shown:
        latent = model.get_latent_representation(shown, batch_size=batch_size).astype(np.float64)
        clusterings = {OF_MODEL: model.predict(shown, batch_size=batch_size)} if model.is_mixture else {}
        clusterings |= {name: _clusters(name, each, latent, cells.fitted, seed) for name, each in estimators.items()}
        samples = {"n_samples": n_samples, "n_importance_samples": n_importance_samples}
        bounds = {
            subset: _bounds(model, shown, at, **samples, random_state=seed, batch_size=batch_size)
            for subset, at in cells.subsets.items()
        }
    table = _table(cells, bounds, clusterings, truth, latent, seed)
    params = {"labels_key": labels_key, "superset": superset if superset is None else str(superset), **samples}
    params |= {"layer": layer, "random_state": seed, "batch_size": batch_size}
    names = {
        "excluded": truth.excluded,
        "clusterers": list(estimators),
        "estimators": list(map(repr, estimators.values())),
    }
    _write_result(adata, key_added, table, params, names)
    return table.copy()


def _write_result(
    adata: AnnData, key: str, table: pd.DataFrame, params: dict[str, Any], names: dict[str, list[str]]
) -> None:
    params = {name: value for name, value in params.items() if value is not None}
    params |= {name: np.array(values, dtype=object) for name, values in names.items() if values}
    write_uns(adata, key, {"table": table, "params": params, "version": __version__})


# -- which cells -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cells:
    """Positions of the cells by subset; and the cells, None for those of the model."""

    subsets: dict[str, np.ndarray]
    others: OtherCells | None

    @property
    def fitted(self) -> np.ndarray:
        """Positions of the cells that clusterers and majorities are fitted on."""
        return self.subsets.get("train", self.subsets.get("new"))

    @contextmanager
    def shown(self, model: SCVAE) -> Iterator[AnnData | None]:
        """Let the model read the cells inside; yield what its methods are passed."""
        if self.others is None:
            yield None
            return
        with model.shown(self.others) as shown:
            yield shown


def _cells(adata: AnnData, model: SCVAE, layer: str | None) -> _Cells:
    split = _split_of(model)
    if split and adata is model.adata:
        return _Cells(split, None)
    has_names = bool(split) and adata.obs_names.equals(model.adata.obs_names)
    try:
        others = model.other_cells(adata, layer=layer, any_labels=True)
    except ValueError as error:
        is_told = has_names and layer is None and not _are_numbered(adata.obs_names)
        if not is_told or not adata.var_names.isin(model.var_names).any():
            raise
        # Normalized, or genes dropped, since the training: the names are all there is to go by.
        warn(
            f"The cells cannot be read as counts for the model ({error}) They have the names of those that it was "
            "trained on, and are taken for these."
        )
        return _Cells(split, None)
    if has_names and _are_equal(others.counts, model.counts_of_model()):
        return _Cells(split, None)
    return _Cells({"new": np.arange(adata.n_obs)}, others)


def _are_numbered(names: pd.Index) -> bool:
    """Whether names are 0, 1, 2, ..., which say nothing of the cells."""
    return names.equals(pd.Index(map(str, range(len(names)))))


def _split_of(model: SCVAE) -> dict[str, np.ndarray]:
    """Positions of the model's cells by subset; none if its data are not those that were split."""
    if model.adata is None:
        return {}
    indices = {"train": model.train_indices, "validation": model.validation_indices, "test": model.test_indices}
    split = {name: np.asarray(at) for name, at in indices.items() if at is not None and len(at) > 0}
    if "train" not in split:
        return {}
    known = np.unique(np.concatenate(list(split.values())))
    return split if np.array_equal(known, np.arange(model.adata.n_obs)) else {}


def _are_equal(left: csr_matrix, right: csr_matrix) -> bool:
    """Whether two matrices without explicit zeros, their columns in order, are the same."""
    return left.shape == right.shape and all(
        np.array_equal(getattr(left, name), getattr(right, name)) for name in ("indptr", "indices", "data")
    )


# -- what is scored by -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Truth:
    """Labels of all cells, None where a cell has none or is excluded."""

    labels: np.ndarray | None
    superset: np.ndarray | None
    excluded: list[str]

    @property
    def n_labels(self) -> int:
        return len(set(self.labels) - {None})


def _truth(
    adata: AnnData, model: SCVAE, labels_key: str | None, superset: object, excluded: str | Collection[Any]
) -> _Truth:

    excluded = [str(label) for label in ([excluded] if isinstance(excluded, str) else excluded)]
    if labels_key is None:
        for name, is_given in (("superset", superset is not None), ("excluded", bool(excluded))):
            if is_given:
                raise ValueError(f"`{name}` is about labels, and needs `labels_key`; found none. Pass both.")
        return _Truth(None, None, [])
    names = _names(labels_to_score_by(adata, labels_key))
    names[~metrics.is_scored(names, _unlabeled(model))] = None
    known = sorted(set(names) - {None})
    if unknown := [label for label in excluded if label not in known]:
        raise ValueError(
            f"`excluded` must be labels in adata.obs[{labels_key!r}]; {unknown[0]!r} is none. There are "
            f"{listed(known)}."
        )
    scored = metrics.is_scored(names, excluded)
    if not scored.any():
        raise ValueError(
            f"adata.obs[{labels_key!r}] (`labels_key`) must hold labels to score by; all cells have none, or one of "
            f"`excluded` ({listed(excluded)}). Exclude fewer, or leave `labels_key` out."
        )
    names[~scored] = None
    if superset is None:
        return _Truth(names, None, excluded)
    if isinstance(superset, Mapping):
        coarse = _mapped(names, superset)
    else:
        coarse = _names(column_of_obs(adata, superset, "superset"))
    coarse[~scored] = None
    return _Truth(names, coarse, excluded)


def _unlabeled(model: SCVAE) -> list[str]:
    """Category of cells without a label that the model was given, if any, as a list."""
    category = model.registry["setup_args"].get("unlabeled_category")
    return [] if category is None else [str(category)]


def _names(column: pd.Series) -> np.ndarray:
    """Values as text, (n_cells,), None where there is none."""
    return np.array(
        [None if missing else str(value) for value, missing in zip(column, column.isna(), strict=True)], dtype=object
    )


def _mapped(labels: np.ndarray, superset: Mapping[Any, Any]) -> np.ndarray:

    by_name = {str(label): coarse for label, coarse in superset.items()}
    missing = sorted(set(labels) - {None} - set(by_name))
    if missing:
        raise ValueError(
            f"`superset` must have a coarser label for each label that is not excluded; it has none for "
            f"{listed(missing)}. Add them, with None to leave their cells out of the scores by `superset`."
        )
    return _names(pd.Series([by_name.get(label) for label in labels], dtype=object))


# -- clusterings -------------------------------------------------------------------------------------------------------


def _estimators(clusterers: object, truth: _Truth, model: SCVAE, seed: int) -> dict[str, BaseEstimator]:
    """Unfitted copies of the clusterers, with a seed."""
    if clusterers is None:
        return {}
    if isinstance(clusterers, str):
        clusterers = {K_MEANS: _k_means(clusterers, truth, model)}
    if not isinstance(clusterers, Mapping):
        raise ValueError(
            f"`clusterers` must be {K_MEANS!r} or a dict of estimators by name; found a {type(clusterers).__name__}. "
            'Pass, for example, {"k-means": KMeans(8)}.'
        )
    return {name: _copied(name, each, seed) for name, each in clusterers.items()}


def _k_means(name: str, truth: _Truth, model: SCVAE) -> BaseEstimator:
    from sklearn.cluster import KMeans

    if name != K_MEANS:
        raise ValueError(
            f"`clusterers` must be {K_MEANS!r} or a dict of estimators by name; found {name!r}. Pass the estimator "
            f"itself: {{{name!r}: ...}}."
        )
    if truth.labels is not None:
        return KMeans(truth.n_labels)
    if not model.is_mixture:
        raise ValueError(
            f"clusterers={K_MEANS!r} has as many clusters as there are labels, or components; found neither "
            '`labels_key` nor a mixture. Pass the number: {"k-means": KMeans(8)}.'
        )
    return KMeans(model.n_components)


def _copied(name: object, estimator: BaseEstimator, seed: int) -> BaseEstimator:
    from sklearn.base import clone

    if not isinstance(name, str) or name in (OF_MODEL, NO_CLUSTERING):
        raise ValueError(
            f"`clusterers` must have names other than {OF_MODEL!r} and {NO_CLUSTERING!r}, which the table has already; "
            f"found {name!r}. Pass another one."
        )
    clusters = hasattr(estimator, "fit_predict") or (hasattr(estimator, "fit") and hasattr(estimator, "predict"))
    if isinstance(estimator, type) or not (clusters and hasattr(estimator, "get_params")):
        found = f"the class {estimator.__name__}" if isinstance(estimator, type) else f"a {type(estimator).__name__}"
        raise ValueError(
            f"clusterers[{name!r}] must be an estimator like those of scikit-learn, with `get_params` and "
            f"`fit_predict`, or `fit` and `predict`; found {found}. Pass, for example, KMeans(8)."
        )
    copied = clone(estimator)
    is_seed = {key: key.split("__")[-1] == "random_state" for key in copied.get_params()}
    return copied.set_params(
        **{key: seed for key, value in copied.get_params().items() if is_seed[key] and value is None}
    )


def _clusters(name: str, estimator: BaseEstimator, latent: np.ndarray, fitted: np.ndarray, seed: int) -> np.ndarray:
    """Clusters of all cells, as text, (n_cells,)."""
    try:
        with isolated_random_state(seed):  # some estimators have no seed
            found = (
                estimator.fit(latent[fitted]).predict(latent)
                if hasattr(estimator, "predict")
                else estimator.fit_predict(latent)
            )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"clusterers[{name!r}] must cluster {len(fitted)} cells in {latent.shape[1]} dimensions; found the error: "
            f"{error}"
        ) from error
    return np.asarray(found).astype(str)


# -- the table ---------------------------------------------------------------------------------------------------------


def _bounds(
    model: SCVAE,
    private: AnnData | None,
    at: np.ndarray,
    *,
    n_samples: int,
    n_importance_samples: int,
    random_state: int,
    batch_size: int | None,
) -> dict[str, float]:
    options = {"indices": at, "batch_size": batch_size, "random_state": random_state}
    found = model.get_elbo_terms(private, n_samples=n_samples, **options).mean()
    bounds = {name: float(found[name]) for name in TERMS}
    if n_importance_samples > 0:
        bounds["importance_weighted"] = model.get_marginal_ll(private, n_mc_samples=n_importance_samples, **options)
    return bounds


def _table(
    cells: _Cells,
    bounds: dict[str, dict[str, float]],
    clusterings: dict[str, np.ndarray],
    truth: _Truth,
    latent: np.ndarray,
    seed: int,
) -> pd.DataFrame:
    """Table with a row for each subset and clustering, as anndata can write it."""
    rows = []
    for subset, at in cells.subsets.items():
        for name, clusters in (clusterings or {NO_CLUSTERING: None}).items():
            row = {"subset": subset, "clustering": name, "n_cells": len(at), **bounds[subset]}
            rows.append(row | _scores(clusters, truth, latent, at, cells.fitted, seed))
    table = pd.DataFrame(rows, index=[str(i) for i in range(len(rows))])
    texts = {name: table[name].astype(object) for name in ("subset", "clustering")}
    return table.assign(**texts, n_clusters=table["n_clusters"].astype("Int64"))


def _scores(
    clusters: np.ndarray | None, truth: _Truth, latent: np.ndarray, at: np.ndarray, fitted: np.ndarray, seed: int
) -> dict[str, Any]:
    """Scores of a clustering on some of the cells."""
    scored = at if truth.labels is None else at[metrics.is_scored(truth.labels[at])]
    scores: dict[str, Any] = {"n_scored": len(scored), "n_clusters": None}
    if clusters is not None:
        scores["n_clusters"] = len(set(clusters[scored]))
    if truth.labels is not None:
        scores |= _agreement(clusters, truth.labels, at, fitted)
    scores["silhouette"] = np.nan
    if clusters is not None:
        scores["silhouette"] = metrics.silhouette(latent[scored], clusters[scored], random_state=seed)
    if truth.superset is not None:
        coarse = _agreement(clusters, truth.superset, at, fitted)
        scores |= {f"superset_{name}": value for name, value in coarse.items()}
    return scores


def _agreement(clusters: np.ndarray | None, labels: np.ndarray, at: np.ndarray, fitted: np.ndarray) -> dict[str, float]:
    """Scores by labels of some of the cells, the majority being that of the fitted ones."""
    if clusters is None:
        return dict.fromkeys(("accuracy", "ari", "ami"), np.nan)
    majority = metrics.majority_labels(clusters[fitted], labels[fitted])
    return {
        "accuracy": metrics.accuracy(clusters[at], labels[at], majority) if majority else np.nan,
        "ari": metrics.ari(clusters[at], labels[at]),
        "ami": metrics.ami(clusters[at], labels[at]),
    }
