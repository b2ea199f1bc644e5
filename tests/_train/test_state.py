"""State of a training: what files hold of it comes back, and nothing of an earlier training stays by mistake."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from scvae_tools._train.state import TrainingState

ROWS = [{"epoch": 1, "stage": "vae", "elbo_train": -3.5}, {"epoch": 2, "stage": "mixture", "elbo_train": np.nan}]


@pytest.mark.parametrize("n_components", [None, 3, (4, 20)])
def test_what_is_written_comes_back(n_components):
    state = TrainingState(n_components)
    state.add_epochs(ROWS)
    state.is_trained = True
    state.component_curve = pd.DataFrame({"n_components": [1, 2], "overlap": [0.0, 0.3], "chosen": [False, True]})
    other = TrainingState()
    assert other.update_from_json(state.to_json(5)) == 5
    pd.testing.assert_frame_equal(other.history, pd.DataFrame(ROWS))
    pd.testing.assert_frame_equal(other.component_curve, state.component_curve)
    assert (other.n_components, other.is_trained, other.n_epochs) == (n_components, True, 2)


def test_the_text_is_as_it_is_read():
    text = json.loads(TrainingState((4, 20)).to_json(None))
    assert text == {
        "history_": None,
        "component_curve_": None,
        "valley_p_values_": None,
        "is_trained_": False,
        "n_components": None,
        "init_n_components": {"__tuple__": [4, 20]},
    }


def test_epochs_are_added_to_those_before():
    state = TrainingState()
    assert state.n_epochs == 0
    state.add_epochs(ROWS[:1])
    state.add_epochs([{"epoch": 2, "stage": "vae", "max_rate": 2.0}])
    assert state.n_epochs == 2
    assert state.history.index.tolist() == [0, 1]
    assert np.isnan(state.history["max_rate"][0])


def test_versions_are_of_one_training():
    state = TrainingState(versions={"end": object()}, version="end")
    state.forget_versions()
    assert (dict(state.versions), state.version) == ({}, None)
