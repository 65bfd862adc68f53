"""Numbers on their way from an accelerator, which nobody waits for before they are needed."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class Later:
    """A few numbers as Python floats, once somebody asks; the accelerator goes on meanwhile."""

    def __init__(self, numbers: Float[Tensor, " n"]) -> None:
        self._ready: torch.cuda.Event | None = None
        self._numbers = numbers.detach()
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers.detach(), non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def values(self) -> list[float]:
        """The numbers; waits until the accelerator has come as far as where they were asked for, and no further."""
        if self._ready is not None:
            self._ready.synchronize()
        return [float(number) for number in self._numbers.tolist()]
