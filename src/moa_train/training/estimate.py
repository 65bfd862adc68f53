"""What a run needs before it begins: memory by part from one step without memory, time from a few real ones."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from moa_train.symbols import Batch
from moa_train.training.callbacks.steps import StepCallback
from moa_train.training.module import MoAModule, Noised
from moa_train.training.objective import Masks
from moa_train.training.split import gathered_bytes
from moa_train.training.zero import ZERO_BUCKET


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step on one rank, by part.

    frozen, trained: the weights. gradients, optimizer, average: of the trained ones. saved: what the forward pass keeps
    for the backward pass. working: most that forward and backward pass hold at one moment, without weights and
    gradients (`saved` is part of it). split: those of the frozen weights that trainer=fsdp splits. gathered: most of
    its weights and gradients that are whole at one moment.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    average: int
    saved: int
    working: int
    split: int
    gathered: int

    @property
    def total(self) -> int:
        """Everything at the moment when it is most."""
        return self.frozen + self.trained + self.gradients + self.optimizer + self.average + self.working

    def fsdp(self, ranks: int) -> int:
        """`total` of one of so many ranks that split the model (trainer=fsdp)."""
        parts = self.split + self.trained + self.gradients + self.optimizer + self.average
        return self.total - parts + -(-parts // ranks) + self.gathered

    def deepspeed(self, ranks: int, stage: int = 2) -> int:
        """`total` of one of so many ranks that split the optimizer, in stage 2 the gradients, too (trainer=deepspeed).

        The optimizer's part has weights of its own; two buckets of gradients are on their way at one moment.
        """
        parts = self.optimizer + (self.gradients if stage == 2 else 0)
        return self.total - parts + -(-(parts + self.trained) // ranks) + 2 * min(self.trained, 4 * ZERO_BUCKET)


def checkpoint_bytes(module: MoAModule, averaged: bool) -> int:
    """The tensors of a checkpoint: trained weights, optimizer, and their average if one is kept."""
    trained = _bytes(module.trained_parameters().values())
    return trained + round(trained * _optimizer_ratio(module)) + (trained if averaged else 0)


def step_memory(module: MoAModule, batch: Batch, bf16: bool, averaged: bool) -> Memory:
    """Runs one step on tensors that have shapes and no memory; what they would take is added up.

    Args:
        module: as built, on the CPU. batch: one real batch. bf16: whether autocast computes in bfloat16.
        averaged: whether an average of the weights is kept.
    """
    trained = _bytes(module.trained_parameters().values())
    frozen = _bytes(parameter for parameter in module.parameters() if not parameter.requires_grad)
    frozen += _bytes(module.buffers())
    batch = batch.unpacked()
    step = _Step(module, bf16)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        state = {name: _fake(mode, value) for name, value in (*step.named_parameters(), *step.named_buffers())}
        given: dict[str, Any] = {
            name: mode.from_tensor(value) for name, value in vars(batch).items() if isinstance(value, Tensor)
        }
        shapes = replace(batch, **given)
        with _Meter() as meter:
            functional_call(step, state, (shapes, meter))
    working = max(meter.forward_peak, meter.peak - trained)
    optimizer = round(trained * _optimizer_ratio(module))
    unet: Any = module.get_submodule("denoiser.unet")
    split = _bytes(parameter for parameter in unet.parameters() if not parameter.requires_grad)
    average, gathered = trained if averaged else 0, gathered_bytes(unet)
    return Memory(frozen, trained, trained, optimizer, average, meter.saved, working, split, gathered)


class _Step(nn.Module):
    """Forward and backward pass in one call, so that recomputed layers see the same weights."""

    def __init__(self, module: MoAModule, bf16: bool) -> None:
        super().__init__()
        self.module, self.bf16 = module, bf16

    def forward(self, batch: Batch, meter: _Meter) -> None:
        module = self.module
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            moments = batch.latents
            if moments is None:
                assert batch.pixels is not None
                moments = module.codec.moments(batch.pixels)
            latents = module.codec.sample(moments, torch.randn_like(moments[:, 0])).float()
            noised = Noised(latents, torch.zeros(len(latents), dtype=torch.long), torch.randn_like(latents))
            masks = Masks.of(batch, (latents.shape[-2], latents.shape[-1]))
            settings = replace(module.loss, mask_probability=1.0)  # the draw reads keys, which have no values here
            terms, _ = module.losses(batch, noised, module.conditioning(batch), masks, settings)
            loss = settings.total(terms, 1.0)
        meter.end_forward()
        loss.backward()


class _Meter(TorchDispatchMode):
    """Adds up the storages that operations make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self._known: set[int] = set()
        self.live = self.peak = self.forward_peak = self.saved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, made)
        return made

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def end_forward(self) -> None:
        """What lives now is kept for the backward pass."""
        self.saved, self.forward_peak = self.live, self.peak


def _fake(mode: FakeTensorMode, value: Tensor) -> Tensor:
    made = mode.from_tensor(value.detach())
    return made.requires_grad_(value.requires_grad)


def _optimizer_ratio(module: MoAModule) -> float:
    """Bytes of the optimizer's state a byte of parameter, measured on one small parameter."""
    probe = nn.Parameter(torch.zeros(64, 64))
    probe.grad = torch.zeros_like(probe)
    optimizer = module.optimizer_settings.optimizer([{"params": [probe], "lr": 0.0}])
    optimizer.step()
    state = optimizer.state[probe].values()
    return _bytes(value for value in state if isinstance(value, Tensor) and value.numel() > 1) / _bytes([probe])


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class StepTimes(StepCallback):
    """Seconds of each optimizer step, data included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._began = time.perf_counter()

    def after_step(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._began)
        self._began = now
