"""Cost of a bank's prompt with the prefix cache: EPIC, text ICL and zero-shot side by side.

    python benchmarks/prompt_cache.py --model FOLDER --num-layers 12 --demonstrations pairs.jsonl.gz --output DIR

Single queries and batches of 32 on one model with 8 demonstrations whose passages are nearest to 120 tokens; every
case once a run, in turn. Writes prompt_cache.json and prompt_cache.md to DIR and prints the tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench_common import Bar, bars_table, interleaved, milliseconds, ratio, run_main, write
from efficiency import load_bank

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.errors import DataError
from epic_rag.evaluation.report import markdown_table
from epic_rag.prefix_cache import PrefixCache

BATCH = 32


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--model", required=True, help="a causal model: a checkpoint, a folder or a hub name")
    options.add_argument("--num-layers", type=int, metavar="N", help="keep the first N layers")
    options.add_argument("--pooling", choices=("last", "mean"))
    options.add_argument("--demonstrations", required=True, help="a bank or a JSON lines file of pairs")
    options.add_argument("--k", type=int, default=8)
    options.add_argument("--passage-tokens", type=int, default=120, metavar="N")
    options.add_argument("--runs", type=int, default=15, metavar="N")
    options.add_argument("--device")
    options.add_argument("--dtype")
    options.add_argument("--separators", choices=("words", "none"), default="none")
    options.add_argument("--output", required=True, type=Path, metavar="DIR")
    return options


class Way:
    """One way to encode queries, with the prompt's keys and values cached or computed every time."""

    def __init__(self, encoder: EpicEncoder, cached: bool, **options: Any) -> None:
        self.encoder = encoder
        self.cache = PrefixCache() if cached else None
        self.options = options

    def __call__(self, texts: Sequence[str]) -> None:
        kept, self.encoder.prefix_cache = self.encoder.prefix_cache, self.cache
        try:
            self.encoder.encode_query(texts, **self.options)
        finally:
            self.encoder.prefix_cache = kept


def ways(encoder: EpicEncoder, bank: DemonstrationBank, k: int) -> dict[str, Way]:
    """Every case, by its name in the table."""
    shown = {"bank": bank, "num_demonstrations": k, "strategy": "epic"}
    return {
        "zero-shot, no cache": Way(encoder, False, bank=bank, num_demonstrations=0),
        "zero-shot, cache": Way(encoder, True, bank=bank, num_demonstrations=0),
        "EPIC, no cache": Way(encoder, False, **shown),
        "EPIC, cache": Way(encoder, True, **shown),
        "EPIC, nearest per query": Way(encoder, True, selection="nearest", **shown),
        "text, no cache": Way(encoder, False, **{**shown, "strategy": "text"}),
        "text, cache": Way(encoder, True, **{**shown, "strategy": "text"}),
    }


def measure(options: argparse.Namespace) -> int:
    encoder = EpicEncoder.from_pretrained(
        options.model,
        device=options.device,
        dtype=options.dtype,
        num_layers=options.num_layers,
        pooling=options.pooling,
    )
    encoder.prompt.template = type(encoder.prompt.template)(separators=options.separators)
    # For text demonstrations of any length to be read whole.
    encoder.prompt.max_demonstration_tokens = max(encoder.prompt.max_demonstration_tokens, 2 * options.passage_tokens)
    # The bank has more demonstrations than are shown, so that "nearest" has a choice.
    rows = load_bank(options.demonstrations, encoder, 4 * options.k + BATCH, options.passage_tokens)
    if len(rows) <= 4 * options.k:
        raise DataError(f"{len(rows)} demonstrations are too few for k = {options.k}. Pass more, or a smaller --k.")
    shown = DemonstrationBank(rows.demonstrations[: 4 * options.k], instruction=rows.instruction)
    queries = [item.query for item in rows.demonstrations[4 * options.k :][:BATCH]]
    built = shown.copy()
    built.embed(encoder)
    by_length = sorted(queries, key=lambda text: encoder.count_tokens([text])[0])
    single = [by_length[len(by_length) // 2]]
    batch = [queries[index % len(queries)] for index in range(BATCH)]
    cases = ways(encoder, built, options.k)
    calls: dict[str, Callable[[], object]] = {}
    for name, case in cases.items():
        calls[f"{name}; single"] = partial(case, single)
        calls[f"{name}; batch"] = partial(case, batch)
    seconds = interleaved(calls, options.runs, encoder.device)
    memory = {name: case.cache.nbytes for name, case in cases.items() if case.cache is not None}
    bars = _bars(seconds, memory)
    tokens = encoder.count_tokens([item.passage for item in shown.demonstrations[: options.k]])
    config = encoder.backbone.transformer.config.get_text_config()
    facts = {
        "model": options.model,
        "layers": int(config.num_hidden_layers),
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "pooling": encoder.backbone.pooling,
        "k": options.k,
        "runs": options.runs,
        "mean_passage_tokens": sum(tokens) / len(tokens),
        "query_tokens": encoder.count_tokens(single)[0],
        "prompt_positions": {
            "zero-shot": len(encoder.prompt.prefix(built.instruction).ids),
            "EPIC": len(encoder.prompt.prefix(built.instruction, num_slots=options.k).ids),
        },
        "seconds": seconds,
        "cache_bytes": memory,
    }
    lines = [
        [
            name,
            milliseconds(seconds[f"{name}; single"]),
            milliseconds(seconds[f"{name}; batch"]),
            f"{memory[name] / 1e6:.2f}" if name in memory else "",
        ]
        for name in cases
    ]
    table = markdown_table(["way", "one query, ms", f"batch of {BATCH}, ms", "cache, MB"], lines, text_columns=1)
    head = (
        f"{Path(options.model).name}, {facts['layers']} layers, {facts['dtype']}, k = {options.k}, passages of "
        f"{facts['mean_passage_tokens']:.0f} tokens, a query of {facts['query_tokens']}; median (quartiles) of "
        f"{options.runs} runs."
    )
    write(
        options.output,
        "prompt_cache",
        "\n\n".join([head, table, bars_table(bars)]),
        bars,
        encoder.device,
        **facts,
    )
    return 0


def _bars(seconds: dict[str, list[float]], memory: dict[str, int]) -> list[Bar]:
    found = []
    for kind, faster in (("single", 8.0), ("batch", 10.0)):
        zero, text = seconds[f"zero-shot, no cache; {kind}"], seconds[f"text, no cache; {kind}"]
        epic = seconds[f"EPIC, cache; {kind}"]
        found += [
            ratio(f"EPIC with cache / zero-shot without, {kind}", epic, zero, 1.05, at_most=True),
            ratio(f"text without cache / EPIC with, {kind}", text, epic, faster, at_most=False),
            ratio(f"EPIC with cache / text with, {kind}", epic, seconds[f"text, cache; {kind}"], 1.0, at_most=True),
        ]
    share = memory["EPIC, cache"] / memory["text, cache"]
    return [*found, Bar("cache memory, EPIC / text", share, 1 / 15, True)]


if __name__ == "__main__":
    sys.exit(run_main(parser(), measure))
