"""The toy benchmark's numbers: who is in the pictures, did the context stay, did the router find the subject.

Where a person is in a generated picture is told by the probe's segmenter, trained on real scenes, never by the router.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from moa_train.data.sources.toyworld import NOUNS, draw_scene
from moa_train.evaluation import metrics
from moa_train.evaluation.gallery import REAL_STREAM, Gallery, ToyProtocol, make_gallery
from moa_train.inference.pipeline import MoAPipeline
from moa_train.inference.regions import dilate
from moa_train.prior.probe import SIZE, Probe, crop_people


@dataclass(frozen=True)
class Seen:
    """What the probe sees in pictures: where people are, who (zeros where nobody is found), and which context."""

    pixels: Float[Tensor, "b 3 h w"]
    people: Bool[Tensor, "b h w"]
    vectors: Float[Tensor, "b i"]
    contexts: Float[Tensor, "b k"]


@dataclass(frozen=True)
class Rows:
    """For each MoA picture (axis b): its person, context and seed, and which other rows it is compared with.

    same: the prior's picture of equal noun, context and seed. other: the prior's of equal noun and context, next seed.
    wrong: another person of the same noun, so that only the photo could tell them apart.
    """

    person: Int[Tensor, " b"]
    context: Int[Tensor, " b"]
    same: Int[Tensor, " b"]
    other: Int[Tensor, " b"]
    wrong: Int[Tensor, " b"]


def look(probe: Probe, pixels: Float[Tensor, "b 3 h w"]) -> Seen:
    """Find the people in each picture, and tell who they are and in which context."""
    people = probe.person(pixels) > 0.5
    found = people.flatten(1).any(dim=1, keepdim=True)
    return Seen(pixels, people, probe.identity(crop_people(pixels, people)) * found, probe.context(pixels))


def compared_rows(gallery: Gallery) -> Rows:
    """Which pictures are compared, as indices into the flattened arrays of a gallery."""
    people, contexts, seeds = gallery.moa.shape
    person, context, seed = (torch.from_numpy(axis.ravel()) for axis in np.indices((people, contexts, seeds)))
    nouns = [NOUNS.index(who.identity.noun) for who in gallery.people]
    after = [[q % people for q in range(p + 1, p + people) if nouns[q % people] == nouns[p]] for p in range(people)]
    first = (torch.tensor(nouns)[person] * contexts + context) * seeds
    return Rows(person, context, first + seed, first + (seed + 1) % seeds, torch.tensor([q[0] for q in after])[person])


def measure(gallery: Gallery, probe: Probe, margin: int) -> dict[str, Any]:
    """The numbers of a gallery: means, their 95 % intervals (bootstrap over people), and of how many pictures."""
    rows = compared_rows(gallery)
    truth = torch.from_numpy(np.stack([who.identity.vector() for who in gallery.people]))
    moa, prior, real = (look(probe, x) for x in (_pixels(gallery.moa), _pixels(gallery.prior), _real_scenes(gallery)))
    place = torch.tensor([probe.contexts.index(context) for context in gallery.contexts])[rows.context]
    values = {
        "identity.moa": metrics.cosine(moa.vectors, truth[rows.person]),
        "identity.prior": metrics.cosine(prior.vectors[rows.same], truth[rows.person]),
        "identity.wrong_subject": metrics.cosine(moa.vectors, truth[rows.wrong]),
        "identity.real": metrics.cosine(real.vectors, truth[rows.person]),
        "context_difference.moa": _difference(moa, prior, torch.arange(len(rows.same)), rows.same, margin),
        "context_difference.other_seed": _difference(prior, prior, rows.same, rows.other, margin),
        "context_accuracy.moa": metrics.correct(moa.contexts, place),
        "context_accuracy.prior": metrics.correct(prior.contexts[rows.same], place),
        "context_accuracy.real": metrics.correct(real.contexts, place),
        "person_found.moa": moa.people.flatten(1).any(dim=1).float(),
        "person_found.prior": prior.people[rows.same].flatten(1).any(dim=1).float(),
        "diversity.moa": _diversity(moa.pixels, gallery),
        "diversity.prior": _diversity(prior.pixels[rows.same], gallery),
    }
    if gallery.routed:
        routing = torch.stack([picture.routing for picture in gallery.moa.flat])
        values["routing_iou"] = metrics.routing_iou(routing, moa.people)
    return _summary(values, rows.person.tolist())


def run_toy(pipe: MoAPipeline, probe: Probe, protocol: ToyProtocol) -> tuple[Gallery, dict[str, Any]]:
    """Generate and measure; `seconds` is the time of both."""
    start = time.perf_counter()
    gallery = make_gallery(pipe, protocol)
    numbers = measure(gallery, probe, protocol.margin)
    seconds = round(time.perf_counter() - start, 1)
    return gallery, {**numbers, "method": pipe.unet.moa.config.name, "protocol": asdict(protocol), "seconds": seconds}


def _pixels(pictures: np.ndarray) -> Float[Tensor, "b 3 h w"]:
    """Generated pictures at the probe's size."""
    images = (picture.image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC) for picture in pictures.flat)
    stack = np.stack([np.asarray(image) for image in images])
    return rearrange(torch.from_numpy(stack), "b h w c -> b c h w") / 255.0


def _real_scenes(gallery: Gallery) -> Float[Tensor, "b 3 h w"]:
    """A real scene for each MoA picture, of the same person in the same context: the ceiling of every measure."""
    drawn = [
        draw_scene(
            np.random.default_rng([REAL_STREAM, p, c, g]), [gallery.people[p].identity], gallery.contexts[c]
        ).image
        for p, c, g in np.ndindex(gallery.moa.shape)
    ]
    return rearrange(torch.from_numpy(np.stack(drawn)), "b h w c -> b c h w") / 255.0


def _difference(
    first: Seen, second: Seen, i: Int[Tensor, " b"], j: Int[Tensor, " b"], margin: int
) -> Float[Tensor, " b"]:
    people = dilate(first.people[i] | second.people[j], margin)
    return metrics.context_difference(first.pixels[i], second.pixels[j], people)


def _diversity(pixels: Float[Tensor, "b 3 h w"], gallery: Gallery) -> Float[Tensor, " b"]:
    """Of each (person, context), given to each of its seeds' rows."""
    seeds = gallery.moa.shape[2]
    spread = metrics.diversity(rearrange(pixels, "(b g) c h w -> b g c h w", g=seeds))
    return spread.repeat_interleave(seeds)


def _summary(values: dict[str, Tensor], people: list[int]) -> dict[str, Any]:
    """Means under nested keys ("identity.moa" -> identity: {moa: ...}), `intervals` under flat ones, and `n`."""
    summary: dict[str, Any] = {}
    for name, each in values.items():
        group, _, leaf = name.rpartition(".")
        (summary.setdefault(group, {}) if group else summary)[leaf] = round(float(each.double().mean()), 5)
    summary["intervals"] = {
        name: [round(bound, 5) for bound in metrics.bootstrap_interval(each.tolist(), people)]
        for name, each in values.items()
    }
    summary["n"] = {"people": len(set(people)), "pictures": len(people)}
    return summary
