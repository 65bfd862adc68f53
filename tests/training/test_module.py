"""What trains, what is frozen, what is saved, and that batches add up."""

import copy
from dataclasses import fields, replace
from functools import partial

import pytest
import pytorch_lightning as pl
import torch

from moa_train.cli.train import build_module
from moa_train.symbols import Batch
from moa_train.training.module import check_prior
from moa_train.training.objective import LossSettings, Masks, ObjectLoss, RouterLoss
from moa_train.training.optim import OptimizerSettings
from tiny import load

SGD = OptimizerSettings(partial(torch.optim.SGD), lr=0.05, lr_scale={"router": 5.0}, weight_decay=0.0)


def build(world, *more, optimizer=None):
    """Module and data module of a tiny run."""
    from hydra.utils import instantiate

    cfg = world.config("run_dir=unused", *more)
    pl.seed_everything(0, verbose=False)
    prior, module = build_module(cfg)
    if optimizer is not None:
        module.optimizer_settings = optimizer
    datamodule = instantiate(cfg.data)(tokenizer=prior.tokenizer, subject_size=prior.image_encoder.image_size)
    return module, datamodule


def fit(module, datamodule, steps, accumulate=1):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule)
    return trainer


def first_batch(datamodule):
    return next(iter(datamodule.val_dataloader())).unpacked()


def losses_of(module, batch, settings):
    """Per-sample losses, as a step computes them."""
    noised = module.noised(batch)
    masks = Masks.of(batch, tuple(noised.noisy.shape[-2:]))
    return module.losses(batch, noised, module.conditioning(batch), masks, settings)[0]


def rows(batch: Batch, chosen: slice) -> Batch:
    """Some samples of a batch."""
    parts = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return Batch(**{name: None if value is None else value[chosen] for name, value in parts.items()})


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def test_every_trained_tensor_changes_and_every_frozen_one_stays(world):
    module, datamodule = build(world, "optim.lr=0.01")
    before = {name: value.clone() for name, value in copy.deepcopy(dict(module.named_parameters())).items()}
    fit(module, datamodule, 3)
    trained = module.trained_names()
    changed = {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}
    assert len(trained) > 50
    assert changed == trained


def test_frozen_modules_stay_in_evaluation_mode_and_get_no_gradient(world):
    module, datamodule = build(world)
    fit(module, datamodule, 1)
    module.eval()
    module.train()
    unet = module.denoiser.unet
    frozen = [module.text_encoder, module.image_encoder, module.codec, unet.conv_in, unet.down_blocks[0].resnets[0]]
    assert not any(child.training for part in frozen for child in part.modules())
    assert unet.moa.training
    assert module.training
    names = module.trained_names()
    assert all(value.grad is None for name, value in module.named_parameters() if name not in names)


def test_only_trained_tensors_are_in_the_state(world):
    module, _ = build(world)
    state = module.state_dict()
    groups = {".processor.": 0, "unet.moa.": 0}
    for name in state:
        assert any(part in name for part in groups), name
    assert set(state) == {name for name, value in module.named_parameters() if value.requires_grad}


def test_a_state_with_a_missing_or_an_unknown_tensor_is_refused(world):
    module, _ = build(world)
    state = module.state_dict()
    name = next(iter(state))
    with pytest.raises(ValueError, match="lacks 1 trained tensors"):
        module.load_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(ValueError, match="1 unknown ones"):
        module.load_state_dict({**state, "denoiser.unet.conv_in.bias": torch.zeros(8)})


def test_tuned_image_encoder_layers_are_trained_and_saved(world):
    module, datamodule = build(world, "image_encoder.trainable_layers=1", "optim.lr=0.01")
    names = {name for name in module.state_dict() if name.startswith("image_encoder.")}
    assert names
    before = {name: module.get_parameter(name).detach().clone() for name in names}
    fit(module, datamodule, 3)
    assert all(not torch.equal(module.get_parameter(name), before[name]) for name in names)


def test_two_micro_batches_make_the_step_of_one_large_batch(world):
    """With samples that have no subject among them, so that the divisor matters."""
    drop = "data.unconditional_probability=0.4"
    whole, data = build(world, drop, optimizer=SGD)
    fit(whole, data, 2)
    halves, data = build(world, drop, "data.batch_size=2", optimizer=SGD)
    fit(halves, data, 2, accumulate=2)
    start, _ = build(world)
    moved = 0.0
    for name, value in whole.state_dict().items():
        assert torch.allclose(value, halves.state_dict()[name], rtol=1e-4, atol=1e-6), name
        moved += (value - start.state_dict()[name]).abs().sum().item()
    assert moved > 0.01


def test_a_samples_losses_do_not_depend_on_its_batch(world):
    module, datamodule = build(world)
    batch = first_batch(datamodule)
    settings = LossSettings(mask_probability=0.5, min_snr_gamma=5.0)
    together = losses_of(module, batch, settings)
    alone = losses_of(module, rows(batch, slice(2, 3)), settings)
    for name in ("masked", "router", "object"):
        assert torch.allclose(getattr(together, name)[2:3], getattr(alone, name), rtol=1e-4, atol=1e-6)


def test_an_unconditional_sample_has_no_masked_loss_and_is_pulled_to_the_prior_everywhere(world):
    module, datamodule = build(world)
    batch = first_batch(datamodule)
    nobody = replace(
        batch,
        subject_masks=torch.zeros_like(batch.subject_masks),
        subject_present=torch.zeros_like(batch.subject_present),
    )
    terms = losses_of(module, nobody, LossSettings())
    assert terms.masked.tolist() == terms.object.tolist() == [0.0] * len(batch.key)
    assert terms.router.tolist() == pytest.approx([0.25] * len(batch.key))  # R_0 starts at 0.5: (1 - 0.5)^2


def test_the_identity_gap_is_zero_at_the_start(world, tmp_path):
    """At identity initialisation the picture changes nothing, so a wrong one cannot hurt."""
    module, datamodule = build(world)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    (metrics,) = trainer.validate(module, datamodule, verbose=False)
    assert metrics["val/identity_gap"] == 0
    assert metrics["val/masked"] > 0.1
    assert metrics["val/routing_inside"] == pytest.approx(0.5)
    assert metrics["val/routing_outside"] == pytest.approx(0.5)
    with torch.no_grad():  # once the fusion is trained the picture matters
        for name, value in module.denoiser.unet.moa.named_parameters():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    (metrics,) = trainer.validate(module, datamodule, verbose=False)
    assert metrics["val/identity_gap"] != 0


def test_latents_from_the_shards_give_the_same_loss_as_pictures(world):
    module, datamodule = build(world)
    batch = first_batch(datamodule)
    packed = replace(batch, latents=module.codec.moments(batch.pixels))
    expected = losses_of(module, batch, LossSettings()).masked
    assert torch.equal(losses_of(module, packed, LossSettings()).masked, expected)


def test_gradient_checkpointing_and_bf16_priors_change_nothing_that_matters(world):
    plain, datamodule = build(world)
    spared, _ = build(world, "gradient_checkpointing=true")
    settings = LossSettings(router=RouterLoss(weight=0.1), object=ObjectLoss(weight=0.1))
    batch = first_batch(datamodule)
    gradients = []
    for module in (plain, spared):
        settings.total(losses_of(module, batch, settings), 1.0).backward()
        gradients.append({name: value.grad for name, value in module.trained_parameters().items()})
    assert spared.denoiser.unet.is_gradient_checkpointing
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-7), name


def test_casting_the_prior_leaves_what_trains_in_float32(world):
    module, _ = build(world, "prior_dtype=bfloat16")
    trained = module.trained_names()
    kinds = {name in trained: value.dtype for name, value in module.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


def test_a_checkpoint_of_another_prior_is_refused_by_name(finished):
    checkpoint = load(finished)
    prior = checkpoint["moa_train"]["prior"]
    check_prior(checkpoint, prior)
    check_prior(checkpoint, {**prior, "name": "the same, elsewhere"})
    with pytest.raises(ValueError, match=r"'other'.*weights"):
        check_prior(checkpoint, {**prior, "name": "other", "weights": "0000"})
    with pytest.raises(ValueError, match="not a checkpoint of moa-train"):
        check_prior({"state_dict": {}}, prior)


def test_a_resume_of_another_length_says_that_the_router_loss_moves(world, tmp_path, caplog):
    ramp = ("loss.router.weight=0.5", "loss.router.warmup=0.25", "loss.router.ramp=0.5")
    world.train(tmp_path, "max_steps=2", *ramp)
    assert "max_steps was" not in caplog.text
    world.train(tmp_path, "max_steps=4", "ckpt=last", *ramp)
    assert "max_steps was 2, is 4" in caplog.text
    assert "goes on with 0.25" in caplog.text  # half of the run is over, half of the ramp


def test_a_checkpoint_holds_trained_tensors_and_no_prior(finished):
    checkpoint = load(finished)
    assert len(checkpoint["state_dict"]) > 50
    assert checkpoint["state_dict"].keys() == checkpoint["ema"]["average"].keys()
    assert all(".processor." in name or ".moa." in name for name in checkpoint["state_dict"])
    held = sum(len(state) for state in (checkpoint["optimizer_states"][0]["state"],))
    assert held == len(checkpoint["state_dict"])
