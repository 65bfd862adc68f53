"""Where the members of each sample lie in a shard: the scan of a tar file, and the check of a member's header."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moa_train.data.schema import IMAGE_SUFFIXES, JSON_SUFFIX, KINDS, LABELS_SUFFIX, BadSample, kind_of, split_name

BLOCK = tarfile.BLOCKSIZE

MEMBER_DTYPE = np.dtype(
    [("shard", "<u4")]
    + [(f"{kind}_{what}", code) for kind in KINDS for what, code in (("offset", "<u8"), ("size", "<u4"))]
)
"""One row a sample: its shard's number, and of each member the byte offset of its content and its size (0: absent)."""


@dataclass(frozen=True)
class StoredSample:
    """A sample as it lies in a shard: suffix -> (byte offset of the content, size)."""

    key: str
    members: dict[str, tuple[int, int]]

    def row(self, shard: int) -> tuple[int, ...]:
        """The sample's row of a `MEMBER_DTYPE` array."""
        places = {kind_of(suffix): place for suffix, place in self.members.items()}
        return (shard, *(number for kind in KINDS for number in places.get(kind, (0, 0))))


def scan_shard(path: Path) -> tuple[list[StoredSample], list[str]]:
    """The samples of a shard and what is wrong with it as a tar file; contents are not read.

    Each problem is `KEY problem`, or `- problem` where no key can be told.
    """
    samples: list[StoredSample] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                key, suffix = split_name(info.name)
                if not info.isfile() or kind_of(suffix) is None:
                    continue
                if not samples or samples[-1].key != key or suffix in samples[-1].members:
                    samples.append(StoredSample(key, {}))
                samples[-1].members[suffix] = (info.offset_data, info.size)
            problems = _check_end(path, tar.offset)
    except (tarfile.TarError, EOFError) as error:
        where = samples[-1].key if samples else "-"
        problems = [f"{where} truncated or damaged tar file: {error}"]
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
    if info.size != size:
        raise BadSample(f"member {info.name} has {info.size} bytes, the index says {size}")
    return split_name(info.name)


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
    return problems + [f"{sample.key} member {sample.key}.{suffix} is missing" for suffix in lacking]
