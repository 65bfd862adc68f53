"""What a split holds: captions, nouns, subject sizes and subjects per picture, as numbers, lines and a plot."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moa_train.data.schema import JSON_SUFFIX, read_told
from moa_train.data.shards import ShardIndex, ShardReader

_NOUNS = 12
_QUANTILES = (0, 5, 25, 50, 75, 95, 100)


def split_stats(
    index: ShardIndex, count_tokens: Callable[[str], int] | None = None, on_sample: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Numbers of a split, from the JSON of every sample; pictures are not decoded.

    Returns:
        samples; captions (how many differ, words and tokens by percentile); subjects (pictures with 0, 1, ... of them);
        nouns (subjects called so); sizes (a subject's share of its picture, by percentile) and all shares.

    Raises:
        BadSample: one cannot be read.
    """
    reader = ShardReader(index)
    captions: Counter[str] = Counter()
    nouns: Counter[str] = Counter()
    subjects: Counter[int] = Counter()
    shares: list[float] = []
    for number in range(len(reader)):
        told, segments = read_told(reader.read(number, ("json",))[1][JSON_SUFFIX])
        captions[told["caption"]] += 1
        subjects[len(segments)] += 1
        nouns.update(segment.noun for segment in segments)
        shares += [segment.area / (told["width"] * told["height"]) for segment in segments]
        if on_sample is not None:
            on_sample(number + 1)
    return {
        "samples": len(reader),
        "captions": {
            "different": len(captions),
            "words": _percentiles([len(text.split()) for text in captions.elements()]),
            "tokens": _percentiles([count_tokens(text) for text in captions.elements()]) if count_tokens else {},
        },
        "subjects": {str(n): subjects[n] for n in sorted(subjects)},
        "nouns": dict(nouns.most_common()),
        "sizes": _percentiles(shares),
        "shares": [round(share, 5) for share in shares],
    }


def table(stats: dict[str, Any]) -> Iterator[str]:
    """The numbers as lines for a terminal."""
    yield f"samples    {stats['samples']:,d}"
    yield f"captions   {stats['captions']['different']:,d} different"
    for what in ("words", "tokens"):
        yield f"  {what:8} {_line(stats['captions'][what], '{:.0f}')}"
    yield "subjects   " + ", ".join(f"{count:,d} pictures with {n}" for n, count in stats["subjects"].items())
    yield f"  size     {_line(stats['sizes'], '{:.1%}')} of the picture"
    nouns = list(stats["nouns"].items())
    yield "nouns      " + ", ".join(f"{noun} {count:,d}" for noun, count in nouns[:_NOUNS])
    if len(nouns) > _NOUNS:
        yield f"           and {len(nouns) - _NOUNS} more"


def save_stats(stats: dict[str, Any], out: str | Path) -> None:
    """Write `stats.json` and `stats.png` to a folder."""
    from matplotlib.figure import Figure

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stats.json").write_text(json.dumps(stats, indent=1, ensure_ascii=False), encoding="utf-8")
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    people, sizes, nouns = figure.subplots(1, 3)
    people.bar([int(n) for n in stats["subjects"]], list(stats["subjects"].values()))
    people.xaxis.get_major_locator().set_params(integer=True)
    people.set(title="Subjects in a picture", xlabel="subjects", ylabel="pictures")
    sizes.hist(100 * np.array(stats["shares"]), bins=30)
    sizes.set(title="Size of a subject", xlabel="share of the picture (%)", ylabel="subjects")
    first = list(stats["nouns"].items())[:_NOUNS][::-1]
    nouns.barh([noun for noun, _ in first], [count for _, count in first])
    nouns.set(title="Nouns", xlabel="subjects")
    figure.savefig(folder / "stats.png", dpi=120)


def _percentiles(values: list[int] | list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {str(q): float(value) for q, value in zip(_QUANTILES, np.percentile(values, _QUANTILES), strict=True)}


def _line(percentiles: dict[str, float], form: str) -> str:
    names = {"0": "least", "5": "5 %", "50": "median", "95": "95 %", "100": "most"}
    return ", ".join(f"{name} {form.format(percentiles[q])}" for q, name in names.items() if q in percentiles) or "-"
