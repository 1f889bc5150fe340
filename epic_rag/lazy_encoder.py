"""`LazyEncoder`: an encoder behind the embedding classes of LlamaIndex, LangChain and Haystack.

These classes are copied, pickled, and called from threads and event loops. Their settings are plain values; the
encoder is loaded with its first use, shared by copies, and called by one thread at a time.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from epic_rag.demonstrations import DemonstrationBank
from epic_rag.embedding_model import Role
from epic_rag.encoder import EpicEncoder
from epic_rag.errors import FingerprintError, PromptError
from epic_rag.query_prompt import QueryPrompt
from epic_rag.tasks import get_task

__all__ = ["LazyEncoder", "encoder_settings", "is_symmetric", "load_prompt"]


class LazyEncoder:
    """An encoder that is loaded at its first use, with the lock and the thread of its callers.

    A copy is the same object: weights are read-only. A pickle has the settings and the fingerprint.

    Args:
        settings: Arguments of `EpicEncoder.from_pretrained`; its first one is called "model".
        encoder: The encoder, if it is loaded already.
        fingerprint: Required fingerprint; None for any.
    """

    def __init__(
        self, settings: Mapping[str, Any], encoder: EpicEncoder | None = None, fingerprint: str | None = None
    ) -> None:
        self.settings = settings
        self.fingerprint = fingerprint
        # Re-entrant: callers hold it while they encode, and loading happens inside. EpicEncoder is not thread-safe.
        self.lock = threading.RLock()
        # One thread for async callers. Not `asyncio.to_thread`: frameworks start all batches at once, and each would
        # block a thread of the event loop's shared pool while it waits for the lock. A single thread also keeps
        # torch to one team of OpenMP workers. It starts with the first call.
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="epic-embedding")
        self._encoder = encoder

    def load(self) -> EpicEncoder:
        """Return the encoder; load it first if necessary.

        Raises:
            CheckpointError: If the checkpoint is missing or broken.
            FingerprintError: If it has another fingerprint than the required one.
        """
        with self.lock:
            if self._encoder is None:
                options = dict(self.settings)
                encoder = EpicEncoder.from_pretrained(options.pop("model"), **options)
                if self.fingerprint is not None and encoder.fingerprint != self.fingerprint:
                    raise FingerprintError(
                        f"{encoder.name} has fingerprint {encoder.fingerprint}, but {self.fingerprint} was saved. "
                        "Load the old checkpoint, or make a new object and embed the documents again."
                    )
                self._encoder = encoder
            return self._encoder

    def embed(self, role: Role, texts: Sequence[str], prompt: QueryPrompt) -> list[list[float]]:
        """Embed texts one call at a time.

        Documents are embedded bare, long ones in windows; in a symmetric task they are embedded like queries.

        Args:
            role: What the texts are.
            texts: The texts.
            prompt: The prompt of queries, with its bank loaded.
        """
        with self.lock:
            encoder = self.load()
            if role == "document" and not is_symmetric(prompt):
                rows = encoder.encode_document(texts, long_texts="windows")
            else:
                rows = encoder.encode_query(texts, prompt)
        vectors: list[list[float]] = rows.tolist()
        return vectors

    async def aembed(self, role: Role, texts: Sequence[str], prompt: QueryPrompt) -> list[list[float]]:
        """Embed texts as `embed` does, in the thread of async callers."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, self.embed, role, texts, prompt)

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyEncoder:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        fingerprint = self.fingerprint if self._encoder is None else self._encoder.fingerprint
        return type(self), (self.settings, None, fingerprint)


def encoder_settings(encoder: EpicEncoder) -> dict[str, Any]:
    """Return the settings that load an encoder again."""
    return {
        "model": encoder.source,
        "max_query_tokens": encoder.max_query_tokens,
        "max_document_tokens": encoder.max_document_tokens,
        "device": ",".join(map(str, encoder.devices)),
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "truncate_dim": encoder.truncate_dim,
    }


def load_prompt(prompt: QueryPrompt) -> QueryPrompt:
    """Return a prompt with its bank loaded.

    Raises:
        BankError: If the bank is missing or malformed.
        PromptError: If the bank has fewer demonstrations than the prompt asks for.
        TaskError: If the task is unknown.
    """
    if prompt.task is not None:
        get_task(prompt.task)
    bank, wanted = prompt.resolve_bank(), prompt.num_demonstrations
    if bank is not None and wanted is not None and wanted > len(bank):
        raise PromptError(f"num_demonstrations is {wanted}, but the bank has {len(bank)}. Use at most {len(bank)}.")
    return replace(prompt, bank=bank)


def is_symmetric(prompt: QueryPrompt) -> bool:
    """Return whether documents are embedded like queries: by the prompt's task, or else by its loaded bank."""
    return prompt.is_symmetric(prompt.bank if isinstance(prompt.bank, DemonstrationBank) else None)
