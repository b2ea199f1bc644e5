"""Files of torch: written whole or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from scvae_tools._files import Sink, replacing

if TYPE_CHECKING:
    from pathlib import Path


def write_torch(saved: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values, whole or not at all.

    Raises
    ------
    DiskFullError
        If there is no room.
    """
    with replacing(path) as temporary, Sink(temporary) as sink:
        torch.save(saved, sink)
