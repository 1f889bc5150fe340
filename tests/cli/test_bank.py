"""`epic-rag bank`: list, show and build."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.demonstrations import built_in_banks


def test_list(cli: Any) -> None:
    listed = json.loads(cli("bank", "list", "--json").out)
    assert [bank["name"] for bank in listed] == list(built_in_banks())
    assert all(bank["instruction"] and bank["num_demonstrations"] >= 8 for bank in listed)
    lines = cli("bank", "list").out.splitlines()
    assert [line.split()[0] for line in lines] == list(built_in_banks())
    assert lines[0].endswith(listed[0]["instruction"])


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
