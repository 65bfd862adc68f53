"""The optimizer and its learning rates: experts, routers, fusion and image encoder each at their own rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

NamedParameters = Mapping[str, Sequence[tuple[str, Parameter]]]
"""Trained parameters with their names, by group."""


@dataclass(frozen=True)
class Constant:
    """Factor of the learning rate: 1 after a linear warm-up over `warmup_steps`."""

    warmup_steps: int = 0

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / (self.warmup_steps + 1))


@dataclass(frozen=True)
class Cosine:
    """Factor of the learning rate: linear warm-up, then half a cosine from 1 at its end to `floor` at `total_steps`."""

    total_steps: int
    warmup_steps: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(
                f"optim.schedule.warmup_steps={self.warmup_steps}: expected at least 0 and fewer than the run's "
                f"{self.total_steps} steps"
            )

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = min((step - self.warmup_steps) / (self.total_steps - self.warmup_steps), 1.0)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class OptimizerSettings:
    """How the trained parameters are stepped.

    optimizer: called with the parameter groups, e.g. `partial(torch.optim.AdamW, betas=...)`.
    lr: learning rate of the personalized experts (and of any group that `lr_scale` does not name).
    lr_scale: learning rate of a group as a multiple of `lr`.
    weight_decay: of matrices and filters; norms, biases and single vectors have none.
    schedule: factor of all learning rates at an optimizer step.
    """

    optimizer: Callable[..., Optimizer]
    lr: float
    lr_scale: Mapping[str, float] = field(default_factory=dict)
    weight_decay: float = 0.01
    schedule: Callable[[int], float] = Constant()

    def build(self, trained: NamedParameters, fused: bool = False) -> tuple[Optimizer, LambdaLR]:
        """The optimizer over all trained parameters and the schedule of its learning rates.

        fused: one kernel for all parameters, which can leave out a step by itself; where the settings leave it open.
        """
        open_to_it = getattr(self.optimizer, "keywords", {}).get("fused", False) is None
        more = {"fused": True} if fused and open_to_it else {}
        optimizer = self.optimizer(self.groups(trained), **more)
        return optimizer, LambdaLR(optimizer, lambda step: self.schedule(step))  # a function's state is not saved

    def groups(self, trained: NamedParameters) -> list[dict[str, Any]]:
        """Torch's parameter groups, two for each of ours: with and without weight decay."""
        groups = []
        for name, parameters in trained.items():
            lr = self.lr * self.lr_scale.get(name, 1.0)
            matrices = [parameter for _, parameter in parameters if parameter.ndim > 1]
            vectors = [parameter for _, parameter in parameters if parameter.ndim <= 1]
            for suffix, members, decay in (("", matrices, self.weight_decay), ("_vectors", vectors, 0.0)):
                if members:
                    groups.append({"params": members, "lr": lr, "weight_decay": decay, "name": name + suffix})
        return groups
