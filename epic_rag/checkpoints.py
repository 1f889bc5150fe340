"""Names to folders: what ships with the package, what lies on disk, what a hub has."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epic_rag.errors import CheckpointError, reason_of

__all__ = [
    "DEFAULT_CHECKPOINT",
    "EPIC_FILE",
    "FORMAT_VERSION",
    "INT8_FORMAT_VERSION",
    "INT8_ROWS",
    "CheckpointInfo",
    "is_int8",
    "is_shipped",
    "list_checkpoints",
    "read_epic_file",
    "resolve",
]

DEFAULT_CHECKPOINT = "epic-minilm"
EPIC_FILE = "epic.json"
FORMAT_VERSION = 1
# Of a folder whose weights are int8 rows. A release that cannot read those says so, and reads all other folders.
INT8_FORMAT_VERSION = 2
INT8_ROWS = "int8-rows"
_SHIPPED = Path(__file__).parent / "checkpoints"
# What a checkpoint may consist of. Pickled weights are left on the hub: only safetensors are ever read.
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "README.md"]


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint that ships with the package.

    Attributes:
        name: What `EpicEncoder.from_pretrained` takes.
        path: Its folder.
        dimension: Width of its vectors.
        parameters: Number of weights.
        size_bytes: Size of its files.
        description: One sentence.
        default: Whether it is loaded when no name is given.
    """

    name: str
    path: Path
    dimension: int
    parameters: int
    size_bytes: int
    description: str
    default: bool


def list_checkpoints() -> list[CheckpointInfo]:
    """The checkpoints that ship with the package, sorted by name. Reads no weights."""
    found = []
    for file in sorted(_SHIPPED.glob(f"*/{EPIC_FILE}")):
        data = read_epic_file(file.parent)
        found.append(
            CheckpointInfo(
                name=file.parent.name,
                path=file.parent,
                dimension=int(data.get("dimension", 0)),
                parameters=int(data.get("parameters", 0)),
                size_bytes=sum(item.stat().st_size for item in file.parent.rglob("*") if item.is_file()),
                description=str(data.get("description", "")),
                default=file.parent.name == DEFAULT_CHECKPOINT,
            )
        )
    return found


def is_shipped(folder: Path) -> bool:
    """Whether a checkpoint folder is one that ships with the package, so that its name alone finds it."""
    return folder.parent == _SHIPPED and (folder / EPIC_FILE).is_file()


def resolve(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    gguf_file: str | None = None,
) -> Path:
    """Find the folder of a checkpoint.

    A shipped name wins over a folder of the same name in the working directory, so that a default never depends on
    where a command is run; write `./name` for the folder.

    Args:
        name_or_path: A shipped name, a folder, or a hub name; None for the default checkpoint.
        revision: Commit or tag on the hub.
        local_files_only: Never ask the hub; use what was downloaded before.
        gguf_file: A GGUF file to fetch from the hub as well.

    Returns:
        A local folder.

    Raises:
        CheckpointError: If there is none.
    """
    name = DEFAULT_CHECKPOINT if name_or_path is None else os.fspath(name_or_path)
    if not name.strip():
        raise CheckpointError("the checkpoint's name is empty; run `epic-rag models` for those that are shipped")
    shipped = _SHIPPED / name
    if os.sep not in name and (shipped / EPIC_FILE).is_file():
        return shipped
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    known = ", ".join(info.name for info in list_checkpoints()) or "none"
    if folder.exists():
        raise CheckpointError(f"{name} is a file, a checkpoint is a folder; pass its folder (shipped: {known})")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"no checkpoint {name}: no such folder, and shipped are {known}; run `epic-rag models`")
    return _download(name, revision, local_files_only, gguf_file, known)


def _download(name: str, revision: str | None, local_only: bool, gguf_file: str | None, known: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*_HUB_PATTERNS, *([gguf_file] if gguf_file else [])]
    try:
        # The hub client checks every file against the hash that the hub names for the revision.
        return Path(snapshot_download(name, revision=revision, local_files_only=local_only, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = reason_of(error)
        raise CheckpointError(
            f"no checkpoint {name}: no such folder, shipped are {known}, and the hub did not give it ({reason}); "
            "run `epic-rag models`"
        ) from error


def read_epic_file(folder: Path) -> dict[str, Any]:
    """Read `epic.json`.

    Args:
        folder: A checkpoint folder.

    Returns:
        Its contents, or an empty dict for a plain Hugging Face folder.

    Raises:
        CheckpointError: If the file is not valid, or newer than this version reads.
    """
    file = folder / EPIC_FILE
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); copy the checkpoint again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} holds a {type(data).__name__}, expected an object; copy the checkpoint again")
    version = data.get("format_version")
    if version not in (FORMAT_VERSION, INT8_FORMAT_VERSION):
        raise CheckpointError(
            f"{file} has format version {version}, this release reads {FORMAT_VERSION} and {INT8_FORMAT_VERSION}; "
            "run `pip install -U epic-rag`"
        )
    if is_int8(data) and data.get("weights") != {"format": INT8_ROWS}:
        raise CheckpointError(
            f"{file} has weights stored as {data.get('weights')}, this release reads {{'format': {INT8_ROWS!r}}}; "
            "run `pip install -U epic-rag`"
        )
    return data


def is_int8(epic: Mapping[str, Any]) -> bool:
    """Whether the weights beside an `epic.json` with these contents are int8 rows."""
    return bool(epic.get("format_version") == INT8_FORMAT_VERSION)
