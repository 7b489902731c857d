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


def tiny_config(vocab_file, **changes):
    """A model of two small towers from scratch."""
    from stair.encoders import ImageTower, TextTower
    from stair.model import StairConfig

    image = ImageTower(
        "vit_tiny_patch16_224", False, 32, options={"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}
    )
    text = TextTower("bert", False, 12, options=TEXT_OPTIONS)
    return StairConfig(str(vocab_file), image, text, **changes)
