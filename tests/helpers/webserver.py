"""A web server on loopback over a folder: ranges, HEAD, redirects, refusals, cut bodies; and the hub's two addresses
for reading a dataset, so that HF_ENDPOINT may point at it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


@dataclass
class WebServer:
    """Settings and the log of a running server.

    Args:
        folder: served under `/`, and as a dataset `me/videos` of the hub under `/datasets/me/videos/resolve/main/`.
        elsewhere: port of a second server to which the hub's addresses redirect, as the hub does.
        seen: (method, path, range, authorization) of every request.
    """

    folder: Path
    port: int = 0
    ranges: bool = True
    heads: bool = True
    cut: str = ""  # of paths that contain this the second half never comes
    cuts: int = -1  # so many times; -1 always
    refuse: dict[str, int] = field(default_factory=dict)  # status by a part of the path
    elsewhere: int = 0
    seen: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    settings: WebServer

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        server, path = self.settings, unquote(self.path.partition("?")[0])
        server.seen.append((self.command, path, self.headers.get("Range"), self.headers.get("Authorization")))
        status = next((status for part, status in server.refuse.items() if part in path), 0)
        if not server.heads and not body:
            status = 405
        if status:
            return self._send(status)
        if path.startswith("/loop"):
            return self._send(302, location=self.path)
        if path.startswith("/moved/"):
            return self._send(302, location=f"{server.url}/{self.path.removeprefix('/moved/')}")
        if path.startswith("/api/datasets/me/videos/tree/main"):
            return self._tree(path.removeprefix("/api/datasets/me/videos/tree/main").strip("/"))
        if path.startswith("/datasets/me/videos/resolve/main/"):
            name = self.path.removeprefix("/datasets/me/videos/resolve/main/")
            if server.elsewhere:
                return self._send(302, location=f"http://localhost:{server.elsewhere}/{name}")
            path = f"/{unquote(name)}"
        file = server.folder / path.lstrip("/")
        return self._file(file.read_bytes(), path, body) if file.is_file() else self._send(404)

    def _tree(self, below: str) -> None:
        top = self.settings.folder / below
        if not top.is_dir():
            return self._send(404, headers={"X-Error-Code": "EntryNotFound"})
        files = [
            {"type": "file", "path": str(one.relative_to(self.settings.folder)), "size": one.stat().st_size, "oid": "a"}
            for one in sorted(top.rglob("*"))
            if one.is_file()
        ]
        return self._send(200, json.dumps(files).encode(), headers={"Content-Type": "application/json"})

    def _file(self, data: bytes, path: str, body: bool) -> None:
        server, headers, status = self.settings, {"ETag": f'"{len(data)}-{hash(data)}"'}, 200
        asked = self.headers.get("Range")
        if asked and server.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or len(data)), len(data) - 1) + 1
            if start >= len(data):
                return self._send(416)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data, status = data[start:stop], 206
        if not body:
            return self._send(status, headers=headers, length=len(data))
        if server.cut and server.cut in path and server.cuts != 0:
            server.cuts -= 1
            return self._send(status, data[: len(data) // 2], headers, length=len(data))
        return self._send(status, data, headers)

    def _send(
        self,
        status: int,
        data: bytes = b"",
        headers: dict[str, str] | None = None,
        length: int | None = None,
        location: str | None = None,
    ) -> None:
        self.send_response(status)
        given = {"Content-Length": str(len(data) if length is None else length)} | (headers or {})
        for name, value in (given | ({"Location": location} if location else {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        if length is not None and data:
            self.close_connection = True


@contextmanager
def serving(folder: Path) -> Iterator[WebServer]:
    """A server over a folder while the block lasts."""
    settings = WebServer(folder)
    handler = type("Handler", (_Handler,), {"settings": settings})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    settings.port = server.server_port
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield settings
    finally:
        server.shutdown()
        server.server_close()
