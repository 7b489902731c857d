"""`stair index` and `stair search`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from tqdm import tqdm

from stair.embeddings import SUFFIXES, Embeddings, part_files, read_header
from stair.errors import SettingError, require
from stair.images import decode_image
from stair.index.hits import Hits
from stair.index.query import parse_words, problem_of
from stair.index.sparse_index import SparseIndex
from stair.index.storage import FILE, write_index
from stair.plain import one_line

_REFINED = 100  # hits of which `refine` counts terms


def index(
    paths: list[str],
    delete: str | None = None,
    delete_from: Path | None = None,
    replace: bool = False,
    budget: int | None = None,
    verify: bool = False,
) -> dict[str, Any]:
    """Creates or changes an index: deletes documents and adds embeddings in one atomic step.

    Args:
        paths: folder of the index, then folders or files of embeddings (`stair embed`) to add to it. If there is no
            index, it is created.
        delete: id of a document to delete.
        delete_from: file with one id per line; these documents are deleted.
        replace: added documents replace documents with the same id; without it, an existing id is an error.
        budget: maximum number of terms of each added document; the heaviest are kept. Default: all terms.
        verify: check the checksum and all numbers.
    """
    folder, embeddings = Path(paths[0]), paths[1:]
    require(
        budget is None or (budget >= 1 and len(embeddings) > 0), "budget", budget, "at least 1, with embeddings to add"
    )
    deleted = [delete] if delete is not None else []
    if delete_from is not None:
        deleted += delete_from.read_text(encoding="utf-8").splitlines()
    files = [file for path in embeddings for file in part_files(path)]
    for file in files:
        read_header(file)  # a path that is no embeddings ends the command before anything is written
    bar = tqdm(files, "indexing", unit="file", disable=None if files else True)
    parts = (part.heaviest(budget) if budget else part for file in bar for part in Embeddings.parts(file))
    if embeddings and not deleted and not (folder / FILE).exists():
        SparseIndex.build(folder, parts)
    elif deleted or embeddings:
        write_index(folder, parts, deleted, replace)
    opened = SparseIndex.open(folder)
    if verify:
        opened.verify()
    facts = opened.facts
    each = facts["bytes"] / max(1, facts["documents"])
    size = f"{facts['documents']} documents, {facts['bytes']:,} bytes ({each:,.0f} per document)"
    print(f"{folder}: {size}, {facts['similarity']}, model {facts['model'][:12]}")
    return {"index": str(folder), **facts}


def search(
    index: Path,
    text: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    model: str | None = None,
    image: Path | None = None,
    words: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,  # `-people dog`
    like: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    queries: Path | None = None,
    where: str | None = None,
    max_error: float | None = None,
    weighting: Literal["plain", "idf"] = "plain",
    refine: int = 0,
    k: int = 10,
    shown: int = 5,
    threads: int = 1,
) -> list[dict[str, Any]] | dict[str, Any] | tuple[dict[str, Any], ...]:
    """Finds the documents with the highest scores (exact dot products) and shows the terms that contribute.

    A term marked with + is an expansion: the text does not contain it.

    Args:
        index: folder of the index.
        text: query text; needs the model.
        model: folder or hub name of the model of the index, for texts and images.
        image: query image; needs the model.
        words: weighted words instead of a text, such as 'dog:2 beach -people'; no model needed.
        like: id of a document whose neighbours are searched.
        queries: file with one query per line (texts with a model, otherwise weighted words), or embeddings of queries.
            Prints ids and scores; with --json, one line per query.
        where: conditions on metadata, joined by ` and `, such as 'split=test and year>=2010'; `stair:file` and
            `stair:id` are the source file and the id. Put names and values that contain operators or ` and ` in double
            quotes.
        max_error: maximum share of texts that lose their right document, such as 0.05. Hits below the score that
            `stair calibrate` found for this share are left out.
        weighting: `idf` lets rare terms of the index count more.
        refine: also show this number of terms that narrow the search: about half of the best 100 hits have them, but
            few of all documents. With --json, the result is an object with `hits` and `refine`.
        k: number of hits.
        shown: number of shared terms shown per hit.
        threads: number of threads for a file of queries.
    """
    require(refine >= 0, "refine", refine, "a number of terms, 0 for none")
    if sum(given is not None for given in (text, image, words, like, queries)) != 1:
        raise SettingError("give one of --text, --image, --words, --like, --queries", "text")
    opened = SparseIndex.open(index)
    if model is not None:
        from stair.model import Stair

        opened.use(Stair.from_pretrained(model))
    if max_error is not None and text is None:
        raise SettingError("max_error is calibrated on texts; give --text, or leave it out", "max_error")
    if queries is not None:
        if weighting != "plain" or refine:
            raise SettingError("weighting and refine are for a single query; leave them out with --queries", "queries")
        return _search_file(queries, opened, k, where or (), threads)
    query = decode_image(image.read_bytes()) if image is not None else text
    asked: dict[str, Any] = {"words": words, "like": like, "where": where or (), "max_error": max_error}
    found = opened.search(query, max(k, _REFINED) if refine else k, weighting=weighting, **asked)
    _show_notes(found, opened, words)
    rows = _show(found.first(k), shown, where)
    return {"hits": rows, "refine": _show_refinements(found, refine)} if refine else rows


def _show_notes(found: Hits, opened: SparseIndex, words: str | None) -> None:
    """Prints what was searched or compared otherwise than was typed."""
    for word in parse_words(words) if words is not None else ():
        if len(split := opened.query(words={word: 1.0}).terms) > 1:
            tokens = ", ".join(opened.space.tokens[v] for v in split)
            print(one_line(f"{word} is not a word of the vocabulary; searched as {tokens}"), file=sys.stderr)
    for condition, count in found.not_comparable.items():
        rest = f"have no value that compares with {one_line(condition)}; they do not match"
        print(f"{count} of {len(opened)} documents {rest}", file=sys.stderr)


def _show(hits: Hits, shown: int, where: str | None) -> list[dict[str, Any]]:
    rows = []
    for hit in hits:
        terms = {term.token: term.contribution for term in hit.terms[:shown]}
        expansions = [term.token for term in hit.terms[:shown] if term.expansion]
        row = {"id": hit.id, "score": hit.score, "terms": terms, "expansions": expansions, "missing": hits.missing}
        rows.append({**row, "metadata": hit.metadata, "source": hit.source})
        shared = " ".join(f"{'+' * (term in expansions)}{term}:{weight:.3f}" for term, weight in terms.items())
        print(f"{hit.score:9.4f}  {one_line(hit.id)}  {one_line(shared)}")
    if hits.missing:
        print(f"no document has: {one_line(', '.join(hits.missing))}", file=sys.stderr)
    if not rows:
        print(one_line(hits.message + (f", where {where}" if where else "")))
    return rows


def _show_refinements(found: Hits, number: int) -> list[dict[str, Any]]:
    parts = [vars(part) for part in found.refine(number)]
    for part in parts:
        counts = f"{part['hits']} of {len(found)} hits, {part['lift']:.1f} x as often as in all documents"
        print(one_line(f"refine: {part['token']}, {counts}"))
    return parts


def _search_file(path: Path, opened: SparseIndex, k: int, where: Any, threads: int) -> tuple[dict[str, Any], ...]:
    names, queries = _read_queries(path, opened)
    found: list[Hits] = []
    with tqdm(total=len(names), desc="searching", unit="query", delay=2, disable=None) as bar:
        for n in range(0, len(names), 256):
            found += opened.search_many(queries[n : n + 256], k, where=where, threads=threads)
            bar.update(len(found) - n)
    lines = []
    for name, hits in zip(names, found, strict=True):
        shown = [f"{hit.score:9.4f}  {one_line(hit.id)}" for hit in hits] or ["no document scores above 0"]
        print("\n".join([one_line(name), *shown]))
        lines.append({"query": name, "hits": [{"id": hit.id, "score": hit.score} for hit in hits]})
    return tuple(lines)


def _read_queries(path: Path, opened: SparseIndex) -> tuple[Sequence[str], Any]:
    """Names of the queries of a file, and what `SparseIndex.search_many` takes."""
    if path.is_dir() or path.suffix in SUFFIXES:
        loaded = Embeddings.load(path)
        opened.space.check_same(loaded.space, f"{path}, queries for {opened.folder}")
        return loaded.ids, loaded.vectors
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise SettingError(f"{path} is not UTF-8 ({error}); save it as UTF-8", "queries") from error
    if lines == [""]:
        raise SettingError(f"{path} is empty; write a query on each line", "queries")
    ready = []
    for number, line in enumerate(lines, 1):
        try:
            if opened.model is None:
                ready.append(opened.query(words=line))
            elif problem := problem_of(line, opened.vocabulary.words(line), opened.space.tokens):
                raise SettingError(problem, "queries")
        except ValueError as error:
            raise SettingError(f"{path}, line {number}: {error}", "queries") from error
    return lines, ready or lines
