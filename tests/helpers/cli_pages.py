"""The functions of docs/generate_cli.py, which is a script outside the packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_SCRIPT = Path(__file__).parents[2] / "docs/generate_cli.py"
_spec = importlib.util.spec_from_file_location("generate_cli", _SCRIPT)
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

SCHEMAS = _module.SCHEMAS
command_help = _module.command_help
commands = _module.commands
load_schema = _module.load_schema
markdown = _module.markdown
schema_tables = _module.schema_tables
