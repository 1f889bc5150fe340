"""Counts are what the prompt builder makes, FLOPs are what the formula says, and the script runs as it is documented."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from epic_rag import batching as devices
from epic_rag.backbone import Backbone
from epic_rag.demonstrations import DemonstrationBank
from epic_rag.encoder import EpicEncoder
from epic_rag.errors import ConfigError
from epic_rag.evaluation.efficiency import EfficiencyReport, QueryCost, measure_queries
from epic_rag.evaluation.measuring import analytic_flops, count_flops, peak_bytes, spread_of
from epic_rag.evaluation.training_cost import measure_training
from epic_rag.prompt import PromptTemplate

ROOT = Path(__file__).parents[3]
KS = (1, 2, 4)
PAIRS = [
    (f"how do I install part {number}", f"run the installer {'again and ' * number}read it") for number in range(6)
]
BANK = DemonstrationBank(PAIRS, instruction="Given a question, retrieve passages that answer it")
QUERIES = ["a", "how do I install the package in an environment", "where is the manual"]


@pytest.fixture(scope="module")
def report(tiny_encoder: EpicEncoder) -> EfficiencyReport:
    return measure_queries(tiny_encoder, BANK, QUERIES, KS, runs=2)


@pytest.fixture
def cost(report: EfficiencyReport) -> Callable[[str, int], QueryCost]:
    return lambda shown, k: next(item for item in report.queries if (item.shown, item.k) == (shown, k))


def test_every_condition_is_measured_once(report: EfficiencyReport) -> None:
    found = [(item.shown, item.k) for item in report.queries]
    assert found == [("none", 0), *(("text", k) for k in KS), *(("epic", k) for k in KS)]
    for item in report.queries:
        assert item.single_seconds is not None
        assert item.batch_seconds is not None
        assert 0 < item.single_seconds.low <= item.single_seconds.median <= item.single_seconds.high
        assert item.single_seconds.runs == 2
        assert item.peak_bytes > 0


def test_positions_are_those_of_the_prompt_builder(
    report: EfficiencyReport, cost: Callable[[str, int], QueryCost], tiny_encoder: EpicEncoder
) -> None:
    single = report.demonstrations["single_query"]
    assert single == "where is the manual"  # of median length
    prompt = tiny_encoder.prompt
    for shown, k in [("none", 0), *((shown, k) for shown in ("text", "epic") for k in KS)]:
        prefix = prompt.prefix(BANK.instruction, num_slots=k, demonstrations=PAIRS[:k], strategy=shown)  # type: ignore[arg-type]
        [row] = prompt.queries(prefix, [single])
        assert (cost(shown, k).prompt_tokens, cost(shown, k).positions) == (len(prefix.ids), len(row.ids)), (shown, k)


@pytest.mark.parametrize("separators", ["words", "none"])
def test_a_demonstration_of_epic_costs_a_constant(tiny_encoder: EpicEncoder, separators: Any) -> None:
    template = PromptTemplate(separators=separators)
    encoder = EpicEncoder(tiny_encoder.backbone, replace(tiny_encoder.prompt, template=template))
    words = [template.query, template.response, template.end]
    each = 2 + (sum(len(ids) for ids in encoder.prompt.token_ids(words)) if separators == "words" else 0)
    costs = [item for item in measure_queries(encoder, BANK, QUERIES, KS, runs=2).queries if item.shown == "epic"]
    assert [item.demonstration_tokens for item in costs] == [each * k for k in KS]
    assert separators == "words" or each == 2


def test_a_demonstration_of_text_costs_all_of_its_tokens(
    cost: Callable[[str, int], QueryCost], tiny_encoder: EpicEncoder
) -> None:
    template = tiny_encoder.prompt.template
    words = [template.query, template.response, template.end]
    for k in KS:
        texts = [*words * k, *(f" {text}" for pair in PAIRS[:k] for text in pair)]
        assert cost("text", k).demonstration_tokens == sum(len(ids) for ids in tiny_encoder.prompt.token_ids(texts))
    assert cost("text", 4).demonstration_tokens > cost("epic", 4).demonstration_tokens


@pytest.mark.parametrize("name", ["tiny_encoder", "tiny_bidirectional_encoder"])
def test_flops_are_those_of_the_formula_and_grow(name: str, request: pytest.FixtureRequest) -> None:
    costs = measure_queries(request.getfixturevalue(name), BANK, QUERIES, KS, runs=2).queries
    assert [item.flops for item in costs] == [item.analytic_flops for item in costs]
    zero = costs[0].flops
    for shown in ("text", "epic"):
        flops = [zero, *(item.flops for item in costs if item.shown == shown)]
        assert flops == sorted(set(flops))


def test_what_is_counted_is_done_in_this_thread(tiny_encoder: EpicEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_WORTH", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    seen = set()
    forward = Backbone.forward

    def noted(self: Backbone, *arguments: Any) -> torch.Tensor:
        seen.add(threading.current_thread())
        return forward(self, *arguments)

    monkeypatch.setattr(Backbone, "forward", noted)
    replicas = tiny_encoder.replicas
    found = measure_queries(tiny_encoder, BANK, QUERIES, [4], runs=2)
    assert seen == {threading.main_thread()}
    assert all(item.flops > 0 for item in found.queries)
    assert tiny_encoder.replicas is replicas
    tiny_encoder.encode_document(QUERIES)  # or else the workers would not have been there at all
    assert seen != {threading.main_thread()}


def test_flops_and_memory_of_a_known_call() -> None:
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7

    def call() -> None:
        first = torch.empty(1000)  # 4000 bytes
        second = torch.empty(500)
        del first
        third = torch.empty(900)
        del second, third

    assert peak_bytes(torch.device("cpu"), call) == 6000


def test_the_formula_counts_slots(tiny_encoder: EpicEncoder) -> None:
    width = tiny_encoder.dimension
    assert analytic_flops(tiny_encoder, 9, slots=4) - analytic_flops(tiny_encoder, 9) == 4 * 2 * width * width


def test_spread_has_median_and_quartiles() -> None:
    spread = spread_of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (spread.low, spread.median, spread.high, spread.runs) == (2.0, 3.0, 4.0, 5)


def test_a_prompt_that_does_not_fit_says_so(tiny_encoder: EpicEncoder) -> None:
    encoder = EpicEncoder(tiny_encoder.backbone, replace(tiny_encoder.prompt, max_positions=90))
    report = measure_queries(encoder, BANK, QUERIES, [1, 4], runs=2)
    missing = [item for item in report.queries if item.why_not]
    assert [(item.shown, item.k) for item in missing] == [("text", 4)]
    assert "text, k = 4: no room for a query" in report.to_markdown()
    assert missing[0].single_seconds is None


@pytest.mark.parametrize(
    ("ks", "queries", "runs", "said"),
    [
        ([], QUERIES, 2, "the numbers of demonstrations are []"),
        ([0, 1], QUERIES, 2, "give numbers of 1 or more"),
        ([7], QUERIES, 2, "7 demonstrations were asked for and the bank has 6"),
        ([1], [], 2, "there are 0 queries"),
        ([1], QUERIES, 1, "1 runs were asked for"),
    ],
)
def test_what_cannot_work(tiny_encoder: EpicEncoder, ks: list[int], queries: list[str], runs: int, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        measure_queries(tiny_encoder, BANK, queries, ks, runs=runs)
    assert said in str(error.value)


def test_a_training_step_of_each_strategy(tiny_encoder: EpicEncoder) -> None:
    before = tiny_encoder.fingerprint
    costs = {
        cost.strategy: cost
        for cost in measure_training(
            tiny_encoder, BANK.demonstrations, instruction="Find", max_demonstrations=3, runs=2
        )
    }
    assert set(costs) == {"epic", "text", "none"}
    assert {cost.pairs for cost in costs.values()} == {6}
    # The same demonstrations: as vectors they cost less than as texts, and more than none.
    assert costs["none"].tokens < costs["epic"].tokens < costs["text"].tokens
    assert costs["none"].flops < costs["epic"].flops < costs["text"].flops
    # Backward computes the gradients of weights and of inputs: three times the forward pass in all, at least.
    assert costs["none"].flops > 2.5 * analytic_flops(tiny_encoder, costs["none"].tokens // 12) * 12
    assert all(cost.seconds is not None and cost.seconds.runs == 2 for cost in costs.values())
    tiny_encoder.invalidate_caches()
    assert tiny_encoder.fingerprint == before, "the caller's encoder was trained"


def test_training_needs_pairs(tiny_encoder: EpicEncoder) -> None:
    with pytest.raises(ConfigError, match="1 pairs and 5 runs were given"):
        measure_training(tiny_encoder, BANK.demonstrations[:1], instruction="")


def test_the_command_of_the_page() -> None:
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    [arguments] = re.findall(r"^    python benchmarks/efficiency.py (.*)$", page, re.MULTILINE)
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/efficiency.py"), "--help"], capture_output=True, text=True, check=True
    )
    for option in re.findall(r"--[\w-]+", arguments):
        assert option in done.stdout
    assert "--demonstrations docs" in arguments
    assert len(DemonstrationBank.load("docs")) >= 8 >= max(map(int, re.findall(r"\d+", arguments.partition("--k")[2])))


def test_the_script(tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"query": query, "positive": passage} for query, passage in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [sys.executable, str(ROOT / "benchmarks/efficiency.py"), "--model", str(tiny_checkpoint), "--k", "1,2"]
    command += ["--demonstrations", "pairs.jsonl", "--output", "out", "--runs", "2", "--training-runs", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    names = ["tokens", "latency-single", "latency-batch", "flops", "memory"]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        *(f"{name}.{ending}" for name in names for ending in ("svg", "png")),
        *("efficiency.json", "efficiency.md"),
    }
    values = json.loads((tmp_path / "out/efficiency.json").read_text(encoding="utf-8"))
    assert values["machine"]["threads"] >= 1
    assert values["versions"]["torch"] == torch.__version__
    assert values["model"]["dtype"] == "float32"
    assert values["demonstrations"]["mean_passage_tokens"] > 0
    assert [(item["shown"], item["k"]) for item in values["queries"]] == [
        *(("none", 0), ("text", 1), ("text", 2), ("epic", 1), ("epic", 2))
    ]
    assert [item["strategy"] for item in values["training"]] == ["epic", "text", "none"]
    assert "| zero-shot" in done.stdout
    assert done.stdout == (tmp_path / "out/efficiency.md").read_text(encoding="utf-8")

    command[command.index("1,2")] = "99"
    failed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "error: 6 demonstrations were found and k goes up to 99" in failed.stderr
