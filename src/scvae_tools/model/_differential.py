"""p-values beside the differential expression of scvi-tools, from the counts of the groups that it compares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvae_tools.model._count_evidence import count_evidence
from scvae_tools.model._fold_changes import FoldChanges, adjusted_p_values, fold_changes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData

    from scvae_tools.model._decoding import DecodingMixin

#: False discovery rate of scvi-tools where none is given.
DEFAULT_RATE = 0.05


def with_p_values(
    model: DecodingMixin, table: pd.DataFrame, adata: AnnData, given: Mapping[str, Any], random_state: int
) -> pd.DataFrame:
    """Table of scvi-tools with p-values of the differences in the counts, and with calls of genes by them.

    Parameters
    ----------
    model
        Trained model; where its data are minified, the table is returned as it is.
    table
        Result of ``differential_expression`` of scvi-tools.
    adata
        Cells.
    given
        Arguments of the call by name, as `compared_cells` checked them.
    random_state
        Seed of the draws of z.
    """
    if model.minified_data_type is not None:
        return table
    code, contrasts = _comparisons(adata, given)
    options = {"adjusts": bool(given.get("batch_correction", False)), "random_state": random_state}
    changes = fold_changes(count_evidence(model, adata, code, contrasts.shape[1], **options), contrasts)
    # The table has the comparisons one after the other, each with all genes in an order of its own.
    names = pd.Index(model.var_names)
    place = np.where(names.duplicated(keep=False), -1, np.arange(len(names)))  # genes of one name cannot be told apart
    of_name = pd.Series(place, index=names)[~names.duplicated()]
    gene = of_name[table.index].to_numpy()
    comparison = np.repeat(np.arange(len(contrasts)), len(names))
    deltas = table["delta"].to_numpy() if "delta" in table else np.zeros(len(table))
    changes = FoldChanges(*(value[comparison, gene] / np.log(2) for value in changes))
    p_values = np.where(gene < 0, 1.0, changes.p_values(deltas))
    table["lfc_counts"], table["lfc_se"] = (np.where(gene < 0, np.nan, value) for value in changes)
    table["pval"] = p_values
    table["pval_adj"] = adjusted_p_values(p_values.reshape(len(contrasts), -1)).ravel()
    own = given.get("kwargs", {})
    rate = given.get("fdr_target", DEFAULT_RATE)
    if f"is_de_fdr_{rate}" in table and own.get("change_fn") is None and own.get("m1_domain_fn") is None:
        table[f"is_de_fdr_{rate}"] = table["pval_adj"] <= rate
    return table


def _comparisons(adata: AnnData, given: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Group of each cell, −1 for none, and weight of each group in each comparison, (n_comparisons, n_groups).

    Groups are those to compare, then the one to compare with, or all other cells.
    """
    label, first, second = _labels(adata, given)
    names = [*dict.fromkeys(first)]
    code = np.full(adata.n_obs, len(names) if second is None else -1)
    if second is not None and second not in names:
        names.append(second)
    for place, name in enumerate(names):
        code[label == name] = place
    n_cells = np.bincount(code[code >= 0], minlength=len(names) + (second is None)).astype(float)
    contrasts = np.zeros((len(first), len(n_cells)))
    for row, name in enumerate(first):
        others = n_cells.copy() if second is None else np.eye(len(n_cells))[names.index(second)]
        if second is None:
            others[names.index(name)] = 0
        contrasts[row] = -others / others.sum()
        contrasts[row, names.index(name)] += 1
    return code, contrasts


def _labels(adata: AnnData, given: Mapping[str, Any]) -> tuple[np.ndarray, list, Any]:
    """Label of each cell, those of the groups to compare, and that to compare with, None for all other cells."""
    first, second = list(given.get("group1", ())), given.get("group2")
    if given.get("idx1") is not None:
        label, first, second = np.full(adata.n_obs, "none", dtype=object), ["one"], None
        label[given["idx1"]] = "one"
        if given.get("idx2") is not None:
            label[given["idx2"]], second = "two", "two"  # where both, as in scvi-tools
    else:
        label = adata.obs[given["groupby"]].to_numpy(dtype=object)
    chosen = given.get("kwargs", {}).get("subset_idx")
    if chosen is not None:
        is_in = np.zeros(adata.n_obs, dtype=bool)
        is_in[adata.obs.index.isin(adata.obs.query(chosen).index) if isinstance(chosen, str) else chosen] = True
        label = np.where(is_in, label, None)
    return label, first, second
