"""The pipeline without a cluster, which runs the same code; `test_cluster.py` runs it on one."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epic_rag.errors import ConfigError, DataError, FingerprintError
from epic_rag_chroma import IndexLockedError, IndexSettings
from epic_rag_ray import PipelineSettings, RunProgress, VectorParts, embedding_vectors, read_progress, run_pipeline
from epic_rag_ray.storage import Storage
from tests.helpers.free_encoder import calls, free_encoder
from tests.helpers.indexes import write_tree
from tests.helpers.parts import contents

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "omicron",
    "pi",
    "rho",
    "sigma",
    "tau",
]


def text_of(number: int) -> str:
    """A text of some words that no other number has."""
    return " ".join(WORDS[(number * 7 + place * place) % 19] for place in range(12)) + f" number{number}"


def corpus(folder: Path, count: int) -> Path:
    return write_tree(folder, {f"{number // 10}/{number}.txt": text_of(number) for number in range(count)})


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "calls.log"


@pytest.fixture
def options(log: Path) -> PipelineSettings:
    return PipelineSettings(model=partial(free_encoder, str(log)), rows=8)


def test_every_document_has_a_row_with_its_vector(tmp_path: Path, options: PipelineSettings) -> None:
    docs = corpus(tmp_path / "docs", 30)
    events: list[RunProgress] = []
    report = run_pipeline([docs], tmp_path / "out", options, progress=events.append)
    assert (report.added, report.rows, report.embedded, report.generation) == (30, 30, 30, 1)
    rows = contents(tmp_path / "out")
    assert sorted(row["text"] for row in rows.values()) == sorted(text_of(number) for number in range(30))
    encoder = free_encoder()
    for row in rows.values():
        np.testing.assert_array_equal(row["embedding"], encoder.encode_document(row["text"]))
        assert (docs / row["path"]).read_text() == row["text"]
        assert (row["root"], row["first_line"], row["kind"]) == (str(docs), 1, "text")
    assert [event.stage for event in events if event.state == "complete"] == ["storing"]
    done = [event.done for event in events if event.stage == "embedding"]
    assert done == sorted(done)
    assert done[-1] == 30
    assert read_progress(Storage(tmp_path / "out")).state == "complete"
    parts = VectorParts(tmp_path / "out")
    assert parts.info.fingerprint == encoder.fingerprint
    assert [parts.storage.read_schema(name).metadata[b"epic_rag"] for name in parts.files()]


def test_ids_and_metadata_are_those_of_an_index(tmp_path: Path, options: PipelineSettings) -> None:
    from epic_rag_chroma import ChromaIndexer

    files: dict[str, str | bytes] = {
        "a.md": "---\ntag: x\n---\n# A\n\nText one.\n\n## B\n\nText two.\n",
        "b.py": "def f():\n    return 1\n",
    }
    docs = write_tree(tmp_path / "docs", files)
    run_pipeline([docs], tmp_path / "out", options)
    with ChromaIndexer(tmp_path / "index", encoder=free_encoder(), chroma="none") as indexer:
        indexer.index([docs])
        passages = {passage.text: passage for passage in indexer.passages()}
    rows = contents(tmp_path / "out")
    assert {row["text"] for row in rows.values()} == set(passages)
    for row in rows.values():
        passage = passages[row["text"]]
        assert (row["path"], row["first_line"], row["last_line"]) == (
            passage.path,
            passage.first_line,
            passage.last_line,
        )
        np.testing.assert_allclose(row["embedding"], passage.vector, atol=1e-6)


def test_a_run_without_changes_writes_nothing(tmp_path: Path, options: PipelineSettings, log: Path) -> None:
    docs = corpus(tmp_path / "docs", 20)
    run_pipeline([docs], tmp_path / "out", options)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    log.unlink()
    report = run_pipeline([], tmp_path / "out", options)
    assert (report.generation, report.unchanged, report.embedded, report.rows) == (1, 20, 0, 20)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")} == before
    assert calls(log) == []


def test_changed_documents_alone_are_embedded(tmp_path: Path, options: PipelineSettings, log: Path) -> None:
    docs = corpus(tmp_path / "docs", 100)
    run_pipeline([docs], tmp_path / "out", options)
    before = {path: path.read_bytes() for path in (tmp_path / "out/parts").iterdir()}
    old = contents(tmp_path / "out")
    log.unlink()
    for number in (3, 50, 77, 78):
        (docs / f"{number // 10}/{number}.txt").write_text(text_of(1000 + number))
    (docs / "2/20.txt").unlink()
    report = run_pipeline([docs], tmp_path / "out", options)
    assert (report.changed, report.deleted, report.unchanged, report.embedded) == (4, 1, 95, 4)
    assert sum(count for _, count in calls(log)) == 4
    assert {path: path.read_bytes() for path in before} == before
    rows = contents(tmp_path / "out")
    texts = {row["text"] for row in rows.values()}
    assert texts == {text_of(n if n not in (3, 50, 77, 78) else 1000 + n) for n in range(100) if n != 20}
    assert VectorParts(tmp_path / "out").deleted(since=1) == sorted(old.keys() - rows.keys())


def test_a_renamed_document_keeps_its_vector(tmp_path: Path, options: PipelineSettings, log: Path) -> None:
    docs = corpus(tmp_path / "docs", 20)
    run_pipeline([docs], tmp_path / "out", options)
    log.unlink()
    (docs / "0").rename(docs / "zero")
    report = run_pipeline([docs], tmp_path / "out", options)
    assert (report.embedded, report.copied, report.rows) == (0, 10, 20)
    assert calls(log) == []
    rows = contents(tmp_path / "out")
    assert {row["path"].split("/")[0] for row in rows.values()} == {"zero", "1"}
    for row in rows.values():
        np.testing.assert_array_equal(row["embedding"], free_encoder().encode_document(row["text"]))


def test_moved_lines_are_updated_without_the_model(tmp_path: Path, options: PipelineSettings, log: Path) -> None:
    docs = write_tree(tmp_path / "docs", {"a.md": "# A\n\nFirst text.\n\n# B\n\nSecond text.\n"})
    run_pipeline([docs], tmp_path / "out", options)
    log.unlink()
    (docs / "a.md").write_text("# New\n\nAdded.\n\n# A\n\nFirst text.\n\n# B\n\nSecond text.\n")
    report = run_pipeline([docs], tmp_path / "out", options)
    assert (report.embedded, report.copied, report.rows, report.rows_deleted) == (1, 2, 3, 0)
    rows = contents(tmp_path / "out")
    assert sorted((row["heading_path"], row["first_line"]) for row in rows.values()) == [("A", 5), ("B", 9), ("New", 1)]
    assert VectorParts(tmp_path / "out").deleted(since=1) == []


def test_one_percent_of_broken_files_costs_nothing_else(tmp_path: Path, options: PipelineSettings) -> None:
    docs = corpus(tmp_path / "docs", 98)
    (docs / "bad.pdf").write_bytes(b"%PDF-1.4 broken")
    (docs / "bad.docx").write_bytes(b"PK\x03\x04 broken")
    report = run_pipeline([docs], tmp_path / "out", options)
    assert sorted(Path(file.path).name for file in report.skipped) == ["bad.docx", "bad.pdf"]
    assert all(file.reason for file in report.skipped)
    assert report.rows == 98
    again = run_pipeline([docs], tmp_path / "out", options)
    assert (again.generation, len(again.skipped), again.unchanged) == (1, 2, 98)
    # A file that can be read again joins.
    (docs / "bad.pdf").unlink()
    (docs / "bad.docx").unlink()
    (docs / "bad.txt").write_text("good now")
    assert run_pipeline([docs], tmp_path / "out", options).rows == 99


def test_a_document_that_breaks_keeps_its_rows(tmp_path: Path, options: PipelineSettings) -> None:
    docs = write_tree(
        tmp_path / "docs",
        {
            "a.ipynb": json.dumps(
                {
                    "cells": [{"cell_type": "markdown", "source": ["Hello there"], "metadata": {}}],
                    "metadata": {},
                    "nbformat": 4,
                    "nbformat_minor": 5,
                }
            ),
            "b.txt": "other",
        },
    )
    run_pipeline([docs], tmp_path / "out", options)
    (docs / "a.ipynb").write_text("{broken")
    report = run_pipeline([docs], tmp_path / "out", options)
    assert [Path(file.path).name for file in report.skipped] == ["a.ipynb"]
    assert report.rows == 2


def test_a_text_without_a_finite_vector_is_listed(tmp_path: Path) -> None:
    docs = write_tree(tmp_path / "docs", {"a.txt": "a fox", "b.txt": "a dog"})
    report = run_pipeline([docs], tmp_path / "out", PipelineSettings(model=partial(free_encoder, broken="fox")))
    assert [(file.path, "finite" in file.reason) for file in report.skipped] == [("a.txt", True)]
    assert (report.rows, len(contents(tmp_path / "out"))) == (1, 1)


def test_duplicates_are_left_out_and_counted(tmp_path: Path, options: PipelineSettings, log: Path) -> None:
    long = " ".join(f"{word}{number}" for number in range(6) for word in WORDS)
    files: dict[str, str | bytes] = {
        "a.txt": long,
        "b.txt": long,
        "c.txt": long + " end",
        "d.txt": text_of(1),
        "e.txt": text_of(2),
    }
    docs = write_tree(tmp_path / "docs", files)
    report = run_pipeline([docs], tmp_path / "out", options)
    assert (report.exact_duplicates, report.near_duplicates, report.rows) == (1, 1, 3)
    assert sum(count for _, count in calls(log)) == 3
    assert {row["path"] for row in contents(tmp_path / "out").values()} == {"a.txt", "d.txt", "e.txt"}
    listed = Storage(tmp_path / "out").read_table("duplicates/000001.parquet").to_pylist()
    assert sorted(row["kind"] for row in listed) == ["exact", "near"]
    # The text stays when the document that was kept goes.
    (docs / "a.txt").unlink()
    report = run_pipeline([docs], tmp_path / "out", options)
    assert (report.rows, report.copied, report.embedded) == (3, 1, 0)
    assert {row["path"] for row in contents(tmp_path / "out").values()} == {"b.txt", "d.txt", "e.txt"}


@pytest.mark.parametrize(("rule", "rows"), [("exact", 2), ("keep", 3)])
def test_other_rules_for_duplicates(tmp_path: Path, options: PipelineSettings, rule: str, rows: int) -> None:
    long = " ".join(f"{word}{number}" for number in range(6) for word in WORDS)
    docs = write_tree(tmp_path / "docs", {"a.txt": long, "b.txt": long, "c.txt": long + " end"})
    changed = PipelineSettings(model=options.model, duplicates=rule)  # type: ignore[arg-type]
    assert run_pipeline([docs], tmp_path / "out", changed).rows == rows


def test_archives_of_json_lines(tmp_path: Path, options: PipelineSettings, log: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    lines = [
        json.dumps({"_id": f"d{number}", "title": f"T{number}", "text": text_of(number), "metadata": {"year": 2020}})
        for number in range(20)
    ]
    lines[5:5] = ["{broken", "[]", '{"title": "no text"}', '{"text": "\\ud800 lone"}']
    with gzip.open(docs / "corpus.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    report = run_pipeline([docs], tmp_path / "out", options)
    assert report.rows == 21
    assert [file.path.rpartition("!")[2] for file in report.skipped] == ["6", "7", "8"]
    rows = contents(tmp_path / "out").values()
    row = next(row for row in rows if row["path"] == "d3")
    assert (row["root"], row["heading_path"], row["text"]) == (f"{docs}/corpus.jsonl.gz", "T3", text_of(3))
    assert json.loads(row["front_matter"]) == {"year": "2020"}
    again = run_pipeline([], tmp_path / "out", options)
    assert (again.skipped, again.rows, again.generation) == (report.skipped, 21, 1)
    # A new version of the archive: only what differs is embedded.
    log.unlink()
    with gzip.open(docs / "corpus.jsonl.gz", "wt") as file:
        file.write("\n".join([*lines[:-1], json.dumps({"_id": "new", "text": "something else entirely"})]))
    report = run_pipeline([docs], tmp_path / "out", options)
    assert (report.embedded, report.rows, report.rows_deleted) == (1, 21, 1)


def test_a_damaged_archive_keeps_what_was_before_the_damage(tmp_path: Path, options: PipelineSettings) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    data = gzip.compress("\n".join(json.dumps({"id": n, "text": text_of(n)}) for n in range(5000)).encode())
    (docs / "cut.jsonl.gz").write_bytes(data[: len(data) * 2 // 3])
    report = run_pipeline([docs], tmp_path / "out", options)
    assert 1000 < report.rows < 5000
    assert ["damaged" in file.reason for file in report.skipped] == [True]


def warc_record(address: str, status: str, kind: str, body: bytes) -> bytes:
    response = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    head = (
        f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {address}\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
        "WARC-Record-ID: <urn:uuid:12345678-feb0-11e6-8f83-68a86d1772ce>\r\n"
        f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(response)}\r\n\r\n"
    )
    return gzip.compress(head.encode() + response + b"\r\n\r\n")


def test_archives_of_web_pages(tmp_path: Path, options: PipelineSettings) -> None:
    pages = [
        ("http://a.org/x", "200 OK", "text/html", b"<h1>Head</h1><p>A page about foxes.</p>"),
        ("http://a.org/y", "404 Not Found", "text/html", b"<p>Gone</p>"),
        ("http://a.org/z", "200 OK", "image/png", b"PNG"),
        ("http://a.org/p", "200 OK", "application/pdf", b"broken"),
    ]
    docs = write_tree(tmp_path / "docs", {"crawl.warc.gz": b"".join(warc_record(*page) for page in pages)})
    report = run_pipeline([docs], tmp_path / "out", options)
    (row,) = contents(tmp_path / "out").values()
    assert (row["path"], row["kind"], row["heading_path"], row["root"]) == (
        "http://a.org/x",
        "html",
        "Head",
        f"{docs}/crawl.warc.gz",
    )
    assert [file.path.rpartition("!")[2] for file in report.skipped] == ["http://a.org/p"]


def test_other_file_systems(tmp_path: Path, options: PipelineSettings) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for number in range(12):
        memory.pipe(f"/corpus/docs/{number}.txt", text_of(number).encode())
    memory.pipe("/corpus/docs/.hidden.txt", b"hidden")
    memory.pipe("/corpus/docs/photo.png", b"\x89PNG")
    memory.pipe("/corpus/more.jsonl.gz", gzip.compress(json.dumps({"text": "in an archive"}).encode()))
    report = run_pipeline(["memory:///corpus"], "memory:///vectors", options)
    assert (report.rows, [file.reason for file in report.skipped]) == (13, ["not text: a picture"])
    memory.pipe("/corpus/docs/3.txt", text_of(99).encode() + b" and more")
    memory.rm("/corpus/docs/4.txt")
    report = run_pipeline(["memory:///corpus"], "memory:///vectors", options)
    assert (report.rows, report.embedded, report.deleted) == (12, 1, 1)
    assert {row["root"] for row in contents("memory:///vectors").values()} == {"memory:///corpus", "memory:///corpus/more.jsonl.gz"}  # fmt: skip


def test_a_folder_belongs_to_one_model_and_its_settings(
    tmp_path: Path, options: PipelineSettings, tiny_checkpoint: Path
) -> None:
    docs = corpus(tmp_path / "docs", 3)
    run_pipeline([docs], tmp_path / "out", options)
    with pytest.raises(FingerprintError, match=r"vectors of free .* Write to another folder"):
        run_pipeline([docs], tmp_path / "out", PipelineSettings(model=str(tiny_checkpoint)))
    for changed in (
        PipelineSettings(model=options.model, vectors="float16"),
        PipelineSettings(model=options.model, duplicates="keep"),
        PipelineSettings(model=options.model, index=IndexSettings(chunk_tokens=50)),
    ):
        with pytest.raises(ConfigError, match="was made with"):
            run_pipeline([docs], tmp_path / "out", changed)


def test_errors_name_a_remedy(tmp_path: Path, options: PipelineSettings) -> None:
    with pytest.raises(DataError, match="No such file or folder"):
        run_pipeline([tmp_path / "missing"], tmp_path / "out", options)
    with pytest.raises(ConfigError, match="nothing to index"):
        run_pipeline([], tmp_path / "out", options)
    with pytest.raises(DataError, match="no vectors of a complete run"):
        VectorParts(tmp_path / "out")
    with pytest.raises(DataError, match="no run"):
        read_progress(str(tmp_path / "other"))
    with pytest.raises(DataError, match="cannot be opened"):
        Storage("nosuch://x")
    docs = corpus(tmp_path / "docs", 3)
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(IndexLockedError, match="Another run"):
        run_pipeline([docs], tmp_path / "out", options)
    run_pipeline([docs], tmp_path / "out", options)
    part = next((tmp_path / "out/parts").iterdir())
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        contents(tmp_path / "out")


def test_a_root_that_is_missing_deletes_nothing(tmp_path: Path, options: PipelineSettings) -> None:
    docs, more = corpus(tmp_path / "docs", 3), corpus(tmp_path / "more", 2)
    run_pipeline([docs, more], tmp_path / "out", options)
    more.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="No such file or folder"):
        run_pipeline([docs], tmp_path / "out", options)
    assert VectorParts(tmp_path / "out").count() == 3


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.dictionaries(st.integers(0, 9), st.integers(-1, 12), max_size=6), min_size=1, max_size=4))
def test_after_any_changes_the_rows_are_those_of_a_new_run(
    steps: list[dict[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("changes")
    docs = folder / "docs"
    docs.mkdir()
    (docs / "always.txt").write_text("always here")
    options = PipelineSettings(model=free_encoder, rows=3)
    for step in steps:
        for name, content in step.items():
            file = docs / f"{name}.md"
            if content < 0:
                file.unlink(missing_ok=True)
            else:
                file.write_text(f"# {name % 3}\n\n{text_of(content)}\n\n# Other\n\n{text_of(content % 4)}\n")
                os.utime(file, ns=(time.time_ns(), time.time_ns()))
        run_pipeline([docs], folder / "out", options)
    run_pipeline([docs], folder / "new", options)
    found, expected = contents(folder / "out"), contents(folder / "new")
    # Of duplicates another one may have been kept.
    assert sorted(row["embedded_hash"] for row in found.values()) == sorted(
        row["embedded_hash"] for row in expected.values()
    )
    for id_ in found.keys() & expected.keys():
        assert {name: value for name, value in found[id_].items() if name != "embedding"} == {
            name: value for name, value in expected[id_].items() if name != "embedding"
        }
        np.testing.assert_array_equal(found[id_]["embedding"], expected[id_]["embedding"])


RUN = """
import sys
from functools import partial
from epic_rag_ray import PipelineSettings, run_pipeline
from tests.helpers.free_encoder import free_encoder
docs, out, log = sys.argv[1:]
run_pipeline([docs], out, PipelineSettings(model=partial(free_encoder, log, 0.05), rows=8))
"""


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, options: PipelineSettings, log: Path) -> None:
    docs = corpus(tmp_path / "docs", 200)
    run_pipeline([docs], tmp_path / "whole", options)
    log.unlink()
    kills = 0
    for batches in (1, 7, 15):
        command = [sys.executable, "-c", RUN, str(docs), str(tmp_path / "out"), str(log)]
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
        while len(calls(log)) < batches and process.poll() is None:
            time.sleep(0.02)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
            process.wait()
            state = read_progress(str(tmp_path / "out"))
            assert (state.state, state.seconds_left) == ("interrupted", None)
        process.wait()
    report = run_pipeline([], tmp_path / "out", options)
    assert report.resumed
    assert kills == 3
    found, expected = contents(tmp_path / "out"), contents(tmp_path / "whole")
    assert found.keys() == expected.keys()
    for id_, row in found.items():
        np.testing.assert_array_equal(row["embedding"], expected[id_]["embedding"])
        assert row["text"] == expected[id_]["text"]
    embedded = sum(count for _, count in calls(log))
    assert 200 <= embedded <= 200 + kills * 8


def test_parts_keep_a_float16_column(tmp_path: Path, options: PipelineSettings) -> None:
    docs = corpus(tmp_path / "docs", 5)
    run_pipeline([docs], tmp_path / "out", PipelineSettings(model=options.model, vectors="float16"))
    parts = VectorParts(tmp_path / "out")
    (table,) = parts.tables(["embedding", "text"])
    assert table.schema.field("embedding").type == pa.list_(pa.float16(), 16)
    np.testing.assert_allclose(
        embedding_vectors(table), free_encoder().encode_document(table["text"].to_pylist()), atol=1e-3
    )
