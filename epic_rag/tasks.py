"""Known tasks: names of instructions, each with a built-in bank of demonstrations.

`task="claims"` selects the instruction, `bank="claims"` the demonstrations. A custom instruction and a custom bank work
the same way.

Where the shipped checkpoint was trained on a task, the instruction here is that of training, word for word: an encoder
reads a familiar instruction better than a paraphrase.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from epic_rag.errors import TaskError

__all__ = ["DEFAULT_TASK", "Task", "get_task", "list_tasks"]

DEFAULT_TASK = "docs"
"""Default task of the command line."""


@dataclass(frozen=True)
class Task:
    """An instruction with a name.

    Attributes:
        name: Short name, as in `--task NAME`.
        instruction: What to retrieve, as the encoder reads it.
        symmetric: Whether both sides are of one kind (paraphrases, messages with the same intent); both are
            then encoded as queries.
        bank: Name of the built-in demonstration bank; None if there is none.
        description: One line for people.
    """

    name: str
    instruction: str
    symmetric: bool
    bank: str | None
    description: str


_TASKS = (
    Task(
        name="docs",
        instruction=("Given a question about a software product, retrieve the documentation section that answers it"),
        symmetric=False,
        bank="docs",
        description="Technical documentation: manuals, references, guides, release notes.",
    ),
    Task(
        name="qa",
        instruction="Given a question, retrieve passages that answer it",
        symmetric=False,
        bank="qa",
        description="Questions of general knowledge and the passages that answer them.",
    ),
    Task(
        name="claims",
        instruction="Given a claim, retrieve evidence that supports or refutes it",
        symmetric=False,
        bank="claims",
        description="Fact checking: a statement and the evidence for or against it.",
    ),
    Task(
        name="code",
        instruction="Given a description of what code does, retrieve the Python code",
        symmetric=False,
        bank="code",
        description="Python functions and classes, from a description of what they do.",
    ),
    Task(
        name="commands",
        instruction="Given a description of a task, retrieve the shell command that does it",
        symmetric=False,
        bank="commands",
        description="Shell commands, from a description of what is to be done.",
    ),
    Task(
        name="papers",
        instruction="Given the title or the topic of a paper, retrieve its abstract",
        symmetric=False,
        bank="papers",
        description="Scientific papers, from a title, a topic or a research question.",
    ),
    Task(
        name="sts",
        instruction="Given a sentence, retrieve a sentence with the same meaning",
        symmetric=True,
        bank="sts",
        description="Paraphrases: sentences that say the same in other words (symmetric).",
    ),
    Task(
        name="intent",
        instruction="Given a command to an assistant, retrieve a command with the same intent",
        symmetric=True,
        bank="intent",
        description="Messages that want the same thing, for classification and clustering (symmetric).",
    ),
)
_BY_NAME = {task.name: task for task in _TASKS}


def list_tasks() -> list[Task]:
    """Return all known tasks, the default one first."""
    return list(_TASKS)


def get_task(name: str) -> Task:
    """Return the task of a name.

    Args:
        name: One of the names in `list_tasks()`.

    Raises:
        TaskError: If there is no such task; the message lists those there are.

    Example:
        >>> get_task("claims").instruction
        'Given a claim, retrieve evidence that supports or refutes it'
    """
    if isinstance(name, str) and name in _BY_NAME:
        return _BY_NAME[name]
    close = difflib.get_close_matches(name, _BY_NAME, n=1) if isinstance(name, str) else []
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise TaskError(f"Unknown task {name!r}{hint}. Choose one of {', '.join(_BY_NAME)}.")
