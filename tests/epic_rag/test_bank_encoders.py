"""Banks that hold the vectors of several encoders."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from epic_rag import DemonstrationBank, EpicEncoder
from tests.conftest import make_encoder
from tests.helpers.banks import embedded

PAIRS = [
    ("how do I undo this", "To undo a step, press Ctrl+Z."),
    ("change the language", "Open Settings, then Language."),
    ("E1042 on startup", "The licence file could not be read."),
]


@pytest.fixture
def bank() -> DemonstrationBank:
    return DemonstrationBank(PAIRS, instruction="find the section")


@pytest.fixture
def other() -> EpicEncoder:
    return make_encoder(seed=5)


def test_a_bank_serves_several_encoders_without_embedding_again(
    bank: DemonstrationBank,
    tiny_encoder: EpicEncoder,
    other: EpicEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = {
        encoder.fingerprint: embedded(DemonstrationBank(PAIRS, instruction="find the section"), encoder).embeddings
        for encoder in (tiny_encoder, other)
    }
    assert embedded(bank, tiny_encoder, other) is bank
    bank.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["bank.json", "embeddings.safetensors"]
    data = json.loads((tmp_path / "bank.json").read_text("utf-8"))
    # What a release that knows one encoder alone looks for is as it was.
    assert (data["format_version"], data["encoder_fingerprint"]) == (1, tiny_encoder.fingerprint)
    assert data["other_encoders"] == {other.fingerprint: 32}
    for encoder in (tiny_encoder, other):
        monkeypatch.setattr(encoder, "embed_demonstrations", lambda bank: pytest.fail("embedded again"))
    with caplog.at_level(logging.INFO, "epic_rag"):
        for encoder in (tiny_encoder, other):
            loaded = DemonstrationBank.load(tmp_path)
            assert loaded.encoder_fingerprints == (tiny_encoder.fingerprint, other.fingerprint)
            encoder.encode_query("a", bank=loaded)
            encoder.encode_query("a", bank=loaded, num_demonstrations=2, selection="nearest")
            assert loaded.encoder_fingerprint == tiny_encoder.fingerprint
            half = embedded(loaded.select(2, method="random", seed=3), encoder)
            rows = [PAIRS.index((item.query, item.passage)) for item in half.demonstrations]
            np.testing.assert_array_equal(half.embeddings, expected[encoder.fingerprint][rows])
            np.testing.assert_array_equal(
                DemonstrationBank.load(tmp_path, encoder).embeddings_for(encoder.fingerprint),
                expected[encoder.fingerprint],
            )
    assert caplog.text == ""
    monkeypatch.undo()


def test_building_keeps_the_vectors_of_the_encoders_that_are_named(
    bank: DemonstrationBank, tiny_encoder: EpicEncoder, other: EpicEncoder, tmp_path: Path
) -> None:
    third = make_encoder(seed=6)
    first = embedded(bank, tiny_encoder, other).embeddings
    assert embedded(bank, other, third, tiny_encoder).encoder_fingerprints == (
        other.fingerprint,
        third.fingerprint,
        tiny_encoder.fingerprint,
    )
    assert repr(bank).endswith(f"embedded under {', '.join(bank.encoder_fingerprints)})")
    assert embedded(bank, tiny_encoder).embeddings is first
    assert bank.encoder_fingerprints == (tiny_encoder.fingerprint,)
    bank.save(tmp_path)
    assert DemonstrationBank.load(tmp_path).encoder_fingerprints == (tiny_encoder.fingerprint,)
    assert "other_encoders" not in json.loads((tmp_path / "bank.json").read_text("utf-8"))
    assert embedded(bank, tiny_encoder, tiny_encoder).encoder_fingerprints == (tiny_encoder.fingerprint,)


def test_edited_texts_lose_the_vectors_of_every_encoder(
    bank: DemonstrationBank, tiny_encoder: EpicEncoder, other: EpicEncoder, tmp_path: Path
) -> None:
    embedded(bank, tiny_encoder, other).save(tmp_path)
    file = tmp_path / "bank.json"
    file.write_text(file.read_text("utf-8").replace("press Ctrl+Z", "press Escape"), encoding="utf-8")
    assert DemonstrationBank.load(tmp_path).encoder_fingerprints == ()


def test_a_file_of_one_encoder_from_before_is_read(
    tmp_path: Path, bank: DemonstrationBank, tiny_encoder: EpicEncoder
) -> None:
    from safetensors.numpy import save_file

    built = embedded(bank, tiny_encoder)
    built.save(tmp_path)
    assert built.embeddings is not None
    metadata = {"encoder": str(built.encoder_fingerprint), "bank": built.fingerprint}
    save_file({"embeddings": built.embeddings}, tmp_path / "embeddings.safetensors", metadata=metadata)
    loaded = DemonstrationBank.load(tmp_path)
    assert loaded.encoder_fingerprints == built.encoder_fingerprints
    np.testing.assert_array_equal(loaded.embeddings, built.embeddings)
