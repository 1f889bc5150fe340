"""`EpicEncoder`: texts in, unit vectors out, with or without demonstrations.

The way of a query: `encode_query` resolves instruction and demonstrations, `PromptBuilder.queries` tokenises the texts
behind the prompt, `batching.embed` batches them, `Backbone.forward` embeds a batch. Demonstrations reach the query in
the prompt (strategies "epic" and "text") or move its vector (`reader`, `task_vector`).

In a process without torch, a handful of texts is embedded by `NumpyBert`, if it can run the checkpoint. The backbone is
then loaded when it is needed: for more texts, for slots, or by `backbone`, `device`, `save_pretrained` and others.

Models that are no checkpoint of epic-rag and need more than a backbone are run by an `EmbeddingModel`: folders of
sentence-transformers with prompts or modules of their own, ONNX files, and remote models.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt
from typing_extensions import Unpack

from epic_rag.checkpoints import (
    EPIC_FILE,
    EncoderConfig,
    check_width,
    fingerprint_of,
    identify,
    is_trusted,
    read_epic_file,
    resolve,
)
from epic_rag.demonstrations import DemonstrationBank, Selection
from epic_rag.embedded_banks import EmbeddedBanks
from epic_rag.embedding_model import EmbeddingModel, Fact, Role, is_remote, refuse_options, split_onnx
from epic_rag.errors import ConfigError, PromptError
from epic_rag.long_texts import SPECIAL_TOKENS, divide, mean_of_windows
from epic_rag.metrics import unit_rows
from epic_rag.numpy_bert import NumpyBert, open_numpy_bert
from epic_rag.prompt import EncoderInput, LongTexts, PromptBuilder, check_strings, prefetch
from epic_rag.query_prompt import PromptSettings, QueryPrompt, QueryStrategy
from epic_rag.reader import READER_FILE, DemonstrationReader
from epic_rag.task_vector import apply_task_vector

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from epic_rag.backbone import Backbone
    from epic_rag.batching import DeviceNames, Replicas
    from epic_rag.checkpoint_io import Checkpoint
    from epic_rag.prefix_cache import PrefixCache

__all__ = ["EpicEncoder"]

Vectors = npt.NDArray[np.float32]
Backend = Literal["native", "sentence-transformers"]
logger = logging.getLogger(__name__)

# Documents that are sorted by length together.
_BLOCK = 4096


class EpicEncoder:
    """A text encoder that reads demonstrations as their own embeddings.

    Make one with `from_pretrained`. An encoder is not safe to share between threads without a lock.

    Args:
        backbone: Transformer, projector and pooling; or a model of another library or service.
        prompt: Tokenizer, template and length limits; None for such a model.
        name: Name of the checkpoint in messages.
        source: Argument of `from_pretrained` that makes it again.
        config: The other settings of `epic.json` (default instruction, strategy, training record, ...).

    Attributes:
        config: These settings.
        external: The model of another library or service that embeds texts; None for a checkpoint of epic-rag.
        takes_instructions: Whether queries are put behind an instruction; a model that was not trained to follow one
            ignores those of tasks and banks.
        folder: The model's files, and its reader; None for a model without files.
        truncate_dim: Number of dimensions to keep; None for all.
        padding_side: "right", or "left" for causal models. Vectors do not depend on it.
    """

    def __init__(
        self,
        backbone: Backbone | NumpyBert | EmbeddingModel,
        prompt: PromptBuilder | None,
        *,
        name: str = "unnamed",
        source: str = "",
        config: EncoderConfig | None = None,
    ) -> None:
        self._numpy: NumpyBert | None = None
        self.external: EmbeddingModel | None = None
        if isinstance(backbone, NumpyBert):
            self._numpy = backbone
        elif isinstance(backbone, EmbeddingModel):
            self.external = backbone
        else:
            self.backbone = backbone
        if prompt is not None:
            self.prompt = prompt
        self.name = name
        self.source = source
        self.config = EncoderConfig() if config is None else config
        self.takes_instructions = self.external is None or self.external.takes_instructions
        self.truncate_dim: int | None = None
        self.padding_side: Literal["left", "right"] = "right"
        self._load: Callable[[], tuple[Checkpoint, list[torch.device]]] | None = None
        self._weights_hash: str | None = None
        self._banks = EmbeddedBanks()
        self.folder: Path | None = None
        self._noted: set[str] = set()

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
        backend: Backend | None = None,
    ) -> EpicEncoder:
        """Load an encoder.

        In a process that has not imported torch, a BERT checkpoint of epic-rag is opened without it, unless an argument
        asks for more than the CPU in float32. It embeds a handful of texts with numpy, and loads what the other
        arguments say when there are more.

        Args:
            name_or_path: A shipped checkpoint ("epic-minilm"), a local folder (an epic-rag checkpoint, a Hugging Face,
                sentence-transformers or model2vec folder), a hub name, `onnx:FOLDER_OR_NAME[@FILE]`, or a remote model
                (`openai:NAME@URL`, `ollama:NAME`, `tei:URL`, `cohere:NAME`; see `epic_rag.remote_model`). None loads
                the shipped default.
            device: "cpu", "cuda:1", "mps", ...; several of them, in a list or with commas between, share the batches.
                None takes a GPU if there is one.
            dtype: "float32", "bfloat16" or "float16". None means float32 on a CPU and bfloat16 on a GPU; "auto"
                means bfloat16 also on a CPU that multiplies it in hardware.
            num_layers: Keep the first N layers only.
            adapter: Folder of a PEFT adapter, merged into the weights.
            gguf_file: Name of a GGUF file in the folder.
            pooling: "last", "mean" or "cls"; None takes the checkpoint's, or the default of its kind of attention.
            projector: "scale", "linear" or "mlp" for a model that has no trained projector yet.
            max_query_tokens: Longest query in tokens, without its prompt.
            max_document_tokens: Longest document in tokens.
            truncate_dim: Keep the first N dimensions and renormalise; None takes the checkpoint's.
            trust_remote_code: Allow Python code in the folder to run; EPIC_RAG_TRUST_REMOTE_CODE may name it, too.
            revision: Commit or tag on the hub.
            local_files_only: Use only what was downloaded before, without network access.
            backend: "native" runs the transformer by epic-rag, as training and prompts with demonstrations need it;
                "sentence-transformers" by that library. None takes the former where it gives the same vectors.

        Raises:
            CheckpointError: If there is no such checkpoint or it does not load.
            ConfigError: If a setting cannot work with it.
            MissingExtraError: If a GGUF file, an adapter or a model needs a package that is not installed.
            RemoteModelError: If a remote model does not answer.
        """
        onnx = split_onnx(name_or_path)
        trust_remote_code = trust_remote_code or is_trusted(name_or_path)
        changes = {
            "num_layers": num_layers,
            "adapter": adapter,
            "gguf_file": gguf_file,
            "pooling": pooling,
            "projector": projector,
        }
        limits = {"max_query_tokens": max_query_tokens, "max_document_tokens": max_document_tokens}
        if is_remote(name_or_path):
            refuse_options("a remote model", name_or_path, changes)
            from epic_rag.remote_model import RemoteModel

            remote = RemoteModel(
                str(name_or_path), max_query_tokens=max_query_tokens, max_document_tokens=max_document_tokens
            )
            return cls._of_model(remote, remote.name, remote.source, truncate_dim, remote.reader_folder)
        folder = resolve(
            name_or_path if onnx is None else onnx[0],
            revision=revision,
            local_files_only=local_files_only,
            gguf_file=gguf_file,
            patterns=[*(["*.py"] if trust_remote_code else []), *(["*.onnx", "*.onnx_data"] if onnx else [])],
        )
        epic = read_epic_file(folder)
        name, source = identify(name_or_path if onnx is None else onnx[0], folder, epic, revision)
        from epic_rag.sentence_model import SentenceModel, is_onnx_folder, is_simple_folder

        if onnx is None and not epic and is_onnx_folder(folder):
            onnx = os.fspath(name_or_path or ""), None
        # Settings that only the backbone has ask for it.
        is_native = backend == "native" or bool(epic) or any(value is not None for value in changes.values())
        is_other = onnx is not None or (not is_native and backend == "sentence-transformers")
        if is_other or not (is_native or is_simple_folder(folder, name)):
            refuse_options("this model", name, {**changes, "several devices": _several(device)})
            file = None if onnx is None else onnx[1]
            model = SentenceModel.open(
                folder,
                name=name,
                device=device,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                is_onnx=onnx is not None,
                onnx_file=file,
                **limits,
            )
            source = source if onnx is None else f"onnx:{source}" + ("" if file is None else f"@{file}")
            return cls._of_model(model, name, source, truncate_dim, folder)
        settings = {"dtype": dtype, "truncate_dim": truncate_dim, "trust_remote_code": trust_remote_code}
        load = partial(
            _load_checkpoint, folder, epic, device, name=name, source=source, **settings, **limits, **changes
        )
        on_cpu = device in (None, "cpu") and dtype in (None, "auto", "float32")
        if "torch" not in sys.modules and on_cpu and all(change is None for change in changes.values()):
            opened = open_numpy_bert(folder, epic, **limits)
            if opened is not None:
                encoder = cls(*opened, name=name, source=source, config=EncoderConfig.from_dict(epic))
                stored_dim = epic.get("truncate_dim")
                encoder.truncate_dim = check_width(stored_dim if truncate_dim is None else truncate_dim, encoder.width)
                encoder._load = load
                encoder.folder = folder
                return encoder
        from epic_rag.batching import Replicas

        loaded, others = load()
        encoder = cls(loaded.backbone, loaded.prompt, name=name, source=source, config=loaded.config)
        # A folder of sentence-transformers without prompts was trained without instructions.
        encoder.takes_instructions = is_native or not (folder / "modules.json").is_file()
        encoder.truncate_dim = loaded.truncate_dim
        encoder._weights_hash = loaded.weights_hash
        encoder.folder = folder
        encoder.replicas = Replicas(others)
        if others:
            # At loading rather than with the first texts: weights that do not fit a device are an error of loading.
            encoder.replicas.copies_of(encoder.backbone)
        return encoder

    @classmethod
    def _of_model(
        cls, model: EmbeddingModel, name: str, source: str, truncate_dim: int | None, folder: Path | None
    ) -> EpicEncoder:
        """Make an encoder of a model of another library or service."""
        encoder = cls(model, None, name=name, source=source, config=EncoderConfig(strategy="reader"))
        encoder.truncate_dim = check_width(
            model.truncate_dim if truncate_dim is None else truncate_dim, model.dimension
        )
        encoder.folder = folder
        return encoder

    def describe(self) -> list[Fact]:
        """Return what is known of the model, each fact with its source."""
        if self.external is not None:
            return self.external.describe()
        stored, guessed = "checkpoint", "guessed"
        model = self.backbone if self._numpy is None else self._numpy
        is_own = self.folder is None or (self.folder / EPIC_FILE).is_file()
        source = stored if is_own else "the folder's files"
        instructions = "before the query" if self.takes_instructions else "not used: the folder has no prompts"
        facts = [
            Fact("run by", "epic-rag", source),
            Fact("pooling", model.pooling, source),
            *([Fact("weights", "of their own for queries", source)] if model.has_query_weights else []),
            Fact("default instruction", repr(self.default_instruction), source),
            Fact("instructions", instructions, source),
            Fact("strategy of demonstrations", self.strategy, stored if self.config.strategy else "default"),
            Fact("longest query", f"{self.max_query_tokens} tokens", source),
            Fact("longest text", f"{self.max_document_tokens} tokens", source),
            Fact("dimensions", str(self.dimension), source),
            Fact("similarity", "cosine", stored if is_own else guessed),
            Fact("licence", self.config.license or "unknown", stored if self.config.license else "not stated"),
        ]
        if self.config.base_model:
            facts.append(Fact("base model", self.config.base_model, stored))
        return facts

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, dtype: str | None = None, compact: bool = False
    ) -> None:
        """Write a checkpoint folder that `from_pretrained` opens, and `AutoModel` and `SentenceTransformer` too.

        Args:
            folder: Made if it is missing; a checkpoint in it is replaced.
            dtype: Weight dtype on disk; None keeps the current one. "int8" stores each row of a matrix as int8 with a
                scale: the smallest folder, which only `from_pretrained` reads.
            compact: Write of the queries' own weights what documents do not share; only `from_pretrained` reads that.

        Raises:
            CheckpointError: If the folder cannot be made, or weights for int8 are not finite.
            ConfigError: If the dtype is unknown.
        """
        from epic_rag.checkpoint_io import Checkpoint, save_checkpoint

        target = Path(folder).expanduser()
        parts = Checkpoint(self.backbone, self.prompt, self.config, self.name, self.source, self.truncate_dim)
        save_checkpoint(target, parts, dtype, compact=compact)
        if self.reader.kind == "trained":
            self.reader.save(target)
        else:
            (target / READER_FILE).unlink(missing_ok=True)

    def __copy__(self) -> EpicEncoder:
        """Return an encoder that shares the weights, and loads torch by itself when it is needed."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        if self.external is None:
            other.prompt, other._numpy = copy.copy(self.prompt), copy.copy(self._numpy)
        return other

    @cached_property
    def reader(self) -> DemonstrationReader:
        """Reader of demonstrations for strategy "reader": the checkpoint's, or the universal one.

        Raises:
            CheckpointError: If the checkpoint's file is damaged.
        """
        return DemonstrationReader.universal() if self.folder is None else DemonstrationReader.load(self.folder)

    @cached_property
    def backbone(self) -> Backbone:
        """Transformer, projector, pooling and head; loaded when it is first used, if numpy was enough until then.

        Raises:
            ConfigError: If the encoder is a model of another library or service.
        """
        if self._load is None:
            raise ConfigError(
                f"{self.name} is run by another library. Load it with backend='native' if it is a folder."
            )
        loaded, _ = self._load()
        self.prompt.tokenizer = loaded.prompt.tokenizer
        self._weights_hash = self._weights_hash or loaded.weights_hash
        self._numpy = None
        return loaded.backbone

    @cached_property
    def max_batch_tokens(self) -> int:
        """Most padded tokens in one forward pass."""
        from epic_rag.batching import batch_tokens

        return batch_tokens(self.device)

    @cached_property
    def prefix_cache(self) -> PrefixCache | None:
        """Keys and values of recent prompts (causal models); None computes each prompt every time."""
        from epic_rag.prefix_cache import PrefixCache

        return PrefixCache()

    @cached_property
    def replicas(self) -> Replicas:
        """Copies of the model on further devices."""
        from epic_rag.batching import Replicas

        return Replicas()

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        return self.truncate_dim or self.width

    @property
    def device(self) -> torch.device:
        """Device of the model; the first of several, and the CPU for a remote model."""
        if self.external is not None:
            import torch

            return torch.device("cpu" if self.external.kind == "remote" else self.external.device)
        return self.backbone.device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices of the model."""
        return (self.device, *self.replicas.others)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; vectors are always float32."""
        if self.external is not None:
            import torch

            return cast("torch.dtype", getattr(torch, self.external.precision))
        return self.backbone.transformer.dtype

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; loads the backbone, because it is transformers' object.

        Raises:
            ConfigError: If the encoder is a model of another library or service.
        """
        _ = self.backbone
        return self.prompt.tokenizer

    @property
    def max_query_tokens(self) -> int:
        """Longest query in tokens, with special tokens, without the prompt."""
        return (self.external or self.prompt).max_query_tokens

    @property
    def max_document_tokens(self) -> int:
        """Longest document in tokens, with special tokens."""
        return (self.external or self.prompt).max_document_tokens

    @property
    def default_instruction(self) -> str | None:
        """Instruction of queries for which none is given; None for a model that was trained without."""
        return self.config.default_instruction

    @property
    def strategy(self) -> QueryStrategy:
        """Strategy of demonstrations for queries that name none."""
        return self.config.strategy or ("epic" if self.takes_instructions else "reader")

    @property
    def query_fingerprint(self) -> str:
        """Short hash of what decides a query's vector: `fingerprint`, default strategy and reader."""
        return hashlib.sha256(f"{self.fingerprint}-{self.strategy}-{self.reader.fingerprint}".encode()).hexdigest()[:12]

    @property
    def fingerprint(self) -> str:
        """Short hash of everything that decides a vector: weights, projector, template, pooling, lengths, width."""
        if self.external is not None:
            facts = {**self.external.identity(), "dimension": self.dimension}
            return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        if self._weights_hash is None:
            if self._numpy is not None:
                self._weights_hash = self._numpy.weights_hash()
            else:
                from epic_rag.backbone import hash_tensors

                self._weights_hash = hash_tensors(self.backbone.state_dict().items())
        model = self.backbone if self._numpy is None else self._numpy
        return fingerprint_of(
            self._weights_hash,
            pooling=model.pooling,
            projector=model.projector_kind,
            dimension=self.dimension,
            config=self.config,
            prompt=self.prompt.settings(),
        )

    def invalidate_caches(self) -> None:
        """Drop the fingerprint and everything computed with the weights, after these have changed."""
        self._weights_hash = None
        self._banks.clear()
        self.replicas.clear()
        if self.prefix_cache is not None:
            self.prefix_cache.clear()

    def encode_query(
        self,
        texts: str | Sequence[str],
        prompt: QueryPrompt | None = None,
        *,
        batch_size: int | None = None,
        show_progress: bool = False,
        truncate_dim: int | None = None,
        **settings: Unpack[PromptSettings],
    ) -> Vectors:
        """Encode queries.

        Args:
            texts: A query or a list of queries.
            prompt: Instruction and demonstrations; None makes one of `settings`.
            batch_size: Most rows in a batch; None lets token counts decide.
            show_progress: Whether to draw a progress bar.
            truncate_dim: Overrides the encoder's setting for this call.
            **settings: The fields of `QueryPrompt`: task, bank, instruction, num_demonstrations, strategy, selection.

        Returns:
            float32 unit rows (n, dimension), in order; (dimension,) for a single string.

        Raises:
            TaskError: If the task is unknown.
            BankError: If the bank is missing or malformed.
            ConfigError: If the batch size or the width cannot work, or both a prompt and settings are given.
            PromptError: If the bank has fewer demonstrations than requested, the prompt does not fit, or the strategy
                or the selection is unknown.
        """
        prompt = QueryPrompt.of(prompt, settings)
        items = [texts] if isinstance(texts, str) else list(texts)
        bank = prompt.resolve_bank()
        strategy = prompt.strategy or self.strategy
        k = 0 if bank is None else self._num_demonstrations(bank, prompt.num_demonstrations, strategy)
        if bank is None or k == 0 or not items or strategy in ("reader", "task-vector"):
            vectors = self._zero_shot(items, prompt, bank, batch_size, show_progress)
            if bank is not None and k and items and strategy == "reader":
                vectors = self._banks.read(bank, k, self, selection=prompt.selection, vectors=vectors)
            elif bank is not None and k and items:
                banks = self._banks.select(bank, k, len(items), self, selection=prompt.selection, vectors=vectors)
                vectors = apply_task_vector(vectors, [each.embeddings_for(self.fingerprint) for each in banks])
        elif self.external is not None:
            raise PromptError(
                f"Strategy {strategy!r} needs a checkpoint of epic-rag, and {self.name} is none. "
                "Use 'task-vector' or 'reader'."
            )
        else:
            rows, slots = self._rows_behind_demonstrations(
                items, bank, k, self._instruction(prompt, bank), strategy, prompt.selection, batch_size
            )
            vectors = self._embed(rows, slots, batch_size, show_progress)
        # A token has a character or more.
        long_queries = [] if "query" in self._noted else [text for text in items if len(text) > self.max_query_tokens]
        if long_queries and max(tokens := self.count_tokens(long_queries)) > self.max_query_tokens - SPECIAL_TOKENS:
            self._noted.add("query")
            logger.warning(
                "A query has %d tokens, and %s reads %d. The rest of it is cut off.",
                max(tokens),
                self.name,
                self.max_query_tokens,
            )
        return self._output(vectors, texts, truncate_dim)

    def encode_document(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int | None = None,
        show_progress: bool = False,
        truncate_dim: int | None = None,
        long_texts: LongTexts = "cut",
    ) -> Vectors:
        """Encode documents: bare texts, without instruction and demonstrations.

        Args:
            texts: A document or a list of documents.
            batch_size: Most rows in a batch; None lets token counts decide.
            show_progress: Whether to draw a progress bar.
            truncate_dim: Overrides the encoder's setting for this call.
            long_texts: Texts with more than `max_document_tokens` are cut there ("cut"), or encoded in windows whose
                vectors are averaged, weighted by their tokens ("windows"); the latter is logged once.

        Returns:
            float32 unit rows (n, dimension), in order; (dimension,) for a single string.
        """
        items = [texts] if isinstance(texts, str) else list(texts)
        if long_texts == "windows":
            return self._output(self._encode_windows(items, batch_size, show_progress), texts, truncate_dim)
        return self._output(self._documents(items, batch_size, show_progress), texts, truncate_dim)

    def _documents(self, texts: Sequence[str], batch_size: int | None, show_progress: bool) -> Vectors:
        """Embed documents at full width, cut at `max_document_tokens`."""
        if self.external is not None:
            return self._external_vectors(texts, "document", None, batch_size, show_progress)
        # While one block is embedded the next one is tokenised, and only two are in memory as tokens.
        blocks = prefetch(self.prompt.documents, texts, _BLOCK)
        return np.concatenate([self._embed(rows, None, batch_size, show_progress) for rows in blocks])

    def windows(self, text: str) -> list[str]:
        """Return the parts of a document that the model reads one at a time: of like length, divided at white space.

        A document of at most `max_document_tokens` is its only part.
        """
        return divide(text, self.max_document_tokens, self.count_tokens)

    def _encode_windows(self, texts: Sequence[str], batch_size: int | None, show_progress: bool) -> Vectors:
        """Encode documents by their windows; return the unit rows of their vectors' means, weighted by tokens."""
        parts = [self.windows(text) for text in texts]
        windows = [part for own in parts for part in own]
        vectors = self._documents(windows, batch_size, show_progress)
        if len(windows) == len(texts):
            return vectors
        if "document" not in self._noted:
            self._noted.add("document")
            longest = max(range(len(texts)), key=lambda number: len(parts[number]))
            logger.warning(
                "A text has %d tokens, and %s reads %d at a time. Its vector is the mean of %d windows; split texts "
                "into chunks that it reads whole to find their parts better.",
                self.count_tokens([texts[longest]])[0],
                self.name,
                self.max_document_tokens,
                len(parts[longest]),
            )
        return mean_of_windows(vectors, self.count_tokens(windows), [len(own) for own in parts])

    def select_demonstrations(
        self, texts: Sequence[str], bank: DemonstrationBank, k: int, *, selection: Selection = "nearest"
    ) -> list[DemonstrationBank]:
        """Return the demonstrations that `encode_query` uses for each query, given the bank's instruction.

        Raises:
            PromptError: See `encode_query`.
        """
        vectors = self._zero_shot(texts, QueryPrompt(), bank) if selection == "nearest" else None
        return self._banks.select(bank, k, len(texts), self, selection=selection, vectors=vectors)

    def embed_demonstrations(self, bank: DemonstrationBank) -> Vectors:
        """Compute the vectors of a bank's demonstrations.

        Returns:
            (k, 3, dim) float32 at full width: query (zero-shot, with the bank's instruction), passage, and the query
            read as a document, as it would stand in a collection.
        """
        width = self.width
        zero_shot = QueryPrompt(bank=bank, num_demonstrations=0)
        passages = [item.passage for item in bank.demonstrations]
        texts = [item.query for item in bank.demonstrations]
        queries = self.encode_query(texts, zero_shot, truncate_dim=width)
        if bank.symmetric:
            return np.stack([queries, self.encode_query(passages, zero_shot, truncate_dim=width), queries], axis=1)
        documents = (self.encode_document(each, truncate_dim=width) for each in (passages, texts))
        return np.stack([queries, *documents], axis=1)

    def similarity(self, a: npt.ArrayLike, b: npt.ArrayLike) -> Vectors:
        """Compute the cosine similarity of every row of `a` with every row of `b`.

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
        """Return the token count of each text, without special tokens."""
        if self.external is not None:
            return self.external.count_tokens(texts)
        return [len(ids) for ids in self.prompt.token_ids(texts)]

    def token_counter(self) -> Callable[[Sequence[str], bool], list[int]]:
        """Return a function of texts and whether they are documents: their token counts; it may run in a thread."""
        return (self.prompt if self.external is None else self.external).token_counter()

    @property
    def width(self) -> int:
        """Width of the vectors before truncation."""
        if self.external is not None:
            return self.external.dimension
        return self.backbone.dimension if self._numpy is None else self._numpy.dimension

    def _instruction(self, prompt: QueryPrompt, bank: DemonstrationBank | None) -> str | None:
        """Return the instruction of a query; None for the model's own, or for a model that follows none."""
        instruction = prompt.resolve_instruction(bank, self.default_instruction)
        if self.external is not None:
            # "" stands for the model's own prompt as well: without it, the vectors are not those it was trained for.
            return (instruction or None) if self.takes_instructions else None
        return instruction if self.takes_instructions or prompt.instruction else None

    def _zero_shot(
        self,
        texts: Sequence[str],
        prompt: QueryPrompt,
        bank: DemonstrationBank | None,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> Vectors:
        """Embed queries behind an instruction alone."""
        instruction = self._instruction(prompt, bank)
        if self.external is not None:
            return self._external_vectors(texts, "query", instruction, batch_size, show_progress)
        bare = bool(self.config.symmetric_as_documents) and prompt.is_bare(bank)
        rows = self.prompt.symmetric(texts) if bare else self.prompt.queries(self.prompt.prefix(instruction), texts)
        return self._embed(rows, None, batch_size, show_progress)

    def _external_vectors(
        self, texts: Sequence[str], role: Role, instruction: str | None, batch_size: int | None, show_progress: bool
    ) -> Vectors:
        assert self.external is not None
        check_strings(texts)
        return self.external.embed(
            texts, role, instruction=instruction, batch_size=batch_size, show_progress=show_progress
        )

    def _embed(
        self,
        rows: Sequence[EncoderInput],
        slots: Sequence[torch.Tensor] | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> Vectors:
        """Embed rows: a handful with numpy, if that is possible without loading torch; all others with torch."""
        light = self._numpy
        if (
            light is not None
            and slots is None
            and (batch_size is None or batch_size > 0)
            and self.padding_side == "right"
            and light.takes(rows)
        ):
            return light.embed(rows)
        from epic_rag.batching import BatchOptions, embed

        backbone = self.backbone
        options = BatchOptions(
            pad_id=self.prompt.pad_id,
            max_tokens=self.max_batch_tokens,
            cache=self.prefix_cache,
            padding_side=self.padding_side,
            max_rows=batch_size,
            show_progress=show_progress,
            replicas=self.replicas,
        )
        return embed(backbone, rows, slots, options)

    def _num_demonstrations(self, bank: DemonstrationBank, requested: int | None, strategy: QueryStrategy) -> int:
        """Return the requested number of demonstrations, or the most that the strategy can use."""
        if requested is None and not bank.enabled:
            logger.info("the demonstrations of the bank are off; name their number to use them")
            return 0
        if strategy in ("reader", "task-vector"):  # they have no trained length
            return len(bank) if requested is None else requested
        trained = self.config.max_demonstrations or len(bank)
        if requested is None:
            return min(len(bank), trained)
        if requested > trained:
            logger.warning("%d demonstrations requested, %s was trained with up to %d", requested, self.name, trained)
        return requested

    def embedded(self, bank: DemonstrationBank) -> DemonstrationBank:
        """Return the bank with this encoder's vectors, which are cached; the given bank stays unchanged."""
        return self._banks.get(bank, self)

    def _rows_behind_demonstrations(
        self,
        texts: Sequence[str],
        bank: DemonstrationBank,
        k: int,
        instruction: str | None,
        strategy: QueryStrategy,
        selection: Selection,
        batch_size: int | None,
    ) -> tuple[list[EncoderInput], list[torch.Tensor] | None]:
        """Build inputs of queries behind demonstrations.

        Returns:
            One row per text, and for strategy "epic" each row's (2k, dim) slot vectors. Rows with the same
            demonstrations share one tensor, which is how a shared prompt is recognised.
        """
        zero_shot: list[EncoderInput] = []
        vectors = None
        if selection == "nearest":
            zero_shot = self.prompt.queries(self.prompt.prefix(instruction), texts)
            vectors = self._embed(zero_shot, None, batch_size)
        if strategy == "text" and selection in ("first", "random"):
            banks = [bank.select(k, method=selection)] * len(texts)  # texts need no vectors
        else:
            banks = self._banks.select(bank, k, len(texts), self, selection=selection, vectors=vectors)
        if strategy == "epic":
            import torch

            prefix = self.prompt.prefix(instruction, num_slots=k)
            # Rows that are tokenised behind words already keep their tokens.
            rows = (
                self.prompt.with_prefix(prefix, zero_shot)
                if zero_shot and instruction
                else self.prompt.queries(prefix, texts)
            )
            fingerprint = self.fingerprint
            pairs = {id(each): each.embeddings_for(fingerprint)[:, :2] for each in banks}
            tensors = {key: torch.from_numpy(each).flatten(0, 1) for key, each in pairs.items()}
            return rows, [tensors[id(each)] for each in banks]
        shown = [[(item.query, item.passage) for item in each.demonstrations] for each in banks]
        return self.prompt.queries_behind_texts(instruction, shown, texts), None

    def _output(self, vectors: Vectors, texts: str | Sequence[str], truncate_dim: int | None) -> Vectors:
        width = check_width(truncate_dim, self.width) or self.dimension
        if width < vectors.shape[1]:
            vectors = unit_rows(vectors[:, :width])
        return vectors[0] if isinstance(texts, str) else vectors


def _several(device: DeviceNames | None) -> bool:
    return (isinstance(device, str) and "," in device) or (isinstance(device, (list, tuple)) and len(device) > 1)


def _load_checkpoint(
    folder: Path, epic: dict[str, Any], device: DeviceNames | None, **settings: Any
) -> tuple[Checkpoint, list[torch.device]]:
    """Load a checkpoint with torch; return it and the devices beside its own."""
    from epic_rag.batching import parse_devices
    from epic_rag.checkpoint_io import load_checkpoint

    target, *others = parse_devices(device)
    return load_checkpoint(folder, epic, device=target, **settings), others
