"""Writes shards again with only those captions that contain a text; images that have none are left out.

    python -m benchmarks.paper_table.phrases '../shared/data/emoji-fluent/*.tar' runs/paper_table/emoji-phrases ' icon of '

Emoji are captioned by name, by keywords and by a phrase, `a flat icon of french fries`. With phrases alone no caption is
a bare word, as captions of photographs are none (plans/emoji_phrases.yaml).
"""

import argparse
from pathlib import Path

import webdataset

from stair.data.samples import IMAGE_TYPES, captions, json_fields
from stair.data.tars import expand, read_samples


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
            for sample in read_samples(shard):
                texts = [text for text in captions(sample.members) if args.text in text]
                if texts:
                    facts = json_fields(sample.members)
                    image = {kind: data for kind, data in sample.members.items() if kind in IMAGE_TYPES}
                    writer.write({"__key__": sample.key, **image, "json": {**facts, "captions": texts}})
                    kept += 1
        print(f"{Path(shard).name}: {kept} images")


if __name__ == "__main__":
    main()
