"""One SeaweedFS for the suite, and for each test a prefix of its own in a bucket."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from uuid import uuid4

import pytest

from tests.helpers.slurm import clear_jobs
from tests.helpers.stores import READER, Proxied, use
from tools.local_services.s3 import Identity, ObjectServer, start_store
from tools.local_services.slurm import SlurmCluster, start_slurm
from tools.local_services.slurm_daemons import missing_packages

# Workers that share the suite by files end together when these come first.
LONGEST = (
    "test_miniature",
    "test_launcher",
    "test_launcher_jobs",
    "test_slurm",
    "test_pipelines",
    "test_jobs",
    "test_checkpoints",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that last longest come first; most of their time is waiting for Slurm."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    """A running server. Its first identity may do everything, its second (`READER`) may read and list."""
    with start_store(tmp_path_factory.mktemp("seaweed"), identities=(Identity(), READER)) as server:
        yield server


@pytest.fixture
def bucket_url(object_store: ObjectServer, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A fresh `s3://bucket/prefix`; the environment of this process and its children has the keys."""
    use(monkeypatch, object_store.environment())
    name = re.sub(r"[^A-Za-z0-9]+", "-", request.node.name)[:40].strip("-")
    return f"s3://{object_store.bucket}/{name}-{uuid4().hex[:8]}"


@pytest.fixture
def proxied(object_store: ObjectServer, bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> Proxied:
    """`with proxied() as proxy:` puts a fault proxy in front of the server for stores opened inside."""
    return Proxied(object_store, monkeypatch)


@pytest.fixture(scope="session")
def slurm_packages() -> None:
    """For tests that need Slurm: skips them where it is not installed, unless REGEN_REQUIRE_SLURM=1, as in CI."""
    missing = missing_packages(accounting=True)
    if missing and os.environ.get("REGEN_REQUIRE_SLURM") != "1":
        pytest.skip(f"Slurm is not installed ({', '.join(missing)} missing); .ci/system-packages installs it on Debian")


@pytest.fixture(scope="session")
def slurm_cluster(slurm_packages: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A running Slurm of two nodes with two fake GPUs each."""
    with start_slurm(tmp_path_factory.mktemp("slurm"), grace_s=15) as cluster:
        yield cluster


@pytest.fixture
def slurm(slurm_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """The running Slurm, which this test has to itself: the jobs that it leaves are cancelled."""
    yield slurm_cluster
    clear_jobs(slurm_cluster)
