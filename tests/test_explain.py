"""Explanations: they sum to the score, and name the position that really made each word."""

import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from stair.cli import main
from stair.explain import explain, read_image, read_text
from stair.explain_page import draw, overlay, page
from stair.index import SparseIndex
from stair.kernels import vocabulary_max_reference


@pytest.fixture
def picture(pixels):
    return Image.fromarray(pixels[0].permute(1, 2, 0).numpy())


@pytest.fixture(params=["dot", "cosine"])
def model(tiny_stair, request):
    tiny_stair.config.similarity = request.param
    return tiny_stair


def test_contributions_sum_to_the_score_of_the_model_and_of_the_index(model, picture, tmp_path):
    text = "a red ball on the sea"
    why = explain(model, text, picture)
    expected = float(model.score(model.encode_image([picture]), model.encode_text([text])))
    assert why.score == pytest.approx(expected, rel=1e-5)
    place = {token: v for v, token in enumerate(model.vocabulary.tokens)}
    assert sum(w.contribution for w in sorted(why.shared, key=lambda w: place[w.token])) == why.score
    index = SparseIndex.build(tmp_path / "i", model.encode(images=[picture]), ["p"], model=model)
    hit = index.search(text)[0]
    assert hit.score == pytest.approx(why.score, rel=1e-6)
    assert [t.token for t in hit.terms] == [t.token for t in why.shared]
    # patches are the only positions that speak, so the score lies wholly on the picture
    assert why.heat(why.document).sum() == pytest.approx(why.score, rel=1e-9)


@torch.no_grad()
def test_the_argmax_position_of_a_term_is_the_one_without_which_it_weighs_less(any_stair, picture):
    reading = read_image(any_stair, picture)
    hidden = any_stair.image_encoder(torch.as_tensor(np.array(reading.image)).permute(2, 0, 1)[None])
    head = any_stair.image_head
    hidden = head.norm(torch.nn.functional.gelu(head.dense(hidden)))
    place = {token: v for v, token in enumerate(any_stair.vocabulary.tokens)}
    assert len(reading.terms) == int((any_stair.encode_image([picture]) > 0).sum()) > 5
    for n, word in enumerate(reading.terms):
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool)
        whole = vocabulary_max_reference(hidden, mask, head.word_embeddings, head.bias)[0, place[word]]
        mask[0, reading.positions[n]] = False
        without = vocabulary_max_reference(hidden, mask, head.word_embeddings, head.bias)[0, place[word]]
        assert without < whole and reading.weights[n] == pytest.approx(float(whole), rel=1e-5)
        assert reading.evidence[n].max() == pytest.approx(float(whole), rel=1e-5)
        row, column = reading.patch(n)
        assert reading.heat(n)[row, column] == reading.evidence[n].max() and reading.heat(n).shape == (4, 4)


def test_terms_of_a_class_token_lie_on_no_patch(vocab_file, picture):
    from stair.model import Stair
    from tests.support.models import tiny_config

    config = tiny_config(vocab_file)
    config.image.positions = "all"
    torch.manual_seed(0)
    reading = read_image(Stair(config).eval(), picture)
    outside = {n for n in range(len(reading.terms)) if reading.patch(n) is None}
    assert outside == {n for n in range(len(reading.terms)) if reading.positions[n] == 0}
    assert outside
    assert draw(reading, 3)


def test_a_text_has_its_tokens_and_its_expansions(tiny_stair):
    reading = read_text(tiny_stair, "two dogs")
    assert reading.tokens == ["[CLS]", "two", "dog", "##s", "[SEP]"]
    weights = tiny_stair.encode_text(["two dogs"])[0]
    assert dict(zip(reading.terms, reading.weights.tolist(), strict=True)) == {
        tiny_stair.vocabulary.tokens[v]: float(weights[v]) for v in weights.nonzero()[:, 0].tolist()
    }
    own = {word for n, word in enumerate(reading.terms) if not reading.expands(n)}
    assert own == {"two", "dog", "##s"} & set(reading.terms) and len(own) < len(reading.terms)


def test_a_tokens_evidence_for_a_term_is_at_most_the_terms_weight(tiny_stair):
    with torch.no_grad():
        tiny_stair.text_head.bias += 0.7
    tiny_stair.config.in_caption_margin = 0.7
    reading = read_text(tiny_stair, "two dogs")
    assert any(reading.expands(n) for n in range(len(reading.terms))), "the test would say nothing"
    np.testing.assert_allclose(reading.evidence.max(axis=1), reading.weights, rtol=1e-5, atol=1e-6)


def test_a_heat_map_is_hottest_where_the_heat_is():
    heat = np.zeros((4, 4))
    heat[1, 2] = 2
    mapped = np.asarray(overlay(Image.new("RGB", (32, 32), "white"), heat, 64), np.int64)
    redness = mapped[:, :, 0] - mapped[:, :, 2]
    row, column = np.unravel_index(redness.argmax(), redness.shape)
    assert 16 <= row < 32 and 32 <= column < 48 and redness[60, 4] == 0
    assert np.asarray(overlay(Image.new("RGB", (32, 32), "white"), np.zeros((4, 4)), 8)).min() == 255


def test_pages_are_complete_escaped_and_ask_for_nothing(tiny_stair, picture):
    for subject in (
        explain(tiny_stair, "<i>red</i> & ball", picture),
        read_text(tiny_stair, "a dog"),
        explain(tiny_stair, picture, picture),
    ):
        html = page(subject, num_terms=3)
        assert "default-src 'none'" in html and not re.search(r"(src|href)=\"(?!data:)", html)
        assert "<script" not in html and "<i>red" not in html
        assert draw(subject, num_terms=3).size[0] >= 620


def test_the_command_writes_a_picture_and_a_page(tiny_stair, picture, tmp_path, monkeypatch, capsys):
    tiny_stair.save_pretrained(tmp_path / "m")
    picture.save(tmp_path / "p.png")

    def stair(*args):
        monkeypatch.setattr(sys, "argv", ["stair", "explain", *map(str, args)])
        main()
        return capsys.readouterr().out

    pair = "--image", tmp_path / "p.png", "--text", "a red ball"
    assert "score, of" in stair(tmp_path / "m", tmp_path / "why.png", *pair)
    with Image.open(tmp_path / "why.png") as drawn:
        assert drawn.size[0] >= 620
    stair(tmp_path / "m", tmp_path / "why.html", *pair, "--num_terms", "2")
    assert "The score is the sum" in (tmp_path / "why.html").read_text()
    stair(tmp_path / "m", tmp_path / "one.html", "--image", tmp_path / "p.png")
    for args, complaint in [((tmp_path / "x.pdf", *pair), "pdf"), ((tmp_path / "x.png",), "give one or two")]:
        with pytest.raises(SystemExit, match=complaint):
            stair(tmp_path / "m", *args)
