"""Stable Diffusion with subjects: a diffusers pipeline whose U-Net blends the prior and the personalized attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers import StableDiffusionPipeline, UniPCMultistepScheduler
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from moa_train.inference.routing import Routing, RoutingRecorder
from moa_train.inference.subjects import Subject, subject_pixels, subjects_of_each
from moa_train.inference.weights import load_personalized_prior
from moa_train.model.attention import MoACall
from moa_train.prompts import Prompt, parse_prompt, tokenize
from moa_train.symbols import Conditioning


class MoAPipeline(StableDiffusionPipeline):
    """`StableDiffusionPipeline` that puts the subjects of photos where a prompt says `<1>`, `<2>` ...

    Everything of the parent works (schedulers, LoRA, offloading, callbacks), except what replaces attention processors;
    that is refused with a reason. A prompt without a marker gives the prior's picture, bit for bit.

    Attributes:
        routing: the routing maps of the last call; None if its prompt had no subject or they were not recorded.
        subject_background: what replaces the background of a subject's photo, "noise" or "grey", as in training.
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
        self.routing: Routing | None = None
        self.subject_background = "noise"

    @classmethod
    def from_pretrained(
        cls,
        prior: str | Path,
        weights: str | Path | None = None,
        torch_dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> MoAPipeline:
        """Load a prior and put personalized weights on it; the scheduler is UniPC, made from the prior's own.

        Args:
            prior: "toy", a folder in the Stable Diffusion format, or a hub id.
            weights: `personalized.safetensors`, as `moa-export` writes it; "toy": the file that ships with this
                package, trained on the toy prior; None: the prior alone.
            torch_dtype: of all weights.
            options: passed to `load_prior`.

        Raises:
            ValueError: weights of another architecture, a damaged file, an unknown prior.
        """
        parts, config = load_personalized_prior(prior, weights, **options)
        # Both values are what the parent would set, with a deprecation warning each.
        settings = {**parts.scheduler.config, "steps_offset": 1, "clip_sample": False}
        scheduler = UniPCMultistepScheduler.from_config(settings)
        pipe = cls(parts.vae, parts.text_encoder, parts.tokenizer, parts.unet, scheduler, parts.image_encoder)
        pipe.subject_background = config.get("data", {}).get("background", pipe.subject_background)
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                nn.Module.to(part.eval().requires_grad_(False), dtype=torch_dtype)
        return pipe

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        subjects: Sequence[Any] = (),
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        record_routing: bool = True,
        **options: Any,
    ) -> Any:
        """Make pictures.

        Args:
            prompt: marks each subject behind its noun: "a photo of a man <1> and a woman <2>". Of several prompts, all
                or none have markers.
            subjects: what the markers stand for, `<1>` the first: photos or their paths (an alpha channel is the mask;
                without one the person is found), pairs (photo, mask), or cut-out tensors. One list serves every prompt;
                a list of lists gives each prompt its own.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance above 1; its unconditional half sees the prior alone.
            negative_prompt: what to guide away from; one for all prompts, or one each.
            num_images_per_prompt: pictures of each prompt, one after the other.
            record_routing: keep the routing maps in `routing`.
            options: all else that `StableDiffusionPipeline` takes (generator, height, width, output_type ...).

        Raises:
            ValueError: markers and subjects that do not match, a subject that cannot be read, options that would
                silently replace MoA's attention.
        """
        _refuse_options(options)
        self.routing = None
        prompts = [parse_prompt(text) for text in ([prompt] if isinstance(prompt, str) else prompt)]
        chosen = subjects_of_each(prompts, subjects)
        texts = [parsed.text for parsed in prompts]
        if isinstance(negative_prompt, str):
            negative_prompt = [negative_prompt] * len(texts)
        options |= {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "num_images_per_prompt": num_images_per_prompt,
        }
        if not any(chosen):
            return super().__call__(prompt=texts, negative_prompt=negative_prompt, **options)
        self._check_moa()
        positive, negative = self._encode(texts, negative_prompt, options)
        conditioning = self._conditioning(prompts, chosen, positive, negative, num_images_per_prompt)
        call, recorder = MoACall(conditioning, record=record_routing), RoutingRecorder()
        options["cross_attention_kwargs"] = {**(options.get("cross_attention_kwargs") or {}), "moa": call}
        if record_routing:
            _record_steps(call, recorder, options)
        result = super().__call__(prompt_embeds=positive, negative_prompt_embeds=negative, **options)
        self.routing = recorder.result()
        return result

    def _encode(
        self, texts: list[str], negative: list[str] | None, options: dict[str, Any]
    ) -> tuple[Float[Tensor, "p k d"], Float[Tensor, "p k d"] | None]:
        """C_prior of the prompts and, with guidance, of the negative prompts, exactly as the parent encodes them."""
        guided = options["guidance_scale"] > 1 and self.unet.config.time_cond_proj_dim is None
        scale = (options.get("cross_attention_kwargs") or {}).get("scale")
        device, clip_skip = self._execution_device, options.get("clip_skip")
        encoded = self.encode_prompt(texts, device, 1, guided, negative, lora_scale=scale, clip_skip=clip_skip)
        return encoded[0], encoded[1] if guided else None

    def _conditioning(
        self,
        prompts: Sequence[Prompt],
        subjects: Sequence[Sequence[Subject]],
        positive: Float[Tensor, "p k d"],
        negative: Float[Tensor, "p k d"] | None,
        copies: int,
    ) -> Conditioning:
        """The rows of one denoising batch: with guidance the null rows first, then each prompt `copies` times."""
        slots, size = max(len(row) for row in subjects), self.image_encoder.image_size
        tokens = [tokenize(self.tokenizer, prompt, slots) for prompt in prompts]
        present = torch.stack([row.present for row in tokens]).to(positive.device)
        positions = torch.stack([row.positions for row in tokens]).to(positive.device)
        pixels = torch.zeros(len(prompts), slots, 3, size, size)
        for row, own in enumerate(subjects):
            for slot, subject in enumerate(own):
                pixels[row, slot] = subject_pixels(subject, size, self.subject_background)
        features = self.image_encoder(pixels.to(positive.device, self.image_encoder.dtype), present).to(positive.dtype)
        positive, features, positions, present = (
            repeat(x, "p ... -> (p g) ...", g=copies) for x in (positive, features, positions, present)
        )
        if negative is None:
            return Conditioning(positive, features, positions, present)
        negative = repeat(negative, "p ... -> (p g) ...", g=copies)
        features, positions, present = (torch.cat([torch.zeros_like(x), x]) for x in (features, positions, present))
        return Conditioning(torch.cat([negative, positive]), features, positions, present, prior_rows=len(negative))

    def _check_moa(self) -> None:
        """Subjects need an image encoder and MoA; the U-Net itself checks that no attention layer has lost it."""
        if self.image_encoder is None:
            raise ValueError("the prompt has subjects but this pipeline has no image encoder: give image_encoder=...")
        if not hasattr(self.unet, "moa"):
            raise ValueError("the prompt has subjects but the U-Net has no MoA: give weights=personalized.safetensors")

    # ---------------------------------------------------------------------- what would replace the attention processors
    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Refused: it replaces MoA's attention processors."""
        _refuse("enable_attention_slicing", "scaled-dot-product attention already needs no more memory")

    def enable_xformers_memory_efficient_attention(self, attention_op: Callable[..., Any] | None = None) -> None:
        """Refused: it replaces MoA's attention processors."""
        _refuse("enable_xformers_memory_efficient_attention", "scaled-dot-product attention is as lean")

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Refused for the U-Net: it replaces MoA's attention processors."""
        if unet:
            _refuse("fuse_qkv_projections", "fuse the VAE alone with fuse_qkv_projections(unet=False)")
        super().fuse_qkv_projections(unet=False, vae=vae)

    def load_ip_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: IP-Adapter brings attention processors of its own."""
        _refuse("load_ip_adapter", "use a StableDiffusionPipeline for IP-Adapter")

    def unload_ip_adapter(self) -> None:
        """Refused: it would put plain attention in the place of MoA's."""
        _refuse("unload_ip_adapter", "remove_moa(pipe.unet) takes MoA off")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: diffusers would write MoA's weights into the U-Net's file and drop them when it reads it."""
        _refuse("save_pretrained", "moa-export writes the personalized weights; remove_moa(pipe.unet) frees the prior")


def _refuse(what: str, instead: str) -> NoReturn:
    raise ValueError(f"{what} would replace or lose MoA's attention processors: {instead}")


def _refuse_options(options: dict[str, Any]) -> None:
    for name in ("ip_adapter_image", "ip_adapter_image_embeds"):
        if options.get(name) is not None:
            _refuse(name, "give the picture in subjects=[...]")
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        if options.get(name) is not None:
            raise ValueError(f"{name} cannot be given, for MoA finds the subjects in the text: give prompt=...")


def _record_steps(call: MoACall, recorder: RoutingRecorder, options: dict[str, Any]) -> None:
    """Put a callback into the options that records routing after each step, and then calls the user's own."""
    own = options.get("callback_on_step_end")
    wanted = getattr(own, "tensor_inputs", None) or options.get("callback_on_step_end_tensor_inputs", ["latents"])

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        height, width = tensors["latents"].shape[-2:]
        recorder.add(call.observations(), timestep, (height, width))
        given = {name: tensors[name] for name in wanted}
        return given if own is None else own(pipe, step, timestep, given)

    options["callback_on_step_end"] = after_step
    options["callback_on_step_end_tensor_inputs"] = list(dict.fromkeys(["latents", *wanted]))
