"""`EpicEmbedding`: an EPIC encoder as a LlamaIndex embedding model.

Three facts about LlamaIndex 0.14 shape this class.

1. A component *is* its declared fields: `to_dict` writes them, an IngestionPipeline hashes them into its
   cache keys, and they travel to worker processes. So everything that changes a vector is a field,
   `fingerprint` included, which names weights and demonstrations by content. The weights are no field.
2. An IngestionPipeline cannot know that only queries see demonstrations: its key holds every field, so
   another bank misses the cache. That is safe but wasteful. `for_documents()` gives the part of an embedding
   that documents depend on; a pipeline that holds it embeds nothing again when demonstrations change.
3. BaseEmbedding caches by bare text, and its default async methods block the event loop (see `_cache` and
   `_engine`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import pickle
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.bridge.pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    WithJsonSchema,
    field_serializer,
    field_validator,
    model_validator,
)
from llama_index.core.storage.kvstore.types import BaseKVStore

from epic_rag.checkpoints import DEFAULT_CHECKPOINT
from epic_rag.demonstrations import DemonstrationBank, Selection
from epic_rag.encoder import EpicEncoder
from epic_rag.errors import BankError, FingerprintError, PromptError
from epic_rag.task_vector import QueryStrategy
from epic_rag.tasks import get_task
from llama_index.embeddings.epic._cache import RoleKeyedCache

__all__ = ["EpicEmbedding", "EpicFields"]


# --- from _engine
# One loaded encoder, the lock that guards it and the thread that async callers use.
#
# `EpicEmbedding` is a bag of settings that LlamaIndex copies, pickles and hashes; the weights are none of that.
# They live here, shared by all copies of an embedding, and never travel to another process: a copy that was
# unpickled there loads them again at its first use.


@dataclass(frozen=True)
class EngineSettings:
    """What an encoder is loaded from; two equal ones can share one encoder."""

    model: str | None
    max_query_tokens: int | None
    max_document_tokens: int | None
    device: str | None
    dtype: str | None
    truncate_dim: int | None


class Engine:
    """An encoder that is loaded when it is first asked for.

    Args:
        settings: What to load.
        encoder: The encoder itself, when there is one already.
    """

    def __init__(self, settings: EngineSettings, encoder: EpicEncoder | None = None) -> None:
        self.settings = settings
        # Re-entrant: whoever encodes holds it, and loading happens inside. EpicEncoder is not thread-safe.
        self.lock = threading.RLock()
        self._encoder = encoder
        # For async callers, and of one thread. Not `asyncio.to_thread`: LlamaIndex starts all batches at
        # once, and each would hold a thread of the event loop's shared pool while it waits for the lock,
        # until the application's own `to_thread` calls queue behind an indexing run. One thread also keeps
        # torch to one team of OpenMP workers. It starts with the first call.
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="epic-embedding")

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._encoder is not None

    @property
    def encoder(self) -> EpicEncoder:
        """The encoder, loaded now if need be.

        Raises:
            CheckpointError: There is no such checkpoint, or it is broken.
        """
        with self.lock:
            if self._encoder is None:
                self._encoder = EpicEncoder.from_pretrained(
                    self.settings.model,
                    device=self.settings.device,
                    dtype=self.settings.dtype,
                    max_query_tokens=self.settings.max_query_tokens,
                    max_document_tokens=self.settings.max_document_tokens,
                    truncate_dim=self.settings.truncate_dim,
                )
            return self._encoder

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        # Weights are only ever read: a deep copy of an embedding must not double them.
        return self


_SHARED: ContextVar[Engine | None] = ContextVar("epic_embedding_engine", default=None)


@contextmanager
def share(engine: Engine) -> Iterator[None]:
    """Let the embeddings that are constructed inside use `engine`, when their settings are the same."""
    token = _SHARED.set(engine)
    try:
        yield
    finally:
        _SHARED.reset(token)


def engine_for(settings: EngineSettings) -> Engine:
    """The shared engine if it fits, else a new one."""
    shared = _SHARED.get()
    return shared if shared is not None and shared.settings == settings else Engine(settings)


# --- from _fields
# The declared fields of `EpicEmbedding`, and how they are read and written.

# A bank object is written as its texts; a schema has to be told so.
Bank = Annotated[DemonstrationBank, WithJsonSchema({"type": "object", "title": "DemonstrationBank"})]


class EpicFields(BaseEmbedding):
    """Everything about an embedding that LlamaIndex may write down, hash or send to another process."""

    # A misspelt argument must not be ignored: it would silently give other vectors than asked for.
    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(
        default=None,
        frozen=True,
        description="A shipped checkpoint, a folder or a hub name; the shipped default if left out.",
    )
    task: str | None = Field(
        default=None,
        frozen=True,
        description="A known task: gives the instruction and, with num_demonstrations, the built-in bank.",
    )
    bank: Bank | str | None = Field(
        default=None,
        frozen=True,
        description="Demonstrations for queries: a DemonstrationBank, a bank folder or a built-in name.",
    )
    instruction: str | None = Field(
        default=None, frozen=True, description="Overrides the task's or the bank's instruction; '' for none."
    )
    num_demonstrations: int | None = Field(
        default=None,
        frozen=True,
        ge=0,
        description="How many to show; None shows all of `bank`, and none where only a task is named.",
    )
    selection: Selection = Field(
        default="first",
        frozen=True,
        description="How they are picked: first, random, diverse, nearest or nearest-early.",
    )
    strategy: QueryStrategy | None = Field(
        default=None,
        frozen=True,
        description="How they reach a query: epic, text, none or task-vector; None for the checkpoint's own.",
    )
    max_query_tokens: int | None = Field(default=None, frozen=True, ge=1, description="Longest query in tokens.")
    max_document_tokens: int | None = Field(default=None, frozen=True, ge=1, description="Longest document in tokens.")
    device: str | None = Field(
        default=None, frozen=True, description="cpu, cuda, ..., several with commas; None takes a GPU if any."
    )
    dtype: str | None = Field(default=None, frozen=True, description="float32, bfloat16, float16, int8 or auto.")
    truncate_dim: int | None = Field(
        default=None, frozen=True, ge=1, description="Keep the first N dimensions and renormalise."
    )
    fingerprint: str | None = Field(
        default=None,
        frozen=True,
        description="Names all that changes a vector: '<encoder>-<query settings>'. Filled in when loaded; a "
        "stored one is compared with the checkpoint that is found.",
    )
    embed_batch_size: int = Field(
        default=128,
        gt=0,
        le=2048,
        description="Texts in one call; the encoder cuts them to batches by tokens.",
    )
    # Excluded like LlamaIndex's other live resources: a connection is no setting.
    embeddings_cache: Any | None = Field(
        default=None,
        frozen=True,
        exclude=True,
        description="A LlamaIndex key-value store; queries and documents are kept apart in it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_aliases(cls, data: Any) -> Any:
        """Settle `model` (LlamaIndex's `model_name` is taken for it) and drop `class_name`."""
        if not isinstance(data, Mapping):
            return data
        values = {name: value for name, value in data.items() if name != "class_name"}
        if values.get("model") is None and values.get("model_name", "unknown") != "unknown":
            values["model"] = values["model_name"]
        if values.get("model") is None:
            values["model"] = DEFAULT_CHECKPOINT
        return values

    @field_validator("model", "device", "dtype", mode="before")
    @classmethod
    def _as_text(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if isinstance(value, (torch.dtype, torch.device)):
            return str(value).removeprefix("torch.")
        if info.field_name == "device" and isinstance(value, (list, tuple)):
            return ",".join(map(str, value))
        return value

    @field_validator("bank", mode="before")
    @classmethod
    def _as_bank(cls, value: Any) -> Any:
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if not isinstance(value, Mapping):
            return value
        try:
            pairs = [(item["query"], item["passage"]) for item in value["demonstrations"]]
        except (KeyError, TypeError) as error:
            raise BankError(
                f"bank is {value!r}, which is not what to_dict() writes ({type(error).__name__}: {error}); "
                "pass a DemonstrationBank, a bank folder or a built-in name"
            ) from error
        return DemonstrationBank(
            pairs,
            instruction=value.get("instruction"),
            task=value.get("task"),
            symmetric=value.get("symmetric"),
        )

    @field_serializer("bank")
    def _bank_as_texts(self, bank: DemonstrationBank | str | None) -> dict[str, Any] | str | None:
        if not isinstance(bank, DemonstrationBank):
            return bank
        return {
            "task": bank.task,
            "instruction": bank.instruction,
            "symmetric": bank.symmetric,
            "demonstrations": [{"query": item.query, "passage": item.passage} for item in bank.demonstrations],
        }

    @field_validator("embeddings_cache")
    @classmethod
    def _keep_roles_apart(cls, store: Any) -> Any:
        if isinstance(store, BaseKVStore) and not isinstance(store, RoleKeyedCache):
            return RoleKeyedCache(store)
        return store


logger = logging.getLogger(__name__)

Role = Literal["query", "document"]


class EpicEmbedding(EpicFields):
    """A LlamaIndex embedding model that adapts to demonstrations.

    Documents are embedded bare. Queries are embedded behind an instruction and, if there is a bank, behind
    its demonstrations; so a bank can be changed at any time, over an index that exists.

    The fields that change vectors are frozen: a changed embedding is a new one, made with `with_bank` or
    `model_copy(update=...)`, which share the loaded weights.

    Raises:
        CheckpointError: If there is no such checkpoint or it does not load.
        BankError: If there is no such bank or it is malformed.
        TaskError: If the task is unknown.
        PromptError: If more demonstrations are asked for than the bank has.
        FingerprintError: If a stored `fingerprint` is passed, as `from_dict` does, and the checkpoint that is
            found is another.

    Example:
        >>> from epic_rag import DemonstrationBank
        >>> from llama_index.embeddings.epic import EpicEmbedding
        >>> embedding = EpicEmbedding(task="docs")
        >>> bank = DemonstrationBank([("how do I undo this", "To undo a step, press Ctrl+Z.")])
        >>> adapted = embedding.with_bank(bank)
        >>> adapted.document_fingerprint == embedding.document_fingerprint
        True
    """

    _engine: Engine = PrivateAttr()
    _bank: DemonstrationBank | None = PrivateAttr(default=None)
    _settled: bool = PrivateAttr(default=False)

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex writes into a serialised component."""
        return "EpicEmbedding"

    @classmethod
    def from_encoder(
        cls,
        encoder: EpicEncoder,
        *,
        task: str | None = None,
        bank: DemonstrationBank | str | None = None,
        instruction: str | None = None,
        num_demonstrations: int | None = None,
        selection: Selection = "first",
        strategy: QueryStrategy | None = None,
        embed_batch_size: int = 128,
    ) -> EpicEmbedding:
        """Wrap an encoder that is loaded already.

        A copy in another process loads `encoder.source` again. If that gives another encoder (it was loaded
        with an adapter or fewer layers, or changed in memory), the copy raises FingerprintError: save the
        encoder to a folder and load that.

        Args:
            encoder: The encoder; used, not copied.
            task: As the field.
            bank: As the field.
            instruction: As the field.
            num_demonstrations: As the field.
            selection: As the field.
            strategy: As the field.
            embed_batch_size: As the field.
        """
        settings = EngineSettings(
            model=encoder.source,
            max_query_tokens=encoder.max_query_tokens,
            max_document_tokens=encoder.max_document_tokens,
            device=",".join(map(str, encoder.devices)),
            dtype=str(encoder.dtype).removeprefix("torch."),
            truncate_dim=encoder.truncate_dim,
        )
        with share(Engine(settings, encoder)):
            return cls(
                model=settings.model,
                max_query_tokens=settings.max_query_tokens,
                max_document_tokens=settings.max_document_tokens,
                device=settings.device,
                dtype=settings.dtype,
                truncate_dim=settings.truncate_dim,
                task=task,
                bank=bank,
                instruction=instruction,
                num_demonstrations=num_demonstrations,
                selection=selection,
                strategy=strategy,
                embed_batch_size=embed_batch_size,
            )

    @property
    def encoder(self) -> EpicEncoder:
        """The encoder underneath. It is not thread-safe: use it only while this object is idle."""
        return self._engine.encoder

    @property
    def symmetric(self) -> bool:
        """Whether documents are embedded like queries, as in paraphrase search and clustering."""
        if self.task is not None:
            return get_task(self.task).symmetric
        bank = self._resolve_bank()
        return bank is not None and bank.symmetric

    @property
    def document_fingerprint(self) -> str:
        """Names everything that changes a document's vector: keep it beside stored vectors.

        It is the encoder's fingerprint, because task, instruction and demonstrations leave documents alone;
        for a symmetric task it is the whole `fingerprint`.
        """
        self._settle()
        whole = str(self.fingerprint)
        return whole if self.symmetric else _encoder_part(whole)

    def check_documents(self, fingerprint: str | None) -> None:
        """Compare with the fingerprint that was kept beside stored vectors.

        Args:
            fingerprint: `document_fingerprint` of the embedding that made them; None if nothing was kept.

        Raises:
            FingerprintError: If they are another's.
        """
        if fingerprint != self.document_fingerprint:
            raise FingerprintError(
                f"the stored vectors were made under {fingerprint}, this EpicEmbedding (model "
                f"{self.model!r}) is {self.document_fingerprint}; load the model they were made with, or "
                "embed the documents again"
            )

    def with_bank(
        self,
        bank: DemonstrationBank | str | os.PathLike[str] | None,
        *,
        num_demonstrations: int | None = None,
        selection: Selection = "first",
        strategy: QueryStrategy | None = None,
    ) -> EpicEmbedding:
        """The same encoder with other demonstrations; stored document vectors stay valid.

        The bank's own instruction is used, if it has one, unless this embedding was made with `instruction`.

        Args:
            bank: A DemonstrationBank, a bank folder or a built-in name; None for no demonstrations.
            num_demonstrations: How many to show; None for all.
            selection: How they are picked.
            strategy: How they reach a query; None for the checkpoint's own.
        """
        shown = {"num_demonstrations": num_demonstrations, "selection": selection, "strategy": strategy}
        return self.model_copy(update={"bank": bank, **shown})

    def for_documents(self) -> EpicEmbedding:
        """The part of this embedding that documents depend on, for an IngestionPipeline.

        An IngestionPipeline caches under every field of its transformations. This copy has no bank, task or
        instruction, so its cache entries outlive a change of them. For a symmetric task it is a plain copy.
        """
        if self.symmetric:
            return self.model_copy()
        bare: dict[str, Any] = dict.fromkeys(("task", "bank", "instruction", "num_demonstrations", "strategy"))
        return self.model_copy(update={**bare, "selection": "first"})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> EpicEmbedding:
        """A copy, with other values for some fields; they are validated and the fingerprint is made anew.

        Args:
            update: Fields to change.
            deep: Whether to copy field values; weights are shared in any case.
        """
        if not update:
            return super().model_copy(deep=deep)
        fields = {name: getattr(self, name) for name in type(self).model_fields if name != "fingerprint"}
        with share(self._engine):
            return type(self)(**{**fields, **update})

    # -- loading: what the fields name --------------------------------------------------------------------

    def model_post_init(self, context: Any, /) -> None:
        """Load at once, so that a mistake shows where it is made and `to_dict` has the fingerprint."""
        self._engine = engine_for(self._engine_settings())
        self._settle()

    def _engine_settings(self) -> EngineSettings:
        return EngineSettings(**{name: getattr(self, name) for name in EngineSettings.__dataclass_fields__})

    def _settle(self) -> None:
        """Load what the fields name, compare with a stored fingerprint and fill in what was left open."""
        with self._engine.lock:
            if self._settled:
                return
            encoder = self._engine.encoder
            self._bank = self._resolve_bank()
            current = f"{encoder.fingerprint}-{self._query_fingerprint(self._bank)}"
            self._compare(self.fingerprint, current)
            # Frozen for users; these two follow from the other fields.
            derived = {"model_name": encoder.name, "fingerprint": current}
            self.__dict__.update(derived)
            self.__pydantic_fields_set__.update(derived)
            self._settled = True

    def _resolve_bank(self) -> DemonstrationBank | None:
        """The bank that queries see: the one named, or the task's own if demonstrations are asked for."""
        if self._bank is not None:
            return self._bank
        bank = self.bank
        if bank is None and self.task is not None and self.num_demonstrations:
            bank = get_task(self.task).bank
        return DemonstrationBank.load(bank) if isinstance(bank, str) else bank

    def _query_fingerprint(self, bank: DemonstrationBank | None) -> str:
        """Short hash of what a query's vector depends on beside the encoder.

        Device and dtype are left out: they move a vector by rounding only, and an index that was made on a
        GPU has to be readable on a laptop.
        """
        shown = self.num_demonstrations
        if bank is None and shown:
            raise PromptError(f"asked for {shown} demonstrations and there is no bank to take them from; pass bank=...")
        if bank is not None:
            # select() raises PromptError if there are too few.
            shown = len(bank.select(len(bank) if shown is None else shown))
        task = None if self.task is None else get_task(self.task)
        facts = {
            "task": None if task is None else [task.name, task.instruction, task.symmetric],
            "instruction": self.instruction,
            "bank": None if bank is None else bank.fingerprint,
            "num_demonstrations": shown or 0,
            "selection": self.selection,
            # Only where it is set, so that what was stored before there was this field stays valid.
            **({} if self.strategy is None else {"strategy": self.strategy}),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]

    def _compare(self, stored: str | None, current: str) -> None:
        if stored is None or stored == current:
            return
        if _encoder_part(stored) != _encoder_part(current):
            raise FingerprintError(
                f"this EpicEmbedding was saved with encoder {_encoder_part(stored)}, model {self.model!r} is "
                f"now {_encoder_part(current)}; load the checkpoint of then with from_dict(data, "
                "model=FOLDER), or accept this one with from_dict(data, fingerprint=None) and embed the "
                "documents again"
            )
        if self.symmetric:
            raise FingerprintError(
                f"this EpicEmbedding was saved as {stored} and is now {current}, and in a symmetric task "
                "instruction and demonstrations are part of every document's vector; restore them, or accept "
                "these with from_dict(data, fingerprint=None) and embed the documents again"
            )
        # The bank was edited since, or from_dict was given another one: what demonstrations are for.
        logger.info("query settings have changed from %s to %s; document vectors stay valid", stored, current)

    # -- copies in other processes ------------------------------------------------------------------------

    def __getstate__(self) -> dict[Any, Any]:
        """The fields alone.

        Not BaseComponent's: that pickles the weights to see whether it can, and deletes what cannot be
        pickled from the object that is alive.
        """
        fields = dict(self.__dict__)
        for name in ("callback_manager", "rate_limiter", "embeddings_cache"):
            try:
                pickle.dumps(fields[name])
            except Exception:  # whatever a third party's object raises
                logger.warning("%s of %s cannot be pickled; the copy goes without", name, self.class_name())
                del fields[name]
        return {
            "__dict__": fields,
            "__pydantic_extra__": None,
            "__pydantic_fields_set__": set(self.__pydantic_fields_set__),
            "__pydantic_private__": {"_bank": None, "_settled": False},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the fields; weights are loaded, and the fingerprint compared, at the first use.

        Not BaseComponent's: that runs `__init__` and swallows its errors. To raise here would be worse: a
        multiprocessing pool whose worker cannot unpickle its task waits for ever.
        """
        for name, field in type(self).model_fields.items():
            if name not in state["__dict__"]:
                state["__dict__"][name] = field.get_default(call_default_factory=True)
        BaseModel.__setstate__(self, state)
        self._engine = Engine(self._engine_settings())

    # -- vectors ------------------------------------------------------------------------------------------

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._vectors("query", [query])[0]

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return (await self._avectors("query", [query]))[0]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._vectors("document", [text])[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return (await self._avectors("document", [text]))[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self._vectors("document", texts)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await self._avectors("document", texts)

    async def _avectors(self, role: Role, texts: list[str]) -> list[Embedding]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._engine.thread, self._vectors, role, texts)

    def _vectors(self, role: Role, texts: list[str]) -> list[Embedding]:
        """One vector a text, from the cache where there is one."""
        self._settle()
        cache = self.embeddings_cache
        if cache is None:
            return self._encode(role, texts)
        key = str(self.fingerprint) if role == "query" else self.document_fingerprint
        found = cache.lookup(role, key, texts)
        missing = [text for text, vector in zip(texts, found, strict=True) if vector is None]
        fresh = self._encode(role, missing)
        cache.remember(role, key, missing, fresh)
        remaining = iter(fresh)
        return [next(remaining) if vector is None else vector for vector in found]

    def _encode(self, role: Role, texts: list[str]) -> list[Embedding]:
        with self._engine.lock:
            if role == "document" and not self.symmetric:
                rows = self._engine.encoder.encode_document(texts)
            else:
                rows = self._engine.encoder.encode_query(
                    texts,
                    task=self.task,
                    bank=self._bank,
                    instruction=self.instruction,
                    num_demonstrations=self.num_demonstrations,
                    selection=self.selection,
                    strategy=self.strategy,
                )
        vectors: list[Embedding] = rows.tolist()
        return vectors


def _encoder_part(fingerprint: str) -> str:
    """What stands before the query settings."""
    return fingerprint.partition("-")[0]
