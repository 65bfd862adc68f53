"""`moa-pretrain`: trains the toy prior that ships with the package, from drawn scenes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moa_train.cli.command import command
from moa_train.cli.precision import chosen_precision

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = """\
Train the toy prior: a small Stable Diffusion for drawn scenes, with MoA's image encoder and the measuring probe.

  moa-pretrain                                         everything: about two hours on two CPU cores
  moa-pretrain accelerator=cuda text_to_image.steps=20000   longer, on a GPU
  moa-pretrain stages=[figures]                        measure a finished one again
  moa-pretrain scenes=500 autoencoder.steps=20 text_to_image.steps=20 image_encoder.steps=20 probe.steps=20 out=/tmp/try

Stages, each from what the earlier ones saved:
  autoencoder      AutoencoderKL, 64 x 64 x 3 to 16 x 16 x 4
  text_to_image    tokenizer, text encoder and U-Net
  image_encoder    open_clip model of pictures and detailed descriptions; its vision tower feeds MoA
  probe            networks that measure who, where and which place; never used to make pictures
  figures          PSNR, retrieval, probe errors, context accuracy and a sheet of samples: figures.json, samples.png

The result lies in out= as a Stable Diffusion folder; train MoA on it with moa-train prior=FOLDER. A run that was cut
off goes on from its last checkpoint when the same command is given again.
"""


def run(cfg: DictConfig) -> None:
    """Train the stages that the configuration names."""
    from pathlib import Path

    import torch
    from omegaconf import OmegaConf

    from moa_train.prior.pretrain.run import Pretraining, PretrainOptions, StageOptions

    torch.set_num_threads(cfg.threads)
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    for name in ("autoencoder", "text_to_image", "image_encoder", "probe"):
        settings[name] = StageOptions(**settings[name])
    for name in ("out", "work"):
        settings[name] = Path(settings[name])
    settings["precision"] = chosen_precision(cfg.precision, cfg.accelerator)
    stages = settings.pop("stages")
    for name in ("threads", "debug"):
        settings.pop(name)
    Pretraining(PretrainOptions(**settings)).run(stages)  # type: ignore[arg-type]


main = command("pretrain", help=HELP, run="moa_train.cli.pretrain:run")
