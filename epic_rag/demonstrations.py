"""Demonstrations and the banks that hold them.

A demonstration is a query and a passage that answers it. A `DemonstrationBank` is an instruction, a list of
demonstrations and their embeddings *under the fingerprint of a checkpoint*, or of several. On disk it is a folder:

    bank.json                 format version, task, instruction, demonstrations as text, fingerprints of the vectors
    embeddings.safetensors    (k, 2, dim) float32: query, passage; one tensor a checkpoint

Vectors of another checkpoint are never used: a bank that has none of the encoder's is embedded again from its texts.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import logging
import os
import random
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from epic_rag.errors import BankError, DataError, FingerprintError, PromptError, TaskError

if TYPE_CHECKING:
    from epic_rag.encoder import EpicEncoder

__all__ = [
    "SELECTIONS",
    "Demonstration",
    "DemonstrationBank",
    "Selection",
    "Vectors",
    "built_in_banks",
    "farthest_rows",
    "find_bank",
    "nearest_rows",
    "read_pairs",
    "read_vectors",
    "unit_rows",
    "write_json",
    "write_vectors",
]


# --- from _bank_files
# The files of demonstrations: pairs as JSON lines, vectors as safetensors.

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


# --- from _selection
# Which demonstrations to show: rows of a bank, chosen by its queries' vectors; and vectors of length one.

Matrix = npt.NDArray[np.float32]


def nearest_rows(vectors: Matrix, query: Matrix | None, k: int) -> list[int]:
    """The k rows nearest to a query by cosine, nearest last.

    Args:
        vectors: (rows, dim) unit vectors.
        query: (dim,) unit vector.
        k: How many, up to all.

    Raises:
        PromptError: If there is no query, or its width is another.
    """
    if query is None:
        raise PromptError("selection 'nearest' needs query_embedding and got none; pass the query's vector")
    vector = np.asarray(query, dtype=np.float32)
    if vector.shape != vectors.shape[1:]:
        raise PromptError(
            f"query_embedding has shape {vector.shape}, the bank's vectors have {vectors.shape[1:]}; "
            "encode one query with the same encoder at full width"
        )
    # The threads of a product by numpy's own library would go on spinning for a while, in the way of torch's.
    cosines = np.einsum("rd,d->r", vectors, vector)
    return [int(row) for row in np.argsort(-cosines, kind="stable")[:k]][::-1]


def farthest_rows(vectors: Matrix, k: int) -> list[int]:
    """Greedy farthest-point choice of k rows by cosine, from row 0 on.

    Args:
        vectors: (rows, dim) unit vectors.
        k: How many, up to all.
    """
    chosen: list[int] = [0][:k]
    while len(chosen) < k:
        closest = (vectors @ vectors[chosen].T).max(axis=1)
        closest[chosen] = np.inf
        chosen.append(int(closest.argmin()))
    return chosen


def unit_rows(vectors: Matrix) -> Matrix:
    """Each row (rows, dim) at length one; a zero row stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    result: Matrix = vectors / np.maximum(norms, 1e-12)
    return result


BANK_FILE = "bank.json"
EMBEDDINGS_FILE = "embeddings.safetensors"
FORMAT_VERSION = 1

Selection = Literal["first", "random", "diverse", "nearest", "nearest-early"]
SELECTIONS: tuple[Selection, ...] = ("first", "random", "diverse", "nearest", "nearest-early")


@dataclass(frozen=True)
class Demonstration:
    """A query and a passage that is relevant to it."""

    query: str
    passage: str


class DemonstrationBank:
    """An instruction and demonstrations of one task.

    Args:
        demonstrations: `Demonstration`s or (query, passage) pairs.
        instruction: What to retrieve; None takes the task's, if a task is named.
        task: Name of the task, for the record and for its instruction.
        symmetric: Whether passages are encoded like queries (paraphrases, messages with the same intent). None
            takes the task's setting, or False.
        origin: Where the demonstrations come from, for the record.

    Raises:
        BankError: If a demonstration is not a pair of non-empty strings.

    Example:
        >>> bank = DemonstrationBank([("how do I undo this", "To undo a step, press Ctrl+Z.")])
        >>> len(bank)
        1
    """

    def __init__(
        self,
        demonstrations: Iterable[Demonstration | tuple[str, str]],
        *,
        instruction: str | None = None,
        task: str | None = None,
        symmetric: bool | None = None,
        origin: str = "",
    ) -> None:
        self.demonstrations = tuple(_demonstration(item, index) for index, item in enumerate(demonstrations))
        known = _task_defaults(task)
        self.task = task
        self.instruction = instruction if instruction is not None else known[0]
        self.symmetric = symmetric if symmetric is not None else known[1]
        self.origin = origin
        self.embeddings: Vectors | None = None
        self.encoder_fingerprint: str | None = None
        self._others: dict[str, Vectors] = {}

    def __len__(self) -> int:
        return len(self.demonstrations)

    def __repr__(self) -> str:
        state = (
            f"embedded under {', '.join(self.encoder_fingerprints)}" if self.encoder_fingerprints else "not embedded"
        )
        return f"DemonstrationBank(task={self.task!r}, {len(self)} demonstrations, {state})"

    @property
    def fingerprint(self) -> str:
        """Short hash of the texts, the instruction and the symmetry; not of the vectors."""
        content = [self.instruction, self.symmetric, [[item.query, item.passage] for item in self.demonstrations]]
        return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()[:12]

    @property
    def encoder_fingerprints(self) -> tuple[str, ...]:
        """The checkpoints that the bank has vectors of; the first is `encoder_fingerprint`, whose are `embeddings`."""
        return tuple(self._by_encoder())

    @classmethod
    def from_jsonl(
        cls,
        path: str | os.PathLike[str],
        *,
        instruction: str | None = None,
        task: str | None = None,
        symmetric: bool | None = None,
    ) -> DemonstrationBank:
        """Read demonstrations from JSON lines.

        Args:
            path: A `.jsonl` or `.jsonl.gz` file; each line has "query" and "passage" (or "positive").
            instruction: As in the constructor.
            task: As in the constructor.
            symmetric: As in the constructor.

        Raises:
            DataError: If the file is missing or a line is malformed; names file and line.
        """
        pairs = read_pairs(Path(path).expanduser())
        return cls(pairs, instruction=instruction, task=task, symmetric=symmetric)

    @classmethod
    def load(cls, folder_or_name: str | os.PathLike[str], encoder: EpicEncoder | None = None) -> DemonstrationBank:
        """Load a bank folder or a built-in bank.

        Args:
            folder_or_name: A folder with `bank.json`, or the name of a built-in bank. A built-in name wins over a
                folder of that name; write `./name` for the folder.
            encoder: If given, the bank is embedded for it where its stored vectors are another checkpoint's.

        Raises:
            BankError: If there is no such bank or it is malformed.
        """
        folder = _locate(folder_or_name)
        file = folder / BANK_FILE
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if data.get("format_version") != FORMAT_VERSION:
                raise BankError(
                    f"{file} has format version {data.get('format_version')}, this release reads {FORMAT_VERSION}; "
                    "run `pip install -U epic-rag`"
                )
            bank = cls(
                [(item["query"], item["passage"]) for item in data["demonstrations"]],
                instruction=data.get("instruction"),
                task=data.get("task"),
                symmetric=data.get("symmetric"),
                origin=str(data.get("origin", "")),
            )
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise BankError(
                f"{file} is not a demonstration bank ({type(error).__name__}: {error}); "
                "make one with `epic-rag bank build PAIRS.jsonl --out FOLDER`"
            ) from error
        bank._read_embeddings(folder, data.get("encoder_fingerprint"))
        return bank.build(encoder) if encoder is not None else bank

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the bank to a folder, which is made if it is missing.

        Raises:
            BankError: If the folder cannot be made.
        """
        target = Path(folder).expanduser()
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BankError(f"no folder can be made at {target} ({error}); save the bank somewhere else") from error
        data = {
            "format_version": FORMAT_VERSION,
            "task": self.task,
            "instruction": self.instruction,
            "symmetric": self.symmetric,
            "origin": self.origin,
            "encoder_fingerprint": self.encoder_fingerprint,
            "dimension": None if self.embeddings is None else int(self.embeddings.shape[-1]),
            **(
                {"other_encoders": {key: array.shape[-1] for key, array in self._others.items()}}
                if self._others
                else {}
            ),
            "demonstrations": [{"query": item.query, "passage": item.passage} for item in self.demonstrations],
        }
        vectors = target / EMBEDDINGS_FILE
        # Vectors first and under a fingerprint of their own: a crash between the two writes leaves a pair that
        # disagrees, which load() takes for "not embedded" rather than for valid.
        if self.embeddings is not None:
            write_vectors(vectors, self._by_encoder(), self.fingerprint)
        else:
            vectors.unlink(missing_ok=True)
        write_json(target / BANK_FILE, data)

    def build(self, encoder: EpicEncoder, *others: EpicEncoder) -> DemonstrationBank:
        """Embed the demonstrations with an encoder, in place.

        Queries are encoded zero-shot with the bank's instruction and passages as documents (as queries, if the task
        is symmetric). Vectors of the encoder that the bank has already are kept, those of other encoders are dropped.

        Args:
            encoder: Its vectors become `embeddings`, (k, 2, dim) float32.
            others: The bank gets the vectors of these encoders as well, for whoever builds or loads it with one.

        Returns:
            The bank itself.
        """
        known = self._by_encoder()
        built = {}
        for each in (encoder, *others):
            if known and each.fingerprint not in known:
                logger.info(
                    "bank %s was embedded under %s, the encoder is %s: embedding its %d demonstrations again",
                    self.task or self.fingerprint,
                    ", ".join(known),
                    each.fingerprint,
                    len(self),
                )
            vectors = known.get(each.fingerprint)
            built[each.fingerprint] = each.embed_demonstrations(self) if vectors is None else vectors
        self._set_vectors(built)
        return self

    def select(
        self,
        k: int,
        *,
        method: Selection = "first",
        seed: int = 0,
        query_embedding: Vectors | None = None,
    ) -> DemonstrationBank:
        """Pick k demonstrations.

        Args:
            k: How many; 0 to all.
            method: "first" k; seeded "random" k; the most "diverse" k (greedy farthest-point over query vectors,
                from the first demonstration on); the k "nearest" to a query, nearest last, beside the query.
            seed: Seed of "random".
            query_embedding: (dim,) vector of the query, for "nearest".

        Returns:
            A new bank with the same instruction; it keeps the vectors it has.

        Raises:
            PromptError: If k is out of range or the method is unknown.
            BankError: If the method needs vectors and the bank has none.
        """
        if not 0 <= k <= len(self):
            raise PromptError(f"asked for {k} demonstrations, the bank has {len(self)}; ask for 0 to {len(self)}")
        if method == "first":
            rows = list(range(k))
        elif method == "random":
            rows = random.Random(seed).sample(range(len(self)), k)
        elif method == "diverse":
            rows = farthest_rows(self._vectors(method)[:, 0], k)
        elif method == "nearest":
            rows = nearest_rows(self._vectors(method)[:, 0], query_embedding, k)
        elif method == "nearest-early":
            raise PromptError(f"selection {method!r} needs the model, select has none; pass it to encode_query")
        else:
            raise PromptError(f"selection is {method!r}, known are {', '.join(SELECTIONS)}; choose one of them")
        return self.take(rows)

    def require(self, fingerprint: str) -> Vectors:
        """The vectors, if they are those of the given checkpoint.

        Returns:
            (k, 2, dim) float32, contiguous.

        Raises:
            FingerprintError: If they are another's, or there are none.
        """
        if self.embeddings is None or self.encoder_fingerprint != fingerprint:
            raise FingerprintError(
                f"the bank was embedded under {self.encoder_fingerprint}, the encoder is {fingerprint}; "
                "call bank.build(encoder)"
            )
        return np.ascontiguousarray(self.embeddings, dtype=np.float32)

    def take(self, rows: Sequence[int]) -> DemonstrationBank:
        """The demonstrations with these numbers, from 0 on, in this order, as a new bank with its vectors."""
        chosen = DemonstrationBank(
            [self.demonstrations[row] for row in rows],
            instruction=self.instruction,
            task=None,
            symmetric=self.symmetric,
            origin=self.origin,
        )
        chosen.task = self.task
        chosen._set_vectors({key: array[list(rows)] for key, array in self._by_encoder().items()})
        return chosen

    def _by_encoder(self) -> dict[str, Vectors]:
        """All vectors by encoder's fingerprint, `embeddings` first."""
        return {} if self.embeddings is None else {self.encoder_fingerprint or "": self.embeddings, **self._others}

    def _set_vectors(self, vectors: Mapping[str, Vectors]) -> None:
        """What `_by_encoder` returns becomes the bank's."""
        self._others = dict(vectors)
        self.encoder_fingerprint = next(iter(self._others), None)
        self.embeddings = None if self.encoder_fingerprint is None else self._others.pop(self.encoder_fingerprint)

    def _vectors(self, method: str) -> Vectors:
        if self.embeddings is None:
            raise BankError(f"selection {method!r} needs vectors and the bank has none; call bank.build(encoder) first")
        return self.embeddings

    def _read_embeddings(self, folder: Path, fingerprint: object) -> None:
        file = folder / EMBEDDINGS_FILE
        if not isinstance(fingerprint, str) or not file.is_file():
            return
        # Texts that were edited by hand after embedding make these vectors somebody else's.
        self._set_vectors(read_vectors(file, encoder=fingerprint, bank=self.fingerprint, count=len(self)))


def built_in_banks() -> dict[str, Path]:
    """Names and folders of the banks that ship with the package, sorted by name."""
    spec = importlib.util.find_spec("epic_rag_demos")
    roots = list(spec.submodule_search_locations or []) if spec is not None else []
    return {file.parent.name: file.parent for root in roots for file in sorted(Path(root).glob(f"*/{BANK_FILE}"))}


def find_bank(
    task: str | None, bank: DemonstrationBank | str | os.PathLike[str] | None, num_demonstrations: int | None
) -> DemonstrationBank | None:
    """The bank that a call asks for: the given one, or the task's built-in one if demonstrations are wanted.

    Raises:
        BankError: If the bank is missing or malformed.
        TaskError: If the task is unknown.
        PromptError: If demonstrations are wanted and neither a bank nor a task says which.
    """
    if num_demonstrations is not None and num_demonstrations < 0:
        raise PromptError(f"asked for {num_demonstrations} demonstrations; ask for 0 or more")
    if bank is not None:
        return bank if isinstance(bank, DemonstrationBank) else DemonstrationBank.load(bank)
    if not num_demonstrations:
        return None
    from epic_rag.tasks import get_task

    name = get_task(task).bank if task is not None else None
    if name is None:
        raise PromptError(
            f"asked for {num_demonstrations} demonstrations and there is no bank to take them from; pass bank=..."
        )
    return DemonstrationBank.load(name)


def _locate(folder_or_name: str | os.PathLike[str]) -> Path:
    name = os.fspath(folder_or_name)
    banks = built_in_banks()
    if name in banks:
        return banks[name]
    folder = Path(name).expanduser()
    if (folder / BANK_FILE).is_file():
        return folder
    what = f"the folder {name} has no {BANK_FILE}" if folder.is_dir() else f"no demonstration bank {name}"
    raise BankError(f"{what}; built in are {', '.join(banks) or 'none'}; run `epic-rag bank list`")


def _task_defaults(task: str | None) -> tuple[str | None, bool]:
    if task is None:
        return None, False
    from epic_rag.tasks import get_task

    try:
        known = get_task(task)
    except TaskError:
        # A user's own bank may carry a task name of its own; it then has to bring its instruction.
        return None, False
    return known.instruction, known.symmetric


def _demonstration(item: Demonstration | tuple[str, str], index: int) -> Demonstration:
    if isinstance(item, Demonstration):
        item = (item.query, item.passage)
    # A string of two characters would unpack into two strings.
    pair = tuple(item) if isinstance(item, Sequence) and not isinstance(item, str) else ()
    if len(pair) != 2 or not all(isinstance(part, str) and part.strip() for part in pair):
        raise BankError(
            f"demonstration {index + 1} is {item!r}; each is a (query, passage) pair of two non-empty strings"
        )
    return Demonstration(*pair)
