"""Object stores for tests: environments of clients, and buckets seen through the fault proxy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.helpers.proxy import FaultProxy
from tools.local_services.s3 import Identity, ObjectServer

READER = Identity("reader", actions=("Read", "List"))
_PREFIXES = ("AWS_", "GOOGLE_", "AZURE_")


def use(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """Let this process and its children have exactly these variables of storage services."""
    for name in [name for name in os.environ if name.startswith(_PREFIXES)]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@dataclass
class Proxied:
    """Puts a fault proxy between this process (and its children) and a server."""

    server: ObjectServer
    monkeypatch: pytest.MonkeyPatch

    @contextmanager
    def __call__(self) -> Iterator[FaultProxy]:
        """While the block lasts, stores that are opened go through the proxy that it gives."""
        with FaultProxy(self.server.ports["s3"]) as proxy, self.monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            yield proxy
