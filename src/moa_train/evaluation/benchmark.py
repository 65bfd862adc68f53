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
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from moa_train.data.sources.toyworld import NOUNS, draw_scene
from moa_train.evaluation import metrics
from moa_train.evaluation.gallery import REAL_STREAM, Gallery, ToyProtocol, lineup, make_gallery
from moa_train.evaluation.seen import Seen, context_measures, look
from moa_train.inference.pipeline import MoAPipeline
from moa_train.prior.probe import SIZE, Probe


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


def measure(gallery: Gallery, probe: Probe, protocol: ToyProtocol) -> dict[str, Any]:
    """The numbers of a gallery: means, their 95 % intervals (bootstrap over people), and of how many pictures."""
    rows = compared_rows(gallery)
    moa, prior, real = (look(probe, x) for x in (_pixels(gallery.moa), _pixels(gallery.prior), _real_scenes(gallery)))
    place = torch.tensor([probe.contexts.index(context) for context in gallery.contexts])[rows.context]
    values = {
        **_identity(rows, moa, prior, real, lineup(gallery.people, protocol)),
        **_context(rows, moa, prior, probe, protocol.margin),
        "context_accuracy.moa": metrics.correct(moa.contexts, place),
        "context_accuracy.prior": metrics.correct(prior.contexts[rows.same], place),
        "context_accuracy.real": metrics.correct(real.contexts, place),
        "person_found.moa": moa.found.float(),
        "person_found.prior": prior.found[rows.same].float(),
        **_diversity(rows, moa, prior, real, gallery),
    }
    if gallery.routed:
        routing = torch.stack([picture.routing for picture in gallery.moa.flat])
        values["routing_iou"] = metrics.routing_iou(routing, moa.people)
    return summarise(values, rows.person.tolist())


def run_toy(pipe: MoAPipeline, probe: Probe, protocol: ToyProtocol) -> tuple[Gallery, dict[str, Any]]:
    """Generate and measure; `seconds` is the time of both."""
    start = time.perf_counter()
    gallery = make_gallery(pipe, protocol)
    numbers = measure(gallery, probe, protocol)
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


def summarise(values: dict[str, Tensor], people: list[int]) -> dict[str, Any]:
    """Means under nested keys ("identity.moa" -> identity: {moa: ...}), `intervals` under flat ones, and `n`.

    Rows that are NaN were not measured (no person was found) and do not count; what no row has measured is left out.
    """
    summary: dict[str, Any] = {}
    intervals: dict[str, list[float]] = {}
    for name, each in values.items():
        measured = ~each.isnan()
        if not measured.any():
            continue
        group, _, leaf = name.rpartition(".")
        (summary.setdefault(group, {}) if group else summary)[leaf] = round(float(each[measured].double().mean()), 5)
        groups = [person for person, has in zip(people, measured.tolist(), strict=True) if has]
        intervals[name] = [round(bound, 5) for bound in metrics.bootstrap_interval(each[measured].tolist(), groups)]
    n = {"people": len(set(people)), "pictures": len(people)}
    return {**summary, "intervals": intervals, "n": n}
