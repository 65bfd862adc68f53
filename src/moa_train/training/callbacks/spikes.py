"""Loss spikes: how far a step's loss stands out of those before it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

LEAST = 32
"""Losses that are seen before any is judged."""

_NORMAL = 1.4826
"""The standard deviation of a normal distribution, in median absolute deviations."""

_FLOOR = 1e-3
"""Smallest spread that is believed, as a fraction of the median: losses that hardly differ make no spikes."""


class LossWindow:
    """The last losses of a run, and the robust z-score of the next: (x - median) / (1.4826 MAD).

    Args:
        size: how many losses are kept.
    """

    def __init__(self, size: int) -> None:
        self.losses: deque[float] = deque(maxlen=size)

    def fill(self, losses: Iterable[float]) -> None:
        """Begin with these, the oldest first."""
        self.losses.clear()
        self.losses.extend(losses)

    def judge(self, loss: float) -> tuple[float, float] | None:
        """Median of the losses before and z of this one, which is kept then; None while there are too few."""
        told = None
        if len(self.losses) >= LEAST:
            middle = median(self.losses)
            spread = _NORMAL * median(abs(each - middle) for each in self.losses)
            told = middle, (loss - middle) / max(spread, _FLOOR * abs(middle), math.ulp(0.0))
        self.losses.append(loss)
        return told
