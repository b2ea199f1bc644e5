"""Memory that is used again: only when nothing refers to it, only while it is to be kept, and none is left behind.

What tells whether memory is the same is its address; what tells whether it has been given back, a weak reference to it.
"""

from __future__ import annotations

from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import scvae_tools as svt
from scvae_tools._module.covariates import Covariates, Sizes
from scvae_tools._module.memory import SMALLEST, Buffers
from scvae_tools._module.vae import VAE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

N_ROWS = 256
LARGE = torch.zeros(N_ROWS, SMALLEST // (4 * N_ROWS))  #: the smallest that is kept


# -- factories ---------------------------------------------------------------------------------------------------------


@contextmanager
def keeping() -> Iterator[Buffers]:
    buffers = Buffers()
    with buffers.kept():
        yield buffers


def taken(buffers: Buffers, value: float) -> torch.Tensor:
    """A buffer filled with a number."""
    return buffers.empty_like(LARGE).fill_(value)


def as_gradient(buffer: torch.Tensor) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.zeros_like(buffer))
    parameter.grad = buffer
    return parameter


#: What holds on to memory, made of a buffer, and what reads a number of it again.
HOLDERS: dict[str, tuple[Callable, Callable]] = {
    "itself": (lambda buffer: buffer, lambda held: held),
    "a view": (lambda buffer: buffer[3:5, 1], lambda held: held),
    "a transposed view": (lambda buffer: buffer.T, lambda held: held),
    "a detached tensor": (lambda buffer: buffer.detach(), lambda held: held),
    "an array": (lambda buffer: buffer.numpy(), torch.from_numpy),
    "a slice of an array": (lambda buffer: buffer.numpy()[7:9], torch.from_numpy),
    "a container": (lambda buffer: {"weights": [buffer]}, lambda held: held["weights"][0]),
    "the gradient of a parameter": (as_gradient, lambda held: held.grad),
}


# -- the same memory again ---------------------------------------------------------------------------------------------


def test_a_buffer_has_the_shape_and_type_asked_for() -> None:
    with keeping() as buffers:
        for like in (LARGE, LARGE.double(), LARGE.reshape(-1), LARGE.T, LARGE.long()):
            buffer = buffers.empty_like(like)
            assert buffer.shape == like.shape
            assert buffer.dtype == like.dtype
            assert not buffer.requires_grad


def test_memory_is_handed_out_again_once_nothing_refers_to_it() -> None:
    with keeping() as buffers:
        buffer = taken(buffers, 1)
        address = buffer.data_ptr()
        del buffer
        assert all(taken(buffers, i).data_ptr() == address for i in range(3))


def test_buffers_that_are_in_use_are_apart() -> None:
    with keeping() as buffers:
        held = [taken(buffers, i) for i in range(5)]
        assert len({buffer.data_ptr() for buffer in held}) == 5
        for i, buffer in enumerate(held):
            assert (buffer == i).all()


def test_of_several_buffers_the_free_one_is_taken() -> None:
    with keeping() as buffers:
        held = [taken(buffers, i) for i in range(3)]
        free = held.pop(1).data_ptr()
        assert taken(buffers, 7).data_ptr() == free
        assert (held[0] == 0).all()
        assert (held[1] == 2).all()


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_is_not_handed_out_while_anything_refers_to_it(holder: str) -> None:
    hold, read = HOLDERS[holder]
    with keeping() as buffers:
        buffer = taken(buffers, 1)
        address = buffer.data_ptr()
        held = hold(buffer)
        del buffer
        others = [taken(buffers, 2) for _ in range(3)]
        assert address not in [other.data_ptr() for other in others]
        assert (read(held) == 1).all()
        del held, others
        assert address in [buffer.data_ptr() for buffer in [taken(buffers, 3) for _ in range(4)]]


def test_memory_is_not_handed_out_while_a_gradient_needs_it() -> None:
    with keeping() as buffers:
        leaf = torch.ones_like(LARGE, requires_grad=True)
        result = (leaf * taken(buffers, 5)).sum()
        taken(buffers, 6)
        result.backward()
        assert (leaf.grad == 5).all()


@pytest.mark.parametrize("other", [LARGE.double(), LARGE.T, LARGE.reshape(-1), torch.zeros(2 * N_ROWS, LARGE.shape[1])])
def test_memory_of_another_shape_or_type_stays_apart(other: torch.Tensor) -> None:
    with keeping() as buffers:
        address = taken(buffers, 1).data_ptr()
        found = buffers.empty_like(other)
        assert found.shape == other.shape
        assert found.data_ptr() != address
        assert taken(buffers, 1).data_ptr() == address


def test_a_change_of_a_buffer_that_is_handed_out_is_not_seen_by_its_model() -> None:
    """That a buffer requires a gradient, or is one of a graph, is gone with the tensor that was handed out."""
    with keeping() as buffers:
        address = taken(buffers, 1).requires_grad_().data_ptr()
        again = taken(buffers, 2)
        assert again.data_ptr() == address
        assert again.is_leaf
        assert not again.requires_grad


def is_kept(buffers: Buffers, like: torch.Tensor) -> bool:
    """Whether memory outlives its tensor."""
    return not StorageWeakRef(buffers.empty_like(like).untyped_storage()).expired()


def test_only_large_buffers_are_kept() -> None:
    with keeping() as buffers:
        assert is_kept(buffers, LARGE)
        assert not is_kept(buffers, LARGE[:-1])
        assert not is_kept(buffers, torch.zeros(()))
        assert not is_kept(buffers, torch.zeros(0, 10))


def test_buffers_of_another_device_are_left_to_its_allocator() -> None:
    with keeping() as buffers:
        found = buffers.empty_like(LARGE.to("meta"))
        assert found.device.type == "meta"
        assert found.shape == LARGE.shape


# -- while it is to be kept --------------------------------------------------------------------------------------------


def test_outside_no_memory_is_kept() -> None:
    buffers = Buffers()
    assert not is_kept(buffers, LARGE)
    with buffers.kept():
        assert is_kept(buffers, LARGE)
    assert not is_kept(buffers, LARGE)


def test_all_memory_is_let_go_at_the_end() -> None:
    with keeping() as buffers:
        held = [taken(buffers, i) for i in range(3)]
        memory = [StorageWeakRef(buffer.untyped_storage()) for buffer in held]
        del held
        assert not any(weak.expired() for weak in memory)
    assert all(weak.expired() for weak in memory)


def test_all_memory_is_let_go_after_an_error() -> None:
    buffers = Buffers()
    memory = []

    def fail() -> None:
        with buffers.kept():
            memory.append(StorageWeakRef(taken(buffers, 1).untyped_storage()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert memory[0].expired()
    assert not is_kept(buffers, LARGE)


def test_what_is_in_use_at_the_end_stays_what_it_is() -> None:
    with keeping() as buffers:
        buffer = taken(buffers, 1)
    with buffers.kept():
        others = [taken(buffers, 2) for _ in range(2)]
        assert buffer.data_ptr() not in [other.data_ptr() for other in others]
    assert (buffer == 1).all()
    memory = StorageWeakRef(buffer.untyped_storage())
    del buffer
    assert memory.expired()


def test_a_copy_shares_no_memory_and_keeps_none() -> None:
    with keeping() as buffers:
        address = taken(buffers, 1).data_ptr()
        copy = deepcopy(buffers)
        assert not is_kept(copy, LARGE)
        with copy.kept():
            assert taken(copy, 2).data_ptr() != address
        assert taken(buffers, 3).data_ptr() == address


# -- in a model --------------------------------------------------------------------------------------------------------

N_GENES, N_HIDDEN, N_CELLS = 2_800, 100, 6


def make_vae() -> VAE:
    """With weights by gene of more than `SMALLEST` bytes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = VAE(Sizes(N_GENES), n_hidden=N_HIDDEN, n_latent=3, engine="blocked")
    assert module.encoder.gene_weight.nbytes > SMALLEST
    return module


def step(module: VAE) -> dict[str, torch.Tensor]:
    """Gradients of the loss, the same every time but for what was there before."""
    x = torch.tensor(np.random.default_rng(0).poisson(0.05, (N_CELLS, N_GENES)), dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bound = module.bound(
            x, x.sum(1, keepdim=True), Covariates(torch.zeros(N_CELLS, 1, dtype=torch.long)), is_averaged=True
        )
        bound.loss().backward()
    return {name: p.grad for name, p in module.named_parameters() if p.numel()}


def test_the_gradients_of_a_module_use_the_same_memory_step_after_step() -> None:
    module = make_vae()
    large = ["encoder.gene_weight", "decoder.heads.log_rate.weight"]
    with module.buffers.kept():
        addresses = []
        for _ in range(3):
            gradients = step(module)
            addresses.append([gradients[name].data_ptr() for name in large])
            memory = [StorageWeakRef(gradients[name].untyped_storage()) for name in large]
            del gradients
            module.zero_grad(set_to_none=True)
            assert not any(weak.expired() for weak in memory)
    assert all(weak.expired() for weak in memory)
    assert {tuple(sorted(each)) for each in addresses} == {tuple(sorted(addresses[0]))}


@pytest.mark.parametrize("is_kept", [False, True])
def test_gradients_that_are_not_reset_add_up(is_kept: bool) -> None:
    """Tolerance: none; twice a number is exact."""
    module = make_vae()
    once = {name: gradient.clone() for name, gradient in step(module).items()}
    module.zero_grad(set_to_none=True)
    buffers = module.buffers if is_kept else Buffers()
    with buffers.kept():
        step(module)
        twice = step(module)
    for name, gradient in twice.items():
        assert torch.equal(gradient, 2 * once[name]), name


def test_gradients_that_someone_holds_are_not_overwritten() -> None:
    module = make_vae()
    with module.buffers.kept():
        held = step(module)
        copies = {name: gradient.clone() for name, gradient in held.items()}
        module.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1)
        others = step(module)
    assert not torch.equal(others["encoder.gene_weight"], copies["encoder.gene_weight"])
    for name, gradient in held.items():
        assert torch.equal(gradient, copies[name]), name


def test_a_copy_of_a_module_in_training_has_memory_of_its_own() -> None:
    module = make_vae()
    with module.buffers.kept():
        ours = step(module)
        copy = deepcopy(module)
        copy.zero_grad(set_to_none=True)
        theirs = step(copy)
    for name, gradient in theirs.items():
        assert torch.equal(gradient, ours[name]), name
        assert gradient.data_ptr() != ours[name].data_ptr(), name
    assert copy.buffers is not module.buffers
    assert copy.encoder.buffers is not module.encoder.buffers


def test_training_leaves_no_memory_behind() -> None:
    adata = svt.datasets.simulate(40, N_GENES, 2, median_counts=200, random_state=0)
    svt.SCVAE.setup_anndata(adata)
    model = svt.SCVAE(adata, mixture=False, n_hidden=N_HIDDEN, engine="blocked")
    memory = []
    empty_like = model.module.buffers.empty_like

    def watched(tensor: torch.Tensor) -> torch.Tensor:
        buffer = empty_like(tensor)
        memory.append(StorageWeakRef(buffer.untyped_storage()))
        return buffer

    model.module.buffers.empty_like = watched
    model.train(2, batch_size=20, progress=False)
    assert memory
    model.module.zero_grad(set_to_none=True)
    assert all(weak.expired() for weak in memory)
