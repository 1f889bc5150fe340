"""The error of a command that was interrupted and can say what it had done."""

from __future__ import annotations

__all__ = ["Interrupted"]


class Interrupted(Exception):  # noqa: N818 - not an error: the user asked for it
    """Ctrl-C; the message is one line that says what was done and how to go on."""
