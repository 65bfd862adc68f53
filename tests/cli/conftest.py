"""`moa-data` as a person calls it."""

import sys

import pytest

from moa_train.cli.data import main


@pytest.fixture
def moa_data(monkeypatch, capsys, tmp_path):
    """Runs the command; gives back exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moa-data", *arguments])
        code = 0
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
        told = capsys.readouterr()
        return code, told.out, told.err

    return call
