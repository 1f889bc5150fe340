"""Indexes of format 2: settings, files, rows and words in a file each."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from epic_rag_chroma.store.database import IndexDatabase, delete_database
from epic_rag_chroma.store.paths import DATABASE_FILE, VECTORS_FILE

_RECORDS = """
CREATE TABLE records (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    doc_id TEXT NOT NULL,
    embedded_hash TEXT NOT NULL,
    text TEXT NOT NULL,
    metadata TEXT NOT NULL,
    vector BLOB NOT NULL
);
CREATE INDEX records_doc_id ON records (doc_id);
CREATE INDEX records_embedded_hash ON records (embedded_hash);
CREATE TABLE spare (embedded_hash TEXT PRIMARY KEY, vector BLOB NOT NULL);
PRAGMA user_version = 1;
"""
_KEYWORDS = """
CREATE TABLE meta (version TEXT NOT NULL);
CREATE TABLE chunks (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, doc_id TEXT NOT NULL);
CREATE VIRTUAL TABLE words USING fts5 (terms, tokenize = 'porter unicode61 remove_diacritics 2');
INSERT INTO meta VALUES ('1.1');
"""


def make_old(index_dir: Path, **settings: Any) -> None:
    """Rewrite an index of today's format as one of format 2.

    Args:
        index_dir: The index folder.
        **settings: Other values for `index.json`.
    """
    path = index_dir / DATABASE_FILE
    with closing(IndexDatabase.open_reading(path)) as database:
        state, files, mirror = database.state(), database.files(), database.mirror()
        rows = [row for page in database.pages() for row in page]
    assert state is not None
    delete_database(path)
    (index_dir / VECTORS_FILE).unlink()
    collection = mirror.collection
    assert collection is not None
    content = {"format": "epic-rag-index", "format_version": 2, **asdict(state), "collection": collection}
    (index_dir / "index.json").write_text(json.dumps({**content, "chroma": None, **settings}, indent=2) + "\n")
    entries = [
        [*key, entry.digest, entry.chunks, entry.checked_ns, *(asdict(entry.stamp).values() if entry.stamp else ())]
        for key, entry in sorted(files.items())
    ]
    manifest = {"version": 2, "collection": collection, "complete": True, "files": entries}
    (index_dir / "manifest.json").write_text(json.dumps(manifest))
    with closing(sqlite3.connect(index_dir / f"records-{collection}.sqlite")) as records, records:
        records.execute("PRAGMA journal_mode = WAL")
        records.executescript(_RECORDS)
        records.executemany(
            "INSERT INTO records (id, doc_id, embedded_hash, text, metadata, vector) VALUES (?, ?, ?, ?, ?, ?)",
            [
                (
                    row.id, row.metadata["doc_id"], row.metadata["embedded_hash"], row.text, json.dumps(row.metadata),
                    row.vector.astype("<f4").tobytes(),
                )
                for row in rows
            ],
        )  # fmt: skip
    with closing(sqlite3.connect(index_dir / f"keywords-{collection}.sqlite")) as keywords:
        keywords.executescript(_KEYWORDS)
