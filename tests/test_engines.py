"""The engines themselves, through `stair export` and examples/: the hits of `SparseIndex`, scores as exact as stated.

An engine that is not installed is skipped. `.ci/run` installs the extra `engines`, and Lucene with `.ci/lucene`.
"""

import numpy as np
import pytest
from scipy import sparse

from stair.embeddings import Embeddings, EmbeddingSpace
from stair.index import SparseIndex
from tests.support import engines
from tests.support.engines import K

V, N = 2_000, 1_500
pytestmark = pytest.mark.filterwarnings("default")  # of libraries that are older, or younger, than ours


def rows(count, length, seed):
    """Terms as frequent as Zipf says; rare ones weigh more. The last one is never active."""
    generator = np.random.default_rng(seed)
    share = 1 / np.arange(1, V) ** 0.8
    terms = generator.choice(V - 1, (count, length), p=share / share.sum())
    weights = np.log1p(generator.gamma(2, 0.5, terms.shape) * (1 + terms / V)).astype(np.float32)
    matrix = sparse.csr_matrix((weights.ravel(), terms.ravel(), np.arange(count + 1) * length), (count, V))
    matrix.sum_duplicates()
    return matrix


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Twins, whose scores tie; documents without terms; ids that formats with lines, tabs or quotes have to escape."""
    vectors = sparse.vstack([rows(N, 60, 0), rows(N, 60, 0)[:100], sparse.csr_matrix((5, V), dtype=np.float32)], "csr")
    ids = [f"{n} é狗\\N\"'" + ("\t\n\r" if n % 3 else "") for n in range(vectors.shape[0])]
    space = EmbeddingSpace("m" * 64, "dot", ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{v}" for v in range(4, V))))
    metadata = [{"text": f"\\{n}\n\t'{{é", "n": n, "id": "theirs", "terms": [1, None]} for n in range(len(ids))]
    return SparseIndex.build(tmp_path_factory.mktemp("index") / "i", Embeddings(vectors, ids, space, metadata))


@pytest.fixture(scope="module")
def queries(index):
    """Also the vector of a twin, a frequent term, a term that no document has, and heavy weights."""
    vectors = [*rows(30, 20, 1), *rows(5, 3, 2), 100 * rows(1, 20, 3)]
    words = [index.query(words={"w4": 1.5}), index.query(words={f"w{V - 1}": 2.0})]
    return [*words, index.query(like=next(index.ids)), *map(index.query, vectors)]


@pytest.fixture(scope="module", params=engines.ENGINES)
def engine(request, index, tmp_path_factory):
    if reason := engines.missing(request.param):
        pytest.skip(reason)
    make, _, *exactness = engines.ENGINES[request.param]
    with make(index.folder, tmp_path_factory.mktemp("engine")) as (search, _):
        yield make, lambda queries: [found for _, found in search(queries)], *exactness


def scores_of(index, query, stored=None, asked=None):
    """Score of each document, in float64, from the weights that an engine keeps."""
    [content] = index.content()
    vectors = content.vectors.astype(np.float64)
    vectors.data = np.asarray(stored(content.vectors.data) if stored else content.vectors.data, np.float64)
    dense_V = np.zeros(V)
    dense_V[query.terms] = asked(query.weights.astype(np.float64)) if asked else query.weights
    return dict(zip(content.ids, (vectors @ dense_V).tolist(), strict=True))


def check(index, query, found, stored, asked, rel):
    """The found documents are the best ones by what the engine keeps; equal scores may stand in any order."""
    scores = scores_of(index, query, stored, asked)
    best = sorted((score for score in scores.values() if score > 0), reverse=True)[:K]
    assert len({hit for hit, _ in found}) == len(found) == len(best)
    np.testing.assert_allclose([score for _, score in found], best, rtol=rel)
    np.testing.assert_allclose([score for _, score in found], [scores[hit] for hit, _ in found], rtol=rel)


def test_the_engine_finds_the_best_documents_with_their_scores(engine, index, queries):
    _, search, *exactness = engine
    for query, found in zip(queries, search(queries), strict=True):
        check(index, query, found, *exactness)


def test_hits_and_scores_are_those_of_the_index_up_to_the_stated_rounding(engine, index, queries):
    _, search, stored, _, rel = engine
    for query, found in zip(queries, search(queries), strict=True):
        exact = scores_of(index, query)
        if stored is engines.steps:  # half a step of a weight, for each of the query's terms, and the same of the query
            heaviest = max(content.vectors.data.max() for content in index.content())
            most = 2 * len(query.terms) * heaviest * query.weights.max() / 255 / 2 if found else 0
        else:
            most = max(exact.values()) * (rel if stored is None else 2**-8)
        assert all(abs(score - exact[hit]) <= most for hit, score in found)
        expected = index.top(query, K)
        assert len(found) == len(expected)
        # what is that much better than the tenth hit is found
        assert {hit.id for hit in expected if hit.score > expected[-1].score + 2 * most} <= {hit for hit, _ in found}


def test_negative_weights_of_a_query_count_or_are_an_error(engine, index):
    make, search, *exactness = engine
    vector = rows(1, 20, 4)
    vector.data[::3] *= -0.7
    query = index.query(vector)
    if make in (engines.milvus, engines.pisa, engines.lucene_core):
        with pytest.raises(Exception, match=r"(?i)negative"):
            search([query])
    else:
        [found] = search([query])
        check(index, query, [(hit, score) for hit, score in found if score > 0], *exactness)


def test_seismic_finds_nearly_all_hits_within_its_half_precision(index, queries, tmp_path):
    """Approximate by design."""
    pytest.importorskip("seismic")
    right = total = 0
    with engines.seismic(index.folder, tmp_path) as (search, _):
        for query, (_, found) in zip(queries, search(queries), strict=True):
            exact, best = scores_of(index, query), [hit.score for hit in index.top(query, K)]
            for name, score in found:
                assert score == pytest.approx(exact[name], rel=2e-3)
                right += exact[name] >= best[-1] * 0.998
            total += len(best)
    assert right / total > 0.9


def test_hits_of_shards_merged_by_score_are_those_of_one_index(index, queries, tmp_path):
    """No score depends on the other documents, so that shards need to know nothing of each other."""
    [whole] = index.content()
    half = len(whole.ids) // 2
    parts = [
        Embeddings(whole.vectors[part], whole.ids[part], whole.space, whole.metadata[part])
        for part in (slice(0, half), slice(half, None))
    ]
    shards = [SparseIndex.build(tmp_path / f"{n}.index", part) for n, part in enumerate(parts)]
    for query in queries:
        hits = [hit for shard in shards for hit in shard.top(query, K)]
        merged = sorted(hits, key=lambda hit: -hit.score)[:K]
        assert [(hit.id, hit.score) for hit in merged] == [(hit.id, hit.score) for hit in index.top(query, K)]
