"""Models compared."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection, PathCollection
from pictures import legend_texts, make_adata, make_comparison, texts, titles, with_comparison

from scvae_tools import pl
from scvae_tools._results.comparison import RESULTS

LIKELIHOODS, SEEDS = ["zinb", "nb"], [0, 1, 2]
BOUND = "importance_weighted_test"  # which is drawn unless another is asked for


def labels(ax):
    return [label.get_text() for label in ax.get_xticklabels()]


def points(ax):
    """Places and values of the models; the bars at the means are collections too."""
    return np.concatenate([np.asarray(d.get_offsets()) for d in ax.collections if isinstance(d, PathCollection)])


def means(ax):
    """Heights of the bars at the means, by their place."""
    segments = np.concatenate([drawn.get_segments() for drawn in ax.collections if isinstance(drawn, LineCollection)])
    return {round(float(segment[:, 0].mean()), 6): segment[0, 1] for segment in segments}


def images(ax):
    return np.asarray(ax.images[0].get_array())


def without_value(table, row, state="ValueError: no"):
    table.loc[row, "state"] = state
    table.loc[row, BOUND] = np.nan
    return table


def test_points_are_the_models_and_bars_their_means():
    table = make_comparison(likelihood=LIKELIHOODS, random_state=SEEDS)
    (ax,) = pl.compare(table)
    assert labels(ax) == LIKELIHOODS  # in the order of the grid
    place = table["likelihood"].map({"zinb": 0, "nb": 1})
    drawn = points(ax)
    expected = np.column_stack([place, table[BOUND]])
    np.testing.assert_allclose(drawn[np.lexsort(drawn.T)], expected[np.lexsort(expected.T)])
    average = table.groupby("likelihood")[BOUND].mean()
    assert means(ax) == pytest.approx({0: average["zinb"], 1: average["nb"]})


def ranked(table, best, tied=(), recommended=None, error=0.5):
    """Table with the columns of the ranking, where the first argument of the grid tells the settings apart."""
    setting, bound = table.iloc[:, 0], table[BOUND]
    mean = bound.groupby(setting).transform("mean")
    table["rank"] = setting.map(lambda name: 1 if name == best else 2).astype("Int64")
    table["difference"] = mean - mean[setting == best].iloc[0]
    table["difference_se"] = np.where(setting == best, 0.0, error)
    table["is_tied"] = setting.isin([best, *tied] if tied else []).astype("boolean")
    table["is_recommended"] = (setting == (recommended or best)).astype("boolean")
    return table


def rings(ax):
    """Places and values of the rings."""
    found = [drawn for drawn in ax.collections if isinstance(drawn, PathCollection) and not len(drawn.get_facecolor())]
    return np.concatenate([np.asarray(drawn.get_offsets()) for drawn in found] or [np.empty((0, 2))])


def errors(ax):
    """Ends of the error bars, by their place."""
    segments = [bar[2][0].get_segments()[0] for bar in ax.containers]
    return {round(float(segment[0, 0]), 6): tuple(segment[:, 1]) for segment in segments}


def test_ties_and_the_model_to_take_are_marked():
    table = make_comparison(likelihood=["poisson", "nb", "zinb"], random_state=SEEDS)
    table[BOUND] = [-610, -611, -612, -600.2, -600.3, -600.1, -600.0, -600.1, -600.2]
    (ax,) = pl.compare(ranked(table, "zinb", tied=["nb"], recommended="nb"))
    np.testing.assert_allclose(rings(ax), [[1, -600.2], [1, -600.3], [1, -600.1]])
    assert errors(ax) == {0: pytest.approx((-612, -610)), 1: pytest.approx((-601.2, -599.2))}
    lines = [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ":"]
    assert lines == pytest.approx([-600.1])
    assert texts(ax) == ["tied", "tied"]
    assert [round(text.xy[0]) for text in ax.texts] == [1, 2]
    (title,) = titles([ax])
    assert "ring: recommended" in title


def test_marks_are_those_of_the_bound_that_models_are_ranked_by():
    table = ranked(make_comparison(likelihood=LIKELIHOODS, random_state=SEEDS), "nb", tied=["zinb"])
    (ax,) = pl.compare(table, y="elbo_test")
    assert (len(rings(ax)), texts(ax)) == (0, [])
    without = table.assign(importance_weighted_test=np.nan)
    (ax,) = pl.compare(without)
    assert ax.get_ylabel().startswith("ELBO")
    assert len(rings(ax)) == len(SEEDS)


def test_bars_of_several_settings_have_no_error_of_one():
    table = ranked(make_comparison(likelihood=LIKELIHOODS, n_layers=[1, 2], lr=[0.1, 0.2]), "nb", tied=["zinb"])
    (ax,) = pl.compare(table, x="n_layers", hue="lr")
    assert (texts(ax), list(ax.containers)) == ([], [])
    assert len(rings(ax)) == 4
    assert titles([ax]) == ["points differ by likelihood\nring: recommended"]


def test_a_table_that_was_written_as_text_is_the_same_picture(tmp_path):
    table = ranked(make_comparison(likelihood=LIKELIHOODS, random_state=SEEDS), "nb", tied=["zinb"])
    failed = make_comparison(likelihood=["zip"]).drop(columns=list(RESULTS), errors="ignore").assign(state="ValueError")
    table = pd.concat([table, failed], ignore_index=True)
    table.to_csv(tmp_path / "table.tsv", sep="\t", index=False)
    (one,), (other,) = pl.compare(table), pl.compare(pd.read_csv(tmp_path / "table.tsv", sep="\t"))
    np.testing.assert_allclose(rings(one), rings(other))
    assert len(rings(one)) == len(SEEDS)
    assert texts(one) == texts(other) == ["tied", "tied"]


def test_a_table_of_an_earlier_version_has_no_marks():
    (ax,) = pl.compare(make_comparison(likelihood=LIKELIHOODS, random_state=SEEDS))
    assert (len(rings(ax)), texts(ax), list(ax.containers)) == (0, [], [])
    old = make_comparison(likelihood=LIKELIHOODS).drop(columns=BOUND)
    (ax,) = pl.compare(old)
    assert ax.get_ylabel().startswith("ELBO")


def test_an_adata_and_its_table_are_the_same_picture():
    table = make_comparison()
    (one,), (other,) = pl.compare(with_comparison(make_adata(), table, "foo"), key="foo"), pl.compare(table)
    np.testing.assert_array_equal(points(one), points(other))


@pytest.mark.parametrize(
    ("y", "label"), [("elbo_test", "ELBO of test cells\n(nats per cell)"), ("seconds", "seconds of training")]
)
def test_any_result_may_be_plotted(y, label):
    table = make_comparison()
    (ax,) = pl.compare(table, y=y)
    np.testing.assert_allclose(np.sort(points(ax)[:, 1]), np.sort(table[y]))
    assert ax.get_ylabel() == label


def test_the_mixture_is_the_colour_if_it_varies():
    table = make_comparison(n_layers=[1, 2], mixture=["False", "vade"], likelihood=LIKELIHOODS)
    (ax,) = pl.compare(table)
    assert (ax.get_xlabel(), ax.get_legend().get_title().get_text()) == ("likelihood", "mixture")
    assert legend_texts(ax) == ["False", "vade"]
    assert titles([ax]) == ["points differ by n_layers"]
    group = table[(table["likelihood"] == "nb") & (table["mixture"] == "vade")]
    assert means(ax)[1.2] == pytest.approx(group[BOUND].mean())


def test_axis_and_colour_may_be_chosen():
    table = make_comparison(n_layers=[2, 1], lr=[0.1, 0.01, 1.0], likelihood=LIKELIHOODS)
    (ax,) = pl.compare(table, x="lr", hue="n_layers")
    assert labels(ax) == ["0.01", "0.1", "1.0"]  # numbers ascend
    assert legend_texts(ax) == ["1", "2"]
    assert titles([ax]) == ["points differ by likelihood"]


@pytest.mark.parametrize(
    ("grid", "x", "hue"),
    [
        ({"random_state": SEEDS}, "random_state", None),
        ({"random_state": SEEDS, "lr": [1, 2]}, "lr", None),
        ({"random_state": SEEDS, "likelihood": ["nb"]}, "random_state", None),
        ({"likelihood": ["nb"]}, "likelihood", None),
        ({"lr": [1, 2], "n_layers": [1, 2]}, "lr", "n_layers"),
        ({"mixture": ["False", "vade"], "n_latent": [1, 2], "n_hidden": [1, 2]}, "mixture", None),
    ],
)
def test_axis_and_colour_are_what_varies(grid, x, hue):
    ax = pl.compare(make_comparison(**grid))[0]
    assert ax.get_xlabel() == x
    assert (ax.get_legend().get_title().get_text() if ax.get_legend() else None) == hue


def test_colours_do_not_run_out():
    for n in (8, 12, 20, 40):
        (ax,) = pl.compare(make_comparison(likelihood=LIKELIHOODS, n_layers=list(range(n))))
        drawn = {tuple(each.get_facecolor()[0]) for each in ax.collections if isinstance(each, PathCollection)}
        assert len(drawn) == n


def test_heat_maps_are_means_by_latent_size_and_width():
    grid = {"n_hidden": [128, 64], "n_latent": [20, 5, 10], "likelihood": LIKELIHOODS, "random_state": SEEDS}
    table = make_comparison(**grid)
    axes = pl.compare(table)
    assert titles(axes[1:]) == ["zinb", "nb"]
    for ax, likelihood in zip(axes[1:], LIKELIHOODS, strict=True):
        chosen = table[table["likelihood"] == likelihood]
        expected = chosen.pivot_table(BOUND, "n_hidden", "n_latent")  # ascending
        np.testing.assert_allclose(images(ax), expected)
        assert labels(ax) == ["5", "10", "20"]
        assert [label.get_text() for label in ax.get_yticklabels()] == ["64", "128"]
        assert texts(ax)[0] == f"{expected.iloc[0, 0]:.0f}".replace("-", "\N{MINUS SIGN}")
    limits = [ax.images[0].get_clim() for ax in axes[1:]]
    assert limits[0] == limits[1]


def test_a_heat_map_has_no_number_where_there_is_no_model():
    table = make_comparison(n_hidden=[64, 128], n_latent=[5, 10])
    axes = pl.compare(without_value(table, "3"))
    assert len(texts(axes[1])) == 3
    assert np.isnan(np.ma.filled(images(axes[1]).astype(float), np.nan)[1, 1])


def test_models_that_failed_are_left_out_and_counted():
    table = without_value(make_comparison(), "1")
    (ax,) = pl.compare(table)
    assert len(points(ax)) == len(table) - 1
    assert titles([ax]) == ["points differ by random_state; 1 without a value"]


def test_given_axes_are_drawn_on():
    table = make_comparison(n_hidden=[64, 128], n_latent=[5, 10])
    _, given = plt.subplots(1, 2)
    assert list(pl.compare(table, axes=given)) == list(given)
    with pytest.raises(ValueError, match=r"there are 1 for 2 panels \(importance_weighted_test, heat map\)"):
        pl.compare(table, axes=given[:1])


def test_the_table_is_left_as_it_was():
    table, same = make_comparison(), make_comparison()
    pl.compare(table)
    assert table.equals(same)
    assert (table.dtypes == same.dtypes).all()


def test_a_result_that_is_not_there_names_those_that_are():
    with pytest.raises(
        ValueError, match=r"adata holds no comparison. Run svt.tl.compare\(adata, grid, key_added='foo'"
    ):
        pl.compare(make_adata(), key="foo")
    with pytest.raises(ValueError, match=r"comparisons under \['mine'\].*or pass key='mine'"):
        pl.compare(with_comparison(make_adata(), key="mine"))


def test_another_table_is_refused():
    with pytest.raises(ValueError, match=r"found a DataFrame without the column 'state'"):
        pl.compare(make_comparison().drop(columns="state"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"y": "ari"}, r"'ari' is not among \['seconds', 'elbo_train'"),
        ({"y": "likelihood"}, r"y must be a result"),
        (
            {"x": "n_layers"},
            r"x must be an argument of the grid; 'n_layers' is not among \['likelihood', 'ran",
        ),
        ({"hue": "elbo_test"}, r"hue must be an argument of the grid"),
    ],
)
def test_columns_that_are_not_there_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        pl.compare(make_comparison(), **options)


def test_nothing_to_plot_is_said():
    with pytest.raises(ValueError, match=r"found none of 6; the first: ValueError: no"):
        pl.compare(make_comparison().assign(state="ValueError: no"))
    with pytest.raises(ValueError, match=r"'ari' is missing for all 6 finished models"):
        pl.compare(make_comparison().assign(ari=np.nan), y="ari")


def test_titles_of_heat_maps_do_not_overlap():
    grid = {"likelihood": ["constrained_poisson"], "mixture": ["gmvae", "vade"], "covariance": ["full", "diag"]}
    axes = pl.compare(make_comparison(**grid, n_latent=[2, 10], n_hidden=[32, 128]))
    axes[0].figure.canvas.draw()
    boxes = [ax._left_title.get_window_extent() for ax in axes[1:]]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_long_legend_is_not_higher_than_the_panel():
    (ax,) = pl.compare(make_comparison(likelihood=["nb", "zinb"], n_components=list(range(2, 27))))
    ax.figure.canvas.draw()
    assert ax.get_legend().get_window_extent().height <= ax.get_window_extent().height
