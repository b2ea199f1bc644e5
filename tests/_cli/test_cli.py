"""The command line: its examples run, what it is given arrives, and nothing is lost when something goes wrong."""

from __future__ import annotations

import errno
import functools
import inspect
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scvae_tools as svt
from scvae_tools import _adata_files, _cli, tl
from scvae_tools._cli import _commands, _options, build_parsers, main
from scvae_tools._cli._options import COMMANDS
from scvae_tools._files import FORMER, DiskFullError, is_temporary
from scvae_tools._results.comparison import RANKING

ROOT = Path(__file__).parents[2]
PARSER, PARSERS = build_parsers()
EXAMPLES = [
    (name, example)
    for name, parser in PARSERS.items()
    for example in re.findall(r"^  (scvae-tools .*)$", parser.format_help(), flags=re.MULTILINE)
]


def run(command):
    return main(shlex.split(command)[1:] if isinstance(command, str) else command)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder with a short training of the demo."""
    folder = tmp_path_factory.mktemp("trained")
    call = ["fit", "demo", "-o", folder / "fitted.h5ad", "--model", folder / "model"]
    call += ["--components", 4, "--epochs", 4, "--seed", 3, "--quiet"]
    assert main(list(map(str, call))) == 0
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def received(monkeypatch):
    """What `tl.scvae` and `tl.compare` are called with; they do nothing but that."""
    calls = []

    def record(*positional, **options):
        calls.append((positional, options))
        raise ValueError("recorded")

    monkeypatch.setattr(tl, "scvae", record)
    monkeypatch.setattr(tl, "compare", record)
    return calls


# -- examples ----------------------------------------------------------------------------------------------------------


def test_every_command_has_examples():
    assert {name for name, _ in EXAMPLES} == set(COMMANDS)


@pytest.fixture(scope="module")
def example_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def done():
    """Examples that have run in this process: another process may have run those before them."""
    return []


@pytest.mark.parametrize(("name", "example"), EXAMPLES, ids=[example[12:60] for _, example in EXAMPLES])
def test_the_examples_of_the_help_run_in_the_order_in_which_they_stand(
    name, example, example_folder, done, monkeypatch, capsys
):
    monkeypatch.chdir(example_folder)
    assert shlex.split(example)[1] == name
    for each in EXAMPLES[len(done) : EXAMPLES.index((name, example)) + 1]:
        assert run(each[1]) == 0, capsys.readouterr().err
        done.append(each)
    written = re.search(r" -o (\S+)", example)
    assert written is None or Path(written[1]).exists()
    assert not [file for file in example_folder.iterdir() if is_temporary(file)]


# -- what is given arrives ---------------------------------------------------------------------------------------------


def parameters_of(*functions):
    return {name: p for function in functions for name, p in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize(
    ("options", "functions"),
    [
        (_options.FIT, [tl.scvae, svt.SCVAE.train]),
        (_options.COMPARE, [tl.compare]),
        (_options.EVALUATE, [tl.evaluate]),
        (_options.SAMPLE, [svt.SCVAE.sample]),
        (_options.LOAD, [svt.SCVAE.load]),
    ],
)
def test_options_are_arguments_of_the_functions_and_name_their_defaults(options, functions):
    found = parameters_of(*reversed(functions))
    assert {option.name for option in options} <= set(found)
    for option in options:
        told, default = re.search(r"\[(.+)\]$", option.help), found[option.name].default
        if told is not None and default is not None:
            true = {True: "gmvae"}.get(default, str(default)) if option.name == "mixture" else str(default)
            assert told[1] == true, option.flags


def test_options_of_fit_arrive_under_their_names(here, received):
    call = """scvae-tools fit demo -o x.h5ad --likelihood zip --mixture vade --components 4-20 --latent 5 --hidden 64,32
      --layers 3 --layer counts --genes hv --batch-key donor --size-factor size --categorical-covariates a,b
      --continuous-covariates c --labels-key cell_type --unlabeled none --epochs 7 --batch-size 50 --learning-rate 1e-2
      --train-size 0.5 --no-early-stopping --checkpoint here --no-lambda --allow-non-integer --seed 9 --device cpu
      --key-added other --quiet --set dispersion=gene-cell --set weights=[0.5,0.5] --set gradient_clip=3"""
    assert run(call) == 1
    ((positional, options),) = received
    assert positional[0].shape == (700, 765)
    assert options == {
        "likelihood": "zip",
        "mixture": "vade",
        "n_components": (4, 20),
        "n_latent": 5,
        "n_hidden": [64, 32],
        "n_layers": 3,
        "layer": "counts",
        "mask_var": "hv",
        "batch_key": "donor",
        "size_factor_key": "size",
        "categorical_covariate_keys": ["a", "b"],
        "continuous_covariate_keys": ["c"],
        "labels_key": "cell_type",
        "unlabeled_category": "none",
        "max_epochs": 7,
        "batch_size": 50,
        "lr": 0.01,
        "train_size": 0.5,
        "early_stopping": False,
        "checkpoint": Path("here"),
        "write_lambda": False,
        "allow_non_integer": True,
        "random_state": 9,
        "accelerator": "cpu",
        "key_added": "other",
        "dispersion": "gene-cell",
        "weights": [0.5, 0.5],
        "gradient_clip": 3,
        "return_model": True,
        "progress": False,
    }


def test_what_is_not_given_keeps_the_default_of_the_function(here, received):
    run("scvae-tools fit demo")
    assert received[0][1] == {"return_model": True, "progress": True}


def test_a_plain_vae_and_a_number_of_components(here, received):
    run("scvae-tools fit demo --mixture none --components 12 --hidden 100")
    assert received[0][1] == {
        "mixture": False,
        "n_components": 12,
        "n_hidden": 100,
        "return_model": True,
        "progress": True,
    }


@pytest.mark.parametrize(
    ("name", "content", "grid"),
    [
        (
            "grid.json",
            '{"likelihood": ["nb", "zinb"], "n_latent": [5]}',
            {"likelihood": ["nb", "zinb"], "n_latent": [5]},
        ),
        (
            "grid.toml",
            "likelihood = ['nb']\nmixture = [true, false]\n",
            {"likelihood": ["nb"], "mixture": [True, False]},
        ),
    ],
)
def test_the_grid_is_read_from_a_file(name, content, grid, here, received):
    (here / name).write_text(content)
    run(f"scvae-tools compare demo --grid {name} --labels-key bulk_labels --directory d --set n_hidden=16")
    (_, given), options = received[0]
    assert given == grid
    assert options == {"labels_key": "bulk_labels", "directory": Path("d"), "n_hidden": 16, "progress": True}


# -- results -----------------------------------------------------------------------------------------------------------


def test_fit_writes_what_the_function_of_that_name_writes(trained):
    adata = ad.read_h5ad(trained / "fitted.h5ad")
    expected = svt.datasets.pbmc68k_reduced()
    svt.tl.scvae(expected, n_components=4, max_epochs=4, random_state=3, progress=False)
    np.testing.assert_array_equal(adata.obsm["X_scvae"], expected.obsm["X_scvae"])
    assert list(adata.obs["scvae"]) == list(expected.obs["scvae"])
    assert set(adata.layers) - {None} == {"scvae_lambda"}  # anndata 0.13 calls X a layer, None
    np.testing.assert_array_equal(adata.X.toarray(), expected.X.toarray())


def test_a_finished_training_is_taken_from_its_checkpoint(here, monkeypatch, capsys):
    call = "scvae-tools fit demo --checkpoint c --epochs 2 --components 2 --json -o"
    assert run(f"{call} a.h5ad") == 0
    capsys.readouterr()
    assert run(f"{call} b.h5ad") == 0
    assert "epoch" not in capsys.readouterr().err  # no bar
    a, b = ad.read_h5ad("a.h5ad"), ad.read_h5ad("b.h5ad")
    np.testing.assert_array_equal(a.obsm["X_scvae"], b.obsm["X_scvae"])
    assert run(f"{call} c.h5ad --latent 3") == 1
    assert "checkpoint in 'c' must be of the same data, model" in capsys.readouterr().err


def test_predict_finds_the_genes_by_name_and_repeats_the_codes_of_the_training(trained, here):
    fitted = ad.read_h5ad(trained / "fitted.h5ad")
    cells = svt.datasets.pbmc68k_reduced()[99:9:-1, ::-1].copy()
    cells.layers["counts"] = cells.X.copy()
    cells.X = np.ones(cells.shape, np.float32)
    cells.write_h5ad("new.h5ad")
    assert run(f"scvae-tools predict new.h5ad --model {trained / 'model'} -o p.zarr --layer counts --key-added m") == 0
    found = ad.read_zarr("p.zarr")
    expected = fitted[found.obs_names]
    np.testing.assert_allclose(found.obsm["X_m"], expected.obsm["X_scvae"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.obsm["m_probs"], expected.obsm["scvae_probs"], rtol=1e-3, atol=1e-5)
    assert list(found.obs["m"].astype(str)) == list(expected.obs["scvae"].astype(str))
    assert list(found.var_names) == list(cells.var_names)
    assert len(found.uns["m"]["history"]) == 4
    assert found.uns["m"]["components"]["means"].shape == (4, 10)


def test_predict_calls_cells_none_that_fit_the_model_worse_than_a_share(trained, here):
    assert run(f"scvae-tools predict demo --model {trained / 'model'} -o p.h5ad --none-below 0.3") == 0
    found = ad.read_h5ad("p.h5ad").obs
    np.testing.assert_array_equal(found["scvae"] == "none", found["scvae_fit"] < 0.3)
    assert 0.1 < np.mean(found["scvae"] == "none") < 0.5


def test_predict_reads_x_by_a_model_that_was_set_up_with_a_layer(here):
    cells = svt.datasets.simulate(120, 20, 3)
    cells.layers["counts"] = cells.X.copy()
    svt.SCVAE.setup_anndata(cells, layer="counts")
    model = svt.SCVAE(cells, mixture=False, likelihood="poisson")
    model.train(2, progress=False)
    model.save("m", save_anndata=False)
    expected = model.get_latent_representation()
    cells.layers["counts"] = np.ones(cells.shape, np.float32)
    cells.write_h5ad("both.h5ad")
    del cells.layers["counts"]
    cells.write_h5ad("x.h5ad")
    for name, layers in {"both": {"counts"}, "x": set()}.items():
        assert run(f"scvae-tools predict {name}.h5ad --model m -o {name}-new.h5ad") == 0
        found = ad.read_h5ad(f"{name}-new.h5ad")
        np.testing.assert_allclose(found.obsm["X_scvae"], expected, rtol=1e-5, atol=1e-6)
        assert set(found.layers) - {None} == layers  # None is X, as of anndata 0.13


def test_predict_refuses_missing_genes_unless_they_count_as_zero(trained, here, capsys):
    cells = svt.datasets.pbmc68k_reduced()
    cells[:, 2:].copy().write_h5ad("few.h5ad")
    call = f"scvae-tools predict few.h5ad --model {trained / 'model'} -o p.h5ad"
    assert run(call) == 1
    message = f"2 of 765 are missing: '{cells.var_names[0]}', '{cells.var_names[1]}'. .* pass --fill-missing"
    assert re.search(message, capsys.readouterr().err)
    assert not (here / "p.h5ad").exists()
    assert run(f"{call} --fill-missing") == 0
    zeros = cells.copy()
    zeros.X = zeros.X @ sparse.diags(np.r_[0, 0, np.ones(763)]).tocsr()
    zeros.write_h5ad("zeros.h5ad")
    assert run(f"scvae-tools predict zeros.h5ad --model {trained / 'model'} -o z.h5ad") == 0
    found, expected = ad.read_h5ad("p.h5ad"), ad.read_h5ad("z.h5ad")
    assert found.n_vars == 763
    np.testing.assert_allclose(found.obsm["X_scvae"], expected.obsm["X_scvae"], rtol=1e-4, atol=1e-5)


def test_prediction_replaces_the_results_of_another_model_as_a_whole(trained, here):
    assert run("scvae-tools fit demo --model vae --mixture none --likelihood zip --epochs 2 --quiet") == 0
    assert run(f"scvae-tools predict {trained / 'fitted.h5ad'} --model vae -o p.h5ad --quiet") == 0
    before, found = ad.read_h5ad(trained / "fitted.h5ad"), ad.read_h5ad("p.h5ad")
    assert {"scvae"} == set(before.obs) - set(found.obs)
    assert {"scvae_probs"} == set(before.obsm) - set(found.obsm)
    assert set(found.layers) - {None} == set(found.varm) - set(before.varm) == set()
    assert "components" not in found.uns["scvae"]
    params = found.uns["scvae"]["params"]
    assert (params["likelihood"], params["n_latent"], params["model"]) == ("zip", 10, "vae")
    assert not params["mixture"]
    assert run("scvae-tools plot p.h5ad training -o t.png --quiet") == 0


def test_quiet_prediction_with_genes_filled_in_says_nothing(trained, here):
    svt.datasets.pbmc68k_reduced()[:60, 2:].copy().write_h5ad("few.h5ad")
    call = ["predict", "few.h5ad", "--model", trained / "model", "-o", "p.h5ad", "--fill-missing", "--quiet", "--json"]
    done = subprocess.run([sys.executable, "-m", "scvae_tools", *call], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["cells"] == 60
    assert done.stderr == ""


@pytest.fixture(scope="module")
def of_batches(tmp_path_factory):
    """Folder with cells of the batches 1 and 2, whole numbers, and a model of them."""
    folder = tmp_path_factory.mktemp("batches")
    cells = svt.datasets.simulate(120, 30, 3, random_state=0)
    cells.obs["run"] = np.repeat([1, 2], 60)
    cells.write_h5ad(folder / "cells.h5ad")
    call = ["fit", folder / "cells.h5ad", "--model", folder / "model", "--batch-key", "run"]
    assert main([*map(str, call), "--mixture", "none", "--epochs", "2", "--quiet"]) == 0
    return folder


def test_a_batch_with_a_number_for_a_name_is_sampled(of_batches, here, capsys):
    call = f"scvae-tools sample --model {of_batches / 'model'} --cells 20 -o x.h5ad --batch"
    assert run(f"{call} 2") == 0
    assert set(ad.read_h5ad("x.h5ad").obs["batch"]) == {2}
    assert run(f"{call} 3 --overwrite") == 1
    assert "`batch` must be one of '1', '2'; found '3'." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda obs: obs.drop(columns="run"), "must have the column 'run' in adata.obs, which was its `batch_key`"),
        (lambda obs: obs.assign(run=3), "knows, '1', '2'; found '3'. Train the model on new batches with"),
        (lambda obs: obs.assign(run="1"), "found '1'. Type str must be int: adata.obs['run'] = adata.obs"),
    ],
)
def test_cells_whose_batch_the_model_does_not_know_are_refused(change, message, of_batches, here, capsys):
    cells = ad.read_h5ad(of_batches / "cells.h5ad")
    cells.obs = change(cells.obs)
    cells.write_h5ad("new.h5ad")
    assert run(f"scvae-tools predict new.h5ad --model {of_batches / 'model'} -o p.h5ad") == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_cells_without_labels_are_predicted_by_a_model_that_was_trained_on_labels(here):
    fit = "scvae-tools fit demo --model m --labels-key bulk_labels --epochs 3 --quiet"
    assert run(fit) == 0
    cells = svt.datasets.pbmc68k_reduced()[:50].copy()
    del cells.obs["bulk_labels"]
    cells.write_h5ad("new.h5ad")
    assert run("scvae-tools predict new.h5ad --model m -o p.h5ad --quiet") == 0
    found = ad.read_h5ad("p.h5ad")
    assert "bulk_labels" not in found.obs
    assert set(found.obs["scvae"]) <= set(svt.datasets.pbmc68k_reduced().obs["bulk_labels"])


def test_samples_are_those_of_the_component_and_the_seed(trained, here):
    call = f"scvae-tools sample --model {trained / 'model'} --cells 30 --component 2 --quiet"
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(f"{call} --seed {seed} -o {name}.h5ad") == 0
    a, b, c = (ad.read_h5ad(f"{name}.h5ad") for name in "abc")
    assert a.shape == (30, 765)
    assert set(a.obs["component"]) == {"2"}
    assert (a.X != b.X).nnz == 0
    assert (a.X != c.X).nnz > 0


def test_compare_goes_on_from_its_folder(here, monkeypatch):
    call = "scvae-tools compare demo --directory d --epochs 2 --quiet --set n_importance_samples=2 --grid"
    assert run([*shlex.split(call)[1:], '{"n_latent": [2]}', "-o", "a.tsv"]) == 0
    trained = []
    train = svt.SCVAE.train

    @functools.wraps(train)
    def count(self, *positional, **options):
        trained.append(self)
        return train(self, *positional, **options)

    monkeypatch.setattr(svt.SCVAE, "train", count)
    assert run([*shlex.split(call)[1:], '{"n_latent": [2, 3]}', "-o", "b.tsv"]) == 0
    assert len(trained) == 1
    a, b = (pd.read_csv(f"{name}.tsv", sep="\t") for name in "ab")
    assert list(b["n_latent"]) == [2, 3]
    of_a_model = [name for name in a if name not in RANKING]
    pd.testing.assert_frame_equal(a[of_a_model], b[of_a_model][:1])
    assert sorted(b["rank"]) == [1, 2]


def test_a_table_is_tab_separated_on_the_standard_output(capsys):
    assert run("scvae-tools datasets") == 0
    table = pd.read_csv(io.StringIO(capsys.readouterr().out), sep="\t")
    assert list(table["name"]) == sorted(svt.datasets.__all__)
    assert run("scvae-tools plot --list") == 0
    assert set(pd.read_csv(io.StringIO(capsys.readouterr().out), sep="\t")["name"]) == set(svt.pl.__all__)


def test_json_is_all_that_is_on_the_standard_output(here, capsys):
    assert run("scvae-tools fit demo --epochs 2 --components 3 --score-key bulk_labels --json") == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert summary["cells"], summary["genes"] == (700, 765)
    assert (summary["epochs"], summary["components"]) == (2, 3)
    assert -0.5 < summary["ari"] <= 1
    assert summary["elbo_train"] < 0
    assert "epoch" in err  # the bar


def test_the_ari_is_that_of_the_written_clusters(trained, here, capsys):
    from sklearn.metrics import adjusted_rand_score

    cells = svt.datasets.pbmc68k_reduced()
    cells.obs["some"] = cells.obs["bulk_labels"].where(np.arange(700) < 500)  # the others are missing
    cells.write_h5ad("cells.h5ad")
    assert run("scvae-tools fit cells.h5ad -o x.h5ad --epochs 2 --components 3 --score-key some --json") == 0
    written = ad.read_h5ad("x.h5ad").obs[:500]
    expected = adjusted_rand_score(written["bulk_labels"], written["scvae"])
    assert json.loads(capsys.readouterr().out)["ari"] == pytest.approx(expected)


def test_numbers_that_json_cannot_hold_are_null(capsys):
    table = pd.DataFrame({"a": [np.float32(0.5), np.nan], "b": [np.int64(2), None]}, index=["x", "y"])
    _cli._print(table, quiet=False, as_json=True)
    rows = [{"index": "x", "a": 0.5, "b": 2}, {"index": "y", "a": None, "b": None}]
    assert json.loads(capsys.readouterr().out) == rows


def test_quiet_leaves_nothing_to_be_read(here, capsys):
    assert run("scvae-tools datasets simulate -o a.h5ad --set n_cells=200 --quiet") == 0
    assert run("scvae-tools fit a.h5ad --model m --epochs 2 --components 2 --quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_plots_are_drawn_in_the_format_of_the_name(trained, here):
    for name, start in (("a.png", b"\x89PNG"), ("b.pdf", b"%PDF"), ("c.svg", b"<?xml")):
        assert run(f"scvae-tools plot {trained / 'fitted.h5ad'} kl -o {name}") == 0
        assert (here / name).read_bytes().startswith(start)


# -- errors ------------------------------------------------------------------------------------------------------------

BAD_INPUT = {
    "fit gone.h5ad -o x.h5ad": "There is no 'gone.h5ad'. Pass a file",
    "fit demo -o x.h5ad --likelihood binomial": "`likelihood` must be one of",
    "fit demo -o x.h5ad --likelihood negative_binomial": "found 'negative_binomial'. Here 'negative_binomial' is 'nb'",
    "fit demo -o x.h5ad --set seed=3": "Here it is 'random_state'",
    "plot demo kl -o x.png --set return_fig=1": "Here it is 'ax'",
    "fit demo -o x.h5ad --set likelyhood=nb": "no argument 'likelyhood'. Did you mean 'likelihood'?",
    "fit demo -o x.h5ad --batch-key donor": "'donor'",
    "fit demo -o x.h5ad --score-key type": "adata.obs.*'type'",
    "fit demo -o x.csv": "written as .h5ad or .zarr; found 'x.csv'",
    "fit demo -o no/x.h5ad": "there is no .*no'. Make it first",
    "fit demo --model no/m": "there is no .*no'. Make it first",
    "predict demo --model gone -o x.h5ad": "No saved model at 'gone/model.pt'",
    "compare demo --grid gone.json": "gone.json",
    "compare demo --grid grid.yaml": "takes a .json or .toml file, or JSON in braces; found 'grid.yaml'",
    "compare demo --grid {likelihood}": "--grid cannot be read",
    "compare demo --grid {} -o t.csv": "written as .tsv or .tsv.gz; found 't.csv'",
    "plot gone.h5ad training -o picture": r"written as .*\.pdf, .*\.png, .*; found 'picture'. Name it so",
    "plot gone.h5ad training -o x.gif2": r"found 'x\.gif2'",
    "plot demo training -o x.png": "There is no .* Run svt.tl.scvae",
    "plot demo nonsense -o x.png": "There is no 'nonsense'; there are 'ambiguous',",
    "plot demo kl -o x.png --set colour=3": "kl: got an unexpected keyword argument 'colour'. It takes",
    "plot demo confusion -o x.png": "confusion: missing a required argument: 'labels_key'",
    "datasets nonsense -o x.h5ad": "There is no 'nonsense'; there are",
    "datasets simulate -o x.h5ad --set n_cells=0": "`n_cells` must be a whole number of at least 1",
    "datasets simulate -o x.h5ad --set cells=3": "unexpected keyword argument 'cells'",
}


@pytest.mark.parametrize("call", BAD_INPUT)
def test_bad_input_is_told_in_one_line_and_ends_with_1(call, here, capsys):
    assert main(call.split()) == 1
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("scvae-tools: error: ")
    assert re.search(BAD_INPUT[call], last)
    assert "Traceback" not in err
    assert list(here.iterdir()) == []


WRONG_USAGE = {
    "sing": "invalid choice",
    "fit": "required: DATA",
    "fit x.h5ad": "nothing to write: pass -o FILE, --model DIR, or both",
    "fit demo --colour red": "unrecognized arguments",
    "fit demo --lik nb": "unrecognized arguments: --lik nb",
    "fit demo --max-epochs 5": "unrecognized arguments: --max-epochs 5; --max-epochs is --epochs here",
    "fit demo -m GMVAE -K 5": "; -m is --mixture here; -K is --components here",
    "fit demo --n-clusters=4": "; --n-clusters is --components here",
    "fit demo --early-stopping-patience 4": "; --early-stopping-patience is --set patience=... here",
    "fit demo --likelihod nb": "; did you mean --likelihood for --likelihod?",
    "fit demo --latent many": "invalid int value",
    "fit demo --components many": "must be a whole number; found 'many'",
    "fit demo --components 1-2-3": "smallest and largest such as 4-20; found '1-2-3'",
    "fit demo --mixture three": "must be gmvae, vade or none; found 'three'",
    "fit demo --set latent": "must be NAME=VALUE",
    "fit demo --latent 3 --set n_latent=4": "--set n_latent=... says the same as an option",
    "fit demo --set copy=true": "--set copy=... is for the command itself to decide",
    "fit demo --set lr=1 --set lr=2": "names an argument twice",
    "predict demo -o x.h5ad": "required: --model",
    "predict demo --model m": "nothing to write: pass -o FILE",
    "plot fitted.h5ad": "pass DATA, NAME and -o FILE; or --list",
    "datasets simulate": "nothing to write",
}


@pytest.mark.parametrize("call", WRONG_USAGE)
def test_wrong_usage_ends_with_2(call, here, capsys):
    with pytest.raises(SystemExit) as ended:
        main(call.split())
    assert ended.value.code == 2
    assert WRONG_USAGE[call] in capsys.readouterr().err


def test_without_arguments_the_help_is_shown(capsys, monkeypatch):
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["fit"]) == 2
    err = capsys.readouterr().err
    assert "examples:" in err
    assert "--likelihood" in err


def test_a_fault_of_the_program_keeps_its_traceback(here, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a fault")

    monkeypatch.setattr(tl, "scvae", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        run("scvae-tools fit demo")


def test_the_traceback_of_bad_input_is_shown_if_wanted(here):
    with pytest.raises(FileNotFoundError):
        run("scvae-tools fit gone.h5ad -o x.h5ad --traceback")


def test_a_training_that_broke_down_is_no_fault_of_the_program(here, monkeypatch, capsys):
    def fail(*_, **__):
        raise svt.NonFiniteError("elbo", "vae", 3)

    monkeypatch.setattr(tl, "scvae", fail)
    assert run("scvae-tools fit demo") == 1
    assert "scvae-tools: error: " in capsys.readouterr().err


def test_an_interruption_ends_with_130(here, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tl, "scvae", interrupt)
    assert run("scvae-tools fit demo -o x.h5ad") == 130
    assert "scvae-tools: interrupted" in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_a_training_that_was_interrupted_is_written_and_ends_with_130(here, monkeypatch, capsys):
    from scvae_tools._train.plan import TrainingPlan

    step = TrainingPlan.training_step

    def interrupted_in_the_third_epoch(self, *positional):
        if self.row["epoch"] == 3:
            raise KeyboardInterrupt
        return step(self, *positional)

    monkeypatch.setattr(TrainingPlan, "training_step", interrupted_in_the_third_epoch)
    call = "scvae-tools fit demo -o x.h5ad --epochs 6 --components 2"
    assert run(f"{call} --json") == 130
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert (summary["interrupted"], summary["epochs"], summary["output"]) == (True, 2, "x.h5ad")
    assert err.count("scvae-tools: warning: Training was interrupted in stage") == 1
    assert len(ad.read_h5ad("x.h5ad").uns["scvae"]["history"]) == 2
    assert run(f"{call} --overwrite") == 130
    assert re.search("^interrupted +True$", capsys.readouterr().out, flags=re.MULTILINE)


def test_warnings_for_users_are_lines_and_those_for_programmers_are_not_shown(here, monkeypatch, capsys):
    import warnings

    def warn(*_, **__):
        warnings.warn("counts\nare odd", UserWarning, stacklevel=1)
        warnings.warn("old", FutureWarning, stacklevel=1)
        raise ValueError("enough")

    monkeypatch.setattr(tl, "scvae", warn)
    assert run("scvae-tools fit demo --quiet") == 1
    assert capsys.readouterr().err == "scvae-tools: warning: counts are odd\nscvae-tools: error: enough\n"


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        "fit demo -o there.h5ad",
        "fit demo --model folder",
        "predict demo --model gone -o there.h5ad",
        'compare demo --grid {"n_latent":[1]} -o there.tsv',
        "sample --model gone -o there.h5ad",
        "plot gone.h5ad kl -o there.png",
        "datasets simulate -o there.h5ad",
    ],
)
def test_nothing_is_overwritten_and_that_is_said_before_any_work(call, here, received, capsys):
    (here / "folder").mkdir()
    for name in ("there.h5ad", "there.tsv", "there.png", "folder/notes.txt"):
        (here / name).write_text("kept")
    assert main(call.split()) == 1
    assert "exists already. Pass another name, or --overwrite." in capsys.readouterr().err
    assert not received
    assert {file.read_text() for file in here.rglob("*.*")} == {"kept"}


@pytest.mark.parametrize("name", ["x.h5ad", "x.zarr"])
def test_what_exists_is_replaced_if_wanted(name, here):
    for n_cells in (20, 30):
        assert run(f"scvae-tools datasets simulate -o {name} --set n_cells={n_cells} --overwrite") == 0
    found = ad.read_zarr(name) if name.endswith("zarr") else ad.read_h5ad(name)
    assert found.n_obs == 30
    assert [file.name for file in here.iterdir()] == [name]


def test_a_model_is_replaced_among_other_files(here):
    (here / "m").mkdir()
    (here / "m" / "notes.txt").write_text("kept")
    assert run("scvae-tools fit demo --model m --epochs 1 --components 2 --overwrite --quiet") == 0
    assert (here / "m" / "model.pt").exists()
    assert (here / "m" / "notes.txt").read_text() == "kept"


@pytest.mark.parametrize("name", ["x.h5ad", "x.zarr"])
def test_a_folder_that_is_no_result_is_never_replaced(name, here, capsys):
    (here / name).mkdir()
    (here / name / "thesis.txt").write_text("kept")
    assert run(f"scvae-tools datasets simulate -o {name} --overwrite") == 1
    assert "Pass another name" in capsys.readouterr().err
    assert (here / name / "thesis.txt").read_text() == "kept"


@pytest.mark.parametrize("name", ["x.h5ad", "x.zarr"])
def test_a_full_disk_leaves_the_former_file_and_no_part(name, here, monkeypatch, capsys):
    call = f"scvae-tools datasets simulate -o {name} --set n_cells=20 --overwrite"
    assert run(call) == 0

    def fail(group, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_adata_files, "write_dispatched", fail)
    capsys.readouterr()
    assert run(call) == 1
    found = capsys.readouterr().err
    assert re.fullmatch(rf"scvae-tools: error: '{name}' cannot be written, and is as it was: it takes .*\n", found)
    assert [file.name for file in here.iterdir()] == [name]
    assert (ad.io.read_zarr(name) if name.endswith("zarr") else ad.read_h5ad(name)).n_obs == 20


@pytest.fixture
def quick_fit(trained, monkeypatch):
    """The training of `trained` takes no time: its cells have the results, and its model is loaded."""

    def fit(adata, **_):
        fitted = ad.read_h5ad(trained / "fitted.h5ad")
        for name in ("obs", "obsm", "uns"):
            setattr(adata, name, getattr(fitted, name))
        return svt.SCVAE.load(trained / "model", adata)

    monkeypatch.setattr(tl, "scvae", fit)


def no_room(_, path, *__, **___):
    raise DiskFullError(path, 10**9)


def test_results_without_room_leave_the_model_from_which_they_can_be_made(quick_fit, here, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(_commands, "write_adata", no_room)
        assert run("scvae-tools fit demo -o x.h5ad") == 1
    (kept,) = here.iterdir()
    message = capsys.readouterr().err.splitlines()[-1]
    assert "'x.h5ad' cannot be written, and is as it was: it takes 1 GB or more" in message
    assert message.endswith(
        f"The trained model is in {str(kept)!r}, from which `scvae-tools predict` makes the results."
    )
    assert run(f"scvae-tools predict demo --model {kept} -o x.h5ad --quiet") == 0


def test_results_are_written_where_the_model_has_no_room(quick_fit, here, monkeypatch, capsys):
    monkeypatch.setattr(svt.SCVAE, "save", no_room)
    assert run("scvae-tools fit demo -o x.h5ad --model m") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "'m' cannot be written" in message
    assert message.endswith("The trained model is lost with it.")
    assert [file.name for file in here.iterdir()] == ["x.h5ad"]


def test_results_that_the_disk_has_no_room_for_are_refused_before_the_training(here, received, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    assert run("scvae-tools fit demo -o x.h5ad") == 1
    assert "'x.h5ad' cannot be written, and is as it was: it takes 3.55 MB or more" in capsys.readouterr().err
    assert not received


@pytest.mark.parametrize(
    ("call", "code"),
    [("plot x.zarr training -o t.png", 0), ("datasets simulate -o x.zarr", 1)],
    ids=["read", "written"],
)
def test_a_zarr_whose_replacement_was_killed_between_two_renames_is_found(call, code, trained, here):
    _adata_files.write_adata(ad.read_h5ad(trained / "fitted.h5ad"), here / "x.zarr")
    left = here / f"x.zarr.{'0a' * 6}.tmp"
    left.mkdir()
    (here / "x.zarr").rename(left / FORMER)
    assert run(f"scvae-tools {call}") == code
    assert ad.read_zarr("x.zarr").n_obs == 700


def test_a_folder_that_cannot_be_written_to_is_refused_before_any_work(here, received, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda folder, mode: Path(folder) != here or mode != os.W_OK)
    assert run("scvae-tools fit demo -o x.h5ad") == 1
    assert "must be open for writing" in capsys.readouterr().err
    assert not received


# -- the program -------------------------------------------------------------------------------------------------------


def test_the_program_is_there_and_help_loads_nothing_heavy():
    code = """if True:
        import sys
        from scvae_tools._cli import main
        try:
            main(["fit", "--help"])
        except SystemExit as ended:
            assert ended.code == 0
        print([name for name in ("torch", "scvi", "scanpy", "anndata", "pandas", "numpy") if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    done = subprocess.run(
        [sys.executable, "-m", "scvae_tools", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"scvae-tools {svt.__version__}\n"


def test_the_script_of_the_package_is_main():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"scvae-tools": "scvae_tools._cli:main"}


def test_exit_codes_are_those_of_the_process(tmp_path):
    def code(*arguments):
        call = [sys.executable, "-m", "scvae_tools", *arguments]
        return subprocess.run(call, capture_output=True, check=False, cwd=tmp_path).returncode

    assert code("fit", "gone.h5ad", "-o", "x.h5ad") == 1
    assert code("fit") == 2


# -- the page ----------------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") if (ROOT / "docs" / "cli.md").exists() else ""
#: Options of scVAE 2.1.4, as `scvae COMMAND --help` has them.
OF_THE_ORIGINAL = """
--format --data-directory --map-features --feature-selection --example-filter --preprocessing-methods
--noisy-preprocessing-methods --split-data-set --splitting-method --splitting-fraction --model-type --latent-size
--hidden-sizes --number-of-importance-samples --number-of-monte-carlo-samples --inference-architecture
--generative-architecture --latent-distribution --number-of-classes --parameterise-latent-posterior
--reconstruction-distribution --number-of-reconstruction-classes --prior-probabilities-method
--number-of-warm-up-epochs --kl-weight --proportion-of-free-nats-for-y-kl-divergence --minibatch-normalisation
--batch-correction --dropout-keep-probabilities --count-sum --minibatch-size --run-id --models-directory
--number-of-epochs --learning-rate --new-run --reset-training --caches-directory --analyses-directory
--included-analyses --analysis-level --decomposition-methods --highlight-feature-indices --export-options
--evaluation-set-kind --sample-size --prediction-method --prediction-training-set-kind --model-versions
--include-data-sets --exclude-data-sets --include-models --exclude-models --include-prediction-methods
--exclude-prediction-methods --extra-model-specification-for-plots --no-prediction-methods-for-gmvae-in-plots
--epoch-cut-off --other-methods --log-summary --version
""".split()  # noqa: SIM905


@pytest.mark.parametrize("option", OF_THE_ORIGINAL)
def test_the_page_says_what_became_of_every_option_of_the_original(option):
    rows = [line for line in PAGE.splitlines() if line.startswith("|")]
    assert [row for row in rows if f"`{option}`" in row.split("|")[1]]


def calls_of_the_page():
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.startswith("scvae-tools ")]


def test_the_calls_of_the_page_are_understood():
    assert calls_of_the_page()
    for call in calls_of_the_page():
        PARSER.parse_args(shlex.split(call.split(" > ")[0], comments=True)[1:])


def test_options_that_the_page_names_exist():
    ours = {flag for parser in PARSERS.values() for action in parser._actions for flag in action.option_strings}
    named = {
        option
        for row in PAGE.splitlines()
        for part in ([row.split("|")[2]] if row.startswith("|") and row.count("|") > 2 else [row])
        for option in re.findall(r"`(--[a-z-]+)", part)
    }
    assert named <= ours | {"--help", "--version"}
    assert {flag for option in _options.FIT for flag in option.flags.split() if flag.startswith("--")} <= set(
        re.findall(r"--[a-z-]+", PAGE)
    )


def test_arguments_that_the_page_sets_exist():
    plots = [getattr(svt.pl, name) for name in svt.pl.__all__]
    ours = parameters_of(tl.scvae, svt.SCVAE.__init__, svt.SCVAE.train, tl.evaluate, *plots)
    named = {_options.setting(text)[0] for text in re.findall(r"--set '?(\w+=[^ `']+)", PAGE)}
    assert len(named) > 10
    assert named <= set(ours)
