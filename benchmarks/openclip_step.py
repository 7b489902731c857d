"""Pairs a second of a training step: STAIR against open_clip with its own towers of the same size. Needs `open_clip_torch`.

python benchmarks/openclip_step.py --device cuda --batch 256 --half
ViT-B/16 at 224 px and a text transformer of 12 layers of width 768 on both sides, both from scratch, same pixels, same
clipping and optimiser; open_clip pads texts to 77 tokens, as it always does. STAIR has 1 % of its terms active.
"""

import argparse
import statistics

import torch
from ratios import header, interleaved
from step import activate, batch, models, step, training

try:
    import open_clip
except ModuleNotFoundError:
    raise SystemExit("this benchmark needs open_clip: python -m pip install open_clip_torch") from None

VISION = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12}


def open_clip_step(args, pixels):
    model = open_clip.model.CLIP(embed_dim=512, vision_cfg=VISION, text_cfg=TEXT).to(pixels.device).train()
    loss_of = open_clip.loss.ClipLoss()
    ids = torch.randint(1, TEXT["vocab_size"] - 1, (len(pixels), 77), device=pixels.device)
    ids[:, args.lengths[1] :] = 0
    ids[:, args.lengths[1]] = TEXT["vocab_size"] - 1  # where it pools
    return model, training(model, lambda: loss_of(*model(pixels.float() / 255, ids)[:3]), pixels.device, args.half)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"batch": 8, "rounds": 5, "threads": 1, "num_terms": 30_522}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lengths", type=int, nargs=2, default=(8, 37), help="shortest and longest caption, in tokens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--half", action="store_true", help="bf16 autocast")
    args = parser.parse_args()
    args.towers = "base"
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    stair, _ = models(args, device)
    parts = batch(args, stair, device)
    activate(stair, parts, 0.01)
    print(header(f"Pairs a second, base towers, B={args.batch}, {'bf16' if args.half else 'fp32'}", device))
    print(f"open_clip {open_clip.__version__}\n")
    runs = {"STAIR": step(stair, parts, True, args.half), "open_clip": open_clip_step(args, parts[0])[1]}
    print("| | pairs a second, median (range) |\n|---|---|")
    for name, values in interleaved(runs, args.rounds, device).items():
        rate = sorted(args.batch / value for value in values)
        print(f"| {name} | {statistics.median(rate):.2f} ({rate[0]:.2f}–{rate[-1]:.2f}) |")


if __name__ == "__main__":
    main()
