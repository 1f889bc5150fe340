"""Run the commands of docs/results.md and write its tables. `make results` runs this.

    python benchmarks/results.py --data DIR --minilm DIR --reader DIR --static DIR --llm DIR
                                 --plain DIR --int8 DIR
                                 [--only STAGE,...] [--output DIR] [--cache-dir DIR]
    python benchmarks/results.py --quick

The stages and their commands are in benchmarks/results/STAGE.yaml. Every step of a stage has a folder under the output
folder, with the table that its command printed and its files. A finished step is skipped as long as its command, its
models and its data are the same; an interrupted one runs again, with the vectors in the cache. The stage `report`
writes the tables of the finished steps between the markers of a document:

    <!-- begin STAGE-STEP -->
    <!-- end STAGE-STEP -->

`--quick` runs the same commands on generated data with tiny random models in a temporary folder, in one process: a
smoke test that changes no document.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from results_report import Finished, placeholder_document, write_report

from epic_rag import __version__
from epic_rag.checkpoints import DEFAULT_CHECKPOINT, list_checkpoints
from epic_rag.cpu_kernels import has_bfloat16_instructions
from epic_rag.errors import ConfigError, EpicError
from epic_rag.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("ablations", "efficiency", "heldout", "fewshot", "evaluation", "quantisation")
REPORT = "report"
# Options beyond the command that is shown, so that a program's files are in the step's folder.
PLUMBING = {
    ("epic-rag", "eval"): "--output {step}/result.json --cache-dir {cache} --mteb-output {step}/mteb",
    ("epic-rag", "ablate"): "--output {step}",
    ("python", "benchmarks/efficiency.py"): "--output {step}",
    ("python", "benchmarks/few_shot_index.py"): "",
    ("python", "benchmarks/built_in_banks.py"): "--cache-dir {cache}",
    ("python", "benchmarks/fine_tuning.py"): "",
    ("python", "benchmarks/prompt_arms.py"): "--output {step}/run",
}
# Without hardware support bfloat16 takes many times as long as float32.
DTYPE = "bfloat16" if has_bfloat16_instructions() else "float32"
TABLES = ("all", "heldout", "fewshot", "methods")
# Placeholders for folders in the commands of the document.
SHOWN = {
    "data": "data",
    "minilm": "path/to/all-MiniLM-L6-v2",
    "reader": "path/to/all-MiniLM-L6-v2-reader",
    "static": "path/to/wordllama",
    "llm": "path/to/untrained-LLM",
    "plain": "runs/plain/final",
    "int8": "path/to/epic-minilm-int8",
    "default": DEFAULT_CHECKPOINT,
    "dtype": DTYPE,
}
OPTION_OF = {
    "data": "--data",
    "minilm": "--minilm",
    "reader": "--reader",
    "static": "--static",
    "llm": "--llm",
    "plain": "--plain",
    "int8": "--int8",
}


@dataclass(frozen=True)
class Step:
    """One command of a stage.

    Args:
        stage: The stage's name.
        name: The step's name.
        command: With placeholders like {data}.
        table: "all" for the printed table, "heldout", "fewshot" or "methods" for short ones of the JSON.
        quick: Arguments that make the command small, added under `--quick`.
    """

    stage: str
    name: str
    command: str
    table: str = "all"
    quick: str = ""

    @property
    def title(self) -> str:
        """The name of the step's place in a document."""
        return f"{self.stage}-{self.name}"


@dataclass(frozen=True)
class Run:
    """Folders of a run.

    Args:
        output: Folder of all steps.
        places: Values of {data} and the other placeholders; None for a folder that was not given.
        shipped: Label (or "") and source of each shipped checkpoint.
        quick: Whether everything is tiny, and commands run in this process.
        cache: Folder of vectors and cells; None for one under the output folder.
    """

    output: Path
    places: Mapping[str, str | None]
    shipped: Sequence[tuple[str, str]]
    quick: bool = False
    cache: Path | None = None

    @property
    def shown(self) -> dict[str, str | None]:
        """Values of the placeholders in a document."""
        return {**SHOWN, "dtype": self.places.get("dtype", DTYPE)}


def load_stage(name: str, folder: Path = ROOT / "benchmarks" / "results") -> list[Step]:
    """Read a stage's steps.

    Raises:
        ConfigError: The file is malformed.
    """
    path = folder / f"{name}.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {"command", "table", "quick"}
    steps = []
    for step, values in content["steps"].items():
        unknown = sorted(values.keys() - known)
        if unknown or values.get("table", "all") not in TABLES:
            raise ConfigError(
                f"{path}, step {step}: unknown {unknown or values['table']}. Known are {', '.join(sorted(known))}."
            )
        steps.append(Step(name, step, **{**values, "command": " ".join(values["command"].split())}))
    return steps


def fill(command: str, places: Mapping[str, str | None], shipped: Sequence[tuple[str, str]], stage: str) -> list[str]:
    """Return a command's words with its placeholders filled.

    Args:
        command: With placeholders like {data}; {shipped} becomes a --model for each shipped checkpoint.
        places: Their values.
        shipped: Label (or "") and source of each shipped checkpoint.
        stage: For the message.

    Raises:
        ConfigError: A folder is needed that was not given.
    """
    words: list[str] = []
    for word in shlex.split(command):
        if word == "{shipped}":
            words += [part for label, name in shipped for part in ("--model", f"{label}={name}" if label else name)]
            continue
        for place, value in places.items():
            if "{" + place + "}" in word:
                if value is None:
                    raise ConfigError(
                        f"The stage {stage} needs {SHOWN[place]}. Pass {OPTION_OF[place]} DIR, or leave the stage out "
                        "with --only."
                    )
                word = word.replace("{" + place + "}", value)
        words.append(word)
    return words


def content_hash(path: Path) -> str:
    """Hash a file, or the names and contents of a folder's files."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    for file in files:
        digest.update(f"{file.relative_to(path)}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def settings_of(words: Sequence[str]) -> dict[str, Any]:
    """Return everything that decides a step's result: the command and the contents of its files and checkpoints."""
    shipped = {info.name: info.path for info in list_checkpoints()}
    inputs: dict[str, str] = {}
    for word in words[2:]:
        name = word.rsplit("=", 1)[-1]
        for mode in (":plain", ":prompted"):
            name = name.removesuffix(mode)
        path = shipped.get(name, Path(name))
        if path.exists():
            inputs[name] = content_hash(path)
    return {"command": list(words), "inputs": inputs, "epic_rag": __version__}


def run_step(step: Step, run: Run) -> Finished:
    """Run a step, unless it is finished already.

    Raises:
        ConfigError: A folder is needed that was not given.
        EpicError: The command failed.
    """
    folder = run.output / step.stage / step.name
    command = f"{step.command} {step.quick}" if run.quick else step.command
    words = fill(command, run.places, run.shipped, step.stage)
    shown = fill(step.command, run.shown, run.shipped, step.stage)
    finished = Finished(step.title, tuple(shown), folder, step.table)
    settings = settings_of(words)
    state = folder / "state.json"
    if state.is_file() and json.loads(state.read_text(encoding="utf-8"))["settings"] == settings:
        say(f"{step.title}: finished before")
        return finished
    folder.mkdir(parents=True, exist_ok=True)
    state.unlink(missing_ok=True)
    plumbing = PLUMBING[words[0], words[1]].format(step=folder, cache=run.cache or run.output / "cache")
    call = [*words, *shlex.split(plumbing)]
    say(f"{step.title}: {shlex.join(call)}")
    started = time.monotonic()
    draft = folder / "table.md.tmp"
    with draft.open("w", encoding="utf-8") as table:
        if run.quick:
            with contextlib.redirect_stdout(table):
                status = run_here(call)
        else:
            status = subprocess.run(interpreter(call), stdout=table, check=False).returncode
    if status:
        raise EpicError(f"{step.title} ended with status {status}; see above. Then run the same command again.")
    os.replace(draft, folder / "table.md")
    record = {"settings": settings, "seconds": round(time.monotonic() - started, 1)}
    write_atomically(state, json.dumps(record, indent=1) + "\n")
    say(f"{step.title}: {record['seconds']} s")
    return finished


def interpreter(words: Sequence[str]) -> list[str]:
    """Return a command for this interpreter, whatever is on the path."""
    if words[0] == "epic-rag":
        return [sys.executable, "-m", "epic_rag_cli", *words[1:]]
    return [sys.executable, str(ROOT / words[1]), *words[2:]]


def run_here(words: Sequence[str]) -> int:
    """Run a command in this process, which spares the imports of every single one."""
    if words[0] == "epic-rag":
        from epic_rag_cli.main import run

        return run(words[1:])
    return int(importlib.import_module(Path(words[1]).stem).main(words[2:]))


def say(line: str) -> None:
    print(f"results: {line}", file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/results.py", description=(__doc__ or "").partition("\n")[0])
    environment = os.environ.get
    parser.add_argument("--data", default=environment("EPIC_RAG_DATA"), metavar="DIR", help="holds eval/ and train/")
    parser.add_argument("--minilm", default=environment("EPIC_RAG_MINILM"), metavar="DIR", help="all-MiniLM-L6-v2")
    parser.add_argument(
        "--reader",
        default=environment("EPIC_RAG_READER"),
        metavar="DIR",
        help="all-MiniLM-L6-v2 with the reader.safetensors of `epic-rag train reader`",
    )
    parser.add_argument(
        "--static",
        default=environment("EPIC_RAG_STATIC"),
        metavar="DIR",
        help="a static model, as benchmarks/static_model.py makes it",
    )
    parser.add_argument("--llm", default=environment("EPIC_RAG_LLM"), metavar="DIR", help="an untrained LLM")
    parser.add_argument(
        "--plain",
        default=environment("EPIC_RAG_PLAIN"),
        metavar="DIR",
        help="the start of the ablations: see their grids",
    )
    parser.add_argument(
        "--int8",
        default=environment("EPIC_RAG_INT8"),
        metavar="DIR",
        help="`epic-rag models export epic-minilm DIR --dtype int8`",
    )
    parser.add_argument("--dtype", default=DTYPE, help="of the models; default: bfloat16 where the processor has it")
    parser.add_argument("--output", type=Path, default=Path("runs/results"), metavar="DIR", help="of all steps")
    parser.add_argument("--only", metavar="NAME,...", help=f"of {', '.join((*STAGES, REPORT))}, or a step STAGE-STEP")
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="of vectors and cells; OUTPUT/cache if it is not given"
    )
    parser.add_argument(
        "--document",
        type=Path,
        action="append",
        metavar="FILE.md",
        help="repeat it for several; docs/results.md and README.md if it is not given",
    )
    parser.add_argument("--quick", action="store_true", help="tiny models, generated data, a temporary folder")
    options = parser.parse_args(arguments)
    options.document = options.document or [ROOT / "docs" / "results.md", ROOT / "README.md"]
    return options


def chosen_steps(only: str | None) -> tuple[list[Step], bool]:
    """Return the steps to run, in order, and whether to write the report.

    Args:
        only: Names of stages or steps (STAGE-STEP), and "report"; None for everything.

    Raises:
        ConfigError: There is no such stage or step.
    """
    steps = [step for stage in STAGES for step in load_stage(stage)]
    known = {*STAGES, REPORT, *(step.title for step in steps)}
    wanted = known if only is None else {name.strip() for name in only.split(",") if name.strip()}
    unknown = sorted(wanted - known)
    if unknown or not wanted:
        names = ", ".join((*STAGES, REPORT))
        raise ConfigError(f"--only names {', '.join(unknown) or 'no stage'}. Use one or more of {names}.")
    return [step for step in steps if {step.stage, step.title} & wanted], REPORT in wanted


def run_steps(steps: Sequence[Step], run: Run, documents: Sequence[Path] | None) -> None:
    """Run steps and, given documents, write the tables of them and of earlier runs.

    Raises:
        EpicError: Something is missing or has failed; what is finished stays.
    """
    finished = [run_step(step, run) for step in steps]
    if documents is None:
        return
    found = {item.title: item for item in finished}
    for stage in STAGES:
        for step in load_stage(stage):
            folder = run.output / stage / step.name
            if step.title not in found and (folder / "state.json").is_file():
                shown = fill(step.command, run.shown, run.shipped, stage)
                found[step.title] = Finished(step.title, tuple(shown), folder, step.table)
    for line in write_report(list(found.values()), documents):
        say(line)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        steps, report = chosen_steps(options.only)
        if options.quick:
            return quick(steps, report=report)
        places = {
            "data": options.data,
            "minilm": options.minilm,
            "reader": options.reader,
            "static": options.static,
            "llm": options.llm,
            "plain": options.plain,
            "int8": options.int8,
            "default": DEFAULT_CHECKPOINT,
            "dtype": options.dtype,
        }
        shipped = [("", info.name) for info in list_checkpoints()]
        run = Run(options.output, places, shipped, cache=options.cache_dir)
        run_steps(steps, run, options.document if report else None)
    except EpicError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def quick(steps: Sequence[Step], *, report: bool) -> int:
    """Run steps on tiny models and data, and print the document.

    Raises:
        EpicError: A command failed, or its table did not arrive in the document.
    """
    from results_quick import make_tiny_world

    with tempfile.TemporaryDirectory(prefix="epic-rag-results-") as folder:
        places = make_tiny_world(Path(folder), [step.command for step in steps])
        run = Run(
            Path(folder) / "output",
            places,
            [(DEFAULT_CHECKPOINT, places["default"])],
            quick=True,
        )
        document = Path(folder) / "results.md"
        document.write_text(placeholder_document([step.title for step in steps]), encoding="utf-8")
        run_steps(steps, run, [document] if report else None)
        written = document.read_text(encoding="utf-8")
        missing = [step.title for step in steps if report and f"<!-- end {step.title}" not in written]
        if missing or (report and written.count("| ---") < len(steps)):
            raise EpicError(f"The document lacks tables of {', '.join(missing) or 'some steps'}.")
        print(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
