"""Counts and reports of the soak tests: a few rounds normally, many with EPIC_RAG_SOAK=1.

EPIC_RAG_SOAK_SEED chooses other random moments.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

SOAK = os.environ.get("EPIC_RAG_SOAK") == "1"
SEED = int(os.environ.get("EPIC_RAG_SOAK_SEED", "1"))
_FOLDER = Path(__file__).parents[2] / "runs" / "soak"


def report(name: str, facts: dict[str, Any]) -> None:
    """Add facts to runs/soak/NAME.json, from which docs/reliability.md is filled; full counts only."""
    if SOAK:
        _FOLDER.mkdir(parents=True, exist_ok=True)
        file = _FOLDER / f"{name}.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**known, **facts}, indent=2) + "\n")
