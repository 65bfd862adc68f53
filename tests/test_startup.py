"""`import moa_train` is free: the names it offers are imported on first use."""

import subprocess
import sys

import pytest

import moa_train

HEAVY = {"torch", "diffusers", "transformers", "hydra", "omegaconf", "pytorch_lightning", "webdataset", "PIL", "numpy"}


@pytest.mark.parametrize("module", ["moa_train", "moa_train.cli.command", "moa_train.cli.paths"])
def test_import_loads_no_heavy_library(module):
    script = f"import {module}, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert module in modules
    assert not HEAVY & set(modules)


@pytest.mark.parametrize("name", moa_train.__all__)
def test_every_public_name_can_be_had(name):
    assert name in dir(moa_train)
    assert getattr(moa_train, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="MoaPipeline"):
        _ = moa_train.MoaPipeline
