"""Stable Diffusion with subjects: diffusers pipelines whose U-Net blends the prior and the personalized attention."""

from __future__ import annotations

from typing import Any

from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline
from torch import nn

from moa_train.inference.subject_pipeline import SubjectPipeline
from moa_train.prior.controlnet import check_controlnet


class MoAPipeline(SubjectPipeline, StableDiffusionPipeline):
    """`StableDiffusionPipeline` that puts the subjects of photos where a prompt says `<1>`, `<2>` ...

    Everything of the parent works (schedulers, LoRA, offloading, callbacks), except what replaces attention processors;
    that is refused with a reason. A prompt without a marker gives the prior's picture, bit for bit.
    """

    def __init__(
        self,
        vae: nn.Module,
        text_encoder: nn.Module,
        tokenizer: Any,
        unet: nn.Module,
        scheduler: Any,
        image_encoder: nn.Module | None = None,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        requires_safety_checker: bool = False,
    ) -> None:
        """Put the parts together; `unet` has MoA installed (`add_moa`), `image_encoder` encodes subjects."""
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )


class MoAControlNetPipeline(SubjectPipeline, StableDiffusionControlNetPipeline):
    """`StableDiffusionControlNetPipeline` with subjects: call it as `MoAPipeline`, with `image=` for the ControlNet.

    The ControlNet sees plain text, never a subject: it steers both experts' residual stream alike.
    """

    def __init__(
        self,
        vae: nn.Module,
        text_encoder: nn.Module,
        tokenizer: Any,
        unet: nn.Module,
        controlnet: Any,
        scheduler: Any,
        image_encoder: nn.Module | None = None,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        requires_safety_checker: bool = False,
    ) -> None:
        """Put the parts together, as for `MoAPipeline`; `controlnet` is one of diffusers, or a list of them."""
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            controlnet=controlnet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )
        for net in getattr(self.controlnet, "nets", [self.controlnet]):
            check_controlnet(net, unet, self.vae_scale_factor)
