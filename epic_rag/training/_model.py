"""The backbone of a run, ready to be trained."""

from __future__ import annotations

from typing import Any, cast

from epic_rag.backbone import Backbone
from epic_rag.encoder import EpicEncoder
from epic_rag.errors import ConfigError
from epic_rag.projector import ProjectorKind
from epic_rag.training._head import new_head
from epic_rag.training.config import TrainingConfig

__all__ = ["checkpoint_activations", "load_backbone"]


def load_backbone(config: TrainingConfig, device: str | None) -> EpicEncoder:
    """Load `config.model`.

    What is trained is float32; weights that LoRA freezes are in the dtype that is computed in.

    Args:
        config: The run.
        device: This process's device; None for the best there is.

    Raises:
        CheckpointError: If it does not load.
    """
    encoder = EpicEncoder.from_pretrained(
        config.model,
        device=device,
        dtype="float32" if config.lora_rank is None else config.dtype,
        num_layers=config.num_layers,
        gguf_file=config.gguf_file,
        pooling=config.pooling,
        projector=None if config.new_projector else config.projector,
    )
    if config.attention is not None:
        cast("Any", encoder.backbone.transformer).set_attn_implementation(config.attention)
    if config.output_dimension is not None:
        new_head(encoder.backbone, config.output_dimension)
        encoder.forget_fingerprint()
    if config.new_projector:
        encoder.backbone.renew_projector(cast("ProjectorKind", config.projector))
        encoder.forget_fingerprint()
    return encoder


def checkpoint_activations(backbone: Backbone) -> None:
    """Keep each layer's input alone for the backward pass, which computes the rest again.

    Raises:
        ConfigError: If the model's code cannot.
    """
    transformer = backbone.transformer
    if not transformer.supports_gradient_checkpointing:
        raise ConfigError(
            f"gradient_checkpointing is true and {type(transformer).__name__} does not support it; "
            "set it to false, and grad_cache to true for less memory"
        )
    # The other implementation wants an input with gradients, which token embeddings behind frozen weights have not.
    model: Any = transformer
    # transformers 5 has given the method another name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
