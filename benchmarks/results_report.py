"""The report of `benchmarks/results.py`: tables and plots, put between the markers of a document."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epic_rag.errors import DataError

CONDITIONS = {"own": "own demonstrations", "shuffled": "passages shuffled", "foreign": "of another task"}
COLOURS = ("#0072B2", "#E69F00", "#999999")  # Okabe and Ito's palette


@dataclass(frozen=True)
class Finished:
    """A step that has run.

    Args:
        title: The name of its place in a document.
        command: What a reader would type.
        folder: Its files: table.md, perhaps result.json and SVGs.
        table: "all" of the table, or its "means".
        plot: Whether its held-out scores are drawn.
    """

    title: str
    command: tuple[str, ...]
    folder: Path
    table: str = "all"
    plot: bool = False


def markers(title: str) -> tuple[str, str]:
    return f"<!-- begin {title} -->", f"<!-- end {title} -->"


def placeholder_document(titles: Sequence[str]) -> str:
    """A document with a place for each title."""
    return "# Results\n\n" + "\n\n".join("\n".join(markers(title)) for title in titles) + "\n"


def replace_between(text: str, title: str, block: str) -> str | None:
    """Put a block between a title's markers.

    Returns:
        The new text, or None if the text has no place for the title.

    Raises:
        DataError: The markers are there more than once, or one of them alone, or in the wrong order.
    """
    begin, end = markers(title)
    if (text.count(begin), text.count(end)) == (0, 0):
        return None
    start, stop = text.find(begin), text.find(end)
    if (text.count(begin), text.count(end)) != (1, 1) or stop < start:
        raise DataError(
            f"the document has {text.count(begin)} times {begin} and {text.count(end)} times {end}; "
            "it needs one of each, in this order"
        )
    return f"{text[: start + len(begin)]}\n{block.strip()}\n{text[stop:]}"


def wrapped(words: Sequence[str], width: int = 108) -> str:
    """A command over several lines, broken before options."""
    pieces: list[str] = []
    for word in words:
        # An option and its value stay together.
        if not pieces or word.startswith("-") or not pieces[-1].startswith("-") or " " in pieces[-1]:
            pieces.append(shlex.quote(word))
        else:
            pieces[-1] += f" {shlex.quote(word)}"
    lines = [pieces[0]]
    for piece in pieces[1:]:
        if len(lines[-1]) + 1 + len(piece) > width:
            lines.append(f"  {piece}")
        else:
            lines[-1] += f" {piece}"
    return " \\\n".join(lines)


def means_only(table: str) -> str:
    """The lines of a table that are means over files or sets, with its header."""
    lines = table.splitlines()
    header = [number for number, line in enumerate(lines) if line.startswith("| ---")]
    kept = {number + offset for number in header for offset in (-1, 0)}
    return "\n".join(line for number, line in enumerate(lines) if number in kept or line.startswith("| **mean"))


def block_of(step: Finished, images: Sequence[str]) -> str:
    """What stands in the document: the command, the table, the plots."""
    table = (step.folder / "table.md").read_text(encoding="utf-8").strip()
    if step.table == "means":
        table = means_only(table)
    parts = [f"```text\n{wrapped(step.command)}\n```", table, *(f"![{Path(name).stem}]({name})" for name in images)]
    return "\n\n".join(parts)


def write_report(steps: Sequence[Finished], document: Path) -> list[str]:
    """Put every step's block into a document that has a place for it, and its plots into `images/` beside it.

    Returns:
        A line of text for each step.

    Raises:
        DataError: There is no such document, or its markers are not in order.
    """
    if not document.is_file():
        raise DataError(f"there is no document {document} with markers; check --document")
    text = document.read_text(encoding="utf-8")
    said = []
    for step in steps:
        if replace_between(text, step.title, "") is None:
            said.append(
                f"{document} has no place for {step.title}; it would be between {' and '.join(markers(step.title))}"
            )
            continue
        if step.plot:
            plot_heldout(step.folder / "result.json", step.folder / "differences.svg")
        images = copy_images(step, document.parent)
        text = replace_between(text, step.title, block_of(step, images)) or text
        said.append(f"{step.title} is in {document}")
    draft = document.with_name(f"{document.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, document)
    return said


def copy_images(step: Finished, home: Path) -> list[str]:
    """Copy a step's SVGs into `images/`, in place of those of an earlier run; return their paths from the document."""
    folder = home / "images"
    for old in folder.glob(f"{step.title}-*.svg"):
        old.unlink()
    names = []
    for image in sorted(step.folder.glob("*.svg")) + sorted(step.folder.glob("plots/*.svg")):
        folder.mkdir(exist_ok=True)
        target = folder / f"{step.title}-{re.sub(r'[^A-Za-z0-9.-]+', '-', image.stem)}.svg"
        shutil.copyfile(image, target)
        names.append(f"images/{target.name}")
    return names


def mean_differences(result: dict[str, Any]) -> dict[tuple[str, str, str, str], tuple[float, float]]:
    """Mean difference to k = 0 over the files, and its standard error, in points, at the largest k.

    Returns:
        By model, collection, instruction and condition.
    """
    found: dict[tuple[str, str, str, str], list[tuple[float, float]]] = {}
    for entry in result["heldout"]:
        largest = max(score["k"] for score in entry["scores"])
        for score in entry["scores"]:
            if score["k"] == largest > 0:
                key = (entry["model"], entry["collection"], entry["instruction_source"], score["condition"])
                versus = score["versus_zero"]
                found.setdefault(key, []).append((100 * versus["difference"], 100 * versus["standard_error"]))
    return {
        key: (
            sum(difference for difference, _ in values) / len(values),
            sum(error**2 for _, error in values) ** 0.5 / len(values),
        )
        for key, values in found.items()
    }


def plot_heldout(result: Path, target: Path) -> None:
    """Draw what demonstrations change on held-out files: a row a model, a panel a collection.

    Args:
        result: JSON of `epic-rag eval --heldout`.
        target: The SVG.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    differences = mean_differences(json.loads(result.read_text(encoding="utf-8")))
    models, collections, instructions = (list(dict.fromkeys(key[place] for key in differences)) for place in range(3))
    if not models:
        return
    # The salt makes the SVG's ids, and with them the file, the same in every run.
    with rc_context({"svg.hashsalt": "epic-rag", "font.size": 9}):
        figure = Figure(figsize=(3.2 * len(collections), 2.6 * len(models)), layout="constrained")
        panels = figure.subplots(len(models), len(collections), squeeze=False, sharey="row")
        for (row, model), (column, collection) in (
            (pair, other) for pair in enumerate(models) for other in enumerate(collections)
        ):
            axes = panels[row][column]
            axes.axhline(0, color="black", linewidth=0.8)
            for number, condition in enumerate(CONDITIONS):
                bars = [differences.get((model, collection, name, condition)) for name in instructions]
                places = [place + 0.25 * (number - 1) for place, bar in enumerate(bars) if bar is not None]
                values = [bar for bar in bars if bar is not None]
                axes.bar(
                    places,
                    [value for value, _ in values],
                    0.25,
                    yerr=[error for _, error in values],
                    color=COLOURS[number],
                    capsize=2,
                    label=CONDITIONS[condition],
                )
            axes.set_xticks(range(len(instructions)), instructions)
            axes.set_title(f"{model}, {collection}")
            axes.set_xlabel("instruction")
        for row in panels:
            row[0].set_ylabel("nDCG@10 minus k = 0")
        panels[0][0].legend(fontsize=7)
        figure.savefig(target, format="svg", metadata={"Date": None})
