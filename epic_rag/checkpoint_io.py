"""Reading and writing checkpoint folders.

`load_checkpoint` returns the parts of an encoder and `save_checkpoint` takes them, so that nothing here depends on the
encoder. Beside `epic.json` and the projector, a folder has the files that sentence-transformers needs to open it
zero-shot, and folders of that library (pooling, linear Dense modules, maximum length) can be read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from epic_rag.backbone import POOLINGS, Backbone, Pooling, ProjectorKind, hash_tensors, load_transformer, quiet
from epic_rag.checkpoints import (
    EPIC_FILE,
    FORMAT_VERSION,
    HEAD_FOLDER,
    INT8_FORMAT_VERSION,
    INT8_ROWS,
    PROJECTOR_FILE,
    QUERY_FILES,
    QUERY_FOLDER,
    QUERY_FORMAT_VERSION,
    EncoderConfig,
    check_width,
    is_int8,
)
from epic_rag.cpu_kernels import has_bfloat16_instructions, use_onednn
from epic_rag.errors import CheckpointError, ConfigError, reason_of
from epic_rag.files import apply_umask, save_tensors
from epic_rag.int8_weights import dequantise, quantise, remove_weights, write_int8_model
from epic_rag.numpy_bert import record_hash
from epic_rag.prompt import PromptBuilder

__all__ = [
    "INT8",
    "Checkpoint",
    "load_checkpoint",
    "parse_dtype",
    "save_checkpoint",
]

INT8 = "int8"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DEFAULT_MAX_TOKENS = 512
_IDENTITY = "torch.nn.modules.linear.Identity"
_ST_MODULES = "sentence_transformers.models"
_ROUTER_FILE = "router_config.json"
# Pooling modes: here, and as sentence-transformers names them.
_ST_POOLING = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}


@dataclass
class Checkpoint:
    """The parts of an encoder.

    Attributes:
        backbone: Transformer, projector, pooling, head; in evaluation mode.
        prompt: Tokenizer, template and length limits.
        config: The other settings of `epic.json`.
        name: Name in messages.
        source: Argument of `EpicEncoder.from_pretrained` that finds it again.
        truncate_dim: Number of dimensions to keep; None for all.
        weights_hash: Hash of the stored weights, if the loaded ones have lost bits of them; None if not.
    """

    backbone: Backbone
    prompt: PromptBuilder
    config: EncoderConfig
    name: str
    source: str
    truncate_dim: int | None = None
    weights_hash: str | None = None


def load_checkpoint(
    folder: Path,
    epic: Mapping[str, Any],
    *,
    device: torch.device,
    name: str,
    source: str,
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
) -> Checkpoint:
    """Load the parts of an encoder; see `EpicEncoder.from_pretrained` for the other arguments and errors."""
    wanted = parse_dtype(dtype, device)
    transformer = load_transformer(
        folder,
        num_layers=num_layers,
        adapter=None if adapter is None else Path(adapter).expanduser(),
        gguf_file=gguf_file,
        int8=gguf_file is None and is_int8(epic),
        trust_remote_code=trust_remote_code,
    )
    tokenizer = _load_tokenizer(folder, gguf_file, trust_remote_code)
    stored_projector = epic.get("projector", "linear")
    if projector is not None and epic and projector != stored_projector:
        raise ConfigError(f"{folder} was trained with projector {stored_projector!r}, not {projector!r}. Leave it out.")
    chosen_pooling = pooling or epic.get("pooling") or _read_pooling(folder)
    if chosen_pooling is not None and chosen_pooling not in POOLINGS:
        raise ConfigError(f"Unknown pooling {chosen_pooling!r}. Choose one of {', '.join(POOLINGS)}.")
    limit = _default_length(folder, tokenizer)
    try:
        backbone = Backbone(
            transformer,
            pooling=cast("Pooling | None", chosen_pooling),
            projector=cast("ProjectorKind", projector or stored_projector),
        )
        backbone.set_head(_read_head(folder))
        _load_projector(backbone, folder, required=bool(epic))
        if epic.get("format_version") == QUERY_FORMAT_VERSION:
            _load_query_weights(backbone, folder, is_cut=num_layers is not None, has_adapter=adapter is not None)
        positions = backbone.max_positions
        prompt = PromptBuilder.from_settings(
            tokenizer,
            epic,
            append_eos=backbone.pooling == "last",
            limit=limit if positions is None else min(limit, positions),
            max_positions=positions,
            max_query_tokens=max_query_tokens,
            max_document_tokens=max_document_tokens,
        )
        stored_dim = None if epic.get("truncate_dim") is None else int(epic["truncate_dim"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / EPIC_FILE} does not fit this release ({error}). Copy the checkpoint again."
        ) from error
    weights_hash = None
    if wanted == torch.bfloat16 and transformer.dtype != torch.bfloat16:
        # bfloat16 drops bits that the fingerprint covers, so the hash is taken of the stored weights.
        weights_hash = hash_tensors(backbone.state_dict().items())
    backbone.to(device=device, dtype=wanted)
    use_onednn(backbone)
    return Checkpoint(
        backbone=backbone.eval(),
        prompt=prompt,
        config=EncoderConfig.from_dict(epic),
        name=name,
        source=source,
        truncate_dim=check_width(stored_dim if truncate_dim is None else truncate_dim, backbone.dimension),
        weights_hash=weights_hash,
    )


def save_checkpoint(folder: Path, checkpoint: Checkpoint, dtype: str | None = None, *, compact: bool = False) -> None:
    """Write a checkpoint folder; see `EpicEncoder.save_pretrained` for arguments and errors."""
    backbone, prompt = checkpoint.backbone, checkpoint.prompt
    int8 = dtype == INT8
    kept = backbone.transformer.dtype if dtype is None or int8 else parse_dtype(dtype, backbone.device, extra=(INT8,))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"No folder can be made at {folder} ({error}). Save the checkpoint elsewhere.") from error
    state = _state(backbone.transformer, kept)
    # New files, because other encoders may have the old ones memory-mapped.
    for file in [] if int8 else sorted(set(folder.glob("model*.safetensors")) - set(folder.glob("model-int8-*"))):
        file.unlink()
    with quiet():
        # config.json keeps naming the encoder's own dtype, which other libraries compute in: float16 is for the disk
        # only (slow on a CPU, and with other vectors).
        backbone.transformer.save_pretrained(folder, state_dict={} if int8 else state)
    # Weights in both formats would be two models, and other libraries would open the older one.
    new = write_int8_model(state, folder) if int8 else set(folder.glob("model*")) - set(folder.glob("model-int8-*"))
    apply_umask(*new)
    remove_weights(folder, keep=new)
    has_query_weights = _save_query_weights(checkpoint, folder, None if int8 else kept, compact=compact)
    version = INT8_FORMAT_VERSION if int8 else FORMAT_VERSION
    projector = {key: value.detach().to("cpu", kept) for key, value in backbone.projector.state_dict().items()}
    save_tensors(quantise(projector) if int8 else projector, folder / PROJECTOR_FILE)
    _save_tokenizer(prompt, folder)
    _write_sentence_transformers(checkpoint, folder, kept)
    epic = {
        "format_version": QUERY_FORMAT_VERSION if has_query_weights else version,
        "name": checkpoint.name,
        "pooling": backbone.pooling,
        "projector": backbone.projector.kind,
        "dimension": checkpoint.truncate_dim or backbone.dimension,
        **({} if checkpoint.truncate_dim is None else {"truncate_dim": checkpoint.truncate_dim}),
        "parameters": sum(value.numel() for value in backbone.parameters()),
        **({"weights": {"format": INT8_ROWS}} if int8 else {}),
        **prompt.settings(),
        **checkpoint.config.to_dict(),
    }
    weights_hash = record_hash(folder, epic)
    _write_json(folder / EPIC_FILE, epic if weights_hash is None else {**epic, "weights_hash": weights_hash})


def parse_dtype(dtype: str | torch.dtype | None, device: torch.device, *, extra: tuple[str, ...] = ()) -> torch.dtype:
    """Parse the name of a dtype.

    Args:
        dtype: A dtype or its name. None means float32 on a CPU and bfloat16 elsewhere; "auto" means bfloat16 on a CPU
            that multiplies it in hardware, too.
        device: Where the model runs.
        extra: Further names for the message, which the caller handles.

    Raises:
        ConfigError: If it is unknown.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" and not has_bfloat16_instructions() else torch.bfloat16
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    parsed = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if parsed is None or parsed not in _DTYPES.values():
        if dtype in (INT8, torch.int8) and not extra:
            raise ConfigError(f"int8 is a storage format. Load with one of {', '.join(_DTYPES)}.")
        raise ConfigError(f"Unknown dtype {dtype!r}. Choose one of {', '.join((*_DTYPES, *extra))}.")
    return parsed


def _load_projector(backbone: Backbone, folder: Path, *, required: bool) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / PROJECTOR_FILE
    if not file.is_file():
        if required:
            raise CheckpointError(f"{folder} has {EPIC_FILE} but no {PROJECTOR_FILE}. Copy the checkpoint again.")
        return
    try:
        backbone.projector.load_state_dict(dequantise(load_file(file)))
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} does not fit {EPIC_FILE} ({reason_of(error)}). Copy the checkpoint again."
        ) from error


def _state(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return a model's tensors on the CPU, floating-point ones in another dtype."""
    return {
        key: value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()
        for key, value in model.state_dict().items()
    }


def _load_query_weights(backbone: Backbone, folder: Path, *, is_cut: bool, has_adapter: bool) -> None:
    """Load the weights that only queries are read with.

    Args:
        backbone: Gets them.
        folder: The checkpoint.
        is_cut: Whether the model is cut to its first layers; those of the others are left out.
        has_adapter: Whether an adapter is merged into the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = next((folder / name for name in QUERY_FILES if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(
            f"{folder} has none of {', '.join(QUERY_FILES)}, and {EPIC_FILE} asks for one. Copy the checkpoint again."
        )
    if has_adapter:
        raise ConfigError(f"{folder} has weights of its own for queries, which take no adapter. Name its base model.")
    try:
        tensors = dequantise(load_file(file))
        known = dict(backbone.transformer.named_parameters())
        unknown = [] if is_cut else sorted(tensors.keys() - known.keys())
        if unknown:
            raise RuntimeError(f"unknown weight {unknown[0]}")
        # A whole model holds the shared weights, too.
        own = {name for name in tensors.keys() & known.keys() if not torch.equal(tensors[name], known[name])}
        backbone.separate_queries(own)
        with torch.no_grad():
            for name, weight in backbone.query_weights().items():
                weight.copy_(tensors[name])
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} does not fit the model ({reason_of(error)}). Copy the checkpoint again."
        ) from error


def _save_query_weights(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None, *, compact: bool) -> bool:
    """Write the weights that only queries are read with, as int8 rows if `dtype` is None; return True if there are any.

    In a floating-point format they are a whole model, with a tokenizer, that other libraries open, unless `compact`.
    """
    backbone = checkpoint.backbone
    int8_file, compact_file, _ = (folder / name for name in QUERY_FILES)
    int8_file.unlink(missing_ok=True)
    compact_file.unlink(missing_ok=True)
    shutil.rmtree(folder / QUERY_FOLDER, ignore_errors=True)
    if backbone.query_transformer is None:
        return False
    own = {name: value.detach().cpu() for name, value in backbone.query_weights().items()}
    if dtype is None:
        save_tensors(quantise(own), int8_file)
        return True
    if compact:
        save_tensors({name: value.to(dtype) for name, value in own.items()}, compact_file)
        return True
    model, state = backbone.query_transformer, _state(backbone.query_transformer, dtype)
    with quiet():
        model.save_pretrained(folder / QUERY_FOLDER, state_dict=state, max_shard_size="1TB")
    apply_umask(*(folder / QUERY_FOLDER).iterdir())
    _save_tokenizer(checkpoint.prompt, folder / QUERY_FOLDER)
    _write_lengths(folder / QUERY_FOLDER, checkpoint.prompt.max_query_tokens)
    return True


# Tokenizer


def _load_tokenizer(folder: Path, gguf_file: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, **extra
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder} has no tokenizer that loads ({reason_of(error)}). Add its tokenizer.json."
        ) from error
    return tokenizer


def _save_tokenizer(prompt: PromptBuilder, folder: Path) -> None:
    """Save the tokenizer so that it pads and appends the end token in other libraries as it does here."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = prompt.tokenizer
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    is_complete = backend is None or tokenizer("a")["input_ids"] == [*prompt.start, *bare, *prompt.stop]
    padding, processor = tokenizer.pad_token, None if backend is None else backend.post_processor
    try:
        if padding is None:
            tokenizer.pad_token = str(tokenizer.convert_ids_to_tokens(prompt.pad_id))
        if not is_complete:
            names = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in (*prompt.start, *prompt.stop)}
            pieces = [*(names[token] for token in prompt.start), "$A", *(names[token] for token in prompt.stop)]
            backend.post_processor = TemplateProcessing(
                single=pieces, special_tokens=[(name, token) for token, name in names.items()]
            )
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.pad_token = padding
        if not is_complete:
            backend.post_processor = processor
    file = folder / "tokenizer.json"
    if file.is_file():
        # The indentation of a vocabulary is a third of its file.
        data = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


# Files of sentence-transformers


def _write_sentence_transformers(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype) -> None:
    """Write modules, pooling, head, lengths and prompts; `dtype` is that of the head on disk."""
    backbone = checkpoint.backbone
    modules = [("", "Router" if backbone.has_query_weights else "Transformer"), ("1_Pooling", "Pooling")]
    (folder / _ROUTER_FILE).unlink(missing_ok=True)
    if backbone.has_query_weights:
        routes = {"document": ".", "query": QUERY_FOLDER}
        _write_json(
            folder / _ROUTER_FILE,
            {
                "types": dict.fromkeys(routes.values(), f"{_ST_MODULES}.Transformer"),
                "structure": {route: [place] for route, place in routes.items()},
                "parameters": {"default_route": "document", "allow_empty_key": True},
            },
        )
    # An earlier checkpoint in the folder may have had a head.
    shutil.rmtree(folder / HEAD_FOLDER, ignore_errors=True)
    if backbone.head is not None:
        modules.append((HEAD_FOLDER, "Dense"))
        _write_dense(backbone.head, folder / HEAD_FOLDER, dtype)
    modules.append((f"{len(modules)}_Normalize", "Normalize"))
    _write_json(
        folder / "modules.json",
        [
            {"idx": number, "name": str(number), "path": path, "type": f"{_ST_MODULES}.{kind}"}
            for number, (path, kind) in enumerate(modules)
        ],
    )
    (folder / "1_Pooling").mkdir(exist_ok=True)
    _write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": backbone.width,
            **{f"pooling_mode_{flag}": mode == backbone.pooling for mode, flag in _ST_POOLING.items()},
            # The prompt's own tokens are not part of a query's mean.
            "include_prompt": False,
        },
    )
    _write_lengths(folder, checkpoint.prompt.max_document_tokens)
    template, instruction = checkpoint.prompt.template, checkpoint.config.default_instruction
    prompt = f"{template.instruction.format(instruction=instruction)}{template.query} " if instruction else ""
    _write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": {"query": prompt, "document": ""}, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )


def _write_lengths(folder: Path, longest: int) -> None:
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False})


def _read_pooling(folder: Path) -> str | None:
    """Return a folder's pooling; None if it names none or an unknown one."""
    data = _read_json(folder / "1_Pooling" / "config.json")
    # A flag for each mode up to release 5 of sentence-transformers, one name since.
    for name, flag in _ST_POOLING.items():
        if data.get(f"pooling_mode_{flag}") or data.get("pooling_mode") == (name if name != "last" else flag):
            return name
    return None


def _default_length(folder: Path, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the length limit of a folder without `epic.json`."""
    stored = _read_json(folder / "sentence_bert_config.json").get("max_seq_length")
    limit = stored if isinstance(stored, int) and stored > 0 else _DEFAULT_MAX_TOKENS
    # sentence-transformers keeps its limit in the tokenizer since release 6; one without a limit has a huge number.
    return min(limit, int(tokenizer.model_max_length))


def _read_head(folder: Path) -> nn.Linear | None:
    """Return the linear map behind a folder's pooling in float32; the product of several in a row.

    Raises:
        CheckpointError: If a dense module is not linear, or its weights are missing or do not fit.
    """
    listed = _read_json(folder / "modules.json", list)
    paths = [str(entry.get("path")) for entry in listed if str(entry.get("type", "")).endswith(".Dense")]
    head: nn.Linear | None = None
    for path in paths:
        dense = _read_dense(folder / path)
        head = dense if head is None else _product(dense, head)
    return head


def _read_dense(folder: Path) -> nn.Linear:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = _read_json(folder / "config.json")
    activation = str(settings.get("activation_function", _IDENTITY))
    if not activation.endswith("Identity"):
        raise CheckpointError(
            f"{folder} is a dense module with {activation}, but a head must be linear. Use another model."
        )
    try:
        head = nn.Linear(int(settings["in_features"]), int(settings["out_features"]), bool(settings.get("bias", True)))
        tensors = load_file(folder / "model.safetensors")
        head.load_state_dict({name.removeprefix("linear."): value.float() for name, value in tensors.items()})
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} has no dense module that loads ({reason_of(error)}). Copy the checkpoint again."
        ) from error
    return head


@torch.no_grad()
def _product(second: nn.Linear, first: nn.Linear) -> nn.Linear:
    """Return one map that equals `first` followed by `second`."""
    if second.in_features != first.out_features:
        raise CheckpointError(
            f"A dense module takes width {second.in_features}, but the one before it returns width "
            f"{first.out_features}. Copy the checkpoint again."
        )
    product = nn.Linear(first.in_features, second.out_features)
    product.weight.copy_(second.weight @ first.weight)
    bias = torch.zeros(second.out_features) if second.bias is None else second.bias
    product.bias.copy_(bias if first.bias is None else second.weight @ first.bias + bias)
    return product


def _write_dense(head: nn.Linear, folder: Path, dtype: torch.dtype) -> None:
    folder.mkdir(exist_ok=True)
    _write_json(
        folder / "config.json",
        {
            "in_features": head.in_features,
            "out_features": head.out_features,
            "bias": head.bias is not None,
            "activation_function": _IDENTITY,
        },
    )
    tensors = {f"linear.{name}": value.detach().to("cpu", dtype) for name, value in head.state_dict().items()}
    save_tensors({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")


def _read_json(file: Path, kind: type = dict) -> Any:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return kind()
    return data if isinstance(data, kind) else kind()


def _write_json(file: Path, data: object) -> None:
    file.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
