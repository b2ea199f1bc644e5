"""A step on a device that is not there: fake CUDA tensors, whose shapes and devices are real.

It finds tensors left on the CPU, shapes that depend on numbers, and looks at results, for which the host would
wait and which a CUDA graph cannot hold. A build of torch for CUDA is needed, but no GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_cases import BATCH_SIZE, CASES, new_model

from scvae_tools._data.loader import CountDataset
from scvae_tools._data.resident import ResidentCells
from scvae_tools._train.plan import Objective

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="needs a build of torch for CUDA"),
    pytest.mark.filterwarnings("ignore:.*(densit|Bounds)"),
]
OBJECTIVE = ("kl_weight", "free_nats_y", "free_nats_z", "n_samples", "n_importance_samples")


class Loss(torch.nn.Module):
    """Loss of the cells at some positions, as a step of the training computes it."""

    def __init__(self, module, objective, cells):
        super().__init__()
        self.module, self.objective, self.cells = module, objective, cells

    def forward(self, positions, share):
        return self.objective.loss(self.module, self.cells[positions], share)[1]


class NothingComesFromTheHost(TorchDispatchMode):
    """Refuses copies from the CPU, for which a device that records would wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        made = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        if any(each.device.type == "cpu" for each in given) and any(each.device.type == "cuda" for each in made):
            raise AssertionError(f"{function} copies from the host")
        return result


def on_fake_device(cells, mode):
    """The same cells with every tensor on a CUDA device that is not there."""
    moved = object.__new__(ResidentCells)
    moved.__dict__.update(cells.__dict__, device=torch.device("cuda", 0))
    for name in ("start", "gene", "value", "log_base_measure"):
        setattr(moved, name, fake(getattr(cells, name), mode))
    moved.columns = {name: fake(column, mode) for name, column in cells.columns.items()}
    return moved


def fake(tensor, mode):
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda:0", requires_grad=tensor.requires_grad)


@pytest.mark.parametrize("is_warming_up", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_step_stays_on_the_device_and_looks_at_no_number(case, is_warming_up):
    options = {name: value for name, value in CASES[case].items() if name != "training"}
    if options.get("mixture"):
        options["n_components"] = 3
    model = new_model(**options)
    training = CASES[case].get("training", {})
    objective = Objective(**{name: training[name] for name in OBJECTIVE if name in training})
    module = model.module.train()
    if options.get("mixture") and not is_warming_up:
        module.set_mixture(torch.full((3,), 1 / 3), torch.randn(3, 3), torch.eye(3), torch.ones(3))
    mode = FakeTensorMode()
    cells = on_fake_device(ResidentCells(CountDataset(model.adata_manager, module.likelihood), "cpu"), mode)
    step = Loss(module, objective, cells)
    tensors = {name: fake(value, mode) for name, value in [*step.named_parameters(), *step.named_buffers()]}
    with mode:
        positions, share = torch.empty(BATCH_SIZE, dtype=torch.long, device="cuda:0"), torch.empty((), device="cuda:0")
        with NothingComesFromTheHost():
            loss = functional_call(step, tensors, (positions, share))
    assert loss.device.type == "cuda"
    assert loss.shape == ()
