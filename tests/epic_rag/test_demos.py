"""The built-in banks: that each loads, fits its task and holds decent demonstrations, and that pages list it."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from epic_rag import DemonstrationBank, EpicEncoder, get_task, list_checkpoints, list_tasks
from epic_rag.demonstrations import built_in_banks
from epic_rag_demos import bank_folder, bank_names

BANKS = ["claims", "code", "commands", "docs", "intent", "papers", "qa", "sts"]
GUIDE = Path(__file__).parents[2] / "docs" / "demonstrations.md"

# (shortest, longest) passage in words. Code and commands are not prose; their bounds are on characters below.
PROSE = {
    "docs": (60, 160),
    "qa": (60, 160),
    "claims": (40, 160),
    "papers": (80, 160),
    "sts": (6, 30),
    "intent": (4, 20),
}

COMMON = """a all an and are at be by can do does each every for from how i in into is it me my of on one or than that the
    to two was what when which why with"""


def load(name: str) -> DemonstrationBank:
    return DemonstrationBank.load(name)


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def test_the_banks_are_those_of_the_tasks() -> None:
    assert bank_names() == BANKS
    assert sorted(task.bank for task in list_tasks() if task.bank is not None) == BANKS
    assert built_in_banks() == {name: bank_folder(name) for name in BANKS}


@pytest.mark.parametrize("name", ["", "nothing", "../epic_rag_demos/docs", "docs/"])
def test_an_unknown_bank_lists_the_known_ones(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="there are claims, code, commands, docs"):
        bank_folder(name)


@pytest.mark.parametrize("name", BANKS)
def test_a_bank_says_what_its_task_says(name: str) -> None:
    data = json.loads((bank_folder(name) / "bank.json").read_text("utf-8"))
    task = get_task(name)
    # From the file itself: the class would fill in what is missing from the task.
    assert data["format_version"] == 1
    assert data["task"] == name
    assert data["instruction"] == task.instruction
    assert data["symmetric"] is task.symmetric
    assert "Apache-2.0" in data["origin"]


@pytest.mark.parametrize("name", BANKS)
def test_a_bank_loads_with_12_to_16_different_demonstrations(name: str) -> None:
    bank = load(name)
    assert 12 <= len(bank) <= 16
    texts = [" ".join(sorted(words(text))) for item in bank.demonstrations for text in (item.query, item.passage)]
    assert len(set(texts)) == 2 * len(bank)


@pytest.mark.parametrize("name", BANKS)
def test_texts_are_clean(name: str) -> None:
    for item in load(name).demonstrations:
        for text in (item.query, item.passage):
            assert text == text.strip()
            assert text.isascii(), text
            assert "\t" not in text
            assert "TODO" not in text
        assert "\n" not in item.query
        assert 2 <= len(item.query.split()) <= 25
        assert item.query.lower() not in item.passage.lower()


@pytest.mark.parametrize(("name", "bounds"), PROSE.items())
def test_passages_are_of_realistic_length(name: str, bounds: tuple[int, int]) -> None:
    counts = [len(item.passage.split()) for item in load(name).demonstrations]
    assert bounds[0] <= min(counts)
    assert max(counts) <= bounds[1]


@pytest.mark.parametrize("name", BANKS)
@pytest.mark.parametrize("k", [4, 8])
def test_the_first_ones_are_about_different_things(name: str, k: int) -> None:
    common = words(COMMON)
    queries = [words(item.query) - common for item in load(name).demonstrations[:k]]
    for index, left in enumerate(queries):
        for right in queries[index + 1 :]:
            assert len(left & right) / min(len(left), len(right)) <= 0.34, (left, right)


def test_the_docs_bank_mixes_questions_and_keywords_and_leaves_out_the_evaluation_manuals() -> None:
    bank = load("docs")
    asked = re.compile(r"^(how|why|what|when|which|where|can|does|is)\b", re.IGNORECASE)
    for k in (4, 8, len(bank)):
        questions = sum(bool(asked.match(item.query)) for item in bank.demonstrations[:k])
        assert k / 4 <= questions <= 3 * k / 4
    seen = {word for item in bank.demonstrations for word in words(item.query) | words(item.passage)}
    assert seen & {"git", "apache", "httpd", "postgresql", "postgres", "psql"} == set()


def test_the_papers_bank_leaves_out_aerodynamics() -> None:
    seen = {word for item in load("papers").demonstrations for word in words(item.query) | words(item.passage)}
    assert seen & {"aerodynamic", "aerodynamics", "boundary", "supersonic", "wing", "airfoil", "mach"} == set()


def test_claims_are_supported_and_refuted() -> None:
    evidence = {item.query: item.passage for item in load("claims").demonstrations}
    assert "three separate pumps" in evidence["An octopus has a single heart."]
    assert "twenty years" in next(text for claim, text in evidence.items() if "Eiffel" in claim)


def test_code_parses_and_has_no_docstring_that_gives_the_query_away() -> None:
    for item in load("code").demonstrations:
        [node] = ast.parse(item.passage).body
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        assert ast.get_docstring(node) is None
        assert 100 <= len(item.passage) <= 800


def test_commands_are_one_line_that_a_shell_can_read() -> None:
    for item in load("commands").demonstrations:
        assert "\n" not in item.passage
        assert len(shlex.split(item.passage)) >= 2
        assert 15 <= len(item.passage) <= 200


@pytest.mark.parametrize("name", ["sts", "intent"])
def test_symmetric_pairs_are_not_copies(name: str) -> None:
    for item in load(name).demonstrations:
        left, right = words(item.query), words(item.passage)
        assert len(left & right) / len(left | right) <= 0.6, item


@pytest.mark.parametrize("name", BANKS)
def test_a_bank_can_be_embedded_and_changes_queries_only(name: str, tiny_encoder: EpicEncoder) -> None:
    bank = DemonstrationBank.load(name, tiny_encoder)
    assert bank.embeddings is not None
    assert bank.embeddings.shape == (len(bank), 3, tiny_encoder.dimension)
    assert np.allclose(np.linalg.norm(bank.embeddings, axis=-1), 1, atol=1e-4)
    assert bank.encoder_fingerprint == tiny_encoder.fingerprint
    query = bank.demonstrations[0].query
    zero_shot = tiny_encoder.encode_query(query, task=name)
    assert np.allclose(tiny_encoder.encode_query(query, bank=bank, num_demonstrations=0), zero_shot, atol=1e-5)
    assert not np.allclose(tiny_encoder.encode_query(query, bank=name, num_demonstrations=4), zero_shot, atol=1e-3)


@pytest.mark.parametrize("checkpoint", [info.name for info in list_checkpoints()])
def test_banks_have_the_vectors_of_every_shipped_checkpoint(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make banks` makes them; without, each start of the command line would embed its bank again."""
    encoder = EpicEncoder.from_pretrained(checkpoint, device="cpu")
    monkeypatch.setattr(encoder, "embed_demonstrations", lambda bank: pytest.fail("embedded again"))
    for name in BANKS:
        stored = load(name)
        bank = DemonstrationBank.load(name, encoder)
        assert bank.embeddings_for(encoder.fingerprint).shape == (len(bank), 3, encoder.backbone.dimension)
        assert set(stored.encoder_fingerprints) >= {encoder.fingerprint}
        assert len(stored.encoder_fingerprints) == len(list_checkpoints())


@pytest.mark.parametrize("name", BANKS)
def test_each_bank_has_a_readme_that_agrees_with_it(name: str) -> None:
    bank = load(name)
    text = (bank_folder(name) / "README.md").read_text("utf-8")
    assert text.startswith(f"# {name}\n")
    assert f'Instruction: "{bank.instruction}"' in text
    assert f"Demonstrations: {len(bank)};" in text
    assert f"Symmetric: {'yes' if bank.symmetric else 'no'}" in text
    assert bank.origin in text
    assert ("Off by default" in text) is not bank.enabled


@pytest.mark.parametrize("file", [bank_folder("docs").parent / "README.md", GUIDE], ids=["readme", "guide"])
def test_the_tables_list_every_bank(file: Path) -> None:
    rows = re.findall(r"^\| `(\w+)`(.*)\|$", file.read_text("utf-8"), re.MULTILINE)
    tables = {name: rest for name, rest in rows if name in BANKS}
    assert sorted(tables) == BANKS
    for name, rest in tables.items():
        assert ("(symmetric)" in rest) is get_task(name).symmetric
        assert (rest.split("|")[3].strip() == "yes") is load(name).enabled
        if file.name == "README.md":
            assert rest.split("|")[-1].strip() == str(len(load(name)))
