"""precision=auto against what the processor says of itself."""

import re
from pathlib import Path

import pytest

from moa_train.cli.precision import chosen_precision

CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.parametrize("named", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_a_named_precision_stays(named, accelerator):
    assert chosen_precision(named, accelerator) == named


def test_auto_is_bfloat16_on_an_accelerator():
    assert chosen_precision("auto", "gpu") == chosen_precision("auto", "cuda") == "bf16-mixed"


@pytest.mark.skipif(not re.search(r"^flags\s*:.*\bsse2\b", CPUINFO.read_text() if CPUINFO.exists() else "", re.M),
                    reason="needs an x86 processor that Linux describes")  # fmt: skip
def test_auto_on_a_cpu_follows_its_instructions():
    wide = re.search(r"^flags\s*:.*\bavx512bw\b", CPUINFO.read_text(), re.M)
    assert chosen_precision("auto", "cpu") == ("bf16-mixed" if wide else "32-true")
