"""Prompt templates of the photo benchmark: FastComposer's four categories, from a text file, filled with nouns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

SUBJECT = "{subject}"
"""What a template has in the place of its subjects."""


@dataclass(frozen=True)
class Template:
    """One prompt with `{subject}` where its subjects stand, and the category that it counts to."""

    category: str
    text: str

    def fill(self, nouns: Sequence[str], marked: bool = True) -> str:
        """The prompt for subjects of these nouns: "a man <1> and a woman <2> playing chess", or without markers."""
        named = [
            f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}{f' <{number}>' if marked else ''}"
            for number, noun in enumerate(nouns, 1)
        ]
        return self.text.replace(SUBJECT, " and ".join(named))


def read_templates(path: str | Path | None, together: int = 1) -> list[Template]:
    """Templates of a file: a line `[category]`, then one template a line; `#` begins a comment line.

    Args:
        path: the file; None: the package's own, 40 for one subject, 21 for two.
        together: subjects in one picture.

    Raises:
        ValueError: the file is missing or empty; a line of it is no template, stands before a category, or comes twice.
    """
    if path is None:
        path = Path(str(files("moa_train") / "assets" / "photo_prompts" / f"{('one', 'two')[together - 1]}.txt"))
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts={path} cannot be read as text: {error}") from error
    category, templates = "", list[Template]()
    for number, line in enumerate(map(str.strip, lines), 1):
        where = f"line {number} of {path}, {line!r},"
        if not line or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            category = line[1:-1].strip()
            if not category.replace("_", "").isalnum():
                raise ValueError(f"{where} names no category: write one word, as [style]")
            continue
        if not category:
            raise ValueError(f"{where} stands before any category: write [style] or another name above it")
        if line.count(SUBJECT) != 1 or "<" in line:
            raise ValueError(
                f"{where} is no template: write {SUBJECT} once, in the place of the subject, and no marker"
            )
        if any(line == known.text for known in templates):
            raise ValueError(f"{where} is there twice: each prompt once")
        templates.append(Template(category, line))
    if not templates:
        raise ValueError(
            f"{path} holds no prompt: write [category], then one template a line, as 'a bust of {SUBJECT}'"
        )
    return templates
