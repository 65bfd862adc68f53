"""`moa-data`: makes, draws and checks shards. One module a command."""

from moa_train.cli.command import command_group
from moa_train.cli.data import fastcomposer, index, latents, pack, photos, show, stats, subjects, toy, validate

HELP = """\
Make and check the data that moa-train reads: shards of pictures, masks and captions.

  moa-data toy                       draw the toy world: needs nothing, takes about a minute
  moa-data photos FOLDER out=OUT     your own photos: finds the people in each, writes shards
  moa-data fastcomposer TAR out=OUT  FastComposer's preprocessing of FFHQ, which the paper trained on
  moa-data pack source=M:F out=OUT   what your own Python function gives
  moa-data latents DIR out=OUT ...   encode the pictures once, for faster training
  moa-data show DIR out=sheet.png    look at what is in the shards of a split
  moa-data subjects DIR out=people   photos of the subjects in them, for moa-generate
  moa-data validate DIR              find everything that is wrong with them; repair=OUT writes a clean copy
  moa-data index DIR                 make the index of shards that other tools wrote
  moa-data stats DIR                 count captions, nouns, subject sizes, subjects per picture

`moa-data COMMAND --help` says more. A data set is a folder with a subfolder a split (OUT/train, OUT/validation). Each
holds WebDataset tars (KEY.jpg, KEY.seg.png, KEY.json), which `tar tf` and webdataset read, and an index. To train:

  moa-train data.train=OUT/train data.validation=OUT/validation
"""

main = command_group(
    "moa-data",
    help=HELP,
    commands={
        "toy": toy.main,
        "photos": photos.main,
        "fastcomposer": fastcomposer.main,
        "pack": pack.main,
        "latents": latents.main,
        "show": show.main,
        "subjects": subjects.main,
        "validate": validate.main,
        "index": index.main,
        "stats": stats.main,
    },
)
