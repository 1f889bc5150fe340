"""The report of `benchmarks/results.py`: tables between the markers of a document."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results_few_shot import few_shot_methods, few_shot_summary, few_shot_tables

from epic_rag.errors import DataError
from epic_rag.evaluation.heldout import Comparison
from epic_rag.evaluation.report import difference, markdown_table, percent, pool_comparisons
from epic_rag.files import write_atomically

PLOT = "result.svg"
SHOWN = {"own": "own", "shuffled": "passages shuffled", "foreign": "another task's"}


@dataclass(frozen=True)
class Finished:
    """A step that has run.

    Args:
        title: The name of its place in a document.
        command: The command as a reader would type it.
        folder: Its files: table.md, perhaps result.json.
        table: "all" for the printed table, "heldout", "fewshot" or "methods" for short ones of the JSON.
    """

    title: str
    command: tuple[str, ...]
    folder: Path
    table: str = "all"


def markers(title: str) -> tuple[str, str]:
    return f"<!-- begin {title} -->", f"<!-- end {title} -->"


def placeholder_document(titles: Sequence[str]) -> str:
    """Return a document with a place for each title."""
    return "# Results\n\n" + "\n\n".join("\n".join(markers(title)) for title in titles) + "\n"


def replace_between(text: str, title: str, block: str) -> str | None:
    """Put a block between a title's markers.

    Returns:
        The new text, or None if the text has no place for the title.

    Raises:
        DataError: The markers are there more than once, or one of them is missing, or in the wrong order.
    """
    begin, end = markers(title)
    if (text.count(begin), text.count(end)) == (0, 0):
        return None
    start, stop = text.find(begin), text.find(end)
    if (text.count(begin), text.count(end)) != (1, 1) or stop < start:
        raise DataError(
            f"The document has {text.count(begin)} times {begin} and {text.count(end)} times {end}. "
            "Write one of each, in this order."
        )
    return f"{text[: start + len(begin)]}\n{block.strip()}\n{text[stop:]}"


def wrapped(words: Sequence[str], width: int = 108) -> str:
    """Return a command over several lines, broken before options."""
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


def heldout_table(result: dict[str, Any]) -> str:
    """Return means over the held-out files: a line per model, collection and instruction.

    Args:
        result: JSON of `epic-rag eval --heldout`.
    """
    groups: dict[tuple[str, str, str], list[dict[tuple[str, int], dict[str, Any]]]] = {}
    for entry in result["heldout"]:
        key = (entry["model"], entry["collection"], entry["instruction_source"])
        groups.setdefault(key, []).append({(score["condition"], score["k"]): score for score in entry["scores"]})
    shown = dict.fromkeys(key for files in groups.values() for file in files for key in file if key[1] > 0)
    rows = []
    for group, files in groups.items():
        row = [*group, percent(sum(file["none", 0]["ndcg_at_10"] for file in files) / len(files))]
        for key in shown:
            found = [file[key]["versus_zero"] if key in file else None for file in files]
            row.append(difference(pool_comparisons([None if each is None else Comparison(**each) for each in found])))
        rows.append(row)
    header = ["model", "collection", "instruction", "k = 0", *(f"{SHOWN[name]}, k = {k}" for name, k in shown)]
    return markdown_table(header, rows, text_columns=3)


def has_plot(step: Finished) -> bool:
    return step.table == "fewshot" and (step.folder / PLOT).is_file()


def result_of(step: Finished) -> dict[str, Any]:
    """Read a step's JSON."""
    found: dict[str, Any] = json.loads((step.folder / "result.json").read_text(encoding="utf-8"))
    return found


def block_of(step: Finished) -> str:
    """Return a step's block: the command and the table."""
    if step.table == "all":
        table = (step.folder / "table.md").read_text(encoding="utf-8").strip()
    else:
        shorten = {"heldout": heldout_table, "fewshot": few_shot_tables, "methods": few_shot_methods}[step.table]
        table = shorten(result_of(step))
    plot = f"\n\n![Gain by the number of demonstrations](images/{step.title}.svg)" if has_plot(step) else ""
    return f"```text\n{wrapped(step.command)}\n```{plot}\n\n{table}"


def write_report(steps: Sequence[Finished], documents: Sequence[Path]) -> list[str]:
    """Put every step's block into the documents that have a place for it.

    A few-shot evaluation has a second, shorter block, TITLE-summary, and a plot, which goes into the folder `images`
    beside the first document.

    Returns:
        A line of text for each block.

    Raises:
        DataError: There is no such document, or its markers are not in order.
    """
    missing = [str(document) for document in documents if not document.is_file()]
    if missing:
        raise DataError(f"No document {missing[0]}. Check --document.")
    texts = {document: document.read_text(encoding="utf-8") for document in documents}
    lines = []
    for step in steps:
        blocks = {step.title: block_of(step)}
        if step.table == "fewshot":
            blocks[f"{step.title}-summary"] = few_shot_summary(result_of(step))
            images = documents[0].parent / "images"
            if has_plot(step):
                images.mkdir(exist_ok=True)
                write_atomically(images / f"{step.title}.svg", (step.folder / PLOT).read_bytes())
        for title, block in blocks.items():
            places = []
            for document, text in texts.items():
                new = replace_between(text, title, block)
                if new is not None:
                    texts[document] = new
                    places.append(document)
            if places:
                lines.append(f"{title} is in {', '.join(map(str, places))}")
            elif title == step.title:
                place = " and ".join(markers(title))
                lines.append(f"{', '.join(map(str, documents))} has no place for {title}, which is {place}")
    for document, text in texts.items():
        write_atomically(document, text)
    return lines
