"""What a pipeline with MoA refuses, with the reason: diffusers' ways to replace attention processors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline as _Pipeline
else:
    _Pipeline = object


class KeepsAttention(_Pipeline):
    """Mixin for a diffusers pipeline: all that would replace or lose MoA's attention processors raises a ValueError."""

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Refused: it replaces MoA's attention processors."""
        refuse("enable_attention_slicing", "scaled-dot-product attention already needs no more memory")

    def enable_xformers_memory_efficient_attention(self, attention_op: Callable[..., Any] | None = None) -> None:
        """Refused: it replaces MoA's attention processors."""
        refuse("enable_xformers_memory_efficient_attention", "scaled-dot-product attention is as lean")

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Refused for the U-Net: it replaces MoA's attention processors."""
        if unet:
            refuse("fuse_qkv_projections", "fuse the VAE alone with fuse_qkv_projections(unet=False)")
        super().fuse_qkv_projections(unet=False, vae=vae)

    def load_ip_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: IP-Adapter brings attention processors of its own."""
        refuse("load_ip_adapter", "use a StableDiffusionPipeline for IP-Adapter")

    def unload_ip_adapter(self) -> None:
        """Refused: it would put plain attention in the place of MoA's."""
        refuse("unload_ip_adapter", "remove_moa(pipe.unet) takes MoA off")


def refuse(what: str, instead: str) -> NoReturn:
    """Raise the ValueError that says what would be lost, and what to do."""
    raise ValueError(f"{what} would replace or lose MoA's attention processors: {instead}")


def refuse_options(options: dict[str, Any]) -> None:
    """Refuse the options of a call that go past MoA."""
    for name in ("ip_adapter_image", "ip_adapter_image_embeds"):
        if options.get(name) is not None:
            refuse(name, "give the picture in subjects=[...]")
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        if options.get(name) is not None:
            raise ValueError(f"{name} cannot be given, for MoA finds the subjects in the text: give prompt=...")
