"""One local Ray cluster of two CPUs for all tests that need one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from epic_rag_ray import Cluster
from tests.helpers import free_encoder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Cluster]:
    # Ray's workers let other processes go first, and wait for long on a busy machine.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's own spelling
    cluster = Cluster("local", actors=2)
    with cluster.connected():
        from ray import cloudpickle

        # Actors need not find the tests.
        cloudpickle.register_pickle_by_value(free_encoder)
        yield cluster
        cloudpickle.unregister_pickle_by_value(free_encoder)
