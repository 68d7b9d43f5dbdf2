"""Objects of a bucket. obstore goes on with the rest of a body that was cut, and repeats what is safe to repeat.

Measured with a proxy that makes faults: obstore (0.12) does not repeat a list whose body is cut, a deletion or a
conditional write whose answer is lost, or the beginning of a multipart upload whose answer is cut. Those are repeated
here, under the same deadline.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import os
import re
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote, urlsplit
from xml.etree import ElementTree

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from regen_dist.config.urls import Location
from regen_dist.data.storage.connection import (
    ENDPOINTS,
    StoreLimits,
    checked_name,
    explain_store_error,
    is_on,
    key_problem,
    open_backend,
    profile_provider,
)
from regen_dist.errors import BackendError, BucketMissing, DataError, ObjectCut, ObjectMissing, StoreUnavailable

if TYPE_CHECKING:
    from obstore.store import ObjectStore


# Listing an S3 bucket by requests of our own, for prefixes that obstore cannot list.
#
# An S3 key is any text; obstore refuses a whole page of keys when one has an empty part (`v//b.mp4`), a part that is
# `.` or `..`, or a control character. Here every key comes back, and whoever asks sorts out those that cannot be read.
# https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html, .../sig-v4-header-based-auth.html


_REFUSED = re.compile(r'(?:Error parsing )?Path "(.*?)"(?: contained|: Encountered)', re.DOTALL)
_EMPTY = hashlib.sha256(b"").hexdigest()


class Key(NamedTuple):
    """An object of a listing: its whole key, size in bytes, tag."""

    key: str
    size: int
    etag: str | None


class _Keys(NamedTuple):
    access: str
    secret: str
    token: str | None


def refused_key(error: Exception) -> str | None:
    """The key that obstore would not take, by its message; None where it names none."""
    found = _REFUSED.search(str(error))
    return found[1] if found and key_problem(found[1]) else None


def list_keys(
    place: Location,
    limits: StoreLimits,
    prefix: str,
    request: Callable[[Callable[[], ElementTree.Element]], ElementTree.Element],
) -> Iterator[Key]:
    """Every key of a bucket that starts with `prefix`, in order.

    Args:
        request: runs the request of each page, so that one that fails is repeated alone: there may be thousands.

    Raises:
        AccessDenied: there are no keys to sign with.
        OSError: the answer was none of a listing; its text is like obstore's, for `explained`.
    """
    keys, base, token = _credentials(place), _base(place), ""
    while True:
        query = {"list-type": "2", "encoding-type": "url", "prefix": prefix}
        page = query | ({"continuation-token": token} if token else {})
        root = request(functools.partial(_page, base, page, keys, limits))
        quoted = _text(root, "EncodingType") == "url"
        for one in root.iterfind("{*}Contents"):
            key = _text(one, "Key")
            yield Key(unquote(key.replace("+", " ")) if quoted else key, int(_text(one, "Size")), _text(one, "ETag"))
        token = _text(root, "NextContinuationToken")
        if _text(root, "IsTruncated") != "true" or not token:
            return


def _page(base: str, query: dict[str, str], keys: _Keys | None, limits: StoreLimits) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(_get(base, query, keys, limits))
    except ElementTree.ParseError as error:
        raise OSError(f"kind: Decode, {error}") from None


def _text(element: ElementTree.Element, name: str) -> str:
    return element.findtext(f"{{*}}{name}") or ""


def _base(place: Location) -> str:
    """The bucket's address, as obstore forms it."""
    endpoint = next((value for name in ENDPOINTS if name.startswith("AWS_") and (value := os.environ.get(name))), None)
    if endpoint is None:
        return f"https://s3.{_region()}.amazonaws.com/{place.bucket}"
    if is_on("AWS_VIRTUAL_HOSTED_STYLE_REQUEST"):
        return endpoint.rstrip("/")
    return f"{endpoint.rstrip('/')}/{place.bucket}"


def _region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def _credentials(place: Location) -> _Keys | None:
    """None where requests are not to be signed."""
    if is_on("AWS_SKIP_SIGNATURE"):
        return None
    access, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    if access and secret:
        return _Keys(access, secret, os.environ.get("AWS_SESSION_TOKEN"))
    provider: Any = profile_provider(place)
    found = provider()
    return _Keys(found["access_key_id"], found["secret_access_key"], found.get("token"))


def _get(base: str, query: dict[str, str], keys: _Keys | None, limits: StoreLimits) -> bytes:
    words = "&".join(f"{quote(name, safe='-._~')}={quote(value, safe='-._~')}" for name, value in sorted(query.items()))
    headers = {} if keys is None else _signed(base, words, keys)
    request = urllib.request.Request(f"{base}/?{words}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=limits.stall_s) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        body = error.read(4096).decode(errors="replace")
        raise OSError(f"status code: {error.code} {body}") from None
    except HTTPException as error:  # a body that was cut
        raise OSError(f"kind: Decode, {type(error).__name__}") from None


def _signed(base: str, words: str, keys: _Keys) -> dict[str, str]:
    """Headers of a GET request with Signature Version 4."""
    parts, now = urlsplit(base), time.gmtime()
    stamp, day = time.strftime("%Y%m%dT%H%M%SZ", now), time.strftime("%Y%m%d", now)
    headers = {"host": parts.netloc, "x-amz-content-sha256": _EMPTY, "x-amz-date": stamp}
    headers |= {"x-amz-security-token": keys.token} if keys.token else {}
    names = ";".join(sorted(headers))
    lines = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
    request = f"GET\n{parts.path}/\n{words}\n{lines}\n{names}\n{_EMPTY}"
    scope = f"{day}/{_region()}/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = f"AWS4{keys.secret}".encode()
    for part in (*scope.split("/"), text):
        digest = hmac.new(key, part.encode(), hashlib.sha256)
        key = digest.digest()
    return headers | {
        "Authorization": f"AWS4-HMAC-SHA256 Credential={keys.access}/{scope}, SignedHeaders={names}, "
        f"Signature={digest.hexdigest()}"
    }


# --- merging byte ranges into requests ---
Range = tuple[int, int]  # offset, size in bytes


class ByteSpan(NamedTuple):
    """Byte span [start, stop) of one request, which covers the requested ranges number `members`."""

    start: int
    stop: int
    members: tuple[int, ...]


def join_ranges(ranges: Sequence[Range], join_bytes: int) -> list[ByteSpan]:
    """Merge ranges into spans that cover all ranges (empty ones aside), in order of offset; ranges with a gap of at
    most `join_bytes` between them share a span. Spans never touch."""
    spans: list[ByteSpan] = []
    for number in sorted(range(len(ranges)), key=lambda number: ranges[number]):
        offset, size = ranges[number]
        if size == 0:
            continue
        if spans and offset <= spans[-1].stop + join_bytes:
            last = spans[-1]
            spans[-1] = ByteSpan(last.start, max(last.stop, offset + size), (*last.members, number))
        else:
            spans.append(ByteSpan(offset, offset + size, (number,)))
    return spans


def split_span(ranges: Sequence[Range], spans: Sequence[ByteSpan], fetched: Sequence[memoryview]) -> list[bytes]:
    """The ranges' own bytes out of what was fetched for each span; too few where a span came back too short."""
    found = [b""] * len(ranges)
    for span, view in zip(spans, fetched, strict=True):
        for number in span.members:
            offset, size = ranges[number]
            found[number] = bytes(view[offset - span.start :][:size])
    return found


def exact_bytes(data: bytes, offset: int, size: int, where: str) -> bytes:
    """`data` when it has `size` bytes; ObjectCut otherwise. `where` is the object's URL."""
    if len(data) == size:
        return data
    raise ObjectCut.at(where, offset, size, len(data))


Result = TypeVar("Result")
_PART_BYTES = 8 << 20  # of a multipart upload; S3 asks for at least 5 MiB
_MOST_PARTS = 9_000  # S3 takes 10,000
_NONCE = "regenwrite"  # attribute of a conditional write: identifies the writer when its answer was lost.

# Letters alone: Azure takes a C# identifier, without a hyphen; services send it back in small letters.
_runtime_process: int | None = None  # which process has obstore's threads


class ObjectInfo(NamedTuple):
    """An object in a listing: size in bytes, and a tag that changes with its bytes (None where there is none)."""

    size: int
    etag: str | None


class Listing(NamedTuple):
    """Objects by name; and those that no program can read by their keys, with why (`key_problem`)."""

    found: dict[str, ObjectInfo]
    unreadable: dict[str, str]


class ObjectStoreFolder:
    """Objects under a bucket's prefix. Bound to the process that created it."""

    def __init__(self, place: Location, limits: StoreLimits) -> None:
        self._place, self._limits = place, limits
        self._opened: dict[bool, ObjectStore] = {}

    def get(self, name: str) -> bytes:
        import obstore

        return self._call("read", name, lambda: bytes(obstore.get(self._store(), name).bytes()))

    def get_ranges(self, name: str, ranges: Sequence[Range], join_bytes: int) -> list[bytes]:
        """Read these ranges, merging neighbours into one request; too few bytes where the object is cut."""
        import obstore

        spans = join_ranges(ranges, join_bytes)
        if len(spans) == 1:
            start, stop, _ = spans[0]
            one = self._call("read", name, lambda: obstore.get_range(self._store(), name, start=start, end=stop))
            return split_span(ranges, spans, [memoryview(one)])
        if not spans:
            return [b""] * len(ranges)
        starts, ends = [span.start for span in spans], [span.stop for span in spans]
        many = self._call(  # obstore's own joining panics where an object is cut
            "read", name, lambda: obstore.get_ranges(self._store(), name, starts=starts, ends=ends, coalesce=0)
        )
        return split_span(ranges, spans, [memoryview(part) for part in many])

    def get_pinned(self, name: str, offset: int, size: int, etag: str | None) -> bytes:
        """Read exactly these bytes of the version `etag`; raise DataError if the object was replaced. Where a store
        gives no tags (None), any version is read."""
        import obstore

        options: Any = {"range": (offset, offset + size)} | ({} if etag is None else {"if_match": etag})
        data = self._call("read", name, lambda: bytes(obstore.get(self._store(), name, options=options).bytes()))
        return exact_bytes(data, offset, size, f"{self._place.url}/{name}")

    def pieces(self, name: str, piece_bytes: int) -> Iterator[bytes]:
        """Read an object piece by piece, each with a deadline of its own; DataError when it is replaced meanwhile."""
        size, etag = self.head(name)
        for offset in range(0, size, piece_bytes):
            yield self.get_pinned(name, offset, min(piece_bytes, size - offset), etag)

    def head(self, name: str) -> ObjectInfo:
        import obstore
        from obstore.exceptions import BaseError, PermissionDeniedError

        def head() -> ObjectInfo:
            try:
                meta = obstore.head(self._store(), name)
            except BaseError as error:
                # 403, or 400 (expired credentials, another region): without a body, and only that of a GET says why.
                if isinstance(error, PermissionDeniedError) or "status code: 400" in str(error):
                    obstore.get_range(self._store(), name, start=0, end=1)
                raise
            return ObjectInfo(int(meta["size"]), meta["e_tag"])

        return self._call("read", name, head)

    def list(self, prefix: str) -> Listing:
        """List the objects whose names start with `prefix`. Only the folder of the prefix is listed."""
        import obstore
        from obstore.exceptions import InvalidPathError

        folder = prefix.rpartition("/")[0] or None  # obstore's prefixes are whole folders

        def found() -> Listing:
            pages = obstore.list(self._store(), folder, chunk_size=1000)
            every = (meta for page in pages for meta in page)
            try:
                return Listing(
                    {
                        meta["path"]: ObjectInfo(int(meta["size"]), meta["e_tag"])
                        for meta in every
                        if meta["path"] and meta["path"].startswith(prefix)  # "": the folder's own mark, see below
                    },
                    {},
                )
            except InvalidPathError as error:
                return self._list_all(prefix, refused_key(error))

        return self._call("list", prefix or ".", found)

    def _list_all(self, prefix: str, refused: str | None) -> Listing:
        """List like `list` when a key is invalid for obstore."""
        if self._place.scheme != "s3":
            raise DataError(
                f"{self._place.url}: cannot be listed: {key_problem(refused or '//')}: {refused!r}; rename or remove "
                "that object, or name the folders beside it one by one"
            )
        top = f"{self._place.prefix}/" if self._place.prefix else ""
        found, unreadable = dict[str, ObjectInfo](), dict[str, str]()
        request = functools.partial(self._call, "list", prefix or ".")
        for key, size, etag in list_keys(self._place, self._limits, f"{top}{prefix}", request):
            if key == top:  # a mark that makes an empty folder visible, as the consoles of services write it
                continue
            if problem := key_problem(key):
                unreadable[key.removeprefix(top)] = f"{problem}: rename it"
            else:
                found[key.removeprefix(top).removesuffix("/")] = ObjectInfo(size, etag)
        return Listing(found, unreadable)

    def put(self, name: str, data: bytes | Path) -> None:
        """Write an object, in parts where it is large; it is there when all parts are."""
        import obstore

        size = data.stat().st_size if isinstance(data, Path) else len(data)
        part = max(_PART_BYTES, -(-size // _MOST_PARTS))
        self._call(
            "write",
            name,
            lambda: obstore.put(self._store(writing=True), name, data, chunk_size=part, max_concurrency=4),
            pieces=1 + size // (4 * _PART_BYTES),
        )

    def put_file(self, name: str, path: Path) -> None:
        self.put(name, path)

    def put_new(self, name: str, data: bytes) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        nonce = secrets.token_hex(16)

        def put() -> bool:
            try:
                obstore.put(self._store(writing=True), name, data, mode="create", attributes={_NONCE: nonce})
            except AlreadyExistsError:  # perhaps by an earlier try of ours, whose answer was lost
                return bool(self._attribute(name, _NONCE) == nonce)
            return True

        return self._call("write", name, put)

    def delete(self, name: str) -> None:
        import obstore

        try:
            self._call("delete", name, lambda: obstore.delete(self._store(writing=True), name))
        except BucketMissing:
            raise
        except ObjectMissing:
            pass

    def _attribute(self, name: str, key: str) -> str | None:
        import obstore

        try:
            attributes = obstore.get(self._store(), name, options={"head": True}).attributes
        except FileNotFoundError:  # somebody has removed it since
            return None
        return attributes.get(key)

    def _store(self, *, writing: bool = False) -> ObjectStore:
        global _runtime_process
        if _runtime_process not in (None, os.getpid()):
            raise BackendError(
                f"{self._place.url}: this process is a fork of one that had used a bucket, and obstore's threads do "
                "not survive a fork; start it by 'spawn' or 'forkserver'"
            )
        _runtime_process = os.getpid()
        if writing not in self._opened:
            self._opened[writing] = open_backend(self._place, self._limits, writing=writing)
        return self._opened[writing]

    def _call(self, verb: str, name: str, operation: Callable[[], Result], pieces: int = 1) -> Result:
        """Run an operation with our errors; again, with growing pauses, while it may help and the deadline allows."""
        from obstore.exceptions import BaseError

        begun = time.monotonic()
        if verb != "list":
            checked_name(name, self._place.url)

        def once() -> Result:
            try:
                return operation()
            except (BaseError, OSError, ValueError) as error:
                if isinstance(error, OSError) and error.filename is not None:  # of the local file that is sent
                    raise
                waited_s = time.monotonic() - begun
                # Not chained: obstore's text may quote what the server said about keys.
                raise explain_store_error(error, self._place, name, verb, waited_s) from None

        try:
            return once()
        except StoreUnavailable:
            left_s = self._limits.deadline_s * pieces - (time.monotonic() - begun)
            if left_s <= 0:
                raise
        again = Retrying(
            retry=retry_if_exception_type(StoreUnavailable),
            stop=stop_after_delay(left_s),
            wait=wait_random_exponential(multiplier=0.1, max=min(3.0, left_s / 4)),
            reraise=True,
        )
        return again(once)
