"""Weights split over the ranks (FSDP): the part that a rank holds of each, and the way from whole tensors and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

_GATHERED_AT_ONCE = (ResnetBlock2D, Transformer2DModel, Downsample2D, Upsample2D)


def split_weights(unet: UNet2DConditionModel, others: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Leave every rank of `mesh` with its part of each weight, in place; trained and frozen ones alike.

    A block gathers its weights when it runs, forward and backward, and lets them go. Outside of passes all are split.

    Args:
        unet: split by its residual blocks, transformers and samplers; the rest of it is gathered once a pass.
        others: modules with a `forward`, each gathered as one.
    """
    for part in (*_blocks(unet), unet, *others):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)  # else the U-Net's own stay whole after a validation


def _blocks(unet: UNet2DConditionModel) -> list[nn.Module]:
    return [part for part in unet.modules() if isinstance(part, _GATHERED_AT_ONCE)]


def gathered_bytes(unet: UNet2DConditionModel) -> int:
    """Most that is whole at one moment of a U-Net that is split: weights, and gradients of the trained ones.

    Those outside of blocks, and two blocks: one that runs, and one that is gathered meanwhile.
    """
    blocks = sorted(_held(block) for block in _blocks(unet))
    return _held(unet) - sum(blocks) + sum(blocks[-2:])


def _held(module: nn.Module) -> int:
    return sum(each.numel() * each.element_size() * (1 + each.requires_grad) for each in module.parameters())


def is_split(module: nn.Module) -> bool:
    """Whether a pass through `module` needs all ranks."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def held_bytes(module: nn.Module) -> tuple[int, int]:
    """Bytes that this rank holds of the split weights, and bytes of the whole."""
    split = [each for each in module.parameters() if isinstance(each, DTensor)]
    held = sum(each.to_local().numel() * each.element_size() for each in split)
    return held, sum(each.numel() * each.element_size() for each in split)


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, as a plain one with the same memory; all of one that is not split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be split; then every rank takes part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every rank has, split as `like` is; nothing is sent."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gathered(state: Any) -> Any:
    """A nested state with whole tensors, on the CPU, in place of split ones; every rank takes part.

    The first rank gets them, on the others they are empty. What is not split stays as it is.
    """

    def gather(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        tensor = value.full_tensor()
        return tensor.cpu() if torch.distributed.get_rank() == 0 else tensor.new_empty(0, device="cpu")

    return tree_map(gather, state)
