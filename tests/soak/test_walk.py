"""A hundred thousand small files: the walk and a run in which nothing has changed stay within bounds.

EPIC_RAG_SOAK=1 takes 100,000; the default is 2,000. The times are in runs/soak/walk.json; none is asserted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SOAK = os.environ.get("EPIC_RAG_SOAK") == "1"
FILES = 100_000 if SOAK else 2_000
MOST_BYTES_A_FILE = 4_000
REPORT = Path(__file__).parents[2] / "runs" / "soak" / "walk.json"

# In a process of its own: the most memory that it has had is what it needed, and nobody else's. The kernel's own
# `ru_maxrss` of a child begins with what its parent had.
PEAK = """
    def peak():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
"""
SCAN = """
    import json, sys, time
    from pathlib import Path
    from epic_rag_chroma.walk.files import scan
    from epic_rag_chroma.types import IndexSettings
    before = peak()
    started = time.perf_counter()
    found = scan(Path(sys.argv[1]).resolve(), IndexSettings())
    print(json.dumps({
        "files": len(found.files), "skipped": len(found.skipped),
        "seconds": round(time.perf_counter() - started, 2),
        "bytes": peak() - before,
    }))
"""
# An encoder that costs nothing: what is measured is all the rest.
INDEX = """
    import hashlib, json, sys, time
    import numpy as np
    from epic_rag_chroma import ChromaIndexer

    class Nothing:
        name = source = "nothing"
        fingerprint = "0" * 12
        dimension, truncate_dim, max_document_tokens = 8, None, 512
        def count_tokens(self, texts): return [len(text.split()) + 1 for text in texts]
        def encode_document(self, texts, **_):
            rows = np.stack([np.frombuffer(hashlib.md5(text.encode()).digest(), dtype=np.uint8)[:8] for text in texts])
            rows = rows.astype(np.float32) + 1
            return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    before = peak()
    started = time.perf_counter()
    with ChromaIndexer(sys.argv[2], encoder=Nothing()) as indexer:
        report = indexer.index([sys.argv[1]])
    print(json.dumps({
        "added": report.added, "unchanged": report.unchanged, "changed": report.changed,
        "seconds": round(time.perf_counter() - started, 2),
        "bytes": peak() - before,
    }))
"""


def run(code: str, *arguments: object) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK + code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files, a hundred in a folder, and ignore files with what such files have."""
    root = tmp_path_factory.mktemp("walk") / "files"
    for number in range(FILES):
        folder = root / f"{number // 1000:03}" / f"{number // 100 % 10}"
        if number % 100 == 0:
            folder.mkdir(parents=True)
        (folder / f"file-{number:06}.md").write_text(f"# File {number}\n\nText number {number}.\n")
    (root / ".gitignore").write_text(
        "".join(f"*.o{number}\n" for number in range(20)) + "build/\n/dist\n**/tmp/*.log\n"
    )
    (root / "loop").symlink_to(root)
    (root / "more").mkdir()
    for number in range(FILES // 100):
        (root / "more" / f"{number}.png").write_bytes(b"\x89PNG")
    return root


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of the memory is read from /proc")
def test_many_small_files(tree: Path, tmp_path: Path) -> None:
    walked = run(SCAN, tree)
    assert (walked["files"], walked["skipped"]) == (FILES, FILES // 100)
    assert walked["bytes"] < 32 * 2**20 + FILES * MOST_BYTES_A_FILE
    first = run(INDEX, tree, tmp_path / "index")
    assert first["added"] == FILES
    again = run(INDEX, tree, tmp_path / "index")
    assert (again["unchanged"], again["added"], again["changed"]) == (FILES, 0, 0)
    assert again["bytes"] < 256 * 2**20 + FILES * MOST_BYTES_A_FILE
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps({"files": FILES, "walk": walked, "index": first, "unchanged": again}, indent=2) + "\n")
