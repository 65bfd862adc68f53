"""`moa-eval`: the numbers and pictures that say whether personalized weights do what they should."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_train.cli.command import command
from moa_train.cli.paths import config_dir
from moa_train.cli.prior import prior_paths_as_source

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from moa_train.evaluation.gallery import ToyProtocol

HELP = """\
Measure personalized weights: identity, context, routing, diversity.

  moa-eval weights=personalized.safetensors
  moa-eval weights=runs/demo/personalized.safetensors out=runs/demo people=24 seeds=[0,1,2,3]

benchmark=toy (the default) shows MoA one photo each of people that training never saw, lets it draw them in
eight contexts, and compares with the prior's pictures of equal prompts and seeds: some minutes on two CPU cores.

  weights=toy              what moa-export wrote; toy: the file in this package
  prior=toy                the prior that the weights belong to
  people=8 contexts=8 seeds=[0,1]    how much is generated: people x contexts x seeds pictures
  steps=25 guidance=3      of the sampler
  split=validation         people to choose settings on; test, the default, is for the figures that you report
  lineup=100               identities of the split among which the person of a picture is sought (rank 1, rank 5)
  pairs=4                  pairs of people who are drawn together, in each context once: are they confused? 0: none
  separate_subjects=true   keep the two people of a pair apart
  reference=scene          the photo of a person: scene (somewhere else) or portrait
  out=outputs/eval         where everything goes
  device=cuda dtype=float32

benchmark=fastcomposer is FastComposer's evaluation for Stable Diffusion 1.x: photos of 15 subjects, 40 prompts, 4
pictures each; CLIP says whether a picture shows its prompt, face vectors whether it shows the person. The same command
goes on with a run that was stopped.

  moa-eval benchmark=fastcomposer prior=sd15 weights=personalized.safetensors subjects=people out=outputs/fastcomposer

  subjects=FOLDER          one photo a subject, with its mask (moa-data subjects writes such); people=15: how many
  prompts=FILE             other templates; noun=person: of a photo whose caption and file name tell none
  together=2               every pair of subjects in one picture, 21 prompts
  subject_start=0.5        the first half of the steps without the subject; auto: so for FastComposer's weights alone
  embedder=facenet embedder.weights=FILE     the faces' measure; openclip, the default, is a stand-in
  clip.model=ViT-L-14-quickgelu clip.pretrained=openai     a tag, a file; or clip.model=FOLDER clip.pretrained=null
  without_photo=false      do not draw each prompt without a photo, too
  steps=50 guidance=5 seeds=[42,43,44,45] size=[512,512] batch_size=4    of the sampler

  moa-eval collect=runs/moa/2026-01-31_12-00-00    gathers a sweep, or any folder of runs, into one table: settings that
                           differ, last validation, evaluations that lie in the runs' folders; means over seeds

Writes metrics.json, report.md (a table that explains itself), samples.png, routing.png, pictures/ (each by itself) and
eval.yaml into `out`.
The weights of a baseline (FastComposer, IP-Adapter) are measured the same way; it has no router, so no routing.png.
Every setting with its meaning: configs/eval.yaml and configs/benchmark; more on photos: docs/evaluation_photos.md
"""


def run(cfg: DictConfig) -> None:
    """Generate, measure and report what the configuration describes, or gather what runs have reported."""
    if cfg.collect is not None:
        from moa_train.cli.collect import report

        if not report(Path(cfg.collect)):
            raise ValueError(f"collect={cfg.collect}: there is no run (a folder with config.yaml) in it")
        return
    if cfg.benchmark == "fastcomposer":
        from moa_train.cli import evaluate_photos

        evaluate_photos.run(cfg)
        return
    from omegaconf import OmegaConf

    from moa_train.evaluation.benchmark import run_toy
    from moa_train.evaluation.clip_score import ClipScore
    from moa_train.evaluation.comparison import save_pictures
    from moa_train.evaluation.report import plain, table, write_report
    from moa_train.inference.device import device_and_dtype
    from moa_train.inference.pipeline import MoAPipeline
    from moa_train.prior.probe import load_probe

    settings: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    protocol = toy_protocol(cfg)
    device, dtype = device_and_dtype(settings["device"], settings["dtype"])
    probe = load_probe(_probe_folder(settings["probe"]))
    clip = ClipScore(**settings["clip"], device=str(device))
    source, weights = settings["prior"]["source"], settings["weights"]
    pipe = prior = MoAPipeline.from_pretrained(source, weights, torch_dtype=dtype).to(device)
    if pipe.unet.moa.config.trains_unet:
        prior = MoAPipeline.from_pretrained(source, torch_dtype=dtype).to(device)
    for each in (pipe, prior):
        each.set_progress_bar_config(disable=True)
    gallery, numbers = run_toy(pipe, probe, clip, protocol, prior)
    out = Path(settings["out"])
    write_report(out, gallery, numbers)
    save_pictures(out, gallery, protocol)
    OmegaConf.save(cfg, out / "eval.yaml")  # config.yaml would be that of a training run in this folder
    print(plain(table(numbers)))
    print(f"\n{numbers['seconds']} s; see {out / 'report.md'}, {out / 'samples.png'}")


def toy_protocol(cfg: DictConfig) -> ToyProtocol:
    """What benchmark=toy is to draw and to measure. Raises ValueError: it would give no comparison."""
    from dataclasses import fields

    from moa_train.evaluation.gallery import ToyProtocol

    settings = {field.name: cfg[field.name] for field in fields(ToyProtocol)}
    return ToyProtocol(**{**settings, "seeds": tuple(cfg.seeds)})


def _probe_folder(name: str) -> Path:
    """Where the networks lie that look at the pictures; "toy" are the ones in this package."""
    from moa_train.prior.load import toy_prior_folder

    return toy_prior_folder() / "probe" if name == "toy" else Path(name)


def main() -> None:
    """The command."""
    sys.argv[1:] = prior_paths_as_source(sys.argv[1:], config_dir())
    _main()


_main = command("eval", help=HELP, run="moa_train.cli.evaluate:run")
