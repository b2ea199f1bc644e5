"""References of the fit: p-values are uniform for cells like those of the reference, at any depth."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from scvae_tools._files import from_plain, to_plain
from scvae_tools.model._fit_reference import ENOUGH, Expected, FitReference, drawn_evenly


def drawn(n_cells, seed, n_components=4, shift=0.0):
    """Scores with a level, a slope and a spread for each component, and skewed ones; ``shift`` in spreads."""
    rng = np.random.default_rng(seed)
    component = rng.choice(n_components, n_cells, p=np.arange(1, n_components + 1) / sum(range(n_components + 1)))
    total = np.exp(rng.normal(7.5, 0.5, n_cells))
    spread = (1 + 0.5 * component) * total**0.45
    counts = -(3 + component) * total**0.7 + spread * (rng.standard_normal(n_cells) - shift)
    codes = -(1 + component) * (rng.chisquare(8, n_cells) / 2 + 3 * shift)
    return np.stack([counts, codes], axis=1), total, component


def thirds(total):
    return np.searchsorted(np.quantile(total, [1 / 3, 2 / 3]), total)


def test_of_new_cells_the_expected_share_is_below_any_level_at_any_depth():
    rows = []
    for seed in range(8):
        reference = FitReference.of(*drawn(600, seed), 4)
        scores, total, component = drawn(6000, 100 + seed)
        p = reference.p_values(scores, total, component)
        below = [p[thirds(total) == third] <= 0.05 for third in range(3)]
        rows.append([np.mean(p <= 0.05), np.mean(p <= 0.2), np.mean(p <= 0.5), *map(np.mean, below)])
    # A share among n reference cells has the standard error √(p (1 − p) / n), and here there are 8 · 600 of them.
    found, expected = np.mean(rows, axis=0), [0.05, 0.2, 0.5]
    np.testing.assert_allclose(found[:3], expected, atol=0.025)
    np.testing.assert_allclose(found[3:], 0.05, atol=0.02)


def test_cells_that_fit_worse_have_small_values():
    reference = FitReference.of(*drawn(600, 0), 4)
    known = reference.p_values(*drawn(2000, 1))
    unknown = reference.p_values(*drawn(2000, 2, shift=2.0))
    assert stats.mannwhitneyu(known, unknown).statistic / 2000**2 > 0.95
    assert np.mean(unknown < 0.01) > 0.3


def test_few_cells_do_not_seem_to_fit_better_than_new_ones():
    shares = []
    for seed in range(40):
        reference = FitReference.of(*drawn(30, seed, n_components=6), 6)
        shares.append(np.mean(reference.p_values(*drawn(500, 100 + seed, n_components=6)) <= 0.1))
    assert 0.05 < np.mean(shares) < 0.13


def test_a_value_is_the_share_of_the_reference_cells_that_fit_as_badly():
    scores, total, component = drawn(700, 3)
    reference = FitReference.of(scores, total, component, 4)
    new = drawn(50, 4)
    found = reference.p_values(*new)
    everywhere = np.concatenate(reference.residuals)
    for cell in range(50):
        z = sum(
            each.standardized(new[0][[cell], i], *(a[[cell]] for a in new[1:]))
            for i, each in enumerate(reference.expected)
        )
        own = reference.residuals[new[2][cell]]
        compared = own if len(own) >= ENOUGH else everywhere
        assert found[cell] == (1 + sum(compared <= z)) / (1 + len(compared))
    assert [len(each) >= ENOUGH for each in reference.residuals] == [False, True, True, True]


def test_cells_that_fit_badly_change_what_is_expected_but_little():
    (scores, total, component), others = drawn(1000, 5), drawn(1000, 6)
    spoilt = scores[:, 0].copy()
    spoilt[::20] -= 1e5
    before = Expected.of(scores[:, 0], total, component, 4).standardized(others[0][:, 0], *others[1:])
    after = Expected.of(spoilt, total, component, 4).standardized(others[0][:, 0], *others[1:])
    assert np.abs(after - before).mean() < 0.3


def test_a_component_without_reference_cells_is_not_taken_for_unknown():
    scores, total, component = drawn(600, 7)
    known = component < 3
    reference = FitReference.of(scores[known], total[known], component[known], 4)
    p = reference.p_values(scores[~known], total[~known], component[~known])
    assert np.mean(p <= 0.01) < 0.05


@pytest.mark.parametrize("n_cells", [1, 2, 5, 21])
def test_any_number_of_cells_is_a_reference(n_cells):
    reference = FitReference.of(*drawn(n_cells, 8), 4)
    p = reference.p_values(*drawn(200, 9))
    assert reference.n_cells == n_cells
    assert np.isfinite(p).all()
    assert p.min() >= 1 / (1 + n_cells)
    assert p.max() <= 1


def test_equal_cells_are_a_reference_too():
    same = np.full((40, 2), -5.0), np.full(40, 100.0), np.zeros(40, dtype=int)
    assert FitReference.of(*same, 1).p_values(*same).tolist() == [1.0] * 40


def test_scores_that_are_no_numbers_are_those_of_the_worst_cells():
    reference = FitReference.of(*drawn(300, 10), 4)
    scores, total, component = drawn(3, 11)
    scores[:2] = [[np.nan, -1], [-np.inf, -1]]
    assert (reference.p_values(scores, total, component)[:2] <= 1 / ENOUGH).all()
    assert FitReference.of(scores, total, component, 4).n_cells == 1


def test_what_is_saved_gives_the_same_values_and_is_small():
    reference = FitReference.of(*drawn(2000, 12), 4)
    text = json.dumps(to_plain(reference.to_plain(), "fit"))
    again = FitReference.from_plain(from_plain(json.loads(text)), 4)
    np.testing.assert_array_equal(again.p_values(*drawn(500, 13)), reference.p_values(*drawn(500, 13)))
    assert len(text) < 30_000


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved.pop("residuals"),
        lambda saved: saved["residuals"].pop(),
        lambda saved: saved["expected"][0].update(level=[1.0]),
        lambda saved: saved["expected"].pop(),
        lambda saved: saved.update(residuals=[[]] * 4),
    ],
    ids=["no residuals", "fewer components", "levels of another model", "one score", "no cells"],
)
def test_what_is_no_reference_of_the_model_is_refused(change):
    saved = FitReference.of(*drawn(100, 14), 4).to_plain()
    change(saved)
    with pytest.raises((ValueError, KeyError, TypeError, IndexError)):
        FitReference.from_plain(saved, 4)


def test_as_equally_many_cells_of_each_component_are_drawn_as_there_are():
    component = np.repeat([0, 1, 2], [1000, 50, 3])
    drawn_cells = drawn_evenly(component, 113, random_state=0)
    assert np.bincount(component[drawn_cells]).tolist() == [60, 50, 3]
    assert len(set(drawn_cells.tolist())) == 113
    assert drawn_evenly(component, 5000, random_state=0).tolist() == list(range(1053))
