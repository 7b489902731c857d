"""Baselines of the benchmark with real encoders."""

import math

import scipy.optimize
import torch

from benchmarks.real_encoders.baselines import BM25, Autoencoder, Splice, late_loss, max_sim
from stair.regularisers import within_budget


def test_max_sim_is_the_sum_over_tokens_of_the_best_position():
    torch.manual_seed(0)
    image_NPE, text_CTE = torch.randn(5, 4, 3), torch.randn(6, 7, 3)
    text_CTE[2, 4:] = 0  # padding adds nothing
    for n, image in enumerate(image_NPE):
        for c, text in enumerate(text_CTE):
            expected = sum(max(float(position @ token) for position in image) for token in text)
            assert math.isclose(float(max_sim(image_NPE, text_CTE)[n, c]), expected, abs_tol=1e-5)


def test_the_loss_of_late_interaction_is_cross_entropy_of_pairs_in_both_directions():
    torch.manual_seed(0)
    image_BPE, text_BTE, scale = torch.randn(3, 4, 5), torch.randn(3, 2, 5), torch.tensor([0.7])
    scores = [[0.7 * float(max_sim(image[None], text[None])) for text in text_BTE] for image in image_BPE]
    rows = [*scores, *map(list, zip(*scores, strict=True))]
    own = [0, 1, 2, 0, 1, 2]
    loss = sum(math.log(sum(map(math.exp, row))) - row[n] for n, row in zip(own, rows, strict=True)) / 6
    assert math.isclose(float(late_loss(image_BPE, [text_BTE, text_BTE], scale)), loss, rel_tol=1e-5)


def test_bm25_scores_a_caption_against_documents_without_it():
    images = [[[0, 1, 1], [2, 3]], [[1, 4], [2, 2, 5]], [[4], [0, 5, 5]]]
    found = BM25(images, 6).scores()
    full = [[v for ids in captions for v in ids] for captions in images]
    mean = sum(map(len, full)) / 3
    queries = [(i, j, ids) for i, captions in enumerate(images) for j, ids in enumerate(captions)]
    for c, (owner, left_out, query) in enumerate(queries):
        for n, captions in enumerate(images):
            document = [v for j, ids in enumerate(captions) if (n, j) != (owner, left_out) for v in ids]
            score = 0.0
            for v in query:
                df = sum(v in ids for ids in full)
                length = 1 - 0.75 + 0.75 * len(document) / mean
                tf = document.count(v)
                score += math.log(1 + (3 - df + 0.5) / (df + 0.5)) * tf * 2.2 / (tf + 1.2 * length)
            assert math.isclose(float(found[n, c]), score, abs_tol=1e-5)


def test_splice_recovers_a_sparse_combination_of_words():
    torch.manual_seed(0)
    words_WD = torch.nn.functional.normalize(torch.randn(40, 64), dim=1)
    true_NW = torch.zeros(30, 40)
    for row in true_NW:
        row[torch.randperm(40)[:3]] = torch.tensor([0.9, 0.6, 0.4])
    rows_ND = true_NW @ words_WD
    splice = Splice(words_WD)
    assert torch.allclose(splice.codes(rows_ND, 6), true_NW, atol=1e-3)
    assert ((splice.codes(rows_ND, 2) > 0).sum(1) == 2).all()


def test_weights_of_splice_are_those_of_non_negative_least_squares():
    torch.manual_seed(0)
    words_WD, rows_ND = (torch.nn.functional.normalize(torch.randn(n, 12) + 0.3, dim=1) for n in (30, 40))
    for row_D, found_W in zip(rows_ND, Splice(words_WD).codes(rows_ND, 6), strict=True):
        active = found_W.nonzero()[:, 0]
        expected, _ = scipy.optimize.nnls(words_WD[active].T.numpy(), row_D.numpy())
        assert 0 < len(active) <= 6 and (found_W >= 0).all()
        assert torch.allclose(found_W[active], torch.from_numpy(expected).float(), atol=1e-4)


def test_an_autoencoder_of_one_code_finds_the_directions_of_its_data():
    torch.manual_seed(0)
    basis_DD = torch.linalg.qr(torch.randn(16, 16)).Q
    rows_ND = torch.nn.functional.normalize(basis_DD[torch.randint(8, (200,))] + 0.01 * torch.randn(200, 16), dim=1)
    coder = Autoencoder(16, 32, [(1, 1.0), (4, 0.125)], 0.0).fit(rows_ND[None], rows_ND[:, None], 200)
    best = within_budget(coder(rows_ND).relu(), 1).argmax(1)
    close = rows_ND @ rows_ND.T > 0.9
    assert ((best[:, None] == best) == close).all()


def test_the_contrastive_loss_of_an_autoencoder_brings_codes_of_pairs_together():
    torch.manual_seed(0)
    images_ND = torch.nn.functional.normalize(torch.randn(60, 16), dim=1)
    texts_ND = torch.nn.functional.normalize(images_ND + 0.3 * torch.randn(60, 16), dim=1)

    def cosine(contrast: float) -> float:
        torch.manual_seed(1)
        coder = Autoencoder(16, 64, [(4, 1.0), (16, 0.125)], contrast).fit(images_ND[None], texts_ND[:, None], 200)
        with torch.no_grad():
            images_NV, texts_NV = (within_budget(coder(rows_ND).relu(), 4) for rows_ND in (images_ND, texts_ND))
        return float(torch.cosine_similarity(images_NV, texts_NV).mean())

    assert cosine(1.0) > cosine(0.0) + 0.1
