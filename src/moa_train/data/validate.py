"""Finds what is wrong with shards: one line a problem, with shard and key, as DATA's list has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from moa_train.data.members import MEMBER_DTYPE, StoredSample, scan_shard
from moa_train.data.schema import BadSample, check_sample, decode_sample
from moa_train.data.shards import ShardIndex
from moa_train.data.storage import sha256_of


def find_problems(
    folder: str | Path, max_subjects: int | None = None, on_shard: Callable[[int], None] | None = None
) -> Iterator[str]:
    """Problems of the shards in the folder of one split: `SHARD KEY problem`.

    Tar structure, completeness, contents of every sample, duplicate keys, and count, bytes, hash and member offsets
    against `index.json`. Nothing is changed.

    Args:
        max_subjects: samples with more subjects are problems; None: any number is fine (training takes some of them).
        on_shard: called with the number of shards done.

    Raises:
        ValueError: there is no index, or it is damaged.
    """
    index = ShardIndex.load(folder)
    keys: Counter[str] = Counter()
    listed = {shard.name for shard in index.shards}
    for path in sorted(Path(folder).glob("*.tar")):
        if path.name not in listed:
            yield f"{path.name} - not in the index: nothing reads it"
    for number, shard in enumerate(index.shards):
        path = Path(folder) / shard.name
        if not path.is_file():
            yield f"{shard.name} - missing"
            continue
        samples, problems = scan_shard(path)
        if not problems:  # else the offsets say nothing new
            problems += _against_index(index, number, samples)
        problems += _contents(path, samples, keys, max_subjects)
        problems += _totals(path, shard.count, shard.bytes, shard.sha256, len(samples))
        yield from (f"{shard.name} {problem}" for problem in problems)
        if on_shard is not None:
            on_shard(number + 1)


def _against_index(index: ShardIndex, number: int, samples: list[StoredSample]) -> list[str]:
    rows = np.array([sample.row(number) for sample in samples], dtype=MEMBER_DTYPE)
    told = index.members[index.members["shard"] == number]
    if len(rows) == len(told) and (rows == told).all():
        return []
    first = next((i for i, (a, b) in enumerate(zip(rows, told, strict=False)) if a != b), min(len(rows), len(told)))
    key = samples[first].key if first < len(samples) else "-"
    return [f"{key} the index has other member offsets from sample {first} of this shard on"]


def _contents(path: Path, samples: list[StoredSample], keys: Counter[str], max_subjects: int | None) -> list[str]:
    problems = []
    with path.open("rb") as file:
        for sample in samples:
            keys[sample.key] += 1
            if keys[sample.key] > 1:
                problems.append(f"{sample.key} duplicate key")
            members = {}
            for suffix, (offset, size) in sample.members.items():
                file.seek(offset)
                members[suffix] = file.read(size)
            try:
                found = check_sample(decode_sample(sample.key, members), max_subjects)
            except BadSample as error:
                found = [] if "is missing" in str(error) else [str(error)]  # the scan names missing members
            problems += [f"{sample.key} {problem}" for problem in found]
    return problems


def _totals(path: Path, count: int, size: int, sha256: str, found: int) -> list[str]:
    problems = []
    if found != count:
        problems.append(f"- holds {found} samples, the index says {count}")
    if path.stat().st_size != size:
        problems.append(f"- has {path.stat().st_size} bytes, the index says {size}")
    elif sha256_of(path) != sha256:
        problems.append("- its SHA-256 is not the index's: the content was changed")
    return problems
