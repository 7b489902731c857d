"""SQLite and DuckDB: postings as a table, exact in float64. PostgreSQL: pgvector's sparsevec, float32."""

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa

from stair.errors import SettingError, import_extra
from stair.export.target import Row, batches, engine_errors, new_target, opened, rows
from stair.index import SparseIndex

_TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE terms (term INTEGER PRIMARY KEY, token TEXT NOT NULL);
CREATE TABLE documents (document INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, metadata TEXT, source TEXT);
CREATE TABLE postings (term INTEGER, document INTEGER, weight {real} NOT NULL{key}){end};
"""
#: a parameter, JSON of weights by term id: {"7592": 1.5}; and how many hits
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
_POSTGRES = """\\set ON_ERROR_STOP on
BEGIN; CREATE EXTENSION IF NOT EXISTS vector; CREATE SCHEMA stair;
CREATE TABLE stair.facts (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE stair.terms (term INTEGER PRIMARY KEY, token TEXT NOT NULL);
CREATE TABLE stair.documents (document INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, metadata JSON, source JSON,
    terms SPARSEVEC({size}));
CREATE FUNCTION stair.search(query SPARSEVEC, k INTEGER) RETURNS TABLE (id TEXT, score FLOAT) STABLE BEGIN ATOMIC
    SELECT id, -(terms <#> query) FROM stair.documents WHERE terms <#> query < 0 ORDER BY terms <#> query, document LIMIT k;
END;
"""
_ESCAPES = {ord("\\"): "\\\\", ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t"}  # of COPY


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
        for table, lines in _tables(documents, SQLITE_SCORE):
            database.executemany(f"INSERT INTO {table} VALUES (?{', ?' * (len(lines[0]) - 1)})", lines)


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
        for table, lines in _tables(documents, DUCKDB_SCORE):
            columns = map(pa.array, zip(*lines, strict=True))  # row by row takes DuckDB a millisecond each
            database.from_arrow(pa.table(dict(zip("abcd", columns, strict=False)))).insert_into(table)


def postgres(index: Path, out: Path) -> None:
    """Writes an SQL script for PostgreSQL (14 or newer) with pgvector (0.7 or newer): `psql DATABASE -f OUT`.

    In one transaction, the script makes the schema `stair` with tables facts, terms and documents and the function
    `search(query, k)`.

    Args:
        index: folder of the index.
        out: file of the script; must not exist.
    """
    documents = opened(index, "PostgreSQL", longest_id=2_600)

    def vector(row: Row) -> str:
        if len(row.terms) > 16_000 or "\0" in row.id:
            raise SettingError(f"{row.id!r}: PostgreSQL takes 16,000 terms, and no character 0 in an id", "index")
        weights = (f"{term + 1}:{weight:.9g}" for term, weight in zip(row.terms, row.weights, strict=True))
        return f"{{{','.join(weights)}}}/{len(documents.space.tokens)}"

    with new_target(out) as part, part.open("w", encoding="utf-8") as file:
        file.write(_POSTGRES.format(size=len(documents.space.tokens)))
        for table, lines in _tables(documents, "SELECT * FROM stair.search($1, $2)", vector):
            file.write(f"COPY stair.{table} FROM stdin;\n")
            file.writelines("\t".join(str(value).translate(_ESCAPES) for value in line) + "\n" for line in lines)
            file.write("\\.\n")
        file.write("COMMIT;\n")


def _tables(index: SparseIndex, score: str, vector: Callable[[Row], str] | None = None) -> Iterator[tuple[str, Any]]:
    """Tables and some of their lines; a vector is a column of the documents, or lines of the table postings."""
    yield "facts", [("model", index.space.model), ("similarity", index.space.similarity), ("score", score)]
    yield "terms", list(enumerate(index.space.tokens))
    for batch in batches(enumerate(rows(index)), 1 << 13):
        texts = [(n, row.id, *map(json.dumps, row.fields.values()), row) for n, row in batch]
        yield "documents", [(*line, vector(row)) if vector else line for *line, row in texts]
        postings = ((term, n, weight) for n, row in batch for term, weight in zip(row.terms, row.weights, strict=True))
        if not vector and (lines := list(postings)):
            yield "postings", lines
