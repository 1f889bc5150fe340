"""What demonstrations cost: tokens, FLOPs, latency and memory of a query, and the cost of a training step.

One backbone, one bank, one run: zero-shot, text ICL and EPIC at each k. Everything is measured through
`EpicEncoder.encode_query` with the bank embedded before, which is what a user waits for.

The paper's claim (EPIC, arXiv 2605.01372, section 3) in these terms: a demonstration costs EPIC two input positions
and the template's words between them, and text ICL all of its tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from epic_rag.batching import Replicas
from epic_rag.demonstrations import DemonstrationBank
from epic_rag.errors import ConfigError, PromptError
from epic_rag.evaluation.measuring import (
    Spread,
    analytic_flops,
    count_flops,
    machine,
    memory_method,
    peak_bytes,
    spread_of,
    timed,
)
from epic_rag.evaluation.report import markdown_table, versions
from epic_rag.prompt import Strategy

if TYPE_CHECKING:
    from epic_rag.encoder import EpicEncoder
    from epic_rag.evaluation.training_cost import TrainingCost

__all__ = [
    "EfficiencyReport",
    "QueryCost",
    "measure_queries",
]

BATCH = 32
"""Queries in the batch whose latency is measured."""


@dataclass(frozen=True)
class QueryCost:
    """What a query costs with k demonstrations shown in one way.

    Attributes:
        shown: "none" (zero-shot), "text" or "epic".
        k: Number of demonstrations.
        prompt_tokens: Positions before the query's own tokens: special tokens, instruction, demonstrations, "Query:".
        demonstration_tokens: Those that the demonstrations add to the zero-shot prompt.
        positions: All positions of the measured query, its end token too.
        flops: Floating-point operations of encoding the one query, counted (a multiply-add is two).
        analytic_flops: The same by formula; see `analytic_flops`.
        single_seconds: Latency of the one query.
        batch_seconds: Latency of a batch of `BATCH` queries.
        peak_bytes: Most bytes of tensors alive at once while the one query is encoded, weights not counted.
        why_not: Why it could not be measured (the prompt has more positions than the model), otherwise empty.
    """

    shown: Strategy
    k: int
    prompt_tokens: int = 0
    demonstration_tokens: int = 0
    positions: int = 0
    flops: int = 0
    analytic_flops: int = 0
    single_seconds: Spread | None = None
    batch_seconds: Spread | None = None
    peak_bytes: int = 0
    why_not: str = ""


@dataclass
class EfficiencyReport:
    """Everything that is measured.

    Attributes:
        model: Name, fingerprint, parameters, layers, width, dtype, device.
        machine: Processor, cores, threads.
        demonstrations: How many, and the mean tokens of their queries and passages.
        memory_method: How `peak_bytes` is measured.
        queries: Costs of queries.
        training: Costs of training steps.
        command: The command line.
    """

    model: dict[str, Any]
    machine: dict[str, Any]
    demonstrations: dict[str, Any]
    memory_method: str
    queries: list[QueryCost]
    training: list[TrainingCost] = field(default_factory=list)
    command: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {"format_version": 1, "versions": versions(), **asdict(self)}

    def to_markdown(self) -> str:
        """The tables."""
        shown = self.demonstrations
        parts = [
            f"{self.model['name']}, {self.model['parameters'] / 1e6:,.0f} million parameters, {self.model['dtype']} "
            f"on {self.machine['device']} ({self.machine['processor']}, {self.machine['threads']} threads). "
            f"Demonstrations: queries of {shown['mean_query_tokens']:.1f} tokens, passages of "
            f"{shown['mean_passage_tokens']:.1f}, on average. Latency: median (quartiles), milliseconds. "
            f"Memory: {self.memory_method}.",
            markdown_table(
                [
                    *("demonstrations", "k", "prompt tokens", "added by demonstrations", "positions", "GFLOPs"),
                    *("one query, ms", f"batch of {BATCH}, ms", "peak memory, MB"),
                ],
                [_query_row(cost) for cost in self.queries],
                text_columns=1,
            ),
        ]
        notes = [f"- {cost.shown}, k = {cost.k}: {cost.why_not}" for cost in self.queries if cost.why_not]
        notes += [f"- training with {cost.strategy}: {cost.why_not}" for cost in self.training if cost.why_not]
        if self.training:
            header = ["training step", "pairs", "tokens", "GFLOPs", "seconds: median (quartiles)"]
            parts.append(
                markdown_table(header, [cost.row() for cost in self.training if not cost.why_not], text_columns=1)
            )
        return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def measure_queries(
    encoder: EpicEncoder,
    bank: DemonstrationBank,
    queries: Sequence[str],
    ks: Sequence[int],
    *,
    runs: int = 7,
    progress: Callable[[str], None] | None = None,
) -> EfficiencyReport:
    """Measure queries zero-shot, with text and with vectors, every prompt computed for every query.

    Args:
        encoder: The model.
        bank: At least as many demonstrations as the largest k; its first k are shown.
        queries: Texts to encode; repeated up to `BATCH` for the batch. The one of median length is the single query.
        ks: Numbers of demonstrations above 0.
        runs: Measurements of each latency.
        progress: Called with one line of text for each step.

    Raises:
        ConfigError: A number cannot work.
    """
    _check(bank, queries, ks, runs)
    # What a prompt costs by itself is the point here; benchmarks/prompt_cache.py has what the cache leaves of it.
    kept, encoder.prefix_cache = encoder.prefix_cache, None
    # FLOPs and memory are counted in this thread, on this device.
    replicas, encoder.replicas = encoder.replicas, Replicas(workers=1)
    try:
        return _measured(encoder, bank, queries, ks, runs, progress or (lambda line: None))
    finally:
        encoder.prefix_cache, encoder.replicas = kept, replicas


def _measured(
    encoder: EpicEncoder,
    bank: DemonstrationBank,
    queries: Sequence[str],
    ks: Sequence[int],
    runs: int,
    say: Callable[[str], None],
) -> EfficiencyReport:
    built = bank.select(max(ks))
    built.embed(encoder)
    by_length = sorted(queries, key=lambda text: encoder.count_tokens([text])[0])
    single = by_length[len(by_length) // 2]
    batch = [queries[index % len(queries)] for index in range(BATCH)]
    cases = [_Case(encoder, built, shown, k) for shown, k in _conditions(ks)]
    for case in cases:
        case.prepare(single)
    fitting = [case for case in cases if not case.why_not]
    for case in fitting:  # warm-up
        case.encode([single])
        case.encode(batch)
    times: dict[tuple[Strategy, int], tuple[list[float], list[float]]] = {case.key: ([], []) for case in fitting}
    for run in range(runs):
        say(f"latency, run {run + 1} of {runs}")
        # All cases in turn, so that a machine that slows down does so for all of them.
        for case in fitting:
            for texts, found in zip(([single], batch), times[case.key], strict=True):
                found.append(timed(encoder.device, partial(case.encode, texts)))
    costs = []
    for case in cases:
        say(f"FLOPs and memory, {case.shown}, k = {case.k}")
        costs.append(QueryCost(case.shown, case.k, why_not=case.why_not) if case.why_not else case.cost(single, times))
    tokens = encoder.prompt.token_ids
    return EfficiencyReport(
        model=_model(encoder),
        machine=machine(encoder.device),
        demonstrations={
            "count": len(built),
            "mean_query_tokens": statistics.fmean(len(ids) for ids in tokens([d.query for d in built.demonstrations])),
            "mean_passage_tokens": statistics.fmean(
                len(ids) for ids in tokens([d.passage for d in built.demonstrations])
            ),
            "longest_shown_as_text": encoder.prompt.max_demonstration_tokens,
            "single_query": single,
        },
        memory_method=memory_method(encoder.device),
        queries=costs,
    )


class _Case:
    """One strategy at one k."""

    def __init__(self, encoder: EpicEncoder, bank: DemonstrationBank, shown: Strategy, k: int) -> None:
        self.encoder = encoder
        self.bank = bank
        self.shown: Strategy = shown
        self.k = k
        self.key = (shown, k)
        self.why_not = ""
        pairs = [(item.query, item.passage) for item in bank.demonstrations[:k]]
        self.prefix = encoder.prompt.prefix(bank.instruction, num_slots=k, demonstrations=pairs, strategy=shown)
        self.positions = 0

    def prepare(self, text: str) -> None:
        """Find out whether the prompt fits, and how many positions it has."""
        try:
            [row] = self.encoder.prompt.queries(self.prefix, [text])
        except PromptError as error:
            self.why_not = str(error)
        else:
            self.positions = len(row.ids)

    def encode(self, texts: Sequence[str]) -> None:
        """What is measured."""
        self.encoder.encode_query(texts, bank=self.bank, num_demonstrations=self.k, strategy=self.shown)

    def cost(self, single: str, times: dict[tuple[Strategy, int], tuple[list[float], list[float]]]) -> QueryCost:
        encoder = self.encoder
        zero = encoder.prompt.prefix(self.bank.instruction)
        slots = 2 * self.k if self.shown == "epic" else 0
        return QueryCost(
            shown=self.shown,
            k=self.k,
            prompt_tokens=len(self.prefix.ids),
            demonstration_tokens=len(self.prefix.ids) - len(zero.ids),
            positions=self.positions,
            flops=count_flops(lambda: self.encode([single])),
            analytic_flops=analytic_flops(encoder, self.positions, slots=slots),
            single_seconds=spread_of(times[self.key][0]),
            batch_seconds=spread_of(times[self.key][1]),
            peak_bytes=peak_bytes(encoder.device, lambda: self.encode([single])),
        )


def _conditions(ks: Sequence[int]) -> list[tuple[Strategy, int]]:
    shown: tuple[Literal["text", "epic"], ...] = ("text", "epic")
    return [("none", 0), *((name, k) for name in shown for k in sorted(set(ks)))]


def _check(bank: DemonstrationBank, queries: Sequence[str], ks: Sequence[int], runs: int) -> None:
    if not ks or min(ks) < 1:
        raise ConfigError(
            f"the numbers of demonstrations are {list(ks)}; give numbers of 1 or more, k = 0 is measured anyway"
        )
    if max(ks) > len(bank):
        raise ConfigError(f"{max(ks)} demonstrations were asked for and the bank has {len(bank)}; ask for fewer")
    if not queries:
        raise ConfigError("there are 0 queries to measure with; pass at least 1")
    if runs < 2:
        raise ConfigError(f"{runs} runs were asked for, quartiles need at least 2; ask for 7 or more")


def _model(encoder: EpicEncoder) -> dict[str, Any]:
    config = encoder.backbone.transformer.config.get_text_config()
    return {
        "name": encoder.name,
        "fingerprint": encoder.fingerprint,
        "parameters": sum(parameter.numel() for parameter in encoder.backbone.parameters()),
        "layers": int(config.num_hidden_layers),
        "dimension": encoder.backbone.dimension,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "separators": encoder.prompt.template.separators,
    }


def _query_row(cost: QueryCost) -> list[str]:
    name = {"none": "zero-shot", "text": "text", "epic": "EPIC"}[cost.shown]
    if cost.single_seconds is None or cost.batch_seconds is None:
        return [name, str(cost.k), *["–"] * 7]  # noqa: RUF001 - the sign for "nothing here"
    return [
        name,
        str(cost.k),
        str(cost.prompt_tokens),
        str(cost.demonstration_tokens),
        str(cost.positions),
        f"{cost.flops / 1e9:.3g}",
        cost.single_seconds.text(".1f", 1e3),
        cost.batch_seconds.text(".1f", 1e3),
        f"{cost.peak_bytes / 1e6:.2f}",
    ]
