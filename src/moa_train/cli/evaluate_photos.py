"""`moa-eval benchmark=fastcomposer`: from the settings to the objects that draw, measure and report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(cfg: DictConfig) -> None:
    """Draw what is missing, measure and report; all that can be wrong is looked for before the first picture."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from moa_train.cli.data.common import progress
    from moa_train.evaluation import photo_report, photo_shots
    from moa_train.evaluation.clip_score import ClipScore
    from moa_train.evaluation.photo_prompts import read_templates
    from moa_train.evaluation.photo_subjects import read_subjects
    from moa_train.evaluation.photos import run_photos
    from moa_train.evaluation.report import plain
    from moa_train.inference.device import device_and_dtype
    from moa_train.inference.pictures import file_hash
    from moa_train.inference.pipeline import MoAPipeline
    from moa_train.inference.weights import weights_path

    settings: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    if settings["weights"] is None or not weights_path(settings["weights"]).is_file():
        raise ValueError(f"weights={settings['weights']} is no file: give the .safetensors file that moa-export wrote")
    size = settings["size"]
    if size is not None and len(size) != 2:
        raise ValueError(f"size is {size}; expected width and height in pixels, size=[512,512], or null")
    protocol = photo_shots.PhotoProtocol(
        seeds=tuple(settings["seeds"]),
        guidance=float(settings["guidance"]),
        size=None if size is None else tuple(size),
        **{key: settings[key] for key in ("together", "steps", "batch_size", "without_photo")},
    )
    templates = read_templates(settings["prompts"], protocol.together)
    subjects = read_subjects(settings["subjects"], settings["people"], settings["noun"])
    device, dtype = device_and_dtype(settings["device"], settings["dtype"])
    clip = ClipScore(**settings["clip"], device=str(device))
    embedder = instantiate(cfg.embedder, device=str(device))
    pipe = MoAPipeline.from_pretrained(settings["prior"]["source"], settings["weights"], torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    protocol = photo_shots.delayed(protocol, settings["subject_start"], pipe)
    weights, out = file_hash(weights_path(settings["weights"])), Path(settings["out"])
    folder = out / "pictures"
    numbers = run_photos(pipe, subjects, templates, protocol, clip, embedder, folder, weights, progress)
    shots, without = photo_shots.plan_shots(subjects, templates, protocol)
    sheet = photo_report.samples_figure(subjects, shots, without, folder)
    photo_report.write_report(out, numbers, sheet)
    OmegaConf.save(cfg, out / "eval.yaml")
    print(plain(photo_report.table(numbers)))
    print(f"\n{numbers['seconds']} s; see {out / 'report.md'}, {out / 'samples.png'}, {folder}")
