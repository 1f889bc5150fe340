"""The pipeline on a local Ray cluster, and what happens when an actor is killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from epic_rag.errors import EpicError
from epic_rag_cli.main import run
from epic_rag_ray import Cluster, FileChunker, PipelineSettings, read_progress, run_pipeline
from epic_rag_ray.engine import Task, run_tasks
from tests.helpers.free_encoder import calls, free_encoder
from tests.helpers.indexes import write_tree
from tests.helpers.parts import contents

# Ray reads its own deprecated settings.
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated:DeprecationWarning")


def corpus(folder: Path, count: int) -> Path:
    return write_tree(folder, {f"{number}.txt": f"text number{number} of {number * 7}" for number in range(count)})


def test_the_rows_are_those_of_a_run_without_ray(ray_cluster: Cluster, tmp_path: Path) -> None:
    docs = corpus(tmp_path / "docs", 60)
    (docs / "bad.pdf").write_bytes(b"broken")
    log = tmp_path / "log"
    options = PipelineSettings(model=partial(free_encoder, str(log)), rows=16)
    report = run_pipeline([docs], tmp_path / "out", options, cluster=ray_cluster)
    assert (report.rows, report.embedded, report.actors, len(report.skipped)) == (60, 60, 2, 1)
    assert os.getpid() not in {process for process, _ in calls(log)}
    assert sorted(count for _, count in calls(log)) == [12, 16, 16, 16]
    run_pipeline([docs], tmp_path / "plain", options)
    found, expected = contents(tmp_path / "out"), contents(tmp_path / "plain")
    assert found.keys() == expected.keys()
    for id_, row in found.items():
        np.testing.assert_array_equal(row.pop("embedding"), expected[id_].pop("embedding"))
        assert row == expected[id_]


def test_a_killed_actor_is_replaced_and_nothing_is_lost(ray_cluster: Cluster, tmp_path: Path) -> None:
    docs = corpus(tmp_path / "docs", 120)
    log = tmp_path / "log"
    options = PipelineSettings(model=partial(free_encoder, str(log), 0.3), rows=8)
    killed: list[int] = []

    def kill() -> None:
        for batches in (3, 9):
            while len(calls(log)) < batches:
                time.sleep(0.02)
            process = calls(log)[-1][0]
            os.kill(process, signal.SIGKILL)
            killed.append(process)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    report = run_pipeline([docs], tmp_path / "out", options, cluster=ray_cluster)
    killer.join(1)
    assert len(killed) == 2
    assert report.rows == 120
    rows = contents(tmp_path / "out")
    assert sorted(row["text"] for row in rows.values()) == sorted(file.read_text() for file in docs.iterdir())
    for row in rows.values():
        np.testing.assert_array_equal(row["embedding"], free_encoder().encode_document(row["text"]))
    assert sum(count for _, count in calls(log)) <= 120 + 2 * 8
    assert read_progress(str(tmp_path / "out")).actors == 2


def test_the_command_runs_on_the_cluster(
    ray_cluster: Cluster, tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    docs = corpus(tmp_path / "docs", 19)
    (docs / "bad.pdf").write_bytes(b"broken")
    capfd.readouterr()
    command = [
        "index",
        str(docs),
        "--to",
        str(tmp_path / "out"),
        "--model",
        str(tiny_checkpoint),
        "--duplicates",
        "exact",
    ]
    assert run([*command, "--ray", "local", "--actors", "1", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["rows"], report["actors"]) == (19, 1)
    assert [Path(each["path"]).name for each in report["skipped"]] == ["bad.pdf"]
    assert len(contents(tmp_path / "out")) == 19


class Broken:
    def __init__(self, error: Exception) -> None:
        self._error = error

    def __call__(self, task: Task) -> Task:
        raise self._error

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("error", "message"), [(EpicError("Out of ink."), "Out of ink"), (ValueError("odd"), "odd")])
def test_an_error_of_an_actor_is_one_of_ours(ray_cluster: Cluster, error: Exception, message: str) -> None:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["x"]))
    with pytest.raises(EpicError, match=message):
        list(run_tasks(Broken, {"error": error}, [{}], ray_cluster))


def test_files_in_passages_and_reasons_out(ray_cluster: Cluster, tmp_path: Path) -> None:
    import ray.data

    docs = write_tree(tmp_path / "docs", {"a.md": "# A\n\nOne.\n", "b.txt": "Two.", "c.pdf": b"broken"})
    files = ray.data.from_items([{"path": str(file)} for file in sorted(docs.iterdir())])
    dataset = files.map_batches(
        FileChunker,
        fn_constructor_kwargs={"model": free_encoder},
        compute=ray.data.ActorPoolStrategy(size=1),
        batch_format="pyarrow",
    )
    rows = sorted(dataset.take_all(), key=lambda row: row["path"])
    assert [(row["path"], row["text"], bool(row["reason"])) for row in rows] == [
        ("a.md", "# A\n\nOne.", False),
        ("b.txt", "Two.", False),
        ("c.pdf", None, True),
    ]


def test_a_cluster_that_is_not_there() -> None:
    with pytest.raises(Exception, match="at least one CPU"):
        Cluster("local", cpus=0)
    with pytest.raises(Exception, match="1 or more"):
        Cluster("local", actors=0)
