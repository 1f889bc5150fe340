"""The worker process: the same documents, limits on time and memory, no process left behind."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from epic_rag.errors import ConfigError, MissingExtraError
from epic_rag_chroma.reading.document import BrokenFileError, Document, NotTextError
from epic_rag_chroma.reading.reader import read_document
from epic_rag_chroma.reading.worker import IsolatedReader, document_from_json, document_to_json
from tests.helpers.sample_files import SAMPLES

posix = pytest.mark.skipif(os.name != "posix", reason="the limit is one of POSIX systems")

# A module that stands before the real one on the worker's path, and a file that makes it misbehave.
PARSER = """
import os, re, sys, time

def rtf_to_text(text, **_):
    command = text.removeprefix("{\\\\rtf ")
    if command == "hang":
        time.sleep(600)
    if command == "spin":
        while True:
            pass
    if command == "backtrack":
        re.match("(a+)+$", "a" * 60 + "b")  # nothing else runs meanwhile, no thread and no handler of a signal
    if command == "grow":
        return "x" * 2**40
    if command == "die":
        os.kill(os.getpid(), 11)
    if command == "leave":
        os._exit(3)
    if command == "print":
        print("noise", flush=True)
        os.write(1, b"more noise")
        sys.stderr.write("noise")
    if command == "fail":
        raise ZeroDivisionError("no")
    return f"{command} {os.getpid()}"
"""


def rtf(command: str) -> bytes:
    """A file that has PARSER run a command."""
    return b"{\\rtf " + command.encode()


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has workers parse RTF with PARSER."""
    folder = tmp_path / "path"
    (folder / "striprtf").mkdir(parents=True)
    (folder / "striprtf" / "__init__.py").touch()
    (folder / "striprtf" / "striprtf.py").write_text(PARSER)
    monkeypatch.syspath_prepend(str(folder))


@pytest.fixture
def reader() -> Iterator[IsolatedReader]:
    with IsolatedReader(seconds=20) as made:
        yield made


def text(document: Document) -> str:
    return "\n".join(document.lines)


def test_same_documents_without_torch_and_chroma(
    reader: IsolatedReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {name: read_document(name, data) for name, data in SAMPLES.items()}
    for module in ("torch", "chromadb", "llama_index", "transformers", "numpy"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, data in SAMPLES.items():
        assert reader.read(name, data) == expected[name], name


def test_document_round_trip() -> None:
    empty = Document([], [])
    assert set(document_to_json(empty)) == {part.name for part in dataclasses.fields(Document)}
    assert document_from_json(document_to_json(empty)) == empty


def test_worker_is_reused_and_ended(hostile: None) -> None:
    with IsolatedReader() as reader:
        assert not reader.has_worker
        first = text(reader.read("a.rtf", rtf("one")))
        assert text(reader.read("b.rtf", rtf("one"))) == first
        worker = psutil.Process(int(first.split()[1]))
        assert worker.parent() == psutil.Process()
    assert not worker.is_running()


def test_memory_of_the_parent_does_not_count(hostile: None) -> None:
    held = bytearray(b"x") * (300 * 2**20)  # as a model would be
    with IsolatedReader(memory_mib=400) as reader:
        first = text(reader.read("a.rtf", rtf("one")))
        assert text(reader.read("b.rtf", rtf("one"))) == first
    assert len(held) == 300 * 2**20


def test_working_directory_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("json", "logging", "justhtml"):
        (tmp_path / f"{module}.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    with IsolatedReader() as reader:
        assert text(reader.read("a.html", b"<p>fine")) == "fine"
    assert not (tmp_path / "ran").exists()


def test_plain_text_without_worker(reader: IsolatedReader) -> None:
    assert reader.read("a.txt", b"one\ntwo").lines == ["one", "two"]
    assert not reader.has_worker


@pytest.mark.parametrize("command", ["hang", "spin"])
def test_time_limit(hostile: None, command: str) -> None:
    with IsolatedReader(seconds=0.5) as reader:
        with pytest.raises(BrokenFileError, match=r"takes longer than 0\.5 s to read"):
            reader.read("a.rtf", rtf(command))
        assert text(reader.read("a.rtf", rtf("next"))).startswith("next")


@posix
def test_memory_limit(hostile: None, reader: IsolatedReader) -> None:
    with pytest.raises(BrokenFileError, match="needs more than 2048 MiB"):
        reader.read("a.rtf", rtf("grow"))
    assert not reader.has_worker
    assert text(reader.read("a.rtf", rtf("next"))).startswith("next")


@posix
@pytest.mark.parametrize(("command", "reason"), [("die", "SIGSEGV"), ("leave", "exit status 3")])
def test_crash(hostile: None, reader: IsolatedReader, command: str, reason: str) -> None:
    with pytest.raises(BrokenFileError, match=rf"crashes its parser \({reason}\)"):
        reader.read("a.rtf", rtf(command))
    assert text(reader.read("a.rtf", rtf("next"))).startswith("next")


def test_output_of_a_parser(hostile: None, reader: IsolatedReader) -> None:
    assert text(reader.read("a.rtf", rtf("print"))).startswith("print")
    assert text(reader.read("a.rtf", rtf("next"))).startswith("next")


def test_reasons(hostile: None, reader: IsolatedReader) -> None:
    with pytest.raises(BrokenFileError, match=r"^a broken RTF document: ZeroDivisionError: no$"):
        reader.read("a.rtf", rtf("fail"))
    with pytest.raises(NotTextError, match="not text"):
        reader.read("a.html", b"\0")


def test_missing_package_in_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pypdfium2.py").write_text("raise ModuleNotFoundError(name=__name__)")
    monkeypatch.syspath_prepend(str(tmp_path))
    with IsolatedReader() as reader, pytest.raises(MissingExtraError, match=r"epic-rag\[index\]") as caught:
        reader.read("a.pdf", b"")
    assert caught.value.package == "pypdfium2"


@pytest.mark.parametrize("variable", ["EPIC_RAG_FILE_SECONDS", "EPIC_RAG_FILE_MEMORY_MIB"])
def test_limits_from_the_environment(variable: str, hostile: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("0", "-1", "much", "nan", "inf"):
        monkeypatch.setenv(variable, wrong)
        with pytest.raises(ConfigError, match=f"{variable} is '{wrong}'"):
            IsolatedReader()
    monkeypatch.setenv("EPIC_RAG_FILE_SECONDS", "0.5")
    monkeypatch.setenv("EPIC_RAG_FILE_MEMORY_MIB", "1024")
    with IsolatedReader() as reader, pytest.raises(BrokenFileError, match=r"longer than 0\.5 s"):
        reader.read("a.rtf", rtf("hang"))


@posix
@pytest.mark.parametrize(
    ("end", "command", "seconds"),
    [
        (signal.SIGINT, "backtrack", 60),
        (signal.SIGKILL, "spin", 60),
        (signal.SIGTERM, "hang", 60),
        (signal.SIGKILL, "backtrack", 2),
    ],
)
def test_no_worker_outlives_its_indexer(hostile: None, end: signal.Signals, command: str, seconds: int) -> None:
    program = textwrap.dedent(
        """
        import sys
        from epic_rag_chroma.reading.worker import IsolatedReader
        sys.path[:] = eval(sys.argv[1])
        with IsolatedReader(seconds=int(sys.argv[2])) as reader:
            print(reader.read("a.rtf", b"{\\\\rtf first").lines[0].split()[1], flush=True)
            reader.read("a.rtf", b"{\\\\rtf " + sys.argv[3].encode())
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, repr(sys.path), str(seconds), command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.3)
        parent.send_signal(end)
        parent.wait(10)
    # After Ctrl-C it is gone already. Whoever takes over an orphan may leave it a zombie.
    psutil.wait_procs([worker], timeout=1 if end is signal.SIGINT else 20)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
