"""Checkpoints: names to folders, and the settings in `epic.json`.

A checkpoint is a Hugging Face folder with `epic.json` and `projector.safetensors`. It ships with the package, is on
disk, or on a hub. Importing this module loads neither torch nor transformers; `checkpoint_io` reads and writes weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epic_rag.errors import CheckpointError, ConfigError, reason_of
from epic_rag.files import describe_os_error
from epic_rag.model_conventions import find_languages
from epic_rag.query_prompt import QUERY_STRATEGIES, QueryStrategy

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "DEFAULT_CHECKPOINT",
    "EPIC_FILE",
    "FORMAT_VERSION",
    "HEAD_FOLDER",
    "INT8_FORMAT_VERSION",
    "INT8_ROWS",
    "PROJECTOR_FILE",
    "QUERY_FILES",
    "QUERY_FOLDER",
    "QUERY_FORMAT_VERSION",
    "CheckpointInfo",
    "EncoderConfig",
    "check_width",
    "fingerprint_of",
    "hash_weights",
    "identify",
    "is_int8",
    "is_shipped",
    "is_trusted",
    "languages_of",
    "list_checkpoints",
    "read_epic_file",
    "read_model_card",
    "resolve",
]

DEFAULT_CHECKPOINT = "epic-minilm"
TRUST_VARIABLE = "EPIC_RAG_TRUST_REMOTE_CODE"
"""Names of models whose Python code may run, with commas between."""
EPIC_FILE = "epic.json"
PROJECTOR_FILE = "projector.safetensors"
# Weights that queries are read with: what documents do not share, as int8 rows or in floating point, or a whole model
# that other libraries open.
QUERY_FOLDER = "query"
QUERY_FILES = ("query_model-int8.safetensors", "query_model.safetensors", f"{QUERY_FOLDER}/model.safetensors")
HEAD_FOLDER = "2_Dense"
FORMAT_VERSION = 1
# Version of folders whose weights are int8 rows, so that a release that cannot read those refuses them alone.
INT8_FORMAT_VERSION = 2
QUERY_FORMAT_VERSION = 3
INT8_ROWS = "int8-rows"
_SHIPPED = Path(__file__).parent / "checkpoints"
# Shipped by earlier versions; indexes of them are on disks.
_WITHDRAWN = frozenset({"epic-smollm2"})
# Files of a checkpoint. Pickled weights stay on the hub: only safetensors are ever read.
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "README.md"]


@dataclass
class EncoderConfig:
    """Settings of an encoder in `epic.json`, beside those of its prompt.

    Attributes:
        default_instruction: Instruction of queries for which none is given; None for a model that was trained without.
        max_demonstrations: Number of demonstrations in the prompt that the model was trained with; None for no bound.
        strategy: How demonstrations reach a query for which no strategy is given; None for "epic".
        temperature: Temperature of the contrastive loss in training.
        matryoshka_dims: Widths at which truncated vectors were trained.
        training: Record of the training run.
        description: One sentence about the checkpoint.
        license: SPDX identifier of the weights' licence.
        base_model: The model that training started from.
        languages: ISO 639-1 codes of the languages that the model was trained on.
        symmetric_as_documents: True if texts of symmetric tasks and banks are read as documents are, without the
            task's instruction; an instruction in words is always read.
    """

    default_instruction: str | None = None
    max_demonstrations: int | None = None
    strategy: QueryStrategy | None = None
    temperature: float | None = None
    matryoshka_dims: list[int] | None = None
    training: dict[str, Any] | None = None
    description: str | None = None
    license: str | None = None
    base_model: str | None = None
    languages: list[str] | None = None
    symmetric_as_documents: bool | None = None

    @classmethod
    def from_dict(cls, epic: Mapping[str, Any]) -> EncoderConfig:
        """Read the settings from the contents of `epic.json`.

        Raises:
            CheckpointError: If the strategy is unknown.
        """
        config = cls(**{field.name: epic[field.name] for field in fields(cls) if field.name in epic})
        if config.strategy is not None and config.strategy not in QUERY_STRATEGIES:
            raise CheckpointError(
                f"Unknown strategy {config.strategy!r} in {EPIC_FILE}. Known are {', '.join(QUERY_STRATEGIES)}."
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that are set, for `epic.json`."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint that ships with the package.

    Attributes:
        name: Name for `EpicEncoder.from_pretrained`.
        path: Its folder.
        dimension: Width of its vectors.
        parameters: Number of weights.
        size_bytes: Size of its files.
        description: One sentence.
        default: Whether it is loaded when no name is given.
        languages: Languages that it was trained on; see `languages_of`.
    """

    name: str
    path: Path
    dimension: int
    parameters: int
    size_bytes: int
    description: str
    default: bool
    languages: tuple[str, ...] = ()


def list_checkpoints() -> list[CheckpointInfo]:
    """Return the checkpoints that ship with the package, sorted by name, without reading weights."""
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
                languages=languages_of(file.parent.name, None, data)[0],
            )
        )
    return found


def is_shipped(folder: Path) -> bool:
    """Return whether a folder is a checkpoint that ships with the package."""
    return folder.parent == _SHIPPED and (folder / EPIC_FILE).is_file()


def is_trusted(name_or_path: str | os.PathLike[str] | None) -> bool:
    """Return whether EPIC_RAG_TRUST_REMOTE_CODE names a model: by its hub name or its folder's absolute path."""
    names = {name.strip() for name in os.environ.get(TRUST_VARIABLE, "").split(",")} - {""}
    return name_or_path is not None and bool(names & {os.fspath(name_or_path), os.path.abspath(name_or_path)})


def resolve(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    gguf_file: str | None = None,
    patterns: Sequence[str] = (),
) -> Path:
    """Find the folder of a checkpoint.

    A shipped name takes precedence over a folder of the same name in the working directory, so that a default never
    depends on where a command is run; write `./name` for the folder.

    Args:
        name_or_path: A shipped name, a folder, or a hub name; None for the default checkpoint.
        revision: Commit or tag on the hub.
        local_files_only: Use only what was downloaded before, without network access.
        gguf_file: A GGUF file to fetch from the hub as well.
        patterns: Names of further files to fetch from the hub.

    Returns:
        A local folder.

    Raises:
        CheckpointError: If there is none.
    """
    name = DEFAULT_CHECKPOINT if name_or_path is None else os.fspath(name_or_path)
    if not name.strip():
        raise CheckpointError("The checkpoint's name is empty. Run `epic-rag models` for a list.")
    shipped = _SHIPPED / name
    if os.sep not in name and (shipped / EPIC_FILE).is_file():
        return shipped
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    known = ", ".join(info.name for info in list_checkpoints()) or "none"
    if folder.exists():
        raise CheckpointError(f"{name} is a file, a checkpoint is a folder. Pass its folder, or one of {known}.")
    if name in _WITHDRAWN:
        raise CheckpointError(
            f"{name} is no longer in the package. Build the index again with `epic-rag index --rebuild --model "
            f"{DEFAULT_CHECKPOINT}`, or name another model."
        )
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"There is no checkpoint {name}. Pass an existing folder or one of {known}.")
    return _download(name, revision, local_files_only, [*([gguf_file] if gguf_file else []), *patterns], known)


def identify(
    name_or_path: str | os.PathLike[str] | None, folder: Path, epic: Mapping[str, Any], revision: str | None = None
) -> tuple[str, str]:
    """Return the name of a checkpoint in messages, and the argument that finds it again.

    Args:
        name_or_path: Argument of `resolve`.
        folder: Its result.
        epic: Contents of the folder's `epic.json`.
        revision: Argument of `resolve`.
    """
    if is_shipped(folder):
        name = source = folder.name
    elif name_or_path is None or Path(name_or_path).expanduser().is_dir():
        name, source = folder.absolute().name, str(folder.absolute())
    else:
        # The hub's name, unless a revision was requested: only the downloaded folder is sure to be that one.
        name, source = os.fspath(name_or_path), os.fspath(name_or_path) if revision is None else str(folder)
    return str(epic.get("name") or name), source


def read_model_card(folder: Path) -> dict[str, Any]:
    """Return the metadata at the top of a folder's model card; empty if there is none."""
    import yaml

    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        data = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else {}
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


def languages_of(name: str, folder: Path | None, epic: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """Return the languages that a model was trained on, and where that is stated.

    Args:
        name: Its name: a hub name, the name of a folder or of a remote model.
        folder: Its files; None for a remote model.
        epic: Contents of the folder's `epic.json`.

    Returns:
        ISO 639-1 codes in the order of the source, or "multilingual"; none if nothing states them.
    """
    stated = epic.get("languages")
    source = EPIC_FILE
    if not stated and folder is not None:
        stated, source = read_model_card(folder).get("language"), "model card"
    codes = [stated] if isinstance(stated, str) else stated if isinstance(stated, list) else []
    # YAML reads the code of Norwegian as a truth value.
    found = ("no" if code is False else str(code).lower() for code in codes)
    languages = tuple(dict.fromkeys(code for code in found if code not in ("", "code")))
    if languages:
        return languages, source
    for known in (name, str(epic.get("base_model") or "")):
        if languages := find_languages(known):
            return languages, f"guessed from the name {known.rsplit('/', 1)[-1]}"
    return (), "not stated"


def check_width(truncate_dim: int | None, dimension: int) -> int | None:
    """Return the width if a model with this dimension has it.

    Raises:
        ConfigError: If it does not.
    """
    if truncate_dim is not None and not 1 <= truncate_dim <= dimension:
        raise ConfigError(
            f"truncate_dim is {truncate_dim}, but the model has {dimension} dimensions. Choose 1 to {dimension}."
        )
    return truncate_dim


def hash_weights(arrays: Mapping[str, Callable[[], npt.NDArray[Any]]]) -> str:
    """Compute a SHA-256 over names, shapes and values.

    Floating-point values are hashed in float16, so that a checkpoint has one hash whether it is stored or loaded in
    float32 or float16.

    Args:
        arrays: By name, a function that returns the values; one array is in memory at a time.
    """
    import numpy as np

    digest = hashlib.sha256()
    for name in sorted(arrays):
        value = arrays[name]()
        if value.dtype.kind == "f":
            with np.errstate(over="ignore"):
                value = value.astype(np.float16, copy=False)
        digest.update(f"{name}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).reshape(-1).data)
    return digest.hexdigest()


def fingerprint_of(
    weights_hash: str,
    *,
    pooling: str,
    projector: str,
    dimension: int,
    config: EncoderConfig,
    prompt: Mapping[str, Any],
) -> str:
    """Compute the short hash of everything that decides a vector: weights, template, pooling, lengths, width."""
    facts = {
        "weights": weights_hash,
        "pooling": pooling,
        "projector": projector,
        "dimension": dimension,
        "default_instruction": config.default_instruction,
        **prompt,
    }
    if config.symmetric_as_documents:
        facts["symmetric_as_documents"] = True
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _download(name: str, revision: str | None, local_only: bool, patterns: Sequence[str], known: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        # The hub client checks every file against the hash that the hub names for the revision.
        return Path(
            snapshot_download(
                name, revision=revision, local_files_only=local_only, allow_patterns=[*_HUB_PATTERNS, *patterns]
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = reason_of(error)
        raise CheckpointError(
            f"There is no checkpoint {name}, and it cannot be downloaded ({reason}). "
            f"Pass an existing folder or one of {known}."
        ) from error


def read_epic_file(folder: Path) -> dict[str, Any]:
    """Read `epic.json`.

    Args:
        folder: A checkpoint folder.

    Returns:
        Its contents, or an empty dict for a plain Hugging Face folder.

    Raises:
        CheckpointError: If the file is not valid or newer than this version reads, or a file may not be read.
    """
    file = folder / EPIC_FILE
    try:
        for needed in (*folder.glob("*.json"), *folder.glob("*.safetensors")):
            needed.open("rb").close()
    except PermissionError as error:
        raise CheckpointError(f"{describe_os_error(error)}. Make it readable or pass another checkpoint.") from error
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}). Copy the checkpoint again.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} holds a {type(data).__name__}, not an object. Copy the checkpoint again.")
    version = data.get("format_version")
    if version not in (FORMAT_VERSION, INT8_FORMAT_VERSION, QUERY_FORMAT_VERSION):
        raise CheckpointError(
            f"{file} has format version {version}, this release reads {FORMAT_VERSION} to {QUERY_FORMAT_VERSION}. "
            "Run `pip install -U epic-rag`."
        )
    if is_int8(data) and data.get("weights") != {"format": INT8_ROWS}:
        raise CheckpointError(
            f"{file} has weights stored as {data.get('weights')}, this release reads {{'format': {INT8_ROWS!r}}}. "
            "Run `pip install -U epic-rag`."
        )
    return data


def is_int8(epic: Mapping[str, Any]) -> bool:
    """Return whether the weights beside an `epic.json` with these contents are int8 rows."""
    version = epic.get("format_version")
    return bool(version == INT8_FORMAT_VERSION or (version == QUERY_FORMAT_VERSION and "weights" in epic))
