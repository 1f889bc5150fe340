"""`benchmarks/scale.py`: generated vectors, quantised scans, what is computed from slopes, and the command at tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scale
from bench_common import run_main
from scale_report import layouts, slope_of, tables
from scale_vectors import Generator, Quantised, bisect, neighbour_cosines

from tests.helpers.vector_rows import unit


def clustered(count: int = 900, dim: int = 24) -> np.ndarray:  # type: ignore[type-arg]
    draw = np.random.default_rng(3)
    centres = unit(draw.standard_normal((6, dim)))
    noise = draw.standard_normal((count, dim)) * np.linspace(0.2, 0.02, dim)
    return unit(centres[draw.integers(0, 6, count)] + noise)


def test_generated_vectors_are_as_close_to_each_other_as_those_they_are_fitted_to() -> None:
    vectors = clustered()
    generator = Generator.fit(vectors, (unit(vectors[:50] + 0.1), vectors[:50]), 6)
    drawn = generator.draw(900, 5)
    assert drawn.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(drawn[:100], generator.draw(900, 5)[:100])
    real, made = neighbour_cosines(vectors), neighbour_cosines(drawn)
    assert made[0] == pytest.approx(real[0], abs=0.01)
    assert made[1:] == pytest.approx(real[1:], abs=0.05)
    queries = generator.queries(drawn, 40)
    wanted = float((unit(vectors[:50] + 0.1) * vectors[:50]).sum(axis=1).mean())
    assert float((queries @ drawn.T).max(axis=1).mean()) == pytest.approx(wanted, abs=0.05)


def test_scans_of_codes_rank_almost_as_the_vectors_do() -> None:
    vectors = clustered(2000)
    codes, queries = Quantised(vectors), clustered(60)[:20]
    assert [codes.nbytes(kind) // 2000 for kind in ("float32", "float16", "int8", "binary")] == [96, 48, 24, 8]
    query = queries[0]
    for kind in ("float16", "int8"):
        np.testing.assert_allclose(codes.scores(kind, query), vectors @ query, atol=0.02)
    signs = [np.sign(vectors - codes.mean), np.sign(query - codes.mean)]
    np.testing.assert_array_equal(codes.scores("binary", query), -(signs[0] != signs[1]).sum(axis=1))
    assert codes.recall("float32", queries, 0) == 1
    assert codes.recall("binary", queries, 2000) > 0.95  # everything is ranked again by float16
    assert codes.recall("binary", queries, 0) < codes.recall("binary", queries, 200) <= 1


def test_larger_sizes_are_computed_from_slopes() -> None:
    assert slope_of([(1, 3), (2, 5), (4, 9)]) == pytest.approx((1, 2))
    assert bisect(lambda x: x * x, 0.25, steps=20) == pytest.approx(0.5, abs=1e-4)
    rows = [
        {"layout": "one", "shards": 1, "writers": 1, "rows": n, "seconds": n * np.log2(n) * 1e-4, "memory": 2000 * n + 5,
         "disk": 3000 * n, "ms": 2 + np.log2(n), "recall": 1.0}
        for n in (1000, 2000, 4000, 8000)
    ]  # fmt: skip
    (one,) = layouts({"chroma": {"layouts": rows, "dimension": 4, "text_bytes": 5}})
    assert one.memory(10**6) == pytest.approx(2e9, rel=0.01)
    assert one.disk(10**7) == pytest.approx(3e10)
    assert one.query_ms(10**8) == pytest.approx(2 + np.log2(1e8))
    assert one.build(10**7) == pytest.approx(1e7 * np.log2(1e7) * 1e-4, rel=0.1)
    assert "| Chroma, one collection | 1 million*   | 2 GB |" in tables(
        {"chroma": {"layouts": rows, "dimension": 4, "text_bytes": 5}}
    ).replace("   2 GB", " 2 GB").replace("  2 GB", " 2 GB")


def test_every_stage_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["scale.py", "--quick", "--output", str(tmp_path)])
    assert run_main(scale.parser(), scale.quick) == 0
    found = {path.stem: json.loads(path.read_text())["result"] for path in tmp_path.glob("*.json")}
    assert set(found) == set(scale.STAGES) - {"report"}
    assert [row["rows"] for row in found["chroma"]["layouts"]] == [100, 200, 200]
    assert all(row["recall"] > 0.9 for row in found["chroma"]["layouts"])
    assert 0.99 < found["training"]["parameters"] / 7.11e9 < 1.01  # Mistral-7B without its output layer
    assert 0.99 < found["training"]["adapters"] / (167.8e6 + 16.8e6) < 1.01
    printed = capsys.readouterr().out
    for said in ("**Vectors.**", "scan, binary, 1000 rescored", "Chroma, one collection", "8 x H100 80 GB"):
        assert said in printed
    assert (tmp_path / "scale.svg").is_file()
    monkeypatch.setattr("sys.argv", ["scale.py", "--only", "nothing"])
    assert run_main(scale.parser(), scale.measure) == 1


def test_the_report_goes_between_the_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- begin scale -->\nlast year\n<!-- end scale -->\nbelow\n")
    result = {"rows": 10, "text_bytes": 5, "seconds": 1, "unchanged_seconds": 1, "sqlite_bytes": 9, "vectors_bytes": 8}
    (tmp_path / "local.json").write_text(json.dumps({"result": {**result, "hybrid_ms": 3}}))
    options = scale.parser().parse_args(["--output", str(tmp_path)])
    for _ in range(2):
        scale.report(options, page)
    text = page.read_text()
    assert text.startswith("above\n<!-- begin scale -->\n")
    assert text.endswith("<!-- end scale -->\nbelow\n")
    assert text.count("An index folder as measured") == 1
    assert "last year" not in text
