"""`moa-export`: the trained weights of a checkpoint as one file for generation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moa_train.cli.command import command

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = """\
Take the trained weights out of a checkpoint: personalized experts, routers, multimodal tokens, and the image encoder's
tuned layers.

  moa-export ckpt=runs/toy/TIME                                   its last checkpoint; the file goes beside config.yaml
  moa-export ckpt=runs/toy/TIME/checkpoints/step=000500.ckpt out=personalized.safetensors
  moa-export ckpt=last dtype=bfloat16                             the newest run in runs/

  ckpt=PATH | last           a checkpoint, a run's folder, or the newest checkpoint below runs/
  out=FILE                   where to write; personalized.safetensors in the run's folder if not given
  dtype=float16              float16, bfloat16 or float32
  ema=true                   the average of the weights (false: the weights themselves)
  hub=user/name              also push the file to a Hugging Face repository

The file's metadata holds the configuration, the step and the identity of the prior. Use it with
`moa-generate weights=FILE`.
"""


def run(cfg: DictConfig) -> None:
    """Write the file that the configuration describes."""
    from pathlib import Path

    from moa_train.cli.runs import LAST, existing_checkpoint, newest_checkpoint
    from moa_train.training.export import export_checkpoint, push_to_hub

    checkpoint = newest_checkpoint(Path(cfg.runs)) if cfg.ckpt == LAST else existing_checkpoint(cfg.ckpt)
    if checkpoint is None:
        raise ValueError(f"ckpt=last: there is no checkpoint below {cfg.runs}/; give ckpt=PATH or runs=FOLDER")
    beside = checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    out = Path(cfg.out) if cfg.out is not None else beside / "personalized.safetensors"
    step = export_checkpoint(checkpoint, out, cfg.dtype, cfg.ema)
    print(f"{out}: step {step}, {out.stat().st_size / 1e6:.1f} MB, {cfg.dtype}")
    if cfg.hub is not None:
        print(push_to_hub(out, cfg.hub))


main = command("export", help=HELP, run="moa_train.cli.export:run")
