"""A run that is stopped, killed and resumed is the run that was never stopped."""

import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch

from moa_train.cli.train import main
from moa_train.training.metrics_csv import read_rows
from processes import free_port
from tiny import load

STEPS = (
    "max_steps=8",
    "data.batch_size=2",
    "trainer.accumulate_grad_batches=2",
    "callbacks.checkpoint.every_n_steps=2",
    "optim=adamw_cosine",
    "optim.schedule.warmup_steps=2",
)

PICTURES = (
    "callbacks.samples={_target_: moa_train.training.callbacks.samples.SamplePictures, _partial_: true, "
    "directory: ${run_dir}, every_n_steps: 3, number: 1, steps: 1, guidance: 1.0, seed: 0}"
)

SIGNALLED = """
import os, sys
from moa_train.training.callbacks.sample_log import SampleLog
signum, at = int(sys.argv.pop(1)), int(sys.argv.pop(1))
log = SampleLog.after_step
def log_and_signal(self, trainer, module, step):
    log(self, trainer, module, step)
    if step == at:
        os.kill(os.getpid(), signum)
SampleLog.after_step = log_and_signal
from moa_train.cli.train import main
main()
"""


def train_until_signal(world, signum, step, *overrides):
    """`moa-train` in a process of its own that gets a signal right after an optimizer step."""
    command = [sys.executable, "-c", SIGNALLED, str(signum), str(step), *world.overrides(*overrides)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def assert_same(given, expected, path=""):
    """Equal to the bit, all the way down."""
    if isinstance(expected, dict):
        assert given.keys() == expected.keys(), path
        for key in expected:
            assert_same(given[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(given) == len(expected), path
        for index, (one, other) in enumerate(zip(given, expected, strict=True)):
            assert_same(one, other, f"{path}[{index}]")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(given, expected), path
    else:
        assert given == expected, path


@pytest.mark.slow
def test_stopped_by_sigterm_then_killed_then_resumed_is_the_straight_run_bit_for_bit(world, tmp_path):
    straight = world.train(tmp_path / "straight", *STEPS)
    broken = tmp_path / "broken"
    stopped = train_until_signal(world, 15, 3, f"run_dir={broken}", *STEPS)
    assert stopped.returncode == 128 + 15, stopped.stderr
    assert load(broken)["global_step"] == 3
    (random_state,) = load(broken)["random_state"]
    killed = train_until_signal(world, 9, 7, f"run_dir={broken}", "ckpt=last", *STEPS)
    assert killed.returncode == -9, killed.stderr
    assert load(broken)["global_step"] == 6
    world.train(broken, "ckpt=last", *STEPS)
    resumed, expected = load(broken), load(straight)
    for part in (
        "state_dict",
        "optimizer_states",
        "lr_schedulers",
        "ema",
        "MoADataModule",
        "global_step",
    ):
        assert_same(resumed[part], expected[part], part)
    for library in ("numpy", "torch"):  # steps draw from keys; beartype, in tests, draws from Python's generator
        assert_same(resumed["random_state"][0][library], random_state[library], library)
    assert (broken / "sample_log.csv").read_text() == (straight / "sample_log.csv").read_text()
    assert (broken / "metrics.csv").read_text() == (straight / "metrics.csv").read_text()


def test_a_run_resumed_with_other_micro_batches_sees_the_same_samples_and_nearly_the_same_weights(world, tmp_path):
    steps = ("loss.router.warmup=0.0", "loss.router.ramp=0.0", "optim.lr=1e-4")
    straight = world.train(tmp_path / "straight", "max_steps=4", *steps)
    split = world.train(tmp_path / "split", "max_steps=2", *steps)
    micro = ("data.batch_size=2", "trainer.accumulate_grad_batches=2")
    world.train(split, "max_steps=4", "ckpt=last", *micro, *steps)
    assert (split / "sample_log.csv").read_text() == (straight / "sample_log.csv").read_text()
    assert load(split)["global_step"] == 4
    for name, value in load(straight)["state_dict"].items():
        assert torch.allclose(load(split)["state_dict"][name], value, atol=2e-5), name


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(world, tmp_path):
    """With accumulation, recomputed activations and the average of the weights; pictures by the first rank alone."""
    settings = ("max_steps=3", "optim.lr=1e-4", "validate_every=3", "gradient_checkpointing=true")
    alone = world.train(tmp_path / "alone", *settings)
    shared = tmp_path / "shared"
    parts = ("trainer.devices=2", "data.batch_size=1", "trainer.accumulate_grad_batches=2", PICTURES)
    launched = world.overrides(*settings, "trainer=ddp", "trainer.accelerator=cpu", *parts, f"run_dir={shared}")
    command = [sys.executable, "-m", "moa_train.train", *launched]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    logs = [
        read_rows(folder / f"sample_log{rank}.csv") for folder, rank in ((alone, ""), (shared, ""), (shared, ".rank1"))
    ]
    for whole, first, second in zip(*logs, strict=True):
        samples = whole["samples"].split()
        assert [first["samples"].split(), second["samples"].split()] == [samples[::2], samples[1::2]]
    given, expected = load(shared), load(alone)
    for name, value in expected["state_dict"].items():
        assert torch.allclose(given["state_dict"][name], value, atol=2e-5), name
        assert torch.allclose(given["ema"]["average"][name], expected["ema"]["average"][name], atol=2e-5), name
    gaps = [float(read_rows(folder / "metrics.csv")[-1]["val/masked"]) for folder in (alone, shared)]
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-3)
    first, second = given["random_state"]
    assert not torch.equal(first["torch"], second["torch"])
    assert [path.name for path in (shared / "samples").iterdir()] == ["step=000003.png"]
    trained = [
        value.numel() * value.element_size() for value in given["state_dict"].values()
    ]  # the prior has no bucket
    assert f"2 ranks average {len(trained)} gradients of {sum(trained)} bytes in each step" in done.stderr + done.stdout


def test_a_resume_with_another_global_batch_is_refused(world, finished):
    with pytest.raises(ValueError, match="batch"):
        world.train(finished, "ckpt=last", "max_steps=6", "data.batch_size=3")


def test_a_new_run_in_the_folder_of_another_is_refused(world, finished):
    with pytest.raises(ValueError, match="ckpt=last"):
        world.train(finished, "max_steps=1")


def test_resuming_without_a_checkpoint_is_refused_unless_it_may_start(world, tmp_path):
    with pytest.raises(ValueError, match="ckpt=last: there is no"):
        world.train(tmp_path / "a", "ckpt=last")
    world.train(tmp_path / "a", "ckpt=auto", "max_steps=1")
    assert load(tmp_path / "a")["global_step"] == 1
    with pytest.raises(ValueError, match="no such checkpoint"):
        world.train(tmp_path / "b", "ckpt=nowhere.ckpt")


def torchrun_two_nodes(arguments):
    """`moa-train` by two agents of torchrun, each of which takes this machine for one of two."""
    where = ("--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}")
    command = [sys.executable, "-m", "torch.distributed.run", *where]
    nodes = [
        subprocess.Popen(
            [*command, f"--node-rank={node}", "-m", "moa_train.train", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    try:
        said = [node.communicate(timeout=300)[0] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], said
    finally:
        for node in nodes:
            node.kill()


TWO_NODES = ("trainer=ddp_nodes", "trainer.accelerator=cpu", "trainer.devices=1", "data.batch_size=2")


def _samples(run, rank=""):
    """Step -> samples of that step, in order."""
    return {row["step"]: row["samples"].split() for row in read_rows(run / f"sample_log{rank}.csv")}


@pytest.mark.slow
def test_one_process_then_two_then_one_see_the_samples_of_one_in_order(world, tmp_path):
    straight = _samples(world.train(tmp_path / "straight", "max_steps=5"))
    run = world.train(tmp_path / "run", "max_steps=1")
    torchrun_two_nodes(world.overrides(*TWO_NODES, f"run_dir={run}", "max_steps=3", "ckpt=last"))
    world.train(run, "max_steps=5", "ckpt=last")
    seen, other = _samples(run), _samples(run, ".rank1")
    assert list(seen) == list(straight)
    assert list(other) == list(straight)[1:3]
    for step, samples in other.items():
        seen[step] = [n for pair in zip(seen[step], samples, strict=True) for n in pair]
    assert seen == straight


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_ends_the_command_in_one_line(world, tmp_path, monkeypatch, capfd, workers):
    train = tmp_path / "train"
    shutil.copytree(world.folder / "data" / "train", train)
    for path in train.glob("*.tar"):
        path.write_bytes(path.read_bytes()[:4000])
    more = (f"data.train={train}", f"data.num_workers={workers}", f"run_dir={tmp_path / 'run'}", "max_steps=2")
    monkeypatch.setattr(sys, "argv", ["moa-train", *world.overrides(*more)])
    handlers = logging.root.handlers[:]
    with pytest.raises(SystemExit) as end:
        main()
    logging.root.handlers[:] = handlers  # Hydra's write to the captured stdout of this test
    assert end.value.code == 2
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("moa-train: error:")]
    assert "it is truncated; moa-data validate lists all such samples, on_bad_sample=skip goes on" in line
