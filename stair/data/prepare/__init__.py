"""`stair prepare`: makes shards of images and captions. Each source is a subcommand."""

from stair.data.prepare.emoji import emoji
from stair.data.prepare.img2dataset import cc
from stair.data.prepare.sources import classes, datasets, folder, karpathy

SOURCES = {
    "folder": folder,
    "coco": karpathy,
    "flickr": karpathy,
    "cc": cc,
    "datasets": datasets,
    "classes": classes,
    "emoji": emoji,
}
