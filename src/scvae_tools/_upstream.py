"""Private functions of scvi-tools that this package uses, fields of its own, and a context that silences scvi-tools.

This is the one file to check when they change.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import rich.pretty  # noqa: F401  (scvi-tools uses it without importing it)
from scipy import sparse
from scvi import REGISTRY_KEYS
from scvi.data._constants import _SETUP_ARGS_KEY as SETUP_ARGS
from scvi.data._utils import _get_adata_minify_type as minified_type
from scvi.data.fields import CategoricalJointObsField, CategoricalObsField
from scvi.model import _utils
from scvi.model.base._archesmixin import _pad_and_sort_query_anndata as pad_and_sort_genes
from scvi.model.base._save_load import _initialize_model as initialize_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData
    from scvi.data import AnnDataManager

__all__ = [
    "SETUP_ARGS",
    "UsedCategoriesField",
    "UsedCategoriesJointField",
    "initialize_model",
    "minified_type",
    "one_process",
    "pad_and_sort_genes",
    "parse_device_args",
    "quiet",
    "rows_as_arrays",
]


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """Context in which Lightning takes a job of SLURM for one process, as it does for one with this name.

    Otherwise it takes the number of tasks of the job for that of its own processes, and refuses any but its own.
    """
    name, former = "SLURM_JOB_NAME", os.environ.get("SLURM_JOB_NAME")
    os.environ[name] = "interactive"
    try:
        yield
    finally:
        if former is None:
            del os.environ[name]
        else:
            os.environ[name] = former


class _RowsAsArrays:
    """Counts whose rows are sparse arrays, of which ``*`` multiplies each row with its number."""

    def __init__(self, counts: Any) -> None:
        self.counts, self.sum = counts, counts.sum

    def __getitem__(self, index: Any) -> sparse.csr_array:
        return sparse.csr_array(self.counts[index])


@contextlib.contextmanager
def rows_as_arrays(manager: AnnDataManager, counts: Any) -> Iterator[None]:
    """Context in which a manager gives counts that stay in a file as `scrna_raw_counts_properties` can scale them.

    It tells scipy's matrices, which ``*`` would multiply as matrices, by their class.
    """
    if counts is None:
        yield
        return
    manager.get_from_registry = lambda key: (
        _RowsAsArrays(counts) if key == REGISTRY_KEYS.X_KEY else type(manager).get_from_registry(manager, key)
    )
    try:
        yield
    finally:
        del manager.get_from_registry


def parse_device_args(*args: Any, **kwargs: Any) -> tuple:
    """Accelerator, devices and, if asked for, the device of torch, as scvi-tools reads them, in `one_process`."""
    with one_process():
        return _utils.parse_device_args(*args, **kwargs)


class UsedCategoriesField(CategoricalObsField):
    """Field of a column of ``obs`` with categories, of which those without cells do not count."""

    def register_field(self, adata: AnnData) -> dict:
        """Register the field; the codes are those of the categories that have cells."""
        state = super().register_field(adata)
        used, codes = np.unique(adata.obs[self.attr_key], return_inverse=True)
        adata.obs[self.attr_key] = codes.astype(adata.obs[self.attr_key].dtype)
        return state | {self.CATEGORICAL_MAPPING_KEY: state[self.CATEGORICAL_MAPPING_KEY][used]}


class UsedCategoriesJointField(CategoricalJointObsField):
    """Field of several columns of ``obs`` with categories, of which those without cells do not count."""

    def _combine_fields(self, adata: AnnData) -> None:
        super()._combine_fields(adata)
        table = adata.obsm[self.attr_key]
        for key in table.select_dtypes("category"):
            table[key] = table[key].cat.remove_unused_categories()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what Lightning and scvi-tools say about devices, loaders and workers, inside only."""
    names = (
        "lightning.pytorch",
        "lightning.fabric",
        "lightning",
        "pytorch_lightning",
        "scvi",
        "lightning.pytorch.utilities.rank_zero",
    )
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", category=UserWarning, module=r"scvi\..*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
