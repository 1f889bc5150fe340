"""Training of a reader: tasks, episodes, fitted gains, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.errors import DataError
from epic_rag.metrics import unit_rows
from epic_rag.reader import FEATURES, KNOTS, DemonstrationReader
from epic_rag.training.reader_training import (
    ReaderTask,
    ReaderTrainingOptions,
    build_episodes,
    embed_task,
    fit_gains,
    read_tasks,
    train_reader,
)

SMALL = ReaderTrainingOptions(episodes=12, steps=40, largest=60)


def task(seed: int, n: int = 120, dim: int = 16) -> ReaderTask:
    """Passages beside their queries, all in one direction that differs between tasks."""
    chance = np.random.default_rng(seed)
    queries = chance.standard_normal((n, dim))
    passages = queries + 1.5 * chance.standard_normal(dim) + 0.4 * chance.standard_normal((n, dim))
    rows = np.arange(n)
    vectors = unit_rows(queries.astype(np.float32)), unit_rows(passages.astype(np.float32))
    return ReaderTask(f"task {seed}", vectors[0], vectors[1], vectors[0], rows, rows, None)


def write_pairs(path: Path, count: int = 24) -> Path:
    rows = [{"query": f"term {number}", "positive": f"what {number} means"} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_episodes_hold_products_of_unit_vectors() -> None:
    episodes = list(build_episodes([task(0), task(1)], SMALL))
    assert len(episodes) == 12
    for episode in episodes:
        assert episode.scores.shape == (48, 1 + len(FEATURES), 200)
        assert 1 <= episode.n <= 60
        np.testing.assert_allclose(episode.gram[:, 0, 0], 1.0, atol=1e-5)
        assert not episode.masked[:, 0].any()
        # The first candidate is the right passage: nothing that is not masked is nearly equal to it.
        assert np.abs(episode.scores[:, 0]).max() <= 1.0 + 1e-5
    again = list(build_episodes([task(0), task(1)], SMALL))
    np.testing.assert_array_equal(episodes[3].scores, again[3].scores)


def test_gains_find_a_shift_that_tasks_share() -> None:
    options = ReaderTrainingOptions(episodes=24, steps=150, largest=60, own=0.0)
    reader, before, after = fit_gains(list(build_episodes([task(seed) for seed in range(6)], options)), options)
    assert after < before - 0.05
    assert reader.kind == "trained"
    assert reader.gains_for(30)[0] > 0.1
    # It helps on a task that it was not fitted on.
    new = task(99)
    shown, asked = slice(0, 40), slice(40, 80)
    pairs = np.stack([new.queries[shown], new.passages[shown]], axis=1)
    moved = reader.prepare(pairs).apply(new.queries[asked])
    own = np.einsum("nd,nd->n", moved, new.passages[asked]).mean()
    assert own > np.einsum("nd,nd->n", new.queries[asked], new.passages[asked]).mean() + 0.05


def test_pairs_that_do_not_belong_together_leave_gains_small() -> None:
    chance = np.random.default_rng(0)
    rows = np.arange(120)
    passages = unit_rows(chance.standard_normal((120, 16)).astype(np.float32))
    random = [ReaderTask("random", task(0).queries, passages, task(0).queries, rows, rows, None)]
    _, before, after = fit_gains(list(build_episodes(random, SMALL)), SMALL)
    assert after == pytest.approx(before, abs=0.05)


def test_sources_are_tasks(tmp_path: Path) -> None:
    rows = [{"query": f"q{n}", "positive": f"p{n}", "source": "abc"[n % 3]} for n in range(30)]
    (tmp_path / "manuals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_pairs(tmp_path / "terms.jsonl")
    options = ReaderTrainingOptions(least_rows=5, rows=8, source_rows=8)
    found = read_tasks(tmp_path, options)
    assert set(found) == {"manuals#a", "manuals#b", "manuals#c", "terms"}
    assert all(len(pairs) == 8 for pairs, _ in found.values())
    assert {pair.source for pair in found["manuals#a"][0]} == {"a"}
    assert set(read_tasks(tmp_path, options, excluded=["a", "terms"])) == {"manuals#b", "manuals#c"}
    assert set(read_tasks(tmp_path, options, tasks=["terms"])) == {"terms"}
    assert set(read_tasks(tmp_path / "terms.jsonl", options)) == {"terms"}
    with pytest.raises(DataError, match="has no file nothing"):
        read_tasks(tmp_path, options, tasks=["nothing"])


def test_too_few_pairs_are_an_error() -> None:
    with pytest.raises(DataError, match="No task has 8 pairs"):
        list(build_episodes([task(0, n=7)], SMALL))


def test_vectors_are_kept_for_a_run_that_continues(
    tiny_encoder: EpicEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_tasks(write_pairs(tmp_path / "terms.jsonl"), SMALL)["terms"][0]
    first = embed_task(tiny_encoder, "terms", rows, 1.0, instruction="Find it", cache=tmp_path / "cache")
    calls: list[Any] = []
    monkeypatch.setattr(tiny_encoder, "encode_document", lambda *given, **_: calls.append(given))
    second = embed_task(tiny_encoder, "terms", rows, 1.0, instruction="Find it", cache=tmp_path / "cache")
    assert calls == []
    np.testing.assert_allclose(first.passages, second.passages, atol=2e-3)
    np.testing.assert_array_equal(first.passage_ids, second.passage_ids)


def test_a_trained_reader_serves_an_encoder(tiny_encoder: EpicEncoder, tmp_path: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    reader, record = train_reader(
        tiny_encoder, write_pairs(tmp_path / "terms.jsonl"), SMALL, progress=lambda *stage: stages.append(stage)
    )
    assert record["tasks"] == ["terms"]
    assert reader.gains.shape == (len(FEATURES), len(KNOTS))
    assert stages[0] == ("embed", 0, 1)
    assert stages[-1] == ("episodes", 12, 12)
    bank = DemonstrationBank([("term 1", "what 1 means"), ("term 2", "what 2 means")], instruction="")
    bank.embed(tiny_encoder)
    assert bank.embeddings is not None
    moved = reader.prepare(bank.embeddings).apply(bank.embeddings[:, 0])
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 1.0, atol=1e-5)


def test_the_command_writes_a_reader(
    cli: Any, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import epic_rag.training.reader_training as module

    monkeypatch.setattr(module, "ReaderTrainingOptions", lambda: SMALL)
    pairs = write_pairs(tmp_path / "terms.jsonl")
    result = cli("train", "reader", "--model", tiny_checkpoint, "--data", pairs, "-o", tmp_path / "out", "--json")
    assert result.status == 0
    printed = json.loads(result.out)
    assert printed["tasks"] == ["terms"]
    assert DemonstrationReader.load(tmp_path / "out").kind == "trained"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reader"], "needs pairs"),
        (["reader", "--data", "x.jsonl"], "A shipped model stays as it is"),
        (["reader", "--data", "x.jsonl", "--set", "steps=1"], "takes neither --set nor --no-resume"),
        (["own-data", "--data", "x.jsonl"], "--data belongs to `epic-rag train reader`"),
    ],
)
def test_options_that_do_not_fit(cli: Any, arguments: list[str], message: str) -> None:
    result = cli("train", *arguments)
    assert result.status == 2
    assert message in " ".join(result.err.split())
