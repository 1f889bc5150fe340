"""The model card (`README.md`) of a checkpoint, written from its `epic.json`.

    python -m epic_rag.training.model_card FOLDER --figures FIGURES.md

The trainer writes one with the result of a run; the command writes it anew, with figures measured since.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from epic_rag.checkpoint_io import HEAD_FOLDER
from epic_rag.checkpoints import EPIC_FILE, is_int8, list_checkpoints, read_epic_file
from epic_rag.errors import CheckpointError, DataError, EpicError
from epic_rag.training.config import TaskConfig
from epic_rag.training.data import SOURCES

__all__ = ["held_out_figures", "main", "write_model_card"]

_TAGS = ("retrieval", "embeddings", "feature-extraction", "in-context-learning", "epic")
_NO_FIGURES = "Not measured yet. `epic-rag eval` measures it; see docs/evaluation.md of epic-rag."
_STRATEGIES = {
    "task-vector": (
        'Unless it is asked for the prompt (`strategy="epic"`), it takes these embeddings as a task vector, which on',
        "new tasks brings more.",
    )
}
# Lines of Python that turn `hidden` and `batch` into one vector a text, for transformers.
_POOLING = {
    "mean": ('mask = batch["attention_mask"].unsqueeze(-1)', "vectors = (hidden * mask).sum(dim=1) / mask.sum(dim=1)"),
    "last": ('last = batch["attention_mask"].sum(dim=1) - 1', "vectors = hidden[torch.arange(len(last)), last]"),
    "cls": ("vectors = hidden[:, 0]",),
}


def write_model_card(folder: str | os.PathLike[str], *, figures: str = "") -> Path:
    """Write `README.md` into a checkpoint folder.

    Args:
        folder: A checkpoint; everything in the card is read from its `epic.json`.
        figures: Markdown for the section on evaluation.

    Returns:
        The card's path.

    Raises:
        CheckpointError: If the folder is no epic-rag checkpoint.
    """
    home = Path(folder)
    epic = read_epic_file(home)
    if not epic:
        raise CheckpointError(f"{home} has no {EPIC_FILE}; name a checkpoint folder of epic-rag, such as RUN/final")
    shipped = any(info.path == home.resolve() for info in list_checkpoints())
    where = str(epic.get("name")) if shipped else f"path/to/{home.resolve().name}"
    parts = [
        _front_matter(epic),
        _introduction(epic),
        _use(epic, where, int8=is_int8(epic), head=(home / HEAD_FOLDER).is_dir()),
    ]
    parts.append(f"## Evaluation\n\n{figures.strip() or _NO_FIGURES}\n")
    record, heading, above = epic.get("training"), "Training", None
    # A record of somebody else's making may say less than ours; it has no section.
    while record and {"config", "data"} <= record.keys():
        parts.append(_training(record, heading, same_data=record["data"] == above))
        record, heading, above = record.get("previous"), "Training before that", record["data"]
    card = home / "README.md"
    card.write_text("\n".join(parts), encoding="utf-8")
    return card


def held_out_figures(entry: Mapping[str, Any]) -> str:
    """A table of what the trainer measured on held-out rows.

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
        "the number k of demonstrations. Measured during training, to see that it works; it compares with nothing else."
    )
    return f"{text}\n\n{_table(('task', *ks), rows)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Without the program's name; None takes the process's own.

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
        raise DataError(f"{file} cannot be read ({error}); pass a Markdown file with --figures") from error


def _front_matter(epic: Mapping[str, Any]) -> str:
    # JSON is YAML: quoted so, no value can be read as anything but a string.
    lines = ["---", "library_name: epic-rag"]
    if epic.get("license"):
        lines.append(f"license: {json.dumps(epic['license'])}")
    if str(epic.get("base_model", "")).count("/") == 1:
        # Model hubs take this for a model's name; a folder on somebody's machine is none.
        lines.append(f"base_model: {json.dumps(epic['base_model'])}")
    lines += ["pipeline_tag: sentence-similarity", "tags:", *(f"- {tag}" for tag in _TAGS), "---", ""]
    return "\n".join(lines)


def _introduction(epic: Mapping[str, Any]) -> str:
    text = [f"# {epic.get('name', 'epic')}", ""]
    if epic.get("description"):
        text += [f"{str(epic['description']).rstrip('.')}.", ""]
    text += [
        "A text encoder for retrieval that reads demonstrations (pairs of a query and a passage that answers it) as",
        "their own embeddings, two input positions each, as in [EPIC](https://arxiv.org/abs/2605.01372). Only queries",
        "see demonstrations; documents are embedded bare.",
        *_STRATEGIES.get(str(epic.get("strategy")), ()),
        "",
    ]
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
    return "\n".join([*text, _table(("", ""), rows)])


def _use(epic: Mapping[str, Any], where: str, *, int8: bool, head: bool) -> str:
    name = exported = json.dumps(where, ensure_ascii=False)
    pooling = "\n".join(_POOLING[str(epic["pooling"])])
    note = ""
    if int8:
        target = f"path/to/{Path(where).name}-float16"
        exported = json.dumps(target, ensure_ascii=False)
        note = (
            "Stored as int8, with a scale for each row of a matrix, the weights are for epic-rag alone. This writes a\n"
            "folder for other libraries, with the same fingerprint:\n\n"
            f"    epic-rag models export {shlex.quote(where)} {shlex.quote(target)}\n\n"
        )
    if head:
        # A head without a bias is none that training here makes.
        pooling += (
            f'\nhead = load_file({exported} + "/{HEAD_FOLDER}/model.safetensors")'
            '\nvectors = vectors @ head["linear.weight"].float().T + head["linear.bias"].float()'
        )
    also = "from safetensors.torch import load_file\n" if head else ""
    return f"""\
## Use

With epic-rag, zero-shot and with demonstrations:

```python
from epic_rag import DemonstrationBank, EpicEncoder

encoder = EpicEncoder.from_pretrained({name})
documents = encoder.encode_document(["To undo a step, press Ctrl+Z.", "To save, press Ctrl+S."])
zero_shot = encoder.encode_query(["how do I take that back"])
bank = DemonstrationBank([("make it louder", "To change the volume, turn the wheel.")])
few_shot = encoder.encode_query(["how do I take that back"], bank=bank)
scores = encoder.similarity(few_shot, documents)
```

{note}With sentence-transformers, zero-shot:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({exported})
documents = model.encode_document(["To undo a step, press Ctrl+Z.", "To save, press Ctrl+S."])
queries = model.encode_query(["how do I take that back"])
```

With transformers, documents:

```python
import torch
{also}from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({exported}, padding_side="right")
model = AutoModel.from_pretrained({exported}).float()
texts = ["To undo a step, press Ctrl+Z.", "To save, press Ctrl+S."]
batch = tokenizer(texts, padding=True, truncation=True, max_length={epic["max_document_tokens"]}, return_tensors="pt")
with torch.no_grad():
    hidden = model(**batch).last_hidden_state
{pooling}
vectors = torch.nn.functional.normalize(vectors, dim=-1)
```
"""


def _training(record: Mapping[str, Any], heading: str, *, same_data: bool) -> str:
    rows = []
    for task, facts in sorted(record["data"].items()):
        source = SOURCES.get(task)
        told = (source.content, source.origin, source.licence) if source else ("", "not stated", "not stated")
        rows.append((task, f"{facts['rows']:,}", f"{facts['held_out']:,}", *told, f"`{facts['sha256'][:12]}`"))
    data = _table(("task", "rows", "held out", "what", "origin", "licence", "SHA-256 of the file"), rows)
    data += (
        f"\nWhole hashes are in `{EPIC_FILE}`. Held-out rows, and rows that share a passage or a group with them, were "
        "not\ntrained on.\n"
    )
    if same_data:
        data = "The same as above.\n"
    run = _table(
        ("", ""),
        (
            ("steps", f"{record['steps']:,}"),
            ("pairs", f"{record['pairs']:,}"),
            ("tokens", f"{record['tokens']:,}"),
            ("hours", record["hours"]),
            ("hardware", record["hardware"]),
            ("versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
            *(
                ("then merged", f"{1 - item['weight']:g} of these weights and {item['weight']:g} of {item['name']}")
                for item in record.get("merged", ())
            ),
        ),
    )
    return f"""\
## {heading}

### Data

{data}
### Run

{run}
### Configuration

```yaml
{_configuration(record["config"])}
```
"""


def _configuration(config: Mapping[str, Any]) -> str:
    """The configuration as YAML that `epic-rag train` takes."""
    defaults = {item.name: item.default for item in fields(TaskConfig)}
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
