"""Files of a demonstration bank beside its texts: vectors, and demonstrations as encoders' readers have read them.

    embeddings.safetensors    (k, 3, dim) vectors: query, passage, query read as a document; one tensor per
                              encoder, the first called `embeddings`
    prepared.safetensors      prepared demonstrations by encoder and reader, facts that a query needs, hash of bank.json

A file that is broken, or belongs to other texts, is as good as none: everything in it can be computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from epic_rag.files import write_atomically
from epic_rag.reader import PreparedDemonstrations

__all__ = [
    "EMBEDDINGS_FILE",
    "PREPARED_FILE",
    "Prepared",
    "read_prepared",
    "read_vectors",
    "write_prepared",
    "write_vectors",
]

logger = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]
Prepared = dict[tuple[str, str], PreparedDemonstrations]
"""Prepared demonstrations by the fingerprints of encoder and reader."""

EMBEDDINGS_FILE = "embeddings.safetensors"
PREPARED_FILE = "prepared.safetensors"
_FIRST_TENSOR = "embeddings"


def write_vectors(file: Path, vectors: Mapping[str, Vectors], bank: str, precision: str) -> None:
    """Write vectors of demonstrations.

    Args:
        file: Its path.
        vectors: (k, 3, dim) by the fingerprint of the encoder; the first encoder's are those that a bank has at once.
        bank: The bank's fingerprint.
        precision: "float32" or "float16".
    """
    from safetensors.numpy import save

    first = next(iter(vectors))
    tensors = {
        _FIRST_TENSOR if name == first else f"{_FIRST_TENSOR}.{name}": np.ascontiguousarray(array, dtype=precision)
        for name, array in vectors.items()
    }
    write_atomically(file, save(tensors, metadata={"encoder": first, "bank": bank}))


def read_vectors(file: Path, *, encoder: str, bank: str, count: int) -> dict[str, Vectors]:
    """Read vectors of demonstrations.

    Args:
        file: Its path.
        encoder: Fingerprint of the first encoder.
        bank: The bank's fingerprint.
        count: Number of demonstrations.

    Returns:
        (k, 3, dim) float32 by encoder, the given one first; none if they are broken or belong to other texts.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as stored:
            metadata: dict[str, str] = stored.metadata() or {}
            keys = list(stored.keys())
            tensors = {key: stored.get_tensor(key).astype(np.float32, copy=False) for key in keys}
    except (SafetensorError, OSError) as error:
        # Nothing is lost but the time to embed the texts again.
        logger.warning("%s cannot be read (%s); its vectors will be computed again", file, error)
        return {}
    whole = all(array.ndim == 3 and array.shape[:2] == (count, 3) for array in tensors.values())
    # Texts that were edited by hand after embedding have another fingerprint.
    if metadata != {"encoder": encoder, "bank": bank} or _FIRST_TENSOR not in tensors or not whole:
        logger.info("the vectors in %s are of other texts or another release; they will be computed again", file.parent)
        return {}
    others = {
        key.removeprefix(f"{_FIRST_TENSOR}."): array for key, array in sorted(tensors.items()) if key != _FIRST_TENSOR
    }
    return {encoder: tensors[_FIRST_TENSOR], **others}


def write_prepared(
    folder: Path, prepared: Mapping[tuple[str, str], PreparedDemonstrations], facts: Mapping[str, Any], content: bytes
) -> None:
    """Write prepared demonstrations.

    Args:
        folder: The bank's folder.
        prepared: The demonstrations as read.
        facts: JSON values that a query needs of the bank.
        content: The bank's `bank.json`.
    """
    from safetensors.numpy import save

    tensors: dict[str, Vectors] = {}
    for number, each in enumerate(prepared.values()):
        tensors |= {f"{number}.{name}": array for name, array in each.to_arrays().items()}
    metadata = {"source": _hash_of(content), "facts": json.dumps(facts), "readers": json.dumps(list(prepared))}
    write_atomically(folder / PREPARED_FILE, save(tensors, metadata=metadata))


def read_prepared(folder: Path, content: bytes, required: Sequence[str]) -> tuple[dict[str, Any], Prepared] | None:
    """Read prepared demonstrations.

    Args:
        folder: The bank's folder.
        content: The bank's `bank.json`.
        required: Names of facts that there must be.

    Returns:
        The facts and the demonstrations as read; None if there are none, or `bank.json` is another since.
    """
    file = folder / PREPARED_FILE
    if not file.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as stored:
            metadata: dict[str, str] = stored.metadata() or {}
            if metadata.get("source") != _hash_of(content):
                return None
            prepared: Prepared = {}
            names = set(stored.keys())
            for number, (encoder, reader) in enumerate(json.loads(metadata["readers"])):
                own = [name for name in names if name.startswith(f"{number}.")]
                arrays = {name.partition(".")[2]: stored.get_tensor(name) for name in own}
                prepared[encoder, reader] = PreparedDemonstrations.from_arrays(arrays)
        facts = json.loads(metadata["facts"])
        return {name: facts[name] for name in required}, prepared
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read (%s); the demonstrations will be read again", file, error)
        return None


def _hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
