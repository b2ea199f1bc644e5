"""Memory: reused buffers for large gradients, measured needs of decoding, and a setting of the allocator."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Working memory, in bytes beside the result, of every method that decodes genes. As many cells are decoded at a time
#: as fit into it; where a single cell has too many draws, as many genes or draws. Read at each call.
CHUNK_BYTES = 2**28
#: float32 numbers in memory at once for each value that is decoded, and for each count that is drawn and put into a
#: sparse matrix. Each parameter of the likelihood adds one. Measured were 2 and 6; an allocator keeps the rest.
DECODED_NUMBERS, DRAWN_NUMBERS = 4, 12
#: Measured: bytes for each non-zero count of a batch while it is encoded.
ENCODED_BYTES = 72
#: Bytes; smaller tensors are served from memory that the process already has, not from `Buffers`.
SMALLEST = 2**20


class Buffers:
    """Pool of tensors, each used again as soon as nothing else refers to its memory.

    The gradient of a matrix of 28,000 x 512 takes 57 MB. On the CPU, the allocator gives so large a block back to the
    system when it is freed. Each step would then need new pages, and to get them takes about as long as to compute the
    gradient. The allocators of other devices keep their memory.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, int]] = []
        self._is_on = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Context in which memory is kept for reuse; all of it is freed at the end."""
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
        return new.detach()  # another tensor of the same memory: once freed, it is not counted any more

    def __deepcopy__(self, memo: dict) -> Buffers:
        return Buffers()


def _n_references(tensor: Tensor) -> int:
    """Number of tensors that share the memory of this one, plus a constant."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


@cache
def keep_freed_memory(n_bytes: int = 31 * 2**20) -> None:
    """Make glibc keep freed memory for the next allocation; acts once for the process.

    glibc gives freed blocks above a threshold back to the system at once. Each such block then needs new pages when it
    is allocated again, which takes longer than most of the operations on it. glibc raises the threshold, up to 32 MB,
    to the largest block that was freed so far. So this function frees a large block, which was never written to.
    """
    torch.empty(n_bytes, dtype=torch.uint8)
