"""The metrics against slow, obvious oracles, and two ranks against one process."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.retrieval import retrieval_normalized_dcg

from stair.grounding import Expansion, Grounding
from stair.metrics import RetrievalRecall, SparsityStats
from stair.ranking import SparseRows
from tests.support.oracles import KS, oracle


def same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for key in expected:
        assert float(got[key]) == pytest.approx(float(expected[key]), abs=1e-6, nan_ok=True), key


@st.composite
def evaluation_sets(draw):
    """Small whole numbers, so sums are exact and ties are many."""
    width = draw(st.integers(1, 4))
    captions = draw(st.lists(st.integers(0, 3), min_size=1, max_size=7).filter(any))
    row = st.lists(st.integers(-1, 2), min_size=width, max_size=width)
    image = draw(st.lists(row, min_size=len(captions), max_size=len(captions)))
    text = draw(st.lists(row, min_size=sum(captions), max_size=sum(captions)))
    owner = np.repeat(np.arange(len(captions)), captions)
    return np.array(image, np.float32), np.array(text, np.float32), owner, draw(st.integers(1, 4))


@given(evaluation_sets())
@settings(max_examples=150, deadline=None)
def test_retrieval_equals_counting_by_hand_with_several_captions_and_ties(case):
    image, text, owner, batch = case
    metric = RetrievalRecall(KS)
    for start in range(0, len(image), batch):
        ids = np.arange(start, min(start + batch, len(image)))
        mine = np.flatnonzero(np.isin(owner, ids))[::-1].copy()  # captions need not come in the order of the images
        # ids of a set need neither start at 0 nor be in order
        metric.update(
            torch.tensor(image[ids]),
            torch.tensor(text[mine]),
            torch.tensor(100 - 3 * ids),
            torch.tensor(100 - 3 * owner[mine]),
        )
    same(metric.compute(), oracle(image, text, owner))


def test_retrieval_by_hand():
    # scores   caption a(0)  b(0)  c(1)  d(2)
    # image 0:          3     1     2     0    own best 3            -> rank 1
    # image 1:          0     2     2     0    own 2, b ties         -> rank 2
    # image 2:          0     0     0     0    own 0, all three tie  -> rank 4
    image = torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 0]])
    text = torch.tensor([[3.0, 0, 0], [1, 2, 0], [0, 2, 2], [0, 0, 0]])
    metric = RetrievalRecall((1, 2))
    metric.update(image, text, torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1, 2]))
    # text to image: a 3 > 0, 0 -> 1 · b 1 < 2 -> 2 · c 2 ties with image 0 -> 2 · d all tie -> 3
    same(
        metric.compute(),
        {
            "i2t/recall@1": 1 / 3,
            "i2t/recall@2": 2 / 3,
            "i2t/median_rank": 2,
            "t2i/recall@1": 1 / 4,
            "t2i/recall@2": 3 / 4,
            "t2i/median_rank": 2,
            "t2i/mrr": (1 + 1 / 2 + 1 / 2 + 1 / 3) / 4,
            "t2i/ndcg@10": (1 + 2 / math.log2(3) + 1 / 2) / 4,
            "i2t/mrr": (1 + 1 / 2 + 1 / 4) / 3,
            # image 0: a first, c above b: places 1 and 3 of two
            "i2t/ndcg@10": ((1 + 1 / 2) / (1 + 1 / math.log2(3)) + 1 / math.log2(3) + 1 / math.log2(5)) / 3,
        },
    )


def _set(n: int, width: int, share: float, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    captions = torch.randint(1, 4, (n,), generator=g)
    owner = torch.arange(n).repeat_interleave(captions)
    image = torch.rand(n, width, generator=g) * (torch.rand(n, width, generator=g) < share)
    noise = torch.rand(len(owner), width, generator=g) * (torch.rand(len(owner), width, generator=g) < share)
    return image, image[owner] * 0.3 + noise, owner


@pytest.mark.parametrize(("width", "share"), [(512, 1.0), (2000, 0.01)], ids=["dense", "sparse"])
def test_blocks_of_queries_equal_the_full_score_matrix(width, share):
    image, text, owner = _set(300, width, share)  # more than one block of 256 each way
    metric = RetrievalRecall((1, 5, 10))
    metric.update(image, text, torch.arange(300), owner)
    score = image.double() @ text.double().T
    own = torch.arange(300)[:, None] == owner[None, :]
    best_own = score.masked_fill(~own, -torch.inf).amax(1)
    i2t = 1 + ((score >= best_own[:, None]) & ~own).sum(1)
    t2i = 1 + ((score >= score[owner, torch.arange(len(owner))][None, :]) & ~own).sum(0)
    expected = {f"{n}/recall@{k}": np.mean(r.numpy() <= k) for n, r in (("i2t", i2t), ("t2i", t2i)) for k in (1, 5, 10)}
    expected |= {"i2t/median_rank": np.median(i2t), "t2i/median_rank": np.median(t2i)}
    expected |= {"i2t/mrr": (1 / i2t.numpy()).mean(), "t2i/mrr": (1 / t2i.numpy()).mean()}
    # no ties here, so torchmetrics' order is ours
    for way, scores, right in (("i2t", score, own), ("t2i", score.T, own.T)):
        gains = [float(retrieval_normalized_dcg(s, r, top_k=10)) for s, r in zip(scores, right, strict=True)]
        expected[f"{way}/ndcg@10"] = np.mean(gains)
    same(metric.compute(), expected)


def test_equal_rows_tie_whatever_their_place():
    row = torch.rand(1, 300)
    metric = RetrievalRecall((1, 299, 300))
    metric.update(row.expand(300, -1), row.expand(300, -1) * 0.7, torch.arange(300), torch.arange(300))
    figures = metric.compute()
    assert figures["i2t/median_rank"] == figures["t2i/median_rank"] == 300
    assert figures["i2t/recall@299"] == 0


def test_padding_and_repeated_images_change_nothing():
    image, text, owner = _set(12, 30, 0.3)
    plain, padded = RetrievalRecall(KS), RetrievalRecall(KS)
    plain.update(image, text, torch.arange(12), owner)
    first, second = owner < 6, owner >= 6
    loud = torch.full((1, 30), 9.0)
    padded.update(
        torch.cat([loud, image[:6]]),
        torch.cat([loud, text[first]]),
        torch.tensor([-1, *range(6)]),
        torch.cat([torch.tensor([-1]), owner[first]]),
    )
    padded.update(image[6:], text[second], torch.arange(6, 12), owner[second])
    padded.update(image[:6], text[first], torch.arange(6), owner[first])  # a sampler that wraps around
    padded.update(loud, loud, torch.tensor([-1]), torch.tensor([-1]))
    same(padded.compute(), plain.compute())


def test_embeddings_that_are_nan_or_zero_rank_last():
    for value in (float("nan"), 0.0):
        metric = RetrievalRecall((1,))
        metric.update(torch.full((4, 3), value), torch.full((4, 3), value), torch.arange(4), torch.arange(4))
        assert metric.compute()["i2t/median_rank"] == metric.compute()["t2i/median_rank"] == 4


def test_half_precision_is_taken_as_it_is():
    image, text, owner = _set(20, 50, 0.2)
    half, full = RetrievalRecall(KS), RetrievalRecall(KS)
    half.update(image.bfloat16(), text.bfloat16(), torch.arange(20), owner)
    full.update(image.bfloat16().float(), text.bfloat16().float(), torch.arange(20), owner)
    same(half.compute(), full.compute())


def test_an_empty_set_gives_nan_and_reset_starts_again():
    metric = RetrievalRecall((1,))
    metric.update(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([-1]), torch.tensor([-1]))
    assert all(v.isnan() for v in metric.compute().values())
    metric.reset()
    metric.update(torch.ones(1, 3), torch.ones(1, 3), torch.tensor([5]), torch.tensor([5]))
    assert metric.compute()["i2t/recall@1"] == 1


def test_wrong_batches_are_refused_with_the_ids():
    metric = RetrievalRecall()
    with pytest.raises(ValueError, match=r"images \[7\], the batch holds images \[1, 2\]"):
        metric.update(torch.ones(2, 3), torch.ones(1, 3), torch.tensor([1, 2]), torch.tensor([7]))
    with pytest.raises(ValueError, match="exactly once"):
        metric.update(torch.ones(2, 3), torch.ones(1, 3), torch.tensor([7, 7]), torch.tensor([7]))
    with pytest.raises(ValueError, match="3 wide, text embeddings 4"):
        metric.update(torch.ones(1, 3), torch.ones(1, 4), torch.tensor([7]), torch.tensor([7]))
    with pytest.raises(ValueError, match="at least 1"):
        RetrievalRecall((0, 1))


def test_sparsity_by_hand():
    metric = SparsityStats(4)
    image = torch.tensor([[1.0, 0, 2, 0], [3, 0, 0, 0], [9, 9, 9, 9]])
    text = torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0]])
    metric.update(image, text, torch.tensor([0, 1, -1]), torch.tensor([0, 1]))
    same(
        metric.compute(),
        {
            "flops_per_pair": 1 * 0.5,  # word 0: always in images, in half of the texts
            "image/active_terms": 1.5,
            "image/active_terms_p50": 1,
            "image/active_terms_p95": 2,
            "text/active_terms_p50": 1,
            "text/active_terms_p95": 1,
            "image/dead_terms": 2,
            "image/always_on_terms": 1,
            "image/max_share": 1,
            "text/active_terms": 1,
            "text/dead_terms": 2,
            "text/always_on_terms": 0,
            "text/max_share": 0.5,
        },
    )


def test_a_side_without_rows_has_no_figures_rather_than_dead_words():
    metric = SparsityStats(4)
    metric.update(torch.tensor([[1.0, 0, 2, 0]]), torch.zeros(0, 4))
    figures = metric.compute()
    assert {name for name, value in figures.items() if not value.isnan()} == {
        f"image/{name}"
        for name in (
            "active_terms",
            "active_terms_p50",
            "active_terms_p95",
            "dead_terms",
            "always_on_terms",
            "max_share",
        )
    }


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_flops_per_pair_is_the_mean_over_all_pairs(seed):
    image, text, _ = _set(9, 20, 0.3, seed)
    metric = SparsityStats(20)
    for part in (slice(0, 4), slice(4, None)):
        metric.update(image[part], text[part])
    pairs = [(i * t != 0).sum() for i in image for t in text]
    assert float(metric.compute()["flops_per_pair"]) == pytest.approx(np.mean(pairs), rel=1e-5)


def test_grounding_by_hand():
    metric = Grounding(5, k=2)
    image = torch.tensor(
        [
            [0.0, 3, 2, 1, 0],  # top 1, 2; captions hold 2, 4: half, and not the first
            [0.0, 0, 0, 4, 0],  # one active term, held: whole
            [0.0, 0, 0, 0, 0],  # nothing active: 0
            [5.0, 5, 5, 5, 5],  # padding
            [5.0, 5, 5, 5, 5],  # without a caption
        ]
    )
    own = torch.zeros(5, 5, dtype=torch.bool)
    for caption, words in enumerate(([2], [4], [3], [2, 3], [0, 1, 2, 3, 4])):
        own[caption, words] = True
    metric.update(image, own, torch.tensor([7, 8, 9, -1, 6]), torch.tensor([7, 7, 8, 9, -1]))
    # word 2 is in the captions of images 7 and 9, word 3 of 8 and 9, word 4 of 7
    same(metric.compute(), {"grounding@2": 0.5, "grounding@1": 1 / 3, "grounding@2_baseline": 4 / 6})


def test_the_frequent_baseline_is_the_grounding_of_an_image_that_always_says_those_words():
    g = torch.Generator().manual_seed(1)
    own = torch.rand(40, 25, generator=g) < torch.linspace(0.02, 0.6, 25)
    ids = torch.arange(20)
    owner = ids.repeat_interleave(2)
    commonest = torch.stack([own[owner == i].any(0) for i in ids]).sum(0).topk(3).indices
    image = torch.zeros(20, 25)
    image[:, commonest] = torch.tensor([3.0, 2, 1])
    metric = Grounding(25, k=3)
    for part in (slice(0, 7), slice(7, 20)):
        mine = (owner >= ids[part][0]) & (owner <= ids[part][-1])
        metric.update(image[part], own[mine], ids[part], owner[mine])
    figures = metric.compute()
    assert float(figures["grounding@3"]) == pytest.approx(float(figures["grounding@3_baseline"]))
    with pytest.raises(ValueError, match="1 to 25"):
        Grounding(25, k=26)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_percentiles_of_active_terms_are_those_of_the_rows(seed):
    image, text, _ = _set(23, 30, 0.4, seed)
    metric = SparsityStats(30)
    for part in (slice(0, 9), slice(9, None)):
        metric.update(image[part], text[part])
    figures = metric.compute()
    for side, rows in (("image", image), ("text", text)):
        counts = (rows != 0).sum(1).numpy()
        for p in (50, 95):
            assert float(figures[f"{side}/active_terms_p{p}"]) == np.percentile(counts, p, method="inverted_cdf")


def test_expansion_by_hand():
    metric = Expansion(5)
    text = torch.tensor(
        [
            [1.0, 1, 0, 1, 0],  # own 0; added 1 (sister has it), 3 (nobody has it)
            [0.0, 2, 0, 0, 2],  # own 1; added 4, nobody
            [0.0, 0, 3, 0, 3],  # alone at its image: own 2, added 4, cannot be tested
            [9.0, 9, 9, 9, 9],  # padding
        ]
    )
    own = torch.zeros(4, 5, dtype=torch.bool)
    own[[0, 1, 2], [0, 1, 2]] = True
    metric.update(text, own, torch.tensor([7, 8, -1]), torch.tensor([7, 7, 8, -1]))
    # by chance: image 7 holds words 0 and 1, image 8 holds 2; of the added 1, 3, 4 only 1 is held, by one image of two
    same(
        metric.compute(),
        {"added_terms": 4 / 3, "added_share": 4 / 7, "added_confirmed": 1 / 3, "added_confirmed_baseline": 1 / 6},
    )


@given(st.integers(0, 1000), st.integers(0, 12), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_pruned_rows_are_those_of_a_pruned_matrix(seed, k, share):
    image, _, _ = _set(12, 15, 0.5, seed)
    image[3] = 0
    rows = SparseRows.of(image)
    largest = torch.zeros_like(image).scatter(1, image.topk(min(k, 15)).indices, 1) * image
    above = torch.where(image >= share * image.amax(1, keepdim=True), image, 0)
    for got, expected in ((rows.largest(k), largest), (rows.above(share), above)):
        torch.testing.assert_close(got.columns(0, 12, 15).T, expected)
    unit = torch.nn.functional.normalize(image, dim=1)
    torch.testing.assert_close(rows.unit().columns(0, 12, 15).T, unit)
    torch.testing.assert_close(SparseRows.cat([rows, rows]).columns(12, 24, 15).T, image)


def _updates(parts: list[list[int]]):
    """The evaluation set cut into updates, given as lists of image ids; -1 is padding."""
    image, text, owner = _set(10, 40, 0.3)
    for ids in parts:
        mine = torch.cat([torch.nonzero(owner == i).flatten() for i in ids if i >= 0])
        rows = torch.tensor(ids)
        yield image[rows.clamp(min=0)], text[mine], rows, owner[mine]


def _measure(parts: list[list[int]]) -> dict[str, torch.Tensor]:
    recall, stats, grounding, expansion = RetrievalRecall(KS), SparsityStats(40), Grounding(40, 3), Expansion(40)
    for image, text, ids, owner in _updates(parts):
        recall.update(image, text, ids, owner)
        stats.update(image, text, ids, owner)
        grounding.update(image, text > 0.5, ids, owner)
        expansion.update(text, text > 0.5, ids, owner)
    return {**recall.compute(), **stats.compute(), **grounding.compute(), **expansion.compute()}


RANKS = {
    "unequal": [[[0, 1, 2], [3, 4], [5, 6, 7]], [[8, 9]]],
    "one_without_rows": [[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], []],
    "padded": [[[0, 1, 2, 3, 4, 5]], [[6, 7, 8, 9, -1, -1]]],
}


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save({name: _measure(parts[rank]) for name, parts in RANKS.items()}, f"{folder}/{rank}.pt")
    # repeated images are known to the retrieval metric only
    recall = RetrievalRecall(KS)
    for update in _updates([[0, 1, 2, 3, 4, 5]] if rank == 0 else [[4, 5, 6, 7], [8, 9]]):
        recall.update(*update)
    torch.save(recall.compute(), f"{folder}/repeated{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_with_unequal_or_no_rows_equal_one_process(tmp_path: Path):
    mp.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    expected = _measure([list(range(10))])
    for rank in (0, 1):
        for got in torch.load(tmp_path / f"{rank}.pt").values():
            same(got, expected)
        repeated = torch.load(tmp_path / f"repeated{rank}.pt")
        same(repeated, {key: expected[key] for key in repeated})
