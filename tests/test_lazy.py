"""Modules that are imported when they are first used."""

from __future__ import annotations

import subprocess
import sys

import pytest

RANDOM_STATES = """
import random
import sys
import numpy as np
import scvae_tools as svt

def states():
    torch = sys.modules.get("torch")
    return random.getstate(), np.random.get_state()[1].tolist(), torch and torch.get_rng_state().tolist()

random.seed(1), np.random.seed(1)
before = states()
{call}
after = states()
assert before[:2] == after[:2]
{call}
assert states() == after
"""


@pytest.mark.parametrize(
    "call",
    [
        "svt.metrics.ari([0, 1], [0, 1]), svt.metrics.silhouette(np.arange(3)[:, None], [0, 0, 1])",
        "from scvae_tools.model import SCVAE",
        "svt.tl.scvae(svt.datasets.simulate(60, 20, 2), n_components=2, max_epochs=3, progress=False)",
    ],
)
def test_the_first_call_leaves_the_random_states_as_they_were(call):
    code = RANDOM_STATES.format(call=call)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
