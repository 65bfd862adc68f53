"""A clean copy of damaged shards: sound samples as they are, certain mistakes mended, all else left out by name."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moa_train.data.members import MEMBER_DTYPE
from moa_train.data.packing import add_sample
from moa_train.data.report import REPORT_NAME, Remark, Report
from moa_train.data.schema import (
    JSON_SUFFIX,
    KINDS,
    MAX_ID,
    BadSample,
    Sample,
    Segment,
    bounding_box,
    check_sample,
    decode_sample,
    encode_sample,
)
from moa_train.data.shards import Shard, ShardIndex, index_shards
from moa_train.data.storage import replacing, sha256_of
from moa_train.data.validate import Checked, check_shards, tars_of

DAMAGED, CHANGED, DUPLICATE, MENDED = "damaged", "changed since it was indexed", "duplicate key", "mended"


def repair(
    folder: str | Path, out: str | Path, on_shard: Callable[[int], None] | None = None, workers: int = 0
) -> tuple[ShardIndex, Report]:
    """Write the sound samples of a split to another folder, with an index and `report.json`.

    Mended is what the label map and the caption leave no doubt of: a subject's box and area, and the offsets of a noun
    that occurs once in the caption. A sample with any other problem is left out, and so is one whose bytes are not
    those that were indexed. The original is not touched.

    Raises:
        ValueError: `out` holds something, no sample is left, or the index is that of another set.
    """
    target = Path(out)
    if target.resolve() == Path(folder).resolve() or (target.exists() and any(target.iterdir())):
        raise ValueError(f"repair is {out}: give a folder that is not there yet, or an empty one")
    paths = tars_of(folder)
    split, known = _indexed(folder)
    report, keys, shards = Report(), set[str](), []
    for done, (path, found) in enumerate(check_shards(paths, workers=workers), 1):
        for problem in found.problems:
            report.add(path.name, False, (Remark(DAMAGED, problem),))
        shard = _copy(path, target / path.name, found.samples, known, keys, report)
        shards += [shard] if shard.count else []
        if on_shard is not None:
            on_shard(done)
    if not shards:
        raise ValueError(f"no sample of {folder} can be kept: {'; '.join(line.strip() for line in report.lines())}")
    told = report.told()
    packing = {"command": "moa-data validate repair", "config": {"folder": str(folder)}, "left_out": told["left_out"]}
    index = index_shards(target, split, tuple(shards), packing)
    with replacing(target / REPORT_NAME) as file:
        file.write(json.dumps(told, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"))
    return index, report


def _indexed(folder: str | Path) -> tuple[str, set[tuple[int, ...]] | None]:
    """The split's name, and the contents that the index knows; None: there is no index or it has no checksums."""
    try:
        index = ShardIndex.load(folder)
    except ValueError:
        return Path(folder).resolve().name, None
    return index.split, {_contents(row) for row in index.members} if index.checked else None


def _contents(row: np.void) -> tuple[int, ...]:
    return tuple(int(row[f"{kind}_{what}"]) for kind in KINDS for what in ("size", "crc"))


def _copy(
    path: Path,
    target: Path,
    samples: list[Checked],
    known: set[tuple[int, ...]] | None,
    keys: set[str],
    report: Report,
) -> Shard:
    """Write what can be kept of a shard; count 0 and no file: nothing."""
    count = 0
    file = os.open(path, os.O_RDONLY)
    try:
        with replacing(target) as copy, tarfile.open(fileobj=copy, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                members, remarks = _kept(sample, sample.stored.read(file), known, keys)
                report.add(f"{path.name} {sample.stored.key}", members is not None, remarks)
                if members is not None:
                    add_sample(tar, sample.stored.key, members, keys)
                    count += 1
    finally:
        os.close(file)
    if not count:
        target.unlink()
        return Shard(path.name, 0, 0, "")
    return Shard(path.name, count, target.stat().st_size, sha256_of(target))


def _kept(
    sample: Checked, members: dict[str, bytes], known: set[tuple[int, ...]] | None, keys: set[str]
) -> tuple[Mapping[str, bytes] | None, tuple[Remark, ...]]:
    """The members to store, or None; and why."""
    if sample.stored.key in keys:
        return None, (Remark(DUPLICATE),)
    if known is not None and _contents(np.array([sample.row], dtype=MEMBER_DTYPE)[0]) not in known:
        return None, (Remark(CHANGED, sample.problems[0] if sample.problems else "its checksum is another one"),)
    if not sample.problems:
        return members, ()
    try:
        decoded = decode_sample(sample.stored.key, members)
    except BadSample as error:
        return None, (Remark(DAMAGED, str(error)),)
    mended = replace(decoded, segments=tuple(mend(segment, decoded) for segment in decoded.segments))
    left = check_sample(mended)
    if left:
        return None, (Remark(DAMAGED, left[0]),)
    told: dict[str, Any] = {JSON_SUFFIX: encode_sample(mended)[JSON_SUFFIX]}
    return members | told, tuple(Remark(MENDED, problem) for problem in sample.problems)


def mend(segment: Segment, sample: Sample) -> Segment:
    """The segment with its box and area from the label map, and its noun at its only place in the caption."""
    if segment.start < 0 or sample.caption[segment.start : segment.end] != segment.noun:
        places = [found.span() for found in re.finditer(rf"\b{re.escape(segment.noun)}\b", sample.caption)]
        alone = [other.noun for other in sample.segments].count(segment.noun) == 1
        if segment.noun and alone and len(places) == 1:
            segment = replace(segment, start=places[0][0], end=places[0][1])
    mask = sample.labels == segment.id
    if 0 < segment.id <= MAX_ID and mask.any():
        segment = replace(segment, bbox=bounding_box(mask), area=int(mask.sum()))
    return segment
