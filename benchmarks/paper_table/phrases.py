"""Writes shards again with only those captions that contain a text; images that have none are left out.

    python -m benchmarks.paper_table.phrases '../shared/data/emoji-fluent/*.tar' runs/paper_table/emoji-phrases ' icon of '

Emoji are captioned by name, by keywords and by a phrase, `a flat icon of french fries`. With phrases alone no caption is
a bare word, as captions of photographs are none (plans/emoji_phrases.yaml).
"""

import argparse
import json
from pathlib import Path

import webdataset

from stair.data.samples import IMAGE_TYPES, captions
from stair.data.tars import expand, stream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="local shard spec")
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", help="what a caption must contain")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for shard in expand(args.shards):
        kept = 0
        with webdataset.TarWriter(str(args.folder / Path(shard).name)) as writer:
            for sample in stream(shard, fail):
                texts = [text for text in captions(sample) if args.text in text]
                if texts:
                    facts = json.loads(sample["json"]) if "json" in sample else {}
                    image = {key: value for key, value in sample.items() if key in IMAGE_TYPES}
                    writer.write({"__key__": sample["__key__"], **image, "json": {**facts, "captions": texts}})
                    kept += 1
        print(f"{Path(shard).name}: {kept} images")


def fail(error: Exception) -> None:
    raise error


if __name__ == "__main__":
    main()
