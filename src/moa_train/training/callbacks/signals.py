"""Signals that ask a run to stop: noted when they come, acted on where a step has ended."""

from __future__ import annotations

import signal
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""SIGUSR1 is what a batch system is told to send some minutes before the time is up; submitit tells it SIGUSR2."""


class Interrupted(SystemExit):
    """A signal ended the run after its checkpoint was saved; the exit code is 128 + the signal's number, or `code`."""

    def __init__(self, signum: int, code: int | None = None) -> None:
        super().__init__(128 + signum if code is None else code)


class StopSignals:
    """Remembers the first signal; a second one of SIGINT ends the process at once.

    The handlers stay until Lightning, at the very end of a run, sets back those that it found: its own one for SIGTERM
    broadcasts at once, and would wait for ranks that are already gone.
    """

    def __init__(self) -> None:
        self.seen = 0

    def listen(self) -> None:
        """Sets the handlers."""
        for signum in ASKING:
            signal.signal(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.seen and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.seen = self.seen or signum
