"""Transformer backbone: token embeddings with slots in, one unit vector per text out.

    ids ──► token embeddings ──► slots replaced by projector(vector) ──► transformer ──► pool ──► head ──► L2

Any Hugging Face transformer that takes `inputs_embeds` works. By default decoder LLMs (causal attention) pool the last
token and bidirectional encoders (BERT family) the mean over the text's own tokens. A head is an optional linear map
from the pooled state to a vector, perhaps of another width. The projector maps an embedding to one input position, a
slot. A model may read queries with weights of their own, for some or all layers: documents keep their vectors then,
whatever queries are trained for.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import io
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils import logging as transformers_logging

from epic_rag.checkpoints import hash_weights
from epic_rag.errors import CheckpointError, ConfigError, MissingExtraError, reason_of
from epic_rag.int8_weights import load_int8_model
from epic_rag.prompt import Batch

__all__ = [
    "POOLINGS",
    "PROJECTORS",
    "Backbone",
    "Pooling",
    "Projector",
    "ProjectorKind",
    "hash_tensors",
    "load_transformer",
    "merge_adapter",
    "quiet",
    "truncate_layers",
]


ProjectorKind = Literal["scale", "linear", "mlp"]
PROJECTORS: tuple[ProjectorKind, ...] = ("scale", "linear", "mlp")


class Projector(nn.Module):
    """Map from an embedding to the input space of the transformer.

    Every kind starts as the identity times the mean norm of the token embeddings, so that an untrained slot has the
    norm of an ordinary token (a unit vector is about 10 to 100 times too short or too long).

    Args:
        kind: "scale" (one learned number), "linear" (a full matrix), or "mlp" (the scaled vector plus a two-layer
            perceptron that starts at zero).
        dimension: Width of embeddings.
        norm: Mean norm of the token embeddings.
        width: Width of the transformer's input; None if it is the same. Where embeddings are narrower, the identity
            leaves the rest of the input zero; where they are wider, it drops their last numbers.
    """

    def __init__(self, kind: ProjectorKind, dimension: int, norm: float, *, width: int | None = None) -> None:
        super().__init__()
        if kind not in PROJECTORS:
            raise ConfigError(f"Unknown projector {kind!r}. Choose one of {', '.join(PROJECTORS)}.")
        self.kind = kind
        self.width = dimension if width is None else width
        if kind == "linear":
            self.linear = nn.Linear(dimension, self.width)
            with torch.no_grad():
                self.linear.weight.copy_(norm * torch.eye(self.width, dimension))
                self.linear.bias.zero_()
        else:
            self.scale = nn.Parameter(torch.tensor(float(norm)))
        if kind == "mlp":
            self.mlp = nn.Sequential(nn.Linear(dimension, dimension), nn.GELU(), nn.Linear(dimension, self.width))
            with torch.no_grad():
                # Seeded: an untrained projector is part of the fingerprint, which must not change from load to load.
                generator = torch.Generator().manual_seed(0)
                bound = dimension**-0.5
                for parameter in self.mlp[0].parameters():
                    parameter.uniform_(-bound, bound, generator=generator)
                for parameter in self.mlp[2].parameters():
                    parameter.zero_()

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Map (slots, dim) unit vectors to (slots, width) input embeddings."""
        if self.kind == "linear":
            return self.linear(vectors)  # type: ignore[no-any-return]
        scaled: torch.Tensor = self.scale * nn.functional.pad(vectors, (0, self.width - vectors.shape[1]))
        return scaled + self.mlp(vectors) * self.scale if self.kind == "mlp" else scaled


Pooling = Literal["last", "mean", "cls"]
POOLINGS: tuple[Pooling, ...] = ("last", "mean", "cls")


class Backbone(nn.Module):
    """Transformer, projector, pooling and optional head.

    Args:
        transformer: The model without a head.
        pooling: "last", "mean" or "cls"; None chooses by the kind of attention.
        projector: Kind of projector.

    Raises:
        ConfigError: If a setting is unknown or the model cannot be an encoder with slots.
    """

    def __init__(
        self, transformer: PreTrainedModel, *, pooling: Pooling | None = None, projector: ProjectorKind = "linear"
    ) -> None:
        super().__init__()
        if transformer.config.is_encoder_decoder:
            raise ConfigError(
                f"{type(transformer).__name__} is an encoder-decoder. Use a decoder LLM or a bidirectional encoder."
            )
        self.transformer = transformer
        self.query_transformer: PreTrainedModel | None = None
        self.causal = is_causal(transformer.config)
        self.pooling: Pooling = pooling if pooling is not None else ("last" if self.causal else "mean")
        if self.pooling not in POOLINGS:
            raise ConfigError(f"Unknown pooling {pooling!r}. Choose one of {', '.join(POOLINGS)}.")
        # A model with more than text (Gemma 3, for one) keeps its text settings in a configuration of their own.
        self.width = int(transformer.config.get_text_config().hidden_size)
        self.head: nn.Linear | None = None
        width = int(next(transformer.get_input_embeddings().parameters()).shape[-1])
        if width != self.width:
            raise ConfigError(
                f"{type(transformer).__name__} has token embeddings of width {width} and states of width "
                f"{self.width}; slots need equal widths. Use another model."
            )
        accepted = inspect.signature(transformer.forward).parameters
        self.takes_positions = "position_ids" in accepted
        # Newer versions of transformers have another name for the keys and values that came before.
        self.cache_argument = next((name for name in ("cache", "past_key_values") if name in accepted), None)
        self.reset_projector(projector)

    def reset_projector(self, kind: ProjectorKind) -> None:
        """Replace the projector by an untrained one.

        Raises:
            ConfigError: If the kind is unknown.
        """
        self.projector = Projector(kind, self.dimension, self._mean_token_norm(), width=self.width)
        weight = next(self.transformer.parameters())
        self.projector.to(device=weight.device, dtype=weight.dtype)

    def set_head(self, head: nn.Linear | None) -> None:
        """Set the linear map behind the pooling; this resets the projector, whose input it makes.

        Args:
            head: From the transformer's width to that of the vectors; None removes the head.

        Raises:
            ConfigError: If its input has another width than the transformer.
        """
        if head is not None and head.in_features != self.width:
            raise ConfigError(
                f"The head takes width {head.in_features}, but the transformer has width {self.width}. "
                "Pass a head that fits."
            )
        weight = next(self.transformer.parameters())
        self.head = None if head is None else head.to(device=weight.device, dtype=weight.dtype)
        self.reset_projector(self.projector.kind)

    def separate_queries(self, names: Collection[str]) -> None:
        """Copy weights for queries alone; all others stay shared with documents.

        Args:
            names: Parameters of the transformer to copy.
        """
        shared: dict[int, Any] = {
            id(value): value for name, value in self.transformer.named_parameters() if name not in names
        }
        self.query_transformer = copy.deepcopy(self.transformer, shared)

    def query_weights(self) -> dict[str, nn.Parameter]:
        """Return the weights that only queries are read with, by name in the transformer."""
        if self.query_transformer is None:
            return {}
        shared = {id(value) for value in self.transformer.parameters()}
        return {name: value for name, value in self.query_transformer.named_parameters() if id(value) not in shared}

    @property
    def has_query_weights(self) -> bool:
        """True if queries are read with weights of their own."""
        return self.query_transformer is not None

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        return self.width if self.head is None else self.head.out_features

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def max_positions(self) -> int | None:
        """Number of positions of the model; None for no bound."""
        limit = getattr(self.transformer.config.get_text_config(), "max_position_embeddings", None)
        if limit is None:
            return None
        tokens = self.transformer.get_input_embeddings()
        for module in self.transformer.modules():
            if isinstance(module, nn.Embedding) and module is not tokens and module.num_embeddings == limit:
                # RoBERTa's kin count positions from after the padding's id, so 514 of them are for 512 tokens.
                return int(limit) if module.padding_idx is None else int(limit) - module.padding_idx - 1
        return int(limit)

    def forward(
        self, batch: Batch, slot_vectors: torch.Tensor | None = None, *, pooled_only: bool = False
    ) -> torch.Tensor:
        """Embed a batch.

        Args:
            batch: Padded rows.
            slot_vectors: (slots, dim) vectors for the batch's slots, in its order; None if it has none.
            pooled_only: Return the pooled states, before head and normalisation.

        Returns:
            (rows, dim) float32 unit vectors, or (rows, width) float32 pooled states.
        """
        transformer = self.transformer
        if batch.is_query and self.query_transformer is not None:
            transformer = self.query_transformer
        embeddings = self.embed_inputs(batch.ids, batch.slot_rows, batch.slot_columns, slot_vectors, transformer)
        inputs: dict[str, Any] = {"inputs_embeds": embeddings, "attention_mask": batch.mask}
        if self.causal and self.takes_positions:
            # Positions count real tokens, so that padding on the left moves nothing.
            inputs["position_ids"] = (batch.mask.cumsum(dim=1) - 1).clamp(min=0)
        if self.causal:
            inputs["use_cache"] = False
        hidden = transformer(**inputs).last_hidden_state  # (rows, tokens, dim)
        pooled = self._pool(hidden.float(), batch)
        return pooled if pooled_only else self.project_and_normalize(pooled)

    def project_and_normalize(self, pooled: torch.Tensor) -> torch.Tensor:
        """Map (rows, width) float32 pooled states to (rows, dim) float32 unit vectors."""
        if self.head is not None:
            pooled = self.head(pooled.to(self.head.weight.dtype)).float()
        return nn.functional.normalize(pooled, dim=-1)

    def embed_inputs(
        self,
        ids: torch.Tensor,
        slot_rows: torch.Tensor,
        slot_columns: torch.Tensor,
        slot_vectors: torch.Tensor | None,
        transformer: PreTrainedModel | None = None,
    ) -> torch.Tensor:
        """Look up token embeddings and put the projected vectors into the slots.

        Args:
            ids: (rows, tokens) token ids.
            slot_rows: (slots,) row of each slot.
            slot_columns: (slots,) column of each slot.
            slot_vectors: (slots, dim) vectors that fill them; None leaves the tokens' own embeddings.
            transformer: The one that reads the rows; None for that of documents.

        Returns:
            (rows, tokens, dim) in the transformer's dtype.
        """
        embeddings: torch.Tensor = (transformer or self.transformer).get_input_embeddings()(ids)
        if slot_vectors is None or not len(slot_rows):
            return embeddings
        # On the module's output, not on its weight: some models (Gemma) scale inside the module.
        filled = self.projector(slot_vectors.to(self.projector_dtype)).to(embeddings.dtype)
        return embeddings.index_put((slot_rows, slot_columns), filled)

    @property
    def projector_kind(self) -> ProjectorKind:
        """Kind of the projector."""
        return self.projector.kind

    @property
    def projector_dtype(self) -> torch.dtype:
        """Dtype of the projector's weights."""
        return next(self.projector.parameters()).dtype

    def _pool(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        rows = torch.arange(len(hidden), device=hidden.device)
        if self.pooling == "mean":
            weights = batch.pool_mask.unsqueeze(-1)  # (rows, tokens, 1)
            return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)
        if self.pooling == "cls":
            return hidden[rows, batch.mask.argmax(dim=1)]
        columns = torch.arange(hidden.shape[1], device=hidden.device)
        return hidden[rows, (batch.mask * columns).argmax(dim=1)]

    @torch.no_grad()
    def _mean_token_norm(self) -> float:
        module = self.transformer.get_input_embeddings()
        weight = next(module.parameters())  # (vocabulary, dim)
        # Through the module, so that a scale inside it counts; a sample is enough for a mean.
        ids = torch.arange(0, len(weight), max(1, len(weight) // 4096), device=weight.device)
        return float(module(ids).float().norm(dim=-1).mean())


def is_causal(config: PretrainedConfig) -> bool:
    """Return whether a model of this configuration attends to the past only.

    Every bidirectional family has a masked-language-model head in transformers, and no decoder LLM has.
    """
    if getattr(config, "use_bidirectional_attention", False):
        return False
    return type(config) not in MODEL_FOR_MASKED_LM_MAPPING


def load_transformer(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    num_layers: int | None = None,
    adapter: Path | None = None,
    gguf_file: str | None = None,
    int8: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a transformer from a local folder.

    Args:
        folder: Holds `config.json` and safetensors, or the GGUF file.
        dtype: Weight dtype; None keeps the stored one.
        num_layers: Keep the first N layers only.
        adapter: Folder of a PEFT adapter that is merged into the weights.
        gguf_file: Name of a GGUF file in the folder; its weights are dequantised.
        int8: Whether the weights are int8 rows, which become float32.
        trust_remote_code: Allow code from the folder to run.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        CheckpointError: If the folder holds no loadable model.
        ConfigError: If there are fewer layers than asked for.
        MissingExtraError: If a GGUF file or an adapter needs a package that is not installed.
    """
    if gguf_file is not None and not (folder / gguf_file).is_file():
        raise CheckpointError(f"{folder} has no file {gguf_file}. Name a GGUF file of this folder.")
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        raise CheckpointError(f"{adapter} has no adapter_config.json. Name the folder of a PEFT adapter.")
    _require(gguf_file is not None, "gguf", "reading GGUF files")
    _require(adapter is not None, "peft", "loading an adapter")
    model: PreTrainedModel
    try:
        with quiet():
            config = AutoConfig.from_pretrained(
                folder, trust_remote_code=trust_remote_code, **({"gguf_file": gguf_file} if gguf_file else {})
            )
            if int8:
                model, report = load_int8_model(folder, config, trust_remote_code=trust_remote_code)
            else:
                model, report = AutoModel.from_pretrained(
                    folder,
                    dtype=dtype if dtype is not None else "auto",
                    trust_remote_code=trust_remote_code,
                    output_loading_info=True,
                    **({"gguf_file": gguf_file} if gguf_file else {"use_safetensors": True}),
                )
    except (MemoryError, torch.OutOfMemoryError, CheckpointError):
        raise
    except Exception as error:  # A broken file makes transformers, safetensors and gguf raise almost anything.
        raise CheckpointError(
            f"{folder} does not load as a model: {reason_of(error)}. It needs config.json and safetensors weights."
        ) from error
    _check_complete(model, folder, sorted(report["missing_keys"]))
    if gguf_file is not None:
        model = _without_quantization(model, config)
    if adapter is not None:
        model = merge_adapter(model, adapter)
    if num_layers is not None:
        truncate_layers(model, num_layers)
    model.train(False)
    return model


def hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Compute the SHA-256 of named tensors; see `epic_rag.checkpoints.hash_weights`."""

    def values(tensor: torch.Tensor) -> npt.NDArray[Any]:
        value = tensor.detach().cpu()
        array: npt.NDArray[Any] = (value.to(torch.float16) if value.is_floating_point() else value).numpy()
        return array

    return hash_weights({name: partial(values, tensor) for name, tensor in tensors})


def _require(needed: bool, package: str, purpose: str) -> None:
    if needed and importlib.util.find_spec(package) is None:
        raise MissingExtraError(package, "train", purpose)


def _check_complete(model: PreTrainedModel, folder: Path, missing: list[str]) -> None:
    """Refuse a model with missing weights, which transformers initialises at random without an error."""
    if any(name.startswith("pooler.") for name in missing):
        # Nothing here reads a pooler's output, but random weights would give each load another fingerprint.
        model.register_module("pooler", None)
        missing = [name for name in missing if not name.startswith("pooler.")]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the weights that its config.json needs, for instance {missing[0]}. "
            "Copy the checkpoint again."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and load report; what matters of them is raised as an error."""
    log: Any = transformers_logging  # transformers leaves these functions without types
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        # The bar of the GGUF reader knows no switch; a terminal may have it.
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _without_quantization(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """Return the same weights under a plain configuration; one that names a quantisation cannot be saved."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    auto: Any = AutoModel
    plain: PreTrainedModel = auto.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    return plain


def truncate_layers(model: PreTrainedModel, num_layers: int) -> None:
    """Keep only the first layers of a model.

    Raises:
        ConfigError: If there are fewer layers than asked for.
    """
    config = model.config.get_text_config()
    total = int(config.num_hidden_layers)
    if not 1 <= num_layers <= total:
        raise ConfigError(f"num_layers is {num_layers}, but the model has {total} layers. Choose 1 to {total}.")
    # The text model, if there are others beside it (a vision tower may have as many layers).
    stack = next((module for module in model.modules() if getattr(module, "config", None) is config), model)
    cut = ""
    for name, module in list(stack.named_modules()):
        # A list inside the layers themselves (experts, say) may happen to have their number.
        if isinstance(module, nn.ModuleList) and len(module) == total and not (cut and name.startswith(cut)):
            parent, _, child = name.rpartition(".")
            setattr(stack.get_submodule(parent), child, module[:num_layers])
            cut = f"{name}."
    per_layer = {
        key: value
        for key, value in config.to_dict().items()
        if isinstance(value, (list, tuple)) and len(value) == total and "layer" in key
    }
    config.num_hidden_layers = num_layers
    for key, value in per_layer.items():
        setattr(config, key, list(value)[:num_layers])


def merge_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Merge a PEFT adapter into a model's weights.

    Args:
        model: Changed in place.
        adapter: The adapter's folder.

    Raises:
        CheckpointError: If it is not one of this model.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    try:
        weights = load_file(adapter / "adapter_model.safetensors")
        with warnings.catch_warnings():
            # PEFT uses a deprecated name of transformers, which does not concern the caller.
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = PeftModel(model, PeftConfig.from_pretrained(str(adapter)))
        # By default PEFT looks for the base model on the hub to see whether its embeddings were changed.
        embeddings = any("embed" in key and "lora_" not in key for key in weights)
        expected = set(get_peft_model_state_dict(wrapped, save_embedding_layers=embeddings))
        # An adapter that was trained on a model with a head names its weights one level deeper.
        root, deeper = "base_model.model.", f"base_model.model.{model.base_model_prefix}."
        named = {key if key in expected else root + key.removeprefix(deeper): weights[key] for key in weights}
        missing = sorted(expected - named.keys())
        if missing:
            raise ValueError(f"{len(missing)} of its {len(expected)} weights are missing, for instance {missing[0]}")
        set_peft_model_state_dict(wrapped, {key: named[key] for key in expected})
        merged: PreTrainedModel = wrapped.merge_and_unload()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{adapter} does not fit {type(model).__name__}: {reason_of(error)}. "
            "Name a mergeable PEFT adapter (LoRA) of this model, saved as safetensors."
        ) from error
    return merged
