"""What a step costs on R devices: memory by part, bytes between ranks, time. A model, with its bytes held against reality.

    python benchmarks/scaling.py --pairs 16384 --ranks 128 --gigabytes-per-second 50
    python benchmarks/scaling.py --check 2          # gloo processes on this machine: bytes of the formulae are exact

Three ways to compare all images with all texts: `dense`, every rank receives V numbers a sample; `entries`, only numbers
that are not zero travel (what stair/exchange.py does, and what is trained with); `columns`, every rank holds a slice of the
vocabulary for all samples and the logits are summed over ranks. Bytes are those a rank receives in a step, its own among
them.
"""

import argparse
import math
import os
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from stair.exchange import exchange
from stair.losses import flops, info_nce

_FP32, _BF16 = 4, 2
_INPUT_BYTES = 34  # of activations a token and unit of width in a block, as kept in bf16 without recomputing


@dataclass
class Tower:
    """A transformer: positions T, width D, blocks, parameters outside of blocks."""

    positions: int
    width: int
    blocks: int
    other: int

    @property
    def parameters(self) -> int:
        """Parameters of the blocks (12 D² each) and outside."""
        return 12 * self.width**2 * self.blocks + self.other

    def flops(self, vocabulary: int) -> float:
        """Multiply-adds times 2 of a sample forward: blocks, attention, head over all terms."""
        T, D = self.positions, self.width
        return T * (24 * D**2 * self.blocks + 4 * T * D * self.blocks + 2 * D**2 + 2 * D * vocabulary)

    def activations(self, micro: int, recompute: bool) -> float:
        """Bytes kept of a micro-batch: all that backward reads, or the input of each block and all of one."""
        whole = _INPUT_BYTES * self.positions * self.width * micro
        inputs = _BF16 * self.positions * self.width * micro
        return self.blocks * inputs + whole if recompute else self.blocks * whole


def towers(vocabulary: int) -> dict[str, tuple[Tower, Tower]]:
    """Image and text towers by name: the paper's, a larger and a smaller pair."""

    def text(width: int, blocks: int) -> Tower:
        return Tower(77, width, blocks, (vocabulary + 514) * width + width**2)

    def image(positions: int, width: int, blocks: int) -> Tower:
        return Tower(positions, width, blocks, (768 + positions) * width + vocabulary * width + width**2)

    return {
        "base": (image(196, 768, 12), text(768, 12)),
        "large": (image(256, 1024, 24), text(1024, 24)),
        "small": (image(196, 384, 12), text(384, 12)),
    }


@dataclass
class Plan:
    """A training step.

    Attributes:
        pairs: G, of all ranks.
        ranks: R.
        micro: pairs encoded at a time; B for all.
        vocabulary: V.
        active: mean non-zero numbers of an embedding.
        spread: most non-zeros of a rank over their mean: all messages are as long as the longest.
        sharded: parameters and optimiser over ranks (FSDP2).
        recompute: activations are computed again backwards.
        forms: of a text that are compared: 2 in the stages' own recipe, 1 in the paper's.
    """

    pairs: int
    ranks: int
    micro: int
    vocabulary: int
    active: float
    spread: float
    sharded: bool
    recompute: bool
    forms: int

    @property
    def own(self) -> int:
        """B, pairs of a rank."""
        return self.pairs // self.ranks

    def received(self, width: int = _BF16) -> dict[str, float]:
        """Bytes of embeddings, of their gradients and of logits that a rank receives, by way; `width` of a number."""
        G, V = self.pairs, self.vocabulary
        slices = 2 * self.own * math.ceil(V / self.ranks) * self.ranks * width
        ways = {
            "dense": 2 * G * V * width,
            # a number and a gap of one byte each
            "entries": 2 * G * self.active * self.spread * (width + 1),
            # slices there and their gradients back; logits reduced, and their gradients gathered
            "columns": 2 * slices + 2 * G**2 * _FP32,
        }
        sums = 2 * G * _FP32 + 2 * V * _FP32  # log-sum-exps; FLOPs of both sides
        return {way: amount + sums for way, amount in ways.items()}

    def memory(self, image: Tower, text: Tower) -> dict[str, float]:
        """Bytes on a device, by part."""
        parameters = image.parameters + text.parameters
        share = 1 / self.ranks if self.sharded else 1
        B, G, V = self.own, self.pairs, self.vocabulary
        largest = 12 * max(image.width, text.width) ** 2
        matrices = V * (image.width + text.width)
        return {
            "parameters (fp32)": _FP32 * parameters * share,
            "gradients (fp32)": _FP32 * parameters * share,
            "optimiser (AdamW)": 2 * _FP32 * parameters * share,
            "gathered units": (2 * _BF16 * largest + _FP32 * matrices) if self.sharded else 0,
            "activations": max(t.activations(min(self.micro, B), self.recompute) for t in (image, text))
            if self.micro < B
            else sum(t.activations(B, self.recompute) for t in (image, text)),
            "embeddings and gradients": 2 * B * V * (2 * _FP32 + 1),
            "received entries": 2 * G * self.active * self.spread * (_BF16 + 1),
            "the same while all terms are active": 2 * G * V * _BF16,
            "logits": 2 * 3 * B * G * _FP32,
            "one peer, dense": B * V * _FP32,
        }

    def seconds(self, image: Tower, text: Tower, flops: float, loss_flops: float, bandwidth: float) -> dict[str, float]:
        """Seconds by part, nothing overlapped: an upper bound for given speeds; of the loss, that of fp32 arithmetic."""
        B, G, V = self.own, self.pairs, self.vocabulary
        # forward 1, backward 2; a micro-batch or a recomputed block runs forward once more, both together twice
        passes = 3 + (self.micro < B) + self.recompute
        work = B * (image.flops(V) + text.flops(V)) * passes
        similarity = self.forms * 2 * 4 * B * G * V
        moved = 2 * _FP32 * (image.parameters + text.parameters) * (1 - 1 / self.ranks)
        received = self.received()
        return {
            "towers and heads": work / flops,
            "similarity": similarity / loss_flops,
            "gradients between ranks": moved / bandwidth,
            **{f"embeddings, {way}": amount / bandwidth for way, amount in received.items()},
        }


def show(title: str, values: dict[str, float], unit: float, name: str) -> None:
    """Prints a table as Markdown."""
    print(f"\n| {title} | {name} |\n|---|---:|")
    for key, value in values.items():
        print(f"| {key} | {value / unit:,.3g} |")


# ------------------------------------------------------------------ reality


class Counter:
    """Counts the bytes that collectives hand to this rank, by wrapping those the project calls."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {"all_gather": 0, "all_reduce": 0}
        gather, reduce = dist.all_gather, dist.all_reduce

        def all_gather(parts: list[torch.Tensor], own: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.bytes["all_gather"] += sum(part.numel() * part.element_size() for part in parts)
            return gather(parts, own, *args, **kwargs)

        def all_reduce(value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.bytes["all_reduce"] += value.numel() * value.element_size()
            return reduce(value, *args, **kwargs)

        dist.all_gather, dist.all_reduce = all_gather, all_reduce


def embeddings(rank: int, pairs: int, vocabulary: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sides of random numbers of which a share is not zero."""
    generator = torch.Generator().manual_seed(rank)
    sides = torch.rand(2, pairs, vocabulary, generator=generator)
    on = torch.rand(2, pairs, vocabulary, generator=generator) < share
    image, text = (sides * on).bfloat16().float()
    return image, text


def by_columns(image_BV: torch.Tensor, text_BV: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Logits of this rank's images with all texts by slices of the vocabulary; and the bytes of that, backward included."""
    R, (B, V) = dist.get_world_size(), image_BV.shape
    received, slices = 0, []
    for side_BV in (image_BV, text_BV):
        padded = torch.nn.functional.pad(side_BV, (0, -V % R)).view(B, R, -1).transpose(0, 1).contiguous()
        mine = torch.empty_like(padded)
        dist.all_to_all_single(mine, padded)
        slices.append(mine.flatten(0, 1))  # all pairs, this rank's words
        received += 2 * mine.numel() * _FP32  # and the gradient back
    partial_GG = slices[0] @ slices[1].T
    logits_BG = torch.empty(B, R * B)
    dist.reduce_scatter(logits_BG, list(partial_GG.contiguous().split(B)))
    return logits_BG, received + 2 * partial_GG.numel() * _FP32


def longest(ranks: int, pairs: int, vocabulary: int, share: float) -> list[int]:
    """Bytes of each side's message, from the numbers themselves: the slow way, for all ranks at once."""
    sizes = []
    for side in range(2):
        counts, bytes8, bytes16 = [], [], []
        for rank in range(ranks):
            flat = embeddings(rank, pairs, vocabulary, share)[side].flatten().tolist()
            places = [place for place, number in enumerate(flat) if number]
            gaps = [b - a - 1 for a, b in zip([-1, *places], places, strict=False)]
            counts.append(len(places))
            bytes8.append(sum(1 + gap // 255 for gap in gaps))
            bytes16.append(2 * sum(1 + gap // 32767 for gap in gaps))
        numbers = _FP32 * (max(counts) + 1)
        sparse = min(numbers + max(bytes8) + 1, numbers + max(bytes16) + 2)
        dense = _FP32 * pairs * vocabulary
        sizes.append(dense if max(counts) * (1 + _FP32) >= pairs * vocabulary * _FP32 else min(sparse, dense))
    return sizes


def measure(rank: int, ranks: int, port: int, pairs: int, vocabulary: int, share: float, results: Any) -> None:
    """One rank of the check: what a step's loss receives."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    image, text = (side.requires_grad_() for side in embeddings(rank, pairs, vocabulary, share))
    gathered = [one.bytes_received for one in exchange(image.detach(), text.detach())]
    counter = Counter()
    info_nce(image, text, torch.ones(1)).loss.backward()
    of_loss = dict(counter.bytes)
    flops(image), flops(text)
    of_flops = counter.bytes["all_reduce"] - of_loss["all_reduce"]
    logits_BG, of_columns = by_columns(image.detach(), text.detach())
    everyone = torch.cat([embeddings(peer, pairs, vocabulary, share)[1] for peer in range(ranks)])
    torch.testing.assert_close(logits_BG, image.detach() @ everyone.T)
    results.put((gathered, of_loss, of_flops, of_columns))
    dist.destroy_process_group()


def check(ranks: int, pairs: int, vocabulary: int, share: float) -> bool:
    """Runs the loss on local processes and compares what they received with the formulae, byte by byte."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    results = mp.get_context("fork").SimpleQueue()
    arguments = (ranks, port, pairs, vocabulary, share, results)
    mp.start_processes(measure, arguments, nprocs=ranks, start_method="fork")
    gathered, of_loss, of_flops, of_columns = results.get()
    messages = [ranks * size for size in longest(ranks, pairs, vocabulary, share)]
    sums = 2 * ranks * pairs * _FP32 + ranks * 7 * 8  # log-sum-exps, and the table of lengths
    expected = {
        "embeddings": (sum(messages), sum(gathered)),
        "all gathers of the loss": (sum(messages) + sums, of_loss["all_gather"]),
        "FLOPs of both sides": (2 * vocabulary * _FP32, of_flops),
    }
    plan = Plan(
        ranks * pairs, ranks, pairs, vocabulary, share * vocabulary, 1.0, sharded=False, recompute=False, forms=1
    )
    exact = {way: amount - 2 * (ranks * pairs + vocabulary) * _FP32 for way, amount in plan.received(_FP32).items()}
    expected["by columns"] = (round(exact["columns"]), of_columns)
    if share > 0.5:
        expected["dense"] = (round(exact["dense"]), sum(gathered))
    else:
        # gaps beyond a byte, and the longest message of all, are what --spread stands for
        print(
            f"entries as the plan has them, without --spread: {exact['entries'] / sum(gathered):.2f} of what travelled"
        )
    for name, (model, measured) in expected.items():
        print(f"{ranks} ranks, {share:.1%} active, {name}: formula {model:,}, measured {measured:,} bytes")
    return all(model == measured for model, measured in expected.values())


def main(args: list[str] | None = None) -> None:
    """Prints the plan, or checks the formulae."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towers", choices=("small", "base", "large"), default="base")
    parser.add_argument("--pairs", type=int, default=16384, help="of all ranks")
    parser.add_argument("--ranks", type=int, default=128)
    parser.add_argument("--micro", type=int, default=0, help="pairs encoded at a time; 0 for all of a rank's")
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--active", type=float, default=300, help="mean non-zero numbers of an embedding")
    parser.add_argument("--spread", type=float, default=1.1, help="most of a rank over the mean")
    parser.add_argument("--strategy", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--forms", type=int, default=2, help="of a text that are compared: 1 in the paper's recipe")
    parser.add_argument("--teraflops", type=float, default=400, help="reached on a device by the towers")
    parser.add_argument("--loss-teraflops", type=float, default=50, help="by the loss, whose products are of fp32")
    parser.add_argument("--gigabytes-per-second", type=float, default=50, help="reached between ranks, for each rank")
    parser.add_argument("--check", type=int, default=0, metavar="R", help="compare with R processes on this machine")
    given = parser.parse_args(args)
    if given.check:
        if not all(check(given.check, 8, 3000, share) for share in (0.001, 0.01, 0.1, 0.9)):
            raise SystemExit("the formulae are wrong")
        return
    if given.pairs % given.ranks:
        raise SystemExit(f"--pairs {given.pairs} must be a multiple of --ranks {given.ranks}")
    micro = given.micro or given.pairs // given.ranks
    plan = Plan(
        given.pairs, given.ranks, micro, given.vocabulary, given.active, given.spread,
        given.strategy == "fsdp2", given.recompute, given.forms,
    )  # fmt: skip
    pair = towers(given.vocabulary)[given.towers]
    print(f"{given.towers}, {given.pairs} pairs over {given.ranks} ranks ({plan.own} each), {given.strategy}: modelled")
    memory = plan.memory(*pair)
    fresh = memory.pop("the same while all terms are active")
    total = sum(memory.values())
    at_start = total - memory["received entries"] + fresh
    show("memory of a device", {**memory, "sum": total, "sum while all terms are active": at_start}, 2**30, "GiB")
    show("received in a step by the loss", plan.received(), 1e6, "MB")
    speeds = given.teraflops * 1e12, given.loss_teraflops * 1e12, given.gigabytes_per_second * 1e9
    show("a step", plan.seconds(*pair, *speeds), 1e-3, "ms")


if __name__ == "__main__":
    main()
