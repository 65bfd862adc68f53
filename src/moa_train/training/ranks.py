"""What all ranks of a run have to know at the same step, told without waiting for an accelerator."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import distributed


class Agreement:
    """The largest of a few small numbers over all ranks; a collective: every rank asks at the same step.

    The numbers go over gloo, from CPU to CPU: nobody waits for kernels that are still queued on an accelerator.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._alone = trainer.world_size == 1
        self._group: distributed.ProcessGroup | None = None
        if not self._alone and distributed.get_backend() != "gloo":
            group = distributed.new_group(backend="gloo")
            assert isinstance(group, distributed.ProcessGroup)
            self._group = group

    def largest(self, *values: int) -> list[int]:
        """Each value's maximum over the ranks."""
        if self._alone:
            return list(values)
        told = torch.tensor(values)
        distributed.all_reduce(told, op=distributed.ReduceOp.MAX, group=self._group)
        return told.tolist()
