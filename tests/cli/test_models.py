"""`epic-rag models`: list and export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from epic_rag import EpicEncoder, list_checkpoints
from epic_rag.checkpoints import DEFAULT_CHECKPOINT


def test_models(cli: Any) -> None:
    names = [info.name for info in list_checkpoints()]
    assert [info["name"] for info in json.loads(cli("models", "--json").out)] == names
    assert [line.removeprefix("*").split()[0] for line in cli("models").out.splitlines()] == names


@pytest.mark.parametrize(
    ("options", "file"),
    [
        ([], "model.safetensors"),
        (["--dtype", "float32"], "model.safetensors"),
        (["--dtype", "int8"], "model-int8-00001-of-00001.safetensors"),
    ],
)
def test_export(cli: Any, tiny_checkpoint: Path, options: list[str], file: str) -> None:
    shutil.copytree(tiny_checkpoint, "given")
    Path("given/README.md").write_text("# A card\n")
    result = cli("models", "export", "given", "out put/here", *options)
    written = options[-1] if options else "float16"
    assert (result.status, result.out) == (0, "out put/here\n")
    assert result.err == f"note: tiny written with {written} weights.\n"
    assert [path.name for path in Path("out put/here").glob("model*")] == [file]
    assert Path("out put/here/README.md").read_text() == "# A card\n"
    loaded, given = (EpicEncoder.from_pretrained(folder) for folder in ("out put/here", "given"))
    assert (loaded.fingerprint == given.fingerprint) is (written != "int8")


def test_export_of_a_shipped_checkpoint(cli: Any) -> None:
    from transformers import AutoModel

    assert cli("models", "export", DEFAULT_CHECKPOINT, "exported").status == 0
    assert EpicEncoder.from_pretrained("exported").fingerprint == EpicEncoder.from_pretrained().fingerprint
    assert AutoModel.from_pretrained("exported").dtype.is_floating_point


def test_export_overwrites_nothing(cli: Any, tiny_checkpoint: Path) -> None:
    Path("file").write_text("")
    Path("full").mkdir()
    Path("full/notes.txt").write_text("kept")
    for target, said in (
        ("file", "file is a file, a checkpoint is a folder. Pass another name."),
        ("full", "full holds other files. Pass a new folder."),
    ):
        result = cli("models", "export", tiny_checkpoint, target)
        assert (result.status, result.out, result.err) == (1, "", f"error: {said}\n")
    result = cli("models", "export", tiny_checkpoint, "new", "--dtype", "int4")
    assert (result.status, result.out) == (1, "")
    assert "Unknown dtype 'int4'. Choose one of float32, bfloat16, float16, int8." in result.err
    assert not Path("new").exists()


def test_show(cli: Any, tiny_checkpoint: Path) -> None:
    result = cli("models", "show", str(tiny_checkpoint), "--json")
    facts = {fact["name"]: fact for fact in json.loads(result.out)}
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint)
    assert facts["fingerprint"]["value"] == encoder.fingerprint
    assert facts["dimensions"] == {"name": "dimensions", "value": str(encoder.dimension), "source": "checkpoint"}
    lines = cli("models", "show", str(tiny_checkpoint)).out.splitlines()
    assert [line.split("  ")[0] for line in lines] == list(facts)


def test_show_says_what_is_guessed(cli: Any, tiny_checkpoint: Path) -> None:
    folder = Path("e5-small-v2")
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "epic.json").unlink()
    facts = {fact["name"]: fact for fact in json.loads(cli("models", "show", str(folder), "--json").out)}
    assert facts["query prompt"]["value"] == "'query: '"
    assert "guessed from its name: model card of intfloat" in facts["query prompt"]["source"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tei:nowhere", "has no address"),
        ("ollama:tiny@http://127.0.0.1:9", "does not answer"),
        ("onnx:no-such-folder", "There is no checkpoint no-such-folder"),
    ],
)
def test_show_of_a_model_that_is_not_there(cli: Any, name: str, message: str) -> None:
    result = cli("models", "show", name)
    assert result.status == 1
    assert message in result.err
    assert "Traceback" not in result.err
