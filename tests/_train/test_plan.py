"""What the training plan does in a step."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback

import scvae_tools as svt
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


# -- the average of the weights ----------------------------------------------------------------------------------------


class SeesWeights(Callback):
    """Notes the weights after each step, and those that are validated."""

    def __init__(self):
        self.newest, self.validated, self.after = [], [], []

    def on_train_start(self, trainer, pl_module):
        self.start = weights_of(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.newest.append(weights_of(pl_module))

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.validated.append(weights_of(pl_module))

    def on_train_epoch_end(self, trainer, pl_module):
        self.after.append(weights_of(pl_module))


def weights_of(plan):
    return torch.cat([each.detach().ravel() for each in plan.module.parameters()]).clone()


def trained_vae(seen, **options):
    adata = svt.datasets.poisson_toy(100)
    svt.SCVAE.setup_anndata(adata)
    model = svt.SCVAE(adata, mixture=False, n_hidden=4, n_latent=2, dropout_rate=0.0)
    model.train(3, n_warm_up_epochs=0, batch_size=30, lr=0.05, progress=False, callbacks=[seen], **options)
    return model


def test_what_is_validated_and_kept_is_the_mean_over_the_last_steps():
    seen = SeesWeights()
    model = trained_vae(seen, early_stopping=False)
    average, expected = seen.start, []
    for step, newest in enumerate(seen.newest, 1):
        average = average + max(9 / (9 + step), 0.01) * (newest - average)
        expected.append(average)
    assert len(seen.validated) == 3
    for found, own in zip(seen.validated, expected[2::3], strict=True):
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)
    for found, newest in zip(seen.after, seen.newest[2::3], strict=True):
        assert torch.equal(found, newest)  # the training goes on from the newest ones
    model.use_version("end")
    kept = torch.cat([each.detach().ravel() for each in model.module.parameters()])
    assert torch.equal(kept, seen.validated[-1])
    best = int(model.history["elbo_validation"].argmax())
    model.use_version("best")
    kept = torch.cat([each.detach().ravel() for each in model.module.parameters()])
    assert torch.equal(kept, seen.validated[best])


def test_the_mean_is_a_tenth_of_the_steps_old_and_a_hundred_at_most():
    """Of weights that are the number of the step: then 9/10 of it, and later 99 less (1 / 0.01 - 1)."""
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    plan = TrainingPlan(module, Stage("vae", 5), first_epoch=0, lr=1e-3, weight_decay=0.0)
    found = []
    for step in range(1, 3_001):
        module.weight.data.fill_(float(step))
        plan._average()
        found.append(plan.average_0.item())
    assert found[9] == pytest.approx(9.0)
    assert found[499] == pytest.approx(450.0, rel=1e-5)
    assert found[-1] == pytest.approx(3_000 - 99, rel=1e-4)
    plan.exchange(average=True)
    assert module.weight.item() == found[-1]
    plan.exchange(average=True)  # once is enough
    assert module.weight.item() == found[-1]
    plan.exchange(average=False)
    assert module.weight.item() == 3_000.0


def test_a_warm_up_has_no_mean_as_its_objective_changes():
    plan = TrainingPlan(
        torch.nn.Linear(2, 2), Stage("warm-up", 5, warms_up=True), first_epoch=0, lr=1e-3, weight_decay=0
    )
    plan._average()
    plan.exchange(average=True)
    assert [name for name, _ in plan.named_buffers()] == ["n_averaged"]
