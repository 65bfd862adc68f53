"""The toy world as samples: scenes of one or two people of a split, with everything that is known about them."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from moa_train.data.schema import Sample, Segment
from moa_train.data.sources.toyworld import CONTEXTS, SPLITS, draw_scene, identity

_SCENES = 1
"""Stream of random numbers: scenes, apart from the world's people."""


@dataclass(frozen=True)
class ToyScenes:
    """Scene `number` is a function of these settings and the number alone.

    Args:
        split: train, validation or test; no person lives in two of them.
        count: scenes.
        people: how many different people the split has.
        subjects: fewest and most people in a scene, at most 2.
        empty: fraction of scenes without people.
        detailed: fraction of captions that describe the people's looks.
        size: side of a picture, pixels.
        contexts: places that occur; None for all.
        seed: of scenes and people.

    Raises:
        ValueError: a value outside its domain.
    """

    split: str
    count: int
    people: int
    subjects: tuple[int, int] = (1, 2)
    empty: float = 0.0
    detailed: float = 0.0
    size: int = 64
    seed: int = 0
    contexts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        low, high = self.subjects
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}; expected one of {', '.join(SPLITS)}")
        if not 0 <= low <= high <= 2 or self.people < high:
            raise ValueError(
                f"subjects is {[low, high]} of {self.people} people; expected fewest and most, 0 to 2, of enough"
            )
        for name in ("empty", "detailed"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a fraction in [0, 1]")
        if self.contexts is not None and not (self.contexts and set(self.contexts) <= set(CONTEXTS)):
            raise ValueError(f"contexts is {list(self.contexts)}; expected some of {', '.join(CONTEXTS)}, or null")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Sample:
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), number, _SCENES])
        empty, detailed = rng.random() < self.empty, bool(rng.random() < self.detailed)
        low, high = self.subjects
        subjects = 0 if empty else int(rng.integers(low, high + 1))
        numbers = rng.choice(self.people, subjects, replace=False).tolist()
        people = [identity(self.split, person, self.seed) for person in numbers]
        context = None if self.contexts is None else self.contexts[int(rng.integers(len(self.contexts)))]
        scene = draw_scene(rng, people, context, self.size, detailed)
        source = {
            "world": "toy",
            "context": scene.context,
            "identities": [
                {"number": person, **asdict(who)} for person, who in zip(numbers, scene.identities, strict=True)
            ],
        }
        segments = tuple(Segment(**asdict(segment)) for segment in scene.segments)
        return Sample(f"{number:08d}", scene.image, scene.labels, scene.caption, segments, source)
