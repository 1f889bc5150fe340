"""Reading and writing checkpoint folders.

A checkpoint is a plain Hugging Face folder plus `epic.json` and `projector.safetensors`; it also carries the few
files that let sentence-transformers open it (zero-shot).
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from epic_rag._int8 import check_int8, use_int8
from epic_rag._kernels import multiplies_bfloat16, use_onednn
from epic_rag._quantisation import dequantise, quantise, remove_weights, write_int8_model
from epic_rag._sentence_transformers import default_length, read_head, read_pooling, write_sentence_transformers
from epic_rag.backbone import POOLINGS, Backbone, Pooling, hash_tensors, load_transformer, quiet
from epic_rag.checkpoints import (
    EPIC_FILE,
    FORMAT_VERSION,
    INT8_FORMAT_VERSION,
    INT8_ROWS,
    is_int8,
    is_shipped,
    read_epic_file,
    resolve,
)
from epic_rag.devices import DeviceNames, Replicas, parse_devices
from epic_rag.errors import CheckpointError, ConfigError, reason_of
from epic_rag.projector import ProjectorKind
from epic_rag.prompt import PromptBuilder, PromptTemplate

if TYPE_CHECKING:
    from epic_rag.encoder import EpicEncoder

__all__ = ["checked_dim", "fingerprint", "load", "save"]

PROJECTOR_FILE = "projector.safetensors"
INT8 = "int8"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SETTINGS = (
    "default_instruction",
    "max_demonstrations",
    "strategy",
    "temperature",
    "matryoshka_dims",
    "training",
    "description",
    "license",
    "base_model",
)


def load(
    cls: type[EpicEncoder],
    name_or_path: str | os.PathLike[str] | None,
    *,
    device: DeviceNames | None,
    dtype: str | torch.dtype | None,
    num_layers: int | None,
    adapter: str | os.PathLike[str] | None,
    gguf_file: str | None,
    pooling: str | None,
    projector: str | None,
    max_query_tokens: int | None,
    max_document_tokens: int | None,
    truncate_dim: int | None,
    trust_remote_code: bool,
    revision: str | None,
    local_files_only: bool,
) -> EpicEncoder:
    """See `EpicEncoder.from_pretrained`."""
    folder = resolve(name_or_path, revision=revision, local_files_only=local_files_only, gguf_file=gguf_file)
    target, *others = parse_devices(device)
    as_int8 = dtype in (INT8, torch.int8)
    if as_int8:
        check_int8(target, *others)
    wanted = torch.float32 if as_int8 else parse_dtype(dtype, target, extra=(INT8,))
    epic = read_epic_file(folder)
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
        raise ConfigError(
            f"{folder} was trained with projector {stored_projector!r}, you asked for {projector!r}; leave it out"
        )
    pooled = pooling or epic.get("pooling") or read_pooling(folder)
    if pooled is not None and pooled not in POOLINGS:
        raise ConfigError(f"pooling is {pooled!r}, known are {', '.join(POOLINGS)}; choose one of them")
    limit = default_length(folder, tokenizer)
    try:
        backbone = Backbone(
            transformer,
            pooling=cast("Pooling | None", pooled),
            projector=cast("ProjectorKind", projector or stored_projector),
        )
        backbone.put_head(read_head(folder))
        _load_projector(backbone, folder, required=bool(epic))
        template = PromptTemplate(**epic.get("template", {}))
        if backbone.max_positions is not None:
            limit = min(limit, backbone.max_positions)
        query_limit = int(epic.get("max_query_tokens", limit))
        document_limit = int(epic.get("max_document_tokens", limit))
        stored_dim = None if epic.get("truncate_dim") is None else int(epic["truncate_dim"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / EPIC_FILE} does not fit this release ({error}); copy the checkpoint again"
        ) from error
    builder = PromptBuilder(
        tokenizer,
        template,
        append_eos=bool(epic.get("append_eos", backbone.pooling == "last")),
        max_query_tokens=_checked_limit("max_query_tokens", max_query_tokens, query_limit),
        max_document_tokens=_checked_limit("max_document_tokens", max_document_tokens, document_limit),
        max_positions=backbone.max_positions,
    )
    name, source = _identity(name_or_path, folder, revision)
    weights = None
    if as_int8 or (wanted == torch.bfloat16 and transformer.dtype != torch.bfloat16):
        # int8 and bfloat16 drop bits that the fingerprint reads, so it is taken from what is stored.
        weights = hash_tensors(backbone.state_dict().items())
    backbone.to(device=target, dtype=wanted)
    if as_int8:
        use_int8(backbone.transformer)
    use_onednn(backbone)
    encoder = cls(
        backbone.eval(),
        builder,
        name=str(epic.get("name") or name),
        source=source,
        settings={key: epic[key] for key in _SETTINGS if key in epic},
    )
    encoder._fingerprint = weights
    encoder.truncate_dim = checked_dim(stored_dim if truncate_dim is None else truncate_dim, backbone)
    encoder.replicas = Replicas(others)
    if others:
        # Now rather than with the first texts: that weights do not fit a device is an error of loading.
        encoder.replicas.of(backbone)
    return encoder


def fingerprint(encoder: EpicEncoder, weights: str) -> str:
    """See `EpicEncoder.fingerprint`; `weights` is the hash of the backbone's tensors."""
    facts = {
        "weights": weights,
        "pooling": encoder.backbone.pooling,
        "projector": encoder.backbone.projector.kind,
        "dimension": encoder.dimension,
        "default_instruction": encoder.default_instruction,
        **encoder.prompt.settings(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def save(encoder: EpicEncoder, folder: Path, dtype: str | None) -> None:
    """See `EpicEncoder.save_pretrained`."""
    from safetensors.torch import save_file

    computed = torch.float32 if encoder.dtype == torch.int8 else encoder.dtype
    int8 = dtype == INT8 or (dtype is None and encoder.dtype == torch.int8)
    kept = computed if dtype is None or int8 else parse_dtype(dtype, encoder.device, extra=(INT8,))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"no folder can be made at {folder} ({error}); save the checkpoint elsewhere") from error
    transformer = encoder.backbone.transformer
    state = {
        key: value.detach().to("cpu", kept if value.is_floating_point() else value.dtype).contiguous()
        for key, value in transformer.state_dict().items()
    }
    with quiet():
        # config.json goes on naming the encoder's own dtype, the one to compute in: other libraries take theirs from
        # it, and float16 is for the disk (a CPU is slow in it, and its vectors are others).
        transformer.save_pretrained(folder, state_dict={} if int8 else state)
    # Weights of both formats in one folder would be two models, and other libraries would open the older one.
    new = write_int8_model(state, folder) if int8 else set(folder.glob("model*")) - set(folder.glob("model-int8-*"))
    remove_weights(folder, keep=new)
    projector = {key: value.detach().to("cpu", kept) for key, value in encoder.backbone.projector.state_dict().items()}
    save_file(quantise(projector) if int8 else projector, folder / PROJECTOR_FILE)
    _save_tokenizer(encoder.prompt, folder)
    write_sentence_transformers(encoder, folder, kept)
    write_epic_file(encoder, folder, int8=int8)


def write_epic_file(encoder: EpicEncoder, folder: Path, *, int8: bool = False) -> None:
    """Write `epic.json` alone; `int8` is whether the weights beside it are int8 rows."""
    data = {
        "format_version": INT8_FORMAT_VERSION if int8 else FORMAT_VERSION,
        "name": encoder.name,
        "pooling": encoder.backbone.pooling,
        "projector": encoder.backbone.projector.kind,
        "dimension": encoder.dimension,
        **({} if encoder.truncate_dim is None else {"truncate_dim": encoder.truncate_dim}),
        "parameters": sum(value.numel() for value in encoder.backbone.parameters()),
        **({"weights": {"format": INT8_ROWS}} if int8 else {}),
        **encoder.prompt.settings(),
        **encoder.settings,
    }
    (folder / EPIC_FILE).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def checked_dim(truncate_dim: int | None, backbone: Backbone) -> int | None:
    """A width, if the model has it.

    Raises:
        ConfigError: If it has not.
    """
    if truncate_dim is not None and not 1 <= truncate_dim <= backbone.dimension:
        raise ConfigError(
            f"truncate_dim is {truncate_dim}, the model has {backbone.dimension} dimensions; "
            f"ask for 1 to {backbone.dimension}"
        )
    return truncate_dim


def parse_dtype(dtype: str | torch.dtype | None, device: torch.device, *, extra: tuple[str, ...] = ()) -> torch.dtype:
    """The dtype a string names; None means float32 on a CPU and bfloat16 elsewhere, "auto" what is fastest.

    Args:
        dtype: A dtype or its name.
        device: Decides what None means.
        extra: Further names for the message, which the caller takes.

    Raises:
        ConfigError: If it is unknown.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" and not multiplies_bfloat16() else torch.bfloat16
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    parsed = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if parsed is None or parsed not in _DTYPES.values():
        raise ConfigError(f"dtype is {dtype!r}, known are {', '.join((*_DTYPES, *extra))}; choose one of them")
    return parsed


def _load_tokenizer(folder: Path, gguf_file: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, **extra
        )
    except (OSError, ValueError, KeyError) as error:
        reason = reason_of(error)
        raise CheckpointError(f"{folder} has no tokenizer that loads: {reason}; it needs tokenizer.json") from error
    return tokenizer


def _load_projector(backbone: Backbone, folder: Path, *, required: bool) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / PROJECTOR_FILE
    if not file.is_file():
        if required:
            raise CheckpointError(f"{folder} has {EPIC_FILE} but no {PROJECTOR_FILE}; copy the checkpoint again")
        return
    try:
        backbone.projector.load_state_dict(dequantise(load_file(file)))
    except (SafetensorError, RuntimeError) as error:
        reason = reason_of(error)
        raise CheckpointError(f"{file} does not fit {EPIC_FILE} ({reason}); copy the checkpoint again") from error


def _save_tokenizer(prompt: PromptBuilder, folder: Path) -> None:
    """Save the tokenizer, taught to pad and to append the end token as the encoder does, for other libraries' sake."""
    tokenizer = prompt.tokenizer
    padding = tokenizer.pad_token
    if padding is None:
        tokenizer.pad_token = str(tokenizer.convert_ids_to_tokens(prompt.pad_id))
    try:
        _save_with_template(prompt, folder)
    finally:
        tokenizer.pad_token = padding
    file = folder / "tokenizer.json"
    if file.is_file():
        # The indentation of a vocabulary is a third of its file.
        data = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def _save_with_template(prompt: PromptBuilder, folder: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = prompt.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    own: list[int] = tokenizer("a")["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    if backend is None or own == [*prompt.start, *bare, *prompt.stop]:
        tokenizer.save_pretrained(folder)
        return
    before = backend.post_processor
    names = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in (*prompt.start, *prompt.stop)}
    pieces = [*(names[token] for token in prompt.start), "$A", *(names[token] for token in prompt.stop)]
    backend.post_processor = TemplateProcessing(
        single=pieces, special_tokens=[(name, token) for token, name in names.items()]
    )
    try:
        tokenizer.save_pretrained(folder)
    finally:
        backend.post_processor = before


def _identity(name_or_path: str | os.PathLike[str] | None, folder: Path, revision: str | None) -> tuple[str, str]:
    """The name of a checkpoint that has none of its own, and what `from_pretrained` takes to find it again."""
    if is_shipped(folder):
        return folder.name, folder.name
    if name_or_path is None or Path(name_or_path).expanduser().is_dir():
        return folder.absolute().name, str(folder.absolute())
    # The hub's name, unless a revision was asked for: only the downloaded folder is sure to be that one.
    return os.fspath(name_or_path), os.fspath(name_or_path) if revision is None else str(folder)


def _checked_limit(setting: str, given: int | None, stored: int) -> int:
    value = stored if given is None else given
    if value < 1:
        raise ConfigError(f"{setting} is {value}, a text has at least 1 token; pass 1 or more")
    return value
