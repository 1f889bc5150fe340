"""Plots are written as SVG and PNG, hold what they should, and need matplotlib."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest

from epic_rag.errors import MissingExtraError
from epic_rag.evaluation.plots import Curve, plot_curves, require_matplotlib

CURVES = [
    Curve("EPIC", [0, 1, 8], [1.0, 2.0, 4.0], [0.9, 1.8, 3.0], [1.1, 2.5, 5.0]),
    Curve("text ICL", [0, 1, 2], [1.0, 3.0, 9.0]),
]


def test_both_formats_and_their_labels(tmp_path: Path) -> None:
    files = plot_curves(CURVES, tmp_path / "new" / "latency.1", title="Latency", y_label="ms", logarithmic=True)
    assert [path.name for path in files] == ["latency.1.svg", "latency.1.png"]
    svg = files[0].read_text(encoding="utf-8")
    for text in ("Latency", "ms", "EPIC", "text ICL", "demonstrations k", ">8<"):
        assert text in svg, text
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_equal_data_gives_an_equal_file(tmp_path: Path) -> None:
    first, second = (plot_curves(CURVES, tmp_path / name, title="T", y_label="y")[0] for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    other = plot_curves(CURVES[:1], tmp_path / "c", title="T", y_label="y")[0]
    assert other.read_bytes() != first.read_bytes()


def test_no_window_and_no_global_state(tmp_path: Path) -> None:
    plot_curves(CURVES, tmp_path / "a", title="T", y_label="y")
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"drawing plots needs matplotlib.*epic-rag\[eval\]"):
        require_matplotlib()
    with pytest.raises(MissingExtraError):
        plot_curves(CURVES, tmp_path / "a", title="T", y_label="y")
