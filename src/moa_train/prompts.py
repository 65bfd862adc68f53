"""Turns "a photo of a man <1>" into token ids and subject positions, the same way for training and generation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

_MARKER = re.compile(r"\s*<(\d+)>")
_LAST_WORD = re.compile(r"[\w-]*\w$")
_MAX_LENGTH = 10_000


@runtime_checkable
class Tokenizer(Protocol):
    """What is used of a CLIP tokenizer of transformers, fast or slow."""

    model_max_length: int

    def __call__(self, text: str, **options: Any) -> Any:
        """Encode one text."""


@dataclass(frozen=True)
class Prompt:
    """A prompt without markers, and which of its nouns stand for subjects.

    text: what is tokenised. subjects: 0-based subject of each mark, in order of appearance; one may recur.
    spans: start and end of each marked noun in `text`, in the same order.
    """

    text: str
    subjects: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        """Number of different subjects."""
        return len(set(self.subjects))

    @property
    def owners(self) -> tuple[int, ...]:
        """The subject of each slot of `tokenize`: a slot is a marked noun, by subject, then in order of appearance."""
        return tuple(sorted(self.subjects))


@dataclass(frozen=True)
class TokenizedPrompt:
    """Token ids of a prompt, and for each slot of `Prompt.owners` the last token of its noun (0 where not present)."""

    ids: Int[Tensor, " k"]
    positions: Int[Tensor, " s"]
    present: Bool[Tensor, " s"]


def parse_prompt(marked: str) -> Prompt:
    """Take the markers `<1>` ... `<9>` out of a prompt; each marks the word before it as a noun of that subject.

    Raises:
        ValueError: a marker without a word of its own before it, a gap in the numbers.
    """
    text, rest = "", 0
    subjects: list[int] = []
    spans: list[tuple[int, int]] = []
    for match in _MARKER.finditer(marked):
        text += marked[rest : match.start()]
        rest = match.end()
        noun = _LAST_WORD.search(text)
        if noun is None or (noun.start(), len(text)) in spans:
            raise ValueError(f"{match[0].strip()} in {marked!r} has no noun of its own: write the marker after a word")
        subjects.append(int(match[1]) - 1)
        spans.append((noun.start(), len(text)))
        if marked[rest : rest + 1].isalnum():
            text += " "
    numbers = sorted({subject + 1 for subject in subjects})
    if numbers != list(range(1, len(numbers) + 1)) or len(numbers) > 9:
        raise ValueError(f"{marked!r} marks subjects {numbers}: number them 1, 2, ... up to 9, without a gap")
    return Prompt(text + marked[rest:], tuple(subjects), tuple(spans))


def mark_prompt(caption: str, spans: Sequence[tuple[int, int]]) -> str:
    """Write ` <i>` after the i-th noun phrase of a caption; `spans` are character offsets (start, end).

    Raises:
        ValueError: the caption has markers, a span holds no word, two spans end at the same place.
    """
    if _MARKER.search(caption):
        raise ValueError(f"{caption!r} already has markers such as <1>: take them out first")
    ends = {}
    for number, (start, end) in enumerate(spans, 1):
        word = re.search(r"\w(?=\W*$)", caption[start:end])
        if word is None:
            raise ValueError(f"span {(start, end)} of {caption!r} holds no word")
        if start + word.end() in ends:
            raise ValueError(f"two subjects of {caption!r} end at character {end}: give each a noun of its own")
        ends[start + word.end()] = number
    for end in sorted(ends, reverse=True):
        caption = f"{caption[:end]} <{ends[end]}>{caption[end:]}"
    return caption


def tokenize(tokenizer: Tokenizer, prompt: Prompt, slots: int) -> TokenizedPrompt:
    """Encode a prompt to the tokenizer's full length, and find the last token of each marked noun.

    Raises:
        ValueError: more marked nouns than slots, or a noun behind the tokenizer's last token.
    """
    length = tokenizer.model_max_length
    if length > _MAX_LENGTH:
        raise ValueError("the tokenizer has no model_max_length: set it to the text encoder's positions (77 for CLIP)")
    if len(prompt.subjects) > slots:
        raise ValueError(f"{prompt.text!r} marks {len(prompt.subjects)} subjects, max_subjects is {slots}: raise it")
    ids = tokenizer(prompt.text, padding="max_length", max_length=length, truncation=True).input_ids
    positions = []
    for subject, (start, end) in sorted(zip(prompt.subjects, prompt.spans, strict=True)):
        # CLIP splits words before it applies BPE, so the tokens up to a word's end do not depend on what follows.
        position = len(tokenizer(prompt.text[:end], add_special_tokens=False).input_ids)
        if position >= length - 1:
            noun = prompt.text[start:end]
            raise ValueError(f"the noun {noun!r} <{subject + 1}> is token {position} of {length}: shorten the prompt")
        positions.append(position)
    empty = slots - len(positions)
    present = torch.tensor([True] * len(positions) + [False] * empty, dtype=torch.bool)
    return TokenizedPrompt(torch.tensor(ids), torch.tensor(positions + [0] * empty, dtype=torch.long), present)
