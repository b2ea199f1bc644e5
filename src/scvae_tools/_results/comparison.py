"""Stored results of comparisons of models: columns of the table, its ranking, and finished rows by their hashes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pandas import DataFrame

#: Columns of the table after those of the parameters; ``ari`` only where there are labels.
RESULTS = (
    "epochs",
    "seconds",
    "elbo_train",
    "elbo_validation",
    "elbo_test",
    "elbo_above_null",
    "log_likelihood_test",
    "kl_z_test",
    "kl_y_test",
    "importance_weighted_test",
    "components_used",
    "ari",
)


WHOLE_NUMBERS = ("epochs", "components_used")


#: Bounds that models can be ranked by, the best first.
BOUNDS = ("importance_weighted_test", "elbo_test")


#: Columns that depend on the other rows; results of earlier versions have none.
RANK, DIFFERENCE, DIFFERENCE_SE = "rank", "difference", "difference_se"
IS_TIED, IS_RECOMMENDED = "is_tied", "is_recommended"
RANKING = (RANK, DIFFERENCE, DIFFERENCE_SE, IS_TIED, IS_RECOMMENDED)


#: Standard errors within which a difference from the best is called a tie: of two equal models, in 19 of 20 cases.
TIED_WITHIN = 2.0


STATE, FINISHED = "state", "finished"


#: Argument by which the models of one setting differ.
SEED = "random_state"


#: Bounds of the test cells in a row of a `Store`, and in ``uns`` for all rows, (n_rows, n_test_cells).
BOUND_BY_CELL = "bound_by_cell"


def ranked_by(table: DataFrame) -> str:
    """Name the bound that the models are ranked by: the first of `BOUNDS` that all finished ones have."""
    finished = table[table[STATE] == FINISHED]
    return next((name for name in BOUNDS if name in table and finished[name].notna().all()), BOUNDS[-1])


def finished_rows(former: object) -> dict[str, dict[str, Any]]:
    """Finished rows of a result in ``uns``, by their hashes."""
    if not isinstance(former, Mapping) or not {"table", "hashes"} <= set(former):
        return {}
    table = former["table"]
    names = [name for name in (*RESULTS, STATE) if name in table]
    rows = table[names].astype(object).where(table[names].notna(), None).to_dict("records")
    if BOUND_BY_CELL in former:
        for row, bounds in zip(rows, former[BOUND_BY_CELL], strict=True):
            row[BOUND_BY_CELL] = None if np.isnan(bounds).all() else bounds.tolist()
    return {name: row for name, row in zip(former["hashes"], rows, strict=True) if row[STATE] == FINISHED}
