"""Encoders for the commands: loaded only when a command comes to need one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from epic_rag import EpicEncoder

__all__ = ["encoder_for", "without_collections"]


def encoder_for(model: str | None, dtype: str, device: str | None) -> Callable[[], EpicEncoder] | None:
    """Return what loads `model`, or None to leave the choice to the index (its own model, or the default)."""
    if model is None:
        return None

    def load() -> EpicEncoder:
        from epic_rag import EpicEncoder

        return EpicEncoder.from_pretrained(model, dtype=dtype, device=device)

    return load


@contextmanager
def without_collections() -> Iterator[None]:
    """Suspend the search for cyclic garbage while a short piece of work imports and loads what it needs.

    Imports make hundreds of thousands of objects, none of them garbage; searching them every few thousand takes a
    third of the time of a cold query.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
