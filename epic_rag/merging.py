"""One model from two of the same kind: the mean of their weights.

Training on a few tasks makes a model better at them and worse at what it could do before. Between the weights before
and after lie models that keep most of both (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models").
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from epic_rag.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from epic_rag.encoder import EpicEncoder

__all__ = ["merge"]


def merge(encoder: EpicEncoder, other: EpicEncoder, *, weight: float = 0.5) -> None:
    r"""Move an encoder's weights towards another one's, in place.

        theta = (1 - w) theta_encoder + w theta_other

    (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", section 3.) This is of use where one of the two
    was trained from the other, or both from the same model; anything else gives a model that can do nothing.

    Prompt, lengths, default instruction and the rest of `epic.json` stay the encoder's own, and so does its projector
    if `other` was never trained with demonstrations. A training record, if there is one, says what
    was merged.

    Args:
        encoder: Is changed; its dtype is float32.
        other: Is left as it is.
        weight: w, the share of `other`, from 0 to 1.

    Raises:
        ConfigError: If the weight is no share, or a dtype is not float32.
        CheckpointError: If the two are not of the same kind: layers, widths, tokenizer, pooling, head.

    Example:
        >>> encoder = EpicEncoder.from_pretrained("epic-minilm", dtype="float32")    # doctest: +SKIP
        >>> start = EpicEncoder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")    # doctest: +SKIP
        >>> merge(encoder, start, weight=0.5)    # doctest: +SKIP
    """
    if not 0 <= weight <= 1 or not math.isfinite(weight):
        raise ConfigError(f"weight is {weight}; give the second model's share, from 0 to 1")
    for model in (encoder, other):
        if model.dtype != torch.float32:
            raise ConfigError(f'{model.name} is loaded as {model.dtype}; load both with dtype="float32"')
    _require_same_kind(encoder, other)
    trained = bool(other.settings.get("training"))
    theirs = other.backbone.state_dict()
    with torch.no_grad():
        for name, value in encoder.backbone.state_dict().items():
            if not value.is_floating_point() or (name.startswith("projector.") and not trained):
                continue
            value.lerp_(theirs[name].to(value.device), weight)
    record = encoder.settings.get("training")
    if record:
        merged = {"name": other.name, "fingerprint": other.fingerprint, "weight": weight}
        encoder.settings["training"] = {**record, "merged": [*record.get("merged", ()), merged]}
    encoder.forget_fingerprint()


def _require_same_kind(encoder: EpicEncoder, other: EpicEncoder) -> None:
    mine, theirs = encoder.backbone, other.backbone
    facts = [
        ("pooling", mine.pooling, theirs.pooling),
        ("architecture", type(mine.transformer).__name__, type(theirs.transformer).__name__),
    ]
    if other.settings.get("training"):
        facts.append(("projector", mine.projector.kind, theirs.projector.kind))
    for what, one, two in facts:
        if one != two:
            raise _different(encoder, other, f"{what} {one}", str(two))
    shapes = [
        {name: tuple(value.shape) for name, value in model.state_dict().items() if not name.startswith("projector.")}
        for model in (mine, theirs)
    ]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        one_shape, two_shape = shapes[0].get(name), shapes[1].get(name)
        if one_shape != two_shape:
            raise _different(encoder, other, f"{name} {one_shape or 'missing'}", str(two_shape or "missing"))
    if encoder.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise _different(encoder, other, "one vocabulary", "another one")


def _different(encoder: EpicEncoder, other: EpicEncoder, one: str, two: str) -> CheckpointError:
    return CheckpointError(
        f"{encoder.name} has {one}, {other.name} {two}; merge two models that were trained from the same one"
    )
