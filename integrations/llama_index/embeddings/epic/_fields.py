"""The declared fields of `EpicEmbedding`, and how they are read and written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import (
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_serializer,
    field_validator,
    model_validator,
)
from llama_index.core.storage.kvstore.types import BaseKVStore

from epic_rag.checkpoints import DEFAULT_CHECKPOINT
from epic_rag.demonstrations import DemonstrationBank, Selection
from epic_rag.errors import BankError
from epic_rag.task_vector import QueryStrategy
from llama_index.embeddings.epic._cache import RoleKeyedCache

__all__ = ["EpicFields"]

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
