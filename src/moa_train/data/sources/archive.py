"""A folder, or a tar of it that is never unpacked: files by name, from any number of processes at once."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias


class FolderArchive:
    """A folder."""

    def __init__(self, location: str | Path) -> None:
        self.location = Path(location)

    def read(self, name: str) -> bytes:
        """The content of a file. Raises `FileNotFoundError` where there is none."""
        try:
            return (self.location / name).read_bytes()
        except NotADirectoryError as error:
            raise FileNotFoundError(name) from error


class TarArchive:
    """An uncompressed tar: its headers are read once, contents by their place when asked for.

    Args:
        location: the file.
        landmark: name of a file at the root; a folder in the tar that holds it is the root.
        on_bytes: called with the bytes passed while the headers are read.

    Raises:
        ValueError: it is compressed, no tar, or truncated.
    """

    def __init__(self, location: str | Path, landmark: str = "", on_bytes: Callable[[int], None] | None = None) -> None:
        self.location = Path(location)
        self._file: int | None = None
        self._places: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(self.location, "r:") as tar:
                for count, info in enumerate(tar):
                    if info.isfile():
                        self._places[info.name.removeprefix("./")] = (info.offset_data, info.size)
                    tar.members.clear()  # type: ignore[attr-defined]  # the tar reader keeps every header otherwise
                    if on_bytes is not None and count % 1000 == 0:
                        on_bytes(info.offset)
                self._check_end(tar.offset)
        except tarfile.ReadError as error:
            raise ValueError(self._unreadable(error)) from error
        self._set_root(landmark)

    def read(self, name: str) -> bytes:
        """The content of a file. Raises `FileNotFoundError` where there is none."""
        if name not in self._places:
            raise FileNotFoundError(name)
        if self._file is None:
            self._file = os.open(self.location, os.O_RDONLY)
        offset, size = self._places[name]
        content = os.pread(self._file, size, offset)
        if len(content) < size:
            raise OSError(f"{self.location} ends before byte {offset + size}: it has changed")
        return content

    def _set_root(self, landmark: str) -> None:
        roots = [name.removesuffix(landmark) for name in self._places if Path(name).name == landmark]
        root = min(roots, key=len, default="")
        if root:
            inside = {name: place for name, place in self._places.items() if name.startswith(root)}
            self._places = {name.removeprefix(root): place for name, place in inside.items()}

    def _check_end(self, offset: int) -> None:
        """The tar reader stops without a word at a damaged header and at a cut between two files."""
        with self.location.open("rb") as file:
            file.seek(offset)
            block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE or any(block):
            what = "has a damaged header" if any(block) else "ends early"
            raise ValueError(f"{self.location} {what} at byte {offset}: is its download complete?")

    def _unreadable(self, error: Exception) -> str:
        with self.location.open("rb") as file:
            start = file.read(6)
        for magic, name in (
            (b"\x1f\x8b", "gunzip"),
            (b"BZh", "bunzip2"),
            (b"\xfd7zXZ", "unxz"),
            (b"\x28\xb5\x2f", "unzstd"),
        ):
            if start.startswith(magic):
                return (
                    f"{self.location} is compressed, and its files cannot be reached by their place: run {name} first"
                )
        return f"{self.location} is not a tar that can be read ({error}): is its download complete?"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]


Archive: TypeAlias = FolderArchive | TarArchive


def open_archive(location: str | Path, landmark: str, on_bytes: Callable[[int], None] | None = None) -> Archive:
    """A folder or a tar by its path; `landmark` names a file at the root.

    Raises:
        ValueError: there is neither, or the tar cannot be used.
    """
    path = Path(location)
    if path.is_file():
        return TarArchive(path, landmark, on_bytes)
    if not path.is_dir():
        raise ValueError(f"{path} is neither a folder nor a tar file")
    if not (path / landmark).is_file():
        below = sorted(path.glob(f"*/{landmark}"))
        if below:
            return FolderArchive(below[0].parent)
    return FolderArchive(path)
