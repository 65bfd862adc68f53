"""Finds what is wrong with shards: one line a problem, with shard and key, as DATA's list has them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from moa_train.data.members import MEMBER_DTYPE, StoredSample, scan_shard
from moa_train.data.parallel import ordered_map
from moa_train.data.schema import KINDS, BadSample, check_sample, decode_sample
from moa_train.data.shards import INDEX_NAME, Shard, ShardIndex
from moa_train.data.storage import Storage, sha256_of


@dataclass(frozen=True)
class Checked:
    """A sample of a shard: its row of `MEMBER_DTYPE` (shard 0) and what is wrong with it."""

    stored: StoredSample
    row: tuple[int, ...]
    problems: list[str]


@dataclass(frozen=True)
class CheckedShard:
    """A shard as it lies there: each sample with its problems, and the problems of the tar file itself."""

    shard: Shard
    samples: list[Checked]
    problems: list[str]


def check_shard(path: Path, max_subjects: int | None = None) -> CheckedShard:
    """Structure of a tar file and contents of every sample; no index is needed."""
    samples, problems = scan_shard(path)
    own: dict[str, list[str]] = {sample.key: [] for sample in samples}
    structure = []
    for problem in problems:
        key, _, told = problem.partition(" ")
        own[key].append(told) if key in own and "tar file" not in told else structure.append(problem)
    checked = []
    file = os.open(path, os.O_RDONLY)
    try:
        for sample in samples:
            members = sample.read(file)
            found = own[sample.key] or _contents(sample.key, members, max_subjects)
            checked.append(Checked(sample, sample.row(0, members), found))
    finally:
        os.close(file)
    return CheckedShard(Shard(path.name, len(samples), path.stat().st_size, sha256_of(path)), checked, structure)


def _contents(key: str, members: dict[str, bytes], max_subjects: int | None) -> list[str]:
    try:
        return check_sample(decode_sample(key, members), max_subjects)
    except BadSample as error:
        return [str(error)]


def tars_of(folder: str | Path) -> list[Path]:
    """The shards that lie in a folder.

    Raises:
        ValueError: there is none, or the folder is a URL.
    """
    if "://" in str(folder):
        raise ValueError(f"{folder} is a URL; shards are checked in a local folder: copy them there first")
    paths = sorted(Path(folder).glob("*.tar"))
    if not paths:
        raise ValueError(f"there is no .tar in {folder}: give the folder of one split")
    return paths


def check_shards(
    paths: list[Path], max_subjects: int | None = None, workers: int = 0
) -> Iterator[tuple[Path, CheckedShard]]:
    """`check_shard` of each path in order, by `workers` processes; 0: by this one."""
    with closing(ordered_map(partial(_check_path, paths, max_subjects), range(len(paths)), workers)) as shards:
        yield from zip(paths, shards, strict=True)


def _check_path(paths: list[Path], max_subjects: int | None, number: int) -> CheckedShard:
    return check_shard(paths[number], max_subjects)


def find_problems(
    folder: str | Path,
    max_subjects: int | None = None,
    on_shard: Callable[[int], None] | None = None,
    workers: int = 0,
) -> Iterator[str]:
    """Problems of the shards in the folder of one split: `SHARD KEY problem`.

    Tar structure, completeness, contents of every sample, duplicate keys, and count, bytes, hash, member offsets and
    checksums against `index.json`. Nothing is changed.

    Args:
        max_subjects: samples with more subjects are problems; None: any number is fine (training takes some of them).
        on_shard: called with the number of shards done.
        workers: processes; 0: this one.

    Raises:
        ValueError: there is neither a shard nor an index.
    """
    try:
        index = ShardIndex.load(folder)
    except ValueError as error:
        tars_of(folder)  # else there is nothing to check
        yield f"{INDEX_NAME} - {error}"
        index = None
    if index is not None and not index.checked:
        yield f"{INDEX_NAME} - has no checksums of samples: moa-data index {folder} overwrite=true adds them"
    listed = {} if index is None else {shard.name: number for number, shard in enumerate(index.shards)}
    paths = sorted(Path(folder).glob("*.tar"))
    if index is not None:
        yield from (f"{path.name} - not in the index: nothing reads it" for path in paths if path.name not in listed)
        yield from (f"{name} - missing" for name in listed if not (Path(folder) / name).is_file())
        paths = [path for path in paths if path.name in listed]
    keys: dict[str, str] = {}
    for done, (path, found) in enumerate(check_shards(paths, max_subjects, workers), 1):
        problems = _problems_of(found, keys)
        lines = [problem for _, problem in problems]
        if index is not None:
            lines = _with_index(index, listed[path.name], found, problems)
        yield from (f"{path.name} {line}" for line in lines)
        if on_shard is not None:
            on_shard(done)


def _problems_of(found: CheckedShard, keys: dict[str, str]) -> list[tuple[int | None, str]]:
    """(number of the sample, problem) of a shard; the number is None where the tar file itself is damaged."""
    problems: list[tuple[int | None, str]] = [(None, problem) for problem in found.problems]
    for number, sample in enumerate(found.samples):
        key = sample.stored.key
        if key in keys:
            problems.append((number, f"{key} duplicate key: it is also in {keys[key]}"))
        keys.setdefault(key, found.shard.name)
        problems += [(number, f"{key} {problem}") for problem in sample.problems]
    return problems


def _with_index(
    index: ShardIndex, number: int, found: CheckedShard, problems: list[tuple[int | None, str]]
) -> list[str]:
    """All problems of a shard that the index tells of; what it leaves out on purpose is none."""
    told, there = index.shards[number], found.shard
    rows = np.array([sample.row for sample in found.samples], dtype=MEMBER_DTYPE)
    known = index.members[index.members["shard"] == number]
    places = {_place(row): row for row in known}
    indexed = {i for i, row in enumerate(rows) if _place(row) in places}
    same = there.sha256 == told.sha256
    if same and told.left_out:
        return [problem for i, problem in problems if i is not None and i in indexed]
    lines = [problem for _, problem in problems]
    lines += _against_index(index.checked, known, rows, found, indexed)
    if there.count != told.count:
        lines.append(f"- holds {there.count} samples, the index says {told.count}")
    if there.bytes != told.bytes:
        lines.append(f"- has {there.bytes} bytes, the index says {told.bytes}")
    elif not same:
        lines.append("- its SHA-256 is not the index's: the content was changed")
    return lines


def _against_index(
    checked: bool, known: np.ndarray, rows: np.ndarray, found: CheckedShard, indexed: set[int]
) -> list[str]:
    places = {_place(row): row for row in known}
    if not indexed and len(known):
        return ["- none of its samples lies where the index says: it is the index of another set"]
    lines = []
    for i, row in enumerate(rows):
        stored = found.samples[i].stored
        if i not in indexed:
            lines.append(f"{stored.key} the index has other member offsets")
        elif checked:
            changed = [kind for kind in KINDS if row[f"{kind}_crc"] != places[_place(row)][f"{kind}_crc"]]
            lines += [f"{stored.key} its {kind} was changed since it was indexed (CRC-32)" for kind in changed]
    lost = len(known) - len(indexed)
    return lines + ([f"- {lost} samples of the index are not where it says"] if lost > 0 else [])


def _place(row: np.void) -> tuple[int, ...]:
    """Offsets and sizes of a sample's members."""
    return tuple(int(row[f"{kind}_{what}"]) for kind in KINDS for what in ("offset", "size"))


def index_folder(
    folder: str | Path,
    split: str,
    *,
    leave_out: bool = False,
    overwrite: bool = False,
    workers: int = 0,
    on_shard: Callable[[int], None] | None = None,
) -> tuple[ShardIndex | None, list[str]]:
    """Index the tars that lie in a folder, whatever wrote them; every sample is checked first.

    Args:
        leave_out: damaged and incomplete samples are left out of the index; else one such sample and none is written.
        overwrite: an index that is there already is replaced.

    Returns:
        The index (None: it was not written) and the problems, `SHARD KEY problem`.

    Raises:
        ValueError: there is an index already, no shard, or no sound sample.
    """
    if (Path(folder) / INDEX_NAME).exists() and not overwrite:
        raise ValueError(f"{folder} has an index already: overwrite=true replaces it")
    keys: dict[str, str] = {}
    shards: list[Shard] = []
    rows: list[tuple[int, ...]] = []
    told: list[str] = []
    for done, (path, found) in enumerate(check_shards(tars_of(folder), workers=workers), 1):
        problems = _problems_of(found, keys)
        bad = {number for number, _ in problems if number is not None}
        sound = [sample.row[1:] for i, sample in enumerate(found.samples) if i not in bad]
        if sound:
            rows += [(len(shards), *row) for row in sound]
            shards.append(replace(found.shard, count=len(sound), left_out=len(bad) + len(found.problems)))
        told += [f"{path.name} {problem}" for _, problem in problems]
        if on_shard is not None:
            on_shard(done)
    if not rows:
        raise ValueError(f"no sample of {folder} is sound: {'; '.join(told[:3])}")
    if told and not leave_out:
        return None, told
    packing = {"command": "moa-data index", "config": {"leave_out": leave_out}}
    index = ShardIndex(Storage(folder), split, tuple(shards), np.array(rows, dtype=MEMBER_DTYPE), packing)
    index.save()
    return index, told
