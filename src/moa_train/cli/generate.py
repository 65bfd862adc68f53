"""`moa-generate`: pictures of the subjects of photos, and edits of them, from personalized weights."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from moa_train.cli.command import command
from moa_train.cli.paths import config_dir
from moa_train.cli.prior import prior_paths_as_source

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = """\
Make pictures of the people (or other subjects) in your photos, and edit pictures with them.

  moa-generate prompt="a photo of a man <1> at the beach" subjects=[man.png]
  moa-generate prompt="a photo of a man <1> and a woman <2> in the forest" subjects=[man.jpg,woman.jpg] seeds=[0,1,2,3]
  moa-generate prior=FOLDER_OR_HUB_ID weights=personalized.safetensors prompt="..." subjects=[...]

<1> stands behind the noun that is the first photo's subject, <2> behind the second's. A prompt without a marker gives
the prior's own picture. What counts as the subject of a photo: its mask; else its alpha channel; else the person found.

Tasks. Each writes pictures, a sheet of them, and its measurements as JSON; docs/tasks/ has a page for each.

  task=generate   (default) one picture a seed: samples.png, routing.png
  task=swap       the same seeds with other subjects: a grid whose context stays. One subject a row (with n markers, n)
      moa-generate task=swap prompt="a photo of a man <1> at the beach" subjects=[tom.png,tim.png,jim.png] seeds=[0,1,2]
  task=morph      from one subject to another at the first seed: morph.gif and morph.png (a strip)
      moa-generate task=morph prompt="a photo of a man <1> at the beach" subjects=[tom.png,tim.png] frames=9
  task=compose    subjects come in and go out one at a time, all else stays
      moa-generate task=compose prompt="a man <1> and a woman <2> in the forest" subjects=[tom.png,ann.png]
  task=invert     another subject in a real picture: DDIM inversion, reconstruction with its error, one swap a subject
      moa-generate task=invert input=beach.png prompt="a photo of a man <1> at the beach" subjects=[tim.png] steps=50
  task=routing    the paper's figure: what each attention layer gives to the personalized expert at each timestep
      moa-generate task=routing prompt="a photo of a man <1> at the beach" subjects=[tom.png] seeds=[0]

Settings

  prior=toy                 network to personalise: toy (in this package), a Stable Diffusion folder, a hub id
  weights=toy               what moa-export wrote; toy: the file in this package; null: the prior alone
  lora=style.safetensors    a LoRA on the prior: changes the style, not who it is; lora_scale=1.0
  controlnet=toy control_image=room.png     the edges of a picture lead the drawing, with every task but invert
                            toy: the ControlNet in this package; or a folder or hub id of the prior's architecture
  control_kind=map          control_image is a ready map (edges, poses, depth ...); control_scale=1.0: how much
  subjects=[[a.png,b.png]]  an inner list: several photos of one subject
  masks=[man_mask.png]      one mask a photo, white on the subject
  seeds=[0,1,2,3]           one picture a seed; equal seeds and settings give equal files
  steps=25 guidance=5       denoising steps; classifier-free guidance
  negative_prompt="..."     what to guide away from
  size=[512,512]            width and height in pixels; null: the prior's own
  batch_size=4              pictures denoised together: memory against speed
  subject_strength=0.5      less of the subjects: 0 is the prior's picture; '{up_blocks.*:0.5}' in these layers alone
  subject_start=0.3         the first 30 % of the steps see the prior alone: its layout, the subjects' details
  regions=[[0,0,0.5,1],right.png]   where each subject may be: left, top, right, bottom in fractions; a mask; null
  separate_subjects=true    subjects that must not mix: each pixel sees one
  routing_override=map.png  draw with the personalized expert where the map is white; or a number
  routing=false             task=generate without routing maps
  frames=9                  task=morph: pictures, the ends included
  input=photo.png           task=invert: the real picture; input_mask=mask.png is white where it may change
  out=outputs/TASK          where everything goes
  device=cuda dtype=float16

Writes its pictures (settings, seeds and hashes of all files inside), facts.json (the same) and config.yaml into `out`.
Every setting with its meaning: configs/generate.yaml
"""


class Task(NamedTuple):
    """What `task=` names: "package.module:function" of a `Job`, and the settings that no other task reads."""

    function: str
    settings: tuple[str, ...] = ()


TASKS = {
    "generate": Task("moa_train.cli.tasks:generate"),
    "swap": Task("moa_train.cli.tasks:swap"),
    "morph": Task("moa_train.cli.tasks:morph", ("frames",)),
    "compose": Task("moa_train.cli.tasks:compose"),
    "invert": Task("moa_train.cli.tasks:invert", ("input", "input_mask")),
    "routing": Task("moa_train.cli.tasks:routing"),
}


def run(cfg: DictConfig) -> None:
    """Do the task that the configuration names."""
    from omegaconf import OmegaConf

    settings: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    task = chosen_task(settings)

    from moa_train.cli.job import Job

    job = Job(settings)
    module, function = task.function.split(":")
    told = getattr(import_module(module), function)(job)
    job.write_facts()
    OmegaConf.save(cfg, job.out / "config.yaml")
    print(told)


def chosen_task(settings: dict[str, Any]) -> Task:
    """The task, once its settings are known to be its own.

    Raises:
        ValueError: an unknown task, or a setting that another task reads.
    """
    from moa_train.cli.schema import nearest

    name = settings["task"]
    if name not in TASKS:
        raise ValueError(f"there is no task {name}; expected one of {', '.join(TASKS)}{nearest(str(name), TASKS)}")
    for other, task in TASKS.items():
        for key in task.settings:
            if other != name and settings[key] is not None:
                raise ValueError(f"{key} is a setting of task={other}, this is task={name}: leave it out")
    return TASKS[name]


def main() -> None:
    """The command."""
    sys.argv[1:] = prior_paths_as_source(sys.argv[1:], config_dir())
    _main()


_main = command("generate", help=HELP, run="moa_train.cli.generate:run")
