"""The server under load: throughput, latency and memory against the same encoder in this process.

    python benchmarks/server.py --model epic-minilm --texts docs_sections.jsonl.gz --minutes 10 --output DIR

`epic-rag serve` runs in a process of its own. By turns, this process encodes the texts in one call, 32 clients send
them in requests of 1 to 64 (3,000 texts, so that each client sends several), and they send them again while single
queries are timed (those are further work, so this run does not count for the throughput). Single queries are also
timed on an idle server, and in this process: in blocks, since the threads of a process that has just computed keep a
core busy for milliseconds. Then the clients send requests of all kinds for --minutes, and the server's memory and
errors are counted. `--runs 0` leaves out the throughput. Writes server.json and server.md to DIR.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import torch
from bench_common import Bar, bars_table, encoding_options, ratio, run_main, say, write
from throughput import read_texts

from epic_rag import EpicEncoder
from epic_rag.evaluation.report import markdown_table

CLIENTS = 32
SIZES = (1, 1, 1, 2, 4, 8, 16, 32, 64)
PROBE_SECONDS = 0.25
SINGLE_QUERIES = 40
BLOCKS = 3
ROUTES = ("/v1/embeddings", "/embed", "/v1/rerank", "/v2/embed")


def parser() -> argparse.ArgumentParser:
    options = encoding_options((__doc__ or "").split("\n\n")[0], 3000)
    options.add_argument("--minutes", type=float, default=10.0, help="duration of the load whose memory is measured")
    return options


@contextmanager
def served(model: str | None) -> Iterator[tuple[str, psutil.Process]]:
    """Run `epic-rag serve` on a free port; yield its address and process."""
    command = [sys.executable, "-m", "epic_rag_cli", "serve", "--port", "0", "--dtype", "float32"]
    command += ["--model", model] if model else []
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=os.path.sep)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.search(r"served at (http://\S+?)(?: and|\. )", line)
        if found is None:
            raise SystemExit(line + process.stderr.read())
        yield found[1], psutil.Process(process.pid)
    finally:
        process.terminate()
        process.communicate()


def requests_of(texts: list[str], seed: int) -> list[list[str]]:
    """Split the texts into requests of mixed sizes."""
    draw, found, rest = random.Random(seed), [], list(texts)
    draw.shuffle(rest)
    while rest:
        size = draw.choice(SIZES)
        found.append(rest[:size])
        rest = rest[size:]
    return found


async def run_clients(client: httpx.AsyncClient, requests: list[list[str]], probes: list[float] | None) -> float:
    """Send requests by 32 clients, and single queries beside them unless probes is None; return the seconds."""
    waiting = iter(requests)

    async def send() -> None:
        for texts in waiting:
            response = await client.post("/v1/embeddings", json={"input": texts, "encoding_format": "base64"})
            response.raise_for_status()

    async def probe(probes: list[float]) -> None:
        start = time.perf_counter()
        response = await client.post("/v1/embeddings", json={"input": f"query {start}", "input_type": "query"})
        response.raise_for_status()
        probes.append(time.perf_counter() - start)

    start = time.perf_counter()
    clients = asyncio.gather(*(send() for _ in range(CLIENTS)))
    probing = []
    while probes is not None and not clients.done():
        # At fixed times, whether or not the last one has been answered: a slow answer does not hide the next one.
        await asyncio.wait([clients], timeout=PROBE_SECONDS)
        probing.append(asyncio.create_task(probe(probes)))
    await clients
    seconds = time.perf_counter() - start
    await asyncio.gather(*probing)
    return seconds


async def run_mixed(client: httpx.AsyncClient, texts: list[str], seconds: float, memory: Callable[[], int]) -> Any:
    """Send requests of all kinds for some time; return the statuses, and memory during it."""
    statuses: Counter[str] = Counter()
    end = time.monotonic() + seconds
    sizes: list[int] = []

    async def send(seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < end:
            path, chosen = draw.choice(ROUTES), draw.sample(texts, min(draw.choice(SIZES), len(texts)))
            body: dict[str, Any] = {
                "/v1/embeddings": {"input": chosen},
                "/embed": {"inputs": chosen},
                "/v1/rerank": {"query": chosen[0][:50] or "a", "documents": chosen},
                "/v2/embed": {"texts": chosen, "input_type": "search_document"},
            }[path]
            if draw.random() < 0.05:
                body["unknown"] = True
            try:
                response = await client.post(path, json=body, timeout=0.05 if draw.random() < 0.05 else 300)
                statuses[str(response.status_code)] += 1
            except httpx.TimeoutException:
                statuses["left"] += 1

    async def watch() -> None:
        while time.monotonic() < end:
            await asyncio.sleep(min(2.0, seconds / 40))
            sizes.append(memory())

    await asyncio.gather(watch(), *(send(seed) for seed in range(CLIENTS)))
    return statuses, sizes


def metric(url: str, name: str) -> float:
    """Return a metric of the server."""
    found = re.search(rf"^{name} (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def tenths(sizes: list[int]) -> list[float]:
    """Return the mean of each tenth of the samples, which lie with and without the tensors of a batch."""
    size = max(1, len(sizes) // 10)
    return [statistics.mean(sizes[min(place * size, len(sizes) - 1) :][:size]) for place in range(10)]


def measure(options: argparse.Namespace) -> int:
    texts = read_texts(options.texts, options.count)
    encoder = EpicEncoder.from_pretrained(options.model, dtype="float32")
    encoder.encode_document(texts[:64])
    http, local, probes, batches = [], [], [], []
    with served(options.model) as (url, process):

        def using(work: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
            async def run() -> Any:
                limits = httpx.Limits(max_connections=None)
                async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
                    return await work(client)

            return asyncio.run(run())

        using(lambda client: run_clients(client, requests_of(texts[:200], 0), None))
        for run in range(options.runs):
            say(f"run {run + 1} of {options.runs}")
            start = time.perf_counter()
            encoder.encode_document(texts)
            local.append(time.perf_counter() - start)
            before = metric(url, "epic_rag_tokens_total")
            requests = requests_of(texts, run)
            http.append(using(lambda client, requests=requests: run_clients(client, requests, None)))
            # The model is busy all the time, so this is the time of a full batch.
            full = httpx.get(f"{url}/info").json()["max_batch_tokens"]
            batches.append(full * http[-1] / (metric(url, "epic_rag_tokens_total") - before))
            using(lambda client, requests=requests: run_clients(client, requests, probes))
        single_http, single_local = [], []
        with httpx.Client(base_url=url, timeout=60) as client:

            def send(query: str) -> None:
                body = {"input": query, "input_type": "query", "encoding_format": "base64"}
                client.post("/v1/embeddings", json=body).raise_for_status()

            for block in range(BLOCKS):
                for work, times in ((encoder.encode_query, single_local), (send, single_http)):
                    time.sleep(1)
                    for number in range(SINGLE_QUERIES):
                        start = time.perf_counter()
                        work(f"how do I undo commit {number} of {block}")
                        times.append(time.perf_counter() - start)
        say(f"load of {options.minutes:g} minutes")
        statuses, sizes = using(
            lambda client: run_mixed(client, texts, 60 * options.minutes, lambda: process.memory_info().rss)
        )
    memory = [round(size / 2**20) for size in tenths(sizes)]
    # The first tenth fills pools and caches.
    settled, last = memory[1], memory[-1]
    extra = 1e3 * (statistics.median(single_http) - statistics.median(single_local))
    failed = sum(count for status, count in statuses.items() if status not in ("200", "400", "left"))
    bars, rows = [], []
    if options.runs:
        p95 = statistics.quantiles(probes, n=20)[-1] if len(probes) > 1 else probes[0]
        batch = statistics.median(batches)
        bars += [
            ratio("throughput of 32 clients / one call in this process", local, http, 0.9, at_most=False),
            Bar("p95 of a single query under load / time of a batch", p95 / batch, 2.0, at_most=True),
        ]
        rows += [
            ["texts a second, one call", f"{len(texts) / statistics.median(local):.1f}"],
            ["texts a second, 32 clients", f"{len(texts) / statistics.median(http):.1f}"],
            ["time of a batch, s", f"{batch:.3f}"],
            ["single query under load, median / p95, s", f"{statistics.median(probes):.3f} / {p95:.3f}"],
        ]
    bars += [
        Bar("single warm query over HTTP, ms above this process", extra, 5.0, at_most=True),
        Bar("memory at the end / memory after a tenth of the load", last / settled, 1.05, at_most=True),
        Bar("answered requests / requests", 1 - failed / max(1, sum(statuses.values())), 1, at_most=False),
    ]
    rows += [
        ["single query, this process / HTTP, ms", " / ".join(
            f"{1e3 * statistics.median(values):.1f}" for values in (single_local, single_http))],
        ["memory of the server by tenths of the load, MiB", ", ".join(map(str, memory))],
        [f"requests in {options.minutes:g} minutes", ", ".join(f"{count} {name}" for name, count in statuses.items())],
    ]  # fmt: skip
    markdown = "\n\n".join((markdown_table(["", "measured"], rows, text_columns=1), bars_table(bars)))
    write(
        options.output,
        "server",
        markdown,
        bars,
        torch.device("cpu"),
        texts=len(texts),
        statuses=dict(statuses),
        memory=memory,
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(parser(), measure))
