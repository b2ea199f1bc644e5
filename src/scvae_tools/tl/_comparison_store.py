"""Finished combinations of a comparison: in the AnnData, and in a file each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scvae_tools._files import is_temporary, replacing
from scvae_tools._messages import warn
from scvae_tools._results.comparison import finished_rows


class Store:
    """Results of finished combinations, by the hash of all they depend on.

    Parameters
    ----------
    former
        Result of a former call, if there is one.
    directory
        Where each combination has a file, or None.
    """

    def __init__(self, former: object, directory: str | Path | None) -> None:
        self.directory = None if directory is None else Path(directory)
        self.results = finished_rows(former)
        if self.directory is None:
            return
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"`directory` must be a directory; {str(directory)!r} is a file. Pass another path.")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.results |= _read_files(self.directory)

    def __contains__(self, name: str) -> bool:
        return name in self.results

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self.results[name]

    def add(self, name: str, result: dict[str, Any], description: str) -> None:
        """Keep a result, in a file that is never half written."""
        self.results[name] = result
        if self.directory is None:
            return
        saved = {"combination": description, "hash": name, "result": result}
        with replacing(self.directory / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(saved, indent=1), encoding="utf-8")


def _read_files(directory: Path) -> dict[str, dict[str, Any]]:
    results = {}
    for path in sorted(directory.glob("*.json")):
        if is_temporary(path):
            continue
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            results[saved["hash"]] = dict(saved["result"])
        except (ValueError, KeyError, TypeError):
            warn(f"{str(path)!r} is not a result of svt.tl.compare, and is not read.")
    return results
