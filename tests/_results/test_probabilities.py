"""Ambiguous cells and calibration, against numbers worked out by hand or known from how the cells were drawn."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from soft_components import PROBS, make_adata, soft_assignments

from scvae_tools._results.probabilities import ambiguity_of_components
from scvae_tools.tl._ambiguous_cells import ambiguous_cells

# --- ambiguous cells ----------------------------------------------------------------------------------------------


def test_ambiguous_cells_are_those_below_the_threshold_the_least_sure_first():
    table = ambiguous_cells(make_adata(PROBS))
    assert list(table.index) == ["cell4", "cell0", "cell2"]
    assert list(table.columns) == ["first", "probability", "second", "second_probability", "entropy"]
    assert list(table["first"]) == ["0", "0", "2"]
    assert list(table["second"]) == ["2", "1", "1"]
    np.testing.assert_allclose(table["probability"], [0.4, 0.5, 0.6], rtol=1e-6)
    np.testing.assert_allclose(table["second_probability"], [0.4, 0.3, 0.3], rtol=1e-6)


def test_entropy_is_in_nats():
    table = ambiguous_cells(make_adata([[0.25] * 4, [0.5, 0.5, 0, 0]]))
    np.testing.assert_allclose(table["entropy"], [np.log(4), np.log(2)])


def test_a_cell_at_the_threshold_is_not_ambiguous():
    probs = [[0.9, 0.1], [0.89, 0.11]]
    for dtype in (np.float32, np.float64):
        assert list(ambiguous_cells(make_adata(probs, dtype=dtype)).index) == ["cell1"]
        assert list(ambiguous_cells(make_adata(probs, dtype=dtype), threshold=np.float64(0.9)).index) == ["cell1"]


def test_the_threshold_may_be_changed():
    assert list(ambiguous_cells(make_adata(PROBS), threshold=0.55).index) == ["cell4", "cell0"]
    assert len(ambiguous_cells(make_adata(PROBS), threshold=1)) == 4


def test_no_ambiguous_cells_are_an_empty_table():
    table = ambiguous_cells(make_adata(np.eye(3)))
    assert table.shape == (0, 5)


def test_one_component_is_never_ambiguous():
    assert len(ambiguous_cells(make_adata([[1.0], [0.9999]]), threshold=1)) == 0


def test_renamed_components_keep_their_cells():
    adata = make_adata(PROBS)
    adata.obs["scvae"] = adata.obs["scvae"].cat.rename_categories({"0": "T", "2": "B"})
    table = ambiguous_cells(adata)
    assert list(table["first"]) == ["T", "T", "B"]
    assert list(table["second"]) == ["B", "1", "1"]  # component 1 is of no cell, and has no other name


def test_components_of_a_subset_keep_their_names():
    adata = make_adata([*np.eye(3).tolist(), [0.0, 0.4, 0.6]])
    subset = adata[["cell2", "cell3"]].copy()  # drops the categories "0" and "1"
    assert ambiguous_cells(subset)[["first", "second"]].to_numpy().tolist() == [["2", "1"]]


def test_reordered_categories_change_no_name():
    adata = make_adata(PROBS)
    adata.obs["scvae"] = adata.obs["scvae"].cat.reorder_categories(["2", "0"])
    assert list(ambiguous_cells(adata)["first"]) == ["0", "0", "2"]


def test_components_that_were_merged_in_obs_are_numbered():
    adata = make_adata(np.eye(3) * 0.7 + 0.1)
    adata.obs["scvae"] = pd.Categorical(["T", "T", "B"])
    assert sorted(ambiguous_cells(adata)["first"]) == ["0", "1", "2"]


def test_without_the_column_of_components_they_are_numbered():
    adata = make_adata(PROBS)
    del adata.obs["scvae"]
    assert list(ambiguous_cells(adata)["first"]) == ["0", "0", "2"]


def test_another_key_is_read():
    assert len(ambiguous_cells(make_adata(PROBS, key="run2"), key="run2")) == 3


def test_ambiguous_cells_leave_adata_as_it_was():
    adata = make_adata(PROBS)
    before = adata.obsm["scvae_probs"].copy()
    ambiguous_cells(adata)
    np.testing.assert_array_equal(adata.obsm["scvae_probs"], before)
    assert list(adata.obs) == ["scvae"]


def test_components_are_counted_with_what_they_are_confused_with():
    table = ambiguity_of_components(make_adata(PROBS + [[0.6, 0.3, 0.1]]))
    assert list(table.index) == ["0", "2"]  # no cell is of component 1
    assert table["n_cells"].tolist() == [4, 2]
    assert table["n_ambiguous"].tolist() == [3, 1]
    assert table["confused_with"].tolist() == ["1", "1"]
    assert table["n_confused"].tolist() == [2, 1]  # cell4 is between 0 and 2


def test_sure_components_are_confused_with_none():
    table = ambiguity_of_components(make_adata(np.eye(2)))
    assert table["confused_with"].tolist() == [None, None]
    assert table["n_confused"].tolist() == [0, 0]


def test_counts_of_components_agree_with_the_list_of_cells():
    adata = make_adata(soft_assignments(2_000), dtype=np.float64)
    cells, table = ambiguous_cells(adata), ambiguity_of_components(adata)
    pd.testing.assert_series_equal(
        cells["first"].astype(str).value_counts().sort_index(), table["n_ambiguous"], check_names=False
    )
    for component, row in table.iterrows():
        seconds = cells["second"][cells["first"] == component].value_counts()
        assert (seconds.index[0], seconds.iloc[0]) == (row["confused_with"], row["n_confused"])


def test_a_missing_result_names_the_call():
    with pytest.raises(
        ValueError, match=r"'foo_probs'\] is not among \['scvae_probs'\].*mixture=True, key_added='foo'"
    ):
        ambiguous_cells(make_adata(PROBS), key="foo")


@pytest.mark.parametrize("threshold", [0, -0.1, 1.1, np.nan, 90])
def test_a_threshold_that_is_no_probability_is_an_error(threshold):
    with pytest.raises(ValueError, match=r"`threshold` must be in \(0, 1\]; found"):
        ambiguous_cells(make_adata(PROBS), threshold=threshold)


# --- calibration --------------------------------------------------------------------------------------------------
