"""Entry point of `epic-rag` and `python -m epic_rag_cli`; without the extra `cli`, one line instead of a traceback."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from epic_rag.errors import MissingExtraError

__all__ = ["main"]

# The first package of the extra that is missing is named. Some of them come with others, so all are looked for.
_NEEDED = ("typer", "rich", "platformdirs", "watchfiles", "chromadb")


def main() -> None:
    """Run the command line."""
    missing = next((name for name in _NEEDED if find_spec(name) is None), None)
    if missing is not None:
        sys.exit(f"error: {MissingExtraError(missing, 'cli', 'the command line')}")
    from epic_rag_cli.main import main as run

    run()


if __name__ == "__main__":
    main()
