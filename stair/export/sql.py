"""SQLite and DuckDB: postings as a table, and the one statement that scores. Exact, in the database's float64."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from stair.files import atomic_write
from stair.index import SparseIndex
from stair.index.scoring import Query

_TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE words (word INTEGER PRIMARY KEY, token TEXT NOT NULL);
CREATE TABLE documents (document INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, metadata TEXT NOT NULL);
CREATE TABLE postings (word INTEGER, document INTEGER, weight {real} NOT NULL, PRIMARY KEY (word, document)){tail};
"""

#: one parameter, json of weights by word id: {"7592": 1.5}; and how many hits
SQLITE_SCORE = """
SELECT d.id, SUM(p.weight * q.value) AS score
FROM json_each(?) AS q JOIN postings AS p ON p.word = CAST(q.key AS INTEGER) JOIN documents AS d USING (document)
GROUP BY d.document HAVING score > 0 ORDER BY score DESC, d.document LIMIT ?
"""

#: parameters: word ids, their weights, how many hits
DUCKDB_SCORE = """
SELECT d.id, SUM(p.weight * q.weight) AS score
FROM (SELECT unnest(CAST(? AS INTEGER[])) AS word, unnest(CAST(? AS DOUBLE[])) AS weight) AS q
JOIN postings AS p USING (word) JOIN documents AS d USING (document)
GROUP BY d.id, d.document HAVING score > 0 ORDER BY score DESC, d.document LIMIT ?
"""


def sqlite(index: Path, out: Path) -> None:
    """Writes an SQLite database: tables words, documents, postings, and in facts the statement that scores.

    Args:
        index: folder of the index.
        out: file of the database; must not exist.
    """
    opened = SparseIndex.open(index)
    with _fresh(out) as unfinished, closing(sqlite3.connect(unfinished)) as database, database:
        # WITHOUT ROWID: postings lie sorted by word, as they are read
        database.executescript(_TABLES.format(real="REAL", tail=" WITHOUT ROWID"))
        _fill(database, opened, SQLITE_SCORE)


def duckdb(index: Path, out: Path) -> None:
    """Writes a DuckDB database: tables words, documents, postings, and in facts the statement that scores.

    Args:
        index: folder of the index.
        out: file of the database; must not exist.
    """
    try:
        import duckdb as engine
    except ImportError as error:
        raise ValueError("needs duckdb: `pip install duckdb`") from error
    opened = SparseIndex.open(index)
    with _fresh(out) as unfinished, closing(engine.connect(str(unfinished))) as database:
        # no key on postings: DuckDB would check it row by row, and scans columns anyway
        database.execute(_TABLES.format(real="DOUBLE", tail="").replace(", PRIMARY KEY (word, document)", ""))
        _fill(database, opened, DUCKDB_SCORE)


@contextmanager
def _fresh(out: Path) -> Iterator[Path]:
    """Where to write a file that must not exist; it appears when it is whole."""
    if out.exists():
        raise FileExistsError(f"{out} exists; give a new file")
    with atomic_write(out) as part:
        yield part


def _fill(database: Any, index: SparseIndex, statement: str) -> None:
    facts = {"model": index.space.model, "similarity": index.space.similarity, "score": statement}
    database.executemany("INSERT INTO facts VALUES (?, ?)", list(facts.items()))
    database.executemany("INSERT INTO words VALUES (?, ?)", list(enumerate(index.space.tokens)))
    place = 0
    for part in index.content():
        rows = zip(range(place, place + len(part)), part.ids, part.metadata or [{}] * len(part), strict=True)
        documents = [(n, name, json.dumps(row)) for n, name, row in rows]
        database.executemany("INSERT INTO documents VALUES (?, ?, ?)", documents)
        coordinates = part.vectors.tocoo()
        postings = zip(
            coordinates.col.tolist(), (coordinates.row + place).tolist(), coordinates.data.tolist(), strict=True
        )
        if type(database).__module__.startswith("sqlite3"):
            database.executemany("INSERT INTO postings VALUES (?, ?, ?)", postings)
        else:
            _append(database, coordinates, place)
        place += len(part)


def _append(database: Any, coordinates: Any, place: int) -> None:
    # row by row takes DuckDB a millisecond each; a parameter that is a list is one row to it
    columns = coordinates.col.tolist(), (coordinates.row + place).tolist(), coordinates.data.tolist()
    for i in range(0, len(columns[0]), 1 << 20):
        database.execute(
            "INSERT INTO postings SELECT unnest(?::INTEGER[]), unnest(?::INTEGER[]), unnest(?::DOUBLE[])",
            [column[i : i + (1 << 20)] for column in columns],
        )


def sqlite_search(database: sqlite3.Connection, query: Query, k: int) -> list[tuple[str, float]]:
    """The k best ids and scores of an exported SQLite database."""
    weights = {str(word): float(weight) for word, weight in zip(query.words, query.weights, strict=True)}
    return database.execute(SQLITE_SCORE, (json.dumps(weights), k)).fetchall()


def duckdb_search(database: Any, query: Query, k: int) -> list[tuple[str, float]]:
    """The k best ids and scores of an exported DuckDB database."""
    found: list[tuple[str, float]] = database.execute(
        DUCKDB_SCORE, [query.words.tolist(), [float(weight) for weight in query.weights], k]
    ).fetchall()
    return found
