"""What demonstrations cost, measured: tokens, FLOPs, latency, memory of a query, and the cost of a training step.

    python benchmarks/efficiency.py --model epic-minilm --demonstrations docs --k 1,2,4,8 --output runs/efficiency
    python benchmarks/efficiency.py --model FOLDER --demonstrations pairs.jsonl.gz --k 1,2,4,8,16 --output DIR

Writes efficiency.json, efficiency.md and plots (SVG, PNG) to DIR, and prints the table. From a file of pairs those
whose passages are nearest to --passage-tokens are taken; a bank is taken as it is. See docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.demonstrations import Demonstration
from epic_rag.errors import DataError, EpicError
from epic_rag.evaluation.efficiency import BATCH, EfficiencyReport, measure_queries
from epic_rag.evaluation.plots import Curve, plot_curves, require_matplotlib
from epic_rag.evaluation.runner import parse_ks
from epic_rag.evaluation.training_cost import measure_training
from epic_rag.tasks import get_task

READ = 5000
"""Rows of a file that are looked at."""


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--model", help="a checkpoint, a folder or a hub name; default: the shipped checkpoint")
    options.add_argument(
        "--demonstrations", required=True, help="a bank's name or folder, or a JSON lines file of pairs"
    )
    options.add_argument("--k", default="1,2,4,8,16", metavar="K,...", help="numbers of demonstrations")
    options.add_argument("--output", required=True, type=Path, metavar="DIR")
    options.add_argument("--passage-tokens", type=int, default=120, metavar="N", help="wanted length of passages")
    options.add_argument("--runs", type=int, default=7, metavar="N", help="measurements of each latency")
    options.add_argument(
        "--training-pairs", type=int, default=32, metavar="N", help="pairs in a training step; 0: none"
    )
    options.add_argument("--training-k", type=int, default=8, metavar="K", help="K of a training step")
    options.add_argument("--training-runs", type=int, default=5, metavar="N")
    options.add_argument("--device")
    options.add_argument("--dtype", help="of queries; training is in float32")
    return options


def load_bank(source: str, encoder: EpicEncoder, wanted: int, passage_tokens: int) -> DemonstrationBank:
    """A bank, or the rows of a file whose passages are nearest to a length."""
    if not source.endswith((".jsonl", ".jsonl.gz")):
        return DemonstrationBank.load(source)
    bank = DemonstrationBank.from_jsonl(source, instruction=get_task("qa").instruction)
    rows = list(dict.fromkeys(bank.demonstrations))[:READ]
    lengths = encoder.count_tokens([row.passage for row in rows])
    nearest = sorted(range(len(rows)), key=lambda row: (abs(lengths[row] - passage_tokens), row))[:wanted]
    return DemonstrationBank([rows[row] for row in sorted(nearest)], instruction=bank.instruction)


def split(bank: DemonstrationBank, k: int) -> tuple[DemonstrationBank, list[str], list[Demonstration]]:
    """The first k demonstrations; queries of the others, or of all where there are no others; all pairs."""
    if len(bank) < k:
        raise DataError(f"{len(bank)} demonstrations were found and k goes up to {k}; pass more, or a smaller --k")
    shown = DemonstrationBank(bank.demonstrations[:k], instruction=bank.instruction, symmetric=bank.symmetric)
    others = bank.demonstrations[k:] or bank.demonstrations
    return shown, [item.query for item in others[:BATCH]], list(bank.demonstrations)


def plot(report: EfficiencyReport, folder: Path) -> None:
    """Positions, latency, memory and FLOPs against k; zero-shot is k = 0 of both curves."""
    measured = [cost for cost in report.queries if not cost.why_not]

    def curves(value: str) -> list[Curve]:
        found = []
        for shown, label in (("text", "text ICL"), ("epic", "EPIC")):
            costs = sorted((cost for cost in measured if cost.shown in ("none", shown)), key=lambda cost: cost.k)
            numbers = [getattr(cost, value) for cost in costs]
            if value.endswith("_seconds"):
                ends = [[1e3 * getattr(spread, end) for spread in numbers] for end in ("median", "low", "high")]
            else:
                scale = {"flops": 1e-9, "peak_bytes": 1e-6}.get(value, 1)
                ends = [[scale * number for number in numbers], [], []]
            found.append(Curve(label, [cost.k for cost in costs], *ends))
        return found

    for value, name, title, unit in (
        ("positions", "tokens", "Input positions of a query", "positions"),
        ("single_seconds", "latency-single", "Latency of one query", "ms: median, quartiles"),
        ("batch_seconds", "latency-batch", f"Latency of {BATCH} queries", "ms: median, quartiles"),
        ("flops", "flops", "FLOPs of a query", "GFLOPs"),
        ("peak_bytes", "memory", "Peak memory of a query", "MB"),
    ):
        plot_curves(curves(value), folder / name, title=title, y_label=unit, logarithmic=True)


def measure(options: argparse.Namespace) -> EfficiencyReport:
    require_matplotlib()
    ks = [k for k in parse_ks(options.k) if k]
    encoder = EpicEncoder.from_pretrained(options.model, device=options.device, dtype=options.dtype)
    wanted = max(ks, default=0) + max(BATCH, options.training_pairs)
    bank = load_bank(options.demonstrations, encoder, wanted, options.passage_tokens)
    shown, queries, pairs = split(bank, max(ks, default=0))
    # Numbers of demonstrations beyond those of its training are the point here, and no reason for a warning.
    encoder.config.max_demonstrations = None
    report = measure_queries(encoder, shown, queries, ks, runs=options.runs, progress=say)
    report.command = tuple(sys.argv)
    report.demonstrations["source"] = options.demonstrations
    if options.training_pairs:
        trained = EpicEncoder.from_pretrained(options.model, device=options.device, dtype="float32")
        report.training = measure_training(
            trained,
            pairs[-options.training_pairs :],
            instruction=bank.instruction or "",
            max_demonstrations=options.training_k,
            runs=options.training_runs,
            progress=say,
        )
    return report


def say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        report = measure(options)
        options.output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report.to_json(), ensure_ascii=False, indent=1)
        (options.output / "efficiency.json").write_text(text + "\n", encoding="utf-8")
        (options.output / "efficiency.md").write_text(report.to_markdown() + "\n", encoding="utf-8")
        plot(report, options.output)
    except EpicError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    print(report.to_markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
