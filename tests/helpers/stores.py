"""Stores beside SeaweedFS: small servers with answers of S3 and Azure that it does not give, and environments."""

from __future__ import annotations

import os
import re
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from tests.helpers.proxy import FaultProxy
from tools.local_services.s3 import Identity, ObjectServer

BUCKET = "regen"
_OF_HEAD = ("AccessDenied", "ExpiredToken")  # a HEAD is refused by these alone
_IDENTIFIER = re.compile(r"[^\W\d]\w*")  # of C#: what Azure takes as a name of metadata


@dataclass
class FakeStore:
    """Objects of a server, bytes by key. `refused` answers a GET of a key by (status, code), `region` asks for another
    one in every answer, `page` is how many keys a listing gives at once, `tags` gives ETags of objects. `requests` were
    made."""

    objects: dict[str, bytes] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    region: str = ""
    page: int = 1000
    requests: list[str] = field(default_factory=list)
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    lost_answers: int = 0
    tags: bool = True
    endpoint: str = ""

    def environment(self) -> dict[str, str]:
        """The variables that make clients talk to it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1",
            "AZURE_STORAGE_ENDPOINT": self.endpoint, "AZURE_STORAGE_ACCOUNT_NAME": "account",
            "AZURE_STORAGE_ACCOUNT_KEY": "a2V5",
        }  # fmt: skip


@contextmanager
def fake_store() -> Iterator[FakeStore]:
    """A server for the length of a `with` block."""
    store = FakeStore()
    handler = type("Handler", (_Handler,), {"store": store})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    store.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: FakeStore

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        key = unquote(address.path).removeprefix(f"/{BUCKET}").removeprefix("/")
        self.store.requests.append(f"{self.command} {self.path}")
        if self.store.region:
            code = "AuthorizationHeaderMalformed"
            region = self.store.region
            self._error(400, code, f"the region 'us-east-1' is wrong; expecting '{region}'", region=region)
        elif "list-type=2" in address.query:
            self._list({name: values[0] for name, values in parse_qs(address.query).items()})
        elif key in self.store.refused and (self.command == "GET" or self.store.refused[key][1] in _OF_HEAD):
            self._error(*self.store.refused[key])
        elif key not in self.store.objects:
            self._error(404, "NoSuchKey")
        else:
            self._send_object(key)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        """Azure's Put Blob: metadata names are C# identifiers, `If-None-Match: *` writes new blobs only."""
        data = self.rfile.read(int(self.headers.get("content-length", 0)))
        key = unquote(urlsplit(self.path).path).partition(f"/{BUCKET}/")[2]
        named = {n[len("x-ms-meta-") :]: v for n, v in self.headers.items() if n.lower().startswith("x-ms-meta-")}
        if any(not _IDENTIFIER.fullmatch(name) for name in named):
            self._error(400, "InvalidMetadata", f"not identifiers: {', '.join(named)}")
        elif self.headers.get("if-none-match") == "*" and key in self.store.objects:
            self._error(409, "BlobAlreadyExists")
        else:
            self.store.objects[key], self.store.metadata[key] = data, named
            if self.store.lost_answers:
                self.store.lost_answers -= 1
                self.close_connection = True
                return
            self._send(201, b"", {"ETag": f'"{_tag(data)}"'})

    def _send_object(self, key: str) -> None:
        data, status, more = (
            self.store.objects[key],
            200,
            {"ETag": f'"{_tag(self.store.objects[key])}"', "Last-Modified": _DATE},
        )
        if not self.store.tags:
            del more["ETag"]
        if asked := re.match(r"bytes=(\d+)-(\d+)", self.headers.get("range") or ""):
            start, stop = int(asked[1]), min(int(asked[2]) + 1, len(data))
            more["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data, status = data[start:stop], 206
        more |= {f"x-ms-meta-{name}": value for name, value in self.store.metadata.get(key, {}).items()}
        self._send(status, data, more)

    def _list(self, query: dict[str, str]) -> None:
        prefix, after = query.get("prefix", ""), query.get("continuation-token") or query.get("start-after", "")
        keys = [key for key in sorted(self.store.objects) if key.startswith(prefix) and key > after]
        shown, quoted = keys[: self.store.page], query.get("encoding-type") == "url"
        rows = "".join(
            f"<Contents><Key>{quote(key) if quoted else escape(key)}</Key><Size>{len(self.store.objects[key])}</Size>"
            f"<ETag>&quot;{_tag(self.store.objects[key])}&quot;</ETag><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
            for key in shown
        )
        more = len(keys) > len(shown)
        token = f"<NextContinuationToken>{escape(shown[-1])}</NextContinuationToken>" if more else ""
        encoding = "<EncodingType>url</EncodingType>" if quoted else ""
        self._send(
            200,
            f'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{encoding}'
            f"<KeyCount>{len(shown)}</KeyCount><IsTruncated>{str(more).lower()}</IsTruncated>{token}{rows}"
            "</ListBucketResult>".encode(),
        )

    def _error(self, status: int, code: str, message: str = "", region: str = "") -> None:
        more = f"<Region>{region}</Region>" if region else ""
        self._send(status, f"<Error><Code>{code}</Code><Message>{escape(message)}</Message>{more}</Error>".encode())

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


_DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


def _tag(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


# Object stores for tests: environments of clients, and buckets seen through the fault proxy.


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
