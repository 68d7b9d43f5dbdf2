"""Reading a tar once, from its first byte to its last, out of an object store.

Python's tarfile takes a damaged header in the middle for the end of the archive and says nothing; so does everything
that is built on it. Here a tar that does not come to its proper end is an error that names the byte.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from regen_dist.data.storage.store import Store
from regen_dist.errors import DataError

BLOCK = 512
PIECE_BYTES = 8 << 20
_ZEROS = bytes(BLOCK)
_EVERYTHING = 1 << 62
_LARGEST_EXTENDED = 1 << 20  # bytes of a long name or of PAX records: a larger number is damage
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"(\xb5/\xfd": "zstd"}
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_GNU_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
COPY_AGAIN = "copy the tar again from where it came"


class BrokenTar(DataError):
    """A tar that cannot be read to its end; the message names the byte and the remedy."""


class Pieces:
    """The bytes of an object from front to back, each read once and hashed. Holds two pieces: the next one is on its
    way while one is used. A context manager."""

    def __init__(self, store: Store, name: str) -> None:
        self.position = 0
        self._stream, self._digest, self._piece = store.stream(name, PIECE_BYTES), hashlib.sha256(), memoryview(b"")
        self._thread = ThreadPoolExecutor(1)
        self._next: Future[bytes | None] = self._fetch()

    def __enter__(self) -> Pieces:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self, count: int) -> bytes:
        """The next `count` bytes; fewer where the object ends."""
        return b"".join(self._consume(count))

    def skip(self, count: int) -> int:
        """Pass over the next bytes; returns how many there were."""
        return sum(len(piece) for piece in self._consume(count))

    def rest(self) -> Iterator[memoryview]:
        """Read the rest, piece by piece."""
        return self._consume(_EVERYTHING)

    def sha256(self) -> str:
        """SHA-256 of the whole object in hex; reads what is left."""
        self.skip(_EVERYTHING)
        return self._digest.hexdigest()

    def _consume(self, count: int) -> Iterator[memoryview]:
        while count and (self._piece or self._load()):
            part, self._piece = self._piece[:count], self._piece[count:]
            self.position += len(part)
            count -= len(part)
            yield part

    def _load(self) -> bool:
        data = self._next.result()
        if data is None:
            return False
        self._next = self._fetch()
        self._digest.update(data)
        self._piece = memoryview(data)
        return True

    def _fetch(self) -> Future[bytes | None]:
        return self._thread.submit(next, self._stream, None)


def scan_members(
    pieces: Pieces,
    wanted: Callable[[tarfile.TarInfo], bool],
    pass_over: Callable[[tarfile.TarInfo], None] = lambda info: None,
) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Every regular file of a tar, in order, with its place (`offset_data`, `size`), and its bytes where they are
    `wanted`.

    GNU long names and PAX headers are followed. Links, folders and sparse files are passed over: `pass_over` is called
    with each. The scan ends at the archive's end; what may lie behind it is left in `pieces`.

    Raises:
        BrokenTar: compressed, cut, or a header is damaged.
    """
    global_headers: dict[str, str] = {}
    member_headers: dict[str, str] = {}
    while (info := _header(pieces)) is not None:
        if info.type in _GNU_LONG:
            name = _extended(pieces, info).partition(b"\0")[0]
            member_headers |= {"path": _text(name)} if info.type == tarfile.GNUTYPE_LONGNAME else {}
        elif info.type in _PAX:
            member_headers |= _records(_extended(pieces, info), info)
        elif info.type == tarfile.XGLTYPE:
            global_headers |= _records(_extended(pieces, info), info)
        else:
            _apply(info, global_headers | member_headers)
            member_headers = {}
            info.offset_data = pieces.position
            plain = info.isreg() and info.type != tarfile.GNUTYPE_SPARSE
            data = _payload(pieces, info, keep=plain and wanted(info)) if _has_payload(info) else None
            if plain:
                yield info, data
            else:
                pass_over(info)


def _header(pieces: Pieces) -> tarfile.TarInfo | None:
    """The next header block; None at the block of zeros that ends an archive."""
    start = pieces.position
    block = pieces.take(BLOCK)
    if start == 0:
        _refuse_compressed(block)
    if block == _ZEROS:
        return None
    if not block:
        raise BrokenTar(
            f"it ends at byte {start} without the blocks of zeros that close a tar: cut between two members; "
            f"{COPY_AGAIN}, or pack it again if it was never closed"
        )
    if len(block) < BLOCK:
        raise BrokenTar(f"it ends at byte {start + len(block)}, inside the header at byte {start}; {COPY_AGAIN}")
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise _damaged(start, str(error)) from error
    info.offset = start
    if info.size < 0:
        raise _damaged(start, f"size {info.size}")
    if info.type == tarfile.GNUTYPE_SPARSE:
        _skip_sparse_map(pieces, block)
    return info


def _has_payload(info: tarfile.TarInfo) -> bool:
    """Links, folders and devices have none, whatever their size says; an unknown type has."""
    return info.isreg() or info.type not in tarfile.SUPPORTED_TYPES


def _payload(pieces: Pieces, info: tarfile.TarInfo, *, keep: bool) -> bytes | None:
    """The bytes of a member, with the filling after it consumed; None when they are not kept."""
    start, filled = pieces.position, -(-info.size // BLOCK) * BLOCK
    data = pieces.take(info.size) if keep else None
    read = (pieces.skip(info.size) if data is None else len(data)) + pieces.skip(filled - info.size)
    if read < filled:
        raise BrokenTar(
            f"it ends at byte {pieces.position}, inside {printable(info.name)!r}, whose {info.size} bytes begin at "
            f"byte {start}; {COPY_AGAIN}"
        )
    return data


def _extended(pieces: Pieces, info: tarfile.TarInfo) -> bytes:
    """The payload of a header that speaks of the next member."""
    if info.size > _LARGEST_EXTENDED:
        raise _damaged(info.offset, f"{info.size} bytes of names")
    return _payload(pieces, info, keep=True) or b""


def _records(payload: bytes, info: tarfile.TarInfo) -> dict[str, str]:
    """PAX records: "LENGTH KEY=VALUE\\n", the length counting itself."""
    records = {}
    payload = payload.rstrip(b"\0")
    while payload:
        digits, _, rest = payload.partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = rest[: length - len(digits) - 2].partition(b"=")
        if not equals or not len(digits) + 3 < length <= len(payload):
            raise _damaged(info.offset, "PAX records")
        records[_text(key)] = _text(value)
        payload = payload[length:]
    return records


def _apply(info: tarfile.TarInfo, member_headers: dict[str, str]) -> None:
    """Apply name and size from extended headers, for values that do not fit into the plain one."""
    info.name = member_headers.get("path") or info.name
    size = member_headers.get("size") or str(info.size)
    if not size.isdigit():
        raise _damaged(info.offset, f"size {size!r}")
    info.size = int(size)
    if any(key.startswith("GNU.sparse.") for key in member_headers):
        info.type = tarfile.GNUTYPE_SPARSE


def _skip_sparse_map(pieces: Pieces, block: bytes) -> None:
    """Pass over the blocks that continue the map of holes of an old GNU sparse file."""
    more = block[482]
    while more:
        following = pieces.take(BLOCK)
        more = following[504] if len(following) == BLOCK else 0


def _refuse_compressed(block: bytes) -> None:
    for magic, name in _COMPRESSED.items():
        if block.startswith(magic):
            raise BrokenTar(
                f"byte 0 begins a {name} stream: samples are read by byte ranges, which a compressed tar does not "
                "have; unpack it (videos are compressed already) and index that"
            )


def _damaged(position: int, what: str) -> BrokenTar:
    return BrokenTar(f"the header at byte {position} is damaged ({what}); {COPY_AGAIN}")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def printable(text: str) -> str:
    """A name from a tar for messages and tables: bytes that are not UTF-8 as escapes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
