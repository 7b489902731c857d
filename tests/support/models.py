"""A small vocabulary and small models."""

from pathlib import Path

WORDS = (
    "a an the of on two red blue green round dog cat bird runs sleeps ##s ##ning ball house tree sea "
    "small big photo . ,"
).split()

TEXT_OPTIONS = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}


def write_vocabulary(path: Path, unused: int = 3) -> Path:
    """A BERT-shaped vocab.txt of some 35 pieces, `[unusedN]` included as in the published one."""
    special = ["[PAD]", *(f"[unused{i}]" for i in range(unused)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    path.write_text("\n".join([*special, *WORDS]) + "\n")
    return path


# of one each: tokens, a feature map with channels first, one with channels last; all with 4 x 4 cells at 32 px
IMAGE_TOWERS = {
    "vit": ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}),
    "cnn": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 24], "stem_width": 8, "output_stride": 8}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2], "patch_size": 4, "window_size": 4},
    ),
}


def tiny_config(vocab_file, image="vit", **changes):
    """A model of two small towers from scratch."""
    from stair.encoders import ImageTower, TextTower
    from stair.model import StairConfig

    name, options = IMAGE_TOWERS[image]
    text = TextTower("bert", False, 12, options=dict(TEXT_OPTIONS))
    return StairConfig(str(vocab_file), ImageTower(name, False, 32, options=dict(options)), text, **changes)
