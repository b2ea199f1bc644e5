"""The documentation says what is true: the reference is complete, its code runs, its links lead somewhere."""

from __future__ import annotations

import inspect
import json
import re
import sys
from importlib import util
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pictures
import pytest
import test_all
import test_likelihoods
import torch
from likelihood_cases import CASES
from scipy import stats

import scvae_tools as svt
from scvae_tools.likelihoods import LIKELIHOODS

mpl.use("Agg")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("[!_]*.md"))  # `make docs` leaves pages of its own, which begin with _
TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))
MODULES = ("tl", "pl", "metrics", "datasets", "likelihoods")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
every_tutorial = pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda tutorial: tutorial.name)


def read(page):
    return page.read_text(encoding="utf-8")


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", read(page), flags=re.DOTALL | re.MULTILINE)


def cells(tutorial, kind):
    return [cell for cell in json.loads(read(tutorial))["cells"] if cell["cell_type"] == kind]


# -- reference ---------------------------------------------------------------------------------------------------------


def listed_in_reference():
    """Names in the lists of api.md, without that of the package."""
    lists = re.findall(r"^\.\. autosummary::\n(.*?)^```", read(DOCS / "api.md"), flags=re.DOTALL | re.MULTILINE)
    names = [name for part in lists for name in re.findall(r"^ +([\w.*]+)$", part, flags=re.MULTILINE)]
    whole = [name.removesuffix(".*") for name in names if name.endswith(".*")]  # read from the code, see docs/conf.py
    names = [name for name in names if not name.endswith(".*")]
    names += [f"{module}.{name}" for module in whole for name in getattr(svt, module).__all__]
    assert len(names) == len(set(names))
    return set(names)


def test_the_reference_lists_the_public_names_of_the_package():
    names = {name for name in listed_in_reference() if "." not in name}
    assert names | set(MODULES) == set(svt.__all__)


@pytest.mark.parametrize("module", MODULES)
def test_the_reference_lists_the_public_names_of_each_module(module):
    names = {name.removeprefix(f"{module}.") for name in listed_in_reference() if name.startswith(f"{module}.")}
    assert names == set(getattr(svt, module).__all__)


def test_the_reference_lists_the_methods_of_the_model():
    ours = [parent for parent in svt.SCVAE.__mro__ if parent.__module__.startswith("scvae_tools")]
    methods = {name for parent in ours for name in vars(parent) if not name.startswith("_")}
    methods -= {"history_", "is_trained_", "null_log_likelihood_"}  # as scvi-tools and files know what the others are
    methods -= {name for name in methods if (inspect.getdoc(getattr(svt.SCVAE, name)) or "").startswith("Refused")}
    names = {name.removeprefix("SCVAE.") for name in listed_in_reference() if name.startswith("SCVAE.")}
    assert names == methods


@pytest.mark.parametrize("name", sorted(listed_in_reference()))
def test_what_the_reference_lists_has_a_docstring(name):
    found = svt
    for part in name.split("."):
        found = getattr(found, part)
    assert inspect.getdoc(found)


# -- pages -------------------------------------------------------------------------------------------------------------


def named_in(text):
    """Public names as users write them: ``svt.tl.scvae``, ``svt.SCVAE.load``."""
    return set(re.findall(r"\bsvt((?:\.\w+)+)", text))


@pytest.mark.parametrize("page", [*PAGES, *TUTORIALS, ROOT / "README.md"], ids=lambda page: page.name)
def test_names_exist(page):
    missing = []
    for name in named_in(read(page)):
        found = svt
        for part in name.split(".")[1:]:
            found = getattr(found, part, None)
        if found is None:
            missing.append(name)
    assert not missing


@every_page
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(((?!http)[^)#\s]+)", read(page)):
        home = ROOT if target.startswith("tutorials/") else DOCS  # conf.py copies these
        assert (home / target).exists(), target


@every_page
def test_every_page_is_in_the_table_of_contents(page):
    trees = "\n".join(re.findall(r"^```{toctree}\n(.*?)^```", read(DOCS / "index.md"), flags=re.DOTALL | re.MULTILINE))
    assert page.stem == "index" or page.stem.startswith("from-") or re.search(rf"^{page.stem}$", trees, re.MULTILINE)


def test_every_tutorial_is_in_the_table_of_contents():
    named = re.findall(r"^tutorials/(\w+)$", read(DOCS / "index.md"), flags=re.MULTILINE)
    assert sorted(named) == [tutorial.stem for tutorial in TUTORIALS]


def test_the_example_of_the_first_page_is_part_of_the_one_in_the_readme_which_runs():
    (example,) = python_blocks(DOCS / "index.md")
    assert set(example.splitlines()) <= set(python_blocks(ROOT / "README.md")[0].splitlines())


def test_the_example_for_users_of_scvi_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in python_blocks(DOCS / "from-scvi.md"):
        exec(compile(block.replace("train(20)", "train(2, progress=False)"), "from-scvi.md", "exec"), names)
    assert names["adata"].obsm["X_scvae"].shape == (700, 10)
    assert names["adata"].obs["scvae_fit"].between(0, 1).all()
    assert (tmp_path / "blood" / "_scvi_required_metadata.json").exists()


def test_the_example_for_users_of_the_original_runs():
    shorter = {
        "n_components=10, return_model": "n_components=10, max_epochs=4, return_model",
        "max_epochs=500": "max_epochs=4",
        "n_warm_up_epochs=200": "n_warm_up_epochs=1",
        "return_model=True": "return_model=True, progress=False",
    }
    names: dict = {}
    for block in python_blocks(DOCS / "from-scvae.md"):
        for long, short in shorter.items():
            block = block.replace(long, short)
        exec(compile(block, "from-scvae.md", "exec"), names)
    model, split = names["model"], (567, 63, 70)  # 81, 9 and 10 %
    assert (len(model.train_indices), len(model.validation_indices), names["test"].n_obs) == split
    assert model.version == "end"
    assert model.get_prior()["covariances"].shape == (10, 100, 100)
    assert set(names["test"].uns["scvae_evaluation"]["table"]["clustering"]) == {"model", "k-means"}
    mpl.pyplot.close("all")


# -- contributing ------------------------------------------------------------------------------------------------------

#: Tests of likelihoods that take a name.
OF_EVERY_LIKELIHOOD = [
    function
    for name, function in vars(test_likelihoods).items()
    if name.startswith("test_")
    and list(inspect.signature(function).parameters) == ["name"]
    and any(mark.args[1] in (LIKELIHOODS, test_likelihoods.NAMES) for mark in function.pytestmark)
]


@pytest.fixture
def contributed(monkeypatch):
    """The names that the examples of the page define, up to the training; its rows in our tables are taken back."""
    for table in (CASES, LIKELIHOODS):
        monkeypatch.setitem(table, "geometric", None)
    names: dict = {"__name__": "contributing"}
    for block in python_blocks(DOCS / "contributing.md"):
        if "svt.tl.scvae" not in block:
            exec(compile(block, "contributing.md", "exec"), names)
    return names


def test_the_likelihood_of_the_page_is_that_of_scipy(contributed):
    x = np.arange(6.0)
    log_rate = np.log([0.1, 0.5, 1.0, 2.0, 30.0, 400.0])
    params = {"log_rate": torch.tensor(log_rate)}
    likelihood = contributed["Geometric"]()
    geometric = stats.nbinom(1, 1 / (1 + np.exp(log_rate)))  # the same distribution by another name
    np.testing.assert_allclose(likelihood.log_prob(torch.tensor(x), params), geometric.logpmf(x), rtol=1e-10)
    np.testing.assert_allclose(likelihood.mean(params), geometric.mean(), rtol=1e-10)
    np.testing.assert_allclose(likelihood.variance(params), geometric.var(), rtol=1e-10)


@pytest.mark.parametrize("test", OF_EVERY_LIKELIHOOD, ids=lambda test: test.__name__.removeprefix("test_"))
def test_the_likelihood_of_the_page_passes_what_holds_for_all(test, contributed):
    assert test_likelihoods.CASES["geometric"] is not None
    test("geometric")


def test_the_likelihood_of_the_page_trains(contributed):
    (training,) = (block for block in python_blocks(DOCS / "contributing.md") if "svt.tl.scvae" in block)
    exec(compile(training, "contributing.md", "exec"), contributed)
    assert contributed["adata"].uns["scvae"]["params"]["likelihood"] == "geometric"


#: Tests of plots that take one panel and nothing else.
OF_EVERY_PLOT = [
    function
    for name, function in vars(test_all).items()
    if name.startswith("test_") and list(inspect.signature(function).parameters) == ["plot"]
]


@pytest.mark.parametrize("test", OF_EVERY_PLOT, ids=lambda test: test.__name__.removeprefix("test_"))
def test_the_plot_of_the_page_passes_what_holds_for_all(test, contributed):
    test(contributed["sizes"])
    mpl.pyplot.close("all")


def test_the_plot_of_the_page_draws_the_sizes_of_the_components(contributed, tmp_path):
    adata = pictures.make_adata(60, n_components=4)
    ax = contributed["sizes"](adata, save=tmp_path / "sizes.png")
    assert [bar.get_width() for bar in ax.patches] == [15] * 4
    assert (tmp_path / "sizes.png").exists()
    with pytest.raises(ValueError, match="no obs\\['other'\\]"):
        contributed["sizes"](adata, key="other")
    mpl.pyplot.close("all")


def test_commands_are_targets_of_the_makefile():
    makefile = read(ROOT / "Makefile")
    for command in re.findall(r"`(?:PYTHON=\S+ )?make ([\w-]+)", "\n".join(map(read, PAGES))):
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE), command


def test_outputs_of_tutorials_survive_a_build_and_no_commit_or_cleaning():
    makefile = read(ROOT / "Makefile")
    (docs,) = re.findall(r"^docs:.*\n\trm -rf (.*)", makefile, flags=re.MULTILINE)
    (clean,) = re.findall(r"^clean:\n\trm -rf (.*)", makefile, flags=re.MULTILINE)
    (cache,) = re.findall(r'HERE\.parent / "(\.\w+)"', read(DOCS / "conf.py"))
    assert cache not in docs.split()
    assert cache in clean.split()
    assert f"{cache}/" in read(ROOT / ".gitignore").split()


# -- tutorials ---------------------------------------------------------------------------------------------------------


@every_tutorial
def test_tutorials_are_stored_without_outputs(tutorial):
    for cell in cells(tutorial, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@every_tutorial
def test_tutorials_begin_with_a_title(tutorial):
    assert "".join(cells(tutorial, "markdown")[0]["source"]).startswith("# ")


def test_there_is_a_section_with_a_picture_of_each_plot():
    tutorial = ROOT / "tutorials" / "plots.ipynb"
    called = {
        name
        for cell in cells(tutorial, "code")
        for name in re.findall(r"^svt\.pl\.(\w+)\(.*\);$", "".join(cell["source"]), flags=re.MULTILINE)
    }
    titles = [
        re.findall(r"^## .*`svt\.pl\.(\w+)`$", "".join(cell["source"]), flags=re.MULTILINE)
        for cell in cells(tutorial, "markdown")
    ]
    assert called == {name for title in titles for name in title} == set(svt.pl.__all__)


@every_tutorial
def test_links_of_tutorials_lead_to_tutorials(tutorial):
    text = "\n".join("".join(cell["source"]) for cell in cells(tutorial, "markdown"))
    for target in re.findall(r"\]\(((?!http)[^)#\s]+)", text):
        assert (tutorial.parent / target).exists(), target


# -- check_pages.py ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def check_pages():
    spec = util.spec_from_file_location("check_pages", DOCS / "check_pages.py")
    module = util.module_from_spec(spec)
    sys.modules["check_pages"] = module  # where dataclasses look
    spec.loader.exec_module(module)
    yield module
    del sys.modules["check_pages"]


def test_links_anchors_and_images_that_lead_nowhere_are_found(check_pages, tmp_path):
    (tmp_path / "there.png").write_bytes(b"")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "page.html").write_text('<h1 id="a title">x</h1><a href="../index.html#end">back</a>')
    (tmp_path / "index.html").write_text(
        '<a href="sub/page.html#a%20title"></a><a href="https://example.org/x"></a><a href="#"></a>'
        '<img src="there.png"><a id="end"></a><a href="mailto:a@b.c"></a>'
        '<a href="gone.html"></a><a href="sub/page.html#gone"></a><img src="gone.png"><a href="../outside.html"></a>'
    )
    assert check_pages.find_broken(tmp_path) == [
        "index.html: 'gone.html' leads to no file",
        "index.html: 'sub/page.html#gone' has no such anchor",
        "index.html: 'gone.png' leads to no file",
        "index.html: '../outside.html' leads out of the documentation",
    ]
