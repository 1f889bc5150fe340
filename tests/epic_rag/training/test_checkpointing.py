"""Runs that stop and go on: the same weights as without a stop, and a refusal where that cannot be."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from epic_rag import EpicEncoder
from epic_rag.errors import TrainingError
from epic_rag.training import Trainer, TrainingConfig, latest_checkpoint

Config = Callable[..., TrainingConfig]
Interrupt = Callable[[Trainer, int], None]

# The command, killed as by `kill -9` while it writes its second checkpoint: the old one is there, the new one is not.
KILLED_WHILE_SAVING = """
import os, signal, sys
from epic_rag_cli.main import main
replace, seen = os.replace, []
def kill(source, target):
    if "checkpoint-" in str(target):
        seen.append(target)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = kill
main()
"""

# The command, killed some time after a step has begun: in it, between two, or while it writes.
KILLED_AT_RANDOM = """
import os, signal, threading
from epic_rag.training import Trainer
from epic_rag_cli.main import main
train_step = Trainer.train_step
def timed(self, batch):
    if self.step == int(os.environ["KILL_AT"]):
        threading.Timer(float(os.environ["KILL_AFTER"]), os.kill, (os.getpid(), signal.SIGKILL)).start()
    return train_step(self, batch)
Trainer.train_step = timed
main()
"""


def state(run: TrainingConfig) -> dict[str, torch.Tensor]:
    """Weights and moments at the end, in float32."""
    newest = latest_checkpoint(Path(run.output))
    assert newest is not None
    assert newest.name == f"checkpoint-{run.steps}"
    return load_file(newest / "state.safetensors")


def assert_same(left: TrainingConfig, right: TrainingConfig) -> None:
    a, b = state(left), state(right)
    assert a.keys() == b.keys()
    assert any(key.startswith("optimizer.") for key in a)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-6, msg=key)
    names = [Path(run.output) / "final" / "model.safetensors" for run in (left, right)]
    final = [load_file(name) for name in names]
    for key in final[0]:
        torch.testing.assert_close(final[0][key], final[1][key], rtol=0, atol=1e-3, msg=key)


def stop_at(trainer: Trainer, step: int, error: type[BaseException] = KeyboardInterrupt) -> None:
    """Run until the given step has begun, as with Ctrl-C."""
    train_step = trainer.train_step

    def interrupted(batch: Any) -> Any:
        if trainer.step == step:
            raise error
        return train_step(batch)

    trainer.train_step = interrupted  # type: ignore[method-assign]
    with pytest.raises(error):
        trainer.train(show_progress=False)


@pytest.fixture(params=["causal", "dropout"])
def model(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path: Path) -> str:
    """The tiny decoder, which has no dropout, and the tiny BERT, which has."""
    if request.param == "causal":
        return str(tiny_checkpoint)
    encoder: EpicEncoder = request.getfixturevalue("tiny_bidirectional_encoder")
    assert encoder.backbone.transformer.config.hidden_dropout_prob > 0
    encoder.save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def test_a_resumed_run_ends_as_an_uninterrupted_one(config: Config, tmp_path: Path, model: str) -> None:
    whole = config(model=model, output=str(tmp_path / "whole"))
    Trainer(whole).train(show_progress=False)
    halves = config(model=model, output=str(tmp_path / "halves"))
    first = Trainer(halves)
    stop_at(first, 4)
    assert latest_checkpoint(Path(halves.output)) == tmp_path / "halves" / "checkpoint-3"
    second = Trainer(halves)
    second.train(show_progress=False)
    assert_same(whole, halves)
    # Step 4 was done twice and counts once.
    assert second.step == 6
    assert second.pairs == 6 * 8
    entries = [json.loads(line) for line in (tmp_path / "halves" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert entries == second.metrics
    expected = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["loss"] for entry in entries] == pytest.approx([entry["loss"] for entry in expected], abs=1e-5)
    assert sum(entry["tokens"] for entry in entries) == second.tokens
    assert sum(entry["seconds"] for entry in entries) == pytest.approx(second.seconds, abs=0.01)


def test_a_killed_command_goes_on_to_the_same_weights(
    settings: Callable[..., dict[str, Any]], config: Config, tmp_path: Path, cli: Any
) -> None:
    whole = config(output=str(tmp_path / "whole"))
    Trainer(whole).train(show_progress=False)
    killed = config(save_every=2)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(settings(save_every=2)))
    process = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, "train", str(file)], capture_output=True, timeout=300, check=False
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    folder = Path(killed.output)
    left = sorted(item.name for item in folder.iterdir())
    assert left == [".checkpoint-4.tmp", "checkpoint-2", "metrics.jsonl"]
    # Nor does half a line do harm.
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 5, "lo')
    result = cli("train", file)
    assert (result.status, result.out) == (0, f"{folder / 'final'}\n")
    assert_same(whole, killed)
    assert sorted(item.name for item in folder.iterdir()) == ["checkpoint-4", "checkpoint-6", "final", "metrics.jsonl"]
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_command_killed_anywhere_ends_with_the_same_bits(
    settings: Callable[..., dict[str, Any]], config: Config, tmp_path: Path, cli: Any
) -> None:
    changes: dict[str, Any] = {"lora_rank": 4, "lora_dropout": 0.1, "dtype": "float16", "save_every": 1}
    changes |= {"grad_cache": True, "micro_batch_tokens": 60}
    whole = config(output=str(tmp_path / "whole"), **changes)
    Trainer(whole).train(show_progress=False)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(settings(**changes)))
    step, after = random.randrange(6), random.uniform(0, 0.05)
    process = subprocess.run(
        [sys.executable, "-c", KILLED_AT_RANDOM, "train", str(file)],
        capture_output=True,
        timeout=600,
        check=False,
        env={**os.environ, "KILL_AT": str(step), "KILL_AFTER": str(after)},
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    result = cli("train", file)
    assert result.status == 0, result.err
    told = f"killed {after} s after step {step} began"
    left, right = state(whole), state(config(**changes))
    assert left.keys() == right.keys(), told
    assert all(torch.equal(left[key], right[key]) for key in left), told
    final = [Path(folder) / "final" / "model.safetensors" for folder in (whole.output, config().output)]
    assert final[0].read_bytes() == final[1].read_bytes(), told
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6], told


def test_a_finished_run_is_written_again(config: Config) -> None:
    final = Trainer(config()).train(show_progress=False)
    before = {file.name: file.read_bytes() for file in final.glob("*.safetensors")}
    metrics = (final.parent / "metrics.jsonl").read_text()
    again = Trainer(config())
    assert again.train(show_progress=False) == final
    assert again.step == 6
    assert {file.name: file.read_bytes() for file in final.glob("*.safetensors")} == before
    assert (final.parent / "metrics.jsonl").read_text() == metrics


def test_a_stage_stops_where_it_is_told(config: Config, tmp_path: Path) -> None:
    whole = config(output=str(tmp_path / "whole"), save_every=2)
    Trainer(whole).train(show_progress=False)
    stage = Trainer(config(stop_at_step=4, save_every=2))
    final = stage.train(show_progress=False)
    assert stage.step == 4
    assert json.loads((final / "epic.json").read_text())["training"]["steps"] == 4
    # The rest of the schedule is still there to go on with.
    rest = config(save_every=2)
    Trainer(rest).train(show_progress=False)
    assert_same(whole, rest)


def test_old_checkpoints_are_deleted(config: Config) -> None:
    trainer = Trainer(config(steps=5, save_every=1, keep_checkpoints=3))
    trainer.train(show_progress=False)
    names = sorted(path.name for path in trainer.folder.glob("checkpoint-*"))
    assert names == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]


def test_no_resume_starts_afresh(config: Config) -> None:
    old = Trainer(config(seed=1))
    old.train(show_progress=False)
    (old.folder / "checkpoint-notes").mkdir()
    new = Trainer(config(steps=2, save_every=1, keep_checkpoints=1))
    new.train(resume=False, show_progress=False)
    # Its checkpoints are not taken for older ones than those of the run before.
    assert sorted(path.name for path in new.folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-notes"]
    assert [entry["step"] for entry in new.metrics] == [1, 2]
    assert len((new.folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_metrics_of_a_run_that_saved_nothing_are_not_mixed_in(config: Config) -> None:
    stop_at(Trainer(config()), 2)
    trainer = Trainer(config())
    trainer.train(show_progress=False)
    lines = (trainer.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"learning_rate": 0.5}, "learning_rate 0.001, and this run has 0.5"),
        ({"steps": 7}, "steps 6, and this run has 7"),
        ({"strategy": "text"}, "strategy 'epic', and this run has 'text'"),
        ({"evaluation_tasks": ["up"]}, "evaluation_tasks [], and this run has ['up']"),
        ({"tasks": {"up": {"weight": 2}, "down": {}}}, "'weight': 2.0"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(config: Config, changes: dict[str, Any], expected: str) -> None:
    Trainer(config()).train(show_progress=False)
    with pytest.raises(TrainingError, match=re.escape(expected)) as caught:
        Trainer(config(**changes)).train(show_progress=False)
    text = str(caught.value)
    assert "checkpoint-6 was trained with" in text
    assert "another output folder" in text
    assert "--no-resume" in text
    assert "\n" not in text


def test_a_changed_file_is_refused(config: Config, data: Path, write_task: Callable[..., Path]) -> None:
    Trainer(config()).train(show_progress=False)
    write_task(data, "up", [{"query": "a", "positive": "b"}, {"query": "c", "positive": "d"}])
    with pytest.raises(
        TrainingError, match=r"checkpoint-6 was trained on a file up with SHA-256 \w{12}.*, and this run's"
    ):
        Trainer(config()).train(show_progress=False)


def test_what_is_free_to_change(config: Config) -> None:
    stop_at(Trainer(config()), 4)
    changes = {"save_every": 1, "keep_checkpoints": 9, "device": "cpu", "description": "d", "license": "l", "name": "n"}
    changes |= {"grad_cache": True, "gradient_checkpointing": True, "tensorboard": True}
    trainer = Trainer(config(**changes))
    trainer.train(show_progress=False)
    assert sorted(path.name for path in trainer.folder.glob("checkpoint-*")) == [
        f"checkpoint-{n}" for n in (3, 4, 5, 6)
    ]


def test_a_checkpoint_from_before_a_setting_existed(config: Config) -> None:
    stop_at(Trainer(config()), 4)
    file = Path(config().output) / "checkpoint-3" / "trainer.json"
    facts = json.loads(file.read_text())
    del facts["config"]["interpolate_with_start"], facts["config"]["drop_instruction_p"]
    del facts["config"]["tasks"]["up"]["sources_per_batch"], facts["pairs"], facts["data"]
    # Names of earlier releases, and a deleted setting that was not in use.
    facts["config"] |= {"no_instruction": 0.0, "size_power": 0.5, "turned_round": 0.0, "mismatched_weight": 1.0}
    file.write_text(json.dumps(facts))
    trainer = Trainer(config())
    trainer.train(show_progress=False)
    assert (trainer.step, trainer.pairs) == (6, 48)
    # Where the setting is used now, it is another run.
    file = trainer.folder / "checkpoint-6" / "trainer.json"
    facts = json.loads(file.read_text())
    del facts["config"]["drop_instruction_p"]
    file.write_text(json.dumps(facts))
    with pytest.raises(TrainingError, match=r"drop_instruction_p 0\.0, and this run has 0\.5"):
        Trainer(config(drop_instruction_p=0.5)).train(show_progress=False)


@pytest.mark.parametrize(
    ("name", "content"),
    [("trainer.json", "{"), ("trainer.json", "{}"), ("state.safetensors", "no"), ("state.safetensors", None)],
)
def test_a_broken_checkpoint_is_named(config: Config, name: str, content: str | None) -> None:
    trainer = Trainer(config())
    trainer.train(show_progress=False)
    file = trainer.folder / "checkpoint-6" / name
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    with pytest.raises(TrainingError, match=r"checkpoint-6 does not load \(.*\)\. Delete the folder") as caught:
        Trainer(config()).train(show_progress=False)
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_not_finite(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(config(save_every=2))
    compute = trainer.objective

    def poisoned(*arguments: Any) -> Any:
        terms = compute(*arguments)
        return dataclasses.replace(terms, loss=terms.loss * float("nan")) if trainer.step == 3 else terms

    monkeypatch.setattr(trainer, "objective", poisoned)
    with pytest.raises(TrainingError, match=r"The loss at step 4 is nan\. .*checkpoint-2 is good") as caught:
        trainer.train(show_progress=False)
    assert "lower learning_rate" in str(caught.value)
    assert latest_checkpoint(trainer.folder) == trainer.folder / "checkpoint-2"
    assert all(bool(torch.isfinite(value).all()) for value in trainer.encoder.backbone.parameters())
    assert not (trainer.folder / "final").exists()
    # Without the poison the run goes on from there.
    Trainer(config(save_every=2)).train(show_progress=False)


def test_a_gradient_that_is_not_finite(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(config())
    compute = trainer.objective

    def poisoned(*arguments: Any) -> Any:
        terms = compute(*arguments)
        # The root's gradient at zero is infinite, and its value is not.
        return dataclasses.replace(terms, loss=terms.loss + torch.sqrt((terms.loss - terms.loss.detach()).abs()))

    monkeypatch.setattr(trainer, "objective", poisoned)
    with pytest.raises(TrainingError, match=r"The gradient's norm at step 1 is (nan|inf)\. There is no checkpoint"):
        trainer.train(show_progress=False)
    assert all(bool(torch.isfinite(value).all()) for value in trainer.encoder.backbone.parameters())
