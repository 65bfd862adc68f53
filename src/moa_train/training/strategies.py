"""Lightning's ways of using several processes, with what this project needs of each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch.optim import Optimizer

from moa_train.training.split import gathered, part_like
from moa_train.training.zero import ZERO_BUCKET, ZeroStrategy


def ddp(timeout: float = 600.0) -> DDPStrategy:
    """Every process holds the whole model; the gradients of what trains are averaged, those of the prior do not exist.

    Args:
        timeout: seconds that a collective operation waits for the other processes before it fails.
    """
    return DDPStrategy(
        timeout=_timeout(timeout),
        gradient_as_bucket_view=True,  # the gradients lie in the buckets: no second copy of them
    )


def fsdp(timeout: float = 600.0) -> FullySplit:
    """Weights, gradients, moments and average are split over the processes; `MoAModule.configure_model` does it.

    Args:
        timeout: seconds that a collective operation waits for the other processes before it fails.
    """
    return FullySplit(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=_timeout(timeout))


def deepspeed(stage: int = 2, timeout: float = 600.0) -> ZeroStrategy:
    """Moments and gradients are split over the processes by DeepSpeed.

    Args:
        stage: of ZeRO. 1: moments are split; 2: gradients, too.
        timeout: seconds that a collective operation waits for the other processes before it fails.

    Raises:
        ValueError: another stage; or DeepSpeed is not installed.
    """
    if stage not in (1, 2):
        raise ValueError(f"trainer.strategy.stage={stage}: expected 1 or 2; trainer=fsdp splits the weights, too")
    if find_spec("deepspeed") is None:
        raise ValueError("trainer=deepspeed needs DeepSpeed: pip install 'moa-train[deepspeed]', or use trainer=fsdp")
    return ZeroStrategy(
        stage=stage,
        timeout=_timeout(timeout),
        reduce_bucket_size=ZERO_BUCKET,
        allgather_bucket_size=ZERO_BUCKET,
        logging_batch_size_per_gpu=1,  # for messages of DeepSpeed that are off; it would ask the stream
    )


class FullySplit(ModelParallelStrategy):
    """Lightning's FSDP2, with the checkpoints of one process: one file of whole tensors, written by the first rank."""

    restore_checkpoint_after_setup = False  # as one process: weights, then the callbacks' states, then the optimizer
    lightning_restore_optimizer = True

    def setup_environment(self) -> None:
        """All processes split one model."""
        self._data_parallel_size = self.num_processes * self.num_nodes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors, on the first rank."""
        state: dict[str, Any] = gathered(Strategy.lightning_module_state_dict(self))
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole tensors, on the first rank."""
        state: dict[str, Any] = gathered(Strategy.optimizer_state(self, optimizer))
        return state

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every rank reads the whole file, to the CPU."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """The module takes its part."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Every rank takes its part of what the optimizer keeps for each parameter."""
        states = []
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            kept = {
                number: {
                    name: part_like(value, parameters[number]) if value.shape == parameters[number].shape else value
                    for name, value in values.items()
                }
                for number, values in saved["state"].items()
            }
            states.append({**saved, "state": kept})
        Strategy.load_optimizer_state_dict(self, {"optimizer_states": states})


def cluster(nodes: int) -> list[ClusterEnvironment]:
    """Where the ranks of a SLURM job come from; empty outside of one, and under torchrun, which Lightning finds itself.

    The tasks of an `srun` are the ranks. One process alone (an sbatch script without `srun`, a trial of a sweep) starts
    its own; Lightning would take the job's numbers for the run's, and train with fewer ranks than were asked for.

    Raises:
        ValueError: one process alone cannot start ranks on several machines.
    """
    if "SLURM_JOB_ID" not in os.environ or TorchElasticEnvironment.detect():
        return []
    if int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        return [SLURMEnvironment(auto_requeue=False)]  # Lightning's requeueing would resume from a file of its own
    if nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={nodes} in a SLURM job, but this process is alone: start one a rank with srun, as "
            "scripts/slurm/train.sbatch does, or torchrun on each machine"
        )
    return [LightningEnvironment()]


def _timeout(seconds: float) -> timedelta:
    if seconds <= 0:
        raise ValueError(f"trainer.strategy.timeout={seconds:g}: expected a positive number of seconds")
    return timedelta(seconds=seconds)


def check_strategy(strategy: str | Strategy, compiled: bool = False) -> None:
    """Refuses Lightning's other ways to split a model, before or after Lightning has made them out of their name.

    Raises:
        ValueError: names what to use instead; or a split model has compiled blocks.
    """
    if compiled and isinstance(strategy, (FullySplit, ZeroStrategy)):
        name = "fsdp" if isinstance(strategy, FullySplit) else "deepspeed"
        raise ValueError(f"compile=true with trainer={name} is not supported: use compile=false, or trainer=ddp")
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    known = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, FullySplit))
    foreign = isinstance(strategy, DeepSpeedStrategy) and not isinstance(strategy, ZeroStrategy)
    if foreign or name.startswith(("fsdp", "deepspeed")) or not (known or isinstance(strategy, str)):
        raise ValueError(
            f"trainer.strategy={name} splits the model in a way that average, checkpoints and pictures do not support: "
            "use trainer=fsdp, which splits weights, gradients and optimizer over the processes, or trainer=deepspeed "
            "(docs/scaling.md)"
        )
