"""Tokens, FLOPs, latency and memory of a query by number of demonstrations, and the cost of a training step.

    python benchmarks/efficiency.py --model epic-minilm --demonstrations docs --k 1,2,4,8 --output runs/efficiency
    python benchmarks/efficiency.py --model FOLDER --demonstrations pairs.jsonl.gz --k 1,2,4,8,16 --output DIR

One backbone, one bank, one run: zero-shot, text ICL and EPIC at each k, measured through `EpicEncoder.encode_query`
with the bank embedded before. Writes efficiency.json, efficiency.md and efficiency.svg to DIR, and prints the tables.
From a file of pairs those whose passages are nearest to --passage-tokens are taken; a bank is taken as it is. See
docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench_common import say
from measuring import (
    Spread,
    analytic_flops,
    count_flops,
    machine,
    memory_method,
    peak_bytes,
    require_matplotlib,
    spread_of,
    timed,
)

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.batching import Replicas
from epic_rag.demonstrations import Demonstration
from epic_rag.errors import ConfigError, DataError, EpicError, PromptError
from epic_rag.evaluation.report import markdown_table, versions
from epic_rag.evaluation.runner import parse_ks
from epic_rag.tasks import get_task

BATCH = 32
"""Queries in the batch whose latency is measured."""
READ = 5000
"""Rows of a file that are read."""
ZERO_SHOT = "zero-shot"
NAMES = {ZERO_SHOT: "zero-shot", "text": "text", "epic": "EPIC"}
NOTHING = "–"  # noqa: RUF001 - the sign for "not measured"


@dataclass(frozen=True)
class QueryCost:
    """Cost of a query with k demonstrations shown in one way.

    Attributes:
        shown: "zero-shot", "text" or "epic".
        k: Number of demonstrations.
        prompt_tokens: Positions before the query's tokens: special tokens, instruction, demonstrations, "Query:".
        demonstration_tokens: Those that the demonstrations add to the zero-shot prompt.
        positions: All positions of the measured query, its end token too.
        flops: Floating-point operations of encoding the one query, counted (a multiply-add is two).
        analytic_flops: The same by formula; see `analytic_flops`.
        single_seconds: Latency of the one query.
        batch_seconds: Latency of a batch of `BATCH` queries.
        peak_bytes: Most bytes of tensors alive at once while the one query is encoded, weights not counted.
        why_not: Why it could not be measured (the prompt has more positions than the model), otherwise empty.
    """

    shown: str
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

    def row(self) -> list[str]:
        """Return a line of the table."""
        if self.single_seconds is None or self.batch_seconds is None:
            return [NAMES[self.shown], str(self.k), *[NOTHING] * 7]
        return [
            NAMES[self.shown],
            str(self.k),
            str(self.prompt_tokens),
            str(self.demonstration_tokens),
            str(self.positions),
            f"{self.flops / 1e9:.3g}",
            self.single_seconds.text(".1f", 1e3),
            self.batch_seconds.text(".1f", 1e3),
            f"{self.peak_bytes / 1e6:.2f}",
        ]


@dataclass(frozen=True)
class TrainingCost:
    """Cost of one training step.

    Attributes:
        strategy: "none", "epic" or "text".
        max_demonstrations: K; each row of the batch is shown 0..K others, the same ones with "epic" and "text".
        pairs: Pairs in the step.
        tokens: Real tokens through the model, padding not counted.
        flops: Of the whole step: forward, backward; a multiply-add is two.
        seconds: Wall time.
        why_not: Why it could not be measured, otherwise empty.
    """

    strategy: str
    max_demonstrations: int
    pairs: int = 0
    tokens: int = 0
    flops: int = 0
    seconds: Spread | None = None
    why_not: str = ""

    def row(self) -> list[str]:
        """Return a line of the table."""
        label = "no demonstrations" if self.strategy == "none" else f"{NAMES[self.strategy]}, K = "
        label += "" if self.strategy == "none" else str(self.max_demonstrations)
        seconds = "" if self.seconds is None else self.seconds.text(".3f")
        return [label, str(self.pairs), f"{self.tokens:,}", f"{self.flops / 1e9:,.4g}", seconds]


@dataclass
class EfficiencyReport:
    """All measurements of a run.

    Attributes:
        model: Name, fingerprint, parameters, layers, width, dtype.
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
        """Return everything as JSON values."""
        return {"format_version": 1, "versions": versions(), **asdict(self)}

    def to_markdown(self) -> str:
        """Return the tables."""
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
                [cost.row() for cost in self.queries],
                text_columns=1,
            ),
        ]
        notes = [f"- {cost.shown}, k = {cost.k}: {cost.why_not}" for cost in self.queries if cost.why_not]
        notes += [f"- training with {cost.strategy}: {cost.why_not}" for cost in self.training if cost.why_not]
        if self.training:
            header = ["training step", "pairs", "tokens", "GFLOPs", "seconds: median (quartiles)"]
            rows = [cost.row() for cost in self.training if not cost.why_not]
            parts.append(markdown_table(header, rows, text_columns=1))
        return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


class _Case:
    """One way of showing demonstrations, at one k."""

    def __init__(self, encoder: EpicEncoder, bank: DemonstrationBank, shown: Any, k: int) -> None:
        self.encoder = encoder
        self.bank = bank
        self.shown = shown
        self.k = k
        pairs = [(item.query, item.passage) for item in bank.demonstrations[:k]]
        prompt = encoder.prompt
        self.zero_shot = prompt.prefix(bank.instruction)
        self.prefix = (
            prompt.prefix(bank.instruction, num_slots=k, demonstrations=pairs, strategy=shown) if k else self.zero_shot
        )

    def encode(self, texts: Sequence[str]) -> None:
        """Encode queries; this call is measured."""
        strategy = self.shown if self.k else None
        self.encoder.encode_query(texts, bank=self.bank, num_demonstrations=self.k, strategy=strategy)

    def cost(self, single: str, seconds: Sequence[Sequence[float]]) -> QueryCost:
        """Count FLOPs and bytes of one query, and put the times beside them."""
        encoder = self.encoder
        [row] = encoder.prompt.queries(self.prefix, [single])
        return QueryCost(
            shown=self.shown,
            k=self.k,
            prompt_tokens=len(self.prefix.ids),
            demonstration_tokens=len(self.prefix.ids) - len(self.zero_shot.ids),
            positions=len(row.ids),
            flops=count_flops(lambda: self.encode([single])),
            analytic_flops=analytic_flops(encoder, len(row.ids), slots=2 * self.k if self.shown == "epic" else 0),
            single_seconds=spread_of(seconds[0]),
            batch_seconds=spread_of(seconds[1]),
            peak_bytes=peak_bytes(encoder.device, lambda: self.encode([single])),
        )


def measure_queries(
    encoder: EpicEncoder,
    bank: DemonstrationBank,
    queries: Sequence[str],
    ks: Sequence[int],
    *,
    runs: int = 7,
    progress: Callable[[str], None] = lambda line: None,
) -> EfficiencyReport:
    """Measure queries zero-shot, with text and with vectors, without the prefix cache.

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
    if not ks or min(ks) < 1:
        raise ConfigError(f"The numbers of demonstrations are {list(ks)}. Give numbers of 1 or more; 0 is included.")
    if max(ks) > len(bank):
        raise ConfigError(f"k goes up to {max(ks)} and the bank has {len(bank)} demonstrations. Use a smaller k.")
    if not queries:
        raise ConfigError("There are 0 queries to measure. Pass at least 1.")
    if runs < 2:
        raise ConfigError(f"runs is {runs}. Quartiles need 2 or more.")
    # benchmarks/prompt_cache.py measures the prefix cache; FLOPs and memory are counted in this thread.
    cache, encoder.prefix_cache = encoder.prefix_cache, None
    replicas, encoder.replicas = encoder.replicas, Replicas(workers=1)
    try:
        return _measured(encoder, bank, queries, ks, runs, progress)
    finally:
        encoder.prefix_cache, encoder.replicas = cache, replicas


def _measured(
    encoder: EpicEncoder,
    bank: DemonstrationBank,
    queries: Sequence[str],
    ks: Sequence[int],
    runs: int,
    progress: Callable[[str], None],
) -> EfficiencyReport:
    built = bank.select(max(ks))
    built.embed(encoder)
    by_length = sorted(queries, key=lambda text: encoder.count_tokens([text])[0])
    single = by_length[len(by_length) // 2]
    batch = [queries[index % len(queries)] for index in range(BATCH)]
    cases = [_Case(encoder, built, shown, k) for shown in ("text", "epic") for k in sorted(set(ks))]
    cases.insert(0, _Case(encoder, built, ZERO_SHOT, 0))
    why_not: dict[_Case, str] = {}
    for case in cases:  # warm-up
        try:
            case.encode([single])
            case.encode(batch)
        except PromptError as error:
            why_not[case] = str(error)
    seconds: dict[_Case, tuple[list[float], list[float]]] = {case: ([], []) for case in cases if case not in why_not}
    for run in range(runs):
        progress(f"latency, run {run + 1} of {runs}")
        # All cases in turn, so that a slower minute of the machine is in all of them.
        for case, found in seconds.items():
            for texts, times in zip(([single], batch), found, strict=True):
                times.append(timed(encoder.device, partial(case.encode, texts)))
    costs = []
    for case in cases:
        progress(f"FLOPs and memory, {case.shown}, k = {case.k}")
        failed = why_not.get(case)
        costs.append(QueryCost(case.shown, case.k, why_not=failed) if failed else case.cost(single, seconds[case]))
    config = encoder.backbone.transformer.config.get_text_config()
    return EfficiencyReport(
        model={
            "name": encoder.name,
            "fingerprint": encoder.fingerprint,
            "parameters": sum(parameter.numel() for parameter in encoder.backbone.parameters()),
            "layers": int(config.num_hidden_layers),
            "dimension": encoder.backbone.dimension,
            "dtype": str(encoder.dtype).removeprefix("torch."),
            "separators": encoder.prompt.template.separators,
        },
        machine=machine(encoder.device),
        demonstrations={
            "count": len(built),
            "mean_query_tokens": statistics.fmean(encoder.count_tokens([d.query for d in built.demonstrations])),
            "mean_passage_tokens": statistics.fmean(encoder.count_tokens([d.passage for d in built.demonstrations])),
            "longest_shown_as_text": encoder.prompt.max_demonstration_tokens,
            "single_query": single,
        },
        memory_method=memory_method(encoder.device),
        queries=costs,
    )


def measure_training(
    encoder: EpicEncoder,
    pairs: Sequence[Demonstration],
    *,
    instruction: str,
    max_demonstrations: int = 8,
    runs: int = 5,
    progress: Callable[[str], None] = lambda line: None,
) -> list[TrainingCost]:
    """Measure a training step with each strategy on one fixed batch: all of the pairs.

    Args:
        encoder: The model, in float32; it is copied and stays as it is.
        pairs: The batch, at least two pairs.
        instruction: Of the task.
        max_demonstrations: K.
        runs: Measurements of the seconds, after one that warms up.
        progress: Called with one line of text for each step.

    Raises:
        ConfigError: A number cannot work.
    """
    from epic_rag.training import Trainer, TrainingConfig
    from epic_rag.training.sampling import sample_batch

    if len(pairs) < 2 or runs < 2:
        raise ConfigError(f"There are {len(pairs)} pairs and {runs} runs. A training step needs 2 or more of each.")
    costs = []
    with tempfile.TemporaryDirectory() as folder:
        rows = [json.dumps({"query": pair.query, "positive": pair.passage}) for pair in pairs]
        (Path(folder) / "pairs.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        for strategy in ("epic", "text", "none"):
            progress(f"training step, {strategy}")
            config = TrainingConfig.from_dict(
                {
                    "model": encoder.source or encoder.name,
                    "output": str(Path(folder) / "run"),
                    "data": folder,
                    "tasks": {"pairs": {"instruction": instruction}},
                    "strategy": strategy,
                    "batch_size": len(pairs),
                    "max_demonstrations": max_demonstrations,
                    "max_query_tokens": 64,
                    "max_document_tokens": 128,
                    "separators": encoder.prompt.template.separators,
                    "device": str(encoder.device),
                }
            )
            trainer = Trainer(config, deepcopy(encoder))
            batch = sample_batch(trainer.datasets, config, 0)
            k = max_demonstrations if strategy != "none" else 0
            try:
                result = trainer.train_step(batch)  # warm-up
            except PromptError as error:
                costs.append(TrainingCost(strategy, k, why_not=str(error)))
                continue
            step = partial(trainer.train_step, batch)
            seconds = spread_of([timed(encoder.device, step) for _ in range(runs)])
            costs.append(TrainingCost(strategy, k, result.pairs, result.tokens, count_flops(step), seconds))
    return costs


def load_bank(source: str, encoder: EpicEncoder, wanted: int, passage_tokens: int) -> DemonstrationBank:
    """Load a bank, or make one of the rows of a file whose passages are nearest to a length."""
    if not source.endswith((".jsonl", ".jsonl.gz")):
        return DemonstrationBank.load(source)
    bank = DemonstrationBank.from_jsonl(source, instruction=get_task("qa").instruction)
    rows = list(dict.fromkeys(bank.demonstrations))[:READ]
    lengths = encoder.count_tokens([row.passage for row in rows])
    nearest = sorted(range(len(rows)), key=lambda row: (abs(lengths[row] - passage_tokens), row))[:wanted]
    return DemonstrationBank([rows[row] for row in sorted(nearest)], instruction=bank.instruction)


def plot(report: EfficiencyReport, path: Path) -> None:
    """Plot positions, latency, memory and FLOPs against k, a panel each; zero-shot is k = 0 of both curves."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    values: dict[str, Callable[[QueryCost], float]] = {
        "positions of a query": lambda cost: cost.positions,
        "one query, ms": lambda cost: 1e3 * cost.single_seconds.median if cost.single_seconds else 0,
        f"batch of {BATCH}, ms": lambda cost: 1e3 * cost.batch_seconds.median if cost.batch_seconds else 0,
        "GFLOPs": lambda cost: cost.flops / 1e9,
        "peak memory, MB": lambda cost: cost.peak_bytes / 1e6,
    }
    figure = Figure(figsize=(3.2 * len(values), 3.2), layout="constrained")
    for axes, (title, value) in zip(figure.subplots(1, len(values)), values.items(), strict=True):
        for shown, label, colour in (("text", "text ICL", "#D55E00"), ("epic", "EPIC", "#0072B2")):
            costs = [cost for cost in report.queries if cost.shown in (ZERO_SHOT, shown) and not cost.why_not]
            axes.plot([str(cost.k) for cost in costs], list(map(value, costs)), "o-", label=label, color=colour)
        axes.set(yscale="log", title=title, xlabel="demonstrations k")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.grid(linewidth=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, format="svg", metadata={"Date": None})


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--model", help="a checkpoint, a folder or a hub name; default: the shipped checkpoint")
    options.add_argument("--demonstrations", required=True, help="a bank's name or folder, or a file of pairs")
    options.add_argument("--k", default="1,2,4,8,16", metavar="K,...", help="numbers of demonstrations")
    options.add_argument("--output", required=True, type=Path, metavar="DIR")
    options.add_argument("--passage-tokens", type=int, default=120, metavar="N", help="wanted length of passages")
    options.add_argument("--runs", type=int, default=7, metavar="N", help="measurements of each latency")
    options.add_argument("--training-pairs", type=int, default=32, metavar="N", help="pairs in a step; 0: no training")
    options.add_argument("--training-k", type=int, default=8, metavar="K", help="K of a training step")
    options.add_argument("--training-runs", type=int, default=5, metavar="N")
    options.add_argument("--device")
    options.add_argument("--dtype", help="of queries; training is in float32")
    return options


def measure(options: argparse.Namespace) -> EfficiencyReport:
    require_matplotlib()
    # The encoder warns about more demonstrations than it was trained with; they are measured on purpose.
    logging.getLogger("epic_rag.encoder").setLevel(logging.ERROR)
    ks = [k for k in parse_ks(options.k) if k]
    most = max(ks, default=0)
    encoder = EpicEncoder.from_pretrained(options.model, device=options.device, dtype=options.dtype)
    wanted = most + max(BATCH, options.training_pairs)
    bank = load_bank(options.demonstrations, encoder, wanted, options.passage_tokens)
    if len(bank) < most:
        raise DataError(f"{len(bank)} demonstrations were found and k goes up to {most}. Pass more, or a smaller --k.")
    # Queries of rows that are not shown, where there are such rows.
    others = bank.demonstrations[most:] or bank.demonstrations
    report = measure_queries(
        encoder, bank, [item.query for item in others[:BATCH]], ks, runs=options.runs, progress=say
    )
    report.command = tuple(sys.argv)
    report.demonstrations["source"] = options.demonstrations
    if options.training_pairs:
        report.training = measure_training(
            EpicEncoder.from_pretrained(options.model, device=options.device, dtype="float32"),
            bank.demonstrations[-options.training_pairs :],
            instruction=bank.instruction or "",
            max_demonstrations=options.training_k,
            runs=options.training_runs,
            progress=say,
        )
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        report = measure(options)
    except EpicError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report.to_json(), ensure_ascii=False, indent=1)
    (options.output / "efficiency.json").write_text(text + "\n", encoding="utf-8")
    (options.output / "efficiency.md").write_text(report.to_markdown() + "\n", encoding="utf-8")
    plot(report, options.output / "efficiency.svg")
    print(report.to_markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
