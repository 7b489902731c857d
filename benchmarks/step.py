"""A whole training step of STAIR against one of dense CLIP: same towers, batch, loss over pairs, clipping and optimiser.

python benchmarks/step.py                          ViT-B/16 and BERT-base from scratch, B=8, 1 % and 100 % active terms
python benchmarks/step.py --towers small --batch 256 --half      the towers of configs/scratch
python benchmarks/step.py --towers demo --batch 128 --num_terms 244 --plain  make demo's, and with a plain head
Pixels are random, captions have the lengths of --lengths. Append `> benchmarks/results/step_CHIP_DATE.md` to keep a record.
"""

import argparse
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from ratios import header, interleaved, table

from lightning_modules.optimizer import Optimizer
from stair.clip import ClipConfig, DenseClip
from stair.encoders import ImageTower, TextTower
from stair.kernels import vocabulary_max_reference
from stair.losses import flops, info_nce
from stair.model import Stair, StairConfig

SMALL_IMAGE = {"patch_size": 16, "embed_dim": 192, "depth": 4, "num_heads": 3}
DEMO_IMAGE = {"patch_size": 8, "embed_dim": 128, "depth": 3, "num_heads": 4}
SMALL_TEXT = {
    "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 512,
    "max_position_embeddings": 32,
}  # fmt: skip
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def towers(name):
    if name != "base":
        options = SMALL_IMAGE if name == "small" else DEMO_IMAGE
        image = ImageTower("vit_tiny_patch16_224", pretrained=False, image_size=64, options=options)
        return image, TextTower("bert", pretrained=False, max_tokens=32, options=SMALL_TEXT)
    return ImageTower(pretrained=False), TextTower("bert", pretrained=False)


def models(args, device):
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocab.txt"
        vocabulary.write_text(
            "\n".join([*SPECIAL, *(f"word{at}" for at in range(args.num_terms - len(SPECIAL)))]) + "\n"
        )
        torch.manual_seed(0)
        image, text = towers(args.towers)
        stair = Stair(StairConfig(str(vocabulary), image, text)).to(device).train()
        clip = DenseClip(ClipConfig(str(vocabulary), image, text)).to(device).train()
    return stair, clip


def batch(args, stair, device):
    size, longest = stair.config.image.image_size, stair.config.text.max_tokens
    length_B = torch.randint(args.lengths[0], min(args.lengths[1], longest) + 1, (args.batch,))
    T = int(length_B.max())
    pixels = torch.randint(0, 256, (args.batch, 3, size, size), dtype=torch.uint8)
    ids, mask = torch.randint(len(SPECIAL), args.num_terms, (args.batch, T)), torch.arange(T) < length_B[:, None]
    return pixels.to(device), (ids * mask).to(device), mask.to(device)


@torch.no_grad()
def activate(stair, parts, share):
    """Shifts the biases so that the given share of terms is active on each side."""
    for head, side in ((stair.image_head, "image_BV"), (stair.text_head, "text_CV")):
        head.bias.fill_(50.0)
        best = stair(*parts)[side].expm1()
        reached = best[best > 0]
        head.bias.fill_(
            50.0 - float(reached[torch.randint(len(reached), (10_000,))].quantile(1 - share)) if share < 1 else 10.0
        )


def step(model, parts, sparse, half, mark=lambda part: None):
    """A step; `mark` is called with the name of each part when it ends."""

    def loss():
        out = model(*parts)
        mark("towers and heads")
        contrastive = info_nce(out["image_BV"], out["text_CV"], model.scale, cosine=True).loss
        return contrastive + 1e-3 * (flops(out["image_BV"]) + flops(out["text_CV"])) if sparse else contrastive

    return training(model, loss, parts[0].device, half, mark)


def training(model, loss_of, device, half, mark=lambda part: None):
    """A step of training, to be run again and again: forward, backward, clipping, optimiser at a rate of next to 0."""
    optimizer = Optimizer(lr=1e-12).build(model)

    def run():
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = loss_of()
        mark("loss")
        loss.backward()
        mark("backward")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        mark("clipping")
        optimizer.step()
        optimizer.zero_grad()
        mark("optimiser")

    return run


def with_plain_head(run):
    """The same step by the formula word for word, whose logits of all positions are kept for the backward pass."""

    def plain(hidden, mask, weight, bias, active):
        return vocabulary_max_reference(hidden, mask, weight, bias)

    def patched():
        with patch("stair.head.vocabulary_max", plain):
            run()

    return patched


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"batch": 8, "num_terms": 30_522, "rounds": 5, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--towers", choices=["base", "small", "demo"], default="base")
    parser.add_argument("--lengths", type=int, nargs=2, default=(8, 37), help="shortest and longest caption, in tokens")
    parser.add_argument("--active", type=float, nargs="+", default=[0.01, 1.0])
    parser.add_argument("--plain", action="store_true", help="STAIR with the textbook's head as well")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--half", action="store_true", help="bf16 autocast")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    stair, clip = models(args, device)
    parts = batch(args, stair, device)
    print(header(f"Training step, {args.towers} towers, B={args.batch}, {'bf16' if args.half else 'fp32'}", device))
    for share in args.active:
        activate(stair, parts, share)
        with torch.no_grad():
            active = {side: int((out > 0).sum(1).float().mean()) for side, out in stair(*parts).items()}
        runs = {"dense CLIP": step(clip, parts, False, args.half), "STAIR": step(stair, parts, True, args.half)}
        if args.plain:
            runs["STAIR, plain head"] = with_plain_head(runs["STAIR"])
        seconds = interleaved(runs, args.rounds, device)
        print(f"{share:.0%} asked for; active terms {active}\n\n{table(seconds, 'dense CLIP')}")


if __name__ == "__main__":
    main()
