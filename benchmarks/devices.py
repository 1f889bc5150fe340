"""One device against a list of devices in one process.

    python benchmarks/devices.py --texts docs_sections.jsonl.gz --count 300 --device cpu,cpu --output DIR

The same texts by one worker on the first of the devices and by an encoder that spreads its batches over all of them;
vectors must agree. On a CPU that is named twice there is nothing to win but less waiting of its cores for each other,
so the list must only be no slower; on GPUs each should bring its share. A CPU that is named once has several workers
anyway, which is the third row. Writes devices.json and devices.md to DIR.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import numpy as np
import torch
from bench_common import Bar, bars_table, encoding_options, interleaved, ratio, run_main, write
from measuring import spread_of
from throughput import read_texts

from epic_rag import EpicEncoder
from epic_rag.errors import ConfigError
from epic_rag.evaluation.report import markdown_table

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.005}
"""Largest difference of vectors of two devices, by dtype."""


def parser() -> argparse.ArgumentParser:
    options = encoding_options((__doc__ or "").split("\n\n")[0], 300)
    options.add_argument("--device", default="cpu,cpu", metavar="NAME,...", help="the list; default: cpu,cpu")
    return options


def measure(options: argparse.Namespace) -> int:
    several = EpicEncoder.from_pretrained(options.model, device=options.device, num_layers=options.num_layers)
    if len(several.devices) < 2:
        raise ConfigError(f"--device is {options.device!r}, a comparison takes 2 or more; pass --device cpu,cpu")
    one = EpicEncoder.from_pretrained(options.model, device=several.devices[0], num_layers=options.num_layers)
    one.replicas.workers = 1
    texts = read_texts(options.texts, options.count)
    encoders = {f"{one.device}, one worker": one, "list: " + ", ".join(map(str, several.devices)): several}
    if one.device.type == "cpu":
        usual = EpicEncoder.from_pretrained(options.model, device=one.device, num_layers=options.num_layers)
        encoders[f"{one.device}, as it comes"] = usual
    names = list(encoders)
    seconds = interleaved(
        {name: partial(encoder.encode_document, texts) for name, encoder in encoders.items()}, options.runs, one.device
    )
    apart = float(np.abs(one.encode_document(texts) - several.encode_document(texts)).max())
    # On one CPU no slower; on as many GPUs at least 0.8 of their number as fast.
    limit = 1.05 if one.device.type == "cpu" else 1 / (0.8 * len(several.devices))
    bars = [
        ratio("time of the list / time of one worker", seconds[names[1]], seconds[names[0]], limit, at_most=True),
        Bar("largest difference in a vector", apart, CLOSE[one.dtype], True),
    ]
    tokens = sum(len(row.ids) for row in one.prompt.documents(texts))
    rows = [
        [
            name,
            spread_of(each).text(".3g"),
            f"{tokens / spread_of(each).median:,.0f}",
        ]
        for name, each in seconds.items()
    ]
    dtype = str(one.dtype).removeprefix("torch.")
    head = f"{one.name}, {dtype}, {len(texts):,} texts, {tokens:,} tokens; {options.runs} runs."
    table = markdown_table(["devices", "seconds: median (quartiles)", "tokens/s"], rows, text_columns=1)
    write(
        options.output,
        "devices",
        "\n\n".join([head, table, bars_table(bars)]),
        bars,
        one.device,
        model=one.name,
        devices=[str(device) for device in several.devices],
        texts=len(texts),
        tokens=tokens,
        seconds=seconds,
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(parser(), measure))
