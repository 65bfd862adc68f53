"""`trainer=fsdp`: ranks that hold parts of the weights take the steps of one process, and keep its files."""

import pytest
import torch

from processes import ranks
from tiny import load

SPLIT = ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=1")
PICTURES = (
    "callbacks.samples={_target_: moa_train.training.callbacks.samples.SamplePictures, _partial_: true, "
    "directory: ${run_dir}, every_n_steps: 3, number: 2, steps: 2, guidance: 2.0, seed: 0}"
)


def two_ranks(world, run, *settings, hook=None, experiment="toy"):
    """Exit codes and output of `moa-train` on two ranks that split the model."""
    arguments = world.overrides(*settings, *SPLIT, f"run_dir={run}", experiment=experiment)
    with ranks(run.parent / f"output.{run.name}", arguments, 2, hook) as launch:
        return launch.codes(), launch.said()


def same_weights(given, expected):
    for name, value in expected["state_dict"].items():
        assert torch.allclose(given["state_dict"][name], value, atol=2e-5), name
        assert torch.allclose(given["ema"]["average"][name], expected["ema"]["average"][name], atol=2e-5), name


def test_moa(world, tmp_path):
    settings = ("max_steps=3", "optim.lr=1e-4", "validate_every=3", "gradient_checkpointing=true")
    alone = world.train(tmp_path / "alone", *settings)
    codes, said = two_ranks(world, tmp_path / "split", *settings, "trainer.accumulate_grad_batches=2", PICTURES)
    assert codes == [0, 0], said
    print(said)
    same_weights(load(tmp_path / "split"), load(alone))
    assert [path.name for path in (tmp_path / "split" / "samples").iterdir()] == ["step=000003.png"]
