"""A function over many numbers by worker processes: results in order, and never more than a few of them waiting."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

T = TypeVar("T")
_CHUNK = 8
"""Numbers that a worker is sent at once."""
_AHEAD = 3
"""Chunks under way for each worker: memory does not grow with the length of the work."""


def ordered_map(function: Callable[[int], T], numbers: Sequence[int], workers: int) -> Generator[T, None, None]:
    """`map(function, numbers)`, by `workers` processes; 0: by this one.

    The function is sent to each worker once. Workers end with this process, however it ends.

    Raises:
        ValueError: a worker was killed, most likely for want of memory.
    """
    if not workers:
        yield from map(function, numbers)
        return
    pool = ProcessPoolExecutor(workers, initializer=_start, initargs=(function,))
    waiting: deque[Future[list[T]]] = deque()
    try:
        for first in range(0, len(numbers), _CHUNK):
            waiting.append(pool.submit(_work, numbers[first : first + _CHUNK]))
            if len(waiting) > _AHEAD * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            f"one of the {workers} worker processes was killed, most likely for want of memory: "
            "give fewer workers; what is complete is kept"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Worker:
    """What a worker process does; set once when it starts."""

    function: Callable[[int], Any]


def _start(function: Callable[[int], Any]) -> None:
    _Worker.function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _work(numbers: Sequence[int]) -> list[Any]:
    return [_Worker.function(number) for number in numbers]
