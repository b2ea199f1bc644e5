"""What the training plan does in a step."""

from __future__ import annotations

import pytest
import torch

from scvae_tools._train.plan import TrainingPlan
from scvae_tools._train.stages import Stage


def make_plan(gradient: torch.Tensor) -> tuple[TrainingPlan, torch.nn.Parameter]:
    parameter = torch.nn.Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient.clone()
    return TrainingPlan(torch.nn.Module(), Stage("vae", 1), first_epoch=0, lr=1e-3, weight_decay=0), parameter


@pytest.mark.parametrize(("clip", "expected"), [(10.0, [3.0, 4.0]), (2.5, [1.5, 2.0]), (None, [3.0, 4.0])])
def test_gradients_longer_than_the_limit_are_shortened_to_it(clip, expected):
    plan, parameter = make_plan(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.Adam([parameter])
    if clip is None:  # what Lightning does itself where nothing is to be clipped needs a trainer
        plan.clip_gradients = lambda *_, **__: None
    plan.configure_gradient_clipping(optimizer, clip, None)
    assert parameter.grad.tolist() == pytest.approx(expected, rel=1e-5)  # torch divides by the norm plus 1e-6
