"""No step is taken on a loss or gradient that is not finite; what caused it is recorded; spikes of the loss are told.

The verdict is one for all ranks: after the backward pass one small sum over the ranks says whether any rank's loss or
gradient is not finite. Then none of them steps: weights and moments stay, while the step is counted (schedule, data
position, average) as any other, so that a resume or another number of ranks sees the same samples at the same step.
"""

from __future__ import annotations

import csv
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from moa_train.training.callbacks.later import Later
from moa_train.training.callbacks.sample_log import keep_until
from moa_train.training.callbacks.spikes import LossWindow
from moa_train.training.callbacks.steps import StepCallback
from moa_train.training.module import MoAModule
from moa_train.training.nonfinite import MOST, MicroBatch, Record, record_path, save_weights
from moa_train.training.split import whole
from moa_train.training.zero import ZeroStrategy

logger = logging.getLogger(__name__)

KEY = "finite"
"""Where a checkpoint holds {"skipped": steps, "in_a_row": steps, "weights_kept": bool, "losses": the window}."""

POLICIES = ("stop", "skip")
SPIKE_HEADER = ("step", "loss", "median", "z", "samples")
_SHOWN = 16
"""Sample ids in a message."""


class NotFinite(ValueError):
    """A loss or gradient is NaN or infinite; no rank has taken the step."""


@dataclass
class _Micro:
    """A micro-batch on this rank; its losses are there once it is through."""

    samples: list[int]
    keys: list[int]
    losses: Float[Tensor, " b"] | None = None

    def told(self) -> MicroBatch:
        return MicroBatch(self.samples, self.keys, [] if self.losses is None else self.losses.tolist())


@dataclass(frozen=True)
class _Step:
    """A step on this rank, whose verdict may still be on its way."""

    number: int
    facts: Later
    micro: list[_Micro]
    late: bool


class FiniteSteps(StepCallback):
    """Steps only on finite losses and gradients; writes `nonfinite/step=000123.json` and `spikes.csv`.

    On the CPU the verdict is there before the step. On a GPU a fused optimizer itself leaves out the step, and the host
    learns of it one step later without waiting; one that is not fused waits for the verdict. With 16-mixed precision
    the loss scaler leaves out steps whose scaled gradient overflows, as it is meant to: these are counted, too, but
    stop a run only as `max_in_a_row` says.

    Args:
        directory: the run's folder.
        on_nonfinite: "stop" or "skip".
        max_in_a_row: optimizer steps left out one after another that stop a run.
        spike_threshold: robust z-score of the loss above which it is told; None: never.
        spike_window: optimizer steps before it that a loss is compared with.
    """

    def __init__(
        self,
        directory: str | Path,
        on_nonfinite: str = "stop",
        max_in_a_row: int = 20,
        spike_threshold: float | None = 8.0,
        spike_window: int = 200,
    ) -> None:
        if on_nonfinite not in POLICIES:
            raise ValueError(f"trainer.on_nonfinite={on_nonfinite}: expected {' or '.join(POLICIES)}")
        if max_in_a_row < 1 or spike_window < 1:
            raise ValueError(
                f"callbacks.finite.max_in_a_row={max_in_a_row} spike_window={spike_window}: expected at least 1"
            )
        self.directory = Path(directory)
        self.on_nonfinite = on_nonfinite
        self.max_in_a_row = max_in_a_row
        self.spike_threshold = spike_threshold
        self.skipped = 0
        self.in_a_row = 0
        self._weights_kept = False
        self._window = LossWindow(spike_window)
        self._micro: list[_Micro] = []
        self._loss: Tensor | None = None
        self._step: _Step | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            keep_until(self.directory / "spikes.csv", trainer.global_step)

    # -------------------------------------------------------------------------------------------------- during a step
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._micro.append(_Micro(batch.sample.tolist(), batch.key.tolist()))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._settle(trainer, pl_module)  # of the step before, whose weights are still those that it had
        assert self._loss is not None
        zero = trainer.strategy if isinstance(trainer.strategy, ZeroStrategy) else None
        norm = _norm(optimizer) if zero is None else zero.gradient_norm()
        pl_module.log("train/grad_norm", norm, batch_size=1)
        agreed = _agreed(self._loss, norm, trainer.world_size)
        scales = _scales(trainer)
        fused = zero is None and all(group.get("fused") for group in optimizer.param_groups)
        self._step = _Step(trainer.global_step + 1, Later(agreed), self._micro, scales or fused)
        if fused and not scales:
            optimizer.found_inf = (agreed[0] + agreed[1] > 0).float()  # type: ignore[attr-defined]
        elif not scales and any(self._step.facts.values()[:2]):
            if zero is None:
                optimizer.zero_grad(set_to_none=True)  # without gradients a step changes nothing, moments included
            else:
                zero.leave_out()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._micro[-1].losses = outputs["per_sample"]
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def after_step(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        self._micro, self._loss = [], None
        if self._step is not None and not self._step.late:
            self._settle(trainer, module)
        module.log("train/skipped", float(self.skipped), batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._settle(trainer, pl_module)

    # ------------------------------------------------------------------------------------------------------- verdicts
    def _settle(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Acts on the verdict of the last step, the same on all ranks.

        Raises:
            NotFinite: the step was not taken, and the run stops.
        """
        if self._step is None:
            return
        step, self._step = self._step, None
        bad_loss, bad_gradient, loss, norm = step.facts.values()
        if not (bad_loss or bad_gradient):
            self.in_a_row = 0
            self._look_for_spike(trainer, step, loss)
            return
        self.skipped += 1
        self.in_a_row += 1
        overflow = _scales(trainer) and not bad_loss
        stops = (self.on_nonfinite == "stop" and not overflow) or self.in_a_row >= self.max_in_a_row
        what = "loss" if bad_loss else "gradient"
        told = f"the {what} of step {step.number} is not finite"
        if stops or not overflow:
            told += self._recorded(trainer, module, step, what, norm, stops)
        if stops:
            row = f" ({self.in_a_row} steps in a row were left out)" if self.on_nonfinite == "skip" else ""
            raise NotFinite(f"{told}{row}, or resume with ckpt=last and a smaller optim.lr")
        level = logging.INFO if overflow else logging.WARNING
        logger.log(level, "%s; left out (%d so far, %d in a row)", told, self.skipped, self.in_a_row)

    def _recorded(
        self, trainer: pl.Trainer, module: pl.LightningModule, step: _Step, what: str, norm: float, stops: bool
    ) -> str:
        """Writes the record on rank 0; says, equally on all ranks, which samples it was and how to make it again."""
        assert isinstance(module, MoAModule)
        path = record_path(self.directory, step.number)
        ranks = _gathered(trainer, [micro.told() for micro in step.micro])
        keeps = stops or not self._weights_kept
        weights = path.with_suffix(".safetensors") if keeps else None
        state = trainer.strategy.lightning_module_state_dict() if keeps else {}
        self._weights_kept = True
        record = Record(step.number, what, norm, ranks, weights.name if weights else None, module.configuration)
        if trainer.is_global_zero and (stops or self.skipped <= MOST):
            if weights is not None:
                save_weights(weights, state)
            record.write(path)
        return f": samples {_listed(record.faulty())}; see `moa-train replay={path}`"

    def _look_for_spike(self, trainer: pl.Trainer, step: _Step, loss: float) -> None:
        judged = self._window.judge(loss)
        if judged is None or self.spike_threshold is None or judged[1] <= self.spike_threshold:
            return
        ranks = _gathered(trainer, [micro.told() for micro in step.micro])
        pairs = [pair for rank in ranks for micro in rank for pair in zip(micro.losses, micro.samples, strict=True)]
        samples = [sample for _, sample in sorted(pairs, reverse=True)]
        if not trainer.is_global_zero:
            return
        logger.warning(
            "loss spike at step %d: %.4g, the median before is %.4g (robust z %.1f); samples, the worst first: %s",
            step.number, loss, judged[0], judged[1], _listed(samples),
        )  # fmt: skip
        path = self.directory / "spikes.csv"
        begun = path.exists()
        with path.open("a", newline="") as file:
            rows = csv.writer(file)
            if not begun:
                rows.writerow(SPIKE_HEADER)
            rows.writerow((step.number, repr(loss), repr(judged[0]), repr(judged[1]), " ".join(map(str, samples))))

    # ---------------------------------------------------------------------------------------------------- checkpoints
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._settle(trainer, pl_module)  # a checkpoint must not hold a step whose verdict is unknown
        checkpoint[KEY] = {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "weights_kept": self._weights_kept,
            "losses": list(self._window.losses),
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint.get(KEY)
        if state is not None:  # of a run without this callback there is none: it begins to count here
            self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
            self._weights_kept = state["weights_kept"]
            self._window.fill(state["losses"])


def _norm(optimizer: Optimizer) -> Float[Tensor, ""]:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return whole(torch.nn.utils.get_total_norm(gradients))


def _agreed(loss: Float[Tensor, ""], norm: Float[Tensor, ""], world: int) -> Float[Tensor, " facts"]:
    """Ranks whose loss is not finite, ranks whose gradient is not, mean loss, mean norm; the host waits for nothing."""
    facts = torch.stack([(~loss.isfinite()).float(), (~norm.isfinite()).float(), loss / world, norm / world])
    if world > 1:
        torch.distributed.all_reduce(facts)
    return facts


def _scales(trainer: pl.Trainer) -> bool:
    """Whether a loss scaler guards the steps (16-mixed precision)."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _gathered(trainer: pl.Trainer, mine: list[MicroBatch]) -> list[list[MicroBatch]]:
    """What every rank gives, in order of ranks."""
    if trainer.world_size == 1:
        return [mine]
    given: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(given, mine)
    return given


def _listed(samples: list[int]) -> str:
    return ", ".join(map(str, samples[:_SHOWN])) + (", ..." if len(samples) > _SHOWN else "")
