"""Training on cells that are held on a device: the same steps as with batches from the host, here on the CPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_cases import BATCH_SIZE, CASES, new_model

import scvae_tools as svt
from scvae_tools._data import resident, window_steps, windows
from scvae_tools._data.loader import CountDataset
from scvae_tools._data.resident import ResidentCells
from scvae_tools._train import device_plan
from scvae_tools._train.device_plan import DevicePlan, RecordedStep
from scvae_tools._train.plan import NonFiniteError, Objective, TrainingPlan

ELBO = ["elbo_train", "elbo_validation", "kl_weight"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def trained(hold, *, training=None, **options):
    model = new_model(**options)
    model.train(
        **{"max_epochs": 6, "batch_size": BATCH_SIZE, "progress": False, "hold_on_device": hold} | (training or {})
    )
    return model


@pytest.mark.filterwarnings("ignore:.*(densit|Bounds)")
@pytest.mark.parametrize("case", CASES)
def test_the_same_model_is_trained(case):
    """Tolerance: Adam divides by the size of gradients, also of those near 0, where rounding shows."""
    expected, found = (trained(hold, **CASES[case]) for hold in (False, True))
    assert found.history[["epoch", "stage"]].equals(expected.history[["epoch", "stage"]])
    columns = [name for name in ELBO if name in expected.history]
    np.testing.assert_allclose(found.history[columns], expected.history[columns], rtol=2e-3, atol=1e-3)
    np.testing.assert_array_equal(found.history["kl_weight"], expected.history["kl_weight"])
    latent = [model.get_latent_representation() for model in (found, expected)]
    np.testing.assert_allclose(*latent, atol=0.02)


@pytest.mark.parametrize("mixture", [False, "gmvae", "vade"])
def test_parts_are_dropped_out_here_too(mixture):
    rates = {"hidden": 0.3, "input": 0.2, "latent": 0.1} | ({"y": 0.5} if mixture == "gmvae" else {})
    found, expected = (trained(hold, mixture=mixture, dropout_rate=rates) for hold in (True, False))
    assert np.isfinite(found.history[ELBO]).all(axis=None)
    end = [model.history["elbo_validation"].iloc[-1] for model in (found, expected)]
    np.testing.assert_allclose(*end, rtol=0.05)


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
@pytest.mark.parametrize("mixture", ["gmvae", "vade"])
def test_components_that_are_far_apart_are_trained(mixture, likelihood):
    """To the default number of epochs: q(y|x) of other components becomes smaller than the numbers of float32."""
    adata = svt.datasets.pbmc68k_reduced()[:200].copy()
    results = []
    for hold in (True, False):
        own = adata.copy()
        svt.tl.scvae(
            own,
            likelihood=likelihood,
            mixture=mixture,
            n_components=8,
            max_epochs=60,
            dropout_rate=0.0,
            hold_on_device=hold,
            progress=False,
        )
        results.append(own.uns["scvae"]["history"]["elbo_validation"].to_numpy())
    np.testing.assert_allclose(results[0][-1], results[1][-1], rtol=0.01)


def test_the_steps_are_taken_by_the_plan_that_holds_the_cells(monkeypatch):
    made = []
    monkeypatch.setattr(DevicePlan, "on_train_start", lambda self: made.append(type(self.cells)), raising=False)
    trained(True)
    assert made == [resident.ResidentCells] * 2  # warm-up and VAE
    trained(None)  # the CPU
    trained(False)
    assert len(made) == 2


def test_groups_of_any_size_give_the_same_model(monkeypatch):
    histories = []
    for n_steps in (1, 2, 100):
        monkeypatch.setattr(resident, "STEPS_AT_ONCE", n_steps)
        histories.append(trained(True, mixture="gmvae").history[ELBO])
    pd.testing.assert_frame_equal(histories[0], histories[1])
    pd.testing.assert_frame_equal(histories[0], histories[2])


@pytest.fixture
def in_windows(monkeypatch):
    """A device that has room for a third of the cells at a time."""
    monkeypatch.setattr(window_steps, "RUN_LENGTH", 4)
    model = new_model()
    free = 2 * 0.66 * resident.n_bytes_on_device(CountDataset(model.adata_manager, model.module.likelihood))
    monkeypatch.setattr(windows, "free_memory", lambda device: free)


@pytest.mark.usefixtures("in_windows")
@pytest.mark.parametrize("case", ["nb", "gmvae", "vade", "covariates", "batch norm", "no validation", "k unknown"])
def test_windows_train_a_model_that_is_as_good(case):
    """In another order of the cells."""
    options = CASES[case] | {"training": CASES[case].get("training", {}) | {"max_epochs": 30}}
    found, expected = (trained(hold, **options) for hold in (True, False))
    column = "elbo_validation" if case != "no validation" else "elbo_train"
    end = [model.history[column].iloc[-3:].mean() for model in (found, expected)]
    np.testing.assert_allclose(*end, rtol=0.03)


@pytest.mark.usefixtures("in_windows")
def test_windows_are_what_is_trained_on(monkeypatch):
    used = []
    original = windows.CellWindows.of_window
    monkeypatch.setattr(
        windows.CellWindows,
        "of_window",
        lambda self, parts, number: used.append(len(parts)) or original(self, parts, number),
    )
    trained(True, mixture="vade")
    assert set(used) >= {1, 4}  # the validation cells, and the training cells


class StoppedError(Exception):
    """What a process that is killed does not say."""


@pytest.mark.parametrize("mixture", [False, "gmvae"])
@pytest.mark.parametrize("form", ["all", "windows"])
def test_a_training_that_is_killed_goes_on_to_the_last_bit(mixture, form, tmp_path, monkeypatch, request):
    if form == "windows":
        request.getfixturevalue("in_windows")
    whole = trained(True, mixture=mixture, training={"max_epochs": 10})
    original, epochs = TrainingPlan.on_train_epoch_start, []

    def stop(plan):
        epochs.append(1)
        if len(epochs) == 8:
            raise StoppedError
        original(plan)

    monkeypatch.setattr(TrainingPlan, "on_train_epoch_start", stop)
    with contextlib.suppress(StoppedError):
        trained(True, mixture=mixture, training={"max_epochs": 10, "checkpoint": tmp_path})
    assert len(epochs) == 8
    monkeypatch.setattr(TrainingPlan, "on_train_epoch_start", original)
    resumed = trained(True, mixture=mixture, training={"max_epochs": 10, "checkpoint": tmp_path})
    pd.testing.assert_frame_equal(resumed.history, whole.history, check_exact=True)
    for name, value in whole.module.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[name], value), name


def test_a_term_that_is_not_finite_is_named():
    model = new_model()
    with torch.no_grad():
        model.module.z_mean.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="log_likelihood became NaN or infinite in epoch 1"):
        model.train(3, progress=False, hold_on_device=True)


def test_lambda_is_recorded_here_too():
    model = trained(True, training={"record_rates": True})
    assert (model.history[["rate_at_zeros", "max_rate"]] > 0).all(axis=None)


def test_options_that_change_the_steps_are_refused_or_leave_the_cells_on_the_host():
    with pytest.raises(ValueError, match=r"takes the steps of the training by itself.*found 'accumulate_grad_batches'"):
        trained(True, training={"accumulate_grad_batches": 2})
    trained(None, training={"accumulate_grad_batches": 2, "max_epochs": 2})
    with pytest.raises(ValueError, match="`hold_on_device` must be"):
        trained("yes")


def test_a_device_without_memory_says_what_to_pass(monkeypatch):
    def fail(plan, positions, index):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    monkeypatch.setattr(DevicePlan, "training_step", fail)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 10**8, 8 * 10**10))
    model = new_model()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    match = r"than cpu has; found 0\.5 of 80\.0 GB free\. Pass a smaller `batch_size`.*hold_on_device=False: the counts"
    with pytest.raises(torch.cuda.OutOfMemoryError, match=match):
        model.train(2, progress=False, hold_on_device=True)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert model._held is None


# -- recording, without a GPU ------------------------------------------------------------------------------------------


@pytest.fixture
def fake_graphs(monkeypatch):
    """CUDA graphs that note what is done with them: what is recorded runs when it is replayed, and only then."""
    done = SimpleNamespace(recorded=0, replayed=0, on_side=0, is_recording=False, fails=None, current=None)

    class Graph:
        def replay(self):
            done.replayed += 1
            self.function()

    @contextlib.contextmanager
    def record(graph, *, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        done.recorded += 1
        done.is_recording, done.current = True, "the stream of the recording"
        try:
            yield
            if done.fails is not None:
                raise done.fails
            done.current = None
        finally:
            done.is_recording = False

    @contextlib.contextmanager
    def on_stream(_):
        done.on_side += 1
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(done, "current", None))
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    return done


def a_recorded_step(fake_graphs, batch_size=4):
    called = []

    def function(positions):
        if not fake_graphs.is_recording:
            called.append(positions.tolist())

    @contextlib.contextmanager
    def recording():
        fake_graphs.is_prepared = True
        yield
        fake_graphs.is_prepared = False

    step = RecordedStep(function, batch_size, torch.device("cpu"), recording)
    step.can_record, step.stream = True, torch.cuda.Stream(None)
    torch.cuda.CUDAGraph.function = lambda self: function(step.positions)
    return step, called


def test_every_step_is_taken_once_whether_it_is_recorded_or_not(fake_graphs):
    step, called = a_recorded_step(fake_graphs)
    given = [[i, i + 1, i + 2, i + 3] for i in range(7)]
    given.insert(5, [1, 2])  # the end of an epoch
    for positions in given:
        step(torch.tensor(positions))
    assert called == given
    assert fake_graphs.on_side == device_plan.N_STEPS_BEFORE
    assert fake_graphs.recorded == 1
    assert fake_graphs.is_prepared is False
    assert fake_graphs.replayed == len(given) - 1 - device_plan.N_STEPS_BEFORE


def test_a_step_that_cannot_be_recorded_is_taken_all_the_same(fake_graphs):
    step, called = a_recorded_step(fake_graphs)
    fake_graphs.fails = RuntimeError("operation not permitted when stream is capturing\nand more")
    given = [[i, i + 1, i + 2, i + 3] for i in range(6)]
    match = r"\(operation not permitted when stream is capturing\); training goes on"
    for i, positions in enumerate(given):
        first = i == device_plan.N_STEPS_BEFORE
        with pytest.warns(UserWarning, match=match) if first else contextlib.nullcontext():
            step(torch.tensor(positions))
    assert called == given
    assert fake_graphs.recorded == 1
    assert fake_graphs.current is None  # not the stream on which it was tried


def test_memory_that_lacks_for_a_recording_is_no_reason_to_go_on(fake_graphs):
    step, _ = a_recorded_step(fake_graphs)
    fake_graphs.fails = torch.cuda.OutOfMemoryError("CUDA out of memory")
    step.n_before = device_plan.N_STEPS_BEFORE
    with pytest.raises(torch.cuda.OutOfMemoryError):
        step(torch.tensor([0, 1, 2, 3]))


def test_on_the_cpu_nothing_is_recorded():
    step = RecordedStep(lambda positions: None, 4, torch.device("cpu"))
    assert not step.can_record


def test_adam_may_be_recorded_while_it_is_and_only_then():
    """Otherwise it refuses, or warns in every other step."""
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    settled = []
    plan = SimpleNamespace(
        optimizers=lambda use_pl_optimizer: optimizer, cells=SimpleNamespace(settle=lambda: settled.append(True))
    )
    with DevicePlan.recording(plan):
        assert optimizer.param_groups[0]["capturable"]
        assert settled
    assert not optimizer.param_groups[0]["capturable"]


@pytest.mark.parametrize("fails", [False, True])
def test_memory_of_the_device_is_released_with_the_plan(fails, monkeypatch):
    """Also after an error, when Lightning does not say that the fit has ended."""
    plans = []
    monkeypatch.setattr(DevicePlan, "on_train_start", lambda plan: plans.append(plan), raising=False)
    if fails:
        monkeypatch.setattr(DevicePlan, "on_train_epoch_end", lambda plan: 1 / 0)
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        trained(True)
    assert plans
    assert all(plan.cells is None and plan.steps is None and plan._recorded == {} for plan in plans)


# -- on a device that is not there ------------------------------------------------------------------------------------

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


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a build of torch for CUDA")
@pytest.mark.filterwarnings("ignore:.*(densit|Bounds)")
@pytest.mark.parametrize("is_warming_up", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_step_stays_on_the_device_and_looks_at_no_number(case, is_warming_up):
    """Fake CUDA tensors, whose shapes and devices are real: tensors left on the CPU are found, shapes that depend on
    numbers, and looks at results, for which the host would wait and which a CUDA graph cannot hold.
    """
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


#: What is computed of a batch beside the loss.
EVALUATIONS = {
    "bound": lambda module, data: module.bound(*data).elbo,
    "rate": lambda module, data: module.rate(*data),
    "probabilities": lambda module, data: module.probabilities(module.posterior(module.encode(*data))),
    "moments": lambda module, data: module.posterior(module.encode(*data)).moments()[1],
    "importance-weighted bound": lambda module, data: module.importance_weighted_bound(*data, n_samples=3),
    "decoded": lambda module, data: module.decode(module.posterior(module.encode(*data)).moments()[0], *data[1:]).mean,
}


class Evaluation(torch.nn.Module):
    def __init__(self, module, name, cells):
        super().__init__()
        self.module, self.name, self.cells = module, name, cells

    def forward(self, positions):
        return EVALUATIONS[self.name](self.module, self.module.data(self.cells[positions]))


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a build of torch for CUDA")
@pytest.mark.parametrize("name", EVALUATIONS)
@pytest.mark.parametrize("case", ["nb", "constrained_poisson", "gmvae", "vade", "covariates", "small counts apart"])
def test_what_is_computed_of_a_batch_stays_on_the_device(case, name):
    model = new_model(**CASES[case])
    module, mode = model.module.eval(), FakeTensorMode()
    if CASES[case].get("mixture"):
        module.set_mixture(torch.full((3,), 1 / 3), torch.randn(3, 3), torch.eye(3), torch.ones(3))
    cells = on_fake_device(ResidentCells(CountDataset(model.adata_manager, module.likelihood), "cpu"), mode)
    evaluation = Evaluation(module, name, cells)
    tensors = {key: fake(value, mode) for key, value in [*evaluation.named_parameters(), *evaluation.named_buffers()]}
    with mode, torch.no_grad():
        found = functional_call(evaluation, tensors, (torch.empty(5, dtype=torch.long, device="cuda:0"),))
    assert found.device.type == "cuda"
    assert 5 in found.shape


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*(densit|Bounds)", "error:.*cannot be recorded")
@pytest.mark.parametrize("case", CASES)
def test_a_recorded_step_trains_the_model_of_the_cpu(case):
    """With another noise: bounds are compared, and that steps were repeated."""
    training = CASES[case].get("training", {}) | {"max_epochs": 30, "early_stopping": False}
    options = {name: value for name, value in CASES[case].items() if name != "training"}
    of_gpu = trained(None, training=training | {"accelerator": "gpu"}, **options)
    of_cpu = trained(False, training=training | {"accelerator": "cpu"}, **options)
    end = [model.history["elbo_train"].iloc[-3:].mean() for model in (of_gpu, of_cpu)]
    np.testing.assert_allclose(*end, rtol=0.03)


@needs_gpu
@pytest.mark.gpu
def test_recorded_steps_are_the_steps_that_are_not_recorded(monkeypatch):
    """With the same random numbers, and in a precision in which rounding does not show."""
    histories = []
    for records in (True, False):
        monkeypatch.setattr(device_plan, "RECORDS_STEPS", records)
        model = trained(True, mixture="vade", training={"accelerator": "gpu", "matmul_precision": "highest"})
        histories.append(model.history[ELBO])
    np.testing.assert_allclose(*histories, rtol=2e-3)
