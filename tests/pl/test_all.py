"""What holds for every plot."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from matplotlib import pyplot as plt
from pictures import (
    PLOTS,
    SEVERAL_PANELS,
    WITH_MORE,
    make_adata,
    with_curve,
)

from scvae_tools import pl

every_plot = pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)
one_panel = pytest.mark.parametrize("plot", [PLOTS[name] for name in PLOTS if name not in SEVERAL_PANELS])


def test_every_plot_is_enrolled():
    assert set(WITH_MORE) <= set(PLOTS) == set(pl.__all__)


@one_panel
def test_one_panel_is_drawn_on_given_axes(plot):
    figure, given = plt.subplots(1, 2)
    assert plot(make_adata(), ax=given[1]) is given[1]
    assert plt.get_fignums() == [figure.number]
    assert not given[0].has_data()


@one_panel
def test_one_panel_is_drawn_in_a_part_of_a_figure(plot):
    left, right = plt.figure(layout="constrained").subfigures(1, 2)
    given = right.subplots()
    assert plot(make_adata(), ax=given) is given
    assert not left.axes


def test_clusters_are_drawn_in_a_part_of_a_figure():
    part = plt.figure(layout="constrained").subfigures(1, 2)[1]
    given = part.subplots(1, 2)
    assert list(pl.clusters(make_adata(), labels="cell_type", axes=given)) == list(given)


@one_panel
@pytest.mark.parametrize("n_cells", [10, 100_000])
def test_one_panel_is_drawn_in_seconds(plot, n_cells, tmp_path):
    adata = make_adata(n_cells)
    start = time.perf_counter()
    plot(adata, save=tmp_path / "figure.png")
    assert time.perf_counter() - start < 20


@one_panel
def test_one_panel_leaves_adata_as_it_was(plot):
    adata, same = with_curve(make_adata()), with_curve(make_adata())
    plot(adata)
    pd.testing.assert_frame_equal(adata.obs, same.obs)
    np.testing.assert_array_equal(adata.obsm["scvae_probs"], same.obsm["scvae_probs"])
    added = {"scvae_tree"} if plot is PLOTS["tree"] else set()  # what this plot needs is put there for it
    assert set(adata.uns) == set(same.uns) | added


@every_plot
@pytest.mark.parametrize("as_type", [str, lambda path: path], ids=["str", "Path"])
def test_save_writes_a_png(plot, as_type, tmp_path):
    plot(make_adata(), save=as_type(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert plt.imread(tmp_path / "figure.png")[..., :3].std() > 0.01  # something is on it


@pytest.mark.parametrize("name", PLOTS)
def test_save_true_writes_into_the_folder_of_scanpy_under_the_name_of_the_plot(name, tmp_path):
    before = sc.settings.figdir, sc.settings.file_format_figs
    sc.settings.figdir, sc.settings.file_format_figs = tmp_path / "new", "png"
    try:
        PLOTS[name](make_adata(), save=True)
        PLOTS[name](make_adata(), save=False)
    finally:
        sc.settings.figdir, sc.settings.file_format_figs = before
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"{name}.png"]


@every_plot
def test_show_shows_once(plot, monkeypatch):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(True))
    plot(make_adata(), show=True)
    assert shown == [True]


@every_plot
def test_one_figure_is_made(plot):
    plot(make_adata())
    assert len(plt.get_fignums()) == 1


def test_importing_pl_loads_no_heavy_package():
    heavy = ["torch", "scvi", "scanpy", "matplotlib"]
    code = f"import sys; import scvae_tools.pl; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
