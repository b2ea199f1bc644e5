"""A small AnnData, and whether anything of it has changed."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

N_CELLS, N_GENES = 7, 5


def make_dense() -> np.ndarray:
    """Counts with a zero in every row, a count in every cell and none in the last gene, (7, 5) int64."""
    counts = np.random.default_rng(0).poisson(1.0, (N_CELLS, N_GENES))
    counts[:, 0] += 1
    counts[:, -1] = 0
    return counts


def make_adata(x: object = None, **layers: object) -> AnnData:
    cells = pd.DataFrame(index=[f"cell{i}" for i in range(N_CELLS)])
    genes = pd.DataFrame({"kept": [True, False, True, True, False]}, index=[f"gene{j}" for j in range(N_GENES)])
    adata = AnnData(sparse.csr_matrix(make_dense(), dtype=np.float32) if x is None else x, obs=cells, var=genes)
    for name, matrix in layers.items():
        adata.layers[name] = matrix
    return adata


def _bytes(matrix: object) -> tuple:
    if sparse.issparse(matrix):
        parts = (matrix.data, matrix.indices, matrix.indptr)
        return type(matrix).__name__, tuple((p.dtype.str, hashlib.sha256(p.tobytes()).hexdigest()) for p in parts)
    return type(matrix).__name__, str(matrix.dtype), hashlib.sha256(np.asarray(matrix).tobytes()).hexdigest()


def fingerprint(adata: AnnData) -> tuple:
    matrices = {"X": adata.X, **{k: v for k, v in adata.layers.items() if k is not None}}
    frames = tuple(hashlib.sha256(pickle.dumps(frame.to_dict())).hexdigest() for frame in (adata.obs, adata.var))
    return {k: _bytes(v) for k, v in matrices.items()}, frames, sorted(adata.uns), sorted(adata.obsm), adata.is_view
