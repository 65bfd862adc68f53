"""The toy world's pictures: people in a place with exact label maps and captions, and portraits as references."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from moa_train.data.sources.toyworld.canvas import SUPERSAMPLING, Draws
from moa_train.data.sources.toyworld.captions import CONTEXTS, scene_caption
from moa_train.data.sources.toyworld.contexts import draw_backdrop, draw_context
from moa_train.data.sources.toyworld.identities import Identity
from moa_train.data.sources.toyworld.people import Figure, Pose, random_pose

MAX_PEOPLE = 2
_PLACE_DRAWS = 8


@dataclass(frozen=True)
class Segment:
    """One person of a scene: its label, its noun at `caption[start:end]`, its box and area in pixels.

    `bbox` is (x1, y1, x2, y2) with exclusive ends, the tightest around the label's pixels.
    """

    id: int
    noun: str
    start: int
    end: int
    bbox: tuple[int, int, int, int]
    area: int


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture with all that is known about it.

    `image` is uint8 (size, size, 3), RGB; `labels` is uint8 (size, size), 0 the background and i the i-th person.
    """

    image: np.ndarray
    labels: np.ndarray
    caption: str
    segments: tuple[Segment, ...]
    context: str
    identities: tuple[Identity, ...]


@dataclass(frozen=True)
class _Placement:
    """Where a person stands, in fractions of the picture's side."""

    x: float
    y: float
    radius: float
    pose: Pose


def draw_scene(
    rng: np.random.Generator,
    identities: Sequence[Identity],
    context: str | None = None,
    size: int = 64,
    detailed: bool = False,
) -> Scene:
    """Draw people in a place.

    Place, poses and scale use the same numbers of the generator whoever the people are; the caption's draws come last.
    A pixel belongs to people if they cover more than half of it, and to the one in front if that one does alone.

    Args:
        rng: all randomness.
        identities: none, one or two people, in the order of labels and caption; where they stand and who stands in
            front is random.
        context: one of `CONTEXTS`; None for a random one.
        size: pixels along an edge.
        detailed: whether the caption names the people's attributes.

    Raises:
        ValueError: if there are more than two people, the context is unknown or the size is below 16.
    """
    if len(identities) > MAX_PEOPLE:
        raise ValueError(f"{len(identities)} people were given; a scene holds at most {MAX_PEOPLE}")
    _check_size(size)
    chosen = CONTEXTS[int(rng.integers(len(CONTEXTS)))]
    chosen = chosen if context is None else context
    picture = draw_context(rng, chosen, SUPERSAMPLING * size)
    labels = Image.new("L", picture.size, 0)
    placements = _placements(rng, len(identities))
    back_to_front = sorted(range(len(identities)), key=lambda i: placements[i].radius)
    for i in back_to_front:
        _draw_person(picture, labels, i + 1, identities[i], placements[i])
    front = back_to_front[-1] + 1 if identities else 0
    back = back_to_front[0] + 1 if identities else 0
    label_map = _reduce_labels(labels, size, back, front)
    caption, offsets = scene_caption(identities, chosen, detailed, rng)
    segments = tuple(
        _segment(label_map, i + 1, person.noun, offset)
        for i, (person, offset) in enumerate(zip(identities, offsets, strict=True))
    )
    image = np.array(picture.reduce(SUPERSAMPLING))
    return Scene(image, label_map, caption, segments, chosen, tuple(identities))


def draw_portrait(rng: np.random.Generator, identity: Identity, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Draw one person's head and shoulders, large, before a plain backdrop.

    Returns:
        The image, uint8 (size, size, 3), and the mask, uint8 (size, size), 1 where the person is.

    Raises:
        ValueError: if the size is below 16.
    """
    _check_size(size)
    picture = draw_backdrop(rng, SUPERSAMPLING * size)
    labels = Image.new("L", picture.size, 0)
    u = Draws(rng, 3)
    placement = _Placement(u.between(0.45, 0.55), u.between(0.46, 0.5), u.between(0.23, 0.26), random_pose(rng))
    _draw_person(picture, labels, 1, identity, placement)
    return np.array(picture.reduce(SUPERSAMPLING)), _reduce_labels(labels, size, 1, 1)


def _check_size(size: int) -> None:
    if size < 16:
        raise ValueError(f"size is {size}; expected at least 16 pixels, or faces cannot be seen")


def _placements(rng: np.random.Generator, count: int) -> list[_Placement]:
    """Where `count` people stand: alone anywhere near the middle, or one on the left and one on the right."""
    u = Draws(rng, _PLACE_DRAWS)
    poses = [random_pose(rng) for _ in range(MAX_PEOPLE)]
    if count < MAX_PEOPLE:
        height = u.between(0.6, 0.94)
        alone = _Placement(u.between(0.34, 0.66), 1.0 - 0.68 * height, _radius(height), poses[0])
        return [alone][:count]
    spots = [u.between(0.23, 0.28), u.between(0.72, 0.77)]
    if u.chance(0.5):
        spots.reverse()
    heights = [u.between(0.56, 0.78) for _ in range(MAX_PEOPLE)]
    return [
        _Placement(x, 1.0 - 0.68 * height, _radius(height), _with_inner_arm_down(pose, x))
        for x, height, pose in zip(spots, heights, poses, strict=True)
    ]


def _with_inner_arm_down(pose: Pose, x: float) -> Pose:
    """Lower the arm towards the picture's middle: a raised one would hide the other person's face."""
    left, right = pose.arms
    lowered = (left, min(right, 0.25)) if x < 0.5 else (min(left, 0.25), right)
    return replace(pose, arms=lowered)


def _radius(height: float) -> float:
    """The head's radius of a figure that fills this much of the picture's height, hair and all."""
    return 0.1 + 0.13 * (height - 0.3)


def _draw_person(
    picture: Image.Image, labels: Image.Image, label: int, identity: Identity, placement: _Placement
) -> None:
    side = picture.width
    centre = (placement.x * side, placement.y * side)
    Figure(picture, labels, label, centre, placement.radius * side, placement.pose).draw(identity)


def _reduce_labels(labels: Image.Image, size: int, back: int, front: int) -> np.ndarray:
    """The label of each pixel, uint8 (size, size), from a supersampled map that holds at most two labels."""
    drawn = np.asarray(labels)
    if back == 0:
        return np.zeros((size, size), dtype=np.uint8)
    reduced = np.where(_covered(drawn > 0), back, 0).astype(np.uint8)
    if front != back:
        reduced[_covered(drawn == front)] = front
    return reduced


def _covered(mask: np.ndarray) -> np.ndarray:
    """Where a supersampled mask covers more than half of a pixel."""
    share = Image.fromarray(mask.view(np.uint8) * np.uint8(255)).reduce(SUPERSAMPLING)
    return np.asarray(share) > 127


def _segment(labels: np.ndarray, label: int, noun: str, offset: tuple[int, int]) -> Segment:
    mask = labels == label
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    bbox = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return Segment(label, noun, *offset, bbox, int(mask.sum()))
