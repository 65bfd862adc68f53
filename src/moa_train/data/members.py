"""Where the members of each sample lie in a shard: the scan of a tar file, and the check of a member's header."""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moa_train.data.schema import (
    IMAGE_SUFFIXES,
    JSON_SUFFIX,
    KINDS,
    LABELS_SUFFIX,
    BadSample,
    kind_of,
    one_line,
    split_name,
)

BLOCK = tarfile.BLOCKSIZE

MEMBER_DTYPE = np.dtype(
    [("shard", "<u4")]
    + [(f"{kind}_{what}", code) for kind in KINDS for what, code in (("offset", "<u8"), ("size", "<u4"))]
    + [(f"{kind}_crc", "<u4") for kind in KINDS]
)
"""One row a sample: its shard's number, and of each member the byte offset of its content, its size (0: absent) and
its CRC-32."""
UNCHECKED_DTYPE = np.dtype([field for field in MEMBER_DTYPE.descr if not field[0].endswith("_crc")])
"""Rows of sets that were packed before there were checksums."""


@dataclass(frozen=True)
class StoredSample:
    """A sample as it lies in a shard: suffix -> (byte offset of the content, size)."""

    key: str
    members: dict[str, tuple[int, int]]

    def read(self, file: int) -> dict[str, bytes]:
        """The members by suffix, from the open shard."""
        return {suffix: os.pread(file, size, offset) for suffix, (offset, size) in self.members.items()}

    def row(self, shard: int, contents: Mapping[str, bytes]) -> tuple[int, ...]:
        """The sample's row of a `MEMBER_DTYPE` array."""
        places = {kind_of(suffix): place for suffix, place in self.members.items()}
        crcs = {kind_of(suffix): zlib.crc32(content) for suffix, content in contents.items()}
        return (
            shard,
            *(number for kind in KINDS for number in places.get(kind, (0, 0))),
            *(crcs.get(kind, 0) for kind in KINDS),
        )


def scan_shard(path: Path) -> tuple[list[StoredSample], list[str]]:
    """The samples of a shard and what is wrong with it as a tar file; contents are not read.

    Behind a damaged header the scan goes on with the next sound one. Each problem is `KEY problem`, or `- problem`
    where no key can be told.
    """
    samples: list[StoredSample] = []
    problems: list[str] = []
    end = 0
    try:
        with tarfile.open(path, "r:", ignore_zeros=True) as tar:
            for info in tar:
                if info.offset > end:
                    problems.append(_gap(end, info.offset))
                end = tar.offset
                key, suffix = split_name(info.name)
                if kind_of(suffix) is None or info.isdir():
                    continue
                refused = _refused(path, info)
                if refused:
                    problems.append(f"{one_line(key)} member {one_line(info.name)!r} {refused}")
                    continue
                if not samples or samples[-1].key != key or suffix in samples[-1].members:
                    samples.append(StoredSample(key, {}))
                samples[-1].members[suffix] = (info.offset_data, info.size)
            problems += _check_end(path, end)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        where = samples[-1].key if samples else "-"
        problems.append(f"{where} truncated or damaged tar file: {error}")
    return samples, problems + [problem for sample in samples for problem in _missing(sample)]


def check_header(block: bytes, size: int) -> tuple[str, str]:
    """Key and suffix of the member whose tar header this is.

    Raises:
        BadSample: it is no header, or that of a member of another size: index and shard do not fit.
    """
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise BadSample(f"no tar header where the index says ({error})") from error
    if not info.name.isprintable():
        raise BadSample(f"member {one_line(info.name)} has a name of unprintable or undecodable characters")
    if not info.isreg():
        raise BadSample(f"member {one_line(info.name)} is no plain file")
    if info.size != size:
        raise BadSample(f"member {info.name} has {info.size} bytes, the index says {size}")
    return split_name(info.name)


def _gap(start: int, end: int) -> str:
    return f"- damaged tar header at byte {start}: {end - start} bytes up to the next sound header are lost"


def _refused(path: Path, info: tarfile.TarInfo) -> str:
    """Why a member is not taken, however sound its content; empty: it is."""
    if not info.isreg() or info.issparse():
        return "is no plain file"
    if info.name.startswith("/") or ".." in info.name.split("/") or "\\" in info.name:
        return "has a path that leads out of the folder it is unpacked in"
    if not info.name.isprintable():
        return "has a name of unprintable or undecodable characters"
    with path.open("rb") as file:
        file.seek(info.offset_data - BLOCK)
        header = file.read(BLOCK)
    if tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name != info.name:
        return "has a name too long for its own tar header: give shorter keys"
    return ""


def _check_end(path: Path, offset: int) -> list[str]:
    """A sound tar ends with zero blocks; the tar reader stops without a word at a damaged header."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(BLOCK)
    if len(block) < BLOCK:
        return ["- truncated tar file: the end-of-archive marker is missing"]
    if any(block):
        return [f"- damaged tar header at byte {offset}: what follows cannot be read"]
    return []


def _missing(sample: StoredSample) -> list[str]:
    """Members that the schema demands and this sample lacks."""
    images = [suffix for suffix in sample.members if suffix in IMAGE_SUFFIXES]
    problems = []
    if len(images) != 1:
        problems.append(f"{sample.key} has {len(images)} pictures, expected one of {', '.join(IMAGE_SUFFIXES)}")
    lacking = [suffix for suffix in (LABELS_SUFFIX, JSON_SUFFIX) if suffix not in sample.members]
    problems += [f"{sample.key} member {sample.key}.{suffix} is missing" for suffix in lacking]
    empty = [suffix for suffix, (_, size) in sample.members.items() if not size]
    return problems + [f"{sample.key} member {sample.key}.{suffix} is empty (0 bytes)" for suffix in empty]
