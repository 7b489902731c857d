"""The report page: it needs nothing from outside, believes nothing in the data, and its figures add up."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from stair.report.page import Hit, Picture, Search, StageRow, write_page
from stair.report.terms import encode_png, shared_terms, top_terms
from stair.vocabulary import Vocabulary

HOSTILE = "<script>alert(1)</script><img src=\"http://evil.example/x\" onerror='x()'>&amp;"
IMAGE = encode_png(torch.arange(3 * 8 * 8, dtype=torch.uint8).view(3, 8, 8))


class Tags(HTMLParser):
    """Collects what a browser would see: tags with attributes, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "star", "sea", "ship", "##s"]))
    return Vocabulary(path)


def render(path: Path, text: str = "a red star") -> str:
    words = [("star", 2.0), (text, 0.5)]
    hit = Hit(IMAGE, score=3.0, shared=[("star", 2.0), (text, 0.25)], caption=text, is_target=True)
    write_page(
        path,
        title=text,
        stages=[StageRow(text, {"t2i/recall@1": 0.3149, text: 12.345}), StageRow("next", {"t2i/recall@1": 0.5})],
        pictures=[Picture(IMAGE, [text, "a ship"], words, frozenset({"star"}))],
        searches=[Search(text, words, frozenset({"star"}), [hit])],
        notes=[text],
    )
    return path.read_text(encoding="utf-8")


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path):
    page = render(tmp_path / "page.html")
    assert "http://" not in page and "https://" not in page and "url(" not in page and "@import" not in page
    parsed = Tags(page)
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "base"})
    sources = [attributes["src"] for tag, attributes in parsed.tags if tag == "img"]
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert any("default-src 'none'" in (attributes.get("content") or "") for _, attributes in parsed.tags)


def test_hostile_text_is_shown_as_text_wherever_it_comes_from(tmp_path: Path):
    harmless, hostile = (Tags(render(tmp_path / "page.html", text)) for text in ("plain", HOSTILE))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in harmless.tags]
    assert [sorted(attributes) for _, attributes in hostile.tags] == [sorted(a) for _, a in harmless.tags]
    # all but the metric's name, which the page splits at its last slash
    assert hostile.text.count(HOSTILE) == harmless.text.count("plain") - 1 == 10


def test_images_arrive_unchanged(tmp_path: Path):
    page = render(tmp_path / "page.html")
    [data] = set(re.findall(r'src="data:image/png;base64,([^"]+)"', page))
    assert base64.b64decode(data, validate=True) == IMAGE


def test_contributions_of_all_words_sum_to_the_dot_product(vocabulary: Vocabulary):
    generator = torch.Generator().manual_seed(0)
    a_V, b_V = (torch.rand(len(vocabulary), generator=generator) for _ in range(2))
    shared = shared_terms(a_V, b_V, vocabulary, len(vocabulary))
    assert sum(value for _, value in shared) == pytest.approx(float(a_V @ b_V), rel=1e-6)
    assert [value for _, value in shared] == sorted((value for _, value in shared), reverse=True)
    for word, value in shared:
        v = vocabulary.tokens.index(word)
        assert value == pytest.approx(float(a_V[v] * b_V[v]))


def test_contributions_in_half_precision_are_multiplied_in_full(vocabulary: Vocabulary):
    a_V = torch.full((len(vocabulary),), 1.0078125, dtype=torch.bfloat16)
    [(_, value)] = shared_terms(a_V, a_V, vocabulary, 1)
    assert value == 1.0078125**2


def test_top_terms_are_the_active_ones_largest_first_and_ties_in_order(vocabulary: Vocabulary):
    embedding_V = torch.zeros(len(vocabulary))
    embedding_V[[5, 6, 8, 9]] = torch.tensor([0.5, 1.5, 0.5, 0.1])
    assert top_terms(embedding_V, vocabulary, 3) == [("star", 1.5), ("red", 0.5), ("ship", 0.5)]
    assert [word for word, _ in top_terms(embedding_V, vocabulary, 100)] == ["star", "red", "ship", "##s"]
    assert top_terms(torch.zeros(len(vocabulary)), vocabulary, 3) == []


def test_an_embedding_of_another_vocabulary_is_refused(vocabulary: Vocabulary):
    with pytest.raises(ValueError, match=r"shape \(7,\).*10 terms"):
        top_terms(torch.zeros(7), vocabulary, 3)
    with pytest.raises(ValueError, match="shapes"):
        shared_terms(torch.zeros(10), torch.zeros(1), vocabulary, 3)


def test_recall_is_shown_in_percent_the_best_is_marked_and_gaps_stay_gaps(tmp_path: Path):
    page = render(tmp_path / "page.html", "active")
    assert "<td>31.5%</td><td>12.3</td>" in page
    assert '<td class="best">50.0%</td><td>—</td>' in page


def test_in_caption_terms_differ_from_added_ones_and_the_rest_of_a_score_is_shown(tmp_path: Path):
    page = render(tmp_path / "page.html", "sea")
    assert '<li class="own"><span class="word">star</span>' in page
    assert '<li class="added"><span class="word">sea</span>' in page
    # 3.0 scored, 2.0 and 0.25 shown
    assert 'other terms</span><span class="weight">0.75</span>' in page


def test_a_page_of_nothing_but_a_title_is_a_page(tmp_path: Path):
    write_page(tmp_path / "new/page.html", title="empty")
    page = Tags((tmp_path / "new/page.html").read_text())
    assert "empty" in page.text and "h2" not in {tag for tag, _ in page.tags}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


def test_an_image_without_active_terms_is_shown_all_the_same(tmp_path: Path):
    write_page(tmp_path / "page.html", title="dead", pictures=[Picture(IMAGE, [], [], frozenset())])
    assert "no active terms" in (tmp_path / "page.html").read_text()


def test_bytes_that_are_no_image_are_refused_and_leave_no_file(tmp_path: Path):
    picture = Picture(b"<svg onload=x()>", ["a"], [], frozenset())
    with pytest.raises(ValueError, match="encode_png"):
        write_page(tmp_path / "page.html", title="t", pictures=[picture])
    assert not list(tmp_path.iterdir())
