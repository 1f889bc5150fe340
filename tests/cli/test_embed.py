"""`epic-rag embed`."""

from __future__ import annotations

import gzip
import io
import json
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epic_rag import EpicEncoder

LINES = ["To undo a commit, reset softly.", "", "Cats  sleep. ", "猫", "To undo a commit, reset softly."]


@pytest.fixture
def embed(cli: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command, with bytes on standard input."""

    def call(*options: object, stdin: bytes = b"") -> Any:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        return cli("embed", "--model", tiny_checkpoint, "--dtype", "float32", *options)

    return call


def vectors(out: str) -> Any:
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["index"] for row in rows] == list(range(len(rows)))
    return np.array([row["embedding"] for row in rows], np.float32)


def test_every_line_of_standard_input_has_a_vector(embed: Any, tiny_encoder: EpicEncoder) -> None:
    text = "\r\n".join(LINES).encode()
    expected = tiny_encoder.encode_document(LINES)
    for stdin in (text, text + b"\r\n", b"\xef\xbb\xbf" + text):
        done = embed(stdin=stdin)
        assert (done.status, done.err) == (0, "")
        np.testing.assert_array_equal(vectors(done.out), expected)  # the decimals are those of the float32
    assert embed("-", stdin=text).out == done.out


def test_queries(embed: Any, tiny_encoder: EpicEncoder) -> None:
    def found(*options: str) -> Any:
        return vectors(embed("--role", "query", *options, stdin=b"undo it\n").out)[0]

    np.testing.assert_array_equal(found(), tiny_encoder.encode_query("undo it", task="docs"))
    np.testing.assert_array_equal(found("--task", "qa"), tiny_encoder.encode_query("undo it", task="qa"))
    expected = tiny_encoder.encode_query("undo it", bank="docs", num_demonstrations=2)
    np.testing.assert_array_equal(found("--bank", "docs", "-n", "2"), expected)
    narrow = tiny_encoder.encode_query("undo it", task="docs", truncate_dim=8)
    np.testing.assert_array_equal(found("--dims", "8"), narrow)


def test_files(embed: Any, tmp_path: Path, tiny_encoder: EpicEncoder) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three\\nfour", "id": 7}\n\n{"text": "", "other": 1}\n')
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "five", "id": "x"}\n')
    files = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.jsonl.gz")]
    done = embed(*files)
    texts = ["one", "two", "three\nfour", "", "five"]
    np.testing.assert_array_equal(vectors(done.out), tiny_encoder.encode_document(texts))
    assert [json.loads(line).get("id") for line in done.out.splitlines()] == [None, None, 7, None, "x"]
    whole = embed("--read", "file", files[0])
    np.testing.assert_array_equal(vectors(whole.out), tiny_encoder.encode_document(["one\ntwo\n"]))
    assert json.loads(whole.out)["id"] == str(files[0])
    lines = embed("--read", "jsonl", stdin=b'{"text": "five"}')
    np.testing.assert_array_equal(vectors(lines.out), tiny_encoder.encode_document(["five"]))


def test_many_lines_are_encoded_in_groups(embed: Any, tiny_encoder: EpicEncoder) -> None:
    lines = [f"line {number}" for number in range(600)]
    done = embed("--dims", "4", stdin="\n".join(lines).encode())
    expected = tiny_encoder.encode_document(lines, truncate_dim=4)
    np.testing.assert_allclose(vectors(done.out), expected, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_numpy_files(rows: int, embed: Any, tmp_path: Path, tiny_encoder: EpicEncoder) -> None:
    lines = [f"line {number}" for number in range(rows)]
    file = tmp_path / "v.npy"
    done = embed("-o", file, stdin="".join(f"{line}\n" for line in lines).encode())
    assert (done.status, done.out, done.err) == (0, "", "")
    found = np.load(file)
    assert (found.dtype, found.shape) == (np.float32, (rows, tiny_encoder.dimension))
    np.testing.assert_allclose(found, tiny_encoder.encode_document(lines), atol=1e-6)
    assert list(tmp_path.glob(".v*")) == []


def test_a_numpy_file_on_standard_output(tiny_checkpoint: Path, tiny_encoder: EpicEncoder) -> None:
    command = [sys.executable, "-m", "epic_rag_cli", "embed", "--model", str(tiny_checkpoint)]
    command += ["--dtype", "float32", "--format", "npy"]
    done = subprocess.run(command, input=b"one\ntwo\n", capture_output=True, check=True, timeout=120)
    found = np.load(io.BytesIO(done.stdout))
    np.testing.assert_allclose(found, tiny_encoder.encode_document(["one", "two"]), atol=1e-6)


def test_an_output_file_is_replaced_only_by_a_complete_one(embed: Any, tmp_path: Path) -> None:
    file = tmp_path / "v.jsonl"
    file.write_text("old")
    file.chmod(0o640)
    failed = embed("-o", file, stdin=b"one\n" * 300 + b"\xff\n")
    assert (failed.status, failed.out, file.read_text()) == (1, "", "old")
    assert "standard input:301 is not UTF-8 (byte 0)" in failed.err
    done = embed("-o", file, stdin=b"one\n")
    assert vectors(file.read_text()).shape[0] == 1
    assert (done.status, stat.S_IMODE(file.stat().st_mode)) == (0, 0o640)
    assert list(tmp_path.glob(".v*")) == []


def test_bad_input_has_a_remedy(embed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    (tmp_path / "worse.jsonl").write_text("[]\n")
    for options, status, part in (
        ([tmp_path / "none"], 1, "does not exist. Check"),
        ([tmp_path], 1, "directory. Check the path"),
        ([tmp_path / "bad.jsonl"], 1, 'bad.jsonl:2: "text" must be a string. Write'),
        ([tmp_path / "worse.jsonl"], 1, "worse.jsonl:1 is not a JSON object"),
        (["--dims", "999"], 1, "Choose 1 to"),
        (["--dims", "0"], 2, "--dims"),
        (["--bank", "docs"], 2, "Add --role query"),
        (["--task", "docs"], 2, "Add --role query"),
        (["--role", "query", "-n", "2"], 2, "needs --bank"),
        (["--role", "query", "--bank", "nowhere"], 1, "no demonstration bank"),
        (["--role", "other"], 2, "--role"),
        (["-o", tmp_path], 1, "is a folder"),
        (["-o", tmp_path / "none" / "v.npy"], 1, "cannot be written"),
    ):
        done = embed(*options, stdin=b"one\n")
        assert (done.status, part in done.err) == (status, True), done
        assert "Traceback" not in done.err
    monkeypatch.setenv("EPIC_RAG_BANK", "docs")
    assert embed(stdin=b"one\n").status == 0  # the variable is for queries
