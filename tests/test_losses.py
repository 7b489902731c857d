"""The objective against slow oracles, on one process and on several gloo ranks."""

import math

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from stair import losses
from stair.exchange import exchange
from stair.losses import caption_loss, flops, info_nce, info_nces, ramp


def info_nce_oracle(image, text, scale):
    logits = scale * image @ text.T
    target = torch.arange(len(image))
    return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2


def test_info_nce_of_a_worked_example():
    # logits [[2, 0], [0, 0]]: rows log(1+e^-2), log 2; columns the same
    image, text = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.eye(2)
    want = (math.log(1 + math.exp(-2)) + math.log(2)) / 2
    assert float(info_nce(image, text, torch.ones(1)).loss) == pytest.approx(want, abs=1e-6)


def test_empty_embeddings_give_log_n():
    assert float(info_nce(torch.zeros(8, 5), torch.zeros(8, 5), torch.ones(1)).loss) == pytest.approx(math.log(8))


def test_info_nce_and_its_gradient_equal_cross_entropy_both_ways():
    torch.manual_seed(0)
    parts = [torch.rand(6, 9, dtype=torch.float64).requires_grad_() for _ in range(2)]
    scale = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    got, want = info_nce(*parts, scale), info_nce_oracle(*parts, scale)
    assert float(got.logit_std) == pytest.approx(float((scale * parts[0] @ parts[1].T).detach().std(correction=0)))
    torch.testing.assert_close(got.loss, want, atol=1e-12, rtol=0)
    for a, b in zip(
        torch.autograd.grad(2 * got.loss, [*parts, scale]), torch.autograd.grad(2 * want, [*parts, scale]), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("active", [1.0, 0.05], ids=["dense", "few columns"])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("frozen", [None, 0])
def test_sparse_and_cosine_equal_the_plain_formula_in_every_entry(active, cosine, frozen):
    g = torch.Generator().manual_seed(3)
    parts = [
        torch.rand(7, 200, dtype=torch.float64, generator=g) * (torch.rand(200, generator=g) < active) for _ in range(2)
    ]
    parts[0][2] = 0  # says nothing
    for at, part in enumerate(parts):
        part.requires_grad_(at != frozen)
    scale = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    compared = [nn.functional.normalize(part, dim=-1) if cosine else part for part in parts]
    got, want = info_nce(*parts, scale, cosine=cosine).loss, info_nce_oracle(*compared, scale)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    moved = [p for p in (*parts, scale) if p.requires_grad]
    mine, theirs = torch.autograd.grad(got, moved), torch.autograd.grad(want, moved)
    if cosine and frozen is None:
        assert (mine[0][2] == 0).all()
        theirs[0][2] = 0  # there `normalize` divides by its epsilon
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_the_spread_is_right_where_it_is_far_below_the_mean():
    torch.manual_seed(0)
    parts = [0.5 + 0.001 * torch.rand(16, 400) for _ in range(2)]
    want = (parts[0].double() @ parts[1].double().T).std(correction=0)
    assert float(info_nce(*parts, torch.ones(1)).logit_std) == pytest.approx(float(want), rel=1e-2)


def test_flops_of_a_worked_example():
    z = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]], requires_grad=True)
    value = flops(z)
    assert value.item() == 2**2 + 0 + 1**2
    value.backward()
    # 2 · mean_v / rows
    assert z.grad.tolist() == [[2.0, 0.0, 1.0], [2.0, 0.0, 1.0]]


def test_under_bf16_autocast_the_loss_is_fp32_of_rounded_embeddings():
    torch.manual_seed(0)
    image, text = torch.rand(4, 300), torch.rand(4, 300)
    with torch.autocast("cpu", torch.bfloat16):
        loss, regulariser = info_nce(image, text, torch.ones(1)).loss, flops(image)
    # only the embeddings are rounded, to what travels between ranks
    rounded = [part.bfloat16().float() for part in (image, text)]
    torch.testing.assert_close(loss, info_nce_oracle(*rounded, 1.0))
    torch.testing.assert_close(regulariser, image.mean(0).square().sum())


@pytest.mark.parametrize(("step", "length", "want"), [(0, 10, 0.0), (5, 10, 0.25), (10, 10, 1), (99, 10, 1), (0, 0, 1)])
def test_ramp_is_quadratic_then_one(step, length, want):
    assert ramp(step, length) == want


def caption_oracle(signed, in_caption):
    """By image: its softmax over terms against its caption's. By term: the softmax over images against its own."""
    loss, counts = 0.0, in_caption.sum(0).tolist()
    logits = torch.stack([torch.stack([z.exp() - 1 if z > 0 else z for z in row]) for row in signed])
    for row, held in zip(logits, in_caption, strict=True):
        rarity = {int(v): math.log(len(signed) / counts[v]) ** 0.75 for v in held.nonzero()}
        if sum(rarity.values()) > 0:
            named = sum(weight * row.softmax(0)[v].log() for v, weight in rarity.items())
            loss = loss - named / sum(rarity.values()) / len(signed)
    for column, held, count in zip(logits.T, in_caption.T, counts, strict=True):
        if count:
            loss = loss - column.softmax(0)[held].log().mean() * count**0.5 / sum(n**0.5 for n in counts)
    return loss


def test_the_caption_loss_and_its_gradient_equal_cross_entropy_by_image_and_by_term():
    g = torch.Generator().manual_seed(0)
    signed = torch.randn(6, 9, dtype=torch.float64, generator=g).requires_grad_()
    in_caption = torch.rand(6, 9, generator=g) < 0.4
    in_caption[:, 0], in_caption[1], in_caption[:, 8] = True, False, False  # in every caption; no caption; in none
    in_caption[1, 0] = True
    got, want = caption_loss(signed, in_caption), caption_oracle(signed, in_caption)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad(loss, signed)[0] for loss in (got, want)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)
    assert gradients[0].abs().max() > 1e-3


def test_unlike_shapes_are_refused():
    with pytest.raises(ValueError, match=r"image \(2, 3\) and text \(3, 3\)"):
        info_nce(torch.zeros(2, 3), torch.zeros(3, 3), torch.ones(1))


# ------------------------------------------------------------------ several ranks


#: a second form of the texts: cut to some of their words
OWN = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 1])


def towers():
    torch.manual_seed(0)
    return nn.ModuleDict({"image": nn.Linear(4, 9), "text": nn.Linear(5, 9)}).double()


def batch(pairs=8):
    g = torch.Generator().manual_seed(1)
    return torch.randn(pairs, 4, dtype=torch.float64, generator=g), torch.randn(
        pairs, 5, dtype=torch.float64, generator=g
    )


def objective(model, images, texts, scale, wrong=(1.0, 1.0)):
    image, text = (torch.log1p(torch.relu(model[k](x))) for k, x in (("image", images), ("text", texts)))
    whole, part = info_nces(image, (text, text * OWN), scale)
    assert whole.pairs == part.pairs
    compared = whole.loss + 0.5 * part.loss
    named = caption_loss(image, text.detach() > 0.7)
    return wrong[0] * compared + wrong[1] * (0.1 * flops(image) + 0.2 * flops(text)) + 0.3 * named


def on_rank(rank, ranks, file, results, wrong, uneven):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    try:
        model, (images, texts) = towers(), batch()
        model.scale = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        n = len(images) // ranks
        part = slice(rank * n, (rank + 1) * n - (1 if uneven and rank else 0))
        loss = objective(model, images[part], texts[part], model.scale, wrong)
        loss.backward()
        for p in model.parameters():  # what DDP does
            torch.distributed.all_reduce(p.grad)
            p.grad /= ranks
        results.put((rank, loss.item(), [p.grad.tolist() for p in model.parameters()]))
    except ValueError as error:
        results.put((rank, str(error), None))
    finally:
        torch.distributed.destroy_process_group()


def run_ranks(ranks, tmp_path, wrong=(1.0, 1.0), uneven=False):
    results = mp.get_context("fork").SimpleQueue()
    mp.start_processes(
        on_rank, (ranks, str(tmp_path / "store"), results, wrong, uneven), nprocs=ranks, start_method="fork"
    )
    return [results.get() for _ in range(ranks)]


def one_process():
    model = towers()
    model.scale = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    image, text = (torch.log1p(torch.relu(model[k](x))) for k, x in zip(("image", "text"), batch(), strict=True))
    # the oracle shares no code with the product
    loss = info_nce_oracle(image, text, model.scale) + 0.5 * info_nce_oracle(image, text * OWN, model.scale)
    loss = loss + 0.1 * image.mean(0).square().sum() + 0.2 * text.mean(0).square().sum()
    loss = loss + 0.3 * caption_oracle(image, text.detach() > 0.7)
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters()]


def worst(grads, want):
    return max(float((torch.tensor(g, dtype=torch.float64) - w).abs().max()) for g, w in zip(grads, want, strict=True))


@pytest.mark.parametrize("ranks", [2, 4])
def test_loss_and_gradients_on_ranks_equal_one_process(ranks, tmp_path):
    loss, want = one_process()
    for _, got_loss, grads in run_ranks(ranks, tmp_path):
        assert got_loss == pytest.approx(loss, abs=1e-12)
        assert worst(grads, want) < 1e-12


@pytest.mark.parametrize("wrong", [(0.5, 1.0), (1.0, 0.5)], ids=["info_nce", "flops"])
def test_a_part_without_the_factor_of_ranks_is_noticed(tmp_path, wrong):
    _, want = one_process()
    # half of a part on 2 ranks: its gradient as it would be had the factor been forgotten
    assert worst(run_ranks(2, tmp_path, wrong)[0][2], want) > 1e-3


def test_uneven_ranks_are_refused_on_every_rank(tmp_path):
    messages = [message for _, message, _ in run_ranks(2, tmp_path, uneven=True)]
    assert all("different numbers of pairs: [4, 3]" in str(m) for m in messages)


def test_images_travel_once_for_all_forms_of_the_texts(monkeypatch):
    sent = []
    monkeypatch.setattr(losses, "exchange", lambda *own: sent.append(own) or exchange(*own))
    image, *texts = torch.rand(3, 4, 6).unbind()
    both = info_nces(image, texts, torch.ones(1))
    assert len(sent) == 1 and [bool((one == image).all()) for one in sent[0]] == [True, False, False]
    for got, text in zip(both, texts, strict=True):
        assert torch.equal(got.loss, info_nce(image, text, torch.ones(1)).loss)


def test_three_numbers_in_bf16_are_one_in_fp32():
    value = torch.randn(1000) * torch.logspace(-20, 20, 1000)
    parts = losses._three_parts(value)
    assert all(part.dtype == torch.bfloat16 for part in parts)
    torch.testing.assert_close(sum(part.double() for part in parts), value.double(), atol=0, rtol=2**-24)
