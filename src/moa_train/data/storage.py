"""Files of a data set's folder: local ones in place, remote ones (http, s3, gs, ... by fsspec) through a cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from moa_train.data.remote import Patience, WrongBytes, copy_url, read_url

DEFAULT_CACHE = "~/.cache/moa_train/shards"
_CHUNK = 1 << 22


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` once it is complete and on disk; an error leaves `path` alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class Cache:
    """A local folder of fetched files, shared by all processes of a machine; files are kept under their hash.

    A file is fetched once, whoever asks: others wait for it. Each has the hash it was asked for, or does not appear.
    Above the bound the least recently used go; one that any process holds open stays (a shared `flock` says so).

    folder: null of the configuration is the default. gigabytes: the bound, 10^9 bytes; None: no bound. The files
    that are open or being fetched may exceed it. patience: with the servers.
    """

    folder: Path
    gigabytes: float | None = None
    patience: Patience = field(default_factory=Patience)

    @classmethod
    def at(cls, folder: str | Path | None, gigabytes: float | None = None, patience: Patience | None = None) -> Cache:
        """A cache in a folder; None: the default one."""
        return cls(Path(folder or DEFAULT_CACHE).expanduser(), gigabytes, patience or Patience())

    def path(self, url: str, sha256: str) -> Path:
        """Where a file is kept, once it is.

        Raises:
            ValueError: the hash, which comes from a file that may be anybody's, is none and could be a path.
        """
        if re.fullmatch("[0-9a-f]{64}", sha256) is None:
            raise ValueError(f"{url}: {sha256!r} is not a SHA-256 of 64 hexadecimal digits; the index is damaged")
        return self.folder / f"{sha256[:32]}-{url.rsplit('/', 1)[-1]}"

    def open(self, url: str, sha256: str) -> int:
        """An open file descriptor of what lies behind a URL; the file stays in the cache until it is closed.

        Raises:
            ValueError: it cannot be fetched, or has another hash.
        """
        path = self.path(url, sha256)
        handle = _hold(path)
        if handle is None:
            handle = self._fetch(url, sha256, path)
            self._make_room()
        with suppress(PermissionError):  # a cache of several users: its owner's clock then counts fetches only
            os.utime(path, ns=(time.time_ns(), time.time_ns()))
        return handle

    def _fetch(self, url: str, sha256: str, path: Path) -> int:
        def check(fetched: Path) -> None:
            found = sha256_of(fetched)
            if found != sha256:
                raise WrongBytes(
                    f"it has SHA-256 {found}, its index says {sha256}: the file was changed or the transfer failed"
                )

        with _exclusive(self.folder / ".locks" / path.name):
            handle = _hold(path)
            if handle is not None:
                return handle  # another process was quicker
            part = path.with_name(f".{path.name}.part")
            part.touch()
            writing = _hold(part)  # so that no other process makes room of it
            try:
                copy_url(url, part, self.patience, check)
                handle = os.open(part, os.O_RDONLY)
                fcntl.flock(handle, fcntl.LOCK_SH)
                os.fsync(handle)
                part.replace(path)
            except FileNotFoundError as error:
                raise ValueError(f"{url} is not there, though the index lists it") from error
            finally:
                part.unlink(missing_ok=True)
                if writing is not None:
                    os.close(writing)
            return handle

    def _make_room(self) -> None:
        """Remove the least recently used files above the bound."""
        if self.gigabytes is None:
            return
        with _exclusive(self.folder / ".locks" / ".room"):
            found = [(path, path.stat()) for path in self.folder.iterdir() if path.is_file()]
            excess = sum(told.st_size for _, told in found) - self.gigabytes * 1e9
            for path, told in sorted(found, key=lambda pair: pair[1].st_mtime_ns):
                if excess > 0 and _remove_unused(path):
                    excess -= told.st_size


class Storage:
    """The folder of one split.

    Args:
        location: a local folder, or a URL that fsspec opens.
        cache: of what is fetched from a URL, or its folder.
    """

    def __init__(self, location: str | Path, cache: Cache | str | Path | None = None) -> None:
        self.location = str(location).rstrip("/")
        self.remote = "://" in self.location
        self.cache = cache if isinstance(cache, Cache) else Cache.at(cache)
        self._held: list[int] = []

    def path(self, name: str, sha256: str) -> Path:
        """A local path of a file, as `open`; a remote one stays in the cache as long as this object lives."""
        if not self.remote:
            return Path(self.location) / name
        url = f"{self.location}/{name}"
        self._held.append(self.cache.open(url, sha256))
        return self.cache.path(url, sha256)

    def open(self, name: str, sha256: str) -> int:
        """An open file descriptor of a file; a remote one is fetched once and must have this hash.

        Raises:
            ValueError: it cannot be fetched.
            OSError: a local file cannot be opened.
        """
        if self.remote:
            return self.cache.open(f"{self.location}/{name}", sha256)
        return os.open(Path(self.location) / name, os.O_RDONLY)

    def read(self, name: str) -> bytes:
        """The content of a small file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: its server does not hand it out.
        """
        if not self.remote:
            return (Path(self.location) / name).read_bytes()
        return read_url(f"{self.location}/{name}", self.cache.patience)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": []}

    def __del__(self) -> None:
        while getattr(self, "_held", None):
            os.close(self._held.pop())


def _hold(path: Path) -> int | None:
    """Open a file that is in the cache, so that it stays there; None where it is not."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(handle, fcntl.LOCK_SH)
    if os.fstat(handle).st_nlink:
        return handle
    os.close(handle)  # removed between the two
    return None


def _remove_unused(path: Path) -> bool:
    """Remove a file that nobody holds; whether it went."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """One process or thread at a time; a process that dies lets the next one in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
