"""Frozen documents: their vectors, what is drawn and masked, and runs that train queries alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from epic_rag import EpicEncoder
from epic_rag.errors import ConfigError
from epic_rag.training import Trainer, TrainingConfig
from epic_rag.training.frozen_documents import FrozenDocuments
from epic_rag.training.sampling import sample_batch
from tests.conftest import make_encoder
from tests.helpers.training import WORDS

Config = Callable[..., TrainingConfig]
Settings = Callable[..., dict[str, Any]]

# More than there are passages: every passage is drawn.
ALL = 1000


@pytest.fixture
def frozen(config: Config) -> Config:
    """Configuration of a run of queries alone."""
    return lambda **changes: config(freeze_documents=True, **{"document_negatives": ALL, **changes})


def documents_of(trainer: Trainer) -> FrozenDocuments:
    assert trainer.documents is not None
    return trainer.documents


def test_vectors_are_those_of_the_start(frozen: Config, tiny_checkpoint: Path) -> None:
    trainer = Trainer(frozen())
    batch, inputs = trainer.prepare(sample_batch(trainer.datasets, trainer.config, 0))
    encoder = EpicEncoder.from_pretrained(tiny_checkpoint, dtype="float32")
    rows = [row for task in batch.tasks for row in task.rows]
    texts = [row.positive for row in rows] + [text for row in rows for text in row.negatives]
    assert inputs.document_vectors is not None
    np.testing.assert_allclose(inputs.document_vectors[: len(texts)], encoder.encode_document(texts), atol=1e-3)
    drawn = {f"{sign} {word}" for sign in "+-" for word in WORDS} - set(texts)
    assert inputs.counted == len(inputs.document_vectors) == len(texts) + len(drawn)
    assert inputs.documents == []
    assert inputs.mask.shape == inputs.hard.shape == (len(rows), inputs.counted)


def test_vectors_are_those_of_a_model_in_memory(frozen: Config) -> None:
    encoder = make_encoder(seed=3)
    trainer = Trainer(frozen(strategy="none", inference_tokens=8), copy.deepcopy(encoder))
    batch = sample_batch(trainer.datasets, trainer.config, 0)
    trainer.train_step(batch)
    texts = [row.positive for task in batch.tasks for row in task.rows]
    vectors = documents_of(trainer).of_step(batch, 1).vectors[: len(texts)]
    np.testing.assert_allclose(vectors, encoder.encode_document(texts), atol=1e-3)
    assert trainer.encoder.max_document_tokens == encoder.max_document_tokens


def test_draws_follow_the_step(frozen: Config) -> None:
    trainer = Trainer(frozen(document_negatives=6))
    batch = sample_batch(trainer.datasets, trainer.config, 0)
    first, again, other = (documents_of(trainer).of_step(batch, step).vectors for step in (3, 3, 4))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_other_answers_are_no_negatives(frozen: Config, data: Path, write_task: Callable[..., Path]) -> None:
    rows = [{"query": f"q{n // 2}", "positive": f"p{n}"} for n in range(16)]
    rows += [{"query": f"g{n}", "positive": f"member {n}", "group": f"{n % 4}"} for n in range(16)]
    write_task(data, "many", rows)
    trainer = Trainer(frozen(tasks=["many"], batch_size=4, tasks_per_batch=1))
    documents = documents_of(trainer)
    for step in range(20):
        batch = sample_batch(trainer.datasets, trainer.config, step)
        chosen = batch.tasks[0].rows
        found = documents.of_step(batch, step)
        assert found.mask.shape == (len(chosen), len(rows) - len(chosen))
        for row, masked in zip(chosen, found.mask.tolist(), strict=True):
            right = {
                other["positive"]
                for other in rows
                if other["query"] == row.query or (row.group is not None and other.get("group") == row.group)
            }
            assert sum(masked) == len(right - {other.positive for other in chosen})


def test_half_of_the_negatives_come_from_the_rows_sources(
    frozen: Config, data: Path, write_task: Callable[..., Path]
) -> None:
    manuals = [
        {"query": f"{source} {n}", "positive": f"{source} page {n}", "source": source}
        for source in ("cat", "dog", "pen", "cup")
        for n in range(40)
    ]
    write_task(data, "manuals", manuals)
    tasks = {"manuals": {"sources_per_batch": 2}}
    trainer = Trainer(frozen(tasks=tasks, batch_size=4, tasks_per_batch=1, document_negatives=40))
    documents = documents_of(trainer)
    batch = sample_batch(trainer.datasets, trainer.config, 0)
    sources = {row.source for task in batch.tasks for row in task.rows}
    drawn = documents.draw(batch, 0)
    near = [documents.texts[number].split()[0] in sources for number in drawn]
    assert len(drawn) == 40
    assert all(near[:20])


@pytest.mark.parametrize("strategy", ["none", "epic"])
def test_loss_falls_and_documents_are_not_encoded(
    frozen: Config, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(frozen(strategy=strategy, steps=40))
    encoded: list[int] = []
    forward = trainer.forward

    def count(rows: Any, slots: Any = None) -> torch.Tensor:
        encoded.append(len(rows))
        return forward(rows, slots)

    monkeypatch.setattr(trainer, "forward", count)
    losses = []
    for trainer.step in range(40):
        losses.append(trainer.train_step(sample_batch(trainer.datasets, trainer.config, trainer.step)).zero_shot)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert set(encoded) <= {8}


def test_documents_keep_their_weights(frozen: Config, tiny_checkpoint: Path) -> None:
    final = Trainer(frozen(steps=4, frozen_layers=1, symmetric_as_documents=True)).train(show_progress=False)
    start, trained = (EpicEncoder.from_pretrained(folder, dtype="float32") for folder in (tiny_checkpoint, final))
    np.testing.assert_allclose(trained.encode_document(WORDS), start.encode_document(WORDS), atol=2e-3)
    np.testing.assert_array_equal(trained.encode_query(WORDS, task="sts"), trained.encode_document(WORDS))
    moved = np.abs(trained.encode_query(WORDS) - start.encode_query(WORDS)).max()
    assert moved > 0.02
    own = trained.backbone.query_weights()
    assert own
    assert not [name for name in own if "embed" in name or ".0." in name]
    # A run that starts there trains these weights further, and its result is of the same kind.
    again = Trainer(frozen(model=str(final), output=str(final.parent / "more"), steps=2)).train(show_progress=False)
    more = EpicEncoder.from_pretrained(again, dtype="float32")
    assert more.backbone.query_weights().keys() == own.keys()
    assert more.config.symmetric_as_documents
    np.testing.assert_allclose(more.encode_document(WORDS), trained.encode_document(WORDS), atol=2e-3)
    assert np.abs(more.encode_query(WORDS) - trained.encode_query(WORDS)).max() > 1e-3


def test_a_run_of_both_sides_from_there(frozen: Config, config: Config, tmp_path: Path) -> None:
    final = Trainer(frozen(steps=2, frozen_layers=1, symmetric_as_documents=True)).train(show_progress=False)
    start = EpicEncoder.from_pretrained(final, dtype="float32")
    changes = {"tasks": {"up": {}, "down": {"symmetric": True}}, "retention_texts": 4}
    both = Trainer(config(model=str(final), output=str(tmp_path / "both"), steps=4, **changes)).train(
        show_progress=False
    )
    trained = EpicEncoder.from_pretrained(both, dtype="float32")
    assert trained.config.symmetric_as_documents
    for encode in ("encode_query", "encode_document"):
        assert np.abs(getattr(trained, encode)(WORDS) - getattr(start, encode)(WORDS)).max() > 1e-3


def test_layers_that_there_are_not(frozen: Config) -> None:
    with pytest.raises(ConfigError, match="frozen_layers is 2, and the model has 2 layers"):
        Trainer(frozen(frozen_layers=2))


def test_a_run_writes_its_vectors_once(
    frozen: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = frozen(steps=3, strategy="none")
    final = Trainer(run).train(show_progress=False)
    files = sorted((final.parent / "documents").iterdir())
    assert len(files) == 1
    monkeypatch.setattr(EpicEncoder, "encode_document", None)
    again = Trainer(run)
    assert documents_of(again).embed().shape[0] == 33
    monkeypatch.undo()
    # Other passages are other files.
    Trainer(frozen(tasks=["up"], tasks_per_batch=1, steps=3, strategy="none")).train(resume=False, show_progress=False)
    assert len(list((final.parent / "documents").iterdir())) == 2


def test_fewer_rows(config: Config) -> None:
    trainer = Trainer(config(tasks={"up": {"max_rows": 5}, "down": {}}))
    counts = {dataset.name: len(dataset.rows) for dataset in trainer.datasets}
    assert counts == {"up": 5, "down": 16}
    assert [row.query for row in trainer.datasets[0].rows] == [
        row.query for row in Trainer(config(tasks={"up": {"max_rows": 5}, "down": {}})).datasets[0].rows
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"freeze_documents": False}, "document_negatives"),
        ({"tasks": {"up": {"symmetric": True}, "down": {}}}, "symmetric"),
        ({"grad_cache": True}, "grad_cache"),
        ({"teacher": "epic-minilm", "teacher_weight": 1.0}, "teacher"),
        ({"demonstration_source": "bank"}, "bank"),
        ({"reset_projector": True}, "reset_projector"),
        ({"retention_texts": 4}, "retention_texts"),
        ({"lora_rank": 2}, "lora_rank"),
        ({"interpolate_with_start": 0.5, "interpolation_model": "epic-minilm"}, "interpolation_model"),
    ],
)
def test_settings_that_do_not_fit(settings: Settings, changes: dict[str, Any], words: str) -> None:
    values = settings(**{"freeze_documents": True, "document_negatives": ALL, **changes})
    with pytest.raises(ConfigError, match=words):
        TrainingConfig.from_dict(values)


def test_weights_of_queries_are_interpolated_with_the_start(
    frozen: Config, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    states = {}
    for share in (0.0, 0.25, 1.0):
        trainer = Trainer(frozen(interpolate_with_start=share, output=str(tmp_path / str(share))))
        trainer.train(show_progress=False)
        states[share] = {name: value.clone() for name, value in trainer.encoder.backbone.query_weights().items()}
    start = dict(EpicEncoder.from_pretrained(tiny_checkpoint, dtype="float32").backbone.transformer.named_parameters())
    assert any(not torch.equal(states[0.0][name], start[name]) for name in states[0.0])
    for name, value in states[0.25].items():
        torch.testing.assert_close(value, 0.75 * states[0.0][name] + 0.25 * start[name])
        torch.testing.assert_close(states[1.0][name], start[name].detach())


def test_the_command(settings: Settings, cli: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "queries.json"
    file.write_text(json.dumps(settings(freeze_documents=True, document_negatives=8, steps=2)), encoding="utf-8")
    result = cli("train", file)
    assert result.status == 0, result.err
    assert (Path(result.out.strip()) / "epic.json").is_file()
