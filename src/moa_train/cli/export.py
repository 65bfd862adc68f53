"""`moa-export`: the trained weights of a checkpoint as one file for generation, and its way to a hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moa_train.cli.command import command

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig

HELP = """\
Take the trained weights out of a checkpoint: personalized experts, routers, multimodal tokens, and the image encoder's
tuned layers.

  moa-export ckpt=runs/toy/TIME                                   its last checkpoint; the file goes beside config.yaml
  moa-export ckpt=runs/toy/TIME/checkpoints/step=000500.ckpt out=personalized.safetensors
  moa-export ckpt=last dtype=bfloat16 license=apache-2.0          the newest run in runs/
  moa-export ckpt=last hub=./card                                 look at what a hub would get
  moa-export ckpt=last hub=user/name                              and upload it

  ckpt=PATH | last           a checkpoint, a run's folder, or the newest checkpoint below runs/; or an exported file, to
                             write it again in another dtype, with a licence, or to a hub
  out=FILE                   where to write; personalized.safetensors in the run's folder if not given
  dtype=float16              float16, bfloat16 or float32
  ema=true                   the average of the weights (false: the weights themselves)
  license=apache-2.0         what others may do with the weights; null: not stated
  hub=user/name              also upload to a Hugging Face repository (made if need be; log in with `hf auth login`); a
                             folder (./card, /tmp/card) gets the same files and nothing is uploaded
  pictures=false             leave samples.png and routing.png off the hub: they may show real people

The file's metadata hold the configuration, the step, the last validation and the identity of the prior, but no secret,
account or folder of this machine. On a hub the file comes with a model card (README.md: figures, pictures, how to use),
config.json and the run's metrics.json. Use the file with `moa-generate weights=FILE`; docs/format.md describes it.
"""


def run(cfg: DictConfig) -> None:
    """Write the file that the configuration describes, and put it on the hub that it names."""
    from pathlib import Path

    from moa_train.cli.runs import LAST, existing_checkpoint, newest_checkpoint
    from moa_train.training.export import export_checkpoint

    checkpoint = newest_checkpoint(Path(cfg.runs)) if cfg.ckpt == LAST else existing_checkpoint(cfg.ckpt)
    if checkpoint is None:
        raise ValueError(f"ckpt=last: there is no checkpoint below {cfg.runs}/; give ckpt=PATH or runs=FOLDER")
    beside = checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    out = Path(cfg.out) if cfg.out is not None else beside / "personalized.safetensors"
    if cfg.hub is not None:
        from moa_train.evaluation.hub import local_hub

        local_hub(cfg.hub)  # a mistake is told before anything is written
    metadata = export_checkpoint(checkpoint, out, cfg.dtype, cfg.ema, cfg.license, beside / "metrics.csv")
    licence = metadata["license"] or "not stated, license=... states it"
    print(f"{out}: step {metadata['step']}, {out.stat().st_size / 1e6:.1f} MB, {cfg.dtype}, licence {licence}")
    if cfg.hub is not None:
        _publish(cfg.hub, out, metadata, beside, cfg.pictures)


def _publish(hub: str, weights: Path, metadata: dict[str, Any], run_folder: Path, pictures: bool) -> None:
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from moa_train.evaluation.hub import local_hub, push, write_hub_folder

    title, folder = Path(hub).name, local_hub(hub)
    if folder is not None:
        write_hub_folder(folder, weights, metadata, title, run_folder, pictures)
        print(f"{folder}/: {', '.join(sorted(path.name for path in folder.iterdir()))}")
        return
    with TemporaryDirectory() as temporary:
        write_hub_folder(Path(temporary), weights, metadata, title, run_folder, pictures)
        print(push(Path(temporary), hub))


main = command("export", help=HELP, run="moa_train.cli.export:run")
