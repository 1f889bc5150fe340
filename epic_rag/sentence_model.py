"""Models of sentence-transformers: folders and hub names exactly as that library runs them.

A folder's `modules.json` may hold any module of sentence-transformers, prompts for queries and documents, and limits
of its own. `SentenceModel` runs the library itself instead of reading all of that again. Two kinds of folders that the
library does not open without further packages are assembled from its modules: model2vec folders, and folders whose
transformer is an ONNX file (`onnx:MODEL`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from epic_rag.checkpoints import read_model_card
from epic_rag.embedding_model import EmbeddingModel, Fact, Role, Vectors
from epic_rag.errors import CheckpointError, ConfigError, MissingExtraError, reason_of
from epic_rag.model_conventions import fill_instruction, find_convention
from epic_rag.reader import READER_FILE

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

    from epic_rag.batching import DeviceNames

__all__ = ["SentenceModel", "is_onnx_folder", "is_simple_folder", "is_static_folder"]

_MODULES = "modules.json"
_SETTINGS = "config_sentence_transformers.json"
# Tokens for a text where the model has no limit (static embeddings): a batch stays small, whatever a text holds.
_LONGEST = 8192
_SPECIAL_TOKENS = 2
# Files that decide vectors; a model card or an image does not.
_DECIDING = ("*.json", "*.safetensors", "*.txt", "*.model", "*.onnx", "*.onnx_data", "*.py")
# Names of prompts that sentence-transformers uses by itself. Prompts of other names are for its callers to choose.
_ROLES = ("query", "document", "passage", "corpus")
# What `sentence_bert_config.json` says since release 6 of a transformer that returns its last states.
_USUAL = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
_SIMPLE_TOKENS = 512
_SIMPLE_POOLINGS = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}


class SentenceModel(EmbeddingModel):
    """A sentence-transformers model.

    Make one with `open`.

    Args:
        model: The loaded model.
        folder: Its files.
        name: Name in messages.
        backend: "torch" or "onnx".
        prompts_source: Where its prompts are stated.
        batch_tokens: Most padded tokens in a batch.
    """

    kind = "sentence-transformers"

    def __init__(
        self,
        model: SentenceTransformer,
        folder: Path,
        *,
        name: str,
        prompts_source: str,
        batch_tokens: int,
        max_query_tokens: int | None = None,
        max_document_tokens: int | None = None,
    ) -> None:
        self.model = model
        self.folder = folder
        self.name = name
        self.truncate_dim = model.truncate_dim
        # The encoder truncates, so that every model has one place for it.
        model.truncate_dim = None
        dimension = model.get_embedding_dimension()
        if dimension is None:
            dimension = model.encode(["a"], show_progress_bar=False).shape[1]
        self.dimension = int(dimension)
        default = model.prompts.get(model.default_prompt_name or "", "")
        self.query_prompt = model.prompts.get("query", default) or ""
        of_documents = (model.prompts[key] for key in _ROLES[1:] if key in model.prompts)
        self.document_prompt = next(of_documents, default) or ""
        self._prompts_source = prompts_source
        self._batch_tokens = batch_tokens
        limit = model.max_seq_length
        self._limit = int(limit) if limit is not None and math.isfinite(limit) else None
        self.max_query_tokens = _limited(self._limit, max_query_tokens, "max_query_tokens")
        self.max_document_tokens = _limited(self._limit, max_document_tokens, "max_document_tokens")
        self._identity: dict[str, Any] | None = None

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        name: str,
        device: DeviceNames | None = None,
        dtype: str | torch.dtype | None = None,
        trust_remote_code: bool = False,
        onnx_file: str | None = None,
        is_onnx: bool = False,
        max_query_tokens: int | None = None,
        max_document_tokens: int | None = None,
    ) -> SentenceModel:
        """Load a model from a folder.

        Args:
            folder: A sentence-transformers, Hugging Face or model2vec folder.
            name: Hub name or folder name; the prompts of its family hold if the folder has none.
            device: One device; None takes a GPU if there is one.
            dtype: Number format of the weights; see `EpicEncoder.from_pretrained`.
            trust_remote_code: Allow Python code in the folder to run.
            onnx_file: ONNX file of the folder; None for `onnx/model.onnx` or the only one.
            is_onnx: Whether to run the transformer by ONNX Runtime.
            max_query_tokens: Longest query in tokens; None for the model's limit.
            max_document_tokens: Longest document in tokens; None for the model's limit.

        Raises:
            CheckpointError: If the folder does not load.
            ConfigError: If a limit exceeds the model's.
            MissingExtraError: If a package is not installed.
        """
        try:
            import sentence_transformers
        except ImportError as error:
            raise MissingExtraError("sentence-transformers", "models", "running this model") from error
        from epic_rag.backbone import quiet
        from epic_rag.batching import batch_tokens, parse_devices
        from epic_rag.checkpoint_io import parse_dtype

        prompts, source = _prompts(folder, name)
        [target] = parse_devices("cpu" if is_onnx else device)
        place = str(target)
        try:
            with quiet():
                if is_onnx or is_static_folder(folder):
                    modules = _onnx_modules(folder, onnx_file) if is_onnx else _static_modules(folder)
                    model = sentence_transformers.SentenceTransformer(modules=modules, device=place)
                    stored = _read_object(folder / _SETTINGS)
                    model.truncate_dim = stored.get("truncate_dim")
                    model.prompts = {**model.prompts, **{k: v or "" for k, v in stored.get("prompts", {}).items()}}
                    model.default_prompt_name = stored.get("default_prompt_name")
                    model.prompts |= prompts
                else:
                    model = sentence_transformers.SentenceTransformer(
                        str(folder),
                        device=place,
                        prompts=prompts or None,
                        trust_remote_code=trust_remote_code,
                        local_files_only=True,
                        model_kwargs={"dtype": parse_dtype(dtype, target)},
                    )
        except MissingExtraError:
            raise
        except Exception as error:  # of any module of any author
            hint = (
                "It brings its own code: pass trust_remote_code=True, or put its name into "
                "EPIC_RAG_TRUST_REMOTE_CODE, if you trust it."
                if "trust_remote_code" in str(error)
                else "Check the folder's files."
            )
            raise CheckpointError(f"{folder} does not load ({reason_of(error)}). {hint}") from error
        model.eval()
        return cls(
            model,
            folder,
            name=name,
            prompts_source=source,
            batch_tokens=batch_tokens(model.device),
            max_query_tokens=max_query_tokens,
            max_document_tokens=max_document_tokens,
        )

    def embed(
        self,
        texts: Sequence[str],
        role: Role,
        *,
        instruction: str | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> Vectors:
        """Embed texts by `SentenceTransformer.encode_query` or `encode_document`; see `EmbeddingModel.embed`.

        Raises:
            ConfigError: If the batch size is not positive.
        """
        from tqdm import tqdm

        from epic_rag.batching import token_batches

        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}. Pass 1 or more.")
        is_query = role == "query"
        limit = self.max_query_tokens if is_query else self.max_document_tokens
        prompt = fill_instruction(self.query_prompt, instruction) if is_query else None
        # The library chooses the prompt itself unless another instruction replaces it.
        changed: dict[str, Any] = {} if prompt is None or prompt == self.query_prompt else {"prompt": prompt}
        encode: Any = self.model.encode_query if is_query else self.model.encode_document
        texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        lengths = [min(limit, count + _SPECIAL_TOKENS) for count in self.count_tokens(texts)]
        vectors = np.empty((len(texts), self.dimension), np.float32)
        if self._limit is not None and self.model.max_seq_length != limit:
            self.model.max_seq_length = limit
        with tqdm(total=len(texts), disable=not show_progress, unit="text", leave=False) as bar:
            for rows in token_batches(lengths, max_tokens=self._batch_tokens, max_rows=batch_size):
                vectors[rows] = encode(
                    [texts[row] for row in rows],
                    batch_size=len(rows),
                    show_progress_bar=False,
                    normalize_embeddings=True,
                    **changed,
                )
                bar.update(len(rows))
        return vectors

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the token count of each text without special tokens."""
        tokenizer: Any = self.model.tokenizer
        with suppress(AttributeError, TypeError):
            if hasattr(tokenizer, "encode_batch"):
                return [len(found.ids) for found in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
            if callable(tokenizer):
                found = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
                return [len(ids) for ids in found["input_ids"]] if texts else []
        return [len(text.split()) for text in texts]  # the tokenizer of a word-vector module

    def identity(self) -> dict[str, Any]:
        """Return the hash of the files that decide vectors, prompts and limits."""
        if self._identity is None:
            digest = hashlib.sha256()
            for file in sorted({file for pattern in _DECIDING for file in self.folder.rglob(pattern)}):
                place = file.relative_to(self.folder)
                if any(part.startswith(".") for part in place.parts) or not file.is_file() or place.name == READER_FILE:
                    continue
                digest.update(f"{place.as_posix()}\0".encode())
                if place.name == _SETTINGS:
                    # The releases that wrote the file are in it.
                    kept = {key: value for key, value in _read_object(file).items() if key != "__version__"}
                    digest.update(json.dumps(kept, sort_keys=True).encode())
                    continue
                with file.open("rb") as stream:
                    while block := stream.read(1 << 22):
                        digest.update(block)
            self._identity = {
                "kind": self.kind,
                "files": digest.hexdigest(),
                "prompts": [self.query_prompt, self.document_prompt],
                "limits": [self.max_query_tokens, self.max_document_tokens],
            }
        return self._identity

    def describe(self) -> list[Fact]:
        """Return modules, prompts, lengths, dimensions, similarity and licence, each with its file."""
        kinds = [type(module).__name__ for module in self.model]
        poolings = [
            str(getattr(module, "pooling_mode", "")) for module in self.model if hasattr(module, "pooling_mode")
        ]
        card = read_model_card(self.folder)
        similarity = _read_object(self.folder / _SETTINGS).get("similarity_fn_name")
        facts = [
            Fact("run by", "ONNX Runtime" if "OnnxTransformer" in kinds else "sentence-transformers", "installed"),
            Fact("modules", " > ".join(kinds), _MODULES if (self.folder / _MODULES).is_file() else "guessed"),
            *(Fact("pooling", pooling, "module") for pooling in poolings),
            Fact("query prompt", repr(self.query_prompt), self._prompts_source),
            Fact("document prompt", repr(self.document_prompt), self._prompts_source),
            Fact(
                "instructions",
                "a task's or bank's replaces the one in the query prompt" if self.takes_instructions else "not used",
                "query prompt",
            ),
            Fact("longest text", f"{self.max_document_tokens} tokens", "tokenizer" if self._limit else "guessed"),
            Fact("dimensions", str(self.truncate_dim or self.dimension), "model"),
            Fact(
                "similarity",
                str(similarity or "cosine")
                + (
                    ""
                    if similarity in (None, "cosine")
                    else "; an index compares by cosine, which can order differently"
                ),
                _SETTINGS if similarity else "guessed",
            ),
            Fact("licence", str(card.get("license", "unknown")), "model card" if "license" in card else "not stated"),
        ]
        if "base_model" in card:
            facts.append(Fact("base model", str(card["base_model"]), "model card"))
        return facts

    @property
    def precision(self) -> str:
        """Number format of the weights."""
        return str(self.model.dtype or "float32").removeprefix("torch.")

    @property
    def device(self) -> str:
        """Device of the model."""
        return str(self.model.device)


def is_static_folder(folder: Path) -> bool:
    """Return whether a folder is one of model2vec without modules of sentence-transformers."""
    return not (folder / _MODULES).is_file() and _read_object(folder / "config.json").get("model_type") == "model2vec"


def is_onnx_folder(folder: Path) -> bool:
    """Return whether a folder's weights are ONNX files only."""
    weights = {path.name for pattern in ("*.safetensors", "*.bin", "*.gguf") for path in folder.glob(pattern)}
    return not weights - {READER_FILE} and any(folder.rglob("*.onnx"))


def is_simple_folder(folder: Path, name: str) -> bool:
    """Return whether `epic_rag.backbone` gives a folder's vectors exactly.

    That is a plain Hugging Face folder, or a sentence-transformers folder of a transformer, mean or CLS pooling,
    linear dense modules and normalisation, without prompts. All others need sentence-transformers.

    Args:
        folder: A folder without `epic.json`.
        name: The model's name, by which its family may have prompts.
    """
    if is_static_folder(folder) or any(_prompts(folder, name)[0].values()):
        return False
    if not (folder / _MODULES).is_file():
        return True
    stored = _read_object(folder / _SETTINGS)
    if any((stored.get("prompts") or {}).values()) or stored.get("truncate_dim"):
        return False
    try:
        entries = [
            (str(entry["type"]).rsplit(".", 1)[-1], folder / str(entry["path"]))
            for entry in json.loads((folder / _MODULES).read_text(encoding="utf-8"))
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    kinds = [kind for kind, _ in entries]
    if kinds[:2] != ["Transformer", "Pooling"] or set(kinds[2:]) - {"Dense", "Normalize"} or entries[0][1] != folder:
        return False
    if "Normalize" in kinds and kinds.index("Normalize") != len(kinds) - 1:
        return False
    pooling = _read_object(entries[1][1] / "config.json")
    modes = {key for key, value in pooling.items() if key.startswith("pooling_mode_") and value}
    named = pooling.get("pooling_mode")
    if modes not in ({flag} for flag in _SIMPLE_POOLINGS.values()) and not (not modes and named in _SIMPLE_POOLINGS):
        return False
    for kind, path in entries:
        if kind == "Dense":
            settings = _read_object(path / "config.json")
            if not str(settings.get("activation_function", "")).endswith("Identity") or set(settings) - {
                "in_features",
                "out_features",
                "bias",
                "activation_function",
            }:
                return False
    limits = _read_object(folder / "sentence_bert_config.json")
    if limits.pop("do_lower_case", False) or any(limits.get(key, value) != value for key, value in _USUAL.items()):
        return False
    # Without a limit here, the tokenizer's holds; `checkpoint_io` has another one for tokenizers without any.
    longest = limits.get("max_seq_length", _read_object(folder / "tokenizer_config.json").get("model_max_length"))
    return not set(limits) - set(_USUAL) - {"max_seq_length"} and isinstance(longest, int) and longest <= _SIMPLE_TOKENS


def _limited(limit: int | None, requested: int | None, name: str) -> int:
    """Return a length limit within the model's own."""
    if requested is not None and requested < 1:
        raise ConfigError(f"{name} is {requested}. Pass 1 or more.")
    return min(limit or _LONGEST, requested or _LONGEST)


def _prompts(folder: Path, name: str) -> tuple[dict[str, str], str]:
    """Return the prompts that a folder lacks, and the source of its prompts."""
    stored = _read_object(folder / _SETTINGS).get("prompts")
    if isinstance(stored, dict) and any(stored.get(role) for role in _ROLES):
        return {}, _SETTINGS
    written = _read_object(folder / "config.json").get("_name_or_path")
    for candidate in (name, written):
        convention = find_convention(candidate) if isinstance(candidate, str) else None
        if convention is not None:
            given = {"query": convention.query, "document": convention.document}
            return {key: text for key, text in given.items() if text}, f"guessed from its name: {convention.source}"
    return {}, "no file states any"


def _read_object(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _static_modules(folder: Path) -> list[Any]:
    """Return the modules of a model2vec folder."""
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding

    static = StaticEmbedding.load(str(folder))
    # float16 tables are common, and the library sums in the table's own format.
    static.embedding.float()
    return [static, *([Normalize()] if _read_object(folder / "config.json").get("normalize", True) else [])]


def _onnx_modules(folder: Path, file: str | None) -> list[Any]:
    """Return an ONNX transformer and the other modules of a folder; mean pooling if it names none."""
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    from sentence_transformers.util import import_from_string

    load: Any = import_from_string

    from epic_rag.onnx_transformer import OnnxTransformer

    transformer = OnnxTransformer.open(folder, file)
    try:
        entries = json.loads((folder / _MODULES).read_text(encoding="utf-8"))[1:]
    except OSError:
        return [transformer, Pooling(transformer.get_embedding_dimension(), "mean"), Normalize()]
    if any(not str(entry["type"]).startswith("sentence_transformers.") for entry in entries):
        raise CheckpointError("a module is not of sentence-transformers")
    return [transformer, *(load(entry["type"]).load(str(folder / entry["path"])) for entry in entries)]
