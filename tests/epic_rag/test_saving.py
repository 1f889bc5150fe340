"""Checkpoint folders: there and back, fingerprints, and the other libraries that open them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoTokenizer,
    LlamaConfig,
    LlamaModel,
    LlamaTokenizer,
)

from epic_rag import (
    CheckpointError,
    DemonstrationBank,
    EpicEncoder,
    PromptError,
)
from epic_rag.backbone import Backbone
from epic_rag.cpu_kernels import use_onednn
from epic_rag.prompt import PromptBuilder, PromptTemplate
from tests.conftest import make_encoder, make_tokenizer
from tests.helpers.model_files import word_piece_encoder

TEXTS = ["how do I install it", "", "the quick brown fox jumps over the lazy dog " * 2, "naïve 日本語"]
INSTRUCTION = "Given a question, retrieve passages that answer it"


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "epic.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **changes}))


def copy(folder: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(folder, target)
    edit(target, **changes)
    return target


# There and back


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("projector", ["scale", "linear", "mlp"])
def test_a_round_trip_changes_nothing(causal: bool, projector: Any, tmp_path: Path) -> None:
    encoder = make_encoder(causal=causal, projector=projector)
    with torch.no_grad():  # as if trained
        for parameter in encoder.backbone.projector.parameters():
            parameter.add_(0.01)
    vars(encoder.config).update(
        default_instruction="find it", max_demonstrations=3, temperature=0.05, training={"steps": 7}
    )
    use_onednn(encoder.backbone)  # as in what is loaded, so that not even rounding differs
    encoder.save_pretrained(tmp_path / "saved")
    loaded = EpicEncoder.from_pretrained(tmp_path / "saved")
    assert loaded.fingerprint == encoder.fingerprint
    assert loaded.config == encoder.config
    assert loaded.prompt.settings() == encoder.prompt.settings()
    assert (loaded.name, loaded.dtype, loaded.dimension) == (encoder.name, torch.float32, 32)
    assert (loaded.backbone.pooling, loaded.backbone.projector.kind) == (encoder.backbone.pooling, projector)
    bank = DemonstrationBank([("a", "b"), ("c", "d")])
    for options in ({}, {"instruction": INSTRUCTION}, {"bank": bank}, {"bank": bank, "strategy": "text"}):
        np.testing.assert_array_equal(loaded.encode_query(TEXTS, **options), encoder.encode_query(TEXTS, **options))
    np.testing.assert_array_equal(loaded.encode_document(TEXTS), encoder.encode_document(TEXTS))
    # And once more: saving what was loaded writes the same files.
    loaded.save_pretrained(tmp_path / "again")
    for file in sorted((tmp_path / "saved").rglob("*.*")):
        if file.is_file() and file.name != "tokenizer_config.json":  # where transformers notes that it was local
            assert (tmp_path / "again" / file.relative_to(tmp_path / "saved")).read_bytes() == file.read_bytes(), file


def test_what_is_in_a_folder(tiny_checkpoint: Path) -> None:
    files = {str(file.relative_to(tiny_checkpoint)) for file in tiny_checkpoint.rglob("*.*")}
    assert files >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "epic.json",
        "projector.safetensors",
        "modules.json",
        "1_Pooling/config.json",
    }
    assert not [file for file in files if file.endswith((".bin", ".pt", ".pkl", ".tmp"))]
    data = json.loads((tiny_checkpoint / "epic.json").read_text("utf-8"))
    assert data["format_version"] == 1
    assert data["template"]["instruction"] == "Instruct: {instruction}\n"
    assert (data["pooling"], data["projector"], data["append_eos"]) == ("last", "linear", True)
    assert (data["max_query_tokens"], data["max_document_tokens"], data["dimension"]) == (128, 128, 32)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.02), ("bfloat16", 0.1)])
def test_half_precision_on_disk(dtype: str, tolerance: float, tmp_path: Path) -> None:
    encoder = make_encoder()
    encoder.save_pretrained(tmp_path, dtype=dtype)
    stored = {value.dtype for value in load_file(tmp_path / "model.safetensors").values()}
    assert stored == {getattr(torch, dtype)}
    # What others compute in.
    assert AutoModel.from_pretrained(tmp_path).dtype == torch.float32
    loaded = EpicEncoder.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    np.testing.assert_allclose(loaded.encode_document(TEXTS), encoder.encode_document(TEXTS), atol=tolerance)
    # The encoder itself is as it was.
    assert encoder.dtype == torch.float32
    if dtype == "float16":  # bfloat16 keeps fewer bits than the fingerprint reads: another checkpoint
        assert loaded.fingerprint == encoder.fingerprint


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_the_fingerprint_does_not_depend_on_the_dtype_in_memory(stored: str, tmp_path: Path) -> None:
    make_encoder().save_pretrained(tmp_path, dtype=stored)
    found = {
        EpicEncoder.from_pretrained(tmp_path, dtype=kind).fingerprint for kind in ("float32", "float16", "bfloat16")
    }
    assert len(found) == 1


def test_the_width_is_kept(tiny_checkpoint: Path, tmp_path: Path, tiny_encoder: EpicEncoder) -> None:
    narrow = EpicEncoder.from_pretrained(tiny_checkpoint, truncate_dim=8)
    narrow.save_pretrained(tmp_path)
    loaded = EpicEncoder.from_pretrained(tmp_path)
    assert loaded.dimension == 8
    assert loaded.fingerprint == narrow.fingerprint
    np.testing.assert_array_equal(loaded.encode_document(TEXTS), narrow.encode_document(TEXTS))
    whole = EpicEncoder.from_pretrained(tmp_path, truncate_dim=32)
    assert whole.fingerprint == tiny_encoder.fingerprint


def test_saving_into_a_folder_that_holds_another_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "there")
    other = make_encoder(causal=False, projector="scale")
    other.save_pretrained(tmp_path / "there")
    assert EpicEncoder.from_pretrained(tmp_path / "there").fingerprint == other.fingerprint


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"No folder can be made at .*file .*Save the checkpoint elsewhere"):
        make_encoder().save_pretrained(tmp_path / "file")


def test_a_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_encoder().save_pretrained("~/mine")
    assert (tmp_path / "mine" / "epic.json").is_file()


# Fingerprints


def scaled(name: str) -> Callable[[EpicEncoder], None]:
    def change(encoder: EpicEncoder) -> None:
        with torch.no_grad():
            encoder.backbone.get_parameter(name).mul_(1.01)
        encoder.invalidate_caches()

    return change


def template(**changes: str) -> Callable[[EpicEncoder], None]:
    def change(encoder: EpicEncoder) -> None:
        encoder.prompt.template = PromptTemplate(**changes)  # type: ignore[arg-type]

    return change


CHANGES: dict[str, Callable[[EpicEncoder], None]] = {
    "a weight": scaled("transformer.layers.1.mlp.down_proj.weight"),
    "the token embeddings": scaled("transformer.embed_tokens.weight"),
    "the projector": scaled("projector.linear.bias"),
    "the projector's weight": scaled("projector.linear.weight"),
    "the instruction's line": template(instruction="Task: {instruction}\n"),
    "the word before a query": template(query="Q:"),
    "separators": template(separators="none"),
    "pooling": lambda encoder: setattr(encoder.backbone, "pooling", "mean"),
    "the end token": lambda encoder: setattr(encoder.prompt, "append_eos", False),
    "query length": lambda encoder: setattr(encoder.prompt, "max_query_tokens", 127),
    "document length": lambda encoder: setattr(encoder.prompt, "max_document_tokens", 127),
    "width": lambda encoder: setattr(encoder, "truncate_dim", 31),
    "default instruction": lambda encoder: vars(encoder.config).update(default_instruction="find it"),
}


def test_every_change_of_a_vector_is_a_change_of_the_fingerprint() -> None:
    found = {"unchanged": make_encoder().fingerprint}
    assert make_encoder().fingerprint == found["unchanged"]
    for name, change in CHANGES.items():
        encoder = make_encoder()
        if name == "the projector":
            with torch.no_grad():  # it starts at zero, which no factor changes
                encoder.backbone.projector.linear.bias.add_(0.5)
        assert encoder.fingerprint
        change(encoder)
        found[name] = encoder.fingerprint
    assert len(set(found.values())) == len(CHANGES) + 1


def test_what_changes_no_vector_is_no_change_of_the_fingerprint() -> None:
    encoder = make_encoder()
    before = encoder.fingerprint
    encoder.name, encoder.source, encoder.padding_side, encoder.max_batch_tokens = "other", "elsewhere", "left", 100
    vars(encoder.config).update(temperature=0.5, training={"steps": 1}, description="words", max_demonstrations=3)
    assert encoder.fingerprint == before


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 1},
        {"pooling": "mean"},
        {"max_query_tokens": 50},
        {"max_document_tokens": 50},
        {"truncate_dim": 8},
    ],
)
def test_options_of_loading_are_part_of_the_fingerprint(
    options: dict[str, Any], tiny_checkpoint: Path, tiny_encoder: EpicEncoder, tmp_path: Path
) -> None:
    changed = EpicEncoder.from_pretrained(tiny_checkpoint, **options)
    assert changed.fingerprint != tiny_encoder.fingerprint
    changed.save_pretrained(tmp_path)
    assert EpicEncoder.from_pretrained(tmp_path).fingerprint == changed.fingerprint


# Other libraries


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_transformers_opens_a_folder(kind: str, tmp_path: Path) -> None:
    encoder = make_encoder() if kind == "causal" else word_piece_encoder()
    encoder.save_pretrained(tmp_path)
    model, tokenizer = AutoModel.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    with torch.inference_mode():
        for text in TEXTS:
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            vector = states[-1] if kind == "causal" else states.mean(dim=0)
            np.testing.assert_allclose(encoder.encode_document(text), vector / vector.norm(), atol=1e-5)


@pytest.mark.parametrize("kind", ["causal", "causal, no padding token", "bidirectional"])
def test_sentence_transformers_opens_a_folder(kind: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    encoder = word_piece_encoder() if kind == "bidirectional" else make_encoder()
    if kind == "causal, no padding token":
        encoder.tokenizer.pad_token = None
        encoder.prompt = PromptBuilder(encoder.tokenizer, max_query_tokens=128, max_document_tokens=128)
    encoder.config.default_instruction = INSTRUCTION
    encoder.save_pretrained(tmp_path)
    if kind == "causal, no padding token":
        assert encoder.tokenizer.pad_token is None
    assert EpicEncoder.from_pretrained(tmp_path).fingerprint == encoder.fingerprint
    opened = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(opened.encode_document(TEXTS), encoder.encode_document(TEXTS), atol=1e-5)
    np.testing.assert_allclose(opened.encode_query(TEXTS), encoder.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(
        opened.encode(["the quick brown fox " * 200]),
        encoder.encode_document(["the quick brown fox " * 200]),
        atol=1e-5,
    )


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_folder_of_sentence_transformers_is_opened_as_it_means_to_be(pooling: Any, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    encoder = word_piece_encoder()
    encoder.save_pretrained(tmp_path / "plain")
    for file in ("epic.json", "projector.safetensors", "modules.json", "sentence_bert_config.json"):
        (tmp_path / "plain" / file).unlink()
    shutil.rmtree(tmp_path / "plain" / "1_Pooling")
    parts = [Transformer(str(tmp_path / "plain"), max_seq_length=20), Pooling(32, pooling), Normalize()]
    theirs = SentenceTransformer(modules=parts, device="cpu")
    theirs.save(str(tmp_path / "theirs"), create_model_card=False)
    loaded = EpicEncoder.from_pretrained(tmp_path / "theirs")
    assert loaded.backbone.pooling == pooling
    assert loaded.max_document_tokens == 20
    texts = [*TEXTS, "the quick brown fox " * 30]
    np.testing.assert_allclose(loaded.encode_document(texts), theirs.encode(texts), atol=1e-5)


@pytest.mark.parametrize("flag", ["mean_tokens", "cls_token", "lasttoken"])
def test_older_folders_of_sentence_transformers(flag: str, tmp_path: Path) -> None:
    word_piece_encoder().save_pretrained(tmp_path)
    (tmp_path / "epic.json").unlink()
    (tmp_path / "1_Pooling" / "config.json").write_text(
        json.dumps({f"pooling_mode_{flag}": True, "pooling_mode_x": False})
    )
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 33}')
    if flag == "lasttoken":
        with pytest.raises(PromptError, match="needs an end-of-sequence token"):  # a BERT has none
            EpicEncoder.from_pretrained(tmp_path)
        return
    loaded = EpicEncoder.from_pretrained(tmp_path)
    assert loaded.backbone.pooling == flag.split("_")[0]
    assert loaded.max_document_tokens == loaded.max_query_tokens == 33


def test_a_llama_tokenizer_keeps_its_start_and_gains_the_end(tmp_path: Path) -> None:
    """Llama's tokenizer class rebuilds its special tokens when it is loaded; the end must survive that."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in ("▁", *sorted(make_tokenizer().get_vocab())):
        vocabulary.setdefault(token, len(vocabulary))
    LlamaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True).save_pretrained(tmp_path / "plain")
    file = tmp_path / "plain" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "add_bos_token": True, "add_eos_token": False}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = LlamaModel(
            LlamaConfig(
                vocab_size=len(vocabulary),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    builder = PromptBuilder(tokenizer, max_query_tokens=64, max_document_tokens=64)
    assert (builder.start, builder.stop) == ((1,), (2,))
    encoder = EpicEncoder(Backbone(base.eval()).eval(), builder)
    encoder.save_pretrained(tmp_path)
    loaded = EpicEncoder.from_pretrained(tmp_path)
    assert (loaded.prompt.start, loaded.prompt.stop) == ((1,), (2,))
    assert loaded.fingerprint == encoder.fingerprint
    np.testing.assert_array_equal(loaded.encode_document(TEXTS), encoder.encode_document(TEXTS))
    ids = AutoTokenizer.from_pretrained(tmp_path)("a b")["input_ids"]
    assert (ids[0], ids[-1]) == (1, 2)
    assert ids == list(encoder.prompt.documents(["a b"])[0].ids)
