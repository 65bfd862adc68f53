"""A LoRA on the prior: it changes the style; the personalized experts, which bring the identity, stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from safetensors.torch import load_file

_ADAPTER = "style"
_LONGEST = 160


def load_lora(pipe: Any, path: str | Path, scale: float = 1.0) -> None:
    """Put the LoRA of a file onto the prior's U-Net and text encoder.

    Args:
        pipe: a `MoAPipeline`, or any Stable Diffusion pipeline.
        path: a .safetensors file, as diffusers, PEFT or kohya's scripts write it.
        scale: factor of its effect; 0: none.

    Raises:
        ValueError: no such file, a pickle, a damaged file, no LoRA, or one of another architecture.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"lora {path}: no such file")
    if path.suffix != ".safetensors":
        raise ValueError(f"lora {path} is no .safetensors file; others may hold code that runs when they are read")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"lora {path} cannot be read ({error}): download or export it again") from error
    if not any("lora" in name for name in state):
        raise ValueError(f"lora {path} holds no LoRA: none of its {len(state)} tensors is named after one")
    try:
        with _quiet():
            named = {name.split(".lora")[0] for name in pipe.lora_state_dict(state.copy())[0] if ".lora" in name}
            pipe.load_lora_weights(state, adapter_name=_ADAPTER)
    except (ValueError, RuntimeError, KeyError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), str(error))
        raise ValueError(f"lora {path} is of another architecture than this prior: {reason[:_LONGEST]}") from error
    unknown = named - adapted_layers(pipe)
    if unknown or not named:
        raise ValueError(
            f"lora {path} is of another architecture than this prior, "
            f"which has no {min(unknown, default='such layers')}"
        )
    pipe.set_adapters([_ADAPTER], adapter_weights=[scale])


def adapted_layers(pipe: Any) -> set[str]:
    """The layers of the U-Net and the text encoder that have a LoRA, such as unet.mid_block.attentions. ..."""
    return {
        f"{part}.{name}"
        for part in ("unet", "text_encoder")
        for name, layer in getattr(pipe, part).named_modules()
        if hasattr(layer, "lora_A")
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """diffusers logs pages where one line will be raised."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)
