"""`moa-train replay=FILE`: makes a step again whose loss or gradient was not finite, and says where it began."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_train.cli.runs import existing_checkpoint

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from moa_train.symbols import Batch
    from moa_train.training.module import MoAModule
    from moa_train.training.nonfinite import MicroBatch, Record
    from moa_train.training.replay import Replayed

REPRODUCED = 1
"""Exit code where the step is not finite again."""

_NOT_OF_THE_RUN = ("replay", "ckpt", "debug")
_SHOWN = 8


def replay(cfg: DictConfig) -> None:
    """Runs the micro-batches of the record that `cfg.replay` names, and prints what each gives.

    The run's own configuration is in the record; what the command line sets goes before it.

    Raises:
        ValueError: the record, its weights or its data are not there, or not what they were.
        SystemExit: with code 1 where the step is not finite again.
    """
    import torch

    from moa_train.cli.train import build_data, build_module
    from moa_train.training.nonfinite import Record
    from moa_train.training.replay import make_again

    path = Path(cfg.replay)
    record = Record.read(path)
    run = _configuration(record, cfg)
    prior, module = build_module(run)
    told = _load_weights(module, record, path, cfg.ckpt)
    module.to("cuda" if run.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    datamodule = build_data(run, prior)
    print(f"step {record.step}: {record.what} not finite, gradient norm {record.gradient_norm:.4g}; {told}")
    whole = not any(micro.faulty() for rank in record.ranks for micro in rank)
    finite = True
    for rank, recorded in enumerate(record.ranks):
        batches = datamodule.micro_batches(record.step, rank, len(record.ranks), len(recorded))
        for number, (micro, batch) in enumerate(zip(recorded, batches, strict=True)):
            _check_same(micro, batch)
            if whole or micro.faulty():
                made = make_again(module, batch, (record.step - 1) / module.max_steps, run.trainer.precision)
                print(f"rank {rank}, micro-batch {number + 1} of {len(recorded)}", *_lines(made), sep="\n")
                finite = finite and made.finite
    if not finite:
        print("it is not finite again")
        sys.exit(REPRODUCED)
    print("every loss and gradient is finite here: other weights, number format or device than in the run?")


def _configuration(record: Record, cfg: DictConfig) -> DictConfig:
    """The run's configuration with what the command line sets; nothing that would only slow down or start anew."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    run = OmegaConf.create(record.config)
    run.update(init=None, compile=False)
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    for key in (override.split("=")[0].lstrip("+") for override in given):
        if key not in _NOT_OF_THE_RUN and OmegaConf.select(run, key) is not None:
            OmegaConf.update(run, key, OmegaConf.select(cfg, key), merge=False)
    return run


def _load_weights(module: MoAModule, record: Record, path: Path, ckpt: str | None) -> str:
    """Fills the trained tensors; says from where."""
    from moa_train.training.nonfinite import load_weights
    from moa_train.training.resume import read_checkpoint, step_files

    if ckpt is None and record.weights is not None:
        module.load_state_dict(load_weights(path.parent / Path(record.weights).name))
        return f"weights of that step, {record.weights}"
    if ckpt is not None:
        chosen = existing_checkpoint(ckpt)
    else:
        kept = step_files(path.parents[1] / "checkpoints")
        before = [file for step, file in kept.items() if step < record.step]
        if not before:
            raise ValueError(f"{path} has no weights beside it and no checkpoint before it: give ckpt=PATH")
        chosen = before[-1]
    checkpoint = read_checkpoint(chosen)
    module.load_state_dict(checkpoint["state_dict"])
    return f"weights of step {checkpoint['global_step']} instead of {record.step - 1}, {chosen}"


def _check_same(micro: MicroBatch, batch: Batch) -> None:
    if (batch.sample.tolist(), batch.key.tolist()) != (micro.samples, micro.keys):
        raise ValueError(
            f"the data gives the samples {batch.sample.tolist()[:4]}... where the step had {micro.samples[:4]}...: "
            "give data.train, data.weights and seed as they were"
        )


def _lines(made: Replayed) -> list[str]:
    """A table of the samples, and where it began."""
    head = f"{'sample':>10} {'t':>5} {'masked':>11} {'router':>11} {'object':>11} {'loss':>11} {'gradient norm':>14}"
    lines = [head]
    columns: list[Any] = [made.samples, made.timesteps, made.terms.masked, made.terms.router, made.terms.object]
    for sample, timestep, *values in zip(*columns, made.losses, made.norms, strict=True):
        numbers = [float(value) for value in values]
        mark = "" if all(map(math.isfinite, numbers)) else "  <- not finite"
        shown = " ".join(f"{number:>11.4g}" for number in numbers[:-1])
        lines.append(f"{sample:>10} {timestep:>5} {shown} {numbers[-1]:>14.4g}{mark}")
    if made.first:
        more = f" (and {len(made.first) - _SHOWN} after them)" if len(made.first) > _SHOWN else ""
        lines.append("not finite first: " + "; ".join(made.first[:_SHOWN]) + more)
    if made.backward is not None:
        lines.append(f"in the backward pass: {made.backward}")
    return lines
