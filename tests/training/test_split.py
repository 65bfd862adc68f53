"""`trainer=fsdp` and `trainer=deepspeed`: ranks that hold parts of weights or moments take the steps of one process.

They share its files, too.
"""

import json
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from moa_train.cli.train import build_data, build_module
from moa_train.training.export import export_checkpoint
from moa_train.training.metrics_csv import read_rows
from moa_train.training.objective import Masks
from moa_train.training.split import is_split, split_weights, whole
from processes import SignalAt, ranks
from tiny import load

KINDS = ("fsdp", "deepspeed")
PICTURES = (
    "callbacks.samples={_target_: moa_train.training.callbacks.samples.SamplePictures, _partial_: true, "
    "directory: ${run_dir}, every_n_steps: 4, number: 2, steps: 2, guidance: 2.0, seed: 0}"
)
FASTCOMPOSER = ("model=fastcomposer", "optim.lr=1e-4", "max_steps=4", "callbacks.checkpoint.every_n_steps=2")


def split(kind, devices=2):
    """Settings of so many ranks on the CPU."""
    return (f"trainer={kind}", "trainer.accelerator=cpu", f"trainer.devices={devices}")


@dataclass(frozen=True)
class BadStep:
    """A hook: in step 2 the last rank's part of one gradient is NaN, or its loss; each rank notes the bytes it holds.

    killed_at: the step after which both ranks are killed.
    """

    folder: Path
    what: str = "gradient"
    killed_at: int | None = None

    def __call__(self):
        from moa_train.training.callbacks.finite import FiniteSteps
        from moa_train.training.callbacks.sample_log import SampleLog
        from moa_train.training.split import own_part
        from moa_train.training.zero import ZeroStrategy

        judge, log = FiniteSteps.on_before_optimizer_step, SampleLog.after_step

        def spoil_and_judge(callback, trainer, module, optimizer):
            here = trainer.global_step == 1 and trainer.global_rank == trainer.world_size - 1
            if here and self.what == "loss":
                callback._loss = torch.tensor(float("nan"))
            elif here:
                zero = isinstance(trainer.strategy, ZeroStrategy)
                parts = optimizer.averaged_gradients[0] if zero else [optimizer.param_groups[0]["params"][0].grad]
                own_part(parts[0]).fill_(float("nan"))
            judge(callback, trainer, module, optimizer)

        def log_and_measure(callback, trainer, module, step):
            log(callback, trainer, module, step)
            moments = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
            held = {"weights": module.denoiser.unet.parameters(), "moments": moments}
            held = {
                name: sum(own_part(value).numel() for value in values if value.ndim) for name, values in held.items()
            }
            (self.folder / f"held.{trainer.world_size}.{trainer.global_rank}.json").write_text(json.dumps(held))

        FiniteSteps.on_before_optimizer_step, SampleLog.after_step = spoil_and_judge, log_and_measure
        if self.killed_at is not None:
            SignalAt(self.killed_at, signal.SIGKILL, (0, 1))()


def train(world, run, number, *settings, hook=None):
    """`moa-train` as so many processes: exit codes and output."""
    whole_unet = any(each in ("model=fastcomposer", "model=finetune") for each in settings)
    fusion = () if whole_unet else ("model.sinusoids=8",)
    arguments = [each for each in world.overrides(*settings, f"run_dir={run}") if "sinusoids" not in each]
    with ranks(run.parent / f"output.{run.name}", [*arguments, *fusion], number, hook) as launch:
        return launch.codes(), launch.said()


def assert_close(given, expected):
    for name, value in expected["state_dict"].items():
        assert torch.allclose(given["state_dict"][name], value, atol=2e-5), name
        assert torch.allclose(given["ema"]["average"][name], expected["ema"]["average"][name], atol=2e-5), name
    moments = given["optimizer_states"][0]["state"]
    for number, state in expected["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            assert torch.allclose(moments[number][name], value, atol=2e-5), (number, name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_then_one_then_two_ranks_that_split_moa_take_the_steps_of_one(world, tmp_path, kind):
    """With accumulation, recomputed activations, a trained encoder block, the average, a signal to the second rank."""
    settings = ("max_steps=4", "optim.lr=1e-4", "validate_every=4", "gradient_checkpointing=true")
    settings += (
        "image_encoder.trainable_layers=1",
        "loss.mask_warmup=0.0",
        "loss.router.warmup=0.0",
        "loss.router.ramp=0.0",
    )
    straight = world.train(tmp_path / "straight", *settings)
    run = tmp_path / "run"
    parts = (*settings, *split(kind), "data.batch_size=1", "trainer.accumulate_grad_batches=2", PICTURES)

    codes, said = train(world, run, 2, *parts, hook=SignalAt(2, signal.SIGTERM, (1,)))
    assert codes == [143, 143], said
    world.train(run, *settings, "max_steps=3", "ckpt=last")
    codes, said = train(world, run, 2, *parts, "ckpt=last")
    assert codes == [0, 0], said

    given, expected = load(run), load(straight)
    assert given.keys() == expected.keys()
    assert_close(given, expected)
    for folder in (run, straight):
        export_checkpoint(folder / "checkpoints" / "last.ckpt", folder / "out.safetensors", "float32")
    exported, other = (load_file(folder / "out.safetensors") for folder in (run, straight))
    assert exported.keys() == other.keys()
    assert all(torch.allclose(exported[name], value, atol=2e-5) for name, value in other.items())
    assert {path.name for path in (run / "checkpoints").glob("step*")} == {
        "step=000002.ckpt",
        "step=000003.ckpt",
        "step=000004.ckpt",
    }
    assert len(list((run / "checkpoints").glob("best-step=000004-*"))) == 1
    first, second = (read_rows(folder / "metrics.csv")[-1] for folder in (run, straight))
    for name in ("val/masked", "train/grad_norm"):
        assert float(first[name]) == pytest.approx(float(second[name]), rel=1e-3), name
    assert [path.name for path in (run / "samples").iterdir()] == ["step=000004.png"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "what", "halved"), [("fsdp", "gradient", {"weights", "moments"}), ("deepspeed", "loss", {"moments"})]
)
def test_ranks_that_split_a_whole_unet_skip_alike_are_killed_and_resume_to_the_bit(world, tmp_path, kind, what, halved):
    """FastComposer, whose U-Net trains, and the optimizer of GPUs; each rank holds half of what is split."""
    settings = (*FASTCOMPOSER, "trainer.on_nonfinite=skip", "callbacks.checkpoint.asynchronous=true")
    parts = (*settings, *split(kind), "data.batch_size=2", "optim.optimizer.fused=true")
    hook = BadStep(tmp_path, what)
    for name, number, given in (("one", 1, settings), ("two", 2, parts)):
        codes, said = train(world, tmp_path / name, number, *given, hook=hook)
        assert codes == [0] * number, said
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert one["finite"]["skipped"] == two["finite"]["skipped"] == 1
    assert_close(two, one)
    for row, other in zip(
        read_rows(tmp_path / "two" / "metrics.csv"), read_rows(tmp_path / "one" / "metrics.csv"), strict=True
    ):
        assert float(row["train/grad_norm"]) == pytest.approx(float(other["train/grad_norm"]), rel=1e-3, nan_ok=True)

    whole, *halves = (json.loads((tmp_path / f"held.{name}.json").read_text()) for name in ("1.0", "2.0", "2.1"))
    for what, number in whole.items():
        if what not in halved:
            assert [half[what] for half in halves] == [number, number]
            continue
        assert sum(half[what] for half in halves) == number
        assert max(half[what] for half in halves) < 0.55 * number, what

    killed = tmp_path / "killed"
    codes, said = train(world, killed, 2, *parts, hook=BadStep(tmp_path, what, killed_at=3))
    assert codes == [-9, -9], said
    assert load(killed)["global_step"] == 2
    codes, said = train(world, killed, 2, *parts, "ckpt=auto", hook=hook)
    assert codes == [0, 0], said
    resumed = load(killed)
    for name, value in two["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name
        assert torch.equal(resumed["ema"]["average"][name], two["ema"]["average"][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_four_ranks_that_split_a_finetuned_unet_take_the_steps_of_one(world, tmp_path, kind):
    settings = ("model=finetune", "optim.lr=1e-4", "max_steps=3")
    four = (*split(kind, 4), "data.batch_size=1")
    for name, number, given in (("one", 1, settings), ("four", 4, (*settings, *four))):
        codes, said = train(world, tmp_path / name, number, *given)
        assert codes == [0] * number, said
    assert_close(load(tmp_path / "four"), load(tmp_path / "one"))
    whole_rows = read_rows(tmp_path / "one" / "sample_log.csv")
    shares = [tmp_path / "four" / f"sample_log{rank}.csv" for rank in ("", ".rank1", ".rank2", ".rank3")]
    for row, *parts in zip(whole_rows, *map(read_rows, shares), strict=True):
        assert [part["samples"] for part in parts] == row["samples"].split()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_not_finite_on_one_rank_stops_both_and_its_weights_are_kept_whole(world, tmp_path, kind):
    run = tmp_path / "run"
    codes, said = train(world, run, 2, *FASTCOMPOSER, *split(kind), "data.batch_size=2", hook=BadStep(tmp_path))
    assert codes == [2, 2], said
    told = [line for line in said.splitlines() if line.startswith("moa-train: error:")]
    assert len(told) == 2
    assert told[0] == told[1]
    assert "the gradient of step 2 is not finite" in told[0]
    kept = load_file(run / "nonfinite" / "step=000002.safetensors")
    module = build_module(world.compose([e for e in world.overrides(*FASTCOMPOSER) if "sinusoids" not in e]))[1]
    module.load_state_dict(kept)


@pytest.mark.slow
def test_deepspeed_in_bf16_mixed_keeps_float32_weights_and_takes_the_steps_of_ddp(world, tmp_path):
    settings = ("trainer.precision=bf16-mixed", "prior_dtype=bfloat16", "optim.lr=1e-4", "max_steps=4")
    settings += ("validate_every=4", "data.batch_size=1")
    for kind in ("ddp", "deepspeed"):
        codes, said = train(world, tmp_path / kind, 2, *settings, *split(kind))
        assert codes == [0, 0], said
    given, expected = load(tmp_path / "deepspeed"), load(tmp_path / "ddp")
    assert_close(given, expected)
    assert {value.dtype for value in given["state_dict"].values()} == {torch.float32}
    mine, other = (read_rows(tmp_path / kind / "metrics.csv")[-1] for kind in ("deepspeed", "ddp"))
    for name in ("train/loss", "train/grad_norm", "val/masked"):
        assert float(mine[name]) == pytest.approx(float(other[name]), rel=1e-5), name


@pytest.mark.slow
def test_deepspeed_of_stage_1_takes_the_steps_of_stage_2(world, tmp_path):
    settings = (*split("deepspeed"), "optim.lr=1e-4", "max_steps=3", "data.batch_size=1")
    settings += ("trainer.accumulate_grad_batches=2",)
    for stage in (1, 2):
        codes, said = train(world, tmp_path / str(stage), 2, *settings, f"trainer.strategy.stage={stage}")
        assert codes == [0, 0], said
    assert_close(load(tmp_path / "1"), load(tmp_path / "2"))


def test_split_blocks_of_frozen_bfloat16_and_trained_float32_give_the_loss_and_nearly_the_gradients_of_whole_ones(
    world,
):
    """On one rank; a sum in another order is seen in bfloat16."""
    cfg = world.config("trainer.precision=bf16-mixed", "prior_dtype=bfloat16")
    losses, gradients = [], []
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for split in (False, True):
            torch.manual_seed(0)
            prior, module = build_module(cfg)
            if split:
                split_weights(module.denoiser.unet, [], init_device_mesh("cpu", (1,)))
            assert is_split(module) == split
            batch = build_data(cfg, prior).micro_batches(1, 0, 1, 1)[0]
            with torch.autocast("cpu", torch.bfloat16):
                noised = module.noised(batch)
                masks = Masks.of(batch, noised.noisy.shape[-2:])
                terms, _ = module.losses(batch, noised, module.conditioning(batch), masks, module.loss)
                loss = module.loss.total(terms, 1.0)
            loss.backward()
            losses.append(loss.item())
            gradients.append([whole(parameter.grad) for parameter in module.trained_parameters().values()])
    finally:
        torch.distributed.destroy_process_group()
    assert losses[0] == losses[1]
    for expected, given in zip(*gradients, strict=True):
        assert (given - expected).norm() <= 0.05 * expected.norm()
