"""`moa-train`: trains personalized experts, routers and multimodal tokens on a prior."""

from __future__ import annotations

import logging
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_train.cli.command import command
from moa_train.cli.paths import config_dir
from moa_train.cli.precision import chosen_precision
from moa_train.cli.prior import prior_paths_as_source

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from omegaconf import DictConfig

    from moa_train.cli.runs import Run
    from moa_train.prior.load import Prior
    from moa_train.training.datamodule import MoADataModule
    from moa_train.training.module import MoAModule

logger = logging.getLogger(__name__)

HELP = """\
Train MoA: teach a text-to-image model to draw the people (or other subjects) in photos, without fine-tuning for each.

  moa-train                                         the toy world on this machine's CPU (about 20 minutes on two cores)
  moa-train experiment=ffhq_sd15 data.train=FOLDER data.validation=FOLDER      the paper's set-up, on a GPU
  moa-train experiment=ffhq_sd15 trainer=ddp ...    on all GPUs of this machine (several machines: docs/scaling.md)
  moa-train model=fastcomposer trainer=fsdp ...    the same, the model split over them: where the whole U-Net trains
                                                    (trainer=deepspeed: the optimizer)
  moa-train plan experiment=ffhq_sd15 ...           what it needs: memory by part, disk, time; and all that is wrong
  moa-train ckpt=last                               goes on with the newest run of this name, in its folder
  moa-train -m optim.lr=1e-4,3e-4 seed=0,1          a sweep: one run, in a process of its own, for each combination
  moa-train -m hydra/launcher=joblib hydra.launcher.n_jobs=2 ...      two at a time; submitit_slurm: jobs of a cluster
  moa-train -m hydra/sweeper=optuna 'optim.lr=tag(log,interval(1e-5,1e-3))'    values proposed by Optuna, the same
                                                    command goes on; the hopeless are stopped early

Experiments (experiment=):  {experiment}
Machines    (trainer=):     {trainer}
Data        (data=):        {data}
Prior       (prior=):       {prior}; or directly a Stable Diffusion folder or hub id: prior=/models/sd15
Loggers     (logger=):      {logger}

  max_steps=1000              optimizer steps
  name=NAME run_dir=FOLDER    where the run goes: runs/NAME/TIME unless run_dir is given
  ckpt=last | auto | PATH     resume, bit for bit; auto: resume if there is a checkpoint (for jobs that are requeued)
  callbacks.checkpoint.every_n_steps=500            and .keep=3, .asynchronous=true (training goes on meanwhile)
  evaluate={people:8}         at the end, export and let moa-eval measure (its settings; {}: as they are): evaluation/
  replay=FILE                 makes a step again whose loss or gradient was not finite (runs/.../nonfinite/step=N.json)
  init=FILE                   start from exported weights (toy: the file in this package) instead of the prior's copy
  seed=0                      the same seed gives the same run; deterministic=true: to the bit
  trainer.on_nonfinite=skip   leaves out steps whose loss or gradient is not finite, on all ranks; stop (default) ends
  dry_run=true plan_steps=3   the same as `moa-train plan`; real steps that it times (0: none)
  compile=true  gradient_checkpointing=true         speed against start-up time; memory against speed

A run's folder: config.yaml, metrics.csv, train.log, sample_log.csv, samples/, routing/, checkpoints/.
SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C, to any process, save a checkpoint first (docs/survival.md).
Every setting with its meaning: configs/train.yaml and the groups beside it, or `moa-train --cfg job`.
"""


def run(cfg: DictConfig) -> None:
    """Train as the configuration says; a job of a sweep in a process of its own; with replay=, make one step again."""
    from moa_train.cli.trials import in_sweep, run_trial

    if in_sweep():
        run_trial(cfg)
        return
    if cfg.replay is not None:
        from moa_train.cli.replay import replay

        replay(cfg)
        return
    import pytorch_lightning as pl
    from pytorch_lightning.utilities import rank_zero_only

    from moa_train.cli.measure import evaluation_settings, measure
    from moa_train.cli.runs import logged_to, open_run, save_config, tell_ranks
    from moa_train.training.resume import check_resumable

    if cfg.evaluate is not None:
        evaluation_settings(cfg)
    if cfg.dry_run:
        _plan(cfg)
        return
    chosen = open_run(cfg)
    cfg.run_dir, cfg.run_id = str(chosen.folder), cfg.run_id or chosen.identifier
    cfg.trainer.precision = chosen_precision(cfg.trainer.precision, cfg.trainer.accelerator)
    rank = int(getattr(rank_zero_only, "rank", 0))
    first = rank == 0
    with logged_to(chosen.folder / ("train.log" if first else f"train.rank{rank}.log")):
        if first:
            save_config(cfg, chosen.folder)
        pl.seed_everything(cfg.seed, workers=True, verbose=False)
        prior, module = build_module(cfg)
        datamodule = build_data(cfg, prior)
        datamodule.check_latents(module.codec.identity)
        if chosen.checkpoint is not None:
            check_resumable(chosen.checkpoint, module)
        trainer = build_trainer(cfg, prior)
        if trainer.world_size > 1:
            tell_ranks(chosen.folder)
        _fit(trainer, module, datamodule, chosen)
        if cfg.evaluate is not None and trainer.is_global_zero:
            measure(cfg, chosen.folder)


def _plan(cfg: DictConfig) -> None:
    from tempfile import TemporaryDirectory

    from moa_train.cli.plan import plan
    from moa_train.cli.runs import logged_to

    cfg.trainer.precision = chosen_precision(cfg.trainer.precision, cfg.trainer.accelerator)
    with TemporaryDirectory() as folder, logged_to(Path(folder) / "plan.log"):
        plan(cfg, build_module, build_trainer, _build)


def _fit(trainer: pl.Trainer, module: MoAModule, datamodule: pl.LightningDataModule, chosen: Run) -> None:
    from moa_train.training.callbacks.ranks import RankLost, find_watch

    where = f"resuming {chosen.checkpoint}" if chosen.checkpoint else f"writing to {chosen.folder}"
    trained = sum(parameter.numel() for parameter in module.trained_parameters().values())
    if trainer.is_global_zero:
        logger.info("training %.2f M parameters until step %d; %s", trained / 1e6, trainer.max_steps, where)
    try:
        trainer.fit(module, datamodule, ckpt_path=None if chosen.checkpoint is None else str(chosen.checkpoint))
    except RuntimeError as error:
        watch = find_watch(trainer)
        if watch is None or watch.lost is None:
            raise
        raise RankLost from error


def build_module(cfg: DictConfig) -> tuple[Prior, MoAModule]:
    """The prior with MoA installed, and the Lightning module around it."""
    from omegaconf import OmegaConf

    from moa_train import __version__
    from moa_train.checkpoint import load_personalized
    from moa_train.conditioning.encoders import TextEncoder
    from moa_train.denoiser import Denoiser
    from moa_train.diffusion import NoiseSchedule
    from moa_train.inference.weights import fill_moa, weights_path
    from moa_train.latents import LatentCodec
    from moa_train.model.unet import compile_blocks, install, trainable_parameters
    from moa_train.prior.load import load_prior, weights_fingerprint
    from moa_train.training.module import MoAModule

    own = cfg.get("image_encoder") is None  # image_encoder=null: the prior's own
    prior = load_prior(cfg.prior.source, None if own else _build(cfg.image_encoder))
    method = _build(cfg.model)(image_dim=prior.image_encoder.dim)
    unet = install(prior.unet, method)
    if cfg.init is not None:
        fill_moa(prior, *load_personalized(weights_path(cfg.init)))
    trained = trainable_parameters(unet)
    trained["image_encoder"] = [item for item in prior.image_encoder.named_parameters() if item[1].requires_grad]
    module = MoAModule(
        denoiser=Denoiser(unet),
        text_encoder=TextEncoder(prior.tokenizer, prior.text_encoder),
        image_encoder=prior.image_encoder,
        codec=LatentCodec(prior.vae, weights_fingerprint(prior.vae)),
        schedule=NoiseSchedule.from_config(prior.scheduler.config),
        trained=trained,
        loss=_build(cfg.loss),
        optimizer=_build(cfg.optim),
        max_steps=cfg.max_steps,
        prior=prior.identity,
        provenance={
            "method": method.name,
            "moa": method.to_dict(),
            "config": OmegaConf.to_container(cfg, resolve=True),
            "moa_train_version": __version__,
        },
    )
    module.cast_frozen(_prior_dtype(cfg))
    if cfg.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if cfg.compile:
        compile_blocks(unet)
    return prior, module


def build_data(cfg: DictConfig, prior: Prior) -> MoADataModule:
    """The data module, with the prior's tokenizer and for its image encoder."""
    return _build(cfg.data)(tokenizer=prior.tokenizer, subject_size=prior.image_encoder.image_size)


def build_trainer(cfg: DictConfig, prior: Prior) -> pl.Trainer:
    """The trainer with its callbacks and loggers."""
    from moa_train.training.strategies import check_strategy, cluster
    from moa_train.training.writer import CheckpointWriter

    callbacks = [_build(callback) for callback in cfg.callbacks.values() if callback is not None]
    callbacks = [
        callback(pipeline=partial(_pipeline, prior)) if isinstance(callback, partial) else callback
        for callback in callbacks
    ]
    loggers = [_build(logger) for logger in cfg.logger.values() if logger is not None]
    validation: dict[str, Any] = {"limit_val_batches": 0}
    if cfg.validate_every is not None:  # Lightning counts micro-batches
        validation = {"val_check_interval": cfg.validate_every * cfg.trainer.accumulate_grad_batches}
    plugins: list[Any] = [CheckpointWriter(), *cluster(cfg.trainer.num_nodes)]
    if isinstance(cfg.trainer.strategy, str):
        check_strategy(cfg.trainer.strategy)
    make = _build(cfg.trainer)
    make.keywords.pop("on_nonfinite", None)  # callbacks.finite has it; Lightning's trainer knows no such setting
    trainer: pl.Trainer = make(callbacks=callbacks, logger=loggers, plugins=plugins, **validation)
    check_strategy(trainer.strategy, cfg.compile)
    return trainer


def _pipeline(prior: Prior) -> Any:
    """Generation with the modules that are being trained."""
    from diffusers import DDIMScheduler

    from moa_train.inference.pipeline import MoAPipeline

    scheduler = DDIMScheduler.from_config({**prior.scheduler.config, "clip_sample": False, "steps_offset": 1})
    return MoAPipeline(
        vae=prior.vae,
        text_encoder=prior.text_encoder,
        tokenizer=prior.tokenizer,
        unet=prior.unet,
        scheduler=scheduler,
        image_encoder=prior.image_encoder,
    )


def _prior_dtype(cfg: DictConfig) -> Any:
    import torch

    name = cfg.prior_dtype
    if name == "auto":
        bf16 = cfg.trainer.accelerator != "cpu" and cfg.trainer.precision == "bf16-mixed"
        name = "bfloat16" if bf16 else "float32"
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"prior_dtype={name}: expected auto, float32 or bfloat16")
    return getattr(torch, name)


def _build(cfg: DictConfig) -> Any:
    """What a node of the configuration describes, with plain lists and dicts."""
    from hydra.utils import instantiate

    from moa_train.cli.targets import refuse_foreign_targets

    refuse_foreign_targets(cfg)  # each job of a sweep, and configurations out of files, come by here
    return instantiate(cfg, _convert_="all")


def main() -> None:
    """The command; `plan` as its first word stands for dry_run=true."""
    if sys.argv[1:2] == ["plan"]:
        sys.argv[1:2] = ["dry_run=true"]
    sys.argv[1:] = prior_paths_as_source(sys.argv[1:], config_dir())
    _main()


_main = command("train", help=HELP, run="moa_train.cli.train:run")
