"""The built-in demonstration banks of epic-rag: data, one folder a task.

A folder holds `bank.json` (instruction and demonstrations as text), `README.md` and, once it was embedded
with `epic-rag bank build`, `embeddings.safetensors`. `epic_rag.DemonstrationBank.load("docs")` reads one.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["bank_folder", "bank_names"]

_ROOT = Path(__file__).parent


def bank_names() -> list[str]:
    """Names of the built-in banks, sorted."""
    return sorted(file.parent.name for file in _ROOT.glob("*/bank.json"))


def bank_folder(name: str) -> Path:
    """Folder of a built-in bank.

    Raises:
        FileNotFoundError: If there is no bank of that name; the message lists those there are.
    """
    names = bank_names()
    if name not in names:
        raise FileNotFoundError(f"no built-in bank {name!r}; there are {', '.join(names)}; run `epic-rag bank list`")
    return _ROOT / name
