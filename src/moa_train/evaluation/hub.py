"""Exported weights on a hub: the file with a model card of its pictures, figures and use, as a folder or uploaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from PIL import Image

from moa_train.checkpoint import LOCAL
from moa_train.evaluation.report import table
from moa_train.training.privacy import without_private

CARD, SETTINGS, FIGURES = "README.md", "config.json", "metrics.json"
PICTURES = {
    "samples.png": "People, and pictures made of them with these weights.",
    "routing.png": "Which pixels the personalized expert drew.",
}
_TAGS = ["mixture-of-attention", "personalization", "text-to-image", "diffusion", "stable-diffusion"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def local_hub(hub: str) -> Path | None:
    """The folder that `hub=` names, or None where it names a repository.

    Raises:
        ValueError: neither, or a folder that has files already.
    """
    if not hub.startswith((".", "/", "~")):
        if not _HUB_ID.fullmatch(hub):
            raise ValueError(f"hub={hub}: expected a repository, user/name, or a folder that starts with ./ or /")
        return None
    folder = Path(hub).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"hub={hub} exists and is not an empty folder: give a new one, so that nothing is overwritten")
    return folder


def write_hub_folder(
    folder: Path, weights: Path, metadata: Mapping[str, Any], title: str, run: Path, pictures: bool = True
) -> None:
    """Everything that is uploaded: the weights, README.md, config.json, and of the run its figures and pictures.

    Args:
        folder: made if need be. weights: the exported file. metadata: its metadata. title: of the card.
        run: the run's folder, for metrics.json of `moa-eval` and pictures: samples.png, else the newest in samples/.
        pictures: False leaves the pictures out (they may show real people).
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / weights.name).write_bytes(weights.read_bytes())
    (folder / SETTINGS).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    shown = [name for name in PICTURES if pictures and _copy_picture(run, name, folder)]
    figures = None
    if (run / FIGURES).is_file():
        figures = without_private(json.loads((run / FIGURES).read_text(encoding="utf-8")))
        (folder / FIGURES).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    card = model_card(title, weights.name, metadata, figures, shown)
    (folder / CARD).write_text(card, encoding="utf-8")


def push(folder: Path, repository: str) -> str:
    """Upload a folder to a Hugging Face repository, made if need be; returns the commit's address."""
    hub = HfApi()
    hub.create_repo(repository, exist_ok=True)
    return str(hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Personalized weights of MoA"))


def _copy_picture(run: Path, name: str, folder: Path) -> bool:
    """Copy the pixels of a run's picture, without what its file says about how it was made."""
    newest = sorted((run / Path(name).stem).glob("step=*.png"))
    found = next((path for path in (run / name, *newest[-1:]) if path.is_file()), None)
    if found is None:
        return False
    with Image.open(found) as picture:
        picture.convert("RGB").save(folder / name)
    return True


def model_card(
    title: str, file: str, metadata: Mapping[str, Any], figures: Mapping[str, Any] | None, pictures: list[str]
) -> str:
    """The card as Markdown with the hub's front matter."""
    prior = str(metadata["prior"].get("name"))
    on_hub = _HUB_ID.fullmatch(prior) is not None
    front = ModelCardData(
        license=metadata.get("license"),
        library_name="moa-train",
        pipeline_tag="text-to-image",
        tags=_TAGS,
        base_model=prior if on_hub else None,
    )
    lines = ["---", front.to_yaml(), "---", "", f"# {title}", "", _about(metadata), ""]
    for name in pictures:
        lines += [PICTURES[name], "", f"![{Path(name).stem}]({name})", ""]
    lines += _figures(metadata.get("metrics") or {}, figures)
    lines += _use(file, "PRIOR" if prior.startswith(LOCAL) else prior)
    return "\n".join(lines)


def _about(metadata: Mapping[str, Any]) -> str:
    prior, version = metadata["prior"], metadata.get("moa_train_version", "of unknown version")
    kind = "their running average" if metadata.get("ema") else "the weights themselves"
    licence = metadata.get("license") or "not stated"
    method = "Mixture-of-Attention" if metadata.get("method", "moa") == "moa" else metadata["method"]
    return (
        f"Personalized weights ({method}) for a text-to-image prior, to draw the people (or other subjects) of "
        f"photos. Trained by moa_train {version} for {metadata['step']} steps ({kind}) on the prior "
        f"`{prior.get('name')}` (architecture {prior.get('config')}, weights {prior.get('weights')}), which is not in "
        f"the file. All settings: [{SETTINGS}]({SETTINGS}). Licence: {licence}."
    )


def _figures(validation: Mapping[str, float | int], figures: Mapping[str, Any] | None) -> list[str]:
    lines = ["## Figures", ""]
    if figures is not None:
        lines += ["| measured by `moa-eval` | | mean | 95 % interval |", "|---|---|---|---|"]
        for question, _, whose, mean, low, high in _measured(figures):
            lines.append(f"| {question} | {whose} | {mean:.4g} | {low:.4g} – {high:.4g} |")
        lines.append("")
    if validation:
        lines += [f"| last validation, step {int(validation['step'])} | |", "|---|---|"]
        lines += [f"| {name.partition('/')[2]} | {value:.4g} |" for name, value in validation.items() if name != "step"]
        lines.append("")
    return lines if len(lines) > 2 else [*lines, "None were measured.", ""]


def _measured(figures: Mapping[str, Any]) -> list[tuple[str, str, str, float, float, float]]:
    try:
        return table(figures)
    except KeyError as error:
        raise ValueError(
            f"the run's {FIGURES} is not what moa-eval writes (it has no {error.args[0]}): measure again, or rename it"
        ) from error


def _use(file: str, prior: str) -> list[str]:
    prompt = "a photo of a man <1> at the beach"
    return [
        "## Use",
        "",
        "    pip install moa-train",
        f'    moa-generate prior={prior} weights={file} prompt="{prompt}" subjects=[man.png]',
        "",
        "```python",
        "from moa_train import MoAPipeline",
        "",
        f'pipe = MoAPipeline.from_pretrained("{prior}", weights="{file}")',
        f'image = pipe("{prompt}", subjects=["man.png"]).images[0]',
        "```",
        "",
    ]
