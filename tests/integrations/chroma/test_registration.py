"""Registration with Chroma: in either order of the imports, and without importing chromadb."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import chromadb
import pytest

from epic_rag_chroma import EpicEmbeddingFunction

_PROGRAM = """
import importlib.util, sys
{imports}
assert chromadb.__spec__.loader is chromadb.__loader__ and type(chromadb.__loader__).__name__ == "SourceFileLoader"
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("epic_rag")]
with chromadb.PersistentClient(sys.argv[1]) as client:
    print(client.get_collection("notes").query(query_texts=["undo"], n_results=1)["ids"])
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import chromadb, epic_rag_chroma",
        "import epic_rag_chroma\nassert 'chromadb' not in sys.modules\nimport chromadb",
        "import epic_rag_chroma\nassert importlib.util.find_spec('chromadb')\nfrom chromadb.api import types\nimport chromadb",
    ],
)
def test_a_collection_opens_by_its_name(imports: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with chromadb.PersistentClient(str(tmp_path / "db")) as client:  # type: ignore[attr-defined]
        collection = client.create_collection("notes", embedding_function=EpicEmbeddingFunction(tiny_checkpoint))
        collection.upsert(ids=["a"], documents=["Reset softly."])
    command = [sys.executable, "-c", _PROGRAM.format(imports=imports), str(tmp_path / "db")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert (done.stdout, done.returncode) == ("[['a']]\n", 0), done.stderr


def test_chroma_stays_importable_without_the_function() -> None:
    program = (
        "import sys\nimport epic_rag_chroma\nsys.modules['epic_rag_chroma.embedding_function'] = None\n"
        "import chromadb\nprint(chromadb.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=False)
    assert done.stdout == "chromadb\n"
    assert "is not registered with Chroma" in done.stderr
