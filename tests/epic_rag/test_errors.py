"""The tree of errors."""

from __future__ import annotations

import pickle
import re

import pytest

import epic_rag
from epic_rag import EpicError, MissingExtraError, errors

ERRORS = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("kind", ERRORS)
def test_catching_the_base_catches_all(kind: type[Exception]) -> None:
    assert issubclass(kind, EpicError)
    assert kind.__doc__
    assert getattr(epic_rag, kind.__name__) is kind


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        found = re.match(r"([ │├└─]*)(\w+Error)\b", line)
        if found is None or not line.startswith("    "):
            continue
        depth, name = len(found[1]), found[2]
        parents = [(level, parent) for level, parent in parents if level < depth]
        drawn[name] = parents[-1][1] if parents else "Exception"
        parents.append((depth, name))
    assert drawn == {kind.__name__: kind.__bases__[0].__name__ for kind in ERRORS}


@pytest.mark.parametrize("kind", [kind for kind in ERRORS if kind is not MissingExtraError])
def test_an_error_survives_a_worker(kind: type[Exception]) -> None:
    error = pickle.loads(pickle.dumps(kind("two facts; run `this`")))
    assert type(error) is kind
    assert str(error) == "two facts; run `this`"


def test_a_missing_package_survives_a_worker_with_its_parts() -> None:
    error = MissingExtraError("peft", "train", "loading an adapter")
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert str(one) == (
            "Loading an adapter needs peft, which is not installed. Run `pip install 'epic-rag[train]'`."
        )
        assert (one.package, one.extra, one.purpose) == ("peft", "train", "loading an adapter")
