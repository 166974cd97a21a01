"""What a forward pass saves for the backward pass, kept in the computer's memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch


class HostMemory:
    """Page-locked memory that passes write to and read from, one after the other, also while they are captured.

    It is allocated in the first pass, since no memory of this kind may be allocated during a capture. Memory that has
    become too small stays, because captured passes go on using it.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}  # by place in the pass, the largest last

    @contextmanager
    def saving(self, shape: tuple[int, ...]) -> Iterator[None]:
        """Keep here the tensors of this shape that the body saves for its backward pass."""
        places = count()

        def pack(tensor: torch.Tensor) -> Any:
            if tensor.shape != shape:
                return tensor
            kept = self._buffer(next(places), tensor)
            kept.copy_(tensor, non_blocking=True)
            return kept, tensor.device

        def unpack(packed: Any) -> torch.Tensor:
            return packed if torch.is_tensor(packed) else packed[0].to(packed[1], non_blocking=True)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def _buffer(self, place: int, tensor: torch.Tensor) -> torch.Tensor:
        buffers = self.buffers.setdefault((place, tensor.dtype), [])
        if not buffers or buffers[-1].numel() < tensor.numel():
            buffers.append(torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=tensor.is_cuda))
        return buffers[-1][: tensor.numel()].view(tensor.shape)
