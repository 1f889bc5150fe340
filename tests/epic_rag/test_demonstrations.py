"""Banks: their texts, their vectors, and the choice of k."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from epic_rag import (
    BankError,
    DataError,
    Demonstration,
    DemonstrationBank,
    EpicEncoder,
    FingerprintError,
    PromptError,
    get_task,
)
from epic_rag.demonstrations import SELECTIONS
from epic_rag.reader import DemonstrationReader
from tests.conftest import make_encoder
from tests.helpers.banks import embedded

PROPERTY = settings(max_examples=50, deadline=None, derandomize=True, database=None)
PAIRS = [
    ("how do I undo this", "To undo a step, press Ctrl+Z."),
    ("change the language", "Open Settings, then Language."),
    ("E1042 on startup", "The licence file could not be read."),
    ("naïve café 日本語 🙂", "zweite Passage\nwith a line break\u2028and another"),
]

text = st.text(min_size=1, max_size=30).filter(str.strip) | st.sampled_from(
    ["\ud800", "🙂", "\u2028x", '"\\', "x\r\ny"]
)
pairs = st.lists(st.tuples(text, text), max_size=5)


@pytest.fixture
def bank() -> DemonstrationBank:
    return DemonstrationBank(PAIRS, instruction="find the section")


@pytest.fixture
def built(bank: DemonstrationBank, tiny_encoder: EpicEncoder) -> DemonstrationBank:
    return embedded(bank, tiny_encoder)


def rows(file: Path, *lines: str) -> Path:
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


# Making one


def test_pairs_and_demonstrations_are_the_same_thing() -> None:
    assert DemonstrationBank(PAIRS).demonstrations == tuple(Demonstration(*pair) for pair in PAIRS)
    assert (
        DemonstrationBank([Demonstration(*pair) for pair in PAIRS]).fingerprint == DemonstrationBank(PAIRS).fingerprint
    )
    assert len(DemonstrationBank([])) == 0


@pytest.mark.parametrize(
    "bad",
    [("a",), ("a", "b", "c"), ("a", ""), ("  ", "b"), ("a", 3), ("a", None), "ab", 7, None, Demonstration("a", "")],
)
def test_what_is_no_pair_is_named(bad: Any) -> None:
    with pytest.raises(BankError, match=r"Demonstration 2 is .*Pass \(query, passage\)"):
        DemonstrationBank([("a", "b"), bad])


def test_a_task_brings_its_instruction_and_symmetry() -> None:
    sts = DemonstrationBank(PAIRS, task="sts")
    assert (sts.instruction, sts.symmetric) == (get_task("sts").instruction, True)
    own = DemonstrationBank(PAIRS, task="sts", instruction="mine", symmetric=False)
    assert (own.instruction, own.symmetric) == ("mine", False)
    unknown = DemonstrationBank(PAIRS, task="a task of my own")
    assert (unknown.instruction, unknown.symmetric, unknown.task) == (None, False, "a task of my own")


def test_the_fingerprint_is_of_the_texts_and_not_of_the_vectors(
    bank: DemonstrationBank, tiny_encoder: EpicEncoder
) -> None:
    before = bank.fingerprint
    assert embedded(bank, tiny_encoder).fingerprint == before
    others = [
        DemonstrationBank(PAIRS, instruction="another"),
        DemonstrationBank(PAIRS),
        DemonstrationBank(PAIRS, instruction="find the section", symmetric=True),
        DemonstrationBank(PAIRS[::-1], instruction="find the section"),
        DemonstrationBank(PAIRS[:3], instruction="find the section"),
        DemonstrationBank([(passage, query) for query, passage in PAIRS], instruction="find the section"),
        DemonstrationBank([(PAIRS[0][0] + "how", PAIRS[0][1]), *PAIRS[1:]], instruction="find the section"),
    ]
    assert len({before, *(other.fingerprint for other in others)}) == 8
    assert repr(bank).startswith("DemonstrationBank(task=None, 4 demonstrations, embedded under ")
    assert repr(DemonstrationBank([])) == "DemonstrationBank(task=None, 0 demonstrations, not embedded)"


# Vectors


def test_require_refuses_a_bank_without_vectors(bank: DemonstrationBank, tiny_encoder: EpicEncoder) -> None:
    with pytest.raises(FingerprintError, match=r"embedded under None, .*Call bank\.embed\(encoder\)"):
        bank.embeddings_for(tiny_encoder.fingerprint)


def test_building_is_the_queries_zero_shot_and_the_passages_as_documents(
    built: DemonstrationBank, tiny_encoder: EpicEncoder
) -> None:
    assert built.embeddings is not None
    queries, passages = zip(*PAIRS, strict=True)
    np.testing.assert_allclose(
        built.embeddings[:, 0], tiny_encoder.encode_query(queries, instruction="find the section"), atol=1e-6
    )
    np.testing.assert_allclose(built.embeddings[:, 1], tiny_encoder.encode_document(passages), atol=1e-6)
    assert embedded(built, tiny_encoder) is built


def test_a_symmetric_bank_encodes_both_sides_as_queries(tiny_encoder: EpicEncoder) -> None:
    bank = embedded(DemonstrationBank(PAIRS, instruction="same meaning", symmetric=True), tiny_encoder)
    plain = embedded(DemonstrationBank(PAIRS, instruction="same meaning"), tiny_encoder)
    assert bank.embeddings is not None
    assert plain.embeddings is not None
    right = tiny_encoder.encode_query([passage for _, passage in PAIRS], instruction="same meaning")
    np.testing.assert_allclose(bank.embeddings[:, 1], right, atol=1e-6)
    np.testing.assert_allclose(bank.embeddings[:, 0], plain.embeddings[:, 0], atol=1e-6)
    assert np.abs(bank.embeddings[:, 1] - plain.embeddings[:, 1]).max() > 1e-2


# Adding, removing, merging


def test_added_demonstrations_alone_are_embedded(
    built: DemonstrationBank, tiny_encoder: EpicEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    embed = EpicEncoder.embed_demonstrations

    def counted(encoder: EpicEncoder, bank: DemonstrationBank) -> Any:
        asked.append(len(bank))
        return embed(encoder, bank)

    monkeypatch.setattr(EpicEncoder, "embed_demonstrations", counted)
    more = built.add([("where is the log", "Logs are in /var/log."), PAIRS[1]], tiny_encoder)
    assert asked == [1]
    assert (len(built), len(more), more.instruction) == (4, 5, built.instruction)
    whole = embedded(DemonstrationBank(more.demonstrations, instruction=more.instruction), tiny_encoder)
    np.testing.assert_allclose(
        more.embeddings_for(tiny_encoder.fingerprint), whole.embeddings_for(tiny_encoder.fingerprint), atol=1e-6
    )
    assert built.add([PAIRS[0]], tiny_encoder).demonstrations == built.demonstrations
    assert built.add([("a", "b")]).embeddings is None
    with pytest.raises(BankError, match="Demonstration 1 is"):
        built.add([("a", "")])


def test_removed_demonstrations_take_their_vectors_along(built: DemonstrationBank, tiny_encoder: EpicEncoder) -> None:
    fewer = built.remove([2, 0])
    assert [item.query for item in fewer.demonstrations] == [PAIRS[1][0], PAIRS[3][0]]
    kept = built.embeddings_for(tiny_encoder.fingerprint)[[1, 3]]
    np.testing.assert_array_equal(fewer.embeddings_for(tiny_encoder.fingerprint), kept)
    for row in (-1, 4):
        with pytest.raises(BankError, match=f"no demonstration {row + 1}. The bank has 4"):
            built.remove([row])


@given(st.lists(pairs, min_size=1, max_size=4), st.data())
@PROPERTY
def test_a_merged_bank_has_each_demonstration_once(lists: list[list[tuple[str, str]]], data: st.DataObject) -> None:
    banks = [
        DemonstrationBank(each, instruction=data.draw(st.sampled_from("ab")), enabled=data.draw(st.booleans()))
        for each in lists
    ]
    merged = DemonstrationBank.merge(banks)
    used = [bank for bank in banks if bank.enabled] or banks
    assert set(merged.demonstrations) == {item for bank in used for item in bank.demonstrations}
    assert merged.instruction == banks[0].instruction
    assert merged.enabled is any(bank.enabled for bank in banks)


def test_a_merged_bank_keeps_vectors_of_one_instruction(tiny_encoder: EpicEncoder) -> None:
    parts = [
        embedded(DemonstrationBank(half, instruction="find the section"), tiny_encoder)
        for half in (PAIRS[:3], PAIRS[2:])
    ]
    merged = DemonstrationBank.merge(parts)
    whole = embedded(DemonstrationBank(PAIRS, instruction="find the section"), tiny_encoder)
    assert merged.demonstrations == whole.demonstrations
    np.testing.assert_allclose(
        merged.embeddings_for(tiny_encoder.fingerprint), whole.embeddings_for(tiny_encoder.fingerprint), atol=1e-6
    )
    other = embedded(DemonstrationBank([("a", "b")], instruction="another"), tiny_encoder)
    assert DemonstrationBank.merge([merged, other]).embeddings is None
    query = "change the theme"
    np.testing.assert_allclose(
        tiny_encoder.encode_query(query, bank=parts, strategy="task-vector"),
        tiny_encoder.encode_query(query, bank=whole, strategy="task-vector"),
        atol=1e-6,
    )


def test_banks_that_cannot_be_merged() -> None:
    with pytest.raises(BankError, match="no bank to merge"):
        DemonstrationBank.merge([])
    with pytest.raises(BankError, match="symmetric"):
        DemonstrationBank.merge([DemonstrationBank(PAIRS), DemonstrationBank(PAIRS, symmetric=True)])


def test_a_bank_that_is_off_gives_its_instruction_alone(tiny_encoder: EpicEncoder, tmp_path: Path) -> None:
    DemonstrationBank(PAIRS, instruction="find the section", enabled=False).save(tmp_path / "off")
    off = DemonstrationBank.load(tmp_path / "off")
    assert off.enabled is off.copy().enabled is False
    assert (off.number_used(None), off.number_used(3)) == (0, 3)
    zero_shot = tiny_encoder.encode_query("undo", instruction="find the section")
    for strategy in ("task-vector", "epic"):
        np.testing.assert_array_equal(tiny_encoder.encode_query("undo", bank=off, strategy=strategy), zero_shot)
        forced = tiny_encoder.encode_query("undo", bank=off, num_demonstrations=1, strategy=strategy)
        assert np.abs(forced - zero_shot).max() > 1e-4


# Picking k


@PROPERTY
@given(k=st.integers(0, 4), method=st.sampled_from(sorted({*SELECTIONS} - {"nearest-early"})), seed=st.integers(0, 5))
def test_a_choice_keeps_texts_and_vectors_together(tiny_encoder: EpicEncoder, k: int, method: Any, seed: int) -> None:
    built = embedded(DemonstrationBank(PAIRS, task="sts"), tiny_encoder)
    assert built.embeddings is not None
    chosen = built.select(k, method=method, seed=seed, query_embedding=built.embeddings[2, 0])
    assert len(chosen) == len(set(chosen.demonstrations)) == k
    assert (chosen.task, chosen.instruction, chosen.symmetric) == (built.task, built.instruction, built.symmetric)
    indices = [built.demonstrations.index(item) for item in chosen.demonstrations]
    np.testing.assert_array_equal(chosen.embeddings_for(tiny_encoder.fingerprint), built.embeddings[indices])
    again = built.select(k, method=method, seed=seed, query_embedding=built.embeddings[2, 0])
    assert again.demonstrations == chosen.demonstrations
    if method == "first":
        assert indices == list(range(k))
    if method == "diverse":
        assert indices[:1] == [0][:k]
    if method == "nearest":
        similarity = built.embeddings[:, 0] @ built.embeddings[2, 0]
        assert indices == [int(index) for index in np.argsort(-similarity)[:k]][::-1]
        assert indices[-1:] == [2][:k]  # beside the query


def test_a_random_choice_follows_its_seed(bank: DemonstrationBank) -> None:
    drawn = {seed: bank.select(2, method="random", seed=seed).demonstrations for seed in range(12)}
    assert len(set(drawn.values())) > 1
    assert {item for items in drawn.values() for item in items} == set(bank.demonstrations)


def test_a_diverse_choice_takes_the_farthest(bank: DemonstrationBank) -> None:
    queries = np.array([[1, 0], [0.99, 0.1], [0, 1], [-1, 0]], dtype=np.float32)
    bank.embeddings = np.stack([queries, queries[::-1]], axis=1)
    bank.encoder_fingerprint = "made by hand"
    chosen = [bank.demonstrations.index(item) for item in bank.select(4, method="diverse").demonstrations]
    assert chosen == [0, 3, 2, 1]


def test_a_choice_needs_no_vectors_unless_it_reads_them(bank: DemonstrationBank) -> None:
    assert bank.select(2).embeddings is None
    assert bank.select(2, method="random").embeddings is None
    with pytest.raises(BankError, match=r"Selection 'diverse' needs vectors.*Call bank\.embed\(encoder\)"):
        bank.select(2, method="diverse")
    with pytest.raises(BankError, match="Selection 'nearest' needs vectors"):
        bank.select(2, method="nearest", query_embedding=np.zeros(32, dtype=np.float32))


@pytest.mark.parametrize("k", [-1, 5])
def test_more_than_there_are_names_both_numbers(bank: DemonstrationBank, k: int) -> None:
    with pytest.raises(PromptError, match=f"{k} demonstrations requested, but the bank has 4. Use 0 to 4"):
        bank.select(k)


def test_a_choice_that_is_unknown_or_lacks_its_query(built: DemonstrationBank) -> None:
    with pytest.raises(PromptError, match=r"Unknown selection 'best'. Choose one of first, random, diverse, nearest"):
        built.select(1, method="best")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="needs query_embedding"):
        built.select(1, method="nearest")
    with pytest.raises(PromptError, match=r"has shape \(8,\), the bank's vectors have \(32,\)\. Encode one query"):
        built.select(1, method="nearest", query_embedding=np.zeros(8, dtype=np.float32))


ENCODER_PAIRS = [
    ("how do I undo this", "To undo a step, press Ctrl+Z."),
    ("change the language", "Open Settings, then Language."),
    ("E1042 on startup", "The licence file could not be read."),
]


@pytest.fixture
def bank_with_instruction() -> DemonstrationBank:
    return DemonstrationBank(ENCODER_PAIRS, instruction="find the section")


@pytest.fixture
def other() -> EpicEncoder:
    return make_encoder(seed=5)


def test_a_bank_serves_several_encoders_without_embedding_again(
    bank_with_instruction: DemonstrationBank,
    tiny_encoder: EpicEncoder,
    other: EpicEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = {
        encoder.fingerprint: embedded(
            DemonstrationBank(ENCODER_PAIRS, instruction="find the section"), encoder
        ).embeddings
        for encoder in (tiny_encoder, other)
    }
    assert embedded(bank_with_instruction, tiny_encoder, other) is bank_with_instruction
    bank_with_instruction.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["bank.json", "embeddings.safetensors"]
    data = json.loads((tmp_path / "bank.json").read_text("utf-8"))
    # What a release that knows one encoder alone looks for is as it was.
    assert (data["format_version"], data["encoder_fingerprint"]) == (1, tiny_encoder.fingerprint)
    assert data["other_encoders"] == {other.fingerprint: 32}
    for encoder in (tiny_encoder, other):
        monkeypatch.setattr(
            encoder, "embed_demonstrations", lambda bank_with_instruction: pytest.fail("embedded again")
        )
    with caplog.at_level(logging.INFO, "epic_rag"):
        for encoder in (tiny_encoder, other):
            loaded = DemonstrationBank.load(tmp_path)
            assert loaded.encoder_fingerprints == (tiny_encoder.fingerprint, other.fingerprint)
            encoder.encode_query("a", bank=loaded)
            encoder.encode_query("a", bank=loaded, num_demonstrations=2, selection="nearest")
            assert loaded.encoder_fingerprint == tiny_encoder.fingerprint
            half = embedded(loaded.select(2, method="random", seed=3), encoder)
            rows = [ENCODER_PAIRS.index((item.query, item.passage)) for item in half.demonstrations]
            np.testing.assert_array_equal(half.embeddings, expected[encoder.fingerprint][rows])
            np.testing.assert_array_equal(
                DemonstrationBank.load(tmp_path, encoder).embeddings_for(encoder.fingerprint),
                expected[encoder.fingerprint],
            )
    assert caplog.text == ""
    monkeypatch.undo()


def test_building_keeps_the_vectors_of_the_encoders_that_are_named(
    bank_with_instruction: DemonstrationBank, tiny_encoder: EpicEncoder, other: EpicEncoder, tmp_path: Path
) -> None:
    third = make_encoder(seed=6)
    first = embedded(bank_with_instruction, tiny_encoder, other).embeddings
    assert embedded(bank_with_instruction, other, third, tiny_encoder).encoder_fingerprints == (
        other.fingerprint,
        third.fingerprint,
        tiny_encoder.fingerprint,
    )
    assert repr(bank_with_instruction).endswith(
        f"embedded under {', '.join(bank_with_instruction.encoder_fingerprints)})"
    )
    assert embedded(bank_with_instruction, tiny_encoder).embeddings is first
    assert bank_with_instruction.encoder_fingerprints == (tiny_encoder.fingerprint,)
    bank_with_instruction.save(tmp_path)
    assert DemonstrationBank.load(tmp_path).encoder_fingerprints == (tiny_encoder.fingerprint,)
    assert "other_encoders" not in json.loads((tmp_path / "bank.json").read_text("utf-8"))
    assert embedded(bank_with_instruction, tiny_encoder, tiny_encoder).encoder_fingerprints == (
        tiny_encoder.fingerprint,
    )


def test_edited_texts_lose_the_vectors_of_every_encoder(
    bank_with_instruction: DemonstrationBank, tiny_encoder: EpicEncoder, other: EpicEncoder, tmp_path: Path
) -> None:
    embedded(bank_with_instruction, tiny_encoder, other).save(tmp_path)
    file = tmp_path / "bank.json"
    file.write_text(file.read_text("utf-8").replace("press Ctrl+Z", "press Escape"), encoding="utf-8")
    assert DemonstrationBank.load(tmp_path).encoder_fingerprints == ()


def test_a_file_of_one_encoder_from_before_is_read(
    tmp_path: Path, bank_with_instruction: DemonstrationBank, tiny_encoder: EpicEncoder
) -> None:
    built = embedded(bank_with_instruction, tiny_encoder)
    built.save(tmp_path)
    assert built.embeddings is not None
    metadata = {"encoder": str(built.encoder_fingerprint), "bank": built.fingerprint}
    save_file({"embeddings": built.embeddings}, tmp_path / "embeddings.safetensors", metadata=metadata)
    loaded = DemonstrationBank.load(tmp_path)
    assert loaded.encoder_fingerprints == built.encoder_fingerprints
    np.testing.assert_array_equal(loaded.embeddings, built.embeddings)


FILE_PROPERTY = settings(max_examples=50, deadline=None, derandomize=True, database=None)
FILE_PAIRS = [
    ("how do I undo this", "To undo a step, press Ctrl+Z."),
    ("change the language", "Open Settings, then Language."),
    ("E1042 on startup", "The licence file could not be read."),
    ("naïve café 日本語 🙂", "zweite Passage\nwith a line break\u2028and another"),
]

file_text = st.text(min_size=1, max_size=30).filter(str.strip) | st.sampled_from(
    ["\ud800", "🙂", "\u2028x", '"\\', "x\r\ny"]
)
file_pairs = st.lists(st.tuples(file_text, file_text), max_size=5)


@pytest.fixture
def saved_bank() -> DemonstrationBank:
    return DemonstrationBank(FILE_PAIRS, instruction="find the section")


@pytest.fixture
def built_bank(saved_bank: DemonstrationBank, tiny_encoder: EpicEncoder) -> DemonstrationBank:
    return embedded(saved_bank, tiny_encoder)


def write_rows(file: Path, *lines: str) -> Path:
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


# JSON lines


@FILE_PROPERTY
@given(
    content=file_pairs.filter(bool),
    ascii_only=st.booleans(),
    packed=st.booleans(),
    key=st.sampled_from(["passage", "positive"]),
)
def test_json_lines_round_trip(
    tmp_path_factory: pytest.TempPathFactory, content: list[tuple[str, str]], ascii_only: bool, packed: bool, key: str
) -> None:
    lines = [
        json.dumps({"query": query, key: passage, "group": 3}, ensure_ascii=ascii_only) for query, passage in content
    ]
    data = "\n\n".join(lines).encode("utf-8", "backslashreplace")
    file = tmp_path_factory.mktemp("file_pairs") / f"pairs.jsonl{'.gz' if packed else ''}"
    file.write_bytes(gzip.compress(data) if packed else data)
    saved_bank = DemonstrationBank.from_jsonl(file, instruction="x", task="sts")
    assert [(item.query, item.passage) for item in saved_bank.demonstrations] == content
    assert (saved_bank.instruction, saved_bank.task, saved_bank.symmetric) == ("x", "sts", True)


def test_passage_goes_before_positive_and_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"query": "a", "positive": "no", "passage": "yes"}\n', encoding="utf-8-sig")
    assert DemonstrationBank.from_jsonl(file).demonstrations == (Demonstration("a", "yes"),)


GOOD = '{"query": "a", "passage": "b"}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "is not valid JSON"),
        ('{"query": "a"}', "is not of the form"),
        ('{"passage": "a"}', "is not of the form"),
        ('["a", "b"]', "is not a JSON object (list)"),
        ("3", "is not a JSON object (int)"),
        ("null", "is not a JSON object (NoneType)"),
        ('{"query": "", "passage": "b"}', "empty query or passage"),
        ('{"query": "a", "passage": " "}', "empty query or passage"),
        ('{"query": "a", "passage": 3}', "is not of the form"),
        ('{"query": "a", "passage": null}', "is not of the form"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    file = write_rows(tmp_path / "pairs.jsonl", GOOD, "", line)
    with pytest.raises(DataError, match=r"pairs\.jsonl:3 .*Correct or delete the line") as caught:
        DemonstrationBank.from_jsonl(file)
    assert reason in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    packed = gzip.compress(GOOD.encode() * 200)
    files = {
        "missing.jsonl": None,
        "latin.jsonl": '{"query": "é", "passage": "b"}'.encode("latin-1"),
        "plain.jsonl.gz": GOOD.encode(),
        "cut.jsonl.gz": packed[:-12],
        "bent.jsonl.gz": packed[:14] + b"\xff\xff\xff\xff" + packed[18:],
    }
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}(:1 is not UTF-8| cannot be read)"):
            DemonstrationBank.from_jsonl(tmp_path / name)
    with pytest.raises(DataError, match="cannot be read"):
        DemonstrationBank.from_jsonl(tmp_path)
    with pytest.raises(DataError, match=r"has no demonstrations. Write lines of the form"):
        DemonstrationBank.from_jsonl(write_rows(tmp_path / "empty.jsonl", "", " "))


def test_a_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_rows(tmp_path / "pairs.jsonl", GOOD)
    DemonstrationBank.from_jsonl("~/pairs.jsonl").save("~/mine")
    assert len(DemonstrationBank.load("~/mine")) == 1
    assert (tmp_path / "mine" / "bank.json").is_file()


# Folders


@FILE_PROPERTY
@given(
    content=file_pairs,
    instruction=st.none() | file_text,
    task=st.none() | file_text | st.sampled_from(["docs", "sts"]),
    symmetric=st.none() | st.booleans(),
    origin=st.text(max_size=20),
)
def test_save_and_load_round_trip(
    tmp_path_factory: pytest.TempPathFactory, content: list[tuple[str, str]], origin: str, **settings: Any
) -> None:
    saved_bank = DemonstrationBank(content, origin=origin, **settings)
    folder = tmp_path_factory.mktemp("banks")
    saved_bank.save(folder)
    loaded = DemonstrationBank.load(folder)
    for name in ("demonstrations", "instruction", "task", "symmetric", "origin", "fingerprint"):
        assert getattr(loaded, name) == getattr(saved_bank, name)
    assert loaded.embeddings is None
    assert os.listdir(folder) == ["bank.json"]


def test_vectors_round_trip_and_are_used_as_they_are(
    built_bank: DemonstrationBank, tiny_encoder: EpicEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built_bank.save(tmp_path / "saved_bank")
    assert sorted(os.listdir(tmp_path / "saved_bank")) == ["bank.json", "embeddings.safetensors"]
    data = json.loads((tmp_path / "saved_bank" / "bank.json").read_text("utf-8"))
    assert (data["format_version"], data["dimension"]) == (1, 32)
    assert data["encoder_fingerprint"] == tiny_encoder.fingerprint
    monkeypatch.setattr(tiny_encoder, "embed_demonstrations", lambda saved_bank: pytest.fail("embedded again"))
    loaded = DemonstrationBank.load(tmp_path / "saved_bank", tiny_encoder)
    assert loaded.embeddings is not None
    assert (loaded.embeddings.shape, loaded.embeddings.dtype) == ((4, 3, 32), np.float32)
    np.testing.assert_array_equal(loaded.embeddings, built_bank.embeddings)
    tiny_encoder.encode_query("a", bank=tmp_path / "saved_bank")


def test_a_bank_without_vectors_deletes_those_of_the_bank_it_replaces(
    built_bank: DemonstrationBank, tmp_path: Path
) -> None:
    built_bank.save(tmp_path)
    DemonstrationBank(FILE_PAIRS[:1]).save(tmp_path)
    assert os.listdir(tmp_path) == ["bank.json"]
    assert DemonstrationBank.load(tmp_path).embeddings is None


def test_edited_texts_lose_their_vectors(
    built_bank: DemonstrationBank, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    built_bank.save(tmp_path)
    file = tmp_path / "bank.json"
    edited = file.read_text("utf-8").replace("press Ctrl+Z", "press Escape")
    assert edited != file.read_text("utf-8")
    file.write_text(edited, encoding="utf-8")
    with caplog.at_level(logging.INFO, "epic_rag"):
        loaded = DemonstrationBank.load(tmp_path)
    assert loaded.embeddings is None
    assert loaded.encoder_fingerprint is None
    assert "are of other texts or another release; they will be computed again" in caplog.text


def test_a_bank_of_an_earlier_release_is_embedded_again(
    built_bank: DemonstrationBank, tmp_path: Path, tiny_encoder: EpicEncoder
) -> None:
    """It has no vectors of queries that are read as documents."""
    built_bank.prepare(tiny_encoder)
    expected = tiny_encoder.encode_query("a fox", bank=built_bank, strategy="reader")
    built_bank.save(tmp_path)
    (tmp_path / "prepared.safetensors").unlink()
    file = tmp_path / "embeddings.safetensors"
    with safe_open(file, framework="numpy") as stored:
        vectors, metadata = stored.get_tensor("embeddings"), stored.metadata()
    save_file({"embeddings": np.ascontiguousarray(vectors[:, :2])}, file, metadata=metadata)
    loaded = DemonstrationBank.load(tmp_path)
    assert loaded.embeddings is None
    np.testing.assert_allclose(tiny_encoder.encode_query("a fox", bank=loaded, strategy="reader"), expected, atol=1e-6)


@pytest.mark.parametrize("crash", ["while vectors are written", "between the two", "while texts are written"])
def test_a_crash_while_saving_leaves_no_wrong_vectors(
    crash: str,
    built_bank: DemonstrationBank,
    tmp_path: Path,
    tiny_encoder: EpicEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The old bank stays whole, or its vectors count as not there; never the one's texts with the other's vectors."""
    other = make_encoder(seed=5)
    built_bank.save(tmp_path)
    newer = embedded(DemonstrationBank(FILE_PAIRS, instruction="find the section"), other)
    replace = os.replace

    def fail(source: Any, target: Any) -> None:
        if crash == "while vectors are written" or Path(target).name == "bank.json":
            raise KeyboardInterrupt
        replace(source, target)

    def write_half(file: Path, content: str, **_: Any) -> None:
        file.write_bytes(content[: len(content) // 2].encode())
        raise KeyboardInterrupt

    if crash == "while texts are written":
        monkeypatch.setattr(Path, "write_text", write_half)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        newer.save(tmp_path)
    monkeypatch.undo()
    loaded = DemonstrationBank.load(tmp_path)
    assert loaded.demonstrations == built_bank.demonstrations
    if crash == "while vectors are written":
        np.testing.assert_array_equal(loaded.embeddings_for(tiny_encoder.fingerprint), built_bank.embeddings)
    else:
        assert loaded.embeddings is None
        np.testing.assert_allclose(
            embedded(loaded, tiny_encoder).embeddings_for(tiny_encoder.fingerprint),
            built_bank.embeddings,
            atol=1e-6,
        )
    newer.save(tmp_path)
    np.testing.assert_array_equal(DemonstrationBank.load(tmp_path).embeddings_for(other.fingerprint), newer.embeddings)


def test_unreadable_vectors_are_made_again(
    built_bank: DemonstrationBank, tiny_encoder: EpicEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    built_bank.save(tmp_path)
    vectors = tmp_path / "embeddings.safetensors"
    vectors.write_bytes(vectors.read_bytes()[:100])
    with caplog.at_level(logging.WARNING, "epic_rag"):
        loaded = DemonstrationBank.load(tmp_path, tiny_encoder)
    assert "cannot be read" in caplog.text
    np.testing.assert_allclose(loaded.embeddings_for(tiny_encoder.fingerprint), built_bank.embeddings, atol=1e-6)


def test_vectors_of_another_shape_are_not_used(built_bank: DemonstrationBank, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    built_bank.save(tmp_path)
    assert built_bank.embeddings is not None
    metadata = {"encoder": str(built_bank.encoder_fingerprint), "bank": built_bank.fingerprint}
    save_file({"embeddings": built_bank.embeddings[:3]}, tmp_path / "embeddings.safetensors", metadata=metadata)
    assert DemonstrationBank.load(tmp_path).embeddings is None


def test_another_encoders_vectors_are_made_again_with_a_log_line(
    built_bank: DemonstrationBank, tiny_encoder: EpicEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = make_encoder(seed=5)
    fresh = embedded(DemonstrationBank(FILE_PAIRS, instruction="find the section"), other)
    built_bank.save(tmp_path)
    loaded = DemonstrationBank.load(tmp_path)
    with pytest.raises(
        FingerprintError, match=rf"under {tiny_encoder.fingerprint}, the encoder is {other.fingerprint}"
    ):
        loaded.embeddings_for(other.fingerprint)
    line = f"was embedded under {tiny_encoder.fingerprint}, the encoder is {other.fingerprint}: embedding its 4"
    for load in (lambda: embedded(loaded, other), lambda: DemonstrationBank.load(tmp_path, other)):
        caplog.clear()
        with caplog.at_level(logging.INFO, "epic_rag"):
            np.testing.assert_allclose(load().embeddings_for(other.fingerprint), fresh.embeddings, atol=1e-6)
        assert line in caplog.text
    # In a call to encode, too; and there the caller's bank is left as it was.
    kept = DemonstrationBank.load(tmp_path)
    caplog.clear()
    with caplog.at_level(logging.INFO, "epic_rag"):
        vector = other.encode_query("how", bank=kept)
    assert line in caplog.text
    np.testing.assert_allclose(vector, other.encode_query("how", bank=fresh), atol=1e-6)
    assert kept.encoder_fingerprint == tiny_encoder.fingerprint
    np.testing.assert_array_equal(kept.embeddings, built_bank.embeddings)


def test_an_empty_bank_can_be_built_and_saved(tiny_encoder: EpicEncoder, tmp_path: Path) -> None:
    saved_bank = embedded(DemonstrationBank([]), tiny_encoder)
    assert saved_bank.embeddings is not None
    assert saved_bank.embeddings.shape == (0, 3, 32)
    saved_bank.save(tmp_path)
    assert DemonstrationBank.load(tmp_path).embeddings_for(tiny_encoder.fingerprint).shape == (0, 3, 32)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "AttributeError"),
        ('{"format_version": 1}', "KeyError: 'demonstrations'"),
        ('{"format_version": 1, "demonstrations": [{"query": "a"}]}', "KeyError: 'passage'"),
        ('{"format_version": 1, "demonstrations": ["a"]}', "TypeError"),
        ('{"format_version": 1, "demonstrations": null}', "TypeError"),
        (b"\xff\xfe", "UnicodeDecodeError"),
    ],
)
def test_a_broken_bank_file(tmp_path: Path, content: str | bytes, reason: str) -> None:
    (tmp_path / "bank.json").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(BankError, match=rf"bank\.json is not a demonstration bank \({reason}.*Make one with `epic-rag"):
        DemonstrationBank.load(tmp_path)


def test_a_bank_of_a_later_release(tmp_path: Path) -> None:
    (tmp_path / "bank.json").write_text('{"format_version": 2, "demonstrations": []}')
    with pytest.raises(BankError, match=r"has format version 2, this release reads 1. Run `pip install -U epic-rag`"):
        DemonstrationBank.load(tmp_path)


def test_a_bank_that_is_not_there_lists_the_built_in_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        BankError,
        match=r"There is no demonstration bank nothing. Built-in banks are claims, code, .*; run `epic-rag bank",
    ):
        DemonstrationBank.load("nothing")
    with pytest.raises(BankError, match=r"The folder .* has no bank\.json. Built-in banks are"):
        DemonstrationBank.load(tmp_path)
    # A built-in name wins over a folder in the working directory; ./name is the folder.
    monkeypatch.chdir(tmp_path)
    DemonstrationBank(FILE_PAIRS[:1]).save("docs")
    assert len(DemonstrationBank.load("docs")) > 1
    assert len(DemonstrationBank.load("./docs")) == 1


def test_a_folder_that_cannot_be_made(saved_bank: DemonstrationBank, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BankError, match=r"No folder can be made at .*file .*Save the bank elsewhere"):
        saved_bank.save(tmp_path / "file")


def test_vectors_in_half_precision(built_bank: DemonstrationBank, tiny_encoder: EpicEncoder, tmp_path: Path) -> None:
    built_bank.save(tmp_path / "half", precision="float16")
    built_bank.save(tmp_path / "whole")
    sizes = [(tmp_path / name / "embeddings.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < sizes[1]
    read = DemonstrationBank.load(tmp_path / "half").embeddings_for(tiny_encoder.fingerprint)
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, built_bank.embeddings_for(tiny_encoder.fingerprint), atol=1e-3)


def test_a_bank_folder_can_be_copied(built_bank: DemonstrationBank, tiny_encoder: EpicEncoder, tmp_path: Path) -> None:
    built_bank.save(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    np.testing.assert_array_equal(
        DemonstrationBank.load(tmp_path / "two").embeddings_for(tiny_encoder.fingerprint), built_bank.embeddings
    )


def test_negatives_stay_with_the_bank_and_move_no_query(tmp_path: Path, tiny_encoder: EpicEncoder) -> None:
    wrong = Demonstration("take back a commit", "Cats sleep.")
    bank = DemonstrationBank([("undo", "Reset softly."), ("cats", "They sleep.")], negatives=[wrong])
    bank.embed(tiny_encoder)
    bank.save(tmp_path / "bank")
    loaded = DemonstrationBank.load(tmp_path / "bank")
    assert loaded.negatives == (wrong,)
    assert loaded.embeddings is not None
    plain = DemonstrationBank(bank.demonstrations)
    assert loaded.fingerprint == plain.fingerprint
    np.testing.assert_array_equal(
        tiny_encoder.encode_query("undo it", bank=loaded), tiny_encoder.encode_query("undo it", bank=plain)
    )
    more = loaded.add([("c", "d")], tiny_encoder)
    assert more.negatives == more.subset([0]).negatives == more.remove([0]).negatives == (wrong,)
    replaced = loaded.with_negatives([("a", "b"), ("a", "b")])
    assert replaced.negatives == (Demonstration("a", "b"),)
    assert replaced.embeddings is not None
    both = DemonstrationBank.merge([loaded, replaced, DemonstrationBank([("x", "y")], negatives=[wrong])])
    assert both.negatives == (wrong, Demonstration("a", "b"))
    with pytest.raises(BankError):
        loaded.with_negatives([("a", " ")])


# Prepared banks


@pytest.fixture
def prepared(tmp_path: Path, tiny_encoder: EpicEncoder) -> Path:
    bank = DemonstrationBank(FILE_PAIRS, instruction="find the section", negatives=[("a", "b")], origin="here")
    bank.prepare(tiny_encoder)
    bank.save(tmp_path / "prepared")
    return tmp_path / "prepared"


def test_a_query_with_a_prepared_bank_reads_neither_texts_nor_vectors(
    prepared: Path, tiny_encoder: EpicEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = embedded(DemonstrationBank(FILE_PAIRS, instruction="find the section"), tiny_encoder)
    expected = tiny_encoder.encode_query(["undo", "a café"], bank=plain, strategy="reader")
    with monkeypatch.context() as patched:
        patched.setattr("epic_rag.demonstrations._parse_bank", lambda *_: pytest.fail("texts are read"))
        patched.setattr("epic_rag.demonstrations.read_vectors", lambda *_, **__: pytest.fail("vectors are read"))
        patched.setattr(DemonstrationReader, "prepare", lambda *_: pytest.fail("prepared again"))
        found = tiny_encoder.encode_query(["undo", "a café"], bank=prepared, strategy="reader")
        loaded = DemonstrationBank.load(prepared)
        facts = (len(loaded), loaded.fingerprint, loaded.instruction, loaded.origin, loaded.enabled)
    np.testing.assert_array_equal(found, expected)
    assert facts == (len(plain), plain.fingerprint, "find the section", "here", True)
    # What else is asked for is read then.
    assert loaded.demonstrations == plain.demonstrations
    assert loaded.negatives == (Demonstration("a", "b"),)
    np.testing.assert_array_equal(loaded.embeddings_for(tiny_encoder.fingerprint), plain.embeddings)
    few = tiny_encoder.encode_query("undo", bank=loaded, num_demonstrations=2, strategy="reader")
    np.testing.assert_array_equal(
        few, tiny_encoder.encode_query("undo", bank=plain, num_demonstrations=2, strategy="reader")
    )
    task_vector = [tiny_encoder.encode_query("undo", bank=each, strategy="task-vector") for each in (loaded, plain)]
    np.testing.assert_array_equal(*task_vector)


def test_a_prepared_bank_is_changed_like_any_other(prepared: Path, tiny_encoder: EpicEncoder, tmp_path: Path) -> None:
    loaded = DemonstrationBank.load(prepared)
    loaded.enabled = False
    loaded.save(tmp_path / "off")
    again = DemonstrationBank.load(tmp_path / "off")
    assert not again.enabled
    assert again.prepared_for(tiny_encoder.fingerprint, tiny_encoder.reader.fingerprint) is not None
    more = loaded.add([("c", "d")], tiny_encoder)
    assert more.prepared_for(tiny_encoder.fingerprint, tiny_encoder.reader.fingerprint) is None
    more.save(prepared)
    assert sorted(os.listdir(prepared)) == ["bank.json", "embeddings.safetensors"]
    assert len(DemonstrationBank.load(prepared)) == len(loaded) + 1


@pytest.mark.parametrize("fault", ["edited", "cut", "other reader", "no facts"])
def test_prepared_demonstrations_that_do_not_belong_to_the_texts_are_not_used(
    prepared: Path, fault: str, tiny_encoder: EpicEncoder
) -> None:
    file = prepared / "prepared.safetensors"
    if fault == "edited":
        texts = (prepared / "bank.json").read_text("utf-8")
        (prepared / "bank.json").write_text(texts.replace("press Ctrl+Z", "press Escape"), encoding="utf-8")
    elif fault == "cut":
        file.write_bytes(file.read_bytes()[:200])
    elif fault == "no facts":
        from safetensors.numpy import save_file

        source = hashlib.sha256((prepared / "bank.json").read_bytes()).hexdigest()
        save_file({"0.offset": np.zeros(32, np.float32)}, file, metadata={"source": source})
    loaded = DemonstrationBank.load(prepared)
    other = "another" if fault == "other reader" else tiny_encoder.reader.fingerprint
    assert loaded.prepared_for(tiny_encoder.fingerprint, other) is None
    assert len(loaded.demonstrations) == len(FILE_PAIRS)
    assert ("Escape" in loaded.demonstrations[0].passage) == (fault == "edited")
