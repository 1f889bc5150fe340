"""Many small files: the memory of a walk, and of a run in which nothing has changed, stays within bounds.

EPIC_RAG_SOAK=1 takes 100,000 files; the default is 500. Times are reported, not asserted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.helpers.soak import SOAK, report

FILES = 100_000 if SOAK else 500
MAX_BYTES_PER_FILE = 4_000

# Measured in a new process each, by VmHWM: a child's `ru_maxrss` begins with the memory of its parent.
PEAK = """
    import json, sys, time
    from pathlib import Path
    from epic_rag_chroma import IndexSettings

    def peak():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

    def measured(**facts):
        facts.update(seconds=round(time.perf_counter() - started, 2), bytes=peak() - before)
        print(json.dumps(facts))
"""
SCAN = """
    from epic_rag_chroma.walk.files import scan
    before, started = peak(), time.perf_counter()
    found = scan(Path(sys.argv[1]).resolve(), IndexSettings())
    measured(files=len(found.files), skipped=len(found.skipped))
"""
INDEX = """
    from epic_rag_chroma import ChromaIndexer
    from tests.helpers.fork_server import HashEncoder
    before, started = peak(), time.perf_counter()
    with ChromaIndexer(sys.argv[2], encoder=HashEncoder()) as indexer:
        indexed = indexer.index([sys.argv[1]], settings=IndexSettings(chunk_tokens=100))
    measured(added=indexed.added, unchanged=indexed.unchanged, changed=indexed.changed)
"""


def run(code: str, *arguments: object) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK + code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files, a hundred in a folder, with an ignore file, a link to itself and binary files."""
    root = tmp_path_factory.mktemp("walk") / "files"
    for number in range(FILES):
        folder = root / f"{number // 1000:03}" / f"{number // 100 % 10}"
        if number % 100 == 0:
            folder.mkdir(parents=True)
        (folder / f"file-{number:06}.md").write_text(f"# File {number}\n\nText number {number}.\n")
    patterns = [f"*.o{number}" for number in range(20)] + ["build/", "/dist", "**/tmp/*.log"]
    (root / ".gitignore").write_text("\n".join(patterns) + "\n")
    (root / "loop").symlink_to(root)
    (root / "more").mkdir()
    for number in range(FILES // 100):
        (root / "more" / f"{number}.png").write_bytes(b"\x89PNG")
    return root


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of the memory is read from /proc")
def test_many_small_files(tree: Path, tmp_path: Path) -> None:
    walked = run(SCAN, tree)
    assert (walked["files"], walked["skipped"]) == (FILES, FILES // 100)
    assert walked["bytes"] < 32 * 2**20 + FILES * MAX_BYTES_PER_FILE
    first = run(INDEX, tree, tmp_path / "index")
    assert first["added"] == FILES
    again = run(INDEX, tree, tmp_path / "index")
    assert (again["unchanged"], again["added"], again["changed"]) == (FILES, 0, 0)
    assert again["bytes"] < 256 * 2**20 + FILES * MAX_BYTES_PER_FILE
    report("walk", {"files": FILES, "walk": walked, "index": first, "unchanged": again})
