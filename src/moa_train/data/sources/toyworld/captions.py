"""What is said about a toy scene: short captions as FFHQ's have them, and detailed ones that name what can be seen."""

from collections.abc import Sequence

import numpy as np

from moa_train.data.sources.toyworld.identities import Identity, attribute_phrases

_PLACES = {
    "at the beach": "the beach",
    "in the forest": "the forest",
    "in the city at night": "the city at night",
    "on a snowy mountain": "a snowy mountain",
    "in the desert": "the desert",
    "in the living room": "the living room",
    "in outer space": "outer space",
    "in the meadow": "the meadow",
}
CONTEXTS: tuple[str, ...] = tuple(_PLACES)
"""The eight places of the toy world, as a caption names them after its people."""

_PREFIXES = ("a photo of ", "a picture of ", "")
_SUBSET_SHARE = 0.25


def describe(identity: Identity, detail: bool) -> str:
    """The noun alone, or with all that can be seen: "man with tan skin, spiky violet hair and violet shirt"."""
    return _with(identity.noun, attribute_phrases(identity) if detail else ())


def _with(noun: str, phrases: Sequence[str]) -> str:
    if not phrases:
        return noun
    *head, last = phrases
    return f"{noun} with {', '.join(head)} and {last}" if head else f"{noun} with {last}"


def scene_caption(
    identities: Sequence[Identity], context: str, detailed: bool, rng: np.random.Generator
) -> tuple[str, list[tuple[int, int]]]:
    """A caption for these people in this place, and where it names each of them.

    Args:
        identities: the people, in the order in which the caption shall name them; none gives "a photo of the beach".
        context: one of `CONTEXTS`.
        detailed: name the attributes: three times in four all of them, else a random part.
        rng: chooses the prefix and the part.

    Returns:
        The caption, and for each person the character offsets (start, end) of its noun: `caption[start:end] == noun`.

    Raises:
        ValueError: if the context is unknown.
    """
    if context not in _PLACES:
        raise ValueError(f"context is {context!r}; expected one of {CONTEXTS}")
    shares = (0.15, 0.3) if detailed and identities else (0.6, 0.8)
    caption = _PREFIXES[int(np.searchsorted(shares, rng.random(), side="right"))]
    if not identities:
        return caption + _PLACES[context], []
    offsets: list[tuple[int, int]] = []
    for index, person in enumerate(identities):
        if index > 0:
            caption += " and "
        repeated = any(person.noun == earlier.noun for earlier in identities[:index])
        caption += "another " if repeated else "a "
        offsets.append((len(caption), len(caption) + len(person.noun)))
        caption += _with(person.noun, _mentioned(person, rng)) if detailed else person.noun
    return f"{caption} {context}", offsets


def _mentioned(identity: Identity, rng: np.random.Generator) -> list[str]:
    """All of a person's phrases or, one time in four, at least one of them, in their order."""
    phrases = attribute_phrases(identity)
    whole = rng.random() >= _SUBSET_SHARE
    kept = rng.permutation(len(phrases))[: 1 + int(rng.random() * len(phrases))]
    return list(phrases) if whole else [phrases[i] for i in sorted(kept)]
