"""The model card (`README.md`) of a checkpoint: `model_card_template.md` filled from its `epic.json`.

    python -m epic_rag.training.model_card FOLDER --figures FIGURES.md

The trainer writes a card with the result of a run; the command rewrites it with figures that were measured later.
`sources.json` has origin and licence of the files that the shipped recipes train on.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from epic_rag.checkpoints import (
    EPIC_FILE,
    HEAD_FOLDER,
    QUERY_FILES,
    QUERY_FORMAT_VERSION,
    is_int8,
    list_checkpoints,
    read_epic_file,
    resolve,
)
from epic_rag.errors import CheckpointError, DataError, EpicError
from epic_rag.training.config import LAST_COMMIT_WITH_DELETED_SETTINGS, TaskConfig, deleted_settings

__all__ = ["held_out_figures", "main", "stated_license", "write_model_card"]

_HERE = Path(__file__).parent
_TAGS = ["retrieval", "embeddings", "feature-extraction", "in-context-learning", "epic"]


def write_model_card(folder: str | os.PathLike[str], *, figures: str = "") -> Path:
    """Write `README.md` into a checkpoint folder.

    Args:
        folder: A checkpoint; the card is made from its `epic.json`.
        figures: Markdown for the section on evaluation.

    Returns:
        The card's path.

    Raises:
        CheckpointError: If the folder is not a checkpoint of epic-rag.
    """
    home = Path(folder)
    epic = read_epic_file(home)
    if not epic:
        raise CheckpointError(f"{home} has no {EPIC_FILE}. Name a checkpoint folder of epic-rag, such as RUN/final.")
    shipped = any(info.path == home.resolve() for info in list_checkpoints())
    place = str(epic.get("name")) if shipped else f"path/to/{home.resolve().name}"
    # Formats of epic-rag alone.
    is_ours = is_int8(epic) or any((home / name).is_file() for name in QUERY_FILES[:2])
    exported = f"path/to/{Path(place).name}-float16" if is_ours else place
    base = epic.get("base_model")
    card = ModelCard.from_template(
        ModelCardData(
            library_name="epic-rag",
            license=epic.get("license") or None,
            language=epic.get("languages") or None,
            # Hubs take "owner/name" for a model.
            base_model=base if str(base).count("/") == 1 else None,
            pipeline_tag="sentence-similarity",
            tags=_TAGS,
        ),
        template_path=str(_HERE / "model_card_template.md"),
        epic=epic,
        facts=_facts(epic),
        name=json.dumps(place, ensure_ascii=False),
        exported=json.dumps(exported, ensure_ascii=False),
        export=f"epic-rag models export {shlex.quote(place)} {shlex.quote(exported)}" if is_ours else "",
        head=HEAD_FOLDER if (home / HEAD_FOLDER).is_dir() else "",
        figures=figures.strip(),
        stages=list(_stages(epic.get("training"))),
    )
    (home / "README.md").write_text(f"{str(card).strip()}\n", encoding="utf-8")
    return home / "README.md"


def stated_license(model: str) -> str:
    """Return the licence that a model's own files state; "" if they state none.

    Args:
        model: A folder, a shipped checkpoint, or a hub name that was downloaded.
    """
    try:
        folder = resolve(model, local_files_only=True)
        stated = read_epic_file(folder).get("license")
        if not stated and (folder / "README.md").is_file():
            stated = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.license
    except (EpicError, OSError, ValueError):
        return ""
    return stated if isinstance(stated, str) else ""


def held_out_figures(entry: Mapping[str, Any]) -> str:
    """Return a table of the trainer's measurements on held-out rows.

    Args:
        entry: A line of `metrics.jsonl`: {"step": ..., "evaluation": {task: {"k=0": nDCG@10, ...}}}.
    """
    scores: Mapping[str, Mapping[str, float]] = entry["evaluation"]
    if not scores:
        return ""
    ks = list(next(iter(scores.values())))
    rows = [(task, *(f"{values[k]:.1f}" for k in ks)) for task, values in sorted(scores.items())]
    text = (
        f"nDCG@10 on held-out rows after {entry['step']:,} steps, among their passages and a few hundred others, by "
        "the number k of demonstrations. Measured during training as a check; not comparable with other figures."
    )
    return f"{text}\n\n{_table(('task', *ks), rows)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Without the program's name; None takes those of the process.

    Returns:
        The exit status: 0, or 1 for an error, which is one line on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="python -m epic_rag.training.model_card", description="Write the model card of a checkpoint folder."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="A checkpoint of epic-rag.")
    parser.add_argument("--figures", type=Path, metavar="FILE.md", help="Markdown for the section on evaluation.")
    options = parser.parse_args(arguments)
    try:
        card = write_model_card(options.folder, figures=_read(options.figures) if options.figures else "")
    except EpicError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{card}\n")
    return 0


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}). Pass a Markdown file with --figures.") from error


def _facts(epic: Mapping[str, Any]) -> str:
    rows = [
        ("base model", epic.get("base_model") or "not stated"),
        ("licence of the weights", epic.get("license") or "not stated"),
        ("parameters", f"{epic.get('parameters', 0):,}"),
        ("dimensions", epic["dimension"]),
        ("pooling", epic["pooling"]),
        ("projector", epic["projector"]),
        ("longest query, document", f"{epic['max_query_tokens']}, {epic['max_document_tokens']} tokens"),
    ]
    if epic.get("max_demonstrations") is not None:
        rows.append(("demonstrations in training", f"0 to {epic['max_demonstrations']} a query"))
    if epic.get("default_instruction"):
        rows.append(("default instruction", epic["default_instruction"]))
    if epic.get("format_version") == QUERY_FORMAT_VERSION:
        rows.append(("weights", "two sets behind the first layers: of queries, and of documents"))
    if epic.get("symmetric_as_documents"):
        rows.append(("texts that are compared with each other", "read as documents, without an instruction"))
    return _table(("", ""), rows)


def _stages(record: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the sections of a training record and of those before it."""
    sources = json.loads((_HERE / "sources.json").read_text(encoding="utf-8"))
    unknown = {"content": "", "origin": "not stated", "license": "not stated"}
    above = None
    # A record from elsewhere may hold less than ours; it gets no section.
    while record and {"config", "data"} <= record.keys():
        data = []
        for task, facts in sorted(record["data"].items()):
            source = sources.get(task, unknown)
            counts = (f"{facts['rows']:,}", f"{facts['held_out']:,}")
            origin = (source["content"], source["origin"], source["license"])
            data.append((task, *counts, *origin, f"`{facts['sha256'][:12]}`"))
        run = [
            ("steps", f"{record['steps']:,}"),
            ("pairs", f"{record['pairs']:,}"),
            ("tokens", f"{record['tokens']:,}"),
            ("hours", record["hours"]),
            ("hardware", record["hardware"]),
            ("versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
        ]
        yield {
            "same_data": record["data"] == above,
            "data": _table(("task", "rows", "held out", "what", "origin", "licence", "SHA-256 of the file"), data),
            "run": _table(("", ""), run),
            "commit": LAST_COMMIT_WITH_DELETED_SETTINGS if deleted_settings(record["config"]) else "",
            "config": _configuration(record["config"]),
        }
        above, record = record["data"], record.get("previous")


def _configuration(config: Mapping[str, Any]) -> str:
    """Return a configuration as YAML for `epic-rag train`; JSON values are YAML."""
    defaults = {item.name: item.default for item in fields(TaskConfig)} | {"sources": 0}
    lines = []
    for name, value in config.items():
        if name == "tasks":
            lines.append("tasks:")
            for task, settings in value.items():
                changed = {key: item for key, item in settings.items() if item != defaults.get(key)}
                lines.append(f"  {json.dumps(task)}: {json.dumps(changed, ensure_ascii=False)}")
        else:
            lines.append(f"{name}: {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines)


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
