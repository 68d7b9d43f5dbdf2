"""Listing an S3 bucket by requests of our own, for prefixes that obstore cannot list.

An S3 key is any text; obstore refuses a whole page of keys when one has an empty part (`v//b.mp4`), a part that is `.`
or `..`, or a control character. Here every key comes back, and whoever asks sorts out those that cannot be read.
https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html, .../sig-v4-header-based-auth.html
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit
from xml.etree import ElementTree

from regen_dist.config.urls import Location
from regen_dist.data.storage.connection import ENDPOINTS, StoreLimits, key_problem, profile_provider

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


def list_keys(place: Location, limits: StoreLimits, prefix: str) -> Iterator[Key]:
    """Every key of a bucket that starts with `prefix`, in order.

    Raises:
        AccessDenied: there are no keys to sign with.
        OSError: the answer was none of a listing; its text is like obstore's, for `explained`.
    """
    keys, base, token = _credentials(place), _base(place), ""
    while True:
        query = {"list-type": "2", "encoding-type": "url", "prefix": prefix}
        root = _parsed(_get(base, query | ({"continuation-token": token} if token else {}), keys, limits))
        quoted = _text(root, "EncodingType") == "url"
        for one in root.iterfind("{*}Contents"):
            key = _text(one, "Key")
            yield Key(unquote(key.replace("+", " ")) if quoted else key, int(_text(one, "Size")), _text(one, "ETag"))
        token = _text(root, "NextContinuationToken")
        if _text(root, "IsTruncated") != "true" or not token:
            return


def _parsed(answer: bytes) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(answer)
    except ElementTree.ParseError as error:
        raise OSError(f"kind: Decode, {error}") from None


def _text(element: ElementTree.Element, name: str) -> str:
    return element.findtext(f"{{*}}{name}") or ""


def _base(place: Location) -> str:
    """The bucket's address, as obstore forms it."""
    endpoint = next((value for name in ENDPOINTS if name.startswith("AWS_") and (value := os.environ.get(name))), None)
    if endpoint is None:
        return f"https://s3.{_region()}.amazonaws.com/{place.bucket}"
    if os.environ.get("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "").lower() in ("1", "true", "yes", "on", "y"):
        return endpoint.rstrip("/")
    return f"{endpoint.rstrip('/')}/{place.bucket}"


def _region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def _credentials(place: Location) -> _Keys | None:
    """None where requests are not to be signed."""
    if os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "yes", "on", "y"):
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
        said = error.read(4096).decode(errors="replace")
        raise OSError(f"status code: {error.code} {said}") from None
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
