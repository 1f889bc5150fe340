"""Settings, models and versions of an index, and states of the index folder."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epic_rag import EpicEncoder
from epic_rag.errors import ConfigError, DataError
from epic_rag_chroma import ChromaIndexer, IndexProgress, IndexReport, IndexSettings
from epic_rag_chroma.errors import IndexMismatchError, IndexNotFoundError, IndexStateError
from epic_rag_chroma.store.database import IndexDatabase
from epic_rag_chroma.store.paths import DATABASE_FILE

Rows = Callable[[Path], dict[str, tuple[str, dict[str, Any], list[float]]]]
Tree = Callable[[Path, dict[str, str | bytes]], Path]


def counts(report: IndexReport) -> tuple[int, int, int, int]:
    return report.added, report.changed, report.deleted, report.unchanged


def test_changed_patterns(indexer: ChromaIndexer, docs: Path) -> None:
    indexer.index([docs], settings=IndexSettings(include=("*.md",)))
    assert indexer.status().files == 1
    assert counts(indexer.index([docs])) == (0, 0, 0, 1)
    assert counts(indexer.index([docs], settings=IndexSettings(exclude=("*.md",)))) == (2, 0, 1, 0)
    assert indexer.status().settings.exclude == ("*.md",)


def test_other_chunk_sizes(indexer: ChromaIndexer, docs: Path, rows: Rows) -> None:
    indexer.index([docs], settings=IndexSettings(chunk_tokens=60, chunk_overlap=5))
    before = rows(docs / ".epic-rag")
    with pytest.raises(IndexMismatchError, match=r"chunks of 60 tokens with an overlap of 5, not of 30 .*--rebuild"):
        indexer.index([docs], settings=IndexSettings(chunk_tokens=30, chunk_overlap=5))
    assert rows(docs / ".epic-rag") == before
    assert indexer.index([docs], settings=IndexSettings(chunk_tokens=30, chunk_overlap=5), rebuild=True).added == 3
    assert len(rows(docs / ".epic-rag")) > len(before)
    assert indexer.status().settings.chunk_tokens == 30


def test_invalid_chunk_sizes(indexer: ChromaIndexer, docs: Path, tiny_encoder: EpicEncoder) -> None:
    limit = tiny_encoder.max_document_tokens
    with pytest.raises(ConfigError, match=rf"{limit + 1} tokens .* {limit - 2} .*--chunk-tokens {limit - 2}"):
        indexer.index([docs], settings=IndexSettings(chunk_tokens=limit + 1))
    assert not (docs / ".epic-rag").exists()
    for tokens, overlap in ((0, 0), (10, 10), (10, -1)):
        with pytest.raises(ConfigError):
            IndexSettings(chunk_tokens=tokens, chunk_overlap=overlap)


def test_other_model(
    docs: Path, tiny_checkpoint: Path, other_checkpoint: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (EpicEncoder.from_pretrained(path) for path in (tiny_checkpoint, other_checkpoint))
    monkeypatch.chdir(docs.parent)
    with ChromaIndexer("docs/.epic-rag", encoder=first) as indexer:
        indexer.index(["docs"])
        assert indexer.query("cats")
    before = rows(docs / ".epic-rag")
    with ChromaIndexer("docs/.epic-rag", encoder=second) as other:
        expected = (
            f"The index was built with {first.name} ({first.fingerprint}), not with {second.name} "
            f"({second.fingerprint}). Run `epic-rag index --rebuild ./docs --model {second.source}`."
        )
        for call in (lambda: other.index(["docs"]), lambda: other.query("cats")):
            with pytest.raises(IndexMismatchError) as caught:
                call()
            assert str(caught.value) == expected
        assert rows(docs / ".epic-rag") == before
        assert counts(other.index([], rebuild=True)) == (3, 0, 0, 0)
        assert other.query("cats")
    assert {row[1]["path"] for row in rows(docs / ".epic-rag").values()} == {"guide.md", "notes.txt", "src/tool.py"}
    # and with no encoder given, the index's own model is loaded
    with ChromaIndexer("docs/.epic-rag") as own:
        assert own.query("cats")
        assert own.status().fingerprint == second.fingerprint


def test_remedy_with_index_dir(
    docs: Path, tiny_encoder: EpicEncoder, other_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(docs.parent)
    with ChromaIndexer("elsewhere", encoder=tiny_encoder) as indexer:
        indexer.index(["docs"])
    remedy = r"--rebuild \./docs --index-dir \./elsewhere --model \S+other`"
    other = ChromaIndexer("elsewhere", encoder=EpicEncoder.from_pretrained(other_checkpoint))
    with other, pytest.raises(IndexMismatchError, match=remedy):
        other.index(["docs"])


def test_other_chunker_version(indexer: ChromaIndexer, docs: Path) -> None:
    indexer.index([docs])
    indexer.close()
    with closing(IndexDatabase.open(docs / ".epic-rag" / DATABASE_FILE)) as database:
        state = database.state()
        assert state is not None
        database.finish_run(replace(state, chunker_version=0))
    assert sorted(indexer.plan([docs]).changed) == ["guide.md", "notes.txt", "src/tool.py"]
    report = indexer.index([docs])  # reads every file again, and embeds nothing
    assert (counts(report), report.chunks_embedded) == ((0, 3, 0, 0), 0)
    assert counts(indexer.index([docs])) == (0, 0, 0, 3)


def test_newer_format(indexer: ChromaIndexer, docs: Path) -> None:
    indexer.index([docs])
    indexer.close()
    with closing(sqlite3.connect(docs / ".epic-rag" / DATABASE_FILE)) as connection:
        connection.execute("PRAGMA user_version = 99")
    for call in (
        indexer.status,
        lambda: indexer.query("x"),
        lambda: indexer.index([docs]),
        lambda: indexer.plan([docs]),
    ):
        with pytest.raises(IndexMismatchError, match=r"format 99, this version of epic-rag reads 3\. Run `pip install"):
            call()
    assert counts(indexer.index([docs], rebuild=True)) == (3, 0, 0, 0)
    assert len(indexer.query("x", k=9)) == 4


def test_no_index(tmp_path: Path) -> None:
    indexer = ChromaIndexer(tmp_path / "none")
    for call in (indexer.status, indexer.clear, lambda: indexer.query("x")):
        with pytest.raises(IndexNotFoundError, match=r"No index in .*none\. Run `epic-rag index PATH`"):
            call()
    assert not (tmp_path / "none").exists()


def test_missing_paths_and_bad_arguments(indexer: ChromaIndexer, docs: Path) -> None:
    with pytest.raises(DataError, match=r"No such file or folder: .*missing"):
        indexer.index([docs, docs / "missing"])
    with pytest.raises(DataError, match="No path is given"):
        indexer.index([])
    assert not (docs / ".epic-rag").exists()
    indexer.index([docs])
    with pytest.raises(ConfigError, match="k is 0"):
        indexer.query("x", k=0)


def test_folder_with_other_files(docs: Path, tiny_encoder: EpicEncoder) -> None:
    with pytest.raises(IndexStateError, match=r"docs contains guide\.md and no index\.sqlite.*--index-dir"):
        ChromaIndexer(docs, encoder=tiny_encoder).index([docs])
    assert sorted(path.name for path in docs.iterdir()) == ["guide.md", "notes.txt", "src"]


def test_database_of_another_program(docs: Path, tmp_path: Path, tiny_encoder: EpicEncoder) -> None:
    folder = tmp_path / "project"
    (folder / "chroma").mkdir(parents=True)
    (folder / "chroma/mine").write_text("mine")
    with closing(sqlite3.connect(folder / DATABASE_FILE)) as connection, connection:
        connection.execute("CREATE TABLE mine (x)")
    before = (folder / DATABASE_FILE).read_bytes()
    with ChromaIndexer(folder, encoder=tiny_encoder) as indexer:
        for call in (
            lambda: indexer.index([docs]),
            lambda: indexer.index([docs], rebuild=True),
            lambda: indexer.query("x"),
            indexer.status,
            indexer.clear,
            lambda: indexer.plan([docs]),
        ):
            with pytest.raises(IndexStateError, match=r"another program|contains chroma|No index in"):
                call()
    assert (folder / DATABASE_FILE).read_bytes() == before
    assert (folder / "chroma/mine").read_text() == "mine"


def test_model_that_fails_to_load(docs: Path) -> None:
    def load() -> EpicEncoder:
        raise RuntimeError("no model")

    with pytest.raises(RuntimeError, match="no model"):
        ChromaIndexer(docs / ".epic-rag", encoder=load).index([docs])
    assert not (docs / ".epic-rag").exists()


def test_status_and_clear_load_no_model(docs: Path, tiny_encoder: EpicEncoder) -> None:
    with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder) as indexer:
        indexer.index([docs])
    mine = docs / ".epic-rag/mine.txt"
    mine.write_text("mine")
    other = ChromaIndexer(docs / ".epic-rag", encoder=lambda: pytest.fail("loaded"))
    state = other.status()
    assert (state.files, state.chunks, state.roots) == (3, 4, (str(docs),))
    assert (state.model, state.fingerprint, state.dimension) == ("tiny", tiny_encoder.fingerprint, 32)
    assert state.size_bytes > 1000
    assert state.updated_at is not None
    assert state.settings == IndexSettings()
    other.clear()
    assert [path.name for path in (docs / ".epic-rag").iterdir()] == ["mine.txt"]
    mine.unlink()
    (docs / ".epic-rag").rmdir()
    with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder) as indexer:
        indexer.index([docs])
        indexer.clear()
        assert not (docs / ".epic-rag").exists()
        indexer.index([docs])
        assert len(indexer.query("x", k=9)) == 4


def test_progress(indexer: ChromaIndexer, docs: Path) -> None:
    seen: list[IndexProgress] = []
    indexer.index([docs], progress=seen.append)
    assert seen[0] == IndexProgress("scanning", 0, 1, None)
    indexing = [event for event in seen if event.stage == "indexing"]
    assert {event.total for event in indexing} == {3}
    assert indexing[-1].done == 3
    assert [event.done for event in indexing] == sorted(event.done for event in indexing)


def test_batches(docs: Path, tree: Tree, tiny_encoder: EpicEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(docs, {f"many{n}.txt": "word " * (n % 7 + 1) + f"\n\n{n}\n" for n in range(146)})
    sizes: list[list[int]] = []
    encode = EpicEncoder.encode_document

    def spy(self: EpicEncoder, texts: Any, **options: Any) -> Any:
        sizes.append(self.count_tokens(texts))
        return encode(self, texts, **options)

    monkeypatch.setattr(EpicEncoder, "encode_document", spy)
    with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder, batch_chunks=100) as indexer:
        report = indexer.index([docs])
    assert sum(map(len, sizes)) == report.chunks_embedded == 150
    assert [len(each) for each in sizes] == [64, 36, 50]
    for batch in (sizes[0] + sizes[1], sizes[2]):
        assert batch == sorted(batch)
    with pytest.raises(ConfigError, match="batch_chunks is 0"):
        ChromaIndexer(docs / ".epic-rag", batch_chunks=0)


def test_vector_that_is_not_finite(indexer: ChromaIndexer, docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = EpicEncoder.encode_document

    def spoil(self: EpicEncoder, texts: Any, **options: Any) -> Any:
        vectors = encode(self, texts, **options)
        return np.where([["Cats" in text] for text in texts], np.nan, vectors).astype(np.float32)

    monkeypatch.setattr(EpicEncoder, "encode_document", spoil)
    report = indexer.index([docs])
    assert [file.path for file in report.skipped] == ["notes.txt"]
    assert len(indexer.query("x", k=9)) == 3
    monkeypatch.undo()
    indexer.index([docs])
    assert len(indexer.query("x", k=9)) == 4


def test_imports_of_status_and_query(docs: Path, tiny_checkpoint: Path) -> None:
    # What a command pays: importing the package and asking must not load LlamaIndex.
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint)
    with ChromaIndexer(docs / ".epic-rag", encoder=encoder) as indexer:
        indexer.index([docs])
    code = f"""
import sys
import epic_rag_chroma
assert not {{"chromadb", "torch", "llama_index", "llama_index.core"}} & set(sys.modules), "import"
epic_rag_chroma.ChromaIndexer({str(docs / ".epic-rag")!r}).status()
assert not {{"chromadb", "torch", "llama_index.core"}} & set(sys.modules), "status"
assert epic_rag_chroma.ChromaIndexer({str(docs / ".epic-rag")!r}).query("cats")
assert not any(name.startswith("llama_index") for name in sys.modules), "query"
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_truncated_dimension(docs: Path, tiny_checkpoint: Path) -> None:
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint, truncate_dim=16)
    with ChromaIndexer(docs / ".epic-rag", encoder=encoder) as indexer:
        indexer.index([docs])
    with ChromaIndexer(docs / ".epic-rag") as own:
        assert own.status().dimension == 16
        assert len(own.query("cats", k=9)) == 4


def test_shipped_checkpoint(docs: Path) -> None:
    (docs / "undo.md").write_text(
        "# Undo\n\nTo undo the last commit and keep its changes, reset softly to the one before it.\n"
    )
    with ChromaIndexer(docs / ".epic-rag") as indexer:
        indexer.index([docs])
        assert indexer.status().model == "epic-minilm"
        for query, path, heading in (
            ("how do I take back a commit?", "undo.md", "Undo"),
            ("when are cats awake?", "notes.txt", None),
            ("uninstall", "guide.md", "Remove"),
        ):
            best = indexer.query(query, task="docs")[0]
            assert best.path == path
            assert heading is None or best.heading_path[-1] == heading
