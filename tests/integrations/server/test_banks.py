from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from epic_rag import DemonstrationBank
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
