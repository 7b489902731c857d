"""Bytes that a training step gathers a sample and side, exactly, against dense CLIP's 512 numbers in bf16 (1,024 bytes).

python benchmarks/exchange.py                                              random words, active shares of 0.1 to 100 %
python benchmarks/exchange.py --model runs/x/stage3/stair --captions FILE  a model's texts, one caption a line
Two gloo processes exchange what they hold; append `> benchmarks/results/exchange_DATE.md` to keep a record.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ratios import header

from stair.exchange import exchange

CLIP = 512 * 2
SHARES = (0.001, 0.003, 0.005, 0.008, 0.01, 0.02, 0.05, 0.1, 0.3, 0.6, 1.0)


def embeddings(args):
    """Two ranks' rows for each line of the table."""
    if args.model:
        from stair.model import Stair

        captions = Path(args.captions).read_text(encoding="utf-8").splitlines()[: 2 * args.batch]
        if len(captions) < 2 * args.batch:
            raise SystemExit(f"{args.captions} has {len(captions)} captions, wanted {2 * args.batch}")
        return {"texts": Stair.from_pretrained(args.model).encode_text(captions)}
    g = torch.Generator().manual_seed(0)
    shape = 2 * args.batch, args.num_terms
    return {f"{s:.1%}": torch.rand(shape, generator=g) * (torch.rand(shape, generator=g) < s) for s in SHARES}


def on_rank(rank, folder, batch, kind):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, rows in torch.load(f"{folder}/rows").items():
        (gathered,) = exchange(rows[rank * batch : (rank + 1) * batch].to(kind))
        if rank == 0:
            size = gathered.bytes_received / (2 * batch)
            active = float((rows != 0).sum(1).float().mean())
            print(f"| {name} | {active:.1f} | {gathered.payload} | {size:.0f} | {size / CLIP:.2f} |", flush=True)
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, help="pairs of a rank")
    parser.add_argument("--num_terms", type=int, default=30_522)
    parser.add_argument("--model")
    parser.add_argument("--captions")
    args = parser.parse_args()
    print(header("Bytes gathered a sample and side", torch.device("cpu")))
    for kind in (torch.bfloat16, torch.float32):
        print(f"{kind}\n\n| what | terms active | payload | bytes | to dense CLIP |\n|---|---|---|---|---|", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            torch.save(embeddings(args), f"{folder}/rows")
            mp.start_processes(on_rank, (folder, args.batch, kind), nprocs=2, start_method="fork")
        print()


if __name__ == "__main__":
    main()
