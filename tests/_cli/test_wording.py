"""Messages in the words of the command line, on terminals of any encoding."""

from __future__ import annotations

import io
import json
import sys

import anndata
import numpy as np
import pytest
import scanpy as sc

import scvae_tools as svt
from scvae_tools._cli import main
from scvae_tools._cli._options import COMMANDS
from scvae_tools._cli._wording import in_options


@pytest.mark.parametrize(
    ("message", "added"),
    [
        ("`n_components` must be whole.", "On the command line, `n_components` is --components."),
        ("pass mask_var=None", "On the command line, `mask_var` is --genes."),
        (
            "`lr` and `size_factor_key`",
            "On the command line, `lr` is --learning-rate and `size_factor_key` is --size-factor.",
        ),
        ("pass adata.raw.to_adata().", "On the command line, adata.raw.to_adata() is --raw."),
        ("`batch_key` and layer='counts'", ""),  # --batch-key and --layer need no word
        ("a plain\n message", ""),
    ],
)
def test_arguments_are_named_as_options_where_these_are_called_otherwise(message, added):
    assert in_options(message, COMMANDS["fit"]) == f"{' '.join(message.split())} {added}".strip()


@pytest.fixture
def with_raw(tmp_path):
    adata = svt.datasets.simulate(60, 20, 2, random_state=0)
    counts = adata.X.copy()
    adata.raw = adata.copy()
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    path = tmp_path / "logs.h5ad"
    adata[:, :15].copy().write_h5ad(path)
    return path, counts


def test_counts_of_raw_are_named_and_taken(with_raw, tmp_path, capsys):
    path, counts = with_raw
    output = tmp_path / "fitted.h5ad"
    arguments = ["fit", str(path), "-o", str(output), "--epochs", "2", "--json"]
    assert main(arguments) == 1
    assert "On the command line, adata.raw.to_adata() is --raw." in capsys.readouterr().err
    assert main([*arguments, "--raw"]) == 0
    assert json.loads(capsys.readouterr().out)["genes"] == 20
    np.testing.assert_array_equal(anndata.read_h5ad(output).X.toarray(), counts.toarray())


def test_data_without_raw_are_refused(tmp_path, capsys):
    path = tmp_path / "cells.h5ad"
    svt.datasets.simulate(60, 20, 2, random_state=0).write_h5ad(path)
    assert main(["fit", str(path), "-o", str(tmp_path / "out.h5ad"), "--raw"]) == 1
    assert "has none. Leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize(
    "command", [["datasets"], ["plot", "--list"], ["fit", "--help"], ["fit", "λ.h5ad", "-o", "b.h5ad"]]
)
def test_output_is_written_in_any_encoding(command, encoding, monkeypatch):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding, errors="strict") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    try:
        main(command)
    except SystemExit as ended:
        assert ended.code == 0  # noqa: PT017  (of --help)
    for stream in streams.values():
        stream.flush()
        assert stream.errors == "strict"
    written = b"".join(stream.buffer.getvalue() for stream in streams.values()).decode(encoding)
    assert len(written) > 20
    if "λ.h5ad" in command:
        assert ("λ.h5ad" if encoding == "utf-8" else r"\u03bb.h5ad") in written
