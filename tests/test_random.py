"""Randomness as an argument."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from scvae_tools._random import RandomStream, isolated_random_state, seeded


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


def test_a_stream_goes_on_where_it_was_and_is_hidden_in_between():
    def drawn(stream):
        with stream.on():
            return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002

    with seeded(3):
        expected = [(random.random(), float(np.random.random()), float(torch.rand(()))) for _ in range(3)]  # noqa: NPY002
    stream, other = RandomStream(3), RandomStream(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    found = [drawn(stream), drawn(stream)]
    assert drawn(other) == expected[0]
    found.append(drawn(stream))
    assert found == expected
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()


def test_a_stream_inside_a_seeded_call_is_that_of_the_call():
    with seeded(5):
        expected = [random.random() for _ in range(2)]
    with seeded(5):
        found = []
        for _ in range(2):
            with RandomStream(99).on():
                found.append(random.random())
    assert found == expected


@pytest.mark.parametrize("seed", [1.5, "0", None, True, np.float32(0.5), np.True_])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ValueError, match="`random_state` must be a whole number"), isolated_random_state(seed):
        pass
