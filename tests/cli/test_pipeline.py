"""`index --to` and `status --to`, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from epic_rag_cli.pipeline import address_of, progress_line
from epic_rag_ray import RunProgress, VectorParts
from tests.cli.test_schemas import check


def test_counts_rows_and_changes(cli: Any, docs: Path, tiny_checkpoint: Path) -> None:
    (docs / "broken.pdf").write_bytes(b"%PDF-1.4 broken")
    first = cli("index", "docs", "--to", "vectors", "--model", tiny_checkpoint)
    assert first.status == 0
    assert first.out.startswith("4 added, 0 changed, 0 deleted, 0 unchanged, 1 skipped; 5 rows, 5 embedded in ")
    assert "broken.pdf: a broken PDF" in first.err
    (docs / "undo.md").unlink()
    (docs / "notes.txt").write_text("Dogs sleep at night.\n")
    # The folder knows its documents and its model.
    second = cli("index", "--to", "vectors", "--json")
    assert second.status == 0
    report = json.loads(second.out)
    check("index-to", report)
    assert {name: report[name] for name in ("to", "changed", "deleted", "unchanged", "rows", "embedded")} == {
        "to": "vectors",
        "changed": 1,
        "deleted": 1,
        "unchanged": 2,
        "rows": 4,
        "embedded": 1,
    }
    assert [Path(each["path"]).name for each in report["skipped"]] == ["broken.pdf"]
    assert VectorParts("vectors").count() == 4


def test_status(cli: Any, docs: Path, tiny_checkpoint: Path) -> None:
    missing = cli("status", "--to", "vectors")
    assert (missing.status, missing.out) == (1, "")
    assert "no run of `epic-rag index --to`" in missing.err
    cli("index", "docs", "--to", "vectors", "--model", tiny_checkpoint)
    shown = cli("status", "--to", "vectors")
    assert shown.status == 0
    assert "rows     5 of 1 run" in shown.out
    assert "run      complete: storing 5 of 5 rows" in shown.out
    facts = json.loads(cli("status", "--to", "vectors", "--json").out)
    check("status-to", facts)
    assert (facts["state"], facts["rows"], facts["failures"], facts["generation"]) == ("complete", 5, {}, 1)


def test_a_run_that_was_killed_is_interrupted(cli: Any, docs: Path, tiny_checkpoint: Path) -> None:
    cli("index", "docs", "--to", "vectors", "--model", tiny_checkpoint)
    file = Path("vectors/progress.json")
    progress = {**json.loads(file.read_text()), "state": "running", "stage": "embedding", "done": 2, "pid": 2**22 + 1}
    file.write_text(json.dumps(progress))
    shown = cli("status", "--to", "vectors")
    assert "interrupted: embedding 2 of 5 rows" in shown.out
    assert "continues it" in shown.out


def test_the_settings_hold_for_the_folder(cli: Any, docs: Path, tiny_checkpoint: Path, other_checkpoint: Path) -> None:
    common = ("index", "docs", "--to", "vectors", "--model")
    assert cli(*common, tiny_checkpoint, "--include", "*.md", "--vectors", "float16").status == 0
    assert VectorParts("vectors").info.dtype == "float16"
    other = cli(*common, other_checkpoint, "--vectors", "float16")
    assert (other.status, other.err.count("\n")) == (1, 1)
    assert "Write to another folder." in other.err
    assert "was made with vectors float16" in cli(*common, tiny_checkpoint).err


def test_nothing_to_index(cli: Any, tmp_path: Path, tiny_checkpoint: Path) -> None:
    Path("empty").mkdir()
    result = cli("index", "empty", "--to", "vectors", "--model", tiny_checkpoint)
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith("error: Nothing to index")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ray", "local"), "--ray needs --to"),
        (("--to", "v", "--watch"), "--to excludes"),
        (("--to", "v", "--rebuild"), "--to excludes"),
        (("--to", "v", "--actors", "0"), "--actors"),
        (("--to", "v", "--duplicates", "some"), "--duplicates"),
    ],
)
def test_options_that_do_not_fit(cli: Any, docs: Path, options: tuple[str, ...], message: str) -> None:
    result = cli("index", "docs", *options)
    assert (result.status, result.out) == (2, "")
    assert message in result.err
    assert not Path("v").exists()


def test_addresses_keep_both_slashes() -> None:
    assert address_of(Path("s3://bucket/a/b")) == "s3://bucket/a/b"
    assert address_of(Path("gs://x")) == "gs://x"
    assert address_of(Path("docs/a")) == "docs/a"
    assert address_of(Path("/docs")) == "/docs"


def test_the_line_of_progress() -> None:
    event = RunProgress(
        "running",
        "embedding",
        4096,
        20_000,
        actors=2,
        tokens_per_second=5432.1,
        seconds_left=200,
        failures={"a broken PDF": 2, "no text": 5},
    )
    assert progress_line(event) == (
        "embedding 4,096 of 20,000 rows, 5,432 tokens/s an actor, 3 min left, 7 failed (5 no text, 2 a broken PDF)"
    )
    assert progress_line(RunProgress("running", "listing", 0, 0)) == "listing"
