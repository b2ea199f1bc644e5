"""The structure of the package: rooms see what is below them, and nothing is so long that it hides a plan."""

from __future__ import annotations

import subprocess
import sys

import pytest
from structure import ROOMS, SEES, SOURCES, Package

TESTS = SOURCES.parents[1] / "tests"
#: Test files of a topic that no single source has.
TOPICS = {
    "_module": {"architectures", "labels"},
    "_train": {"objective"},
    "likelihoods": {"likelihoods"},
    "model": {"autotune", "covariates", "devices", "query", "recovery"},
    "pl": {"all"},
    "_cli": {"cli", "large_files"},
    "tl": {"lazy"},
}


@pytest.fixture(scope="module")
def package():
    return Package()


def test_a_room_sees_only_what_is_below_it(package):
    assert package.upward == []
    for place, room in enumerate(ROOMS):
        assert SEES[room] - {"package"} <= set(ROOMS[:place]) | {room}, room


def test_no_files_import_each_other_in_a_circle(package):
    assert package.circles == []


def test_no_private_name_crosses_files(package):
    assert package.private_names == []


def test_imports_in_functions_are_there_to_load_torch_late(package):
    assert len(package.eager_imports_in_functions) <= 12


def test_functions_and_files_are_short(package):
    assert package.long_functions == []
    assert package.long_files == []


def test_every_file_says_in_its_first_line_what_lives_there(package):
    for name, file in package.files.items():
        is_empty_face = file.path.name == "__init__.py" and file.path.parent.name.startswith("_") and not file.lines
        assert file.first_line or is_empty_face, name


def test_no_docstring_begins_without_a_noun(package):
    assert package.docstrings_without_a_noun == []


def test_rooms_with_an_underscore_have_empty_faces(package):
    for name, file in package.files.items():
        if file.path.name == "__init__.py" and file.path.parent.name.startswith("_") and file.room != "_cli":
            assert file.lines == 0, name


def test_tests_are_in_folders_named_as_the_rooms(package):
    for folder in sorted(path for path in TESTS.iterdir() if path.is_dir() and not path.name.startswith(("__", "ref"))):
        sources = {path.stem.removeprefix("_") for path in (SOURCES / folder.name).glob("*.py")}
        tests = {path.stem.removeprefix("test_") for path in folder.glob("test_*.py")}
        assert tests <= sources | TOPICS.get(folder.name, set()), folder.name


@pytest.mark.parametrize("module", ["scvae_tools", "scvae_tools.tl", "scvae_tools.pl", "scvae_tools.datasets"])
def test_these_are_imported_without_torch(module):
    code = f"import sys, {module}; print([name for name in ('torch', 'scvi', 'lightning') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


CIRCLE = {
    "_module/a.py": "from scvae_tools._module import b",
    "_module/b.py": "def f():\n    from scvae_tools._module.a import f",
}
UPWARD = {"likelihoods/a.py": "from scvae_tools.tl.b import c", "tl/b.py": "c = 1"}
PRIVATE = {"_module/a.py": "from scvae_tools._module.b import _c", "_module/b.py": "_c = 1"}
FOR_TYPES = {
    "_train/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from scvae_tools.model.b import C",
    "model/b.py": "",
}


@pytest.mark.parametrize(
    ("files", "measure", "number"),
    [
        (CIRCLE, "circles", 1),
        (CIRCLE, "eager_imports_in_functions", 1),
        (UPWARD, "upward", 1),
        (FOR_TYPES, "upward", 1),
        (PRIVATE, "private_names", 1),
        ({"tl/a.py": "def f(model):\n    return model._state"}, "private_names", 1),
        ({"tl/a.py": "def f():\n" + "    1\n" * 70}, "long_functions", 1),
        ({"tl/a.py": 'def f():\n    """Those of g."""'}, "docstrings_without_a_noun", 1),
        ({"_module/a.py": "", "tl/b.py": "from scvae_tools._module.a import c"}, "upward", 0),
    ],
)
def test_what_should_not_be_there_is_found(files, measure, number, tmp_path):
    for name, text in {"__init__.py": "", **files}.items():
        path = tmp_path / "scvae_tools" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert len(getattr(Package(tmp_path / "scvae_tools"), measure)) == number
