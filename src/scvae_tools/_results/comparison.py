"""Stored results of comparisons of models: columns of the table, and finished rows by their hashes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Columns of the table after those of the parameters; ``ari`` only where there are labels.
RESULTS = (
    "epochs",
    "seconds",
    "elbo_train",
    "elbo_validation",
    "elbo_test",
    "log_likelihood_test",
    "kl_z_test",
    "kl_y_test",
    "importance_weighted_test",
    "components_used",
    "ari",
)


WHOLE_NUMBERS = ("epochs", "components_used")


STATE, FINISHED = "state", "finished"


def finished_rows(former: object) -> dict[str, dict[str, Any]]:
    """Finished rows of a result in ``uns``, by their hashes."""
    if not isinstance(former, Mapping) or not {"table", "hashes"} <= set(former):
        return {}
    table = former["table"]
    names = [name for name in (*RESULTS, STATE) if name in table]
    rows = table[names].astype(object).where(table[names].notna(), None).to_dict("records")
    return {name: row for name, row in zip(former["hashes"], rows, strict=True) if row[STATE] == FINISHED}
