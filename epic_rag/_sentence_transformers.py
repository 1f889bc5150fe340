"""The files of a checkpoint folder that sentence-transformers reads: its modules, pooling, head and longest text.

They are written so that `SentenceTransformer(folder)` opens a checkpoint zero-shot, and read so that a folder of that
library opens here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from epic_rag.errors import CheckpointError, reason_of

if TYPE_CHECKING:
    from epic_rag.encoder import EpicEncoder

__all__ = ["HEAD_FOLDER", "default_length", "read_head", "read_pooling", "write_sentence_transformers"]

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
