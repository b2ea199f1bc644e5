"""State of a training: all that it changes of a model beside the weights, as a dataclass and as JSON text."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd

from scvae_tools._files import from_plain, to_plain

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from scvae_tools._train.versions import Version


@dataclass
class TrainingState:
    """State of a training: everything that a training changes of a model beside the weights.

    Checkpoints and saved models contain the state. It also tells whether Ctrl-C ended the last training.

    Parameters
    ----------
    n_components
        Number of components, a range, or None, as given to the model. Once the mixture has been built, the number
        found.
    is_trained
        Whether a stage has ended.
    history
        A row per epoch of all trainings so far; None before the first.
    component_curve
        Overlap of the components by their number; None unless the number was to be found.
    valley_p_values
        Probability of each two components that they are one population, by the test of valleys at the start of the
        mixture, (k, k) in their order; None where labels train the components.
    versions, version
        Versions of the weights, and the name of the version in use; none before a training has ended.
    is_interrupted
        Whether Ctrl-C ended the last training.
    null_log_likelihood
        Log-likelihood of the model without latent variables, in nats per cell, by the subset of the cells; None before
        a training of some length has ended, and for models saved by versions without it. Not in checkpoints: it is
        computed after the last epoch.
    """

    n_components: int | tuple[int, int] | None = None
    is_trained: bool = False
    history: pd.DataFrame | None = None
    component_curve: pd.DataFrame | None = None
    valley_p_values: np.ndarray | None = None
    versions: Mapping[str, Version] = field(default_factory=dict)
    version: str | None = None
    is_interrupted: bool = False
    null_log_likelihood: dict[str, float] | None = None

    @property
    def n_epochs(self) -> int:
        """Number of epochs of all trainings so far."""
        return 0 if self.history is None else len(self.history)

    def add_epochs(self, rows: list[dict]) -> None:
        """Append rows to the history."""
        earlier = [] if self.history is None else [self.history]
        self.history = pd.concat([*earlier, pd.DataFrame(rows)], ignore_index=True)

    def forget_versions(self) -> None:
        """Drop the versions of an earlier training: the weights in use are none of them any more."""
        self.versions, self.version = {}, None

    def to_json(self, n_built: int | None) -> str:
        """State as JSON text, without the versions; ``n_built`` is the number of components that the module has."""
        return json.dumps(
            {
                "history_": to_plain(self.history, "history"),
                "component_curve_": to_plain(self.component_curve, "component_curve"),
                "valley_p_values_": to_plain(self.valley_p_values, "valley_p_values"),
                "is_trained_": self.is_trained,
                "n_components": n_built,
                "init_n_components": to_plain(self.n_components, "n_components"),
            }
        )

    def update_from_json(self, text: str) -> int | None:
        """Restore the state that `to_json` wrote; return the number of components that the module had."""
        saved = {name: from_plain(value) for name, value in json.loads(text).items()}
        self.history, self.component_curve = saved["history_"], saved["component_curve_"]
        self.valley_p_values = saved.get("valley_p_values_")  # not in checkpoints of earlier versions
        self.is_trained, self.n_components = saved["is_trained_"], saved["init_n_components"]
        return saved["n_components"]
