"""Encoders for the commands: loaded only when a command comes to need one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from epic_rag import EpicEncoder

__all__ = ["encoder_for"]


def encoder_for(model: str | None) -> Callable[[], EpicEncoder] | None:
    """Return what loads `model`, or None to leave the choice to the index (its own model, or the default)."""
    if model is None:
        return None

    def load() -> EpicEncoder:
        from epic_rag import EpicEncoder

        return EpicEncoder.from_pretrained(model)

    return load
