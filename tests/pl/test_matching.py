"""Colours of two groupings of the same cells."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from scvae_tools.pl._matching import colours_beside

BLUE, RED, GREEN = "#0000ff", "#ff0000", "#00ff00"


def grouping(**n_cells_by_pair):
    """Return two columns; ``a_x=3`` stands for three cells of group a in the first and x in the second."""
    pairs = [pair.split("_") for pair, n_cells in n_cells_by_pair.items() for _ in range(n_cells)]
    first, second = (pd.Series(pd.Categorical(groups)) for groups in zip(*pairs, strict=True))
    return first, second


def test_groups_that_are_mostly_the_same_cells_have_the_same_colour():
    first, second = grouping(a_y=8, a_x=1, b_x=9, b_y=1)
    assert colours_beside(first, second, [BLUE, RED]) == [RED, BLUE]


def test_a_group_that_is_a_part_of_another_has_a_colour_of_its_own():
    first, second = grouping(a_x=30, b_x=31, c_x=29, d_y=10)  # x is none of a, b and c: none is half of it
    colours = colours_beside(first, second, [BLUE, RED])
    assert colours[3] == RED
    assert not {BLUE, RED} & set(colours[:3])
    assert len(set(colours)) == 4


def test_exactly_half_is_no_match():
    first, second = grouping(a_x=5, a_y=5, b_y=5)
    assert not {BLUE, RED} & set(colours_beside(first, second, [BLUE, RED]))


def test_by_name_the_cells_do_not_matter():
    first, second = grouping(a_b=9, b_a=9, c_a=1)
    assert colours_beside(first, second, [BLUE, RED], by_name=True)[:2] == [BLUE, RED]


def test_cells_without_a_group_do_not_count():
    first = pd.Series(pd.Categorical(["a", "a", None, "b"], categories=["a", "b"]))
    second = pd.Series(pd.Categorical(["x", "x", "y", None], categories=["x", "y"]))
    colours = colours_beside(first, second, [BLUE, RED])
    assert colours[0] == BLUE
    assert colours[1] not in (BLUE, RED)


@pytest.mark.parametrize("n_groups", [3, 20, 60])
def test_other_colours_differ_from_all_and_are_neither_black_nor_white(n_groups):
    first = pd.Series(pd.Categorical(np.arange(n_groups)))
    second = pd.Series(pd.Categorical(np.zeros(n_groups)))
    colours = colours_beside(first, second, [GREEN])
    assert len({GREEN, *colours}) == n_groups + 1
    luminance = np.array([to_rgb(colour) for colour in colours]) @ [0.2126, 0.7152, 0.0722]
    assert luminance.min() > 0.02
    assert luminance.max() < 0.97
