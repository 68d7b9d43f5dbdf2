"""A proxy that makes faults on purpose: it stands between an HTTP client and a server on loopback.

Requests go on byte for byte, so that signatures stay valid. Answers go back whole, unless a `Fault` matches. A thread
of this process; other processes reach it by its port.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Literal, NamedTuple, Self

Kind = Literal["status", "late", "drop", "reset", "short", "stall", "slow", "wrong"]
_PIECE = 64 << 10
_ABORT = struct.pack("ii", 1, 0)  # SO_LINGER of zero seconds: close() sends a reset
_REASONS = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}


@dataclass
class Fault:
    """What goes wrong, and when.

    Args:
        kind: `status` answers with `status` and asks nobody; `late` waits `seconds` before the request goes on; `drop`
            lets the server do the request and resets the connection instead of answering; `reset` does so in the middle
            of the body; `short` promises the whole body and ends it early; `stall` stops for `seconds` in the middle of
            the body, then goes on where `resume` is set, or ends the connection; `slow` sends `bytes_per_s`; `wrong`
            flips a byte.
        match: text that "METHOD target" of the request contains.
        times: how many requests it strikes; None strikes without end.
        every: strikes each n-th of the matching requests, beginning with the first.
        after: bytes of the body before it strikes; half of the body by default.
    """

    kind: Kind
    match: str = ""
    times: int | None = None
    every: int = 1
    status: int = 503
    after: int | None = None
    seconds: float = 1.0
    resume: bool = False
    bytes_per_s: int = 1 << 20
    matched: int = 0
    struck: int = 0

    def strikes(self, request: Request) -> bool:
        """Whether it strikes this request; counts."""
        if self.match not in f"{request.method} {request.target}":
            return False
        self.matched += 1
        if (self.matched - 1) % self.every or (self.times is not None and self.struck >= self.times):
            return False
        self.struck += 1
        return True


class Request(NamedTuple):
    """One request that came: `range` is its Range header, if any."""

    method: str
    target: str
    range: str


@dataclass
class FaultProxy:
    """Forwards `127.0.0.1:port` to `127.0.0.1:upstream` while its `with` block lasts. Counts what came (`requests`)
    and what it did (`injected`, by kind)."""

    upstream: int
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    injected: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._closing = threading.Event()

    @property
    def endpoint(self) -> str:
        """What a client sets as its endpoint."""
        return f"http://127.0.0.1:{self.port}"

    def add(self, kind: Kind, match: str = "", **settings: object) -> Fault:
        """Make and register a fault (see `Fault` for the settings)."""
        fault = Fault(kind, match, **settings)  # type: ignore[arg-type]
        with self._lock:
            self.faults.append(fault)
        return fault

    def clear(self) -> None:
        """No more faults; the counts begin again."""
        with self._lock:
            self.faults.clear()
            self.requests.clear()
            self.injected.clear()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name="fault-proxy", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closing.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.create_connection(("127.0.0.1", self.upstream))
        for each in (client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._open |= {client, server}
        try:
            with client.makefile("rb") as asking, server.makefile("rb") as answering:
                while self._exchange(client, server, asking, answering):
                    pass
        except OSError:  # either side has gone: that is its right
            pass
        finally:
            with self._lock:
                self._open -= {client, server}
            client.close()
            server.close()

    def _exchange(self, client: socket.socket, server: socket.socket, asking: IO[bytes], answering: IO[bytes]) -> bool:
        """One request and its answer; False when the connection is over."""
        head = _read_head(asking)
        if not head:
            return False
        request, fault = self._received(head)
        if b"100-continue" in head.lower():
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = b"".join(_body(head, asking))
        if fault is not None and fault.kind == "status":
            client.sendall(_answer(fault.status))
            return True
        if fault is not None and fault.kind == "late":
            self._closing.wait(fault.seconds)
            fault = None
        server.sendall((_with_length(head, len(body)) if _header(head, "transfer-encoding") else head) + body)
        answer = _read_head(answering)
        while answer.startswith(b"HTTP/1.1 1"):
            answer = _read_head(answering)
        if not answer:
            return False
        if fault is not None and fault.kind == "drop":
            b"".join(_body(answer, answering, request.method))
            return _abort(client)
        return self._pass_back(client, request, answer, answering, fault)

    def _received(self, head: bytes) -> tuple[Request, Fault | None]:
        method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
        request = Request(method, target, _header(head, "range"))
        with self._lock:
            self.requests.append(request)
            fault = next((fault for fault in self.faults if fault.strikes(request)), None)
            if fault is not None:
                self.injected[fault.kind] += 1
        return request, fault

    def _pass_back(
        self, client: socket.socket, request: Request, head: bytes, answering: IO[bytes], fault: Fault | None
    ) -> bool:
        pieces = _body(head, answering, request.method)
        if fault is None and not _header(head, "transfer-encoding"):
            client.sendall(head)
            for piece in pieces:
                client.sendall(piece)
            return True
        body = b"".join(pieces)
        client.sendall(head if not _header(head, "transfer-encoding") else _with_length(head, len(body)))
        if fault is None or request.method == "HEAD":
            client.sendall(body)
            return True
        return self._spoil(client, body, fault)

    def _spoil(self, client: socket.socket, body: bytes, fault: Fault) -> bool:
        """Send a body with its fault; False when the connection is over."""
        cut = min(len(body), len(body) // 2 if fault.after is None else fault.after)
        if fault.kind == "slow":
            return self._send_slowly(client, body, fault.bytes_per_s)
        client.sendall(body[:cut])
        if fault.kind == "wrong":
            client.sendall(bytes([body[cut] ^ 0xFF]) + body[cut + 1 :])
            return True
        if fault.kind == "stall":
            self._closing.wait(fault.seconds)
            if fault.resume:
                client.sendall(body[cut:])
            return fault.resume
        if fault.kind == "reset":
            time.sleep(0.02)  # the receiver throws away what it has not read when the reset comes
            return _abort(client)
        return False  # short: an orderly end

    def _send_slowly(self, client: socket.socket, body: bytes, bytes_per_s: int) -> bool:
        step = max(1, bytes_per_s // 20)
        for start in range(0, len(body), step):
            client.sendall(body[start : start + step])
            if self._closing.wait(0.05):
                return False
        return True


def _read_head(stream: IO[bytes]) -> bytes:
    """Start line and headers with the empty line; b"" at the end of the stream."""
    head = b""
    while line := stream.readline():
        head += line
        if line == b"\r\n":
            return head
    return b""


def _header(head: bytes, name: str) -> str:
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.decode("latin-1").partition(":")
        if key.strip().lower() == name:
            return value.strip()
    return ""


def _body(head: bytes, stream: IO[bytes], method: str = "") -> Iterator[bytes]:
    """The body that belongs to a head, without chunk marks. `method`: of the request, where the head is an answer."""
    if method == "HEAD" or head.startswith((b"HTTP/1.1 204", b"HTTP/1.1 304")):
        return
    if "chunked" in _header(head, "transfer-encoding").lower():
        while size := int(stream.readline().split(b";")[0], 16):
            yield stream.read(size)
            stream.readline()
        _read_head(stream)  # trailers
        return
    left = int(_header(head, "content-length") or 0)
    while left > 0 and (piece := stream.read1(min(left, _PIECE))):  # type: ignore[attr-defined]
        left -= len(piece)
        yield piece


def _with_length(head: bytes, size: int) -> bytes:
    lines = [line for line in head.split(b"\r\n") if line and not line.lower().startswith(b"transfer-encoding")]
    return b"\r\n".join([*lines, f"Content-Length: {size}".encode(), b"", b""])


def _answer(status: int) -> bytes:
    code = _REASONS.get(status, "Error")
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>made by the fault proxy</Message></Error>'
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return (head + body).encode()


def _abort(client: socket.socket) -> bool:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
    client.close()
    return False
