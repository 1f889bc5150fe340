"""Loading a transformer: the first layers only, with an adapter, from GGUF, from a broken folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from epic_rag import CheckpointError, ConfigError, EpicEncoder
from epic_rag.backbone import load_transformer, truncate_layers
from tests.helpers.families import INSTRUCTION, TEXTS, TOKENIZER, by_input_ids, config, encoder, transformer
from tests.helpers.model_files import make_adapter, write_gguf

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
