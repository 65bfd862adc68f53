"""The toy protocol's pictures: people that training never saw, in eight contexts, by MoA and by the prior."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moa_train.data.sources.toyworld import CONTEXTS, NOUNS, SPLITS, Identity, draw_portrait, draw_scene, identity
from moa_train.inference.pictures import generate
from moa_train.inference.pipeline import MoAPipeline

REFERENCE_STREAM, REAL_STREAM, FLOOR_STREAM, PAIR_STREAM = 1, 2, 3, 4
"""First number of the seeds of what the protocol draws itself: reference photos, real scenes for the ceiling, the same
again to compare real with real, and real scenes of two people."""


@dataclass(frozen=True)
class ToyProtocol:
    """What is generated.

    people: held-out people, half of each noun (even). split: where from; "validation" to choose settings on, "test" to
    report. contexts: how many of the eight. seeds: of the sampler's noise, the same for everyone.
    reference: the photo of a subject, a "scene" in another place or a "portrait". margin: pixels around people that do
    not count as context. lineup: identities among which the person is sought, those shown and others of the split.
    pairs: of a man and a woman who are drawn together, in each context from the first seed; 0: none.
    separate_subjects: keep the two of a pair apart (`moa_train.inference.controls`).
    steps, guidance, batch_size: of the sampler.
    """

    people: int = 12
    contexts: int = 8
    seeds: tuple[int, ...] = (0, 1)
    reference: str = "scene"
    split: str = "test"
    margin: int = 3
    lineup: int = 100
    pairs: int = 4
    separate_subjects: bool = False
    steps: int = 25
    guidance: float = 3.0
    batch_size: int = 16

    def __post_init__(self) -> None:
        """Refuse what gives no comparison."""
        if self.people < 4 or self.people % 2:
            raise ValueError(
                f"people is {self.people}; expected 4, 6, 8 ...: each is compared with another of its noun"
            )
        if self.lineup < max(self.people, 6):
            raise ValueError(
                f"lineup is {self.lineup}; expected at least {max(self.people, 6)}: the {self.people} people shown are "
                "sought in it, and rank 5 needs more than five"
            )
        if not 0 <= self.pairs <= (self.people // 2) ** 2:
            raise ValueError(
                f"pairs is {self.pairs}; expected 0 to {(self.people // 2) ** 2}: so many are there of "
                f"{self.people // 2} men and {self.people // 2} women"
            )
        if not 1 <= self.contexts <= len(CONTEXTS):
            raise ValueError(f"contexts is {self.contexts}; expected 1 to {len(CONTEXTS)}")
        if len(set(self.seeds)) < 2 or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds is {list(self.seeds)}; expected two or more, all different: they give the scale")
        if self.split not in SPLITS[1:]:
            raise ValueError(f"split is {self.split}; expected validation or test: training saw the others")
        if self.reference not in ("scene", "portrait"):
            raise ValueError(f"reference is {self.reference}; expected scene or portrait")


@dataclass(frozen=True)
class Person:
    """A held-out person with the one photo of it that MoA is given (uint8 h w 3) and its exact mask (bool h w)."""

    identity: Identity
    photo: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Gallery:
    """All pictures of a run, arrays of `Picture`: `moa[p, c, g]` by person, context and seed, `prior[noun, c, g]`.

    pairs: `pairs[k, c]` with the two people of `couples`; None without them.
    seconds: that each picture took (its share of its batch), by the arrays' names; NaN in a first batch that others
    follow, for it warms up.
    """

    people: tuple[Person, ...]
    contexts: tuple[str, ...]
    moa: np.ndarray
    prior: np.ndarray
    pairs: np.ndarray | None = None
    seconds: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def routed(self) -> bool:
        """Whether the pictures have routing maps: a baseline has no router."""
        return self.moa.flat[0].steps is not None


def held_out_people(protocol: ToyProtocol) -> tuple[Person, ...]:
    """The first people of the split of each noun, men before women, each with its reference photo."""
    chosen: list[Person] = []
    for noun in NOUNS:
        number = found = 0
        while found < protocol.people // len(NOUNS):
            who = identity(protocol.split, number)
            if who.noun == noun:
                chosen.append(_with_photo(who, protocol.reference, number))
                found += 1
            number += 1
    return tuple(chosen)


def lineup(people: tuple[Person, ...], protocol: ToyProtocol) -> Float[Tensor, "n i"]:
    """Identity vectors of the people shown, in their order, and of the split's first others: `protocol.lineup` rows."""
    shown = [who.identity for who in people]
    others = (who for who in (identity(protocol.split, number) for number in count()) if who not in shown)
    vectors = [who.vector() for who in [*shown, *islice(others, protocol.lineup - len(shown))]]
    return torch.from_numpy(np.stack(vectors))


def _with_photo(who: Identity, reference: str, number: int) -> Person:
    rng = np.random.default_rng([REFERENCE_STREAM, number])
    if reference == "portrait":
        photo, mask = draw_portrait(rng, who)
        return Person(who, photo, mask > 0)
    scene = draw_scene(rng, [who])
    return Person(who, scene.image, scene.labels > 0)


def couples(people: int, pairs: int) -> list[tuple[int, int]]:
    """The first pairs of a man and a woman as their numbers, in the order of the markers; each second one woman first.

    Everyone has a turn before anyone has a second one.
    """
    half = people // 2
    mixed = [(k % half, half + (k + k // half) % half) for k in range(pairs)]
    return [(man, woman) if k % 2 == 0 else (woman, man) for k, (man, woman) in enumerate(mixed)]


def make_gallery(pipe: MoAPipeline, protocol: ToyProtocol, prior: MoAPipeline) -> Gallery:
    """Generate every picture of the protocol; the prior's depend on the noun alone, so they are made once a noun.

    Args:
        prior: draws the prior's pictures: `pipe` itself, unless its method has changed the prior's own weights.
    """
    people, places, seeds = held_out_people(protocol), CONTEXTS[: protocol.contexts], protocol.seeds
    grid = [(place, seed) for place in places for seed in seeds]
    draw, shape = _Drawing(pipe, protocol), (len(places), len(seeds))
    moa = draw(
        "moa",
        [f"a photo of a {who.identity.noun} <1> {place}" for who in people for place, _ in grid],
        [[(who.photo, who.mask)] for who in people for _ in grid],
        [seed for _ in people for _, seed in grid],
    ).reshape(len(people), *shape)
    alone = draw(
        "prior",
        [f"a photo of a {noun} {place}" for noun in NOUNS for place, _ in grid],
        [[] for _ in NOUNS for _ in grid],
        [seed for _ in NOUNS for _, seed in grid],
        prior,
    ).reshape(len(NOUNS), *shape)
    pairs = _together(draw, people, places, protocol) if protocol.pairs else None
    return Gallery(people, tuple(places), moa, alone, pairs, draw.seconds)


def _together(draw: _Drawing, people: tuple[Person, ...], places: tuple[str, ...], protocol: ToyProtocol) -> np.ndarray:
    """The pictures of two people, `[k, c]`."""
    mixed = [(people[first], people[second]) for first, second in couples(len(people), protocol.pairs)]
    return draw(
        "pairs",
        [
            f"a photo of a {a.identity.noun} <1> and a {b.identity.noun} <2> {place}"
            for a, b in mixed
            for place in places
        ],
        [[(a.photo, a.mask), (b.photo, b.mask)] for a, b in mixed for _ in places],
        [protocol.seeds[0]] * (len(mixed) * len(places)),
        separate=protocol.separate_subjects,
    ).reshape(len(mixed), len(places))


class _Drawing:
    """Generates pictures with the protocol's sampler and notes how long each took."""

    def __init__(self, pipe: MoAPipeline, protocol: ToyProtocol) -> None:
        self.pipe, self.protocol = pipe, protocol
        self.seconds: dict[str, np.ndarray] = {}

    def __call__(
        self,
        name: str,
        prompts: list[str],
        subjects: list[list[Any]],
        seeds: list[int],
        pipe: MoAPipeline | None = None,
        separate: bool = False,
    ) -> np.ndarray:
        pipe = pipe or self.pipe
        array, seconds = np.empty(len(prompts), dtype=object), np.empty(len(prompts))
        size, options = self.protocol.batch_size, self._options(separate)
        for start in range(0, len(prompts), size):
            batch, begin = slice(start, start + size), time.perf_counter()
            pictures = list(generate(pipe, prompts[batch], subjects[batch], seeds[batch], size, **options))
            seconds[batch] = (time.perf_counter() - begin) / len(pictures)
            for index, picture in enumerate(pictures, start):
                array[index] = picture
        if len(prompts) > size:
            seconds[:size] = np.nan
        self.seconds[name] = seconds
        return array

    def _options(self, separate: bool) -> dict[str, Any]:
        control = {"separate_subjects": True} if separate else {}
        return control | {"num_inference_steps": self.protocol.steps, "guidance_scale": self.protocol.guidance}
