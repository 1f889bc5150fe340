"""Keeps the libraries beneath from talking on the user's terminal.

Hugging Face's progress bars, Chroma's telemetry, deprecation warnings and the loggers of a dozen packages say
nothing that a person who searches a folder could act on. What epic-rag's own packages log at WARNING or above (with
`--verbose` at INFO, too) becomes one line on stderr. `EPIC_RAG_DEBUG=1` leaves everything as the libraries want it.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

from epic_rag_cli.output import message
from epic_rag_cli.verbosity import Verbosity, verbosity

__all__ = ["debugging", "listen", "quieten"]

_OWN = ("epic_rag", "epic_rag_chroma", "epic_rag_cli")

# Read when the libraries are imported, so they have to be set before.
_ENVIRONMENT = {
    "ANONYMIZED_TELEMETRY": "False",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


class _OwnMessages(logging.Handler):
    """Prints what epic_rag and its integrations log; drops what others do."""

    def emit(self, record: logging.LogRecord) -> None:
        wanted = record.levelno >= logging.WARNING or verbosity() is Verbosity.VERBOSE
        if wanted and record.name.partition(".")[0] in _OWN:
            message(record.levelname.lower(), record.getMessage())


def debugging() -> bool:
    """Return whether `EPIC_RAG_DEBUG` asks for tracebacks and the libraries' own messages."""
    return os.environ.get("EPIC_RAG_DEBUG", "") not in ("", "0")


def quieten() -> None:
    """Silence the libraries for this process; call before they are imported."""
    if debugging():
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # A handler on the root logger also keeps logging's last resort, which prints to stderr, from being used.
    logging.getLogger().addHandler(_OwnMessages(logging.WARNING))
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def listen() -> None:
    """Have what epic-rag's own packages log at INFO printed, too, as long as that is what the command asks for."""
    root = logging.getLogger()
    handler = next((handler for handler in root.handlers if isinstance(handler, _OwnMessages)), None)
    if handler is None:
        if not debugging():
            return  # not our process: whoever runs the command has a say in what is logged
        handler = _OwnMessages()
        root.addHandler(handler)
    handler.setLevel(logging.INFO)
    for name in _OWN:
        logging.getLogger(name).setLevel(logging.INFO)
