"""Banks on disk and back, and what happens to files that are broken."""

from __future__ import annotations

import gzip
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

from epic_rag import (
    BankError,
    DataError,
    Demonstration,
    DemonstrationBank,
    EpicEncoder,
    FingerprintError,
)
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


# JSON lines


@PROPERTY
@given(
    content=pairs.filter(bool),
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
    file = tmp_path_factory.mktemp("pairs") / f"pairs.jsonl{'.gz' if packed else ''}"
    file.write_bytes(gzip.compress(data) if packed else data)
    bank = DemonstrationBank.from_jsonl(file, instruction="x", task="sts")
    assert [(item.query, item.passage) for item in bank.demonstrations] == content
    assert (bank.instruction, bank.task, bank.symmetric) == ("x", "sts", True)


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
    file = rows(tmp_path / "pairs.jsonl", GOOD, "", line)
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
        DemonstrationBank.from_jsonl(rows(tmp_path / "empty.jsonl", "", " "))


def test_a_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    rows(tmp_path / "pairs.jsonl", GOOD)
    DemonstrationBank.from_jsonl("~/pairs.jsonl").save("~/mine")
    assert len(DemonstrationBank.load("~/mine")) == 1
    assert (tmp_path / "mine" / "bank.json").is_file()


# Folders


@PROPERTY
@given(
    content=pairs,
    instruction=st.none() | text,
    task=st.none() | text | st.sampled_from(["docs", "sts"]),
    symmetric=st.none() | st.booleans(),
    origin=st.text(max_size=20),
)
def test_save_and_load_round_trip(
    tmp_path_factory: pytest.TempPathFactory, content: list[tuple[str, str]], origin: str, **settings: Any
) -> None:
    bank = DemonstrationBank(content, origin=origin, **settings)
    folder = tmp_path_factory.mktemp("banks")
    bank.save(folder)
    loaded = DemonstrationBank.load(folder)
    for name in ("demonstrations", "instruction", "task", "symmetric", "origin", "fingerprint"):
        assert getattr(loaded, name) == getattr(bank, name)
    assert loaded.embeddings is None
    assert os.listdir(folder) == ["bank.json"]


def test_vectors_round_trip_and_are_used_as_they_are(
    built: DemonstrationBank, tiny_encoder: EpicEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built.save(tmp_path / "bank")
    assert sorted(os.listdir(tmp_path / "bank")) == ["bank.json", "embeddings.safetensors"]
    data = json.loads((tmp_path / "bank" / "bank.json").read_text("utf-8"))
    assert (data["format_version"], data["dimension"]) == (1, 32)
    assert data["encoder_fingerprint"] == tiny_encoder.fingerprint
    monkeypatch.setattr(tiny_encoder, "embed_demonstrations", lambda bank: pytest.fail("embedded again"))
    loaded = DemonstrationBank.load(tmp_path / "bank", tiny_encoder)
    assert loaded.embeddings is not None
    assert (loaded.embeddings.shape, loaded.embeddings.dtype) == ((4, 2, 32), np.float32)
    np.testing.assert_array_equal(loaded.embeddings, built.embeddings)
    tiny_encoder.encode_query("a", bank=tmp_path / "bank")


def test_a_bank_without_vectors_deletes_those_of_the_bank_it_replaces(built: DemonstrationBank, tmp_path: Path) -> None:
    built.save(tmp_path)
    DemonstrationBank(PAIRS[:1]).save(tmp_path)
    assert os.listdir(tmp_path) == ["bank.json"]
    assert DemonstrationBank.load(tmp_path).embeddings is None


def test_edited_texts_lose_their_vectors(
    built: DemonstrationBank, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    built.save(tmp_path)
    file = tmp_path / "bank.json"
    edited = file.read_text("utf-8").replace("press Ctrl+Z", "press Escape")
    assert edited != file.read_text("utf-8")
    file.write_text(edited, encoding="utf-8")
    with caplog.at_level(logging.INFO, "epic_rag"):
        loaded = DemonstrationBank.load(tmp_path)
    assert loaded.embeddings is None
    assert loaded.encoder_fingerprint is None
    assert "do not belong to its texts; they will be computed again" in caplog.text


@pytest.mark.parametrize("crash", ["while vectors are written", "between the two", "while texts are written"])
def test_a_crash_while_saving_leaves_no_wrong_vectors(
    crash: str, built: DemonstrationBank, tmp_path: Path, tiny_encoder: EpicEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old bank stays whole, or its vectors count as not there; never the one's texts with the other's vectors."""
    other = make_encoder(seed=5)
    built.save(tmp_path)
    newer = embedded(DemonstrationBank(PAIRS, instruction="find the section"), other)
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
    assert loaded.demonstrations == built.demonstrations
    if crash == "while vectors are written":
        np.testing.assert_array_equal(loaded.embeddings_for(tiny_encoder.fingerprint), built.embeddings)
    else:
        assert loaded.embeddings is None
        np.testing.assert_allclose(
            embedded(loaded, tiny_encoder).embeddings_for(tiny_encoder.fingerprint), built.embeddings, atol=1e-6
        )
    newer.save(tmp_path)
    np.testing.assert_array_equal(DemonstrationBank.load(tmp_path).embeddings_for(other.fingerprint), newer.embeddings)


def test_unreadable_vectors_are_made_again(
    built: DemonstrationBank, tiny_encoder: EpicEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    built.save(tmp_path)
    vectors = tmp_path / "embeddings.safetensors"
    vectors.write_bytes(vectors.read_bytes()[:100])
    with caplog.at_level(logging.WARNING, "epic_rag"):
        loaded = DemonstrationBank.load(tmp_path, tiny_encoder)
    assert "cannot be read" in caplog.text
    np.testing.assert_allclose(loaded.embeddings_for(tiny_encoder.fingerprint), built.embeddings, atol=1e-6)


def test_vectors_of_another_shape_are_not_used(built: DemonstrationBank, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    built.save(tmp_path)
    assert built.embeddings is not None
    metadata = {"encoder": str(built.encoder_fingerprint), "bank": built.fingerprint}
    save_file({"embeddings": built.embeddings[:3]}, tmp_path / "embeddings.safetensors", metadata=metadata)
    assert DemonstrationBank.load(tmp_path).embeddings is None


def test_another_encoders_vectors_are_made_again_with_a_log_line(
    built: DemonstrationBank, tiny_encoder: EpicEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = make_encoder(seed=5)
    fresh = embedded(DemonstrationBank(PAIRS, instruction="find the section"), other)
    built.save(tmp_path)
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
    np.testing.assert_array_equal(kept.embeddings, built.embeddings)


def test_an_empty_bank_can_be_built_and_saved(tiny_encoder: EpicEncoder, tmp_path: Path) -> None:
    bank = embedded(DemonstrationBank([]), tiny_encoder)
    assert bank.embeddings is not None
    assert bank.embeddings.shape == (0, 2, 32)
    bank.save(tmp_path)
    assert DemonstrationBank.load(tmp_path).embeddings_for(tiny_encoder.fingerprint).shape == (0, 2, 32)


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
    DemonstrationBank(PAIRS[:1]).save("docs")
    assert len(DemonstrationBank.load("docs")) > 1
    assert len(DemonstrationBank.load("./docs")) == 1


def test_a_folder_that_cannot_be_made(bank: DemonstrationBank, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BankError, match=r"No folder can be made at .*file .*Save the bank elsewhere"):
        bank.save(tmp_path / "file")


def test_a_bank_folder_can_be_copied(built: DemonstrationBank, tiny_encoder: EpicEncoder, tmp_path: Path) -> None:
    built.save(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    np.testing.assert_array_equal(
        DemonstrationBank.load(tmp_path / "two").embeddings_for(tiny_encoder.fingerprint), built.embeddings
    )
