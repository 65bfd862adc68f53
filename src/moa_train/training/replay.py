"""Makes one step again on its weights and samples, and finds where it stops being finite."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moa_train.symbols import Batch, LossTerms
from moa_train.training.module import MoAModule
from moa_train.training.objective import Masks

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Replayed:
    """A micro-batch, made again.

    timesteps: t of each sample. terms: its losses before weights. losses: its objective. norms: of its own gradient.
    first: the tensors that are not finite, in the order in which they were made: of the batch, of its noising, outputs
        of modules. backward: torch's word on the first function whose gradient is NaN, of the first sample whose loss
        is finite and whose gradient is not.
    """

    samples: list[int]
    timesteps: list[int]
    terms: LossTerms
    losses: Float[Tensor, " b"]
    norms: Float[Tensor, " b"]
    first: list[str]
    backward: str | None

    @property
    def finite(self) -> bool:
        """Whether every sample's loss and gradient is."""
        return bool((self.losses.isfinite() & self.norms.isfinite()).all())


def make_again(module: MoAModule, batch: Batch, progress: float, precision: str) -> Replayed:
    """Forward and backward passes of one micro-batch, on the device that `module` is on.

    Args:
        progress: fraction of the run that was over, which the objective depends on.
        precision: Lightning's name of the number format.
    """
    module.setup("fit")
    batch = module.transfer_batch_to_device(batch, module.device, 0)
    dtype = _AUTOCAST.get(precision)
    with torch.autocast(module.device.type, dtype, dtype is not None, cache_enabled=False):
        with _watched(module) as first:
            first += _not_finite("batch", batch)
            noised = module.noised(batch)
            first += _not_finite("noised", noised)
            terms = _terms(module, batch, progress)
        losses = module.loss.weighted(terms, progress)
        alone = [_alone(module, _only(batch, row), progress) for row in range(len(losses))]
    detached = LossTerms(terms.masked.detach(), terms.router.detach(), terms.object.detach())
    norms = torch.stack([norm for norm, _ in alone])
    word = next((word for _, word in alone if word is not None), None)
    return Replayed(batch.sample.tolist(), noised.timesteps.tolist(), detached, losses.detach(), norms, first, word)


def _terms(module: MoAModule, batch: Batch, progress: float) -> LossTerms:
    """The losses of a training step."""
    noised = module.noised(batch)
    masks = Masks.of(batch, (noised.noisy.shape[-2], noised.noisy.shape[-1]))
    return module.losses(batch, noised, module.conditioning(batch), masks, module.loss.at(progress))[0]


def _only(batch: Batch, row: int) -> Batch:
    """One sample as a batch: beside others, one that is not finite spoils their gradients, too (0 x NaN)."""
    parts = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: part[row : row + 1] for name, part in parts.items() if part is not None})


def _alone(module: MoAModule, batch: Batch, progress: float) -> tuple[Float[Tensor, ""], str | None]:
    """Norm of the gradient of one sample; torch's word on the first NaN where its loss is finite and this is not."""
    loss = module.loss.weighted(_terms(module, batch, progress), progress)[0]
    parameters = list(module.trained_parameters().values())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    norm = torch.nn.utils.get_total_norm([each for each in gradients if each is not None]).to(loss.device)
    if norm.isfinite() or not loss.isfinite():
        return norm, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that anomaly detection is slow, and the trace of the forward pass
        with torch.autograd.detect_anomaly(check_nan=True):
            loss = module.loss.weighted(_terms(module, batch, progress), progress)[0]
            try:
                torch.autograd.grad(loss, parameters, allow_unused=True)
            except RuntimeError as error:
                return norm, str(error)
    return norm, "no NaN, but a gradient or its norm beyond the largest number"


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[str]]:
    """Inside, the list grows by each module whose output is not finite, innermost first."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(part: nn.Module, inputs: Any, output: Any) -> None:
            if any(not tensor.isfinite().all() for tensor in _tensors(output)):
                found.append(f"output of {name} ({type(part).__name__})")

        return hook

    handles = [part.register_forward_hook(look(name)) for name, part in module.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> list[Tensor]:
    """Floating tensors of an output, in tuples and lists, too."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    return [tensor for part in output for tensor in _tensors(part)] if isinstance(output, (tuple, list)) else []


def _not_finite(what: str, bundle: Any) -> list[str]:
    """Floating tensors of a dataclass that are not finite, with the rows in which."""
    found = []
    for field in fields(bundle):
        for tensor in _tensors(getattr(bundle, field.name)):
            rows = (~tensor.flatten(1).isfinite()).any(dim=1).nonzero()[:, 0].tolist()
            if rows:
                found.append(f"{field.name} of {what}, rows {rows}")
    return found
