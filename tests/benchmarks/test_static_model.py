"""`benchmarks/static_model.py`: a package's table and tokenizer become a model folder."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from static_model import REQUIREMENT, TOKENIZER, WEIGHTS, parser, run

from epic_rag import EpicEncoder
from epic_rag.errors import CheckpointError
from tests.conftest import make_tokenizer

PACKAGE = REQUIREMENT.partition("==")[0]
TEXTS = ["the quick brown fox", "reads a manual"]


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "wordllama.whl"
    tokenizer = make_tokenizer().backend_tokenizer
    table = torch.randn(tokenizer.get_vocab_size(), 8, generator=torch.Generator().manual_seed(0)).half()
    with zipfile.ZipFile(path, "w") as files:
        files.writestr(f"{PACKAGE}/{WEIGHTS}", save({"embedding.weight": table}))
        files.writestr(f"{PACKAGE}/{TOKENIZER}", tokenizer.to_str())
    return path


def test_vectors_are_means_of_the_tables_rows(wheel: Path, tmp_path: Path) -> None:
    assert run(parser().parse_args([str(tmp_path / "model"), "--source", str(wheel)])) == 0
    encoder = EpicEncoder.from_pretrained(tmp_path / "model")
    table = torch.randn(vocabulary(), 8, generator=torch.Generator().manual_seed(0)).half().float().numpy()
    tokenizer = make_tokenizer().backend_tokenizer
    for encode in (encoder.encode_document, encoder.encode_query):
        for text, vector in zip(TEXTS, encode(TEXTS), strict=True):
            expected = table[tokenizer.encode(text, add_special_tokens=False).ids].mean(axis=0)
            np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-6)


def vocabulary() -> int:
    return int(make_tokenizer().backend_tokenizer.get_vocab_size())


def test_an_unpacked_package_is_read_and_others_are_refused(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "site-packages")
    folder = str(tmp_path / "model")
    assert run(parser().parse_args([folder, "--source", str(tmp_path / "site-packages")])) == 0
    with pytest.raises(CheckpointError, match="holds other files"):
        run(parser().parse_args([folder, "--source", str(wheel)]))
    for source in (tmp_path / "nothing", Path(__file__)):
        with pytest.raises(CheckpointError, match="holds no"):
            run(parser().parse_args([str(tmp_path / "new"), "--source", str(source)]))
    (tmp_path / "site-packages" / PACKAGE / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="are damaged"):
        run(parser().parse_args([str(tmp_path / "new"), "--source", str(tmp_path / "site-packages")]))
