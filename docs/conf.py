"""Sphinx: the pages of this folder, the tutorials (executed), and the reference from the docstrings.

``make docs`` builds with warnings as errors and without the network. ``make docs ARGS="-t intersphinx"`` links to the
pages of scanpy, anndata and the others too, which needs it; ``ARGS="-D nb_execution_mode=off"`` skips the tutorials.
Outputs of tutorials are kept in ``.docs_cache``, for the next build with the same sources and packages.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tomllib
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING

from sphinx.ext.napoleon import NumpyDocstring

if TYPE_CHECKING:
    from docutils.nodes import Element, reference
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

HERE = Path(__file__).parent
TUTORIALS = HERE / "tutorials"  #: copies, since Sphinx reads nothing outside this folder


def copy_tutorials() -> None:
    """Copy the notebooks of the repository, and remove copies of those that are gone."""
    shutil.rmtree(TUTORIALS, ignore_errors=True)
    shutil.copytree(HERE.parent / "tutorials", TUTORIALS, ignore=shutil.ignore_patterns(".*"))


copy_tutorials()


def cache_of_outputs() -> Path:
    """Return the folder for outputs of tutorials by these sources and packages; those by others are removed.

    jupyter-cache by itself runs a notebook again only if its code has changed, not if that of the package has.
    """
    digest = hashlib.sha256()
    for source in sorted((HERE.parent / "src").rglob("*.py")):
        digest.update(str(source.relative_to(HERE.parent)).encode() + source.read_bytes())
    for package in ("anndata", "matplotlib", "numpy", "pandas", "scanpy", "scvi-tools", "torch"):
        digest.update(f"{package} {metadata.version(package)}".encode())
    folder = HERE.parent / ".docs_cache" / digest.hexdigest()[:16]
    for other in folder.parent.glob("*"):
        if other != folder:
            shutil.rmtree(other)
    return folder


# -- lists of names that are read from the code ------------------------------------------------------------------------


def with_names(page: str) -> str:
    """Replace a line such as ``pl.*`` in a list by the public names of that module."""

    def names(line: re.Match) -> str:
        module = import_module(f"scvae_tools.{line[2]}")
        return "\n".join(f"{line[1]}{line[2]}.{name}" for name in module.__all__)

    return re.sub(r"^( +)(\w+)\.\*$", names, page, flags=re.MULTILINE)


#: What autosummary makes pages of; it reads files, not what this one makes of them.
REFERENCE = "_reference.md"
(HERE / REFERENCE).write_text(with_names((HERE / "api.md").read_text(encoding="utf-8")), encoding="utf-8")

project = "scvae-tools"
author = "The scvae-tools developers"
copyright = author
release = metadata.version("scvae-tools")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "_templates", REFERENCE]
templates_path = ["_templates"]
suppress_warnings = ["config.cache"]  # tables of this file that cannot be pickled only make the next build slower

if tags.has("intersphinx"):  # noqa: F821
    extensions.append("sphinx.ext.intersphinx")
intersphinx_mapping = {
    "anndata": ("https://anndata.readthedocs.io/en/stable/", None),
    "numpy": ("https://numpy.org/doc/stable/", None),
    "pandas": ("https://pandas.pydata.org/docs/", None),
    "python": ("https://docs.python.org/3/", None),
    "scanpy": ("https://scanpy.readthedocs.io/en/stable/", None),
    "scvi": ("https://docs.scvi-tools.org/en/stable/", None),
    "torch": ("https://docs.pytorch.org/docs/stable/", None),
}

# -- reference ---------------------------------------------------------------------------------------------------------

autosummary_generate = [REFERENCE]
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # attributes in the place of the parameters, not as members of their own
default_role = "py:obj"  # `name` in a docstring is a name of Python
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True

# -- pages and tutorials -----------------------------------------------------------------------------------------------

myst_heading_anchors = 3
myst_fence_as_directive = ["math"]  # as code hosts write formulas; MathJax draws them in the browser
nb_execution_mode = "cache"
nb_execution_cache_path = str(cache_of_outputs())
nb_execution_timeout = -1  # seconds for a cell: no limit, since a busy machine may need any time
nb_execution_raise_on_error = True
nb_execution_in_temp = True  # where what they save goes
nb_merge_streams = True
# tqdm misses a package for bars in notebooks, which here show none.
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"

# -- HTML --------------------------------------------------------------------------------------------------------------

html_theme = "sphinx_book_theme"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_show_sphinx = False
html_theme_options = {
    "home_page_in_toc": True,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "navbar_persistent": [],
    "secondary_sidebar_items": {"**": ["page-toc.html"], "likelihoods": []},  # its first table takes all the width
}
project_urls = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
repository = next((url for name, url in project_urls.items() if name.lower() in ("repository", "source")), None)
if repository is not None:
    html_theme_options |= {"repository_url": repository, "use_repository_button": True}
copybutton_prompt_text = ">>> |... |\\$ "
copybutton_prompt_is_regexp = True


def resolve_short_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Element) -> reference | None:
    """Link names as users write them, such as ``svt.pl.clusters`` or ``SCVAE.train``, if just one object ends so."""
    if node.get("refdomain") != "py":
        return None
    python = env.domains["py"]
    target = node["reftarget"].removeprefix("svt.").removesuffix("()")
    found = [name for name in python.objects if f".{name}".endswith(f".{target}")]
    if len(found) != 1:
        return None
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, content)


def list_names(app: Sphinx, page: str, source: list[str]) -> None:
    """Fill the lists of the reference."""
    source[0] = with_names(source[0])


def drop_citations(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Write the citations in what is inherited from scvi-tools, whose list of references is not here, as plain text."""
    lines[:] = [re.sub(r":cite:\w+:`(\w+)`", r"\1", line) for line in lines]


def parse_returns(docstring: NumpyDocstring, section: str) -> list[str]:
    """Take "Returns" as text: napoleon sees a value in each line, and ours begin with a sentence, as scanpy's do."""
    return docstring._format_block(":returns: ", docstring._dedent(docstring._consume_to_next_section()))


def setup(app: Sphinx) -> None:
    """Register what this file adds to Sphinx."""
    NumpyDocstring._parse_returns_section = parse_returns
    app.connect("missing-reference", resolve_short_name)
    app.connect("autodoc-process-docstring", drop_citations)
    app.connect("source-read", list_names)
