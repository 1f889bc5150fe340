"""`epic-rag index` on files of every format: indexed, skipped with a reason, interrupted."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.sample_files import SAMPLES, make_book, make_odt

# Stands before the real one on the path of the process that parses.
ENDLESS_PARSER = """
import os, pathlib
pathlib.Path(os.environ["STARTED"]).write_text(str(os.getpid()))
while True:
    pass
"""


def test_every_format(cli: Any, tiny_checkpoint: Path) -> None:
    folder = Path.cwd() / "files"
    folder.mkdir()
    for name, data in SAMPLES.items():
        (folder / name).write_bytes(data)
    (folder / "bomb.epub").write_bytes(make_book(extra={"a.xhtml": b"\0" * (64 * 2**20)}))
    (folder / "locked.odt").write_bytes(make_odt(extra={"META-INF/manifest.xml": "<encryption-data/>"}))
    (folder / "broken.docx").write_bytes(SAMPLES["a.docx"][:5000])
    (folder / "photo.jpg").write_bytes(b"\xff\xd8\xff")

    result = cli("index", "files", "--model", tiny_checkpoint, "--json")
    assert result.status == 0, result.err
    report = json.loads(result.out)
    assert report["added"] == len(SAMPLES)
    assert {file["path"]: file["reason"] for file in report["skipped"]} == {
        "bomb.epub": "a part that is compressed more than 250 times in this EPUB book",
        "broken.docx": "a broken Word document: File is not a zip file",
        "locked.odt": "an encrypted OpenDocument file",
        "photo.jpg": "not text: a picture",
    }

    result = cli("query", "Ishmael stuffed a shirt", "--index-dir", "files/.epic-rag", "--json", "-k", 100)
    assert result.status == 0, result.err
    hits = json.loads(result.out)["hits"]
    places = {hit["path"]: (hit["page"], hit["first_line"]) for hit in hits if hit["path"] in ("a.docx", "a.pptx")}
    assert places["a.docx"] == (None, None)
    assert places["a.pptx"][0] in (1, 2, 3)


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_ctrl_c_while_a_file_is_parsed(cli: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("files").mkdir()
    Path("files/a.pdf").write_bytes(SAMPLES["a.pdf"])
    Path("path").mkdir()
    Path("path/pypdfium2.py").write_text(ENDLESS_PARSER)
    started = Path.cwd() / "started"
    monkeypatch.setenv("STARTED", str(started))
    monkeypatch.setattr(sys, "path", [str(Path.cwd() / "path"), *sys.path])  # the worker process gets it
    workers: list[psutil.Process] = []

    def press() -> None:
        while not (started.exists() and started.read_text()):
            time.sleep(0.02)
        workers.append(psutil.Process(int(started.read_text())))
        # A terminal signals every process of the group.
        workers[0].send_signal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    result = cli("index", "files", "--model", tiny_checkpoint)
    assert (result.status, result.out) == (130, "")
    assert result.err.startswith("error: Interrupted")
    thread.join(60)
    assert not workers[0].is_running()
