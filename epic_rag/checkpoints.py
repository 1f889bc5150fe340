"""Names to folders: what ships with the package, what lies on disk, what a hub has."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from epic_rag._int8 import check_int8, use_int8
from epic_rag.backbone import POOLINGS, Backbone, Pooling, ProjectorKind, hash_tensors, load_transformer, quiet
from epic_rag.batching import DeviceNames, Replicas, parse_devices
from epic_rag.cpu_kernels import multiplies_bfloat16, use_onednn
from epic_rag.errors import CheckpointError, ConfigError, reason_of
from epic_rag.int8_weights import INT8_ROWS, dequantise, quantise, remove_weights, write_int8_model
from epic_rag.prompt import PromptBuilder, PromptTemplate

if TYPE_CHECKING:
    from epic_rag.encoder import EpicEncoder

__all__ = [
    "DEFAULT_CHECKPOINT",
    "EPIC_FILE",
    "FORMAT_VERSION",
    "HEAD_FOLDER",
    "INT8_FORMAT_VERSION",
    "CheckpointInfo",
    "checked_dim",
    "default_length",
    "fingerprint",
    "is_int8",
    "is_shipped",
    "list_checkpoints",
    "load",
    "read_epic_file",
    "read_head",
    "read_pooling",
    "resolve",
    "save",
    "write_sentence_transformers",
]


DEFAULT_CHECKPOINT = "epic-minilm"
EPIC_FILE = "epic.json"
FORMAT_VERSION = 1
# Of a folder whose weights are int8 rows. A release that cannot read those says so, and reads all other folders.
INT8_FORMAT_VERSION = 2
_SHIPPED = Path(__file__).parent / "checkpoints"
# What a checkpoint may consist of. Pickled weights are left on the hub: only safetensors are ever read.
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "README.md"]


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint that ships with the package.

    Attributes:
        name: What `EpicEncoder.from_pretrained` takes.
        path: Its folder.
        dimension: Width of its vectors.
        parameters: Number of weights.
        size_bytes: Size of its files.
        description: One sentence.
        default: Whether it is loaded when no name is given.
    """

    name: str
    path: Path
    dimension: int
    parameters: int
    size_bytes: int
    description: str
    default: bool


def list_checkpoints() -> list[CheckpointInfo]:
    """The checkpoints that ship with the package, sorted by name. Reads no weights."""
    found = []
    for file in sorted(_SHIPPED.glob(f"*/{EPIC_FILE}")):
        data = read_epic_file(file.parent)
        found.append(
            CheckpointInfo(
                name=file.parent.name,
                path=file.parent,
                dimension=int(data.get("dimension", 0)),
                parameters=int(data.get("parameters", 0)),
                size_bytes=sum(item.stat().st_size for item in file.parent.rglob("*") if item.is_file()),
                description=str(data.get("description", "")),
                default=file.parent.name == DEFAULT_CHECKPOINT,
            )
        )
    return found


def is_shipped(folder: Path) -> bool:
    """Whether a checkpoint folder is one that ships with the package, so that its name alone finds it."""
    return folder.parent == _SHIPPED and (folder / EPIC_FILE).is_file()


def resolve(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    gguf_file: str | None = None,
) -> Path:
    """Find the folder of a checkpoint.

    A shipped name wins over a folder of the same name in the working directory, so that a default never depends on
    where a command is run; write `./name` for the folder.

    Args:
        name_or_path: A shipped name, a folder, or a hub name; None for the default checkpoint.
        revision: Commit or tag on the hub.
        local_files_only: Never ask the hub; use what was downloaded before.
        gguf_file: A GGUF file to fetch from the hub as well.

    Returns:
        A local folder.

    Raises:
        CheckpointError: If there is none.
    """
    name = DEFAULT_CHECKPOINT if name_or_path is None else os.fspath(name_or_path)
    if not name.strip():
        raise CheckpointError("the checkpoint's name is empty; run `epic-rag models` for those that are shipped")
    shipped = _SHIPPED / name
    if os.sep not in name and (shipped / EPIC_FILE).is_file():
        return shipped
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    known = ", ".join(info.name for info in list_checkpoints()) or "none"
    if folder.exists():
        raise CheckpointError(f"{name} is a file, a checkpoint is a folder; pass its folder (shipped: {known})")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"no checkpoint {name}: no such folder, and shipped are {known}; run `epic-rag models`")
    return _download(name, revision, local_files_only, gguf_file, known)


def _download(name: str, revision: str | None, local_only: bool, gguf_file: str | None, known: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*_HUB_PATTERNS, *([gguf_file] if gguf_file else [])]
    try:
        # The hub client checks every file against the hash that the hub names for the revision.
        return Path(snapshot_download(name, revision=revision, local_files_only=local_only, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = reason_of(error)
        raise CheckpointError(
            f"no checkpoint {name}: no such folder, shipped are {known}, and the hub did not give it ({reason}); "
            "run `epic-rag models`"
        ) from error


def read_epic_file(folder: Path) -> dict[str, Any]:
    """Read `epic.json`.

    Args:
        folder: A checkpoint folder.

    Returns:
        Its contents, or an empty dict for a plain Hugging Face folder.

    Raises:
        CheckpointError: If the file is not valid, or newer than this version reads.
    """
    file = folder / EPIC_FILE
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); copy the checkpoint again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} holds a {type(data).__name__}, expected an object; copy the checkpoint again")
    version = data.get("format_version")
    if version not in (FORMAT_VERSION, INT8_FORMAT_VERSION):
        raise CheckpointError(
            f"{file} has format version {version}, this release reads {FORMAT_VERSION} and {INT8_FORMAT_VERSION}; "
            "run `pip install -U epic-rag`"
        )
    if is_int8(data) and data.get("weights") != {"format": INT8_ROWS}:
        raise CheckpointError(
            f"{file} has weights stored as {data.get('weights')}, this release reads {{'format': {INT8_ROWS!r}}}; "
            "run `pip install -U epic-rag`"
        )
    return data


def is_int8(epic: Mapping[str, Any]) -> bool:
    """Whether the weights beside an `epic.json` with these contents are int8 rows."""
    return bool(epic.get("format_version") == INT8_FORMAT_VERSION)


# --- from _sentence_transformers
# The files of a checkpoint folder that sentence-transformers reads: its modules, pooling, head and longest text.
#
# They are written so that `SentenceTransformer(folder)` opens a checkpoint zero-shot, and read so that a folder of that
# library opens here.

HEAD_FOLDER = "2_Dense"
_DEFAULT_MAX_TOKENS = 512
_IDENTITY = "torch.nn.modules.linear.Identity"


def write_sentence_transformers(encoder: EpicEncoder, folder: Path, dtype: torch.dtype) -> None:
    """Write the files.

    Args:
        encoder: What is saved.
        folder: The checkpoint's.
        dtype: Of a head's weights on disk.
    """
    home = "sentence_transformers.models"
    modes: dict[str, Literal["mean_tokens", "cls_token", "lasttoken"]] = {
        "mean": "mean_tokens",
        "cls": "cls_token",
        "last": "lasttoken",
    }
    pooling = {
        "word_embedding_dimension": encoder.backbone.width,
        **{f"pooling_mode_{mode}": mode == modes[encoder.backbone.pooling] for mode in modes.values()},
        # The prompt's own tokens are not part of a query's mean.
        "include_prompt": False,
    }
    template = encoder.prompt.template
    instruction = encoder.default_instruction
    prompt = f"{template.instruction.format(instruction=instruction)}{template.query} " if instruction else ""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    # An earlier checkpoint in the folder may have had a head.
    shutil.rmtree(folder / HEAD_FOLDER, ignore_errors=True)
    if encoder.backbone.head is not None:
        modules.append((HEAD_FOLDER, "Dense"))
        _write_dense(encoder.backbone.head, folder / HEAD_FOLDER, dtype)
    modules.append((f"{len(modules)}_Normalize", "Normalize"))
    _write_json(
        folder / "modules.json",
        [
            {"idx": number, "name": str(number), "path": path, "type": f"{home}.{kind}"}
            for number, (path, kind) in enumerate(modules)
        ],
    )
    (folder / "1_Pooling").mkdir(exist_ok=True)
    _write_json(folder / "1_Pooling" / "config.json", pooling)
    _write_json(
        folder / "sentence_bert_config.json",
        {"max_seq_length": encoder.prompt.max_document_tokens, "do_lower_case": False},
    )
    _write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": {"query": prompt, "document": ""}, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )


def read_pooling(folder: Path) -> str | None:
    """How a folder's model pools; None if it does not say, or in a way that is not known here."""
    data = _read_json(folder / "1_Pooling" / "config.json")
    # A flag for each mode up to release 5 of sentence-transformers, one name since.
    for name, flag, mode in (
        ("mean", "mean_tokens", "mean"),
        ("cls", "cls_token", "cls"),
        ("last", "lasttoken", "lasttoken"),
    ):
        if data.get(f"pooling_mode_{flag}") or data.get("pooling_mode") == mode:
            return name
    return None


def read_head(folder: Path) -> nn.Linear | None:
    """The linear map behind a folder's pooling, float32; several in a row are one, their product.

    Args:
        folder: A checkpoint's.

    Raises:
        CheckpointError: If a dense module is not linear, or its weights are missing or do not fit.
    """
    listed = _read_json(folder / "modules.json", list)
    paths = [str(entry.get("path")) for entry in listed if str(entry.get("type", "")).endswith(".Dense")]
    head: nn.Linear | None = None
    for path in paths:
        found = _read_dense(folder / path)
        head = found if head is None else _product(found, head)
    return head


def _read_dense(folder: Path) -> nn.Linear:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = _read_json(folder / "config.json")
    activation = str(settings.get("activation_function", _IDENTITY))
    if not activation.endswith("Identity"):
        raise CheckpointError(
            f"{folder} is a dense module with {activation}, an encoder's head here is linear; use another model"
        )
    try:
        head = nn.Linear(int(settings["in_features"]), int(settings["out_features"]), bool(settings.get("bias", True)))
        tensors = load_file(folder / "model.safetensors")
        head.load_state_dict({name.removeprefix("linear."): value.float() for name, value in tensors.items()})
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} has no dense module that loads ({reason_of(error)}); copy the checkpoint again"
        ) from error
    return head


@torch.no_grad()
def _product(second: nn.Linear, first: nn.Linear) -> nn.Linear:
    """One map that does what two do one after the other."""
    if second.in_features != first.out_features:
        raise CheckpointError(
            f"a dense module takes vectors of width {second.in_features}, the one before makes some of width "
            f"{first.out_features}; copy the checkpoint again"
        )
    product = nn.Linear(first.in_features, second.out_features)
    product.weight.copy_(second.weight @ first.weight)
    bias = torch.zeros(second.out_features) if second.bias is None else second.bias
    product.bias.copy_(bias if first.bias is None else second.weight @ first.bias + bias)
    return product


def _write_dense(head: nn.Linear, folder: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    settings = {
        "in_features": head.in_features,
        "out_features": head.out_features,
        "bias": head.bias is not None,
        "activation_function": _IDENTITY,
    }
    _write_json(folder / "config.json", settings)
    tensors = {f"linear.{name}": value.detach().to("cpu", dtype) for name, value in head.state_dict().items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")


def default_length(folder: Path, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest text of a folder that does not say so in `epic.json`."""
    own = _read_json(folder / "sentence_bert_config.json").get("max_seq_length")
    # sentence-transformers keeps its limit there since release 6; a tokenizer without one has a huge number.
    return min(own if isinstance(own, int) and own > 0 else _DEFAULT_MAX_TOKENS, int(tokenizer.model_max_length))


def _read_json(file: Path, kind: type = dict) -> Any:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return kind()
    return data if isinstance(data, kind) else kind()


def _write_json(file: Path, data: object) -> None:
    file.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# --- from _storage
# Reading and writing checkpoint folders.
#
# A checkpoint is a plain Hugging Face folder plus `epic.json` and `projector.safetensors`; it also carries the few
# files that let sentence-transformers open it (zero-shot).

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
