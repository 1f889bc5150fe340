"""The fork server of the soak tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.fork_server import ForkServer


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    with ForkServer(tmp_path_factory.mktemp("answers")) as server:
        yield server
