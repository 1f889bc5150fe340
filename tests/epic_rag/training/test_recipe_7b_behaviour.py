"""The recipe for 7B models, on a tiny random Mistral: it loads, mines what it needs, and trains adapters alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, MistralConfig, MistralModel

from epic_rag import EpicEncoder
from epic_rag.training import load_recipe
from tests.conftest import make_tokenizer

ANIMALS = ["cat", "dog", "fox", "owl", "ant", "bee", "elk", "hen", "cow", "pig", "rat", "bat"]
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Mistral, as `save_pretrained` of transformers leaves it."""
    folder = tmp_path_factory.mktemp("mistral")
    tokenizer = make_tokenizer()
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MistralModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# A tiny model\n")
    return folder


def test_its_settings_are_those_of_the_literature() -> None:
    config = load_recipe("7b-lora")
    assert (config.lora_rank, config.lora_alpha, config.lora_targets) == (64, 32.0, ("all-linear",))
    assert (config.learning_rate, config.temperature, config.batch_size) == (1e-4, 0.02, 512)
    assert (config.hard_negatives, config.tasks_per_batch, config.max_demonstrations) == (7, 1, 8)
    assert (config.dtype, config.gradient_checkpointing, config.grad_cache) == ("bfloat16", True, True)
    # One epoch over the files that the comment counts.
    assert config.steps == round(577_513 / config.batch_size)


def test_two_steps(cli: Any, mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs").mkdir()
    rows = [{"query": f"what is a {name}", "positive": f"a {name} is an animal"} for name in ANIMALS]
    Path("pairs/zoo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("pairs/instructions.json").write_text('{"zoo": "Given a question, retrieve its answer"}')
    assert cli("mine", "pairs/zoo.jsonl", "--out", "pairs/zoo.jsonl", "--model", mistral, "--no-margin").status == 0
    assert all(len(json.loads(line)["negatives"]) == 7 for line in Path("pairs/zoo.jsonl").read_text().splitlines())
    settings = [f"model={mistral}", "data=pairs", "tasks=[zoo]", "steps=2", "batch_size=6", "device=cpu"]
    flags = [part for setting in settings for part in ("--set", setting)]
    result = cli("train", "7b-lora", *flags, "--output", "run", "--json")
    assert result.status == 0, result.err
    assert json.loads(result.out)["steps"] == 2

    # Frozen weights are bfloat16 in training and float16 in the result; nothing else has happened to them.
    trained = AutoModel.from_pretrained("run/final", dtype=torch.float16).state_dict()
    before = AutoModel.from_pretrained(mistral, dtype=torch.bfloat16).half().state_dict()
    changed = {name.split(".")[-2] for name, value in trained.items() if not torch.equal(value, before[name])}
    assert changed == LINEAR
    # The card names the model that was trained, not that of the recipe, and the licence that this one states.
    epic = json.loads(Path("run/final/epic.json").read_text())
    assert (epic["base_model"], epic["license"]) == (mistral.name, "mit")
    card = Path("run/final/README.md").read_text()
    assert "license: mit" in card
    assert "mistralai" not in card
    encoder = EpicEncoder.from_pretrained("run/final")
    assert encoder.encode_query("what is a cat").shape == (32,)
