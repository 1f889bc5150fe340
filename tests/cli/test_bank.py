"""`epic-rag bank`: list, show and build."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.bank_report import BankReport
from epic_rag.demonstrations import built_in_banks


def test_list(cli: Any) -> None:
    listed = json.loads(cli("bank", "list", "--json").out)
    assert [bank["name"] for bank in listed] == list(built_in_banks())
    assert all(bank["instruction"] and bank["num_demonstrations"] >= 8 for bank in listed)
    lines = cli("bank", "list").out.splitlines()
    assert [line.split()[0] for line in lines] == list(built_in_banks())
    assert lines[0].endswith(listed[0]["instruction"])
    assert {line.split()[0] for line in lines if line.split()[2] == "off"} == {
        bank["name"] for bank in listed if not bank["enabled"]
    }


def test_show(cli: Any) -> None:
    shown = json.loads(cli("bank", "show", "docs", "--json").out)
    assert shown["num_demonstrations"] == len(shown["demonstrations"])
    assert all(pair["query"] and pair["passage"] for pair in shown["demonstrations"])
    text = cli("bank", "show", "docs").out
    assert text.startswith(f"docs  {shown['num_demonstrations']} demonstrations, ")
    assert f"\n 1  {shown['demonstrations'][0]['query']}\n" in text


def test_build_from_pairs_and_for_another_model(
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


def test_build_for_several_models(
    cli: Any, pairs: Path, tiny_checkpoint: Path, other_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [EpicEncoder.from_pretrained(folder).fingerprint for folder in (tiny_checkpoint, other_checkpoint)]
    both = ("--model", tiny_checkpoint, "--model", other_checkpoint)
    assert cli("bank", "build", pairs, "--out", "mine", "--task", "docs", *both).status == 0
    assert DemonstrationBank.load("mine").encoder_fingerprints == tuple(models)
    shown = json.loads(cli("bank", "show", "mine", "--json").out)
    assert (shown["encoder_fingerprint"], shown["encoder_fingerprints"]) == (models[0], models)
    assert f"embedded with {models[0]}, {models[1]}\n" in cli("bank", "show", "mine").out
    # Embeddings of other models are deleted; without --model it is the environment's.
    monkeypatch.setenv("EPIC_RAG_MODEL", str(other_checkpoint))
    assert cli("bank", "build", "mine").status == 0
    assert DemonstrationBank.load("mine").encoder_fingerprints == (models[1],)


def test_build_a_copy_with_another_instruction(cli: Any, pairs: Path, tiny_checkpoint: Path) -> None:
    model = ("--model", tiny_checkpoint)
    assert cli("bank", "build", pairs, "--out", "mine", "--task", "sts", *model).status == 0
    assert cli("bank", "build", "mine", "--out", "copy", "--instruction", "Find that", *model).status == 0
    mine, copy = DemonstrationBank.load("mine"), DemonstrationBank.load("copy")
    assert (mine.instruction != copy.instruction, copy.instruction) == (True, "Find that")
    assert mine.symmetric is copy.symmetric is True


def test_build_several_folders(cli: Any, pairs: Path, tiny_checkpoint: Path, other_checkpoint: Path) -> None:
    for name in ("a", "b"):
        cli("bank", "build", pairs, "--out", name, "--task", "docs", "--model", tiny_checkpoint)
    result = cli("bank", "build", "a", "b", "--model", other_checkpoint)
    assert (result.status, result.out) == (0, "a\nb\n")
    first, second = (DemonstrationBank.load(f"./{name}") for name in ("a", "b"))
    assert first.encoder_fingerprint == second.encoder_fingerprint is not None


def write_pairs(count: int, *, name: str = "many.jsonl") -> Path:
    """A file of pairs with a line between that is empty, so that a pair's line is not its number."""
    lines = [json.dumps({"query": f"question {row}", "passage": f"answer number {row}"}) for row in range(count)]
    file = Path.cwd() / name
    file.write_text("\n".join([lines[0], "", *lines[1:], lines[2]]) + "\n", encoding="utf-8")
    return file


def test_build_measures_the_gain_and_lists_pairs_by_line(cli: Any, tiny_checkpoint: Path) -> None:
    result = cli("bank", "build", write_pairs(20), "--out", "mine", "--task", "docs", "--model", tiny_checkpoint)
    assert (result.status, result.out) == (0, "mine\n")
    assert re.search(r"Expected gain in nDCG@10 among 21 passages: [+-]\d+\.\d\d \(95% interval ", result.err)
    assert re.search(r"recall@10 \d\.\d\d\.", result.err)
    assert "Repeated pairs: lines 22. Check these pairs." in result.err
    assert cli("bank", "build", "mine", "--model", tiny_checkpoint).err.count("Repeated pairs: demonstrations 21.") == 1


def test_build_against_an_index(cli: Any, indexed: Path, other_checkpoint: Path) -> None:
    file = write_pairs(12)
    result = cli("bank", "build", file, "--out", "mine", "--task", "docs", "--against", indexed)
    assert result.status == 0, result.err
    chunks = json.loads(cli("status", "--json", "--index-dir", indexed).out)["chunks"]
    assert f"among {13 + chunks} passages" in result.err
    # It is stored as fitted to the index, and in its texts like any other.
    assert Path("mine", "prepared.safetensors").is_file()
    assert len(DemonstrationBank.load("./mine").demonstrations) == 13
    assert cli("query", "anything", "--bank", "./mine", "--index-dir", indexed).status == 0
    other = cli(
        "bank", "build", file, "--out", "o", "--task", "docs", "--against", indexed, "--model", other_checkpoint
    )
    assert other.status == 1
    assert "was built with another model" in other.err
    assert not Path("o").exists()


@pytest.mark.parametrize(("option", "enabled"), [([], False), (["--force"], True)])
def test_a_bank_that_makes_results_worse_is_off_unless_forced(
    cli: Any, tiny_checkpoint: Path, indexed: Path, monkeypatch: pytest.MonkeyPatch, option: list[str], enabled: bool
) -> None:
    worse = BankReport(21, 21, 50.0, 0.7, -4.0, -6.0, -2.0, (3,), ())
    with monkeypatch.context() as patch:
        patch.setattr(DemonstrationBank, "evaluate", lambda *_: worse)
        patch.setattr(EpicEncoder, "strategy", "task-vector")
        made = cli(
            "bank", "build", write_pairs(20), "--out", "b", "--task", "docs", "--model", tiny_checkpoint, *option
        )
    assert made.status == 0
    assert "warning: Expected gain" in made.err
    assert "fit other queries better: lines 5." in made.err
    assert ("are off" in made.err) is not enabled
    assert DemonstrationBank.load("b").enabled is enabled
    answer = cli("query", "undo", "--bank", "b", "--index-dir", indexed)
    assert ("The demonstrations of b are off" in answer.err) is not enabled
    assert "are off" not in cli("query", "undo", "--bank", "b", "-n", "2", "--index-dir", indexed).err


def test_add_takes_a_hit_of_the_last_query(cli: Any, indexed: Path, tiny_checkpoint: Path) -> None:
    model = ("--model", tiny_checkpoint)
    nothing = cli("bank", "add", "mine", "--passage-of", "1", *model)
    assert (nothing.status, "There is no last query" in nothing.err) == (1, True)
    hits = json.loads(cli("query", "undo the commit", "--json", "--index-dir", indexed).out)["hits"]
    assert cli("bank", "add", "mine", "--passage-of", "2", *model).out == "mine\n"
    bank = DemonstrationBank.load("mine")
    assert [(pair.query, pair.passage) for pair in bank.demonstrations] == [("undo the commit", hits[1]["text"])]
    assert bank.embeddings is not None
    named = cli("bank", "add", "mine", "--query", "reset", "--passage-of", f"{hits[0]['path']}:{hits[0]['first_line']}")
    assert named.status == 1  # no index in the working directory
    place = f"{hits[0]['path']}:{hits[0]['last_line']}"
    added = cli("bank", "add", "mine", "--query", "reset", "--passage-of", place, "--index-dir", indexed, *model)
    assert added.status == 0, added.err
    assert DemonstrationBank.load("mine").demonstrations[1].passage == hits[0]["text"]
    again = cli("bank", "add", "mine", "--query", "reset", "--passage-of", place, "--index-dir", indexed, *model)
    assert "has this demonstration already" in again.err
    assert len(DemonstrationBank.load("mine")) == 2


def test_remove_takes_the_numbers_of_show(cli: Any, pairs: Path, tiny_checkpoint: Path) -> None:
    cli("bank", "build", pairs, "--out", "mine", "--task", "docs", "--model", tiny_checkpoint)
    before = DemonstrationBank.load("mine")
    assert cli("bank", "remove", "mine", "1").out == "mine\n"
    after = DemonstrationBank.load("mine")
    assert after.demonstrations == before.demonstrations[1:]
    assert after.encoder_fingerprints == before.encoder_fingerprints
    gone = cli("bank", "remove", "mine", "2")
    assert (gone.status, "There is no demonstration 2. The bank has 1." in gone.err) == (1, True)
    assert cli("bank", "remove", "docs", "1").status == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine"], "Pass one of --passage-of and --passage"),
        (["mine", "--passage-of", "1", "--passage", "x"], "Pass one of --passage-of and --passage"),
        (["docs", "--query", "q", "--passage", "x"], "docs ships with epic-rag"),
        (["mine", "--query", "q", "--passage-of", "guide"], "Pass a number, or PATH:LINE"),
        (["other", "--query", "q", "--passage", "x"], "holds other files"),
    ],
)
def test_what_cannot_be_added(cli: Any, arguments: list[str], message: str) -> None:
    Path("other").mkdir()
    (Path("other") / "notes.txt").write_text("mine", encoding="utf-8")
    result = cli("bank", "add", *arguments)
    assert result.status in (1, 2)
    assert message in result.err.replace("\n", " ")


def test_hits_and_lines_that_are_not_there(cli: Any, indexed: Path) -> None:
    cli("query", "undo", "-k", "2", "--index-dir", indexed)
    for place, message in (("9", "The last query has 2 hits, not 9"), ("0", "not 0")):
        result = cli("bank", "add", "mine", "--passage-of", place)
        assert (result.status, message in result.err) == (1, True)
    for place, message in (("undo.md:999", "has no text at line 999"), ("none.md:1", "none.md is not in the index")):
        result = cli("bank", "add", "mine", "--query", "q", "--passage-of", place, "--index-dir", indexed)
        assert (result.status, message in result.err) == (1, True)
    assert not Path("mine").exists()


def test_suggest_proposes_sections_and_measures_them(cli: Any, tiny_checkpoint: Path) -> None:
    folder = Path("manual")
    folder.mkdir()
    text = "".join(
        f"## Replace part {number}\n\nRemove the cover of unit {number}, loosen all four screws, and pull the worn part "
        f"out by its handle.\n\n## Examples\n\nThis heading is in every file and says nothing about unit {number}, "
        "so nobody would ask for it by this name.\n\n"
        for number in range(8)
    )
    for name in ("a", "b"):
        (folder / f"{name}.md").write_text(f"# Unit {name}\n\n{text.replace('part', f'part {name}')}", encoding="utf-8")
    assert cli("index", folder, "--model", tiny_checkpoint).status == 0
    result = cli("bank", "suggest", folder)
    assert result.status == 0, result.err
    pairs = [json.loads(line) for line in result.out.splitlines()]
    assert len(pairs) == 16
    assert len({pair["query"] for pair in pairs}) == 16
    assert all(pair["query"].startswith("Replace part") for pair in pairs)
    assert all(pair["passage"].startswith("Remove the cover") for pair in pairs)
    assert "Expected gain in nDCG@10 among" in result.err
    assert "recommended" in result.err or "improve results" in result.err
    assert len(cli("bank", "suggest", folder, "--count", "10").out.splitlines()) == 10


def test_suggest_needs_headings(cli: Any, indexed: Path) -> None:
    result = cli("bank", "suggest", indexed)
    assert result.status == 1
    assert "Write pairs of your own" in result.err


def test_several_banks_are_used_together(
    cli: Any, pairs: Path, tiny_checkpoint: Path, indexed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ("--model", tiny_checkpoint)
    cli("bank", "build", pairs, "--out", "first bank", "--instruction", "Find it", *model)
    cli("bank", "add", "second", "--query", "cats", "--passage", "Cats sleep.", "--instruction", "Find it", *model)
    both = ("--bank", "first bank", "--bank", "second")
    answer = json.loads(cli("query", "sleep", "--index-dir", indexed, "--json", "-n", "3", *both).out)
    assert answer["bank"] == ["first bank", "second"]
    assert cli("query", "sleep", "--index-dir", indexed, "-n", "4", *both).status == 1
    monkeypatch.setenv("EPIC_RAG_BANK", "first bank")
    assert json.loads(cli("query", "sleep", "--index-dir", indexed, "--json").out)["bank"] == "first bank"
    monkeypatch.setenv("EPIC_RAG_BANK", os.pathsep.join(("first bank", "second")))
    assert json.loads(cli("query", "sleep", "--index-dir", indexed, "--json").out)["bank"] == ["first bank", "second"]
