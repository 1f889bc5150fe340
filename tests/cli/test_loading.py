"""The commands' way of loading: no search for garbage meanwhile, and one again afterwards, whatever happens."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from epic_rag_cli.loading import without_collections


@pytest.fixture(autouse=True)
def _enabled() -> Iterator[None]:
    before = gc.isenabled()
    yield
    (gc.enable if before else gc.disable)()


@pytest.mark.parametrize("enabled", [True, False])
def test_collections_are_as_before_afterwards(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    with without_collections():
        assert not gc.isenabled()
    assert gc.isenabled() is enabled
    with pytest.raises(RuntimeError), without_collections():
        raise RuntimeError
    assert gc.isenabled() is enabled
