"""Who lives in the toy world: a person is a vector of visible attributes; known exactly, it measures identity."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

NOUNS = ("man", "woman")
SPLITS = ("train", "validation", "test")
SKIN_NAMES = ("pale", "light", "tan", "brown", "dark")
HAIR_STYLES = ("short", "long", "spiky", "bald")
HUE_NAMES = ("red", "orange", "yellow", "green", "cyan", "blue", "violet", "pink")
"""Name k belongs to the hue k / 8: the hue circle is spaced by names, not by HSV angle."""

IDENTITY_DIM = 16
NOUN_PARTS = (0, 14)
"""Entries of an identity's vector that tell the noun: itself, and the beard, which only one noun can have."""

_HAIR_SHARES = (0.3, 0.3, 0.25, 0.15)
_HAT_SHARE = 0.4
_SPLIT_SHARES = (0.8, 0.1, 0.1)
_HUE_JITTER = 0.02
_SKIN_JITTER = 0.05


@dataclass(frozen=True)
class Identity:
    """One person of the toy world.

    Hues lie in [0, 1) on a circle whose k-th eighth is `HUE_NAMES[k]`; `skin` runs from 0 (pale) to 1 (dark) and
    `head_shape` from 0 (round) to 1 (long). A bald person keeps a `hair_hue` and a bareheaded one a `hat_hue`; neither
    is drawn, described or part of the vector.

    Raises:
        ValueError: if an attribute lies outside its domain.
    """

    noun: str
    skin: float
    hair_style: str
    hair_hue: float
    shirt_hue: float
    glasses: bool
    hat: bool
    hat_hue: float
    beard: bool
    head_shape: float

    def __post_init__(self) -> None:
        """Refuse attributes that cannot be drawn."""
        if self.noun not in NOUNS:
            raise ValueError(f"noun is {self.noun!r}; expected one of {NOUNS}")
        if self.hair_style not in HAIR_STYLES:
            raise ValueError(f"hair_style is {self.hair_style!r}; expected one of {HAIR_STYLES}")
        for name in ("skin", "head_shape"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number in [0, 1]")
        for name in ("hair_hue", "shirt_hue", "hat_hue"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number in [0, 1)")
        if self.beard and self.noun != "man":
            raise ValueError(f"a {self.noun} with a beard cannot be drawn; set beard=False or noun='man'")

    def vector(self) -> np.ndarray:
        """The attributes as numbers of about zero mean over the population.

        Scalars are centred; hues are (cos, sin) where they can be seen and zero elsewhere; flags are +-1, the hat's
        shifted and the beard's zero for women; the hair style is a one-hot vector less the styles' shares. The cosine
        between the vectors of two independent people is therefore near zero on average.

        Returns:
            float32, shape (IDENTITY_DIM,).
        """
        style = np.eye(len(HAIR_STYLES))[HAIR_STYLES.index(self.hair_style)] - np.array(_HAIR_SHARES)
        parts = [
            _flag(self.noun == "man"),
            3.0 * (self.skin - 0.5),
            *(1.5 * style),
            *_on_circle(self.hair_hue, self.hair_style != "bald"),
            *_on_circle(self.shirt_hue, True),
            _flag(self.glasses),
            _flag(self.hat) - (2.0 * _HAT_SHARE - 1.0),
            *_on_circle(self.hat_hue, self.hat),
            _flag(self.beard) if self.noun == "man" else 0.0,
            2.0 * (self.head_shape - 0.5),
        ]
        return np.array(parts, dtype=np.float32)


def _flag(value: bool) -> float:
    return 1.0 if value else -1.0


def _on_circle(hue: float, present: bool) -> tuple[float, float]:
    angle = 2.0 * np.pi * hue
    return (1.4 * np.cos(angle), 1.4 * np.sin(angle)) if present else (0.0, 0.0)


def skin_name(skin: float) -> str:
    """The name of a skin tone in [0, 1]."""
    return SKIN_NAMES[min(int(skin * len(SKIN_NAMES)), len(SKIN_NAMES) - 1)]


def hue_name(hue: float) -> str:
    """The name nearest to a hue in [0, 1)."""
    return HUE_NAMES[round(hue * len(HUE_NAMES)) % len(HUE_NAMES)]


def attribute_phrases(identity: Identity) -> tuple[str, ...]:
    """What can be said about a person, one phrase an attribute: ("tan skin", "spiky violet hair", "violet shirt")."""
    bald = identity.hair_style == "bald"
    phrases = [
        f"{skin_name(identity.skin)} skin",
        "bald head" if bald else f"{identity.hair_style} {hue_name(identity.hair_hue)} hair",
    ]
    if identity.beard:
        phrases.append("beard")
    phrases.append(f"{hue_name(identity.shirt_hue)} shirt")
    if identity.glasses:
        phrases.append("glasses")
    if identity.hat:
        phrases.append(f"{hue_name(identity.hat_hue)} hat")
    return tuple(phrases)


def split_of(identity: Identity) -> str:
    """The only split in which a person of this description may appear.

    The split hangs on a hash of the noun and the attribute phrases alone: two people who are described alike share a
    split, whatever seed or number made them. About 80 % of all descriptions are for training, 10 % for each
    other split.
    """
    text = "|".join((identity.noun, *attribute_phrases(identity)))
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2.0**64
    bounds = np.cumsum(_SPLIT_SHARES)
    return SPLITS[min(int(np.searchsorted(bounds, place, side="right")), len(SPLITS) - 1)]


def identity(split: str, number: int, seed: int = 0) -> Identity:
    """The `number`-th person of a split: a pure function of its arguments.

    Args:
        split: one of `SPLITS`; no description occurs in two of them, for any pair of seeds.
        number: which person, from 0 on, without an upper bound.
        seed: which population.

    Raises:
        ValueError: if the split is unknown, or number or seed is negative.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {SPLITS}")
    if number < 0 or seed < 0:
        raise ValueError(f"number is {number} and seed is {seed}; expected both to be 0 or more")
    rng = np.random.default_rng([seed, SPLITS.index(split), number])
    return next(person for person in _population(rng) if split_of(person) == split)


def _population(rng: np.random.Generator) -> Iterator[Identity]:
    """People without end, all attributes independent but the beard, which only men have."""
    while True:
        u = rng.random(12).tolist()
        noun = NOUNS[int(u[0] * len(NOUNS))]
        yield Identity(
            noun=noun,
            skin=(int(u[1] * len(SKIN_NAMES)) + 0.5) / len(SKIN_NAMES) + _SKIN_JITTER * (2.0 * u[2] - 1.0),
            hair_style=HAIR_STYLES[int(np.searchsorted(np.cumsum(_HAIR_SHARES)[:-1], u[3], side="right"))],
            hair_hue=_named_hue(u[4]),
            shirt_hue=_named_hue(u[5]),
            glasses=u[6] < 0.5,
            hat=u[7] < _HAT_SHARE,
            hat_hue=_named_hue(u[8]),
            beard=u[9] < 0.5 and noun == "man",
            head_shape=u[10],
        )


def _named_hue(u: float) -> float:
    """A hue close enough to one of the named ones that its name is beyond doubt; uniform over the names."""
    scaled = u * len(HUE_NAMES)
    jitter = _HUE_JITTER * (2.0 * (scaled - int(scaled)) - 1.0)
    return (int(scaled) / len(HUE_NAMES) + jitter) % 1.0
