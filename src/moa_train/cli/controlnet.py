"""`moa-controlnet`: trains a ControlNet for edges on a frozen prior, and measures how well pictures follow it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from moa_train.cli.command import command
from moa_train.cli.paths import config_dir
from moa_train.cli.precision import chosen_precision
from moa_train.cli.prior import prior_paths_as_source

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = """\
Train a ControlNet for edges on the toy world: the outlines of one picture lead the drawing of another.

  moa-controlnet                                  1000 steps on the toy prior: about 20 minutes on one CPU core
  moa-controlnet stages=[figures]                 measure a finished one again
  moa-controlnet accelerator=cuda steps=20000 batch_size=64 scenes=24000       longer, on a GPU
  moa-controlnet prior=FOLDER weights=null        for another prior whose pictures are toy scenes

Stages:
  train      drawn scenes, Canny's edges of them, a ControlNet that starts as a copy of the prior's encoder
  figures    edges of drawn pictures against the edges given, on held-out scenes, with and without control and a
             subject: figures.json, samples.png

  out=FOLDER          the finished ControlNet in the diffusers format (float16), its learning curve and settings
  work=FOLDER         checkpoints; a run that was cut off goes on from there when the same command is given again
  steps=1000 batch_size=8 learning_rate=1e-3 scenes=4000 seed=0

Use it with `moa-generate controlnet=FOLDER control_image=photo.png ...`; controlnet=toy is the one that ships with this
package. Every setting with its meaning: configs/controlnet.yaml
"""

STAGES = ("train", "figures")


def run(cfg: DictConfig) -> None:
    """Train and measure as the configuration says."""
    import torch

    unknown = set(cfg.stages) - set(STAGES)
    if unknown:
        raise ValueError(f"stages holds {', '.join(sorted(unknown))}; expected some of {', '.join(STAGES)}")
    torch.set_num_threads(cfg.threads)
    if "train" in cfg.stages:
        _train(cfg)
    if "figures" in cfg.stages:
        _measure(cfg)


def _train(cfg: DictConfig) -> None:
    from pathlib import Path

    from moa_train.prior.pretrain.controlnet import ControlNetOptions, train_controlnet

    same = ("scenes", "seed", "workers", "accelerator", "steps", "batch_size", "learning_rate", "drop_probability")
    train_controlnet(
        ControlNetOptions(
            prior=cfg.prior.source,
            out=Path(cfg.out),
            work=Path(cfg.work),
            precision=chosen_precision(cfg.precision, cfg.accelerator),
            **{key: cfg[key] for key in same},
        )
    )


def _measure(cfg: DictConfig) -> None:
    import json
    from pathlib import Path

    from moa_train.evaluation.control import ControlProtocol, measure_control
    from moa_train.inference.pictures import save_png
    from moa_train.inference.pipeline import MoAControlNetPipeline
    from moa_train.prior.controlnet import load_controlnet

    out = Path(cfg.out)
    pipe = MoAControlNetPipeline.from_pretrained(cfg.prior.source, cfg.weights, controlnet=load_controlnet(out))
    pipe.set_progress_bar_config(disable=True)
    pipe.to("cuda" if cfg.accelerator in ("gpu", "cuda") else "cpu")
    protocol = ControlProtocol(
        scenes=cfg.figure_scenes,
        steps=cfg.figure_steps,
        guidance=cfg.figure_guidance,
        scale=cfg.figure_scale,
        seed=cfg.seed,
    )
    figures, sheet = measure_control(pipe, protocol)
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    save_png(out / "samples.png", sheet, {"protocol": figures["protocol"]})
    print(json.dumps(figures, indent=2))


def main() -> None:
    """The command."""
    sys.argv[1:] = prior_paths_as_source(sys.argv[1:], config_dir())
    _main()


_main = command("controlnet", help=HELP, run="moa_train.cli.controlnet:run")
