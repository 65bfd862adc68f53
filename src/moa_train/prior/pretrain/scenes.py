"""Toy scenes held in memory for the toy prior's training: pictures, label maps, short and detailed captions."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from moa_train.data.sources.toyworld import (
    CONTEXTS,
    SPLITS,
    Identity,
    Scene,
    describe,
    draw_portrait,
    draw_scene,
    identity,
    scene_caption,
)

PEOPLE_SHARES = (0.06, 0.62, 0.32)
"""Share of scenes with no, one and two people."""
_CHUNK = 500


@dataclass(frozen=True, eq=False)
class SceneSet:
    """Drawn scenes of one split; captions come in pairs (short, detailed).

    `portraits` shows the first person of scene i alone before a plain backdrop, with its mask; scenes without people
    have a portrait too, of somebody who is not in them, so that every index is valid everywhere.
    """

    images: UInt8[np.ndarray, "n h w 3"]
    labels: UInt8[np.ndarray, "n h w"]
    captions: list[tuple[str, str]]
    contexts: np.ndarray
    people: list[tuple[Identity, ...]]
    portraits: UInt8[np.ndarray, "n h w 3"]
    portrait_masks: UInt8[np.ndarray, "n h w"]
    portrait_people: list[Identity]

    def __len__(self) -> int:
        return len(self.captions)

    def portrait_caption(self, index: int) -> str:
        """What the portrait shows: "a man with tan skin and ..."."""
        return f"a {describe(self.portrait_people[index], True)}"


def draw_scene_set(split: str, count: int, size: int, seed: int, workers: int = 1) -> SceneSet:
    """Draw `count` scenes of `size` pixels; a pure function of split, count, size and seed, whatever the workers."""
    chunks = [(split, range(start, min(start + _CHUNK, count)), size, seed) for start in range(0, count, _CHUNK)]
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            rows = [row for chunk in pool.map(_draw_chunk, chunks) for row in chunk]
    else:
        rows = [row for chunk in chunks for row in _draw_chunk(chunk)]
    scenes = [row[0] for row in rows]
    return SceneSet(
        images=np.stack([scene.image for scene in scenes]),
        labels=np.stack([scene.labels for scene in scenes]),
        captions=[(row[1], row[2]) for row in rows],
        contexts=np.array([CONTEXTS.index(scene.context) for scene in scenes]),
        people=[scene.identities for scene in scenes],
        portraits=np.stack([row[3] for row in rows]),
        portrait_masks=np.stack([row[4] for row in rows]),
        portrait_people=[row[5] for row in rows],
    )


Row = tuple[Scene, str, str, np.ndarray, np.ndarray, Identity]


def _draw_chunk(chunk: tuple[str, range, int, int]) -> list[Row]:
    split, numbers, size, seed = chunk
    return list(_draw_rows(split, numbers, size, seed))


def _draw_rows(split: str, numbers: range, size: int, seed: int) -> Iterator[Row]:
    split_number = SPLITS.index(split)
    for number in numbers:
        rng = np.random.default_rng([seed, split_number, number, 1])
        count = int(rng.choice(len(PEOPLE_SHARES), p=PEOPLE_SHARES))
        people = [identity(split, 2 * number + place, seed) for place in range(max(count, 1))]
        scene = draw_scene(rng, people[:count], size=size)
        detailed, _ = scene_caption(scene.identities, scene.context, True, rng)
        portrait, mask = draw_portrait(rng, people[0], size)
        yield scene, scene.caption, detailed, portrait, mask, people[0]
