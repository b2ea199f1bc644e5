"""Roles of the columns of obs: batch, labels, size factor and covariates, and what each column must hold.

`ROLES` is the one table of them. The set-up of a model, the tools and the command line read it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scvi import REGISTRY_KEYS

from scvae_tools._checks import check_is_one
from scvae_tools._data.count_checks import first_cells
from scvae_tools._data.counts import require_anndata
from scvae_tools._messages import listed, warn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from anndata import AnnData


@dataclass(frozen=True)
class Role:
    """Role that a column of ``obs``, or several columns, can have in a model.

    Parameters
    ----------
    registry_key
        Key under which scvi-tools registers the column.
    check
        Check of a column: takes the AnnData, the name of the column and that of the argument.
    is_categorical
        Whether the column holds categories; it holds numbers otherwise.
    takes_several
        Whether the argument is a list of columns.
    is_input
        Whether the column is an input of the networks; it holds known labels otherwise.
    """

    registry_key: str
    check: Callable[[AnnData, str, str], object]
    is_categorical: bool = True
    takes_several: bool = False
    is_input: bool = True

    def keys(self, value: object, argument: str) -> list[str]:
        """Names of the columns that an argument gives."""
        if value is None:
            return []
        if not self.takes_several:
            check_is_one(value, argument)
            return [value]
        if isinstance(value, str):
            raise TypeError(f"`{argument}` must be a list of names; found the string {value!r}. Pass [{value!r}].")
        if not isinstance(value, Iterable):
            raise TypeError(f"`{argument}` must be a list of names; found {value!r}. Pass a list.")
        names = list(value)
        if repeated := [name for place, name in enumerate(names) if name in names[:place]]:
            raise ValueError(f"`{argument}` must name each column once; found {repeated[0]!r} again. Leave it out.")
        return names


def as_list(value: Iterable[str] | str | None) -> list[str] | None:
    """Names of columns as a list, also for a single name; None for None."""
    return None if value is None else [value] if isinstance(value, str) else list(value)


def obs_keys_of(arguments: Mapping[str, Any], *, inputs_only: bool = False) -> dict[str, Any]:
    """Columns of ``obs`` by their roles, and the category of unlabelled cells, from the arguments of a tool."""
    roles = {name: role for name, role in ROLES.items() if role.is_input or not inputs_only}
    keys = {name: as_list(arguments[name]) if role.takes_several else arguments[name] for name, role in roles.items()}
    return keys if inputs_only else keys | {"unlabeled_category": arguments["unlabeled_category"]}


def columns_in(obs_keys: Mapping[str, Any]) -> list[str]:
    """Names of all columns that have a role, each once."""
    names = [name for argument, role in ROLES.items() for name in role.keys(obs_keys.get(argument), argument)]
    return list(dict.fromkeys(names))


def check_obs(adata: AnnData, *, unlabeled_category: str | None = None, is_new: bool = False, **obs_keys: Any) -> None:
    """Check the columns of ``adata.obs`` that a model is to use.

    Parameters
    ----------
    adata
        Cells.
    unlabeled_category
        Category in the labels for cells without a label.
    is_new
        Whether the cells are shown to a model that is trained, so that a batch may have a single cell.
    **obs_keys
        Columns by their roles in `ROLES`; a role that is left out has no column.

    Raises
    ------
    TypeError
        If ``adata`` is not an AnnData, or a list of keys is a string.
    ValueError
        If a column does not exist, or holds what its role forbids: missing categories, a batch of a single cell,
        covariates that are not finite numbers, size factors that are not positive.
    """
    require_anndata(adata)
    if obs_keys.get("labels_key") is None and unlabeled_category is not None:
        raise ValueError(f"`unlabeled_category` needs `labels_key`; found {unlabeled_category!r} without one.")
    for argument, role in ROLES.items():
        check = check_categories if is_new and role.check is _check_batch else role.check
        for key in role.keys(obs_keys.get(argument), argument):
            check(adata, key, argument)
    if unlabeled_category is not None:
        _check_labels(adata.obs[obs_keys["labels_key"]], obs_keys["labels_key"], unlabeled_category)


def column_of_obs(adata: AnnData, key: str, argument: str) -> pd.Series:
    check_is_one(key, argument)
    columns = [str(name) for name in adata.obs.columns if not str(name).startswith("_scvi")]
    if key in adata.obs.columns:
        column = adata.obs[key]
        if column.ndim > 1:
            raise ValueError(
                f"`{argument}` must name one column of adata.obs; found {column.shape[1]} columns {key!r}. Rename or "
                "remove the others."
            )
        return column
    close = get_close_matches(str(key), columns)
    remedy = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Pass one of {listed(columns)}."
    raise ValueError(f"`{argument}` must name a column of adata.obs; found {key!r}, which is not one. {remedy}")


def check_categories(adata: AnnData, key: str, argument: str) -> pd.Series:
    column = column_of_obs(adata, key, argument)
    missing = np.flatnonzero(column.isna())
    if len(missing):
        raise ValueError(
            f"adata.obs[{key!r}] (`{argument}`) must have a category for every cell; found none for {len(missing):,} "
            f"of {adata.n_obs:,} cells: {first_cells(adata, missing)}. Give them a category of their own (of labels "
            f"the `unlabeled_category`), or remove them: adata = adata[adata.obs[{key!r}].notna()].copy()."
        )
    _check_kinds(column, f"adata.obs[{key!r}]", argument)
    return column


#: What categories may be: values that a saved model knows again, and of which each two can be compared.
KINDS = {"text": str, "True and False": (bool, np.bool_), "numbers": (int, float, np.integer, np.floating)}


def _check_kinds(column: pd.Series, name: str, argument: str) -> None:
    """Refuse categories that a saved model could not hold, such as dates, and those of several kinds."""
    is_categorical = isinstance(column.dtype, pd.CategoricalDtype)
    values = column.cat.remove_unused_categories().cat.categories if is_categorical else column
    types = sorted(set(map(type, values)), key=lambda each: each.__name__)
    kinds = {next((kind for kind, base in KINDS.items() if issubclass(each, base)), None) for each in types}
    if len(kinds) > 1 or None in kinds:
        raise ValueError(
            f"{name} (`{argument}`) must hold categories of one kind, {', '.join(KINDS)}, that a saved model can hold; "
            f"found the types {', '.join(each.__name__ for each in types)}. Make them text: "
            f"{name} = {name}.astype(str)."
        )


#: What cells without a label are often called, in lower case.
NAMES_OF_NO_LABEL = {
    *("unknown", "unlabeled", "unlabelled", "unassigned", "unannotated", "undefined", "undetermined", "ambiguous"),
    *("na", "n/a", "nan", "none", "null", "not assigned", "?", "-", ""),
}


def warn_of_names_of_no_label(adata: AnnData, labels_key: str | None, unlabeled_category: str | None) -> None:
    """Warn where a label sounds like that of cells without one, and would be a cell type like any other."""
    if labels_key is None or unlabeled_category is not None:
        return
    column = adata.obs[labels_key]
    counts = column.astype(str).value_counts()
    found = [name for name in counts.index if name.strip().lower() in NAMES_OF_NO_LABEL and counts[name] > 0]
    if found:
        warn(
            f"`labels_key`: {listed(found)} in adata.obs[{labels_key!r}] ({counts[found].sum():,} of {len(column):,} "
            f"cells) is taken for a label like any other. If these cells have none, pass "
            f"unlabeled_category={found[0]!r}."
        )


def _check_labels(column: pd.Series, key: str, unlabeled_category: str) -> None:
    is_unlabeled = column.astype(str) == str(unlabeled_category)
    if not is_unlabeled.any():
        raise ValueError(
            f"`unlabeled_category` must be what adata.obs[{key!r}] holds for cells without a label; found "
            f"{unlabeled_category!r}, which it does not hold. Pass one of {listed(column.unique())}, or None."
        )
    if is_unlabeled.all():
        raise ValueError(
            f"adata.obs[{key!r}] (`labels_key`) must hold a label for some cells; found {unlabeled_category!r} in all "
            f"{len(column):,}. Leave `labels_key` out."
        )


def _check_batch(adata: AnnData, key: str, argument: str) -> None:
    column = check_categories(adata, key, argument)
    sizes = column.value_counts(sort=False)
    single = sizes.index[sizes == 1]  # unused categories have size 0 and do no harm
    if len(single) == 0:
        return
    cell = adata.obs_names[np.flatnonzero(column == single[0])[0]]
    raise ValueError(
        f"adata.obs[{key!r}] (`{argument}`) must have at least two cells in every batch; found one cell, {cell!r}, in "
        f"batch {single[0]!r} ({len(single):,} such of {len(sizes):,} batches). Merge the batch with another, or "
        f"remove it: adata = adata[adata.obs[{key!r}] != {single[0]!r}].copy()."
    )


#: Largest number in a column, whose square float32 can nearly hold.
LARGEST_VALUE = 1e18


def _check_finite(adata: AnnData, key: str, argument: str) -> np.ndarray:
    """Check a numeric column, and return it as (n_cells,) float64."""
    column = column_of_obs(adata, key, argument)
    if not pd.api.types.is_numeric_dtype(column) or column.dtype.kind == "c":
        raise ValueError(
            f"adata.obs[{key!r}] (`{argument}`) must be numeric; found {column.dtype}. "
            "Convert it with pandas.to_numeric, or pass it as categorical."
        )
    values = column.to_numpy(dtype=np.float64, na_value=np.nan)
    _refuse_cells(adata, ~np.isfinite(values), values, f"adata.obs[{key!r}] (`{argument}`) must be finite")
    rule = f"adata.obs[{key!r}] (`{argument}`) must be at most {LARGEST_VALUE:g} in size"
    _refuse_cells(adata, np.abs(values) > LARGEST_VALUE, values, rule)
    return values


#: Largest ratio of two size factors; those of real cells differ by a few thousand.
LARGEST_RATIO = 1e12


def _check_size_factor(adata: AnnData, key: str, argument: str) -> None:
    values = _check_finite(adata, key, argument)
    _refuse_cells(adata, values <= 0, values, f"adata.obs[{key!r}] (`{argument}`) must be above 0")
    least = f"adata.obs[{key!r}] (`{argument}`) must be at least {1 / LARGEST_VALUE:g}"
    _refuse_cells(adata, values < 1 / LARGEST_VALUE, values, least)
    middle, reach = np.median(values), LARGEST_RATIO**0.5
    rule = f"adata.obs[{key!r}] (`{argument}`) must be within a factor of {reach:,.0f} of its median, {middle:.8g}"
    _refuse_cells(adata, (values > reach * middle) | (values < middle / reach), values, rule)


def _refuse_cells(adata: AnnData, bad: np.ndarray, values: np.ndarray, rule: str) -> None:
    if not bad.any():
        return
    first = int(np.argmax(bad))
    raise ValueError(
        f"{rule}; found {values[first]:.8g} in cell {adata.obs_names[first]!r} ({bad.sum():,} such of "
        f"{adata.n_obs:,} cells). Correct the values or remove the cells."
    )


def labels_to_score_by(adata: AnnData, labels_key: str | None) -> pd.Series | None:
    """Labels of the cells that clusters are scored by, some of which may be missing; None for None."""
    if labels_key is None:
        return None
    labels = column_of_obs(adata, labels_key, "labels_key")
    if labels.isna().all():
        raise ValueError(
            f"adata.obs[{labels_key!r}] (`labels_key`) must hold labels to score by; found none. Leave it out."
        )
    return labels


#: Every role by the argument that names its column, in `SCVAE.setup_anndata` and the tools.
ROLES = {
    "batch_key": Role(REGISTRY_KEYS.BATCH_KEY, _check_batch),
    "labels_key": Role(REGISTRY_KEYS.LABELS_KEY, check_categories, is_input=False),
    # Without it the size factor of a cell is its total count.
    "size_factor_key": Role(REGISTRY_KEYS.SIZE_FACTOR_KEY, _check_size_factor, is_categorical=False),
    "categorical_covariate_keys": Role(REGISTRY_KEYS.CAT_COVS_KEY, check_categories, takes_several=True),
    "continuous_covariate_keys": Role(
        REGISTRY_KEYS.CONT_COVS_KEY, _check_finite, is_categorical=False, takes_several=True
    ),
}
