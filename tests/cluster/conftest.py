"""One SeaweedFS for the suite, and for each test a prefix of its own in a bucket."""

from __future__ import annotations

import re
from collections.abc import Iterator
from uuid import uuid4

import pytest

from launcher.seaweed import Identity, ObjectServer, start_store
from tests.helpers.objects import READER, Proxied, use


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
