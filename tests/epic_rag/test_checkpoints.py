"""Checkpoints: names to folders, plain folders, and everything that cannot work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from epic_rag import CheckpointError, ConfigError, EpicEncoder, EpicError, checkpoints, list_checkpoints
from epic_rag.checkpoints import read_epic_file, resolve
from tests.conftest import make_encoder
from tests.helpers.model_files import make_hub_cache, word_piece_encoder

TEXTS = ["how do I install it", "", "the quick brown fox jumps over the lazy dog " * 2, "naïve 日本語"]
INSTRUCTION = "Given a question, retrieve passages that answer it"


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "epic.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **changes}))


def copy(folder: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(folder, target)
    edit(target, **changes)
    return target


# Names to folders


def test_resolving(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(tiny_checkpoint) == tiny_checkpoint
    assert resolve(str(tiny_checkpoint)) == tiny_checkpoint
    monkeypatch.setattr(checkpoints, "_SHIPPED", tmp_path / "shipped")
    shipped = copy(tiny_checkpoint, tmp_path / "shipped" / "epic-minilm")
    assert resolve() == resolve("epic-minilm") == shipped
    # A shipped name wins over a folder in the working directory; ./name is the folder.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "epic-minilm").mkdir()
    assert resolve("epic-minilm") == shipped
    assert resolve("./epic-minilm") == Path("epic-minilm")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/epic-minilm") == tmp_path / "epic-minilm"


def test_what_ships_is_listed_without_reading_weights(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_SHIPPED", tmp_path)
    assert list_checkpoints() == []
    for name in ("other", "epic-minilm"):
        copy(tiny_checkpoint, tmp_path / name, description=f"the {name}")
        (tmp_path / name / "model.safetensors").write_bytes(b"x" * 10)
    (tmp_path / "no-checkpoint").mkdir()
    found = list_checkpoints()
    assert [(info.name, info.default, info.description) for info in found] == [
        ("epic-minilm", True, "the epic-minilm"),
        ("other", False, "the other"),
    ]
    assert found[0].dimension == 32
    assert found[0].parameters > 1000
    assert found[0].size_bytes == sum(file.stat().st_size for file in (tmp_path / "epic-minilm").rglob("*.*"))
    assert found[0].path == tmp_path / "epic-minilm"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", r"There is no checkpoint nothing\. Pass an existing folder or one of one, two"),
        (
            "epic-smollm2",
            r"epic-smollm2 is no longer in the package\. Build the index again with `epic-rag index --reb",
        ),
        ("./nothing/here", r"There is no checkpoint \./nothing/here\."),
        ("/nothing/here", r"There is no checkpoint /nothing/here\."),
        ("a/b/c", r"There is no checkpoint a/b/c\."),
        ("", r"The checkpoint's name is empty. Run `epic-rag models`"),
        (" ", r"The checkpoint's name is empty. Run `epic-rag models`"),
        # The tests run offline, so the hub has nothing but what lies in its cache.
        (
            "someone/something",
            r"There is no checkpoint someone/something, and it cannot be downloaded .*one, two",
        ),
        ("someone/some thing", r"There is no checkpoint someone/some thing, and it cannot be downloaded"),
        ("some--one/..x", r"There is no checkpoint some--one/\.\.x"),
    ],
)
def test_a_name_that_leads_nowhere(
    name: str, message: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_SHIPPED", tmp_path)
    for shipped in ("one", "two"):
        copy(tiny_checkpoint, tmp_path / shipped)
    for local_only in (False, True):
        with pytest.raises(CheckpointError, match=message) as caught:
            EpicEncoder.from_pretrained(name, local_files_only=local_only)
        assert "\n" not in str(caught.value)


def test_a_file_is_no_checkpoint(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is a file, a checkpoint is a folder. Pass its folder"):
        EpicEncoder.from_pretrained(tiny_checkpoint / "config.json")


@pytest.fixture
def hub(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache as huggingface_hub lays it out, with one model in it: someone/tiny."""
    from huggingface_hub import constants

    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return make_hub_cache(cache, "someone/tiny", tiny_checkpoint)


@pytest.mark.parametrize("local_only", [False, True])
def test_a_hub_name_that_was_downloaded_before(
    local_only: bool, hub: Path, tiny_encoder: EpicEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve("someone/tiny", local_files_only=local_only) == hub
    loaded = EpicEncoder.from_pretrained("someone/tiny", local_files_only=local_only)
    assert loaded.fingerprint == tiny_encoder.fingerprint
    assert (loaded.name, loaded.source) == ("tiny", "someone/tiny")
    # Only the downloaded folder is sure to be the revision that was asked for.
    pinned = EpicEncoder.from_pretrained("someone/tiny", revision="v1", local_files_only=local_only)
    assert pinned.source == str(hub)
    with pytest.raises(CheckpointError, match="cannot be downloaded"):
        EpicEncoder.from_pretrained("someone/tiny", revision="v2", local_files_only=local_only)


def test_a_plain_hub_model_is_called_by_its_hub_name(hub: Path) -> None:
    for file in ("epic.json", "projector.safetensors"):
        (hub / file).unlink()
    loaded = EpicEncoder.from_pretrained("someone/tiny")
    assert (loaded.name, loaded.source) == ("someone/tiny", "someone/tiny")


def test_what_is_asked_of_the_hub(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(hub)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolve("someone/tiny", revision="v1", gguf_file="x.gguf")
    assert asked[0]["revision"] == "v1"
    patterns = asked[0]["allow_patterns"]
    assert {"*.safetensors", "*.json", "x.gguf"} <= set(patterns)
    assert not any(pattern.endswith((".bin", ".pt", ".pkl", "*")) for pattern in patterns)


def test_what_to_pass_to_load_it_again(
    tiny_checkpoint: Path, tmp_path: Path, tiny_encoder: EpicEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_SHIPPED", tmp_path / "shipped")
    shipped = copy(tiny_checkpoint, tmp_path / "shipped" / "epic-minilm", name="epic-minilm")
    for given in (None, "epic-minilm", shipped):
        loaded = EpicEncoder.from_pretrained(given)
        assert (loaded.name, loaded.source) == ("epic-minilm", "epic-minilm")
    monkeypatch.chdir(tiny_checkpoint.parent)
    for given in (tiny_checkpoint, "tiny", "./tiny", f"../{tiny_checkpoint.parent.name}/tiny"):
        loaded = EpicEncoder.from_pretrained(given)
        assert loaded.name == "tiny"
        assert Path(loaded.source).is_absolute()
        monkeypatch.chdir(tmp_path)  # from anywhere else
        assert EpicEncoder.from_pretrained(loaded.source).fingerprint == tiny_encoder.fingerprint
        monkeypatch.chdir(tiny_checkpoint.parent)
    edit(copy(tiny_checkpoint, tmp_path / "nameless"), name="")
    assert EpicEncoder.from_pretrained(tmp_path / "nameless").name == "nameless"


# Plain folders


def test_a_plain_folder_gets_what_fits_its_attention(tiny_checkpoint: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(tiny_checkpoint, plain)
    for file in ("epic.json", "projector.safetensors", "modules.json", "sentence_bert_config.json"):
        (plain / file).unlink()
    shutil.rmtree(plain / "1_Pooling")
    loaded = EpicEncoder.from_pretrained(plain)
    assert loaded.name == "plain"
    assert (loaded.backbone.pooling, loaded.prompt.append_eos) == ("last", True)
    assert loaded.max_document_tokens == 512
    assert loaded.default_instruction is None
    again = EpicEncoder.from_pretrained(plain)
    assert again.fingerprint == loaded.fingerprint
    fingerprints = {
        EpicEncoder.from_pretrained(plain, projector=kind).fingerprint for kind in ("scale", "linear", "mlp")
    }
    assert len(fingerprints) == 3
    assert EpicEncoder.from_pretrained(plain, projector="mlp").fingerprint in fingerprints
    mean = EpicEncoder.from_pretrained(plain, pooling="mean", max_document_tokens=9)
    assert (mean.backbone.pooling, mean.prompt.append_eos, mean.max_document_tokens) == ("mean", False, 9)


def test_a_short_model_is_not_asked_for_more_than_it_takes(tmp_path: Path) -> None:
    encoder = word_piece_encoder()
    encoder.save_pretrained(tmp_path)
    (tmp_path / "epic.json").unlink()
    (tmp_path / "sentence_bert_config.json").unlink()
    long = EpicEncoder.from_pretrained(tmp_path, max_document_tokens=5000, max_query_tokens=5000, backend="native")
    assert long.backbone.max_positions == 512
    assert long.encode_document("fox " * 3000).shape == (32,)
    assert long.encode_query("fox " * 3000, instruction="given a").shape == (32,)


# Folders and settings that cannot work


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"epic\.json is not valid JSON .*\. Copy the checkpoint again"),
        (b"\xff\xfe\x00", r"epic\.json is not valid JSON .*\. Copy the checkpoint again"),
        ("[]", r"epic\.json holds a list, not an object\. Copy the checkpoint again"),
        ('{"format_version": 4}', r"has format version 4, this release reads 1 to 3. Run `pip install -U epic-rag`"),
        ("{}", r"has format version None, this release reads 1 to 3. Run `pip install -U epic-rag`"),
        (
            '{"format_version": 2}',
            r"has weights stored as None, this release reads {'format': 'int8-rows'}. Run `pip install -U epic-rag`",
        ),
        (
            '{"format_version": 2, "weights": {"format": "int4-groups"}}',
            r"has weights stored as {'format': 'int4-groups'}, this release reads {'format': 'int8-rows'}. Run `pip ins",
        ),
    ],
)
def test_a_broken_epic_file(content: str | bytes, message: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(tiny_checkpoint, tmp_path / "broken")
    (folder / "epic.json").write_bytes(content.encode() if isinstance(content, str) else content)
    for read in (read_epic_file, EpicEncoder.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            read(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": "max"}, "Unknown pooling 'max'. Choose one of last, mean, cls"),
        ({"projector": "conv"}, "Unknown projector 'conv'. Choose one of scale, linear, mlp"),
        ({"projector": "scale"}, r"projector\.safetensors does not fit epic\.json .*\. Copy the checkpoint again"),
        ({"template": {"unknown": "x"}}, r"epic\.json does not fit this release .*\. Copy the checkpoint again"),
        ({"template": "words"}, r"epic\.json does not fit this release .*\. Copy the checkpoint again"),
        ({"template": {"instruction": "x"}}, r"must have the field \{instruction\} and no other"),
        ({"max_query_tokens": "long"}, r"epic\.json does not fit this release .*\. Copy the checkpoint again"),
        ({"max_document_tokens": None}, r"epic\.json does not fit this release .*\. Copy the checkpoint again"),
        ({"max_document_tokens": 0}, "max_document_tokens is 0. Pass 1 or more"),
        ({"truncate_dim": 99}, "truncate_dim is 99, but the model has 32 dimensions"),
        ({"truncate_dim": "wide"}, r"epic\.json does not fit this release"),
    ],
)
def test_settings_in_the_file_that_cannot_work(
    changes: dict[str, Any], message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(EpicError, match=message):
        EpicEncoder.from_pretrained(copy(tiny_checkpoint, tmp_path / "broken", **changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "Unknown pooling 'max'. Choose one of last, mean, cls"),
        ({"projector": "mlp"}, "was trained with projector 'linear', not 'mlp'. Leave it out"),
        ({"dtype": "int4"}, "Unknown dtype 'int4'. Choose one of float32, bfloat16, float16."),
        ({"dtype": "int8"}, "int8 is a storage format. Load with one of float32, bfloat16, float16."),
        ({"dtype": torch.int16}, r"Unknown dtype torch\.int16. Choose one of float32"),
        ({"device": "nonsense"}, "Device 'nonsense' is not available on this machine .*Pass 'cpu'"),
        ({"device": "cuda:77"}, "Device 'cuda:77' is not available on this machine .*Pass 'cpu'"),
        ({"num_layers": 3}, "num_layers is 3, but the model has 2 layers. Choose 1 to 2"),
        ({"truncate_dim": 33}, "truncate_dim is 33, but the model has 32 dimensions. Choose 1 to 32"),
        ({"max_query_tokens": 0}, "max_query_tokens is 0. Pass 1 or more"),
        ({"max_document_tokens": -5}, "max_document_tokens is -5. Pass 1 or more"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], message: str, tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        EpicEncoder.from_pretrained(tiny_checkpoint, **options)


def test_an_unknown_dtype_on_saving(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Unknown dtype 'int4'. Choose one of float32, bfloat16, float16, int8"):
        make_encoder().save_pretrained(tmp_path / "x", dtype="int4")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("projector.safetensors", r"has epic\.json but no projector\.safetensors\. Copy the checkpoint again"),
        ("model.safetensors", "does not load as a model"),
        ("config.json", "does not load as a model"),
        ("tokenizer.json", "has no tokenizer that loads"),
    ],
)
def test_a_folder_that_lacks_a_file(missing: str, message: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(tiny_checkpoint, tmp_path / "broken")
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=message):
        EpicEncoder.from_pretrained(folder)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not load as a model: .*It needs config\.json and safetensors"):
        EpicEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "another shape", "another name"])
def test_a_broken_projector(damage: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(tiny_checkpoint, tmp_path / "broken")
    file = folder / "projector.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:50])
    elif damage == "another shape":
        save_file({"linear.weight": torch.zeros(8, 8), "linear.bias": torch.zeros(8)}, file)
    else:
        save_file({"matrix": torch.zeros(32, 32)}, file)
    with pytest.raises(
        CheckpointError, match=r"projector\.safetensors does not fit epic\.json .*\. Copy the checkpoint"
    ):
        EpicEncoder.from_pretrained(folder)


def test_a_broken_tokenizer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(tiny_checkpoint, tmp_path / "broken")
    (folder / "tokenizer.json").write_text('{"broken": ')
    with pytest.raises(CheckpointError, match=r"has no tokenizer that loads .*Add its tokenizer\.json"):
        EpicEncoder.from_pretrained(folder)


def test_code_in_a_folder_does_not_run_unasked(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(tiny_checkpoint, tmp_path / "with-code")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config.update(model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModel": "own.Model"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(CheckpointError, match="does not load as a model"):
        EpicEncoder.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "card", "epic", "expected"),
    [
        ("bge-small-en", "language: [de, fr]", {"languages": ["es"]}, (("es",), "epic.json")),
        ("bge-small-en", "language: [de, fr, de]", {}, (("de", "fr"), "model card")),
        ("bge-small-en", "language: DE", {}, (("de",), "model card")),
        ("m", "language:\n- no\n- sv\n- code", {}, (("no", "sv"), "model card")),  # YAML reads `no` as false
        ("bge-small-en", "license: mit", {}, (("en",), "guessed from the name bge-small-en")),
        ("m", "", {"base_model": "BAAI/bge-small-zh-v1.5"}, (("zh",), "guessed from the name bge-small-zh-v1.5")),
        ("m", "language: {en: 1}", {}, ((), "not stated")),
        ("m", "language: [", {}, ((), "not stated")),
    ],
)
def test_languages(
    name: str, card: str, epic: dict[str, object], expected: tuple[tuple[str, ...], str], tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n\n# A model\n")
    assert checkpoints.languages_of(name, tmp_path, epic) == expected
    assert checkpoints.languages_of(name, None, {"languages": ["en"]}) == (("en",), "epic.json")


def test_shipped_checkpoints_state_their_languages() -> None:
    assert {info.languages for info in list_checkpoints()} == {("en",)}
