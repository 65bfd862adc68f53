"""`moa-train plan`: what a run needs and takes, and everything that would stop it, before it begins."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_train.cli.command import USAGE_ERROR

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from moa_train.prior.load import Prior
    from moa_train.training.datamodule import MoADataModule
    from moa_train.training.estimate import Memory
    from moa_train.training.module import MoAModule

_FITS = 0.9  # share of the free memory that an estimate may take before real steps are left out
_GB = 1e9
_GPUS = 8  # of a machine that is not this one


@dataclass
class Plan:
    """What was found. `problems` are those that would stop the run."""

    cfg: DictConfig
    lines: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def say(self, what: str, text: str) -> None:
        self.lines.append((what, text))

    @contextmanager
    def noted(self) -> Iterator[None]:
        """What a user can mend becomes one of the problems."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.problems.append(" ".join(str(error).split()))


def plan(cfg: DictConfig, build_module: Callable[..., Any], build_trainer: Callable[..., Any], build: Any) -> None:
    """Prints the plan of a run; leaves with exit code 2 and all problems at once where there are some.

    Args:
        cfg: of the run. build_module, build_trainer, build: `moa_train.cli.train`'s.
    """
    import psutil

    from moa_train.training.strategies import check_strategy

    found = Plan(cfg)
    libraries = psutil.Process().memory_info().rss
    prior: Prior | None = None
    with found.noted():
        prior, module = build_module(cfg)
    with found.noted():
        strategy = cfg.trainer.strategy
        check_strategy(strategy if isinstance(strategy, str) else build(strategy), cfg.compile)
    data = _data(found, prior, build)
    if prior is not None:
        from moa_train.training.estimate import checkpoint_bytes, step_memory

        _parameters(found, module)
        averaged = cfg.callbacks.ema is not None
        _disk(found, checkpoint_bytes(module, averaged))
        batch = None
        if data is not None:
            with found.noted():
                batch = next(iter(data.train_dataloader()))
        if batch is not None:
            memory = step_memory(module, batch, cfg.trainer.precision == "bf16-mixed", averaged)
            _memory(found, memory, libraries)
            if not found.problems:
                _time(found, memory, lambda quick: (build_trainer(quick, prior), module, data))
    _show(found)


def _data(found: Plan, prior: Prior | None, build: Any) -> MoADataModule | None:
    """Reads the indexes; without a prior with a stand-in for its tokenizer, so that data are checked all the same."""
    from moa_train.prior.load import clip_tokenizer

    cfg = found.cfg
    tokenizer = clip_tokenizer() if prior is None else prior.tokenizer
    size = 224 if prior is None else prior.image_encoder.image_size
    data: MoADataModule | None = None
    with found.noted():
        data = build(cfg.data)(tokenizer=tokenizer, subject_size=size)
    if data is None:
        return None
    before = len(found.problems)
    for check in (data.train_samples, data.validation_samples):
        with found.noted():
            number = check()
            split = "train" if check == data.train_samples else "validation"
            found.say(f"{split} samples", "not counted" if number is None else f"{number:,}")
    if len(found.problems) > before:
        return None
    if data.train_samples():
        _epochs(found, data.train_samples() or 0)
    return data


def _epochs(found: Plan, samples: int) -> None:
    trainer = found.cfg.trainer
    ranks = trainer.devices * trainer.num_nodes if isinstance(trainer.devices, int) else None
    batch = found.cfg.data.batch_size * trainer.accumulate_grad_batches * (ranks or 1)
    each = "" if ranks else " on one device"
    found.say("global batch", f"{batch} samples{each}")
    found.say("steps per epoch", f"{samples / batch:,.1f}{each}; {found.cfg.max_steps * batch / samples:,.1f} epochs")


def _parameters(found: Plan, module: MoAModule) -> None:
    trained = sum(parameter.numel() for parameter in module.trained_parameters().values())
    every = sum(parameter.numel() for parameter in module.parameters())
    found.say("parameters", f"{trained / 1e6:,.2f} M trained, {(every - trained) / 1e6:,.2f} M frozen")


def _memory(found: Plan, memory: Memory, libraries: int) -> None:
    from omegaconf import OmegaConf

    on_cpu = found.cfg.trainer.accelerator == "cpu"
    for what, size in (
        ("frozen weights", memory.frozen),
        ("trained weights", memory.trained),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("average of weights", memory.average),
        ("kept for backward", memory.saved),
        ("forward and backward", memory.working),
    ):
        found.say(
            f"  {what}", _size(size) + (" at most, with the line above" if what == "forward and backward" else "")
        )
    more = libraries if on_cpu else 0
    if on_cpu:
        found.say("  program and libraries", _size(libraries))
    found.say("memory of a rank", f"{_size(memory.total + more)} at most")
    needed = memory.total
    if found.cfg.trainer.devices not in (1, "1"):
        ranks = _ranks(found.cfg)
        stage = OmegaConf.select(found.cfg, "trainer.strategy.stage", default=2)
        shares = {"fsdp": memory.fsdp(ranks), "deepspeed": memory.deepspeed(ranks, stage)}
        chosen = str(OmegaConf.select(found.cfg, "trainer.strategy._target_")).rpartition(".")[2]
        if chosen in shares:
            needed = shares[chosen]
        else:
            found.say("  with ddp", f"{_size(memory.gradients)} more for its buckets")
        for name, what in (("fsdp", "model"), ("deepspeed", "optimizer")):
            told = f"{_size(shares[name] + more)} at most on each of {ranks} ranks, which split the {what}"
            found.say(f"  with {name}", told)
    free = _free_memory(on_cpu)
    if free is not None and needed > free:
        found.problems.append(
            f"a step takes {_size(needed)} of memory, {_size(free)} are free: lower data.batch_size (and raise "
            "trainer.accumulate_grad_batches), or gradient_checkpointing=true"
        )


def _ranks(cfg: DictConfig) -> int:
    """Processes of the run; where that depends on the GPUs and there are none here, those of a machine with 8."""
    import torch

    devices = cfg.trainer.devices
    each = devices if isinstance(devices, int) and devices > 0 else torch.cuda.device_count() or _GPUS
    return int(each * cfg.trainer.num_nodes)


def _free_memory(on_cpu: bool) -> int | None:
    """Bytes; None: the device is not in this machine."""
    import psutil
    import torch

    if on_cpu:
        return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


def _disk(found: Plan, size: int) -> None:
    cfg, checkpoint = found.cfg, found.cfg.callbacks.checkpoint
    saves = 1 if checkpoint.every_n_steps is None else max(1, cfg.max_steps // checkpoint.every_n_steps)
    kept = saves if checkpoint.keep is None else min(saves, max(1, checkpoint.keep))
    for_ever = 0 if checkpoint.keep_every_n_steps is None else cfg.max_steps // checkpoint.keep_every_n_steps
    number = kept + for_ever + (checkpoint.monitor is not None) + 1  # one more while the next is being written
    needed = number * size
    folder = Path(cfg.run_dir or cfg.runs).absolute()
    folder = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    found.say("checkpoint", f"{_size(size)}; up to {number} of them: {_size(needed)} of {_size(free)} free")
    if needed > free:
        found.problems.append(
            f"checkpoints take {_size(needed)}, {folder} has {_size(free)}: lower callbacks.checkpoint.keep, or give "
            "runs= on a larger disk"
        )


def _time(found: Plan, memory: Memory, parts: Callable[[DictConfig], tuple[Any, Any, Any]]) -> None:
    """Takes a few real steps where the device is here and the estimate fits."""
    on_cpu = found.cfg.trainer.accelerator == "cpu"
    free = _free_memory(on_cpu)
    if found.cfg.plan_steps == 0 or free is None or memory.total > _FITS * free:
        reason = "plan_steps=0" if found.cfg.plan_steps == 0 else "no such device here" if free is None else "too tight"
        found.say("time", f"not measured ({reason})")
        return
    with tempfile.TemporaryDirectory() as folder:
        seconds = _real_steps(_quick(found.cfg, folder), parts)
    each = sorted(seconds)[len(seconds) // 2]
    from moa_train.training.callbacks.progress import duration

    found.say("time", f"{each:.3g} s a step, {duration(each * found.cfg.max_steps)} for {found.cfg.max_steps} of them")
    found.say("  measured", f"median of {len(seconds)} steps after the first; without validation and pictures")
    found.say("  memory measured", _size(_peak(on_cpu)) + " at most")


def _real_steps(cfg: DictConfig, parts: Callable[[DictConfig], tuple[Any, Any, Any]]) -> list[float]:
    """Seconds of each step but the first, which also warms up."""
    from moa_train.training.estimate import StepTimes

    trainer, module, data = parts(cfg)
    times = StepTimes()
    trainer.callbacks.append(times)
    trainer.fit(module, data)
    return times.seconds[1:]


def _quick(cfg: DictConfig, folder: str) -> DictConfig:
    """The run with a few steps, one process, and nothing written."""
    quick = cfg.copy()
    quick.run_dir, quick.validate_every, quick.logger = folder, None, {}
    quick.callbacks = {name: cfg.callbacks[name] for name in ("ema", "finite") if cfg.callbacks.get(name) is not None}
    quick.trainer.max_steps = 1 + cfg.plan_steps
    quick.trainer.devices, quick.trainer.num_nodes, quick.trainer.strategy = 1, 1, "auto"
    return quick


def _peak(on_cpu: bool) -> int:
    import resource

    import torch

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if on_cpu else torch.cuda.max_memory_allocated()


def _size(number: int) -> str:
    return f"{number / _GB:.2f} GB" if number >= _GB / 10 else f"{number / 1e6:.1f} MB"


def _show(found: Plan) -> None:
    width = max((len(what) for what, _ in found.lines), default=0)
    for what, text in found.lines:
        print(f"{what.ljust(width)}  {text}")
    if found.problems:
        for problem in found.problems:
            print(f"moa-train plan: error: {problem}", file=sys.stderr)
        sys.exit(USAGE_ERROR)
