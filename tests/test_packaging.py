"""What is shipped: the wheel's contents and metadata, the Makefile's targets, the sizes of what is committed."""

from __future__ import annotations

import configparser
import email
import email.message
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import epic_rag
from epic_rag.checkpoints import DEFAULT_CHECKPOINT, list_checkpoints
from tests.helpers.extras import project, tomllib
from tests.test_structure import SOURCES

ROOT = Path(__file__).resolve().parents[1]
MIB = 1024 * 1024


def committed_files() -> list[str]:
    """What git has or would take: tracked files and new ones that are not ignored, as long as they exist."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout.decode()
    return sorted(name for name in listed.split("\0") if name and (ROOT / name).is_file())


BUILD = """
import sys
from setuptools.build_meta import build_wheel

build_wheel(sys.argv[1], {"--build-option": ["--compression=stored"]})
"""


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel of a copy of what is committed, built offline with the installed setuptools, and not compressed."""
    source = tmp_path_factory.mktemp("source")
    for name in committed_files():
        if name.startswith(("docs/images/", "tests/")):
            continue
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    shutil.rmtree(source)
    [path] = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="session")
def names(wheel: zipfile.ZipFile) -> set[str]:
    return set(wheel.namelist())


@pytest.fixture(scope="session")
def metadata(wheel: zipfile.ZipFile, names: set[str]) -> email.message.Message:
    [path] = [name for name in names if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(path))


def test_only_our_packages_land_in_site_packages(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert tops == {*SOURCES, f"epic_rag-{epic_rag.__version__}.dist-info"}


def test_llama_index_stays_a_namespace(names: set[str]) -> None:
    # An __init__.py on these levels would hide llama-index-core, or be overwritten by it.
    shared = ("llama_index", "llama_index/embeddings", "llama_index/retrievers")
    assert not {f"{folder}/__init__.py" for folder in shared} & names
    ours = {name for name in names if name.startswith("llama_index/")}
    epic = ("llama_index/embeddings/epic/", "llama_index/retrievers/epic/")
    assert {f"{folder}__init__.py" for folder in epic} <= ours
    assert {name for name in ours if not name.startswith(epic)} == set()


def test_every_module_and_data_file_of_the_packages_is_in_the_wheel(names: set[str]) -> None:
    packages = [(root / name).relative_to(ROOT).as_posix() for name, root in SOURCES.items()]
    expected = {
        re.sub(r"^(integrations|cli|demos)/", "", name)
        for name in committed_files()
        if name.startswith(tuple(f"{package}/" for package in packages))
    }
    assert len(expected) > 100
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_every_shipped_checkpoint_is_in_the_wheel(names: set[str]) -> None:
    shipped = [info.name for info in list_checkpoints()]
    assert DEFAULT_CHECKPOINT in shipped
    for name in shipped:
        folder = f"epic_rag/checkpoints/{name}"
        for file in ("config.json", "tokenizer.json", "epic.json", "projector.safetensors", "README.md"):
            assert f"{folder}/{file}" in names
        # Weights in one format: another beside it would be too large for the package index.
        weights = {Path(file).name for file in names if re.fullmatch(rf"{folder}/(query_)?model.*", file)}
        assert weights in ({"model.safetensors"}, {"model.safetensors", "query_model.safetensors"})


def test_the_shipped_checkpoints_are_under_95_megabytes_together() -> None:
    sizes = {
        name: (ROOT / name).stat().st_size for name in committed_files() if name.startswith("epic_rag/checkpoints/")
    }
    # Megabytes of the strict kind, here and below: whichever kind a limit of others means, this is under it.
    assert sum(sizes.values()) < 95_000_000
    assert {name: size for name, size in sizes.items() if size >= 50_000_000} == {}


@pytest.mark.parametrize(
    "package", [*sorted(set(SOURCES) - {"llama_index"}), "llama_index/embeddings/epic", "llama_index/retrievers/epic"]
)
def test_packages_are_marked_as_typed(names: set[str], package: str) -> None:
    assert f"{package}/py.typed" in names


def test_the_wheel_is_under_100_megabytes(wheel: zipfile.ZipFile) -> None:
    assert wheel.filename is not None
    assert Path(wheel.filename).stat().st_size < 100_000_000


def test_the_command_is_declared(wheel: zipfile.ZipFile, names: set[str]) -> None:
    [path] = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(path).decode())
    assert dict(parser["console_scripts"]) == {"epic-rag": "epic_rag_cli.__main__:main"}


def test_metadata_says_version_python_licence_and_extras(metadata: email.message.Message, names: set[str]) -> None:
    assert metadata["Name"] == "epic-rag"
    assert metadata["Version"] == epic_rag.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"epic_rag-{epic_rag.__version__}.dist-info/licenses/LICENSE" in names
    assert set(metadata.get_all("Provides-Extra", [])) == set(project()["optional-dependencies"])


def test_the_distribution_for_llama_index_is_a_name_for_the_extra() -> None:
    file = ROOT / "integrations/llama-index-embeddings-epic/pyproject.toml"
    settings = tomllib.loads(file.read_text("utf-8"))
    assert settings["project"]["version"] == epic_rag.__version__
    assert settings["project"]["dependencies"] == [f"epic-rag[llama-index]=={epic_rag.__version__}"]
    hub = settings["tool"]["llamahub"]
    module = importlib.import_module(hub["import_path"])
    assert set(hub["class_authors"]) == set(module.__all__)


def test_runtime_requirements_have_no_pin_and_no_address(metadata: email.message.Message) -> None:
    # The pin of torch belongs to constraints.txt: in the metadata it would be forced on everyone.
    requirements = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert any(line.startswith("torch>=") for line in requirements)
    assert [line for line in requirements if "==" in line or "@" in line] == []


def test_the_licence_is_the_whole_apache_licence() -> None:
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    for section in range(1, 10):
        assert re.search(rf"^ {{3}}{section}\. [A-Z]", text, re.MULTILINE), section


@pytest.mark.parametrize("target", ["demo", "test", "check", "wheel", "clean"])
def test_make_knows_the_target(target: str, tmp_path: Path) -> None:
    # A dry run in an empty environment: it must plan commands, and execute none.
    planned = subprocess.run(
        ["make", "--dry-run", target, f"VENV={tmp_path / 'venv'}", f"DIST={tmp_path / 'dist'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.strip()
    assert list(tmp_path.iterdir()) == []


def test_the_files_that_make_uses_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    used = set(re.findall(r"(?<![\w/])(?:tests|benchmarks|demos)/[\w./-]+(?<=[\w])", makefile)) - {
        "demos/epic_rag_demos"
    }
    assert len(used) >= 5
    assert {name for name in used if not (ROOT / name).exists()} == set()


def test_make_without_a_target_changes_nothing_but_explains() -> None:
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "check", "wheel", "clean"):
        assert re.search(rf"^make {target} ", shown, re.MULTILINE)


def test_no_committed_file_is_over_50_megabytes() -> None:
    sizes = {name: (ROOT / name).stat().st_size for name in committed_files()}
    assert len(sizes) > 50
    assert {name: size for name, size in sizes.items() if size >= 50_000_000} == {}


def test_the_demo_has_a_real_folder_of_200_files_with_the_answers_in_it(tmp_path: Path) -> None:
    def export() -> str:
        command = [
            sys.executable,
            str(ROOT / "demos/examples/demo.py"),
            "--work-dir",
            str(tmp_path),
            "--export-only",
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "files written" in export()
    files = [path for path in (tmp_path / "docs").rglob("*") if path.is_file()]
    assert len(files) >= 200
    assert sum(path.stat().st_size for path in files) < 3 * MIB  # more would not be indexed in two minutes
    assert {"pypdf.md", "secrets.txt"} <= {path.name for path in files}
    assert (ROOT / "docs/architecture.md").is_file()
    assert "unchanged" in export()
