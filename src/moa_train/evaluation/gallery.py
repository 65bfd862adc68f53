"""The toy protocol's pictures: people that training never saw, in eight contexts, by MoA and by the prior."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moa_train.data.sources.toyworld import CONTEXTS, NOUNS, SPLITS, Identity, draw_portrait, draw_scene, identity
from moa_train.inference.pictures import generate
from moa_train.inference.pipeline import MoAPipeline

REFERENCE_STREAM, REAL_STREAM = 1, 2
"""First number of the seeds of what the protocol draws itself: reference photos, and real scenes for the ceiling."""


@dataclass(frozen=True)
class ToyProtocol:
    """What is generated.

    people: held-out people, half of each noun (even). split: where from; "validation" to choose settings on, "test" to
    report. contexts: how many of the eight. seeds: of the sampler's noise, the same for everyone.
    reference: the photo of a subject, a "scene" in another place or a "portrait". margin: pixels around people that do
    not count as context. lineup: identities among which the person is sought, those shown and others of the split.
    steps, guidance, batch_size: of the sampler.
    """

    people: int = 12
    contexts: int = 8
    seeds: tuple[int, ...] = (0, 1)
    reference: str = "scene"
    split: str = "test"
    margin: int = 3
    lineup: int = 100
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
    """All pictures of a run, arrays of `Picture`: `moa[p, c, g]` by person, context and seed, `prior[noun, c, g]`."""

    people: tuple[Person, ...]
    contexts: tuple[str, ...]
    moa: np.ndarray
    prior: np.ndarray

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


def make_gallery(pipe: MoAPipeline, protocol: ToyProtocol) -> Gallery:
    """Generate every picture of the protocol; the prior's depend on the noun alone, so they are made once a noun."""
    people, places, seeds = held_out_people(protocol), CONTEXTS[: protocol.contexts], protocol.seeds
    grid = [(place, seed) for place in places for seed in seeds]
    moa = _generate(
        pipe,
        protocol,
        [f"a photo of a {who.identity.noun} <1> {place}" for who in people for place, _ in grid],
        [[(who.photo, who.mask)] for who in people for _ in grid],
        [seed for _ in people for _, seed in grid],
    )
    prior = _generate(
        pipe,
        protocol,
        [f"a photo of a {noun} {place}" for noun in NOUNS for place, _ in grid],
        [[] for _ in NOUNS for _ in grid],
        [seed for _ in NOUNS for _, seed in grid],
    )
    shape = (len(places), len(seeds))
    return Gallery(people, tuple(places), moa.reshape(len(people), *shape), prior.reshape(len(NOUNS), *shape))


def _generate(
    pipe: MoAPipeline, protocol: ToyProtocol, prompts: list[str], subjects: list[list[Any]], seeds: list[int]
) -> np.ndarray:
    pictures = generate(
        pipe,
        prompts,
        subjects,
        seeds,
        protocol.batch_size,
        num_inference_steps=protocol.steps,
        guidance_scale=protocol.guidance,
    )
    array = np.empty(len(prompts), dtype=object)
    for index, picture in enumerate(pictures):
        array[index] = picture
    return array
