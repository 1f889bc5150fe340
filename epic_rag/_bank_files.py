"""The files of demonstrations: pairs as JSON lines, vectors as safetensors."""

from __future__ import annotations

import gzip
import json
import logging
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from epic_rag.errors import DataError

__all__ = ["Vectors", "read_pairs", "read_vectors", "write_json", "write_vectors"]

logger = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]
_FIRST = "embeddings"
_FORM = '{"query": "...", "passage": "..."}'


def read_pairs(file: Path) -> list[tuple[str, str]]:
    """Read the pairs of a `.jsonl` or `.jsonl.gz` file; blank lines are skipped.

    Raises:
        DataError: If the file cannot be read, holds nothing, or a line is malformed; names file and line.
    """
    pairs: list[tuple[str, str]] = []
    try:
        opener: Any = gzip.open if file.suffix == ".gz" else open
        with opener(file, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    pairs.append(_parse_line(line, file, number))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{file} cannot be read ({error}); pass a file of lines like {_FORM}") from error
    if not pairs:
        raise DataError(f"{file} has no demonstrations; each line is {_FORM}")
    return pairs


def _parse_line(line: str, file: Path, number: int) -> tuple[str, str]:
    try:
        row = json.loads(line)
        query, passage = row["query"], row["passage"] if "passage" in row else row["positive"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}:{number} is not {_FORM} ({type(error).__name__}: {error}); mend or delete the line"
        ) from error
    if not all(isinstance(part, str) and part.strip() for part in (query, passage)):
        raise DataError(f"{file}:{number} has an empty query or passage; mend or delete the line")
    return query, passage


def write_vectors(file: Path, vectors: Mapping[str, Vectors], bank: str) -> None:
    """Write a bank's vectors; a process that dies on the way leaves the file that was there before.

    The first encoder's are the tensor `embeddings`, another's `embeddings.FINGERPRINT`.

    Args:
        file: The file.
        vectors: (k, 2, dim) by encoder's fingerprint, one or more.
        bank: The fingerprint of the bank's texts.
    """
    from safetensors.numpy import save_file

    first = next(iter(vectors))
    tensors = {_tensor(name, first): np.ascontiguousarray(array) for name, array in vectors.items()}
    temporary = file.with_name(file.name + ".tmp")
    save_file(tensors, temporary, metadata={"encoder": first, "bank": bank})
    os.replace(temporary, file)


def read_vectors(file: Path, *, encoder: str, bank: str, count: int) -> dict[str, Vectors]:
    """Read a bank's vectors.

    Args:
        file: What `write_vectors` has written.
        encoder: The fingerprint of the first encoder.
        bank: The fingerprint of the bank's texts.
        count: Number of demonstrations, k.

    Returns:
        (k, 2, dim) by encoder's fingerprint, the given one first. Nothing, and a log line, if the vectors are broken
        or those of other texts.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as stored:
            found: dict[str, str] = stored.metadata() or {}
            tensors = {key: stored.get_tensor(key).astype(np.float32, copy=False) for key in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        # The texts are all there, so nothing is lost but the time to embed them.
        logger.warning("%s cannot be read (%s); its vectors will be made again", file, error)
        return {}
    whole = all(array.ndim == 3 and array.shape[:2] == (count, 2) for array in tensors.values())
    if found != {"encoder": encoder, "bank": bank} or _FIRST not in tensors or not whole:
        logger.info("the vectors in %s do not belong to its texts; they will be made again", file.parent)
        return {}
    others = {key.removeprefix(f"{_FIRST}."): array for key, array in sorted(tensors.items()) if key != _FIRST}
    return {encoder: tensors[_FIRST], **others}


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Write JSON; a process that dies on the way leaves the file that was there before."""
    temporary = file.with_name(file.name + ".tmp")
    text = json.dumps(data, ensure_ascii=False, indent=1) + "\n"
    # Half a surrogate pair has no UTF-8; its backslash escape is valid JSON and reads back as what it was.
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(temporary, file)


def _tensor(encoder: str, first: str) -> str:
    return _FIRST if encoder == first else f"{_FIRST}.{encoder}"
