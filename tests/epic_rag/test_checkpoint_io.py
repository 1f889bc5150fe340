"""Loading a transformer: the first layers only, with an adapter, from GGUF, from a broken folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    LlamaConfig,
    LlamaModel,
    LlamaTokenizer,
)

from epic_rag import (
    CheckpointError,
    ConfigError,
    DemonstrationBank,
    EpicEncoder,
    PromptError,
)
from epic_rag.backbone import Backbone, load_transformer, truncate_layers
from epic_rag.cpu_kernels import use_onednn
from epic_rag.prompt import PromptBuilder, PromptTemplate
from tests.conftest import make_encoder, make_tokenizer
from tests.helpers.families import INSTRUCTION, TEXTS, TOKENIZER, by_input_ids, config, encoder, transformer
from tests.helpers.model_files import make_adapter, word_piece_encoder, write_gguf

# The first layers


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bert", "distilbert", "modernbert"])
def test_the_first_layers_are_the_first_layers(family: str, tmp_path: Path) -> None:
    whole = transformer(config(family, num_hidden_layers=3))
    whole.save_pretrained(tmp_path / "whole")
    cut = load_transformer(tmp_path / "whole", num_layers=2)
    assert cut.config.num_hidden_layers == 2
    # By hand: a model of two layers from the start, with the weights of the same names.
    short = transformer(config(family, num_hidden_layers=2), seed=1)
    missing = short.load_state_dict(whole.state_dict(), strict=False).missing_keys
    assert missing == []
    ids = [*TOKENIZER(TEXTS[2])["input_ids"], 0]
    torch.testing.assert_close(by_input_ids(cut, ids), by_input_ids(short, ids), atol=1e-6, rtol=0)
    assert (by_input_ids(cut, ids) - by_input_ids(whole, ids)).abs().max() > 1e-2
    cut.save_pretrained(tmp_path / "cut")
    torch.testing.assert_close(by_input_ids(load_transformer(tmp_path / "cut"), ids), by_input_ids(cut, ids))


def test_the_cut_takes_the_states_after_that_layer(tmp_path: Path) -> None:
    whole = transformer(config("llama", num_hidden_layers=3))
    whole.save_pretrained(tmp_path)
    ids = torch.tensor([TOKENIZER(TEXTS[2])["input_ids"]])
    with torch.inference_mode():
        after_first = whole.norm(whole(input_ids=ids, output_hidden_states=True).hidden_states[1])
    torch.testing.assert_close(by_input_ids(load_transformer(tmp_path, num_layers=1), ids[0].tolist()), after_first[0])


@pytest.mark.parametrize("number", [0, -1, 4])
def test_a_number_of_layers_that_is_not_there(number: int, tmp_path: Path) -> None:
    transformer(config("llama", num_hidden_layers=3)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"num_layers is {number}, but the model has 3 layers. Choose 1 to 3"):
        load_transformer(tmp_path, num_layers=number)


def test_only_the_text_models_own_layers_are_cut() -> None:
    model = transformer(config("gemma3_images"))
    truncate_layers(model, 1)
    assert len(model.language_model.layers) == 1
    assert len(model.vision_tower.encoder.layers) == 2


def test_a_list_inside_a_layer_is_left_alone() -> None:
    # As many experts as layers.
    model = transformer(config("llama", num_hidden_layers=2))
    for layer in model.layers:
        layer.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    truncate_layers(model, 1)
    assert [len(layer.experts) for layer in model.layers] == [2]


# Adapters


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    transformer(config("llama")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("head", [False, True], ids=["of the model", "of the model with a head"])
def test_an_adapter_is_merged(llama_folder: Path, tmp_path: Path, head: bool) -> None:
    kind = transformers.AutoModelForCausalLM if head else AutoModel
    settings = {"task_type": "CAUSAL_LM"} if head else {}
    with torch.random.fork_rng():
        merged = make_adapter(
            kind.from_pretrained(llama_folder), tmp_path, target_modules=["q_proj", "down_proj"], **settings
        )
    own = merged.model if head else merged
    loaded = load_transformer(llama_folder, adapter=tmp_path)
    ids = TOKENIZER(TEXTS[2])["input_ids"]
    torch.testing.assert_close(by_input_ids(loaded, ids), by_input_ids(own, ids), atol=1e-5, rtol=0)
    assert (by_input_ids(loaded, ids) - by_input_ids(load_transformer(llama_folder), ids)).abs().max() > 1e-2
    # What comes out is a plain model, whose weights carry their own names.
    assert {name for name, _ in loaded.named_parameters()} == {
        name for name, _ in load_transformer(llama_folder).named_parameters()
    }


def test_an_adapter_goes_on_before_layers_are_cut(llama_folder: Path, tmp_path: Path) -> None:
    merged = make_adapter(AutoModel.from_pretrained(llama_folder), tmp_path, target_modules=["v_proj"])
    truncate_layers(merged, 1)
    ids = TOKENIZER(TEXTS[2])["input_ids"]
    loaded = load_transformer(llama_folder, adapter=tmp_path, num_layers=1)
    torch.testing.assert_close(by_input_ids(loaded, ids), by_input_ids(merged, ids))


def test_an_adapter_that_does_not_fit_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json. Name the folder of a PEFT adapter"):
        load_transformer(llama_folder, adapter=tmp_path)
    # Of a model with more layers than are there: PEFT itself would ignore the rest.
    make_adapter(transformer(config("llama", num_hidden_layers=1)), tmp_path / "few", target_modules=["v_proj"])
    with pytest.raises(CheckpointError, match=r"does not fit LlamaModel: 2 of its 4 weights are missing.*Name a merg"):
        load_transformer(llama_folder, adapter=tmp_path / "few")
    make_adapter(transformer(config("gpt2")), tmp_path / "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(CheckpointError, match="gpt2 does not fit LlamaModel"):
        load_transformer(llama_folder, adapter=tmp_path / "gpt2")


def test_pickled_adapters_are_not_read(llama_folder: Path, tmp_path: Path) -> None:
    make_adapter(AutoModel.from_pretrained(llama_folder), tmp_path, target_modules=["v_proj"])
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"does not fit LlamaModel.*saved as safetensors"):
        load_transformer(llama_folder, adapter=tmp_path)


# GGUF


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(transformer(config("llama")), TOKENIZER, folder / "tiny.gguf")
    return folder


def test_a_gguf_file_gives_the_same_vectors_as_the_model_it_was_made_from(
    gguf_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = EpicEncoder.from_pretrained(
        gguf_folder, gguf_file="tiny.gguf", max_query_tokens=64, max_document_tokens=64
    )
    assert capsys.readouterr() == ("", "")
    expected = encoder("llama")
    np.testing.assert_allclose(loaded.encode_document(TEXTS), expected.encode_document(TEXTS), atol=1e-5)
    np.testing.assert_allclose(
        loaded.encode_query(TEXTS, instruction=INSTRUCTION),
        expected.encode_query(TEXTS, instruction=INSTRUCTION),
        atol=1e-5,
    )
    loaded.save_pretrained(tmp_path)
    again = EpicEncoder.from_pretrained(tmp_path)
    assert again.fingerprint == loaded.fingerprint
    np.testing.assert_array_equal(again.encode_document(TEXTS), loaded.encode_document(TEXTS))


def test_the_first_layers_of_a_gguf_file(gguf_folder: Path) -> None:
    loaded = load_transformer(gguf_folder, gguf_file="tiny.gguf", num_layers=1)
    cut = transformer(config("llama"))
    truncate_layers(cut, 1)
    ids = TOKENIZER(TEXTS[2])["input_ids"]
    torch.testing.assert_close(by_input_ids(loaded, ids), by_input_ids(cut, ids), atol=1e-5, rtol=0)


def test_gguf_files_that_cannot_be_read(gguf_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no file other\.gguf. Name a GGUF file of this folder"):
        load_transformer(gguf_folder, gguf_file="other.gguf")
    (tmp_path / "broken.gguf").write_bytes((gguf_folder / "tiny.gguf").read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="does not load as a model"):
        load_transformer(tmp_path, gguf_file="broken.gguf")
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(CheckpointError, match="does not load as a model"):
        load_transformer(tmp_path, gguf_file="text.gguf")


@pytest.mark.parametrize(
    ("package", "arguments"), [("gguf", {"gguf_file": "tiny.gguf"}), ("peft", {"adapter": "adapter"})]
)
def test_a_missing_package_names_the_extra(
    package: str, arguments: dict[str, str], gguf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from epic_rag import MissingExtraError, backbone

    monkeypatch.setattr(backbone.importlib.util, "find_spec", lambda name: None)
    if "adapter" in arguments:
        (tmp_path / "adapter_config.json").write_text("{}")
        arguments = {"adapter": tmp_path}  # type: ignore[dict-item]
    with pytest.raises(MissingExtraError, match=rf"needs {package}, .* Run `pip install 'epic-rag\[train\]'`"):
        load_transformer(gguf_folder, **arguments)  # type: ignore[arg-type]


# Broken folders


def broken(folder: Path, target: Path, what: str) -> None:
    shutil.copytree(folder, target)
    weights = target / "model.safetensors"
    if what == "no config":
        (target / "config.json").unlink()
    elif what == "broken config":
        (target / "config.json").write_text("{")
    elif what == "unknown kind":
        (target / "config.json").write_text('{"model_type": "nonsense"}')
    elif what == "wrong value":
        text = (target / "config.json").read_text().replace('"hidden_size": 32', '"hidden_size": "wide"')
        (target / "config.json").write_text(text)
    elif what == "no weights":
        weights.unlink()
    elif what == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif what == "other shapes":
        text = (target / "config.json").read_text().replace('"intermediate_size": 64', '"intermediate_size": 48')
        (target / "config.json").write_text(text)
    elif what == "pickled weights":
        torch.save(load_file(weights), target / "pytorch_model.bin")
        weights.unlink()
    elif what == "missing weights":
        kept = {name: value for name, value in load_file(weights).items() if "layers.1.mlp" not in name}
        save_file(kept, weights, metadata={"format": "pt"})
    else:
        (target / "config.json").unlink()
        weights.unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("empty", "does not load as a model"),
        ("no config", "does not load as a model"),
        ("broken config", "does not load as a model"),
        ("unknown kind", "does not load as a model.*nonsense"),
        ("wrong value", "does not load as a model"),
        ("no weights", "does not load as a model"),
        ("cut weights", "does not load as a model"),
        ("other shapes", "does not load as a model"),
        ("pickled weights", "does not load as a model.*safetensors"),
        ("missing weights", r"lacks 3 of the weights that its config\.json needs, for instance layers\.1\.mlp"),
    ],
)
def test_a_broken_folder_is_one_clear_error(llama_folder: Path, tmp_path: Path, what: str, message: str) -> None:
    broken(llama_folder, tmp_path / "broken", what)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_transformer(tmp_path / "broken")
    assert str(tmp_path / "broken") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_without_its_pooler_has_one_fingerprint(tmp_path: Path) -> None:
    from transformers import BertModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config("bert"), add_pooling_layer=False).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    first, second = (EpicEncoder.from_pretrained(tmp_path) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    np.testing.assert_array_equal(first.encode_document(TEXTS), second.encode_document(TEXTS))


def test_running_out_of_memory_is_no_broken_checkpoint(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(AutoModel, "from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        load_transformer(llama_folder)


SAVING_TEXTS = ["how do I install it", "", "the quick brown fox jumps over the lazy dog " * 2, "naïve 日本語"]
SAVING_INSTRUCTION = "Given a question, retrieve passages that answer it"


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
    for options in ({}, {"instruction": SAVING_INSTRUCTION}, {"bank": bank}, {"bank": bank, "strategy": "text"}):
        np.testing.assert_array_equal(
            loaded.encode_query(SAVING_TEXTS, **options), encoder.encode_query(SAVING_TEXTS, **options)
        )
    np.testing.assert_array_equal(loaded.encode_document(SAVING_TEXTS), encoder.encode_document(SAVING_TEXTS))
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
    np.testing.assert_allclose(
        loaded.encode_document(SAVING_TEXTS), encoder.encode_document(SAVING_TEXTS), atol=tolerance
    )
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
    np.testing.assert_array_equal(loaded.encode_document(SAVING_TEXTS), narrow.encode_document(SAVING_TEXTS))
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
        for text in SAVING_TEXTS:
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
    encoder.config.default_instruction = SAVING_INSTRUCTION
    encoder.save_pretrained(tmp_path)
    if kind == "causal, no padding token":
        assert encoder.tokenizer.pad_token is None
    assert EpicEncoder.from_pretrained(tmp_path).fingerprint == encoder.fingerprint
    opened = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(opened.encode_document(SAVING_TEXTS), encoder.encode_document(SAVING_TEXTS), atol=1e-5)
    np.testing.assert_allclose(opened.encode_query(SAVING_TEXTS), encoder.encode_query(SAVING_TEXTS), atol=1e-5)
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
    texts = [*SAVING_TEXTS, "the quick brown fox " * 30]
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
            EpicEncoder.from_pretrained(tmp_path, backend="native")
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
    np.testing.assert_array_equal(loaded.encode_document(SAVING_TEXTS), encoder.encode_document(SAVING_TEXTS))
    ids = AutoTokenizer.from_pretrained(tmp_path)("a b")["input_ids"]
    assert (ids[0], ids[-1]) == (1, 2)
    assert ids == list(encoder.prompt.documents(["a b"])[0].ids)
