"""What a run leaves behind: the final folder, its training record, its model card, and the metrics."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from epic_rag import EpicEncoder, __version__
from epic_rag.errors import CheckpointError
from epic_rag.training import Trainer, TrainingConfig, list_recipes, load_recipe, model_card
from epic_rag.training.model_card import held_out_figures, main, write_model_card
from tests.conftest import make_encoder
from tests.helpers.training import WORDS, run_values, write_task

Config = Callable[..., TrainingConfig]


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run with an evaluation, over a file that the package knows and one that it does not."""
    folder = tmp_path_factory.mktemp("trained")
    write_task(folder / "data", "medquad", [{"query": f"q{n}", "positive": f"p{n}"} for n in range(9)])
    write_task(folder / "data", "up", [{"query": word, "positive": f"+ {word}"} for word in WORDS])
    values = run_values(tiny_checkpoint, folder)
    trainer = Trainer(
        TrainingConfig.from_dict(
            values
            | {
                "tasks": {"medquad": {"symmetric": True}, "up": {"weight": 2}},
                "evaluation_tasks": ["medquad"],
                "evaluation_rows": 3,
                "evaluate_every": 3,
                "evaluation_demonstrations": [0, 2],
                "inference_tokens": 32,
                "default_instruction": 'Say "what": you want',
                "description": "A tiny encoder.",
                "license": "apache-2.0",
                "base_model": "someone/tiny",
                "name": "toy",
            }
        )
    )
    trainer.train(show_progress=False)
    return trainer


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def front_matter(card: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found
    data: dict[str, Any] = yaml.safe_load(found[1])
    return data


def test_the_final_folder_loads(trained: Trainer) -> None:
    encoder = EpicEncoder.from_pretrained(trained.folder / "final")
    assert encoder.name == "toy"
    assert (encoder.max_query_tokens, encoder.max_document_tokens) == (32, 32)
    assert encoder.default_instruction == 'Say "what": you want'
    # float16 on disk, and the vectors are those of the trainer's weights.
    wanted = EpicEncoder(trained.encoder.backbone, trained.prompt).encode_document(["cat", "dog"])
    np.testing.assert_allclose(encoder.encode_document(["cat", "dog"]), wanted, atol=2e-3)


def test_the_training_record(trained: Trainer) -> None:
    text = (trained.folder / "final" / "epic.json").read_text()
    record = json.loads(text)["training"]
    assert (record["steps"], record["pairs"]) == (6, 48)
    assert record["tokens"] == trained.tokens > 6 * 8
    assert record["data"]["medquad"]["rows"] == 6
    assert record["data"]["medquad"]["held_out"] == 3
    assert re.fullmatch(r"[0-9a-f]{64}", record["data"]["up"]["sha256"])
    assert record["versions"]["epic-rag"] == __version__
    assert set(record["versions"]) == {"epic-rag", "python", "torch", "transformers"}
    assert "threads" in record["hardware"]
    assert record["config"]["tasks"]["up"]["weight"] == 2.0
    assert (record["config"]["data"], record["config"]["output"]) == ("data", "run")
    # Nothing of the machine's folders.
    for place in (trained.folder.parent, trained.config.model, Path.home()):
        assert str(place) not in text


def test_the_base_model_without_a_name_is_a_folder_s_own(config: Config, tmp_path: Path) -> None:
    final = Trainer(config(steps=1)).train(show_progress=False)
    text = (final / "epic.json").read_text()
    assert json.loads(text)["base_model"] == "tiny"
    assert str(tmp_path) not in text
    assert str(tmp_path) not in card_of(final)
    # Not a name that a hub would know.
    assert "base_model" not in front_matter(card_of(final))


def test_hub_names_stay(config: Config, tiny_encoder: EpicEncoder) -> None:
    trainer = Trainer(config(model="someone/tiny"), tiny_encoder)
    assert trainer.record()["config"]["model"] == "someone/tiny"


def test_pairs_are_counted_not_multiplied(config: Config, data: Path, write_task: Callable[..., Path]) -> None:
    write_task(data, "few", [{"query": "a", "positive": "b"}, {"query": "c", "positive": "d"}])
    trainer = Trainer(config(tasks=["few"]))
    trainer.train(show_progress=False)
    assert trainer.record()["pairs"] == 6 * 2


def test_metrics(trained: Trainer) -> None:
    lines = [json.loads(line) for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == trained.metrics
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        told = {"step", "loss", "with_demonstrations", "zero_shot", "pairs", "tokens", "gradient_norm", "seconds"}
        assert set(line) == told
        assert line["loss"] == pytest.approx(line["with_demonstrations"] + line["zero_shot"], rel=1e-5)
        assert line["pairs"] == 8
    evaluations = [line for line in lines if "evaluation" in line]
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    assert set(evaluations[0]["evaluation"]["medquad"]) == {"k=0", "k=2"}


def test_front_matter(trained: Trainer) -> None:
    assert front_matter(card_of(trained.folder / "final")) == {
        "library_name": "epic-rag",
        "license": "apache-2.0",
        "base_model": "someone/tiny",
        "pipeline_tag": "sentence-similarity",
        "tags": ["retrieval", "embeddings", "feature-extraction", "in-context-learning", "epic"],
    }


def test_the_card_describes_the_run(trained: Trainer) -> None:
    card = card_of(trained.folder / "final")
    record = trained.record()
    digest = record["data"]["medquad"]["sha256"][:12]
    assert f"| medquad | 6 | 3 | medical question → answer | MedQuAD | CC BY 4.0 | `{digest}` |" in card
    assert "| up | 16 | 0 |  | not stated | not stated | `" in card
    assert "| steps | 6 |\n| pairs | 48 |" in card
    assert f"| tokens | {record['tokens']:,} |" in card
    assert record["versions"]["torch"] in card
    assert "A tiny encoder.\n" in card
    # A table right under a paragraph would be part of it.
    assert not re.search(r"^[^|\n].*\n\|", card, re.MULTILINE)
    assert "| demonstrations in training | 0 to 3 a query |" in card
    last = [entry for entry in trained.metrics if "evaluation" in entry][-1]["evaluation"]["medquad"]
    assert f"| task | k=0 | k=2 |\n|---|---|---|\n| medquad | {last['k=0']:.1f} | {last['k=2']:.1f} |" in card


def test_the_configuration_in_the_card_is_one(trained: Trainer, tmp_path: Path) -> None:
    found = re.search(r"```yaml\n(.*?)```", card_of(trained.folder / "final"), re.DOTALL)
    assert found
    (tmp_path / "again.yaml").write_text(found[1])
    again = TrainingConfig.from_file(
        tmp_path / "again.yaml", model=trained.config.model, output=trained.config.output, data=trained.config.data
    )
    assert again == trained.config


def test_an_earlier_stage_is_in_record_and_card(trained: Trainer, config: Config) -> None:
    second = config(model=str(trained.folder / "final"), output=str(trained.folder / "second"), steps=1)
    final = Trainer(second).train(show_progress=False)
    record = json.loads((final / "epic.json").read_text())["training"]
    assert (record["steps"], record["previous"]["steps"]) == (1, 6)
    card = card_of(final)
    assert card.index("## Training\n") < card.index("| steps | 1 |") < card.index("## Training before that\n")
    assert card.index("## Training before that\n") < card.index("| steps | 6 |")
    assert "The same as above." not in card
    third = config(model=str(final), output=str(trained.folder / "third"), steps=2)
    card = card_of(Trainer(third).train(show_progress=False))
    assert card.count("## Training before that\n") == 2
    assert card.count("The same as above.\n") == 1


@pytest.mark.parametrize("kind", ["causal", "bidirectional", "with a head"])
def test_the_code_in_the_card_runs(kind: str, tmp_path: Path) -> None:
    encoder = make_encoder(causal=kind != "bidirectional")
    if kind == "with a head":
        encoder.backbone.set_head(torch.nn.Linear(32, 12))
    folder = tmp_path / "model"
    encoder.save_pretrained(folder)
    blocks = re.findall(r"```python\n(.*?)```", write_model_card(folder).read_text(), re.DOTALL)
    assert len(blocks) == 3
    texts = ["To undo a step, press Ctrl+Z.", "To save, press Ctrl+S."]
    wanted = encoder.encode_document(texts)
    for block, result in zip(blocks, ("documents", "documents", "vectors"), strict=True):
        scope: dict[str, Any] = {}
        exec(block.replace("path/to/model", str(folder)), scope)
        np.testing.assert_allclose(np.asarray(scope[result]), wanted, atol=1e-4)


def test_weights_of_queries_are_a_fact(config: Config) -> None:
    run = config(freeze_documents=True, symmetric_as_documents=True, frozen_layers=1, steps=1, strategy="none")
    card = (Trainer(run).train(show_progress=False) / "README.md").read_text(encoding="utf-8")
    assert "| weights | two sets behind the first layers: of queries, and of documents |" in card
    assert "| texts that are compared with each other | read as documents, without an instruction |" in card


def test_the_command_writes_a_card_with_figures(trained: Trainer, tmp_path: Path, capsys: Any) -> None:
    final = trained.folder / "final"
    (tmp_path / "figures.md").write_text("| set | nDCG@10 |\n|---|---|\n| manuals | 75.0 |\n")
    assert main([str(final), "--figures", str(tmp_path / "figures.md")]) == 0
    assert capsys.readouterr().out == f"{final / 'README.md'}\n"
    card = card_of(final)
    assert "## Evaluation\n\n| set | nDCG@10 |\n|---|---|\n| manuals | 75.0 |\n" in card
    assert "held-out rows after" not in card
    for arguments, expected in (
        ([str(tmp_path)], "has no epic.json"),
        ([str(final), "--figures", "nowhere.md"], "nowhere.md cannot be read"),
    ):
        assert main(arguments) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert expected in captured.err
        assert captured.err.count("\n") == 1
    assert card_of(final) == card


def test_the_command_as_a_module(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "epic.json").write_bytes((tiny_checkpoint / "epic.json").read_bytes())
    command = [sys.executable, "-W", "error", "-m", "epic_rag.training.model_card", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=dict(os.environ))
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{tmp_path / 'README.md'}\n", "")


def test_a_checkpoint_that_was_not_trained_here(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "epic.json").write_bytes((tiny_checkpoint / "epic.json").read_bytes())
    card = write_model_card(tmp_path).read_text()
    assert "## Training" not in card
    assert "Not measured yet" in card
    assert "| licence of the weights | not stated |" in card
    (tmp_path / "epic.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no epic\.json\. Name a checkpoint folder"):
        write_model_card(tmp_path)


def test_tables_survive_what_is_in_them() -> None:
    table = held_out_figures({"step": 3, "evaluation": {"a|b": {"k=0": 12.34}}})
    assert "| a\\|b | 12.3 |" in table
    assert held_out_figures({"step": 3, "evaluation": {}}) == ""


def test_every_file_of_the_recipes_has_a_source() -> None:
    named = {task for name in list_recipes() if name != "own-data" for task in load_recipe(name).tasks}
    sources = json.loads(Path(model_card.__file__).with_name("sources.json").read_text())
    assert named
    assert named <= set(sources)
    assert all(source["content"] and source["origin"] and source["license"] for source in sources.values())


def test_a_configuration_with_deleted_settings_names_the_commit(trained: Trainer, tmp_path: Path) -> None:
    epic = json.loads((trained.folder / "final" / "epic.json").read_text())
    epic["training"]["config"]["several_tasks"] = 0.2
    (tmp_path / "epic.json").write_text(json.dumps(epic))
    card = write_model_card(tmp_path).read_text()
    assert "This configuration has settings that later versions deleted. It runs with commit 8891972" in card
    assert "commit" not in card_of(trained.folder / "final")


def test_a_record_that_says_less_than_ours_has_no_section(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    EpicEncoder.from_pretrained(tiny_checkpoint).save_pretrained(folder)
    facts = json.loads((folder / "epic.json").read_text(encoding="utf-8"))
    (folder / "epic.json").write_text(json.dumps({**facts, "training": {"steps": 1}}), encoding="utf-8")
    write_model_card(folder)
    assert "## Training" not in card_of(folder)
