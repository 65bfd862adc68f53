"""Does a ControlNet lead the drawing? Edges of pictures against the edges that they were to follow, held-out scenes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from moa_train.data.sources.toyworld import CONTEXTS
from moa_train.inference.pictures import contact_sheet
from moa_train.inference.pipeline import MoAControlNetPipeline
from moa_train.prior.controlnet import edge_agreement, edge_map
from moa_train.prior.pretrain.scenes import SceneSet, draw_scene_set


@dataclass(frozen=True)
class ControlProtocol:
    """What is drawn. scenes: how many scenes of one held-out person. scale: of the ControlNet. batch_size: pictures."""

    scenes: int = 16
    steps: int = 15
    guidance: float = 3.0
    scale: float = 1.0
    tolerance: int = 1
    batch_size: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Drawn:
    """Pictures of one setting, one a scene, and the edges that they were to follow."""

    pictures: list[Image.Image]
    edges: list[UInt8[np.ndarray, "h w"]]

    def agreement(self, tolerance: int, shift: int = 0) -> dict[str, float]:
        """Mean precision, recall and F1; with `shift`, against the edges of a scene so many places further on."""
        edges = [*self.edges[shift:], *self.edges[:shift]]
        rows = [
            edge_agreement(edge_map(np.asarray(picture.convert("RGB"))), control, tolerance)
            for picture, control in zip(self.pictures, edges, strict=True)
        ]
        return {name: float(np.mean([getattr(row, name) for row in rows])) for name in ("precision", "recall", "f1")}


def measure_control(pipe: MoAControlNetPipeline, protocol: ControlProtocol) -> tuple[dict[str, Any], Image.Image]:
    """Draw the same prompts and noise with and without control, without and with a subject.

    Scene i gives edges and context; the subject is the person of scene i + 1, so the outline is somebody else's.

    Returns:
        The figures (`prior` and, of a pipeline with MoA, `moa`: `controlled`, `uncontrolled`, and `other_edges`, the
        controlled pictures against the edges of another scene) and a sheet of the first eight scenes.
    """
    scenes = _scenes_of_one(pipe, protocol)
    edges = [edge_map(image) for image in scenes.images]
    figures: dict[str, Any] = {"protocol": protocol.__dict__}
    rows = [[Image.fromarray(image) for image in scenes.images], [Image.fromarray(each) for each in edges]]
    for name in ("prior", "moa") if hasattr(pipe.unet, "moa") else ("prior",):
        drawn = {
            scale: Drawn(_draw(pipe, scenes, edges, protocol, scale, name == "moa"), edges)
            for scale in (0.0, protocol.scale)
        }
        controlled = drawn[protocol.scale]
        figures[name] = {
            "controlled": controlled.agreement(protocol.tolerance),
            "uncontrolled": drawn[0.0].agreement(protocol.tolerance),
            "other_edges": controlled.agreement(protocol.tolerance, shift=1),
        }
        rows += [drawn[0.0].pictures, controlled.pictures]
    if len(rows) > 4:
        portraits = [Image.fromarray(picture) for picture in scenes.portraits]
        rows.insert(4, [*portraits[1:], portraits[0]])
    return figures, contact_sheet([row[:8] for row in rows], side=96)


def _scenes_of_one(pipe: MoAControlNetPipeline, protocol: ControlProtocol) -> SceneSet:
    """The first scenes of the held-out people that show exactly one person."""
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    drawn = draw_scene_set("validation", 3 * protocol.scenes + 8, size, protocol.seed)
    chosen = [row for row, people in enumerate(drawn.people) if len(people) == 1][: protocol.scenes]
    return SceneSet(
        images=drawn.images[chosen],
        labels=drawn.labels[chosen],
        captions=[drawn.captions[row] for row in chosen],
        contexts=drawn.contexts[chosen],
        people=[drawn.people[row] for row in chosen],
        portraits=drawn.portraits[chosen],
        portrait_masks=drawn.portrait_masks[chosen],
        portrait_people=[drawn.portrait_people[row] for row in chosen],
    )


def _draw(
    pipe: MoAControlNetPipeline,
    scenes: SceneSet,
    edges: list[UInt8[np.ndarray, "h w"]],
    protocol: ControlProtocol,
    scale: float,
    with_subject: bool,
) -> list[Image.Image]:
    """One picture a scene, of the next scene's person in this scene's place; noise by the scene's number."""
    count = len(scenes)
    pictures: list[Image.Image] = []
    for start in range(0, count, protocol.batch_size):
        numbers = range(start, min(start + protocol.batch_size, count))
        whose = [(number + 1) % count for number in numbers]
        mark = " <1>" if with_subject else ""
        prompts = [
            f"a photo of a {scenes.people[who][0].noun}{mark} {CONTEXTS[scenes.contexts[number]]}"
            for number, who in zip(numbers, whose, strict=True)
        ]
        subjects = [[(scenes.portraits[who], scenes.portrait_masks[who])] for who in whose] if with_subject else []
        pictures += pipe(
            prompts,
            subjects,
            image=[Image.fromarray(edges[number]).convert("RGB") for number in numbers],
            controlnet_conditioning_scale=scale,
            num_inference_steps=protocol.steps,
            guidance_scale=protocol.guidance,
            generator=[torch.Generator().manual_seed(number) for number in numbers],
            record_routing=False,
        ).images
    return pictures
