"""All benchmarks of speed, and the tables of benchmarks/README.md.

    python benchmarks/bench.py --smollm2 FOLDER --data DIR [--only prompt_cache,throughput,growth,report]
    python benchmarks/bench.py --quick     # tiny random models and generated data: a smoke test

FOLDER holds SmolLM2-135M (docs/training.md says how to get it), DIR the training files. Results go to runs/bench, and
`report` puts their tables between the markers of benchmarks/README.md. --quick writes no document and judges no time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench_common import say

HERE = Path(__file__).parent
README = HERE / "README.md"
STAGES = (
    "prompt_cache",
    "prompt_cache_bf16",
    "task_vector",
    "reader",
    "throughput",
    "devices",
    "profiling",
    "cold_start",
    "vector_search",
    "growth",
    "server",
    "scale",
    "report",
)
PAIRS = "docs_questions.jsonl.gz"
TASKS = ("docs_questions", "medquad", "python_docstring_code", "squad_sentence", "wikitablequestions", "tldr_pages")
SECTIONS = "docs_sections.jsonl.gz"


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument(
        "--smollm2", default=os.environ.get("EPIC_RAG_SMOLLM2"), help="SmolLM2-135M (EPIC_RAG_SMOLLM2)"
    )
    options.add_argument("--data", default=os.environ.get("EPIC_RAG_DATA"), help="training files (EPIC_RAG_DATA/train)")
    options.add_argument("--only", default=",".join(STAGES), help="stages, comma-separated")
    options.add_argument("--output", type=Path, default=Path("runs/bench"), metavar="DIR")
    options.add_argument("--quick", action="store_true")
    return options


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the command of each stage."""
    train = Path(options.data or "") / "train"
    prompt = ["prompt_cache.py", "--model", str(options.smollm2), "--num-layers", "12"]
    prompt += ["--demonstrations", str(train / PAIRS)]
    tasks = ",".join(str(train / f"{name}.jsonl.gz") for name in TASKS)
    return {
        "prompt_cache": [*prompt, "--output", str(options.output)],
        "prompt_cache_bf16": [*prompt, "--dtype", "bfloat16", "--output", str(options.output / "bf16")],
        "task_vector": ["task_vector.py", "--pairs", tasks, "--output", str(options.output)],
        "reader": ["reader.py", "--output", str(options.output)],
        "throughput": ["throughput.py", "--texts", str(train / SECTIONS), "--output", str(options.output)],
        "devices": ["devices.py", "--texts", str(train / SECTIONS), "--output", str(options.output)],
        "profiling": [
            *("profiling.py", "--texts", str(train / SECTIONS), "--llm", str(options.smollm2), "--num-layers", "12"),
            *("--output", str(options.output)),
        ],
        "cold_start": [
            *("cold_start.py", "--output", str(options.output)),
            *(("--large", str(options.smollm2)) if options.smollm2 else ()),
        ],
        "vector_search": ["vector_search.py", "--output", str(options.output)],
        "growth": ["growth.py", "--output", str(options.output)],
        "server": ["server.py", "--texts", str(train / SECTIONS), "--runs", "2", "--output", str(options.output)],
        "scale": ["scale.py", "--data", str(options.data), "--output", str(options.output / "scale")],
    }


def quick_commands(folder: Path) -> dict[str, list[str]]:
    """Return the same commands on tiny models and data, made in `folder`."""
    from results_quick import make_encoder  # imports torch; the real stages import it in their processes

    model = str(folder / "model")
    make_encoder(folder / "model", seed=0, trained=True)
    pairs = folder / "pairs.jsonl"
    pairs.write_text(
        "".join(
            json.dumps({"query": f"where is thing {n}?", "positive": f"thing {n} is in box {n} " * (1 + n % 4)}) + "\n"
            for n in range(80)
        ),
        encoding="utf-8",
    )
    # Many more tokens, so that several devices share them.
    long = folder / "long.jsonl"
    long.write_text(
        "".join(json.dumps({"query": f"thing {n}?", "positive": f"box {n} " * 90}) + "\n" for n in range(80)),
        encoding="utf-8",
    )
    out = str(folder / "out")
    return {
        "prompt_cache": [
            *("prompt_cache.py", "--model", model, "--demonstrations", str(pairs), "--k", "2", "--runs", "2"),
            *("--passage-tokens", "8", "--output", out),
        ],
        "throughput": [
            *("throughput.py", "--model", model, "--texts", str(pairs), "--count", "20", "--runs", "2"),
            *("--batches", "4", "--output", out),
        ],
        "devices": [
            *("devices.py", "--model", model, "--texts", str(long), "--runs", "2", "--output", out),
        ],
        "task_vector": [
            *("task_vector.py", "--model", model, "--pairs", str(pairs), "--strengths", "0.7", "--k", "2"),
            *("--queries", "5", "--documents", "10", "--draws", "1", "--runs", "2", "--output", out),
        ],
        "reader": ["reader.py", "--model", model, "--sizes", "1,40", "--runs", "2", "--output", out],
        "profiling": [
            *("profiling.py", "--model", model, "--llm", model, "--texts", str(pairs), "--count", "20", "--runs", "2"),
            *("--output", out),
        ],
        "cold_start": [
            *(
                "cold_start.py",
                "--model",
                model,
                "--large",
                model,
                "--chunks",
                "20",
                "--sizes",
                "20,40",
                "--runs",
                "2",
                "--output",
                out,
            ),
        ],
        "vector_search": ["vector_search.py", "--sizes", "200", "--dim", "16", "--queries", "3", "--output", out],
        "growth": ["growth.py", "--model", model, "--sizes", "20", "--output", out],
        "server": [
            *("server.py", "--model", model, "--texts", str(pairs), "--count", "40", "--runs", "2"),
            *("--minutes", "0.02", "--output", out),
        ],
        "scale": ["scale.py", "--quick", "--output", str(folder / "scale")],
    }


def run(name: str, command: list[str]) -> None:
    say(f"=== {name}")
    subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], check=True)


def report(output: Path) -> None:
    """Put the tables into benchmarks/README.md."""
    text = README.read_text(encoding="utf-8")
    for stage in STAGES[:-1]:
        found = output / "bf16" / "prompt_cache.md" if stage == "prompt_cache_bf16" else output / f"{stage}.md"
        begin, end = f"<!-- begin {stage} -->\n", f"<!-- end {stage} -->"
        if found.is_file() and begin in text:
            head, rest = text.split(begin, 1)
            plot = output / f"{stage}.svg"
            picture = f"\n![{stage}]({stage}.svg)\n" if plot.is_file() else ""
            text = f"{head}{begin}\n{found.read_text(encoding='utf-8')}{picture}\n{rest[rest.index(end) :]}"
            if plot.is_file():
                (HERE / f"{stage}.svg").write_bytes(plot.read_bytes())
    README.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    wanted = [stage for stage in options.only.split(",") if stage]
    unknown = sorted(set(wanted) - set(STAGES))
    if unknown:
        sys.stderr.write(f"error: {unknown[0]} is not a stage. Use {', '.join(STAGES)}.\n")
        return 2
    try:
        if options.quick:
            with tempfile.TemporaryDirectory() as folder:
                for name, command in quick_commands(Path(folder)).items():
                    if name in wanted:
                        run(name, command)
            return 0
        for stage in ("prompt_cache", "prompt_cache_bf16"):
            if stage in wanted and not options.smollm2:
                sys.stderr.write(f"error: {stage} needs --smollm2. Pass it, or leave {stage} out.\n")
                return 2
        chosen = commands(options)
        for stage in wanted:
            if stage == "report":
                report(options.output)
            else:
                run(stage, chosen[stage])
    except subprocess.CalledProcessError as error:
        sys.stderr.write(
            f"error: {Path(error.cmd[1]).name} ended with status {error.returncode}; its messages are above\n"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
