"""Lightning's ways of using several processes, with what this project needs of each."""

from __future__ import annotations

from datetime import timedelta

from pytorch_lightning.strategies import DDPStrategy


def ddp(timeout: float = 600.0) -> DDPStrategy:
    """Every process holds the whole model; the gradients of what trains are averaged, those of the prior do not exist.

    Args:
        timeout: seconds that a collective operation waits for the other processes before it fails.
    """
    if timeout <= 0:
        raise ValueError(f"trainer.strategy.timeout={timeout:g}: expected a positive number of seconds")
    return DDPStrategy(
        timeout=timedelta(seconds=timeout),
        gradient_as_bucket_view=True,  # the gradients lie in the buckets: no second copy of them
    )
