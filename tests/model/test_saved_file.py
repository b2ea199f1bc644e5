"""Saved files: values come back as they were, and reading them runs no code."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from scvae_tools.model._saved_file import read_saved, write_saved

VALUES = {
    "number": 1.5,
    "nothing": None,
    "flag": True,
    "infinite": float("inf"),
    "numpy number": np.float32(0.1),
    "tuple": (1, "a", None),
    "nested": {"list": [1, {"b": (2,)}]},
    "integers": np.arange(5),
    "matrix": np.arange(6.0).reshape(2, 3),
    "names": np.array(["a", "b"], dtype=object),
    "mixed": np.array(["a", 1, True], dtype=object),
    "table": pd.DataFrame({"epoch": [1, 2], "elbo": [-1.5, np.nan], "stage": ["vae", "mixture"]}),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_as_they_were(name, tmp_path):
    path = tmp_path / "model.pt"
    write_saved(path, {"w": torch.ones(2)}, {"value": VALUES[name]}, ["g1", "g2"])
    state, attributes, var_names, versions = read_saved(path)
    assert versions is None
    found, expected = attributes["value"], VALUES[name]
    assert torch.equal(state["w"], torch.ones(2))
    assert var_names == ["g1", "g2"]
    if isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected)
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


def test_what_is_not_plain_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match=r"attributes\['a'\]\['b'\] is a set"):
        write_saved(tmp_path / "model.pt", {}, {"a": {"b": {1}}}, [])


# -- what a saved model knows of its cells -----------------------------------------------------------------------------


# -- folders of models: no method runs code that is in them ------------------------------------------------------------
