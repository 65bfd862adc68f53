"""Other subjects at the same seed: what the photo decides changes, what the prior decides stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moa_train.inference.edits.grid import Grid, Row, make_grid
from moa_train.inference.subject_pipeline import SubjectPipeline
from moa_train.inference.subjects import Subject
from moa_train.prompts import parse_prompt


def swap(
    pipe: SubjectPipeline,
    prompt: str,
    subjects: Sequence[Subject],
    seeds: Sequence[int],
    batch_size: int,
    **options: Any,
) -> Grid:
    """A grid of subjects by seeds.

    Args:
        pipe: the pipeline, with personalized weights.
        prompt: with markers <1> ... <n>.
        subjects: the first n make the first row, the next n the second ...: with one marker, one subject a row.
        seeds: one column each; the noise of a column is the same in all its rows.
        batch_size: pictures denoised together.
        options: of the pipeline's call (num_inference_steps, guidance_scale ...).

    Raises:
        ValueError: a prompt without marker, or subjects that do not fill the rows.
    """
    return make_grid(pipe, prompt, swap_rows(prompt, subjects), seeds, batch_size, **options)


def swap_rows(prompt: str, subjects: Sequence[Subject]) -> list[Row]:
    """The rows of `swap`'s grid."""
    count = parse_prompt(prompt).count
    if count == 0:
        raise ValueError(f'"{prompt}" marks no subject: write <1> behind the noun whose subjects are swapped')
    if not subjects or len(subjects) % count:
        raise ValueError(
            f'"{prompt}" marks {count} subjects and {len(subjects)} were given: give {count} for each row of the grid'
        )
    return [
        Row(f"swap-{number}", prompt, tuple(subjects[start : start + count]))
        for number, start in enumerate(range(0, len(subjects), count), 1)
    ]
