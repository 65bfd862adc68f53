"""Subjects come in and go out again, one at a time, at the same seed and with the same words."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from moa_train.inference.edits.grid import Grid, Row, make_grid
from moa_train.inference.subject_pipeline import SubjectPipeline
from moa_train.inference.subjects import Subject
from moa_train.prompts import parse_prompt

_MARKER = re.compile(r"(\s*)<(\d+)>(?=(\w?))")


def compose(
    pipe: SubjectPipeline,
    prompt: str,
    subjects: Sequence[Subject],
    seeds: Sequence[int],
    batch_size: int,
    **options: Any,
) -> Grid:
    """A grid of stages by seeds: with n subjects <1>, <1> <2>, ... all of them, then without <1>, ... the last alone.

    A subject that is left out stays in the prompt as its noun, without photo: so the words, and with them what the
    prior draws, are the same in every stage. Taking the noun out of the prompt, too, would draw another picture.

    Args:
        pipe: the pipeline, with personalized weights.
        prompt: with markers <1> ... <n>.
        subjects: one a marker.
        seeds, batch_size, options: as for `swap`.

    Raises:
        ValueError: a prompt without marker, or another number of subjects.
    """
    return make_grid(pipe, prompt, compose_rows(prompt, subjects), seeds, batch_size, **options)


def compose_rows(prompt: str, subjects: Sequence[Subject]) -> list[Row]:
    """The stages of `compose`: each differs from the one before by a single subject."""
    count = parse_prompt(prompt).count
    if count == 0:
        raise ValueError(f'"{prompt}" marks no subject: write <1>, <2> ... behind the nouns of those who come and go')
    if len(subjects) != count:
        raise ValueError(f'"{prompt}" marks {count} subjects and {len(subjects)} were given: give one each')
    stages = [range(end) for end in range(1, count + 1)] + [range(start, count) for start in range(1, count)]
    return [
        Row(
            "with-" + "-".join(str(subject + 1) for subject in kept),
            keep_subjects(prompt, kept),
            tuple(subjects[subject] for subject in kept),
        )
        for kept in stages
    ]


def keep_subjects(prompt: str, kept: Collection[int]) -> str:
    """A prompt with the markers of some subjects only (0-based), numbered anew; its words stay."""
    numbers = {subject: number for number, subject in enumerate(sorted(kept), 1)}

    def replaced(match: re.Match[str]) -> str:
        subject = int(match[2]) - 1
        if subject in numbers:
            return f"{match[1]}<{numbers[subject]}>"
        return " " if match[3] else ""

    return _MARKER.sub(replaced, prompt)
