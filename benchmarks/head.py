"""The vocabulary head, forward and backward: fused against plain, max-first and compiled, in time and peak memory.

python benchmarks/head.py                      images at 1 % and 100 % active terms; minutes. --batch 16 for a quick look
python benchmarks/head.py --captions 'train-*.tar' --vocabulary vocab.txt      packed against padded, real captions
python benchmarks/head.py --limits             where the forms it chooses between take equal time
Append `> benchmarks/results/head_CHIP_DATE.md` to keep a record. On a GPU: benchmarks/gpu_check.py.
"""

import argparse
import glob
import json
import tarfile

import torch
from ratios import header, in_fresh_process, interleaved, peak_bytes, table

from stair.kernels import backward, fused, packing, reduction, vocabulary_max, vocabulary_max_reference

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def max_first(hidden, mask, weight, bias):
    logits = (hidden @ weight.T).masked_fill(~mask[..., None], float("-inf"))
    return torch.log1p(torch.relu(logits.amax(1) + bias))


def variants(device, compiled):
    forms = {"plain": vocabulary_max_reference, "max first": max_first, "fused": vocabulary_max}
    if compiled:
        forms["compiled max first"] = torch.compile(max_first)
    return forms


def inputs(args, share, mask=None):
    """Random hidden states, and a bias that leaves the given share of terms active."""
    device, g = torch.device(args.device), torch.Generator().manual_seed(0)
    B, T, D, V = args.batch, args.positions, args.width, args.num_terms
    hidden = torch.randn(B, T, D, generator=g).to(device)
    weight = (torch.randn(V, D, generator=g) / D**0.5).to(device)
    mask = torch.ones(B, T, dtype=torch.bool, device=device) if mask is None else mask.to(device)
    best = vocabulary_max(hidden[:4], mask[:4], weight, torch.full((V,), 100.0, device=device)).expm1() - 100
    least = torch.quantile(best.flatten()[:: max(1, best.numel() // 10_000)], 1 - share) if share < 1 else -10.0
    bias = torch.full((V,), -float(least), device=device)
    return [hidden.requires_grad_(), mask, weight.requires_grad_(), bias.requires_grad_()]


def step(form, given, half):
    def run():
        with torch.autocast(given[0].device.type, torch.bfloat16, enabled=half):
            out = form(*given)
        out.float().sum().backward()
        for value in (given[0], given[2], given[3]):
            value.grad = None

    return run


def images(args):
    device = torch.device(args.device)
    forms = variants(device, not args.no_compile)
    if args.peak:
        share, name = args.peak.split(",")
        run = step(forms[name], inputs(args, float(share)), args.half)
        print(json.dumps(peak_bytes(run, device)))
        return
    print(header(f"Vocabulary head, B={args.batch} T={args.positions} D={args.width} V={args.num_terms}", device))
    print("bf16 autocast\n" if args.half else "fp32\n")
    for share in args.active:
        given = inputs(args, share)
        seconds = interleaved({n: step(f, given, args.half) for n, f in forms.items()}, args.rounds, device)
        del given
        peaks = {name: in_fresh_process("--peak", f"{share},{name}") for name in forms}
        print(f"{share:.0%} of terms active\n\n{table(seconds, 'plain', peaks)}")


def lengths(args):
    """Tokens of real captions, [CLS] and [SEP] included, as a mask."""
    from stair.vocabulary import Vocabulary

    captions = []
    for path in sorted(glob.glob(args.captions)):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is not None and member.name.endswith(".txt"):
                    captions += content.read().decode().splitlines()
                elif content is not None and member.name.endswith(".json"):
                    found = json.loads(content.read()).get("captions", [])
                    captions += [found] if isinstance(found, str) else found
        if len(captions) >= args.batch:
            break
    if len(captions) < args.batch:
        raise SystemExit(f"{args.captions} has {len(captions)} captions, wanted {args.batch}")
    _, mask = Vocabulary(args.vocabulary).tokenize(captions[: args.batch], args.positions)
    return torch.nn.functional.pad(mask, (0, args.positions - mask.shape[1]))


def texts(args):
    device, mask = torch.device(args.device), lengths(args)
    print(header(f"Text head, B={args.batch} T={args.positions} D={args.width} V={args.num_terms}", device))
    size_B = mask.sum(1)
    print(f"captions of {int(size_B.min())} to {int(size_B.max())} tokens, mean {float(size_B.float().mean()):.1f}\n")
    forms = {"padded": inputs(args, 0.01), "packed": inputs(args, 0.01, mask)}
    print(
        table(
            interleaved({n: step(vocabulary_max, g, args.half) for n, g in forms.items()}, args.rounds, device),
            "padded",
        )
    )


def limits(args):
    """Prints what `_GATHER_COST` (backward.py) and `_LOOK_UP_BELOW` (reduction.py) stand for on this machine."""
    device = torch.device("cpu")
    print(header("Where the forms of the head take equal time", device))
    print(f"B={args.batch} T={args.positions} D={args.width} V={args.num_terms}\n")
    print("| type | active | sparse / dense backward | cost of a gathered multiply-add | look-up / pass over all |")
    print("|---|---|---|---|---|")
    for name, kind in TYPES.items():
        for share in (0.01, 0.1, 0.5):
            runs, entries, products = limit_runs(args, kind, share)
            took = {n: sorted(values)[len(values) // 2] for n, values in interleaved(runs, args.rounds, device).items()}
            ratio, looked = took["sparse"] / took["dense"], took["look up"] / took["all"]
            print(f"| {name} | {share:.0%} | {ratio:.2f} | {ratio * products / entries:.0f} | {looked:.2f} |")


def limit_runs(args, kind, share):
    hidden, mask, weight, bias = (value.detach() for value in inputs(args, share))
    packed, ranges = packing.by_slot(mask), [(0, args.num_terms)]
    rows = hidden.flatten(0, 1)[packed.source_N].to(kind)
    embedding, slot = fused._Packed.project(hidden.to(kind), mask, weight.to(kind), bias, ranges)
    maxima = backward.Maxima(torch.ones_like(embedding), embedding, slot, packed)
    chunks = list(fused._chunks(ranges, len(rows), fused._CHUNK_NUMBERS))
    first = chunks[0]
    logits = rows @ weight[first].to(kind).T

    def reduce(below):
        reduction._LOOK_UP_BELOW = below
        filled = torch.zeros_like(embedding[:, first]), torch.zeros_like(slot[:, first])
        reduction.slot_by_slot(logits, packed, bias[first], *filled)

    runs = {
        "sparse": lambda: backward.sparse_gradients(maxima, rows, weight),
        "dense": lambda: backward.dense_gradients(maxima, rows, weight, chunks),
        "look up": lambda: reduce(0),
        "all": lambda: reduce(10**9),
    }
    return runs, int(embedding.count_nonzero()), len(rows) * args.num_terms


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {
        "batch": 64,
        "positions": 197,
        "width": 768,
        "num_terms": 30_522,
        "rounds": 5,
        "threads": 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--active", type=float, nargs="+", default=[0.01, 1.0], help="shares of terms that are active")
    parser.add_argument("--half", action="store_true", help="bf16 autocast")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--captions", help="tars with captions (.txt or .json): measure packed against padded")
    parser.add_argument("--vocabulary", default="bert-base-uncased")
    parser.add_argument("--limits", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    limits(args) if args.limits else texts(args) if args.captions else images(args)


if __name__ == "__main__":
    main()
