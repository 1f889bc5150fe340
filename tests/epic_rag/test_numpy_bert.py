"""`NumpyBert` gives the vectors and fingerprints of torch, takes no checkpoint that it cannot run, and loads no torch."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from epic_rag import ConfigError, EpicEncoder, QueryPrompt, numpy_bert
from epic_rag import encoder as encoder_module
from epic_rag.backbone import PROJECTORS, Pooling, ProjectorKind
from epic_rag.checkpoints import EncoderConfig, read_epic_file, resolve
from epic_rag.files import save_tensors
from epic_rag.numpy_bert import open_numpy_bert
from tests.conftest import make_encoder

SHIPPED = resolve("epic-minilm")
WORDS = st.sampled_from(
    [
        "undo",
        "the",
        "last",
        "commit",
        "Übergröße",
        "数据库",
        "नमस्ते",
        "\u200b",
        "[SEP]",
        "<eos>",
        "a\ud800b",
        "😀",
        "\n",
        "E=mc²",
    ]
)
TEXTS = st.one_of(
    st.lists(WORDS, max_size=40).map(" ".join),
    st.text(max_size=60),
    st.integers(1, 600).map(lambda count: "word " * count),
)


def open_both(folder: Path) -> tuple[EpicEncoder, EpicEncoder]:
    """Return the encoder of a folder with numpy and with torch."""
    epic = read_epic_file(folder)
    opened = open_numpy_bert(folder, epic, max_query_tokens=None, max_document_tokens=None)
    assert opened is not None
    opened[0].tokens_left = sys.maxsize
    light = EpicEncoder(*opened, name=folder.name, config=EncoderConfig.from_dict(epic))
    light.truncate_dim = epic.get("truncate_dim")
    return light, EpicEncoder.from_pretrained(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def shipped() -> tuple[EpicEncoder, EpicEncoder]:
    return open_both(SHIPPED)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(texts=st.lists(TEXTS, max_size=4), bank=st.sampled_from([None, "docs", "sts"]), k=st.integers(1, 8))
def test_vectors_are_those_of_torch(
    shipped: tuple[EpicEncoder, EpicEncoder], texts: list[str], bank: str | None, k: int
) -> None:
    light, full = shipped
    prompt = QueryPrompt(bank=bank, num_demonstrations=None if bank is None else k, selection="nearest")
    np.testing.assert_allclose(light.encode_query(texts, prompt), full.encode_query(texts, prompt), atol=1e-5)
    np.testing.assert_allclose(light.encode_document(texts), full.encode_document(texts), atol=1e-5)
    assert "backbone" not in light.__dict__


@pytest.mark.parametrize("tokens", [1, 2, 3, 64, 255, 256, 257, 512])
def test_every_length(shipped: tuple[EpicEncoder, EpicEncoder], tokens: int) -> None:
    for encoder in shipped:
        encoder.prompt.max_document_tokens = 512
    try:
        text = "word " * (tokens - 2) if tokens > 2 else ""
        light, full = (encoder.encode_document([text, "short"]) for encoder in shipped)
    finally:
        for encoder in shipped:
            encoder.prompt.max_document_tokens = 256
    np.testing.assert_allclose(light, full, atol=1e-5)


def test_gelu_is_exact_to_rounding() -> None:
    x = np.concatenate([np.linspace(-12, 12, 20001), [0.0, -0.0, 1e-30, 1e4, -1e4]]).astype(np.float32)
    exact = [value * 0.5 * (1 + math.erf(value / 2**0.5)) for value in x.astype(float)]
    np.testing.assert_allclose(numpy_bert._gelu(x.copy()), exact, atol=1e-6, rtol=1e-6)


def variant(
    folder: Path,
    *,
    pooling: Pooling = "mean",
    projector: ProjectorKind = "linear",
    head: bool = False,
    dtype: str = "float32",
    truncate_dim: int | None = None,
) -> Path:
    """Save a tiny BERT and return its folder."""
    encoder = make_encoder(causal=False, projector=projector)
    encoder.backbone.pooling = pooling
    if head:
        encoder.backbone.set_head(nn.Linear(32, 24))
    encoder.truncate_dim = truncate_dim
    encoder.config.strategy = "task-vector"
    encoder.save_pretrained(folder, dtype=dtype)
    return folder


VARIANTS: list[dict[str, Any]] = [
    *({"dtype": dtype} for dtype in ("float32", "float16", "int8")),
    *({"pooling": pooling} for pooling in ("cls", "last")),
    *({"projector": kind, "dtype": "int8"} for kind in PROJECTORS),
    {"head": True},
    {"head": True, "dtype": "int8", "truncate_dim": 8},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_kind_of_checkpoint(tmp_path: Path, changes: dict[str, Any]) -> None:
    light, full = open_both(variant(tmp_path, **changes))
    texts = ["how do I undo the last commit?", "", "the " * 300, "naïve 数据"]
    assert light.fingerprint == full.fingerprint
    assert light.dimension == full.dimension
    for bank in (None, "docs"):
        np.testing.assert_allclose(light.encode_query(texts, bank=bank), full.encode_query(texts, bank=bank), atol=1e-5)
    np.testing.assert_allclose(light.encode_document(texts), full.encode_document(texts), atol=1e-5)


def test_the_shipped_fingerprint(shipped: tuple[EpicEncoder, EpicEncoder]) -> None:
    light, full = shipped
    assert light.fingerprint == full.fingerprint


def _edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        kept = {key: value for key, value in {**content, **changes}.items() if value is not ...}
        (folder / name).write_text(json.dumps(kept), encoding="utf-8")

    return edit


def _drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("encoder.layer.1.output.dense.bias")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _bfloat16(folder: Path) -> None:
    tensors = {name: value.to(torch.bfloat16) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


REFUSED: dict[str, Callable[[Path], None]] = {
    "another architecture": _edit_json("config.json", model_type="roberta"),
    "another activation": _edit_json("config.json", hidden_act="relu"),
    "another number of layers": _edit_json("config.json", num_hidden_layers=3),
    "another vocabulary": _edit_json("config.json", vocab_size=7),
    "a decoder": _edit_json("config.json", is_decoder=True),
    "no settings": lambda folder: (folder / "epic.json").unlink(),
    "an unknown setting": _edit_json("epic.json", template={"unknown": "x"}),
    "a truncate_dim that is no number": _edit_json("epic.json", truncate_dim="x"),
    "a missing setting": _edit_json("epic.json", max_query_tokens=...),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "a broken tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "another tokenizer": _edit_json("tokenizer_config.json", tokenizer_class="XLNetTokenizer"),
    "texts cut at the start": _edit_json("tokenizer_config.json", truncation_side="left"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "a missing tensor": _drop_a_tensor,
    "a file that is cut short": _cut_short,
    "weights that are no safetensors": lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100),
    "an empty file": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "bfloat16": _bfloat16,
    "no projector": lambda folder: (folder / "projector.safetensors").unlink(),
    "a head with an activation": lambda folder: _edit_json(
        "2_Dense/config.json", activation_function="torch.nn.modules.activation.Tanh"
    )(folder),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_checkpoints_are_left_to_torch(tmp_path: Path, what: str) -> None:
    folder = variant(tmp_path / "model", head=True)
    REFUSED[what](folder)
    epic = read_epic_file(folder)
    assert open_numpy_bert(folder, epic, max_query_tokens=None, max_document_tokens=None) is None


def test_the_normalizer_must_be_the_one_of_the_tokenizers_class(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(SHIPPED, folder)
    epic = read_epic_file(folder)
    assert open_numpy_bert(folder, epic, max_query_tokens=None, max_document_tokens=None) is not None
    _edit_json("tokenizer_config.json", do_lower_case=False)(folder)
    assert open_numpy_bert(folder, epic, max_query_tokens=None, max_document_tokens=None) is None


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match="max_query_tokens is 0"):
        open_numpy_bert(SHIPPED, read_epic_file(SHIPPED), max_query_tokens=0, max_document_tokens=None)


def open_deferred(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> EpicEncoder:
    """Call `from_pretrained` as in a process that has not imported torch."""
    with monkeypatch.context() as patch:
        patch.setattr(encoder_module, "sys", SimpleNamespace(modules={}))
        return EpicEncoder.from_pretrained(**settings)


@pytest.mark.parametrize(
    "use",
    [
        lambda encoder: encoder.encode_document(["word " * 250] * 17),
        lambda encoder: encoder.encode_query("x", bank="docs", num_demonstrations=4, strategy="epic"),
        lambda encoder: encoder.backbone,
        lambda encoder: encoder.tokenizer("a", return_tensors="pt"),
        lambda encoder: encoder.device,
        lambda encoder: encoder.max_batch_tokens,
    ],
    ids=["many texts", "slots", "backbone", "tokenizer", "device", "max_batch_tokens"],
)
def test_everything_else_loads_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[EpicEncoder], Any]
) -> None:
    folder = variant(tmp_path)
    encoder = open_deferred(monkeypatch, name_or_path=folder, max_document_tokens=256)
    before, fingerprint = encoder.encode_query("undo a commit"), encoder.fingerprint
    assert "backbone" not in encoder.__dict__
    use(encoder)
    assert "backbone" in encoder.__dict__
    np.testing.assert_allclose(encoder.encode_query("undo a commit"), before, atol=1e-5)
    assert encoder.fingerprint == fingerprint
    assert encoder.tokenizer is encoder.prompt.tokenizer
    assert encoder.max_document_tokens == 256


def test_copies_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = open_deferred(monkeypatch, name_or_path=variant(tmp_path, dtype="int8"))
    vector = encoder.encode_query("undo a commit")
    for other in (copy.copy(encoder), copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        np.testing.assert_array_equal(other.encode_query("undo a commit"), vector)
        assert "backbone" not in other.__dict__
        np.testing.assert_allclose(other.encode_query(["undo a commit"] * 800)[0], vector, atol=1e-5)
        assert "backbone" in other.__dict__


def test_many_small_calls_load_torch_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = open_deferred(monkeypatch, name_or_path=variant(tmp_path))
    for _ in range(100):
        encoder.encode_query("one query at a time")
    assert "backbone" not in encoder.__dict__
    calls = 0
    while "backbone" not in encoder.__dict__:
        encoder.encode_document(["word " * 100] * 5)
        calls += 1
    assert calls == 4096 // (5 * encoder.max_document_tokens) + 1


def test_a_shallow_copy_does_not_use_up_the_tokens_of_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = open_deferred(monkeypatch, name_or_path=variant(tmp_path))
    tokenizer = encoder.prompt.tokenizer
    for _ in range(3):
        other = copy.copy(encoder)
        other.encode_document(["word " * 100] * 100)
        assert "backbone" in other.__dict__
    encoder.encode_document(["word " * 100] * 5)
    assert "backbone" not in encoder.__dict__
    assert encoder.prompt.tokenizer is tokenizer


def test_saving_over_the_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_weights = make_encoder(causal=False, seed=1)
    for dtype in ("int8", "float32", "float32", "int8", "int8"):
        folder = variant(tmp_path, dtype=dtype)
        encoder = open_deferred(monkeypatch, name_or_path=folder)
        before, fingerprint = encoder.encode_query("undo a commit"), encoder.fingerprint
        other_weights.save_pretrained(folder, dtype=dtype)
        # It reads the files that were there when it was opened.
        encoder.invalidate_caches()
        assert encoder.fingerprint == fingerprint
        np.testing.assert_allclose(encoder.encode_query("undo a commit"), before, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [{"dtype": "bfloat16"}, {"num_layers": 2}, {"device": ["cpu"]}, {"projector": "linear"}, {"pooling": "cls"}],
    ids=str,
)
def test_other_arguments_load_torch_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    encoder = open_deferred(monkeypatch, name_or_path=variant(tmp_path), **arguments)
    assert "backbone" in encoder.__dict__


def test_errors_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        ({"truncate_dim": 0}, "truncate_dim is 0, but the model has 384 dimensions. Choose 1 to 384."),
        ({"truncate_dim": 385}, "truncate_dim is 385, but the model has 384 dimensions. Choose 1 to 384."),
        ({"max_document_tokens": 0}, "max_document_tokens is 0. Pass 1 or more."),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            open_deferred(monkeypatch, **arguments)
    with pytest.raises(ConfigError, match=re.escape("batch_size is 0. Pass 1 or more.")):
        open_deferred(monkeypatch).encode_query("x", batch_size=0)


def test_a_handful_of_texts_imports_no_torch() -> None:
    code = """
import sys
from epic_rag import EpicEncoder
encoder = EpicEncoder.from_pretrained(dtype="auto", truncate_dim=64)
encoder.encode_query(["undo a commit", "x"], bank="docs", num_demonstrations=16)
encoder.encode_document("a text"), encoder.fingerprint
encoder.count_tokens(["a"]), encoder.dimension, encoder.encode_query([])
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_hash_of_unchanged_files_is_not_computed_again(tmp_path: Path) -> None:
    folder = variant(tmp_path, head=True, dtype="int8")
    recorded = read_epic_file(folder)["weights_hash"]["values"]
    light, full = open_both(folder)
    assert light.fingerprint == full.fingerprint
    _edit_json("epic.json", weights_hash={**read_epic_file(folder)["weights_hash"], "values": "0" * 64})(folder)
    trusted, _ = open_both(folder)
    assert trusted.fingerprint != full.fingerprint
    # Other weights in the same folder, under the settings of the former ones.
    for file in ("projector.safetensors", "2_Dense/model.safetensors", "model-int8-00001-of-00001.safetensors"):
        tensors = load_file(folder / file)
        name = next(name for name, value in tensors.items() if value.dtype == torch.float32 and value.ndim == 1)
        save_tensors({**tensors, name: tensors[name] + 1}, folder / file)
        light, full = open_both(folder)
        assert light.fingerprint == full.fingerprint
        assert light.fingerprint not in (recorded, trusted.fingerprint)
        save_tensors(tensors, folder / file)


def test_the_recorded_hash_of_the_shipped_checkpoint() -> None:
    epic = read_epic_file(SHIPPED)
    known = open_numpy_bert(SHIPPED, epic, max_query_tokens=None, max_document_tokens=None)
    computed = open_numpy_bert(SHIPPED, {**epic, "weights_hash": None}, max_query_tokens=None, max_document_tokens=None)
    assert known is not None
    assert computed is not None
    assert known[0].weights_hash() == computed[0].weights_hash() == epic["weights_hash"]["values"]
