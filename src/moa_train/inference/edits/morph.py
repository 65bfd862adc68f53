"""From one subject to another: the image features between them, at one seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from moa_train.inference.pictures import Picture, contact_sheet, generate, subject_region, subjects_tile
from moa_train.inference.regions import difference
from moa_train.inference.subject_pipeline import SubjectPipeline
from moa_train.inference.subjects import Subject
from moa_train.prompts import parse_prompt


@dataclass(frozen=True)
class Morph:
    """The frames from the first subjects to the second, in order."""

    first: tuple[Subject, ...]
    second: tuple[Subject, ...]
    frames: tuple[Picture, ...]

    def report(self) -> dict[str, Any]:
        """Mean squared differences of each frame to the one before, and of the last frame to the first."""
        images = [frame.image for frame in self.frames]
        region = subject_region(self.frames)
        steps = [difference(a, b, region).rounded() for a, b in pairwise(images)]
        return {
            "measure": "mean squared difference, values in [0, 1], in the subjects' region and in the background",
            "from_the_frame_before": steps,
            "from_first_to_last": difference(images[0], images[-1], region).rounded(),
            "region_share": round(float(region.float().mean()), 3),
        }

    def strip(self, side: int = 128) -> Image.Image:
        """The first subjects' photos, the frames, the second subjects' photos; in one row."""
        ends = [subjects_tile(subjects, side) for subjects in (self.first, self.second)]
        shares = [f"{number / (len(self.frames) - 1):.2f}" for number in range(len(self.frames))]
        row = [ends[0], *(frame.image for frame in self.frames), ends[1]]
        return contact_sheet([row], ("from", *shares, "to"), side)


def morph(
    pipe: SubjectPipeline,
    prompt: str,
    subjects: Sequence[Subject],
    seed: int,
    frames: int,
    batch_size: int,
    **options: Any,
) -> Morph:
    """Pictures whose subjects' features go from those of the first n subjects to those of the next n.

    Args:
        pipe: the pipeline, with personalized weights.
        prompt: with markers <1> ... <n>.
        subjects: 2 n of them: who they are in the first frame, then who they are in the last. The same one at both ends
            stays.
        seed: of the noise, the same in all frames.
        frames: how many, at least 2; the first and the last are the subjects' own pictures.
        batch_size, options: as for `swap`.

    Raises:
        ValueError: another number of subjects, too few frames.
    """
    first, second = morph_ends(prompt, subjects, frames)
    start, end = pipe.subject_features(first), pipe.subject_features(second)
    between = [slerp(start, end, number / (frames - 1)) for number in range(frames)]
    made = generate(
        pipe, [prompt] * frames, [list(features) for features in between], [seed] * frames, batch_size, **options
    )
    return Morph(first, second, tuple(made))


def morph_ends(
    prompt: str, subjects: Sequence[Subject], frames: int
) -> tuple[tuple[Subject, ...], tuple[Subject, ...]]:
    """Who the subjects of `morph` are in the first frame, and in the last."""
    count = parse_prompt(prompt).count
    if count == 0 or len(subjects) != 2 * count:
        raise ValueError(
            f'"{prompt}" marks {count} subjects and {len(subjects)} were given: mark one with <1> and give two '
            "for each marker, those of the first frame and then those of the last"
        )
    if frames < 2:
        raise ValueError(f"frames is {frames}; expected 2 or more: the first and the last are the subjects' own")
    return tuple(subjects[:count]), tuple(subjects[count:])


def slerp(start: Float[Tensor, "s f"], end: Float[Tensor, "s f"], share: float) -> Float[Tensor, "s f"]:
    """Spherical interpolation of each row: direction along the great circle, length linearly; exact at 0 and 1.

    Features of different people are far apart: on the straight line between them the middle is short, like no photo's.
    """
    if share in (0.0, 1.0):
        return start if share == 0.0 else end
    lengths = [x.norm(dim=1, keepdim=True) for x in (start, end)]
    first, second = (x / length.clamp_min(1e-12) for x, length in zip((start, end), lengths, strict=True))
    angle = (first * second).sum(dim=1, keepdim=True).clamp(-1.0, 1.0).acos()
    small = angle.sin() < 1e-4  # nearly parallel, where the straight line is the circle
    sine = torch.where(small, 1.0, angle.sin())
    weights = (((1.0 - share) * angle).sin() / sine, (share * angle).sin() / sine)
    weights = (torch.where(small, 1.0 - share, weights[0]), torch.where(small, share, weights[1]))
    length = torch.lerp(lengths[0], lengths[1], share)
    return length * (weights[0] * first + weights[1] * second)
