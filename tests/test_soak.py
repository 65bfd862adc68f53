"""The long run's watch: it measures what it says, finds a leak, and a short run is flat."""

import importlib.util
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "soak.py"

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_open_files_and_memory_of_a_process_and_its_children_are_counted(soak, tmp_path):
    before = soak.measure(os.getpid())
    held = [(tmp_path / str(number)).open("w") for number in range(7)]
    ballast = mmap.mmap(-1, 2**26)  # new pages from the kernel: malloc may hand out ones that are resident already
    for _ in range(64):
        ballast.write(bytes(2**20))
    after = soak.measure(os.getpid())
    for file in held:
        file.close()
    assert after[1] - before[1] == 7
    ballast.close()
    assert after[0] - before[0] == pytest.approx(64, abs=8)
    child = subprocess.Popen([sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    child.stdout.readline()
    assert child.pid in soak.family(os.getpid())
    child.communicate()


def test_a_leak_is_a_slope_that_single_peaks_do_not_move(soak):
    steps = np.arange(100.0, 2000, 10)
    values = 500 + 0.02 * steps
    values[::7] += 300
    assert soak.slope(steps, values) == pytest.approx(20)


@pytest.mark.slow
def test_a_short_run_is_flat():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "steps=200", "mib=60"], capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "per 1,000 steps" in done.stdout
