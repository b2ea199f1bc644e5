"""Components against labels."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from pictures import make_adata, round_trip, texts, texts_that_overlap, titles

from scvae_tools import pl

# components x labels (A, B, C); the heaviest diagonal is 0-B, 1-C, 2-A with 7 + 6 + 5 cells
COUNTS = [[1, 7, 0], [0, 4, 6], [5, 2, 0]]


def with_counts(counts, labels=None, components=None):
    counts = np.asarray(counts)
    components = [str(i) for i in range(counts.shape[0])] if components is None else components
    labels = list("ABCDEF"[: counts.shape[1]]) if labels is None else labels
    rows, columns = (np.repeat(index.ravel(), counts.ravel()) for index in np.indices(counts.shape))
    adata = make_adata(int(counts.sum()))
    adata.obs["scvae"] = pd.Categorical.from_codes(rows, components)
    adata.obs["label"] = pd.Categorical.from_codes(columns, labels)
    return adata


def drawn(ax):
    mesh = ax.collections[0]
    return np.asarray(mesh.get_array())


def rows(ax):
    return [tick.get_text() for tick in ax.get_yticklabels()]


def columns(ax):
    return [tick.get_text() for tick in ax.get_xticklabels()]


def ticks_that_overlap(ax):
    ax.figure.canvas.draw()
    axes = ([tick.get_window_extent() for tick in ticks] for ticks in (ax.get_xticklabels(), ax.get_yticklabels()))
    return [(a, b) for boxes in axes for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def test_labels_are_in_the_order_of_the_components_that_they_match():
    ax = pl.confusion(with_counts(COUNTS), "label", normalize=None)
    assert rows(ax) == ["0", "1", "2"]
    assert columns(ax) == ["B", "C", "A"]
    np.testing.assert_array_equal(drawn(ax), [[7, 0, 1], [4, 6, 0], [2, 0, 5]])


def test_no_other_order_has_a_heavier_diagonal():
    counts = np.random.default_rng(0).integers(1, 90, (5, 5))
    heaviest = max(sum(counts[i, j] for i, j in enumerate(order)) for order in permutations(range(5)))
    assert np.trace(drawn(pl.confusion(with_counts(counts), "label", normalize=None))) == heaviest


def test_components_and_labels_that_are_left_over_come_last():
    ax = pl.confusion(with_counts([[9, 0], [0, 9], [0, 2], [3, 1]]), "label", normalize=None)
    assert rows(ax) == ["0", "1", "3", "2"]  # 3 has most cells of A, 2 of B
    ax = pl.confusion(with_counts([[0, 1, 9, 0], [8, 0, 0, 2]]), "label", normalize=None)
    assert columns(ax) == ["C", "A", "B", "D"]


def test_a_match_without_cells_is_none():
    ax = pl.confusion(with_counts([[5, 0, 3], [4, 0, 0], [0, 6, 0], [1, 0, 0]]), "label", normalize=None)
    np.testing.assert_array_equal(drawn(ax), [[3, 5, 0], [0, 4, 0], [0, 0, 6], [0, 1, 0]])


def test_by_default_colours_are_the_share_of_the_labels_cells():
    ax = pl.confusion(with_counts(COUNTS), "label")
    np.testing.assert_allclose(drawn(ax), [[7 / 13, 0, 1 / 6], [4 / 13, 1, 0], [2 / 13, 0, 5 / 6]])
    assert ax.figure.axes[1].get_ylabel() == "share of the label's cells"
    assert ax.collections[0].get_clim() == (0, 1)


def test_colours_may_be_the_share_of_the_components_cells():
    ax = pl.confusion(with_counts(COUNTS), "label", normalize="components")
    np.testing.assert_allclose(drawn(ax), [[7 / 8, 0, 1 / 8], [4 / 10, 6 / 10, 0], [2 / 7, 0, 5 / 7]])
    assert ax.figure.axes[1].get_ylabel() == "share of the component's cells"


def test_counts_are_written_on_their_fields_but_for_none():
    ax = pl.confusion(with_counts([[1_200, 0], [3, 8]]), "label")
    places = {text.get_position(): text.get_text() for text in ax.texts}
    assert places == {(0, 0): "1,200", (0, 1): "3", (1, 1): "8"}


def test_counts_without_room_are_left_out():
    assert texts(pl.confusion(with_counts(np.full((120, 120), 1), [str(i) for i in range(120)]), "label")) == []


@pytest.mark.parametrize("normalize", ["labels", "components", None])
def test_counts_are_readable_on_their_colour(normalize):
    def luminance(colour):  # WCAG 2.2
        return sum(
            weight * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
            for weight, c in zip((0.2126, 0.7152, 0.0722), to_rgb(colour), strict=True)
        )

    ax = pl.confusion(with_counts(np.arange(1, 37).reshape(6, 6)), "label", normalize=normalize)
    mesh = ax.collections[0]
    fields = mesh.to_rgba(mesh.get_array())
    assert len(ax.texts) == 36
    for text in ax.texts:
        column, row = (int(place) for place in text.get_position())
        dark, light = sorted((luminance(text.get_color()), luminance(fields[row, column])))
        assert (light + 0.05) / (dark + 0.05) > 3.9


def test_the_title_is_the_adjusted_rand_index():
    # By pairs of cells: (sum of C(n_ij, 2) − expected) / (mean − expected), Hubert and Arabie (1985).
    counts = np.array(COUNTS)
    pairs, of_rows, of_columns = ((n * (n - 1) / 2).sum() for n in (counts.ravel(), counts.sum(1), counts.sum(0)))
    expected = of_rows * of_columns / (counts.sum() * (counts.sum() - 1) / 2)
    index = (pairs - expected) / ((of_rows + of_columns) / 2 - expected)
    assert titles([pl.confusion(with_counts(COUNTS), "label")]) == [f"Adjusted Rand index {index:.3f}"]


def test_cells_without_a_label_are_left_out_and_counted():
    adata = with_counts([*COUNTS, [4, 0, 0]])
    adata.obs.loc[adata.obs["scvae"] == "3", "label"] = None
    ax = pl.confusion(adata, "label", normalize=None)
    assert drawn(ax).sum() == 25
    assert rows(ax) == ["0", "1", "2"]
    reference = titles([pl.confusion(with_counts(COUNTS), "label")])[0]
    assert titles([ax]) == [f"{reference}\n4 of 29 cells left out: no label"]


def test_cells_without_a_component_are_left_out_and_counted():
    adata = with_counts(COUNTS)
    adata.obs.loc[adata.obs["scvae"] == "2", "scvae"] = None
    assert titles([pl.confusion(adata, "label")])[0].endswith("7 of 25 cells left out: no label or component")


def test_labels_may_be_whole_numbers_or_text():
    adata = with_counts(COUNTS)
    adata.obs["code"] = adata.obs["label"].cat.codes.astype(int)
    adata.obs["text"] = adata.obs["label"].astype(str)
    assert columns(pl.confusion(adata, "code")) == ["1", "2", "0"]
    assert columns(pl.confusion(adata, "text")) == ["B", "C", "A"]


def test_renamed_components_have_their_names():
    ax = pl.confusion(with_counts(COUNTS, components=["T", "NK", "mono"]), "label")
    assert rows(ax) == ["T", "NK", "mono"]


@pytest.mark.parametrize("name", ["{}", "natural killer cells, activated {}"], ids=["short", "long"])
@pytest.mark.parametrize(("shape", "largest"), [((2, 2), 9), ((2, 3), 300), ((12, 9), 300), ((15, 20), 9)])
def test_texts_of_the_table_do_not_overlap_and_fit_their_fields(shape, name, largest):
    counts = np.random.default_rng(0).integers(0, largest, shape) + np.eye(*shape, dtype=int)
    labels, components = ([name.format(i) for i in range(n)] for n in shape[::-1])
    ax = pl.confusion(with_counts(counts, labels, components), "label")
    assert texts_that_overlap(ax.figure) == []
    assert ticks_that_overlap(ax) == []
    assert rows(ax) != []
    width = ax.get_window_extent().width / shape[1]
    assert all(text.get_window_extent().width < width for text in ax.texts)
    assert ax.get_window_extent().width > 0.3 * ax.figure.bbox.width


def test_a_small_given_panel_has_no_overlap():
    _, axes = plt.subplots(1, 2, figsize=(6, 2.2), layout="constrained")
    ax = pl.confusion(with_counts(np.full((12, 12), 70), [str(i) for i in range(12)]), "label", ax=axes[0])
    assert texts_that_overlap(ax.figure) == []
    assert ticks_that_overlap(ax) == []


def test_confusion_after_h5ad_is_the_same(tmp_path):
    adata = with_counts(COUNTS)
    before, after = pl.confusion(adata, "label"), pl.confusion(round_trip(adata, tmp_path), "label")
    np.testing.assert_array_equal(drawn(before), drawn(after))
    assert columns(before) == columns(after)


def test_an_unknown_normalization_is_an_error():
    with pytest.raises(ValueError, match=r"must be 'labels', 'components' or None; found 'rows'"):
        pl.confusion(with_counts(COUNTS), "label", normalize="rows")


def test_labels_that_are_not_there_are_an_error_that_lists_the_columns():
    with pytest.raises(ValueError, match=r"labels_key must be a column.*'nope' is not among \['total', 'cell_type'"):
        pl.confusion(with_counts(COUNTS), "nope")


@pytest.mark.parametrize(
    ("values", "finding"),
    [(np.nan, "all 25 of 'bad' are missing"), (0.25, "'bad' holds numbers such as 0.25.*pandas.cut")],
)
def test_labels_that_are_none_are_an_error(values, finding):
    adata = with_counts(COUNTS)
    adata.obs["bad"] = values
    with pytest.raises(ValueError, match=finding):
        pl.confusion(adata, "bad")


def test_confusion_needs_a_mixture():
    with pytest.raises(ValueError, match=r"Components need a mixture; obsm\['X_scvae'\] is there.*mixture=True"):
        pl.confusion(make_adata(n_components=0), "cell_type")


def test_confusion_of_a_missing_result_names_the_call():
    with pytest.raises(ValueError, match=r"no obs\['foo'\].*under \['scvae'\].*key_added='foo'"):
        pl.confusion(make_adata(), "cell_type", key="foo")


def test_the_name_of_the_colour_bar_is_no_longer_than_it():
    ax = pl.confusion(with_counts([[3, 1], [0, 2]], labels=["a long name of a type of cells", "B"]), "label")
    ax.figure.canvas.draw()
    bar = next(other for other in ax.figure.axes if other is not ax)
    assert bar.yaxis.label.get_window_extent().height <= bar.get_window_extent().height
