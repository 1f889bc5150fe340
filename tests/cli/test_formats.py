"""`epic-rag index` on files of every format, in a process of its own: found, refused with a reason, ended by Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
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


def test_every_format_is_indexed_and_found(process: Any, tiny_checkpoint: Path) -> None:
    folder = Path.cwd() / "files"
    folder.mkdir()
    for name, data in SAMPLES.items():
        (folder / name).write_bytes(data)
    (folder / "bomb.epub").write_bytes(make_book(extra={"a.xhtml": b"\0" * (64 * 2**20)}))
    (folder / "locked.odt").write_bytes(make_odt(extra={"META-INF/manifest.xml": "<encryption-data/>"}))
    (folder / "broken.docx").write_bytes(SAMPLES["a.docx"][:5000])
    (folder / "photo.jpg").write_bytes(b"\xff\xd8\xff")

    result = process("index", "files", "--model", tiny_checkpoint, "--json")
    assert result.status == 0, result.err
    report = json.loads(result.out)
    assert report["added"] == len(SAMPLES)
    assert {file["path"]: file["reason"] for file in report["skipped"]} == {
        "bomb.epub": "a part that is compressed more than 250 times in this EPUB book",
        "broken.docx": "a broken Word document: File is not a zip file",
        "locked.odt": "an encrypted OpenDocument file",
        "photo.jpg": "not text",
    }

    result = process("query", "Ishmael stuffed a shirt", "--index-dir", "files/.epic-rag", "--json", "-k", 100)
    assert result.status == 0, result.err
    hits = json.loads(result.out)["hits"]
    places = {hit["path"]: (hit["page"], hit["first_line"]) for hit in hits if hit["path"] in ("a.docx", "a.pptx")}
    assert places["a.docx"] == (None, None)
    assert places["a.pptx"][0] in (1, 2, 3)


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_ctrl_c_while_a_file_is_parsed_leaves_no_process(tiny_checkpoint: Path) -> None:
    folder = Path.cwd() / "files"
    folder.mkdir()
    (folder / "a.pdf").write_bytes(SAMPLES["a.pdf"])
    hostile = Path.cwd() / "path"
    hostile.mkdir()
    (hostile / "pypdf.py").write_text(ENDLESS_PARSER)
    started = Path.cwd() / "started"
    with subprocess.Popen(
        [sys.executable, "-m", "epic_rag_cli", "index", "files", "--model", str(tiny_checkpoint)],
        env={**os.environ, "PYTHONPATH": str(hostile), "STARTED": str(started)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        deadline = time.monotonic() + 100
        while not (started.exists() and started.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        worker = psutil.Process(int(started.read_text()))
        os.killpg(child.pid, signal.SIGINT)  # as a terminal does it: to every process of the group
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err.startswith("error: interrupted")
    assert not worker.is_running()
