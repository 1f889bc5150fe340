"""PEFT adapters that a checkpoint is loaded with."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from transformers import PreTrainedModel

from epic_rag.errors import CheckpointError, reason_of

__all__ = ["merge_adapter"]


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
            # PEFT asks transformers for a name that is to go away, which is no business of the caller's.
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = PeftModel(model, PeftConfig.from_pretrained(str(adapter)))
        # Left to itself, PEFT looks for the base model on the hub to see whether its embeddings were changed.
        embeddings = any("embed" in key and "lora_" not in key for key in weights)
        expected = set(get_peft_model_state_dict(wrapped, save_embedding_layers=embeddings))
        # An adapter that was trained on a model with a head names its weights one level deeper.
        root, deeper = "base_model.model.", f"base_model.model.{model.base_model_prefix}."
        named = {key if key in expected else root + key.removeprefix(deeper): weights[key] for key in weights}
        missing = sorted(expected - named.keys())
        if missing:
            raise ValueError(f"{len(missing)} of its {len(expected)} weights are missing, {missing[0]} for one")
        set_peft_model_state_dict(wrapped, {key: named[key] for key in expected})
        merged: PreTrainedModel = wrapped.merge_and_unload()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{adapter} does not fit {type(model).__name__}: {reason_of(error)}; name a mergeable PEFT adapter (LoRA) "
            "of this model, saved as safetensors"
        ) from error
    return merged
