"""What MoA adds to any Stable Diffusion pipeline of diffusers: subjects in the prompt, recorded routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from diffusers import UniPCMultistepScheduler
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from moa_train.conditioning.encoders import ImageEncoder
from moa_train.inference.controls import Controls
from moa_train.inference.folder import read_own_parts, save_pipeline
from moa_train.inference.guards import KeepsAttention, refuse_options
from moa_train.inference.routing import Routing, RoutingRecorder
from moa_train.inference.steps import AfterStep, slot_owners
from moa_train.inference.subjects import Subject, Views, subject_pixels, subjects_of_each
from moa_train.inference.weights import load_personalized_prior
from moa_train.model.attention import MoACall
from moa_train.model.unet import MoAConfig, attention_layers
from moa_train.prompts import Prompt, parse_prompt, tokenize
from moa_train.symbols import Conditioning

_Pipe = TypeVar("_Pipe", bound="SubjectPipeline")


class SubjectPipeline(KeepsAttention):
    """Mixin before a diffusers pipeline: `class MoAPipeline(SubjectPipeline, StableDiffusionPipeline)`.

    Attributes:
        routing: the routing maps of the last call; None if its prompt had no subject or they were not recorded.
        subject_background: what replaces the background of a subject's photo, "noise" or "grey", as in training.
        provenance: metadata of the personalized weights; empty if they came from no file.
        prior_identity: name and hashes of the prior (`Prior.identity`); empty unless `from_pretrained` has loaded it.
    """

    routing: Routing | None = None
    subject_background: str = "noise"
    prior_identity: Mapping[str, str] = MappingProxyType({})
    provenance: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def from_pretrained(
        cls: type[_Pipe],
        prior: str | Path,
        weights: str | Path | None = None,
        torch_dtype: torch.dtype = torch.float32,
        image_encoder: ImageEncoder | None = None,
        **parts: Any,
    ) -> _Pipe:
        """Load a prior and put personalized weights on it; the scheduler is UniPC, made from the prior's own.

        Args:
            prior: "toy", a folder in the Stable Diffusion format, or a hub id; or a folder of `save_pretrained`, whose
                weights, image encoder and scheduler are then taken, too, where no weights are given.
            weights: `personalized.safetensors`, as `moa-export` writes it; "toy": the file that ships with this
                package, trained on the toy prior; None: the prior alone.
            torch_dtype: of all weights.
            image_encoder: used instead of the one of the training.
            parts: further parts that the class takes, such as `controlnet`.

        Raises:
            ValueError: weights of another architecture, a damaged file, an unknown prior.
        """
        own = read_own_parts(Path(prior)) if weights is None else {}
        encoder = image_encoder or own.get("image_encoder")
        loaded, provenance = load_personalized_prior(prior, own.get("weights", weights), encoder)
        # Both values are what the parent would set, with a deprecation warning each.
        settings = {**loaded.scheduler.config, "steps_offset": 1, "clip_sample": False}
        pipe = cls(
            vae=loaded.vae,
            text_encoder=loaded.text_encoder,
            tokenizer=loaded.tokenizer,
            unet=loaded.unet,
            scheduler=own.get("scheduler") or UniPCMultistepScheduler.from_config(settings),
            image_encoder=loaded.image_encoder,
            **parts,
        )
        pipe.provenance, pipe.prior_identity = provenance, loaded.identity
        background = provenance.get("config", {}).get("data", {}).get("background", pipe.subject_background)
        pipe.subject_background = background
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                nn.Module.to(part.eval().requires_grad_(False), dtype=torch_dtype)
        return pipe

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write a folder that `from_pretrained` reads, bit for bit, and in which diffusers finds the plain prior.

        Args:
            save_directory: gets unet/, vae/ ... as diffusers writes them, image_encoder/ and personalized.safetensors;
                what is no part of Stable Diffusion, such as a ControlNet, is not written.

        Raises:
            ValueError: a LoRA on the prior, offloaded weights, any of diffusers' options.
        """
        if options:
            raise ValueError(f"save_pretrained takes a folder alone, not {', '.join(options)}; moa-export has hub=")
        save_pipeline(self, Path(save_directory))

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
        subject_strength: float | int | Mapping[str, float | int] = 1.0,
        routing_override: Any = None,
        subject_start: float | int = 0.0,
        regions: Sequence[Any] | None = None,
        separate_subjects: bool = False,
        **options: Any,
    ) -> Any:
        """Make pictures.

        Args:
            prompt: marks each subject behind its nouns: "a photo of a man <1> and a woman <2>"; a marker may come
                again behind another noun of the same subject. Of several prompts, all or none have markers.
            subjects: what the markers stand for, `<1>` the first: photos or their paths (an alpha channel is the mask;
                without one the person is found), pairs (photo, mask), cut-out tensors, `Views([photo, photo])` for
                several pictures of one subject, or image features (vectors, as `subject_features` gives them).
                One list serves every prompt; a list of lists gives each prompt its own.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance above 1; its unconditional half sees the prior alone.
            negative_prompt: what to guide away from; one for all prompts, or one each.
            num_images_per_prompt: pictures of each prompt, one after the other.
            record_routing: keep the routing maps in `routing`.
            subject_strength, routing_override, subject_start, regions, separate_subjects: see `Controls`; without
                effect on prompts without a marker.
            options: all else that the diffusers pipeline takes (generator, latents, height, width, output_type ...).

        Raises:
            ValueError: markers and subjects that do not match, a subject that cannot be read, options that would
                silently replace MoA's attention.
        """
        refuse_options(options)
        self.routing = None
        controls = Controls(subject_strength, routing_override, subject_start, regions, separate_subjects)
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
        control = controls.bind(prompts, num_images_per_prompt, attention_layers(self.unet))
        method = self.unet.moa.config
        routed = isinstance(method, MoAConfig) and method.cross_attention
        if (control is not None or separate_subjects) and not routed:
            where = " in its cross-attention" if isinstance(method, MoAConfig) else ""
            raise ValueError(
                f"these weights are of {method.name}, which has no router{where}: only subject_start controls it"
            )
        owners = slot_owners([one.owners for one in prompts], num_images_per_prompt) if separate_subjects else None
        call = MoACall(conditioning, record=record_routing or owners is not None, control=control)
        recorder = RoutingRecorder() if record_routing else None
        AfterStep(call, subject_start, owners, recorder, options)
        options["cross_attention_kwargs"] = {**(options.get("cross_attention_kwargs") or {}), "moa": call}
        result = super().__call__(prompt_embeds=positive, negative_prompt_embeds=negative, **options)
        self.routing = None if recorder is None else recorder.result()
        return result

    @torch.no_grad()
    def subject_features(self, subjects: Sequence[Subject]) -> Float[Tensor, "s f"]:
        """The image feature f of each subject, in the order given; `subjects` takes features in place of pictures.

        Each picture is encoded by itself, so that its feature does not depend on its neighbours.

        Raises:
            ValueError: a subject that cannot be read, a feature of another width or with values that are not finite.
        """
        return torch.stack([self._feature(subject) for subject in subjects])

    def _feature(self, subject: Subject) -> Float[Tensor, " f"]:
        encoder, device = self.image_encoder, self._execution_device
        if isinstance(subject, Views):
            return self.subject_features(subject.pictures).mean(dim=0)
        if isinstance(subject, Tensor) and subject.ndim == 1:
            if len(subject) != encoder.dim or not subject.isfinite().all():
                raise ValueError(
                    f"an image feature has {len(subject)} values; this image encoder gives {encoder.dim} finite ones: "
                    "make features with pipe.subject_features([photo])"
                )
            return subject.to(device, encoder.dtype)
        pixels = subject_pixels(subject, encoder.image_size, self.subject_background)
        present = torch.ones(1, 1, dtype=torch.bool, device=device)
        return encoder(pixels[None, None].to(device, encoder.dtype), present)[0, 0]

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
        slots = max(len(prompt.owners) for prompt in prompts)
        tokens = [tokenize(self.tokenizer, prompt, slots) for prompt in prompts]
        present = torch.stack([row.present for row in tokens]).to(positive.device)
        positions = torch.stack([row.positions for row in tokens]).to(positive.device)
        features = positive.new_zeros(len(prompts), slots, self.image_encoder.dim)
        encoded: dict[int, Tensor] = {}  # each once, though one list serves many prompts
        for row, (prompt, own) in enumerate(zip(prompts, subjects, strict=True)):
            for slot, owner in enumerate(prompt.owners):
                if id(own[owner]) not in encoded:
                    encoded[id(own[owner])] = self._feature(own[owner])
                features[row, slot] = encoded[id(own[owner])]
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
