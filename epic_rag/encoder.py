"""`EpicEncoder`: texts in, unit vectors out, with or without demonstrations."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from epic_rag import checkpoints as _storage
from epic_rag._early import EarlyChoice
from epic_rag._int8 import dtype_of
from epic_rag.backbone import Backbone, hash_tensors
from epic_rag.batching import DeviceNames, Replicas, batch_tokens, embed_queries, made_ahead
from epic_rag.demonstrations import DemonstrationBank, Selection, find_bank, unit_rows
from epic_rag.prefix_cache import PrefixCache
from epic_rag.prompt import EncoderInput, Prefix, PromptBuilder, Strategy
from epic_rag.task_vector import QueryStrategy, known_strategy, moved
from epic_rag.tasks import get_task

__all__ = ["BuiltBanks", "EpicEncoder", "count_shown", "embedded_pairs", "rows_behind", "rows_to_choose_by"]


# --- from _showing
# Model inputs of queries behind demonstrations, as vectors or as texts.

logger = logging.getLogger(__name__)


def count_shown(encoder: EpicEncoder, bank: DemonstrationBank, asked: int | None, strategy: QueryStrategy) -> int:
    """How many demonstrations of a bank to show: as many as were asked for, or as many as the encoder can use."""
    if strategy == "task-vector":  # a mean has no length that was trained
        return len(bank) if asked is None else asked
    trained = int(encoder.settings.get("max_demonstrations") or len(bank))
    if asked is None:
        return min(len(bank), trained)
    if asked > trained:
        logger.warning("asked for %d demonstrations, %s was trained with up to %d", asked, encoder.name, trained)
    return asked


def rows_to_choose_by(
    prompt: PromptBuilder, texts: Sequence[str], instruction: str | None, selection: Selection
) -> list[EncoderInput]:
    """The queries' rows without demonstrations, if these are chosen for each query; else none."""
    if selection not in ("nearest", "nearest-early"):
        return []
    return prompt.queries(prompt.prefix(instruction), texts)


def rows_behind(
    prompt: PromptBuilder,
    banks: Sequence[DemonstrationBank],
    texts: Sequence[str],
    zero_shot: Sequence[EncoderInput],
    instruction: str | None,
    strategy: Strategy,
    fingerprint: str,
) -> tuple[list[EncoderInput], list[torch.Tensor] | None]:
    """Each text behind its own bank's demonstrations; all banks have one size.

    Args:
        prompt: Makes the rows.
        banks: A bank for each text.
        texts: The queries.
        zero_shot: The texts' rows without demonstrations if they are tokenised already, or none.
        instruction: What stands before everything.
        strategy: "epic" for vectors, else texts.
        fingerprint: The encoder's.

    Returns:
        The rows, and for "epic" each row's (2k, dim) slot vectors: one tensor for a bank that is shown to all, which
        is how it is seen that the prompt is shared.

    Raises:
        PromptError: If the prompt does not fit.
        FingerprintError: If a bank has no vectors of this encoder.
    """
    if strategy == "epic":
        prefix = prompt.prefix(instruction, num_slots=len(banks[0]))
        tokenised = bool(zero_shot) and bool(instruction)
        rows = prompt.behind(prefix, zero_shot) if tokenised else prompt.queries(prefix, texts)
        vectors = {id(bank): torch.from_numpy(bank.require(fingerprint)).flatten(0, 1) for bank in banks}
        return rows, [vectors[id(bank)] for bank in banks]
    prefixes: dict[int, Prefix] = {}
    rows = []
    for bank, text in zip(banks, texts, strict=True):
        if id(bank) not in prefixes:
            pairs = [(item.query, item.passage) for item in bank.demonstrations]
            prefixes[id(bank)] = prompt.prefix(instruction, demonstrations=pairs, strategy=strategy)
        rows.extend(prompt.queries(prefixes[id(bank)], [text]))
    return rows, None


# --- from _banks
# Banks with the vectors of an encoder that is not the one they were saved with.

_KEPT = 16


class BuiltBanks:
    """The banks that were embedded last, by the encoder's and the bank's fingerprint."""

    def __init__(self) -> None:
        self._banks: OrderedDict[str, DemonstrationBank] = OrderedDict()

    def __len__(self) -> int:
        return len(self._banks)

    def clear(self) -> None:
        """Forget all."""
        self._banks.clear()

    def get(self, encoder: EpicEncoder, bank: DemonstrationBank) -> DemonstrationBank:
        """The bank with this encoder's vectors; the caller's bank is left as it is."""
        if bank.embeddings is not None and bank.encoder_fingerprint == encoder.fingerprint:
            return bank
        key = f"{encoder.fingerprint}-{bank.fingerprint}"
        if key not in self._banks:
            # A copy of the whole bank; it says so in the log if it replaces another checkpoint's vectors.
            self._banks[key] = bank.select(len(bank)).build(encoder)
            while len(self._banks) > _KEPT:
                self._banks.popitem(last=False)
        self._banks.move_to_end(key)
        return self._banks[key]


def embedded_pairs(encoder: EpicEncoder, bank: DemonstrationBank, instruction: str) -> npt.NDArray[np.float32]:
    """See `EpicEncoder.embed_demonstrations`."""
    width = encoder.backbone.dimension
    queries = [item.query for item in bank.demonstrations]
    passages = [item.passage for item in bank.demonstrations]
    left = encoder.encode_query(queries, instruction=instruction, truncate_dim=width)
    if bank.symmetric:
        right = encoder.encode_query(passages, instruction=instruction, truncate_dim=width)
    else:
        right = encoder.encode_document(passages, truncate_dim=width)
    return np.stack([left, right], axis=1)


Vectors = npt.NDArray[np.float32]

# Documents that are sorted by length together.
_BLOCK = 4096


class EpicEncoder:
    """A text encoder that reads demonstrations as their own embeddings.

    Make one with `from_pretrained`. An encoder is not safe to share between threads without a lock.

    Args:
        backbone: Transformer, projector and pooling.
        prompt: Tokenizer, template and length limits.
        name: What to call the checkpoint in messages.
        source: What `from_pretrained` takes to make it again.
        settings: The rest of `epic.json` (temperature, training record, default instruction, ...).

    Attributes:
        padding_side: "right", or "left" for causal models. Vectors do not depend on it.
        max_batch_tokens: Most padded tokens in one forward pass.
        prefix_cache: Keys and values of the prompts used last (causal models); None computes each prompt every time.
        replicas: Copies of the model on further devices.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompt: PromptBuilder,
        *,
        name: str = "unnamed",
        source: str = "",
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.backbone = backbone
        self.prompt = prompt
        self.name = name
        self.source = source
        self.settings: dict[str, Any] = dict(settings or {})
        self.truncate_dim: int | None = None
        self.padding_side: Literal["left", "right"] = "right"
        self.max_batch_tokens = batch_tokens(backbone.device)
        self.prefix_cache: PrefixCache | None = PrefixCache()
        self.replicas = Replicas()
        self._fingerprint: str | None = None
        self._banks = BuiltBanks()
        self._early = EarlyChoice()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] | None = None,
        *,
        device: DeviceNames | None = None,
        dtype: str | torch.dtype | None = None,
        num_layers: int | None = None,
        adapter: str | os.PathLike[str] | None = None,
        gguf_file: str | None = None,
        pooling: str | None = None,
        projector: str | None = None,
        max_query_tokens: int | None = None,
        max_document_tokens: int | None = None,
        truncate_dim: int | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> EpicEncoder:
        """Load an encoder.

        Args:
            name_or_path: A shipped checkpoint ("epic-minilm"), a local folder (an epic-rag checkpoint, a plain
                Hugging Face or sentence-transformers folder), or a hub name. None loads the shipped default.
            device: "cpu", "cuda:1", "mps", ...; several of them, in a list or with commas between, share the batches.
                None takes a GPU if there is one.
            dtype: "float32", "bfloat16" or "float16"; "int8" rounds products on a CPU with VNNI. None means float32 on
                a CPU and bfloat16 on a GPU, "auto" bfloat16 on a CPU that has instructions for it, too.
            num_layers: Keep the first N layers only.
            adapter: Folder of a PEFT adapter, merged into the weights.
            gguf_file: Name of a GGUF file in the folder.
            pooling: "last", "mean" or "cls"; None takes the checkpoint's, or what fits the attention.
            projector: "scale", "linear" or "mlp" for a model that has no trained projector yet.
            max_query_tokens: Longest query in tokens, without its prompt.
            max_document_tokens: Longest document in tokens.
            truncate_dim: Keep the first N dimensions and renormalise; None takes the checkpoint's.
            trust_remote_code: Allow Python code in the folder to run.
            revision: Commit or tag on the hub.
            local_files_only: Never ask the hub.

        Raises:
            CheckpointError: If there is no such checkpoint or it does not load.
            ConfigError: If a setting cannot work with it.
            MissingExtraError: If a GGUF file or adapter needs a package that is not installed.
        """
        return _storage.load(
            cls,
            name_or_path,
            device=device,
            dtype=dtype,
            num_layers=num_layers,
            adapter=adapter,
            gguf_file=gguf_file,
            pooling=pooling,
            projector=projector,
            max_query_tokens=max_query_tokens,
            max_document_tokens=max_document_tokens,
            truncate_dim=truncate_dim,
            trust_remote_code=trust_remote_code,
            revision=revision,
            local_files_only=local_files_only,
        )

    def save_pretrained(self, folder: str | os.PathLike[str], *, dtype: str | None = None) -> None:
        """Write a checkpoint folder that `from_pretrained` opens, and `AutoModel` and `SentenceTransformer` too.

        Args:
            folder: Made if it is missing; a checkpoint in it is replaced.
            dtype: Weight dtype on disk; None keeps the current one. "int8" rounds each row of a matrix to int8 and a
                scale: the smallest folder, and the one kind that only `from_pretrained` reads.

        Raises:
            CheckpointError: If the folder cannot be made, or weights for int8 are not finite.
            ConfigError: If the dtype is unknown.
        """
        _storage.save(self, Path(folder).expanduser(), dtype)

    @property
    def dimension(self) -> int:
        """Width of the vectors that come out."""
        return self.truncate_dim or self.backbone.dimension

    @property
    def device(self) -> torch.device:
        """Where the model runs; the first device of several."""
        return self.backbone.device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Every device that the model runs on."""
        return (self.device, *self.replicas.others)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; vectors are float32 always."""
        return dtype_of(self.backbone.transformer)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self.prompt.tokenizer

    @property
    def max_query_tokens(self) -> int:
        """Longest query in tokens, special tokens counted, prompt not."""
        return self.prompt.max_query_tokens

    @property
    def max_document_tokens(self) -> int:
        """Longest document in tokens, special tokens counted."""
        return self.prompt.max_document_tokens

    @property
    def default_instruction(self) -> str | None:
        """The instruction of a query for which none is given; None for a model that was not trained with one."""
        value = self.settings.get("default_instruction")
        return None if value is None else str(value)

    @property
    def strategy(self) -> QueryStrategy:
        """How demonstrations reach a query for which no strategy is given."""
        return known_strategy(self.settings.get("strategy", "epic"))

    @property
    def fingerprint(self) -> str:
        """Short hash of everything that decides a vector: weights, projector, template, pooling, lengths, width."""
        if self._fingerprint is None:
            self._fingerprint = hash_tensors(self.backbone.state_dict().items())
        return _storage.fingerprint(self, self._fingerprint)

    def forget_fingerprint(self) -> None:
        """Say that weights have changed, so that the fingerprint is made anew and no cached vector is reused."""
        self._fingerprint = None
        self._banks.clear()
        self.replicas.clear()
        self._early.clear()
        if self.prefix_cache is not None:
            self.prefix_cache.clear()

    def encode_query(
        self,
        texts: str | Sequence[str],
        *,
        task: str | None = None,
        bank: DemonstrationBank | str | os.PathLike[str] | None = None,
        instruction: str | None = None,
        num_demonstrations: int | None = None,
        selection: Selection = "first",
        strategy: QueryStrategy | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
        truncate_dim: int | None = None,
    ) -> Vectors:
        """Encode queries.

        Args:
            texts: A query or a list of queries.
            task: Name of a known task; gives the instruction and, for demonstrations, the built-in bank.
            bank: A bank, a bank folder, or the name of a built-in bank.
            instruction: Overrides the task's or the bank's; "" for none at all.
            num_demonstrations: How many to show. None shows all of `bank`, up to the number that the checkpoint was
                trained with, and none where only a task is named.
            selection: How they are picked from the bank; "nearest" picks for each query its own, "nearest-early" by
                the first third of the layers, which costs less.
            strategy: "epic" shows vectors, "text" shows the texts (for comparison), "none" shows nothing;
                "task-vector" moves the query by the mean difference of passages and queries, at no cost (see
                `epic_rag.task_vector`). None takes the checkpoint's own, `strategy`.
            batch_size: Most rows in a batch; None lets token counts decide.
            show_progress: Whether to draw a progress bar.
            truncate_dim: Overrides the encoder's own setting for this call.

        Returns:
            float32 unit rows (n, dimension), in order; (dimension,) for a single string.

        Raises:
            TaskError: If the task is unknown.
            BankError: If the bank is missing or malformed.
            ConfigError: If the batch size or the width cannot work.
            PromptError: If there are fewer demonstrations than asked for, the prompt does not fit, or the strategy
                or the selection is unknown.
        """
        strategy = self.strategy if strategy is None else known_strategy(strategy)
        chosen = find_bank(task, bank, num_demonstrations)
        default = self._instruction(task, chosen)
        instruction = default if instruction is None else instruction
        k = 0 if chosen is None or strategy == "none" else count_shown(self, chosen, num_demonstrations, strategy)
        items = [texts] if isinstance(texts, str) else list(texts)
        if not items or chosen is None or k == 0:
            rows = self.prompt.queries(self.prompt.prefix(instruction), items)
            vectors = self._embed(rows, None, batch_size, show_progress)
        elif strategy == "task-vector":
            rows = self.prompt.queries(self.prompt.prefix(instruction), items)
            vectors = self._embed(rows, None, batch_size, show_progress)
            built = self._banks.get(self, chosen)
            banks = self._choose(built, k, len(items), rows, selection, batch_size, vectors)
            vectors = moved(vectors, banks, self.fingerprint)
        else:
            by_vectors = strategy == "epic" or selection in ("diverse", "nearest", "nearest-early")
            built = self._banks.get(self, chosen) if by_vectors else chosen
            zero_shot = rows_to_choose_by(self.prompt, items, instruction, selection)
            banks = self._choose(built, k, len(items), zero_shot, selection, batch_size)
            rows, slots = rows_behind(self.prompt, banks, items, zero_shot, instruction, strategy, self.fingerprint)
            vectors = self._embed(rows, slots, batch_size, show_progress)
        return self._finish(vectors, texts, truncate_dim)

    def encode_document(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int | None = None,
        show_progress: bool = False,
        truncate_dim: int | None = None,
    ) -> Vectors:
        """Encode documents: bare texts, which no instruction and no demonstration ever touches.

        Args:
            texts: A document or a list of documents.
            batch_size: Most rows in a batch; None lets token counts decide.
            show_progress: Whether to draw a progress bar.
            truncate_dim: Overrides the encoder's own setting for this call.

        Returns:
            float32 unit rows (n, dimension), in order; (dimension,) for a single string.
        """
        items = [texts] if isinstance(texts, str) else list(texts)
        # While one block is embedded the next one is tokenised; and only two are in memory as tokens.
        blocks = made_ahead(self.prompt.documents, items, _BLOCK)
        found = [self._embed(rows, None, batch_size, show_progress) for rows in blocks]
        return self._finish(np.concatenate(found), texts, truncate_dim)

    def choose_demonstrations(
        self, texts: Sequence[str], bank: DemonstrationBank, k: int, *, selection: Selection = "nearest"
    ) -> list[DemonstrationBank]:
        """The demonstrations that `encode_query` shows to each query, given the bank's instruction.

        Raises:
            PromptError: See `encode_query`.
        """
        zero_shot = rows_to_choose_by(self.prompt, texts, self._instruction(None, bank), selection)
        return self._choose(self._banks.get(self, bank), k, len(texts), zero_shot, selection, None)

    def embed_demonstrations(self, bank: DemonstrationBank) -> Vectors:
        """Vectors of a bank's demonstrations.

        Returns:
            (k, 2, dim) float32 at full width: query (zero-shot, with the bank's instruction), passage.
        """
        return embedded_pairs(self, bank, self._instruction(None, bank) or "")

    def similarity(self, a: npt.ArrayLike, b: npt.ArrayLike) -> Vectors:
        """Cosine similarity of every row of `a` with every row of `b`.

        Args:
            a: (n, dim) or (dim,) vectors, of any length above zero.
            b: (m, dim) or (dim,) vectors.

        Returns:
            (n, m) float32.
        """
        left, right = (np.atleast_2d(np.asarray(side, dtype=np.float32)) for side in (a, b))
        result: Vectors = unit_rows(left) @ unit_rows(right).T
        return result

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Token count of each text by the encoder's own tokenizer, special tokens not counted."""
        return [len(ids) for ids in self.prompt.token_ids(texts)]

    def _instruction(self, task: str | None, bank: DemonstrationBank | None) -> str | None:
        fallback = get_task(task).instruction if task is not None else self.default_instruction
        return bank.instruction if bank is not None and bank.instruction is not None else fallback

    def _choose(
        self,
        bank: DemonstrationBank,
        k: int,
        count: int,
        zero_shot: Sequence[EncoderInput],
        selection: Selection,
        batch_size: int | None,
        vectors: Vectors | None = None,
    ) -> list[DemonstrationBank]:
        if selection == "nearest-early":
            own = self._instruction(None, bank)
            return self._early.banks(self, bank, k, zero_shot, instruction=own, batch_size=batch_size)
        if selection == "nearest":
            found = self._embed(zero_shot, None, batch_size, False) if vectors is None else vectors
            return [bank.select(k, method="nearest", query_embedding=vector) for vector in found]
        return [bank.select(k, method=selection)] * count

    def _embed(
        self,
        rows: Sequence[EncoderInput],
        slots: Sequence[torch.Tensor] | None,
        batch_size: int | None,
        show_progress: bool,
    ) -> Vectors:
        return embed_queries(
            self.backbone,
            rows,
            slots,
            cache=self.prefix_cache,
            pad_id=self.prompt.pad_id,
            padding_side=self.padding_side,
            max_tokens=self.max_batch_tokens,
            max_rows=batch_size,
            show_progress=show_progress,
            others=self.replicas.worth(self.backbone, sum(len(row.ids) for row in rows)),
        )

    def _finish(self, vectors: Vectors, texts: str | Sequence[str], truncate_dim: int | None) -> Vectors:
        width = _storage.checked_dim(truncate_dim, self.backbone) or self.dimension
        if width < vectors.shape[1]:
            vectors = unit_rows(vectors[:, :width])
        return vectors[0] if isinstance(texts, str) else vectors
