"""Files of a data set's folder: local ones in place, remote ones (http, s3, gs, ... by fsspec) through a cache."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

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


class Storage:
    """The folder of one split.

    Args:
        location: a local folder, or a URL that fsspec opens.
        cache: local folder for what is fetched from a URL; files are kept under their hash.
    """

    def __init__(self, location: str | Path, cache: str | Path | None = None) -> None:
        self.location = str(location).rstrip("/")
        self.remote = "://" in self.location
        self.cache = Path(cache or DEFAULT_CACHE).expanduser()

    def path(self, name: str, sha256: str) -> Path:
        """A local path of a file; a remote one is fetched once and must have this hash.

        Raises:
            ValueError: what was fetched has another hash.
        """
        if not self.remote:
            return Path(self.location) / name
        target = self.cache / f"{sha256[:32]}-{name}"
        if not target.exists():
            self._fetch(name, sha256, target)
        return target

    def read(self, name: str) -> bytes:
        """The content of a small file.

        Raises:
            FileNotFoundError: there is none.
        """
        if not self.remote:
            return (Path(self.location) / name).read_bytes()
        import fsspec

        with fsspec.open(f"{self.location}/{name}", "rb") as file:
            return bytes(file.read())

    def _fetch(self, name: str, sha256: str, target: Path) -> None:
        import fsspec

        digest = hashlib.sha256()
        with fsspec.open(f"{self.location}/{name}", "rb") as source, replacing(target) as copy:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                copy.write(chunk)
            if digest.hexdigest() != sha256:
                raise ValueError(
                    f"{self.location}/{name} has SHA-256 {digest.hexdigest()}, its index says {sha256}: "
                    "the file was changed or the transfer failed; try again or pack it anew"
                )
