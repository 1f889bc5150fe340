from __future__ import annotations

import json
from pathlib import Path

import pytest
import server


def test_requests_hold_every_text_once() -> None:
    texts = [f"text {number}" for number in range(200)]
    requests = server.requests_of(texts, 1)
    assert sorted(text for request in requests for text in request) == sorted(texts)
    assert len({len(request) for request in requests}) > 3


def test_the_script_runs_as_documented(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        json.dumps({"query": f"term {number}", "positive": f"{'meaning ' * (number % 9)}{number}"})
        for number in range(80)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    options = [
        "--texts",
        str(tmp_path / "pairs.jsonl"),
        "--model",
        str(tiny_checkpoint),
        "--count",
        "80",
        "--runs",
        "2",
    ]
    parsed = server.parser().parse_args([*options, "--minutes", "0.05", "--output", str(tmp_path / "out")])
    assert server.measure(parsed) == 0
    record = json.loads((tmp_path / "out" / "server.json").read_text())
    assert record["texts"] == 80
    assert set(record["statuses"]) <= {"200", "400", "left"}
    assert record["statuses"]["200"] > 0
    assert [bar["value"] for bar in record["bars"] if bar["what"] == "answered requests / requests"] == [1]
    assert all(bar["value"] is not None for bar in record["bars"])
    assert "texts a second, 32 clients" in capsys.readouterr().out
