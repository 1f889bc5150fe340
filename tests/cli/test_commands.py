"""Every command on a real index with a tiny model, in this process."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from epic_rag import DemonstrationBank, EpicEncoder, list_checkpoints
from epic_rag.checkpoints import DEFAULT_CHECKPOINT, parse_dtype
from epic_rag.demonstrations import built_in_banks

SUMMARY = re.compile(
    r"(\d+) added, (\d+) changed, \d+ renamed, (\d+) deleted, (\d+) unchanged, (\d+) skipped; "
    r"(\d+) passages? embedded(?:, \d+ reused)? in \d+\.\d s( \(\d[\d,.]* a second\))?\n"
)


def counts(text: str) -> tuple[int, ...]:
    """Return added, changed, deleted, unchanged, skipped and embedded of the last line of `index`."""
    found = SUMMARY.fullmatch(text)
    assert found, text
    return tuple(map(int, found.groups()[:6]))


def test_index_counts_what_it_did(cli: Any, docs: Path, tiny_checkpoint: Path) -> None:
    first = cli("index", "docs", "--model", tiny_checkpoint)
    assert (first.status, first.err) == (0, "")
    assert counts(first.out)[:5] == (4, 0, 0, 0, 0)
    (docs / "undo.md").unlink()
    (docs / "notes.txt").write_text("Dogs sleep at night.\n")
    (docs / "new.md").write_text("# New\n\nSomething new.\n")
    # No model given: the index knows its own.
    second = cli("index", "docs")
    assert (second.status, second.err) == (0, "")
    assert counts(second.out)[:5] == (1, 1, 1, 2, 0)
    third = cli("index", "docs")
    assert counts(third.out) == (0, 0, 0, 4, 0, 0)
    assert "a second" not in third.out


def test_index_json(cli: Any, docs: Path, tiny_checkpoint: Path) -> None:
    result = cli("index", "docs", "--model", tiny_checkpoint, "--json")
    report = json.loads(result.out)
    assert {key: report[key] for key in ("index_dir", "added", "changed", "deleted", "unchanged", "skipped")} == {
        "index_dir": "docs/.epic-rag",
        "added": 4,
        "changed": 0,
        "deleted": 0,
        "unchanged": 0,
        "skipped": [],
    }
    assert report["chunks_embedded"] == report["chunks_total"] >= 4
    assert report["chunks_per_second"] > 0


def test_skipped_files_are_named_with_their_reason(cli: Any, docs: Path, tiny_checkpoint: Path) -> None:
    for number in range(12):
        (docs / f"broken{number:02}.pdf").write_bytes(b"%PDF-1.4 broken")
    result = cli("index", "docs", "--model", tiny_checkpoint, "--json")
    assert result.status == 0
    skipped = json.loads(result.out)["skipped"]
    assert [Path(file["path"]).name for file in skipped] == [f"broken{number:02}.pdf" for number in range(12)]
    assert all(file["reason"] for file in skipped)
    reason = skipped[0]["reason"].partition(":")[0]
    assert result.err == f"skipped: 12 files: 12 {reason}\n"
    assert cli("index", "docs").err == f"skipped: 12 files: 12 {reason}; --json lists all\n"
    for number in range(3, 12):
        (docs / f"broken{number:02}.pdf").unlink()
    lines = cli("index", "docs").err.splitlines()
    assert lines == [f"skipped: {file['path']}: {file['reason']}" for file in skipped[:3]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--exclude", "drafts/**"], 3),
        (["--include", "*.txt"], 1),
        (["--include", "*.txt", "--include", "undo.md"], 2),
    ],
)
def test_include_and_exclude(cli: Any, docs: Path, tiny_checkpoint: Path, options: list[str], expected: int) -> None:
    result = cli("index", "docs", "--model", tiny_checkpoint, *options)
    assert counts(result.out)[0] == expected


def test_settings_are_kept_and_changed_by_rebuild(cli: Any, docs: Path, tiny_checkpoint: Path) -> None:
    assert cli("index", "docs", "--model", tiny_checkpoint, "--exclude", "drafts/**").status == 0
    rebuilt = cli("index", "docs", "--chunk-tokens", "12", "--rebuild")
    assert rebuilt.status == 0
    settings = json.loads(cli("status", "--index-dir", "docs/.epic-rag", "--json").out)["settings"]
    assert settings["chunk_tokens"] == 12
    assert settings["chunk_overlap"] < 12
    assert settings["exclude"] == ["drafts/**"]
    assert cli("index", "docs", "--chunk-tokens", "200", "--rebuild").status == 0
    back = json.loads(cli("status", "--index-dir", "docs/.epic-rag", "--json").out)["settings"]
    assert (back["chunk_tokens"], back["chunk_overlap"], back["exclude"]) == (200, 20, ["drafts/**"])


def test_several_paths_share_an_index(cli: Any, docs: Path, tiny_checkpoint: Path) -> None:
    Path("more").mkdir()
    Path("more/extra.md").write_text("# Extra\n\nText from elsewhere.\n")
    result = cli("index", "docs", "more", "--model", tiny_checkpoint, "--index-dir", "one-index")
    assert counts(result.out)[0] == 5
    assert not Path("docs/.epic-rag").exists()
    hits = json.loads(cli("query", "elsewhere", "-k", "5", "--index-dir", "one-index", "--json").out)["hits"]
    assert any(hit["path"].endswith("extra.md") for hit in hits)


def test_a_single_file_is_indexed_beside_it(cli: Any, docs: Path, tiny_checkpoint: Path) -> None:
    result = cli("index", "docs/undo.md", "--model", tiny_checkpoint)
    assert counts(result.out)[0] == 1
    assert Path("docs/.epic-rag").is_dir()


def test_query_finds_the_exact_text(cli: Any, indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(indexed / "drafts")
    result = cli("query", "A draft that nobody has read.", "-k", "2", "--json")
    assert (result.status, result.err) == (0, "")
    answer = json.loads(result.out)
    assert answer["index_dir"] == str(indexed / ".epic-rag")
    assert [hit["rank"] for hit in answer["hits"]] == [1, 2]
    assert answer["hits"][0]["score"] >= answer["hits"][1]["score"]
    for hit in answer["hits"]:
        lines = (indexed / hit["path"]).read_text().splitlines()
        assert hit["text"].strip().splitlines()[0] in lines[hit["first_line"] - 1 : hit["last_line"]]


def test_query_text(cli: Any, indexed: Path) -> None:
    result = cli("query", "cats", "--index-dir", "docs/.epic-rag", "-k", "50")
    assert (result.status, result.err) == (0, "")
    heads = [
        line for line in result.out.splitlines() if re.match(r" *\d+  cosine -?\d\.\d{3}(, bm25 \d+\.\d\d)?  ", line)
    ]
    assert heads[0].startswith(" 1  ") or heads[0].startswith("1  ")
    assert any(re.search(r"  docs/notes\.txt:1-2$", line) for line in heads)
    assert any(re.search(r"  docs/install\.md:\d+(-\d+)?  Guide > Install$", line) for line in heads)


def test_demonstrations_change_the_scores(cli: Any, indexed: Path, pairs: Path, tiny_checkpoint: Path) -> None:
    built = cli("bank", "build", pairs, "--out", "mine", "--instruction", "Find it", "--model", tiny_checkpoint)
    assert built.status == 0

    def scores(*options: str) -> list[float]:
        result = cli("query", "undo", "--index-dir", "docs/.epic-rag", "--json", *options)
        assert (result.status, result.err) == (0, "")
        return [hit["score"] for hit in json.loads(result.out)["hits"]]

    with_none, with_one, with_all = (scores("--bank", "mine", "-n", str(n)) for n in (0, 1, 2))
    assert with_none != with_one != with_all
    assert scores("--bank", "mine") == with_all
    assert scores("--task", "qa") != scores("--task", "docs") == scores()


def test_environment_names_index_and_model(
    cli: Any, docs: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPIC_RAG_INDEX", "elsewhere")
    monkeypatch.setenv("EPIC_RAG_MODEL", str(tiny_checkpoint))
    assert cli("index", "docs").status == 0
    assert Path("elsewhere").is_dir()
    assert not Path("docs/.epic-rag").exists()
    assert cli("query", "cats").status == 0
    assert json.loads(cli("status", "--json").out)["files"] == 4


def test_what_the_model_computes_in(
    cli: Any, docs: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    load = EpicEncoder.from_pretrained

    def seen(*arguments: Any, **options: Any) -> EpicEncoder:
        encoder = load(*arguments, **options)
        used.append(str(encoder.dtype))
        return encoder

    monkeypatch.setattr(EpicEncoder, "from_pretrained", seen)
    fastest = str(parse_dtype("auto", torch.device("cpu")))
    assert cli("index", "docs", "--model", tiny_checkpoint).status == 0
    assert cli("query", "cats", "--index-dir", "docs/.epic-rag", "--dtype", "float32").status == 0
    monkeypatch.setenv("EPIC_RAG_DTYPE", "bfloat16")
    assert cli("query", "cats", "--index-dir", "docs/.epic-rag", "--model", tiny_checkpoint).status == 0
    assert used == [fastest, "torch.float32", "torch.bfloat16"]
    assert cli("query", "cats", "--index-dir", "docs/.epic-rag", "--dtype", "int1").status == 2
    assert cli("query", "cats", "--index-dir", "docs/.epic-rag", "--device", "cpu,cpu").status == 0
    nowhere = cli("query", "cats", "--index-dir", "docs/.epic-rag", "--device", "nowhere")
    assert nowhere.status == 1
    assert nowhere.err.startswith("error: device is 'nowhere', ")


def test_status(cli: Any, indexed: Path) -> None:
    state = json.loads(cli("status", "--index-dir", "docs/.epic-rag", "--json").out)
    assert (state["files"], state["dimension"]) == (4, 32)
    assert state["chunks"] >= 4
    assert state["settings"]["chunk_tokens"] == 200
    lines = cli("status", "--index-dir", "docs/.epic-rag").out.splitlines()
    table = dict(re.split(r"  +", line, maxsplit=1) for line in lines)
    assert table["files"] == "4"
    assert table["model"].endswith(f"({state['fingerprint']}, 32 dimensions)")
    assert table["passages"] == f"{state['chunks']} of at most 200 tokens"


def test_clear_deletes_the_index_and_nothing_else(cli: Any, indexed: Path) -> None:
    before = sorted(path for path in indexed.rglob("*") if ".epic-rag" not in path.parts)
    result = cli("clear", "--index-dir", "docs/.epic-rag", "--yes")
    assert (result.status, result.out, result.err) == (0, "", "note: deleted docs/.epic-rag\n")
    assert sorted(indexed.rglob("*")) == before


def test_clear_asks_on_a_terminal(cli: Any, indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked: list[str] = []

    def confirm(question: str, **options: Any) -> bool:
        asked.append(question)
        assert options == {"abort": True, "err": True}
        return True

    monkeypatch.setattr("typer.confirm", confirm)
    assert cli("clear", "--index-dir", "docs/.epic-rag").status == 0
    assert re.fullmatch(r"Delete docs/\.epic-rag \(\d+ passages of 4 files\)\?", asked[0])
    assert not (indexed / ".epic-rag").exists()


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
def test_models_export(cli: Any, tiny_checkpoint: Path, options: list[str], file: str) -> None:
    shutil.copytree(tiny_checkpoint, "given")
    Path("given/README.md").write_text("# A card\n")
    result = cli("models", "export", "given", "out put/here", *options)
    written = options[-1] if options else "float16"
    assert (result.status, result.out) == (0, "out put/here\n")
    assert result.err == f"note: tiny written with {written} weights\n"
    assert [path.name for path in Path("out put/here").glob("model*")] == [file]
    assert Path("out put/here/README.md").read_text() == "# A card\n"
    loaded, given = (EpicEncoder.from_pretrained(folder) for folder in ("out put/here", "given"))
    assert (loaded.fingerprint == given.fingerprint) is (written != "int8")


def test_models_export_of_a_shipped_checkpoint_opens_elsewhere(cli: Any) -> None:
    from transformers import AutoModel

    assert cli("models", "export", DEFAULT_CHECKPOINT, "exported").status == 0
    assert EpicEncoder.from_pretrained("exported").fingerprint == EpicEncoder.from_pretrained().fingerprint
    assert AutoModel.from_pretrained("exported").dtype.is_floating_point


def test_models_export_overwrites_nothing(cli: Any, tiny_checkpoint: Path) -> None:
    Path("file").write_text("")
    Path("full").mkdir()
    Path("full/notes.txt").write_text("kept")
    for target, said in (
        ("file", "file is a file, a checkpoint is a folder; give another name"),
        ("full", "full holds other files; give a new folder"),
    ):
        result = cli("models", "export", tiny_checkpoint, target)
        assert (result.status, result.out, result.err) == (1, "", f"error: {said}\n")
    result = cli("models", "export", tiny_checkpoint, "new", "--dtype", "int4")
    assert (result.status, result.out) == (1, "")
    assert "dtype is 'int4', known are float32, bfloat16, float16, int8; choose one of them" in result.err
    assert not Path("new").exists()


def test_models_merge(cli: Any, tiny_checkpoint: Path) -> None:
    shutil.copytree(tiny_checkpoint, "start")
    trained = EpicEncoder.from_pretrained("start")
    with torch.no_grad():
        for value in trained.backbone.parameters():
            value.add_(0.5)
    trained.name = "mine"
    trained.save_pretrained("trained", dtype="float32")
    result = cli("models", "merge", "trained", "start", "out put/merged", "--weight", "0.25", "--dtype", "float32")
    assert (result.status, result.out) == (0, "out put/merged\n")
    assert result.err == "note: merged is 0.75 of mine and 0.25 of tiny, with float32 weights\n"
    merged, start = (EpicEncoder.from_pretrained(folder) for folder in ("out put/merged", "start"))
    assert merged.name == "merged"
    assert Path("out put/merged/README.md").read_text().count("# merged\n") == 1
    layers = (model.backbone.transformer.parameters() for model in (merged, start))
    for value, first in zip(*layers, strict=True):
        torch.testing.assert_close(value, first + 0.375, atol=1e-5, rtol=0)
    for arguments, said in (
        (("trained", "start", "out put/merged"), "out put/merged holds other files; give a new folder"),
        (("trained", "start", "new", "--weight", "2"), "weight is 2.0; give the second model's share, from 0 to 1"),
        (("trained", DEFAULT_CHECKPOINT, "new"), "merge two models that were trained from the same one"),
    ):
        result = cli("models", "merge", *arguments)
        assert (result.status, result.out) == (1, "")
        assert result.err.startswith("error: ")
        assert said in result.err
        assert result.err.count("\n") == 1
    assert not Path("new").exists()


def test_bank_list(cli: Any) -> None:
    listed = json.loads(cli("bank", "list", "--json").out)
    assert [bank["name"] for bank in listed] == list(built_in_banks())
    assert all(bank["instruction"] and bank["num_demonstrations"] >= 8 for bank in listed)
    lines = cli("bank", "list").out.splitlines()
    assert [line.split()[0] for line in lines] == list(built_in_banks())
    assert lines[0].endswith(listed[0]["instruction"])


def test_bank_show(cli: Any) -> None:
    shown = json.loads(cli("bank", "show", "docs", "--json").out)
    assert shown["num_demonstrations"] == len(shown["demonstrations"])
    assert all(pair["query"] and pair["passage"] for pair in shown["demonstrations"])
    text = cli("bank", "show", "docs").out
    assert text.startswith(f"docs  {shown['num_demonstrations']} demonstrations, ")
    assert f"\n 1  {shown['demonstrations'][0]['query']}\n" in text


def test_bank_build_from_pairs_and_again_for_another_model(
    cli: Any, pairs: Path, tiny_checkpoint: Path, other_checkpoint: Path
) -> None:
    result = cli("bank", "build", pairs, "--out", "mine", "--instruction", "Find it", "--model", tiny_checkpoint)
    assert (result.status, result.out) == (0, "mine\n")
    assert re.fullmatch(r"note: 2 demonstrations embedded with .*\n", result.err)
    bank = DemonstrationBank.load("mine")
    assert bank.instruction == "Find it"
    assert [pair.query for pair in bank.demonstrations] == ["how do I undo it", "where is the manual"]
    assert cli("bank", "build", "mine", "--model", other_checkpoint).status == 0
    again = DemonstrationBank.load("mine")
    assert again.demonstrations == bank.demonstrations
    assert again.encoder_fingerprint not in (None, bank.encoder_fingerprint)


def test_bank_build_for_several_models(
    cli: Any, pairs: Path, tiny_checkpoint: Path, other_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [EpicEncoder.from_pretrained(folder).fingerprint for folder in (tiny_checkpoint, other_checkpoint)]
    both = ("--model", tiny_checkpoint, "--model", other_checkpoint)
    assert cli("bank", "build", pairs, "--out", "mine", "--task", "docs", *both).status == 0
    assert DemonstrationBank.load("mine").encoder_fingerprints == tuple(models)
    shown = json.loads(cli("bank", "show", "mine", "--json").out)
    assert (shown["encoder_fingerprint"], shown["encoder_fingerprints"]) == (models[0], models)
    assert f"embedded with {models[0]}, {models[1]}\n" in cli("bank", "show", "mine").out
    # Those that are not named any more are dropped; without --model it is the environment's.
    monkeypatch.setenv("EPIC_RAG_MODEL", str(other_checkpoint))
    assert cli("bank", "build", "mine").status == 0
    assert DemonstrationBank.load("mine").encoder_fingerprints == (models[1],)


def test_bank_build_writes_a_copy_with_another_instruction(cli: Any, pairs: Path, tiny_checkpoint: Path) -> None:
    model = ("--model", tiny_checkpoint)
    assert cli("bank", "build", pairs, "--out", "mine", "--task", "sts", *model).status == 0
    assert cli("bank", "build", "mine", "--out", "copy", "--instruction", "Find that", *model).status == 0
    mine, copy = DemonstrationBank.load("mine"), DemonstrationBank.load("copy")
    assert (mine.instruction != copy.instruction, copy.instruction) == (True, "Find that")
    assert mine.symmetric is copy.symmetric is True


def test_bank_build_takes_several_folders(cli: Any, pairs: Path, tiny_checkpoint: Path, other_checkpoint: Path) -> None:
    for name in ("a", "b"):
        cli("bank", "build", pairs, "--out", name, "--task", "docs", "--model", tiny_checkpoint)
    result = cli("bank", "build", "a", "b", "--model", other_checkpoint)
    assert (result.status, result.out) == (0, "a\nb\n")
    first, second = (DemonstrationBank.load(f"./{name}") for name in ("a", "b"))
    assert first.encoder_fingerprint == second.encoder_fingerprint is not None
