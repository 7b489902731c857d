"""What travels between ranks: whole, in the smallest form, and the objective on ranks equal to that of one process.

Forked gloo ranks run the product; the oracle is one process with the whole batch, in float64, by other code.
"""

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

from stair.exchange import _GAPS, Gathered, _active_indices, _message, _steps, exchange
from stair.losses import flops, info_nce


def packed(own, payload):
    """An embedding as it travels, of one rank."""
    place, kind = _active_indices(own), _GAPS[payload]
    numbers, gaps = len(place) + 2, len(place) + int(_steps(place, kind)[0].sum()) + 3  # another rank has more
    return Gathered(payload, [_message(own, place, kind, numbers, gaps)], numbers, own.shape, own.dtype)


def embedding(rows, words, active, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(rows, words, generator=g).to(dtype) * (torch.rand(rows, words, generator=g) < active)


@pytest.mark.parametrize("payload", _GAPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("active", [0.0, 1e-4, 0.01, 0.2])
def test_what_was_packed_comes_out_bit_by_bit(payload, dtype, active):
    own = embedding(5, 70_000, active, dtype)  # more words than 16 bits count
    own[1] = 0
    gathered = packed(own, payload)
    assert torch.equal(gathered.block(0), own)
    columns = gathered.columns()
    assert torch.equal(columns, own.ne(0).any(0).nonzero()[:, 0])
    some = torch.cat([columns[::2], torch.tensor([69_999])]).unique()
    assert torch.equal(gathered.block(0, some), own[:, some])


@pytest.mark.parametrize("payload", _GAPS)
@pytest.mark.parametrize("gap", [253, 254, 255, 256, 509, 510, 32766, 32767, 32768, 65534])
def test_gaps_at_the_edge_of_their_type_come_out_right(payload, gap):
    own = torch.zeros(1, 70_000)
    own[0, [0, gap + 1, 69_999]] = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(packed(own, payload).block(0), own)


# ------------------------------------------------------------------ several ranks

WORDS = 1500
#: what has to travel -> share of words that are active; with 16 bits for a gap, one word or two of each row instead
ACTIVE = {"gaps8": 0.05, "gaps16": 0.0, "dense": 0.97}
#: so that logits neither saturate nor vanish
SCALE = {"gaps8": 0.1, "gaps16": 2.0, "dense": 0.01}


class Towers(nn.Module):
    """A layer for each side; which words may be active is given, so that what travels is known."""

    def __init__(self, scale):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, WORDS) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor([scale]))
        self.double()

    def forward(self, rows, on):
        image, text = (torch.log1p(torch.relu(3 + layer(rows))) for layer in self.layers)
        return image * on[:, 0], text * on[:, 1]


def data(payload, pairs=8):
    g = torch.Generator().manual_seed(1)
    on = torch.rand(pairs, 2, WORDS, generator=g) < ACTIVE[payload]
    if payload == "gaps16":
        for pair in range(pairs):
            on[pair, 0, [5 * pair, 900]] = True
            on[pair, 1, 5 * (pair + 1) % 40] = True
    on[3] = False  # a pair that says nothing at all
    return torch.randn(pairs, 4, dtype=torch.float64, generator=g), on.double()


def objective(model, rows, on, cosine, micro):
    if micro:
        pieces = [
            checkpoint(model, *piece, use_reentrant=False)
            for piece in zip(rows.split(micro), on.split(micro), strict=True)
        ]
        image, text = (torch.cat(side) for side in zip(*pieces, strict=True))
    else:
        image, text = model(rows, on)
    return info_nce(image, text, model.scale, cosine).loss + 0.1 * flops(image) + 0.2 * flops(text)


def on_rank(rank, ranks, folder, check, *how):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        torch.save(check(rank, ranks, *how), f"{folder}/{rank}")  # a pipe would block when full
    finally:
        torch.distributed.destroy_process_group()


def run_ranks(ranks, folder, check, *how):
    mp.start_processes(on_rank, (ranks, str(folder), check, *how), nprocs=ranks, start_method="fork")
    return [torch.load(folder / str(rank)) for rank in range(ranks)]


def train_step(rank, ranks, payload, cosine, micro):
    model, (rows, on) = Towers(5.0 if cosine else SCALE[payload]), data(payload)
    own = slice(rank * len(rows) // ranks, (rank + 1) * len(rows) // ranks)
    gathered = exchange(*(side.detach() for side in model(rows[own], on[own])))
    loss = objective(model, rows[own], on[own], cosine, micro)
    loss.backward()
    for p in model.parameters():  # what DDP does
        torch.distributed.all_reduce(p.grad)
        p.grad /= ranks
    return float(loss.detach()), [p.grad for p in model.parameters()], [part.payload for part in gathered]


def one_process(payload, cosine):
    model, (rows, on) = Towers(5.0 if cosine else SCALE[payload]), data(payload)
    image, text = model(rows, on)
    # gradients of rows that say nothing: an epsilon in place of their length would blow them up, and they are masked
    unit = (
        [side / side.norm(dim=1, keepdim=True).clamp(min=1e-300) for side in (image, text)] if cosine else (image, text)
    )
    logits = model.scale * unit[0] @ unit[1].T
    target = torch.arange(len(rows))
    loss = (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2
    loss = loss + 0.1 * image.mean(0).square().sum() + 0.2 * text.mean(0).square().sum()
    loss.backward()
    return float(loss.detach()), [p.grad.nan_to_num() for p in model.parameters()]


@pytest.mark.parametrize("payload", ACTIVE)
@pytest.mark.parametrize(("ranks", "cosine", "micro"), [(2, False, None), (2, True, 2), (4, True, None), (4, False, 1)])
def test_loss_and_gradients_on_ranks_equal_one_process_for_each_payload(payload, ranks, cosine, micro, tmp_path):
    loss, want = one_process(payload, cosine)
    assert max(float(w.abs().max()) for w in want) > 1e-3
    for got_loss, grads, travelled in run_ranks(ranks, tmp_path, train_step, payload, cosine, micro):
        assert travelled == [payload] * 2
        assert got_loss == pytest.approx(loss, rel=1e-12)
        for got, w in zip(grads, want, strict=True):
            torch.testing.assert_close(got, w, atol=1e-10, rtol=0)


def sizes(rank, ranks):
    # one rank is dense, the other one sparse: all have to take the same form
    mixed, *_ = exchange(embedding(4, 3000, 0.01 if rank else 0.99, seed=rank))
    own = embedding(64, 30_522, 0.01, torch.bfloat16, seed=rank)
    sparse, empty = exchange(own, torch.zeros_like(own))
    assert torch.equal(sparse.block(rank), own) and not empty.block(1 - rank).any()
    return mixed.payload, sparse.payload, sparse.bytes_received / 128, empty.bytes_received


def test_one_percent_travels_in_less_than_a_dense_clip_embedding(tmp_path):
    for mixed, payload, size, empty in run_ranks(2, tmp_path, sizes):
        assert (mixed, payload) == ("dense", "gaps8")
        assert size < 512 * 2
        assert empty < 16
