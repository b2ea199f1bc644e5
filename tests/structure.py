"""Structure of the package, read from its sources: rooms, imports, circles, private names, long functions and files.

``python tests/structure.py [FOLDER]`` prints the measures of ``src/scvae_tools``, or of another folder of that name.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

PACKAGE = "scvae_tools"
SOURCES = Path(__file__).parents[1] / "src" / PACKAGE
#: Rooms from the ground up: a lower one knows nothing of a higher one.
ROOMS = ("ground", "likelihoods", "_module", "_data", "_train", "model", "tl", "pl", "datasets", "_cli", "package")
#: What a room sees, beside itself and the ground.
SEES = {
    "ground": set(),
    "likelihoods": set(),
    "_module": {"likelihoods"},
    "_data": {"likelihoods", "_module"},
    "_train": {"likelihoods", "_module", "_data"},
    "model": {"likelihoods", "_module", "_data", "_train"},
    "tl": {"likelihoods", "_module", "_data", "_train", "model"},
    "pl": set(),
    "datasets": {"likelihoods", "_data"},
    "_cli": {"_data", "model", "tl", "pl", "datasets"},
    "package": set(ROOMS),
}
#: Rooms that are imported without torch: what needs it is imported in their functions.
WITHOUT_TORCH = {"ground", "pl", "datasets", "_cli", "package"}
LONG_FUNCTION, LONG_FILE = 60, 600
WITHOUT_A_NOUN = ("Those ", "That ", "The same", "Its ", "Their ")


class Import(NamedTuple):
    """A module of the package that a file imports."""

    module: str
    names: tuple[str, ...]
    line: int
    in_function: bool
    for_types: bool


@dataclass(frozen=True)
class File:
    """A source file and what it imports of the package."""

    module: str
    path: Path
    tree: ast.Module = field(repr=False)
    lines: int = 0

    @property
    def first_line(self) -> str:
        """First line of its docstring."""
        return (ast.get_docstring(self.tree) or "").partition("\n")[0]

    @property
    def room(self) -> str:
        """Folder that it is in; the ground for the files and `_results`, which all may use."""
        parts = self.module.split(".")[1:]
        if not parts or parts[0] == "__main__":
            return "package"
        return parts[0] if parts[0] in ROOMS else "ground"


class Package:
    """All files of the package.

    Parameters
    ----------
    folder
        Where its sources are.
    """

    def __init__(self, folder: Path = SOURCES) -> None:
        self.files = {}
        for path in sorted(folder.rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((PACKAGE, *parts)).removesuffix(".__init__")
            self.files[name] = File(name, path, ast.parse(text), len(text.splitlines()))

    # -- imports -------------------------------------------------------------------------------------------------------

    @cached_property
    def imports(self) -> dict[str, list[Import]]:
        """Imports of the package by each file, resolved to modules."""
        return {name: list(self._imports_of(file.tree)) for name, file in self.files.items()}

    def _imports_of(self, tree: ast.Module):
        for node, in_function, for_types in _walk(tree):
            names = tuple(alias.name for alias in node.names)
            if isinstance(node, ast.Import):
                found = {name: () for name in names if name in self.files}
            elif node.module and (node.module == PACKAGE or node.module.startswith(f"{PACKAGE}.")):
                modules = [f"{node.module}.{name}" for name in names]
                found = {module: () for module in modules if module in self.files}
                others = tuple(name for name in names if f"{node.module}.{name}" not in self.files)
                if others and node.module in self.files:
                    found[node.module] = others
            else:
                continue
            for module, taken in found.items():
                yield Import(module, taken, node.lineno, in_function, for_types)

    @cached_property
    def arrows(self) -> dict[str, set[str]]:
        """Files that each file imports, in functions and for types too, without the faces of folders.

        A face, an ``__init__.py``, hands on names of its folder when they are first used.
        """
        return {
            name: {each.module for each in imports if each.module != name} if not self._is_face(name) else set()
            for name, imports in self.imports.items()
        }

    def _is_face(self, name: str) -> bool:
        return self.files[name].path.name == "__init__.py"

    @cached_property
    def circles(self) -> list[list[str]]:
        """Files that import each other in a loop."""
        reached = {name: _reachable(self.arrows, name) for name in self.arrows}
        loops = {tuple(sorted(b for b in reached[a] if a in reached[b])) for a in reached if a in reached[a]}
        return [list(loop) for loop in sorted(loops)]

    @cached_property
    def levels(self) -> int:
        """Files on the longest way of imports; circles count as one file."""
        loop_of = {name: loop[0] for loop in self.circles for name in loop}
        arrows: dict[str, set[str]] = {}
        for name, targets in self.arrows.items():
            own = loop_of.get(name, name)
            arrows.setdefault(own, set()).update(loop_of.get(each, each) for each in targets)
        for own, targets in arrows.items():
            targets.discard(own)
        known: dict[str, int] = {}

        def level(name: str) -> int:
            if name not in known:
                known[name] = 1 + max((level(each) for each in arrows.get(name, ())), default=0)
            return known[name]

        return max(map(level, arrows))

    @cached_property
    def upward(self) -> list[str]:
        """Imports of what a room does not see."""
        found = []
        for name, targets in self.arrows.items():
            room = self.files[name].room
            for target in sorted(targets):
                other = self.files[target].room
                if other not in {room, "ground"} | SEES.get(room, set(ROOMS)):
                    found.append(f"{name} ({room}) -> {target} ({other})")
        return found

    @cached_property
    def private_names(self) -> list[str]:
        """Names with an underscore that a file takes from another one, or from a package that they are private in."""
        found = []
        for name, file in self.files.items():
            modules = {each.module.rpartition(".")[2] for each in self.imports[name] if not each.names}
            for node, *_ in _walk(file.tree):
                if isinstance(node, ast.ImportFrom) and not name.endswith("._upstream"):
                    found += [
                        f"{name}: {node.module}.{alias.name}"
                        for alias in node.names
                        if _is_private(alias.name) and f"{node.module}.{alias.name}" not in self.files
                    ]
            found += [
                f"{name}: {node.value.id}.{node.attr}"
                for node in ast.walk(file.tree)
                if isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and _is_private(node.attr)
                and node.value.id in modules | ({"model"} if file.room != "model" else set())
            ]
        return found

    @cached_property
    def eager_imports_in_functions(self) -> list[str]:
        """Imports of the package in functions for another reason than to load torch late."""
        loads_torch = {name for name, file in self.files.items() if file.room not in WITHOUT_TORCH}
        return [
            f"{name}:{each.line} {each.module}"
            for name, imports in self.imports.items()
            for each in imports
            if each.in_function and not (self.files[name].room in WITHOUT_TORCH and each.module in loads_torch)
        ]

    # -- lengths -------------------------------------------------------------------------------------------------------

    @cached_property
    def functions(self) -> list[tuple[int, str]]:
        """Lines of each function without its docstring, and its name."""
        return [
            (_length(node), f"{name}.{node.name}")
            for name, file in self.files.items()
            for node in ast.walk(file.tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]

    @cached_property
    def docstrings_without_a_noun(self) -> list[str]:
        """Docstrings that begin with a pronoun in the place of the thing."""
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        return [
            f"{name}.{getattr(node, 'name', '')}"
            for name, file in self.files.items()
            for node in ast.walk(file.tree)
            if isinstance(node, documented) and (ast.get_docstring(node) or "").startswith(WITHOUT_A_NOUN)
        ]

    @property
    def long_functions(self) -> list[str]:
        """Functions of more than `LONG_FUNCTION` lines."""
        return [f"{name} ({n} lines)" for n, name in sorted(self.functions, reverse=True) if n > LONG_FUNCTION]

    @property
    def long_files(self) -> list[str]:
        """Files of more than `LONG_FILE` lines."""
        return [f"{name} ({file.lines} lines)" for name, file in self.files.items() if file.lines > LONG_FILE]


def _walk(tree: ast.Module):
    """Imports of a file, whether each is in a function, and whether it is for types alone."""

    def visit(node, in_function, for_types):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield child, in_function, for_types
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            is_for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            yield from visit(child, in_function or is_function, for_types or is_for_types)

    yield from visit(tree, in_function=False, for_types=False)


def _reachable(arrows: dict[str, set[str]], start: str) -> set[str]:
    found, left = set(), [start]
    while left:
        for target in arrows.get(left.pop(), ()):
            if target not in found:
                found.add(target)
                left.append(target)
    return found


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    docstring = ast.get_docstring(node, clean=False)
    return node.end_lineno - node.lineno + 1 - (len(docstring.splitlines()) if docstring else 0)


def measures(package: Package) -> dict[str, object]:
    """What is measured, by name: numbers, and lists of what should not be there."""
    lengths = sorted(n for n, _ in package.functions)
    return {
        "files": len(package.files),
        "lines of the longest file": max(file.lines for file in package.files.values()),
        "levels of import": package.levels,
        "functions": len(lengths),
        "lines of a function, median": lengths[len(lengths) // 2],
        "lines of a function, 90th percentile": lengths[int(0.9 * len(lengths))],
        "circles": package.circles,
        "imports of a higher room": package.upward,
        "private names across files": package.private_names,
        "imports in functions other than for laziness": package.eager_imports_in_functions,
        "functions over 60 lines": package.long_functions,
        "files over 600 lines": package.long_files,
        "docstrings that begin without a noun": package.docstrings_without_a_noun,
    }


def main() -> None:
    """Print the measures."""
    package = Package(Path(sys.argv[1])) if len(sys.argv) > 1 else Package()
    for name, value in measures(package).items():
        sys.stdout.write(f"{name}: {len(value) if isinstance(value, list) else value}\n")
        if isinstance(value, list):
            sys.stdout.writelines(f"    {each}\n" for each in value)


if __name__ == "__main__":
    main()
