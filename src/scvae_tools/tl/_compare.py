"""Compare models: every combination of given arguments, trained and scored on one split of the cells."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np

from scvae_tools._checks import check_key, check_random_source, checked, whole_or_auto
from scvae_tools._data.counts import read_counts, require_anndata, resolve_mask_var
from scvae_tools._data.roles import check_obs, labels_to_score_by, obs_keys_of
from scvae_tools._messages import inform, warn
from scvae_tools._other_names import answers_other_names
from scvae_tools._random import as_seed
from scvae_tools._results.comparison import BOUND_BY_CELL, ranked_by
from scvae_tools._results.writing import require_writable, write_uns
from scvae_tools._train.progress import is_shown
from scvae_tools._version import __version__
from scvae_tools.likelihoods import get_likelihood
from scvae_tools.tl._comparison import Comparison
from scvae_tools.tl._comparison_cells import Cells
from scvae_tools.tl._comparison_grid import (
    OBS_KEYS,
    as_text,
    check_combinations,
    check_names,
    combine,
    defaults_of_models,
    distinct,
)
from scvae_tools.tl._comparison_ranking import verdict
from scvae_tools.tl._comparison_store import Store

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData

#: Draws for the importance-weighted bound of all test cells of a model, and of each, unless told otherwise.
ALL_DRAWS, LEAST_DRAWS, MOST_DRAWS = 200_000, 100, 1_000


@answers_other_names
@checked(random_state=check_random_source, n_importance_samples=whole_or_auto)
def compare(
    adata: AnnData,
    grid: Mapping[str, Sequence[Any]],
    *,
    layer: str | None = None,
    mask_var: str | np.ndarray | None = None,
    batch_key: str | None = None,
    size_factor_key: str | None = None,
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    labels_key: str | None = None,
    max_epochs: int | None = None,
    train_size: float = 0.8,
    test_size: float = 0.1,
    n_importance_samples: int | str | None = "auto",
    accelerator: str = "auto",
    random_state: int | np.random.RandomState | np.random.Generator | None = 0,
    key_added: str = "scvae_compare",
    directory: str | Path | None = None,
    allow_non_integer: bool = False,
    progress: bool | None = None,
    **kwargs: Any,
) -> pd.DataFrame:
    """Train a model for every combination of arguments, and compare them on cells that none of them has seen.

    The cells are divided once, for all models: those of the training, those of the validation, which choose the best
    weights and tell when to stop, and those of the test, which play no part in any training. The bounds of the test
    cells are what likelihoods, mixtures and sizes can be compared by. Models are ranked by the importance-weighted
    bound, and each is compared with the best cell by cell, so that a difference that the test cells do not show is
    called a tie.

    Parameters
    ----------
    adata
        Annotated data, cells x genes, with raw counts; never changed but for the key below.
    grid
        Values to combine, by the name of the argument: those of `SCVAE` (``"likelihood"``, ``"mixture"``,
        ``"n_components"``, ``"n_latent"``, ...) and `SCVAE.train` (``"lr"``, ``"batch_size"``, ``"max_epochs"``, ...),
        ``"random_state"`` for the seeds of the models, and ``"batch_key"``, ``"size_factor_key"``,
        ``"categorical_covariate_keys"`` and ``"continuous_covariate_keys"``. What takes several numbers has them as one
        value: ``{"n_hidden": [128, (250, 100)], "dropout_rate": [0.2, {"input": 0.1}]}``.
    layer, mask_var
        Layer of the counts, and genes to use, as in `scvae`; the same for all models, since likelihoods of other counts
        cannot be compared.
    batch_key, size_factor_key, categorical_covariate_keys, continuous_covariate_keys
        Columns of ``obs``, as in `scvae`, where ``grid`` does not name them.
    labels_key
        Column of ``obs`` with labels to score the clusters by. No model is trained on them. Cells whose label is
        missing are not scored.
    max_epochs
        Largest number of epochs of a model; None for about 4,000 steps of 128 cells.
    train_size, test_size
        Shares of the cells to train on and to test on; the others are those of the validation.
    n_importance_samples
        Samples per test cell for the importance-weighted bound. ``"auto"`` for about 200,000 in all, but at least 100
        and at most 1,000 per cell: the fewer the test cells, the less a difference may owe to the draws. None to leave
        this bound out, and to rank by the ELBO, whose gap to log p(x) differs between likelihoods.
    accelerator
        ``"auto"``, ``"cpu"``, ``"gpu"``, ``"mps"``.
    random_state
        Seed of the split, and of the models where ``grid`` does not name ``"random_state"``; or a generator to draw it
        from. The global random states are left as they were.
    key_added
        Name of the result.
    directory
        Where to keep a small file for each finished combination, so that an interrupted comparison continues from
        there, also after a crash. None to continue from the result of a former call in ``adata.uns``.
    allow_non_integer
        Accept estimated (non-integer) counts, with a warning.
    progress
        Whether to show a progress bar, as in `scvae`.
    **kwargs
        Arguments of `SCVAE` and `SCVAE.train` that are the same for all models, such as ``likelihood="zinb"``.

    Returns
    -------
    A table with a row per combination, the last argument of ``grid`` varying fastest, and the columns

    arguments of ``grid`` : number, bool or str
        Their values; written as text (``"(250, 100)"``) where they are not all numbers or all of True and False.
    ``epochs``, ``seconds``
        Length of the training.
    ``elbo_train``, ``elbo_validation``, ``elbo_test``
        Evidence lower bound, nats per cell.
    ``elbo_above_null``
        ``elbo_validation`` less the log-likelihood of the same cells under the same model without latent variables,
        nats per cell: what the latent space explains. Missing after less than 120 steps.
    ``log_likelihood_test``, ``kl_z_test``, ``kl_y_test``
        Its terms, on the test cells.
    ``importance_weighted_test``
        Importance-weighted bound of log p(x), tighter than the ELBO, nats per cell.
        By it models are ranked, unless ``n_importance_samples`` is None.
    ``components_used``
        Components that are the most probable one of any cell; missing without a mixture.
    ``ari``
        Adjusted Rand index of these components and the labels, over all cells. Only with ``labels_key``.
    ``rank``
        Place of the setting by its bound, 1 for the best. A setting is all models that differ by ``random_state``
        alone, and these columns are the same for all of them. Likelihoods of different kinds are ranked apart.
    ``difference``, ``difference_se``
        Mean of the bound less that of the best setting, nats per cell, and its standard error: that of the paired
        difference over the test cells and, where there are several, over the seeds. 0 for the best setting.
    ``is_tied`` : bool
        Whether the setting is one of several within two standard errors of the best, itself included.
    ``is_recommended`` : bool
        Whether it is the one to take: of the tied ones that whose likelihood has the fewest parameters per gene, and
        if there are several, the best of these.
    ``state`` : str
        ``"finished"``, or the error that ended this combination; its results are then missing.

    Sets ``adata.uns["scvae_compare"]``, a dict with this ``table``; ``grid``, the values as text by argument;
    ``params``, the arguments that are the same for all; ``split``, with the positions ``train_indices``,
    ``validation_indices`` and ``test_indices`` and what they were drawn by; ``ranked_by``, the column that the models
    are ranked by, and ``bound_by_cell``, that bound of each test cell by the models, (n_rows, n_test_cells) in nats;
    ``hashes``, by which a later call finds what is finished; and ``version``.

    Raises
    ------
    CountsError
        If the counts are not raw counts, with the cell and the gene.
    ValueError
        If a name of ``grid`` or another argument is unknown, or a combination cannot be built; before any is trained.

    Notes
    -----
    A combination is trained once for each set of arguments, split, data and version of the package: one that is
    finished, also in a call with another ``grid``, is not trained again. A combination that failed is.

    Without a mixture, the arguments of mixtures (``n_components``, ``covariance``, ``weights``, ``y_term``) mean
    nothing: combinations that differ by them alone share one training.

    Ctrl-C stores the combinations that are finished, and ends the call.

    Models are trained one after the other. On many machines, `SCVAE` is a model class for Ray Tune by way of
    ``scvi.autotune.run_autotune``, with ``metrics="elbo_validation"`` and ``mode="max"``.

    Only models of the same counts have comparable bounds, and only likelihoods of the same kind: those of counts, of
    detection (``"bernoulli"``), and densities (``"gaussian"``, ``"log_normal"``, ``"lomax"``). A warning names the
    kinds that a grid mixes.

    A training ends a little differently with each seed, of which a single one says nothing: ``difference_se`` is then
    that of the test cells alone. Give ``"random_state"`` several values, and the seeds are in it. What a version
    finished that kept no bounds of cells, with the same number of samples, is not trained again: it has a
    ``difference``, but neither ``difference_se`` nor ``is_tied``.

    Examples
    --------
    >>> grid = {"likelihood": ["poisson", "nb", "zinb"], "n_latent": [5, 10, 20], "random_state": [0, 1, 2]}
    >>> svt.tl.compare(adata, grid, directory="comparison")
    >>> svt.pl.compare(adata)
    """
    arguments = dict(locals())
    require_anndata(adata)
    require_writable(adata)
    seed = as_seed(random_state, None)
    _check_sizes(train_size, test_size)
    named = {name: arguments[name] for name in (*OBS_KEYS, "max_epochs", "accelerator")}
    defaults = defaults_of_models()
    shared = set(inspect.signature(compare).parameters)
    values, fixed = check_names(grid, named, kwargs, defaults, shared)
    combinations = combine(values, defaults | {"random_state": seed} | fixed)
    mask = resolve_mask_var(adata, mask_var)
    counts = read_counts(adata, layer=layer, mask_var=mask, allow_non_integer=allow_non_integer)
    for keys in distinct(obs_keys_of(combination, inputs_only=True) for combination in combinations):
        check_obs(adata, **keys)
    known = {"labels": labels_to_score_by(adata, labels_key)} | _split(adata.n_obs, train_size, test_size, seed)
    names = adata.var_names if mask is None else adata.var_names[mask]
    cells = Cells(counts=counts, obs=adata.obs, names=names, allow_non_integer=allow_non_integer, **known)
    check_combinations(cells, combinations, values, defaults)
    _warn_of_kinds({combination["likelihood"] for combination in combinations})

    store = Store(adata.uns.get(check_key("key_added", key_added)), directory)
    n_draws = _n_draws(n_importance_samples, len(cells.test))
    fixed |= {"layer": layer, "mask_var": mask_var if isinstance(mask_var, str) else None, "labels_key": labels_key}
    fixed |= {"n_importance_samples": n_draws, "allow_non_integer": allow_non_integer}
    split = {"random_state": seed, "train_size": float(train_size), "test_size": float(test_size)}
    comparison = Comparison(cells, values, combinations, n_draws, store)
    try:
        comparison.run(progress=is_shown(progress))
    except BaseException:  # Ctrl-C, the end of the process, a full disk
        if comparison.rows:
            _write_result(adata, key_added, comparison, fixed, split)
            warn(
                f"The comparison was ended early. The {len(comparison.rows)} of {len(combinations)} combinations that "
                f"are done are in adata.uns[{key_added!r}]; the same call goes on from there."
            )
        raise
    return _write_result(adata, key_added, comparison, fixed, split)


def _n_draws(n_importance_samples: int | str | None, n_test: int) -> int | None:
    """Draws of each test cell, None for none."""
    if n_importance_samples == "auto":
        return min(max(ALL_DRAWS // n_test, LEAST_DRAWS), MOST_DRAWS)
    return n_importance_samples


#: What the bound of a likelihood is of, by `Likelihood.measures`.
KINDS = {"counts": "probabilities of counts", "detection": "probabilities of x > 0", "density": "densities"}


def _warn_of_kinds(likelihoods: set[str]) -> None:
    """Say which of the likelihoods cannot be compared with each other."""
    by_kind: dict[str, list[str]] = {}
    for name in sorted(likelihoods):
        by_kind.setdefault(get_likelihood(name).measures, []).append(repr(name))
    if len(by_kind) > 1:
        found = ", ".join(f"{KINDS[kind]} ({', '.join(by_kind[kind])})" for kind in KINDS if kind in by_kind)
        warn(
            "Bounds can only be compared between likelihoods of the same kind: a density has no upper bound, and "
            f"whether a count is above 0 says less than the count. The grid has {found}. Compare bounds within each "
            "kind, and the kinds by `ari`."
        )


def _check_sizes(train_size: float, test_size: float) -> None:
    if not train_size + test_size < 1 - 1e-9:
        raise ValueError(
            "`train_size` and `test_size` must leave cells for the validation, which chooses the weights: their sum "
            f"must be below 1; found {train_size!r} and {test_size!r}. Pass, for example, 0.8 and 0.1."
        )


def _split(n_cells: int, train_size: float, test_size: float, seed: int) -> dict[str, np.ndarray]:
    """Positions of the cells of ``train``, ``validation`` and ``test``, ascending."""
    n_train, n_test = round(train_size * n_cells), round(test_size * n_cells)
    n_validation = n_cells - n_train - n_test
    if min(n_train, n_validation, n_test) < 1:
        raise ValueError(
            f"`train_size` and `test_size` must leave cells in each of the three parts; found {n_train} to train on, "
            f"{n_validation} for the validation and {n_test} for the test, of {n_cells}. Pass other shares, or more "
            "cells."
        )
    order = np.random.default_rng(seed).permutation(n_cells)
    parts = map(np.sort, np.split(order, [n_train, n_train + n_validation]))
    return dict(zip(("train", "validation", "test"), parts, strict=True))


def _writable(value: object) -> object:
    """A value that anndata can write."""
    is_plain = isinstance(value, str | bool | int | float | np.ndarray | np.generic)
    return value if is_plain else as_text(value)


def _write_result(
    adata: AnnData, key: str, comparison: Comparison, fixed: dict[str, Any], split: dict[str, Any]
) -> pd.DataFrame:
    """Write what is done into ``uns``, and return its table."""
    cells, (table, settings) = comparison.cells, comparison.table()
    bound = ranked_by(table)
    indices = {"train_indices": cells.train, "validation_indices": cells.validation, "test_indices": cells.test}
    result = {
        "table": table,
        "grid": {name: np.array(list(map(as_text, given)), dtype=object) for name, given in comparison.values.items()},
        "params": {name: _writable(value) for name, value in fixed.items() if value is not None},
        "split": split | indices,
        "ranked_by": bound,
        BOUND_BY_CELL: comparison.bound_by_cell(),
        "hashes": np.array([comparison.hashes[i] for i in sorted(comparison.rows)], dtype=object),
        "version": __version__,
    }
    write_uns(adata, key, result)
    if len(settings) > 1:
        inform("%s", verdict(settings, comparison.values, bound))
    return table.copy()
