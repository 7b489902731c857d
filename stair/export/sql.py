"""SQLite and DuckDB: postings as a table, and the one statement that scores. Exact, in the database's float64."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from stair.errors import import_extra
from stair.export.target import batches, engine_errors, new_target, opened, rows
from stair.index import SparseIndex

_TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE terms (term INTEGER PRIMARY KEY, token TEXT NOT NULL);
CREATE TABLE documents (document INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, metadata TEXT, source TEXT);
CREATE TABLE postings (term INTEGER, document INTEGER, weight {real} NOT NULL{key}){end};
"""
#: one parameter, JSON of weights by term id: {"7592": 1.5}; and how many hits
SQLITE_SCORE = """
SELECT d.id, SUM(p.weight * q.value) AS score
FROM json_each(?) AS q JOIN postings AS p ON p.term = CAST(q.key AS INTEGER) JOIN documents AS d USING (document)
GROUP BY d.document HAVING score > 0 ORDER BY score DESC, d.document LIMIT ?
"""
#: parameters: term ids, their weights, how many hits
DUCKDB_SCORE = """
SELECT d.id, SUM(p.weight * q.weight) AS score
FROM (SELECT unnest(CAST(? AS INTEGER[])) AS term, unnest(CAST(? AS DOUBLE[])) AS weight) AS q
JOIN postings AS p USING (term) JOIN documents AS d USING (document)
GROUP BY d.id, d.document HAVING score > 0 ORDER BY score DESC, d.document LIMIT ?
"""


def sqlite(index: Path, out: Path) -> None:
    """Writes an SQLite database with the tables terms, documents and postings; table facts has the scoring query.

    Args:
        index: folder of the index.
        out: file of the database; must not exist.
    """
    documents = opened(index, "SQLite")
    with engine_errors("SQLite"), new_target(out) as part, closing(sqlite3.connect(part)) as database, database:
        # WITHOUT ROWID: postings lie sorted by term, as they are read
        database.executescript(_TABLES.format(real="REAL", key=", PRIMARY KEY (term, document)", end=" WITHOUT ROWID"))
        _fill(database, documents, SQLITE_SCORE)


def duckdb(index: Path, out: Path) -> None:
    """Writes a DuckDB database with the tables terms, documents and postings; table facts has the scoring query.

    Args:
        index: folder of the index.
        out: file of the database; must not exist.
    """
    documents = opened(index, "DuckDB")
    connect = import_extra("duckdb", "duckdb", "export").connect
    with engine_errors("DuckDB"), new_target(out) as part, closing(connect(str(part))) as database:
        # no key on postings: DuckDB would check it row by row, and scans columns anyway
        database.execute(_TABLES.format(real="DOUBLE", key="", end=""))
        _fill(database, documents, DUCKDB_SCORE)


def _fill(database: Any, index: SparseIndex, statement: str) -> None:
    facts = {"model": index.space.model, "similarity": index.space.similarity, "score": statement}
    database.executemany("INSERT INTO facts VALUES (?, ?)", list(facts.items()))
    database.executemany("INSERT INTO terms VALUES (?, ?)", list(enumerate(index.space.tokens)))
    for batch in batches(enumerate(rows(index)), 1 << 13):
        documents = [(n, row.id, *map(json.dumps, row.fields.values())) for n, row in batch]
        database.executemany("INSERT INTO documents VALUES (?, ?, ?, ?)", documents)
        postings = [(term, n, weight) for n, row in batch for term, weight in zip(row.terms, row.weights, strict=True)]
        if isinstance(database, sqlite3.Connection):
            database.executemany("INSERT INTO postings VALUES (?, ?, ?)", postings)
        elif postings:  # row by row takes DuckDB a millisecond each; a parameter that is a list is one row to it
            unnested = "unnest(?::INTEGER[]), unnest(?::INTEGER[]), unnest(?::DOUBLE[])"
            database.execute(f"INSERT INTO postings SELECT {unnested}", list(map(list, zip(*postings, strict=True))))
