"""`scripts/survive.py` in its short form: two kills, one of them inside a save."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "survive.py"


@pytest.mark.slow
def test_a_run_killed_anywhere_and_in_a_save_ends_with_the_bits_of_one_that_was_not(tmp_path):
    command = [sys.executable, str(SCRIPT), "--kills=2", "--steps=4", f"--work={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the same bits") == 2 + 1  # in the table, and in the last line
    assert "2 kills, " in done.stdout


def test_a_campaign_without_kills_is_refused():
    done = subprocess.run([sys.executable, str(SCRIPT), "--kills=0"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--kills: at least 1" in done.stderr
