"""Shards: WebDataset tars that plain tools read, written atomically, with an index that makes any sample one seek away.

The folder of a split holds `train-000000.tar` ..., `train-members.npy` (where each member of each sample lies) and
`index.json` (schema version, split, per shard its name, count, bytes and sha256, totals, packing command and config).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moa_train.data.members import BLOCK, MEMBER_DTYPE, UNCHECKED_DTYPE, check_header, scan_shard
from moa_train.data.schema import KINDS, SCHEMA_VERSION, BadSample, Sample, decode_sample, kind_of
from moa_train.data.storage import Cache, Storage, replacing, sha256_of

log = logging.getLogger(__name__)

INDEX_NAME = "index.json"
_ADD_CHECKSUMS = "moa-data index DIR overwrite=true"


@dataclass(frozen=True)
class Shard:
    """One tar file: name, samples, bytes, SHA-256.

    left_out: samples and stretches of it that the index leaves out because they are damaged.
    """

    name: str
    count: int
    bytes: int
    sha256: str
    left_out: int = 0

    def __post_init__(self) -> None:
        numbers = (self.count, self.bytes, self.left_out)
        if not isinstance(self.name, str) or Path(self.name).name != self.name or not isinstance(self.sha256, str):
            raise ValueError(f"a shard has the name {self.name!r} and the hash {self.sha256!r}")
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"shard {self.name} has the count, bytes and left_out {numbers}")


class ShardIndex:
    """The shards of one split and where every sample lies in them. `len(index)` counts samples."""

    def __init__(
        self, storage: Storage, split: str, shards: tuple[Shard, ...], members: np.ndarray, packing: dict[str, Any]
    ) -> None:
        self.storage = storage
        self.split = split
        self.shards = shards
        self.members = members
        self.packing = packing

    def __len__(self) -> int:
        return len(self.members)

    @property
    def counts(self) -> np.ndarray:
        """Samples in each shard."""
        return np.array([shard.count for shard in self.shards], dtype=np.int64)

    @property
    def hash(self) -> str:
        """Identity of the data: equal if and only if every shard has the same content in the same place."""
        told = [SCHEMA_VERSION, [[shard.name, shard.count, shard.sha256] for shard in self.shards]]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    @classmethod
    def load(cls, location: str | Path, cache: Cache | str | Path | None = None) -> ShardIndex:
        """Read the index of one split: a local folder or a URL.

        Raises:
            ValueError: there is no index, or it is damaged or of another version.
        """
        storage = Storage(location, cache)
        told = _read_index(storage)
        if told.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"{storage.location}/{INDEX_NAME} has schema version {told.get('schema_version')}, "
                f"expected {SCHEMA_VERSION}: pack the data with this version of moa-data"
            )
        try:
            shards = tuple(Shard(**shard) for shard in told["shards"])
            file, sha256 = str(told["members"]["file"]), str(told["members"]["sha256"])
            split, samples, packing = str(told["split"]), int(told["samples"]), dict(told["packing"])
            if Path(file).name != file or sum(shard.count for shard in shards) != samples:
                raise ValueError("its numbers of samples disagree, or a file has no plain name")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{storage.location}/{INDEX_NAME} is damaged ({error}): moa-data index DIR overwrite=true makes it anew"
            ) from error
        path = storage.path(file, sha256)
        if not path.is_file() or sha256_of(path) != sha256:
            raise ValueError(f"{path} is missing or not the one that {INDEX_NAME} describes: pack the data again")
        members = np.load(path, mmap_mode="r", allow_pickle=False)
        if members.dtype not in (MEMBER_DTYPE, UNCHECKED_DTYPE) or len(members) != samples:
            raise ValueError(f"{path} holds {len(members)} samples, {INDEX_NAME} says {samples}")
        if not np.array_equal(np.bincount(members["shard"], minlength=len(shards)), [s.count for s in shards]):
            raise ValueError(f"{path} and {INDEX_NAME} count other samples in a shard: make the index anew")
        index = cls(storage, split, shards, members, packing)
        if not index.checked:
            log.warning("%s has no checksums of samples: %s adds them", storage.location, _ADD_CHECKSUMS)
        return index

    @property
    def checked(self) -> bool:
        """Whether each sample has checksums, which reading compares."""
        return bool(self.members.dtype == MEMBER_DTYPE)

    def save(self) -> None:
        """Write `SPLIT-members.npy`, then `index.json`, beside the shards of a local folder; each atomically."""
        folder = Path(self.storage.location)
        path = folder / f"{self.split}-members.npy"
        with replacing(path) as file:
            np.save(file, self.members)
        told = {
            "schema_version": SCHEMA_VERSION,
            "split": self.split,
            "samples": len(self),
            "bytes": sum(shard.bytes for shard in self.shards),
            "members": {"file": path.name, "sha256": sha256_of(path)},
            "shards": [asdict(shard) for shard in self.shards],
            "packing": self.packing,
        }
        with replacing(folder / INDEX_NAME) as file:
            file.write(json.dumps(told, indent=1).encode())


def index_shards(
    folder: str | Path, split: str, shards: tuple[Shard, ...], packing: dict[str, Any] | None = None
) -> ShardIndex:
    """Make and save the index of shards that lie in a local folder.

    Raises:
        ValueError: a shard is damaged or a sample is incomplete; the message names shard, key and problem.
    """
    rows = []
    for number, shard in enumerate(shards):
        path = Path(folder) / shard.name
        samples, problems = scan_shard(path)
        if problems:
            raise ValueError(f"{shard.name} {problems[0]}")
        with path.open("rb") as file:
            rows += [sample.row(number, sample.read(file.fileno())) for sample in samples]
    index = ShardIndex(Storage(folder), split, shards, np.array(rows, dtype=MEMBER_DTYPE), packing or {})
    index.save()
    return index


class ShardReader:
    """Samples by number: by `pread`, no file position shared between workers.

    Args:
        index: what to read.
        open_shards: files held open at once; the longest unused is closed.
    """

    def __init__(self, index: ShardIndex, open_shards: int = 16) -> None:
        self.index = index
        self.open_shards = open_shards
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Sample:
        """Sample `number` of the split.

        Raises:
            BadSample: it cannot be read; the message names shard and key.
        """
        key, members = self.read(number)
        try:
            return decode_sample(key, members)
        except BadSample as error:
            raise BadSample(f"shard {self._shard(number).name}, key {key}: {error}") from error

    def read(self, number: int, kinds: tuple[str, ...] = KINDS) -> tuple[str, dict[str, bytes]]:
        """Key and members (by suffix) of sample `number`, as stored; of all kinds, or only those named.

        Raises:
            BadSample: the shard ends early, other members lie where the index says, or a content was changed.
        """
        row = self.index.members[number]
        shard, file = self.index.shards[row["shard"]].name, self._file(int(row["shard"]))
        keys, members = set(), {}
        for kind in kinds:
            offset, size = int(row[f"{kind}_offset"]), int(row[f"{kind}_size"])
            if not size:
                continue
            header, content = os.pread(file, BLOCK, offset - BLOCK), os.pread(file, size, offset)
            if len(content) < size:
                end = offset + size
                raise BadSample(f"shard {shard}, sample {number}: the file ends before byte {end}: it is truncated")
            try:
                key, suffix = check_header(header, size)
            except BadSample as error:
                raise BadSample(f"shard {shard}, sample {number}: {error}") from error
            if kind_of(suffix) != kind:
                raise BadSample(f"shard {shard}, key {key}: the index expects the {kind} where {key}.{suffix} lies")
            keys.add(key)
            members[suffix] = content
        if not members:
            raise BadSample(f"shard {shard}, sample {number}: the index knows none of its members")
        if len(keys) > 1:
            raise BadSample(f"shard {shard}, key {min(keys)}: mixed with the members of {', '.join(sorted(keys)[1:])}")
        for suffix, content in members.items():
            if self.index.checked and zlib.crc32(content) != row[f"{kind_of(suffix)}_crc"]:
                where = f"shard {shard}, key {key}"
                raise BadSample(f"{where}: {key}.{suffix} was changed since it was indexed (CRC-32)")
        return key, members

    def close(self) -> None:
        """Close every file."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _shard(self, number: int) -> Shard:
        return self.index.shards[int(self.index.members[number]["shard"])]

    def _file(self, shard: int) -> int:
        """An open file descriptor of a shard."""
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        while len(self._files) >= self.open_shards:
            os.close(self._files.popitem(last=False)[1])
        told = self.index.shards[shard]
        try:
            self._files[shard] = self.index.storage.open(told.name, told.sha256)
        except OSError as error:
            raise ValueError(f"shard {told.name} cannot be opened: {error}; run moa-data validate on it") from error
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self) -> None:
        self.close()


def _read_index(storage: Storage) -> dict[str, Any]:
    where = f"{storage.location}/{INDEX_NAME}"
    try:
        return dict(json.loads(storage.read(INDEX_NAME)))
    except (FileNotFoundError, NotADirectoryError) as error:
        splits = [] if storage.remote else sorted(Path(storage.location).glob(f"*/{INDEX_NAME}"))
        hint = (
            f"; did you mean {splits[0].parent}?" if splits else ": give the folder of one split, as moa-data wrote it"
        )
        raise ValueError(f"there is no {where}{hint}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where} is damaged ({error}): pack the data again") from error
