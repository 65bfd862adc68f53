"""Bytes behind a URL (http, s3, gs, ... by fsspec): patient with servers that fail a while, clear about the rest."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

_LONGEST_WAIT = 30.0
_EXTRAS = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}
"""Protocol -> the package that serves it, and the extra of moa-train that installs it."""
_WORTH_ANOTHER_TRY = (408, 429)
"""Answers of a server below 500 that may be another one later: time-out, too many requests."""


class WrongBytes(Exception):
    """What was fetched is not what was expected: perhaps a transfer that went wrong."""


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for.

    tries: in all. timeout: seconds to connect, and seconds without a byte. wait: seconds before the second try; it
    doubles from try to try, up to half a minute.
    """

    tries: int = 5
    timeout: float = 60.0
    wait: float = 1.0

    def __post_init__(self) -> None:
        if self.tries < 1 or self.timeout <= 0:
            raise ValueError(
                f"fetch_tries is {self.tries}, fetch_timeout {self.timeout}; expected 1 or more, and above 0"
            )


def read_url(url: str, patience: Patience) -> bytes:
    """The content of a small file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be had; the message says why.
    """

    def get() -> bytes:
        filesystem, path = _open_filesystem(url, patience.timeout)
        return bytes(filesystem.cat_file(path))

    return _patiently(get, url, patience)


def copy_url(url: str, path: Path, patience: Patience, check: Callable[[Path], None]) -> None:
    """Write what lies behind a URL to a local file.

    Args:
        check: called with the file; what it raises as `WrongBytes` is worth another try.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be had; the message says why.
    """

    def get() -> None:
        filesystem, remote = _open_filesystem(url, patience.timeout)
        filesystem.get_file(remote, str(path))
        check(path)

    _patiently(get, url, patience)


def _patiently(get: Callable[[], T], url: str, patience: Patience) -> T:
    for number in range(1, patience.tries + 1):
        try:
            return get()
        except Exception as error:  # noqa: PERF203 - a loop over tries
            if isinstance(error, (FileNotFoundError, ValueError)):
                raise
            if _is_lasting(error):
                raise ValueError(f"{url} cannot be read: {_told(error)}") from error
            if number == patience.tries:
                raise ValueError(f"{url} cannot be read after {number} tries: {_told(error)}") from error
            seconds = min(patience.wait * 2 ** (number - 1), _LONGEST_WAIT)
            log.warning("%s: %s; try %d of %d in %g s", url, _told(error), number + 1, patience.tries, seconds)
            time.sleep(seconds)
    raise AssertionError("the last try returns or raises")


def _is_lasting(error: Exception) -> bool:
    """Whether another try would meet the same: no access, a full disk, a mistake of ours."""
    status = getattr(error, "status", None)  # of aiohttp's and gcsfs' errors
    refused = isinstance(status, int) and 400 <= status < 500 and status not in _WORTH_ANOTHER_TRY
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return refused or full or isinstance(error, (PermissionError, TypeError, AttributeError, NotImplementedError))


def _told(error: Exception) -> str:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"the server answers {status} {getattr(error, 'message', '')}".rstrip()
    return " ".join(f"{type(error).__name__} {error}".split())


def _open_filesystem(url: str, timeout: float) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the file's path in it."""
    import fsspec

    protocol = fsspec.utils.get_protocol(url)
    try:
        return fsspec.core.url_to_fs(url, **_timeout_options(protocol, timeout))
    except ImportError as error:
        package, extra = _EXTRAS.get(protocol, (None, None))
        what = f"the package {package}: pip install 'moa-train[{extra}]'" if package else f"another package ({error})"
        raise ValueError(f"{url}: reading {protocol}:// needs {what}") from error


def _timeout_options(protocol: str, seconds: float) -> dict[str, Any]:
    """Each file system has its own name for it. The default of http would end any transfer after five minutes."""
    if protocol in ("http", "https"):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, connect=seconds, sock_connect=seconds, sock_read=seconds)
        return {"client_kwargs": {"timeout": limits}}
    if protocol in ("s3", "s3a"):
        return {"config_kwargs": {"connect_timeout": seconds, "read_timeout": seconds}}
    return {}
