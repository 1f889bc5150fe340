"""Counts are those of the prompt builder, FLOPs those of the formula, and the script runs as documented."""

from __future__ import annotations

import importlib.metadata
import json
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import efficiency
import pytest
import torch
from efficiency import EfficiencyReport, QueryCost, measure_queries, measure_training
from measuring import analytic_flops, count_flops, peak_bytes, spread_of
from torch import nn

from epic_rag.backbone import Backbone
from epic_rag.demonstrations import DemonstrationBank
from epic_rag.encoder import EpicEncoder
from epic_rag.errors import ConfigError
from epic_rag.prompt import PromptTemplate

ROOT = Path(__file__).parents[2]
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
    assert found == [("zero-shot", 0), *(("text", k) for k in KS), *(("epic", k) for k in KS)]
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
    [row] = prompt.queries(prompt.prefix(BANK.instruction), [single])
    assert cost("zero-shot", 0).positions == len(row.ids)
    for shown, k in ((shown, k) for shown in ("text", "epic") for k in KS):
        prefix = prompt.prefix(BANK.instruction, num_slots=k, demonstrations=PAIRS[:k], strategy=shown)  # type: ignore[arg-type]
        [row] = prompt.queries(prefix, [single])
        assert (cost(shown, k).prompt_tokens, cost(shown, k).positions) == (len(prefix.ids), len(row.ids)), (shown, k)


def test_a_demonstration_of_epic_costs_a_constant(
    cost: Callable[[str, int], QueryCost], tiny_encoder: EpicEncoder
) -> None:
    template = tiny_encoder.prompt.template
    assert template.separators == "words"
    words = [template.query, template.response, template.end]
    each = 2 + sum(len(ids) for ids in tiny_encoder.prompt.token_ids(words))
    assert [cost("epic", k).demonstration_tokens for k in KS] == [each * k for k in KS]
    without = PromptTemplate(separators="none")
    encoder = EpicEncoder(tiny_encoder.backbone, replace(tiny_encoder.prompt, template=without))
    [_, _, epic] = measure_queries(encoder, BANK, QUERIES, [4], runs=2).queries
    assert epic.demonstration_tokens == 2 * 4


def test_a_demonstration_of_text_costs_all_of_its_tokens(
    cost: Callable[[str, int], QueryCost], tiny_encoder: EpicEncoder
) -> None:
    template = tiny_encoder.prompt.template
    words = [template.query, template.response, template.end]
    for k in KS:
        texts = [*words * k, *(f" {text}" for pair in PAIRS[:k] for text in pair)]
        assert cost("text", k).demonstration_tokens == sum(len(ids) for ids in tiny_encoder.prompt.token_ids(texts))
    assert cost("text", 4).demonstration_tokens > cost("epic", 4).demonstration_tokens


def test_flops_are_those_of_the_formula_and_grow(
    report: EfficiencyReport, tiny_bidirectional_encoder: EpicEncoder
) -> None:
    bidirectional = measure_queries(tiny_bidirectional_encoder, BANK, QUERIES, [2], runs=2).queries
    for costs in (report.queries, bidirectional):
        assert [item.flops for item in costs] == [item.analytic_flops for item in costs]
        for shown in ("text", "epic"):
            flops = [costs[0].flops, *(item.flops for item in costs if item.shown == shown)]
            assert flops == sorted(set(flops))


def test_measuring_takes_one_thread(tiny_encoder: EpicEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    forward = Backbone.forward

    def noted(self: Backbone, *arguments: Any) -> torch.Tensor:
        seen.add(threading.current_thread())
        return forward(self, *arguments)

    monkeypatch.setattr(Backbone, "forward", noted)
    replicas, cache = tiny_encoder.replicas, tiny_encoder.prefix_cache
    found = measure_queries(tiny_encoder, BANK, QUERIES, [4], runs=2)
    assert seen == {threading.main_thread()}
    assert all(item.flops > 0 for item in found.queries)
    assert tiny_encoder.replicas is replicas
    assert tiny_encoder.prefix_cache is cache


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


def test_the_formula_counts_slots_and_a_head(tiny_encoder: EpicEncoder) -> None:
    width = tiny_encoder.dimension
    plain = analytic_flops(tiny_encoder, 9)
    assert analytic_flops(tiny_encoder, 9, slots=4) - plain == 4 * 2 * width * width
    tiny_encoder.backbone.head = nn.Linear(width, 12)
    try:
        assert analytic_flops(tiny_encoder, 9) - plain == 2 * width * 12
    finally:
        tiny_encoder.backbone.head = None


def test_spread_has_median_and_quartiles() -> None:
    spread = spread_of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (spread.low, spread.median, spread.high, spread.runs) == (2.0, 3.0, 4.0, 5)


def test_a_prompt_that_does_not_fit(tiny_encoder: EpicEncoder) -> None:
    encoder = EpicEncoder(tiny_encoder.backbone, replace(tiny_encoder.prompt, max_positions=90))
    report = measure_queries(encoder, BANK, QUERIES, [4], runs=2)
    missing = [item for item in report.queries if item.why_not]
    assert [(item.shown, item.k) for item in missing] == [("text", 4)]
    assert f"- text, k = 4: {missing[0].why_not}" in report.to_markdown()
    assert missing[0].single_seconds is None


@pytest.mark.parametrize(
    ("ks", "queries", "runs", "said"),
    [
        ([], QUERIES, 2, "The numbers of demonstrations are []"),
        ([0, 1], QUERIES, 2, "Give numbers of 1 or more"),
        ([7], QUERIES, 2, "k goes up to 7 and the bank has 6"),
        ([1], [], 2, "There are 0 queries"),
        ([1], QUERIES, 1, "runs is 1"),
    ],
)
def test_numbers_that_cannot_work(
    tiny_encoder: EpicEncoder, ks: list[int], queries: list[str], runs: int, said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        measure_queries(tiny_encoder, BANK, queries, ks, runs=runs)
    assert said in str(error.value)
    with pytest.raises(ConfigError, match="There are 1 pairs and 5 runs"):
        measure_training(tiny_encoder, BANK.demonstrations[:1], instruction="")


def test_a_training_step_of_each_strategy(tiny_encoder: EpicEncoder) -> None:
    before = [parameter.clone() for parameter in tiny_encoder.backbone.parameters()]
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
    for old, new in zip(before, tiny_encoder.backbone.parameters(), strict=True):
        assert torch.equal(old, new), "the caller's encoder was trained"


def test_the_command_of_the_page() -> None:
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    [arguments] = re.findall(r"^    python benchmarks/efficiency.py (.*)$", page, re.MULTILINE)
    options = efficiency.parser().parse_args(arguments.split())
    assert len(DemonstrationBank.load(options.demonstrations)) >= max(map(int, options.k.split(",")))


def test_the_script(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"query": query, "positive": passage} for query, passage in PAIRS]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ["--model", str(tiny_checkpoint), "--k", "1,2", "--demonstrations", "pairs.jsonl", "--output", "out"]
    assert efficiency.main([*command, "--runs", "2", "--training-runs", "2"]) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in Path("out").iterdir()} == {"efficiency.json", "efficiency.md", "efficiency.svg"}
    values = json.loads(Path("out/efficiency.json").read_text(encoding="utf-8"))
    assert values["machine"]["threads"] >= 1
    assert values["versions"]["torch"] == importlib.metadata.version("torch")
    assert values["model"]["dtype"] == "float32"
    assert values["demonstrations"]["mean_passage_tokens"] > 0
    assert [(item["shown"], item["k"]) for item in values["queries"]] == [
        *(("zero-shot", 0), ("text", 1), ("text", 2), ("epic", 1), ("epic", 2))
    ]
    assert [item["strategy"] for item in values["training"]] == ["epic", "text", "none"]
    assert "| zero-shot" in printed
    assert printed == Path("out/efficiency.md").read_text(encoding="utf-8")

    command[command.index("1,2")] = "99"
    assert efficiency.main(command) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: 6 demonstrations were found and k goes up to 99" in captured.err
