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

__all__ = ["read_pairs", "read_vectors", "write_vectors"]

logger = logging.getLogger(__name__)

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


def write_vectors(file: Path, vectors: npt.NDArray[np.float32], metadata: Mapping[str, str]) -> None:
    """Write vectors; a process that dies on the way leaves the file that was there before."""
    from safetensors.numpy import save_file

    temporary = file.with_name(file.name + ".tmp")
    save_file({"embeddings": np.ascontiguousarray(vectors)}, temporary, metadata=dict(metadata))
    os.replace(temporary, file)


def read_vectors(file: Path, metadata: Mapping[str, str]) -> npt.NDArray[np.float32] | None:
    """Read vectors that were written with this metadata; None, with a log line, if the file's are others."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as stored:
            found: dict[str, str] = stored.metadata() or {}
            vectors: npt.NDArray[np.float32] = stored.get_tensor("embeddings").astype(np.float32, copy=False)
    except (SafetensorError, OSError) as error:
        # The texts are all there, so nothing is lost but the time to embed them.
        logger.warning("%s cannot be read (%s); its vectors will be made again", file, error)
        return None
    if found != metadata:
        logger.info("the vectors in %s do not belong to its texts; they will be made again", file.parent)
        return None
    return vectors
