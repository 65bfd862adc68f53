"""The toy benchmark's numbers: who is in the pictures, did the context stay, did the router find the subject.

Where a person is in a generated picture is told by the probe's segmenter, trained on real scenes, never by the router.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from moa_train.data.sources.toyworld import NOUNS, draw_scene
from moa_train.evaluation import metrics
from moa_train.evaluation.clip_score import ClipScore
from moa_train.evaluation.cost import forget_peak, measure_seconds, peak_memory
from moa_train.evaluation.gallery import FLOOR_STREAM, REAL_STREAM, Gallery, ToyProtocol, lineup, make_gallery
from moa_train.evaluation.pairs import measure_pairs
from moa_train.evaluation.quality import measure_quality
from moa_train.evaluation.seen import Seen, context_measures, look, pixels_in, pixels_of, scene_vectors
from moa_train.evaluation.summary import counted, joined
from moa_train.inference.pipeline import MoAPipeline
from moa_train.prior.probe import Probe


@dataclass(frozen=True)
class Rows:
    """For each MoA picture (axis b): its person, context and seed, and which other rows it is compared with.

    same: the prior's picture of equal noun, context and seed. other: the prior's of equal noun and context, next seed.
    wrong: another person of the same noun, so that only the photo could tell them apart; swapped: the MoA picture of
    that person in equal context and seed.
    """

    person: Int[Tensor, " b"]
    context: Int[Tensor, " b"]
    same: Int[Tensor, " b"]
    other: Int[Tensor, " b"]
    wrong: Int[Tensor, " b"]
    swapped: Int[Tensor, " b"]


def compared_rows(gallery: Gallery) -> Rows:
    """Which pictures are compared, as indices into the flattened arrays of a gallery."""
    people, contexts, seeds = gallery.moa.shape
    person, context, seed = (torch.from_numpy(axis.ravel()) for axis in np.indices((people, contexts, seeds)))
    nouns = [NOUNS.index(who.identity.noun) for who in gallery.people]
    after = [[q % people for q in range(p + 1, p + people) if nouns[q % people] == nouns[p]] for p in range(people)]
    first = (torch.tensor(nouns)[person] * contexts + context) * seeds
    wrong = torch.tensor([q[0] for q in after])[person]
    swapped = (wrong * contexts + context) * seeds + seed
    return Rows(person, context, first + seed, first + (seed + 1) % seeds, wrong, swapped)


def measure(gallery: Gallery, probe: Probe, clip: ClipScore, protocol: ToyProtocol) -> dict[str, Any]:
    """The numbers of a gallery: means, their 95 % intervals (bootstrap over people), and of how many pictures."""
    rows = compared_rows(gallery)
    scenes = _real_scenes(gallery, REAL_STREAM)
    moa, prior, real = (
        look(probe, pixels) for pixels in (pixels_of(gallery.moa), pixels_of(gallery.prior), pixels_in(scenes))
    )
    place = torch.tensor([probe.contexts.index(context) for context in gallery.contexts])[rows.context]
    values = {
        **_identity(rows, moa, prior, real, lineup(gallery.people, protocol)),
        **_context(rows, moa, prior, probe, protocol.margin),
        "context_accuracy.moa": metrics.correct(moa.contexts, place),
        "context_accuracy.prior": metrics.correct(prior.contexts[rows.same], place),
        "context_accuracy.real": metrics.correct(real.contexts, place),
        **_prompt(rows, clip, gallery, scenes),
        "person_found.moa": moa.found.float(),
        "person_found.prior": prior.found[rows.same].float(),
        **_diversity(rows, moa, prior, real, gallery),
    }
    if gallery.routed:
        routing = torch.stack([picture.routing for picture in gallery.moa.flat])
        values["routing_iou"] = metrics.routing_iou(routing, moa.people)
    again = pixels_in(_real_scenes(gallery, FLOOR_STREAM))
    features = [scene_vectors(probe, pixels) for pixels in (moa.pixels, real.pixels, again)]
    return joined(
        counted(values, rows.person.tolist()),
        measure_quality(features[0], features[1], features[2], rows.person),
        measure_seconds(gallery, protocol.batch_size),
        {} if gallery.pairs is None else measure_pairs(gallery, probe),
    )


def run_toy(
    pipe: MoAPipeline, probe: Probe, clip: ClipScore, protocol: ToyProtocol, prior: MoAPipeline
) -> tuple[Gallery, dict[str, Any]]:
    """Generate (`prior`: see `make_gallery`) and measure; `seconds` is the time of both."""
    start = time.perf_counter()
    forget_peak(pipe.device)
    gallery = make_gallery(pipe, protocol, prior)
    memory = peak_memory(pipe.device)
    numbers = measure(gallery, probe, clip, protocol)
    seconds = round(time.perf_counter() - start, 1)
    return gallery, {
        **numbers,
        "method": pipe.unet.moa.config.name,
        "clip": clip.name,
        "protocol": asdict(protocol),
        "seconds": seconds,
        "memory": memory,
    }


def _real_scenes(gallery: Gallery, stream: int) -> list[np.ndarray]:
    """A real scene for each MoA picture, of the same person in the same context: the ceiling of every measure."""
    return [
        draw_scene(np.random.default_rng([stream, p, c, g]), [gallery.people[p].identity], gallery.contexts[c]).image
        for p, c, g in np.ndindex(gallery.moa.shape)
    ]


def _identity(
    rows: Rows, moa: Seen, prior: Seen, real: Seen, known: Float[Tensor, "n i"]
) -> dict[str, Float[Tensor, " b"]]:
    """Cosines with the true vectors, and whether the true person is the first, or one of five, among all `known`."""
    values = {
        "identity.moa": metrics.cosine(moa.vectors, known[rows.person]),
        "identity.prior": metrics.cosine(prior.vectors[rows.same], known[rows.person]),
        "identity.wrong_subject": metrics.cosine(moa.vectors, known[rows.wrong]),
        "identity.real": metrics.cosine(real.vectors, known[rows.person]),
    }
    vectors = {"moa": moa.vectors, "prior": prior.vectors[rows.same], "real": real.vectors}
    ranks = {name: metrics.rank(each, known, rows.person) for name, each in vectors.items()}
    for k in (1, 5):
        values |= {f"rank{k}.{name}": (rank <= k).float() for name, rank in ranks.items()}
        values[f"rank{k}.chance"] = torch.full(rows.person.shape, k / len(known))
    return values


def _context(rows: Rows, moa: Seen, prior: Seen, probe: Probe, margin: int) -> dict[str, Float[Tensor, " b"]]:
    """Three measures outside people: against the prior, against another subject, and two of the prior for scale."""
    own = torch.arange(len(rows.same))
    compared = {
        "moa": (moa, prior, own, rows.same),
        "other_subject": (moa, moa, own, rows.swapped),
        "other_seed": (prior, prior, rows.same, rows.other),
    }
    return {
        f"{measure}.{name}": each
        for name, (first, second, i, j) in compared.items()
        for measure, each in context_measures(probe, first, second, i, j, margin).items()
    }


def _prompt(
    rows: Rows, clip: ClipScore, gallery: Gallery, scenes: Sequence[np.ndarray]
) -> dict[str, Float[Tensor, " b"]]:
    """CLIP's cosine of each picture and its prompt; of MoA's, also with the prompt of the next place."""
    nouns = [gallery.people[person].identity.noun for person in rows.person.tolist()]
    places, drawn = [gallery.contexts[place] for place in rows.context.tolist()], _images(gallery.moa)
    prompts = [f"a photo of a {noun} {place}" for noun, place in zip(nouns, places, strict=True)]
    alone = [_images(gallery.prior)[row] for row in rows.same.tolist()]
    values = {
        "clip_score.moa": clip(drawn, prompts),
        "clip_score.prior": clip(alone, prompts),
        "clip_score.real": clip([Image.fromarray(scene) for scene in scenes], prompts),
    }
    if len(gallery.contexts) > 1:
        after = dict(zip(gallery.contexts, (*gallery.contexts[1:], gallery.contexts[0]), strict=True))
        others = [f"a photo of a {noun} {after[place]}" for noun, place in zip(nouns, places, strict=True)]
        values["clip_score.other_place"] = clip(drawn, others)
    return values


def _images(pictures: np.ndarray) -> list[Image.Image]:
    return [picture.image for picture in pictures.flat]


def _diversity(rows: Rows, moa: Seen, prior: Seen, real: Seen, gallery: Gallery) -> dict[str, Float[Tensor, " b"]]:
    """What differs between the seeds of a (person, context), given to each of its rows: pixels, place and size."""
    seeds = gallery.moa.shape[2]
    values: dict[str, Tensor] = {}
    pixels = {"moa": moa.pixels, "prior": prior.pixels[rows.same]}
    for name, each in pixels.items():
        grouped = metrics.diversity(rearrange(each, "(b g) c h w -> b g c h w", g=seeds))
        values[f"diversity.{name}"] = grouped.repeat_interleave(seeds)
    people = {"moa": moa.people, "prior": prior.people[rows.same], "real": real.people}
    for name, found in people.items():
        for measure, each in zip(("position", "size"), metrics.centre_and_size(found), strict=True):
            grouped = metrics.spread(rearrange(each, "(b g) d -> b g d", g=seeds))
            values[f"{measure}_spread.{name}"] = grouped.repeat_interleave(seeds)
    return values
