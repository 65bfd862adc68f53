"""The plan of a run: its memory against what a real step saves, its checkpoint against the file, problems at once."""

import logging
import sys

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from moa_train.cli import train
from moa_train.diffusion import keyed_noise
from moa_train.training.estimate import _Meter, _Step, step_memory


@pytest.fixture(scope="module")
def parts(world):
    """A module on the CPU and one batch, with the loss on all that the estimate assumes."""
    cfg = world.config("run_dir=nowhere", "run_id=nothing")
    prior, module = train.build_module(cfg)
    data = train._build(cfg.data)(tokenizer=prior.tokenizer, subject_size=prior.image_encoder.image_size)
    return module, next(iter(data.train_dataloader())).unpacked()


def saved_bytes(module, batch):
    """Bytes that autograd itself keeps for the backward pass of a real step: its hooks, each storage once."""
    weights = {value.untyped_storage().data_ptr() for value in (*module.parameters(), *module.buffers())}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)  # so that no address is given out twice
        return tensor

    class Ends(Exception):
        pass

    class Meter:
        def end_forward(self):
            raise Ends

    with saved_tensors_hooks(pack, lambda tensor: tensor), pytest.raises(Ends):
        _Step(module, bf16=False)(batch, Meter())
    return sum(kept.values())


def test_what_a_step_keeps_is_what_autograd_saves(parts):
    module, batch = parts
    memory = step_memory(module, batch, bf16=False, averaged=True)
    assert memory.saved == pytest.approx(saved_bytes(module, batch), rel=0.1)
    assert memory.working > memory.saved
    trained = sum(4 * parameter.numel() for parameter in module.trained_parameters().values())
    assert (memory.trained, memory.gradients, memory.optimizer, memory.average) == (
        trained,
        trained,
        2 * trained,
        trained,
    )


def test_no_memory_is_touched_and_no_weight_changed(parts):
    module, batch = parts
    before = {name: value.clone() for name, value in module.state_dict().items()}
    step_memory(module, batch, bf16=False, averaged=True)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_twice_the_batch_keeps_twice_as_much_and_half_precision_less(parts):
    module, batch = parts
    twice = type(batch)(
        **{
            name: torch.cat([value, value]) if isinstance(value, torch.Tensor) else value
            for name, value in vars(batch).items()
        }
    )
    one, two = (step_memory(module, each, bf16=False, averaged=False).saved for each in (batch, twice))
    assert two == pytest.approx(2 * one, rel=0.05)  # a few tensors do not grow
    assert step_memory(module, batch, bf16=True, averaged=False).saved < one


def test_the_meter_counts_what_lives(parts):
    with _Meter() as meter:
        held = keyed_noise(torch.tensor([1, 2]), (256,))
        torch.zeros(1000)
        view = held[:, ::2]
    assert meter.live == held.untyped_storage().nbytes() == 2 * 256 * 4
    assert meter.peak >= 2 * 256 * 4 + 4000
    assert view.shape == (2, 128)


def test_ranks_that_split_the_model_share_all_but_activations_and_what_the_unet_does_not_hold(parts):
    """Beside their share each holds what is gathered at one moment, which is less than all weights and gradients."""
    module, batch = parts
    memory = step_memory(module, batch, bf16=False, averaged=True)
    unet = dict(module.denoiser.unet.named_parameters())
    frozen = sum(value.numel() * 4 for value in unet.values() if not value.requires_grad)
    trained = sum(value.numel() * 4 for value in unet.values() if value.requires_grad)
    shared = frozen + 5 * trained  # weight, gradient, two moments, average
    assert memory.fsdp(4) == memory.total - shared + -(-shared // 4) + memory.gathered
    assert 0 < memory.gathered < frozen + 2 * trained


def test_ranks_that_split_the_optimizer_share_gradients_moments_and_a_copy_of_what_trains(parts):
    """The bound: what one rank holds, of which three quarters go away, and two buckets, all of so small a model."""
    module, batch = parts
    memory = step_memory(module, batch, bf16=False, averaged=True)
    trained = sum(value.numel() * 4 for value in module.trained_parameters().values())
    assert memory.deepspeed(4) == memory.total - 3 * trained + 4 * trained // 4 + 2 * trained
    assert memory.deepspeed(4, stage=1) == memory.total - 2 * trained + -(-3 * trained // 4) + 2 * trained


@pytest.fixture
def plan(world, monkeypatch, tmp_path, capfd):
    """`moa-train plan`; gives back exit code, output, errors."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["moa-train", "plan", *world.overrides(f"runs={tmp_path}/runs", *arguments)])
        handlers = logging.root.handlers[:]
        code = 0
        try:
            train.main()
        except SystemExit as left:
            code = int(left.code or 0)
        finally:
            logging.root.handlers[:] = handlers
        told = capfd.readouterr()
        return code, told.out, told.err

    return call


def test_a_plan_tells_all_and_writes_nothing(plan, finished, tmp_path):
    code, out, _ = plan("max_steps=12", "plan_steps=1")
    assert code == 0
    told = {line[:22].strip(): line[22:].strip() for line in out.splitlines()}
    assert told["train samples"] == "24"
    assert told["steps per epoch"] == "6.0; 2.0 epochs"
    assert told["time"].endswith("for 12 of them")
    planned = float(told["checkpoint"].split(" MB")[0])
    real = (finished / "checkpoints" / "last.ckpt").stat().st_size / 1e6
    assert planned < real < planned + 0.5  # the rest is names, the sample order and random states
    assert not (tmp_path / "runs").exists()


def test_a_plan_tells_what_each_of_several_ranks_holds(plan):
    for trainer, more in (("ddp", 1), ("fsdp", 0), ("deepspeed", 0)):
        code, out, _ = plan(f"trainer={trainer}", "trainer.accelerator=cpu", "trainer.devices=2", "plan_steps=0")
        assert code == 0
        assert len([line for line in out.splitlines() if line.startswith("  with ddp")]) == more
        assert "at most on each of 2 ranks, which split the model" in out
        assert "at most on each of 2 ranks, which split the optimizer" in out


def test_all_problems_are_told_at_once(plan, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    code, out, err = plan("data.validation=/no/such/validation", "plan_steps=0", "trainer.strategy=deepspeed")
    assert code == 2, out + err
    problems = [line for line in err.splitlines() if line.startswith("moa-train plan: error: ")]
    assert len(problems) == 3
    assert "use trainer=fsdp" in problems[0]
    assert "/no/such/validation" in problems[1]
    assert "checkpoints take" in problems[2]
