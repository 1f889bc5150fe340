"""The code in docs/encoder.md runs as it stands, from top to bottom."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from transformers import AutoModel

from epic_rag import EpicEncoder, checkpoints
from epic_rag_cli.main import run
from tests.conftest import make_encoder, make_tokenizer
from tests.helpers.model_files import make_adapter, make_hub_cache, write_gguf

GUIDE = Path(__file__).parents[2] / "docs" / "encoder.md"


@pytest.fixture
def guide_folder(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the guide speaks of: a shipped checkpoint, a model in the hub's cache, folders, a GGUF file, an adapter."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "_SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    make_hub_cache(tmp_path / "cache", "Qwen/Qwen3-0.6B", tiny_checkpoint)
    for folder in ("shipped/epic-minilm", "my-model", "my-llm"):
        shutil.copytree(tiny_checkpoint, tmp_path / folder)
    (tmp_path / "downloads").mkdir()
    write_gguf(make_encoder().backbone.transformer, make_tokenizer(), tmp_path / "downloads" / "model.gguf")
    make_adapter(AutoModel.from_pretrained("my-llm"), tmp_path / "my-adapter", target_modules=["q_proj"])
    return tmp_path


def test_the_guides_python_runs(guide_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len(examples) == 19
    capsys.readouterr()
    state: dict[str, object] = {}
    for example in examples:
        exec(compile(example, str(GUIDE), "exec"), state)
    assert {"from-gguf", "my-checkpoint", "my-checkpoint-half", "my-checkpoint-int8", "machine-bank"} <= {
        path.name for path in guide_folder.iterdir()
    }
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[-5:-1]] == ["epic", "text", "none", "task-vector"]
    # What the guide says that is printed.
    assert f"print(error)  # {printed[-1]}\n" in GUIDE.read_text("utf-8")


def test_the_guides_commands_run(guide_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    EpicEncoder.from_pretrained("my-model").save_pretrained("my-checkpoint")
    rows = [{"query": f"term {number}", "passage": f"what {number} means"} for number in range(12)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = re.findall(r"^    (epic-rag .*)$", GUIDE.read_text("utf-8"), re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        assert run(shlex.split(line)[1:]) == 0, line
    printed = capsys.readouterr().out
    assert all(re.search(rf"^\| pairs +\| {label} ", printed, re.MULTILINE) for label in ("before", "int8"))


@pytest.mark.parametrize(
    ("method", "first"), [(EpicEncoder.from_pretrained, "device"), (EpicEncoder.encode_query, "task")]
)
def test_the_tables_name_every_argument(method: object, first: str) -> None:
    arguments = [
        name
        for name, parameter in inspect.signature(method).parameters.items()  # type: ignore[arg-type]
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    tables = re.findall(r"((?:^\|.*\|\n)+)", GUIDE.read_text("utf-8"), re.MULTILINE)
    named = [re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) for table in tables]
    assert arguments in named
    assert arguments[0] == first


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", GUIDE.read_text("utf-8")):
        assert (GUIDE.parent / target).is_file(), target
