"""`ChromaIndexer`: from folders to hits, kept up to date."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epic_rag import EpicEncoder
from epic_rag.errors import (
    ConfigError,
    DataError,
    IndexMismatchError,
    IndexNotFoundError,
    IndexStateError,
)
from epic_rag_chroma import ChromaIndexer, IndexProgress, IndexReport, IndexSettings

Rows = Callable[[Path], dict[str, tuple[str, dict[str, Any], list[float]]]]
Tree = Callable[[Path, dict[str, str | bytes]], Path]


def counts(report: IndexReport) -> tuple[int, int, int, int]:
    return report.added, report.changed, report.deleted, report.unchanged


def test_hits_name_the_lines_that_show_their_text(indexer: ChromaIndexer, docs: Path) -> None:
    report = indexer.index([docs])
    assert counts(report) == (3, 0, 0, 0)
    assert report.chunks_embedded == report.chunks_total == 4
    hits = indexer.query("cats", k=10)
    assert [hit.rank for hit in hits] == [1, 2, 3, 4]
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    for hit in hits:
        assert Path(hit.root) == docs
        lines = (Path(hit.root) / hit.path).read_text().split("\n")
        assert "\n".join(lines[hit.first_line - 1 : hit.last_line]) == hit.text  # type: ignore[operator]
    assert {(hit.path, hit.heading_path) for hit in hits} == {
        ("guide.md", ("Guide", "Install")),
        ("guide.md", ("Guide", "Remove")),
        ("notes.txt", ()),
        ("src/tool.py", ()),
    }


def test_scores_are_cosines(indexer: ChromaIndexer, docs: Path, tiny_encoder: EpicEncoder) -> None:
    indexer.index([docs])
    text = (docs / "notes.txt").read_text().strip()
    for query in ("cats", text):
        expected = tiny_encoder.similarity(tiny_encoder.encode_query(query), tiny_encoder.encode_document([text]))[0, 0]
        hit = next(hit for hit in indexer.query(query, k=10) if hit.path == "notes.txt")
        assert hit.score == pytest.approx(float(expected), abs=1e-4)


def test_a_query_takes_a_task_a_bank_and_demonstrations(indexer: ChromaIndexer, docs: Path) -> None:
    from epic_rag import DemonstrationBank

    indexer.index([docs])
    bank = DemonstrationBank([("where do cats sleep", "Cats sleep in the sun.")], instruction="Find it")
    scores = [
        [hit.score for hit in indexer.query("cats", **arguments)]
        for arguments in ({}, {"task": "docs"}, {"bank": bank}, {"bank": bank, "num_demonstrations": 0}, {"k": 4})
    ]
    assert len({tuple(each) for each in scores}) == 4
    assert scores[0] == scores[4]


def test_only_what_changed_is_embedded_again(indexer: ChromaIndexer, docs: Path, rows: Rows) -> None:
    indexer.index([docs])
    assert counts(indexer.index([docs])) == (0, 0, 0, 3)
    before = rows(docs / ".epic-rag")
    guide = docs / "guide.md"
    guide.write_text("Before.\n\n" + guide.read_text().replace("Delete", "Remove"))
    (docs / "notes.txt").unlink()
    (docs / "new.md").write_text("# New\n\nText.\n")
    report = indexer.index([docs])
    assert counts(report) == (1, 1, 1, 1)
    # "Before.", the changed section and the new file; the section that only moved keeps its vector
    assert (report.chunks_embedded, report.chunks_total) == (3, 5)
    after = rows(docs / ".epic-rag")
    moved = [row for row in after if row in before and after[row][1]["first_line"] != before[row][1]["first_line"]]
    assert len(moved) == 1
    assert after[moved[0]][1]["first_line"] == before[moved[0]][1]["first_line"] + 2
    assert after[moved[0]][2] == before[moved[0]][2]
    assert not any(metadata["path"] == "notes.txt" for _, metadata, _ in after.values())
    assert len({metadata["content_hash"] for _, metadata, _ in after.values() if metadata["path"] == "guide.md"}) == 1


def test_an_edit_that_keeps_size_and_time_is_seen(indexer: ChromaIndexer, docs: Path) -> None:
    indexer.index([docs])
    notes = docs / "notes.txt"
    info = notes.stat()
    notes.write_text(notes.read_text().replace("Cats", "Dogs"))
    os.utime(notes, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert counts(indexer.index([docs])) == (0, 1, 0, 2)
    assert any(hit.text.startswith("Dogs") for hit in indexer.query("x", k=10))


def test_an_old_unchanged_file_is_not_read(indexer: ChromaIndexer, docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from epic_rag_chroma import manifest, sync

    indexer.index([docs])
    monkeypatch.setattr(manifest, "_RACY_NS", -(10**18))  # as if the files had been old when they were read
    monkeypatch.setattr(sync, "read_document", lambda *_: pytest.fail("parsed"))
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read"))
    assert counts(indexer.index([docs])) == (0, 0, 0, 3)


def test_touched_files_are_unchanged(indexer: ChromaIndexer, docs: Path) -> None:
    indexer.index([docs])
    for path in docs.glob("*.*"):
        os.utime(path, (1, 1))
    report = indexer.index([docs])
    assert (counts(report), report.chunks_embedded) == ((0, 0, 0, 3), 0)


def test_the_folder_can_be_moved(indexer: ChromaIndexer, docs: Path, tiny_encoder: EpicEncoder, rows: Rows) -> None:
    indexer.index([docs])
    before = rows(docs / ".epic-rag")
    indexer.close()
    moved = Path(shutil.move(docs, docs.parent / "elsewhere"))
    for file in (moved / ".epic-rag").glob("*.json"):
        assert str(docs) not in file.read_text()
    with ChromaIndexer(moved / ".epic-rag", encoder=tiny_encoder) as again:
        assert Path(again.query("cats")[0].root) == moved
        assert again.status().roots == (str(moved),)
        report = again.index([moved])
        assert (counts(report), report.chunks_embedded) == ((0, 0, 0, 3), 0)
    assert rows(moved / ".epic-rag") == before


def test_several_roots_and_single_files(
    tmp_path: Path, docs: Path, tree: Tree, tiny_encoder: EpicEncoder, rows: Rows
) -> None:
    more = tree(tmp_path / "more", {"notes.txt": "Of more.\n", "a.md": "A.\n", "b.md": "B.\n"})
    with ChromaIndexer(tmp_path / "index", encoder=tiny_encoder) as indexer:
        assert indexer.index([docs, more / "notes.txt"]).added == 4
        # a path inside a root means the root; a root that holds others takes their place
        assert counts(indexer.index([docs / "src"])) == (0, 0, 0, 4)
        assert indexer.status().roots == (str(docs), str(more / "notes.txt"))
        assert counts(indexer.index([more])) == (2, 0, 0, 4)
        (more / "a.md").unlink()
        assert counts(indexer.index([])) == (0, 0, 1, 5)
        assert {(Path(hit.root).name, hit.path) for hit in indexer.query("x", k=20)} == {
            ("docs", "guide.md"), ("docs", "notes.txt"), ("docs", "src/tool.py"), ("more", "b.md"), ("more", "notes.txt"),
        }  # fmt: skip
    assert len(rows(tmp_path / "index")) == 6


def test_a_single_file_that_is_gone_leaves_the_index(tmp_path: Path, tree: Tree, tiny_encoder: EpicEncoder) -> None:
    folder = tree(tmp_path / "docs", {"a.md": "A.\n", "b.md": "B.\n"})
    with ChromaIndexer(tmp_path / "index", encoder=tiny_encoder) as indexer:
        indexer.index([folder / "a.md", folder / "b.md"])
        (folder / "a.md").unlink()
        assert counts(indexer.index([folder / "b.md"])) == (0, 0, 1, 1)
        assert indexer.status().roots == (str(folder / "b.md"),)


def test_a_root_that_is_gone_keeps_its_chunks(
    tmp_path: Path, docs: Path, tree: Tree, tiny_encoder: EpicEncoder
) -> None:
    away = tree(tmp_path / "away", {"a.md": "A.\n"})
    with ChromaIndexer(tmp_path / "index", encoder=tiny_encoder) as indexer:
        indexer.index([docs, away])
        shutil.rmtree(away)
        report = indexer.index([docs])
        assert counts(report) == (0, 0, 0, 3)
        assert [(file.path, "gone" in file.reason) for file in report.skipped] == [(str(away), True)]
        assert any(hit.path == "a.md" for hit in indexer.query("x", k=20))


def test_files_that_cannot_be_read_keep_their_chunks(
    indexer: ChromaIndexer, docs: Path, pdf: Callable[[list[str]], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    (docs / "paper.pdf").write_bytes(pdf(["Hello from one", "Second page"]))
    indexer.index([docs])
    (docs / "paper.pdf").write_bytes(b"%PDF-1.4 cut off")
    (docs / "broken.pdf").write_bytes(b"%PDF-1.4 never good")
    (docs / "notes.txt").write_text("changed\n")
    (docs / "photo.md").write_bytes(b"\x89PNG\0\0")
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "notes.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    report = indexer.index([docs])
    assert counts(report) == (0, 0, 0, 2)
    reasons = {file.path: file.reason for file in report.skipped}
    assert reasons["notes.txt"] == "cannot be read: Permission denied"
    assert reasons["photo.md"] == "not text"
    assert all(reasons[name].startswith("a broken PDF") for name in ("paper.pdf", "broken.pdf"))
    hits = indexer.query("x", k=20)
    assert {(hit.path, hit.page) for hit in hits if hit.page} == {("paper.pdf", 1), ("paper.pdf", 2)}
    assert any(hit.text.startswith("Cats") for hit in hits)
    monkeypatch.undo()
    assert counts(indexer.index([docs])) == (0, 1, 0, 2)


def test_a_file_that_is_no_longer_text_leaves_the_index(indexer: ChromaIndexer, docs: Path) -> None:
    indexer.index([docs])
    (docs / "notes.txt").write_bytes(b"\0\1\2")
    assert counts(indexer.index([docs])) == (0, 0, 1, 2)


def test_a_folder_that_cannot_be_listed_keeps_its_chunks(
    indexer: ChromaIndexer, docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexer.index([docs])
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("src"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    report = indexer.index([docs])
    assert counts(report) == (0, 0, 0, 2)
    assert report.chunks_total == 4


def test_a_parser_that_fails_costs_one_file(
    indexer: ChromaIndexer, docs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from epic_rag_chroma import sync

    read = sync.read_document

    def fail(name: str, data: bytes) -> Any:
        if name == "guide.md":
            raise RecursionError("too deep")
        return read(name, data)

    monkeypatch.setattr(sync, "read_document", fail)
    report = indexer.index([docs])
    assert (report.added, [file.path for file in report.skipped]) == (2, ["guide.md"])


def test_files_that_are_too_large_are_skipped(
    indexer: ChromaIndexer, docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from epic_rag_chroma import sync

    monkeypatch.setattr(sync, "byte_limit", lambda name: 60)
    report = indexer.index([docs])
    assert report.added == 1
    assert {file.path for file in report.skipped} == {"guide.md", "src/tool.py"}


def test_empty_files_and_empty_folders(
    indexer: ChromaIndexer, docs: Path, tmp_path: Path, tiny_encoder: EpicEncoder
) -> None:
    (docs / "empty.md").write_text("")
    (docs / "blank.txt").write_text("\n \n")
    assert counts(indexer.index([docs])) == (5, 0, 0, 0)
    assert counts(indexer.index([docs])) == (0, 0, 0, 5)
    (tmp_path / "nothing").mkdir()
    with ChromaIndexer(tmp_path / "nothing/.epic-rag", encoder=tiny_encoder) as empty:
        assert empty.index([tmp_path / "nothing"]).chunks_total == 0
        assert empty.query("x") == []


def test_other_patterns_are_taken_over(indexer: ChromaIndexer, docs: Path) -> None:
    indexer.index([docs], settings=IndexSettings(include=("*.md",)))
    assert indexer.status().files == 1
    assert counts(indexer.index([docs])) == (0, 0, 0, 1)
    assert counts(indexer.index([docs], settings=IndexSettings(exclude=("*.md",)))) == (2, 0, 1, 0)
    assert indexer.status().settings.exclude == ("*.md",)


def test_other_chunk_sizes_need_a_rebuild(indexer: ChromaIndexer, docs: Path, rows: Rows) -> None:
    indexer.index([docs], settings=IndexSettings(chunk_tokens=60, chunk_overlap=5))
    before = rows(docs / ".epic-rag")
    with pytest.raises(IndexMismatchError, match=r"60 tokens, 5 shared, you asked for 30.*--rebuild"):
        indexer.index([docs], settings=IndexSettings(chunk_tokens=30, chunk_overlap=5))
    assert rows(docs / ".epic-rag") == before
    assert indexer.index([docs], settings=IndexSettings(chunk_tokens=30, chunk_overlap=5), rebuild=True).added == 3
    assert len(rows(docs / ".epic-rag")) > len(before)
    assert indexer.status().settings.chunk_tokens == 30


def test_chunk_sizes_that_cannot_work(indexer: ChromaIndexer, docs: Path, tiny_encoder: EpicEncoder) -> None:
    limit = tiny_encoder.max_document_tokens
    with pytest.raises(ConfigError, match=rf"{limit + 1} tokens .* {limit - 2} .*--chunk-tokens {limit - 2}"):
        indexer.index([docs], settings=IndexSettings(chunk_tokens=limit + 1))
    assert not (docs / ".epic-rag").exists()
    for tokens, overlap in ((0, 0), (10, 10), (10, -1)):
        with pytest.raises(ConfigError):
            IndexSettings(chunk_tokens=tokens, chunk_overlap=overlap)


def test_another_model_needs_a_rebuild(
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
            f"index was built with {first.name} ({first.fingerprint}), you asked for {second.name} "
            f"({second.fingerprint}); run `epic-rag index --rebuild ./docs`"
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


def test_another_version_of_the_chunks_needs_a_rebuild(indexer: ChromaIndexer, docs: Path) -> None:
    indexer.index([docs])
    path = docs / ".epic-rag/index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chunker_version": 0}))
    with pytest.raises(IndexMismatchError, match=r"version 0 of the chunks, this is version 1; .*--rebuild"):
        indexer.index([docs])
    indexer.index([docs], rebuild=True)
    assert counts(indexer.index([docs])) == (0, 0, 0, 3)


@pytest.mark.parametrize("broken", ["{", "[]", "{}", '{"format_version": 1, "format": "other"}'])
def test_a_broken_index_file_is_mended_by_a_rebuild(indexer: ChromaIndexer, docs: Path, broken: str) -> None:
    indexer.index([docs])
    (docs / ".epic-rag/index.json").write_text(broken)
    for call in (indexer.status, lambda: indexer.query("x"), lambda: indexer.index([docs])):
        with pytest.raises(IndexStateError, match=r"index\.json cannot be read.*`epic-rag index --rebuild`"):
            call()
    assert counts(indexer.index([docs], rebuild=True)) == (3, 0, 0, 0)
    assert len(indexer.query("x", k=9)) == 4


def test_an_index_of_a_newer_format_is_left_alone(indexer: ChromaIndexer, docs: Path) -> None:
    indexer.index([docs])
    (docs / ".epic-rag/index.json").write_text('{"format_version": 99}')
    with pytest.raises(IndexStateError, match="format 99, this version of epic-rag reads 1; run `pip install"):
        indexer.index([docs])


def test_no_index(tmp_path: Path) -> None:
    indexer = ChromaIndexer(tmp_path / "none")
    for call in (indexer.status, indexer.clear, lambda: indexer.query("x")):
        with pytest.raises(IndexNotFoundError, match=r"no index in .*none; run `epic-rag index PATH`"):
            call()
    assert not (tmp_path / "none").exists()


def test_missing_paths_and_bad_arguments(indexer: ChromaIndexer, docs: Path) -> None:
    with pytest.raises(DataError, match=r"no such file or folder: .*missing"):
        indexer.index([docs, docs / "missing"])
    with pytest.raises(DataError, match="no path is given"):
        indexer.index([])
    assert not (docs / ".epic-rag").exists()
    indexer.index([docs])
    with pytest.raises(ConfigError, match="k is 0"):
        indexer.query("x", k=0)


def test_a_folder_with_other_things_is_refused(docs: Path, tiny_encoder: EpicEncoder) -> None:
    with pytest.raises(IndexStateError, match=r"docs holds guide\.md and no index\.json.*--index-dir"):
        ChromaIndexer(docs, encoder=tiny_encoder).index([docs])
    assert sorted(path.name for path in docs.iterdir()) == ["guide.md", "notes.txt", "src"]


def test_a_model_that_cannot_be_loaded_leaves_nothing(docs: Path) -> None:
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


def test_batches_are_sorted_by_length_and_bounded(
    docs: Path, tree: Tree, tiny_encoder: EpicEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from epic_rag_chroma import sync

    monkeypatch.setattr(sync, "_BATCH_CHUNKS", 16)
    monkeypatch.setattr(sync, "_SLICE_CHUNKS", 4)
    tree(docs, {f"many{n}.txt": "word " * (n % 7 + 1) + f"\n\n{n}\n" for n in range(40)})
    sizes: list[list[int]] = []
    encode = EpicEncoder.encode_document

    def spy(self: EpicEncoder, texts: Any, **options: Any) -> Any:
        sizes.append(self.count_tokens(texts))
        return encode(self, texts, **options)

    monkeypatch.setattr(EpicEncoder, "encode_document", spy)
    with ChromaIndexer(docs / ".epic-rag", encoder=tiny_encoder) as indexer:
        report = indexer.index([docs])
    assert sum(map(len, sizes)) == report.chunks_embedded == 44
    assert max(map(len, sizes)) <= 4
    first_batch = [size for batch in sizes[:4] for size in batch]
    assert first_batch == sorted(first_batch)


def test_a_vector_that_is_not_finite_is_not_stored(
    indexer: ChromaIndexer, docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_unchanged_files_cost_no_model_work_in_a_fresh_process(docs: Path, tiny_checkpoint: Path) -> None:
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


def test_a_width_that_was_cut_is_kept(docs: Path, tiny_checkpoint: Path) -> None:
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint, truncate_dim=16)
    with ChromaIndexer(docs / ".epic-rag", encoder=encoder) as indexer:
        indexer.index([docs])
    with ChromaIndexer(docs / ".epic-rag") as own:
        assert own.status().dimension == 16
        assert len(own.query("cats", k=9)) == 4


def test_settings_can_be_replaced_one_by_one() -> None:
    assert replace(IndexSettings(), include=("*.md",)).chunk_tokens == 200
