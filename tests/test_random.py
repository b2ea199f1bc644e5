"""Randomness as an argument."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from scvae_tools._random import isolated_random_state, seeded


def draw():
    return random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002


def test_random_states_are_seeded_inside_and_restored_outside():
    with isolated_random_state(11):
        first = draw()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002
    expected = draw()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002
    with isolated_random_state(11):
        assert draw() == first
    assert draw() == expected
    with pytest.raises(KeyError), isolated_random_state(11):
        raise KeyError
    random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002
    assert draw() == expected


def test_a_seeded_call_inside_another_goes_on_with_its_stream():
    with seeded(5):
        expected = draw(), draw()
    with seeded(5):
        first = draw()
        with seeded(5):
            second = draw()
    assert (first, second) == expected
    assert first != second
