from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from epic_rag import DemonstrationBank
from epic_rag_chroma import ChromaIndexer
from tests.conftest import make_encoder
from tests.integrations.server.conftest import Running, serving

PAIR = {"query": "how do I undo it", "passage": "Reset softly."}


def test_the_life_of_a_bank(running: Running) -> None:
    created = running.post("/v1/banks", {"name": "life", "task": "docs", "examples": [PAIR]})
    assert created.status_code == 201
    assert (created.json()["num_examples"], created.json()["built_in"]) == (1, False)
    more = [{"query": "cats", "passage": "They sleep."}, PAIR]  # one is there already
    added = running.post("/v1/banks/life/examples", {"examples": more})
    assert (added.status_code, added.json()["num_examples"]) == (201, 2)
    shown = running.client.get("/v1/banks/life").json()
    assert [example["query"] for example in shown["examples"]] == ["how do I undo it", "cats"]
    assert shown["examples"][1]["id"] == added.json()["examples"][0]
    assert len(DemonstrationBank.load(running.bank_folder / "life")) == 2  # the command line reads the same folder
    removed = running.client.delete(f"/v1/banks/life/examples/{shown['examples'][0]['id']}")
    assert removed.json()["num_examples"] == 1
    again = running.client.delete(f"/v1/banks/life/examples/{shown['examples'][0]['id']}")
    assert again.status_code == 404
    assert "life" in [bank["id"] for bank in running.client.get("/v1/banks").json()["data"]]
    assert "tiny-query@life" in [model["id"] for model in running.client.get("/v1/models").json()["data"]]


def test_a_bank_without_examples_is_zero_shot(running: Running) -> None:
    running.post("/v1/banks", {"name": "empty"})
    plain = running.post("/v1/embeddings", {"model": "tiny-query", "input": "undo"}).json()["data"]
    assert running.post("/v1/embeddings", {"model": "tiny-query@empty", "input": "undo"}).json()["data"] == plain


def test_several_banks_are_used_together(running: Running) -> None:
    for name, query in (("one", "cats"), ("two", "dogs")):
        running.post("/v1/banks", {"name": name, "examples": [{"query": query, "passage": f"About {query}."}]})
    pairs = [{"query": query, "passage": f"About {query}."} for query in ("cats", "dogs")]
    running.post("/v1/banks", {"name": "both", "examples": pairs})

    def vector(bank: str) -> list[float]:
        answer = running.post("/v1/embeddings", {"model": f"tiny-query@{bank}", "input": "birds"}).json()
        found: list[float] = answer["data"][0]["embedding"]
        return found

    assert vector("one,two") == pytest.approx(vector("both"), abs=1e-5)
    assert vector("one,two") != vector("one")
    assert running.post("/v1/embeddings", {"model": "tiny-query@one,none", "input": "birds"}).status_code == 404
    mixed = running.post("/v1/embeddings", {"model": "tiny-query@one,sts", "input": "birds"})
    assert (mixed.status_code, "one kind" in mixed.text) == (400, True)


def test_built_in_banks_do_not_change(running: Running) -> None:
    example = running.client.get("/v1/banks/docs").json()["examples"][0]
    assert running.post("/v1/banks/docs/examples", {"examples": [PAIR]}).status_code == 403
    assert running.client.delete(f"/v1/banks/docs/examples/{example['id']}").status_code == 403
    assert running.post("/v1/banks", {"name": "docs"}).status_code == 409


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"name": "../up"}, 400),
        ({"name": ".hidden"}, 400),
        ({"name": "a/b"}, 400),
        ({"name": ""}, 400),
        ({"name": "a" * 65}, 400),
        ({"name": "new\n"}, 400),
        ({"name": "new", "task": "cooking"}, 400),
        ({"name": "new", "examples": [{"query": "a", "passage": " "}]}, 400),
        ({"name": "new", "examples": [{"query": "a"}]}, 400),
        ({"name": "new", "examples": [["a", "b"]]}, 400),
    ],
)
def test_wrong_banks_are_refused(running: Running, body: dict[str, Any], status: int) -> None:
    assert running.post("/v1/banks", body).status_code == status
    assert not (running.bank_folder / "new").exists()


def test_unknown_banks(running: Running) -> None:
    for name in ("nothing", "..", "%2e%2e", "a%2Fb"):
        assert running.client.get(f"/v1/banks/{name}").status_code == 404
        assert running.post(f"/v1/banks/{name}/examples", {"examples": [PAIR]}).status_code == 404


def test_a_bank_that_another_program_changes(running: Running) -> None:
    running.post("/v1/banks", {"name": "shared", "examples": [PAIR]})
    DemonstrationBank([("a", "b"), ("c", "d"), ("e", "f")]).save(running.bank_folder / "shared")
    assert running.client.get("/v1/banks/shared").json()["num_examples"] == 3


def test_negatives_and_undo(running: Running) -> None:
    wrong = {"query": "cats", "passage": "Run the installer.", "relevant": False}
    running.post("/v1/banks", {"name": "taken-back", "examples": [PAIR, wrong]})
    shown = running.client.get("/v1/banks/taken-back").json()
    assert (shown["num_examples"], shown["num_negatives"], shown["can_undo"]) == (1, 1, False)
    assert running.post("/v1/banks/taken-back/undo", {}).status_code == 409  # nothing was changed yet
    states = [shown["examples"]]

    def change(method: str, rest: str, body: Any = None) -> dict[str, Any]:
        answer = running.client.request(method, f"/v1/banks/taken-back/{rest}", json=body)
        assert answer.status_code in (200, 201), answer.text
        states.append(running.client.get("/v1/banks/taken-back").json()["examples"])
        return answer.json()

    more = {"query": "reset", "passage": "Softly, to the parent."}
    change("POST", "examples", {"examples": [more, {**wrong, "relevant": True}]})  # changes its mind
    assert [each["relevant"] for each in states[-1]] == [True, True, True]
    (gone,) = (each["id"] for each in states[-1] if each["query"] == "reset")
    change("DELETE", f"examples/{gone}")
    change("POST", "examples", {"examples": [{**PAIR, "relevant": False}]})
    assert [(each["query"], each["relevant"]) for each in states[-1]] == [("cats", True), (PAIR["query"], False)]
    answer = change("POST", "examples", {"examples": [{**PAIR, "relevant": False}]})  # is there already
    assert answer["can_undo"] is True
    states.pop()

    def sorted_texts(examples: list[dict[str, Any]]) -> list[tuple[str, bool]]:
        return sorted((each["query"], each["relevant"]) for each in examples)

    for expected in reversed(states[:-1]):
        answer = running.post("/v1/banks/taken-back/undo", {}).json()
        assert sorted_texts(running.client.get("/v1/banks/taken-back").json()["examples"]) == sorted_texts(expected)
    assert answer["can_undo"] is False
    assert running.post("/v1/banks/taken-back/undo", {}).status_code == 409
    stored = DemonstrationBank.load(running.bank_folder / "taken-back")
    assert stored.embeddings is not None  # examples that come and go are not embedded again


def test_undo_leaves_what_another_program_wrote(running: Running) -> None:
    running.post("/v1/banks", {"name": "edited"})
    running.post("/v1/banks/edited/examples", {"examples": [PAIR]})
    DemonstrationBank([("a", "b")]).save(running.bank_folder / "edited")
    response = running.post("/v1/banks/edited/undo", {})
    assert response.status_code == 409
    assert "Another program" in response.json()["error"]["message"]
    assert running.client.get("/v1/banks/edited").json()["num_examples"] == 1
    assert running.post("/v1/banks/docs/undo", {}).status_code == 403
    assert running.post("/v1/banks/nothing/undo", {}).status_code == 404


def test_marks_are_used_at_once(running: Running) -> None:
    query = "where do cats sleep"
    for mode in ("hybrid", "dense", "keyword"):
        plain = running.post("/v1/search", {"query": query, "mode": mode, "task": "docs"}).json()["data"]
        last, first = plain[-1], plain[0]
        assert {hit["marked"] for hit in plain} == {None}
        examples = [{"query": query, "passage": last["text"]}]
        if len(plain) > 1:
            examples.append({"query": query, "passage": first["text"], "relevant": False})
        assert running.post("/v1/banks", {"name": mode, "task": "docs", "examples": examples}).status_code == 201
        hits = running.post("/v1/search", {"query": query, "mode": mode, "bank": mode}).json()["data"]
        assert (hits[0]["id"], hits[0]["marked"]) == (last["id"], "right")
        if len(plain) > 1:
            assert (hits[-1]["id"], hits[-1]["marked"]) == (first["id"], "wrong")


def test_expected_gain(running: Running) -> None:
    running.post("/v1/banks", {"name": "judged", "task": "docs"})
    pairs = [
        {"query": f"how do I fix fault {number}", "passage": f"Fault {number} needs part {number}."}
        for number in range(11)
    ]
    running.post("/v1/banks/judged/examples", {"examples": pairs[:9]})
    few = running.post("/v1/banks/judged/evaluate", {}).json()
    assert (few["num_examples"], few["report"], few["can_undo"]) == (9, None, True)
    assert "9 of the 10" in few["description"]
    running.post("/v1/banks/judged/examples", {"examples": pairs[9:]})
    found = running.post("/v1/banks/judged/evaluate", {"index": "docs"}).json()
    report = found["report"]
    assert report["low"] <= report["gain"] <= report["high"]
    chunks = running.client.get("/v1/indexes").json()["data"][0]["chunks"]
    assert (report["pairs"], report["passages"]) == (11, 11 + chunks)
    bank, encoder = DemonstrationBank.load(running.bank_folder / "judged"), make_encoder()
    with ChromaIndexer(running.docs / ".epic-rag", encoder=encoder) as indexer:
        expected = bank.evaluate(encoder, indexer.passage_vectors())
    assert report["gain"] == pytest.approx(expected.gain, abs=1e-4)
    for body, status in (({"index": "other"}, 404), ({"corpus": []}, 400), ([], 400)):
        assert running.post("/v1/banks/judged/evaluate", body).status_code == status
    assert running.post("/v1/banks/nothing/evaluate", {}).status_code == 404
    assert running.post("/v1/banks/docs/evaluate", {}).status_code == 200  # a built-in one can be judged, too


def test_concurrent_additions_are_all_kept(running: Running) -> None:
    running.post("/v1/banks", {"name": "busy"})

    def add(number: int) -> None:
        running.post("/v1/banks/busy/examples", {"examples": [{"query": f"q{number}", "passage": f"p{number}"}]})

    threads = [threading.Thread(target=add, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stored = json.loads((running.bank_folder / "busy" / "bank.json").read_text())
    assert {pair["query"] for pair in stored["demonstrations"]} == {f"q{number}" for number in range(12)}


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "banks").write_text("a file")
    with serving(make_encoder(), tmp_path) as server:
        response = server.post("/v1/banks", {"name": "mine"})
    assert response.status_code == 503
    assert str(tmp_path) not in response.text
