"""The task registry: names, instructions, errors, and what importing it costs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from epic_rag.errors import EpicError, TaskError
from epic_rag.tasks import DEFAULT_TASK, Task, get_task, list_tasks

NAMES = ["docs", "qa", "claims", "code", "commands", "papers", "sts", "intent"]

# The wording that the shipped checkpoint was trained with. Changing one of these is a change of the model's input.
TRAINED = {
    "docs": "Given a question about a software product, retrieve the documentation section that answers it",
    "claims": "Given a claim, retrieve evidence that supports or refutes it",
    "code": "Given a description of what code does, retrieve the Python code",
    "commands": "Given a description of a task, retrieve the shell command that does it",
    "intent": "Given a command to an assistant, retrieve a command with the same intent",
}


def test_the_tasks_are_listed_in_order_with_the_default_first() -> None:
    assert [task.name for task in list_tasks()] == NAMES
    assert list_tasks()[0].name == DEFAULT_TASK


def test_the_list_is_a_copy() -> None:
    list_tasks().clear()
    assert len(list_tasks()) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_found_by_its_name(name: str) -> None:
    task = get_task(name)
    assert isinstance(task, Task)
    assert task.name == name
    assert task.bank == name
    assert task in list_tasks()


@pytest.mark.parametrize("task", list_tasks(), ids=NAMES)
def test_instructions_have_one_form(task: Task) -> None:
    assert task.instruction.startswith("Given ")
    assert ", retrieve " in task.instruction
    assert not task.instruction.endswith(".")
    assert "\n" not in task.instruction
    assert task.description.endswith(".")


def test_no_two_tasks_share_an_instruction() -> None:
    assert len({task.instruction for task in list_tasks()}) == len(NAMES)


@pytest.mark.parametrize(("name", "instruction"), TRAINED.items())
def test_trained_instructions_are_word_for_word(name: str, instruction: str) -> None:
    assert get_task(name).instruction == instruction


def test_paraphrases_and_intents_are_symmetric() -> None:
    assert {task.name for task in list_tasks() if task.symmetric} == {"sts", "intent"}


def test_a_task_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_task("docs").instruction = "anything"  # type: ignore[misc]


def test_an_unknown_task_lists_the_known_ones_and_the_next_command() -> None:
    with pytest.raises(TaskError) as caught:
        get_task("poetry")
    message = str(caught.value)
    assert message == f"Unknown task 'poetry'. Choose one of {', '.join(NAMES)}."
    assert isinstance(caught.value, EpicError)


@pytest.mark.parametrize(("typed", "meant"), [("doc", "docs"), ("claim", "claims"), ("command", "commands")])
def test_a_near_miss_is_named(typed: str, meant: str) -> None:
    with pytest.raises(TaskError, match=rf"Unknown task '{typed}' \(did you mean {meant}\?\)"):
        get_task(typed)


@pytest.mark.parametrize("name", ["", "DOCS", " docs", None, 3, ["docs"]])
def test_names_are_exact(name: object) -> None:
    with pytest.raises(TaskError, match="Choose one of docs, qa"):
        get_task(name)  # type: ignore[arg-type]


def test_the_registry_imports_nothing_heavy() -> None:
    code = "import sys, epic_rag.tasks; print(sorted({'torch', 'transformers', 'numpy', 'typer'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
