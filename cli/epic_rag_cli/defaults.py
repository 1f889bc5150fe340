"""What the commands do when nothing is said; each value in one place."""

from __future__ import annotations

from typing import Literal

# The task whose instruction `query` gives the encoder when neither --task nor --bank is given.
from epic_rag.tasks import DEFAULT_TASK

__all__ = [
    "DEFAULT_DTYPE",
    "DEFAULT_HITS",
    "DEFAULT_TASK",
    "INDEX_FOLDER",
    "MAX_SKIPPED_SHOWN",
    "ComputeDtype",
    "ShownBy",
]

DEFAULT_HITS = 5
"""How many passages `query` prints without -k."""

ComputeDtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]
"""What a model can compute in."""

ShownBy = Literal["epic", "text", "none", "task-vector"]
"""How demonstrations reach a query; `epic_rag.task_vector` has the same names, and loads torch."""

DEFAULT_DTYPE: ComputeDtype = "auto"
"""What a model computes in without --dtype."""

INDEX_FOLDER = ".epic-rag"
"""The name of an index folder that stands in the folder it indexes."""

MAX_SKIPPED_SHOWN = 10
"""How many skipped files `index` names; of more, it says how many there are for each reason, and --json lists all."""
