"""Demonstrations, and banks that hold them.

A demonstration is a query and a passage that answers it. A `DemonstrationBank` is an instruction, a list of
demonstrations and their embeddings *under the fingerprint of an encoder*, or of several. On disk it is a folder:

    bank.json                 format version, task, instruction, demonstrations as text, fingerprints of the vectors
    embeddings.safetensors    (k, 3, dim) float32: query, passage, query read as a document; one tensor per encoder
    prepared.safetensors      optional: the demonstrations as encoders' readers have read them, a hash of bank.json

Vectors of another encoder are never used: a bank that has none of the encoder's is embedded again from its texts.
Texts and vectors of a bank with `prepared.safetensors` are read when they are first needed, which a query does not.
A bank never changes but by `embed` and `prepare`: `add`, `remove`, `subset` and `merge` return new ones, with the
vectors that are known.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from epic_rag.bank_files import (
    EMBEDDINGS_FILE,
    PREPARED_FILE,
    read_prepared,
    read_vectors,
    write_prepared,
    write_vectors,
)
from epic_rag.bank_report import BankReport, evaluate_pairs
from epic_rag.errors import BankError, DataError, FingerprintError, PromptError, TaskError
from epic_rag.files import describe_os_error, read_jsonl, write_atomically
from epic_rag.reader import DemonstrationReader, PreparedDemonstrations
from epic_rag.tasks import get_task

__all__ = [
    "SELECTIONS",
    "BankEncoder",
    "BankEvaluator",
    "BankReader",
    "Demonstration",
    "DemonstrationBank",
    "Selection",
    "built_in_banks",
    "check_selection",
    "is_enabled",
    "merged_bank",
]

logger = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]
Selection = Literal["first", "random", "diverse", "nearest"]
"""Rule that picks demonstrations from a bank that holds more than are used."""
SELECTIONS: tuple[Selection, ...] = get_args(Selection)

BANK_FILE = "bank.json"
FORMAT_VERSION = 1
# What a query needs of a bank beside its prepared demonstrations.
_FACTS = ("count", "bank", "task", "instruction", "symmetric", "origin", "enabled")
_FORM = '{"query": "...", "passage": "..."}'


@dataclass(frozen=True)
class Demonstration:
    """A query and a passage that is relevant to it."""

    query: str
    passage: str


class BankEncoder(Protocol):
    """The part of an encoder that embeds a bank."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides a vector."""

    def embed_demonstrations(self, bank: DemonstrationBank) -> Vectors:
        """Return (k, 3, dim) float32: query, passage, and the query read as a document, of each demonstration."""


class BankReader(BankEncoder, Protocol):
    """The part of an encoder that prepares a bank."""

    @property
    def reader(self) -> DemonstrationReader:
        """Reader of demonstrations for strategy "reader"."""


class BankEvaluator(BankEncoder, Protocol):
    """The part of an encoder that evaluates a bank."""

    @property
    def strategy(self) -> str:
        """Strategy of demonstrations for queries that name none."""

    @property
    def reader(self) -> DemonstrationReader:
        """Reader of demonstrations for strategy "reader"."""

    def encode_document(self, texts: Sequence[str]) -> Vectors:
        """Return (n, dim) float32 vectors of documents."""


class DemonstrationBank:
    """An instruction and demonstrations of one task.

    Args:
        demonstrations: `Demonstration`s or (query, passage) pairs.
        instruction: What to retrieve; None takes the task's, if a task is named.
        task: Name of the task, for the record and for its instruction.
        symmetric: Whether passages are encoded like queries (paraphrases, messages with the same intent). None
            takes the task's setting, or False.
        origin: Where the demonstrations come from, for the record.
        enabled: Whether queries use the demonstrations if they name no number of them; the instruction always holds.
        negatives: Pairs of a query and a passage that does not answer it. They move no query; searches put the
            passage last when the query is asked again.

    Attributes:
        embeddings: (k, 3, dim) float32 vectors (query, passage, query read as a document) of the encoder
            `encoder_fingerprint`; None before `embed`.

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
        enabled: bool = True,
        negatives: Iterable[Demonstration | tuple[str, str]] = (),
    ) -> None:
        self.demonstrations = tuple(_demonstration(item, index) for index, item in enumerate(demonstrations))
        self.negatives = tuple(_demonstration(item, index) for index, item in enumerate(negatives))
        task_instruction, task_symmetric = _task_defaults(task)
        self.task = task
        self.instruction = task_instruction if instruction is None else instruction
        self.symmetric = task_symmetric if symmetric is None else symmetric
        self.origin = origin
        self.enabled = enabled
        self.embeddings: Vectors | None = None
        self.encoder_fingerprint: str | None = None
        self._others: dict[str, Vectors] = {}
        self._prepared: dict[tuple[str, str], PreparedDemonstrations] = {}

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
        """Fingerprints of the encoders that the bank has vectors of; the first is `encoder_fingerprint`."""
        return tuple(self._vectors_by_encoder())

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
        file = Path(path).expanduser()
        pairs = []
        for number, row in read_jsonl(file):
            query, passage = row.get("query"), row.get("passage", row.get("positive"))
            if not isinstance(query, str) or not isinstance(passage, str):
                raise DataError(f"{file}:{number} is not of the form {_FORM}. Correct or delete the line.")
            if not query.strip() or not passage.strip():
                raise DataError(f"{file}:{number} has an empty query or passage. Correct or delete the line.")
            pairs.append((query, passage))
        if not pairs:
            raise DataError(f"{file} has no demonstrations. Write lines of the form {_FORM}.")
        return cls(pairs, instruction=instruction, task=task, symmetric=symmetric)

    def to_dict(self) -> dict[str, Any]:
        """Return the texts of the demonstrations and what they are for, as JSON values."""
        return {
            "task": self.task,
            "instruction": self.instruction,
            "symmetric": self.symmetric,
            "demonstrations": [{"query": item.query, "passage": item.passage} for item in self.demonstrations],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DemonstrationBank:
        """Make a bank of what `to_dict` returned.

        Raises:
            BankError: If it is something else.
        """
        try:
            pairs = [(item["query"], item["passage"]) for item in data["demonstrations"]]
        except (KeyError, TypeError) as error:
            raise BankError(
                f"bank is {data!r}, which to_dict() did not write ({type(error).__name__}: {error}). "
                "Pass a DemonstrationBank, a bank folder or a built-in name."
            ) from error
        return cls(pairs, instruction=data.get("instruction"), task=data.get("task"), symmetric=data.get("symmetric"))

    @classmethod
    def load(cls, folder_or_name: str | os.PathLike[str], encoder: BankEncoder | None = None) -> DemonstrationBank:
        """Load a bank folder or a built-in bank.

        Args:
            folder_or_name: A folder with `bank.json`, or the name of a built-in bank. A built-in name takes
                precedence over a folder of that name; write `./name` for the folder.
            encoder: If given, the bank is embedded for it unless its stored vectors are this encoder's.

        Raises:
            BankError: If there is no such bank or it is malformed.
        """
        folder = _locate(folder_or_name)
        file = folder / BANK_FILE
        try:
            content = file.read_bytes()
        except OSError as error:
            raise BankError(f"{describe_os_error(error)}. Make it readable or pass another bank.") from error
        stored = read_prepared(folder, content, _FACTS)
        bank = _parse_bank(folder, content) if stored is None else _StoredBank(folder, content, *stored)
        if encoder is not None:
            bank.embed(encoder)
        return bank

    def save(self, folder: str | os.PathLike[str], *, precision: Literal["float32", "float16"] = "float32") -> None:
        """Write the bank to a folder, which is made if it is missing.

        Args:
            folder: The folder.
            precision: Precision of the vectors on disk; float16 halves their size and changes cosines by about 0.0001.

        Raises:
            BankError: If the folder cannot be made.
        """
        target = Path(folder).expanduser()
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BankError(f"No folder can be made at {target} ({error}). Save the bank elsewhere.") from error
        others = {key: array.shape[-1] for key, array in self._others.items()}
        data = {
            "format_version": FORMAT_VERSION,
            "task": self.task,
            "instruction": self.instruction,
            "symmetric": self.symmetric,
            "origin": self.origin,
            **({} if self.enabled else {"enabled": False}),
            "encoder_fingerprint": self.encoder_fingerprint,
            "dimension": None if self.embeddings is None else int(self.embeddings.shape[-1]),
            **({"other_encoders": others} if others else {}),
            "demonstrations": [{"query": item.query, "passage": item.passage} for item in self.demonstrations],
        }
        if self.negatives:
            data["negatives"] = [{"query": item.query, "passage": item.passage} for item in self.negatives]
        # Vectors first, under the fingerprint of the texts: a crash between the two writes leaves a pair that
        # disagrees, which load() treats as "not embedded".
        if self.embeddings is not None:
            write_vectors(target / EMBEDDINGS_FILE, self._vectors_by_encoder(), self.fingerprint, precision)
        else:
            (target / EMBEDDINGS_FILE).unlink(missing_ok=True)
        text = json.dumps(data, ensure_ascii=False, indent=1) + "\n"
        # A lone surrogate has no UTF-8; its backslash escape is valid JSON and reads back as the same character.
        content = text.encode("utf-8", "backslashreplace")
        if self._prepared:
            facts = {"count": len(self), "bank": self.fingerprint}
            facts |= {name: getattr(self, name) for name in _FACTS if name not in facts}
            write_prepared(target, self._prepared, facts, content)
        else:
            (target / PREPARED_FILE).unlink(missing_ok=True)
        write_atomically(target / BANK_FILE, content)

    def embed(self, encoder: BankEncoder, *others: BankEncoder) -> None:
        """Embed the demonstrations with an encoder, in place.

        Queries are encoded zero-shot with the bank's instruction and passages as documents (as queries, if the task
        is symmetric). Vectors of these encoders that the bank already has are kept, those of other encoders dropped.

        Args:
            encoder: Its vectors become `embeddings`, (k, 3, dim) float32.
            others: Further encoders whose vectors the bank gets as well.
        """
        known = self._vectors_by_encoder()
        vectors = {}
        for each in (encoder, *others):
            found = known.get(each.fingerprint)
            if found is None:
                if known:
                    logger.info(
                        "bank %s was embedded under %s, the encoder is %s: embedding its %d demonstrations again",
                        self.task or self.fingerprint,
                        ", ".join(known),
                        each.fingerprint,
                        len(self),
                    )
                found = each.embed_demonstrations(self)
            vectors[each.fingerprint] = found
        self._set_vectors(vectors)
        self._prepared = {key: prepared for key, prepared in self._prepared.items() if key[0] in vectors}

    def prepare(self, encoder: BankReader, corpus: Vectors | None = None) -> None:
        """Read the demonstrations with an encoder's reader, in place, and embed them if they are not.

        `save` stores the result. A query with the stored bank then needs neither texts nor vectors, which pays for
        hundreds of demonstrations and more. Prepared against the passages of an index, they move queries as far as
        helps there. A changed bank has to be prepared again.

        Args:
            encoder: Its reader reads them. What other encoders' readers have read is kept.
            corpus: (m, d) vectors of the passages of an index by this encoder; None if they are not known.
        """
        if encoder.fingerprint not in self.encoder_fingerprints:
            self.embed(encoder)
        pairs = np.ascontiguousarray(self._vectors_by_encoder()[encoder.fingerprint], dtype=np.float32)
        self._prepared[encoder.fingerprint, encoder.reader.fingerprint] = encoder.reader.prepare(pairs, corpus)

    def prepared_for(self, encoder: str, reader: str) -> PreparedDemonstrations | None:
        """Return the demonstrations as read by `prepare`; None if they were not.

        Args:
            encoder: The encoder's fingerprint.
            reader: That of its reader.
        """
        return self._prepared.get((encoder, reader))

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
            k: Number of demonstrations, 0 to all.
            method: "first" k; seeded "random" k; the most "diverse" k (greedy farthest-point over query vectors,
                from the first demonstration on); the k "nearest" to a query, nearest last, beside the query.
            seed: Seed of "random".
            query_embedding: (dim,) unit vector of the query, for "nearest".

        Returns:
            A new bank with the same instruction and the vectors of these demonstrations.

        Raises:
            PromptError: If k is out of range, the method is unknown, or the query's vector is missing or does not fit.
            BankError: If the method needs vectors and the bank has none.
        """
        if not 0 <= k <= len(self):
            raise PromptError(f"{k} demonstrations requested, but the bank has {len(self)}. Use 0 to {len(self)}.")
        check_selection(method)
        if method == "first":
            return self.subset(range(k))
        if method == "random":
            return self.subset(random.Random(seed).sample(range(len(self)), k))
        if self.embeddings is None:
            raise BankError(f"Selection {method!r} needs vectors, but the bank has none. Call bank.embed(encoder).")
        queries = self.embeddings[:, 0]
        if method == "diverse":
            return self.subset(_farthest_rows(queries, k))
        if query_embedding is None:
            raise PromptError("Selection 'nearest' needs query_embedding. Pass the query's vector.")
        vector = np.asarray(query_embedding, dtype=np.float32)
        if vector.shape != queries.shape[1:]:
            raise PromptError(
                f"query_embedding has shape {vector.shape}, the bank's vectors have {queries.shape[1:]}. "
                "Encode one query with the same encoder at full width."
            )
        # einsum avoids BLAS: its worker threads busy-wait after a call and compete with torch's OpenMP threads.
        cosines = np.einsum("rd,d->r", queries, vector)
        return self.subset([int(row) for row in np.argsort(-cosines, kind="stable")[:k]][::-1])

    def embeddings_for(self, fingerprint: str) -> Vectors:
        """Return the vectors, if they are those of an encoder.

        Args:
            fingerprint: The encoder's.

        Returns:
            (k, 3, dim) float32, contiguous: query, passage, query read as a document.

        Raises:
            FingerprintError: If they are another encoder's, or there are none.
        """
        if self.embeddings is None or self.encoder_fingerprint != fingerprint:
            raise FingerprintError(
                f"The bank was embedded under {self.encoder_fingerprint}, the encoder is {fingerprint}. "
                "Call bank.embed(encoder)."
            )
        return np.ascontiguousarray(self.embeddings, dtype=np.float32)

    def number_used(self, requested: int | None) -> int:
        """Return how many demonstrations a query uses, given the number that it names or None."""
        return (len(self) if self.enabled else 0) if requested is None else requested

    def evaluate(
        self,
        encoder: BankEvaluator,
        corpus: Vectors | Sequence[str] | None = None,
        *,
        strategy: Literal["reader", "task-vector"] | None = None,
    ) -> BankReport:
        """Compute the gain in nDCG@10 that the bank can be expected to bring, by cross-validation on its pairs.

        Args:
            encoder: The bank's vectors are its own, or computed with it.
            corpus: Passages of an index beside those of the bank: (m, dim) vectors of this encoder, or texts.
            strategy: None takes the encoder's, or "reader" for an encoder whose strategy needs a prompt.

        Returns:
            Gain with its 95% interval, base recall, and the pairs that do not fit.

        Raises:
            BankError: If the bank has fewer than ten pairs, or `corpus` has more dimensions than the bank.

        Example:
            >>> report = bank.evaluate(encoder, ["The filter is behind the cover."])  # doctest: +SKIP
            >>> print(report.gain, report.low, report.high, report.verdict)  # doctest: +SKIP
        """
        known = self._vectors_by_encoder().get(encoder.fingerprint)
        pairs = encoder.embed_demonstrations(self) if known is None else known
        chosen = strategy or ("task-vector" if encoder.strategy == "task-vector" else "reader")
        texts = None if corpus is None or isinstance(corpus, np.ndarray) else list(corpus)
        return evaluate_pairs(
            np.ascontiguousarray(pairs, dtype=np.float32),
            [item.query for item in self.demonstrations],
            [item.passage for item in self.demonstrations],
            reader=encoder.reader if chosen == "reader" else None,
            corpus=encoder.encode_document(texts) if texts else corpus if isinstance(corpus, np.ndarray) else None,
        )

    def add(
        self, demonstrations: Iterable[Demonstration | tuple[str, str]], *encoders: BankEncoder
    ) -> DemonstrationBank:
        """Return a new bank with further demonstrations behind those it has; repeated ones are left out.

        Args:
            demonstrations: `Demonstration`s or (query, passage) pairs.
            encoders: Encoders that embed the new ones. Vectors that the bank has of them are kept; those of other
                encoders are dropped, as they lack the new demonstrations.

        Raises:
            BankError: If a demonstration is not a pair of non-empty strings.
        """
        checked = [_demonstration(item, index) for index, item in enumerate(demonstrations)]
        known_pairs = set(self.demonstrations)
        new = [item for item in dict.fromkeys(checked) if item not in known_pairs]
        if not new:
            return self.copy()
        result = self._with(self.demonstrations + tuple(new))
        fresh = self._with(new)
        known = self._vectors_by_encoder()
        result._set_vectors(
            {
                each.fingerprint: np.concatenate([known[each.fingerprint], each.embed_demonstrations(fresh)])
                if each.fingerprint in known
                else each.embed_demonstrations(result)
                for each in encoders
            }
        )
        return result

    def remove(self, rows: Iterable[int]) -> DemonstrationBank:
        """Return a new bank without the demonstrations with these indices.

        Raises:
            BankError: If there is no such demonstration.
        """
        gone = set(rows)
        if wrong := sorted(row for row in gone if not 0 <= row < len(self)):
            raise BankError(f"There is no demonstration {wrong[0] + 1}. The bank has {len(self)}.")
        return self.subset([row for row in range(len(self)) if row not in gone])

    @classmethod
    def merge(cls, banks: Sequence[DemonstrationBank]) -> DemonstrationBank:
        """Return one bank of the demonstrations of several, in their order; repeated ones are left out.

        The instruction is that of the first bank. Vectors are kept where all have them and the instruction is the
        same, as a query's vector depends on it. Banks that are not enabled are left out, unless none is.

        Raises:
            BankError: If there is no bank, or only some are symmetric.
        """
        if not banks:
            raise BankError("There is no bank to merge. Pass one or more.")
        if len({bank.symmetric for bank in banks}) > 1:
            raise BankError("Banks of symmetric tasks and others cannot be used together. Pass banks of one kind.")
        first = banks[0]
        used = [bank for bank in banks if bank.enabled] or list(banks)
        if len(used) == 1 and used[0] is first:
            return first
        rows: dict[Demonstration, int] = {}
        for number, item in enumerate(item for bank in used for item in bank.demonstrations):
            rows.setdefault(item, number)
        result = first._with(list(rows))
        result.negatives = tuple(dict.fromkeys(item for bank in used for item in bank.negatives))
        result.enabled = any(bank.enabled for bank in banks)
        result.origin = "; ".join(dict.fromkeys(bank.origin for bank in used if bank.origin))
        if all(bank.instruction == first.instruction for bank in used):
            stored = [bank._vectors_by_encoder() for bank in used]
            shared = [key for key in stored[0] if all(key in vectors for vectors in stored)]
            kept = list(rows.values())
            result._set_vectors({key: np.concatenate([each[key] for each in stored])[kept] for key in shared})
        return result

    def with_negatives(self, negatives: Iterable[Demonstration | tuple[str, str]]) -> DemonstrationBank:
        """Return a new bank with the same demonstrations and these negatives.

        Raises:
            BankError: If a negative is not a pair of non-empty strings.
        """
        result = self.copy()
        result.negatives = tuple(dict.fromkeys(_demonstration(item, row) for row, item in enumerate(negatives)))
        return result

    def subset(self, rows: Sequence[int]) -> DemonstrationBank:
        """Return a new bank of the demonstrations with these indices, in this order, with their vectors."""
        chosen = self._with([self.demonstrations[row] for row in rows])
        chosen._set_vectors({key: array[list(rows)] for key, array in self._vectors_by_encoder().items()})
        return chosen

    def copy(self) -> DemonstrationBank:
        """Return a copy with the same vectors."""
        return self.subset(range(len(self)))

    def _with(self, demonstrations: Sequence[Demonstration]) -> DemonstrationBank:
        """Return a bank of other demonstrations with the same settings, without vectors."""
        result = DemonstrationBank(
            demonstrations,
            instruction=self.instruction,
            symmetric=self.symmetric,
            origin=self.origin,
            enabled=self.enabled,
            negatives=self.negatives,
        )
        result.task = self.task  # passed on above it would fill in an instruction that is None
        return result

    def _vectors_by_encoder(self) -> dict[str, Vectors]:
        return {} if self.embeddings is None else {self.encoder_fingerprint or "": self.embeddings, **self._others}

    def _set_vectors(self, vectors: Mapping[str, Vectors]) -> None:
        self._others = dict(vectors)
        self.encoder_fingerprint = next(iter(self._others), None)
        self.embeddings = None if self.encoder_fingerprint is None else self._others.pop(self.encoder_fingerprint)


class _StoredBank(DemonstrationBank):
    """A bank folder whose texts and vectors are read when they are first needed.

    Args:
        folder: The folder.
        content: Its `bank.json`.
        facts: `count`, `bank` (the fingerprint) and fields of the constructor.
        prepared: The demonstrations as read, by fingerprints of encoder and reader.
    """

    def __init__(
        self,
        folder: Path,
        content: bytes,
        facts: Mapping[str, Any],
        prepared: Mapping[tuple[str, str], PreparedDemonstrations],
    ) -> None:
        self._folder, self._content, self._facts = folder, content, facts
        self.task, self.instruction, self.symmetric = facts["task"], facts["instruction"], facts["symmetric"]
        self.origin, self.enabled = facts["origin"], facts["enabled"]
        self._prepared = dict(prepared)

    @cached_property
    def _whole(self) -> DemonstrationBank:
        return _parse_bank(self._folder, self._content)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute that is not read yet."""
        if name not in ("demonstrations", "negatives", "embeddings", "encoder_fingerprint", "_others"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        value = getattr(self._whole, name)
        setattr(self, name, value)
        return value

    def __len__(self) -> int:
        return int(self._facts["count"])

    @property
    def fingerprint(self) -> str:
        """Short hash of the texts, the instruction and the symmetry; not of the vectors."""
        return str(self._facts["bank"])


def _parse_bank(folder: Path, content: bytes) -> DemonstrationBank:
    """Read a bank's texts from its `bank.json`, and its vectors."""
    file = folder / BANK_FILE
    try:
        data = json.loads(content.decode("utf-8"))
        if data.get("format_version") != FORMAT_VERSION:
            raise BankError(
                f"{file} has format version {data.get('format_version')}, this release reads {FORMAT_VERSION}. "
                "Run `pip install -U epic-rag`."
            )
        bank = DemonstrationBank(
            [(item["query"], item["passage"]) for item in data["demonstrations"]],
            instruction=data.get("instruction"),
            task=data.get("task"),
            symmetric=data.get("symmetric"),
            origin=str(data.get("origin", "")),
            enabled=data.get("enabled") is not False,
            negatives=[(item["query"], item["passage"]) for item in data.get("negatives", ())],
        )
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise BankError(
            f"{file} is not a demonstration bank ({type(error).__name__}: {error}). "
            "Make one with `epic-rag bank build PAIRS.jsonl --out FOLDER`."
        ) from error
    vectors = folder / EMBEDDINGS_FILE
    fingerprint = data.get("encoder_fingerprint")
    if isinstance(fingerprint, str) and vectors.is_file():
        bank._set_vectors(read_vectors(vectors, encoder=fingerprint, bank=bank.fingerprint, count=len(bank)))
    return bank


def built_in_banks() -> dict[str, Path]:
    """Return names and folders of the banks that ship with the package, sorted by name."""
    spec = importlib.util.find_spec("epic_rag_demos")
    roots = list(spec.submodule_search_locations or []) if spec is not None else []
    return {file.parent.name: file.parent for root in roots for file in sorted(Path(root).glob(f"*/{BANK_FILE}"))}


@lru_cache(maxsize=16)
def merged_bank(*banks: DemonstrationBank) -> DemonstrationBank:
    """Return `DemonstrationBank.merge` of banks; the same object for the same banks, so that it is prepared once."""
    return DemonstrationBank.merge(banks)


def is_enabled(folder_or_name: str | os.PathLike[str]) -> bool:
    """Return whether queries use a bank's demonstrations by default; reads no vectors.

    Raises:
        BankError: If there is no such bank.
    """
    try:
        data = json.loads((_locate(folder_or_name) / BANK_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # loading it reports what is wrong
    return not isinstance(data, dict) or data.get("enabled") is not False


def check_selection(name: str) -> None:
    """Raise PromptError unless a selection has this name."""
    if name not in SELECTIONS:
        raise PromptError(f"Unknown selection {name!r}. Choose one of {', '.join(SELECTIONS)}.")


def _farthest_rows(vectors: Vectors, k: int) -> list[int]:
    """Choose k of (rows, dim) unit vectors by greedy farthest point, starting with row 0."""
    chosen: list[int] = [0][:k]
    while len(chosen) < k:
        closest = (vectors @ vectors[chosen].T).max(axis=1)
        closest[chosen] = np.inf
        chosen.append(int(closest.argmin()))
    return chosen


def _locate(folder_or_name: str | os.PathLike[str]) -> Path:
    name = os.fspath(folder_or_name)
    banks = built_in_banks()
    if name in banks:
        return banks[name]
    folder = Path(name).expanduser()
    if (folder / BANK_FILE).is_file():
        return folder
    fact = f"The folder {name} has no {BANK_FILE}" if folder.is_dir() else f"There is no demonstration bank {name}"
    raise BankError(f"{fact}. Built-in banks are {', '.join(banks) or 'none'}; run `epic-rag bank list`.")


def _task_defaults(task: str | None) -> tuple[str | None, bool]:
    try:
        known = None if task is None else get_task(task)
    except TaskError:
        known = None  # a user's bank may name a task that is not built in
    return (None, False) if known is None else (known.instruction, known.symmetric)


def _demonstration(item: Demonstration | tuple[str, str], index: int) -> Demonstration:
    if isinstance(item, Demonstration):
        item = (item.query, item.passage)
    # A string of two characters would unpack into two strings.
    pair = tuple(item) if isinstance(item, Sequence) and not isinstance(item, str) else ()
    if len(pair) != 2 or not all(isinstance(part, str) and part.strip() for part in pair):
        raise BankError(f"Demonstration {index + 1} is {item!r}. Pass (query, passage), two non-empty strings.")
    return Demonstration(*pair)
