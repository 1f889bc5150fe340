"""Documents a second: this encoder and sentence-transformers on the same weights, texts and machine.

    python benchmarks/throughput.py --model epic-minilm --texts docs_sections.jsonl.gz --count 3000 --output DIR

sentence-transformers encodes at its default batch size and at the best of several others, which is found on every
eighth text; both sides in the same dtype, and this encoder in the fastest dtype that the machine has too. Then the
share of padding, and the rate of matrix products against what the machine reaches on matrices of these shapes alone.
Writes throughput.json and throughput.md to DIR.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_common import Bar, bars_table, encoding_options, interleaved, ratio, run_main, say, write
from measuring import count_flops, spread_of, timed
from torch import nn

from epic_rag import DemonstrationBank, EpicEncoder
from epic_rag.batching import token_batches
from epic_rag.checkpoint_io import parse_dtype
from epic_rag.cpu_kernels import use_onednn
from epic_rag.evaluation.report import markdown_table

DEFAULT_BATCH = 32
OTHER_BATCHES = (8, 16, 64, 128)
ROWS = 4096
"""Rows of the matrices whose products are timed alone: the tokens of a batch."""


def parser() -> argparse.ArgumentParser:
    options = encoding_options((__doc__ or "").split("\n\n")[0], 3000)
    options.add_argument("--batches", default=",".join(map(str, OTHER_BATCHES)), help="other batch sizes to try")
    options.add_argument("--compile", action="store_true", help="also time torch.compile, and how long it compiles")
    options.add_argument("--device")
    return options


def read_texts(path: str, count: int) -> list[str]:
    """Distinct passages, spread over the file, so that lengths are mixed as they are in it."""
    passages = list(dict.fromkeys(item.passage for item in DemonstrationBank.from_jsonl(path).demonstrations))
    step = max(1, len(passages) // count)
    return passages[::step][:count]


def padded_share(encoder: EpicEncoder, texts: list[str]) -> tuple[int, float]:
    """Tokens of the texts as the model reads them, and the share of padding in what is computed."""
    lengths = [len(row.ids) for row in encoder.prompt.documents(texts)]
    batches = token_batches(lengths, max_tokens=encoder.max_batch_tokens)
    computed = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    return sum(lengths), 1 - sum(lengths) / computed


def product_rate(encoder: EpicEncoder, runs: int) -> float:
    """FLOPs a second of matrix products alone, in the shapes of the model's layers, each as often as it occurs."""
    shapes: dict[tuple[int, int], int] = {}
    for module in encoder.backbone.transformer.modules():
        if isinstance(module, nn.Linear):
            shape = (module.in_features, module.out_features)
            shapes[shape] = shapes.get(shape, 0) + 1
    flops = seconds = 0.0
    for (inputs, outputs), number in shapes.items():
        layer = nn.Linear(inputs, outputs, device=encoder.device, dtype=encoder.dtype).train(False)
        use_onednn(nn.Sequential(layer))
        given = torch.randn(ROWS, inputs, device=encoder.device, dtype=encoder.dtype)
        with torch.inference_mode():
            layer(given)
            best = spread_of([timed(encoder.device, partial(layer, given)) for _ in range(max(runs, 2) * 3)]).low
        flops += number * 2.0 * ROWS * inputs * outputs
        seconds += number * best
    return flops / seconds


def compiled(options: argparse.Namespace, dtype: str) -> EpicEncoder:
    """This encoder with torch's own layers, which torch.compile (it needs a C++ compiler) puts its own in place of."""
    encoder = EpicEncoder.from_pretrained(
        options.model, device=options.device, dtype=dtype, num_layers=options.num_layers
    )
    transformer = encoder.backbone.transformer
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = nn.Linear
    # Frozen, weights may be laid out once, as ours are.
    transformer.forward = torch.compile(transformer.forward, dynamic=True, options={"freezing": True})
    return encoder


def measure(options: argparse.Namespace) -> int:
    from sentence_transformers import SentenceTransformer

    plain = EpicEncoder.from_pretrained(
        options.model, device=options.device, dtype="float32", num_layers=options.num_layers
    )
    device = plain.device
    best = str(parse_dtype("auto", device)).removeprefix("torch.")
    texts = read_texts(options.texts, options.count)
    with tempfile.TemporaryDirectory() as folder:
        # Both sides open one folder of float32 weights.
        plain.save_pretrained(folder, dtype="float32")
        fast = EpicEncoder.from_pretrained(folder, device=options.device, dtype=best)
        other = SentenceTransformer(folder, device=str(device), local_files_only=True)
    other.max_seq_length = plain.max_document_tokens
    calls: dict[str, Callable[[], object]] = {}
    sizes = [DEFAULT_BATCH, *(int(size) for size in options.batches.split(",") if size)]
    say(f"trying batch sizes {sizes} on every eighth text")
    tried = interleaved(
        {str(size): partial(other.encode, texts[::8], batch_size=size, show_progress_bar=False) for size in sizes},
        3,
        device,
    )
    quickest = min(sizes, key=lambda size: min(tried[str(size)]))
    for size in dict.fromkeys((DEFAULT_BATCH, quickest)):
        calls[f"sentence-transformers, float32, batch {size}"] = partial(
            other.encode, texts, batch_size=size, show_progress_bar=False
        )
    calls["epic-rag, float32"] = partial(plain.encode_document, texts)
    calls[f"epic-rag, {best}"] = partial(fast.encode_document, texts)
    compiling = {}
    if options.compile:
        for dtype in dict.fromkeys(("float32", best)):
            name = f"torch.compile, {dtype}"
            say(f"compiling: {name}")
            other_encoder = compiled(options, dtype)
            calls[name] = partial(other_encoder.encode_document, texts)
            compiling[name] = timed(device, partial(other_encoder.encode_document, texts[:64]))
    seconds = interleaved(calls, options.runs, device)
    default = f"sentence-transformers, float32, batch {DEFAULT_BATCH}"
    rivals = [name for name in calls if name.startswith("sentence")]
    fastest = min(rivals, key=lambda name: spread_of(seconds[name]).median)
    tokens, padded = padded_share(plain, texts)
    say("matrix products alone")
    # The texts whose FLOPs are counted are some of them: the count is exact and slow.
    some = texts[: max(1, len(texts) // 20)]
    plain.replicas.workers = 1  # what other threads do is not counted
    some_tokens = sum(len(row.ids) for row in plain.prompt.documents(some))
    flops_per_token = count_flops(lambda: plain.encode_document(some)) / some_tokens
    rates = {}
    for name, encoder in (("epic-rag, float32", plain), (f"epic-rag, {best}", fast)):
        rates[name] = (flops_per_token * tokens / spread_of(seconds[name]).median, product_rate(encoder, options.runs))
    ours, quick = seconds["epic-rag, float32"], seconds[f"epic-rag, {best}"]
    bars = [
        ratio("sentence-transformers, default batch / epic-rag, float32", seconds[default], ours, 1.5, at_most=False),
        ratio("sentence-transformers, best batch / epic-rag, float32", seconds[fastest], ours, 1.5, at_most=False),
        ratio(f"sentence-transformers, best batch / epic-rag, {best}", seconds[fastest], quick, 3.0, at_most=False),
        *(
            ratio(f"epic-rag / {name}", seconds[f"epic-rag, {name.split(', ')[1]}"], each, 1.1, at_most=False)
            for name, each in seconds.items()
            if name in compiling
        ),
        Bar("rate of matrix products / the machine's, float32", _share(rates["epic-rag, float32"]), 0.6, False),
        Bar("share of padding", padded, 0.05, True),
    ]
    rows = [
        [
            name,
            spread_of(each).text(".2f"),
            f"{len(texts) / spread_of(each).median:,.0f}",
            f"{tokens / spread_of(each).median:,.0f}",
            f"{rates[name][0] / 1e9:,.0f} of {rates[name][1] / 1e9:,.0f}" if name in rates else "",
        ]
        for name, each in seconds.items()
    ]
    header = ["encoder", "seconds: median (quartiles)", "texts/s", "tokens/s", "GFLOP/s, of products alone"]
    head = (
        f"{plain.name}, {len(texts):,} texts of {tokens / len(texts):.0f} tokens on average, {tokens:,} in all, "
        f"{padded:.1%} padding on top; {options.runs} runs."
    ) + "".join(f" {name}: {each:.0f} s until it had encoded 64 texts." for name, each in compiling.items())
    facts: dict[str, Any] = {
        "model": plain.name,
        "texts": len(texts),
        "tokens": tokens,
        "padded_share": padded,
        "seconds": seconds,
        "flops_per_token": flops_per_token,
        "rates": rates,
        "compiling": compiling,
        "best_rival": fastest,
        "tried": tried,
    }
    table = markdown_table(header, rows, text_columns=1)
    write(options.output, "throughput", "\n\n".join([head, table, bars_table(bars)]), bars, device, **facts)
    return 0


def _share(rate: tuple[float, float]) -> float:
    return rate[0] / rate[1]


if __name__ == "__main__":
    sys.exit(run_main(parser(), measure))
