"""`EpicEmbedding`: an EPIC encoder as a LlamaIndex embedding model.

Three facts about LlamaIndex 0.14 shape this class.

1. A component *is* its declared fields: `to_dict` writes them, an IngestionPipeline hashes them into its cache keys,
   and they are sent to worker processes. So everything that changes a vector is a field, including `fingerprint`, which
   identifies weights and demonstrations by content. The weights are not a field: they live in a `LazyEncoder`, which
   copies share and pickles leave out.
2. An IngestionPipeline cannot know that demonstrations change queries only: its cache key holds every field, so a
   changed bank misses the cache. That is safe but wasteful. `for_documents()` returns a copy with only those fields
   that documents depend on; a pipeline that holds this copy embeds nothing again when demonstrations change.
3. BaseEmbedding caches by the bare text (see `_cache`), and its default async methods block the event loop; here they
   run in a thread.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import pickle
from collections.abc import Mapping
from typing import Annotated, Any

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
from typing_extensions import Unpack

from epic_rag.checkpoints import DEFAULT_CHECKPOINT
from epic_rag.demonstrations import DemonstrationBank, Selection
from epic_rag.encoder import EpicEncoder
from epic_rag.errors import FingerprintError, PromptError
from epic_rag.lazy_encoder import LazyEncoder, encoder_settings, is_symmetric, load_prompt
from epic_rag.query_prompt import PromptSettings, QueryPrompt, QueryStrategy
from epic_rag.tasks import get_task
from llama_index.embeddings.epic._cache import Role, RoleKeyedCache

__all__ = ["EpicEmbedding"]

logger = logging.getLogger(__name__)

# In JSON a bank is its texts, an object; without this, pydantic cannot make a schema.
Bank = Annotated[DemonstrationBank, WithJsonSchema({"type": "object", "title": "DemonstrationBank"})]

_ENCODER_FIELDS = ("model", "max_query_tokens", "max_document_tokens", "device", "dtype", "truncate_dim")
_PROMPT_FIELDS = ("task", "bank", "instruction", "num_demonstrations", "strategy", "selection")


class EpicEmbedding(BaseEmbedding):
    """A LlamaIndex embedding model that adapts to demonstrations.

    Documents are embedded bare; one that is longer than the model reads is embedded in windows whose vectors are
    averaged, and a warning says so once. Queries are embedded with an instruction and, if there is a bank, with its
    demonstrations, so a bank can be changed at any time over an existing index.

    Fields that change vectors are frozen. `with_bank` and `model_copy(update=...)` return a changed embedding, which
    shares the loaded weights.

    Raises:
        CheckpointError: If the checkpoint is missing or does not load.
        BankError: If the bank is missing or malformed.
        TaskError: If the task is unknown.
        PromptError: If `num_demonstrations` is more than the bank has, or is given without a bank.
        FingerprintError: If a stored `fingerprint`, as `from_dict` passes it, is not that of the checkpoint.

    Example:
        >>> from epic_rag import DemonstrationBank
        >>> from llama_index.embeddings.epic import EpicEmbedding
        >>> embedding = EpicEmbedding(task="docs")
        >>> bank = DemonstrationBank([("how do I undo this", "To undo a step, press Ctrl+Z.")])
        >>> adapted = embedding.with_bank(bank)
        >>> adapted.document_fingerprint == embedding.document_fingerprint
        True
    """

    # A misspelt argument must not be ignored: it would silently give other vectors.
    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(
        default=None, frozen=True, description="A shipped checkpoint, a folder or a hub name; None for the default."
    )
    task: str | None = Field(default=None, frozen=True, description="A known task, for its instruction.")
    bank: Bank | str | None = Field(
        default=None,
        frozen=True,
        description="Demonstrations for queries: a DemonstrationBank, a bank folder or a built-in name.",
    )
    instruction: str | None = Field(
        default=None, frozen=True, description="Replaces the instruction of task and bank; '' for none."
    )
    num_demonstrations: int | None = Field(
        default=None, frozen=True, ge=0, description="How many demonstrations of the bank to use; None for all."
    )
    selection: Selection = Field(
        default="first", frozen=True, description="Which ones: first, random, diverse or nearest."
    )
    strategy: QueryStrategy | None = Field(
        default=None,
        frozen=True,
        description="How demonstrations reach a query: reader, task-vector, epic or text; None for the checkpoint's "
        "default.",
    )
    max_query_tokens: int | None = Field(default=None, frozen=True, ge=1, description="Longest query in tokens.")
    max_document_tokens: int | None = Field(default=None, frozen=True, ge=1, description="Longest document in tokens.")
    device: str | None = Field(
        default=None, frozen=True, description="cpu, cuda, ..., several with commas; None takes a GPU if any."
    )
    dtype: str | None = Field(default=None, frozen=True, description="float32, bfloat16, float16 or auto.")
    truncate_dim: int | None = Field(
        default=None, frozen=True, ge=1, description="Keep the first N dimensions and renormalise."
    )
    fingerprint: str | None = Field(
        default=None,
        frozen=True,
        description="Identifies everything that changes a vector: '<encoder>-<query settings>'. Filled in on loading; "
        "a stored one is compared with the checkpoint.",
    )
    embed_batch_size: int = Field(
        default=128, gt=0, le=2048, description="Texts in one call; the encoder cuts them into batches by tokens."
    )
    # Excluded from to_dict like LlamaIndex's other live resources.
    embeddings_cache: Any | None = Field(
        default=None,
        frozen=True,
        exclude=True,
        description="A LlamaIndex key-value store; queries and documents have separate keys.",
    )

    _lazy: LazyEncoder = PrivateAttr()
    _prompt: QueryPrompt | None = PrivateAttr(default=None)  # None until the encoder is loaded and compared

    # -- fields -------------------------------------------------------------------------------------------

    @model_validator(mode="before")
    @classmethod
    def _normalise(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        values = {name: value for name, value in data.items() if name != "class_name"}
        if values.get("model") is None:  # LlamaIndex's name for it is accepted too
            name = values.get("model_name", "unknown")
            values["model"] = DEFAULT_CHECKPOINT if name == "unknown" else name
        return _upgrade(values)

    @field_validator("model", "device", "dtype", "bank", mode="before")
    @classmethod
    def _as_text(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if isinstance(value, (torch.dtype, torch.device)):
            return str(value).removeprefix("torch.")
        if info.field_name == "device" and isinstance(value, (list, tuple)):
            return ",".join(map(str, value))
        if info.field_name == "bank" and isinstance(value, Mapping):
            return DemonstrationBank.from_dict(value)
        return value

    @field_serializer("bank")
    def _bank_to_dict(self, bank: DemonstrationBank | str | None) -> dict[str, Any] | str | None:
        return bank.to_dict() if isinstance(bank, DemonstrationBank) else bank

    @field_validator("embeddings_cache")
    @classmethod
    def _separate_roles(cls, store: Any) -> Any:
        if isinstance(store, BaseKVStore) and not isinstance(store, RoleKeyedCache):
            return RoleKeyedCache(store)
        return store

    # -- construction and copies --------------------------------------------------------------------------

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex writes into a serialised component."""
        return "EpicEmbedding"

    @classmethod
    def from_encoder(
        cls, encoder: EpicEncoder, *, embed_batch_size: int = 128, **prompt: Unpack[PromptSettings]
    ) -> EpicEmbedding:
        """Wrap a loaded encoder.

        A copy in another process loads `encoder.source` again. If that gives another encoder (it was loaded with an
        adapter or fewer layers, or changed in memory), the copy raises FingerprintError. Save such an encoder to a
        folder and load that.

        Args:
            encoder: The encoder; used, not copied.
            embed_batch_size: As the field.
            **prompt: The fields `task`, `bank`, `instruction`, `num_demonstrations`, `strategy` and `selection`.
        """
        settings = encoder_settings(encoder)
        fields = {**settings, **prompt, "embed_batch_size": embed_batch_size}
        return cls.model_validate(fields, context=LazyEncoder(settings, encoder))

    def with_bank(
        self,
        bank: DemonstrationBank | str | os.PathLike[str] | None,
        *,
        num_demonstrations: int | None = None,
        selection: Selection = "first",
        strategy: QueryStrategy | None = None,
    ) -> EpicEmbedding:
        """Return the same embedding with other demonstrations; stored document vectors stay valid.

        The bank's instruction is used if this embedding has neither `instruction` nor `task`.

        Args:
            bank: A DemonstrationBank, a bank folder or a built-in name; None for no demonstrations.
            num_demonstrations: How many to use; None for all.
            selection: Which ones.
            strategy: How they reach a query; None for the checkpoint's default.
        """
        settings = {"num_demonstrations": num_demonstrations, "selection": selection, "strategy": strategy}
        return self.model_copy(update={"bank": bank, **settings})

    def for_documents(self) -> EpicEmbedding:
        """Return a copy with only the settings that documents depend on, for an IngestionPipeline.

        An IngestionPipeline caches under every field of its transformations. This copy has no bank, task or
        instruction, so cache entries stay valid when these change. For a symmetric task it is a plain copy.
        """
        if self.symmetric:
            return self.model_copy()
        return self.model_copy(update={name: type(self).model_fields[name].default for name in _PROMPT_FIELDS})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> EpicEmbedding:
        """Return a copy; changed fields are validated and the fingerprint is computed again.

        Args:
            update: Fields to change.
            deep: Whether to copy field values; weights are shared in any case.
        """
        if not update:
            return super().model_copy(deep=deep)
        fields = {name: getattr(self, name) for name in type(self).model_fields if name != "fingerprint"}
        return type(self).model_validate({**fields, **update}, context=self._lazy)

    def model_post_init(self, context: Any, /) -> None:
        """Load at once, so that a mistake shows where it is made and `to_dict` has the fingerprint.

        Args:
            context: The LazyEncoder of the embedding that this is a copy of; used if it has the same settings.
        """
        settings = self._fields(_ENCODER_FIELDS)
        shared = isinstance(context, LazyEncoder) and context.settings == settings
        self._lazy = context if shared else LazyEncoder(settings)
        self._ready()

    def __getstate__(self) -> dict[Any, Any]:
        """Return the fields only.

        BaseComponent's method would pickle the weights to find out if that works, and delete from the live object
        whatever cannot be pickled.
        """
        fields = dict(self.__dict__)
        for name in ("callback_manager", "rate_limiter", "embeddings_cache"):
            try:
                pickle.dumps(fields[name])
            except Exception:  # raised by third-party objects
                logger.warning("%s of %s cannot be pickled. The copy has none.", name, self.class_name())
                del fields[name]
        return {
            "__dict__": fields,
            "__pydantic_extra__": None,
            "__pydantic_fields_set__": set(self.__pydantic_fields_set__),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the fields; weights are loaded, and the fingerprint compared, at the first use.

        BaseComponent's method runs `__init__` and swallows its errors. Raising here would be worse: a multiprocessing
        pool whose worker cannot unpickle its task waits forever.
        """
        fields = _upgrade(state["__dict__"])
        for name, field in type(self).model_fields.items():
            if name not in fields:
                fields[name] = field.get_default(call_default_factory=True)
        BaseModel.__setstate__(self, {**state, "__dict__": fields, "__pydantic_private__": {"_prompt": None}})
        self._lazy = LazyEncoder(self._fields(_ENCODER_FIELDS))

    def _fields(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    # -- encoder, prompt and fingerprints -----------------------------------------------------------------

    @property
    def encoder(self) -> EpicEncoder:
        """The encoder. It is not thread-safe: use it only while this object is idle."""
        return self._lazy.load()

    @property
    def symmetric(self) -> bool:
        """True if documents are embedded like queries, as in paraphrase search and clustering."""
        return is_symmetric(self._ready())

    @property
    def document_fingerprint(self) -> str:
        """Identifies everything that changes a document's vector: keep it beside stored vectors.

        It is the encoder's fingerprint, because task, instruction and demonstrations do not change documents; for a
        symmetric task it is the whole `fingerprint`.
        """
        symmetric = self.symmetric
        return str(self.fingerprint) if symmetric else _encoder_part(str(self.fingerprint))

    def check_documents(self, fingerprint: str | None) -> None:
        """Compare with the fingerprint that was kept beside stored vectors.

        Args:
            fingerprint: `document_fingerprint` of the embedding that made them; None if nothing was kept.

        Raises:
            FingerprintError: If they differ.
        """
        if fingerprint != self.document_fingerprint:
            raise FingerprintError(
                f"The stored vectors were made under {fingerprint}, but this EpicEmbedding (model {self.model!r}) has "
                f"{self.document_fingerprint}. Load the model that made them, or embed the documents again."
            )

    def _ready(self) -> QueryPrompt:
        """Load encoder and bank on the first call, compare with a stored fingerprint and return the prompt."""
        with self._lazy.lock:
            if self._prompt is not None:
                return self._prompt
            encoder = self._lazy.load()
            prompt = load_prompt(QueryPrompt(**self._fields(_PROMPT_FIELDS)))
            current = f"{encoder.fingerprint}-{_query_fingerprint(prompt)}"
            if self.fingerprint is not None:
                self._compare(self.fingerprint, current, symmetric=is_symmetric(prompt))
            # Frozen for users; these two follow from the other fields.
            derived = {"model_name": encoder.name, "fingerprint": current}
            self.__dict__.update(derived)
            self.__pydantic_fields_set__.update(derived)
            self._prompt = prompt
            return prompt

    def _compare(self, stored: str, current: str, *, symmetric: bool) -> None:
        if stored in (current, _encoder_part(current)):
            return
        if _encoder_part(stored) != _encoder_part(current):
            raise FingerprintError(
                f"This EpicEmbedding was saved with encoder {_encoder_part(stored)}, but model {self.model!r} is now "
                f"{_encoder_part(current)}. Load the old checkpoint with from_dict(data, model=FOLDER), or accept the "
                "new one with from_dict(data, fingerprint=None) and embed the documents again."
            )
        if symmetric:
            raise FingerprintError(
                f"This EpicEmbedding was saved as {stored} and is now {current}. In a symmetric task, instruction and "
                "demonstrations are part of every document's vector. Restore them, or accept the new ones with "
                "from_dict(data, fingerprint=None) and embed the documents again."
            )
        # The bank was edited, or from_dict was given another one, as demonstrations are meant to be used.
        logger.info("Query settings changed from %s to %s. Document vectors stay valid.", stored, current)

    # -- vectors ------------------------------------------------------------------------------------------

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._embed("query", [query])[0]

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return (await self._aembed("query", [query]))[0]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._embed("document", [text])[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return (await self._aembed("document", [text]))[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self._embed("document", texts)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await self._aembed("document", texts)

    async def _aembed(self, role: Role, texts: list[str]) -> list[Embedding]:
        return await asyncio.get_running_loop().run_in_executor(self._lazy.thread, self._embed, role, texts)

    def _embed(self, role: Role, texts: list[str]) -> list[Embedding]:
        """Return one vector per text, from the cache where it has one."""
        prompt = self._ready()
        cache: RoleKeyedCache | None = self.embeddings_cache
        if cache is None:
            return self._lazy.embed(role, texts, prompt)
        key = str(self.fingerprint) if role == "query" else self.document_fingerprint
        names = [*texts]
        if role == "document" and not is_symmetric(prompt):
            # Earlier versions cut long texts under the same key.
            with self._lazy.lock:
                encoder = self._lazy.load()
                names = [text if len(encoder.windows(text)) == 1 else f"windows\0{text}" for text in texts]
        found = cache.lookup(role, key, names)
        missing = [number for number, vector in enumerate(found) if vector is None]
        fresh = self._lazy.embed(role, [texts[number] for number in missing], prompt)
        cache.store_vectors(role, key, [names[number] for number in missing], fresh)
        remaining = iter(fresh)
        return [next(remaining) if vector is None else vector for vector in found]


def _upgrade(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a stored embedding with settings of earlier versions replaced; new ones are unchanged."""
    values = dict(fields)
    stored = values.get("fingerprint")
    if stored is None:
        return values
    if values.get("task") is not None and values.get("bank") is None and values.get("num_demonstrations"):
        values["bank"] = get_task(values["task"]).bank  # a task used to bring its demonstrations
    if values.get("strategy") == "none":
        # Without the part of the query settings, only the encoder is compared: the vectors are the same.
        values.update(strategy=None, num_demonstrations=0, fingerprint=_encoder_part(stored))
    if values.get("selection") == "nearest-early":
        values["selection"] = "nearest"
    return values


def _query_fingerprint(prompt: QueryPrompt) -> str:
    """Return a short hash of everything but the encoder that a query's vector depends on.

    Device and dtype are left out: they change a vector by rounding only, and an index that was made on a GPU has to
    be readable on a laptop.

    Args:
        prompt: The prompt, with its bank loaded.
    """
    bank, used = prompt.bank, prompt.num_demonstrations or 0
    task = None if prompt.task is None else get_task(prompt.task)
    facts: dict[str, Any] = {
        "task": None if task is None else [task.name, task.instruction, task.symmetric],
        "instruction": prompt.instruction,
        "bank": None,
        "num_demonstrations": used,
        "selection": prompt.selection,
    }
    if isinstance(bank, DemonstrationBank):
        used = bank.number_used(prompt.num_demonstrations)
        if used > len(bank):
            raise PromptError(f"num_demonstrations is {used}, but the bank has {len(bank)}. Use at most {len(bank)}.")
        facts.update(bank=bank.fingerprint, num_demonstrations=used)
        if task is not None and prompt.instruction is None and bank.instruction not in (None, task.instruction):
            facts["precedence"] = "task"  # earlier versions took the bank's instruction
    if prompt.strategy is not None:  # absent otherwise, so that fingerprints from before this field stay valid
        facts["strategy"] = prompt.strategy
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


def _encoder_part(fingerprint: str) -> str:
    return fingerprint.partition("-")[0]
