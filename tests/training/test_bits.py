"""Equal bits from run to run, and checkpoints that would run code."""

import os
import pickle
import subprocess
import sys

import pytest
import torch

from moa_train.training.writer import CheckpointWriter
from tiny import load

STEPS = ("max_steps=3", "deterministic=true", "data.num_workers=1", "optim.lr=1e-3", "validate_every=3")

WATCHED = """
import os, sys, torch
from moa_train.cli.train import main
main()
assert torch.are_deterministic_algorithms_enabled()
assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
"""


@pytest.mark.slow
def test_two_deterministic_runs_are_equal_to_the_bit(world, tmp_path):
    runs = [tmp_path / "one", tmp_path / "two"]
    for number, run in enumerate(runs):  # what differs between two calls of a user must not matter
        arguments = world.overrides(f"run_dir={run}", *STEPS)
        environment = {**os.environ, "PYTHONHASHSEED": str(number)}
        subprocess.run([sys.executable, "-c", WATCHED, *arguments], env=environment, check=True, capture_output=True)
    one, two = (load(run) for run in runs)
    for name, value in one["state_dict"].items():
        assert torch.equal(two["state_dict"][name], value), name
    for name in ("metrics.csv", "sample_log.csv"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()


def test_a_deterministic_run_refuses_operations_that_are_not(world, tmp_path):
    world.train(tmp_path / "run", "max_steps=1", "deterministic=true")
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
    world.train(tmp_path / "other", "max_steps=1")
    torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, trace) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("kind", ["torch", "pickle"])
@pytest.mark.parametrize("command", ["train", "export"])
def test_a_checkpoint_that_would_run_code_is_refused_in_one_line(world, tmp_path, monkeypatch, capfd, kind, command):
    from moa_train.cli import export, train

    path, trace = tmp_path / "evil.ckpt", tmp_path / "it_ran"
    told = {"moa_train": {"version": 1}, "state_dict": {"x": Evil(trace)}, "global_step": 1}
    if kind == "torch":
        torch.save(told, path)
    else:
        path.write_bytes(pickle.dumps(told))
    main = {"train": train.main, "export": export.main}[command]
    settings = world.overrides("max_steps=2", f"run_dir={tmp_path / 'run'}") if command == "train" else []
    monkeypatch.setattr(sys, "argv", ["moa", f"ckpt={path}", *settings])
    with pytest.raises(SystemExit, match="2"):
        main()
    errors = [line for line in capfd.readouterr().err.splitlines() if f"moa-{command}: error:" in line]
    assert len(errors) == 1
    assert "evil.ckpt" in errors[0]
    assert not trace.exists()
    with pytest.raises(ValueError, match="not a whole checkpoint"):  # what Lightning reads with
        CheckpointWriter().load_checkpoint(path)
    assert not trace.exists()
