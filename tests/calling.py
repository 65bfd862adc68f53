"""Commands as a person calls them, in this process."""

import logging
import sys


def call(main, monkeypatch, *arguments):
    """Exit code of a command."""
    monkeypatch.setattr(sys, "argv", ["moa", *arguments])
    handlers = logging.root.handlers[:]
    try:
        main()
    except SystemExit as end:
        return end.code
    finally:
        logging.root.handlers[:] = handlers  # Hydra's write to the captured stdout of this test
    return 0


def refused(main, monkeypatch, capfd, *arguments):
    """The one line with which a command refuses its arguments (exit code 2, no traceback)."""
    assert call(main, monkeypatch, *arguments) == 2
    told = capfd.readouterr().err
    assert "Traceback" not in told
    lines = [line for line in told.splitlines() if ": error:" in line]
    assert len(lines) == 1
    return lines[0]
