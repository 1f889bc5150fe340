from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_rag.demonstrations import Demonstration, DemonstrationBank
from epic_rag.errors import BankError, DataError, PromptError
from epic_rag.evaluation.datasets import CATALOGUE, ClassificationData, SetEntry, entry_for, load_local_set
from epic_rag.evaluation.runner import PromptPlan, normalised, plan_prompts, training_demonstrations
from epic_rag.tasks import list_tasks

LABELLED = st.lists(
    st.tuples(st.sampled_from(["one", "One ", "two", "three", "four", "five", "six", " "]), st.integers(0, 2)),
    max_size=20,
)


@settings(max_examples=200, deadline=None)
@given(train=LABELLED, test=LABELLED, labels=st.booleans(), count=st.integers(0, 6), seed=st.integers(0, 3))
def test_training_demonstrations_are_no_test_texts(
    train: list[tuple[str, int]], test: list[tuple[str, int]], labels: bool, count: int, seed: int
) -> None:
    data = ClassificationData(tuple(train), tuple(test), ("a", "b", "c"))
    drawn = training_demonstrations(data, labels=labels, count=count, seed=seed)
    assert len(drawn) <= count
    forbidden = {normalised(text) for text, _ in test}
    rows = {text: {label for other, label in train if other == text} for text, _ in train}
    for shown in drawn:
        assert normalised(shown.query) not in forbidden
        if labels:
            assert "abc".index(shown.passage) in rows[shown.query]
        else:
            assert normalised(shown.passage) not in forbidden
            assert rows[shown.query] & rows[shown.passage]
    assert drawn == training_demonstrations(data, labels=labels, count=count, seed=seed)


def test_training_demonstrations_go_round_the_labels() -> None:
    rows = tuple((f"text {number} of {label}", label) for number in range(6) for label in range(3))
    data = ClassificationData(rows, (("other", 0),), ("a", "b", "c"))
    drawn = training_demonstrations(data, labels=True, count=6)
    assert sorted(item.passage for item in drawn[:3]) == ["a", "b", "c"]
    assert len({item.query for item in drawn}) == 6
    assert drawn[:3] == training_demonstrations(data, labels=True, count=3)


def test_a_plan_gives_the_first_k() -> None:
    shown = tuple(Demonstration(f"q{number}", f"p{number}") for number in range(3))
    plan = PromptPlan("find it", "bank", shown, symmetric=True)
    assert plan.prompt(0).demonstrations == ()
    prompt = plan.prompt(2, strategy="text")
    assert (prompt.instruction, prompt.demonstrations) == ("find it", shown[:2])
    assert (prompt.symmetric, prompt.strategy) == (True, "text")
    assert plan.prompt(0, plain=True).instruction is None
    with pytest.raises(PromptError, match=r"4 demonstrations were asked, bank has 3; lower --num-demonstrations"):
        plan.prompt(4)
    with pytest.raises(PromptError, match="a plain model has no prompt"):
        plan.prompt(1, plain=True)


def test_a_source_is_a_bank_a_file_or_the_training_split(sets: Path, tmp_path: Path) -> None:
    requests = load_local_set(sets / "requests")
    entry = entry_for("requests", "classification")
    plan = plan_prompts(requests, entry, max_k=4)
    assert plan.source == "requests/train"
    assert plan.symmetric
    assert len(plan.demonstrations) == 4
    labels = plan_prompts(requests, entry, max_k=2, banks={"requests": "train-labels"})
    assert {item.passage for item in labels.demonstrations} == {"pay", "lost"}
    assert not labels.symmetric

    built_in = plan_prompts(requests, SetEntry("classify", "intent"), max_k=2, instructions={"requests": "mine"})
    bank = DemonstrationBank.load("intent")
    assert built_in.instruction == "mine"
    assert built_in.demonstrations == bank.demonstrations
    assert built_in.symmetric == bank.symmetric

    file = tmp_path / "pairs.jsonl"
    file.write_text('{"query": "q", "positive": "p"}\n', encoding="utf-8")
    from_file = plan_prompts(requests, entry, max_k=1, banks={"requests": str(file)})
    assert from_file.demonstrations == (Demonstration("q", "p"),)
    DemonstrationBank([("q", "p")], symmetric=True).save(tmp_path / "bank")
    assert plan_prompts(requests, entry, max_k=1, banks={"requests": str(tmp_path / "bank")}).symmetric
    with pytest.raises(BankError, match="no demonstration bank nothing"):
        plan_prompts(requests, entry, max_k=1, banks={"requests": "nothing"})
    assert plan_prompts(requests, entry, max_k=0, banks={"requests": "nothing"}).source is None
    with pytest.raises(DataError, match=r'"train" were asked for library, which has no training split'):
        plan_prompts(load_local_set(sets / "library"), entry, max_k=1)


@pytest.mark.parametrize("row", ['{"query": "Ask  ONE", "passage": "p"}', '{"query": "q", "passage": "ask one"}'])
def test_a_demonstration_may_not_be_a_test_text(sets: Path, tmp_path: Path, row: str) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(row + "\n", encoding="utf-8")
    with pytest.raises(
        DataError, match=r'(?i)"ask +one" is a demonstration of .*pairs\.jsonl and a test text of library'
    ):
        plan_prompts(load_local_set(sets / "library"), SetEntry("find", str(file)), max_k=1)


def test_the_catalogue_names_banks_that_are_there() -> None:
    known = {task.bank for task in list_tasks()}
    for name, entry in CATALOGUE.items():
        assert entry.instruction, name
        assert entry.demonstrations in known | {"train", "train-labels"}, name
    for kind in ("retrieval", "reranking", "sts", "classification", "clustering"):
        assert entry_for("unheard of", kind).instruction
    assert entry_for("Cranfield", "retrieval").demonstrations == "papers"
