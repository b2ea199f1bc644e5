"""Memory: buffers for large gradients that are used again, and what a step of decoding takes."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Working memory, in bytes above the result, of every method that decodes genes: as many cells, and where a single cell
#: has too many draws as many genes or draws, are decoded at a time as fit into it. Read at each call.
CHUNK_BYTES = 2**28
#: float32 numbers in memory at once for each value that is decoded, or each count that is drawn and put into a sparse
#: matrix, and one more for each parameter of the likelihood: measured 2 and 6, the rest is what an allocator keeps.
DECODED_NUMBERS, DRAWN_NUMBERS = 4, 12
#: Measured: bytes for each non-zero count of a batch while it is encoded.
ENCODED_BYTES = 72
#: Bytes; smaller tensors are served from memory that the process already has, not from `Buffers`.
SMALLEST = 2**20


class Buffers:
    """Tensors that are handed out again as soon as nothing else refers to their memory.

    The gradient of a matrix of 28,000 x 512 takes 57 MB. An allocator gives that much back to the system when it is
    freed, so that each step would ask for fresh pages, and to get them takes about as long as to compute what goes in.
    Devices other than the processor have allocators that keep their memory.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, int]] = []
        self._is_on = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep memory inside; let go of all of it at the end."""
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False
            self._kept.clear()

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Uninitialised tensor of the same shape and type."""
        shape, dtype = tensor.shape, tensor.dtype
        if not self._is_on or tensor.device.type != "cpu" or tensor.nbytes < SMALLEST:
            return torch.empty(shape, dtype=dtype, device=tensor.device)
        for kept, n_idle in self._kept:
            if kept.shape == shape and kept.dtype == dtype and _n_references(kept) == n_idle:
                return kept.detach()
        new = torch.empty(shape, dtype=dtype)
        self._kept.append((new, _n_references(new)))
        return new.detach()  # another tensor of the same memory: its end is seen in the number of references

    def __deepcopy__(self, memo: dict) -> Buffers:
        return Buffers()


def _n_references(tensor: Tensor) -> int:
    """Number of tensors that share the memory of this one, plus a constant."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


@cache
def keep_freed_memory(n_bytes: int = 31 * 2**20) -> None:
    """Let glibc keep what is freed for what is asked for next, once for the process.

    It gives blocks above a threshold back to the system at once, and learns the threshold, up to 32 MB, from the
    largest block that was freed so far; each block that is computed then costs fresh pages, which takes longer than
    most of the operations on it. This one is freed without ever having been written to.
    """
    torch.empty(n_bytes, dtype=torch.uint8)
