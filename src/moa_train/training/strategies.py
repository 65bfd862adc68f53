"""Lightning's ways of using several processes, with what this project needs of each."""

from __future__ import annotations

from datetime import timedelta

from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy


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


def refuse_sharding(strategy: Strategy) -> None:
    """Refuses strategies that split the model or the optimizer: the average, checkpoints and pictures need them whole.

    Raises:
        ValueError: names what to use instead.
    """
    whole = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not isinstance(strategy, DeepSpeedStrategy)
    if not whole:
        raise ValueError(
            f"trainer.strategy={type(strategy).__name__} splits the model over the processes, which average, "
            "checkpoints and pictures do not support; use trainer=ddp: what MoA trains takes 2 GB at the size of "
            "Stable Diffusion 1.5, there is little to split (docs/scaling.md)"
        )
