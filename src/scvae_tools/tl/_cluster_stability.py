"""Measure how stable clusters are: the model is trained again with other seeds and on halves of the cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvae_tools import metrics
from scvae_tools._checks import check_random_source, checked
from scvae_tools._data.counts import require_anndata
from scvae_tools._data.roles import column_of_obs
from scvae_tools._keys import Keys
from scvae_tools._messages import inform, said_before, warn
from scvae_tools._other_names import answers_other_names
from scvae_tools._random import as_seed
from scvae_tools._results.cluster_stability import (
    DISSOLVED,
    DISSOLVED_UP_TO,
    HALF,
    SEED,
    STABILITY,
    STABLE,
    Stability,
    jaccard_of_most_similar,
    means_of_runs,
    verdicts,
)
from scvae_tools._results.writing import require_writable, write_uns
from scvae_tools._train.progress import is_shown, progress_bar
from scvae_tools._upstream import quiet
from scvae_tools._version import __version__
from scvae_tools.model._trainer_options import device_of
from scvae_tools.tl._stability_runs import Run, check_halves, planned_runs
from scvae_tools.tl._trainable_cells import TrainableCells, train_to_the_end
from scvae_tools.tl._training_of_result import TrainingOfResult

if TYPE_CHECKING:
    from anndata import AnnData


@answers_other_names
@checked(random_state=check_random_source)
def cluster_stability(
    adata: AnnData,
    *,
    key: str = "scvae",
    n_seeds: int = 4,
    n_halves: int = 4,
    mask_var: str | np.ndarray | None = None,
    accelerator: str = "auto",
    random_state: int | np.random.RandomState | np.random.Generator | None = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Measure whether the clusters of a result come back when its model is trained again.

    The model is trained with the arguments of the result: with other seeds on all cells, and on random halves of the
    cells. Each cluster is compared with the most similar cluster of each run by the Jaccard index, the number of cells
    in both over the number in either, among the cells of the run [Hennig07]_.

    Parameters
    ----------
    adata
        Annotated data with a result of :func:`scvae_tools.tl.scvae` with a mixture, and the counts and columns that it
        was trained on; never changed but for the key below. The clusters are those in ``adata.obs[key]``, also where
        that was edited. Cells without one are trained on, but not counted.
    key
        Key of the result, the ``key_added`` of :func:`scvae_tools.tl.scvae`.
    n_seeds
        Number of runs on all cells, each with a seed of its own. 0 for none.
    n_halves
        Number of runs on halves of the cells. The first two share no cell and have all cells together, and so have each
        two that follow. 0 for none.
    mask_var
        Genes, where the result was trained on those of an array and its model is not in memory. None for those that the
        result names.
    accelerator
        ``"auto"``, ``"cpu"``, ``"gpu"``, ``"mps"``.
    random_state
        Seed of the seeds and the halves, or a generator to draw it from. More runs begin with the same ones. The global
        random states are left as they were.
    progress
        Whether to show a progress bar, as in `scvae`.

    Returns
    -------
    A table with a row per cluster, indexed by its name, with the columns

    ``n_cells``
        Number of cells.
    ``jaccard_seeds``, ``jaccard_halves``
        Mean of the Jaccard index over the runs of the kind, from 0 to 1; NaN without such runs. Halves that have no
        cell of a cluster are left out of its mean.
    ``verdict`` : str
        By the lower of both means: ``"dissolved"`` up to 0.5, ``"stable"`` from 0.75 on, ``"uncertain"`` between;
        ``"unknown"`` if there is none.

    Sets ``adata.uns["scvae"]["stability"]``, a dict with this ``table``; ``jaccard``, the index of each cluster and
    run, (n_clusters, n_runs) float64, NaN where a half has no cell of the cluster; ``runs``, a table with a row per
    run: ``kind`` (``"seed"`` or ``"half"``), ``random_state``, ``pair`` (number of the pair of halves; −1 for all
    cells), ``n_cells``, ``n_clusters`` that have cells, and ``ari``, the adjusted Rand index with the clusters of the
    result; ``params``; and ``version``. `scvae` and `predict` delete it with the result.

    Raises
    ------
    TypeError
        If ``adata`` is not an AnnData.
    CountsError
        If the counts are not raw counts.
    ValueError
        If the result is not there, has no clusters, or does not tell how it was trained; if its genes or columns are
        gone; or if a half has too few cells for its model. All this is found before anything is trained.
    NonFiniteError
        If a training broke down twice.

    Notes
    -----
    Where the number of components was found, it is found anew in each run, within the limits that were given. On halves
    a fixed number of epochs means half the steps; ``max_epochs=None`` means as many steps.

    A mean of 0.5 or less is the border below which clusters count as dissolved [Hennig08]_; valid, stable clusters have
    0.75 or more (``clusterboot`` of the R package fpc). Between them, there is something in the data, but which cells
    belong to it is open. Clusters that come back need not be types: a model that cuts one population always at the same
    place is stable, too. A single component of all cells always comes back.

    It takes as long as ``n_seeds + n_halves`` calls of `scvae`, without λ. Options of Lightning's trainer are not
    repeated. After Ctrl-C, or any error, ``adata`` is as it was.

    Labels that train components hold them in place, and a warning says so.

    References
    ----------
    .. [Hennig07] Hennig (2007) Cluster-wise assessment of cluster stability. Computational Statistics & Data Analysis
       52:258, doi:10.1016/j.csda.2006.11.025.
    .. [Hennig08] Hennig (2008) Dissolution point and isolation robustness: robustness criteria for general cluster
       analysis methods. Journal of Multivariate Analysis 99:1154, doi:10.1016/j.jmva.2007.07.002.

    Examples
    --------
    >>> svt.tl.scvae(adata)
    >>> svt.tl.cluster_stability(adata)
    >>> svt.pl.cluster_stability(adata)
    """
    require_anndata(adata)
    require_writable(adata)
    if n_seeds + n_halves == 0:
        raise ValueError("`n_seeds` or `n_halves` must be at least 1; found 0 for both. Pass, for example, n_seeds=4.")
    training = TrainingOfResult.read(adata, key)
    clusters, names = _clusters(adata, key, training)
    cells = training.cells(adata, key, mask_var)
    with quiet():
        device_of(accelerator, training.of_training.get("devices", "auto"))
    seed = as_seed(random_state, None)
    runs = planned_runs(adata.n_obs, n_seeds, n_halves, seed, training.random_state)
    check_halves(cells, training, runs, len(names))
    if training.is_supervised:
        warn(
            f"The labels in adata.obs[{training.obs_keys['labels_key']!r}] train the components, here as in the "
            "result, and hold them in place: that their clusters come back says little. For clusters of the counts "
            "alone, train with y_term='kl', or without labels_key."
        )
    found = _clusters_of_runs(cells, training, runs, accelerator, progress=is_shown(progress))
    params = {"n_seeds": n_seeds, "n_halves": n_halves, "random_state": seed}
    result = _compared(clusters, names, runs, found, params)
    kept = dict(adata.uns[Keys(key).uns])
    write_uns(adata, Keys(key).uns, kept | {STABILITY: result.stored() | {"version": __version__}})
    _say_verdicts(result.table)
    return result.table.copy()


def _clusters(adata: AnnData, key: str, training: TrainingOfResult) -> tuple[np.ndarray, list[str]]:
    """Code of the cluster of each cell, −1 for none, (n_cells,), and names of the clusters that have cells."""
    if not training.is_mixture:
        raise ValueError(
            f"Stability is of clusters, the components of a mixture; found a result with mixture=False in "
            f"adata.uns[{key!r}]. Run svt.tl.scvae(adata, mixture=True, key_added={key!r}) first."
        )
    column = column_of_obs(adata, Keys(key).component, "key")
    column = column.astype("category").cat.remove_unused_categories()
    if len(column.cat.categories) == 0:
        raise ValueError(
            f"adata.obs[{key!r}] must hold the cluster of some cells; found none in {adata.n_obs:,}. Run svt.tl.scvae("
            f"adata, key_added={key!r}) again."
        )
    return column.cat.codes.to_numpy().astype(np.int64), [str(name) for name in column.cat.categories]


def _clusters_of_runs(
    cells: TrainableCells, training: TrainingOfResult, runs: list[Run], accelerator: str, *, progress: bool
) -> list[np.ndarray]:
    """Code of the cluster of each cell of each run, trained one after the other."""
    bar = progress_bar(len(runs), "cluster stability", "model") if progress else None
    found = []
    try:
        for run in runs:
            if bar is not None:
                bar.set_postfix_str(run.name)
            found.append(_clusters_of_run(cells, training, run, accelerator, bar))
            if bar is not None:
                bar.update(1)
    finally:
        if bar is not None:
            bar.close()
    return found


def _clusters_of_run(
    cells: TrainableCells, training: TrainingOfResult, run: Run, accelerator: str, bar: Any
) -> np.ndarray:
    options = {"accelerator": accelerator, "random_state": run.random_state}
    options["validation_indices"] = training.held_out(len(cells.obs), run.positions)
    with said_before():  # what there is to say of the cells, the result has said
        model = cells.build(run.positions, training.obs_keys, training.of_model | {"random_state": run.random_state})
    train_to_the_end(model, bar, run.name, **training.of_training, **options)
    with said_before():
        return pd.factorize(np.asarray(model.predict()))[0]


def _compared(
    clusters: np.ndarray, names: list[str], runs: list[Run], found: list[np.ndarray], params: dict[str, Any]
) -> Stability:
    """Clusters of the result compared with those of the runs."""
    jaccard, rows = np.empty((len(names), len(runs))), []
    for place, (run, others) in enumerate(zip(runs, found, strict=True)):
        own = clusters if run.positions is None else clusters[run.positions]
        jaccard[:, place] = jaccard_of_most_similar(own, others, len(names))
        numbers = {"n_cells": len(own), "n_clusters": len(np.unique(others))}
        ari = metrics.ari(others[own >= 0], own[own >= 0])
        rows.append({"kind": run.kind, "random_state": run.random_state, "pair": run.pair, **numbers, "ari": ari})
    table_of_runs = pd.DataFrame(rows, index=[str(i) for i in range(len(runs))])
    table_of_runs["kind"] = np.array([run.kind for run in runs], dtype=object)
    is_of = {kind: np.array([run.kind == kind for run in runs]) for kind in (SEED, HALF)}
    means = {kind: means_of_runs(jaccard[:, chosen]) for kind, chosen in is_of.items()}
    table = pd.DataFrame(
        {
            "n_cells": np.bincount(clusters[clusters >= 0], minlength=len(names)),
            "jaccard_seeds": means[SEED],
            "jaccard_halves": means[HALF],
            "verdict": np.array(verdicts(*means.values()), dtype=object),
        },
        index=pd.Index(np.array(names, dtype=object), name="cluster"),
    )
    return Stability(table, jaccard, table_of_runs, params)


def _say_verdicts(table: pd.DataFrame) -> None:
    """Say how many clusters are stable, and name those that are dissolved."""
    inform("%d of %d clusters are stable.", (table["verdict"] == STABLE).sum(), len(table))
    if len(table) == 1:
        inform("There is one cluster: a run that has one, too, has all its cells in common with it, whatever they are.")
    dissolved = table[table["verdict"] == DISSOLVED]
    if len(dissolved) == 0:
        return
    kinds = {"jaccard_seeds": "seeds", "jaccard_halves": "halves"}
    said = []
    for name, row in dissolved.iterrows():
        means = ", ".join(
            f"{row[column]:.2f} over {kind}" for column, kind in kinds.items() if np.isfinite(row[column])
        )
        said.append(f"{name!r} ({means})")
    more = f"; and {len(said) - 10} more, see the table" if len(said) > 10 else ""
    warn(
        f"{len(said)} of {len(table)} clusters dissolve when the model is trained again, with a mean Jaccard index of "
        f"at most {DISSOLVED_UP_TO:g}: {'; '.join(said[:10])}{more}. Do not build on them. A smaller n_components may "
        "have clusters that are stable."
    )
