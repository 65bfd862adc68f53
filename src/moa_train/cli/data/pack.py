"""`moa-data pack`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moa_train.cli.command import command
from moa_train.cli.data.common import pack, plain

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = """\
Make shards of what your own Python function gives.

  moa-data pack source=my_source:samples out=data/mine
  moa-data pack source=my.package.module:samples out=data/mine splits=[train,validation] args={folder: photos}

  source=MODULE:FUNCTION   the function; its module is looked for in the current folder, too
  out=FOLDER            gets a subfolder a split
  splits=[train]        the function is called once for each, with split=NAME if it has such a parameter
  args=null             further arguments of the function, {name: value}
  no_noun=append        a caption that does not name a subject gets ", with a NOUN" at its end; keep: that subject is
                        not used, the sample is; leave_out: the sample is left out
  workers=0             processes that make samples, if the function gives a source

The function gives mappings of image, caption, masks and nouns, one after another (a generator); or a source: something
with len() and samples by number, which workers share and which goes on after an interruption. data/README.md has an
example. What cannot be used is left out, counted, and listed in OUT/SPLIT/report.json.
Every setting with its meaning: configs/data_pack.yaml
"""


def run(cfg: DictConfig) -> None:
    """Pack every split."""
    from moa_train.data.packing import Source
    from moa_train.data.sources.own import Checked, call, load_function, spooled

    settings = plain(cfg)
    function = load_function(settings["source"])
    config = {name: settings[name] for name in ("source", "args", "no_noun")}
    for split in settings["splits"]:
        samples = call(function, split, settings["args"] or {})
        if isinstance(samples, Source):
            pack(Checked(samples, settings["no_noun"]), split, settings, config)
            continue
        with spooled(samples, settings["out"], settings["image_format"], settings["no_noun"]) as source:
            pack(source, split, {**settings, "workers": 0}, config)


main = command("data_pack", help=HELP, run="moa_train.cli.data.pack:run", name="moa-data pack")
