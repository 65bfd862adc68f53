"""A sample from a picture, masks and a caption: who lies in front, and which words of the caption name whom."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer, UInt8

from moa_train.data.report import LeftOut, Remark
from moa_train.data.schema import Sample, Segment, bounding_box, check_sample

NO_NOUN = ("append", "keep", "leave_out")
"""What becomes of subjects that the caption does not name."""
APPENDED = "the caption did not name every subject; nouns were appended"
UNNAMED = "the caption does not name every subject"

Span = tuple[int, int]


def compose(
    key: str,
    image: UInt8[np.ndarray, "h w 3"],
    labels: Integer[np.ndarray, "h w"],
    caption: str,
    nouns: Sequence[str],
    *,
    also: Sequence[str] = (),
    no_noun: str = "append",
    source: dict[str, Any] | None = None,
) -> tuple[Sample, tuple[Remark, ...]]:
    """A sound sample, and what had to be changed for it.

    Args:
        labels: the subjects by their ids, 0 elsewhere.
        nouns: what each subject is called, in the order of the ids.
        also: other words that may stand for a subject whose own noun the caption lacks.
        no_noun: what becomes of subjects that the caption does not name: "append" adds ", with a man and a dog" to it,
            "keep" keeps the picture without them, "leave_out" leaves the picture out.

    Raises:
        LeftOut: a subject has no name and `no_noun` is "leave_out", or the sample would not be sound.
        ValueError: `no_noun` is none of these, or there are more or fewer nouns than subjects.
    """
    ids = [int(number) for number in np.unique(labels) if number]
    if no_noun not in NO_NOUN:
        raise ValueError(f"no_noun is {no_noun!r}; expected one of {', '.join(NO_NOUN)}")
    if len(nouns) != len(ids):
        raise ValueError(f"{len(nouns)} nouns are given for {len(ids)} subjects: give one for each")
    spans = find_nouns(caption, nouns, also)
    remarks: tuple[Remark, ...] = ()
    unnamed = [place for place, span in enumerate(spans) if span is None]
    if unnamed:
        detail = f"{', '.join(nouns[place] for place in unnamed)} in {caption!r}"
        if no_noun == "leave_out":
            raise LeftOut(UNNAMED, detail)
        remarks = (Remark(APPENDED if no_noun == "append" else UNNAMED, detail),)
        if no_noun == "append":
            caption, added = append_nouns(caption, [nouns[place] for place in unnamed])
            for place, span in zip(unnamed, added, strict=True):
                spans[place] = span
    segments = tuple(
        Segment(number, caption[span[0] : span[1]], *span, bounding_box(mask), int(mask.sum()))
        for number, span in zip(ids, spans, strict=True)
        if span is not None and (mask := labels == number) is not None
    )
    sample = Sample(key, image, labels, caption, segments, source or {})
    for problem in check_sample(sample):
        raise LeftOut("it would not be a sound sample", problem)
    return sample, remarks


def find_nouns(caption: str, nouns: Sequence[str], also: Sequence[str] = ()) -> list[Span | None]:
    """For each noun the first place in the caption, as a word of its own, that no noun before it took.

    Upper and lower case count as equal. A noun that is not there takes the first free word of `also`; else None.
    """
    taken: list[Span] = []

    def take(words: Sequence[str]) -> Span | None:
        longest_first = sorted(words, key=len, reverse=True)
        pattern = "|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in longest_first) or r"(?!)"
        for found in re.finditer(pattern, caption, re.IGNORECASE):
            if all(found.end() <= start or end <= found.start() for start, end in taken):
                taken.append(found.span())
                return found.span()
        return None

    spans = [take([noun]) for noun in nouns]
    return [take(also) if span is None else span for span in spans]


def append_nouns(caption: str, nouns: Sequence[str]) -> tuple[str, list[Span]]:
    """`a day at sea` with man and owl becomes `a day at sea, with a man and an owl`; where each noun came to lie."""
    text, spans = caption.rstrip(" .,;:"), []
    for place, noun in enumerate(nouns):
        text += (", with " if text else "") if place == 0 else " and "
        text += "an " if noun[:1].lower() in "aeiou" else "a "
        spans.append((len(text), len(text) + len(noun)))
        text += noun
    return text, spans


def label_map(masks: Sequence[Bool[np.ndarray, "h w"]]) -> Integer[np.ndarray, "h w"]:
    """The masks as one label map, ids 1, 2, ...; where they overlap, the smaller lies in front.

    One that is hidden completely does not occur in it.
    """
    labels = np.zeros(masks[0].shape, dtype=np.uint8 if len(masks) < 256 else np.int32)
    for place in sorted(range(len(masks)), key=lambda place: -int(masks[place].sum())):
        labels[masks[place]] = place + 1
    return labels
