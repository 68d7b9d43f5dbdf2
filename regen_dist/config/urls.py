"""Parsing of the URLs of stores, all in one place, so that nothing that a shell could run passes.

Messages never quote possible secrets: user information and queries.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

BUCKET_SCHEMES = ("s3", "gs", "az")
WEB_SCHEMES = ("https", "http", "hf")  # read only
_SECRET = re.compile(r"[?&#](x-amz-|x-goog-|awsaccesskeyid|googleaccessid|signature|sig|token|secret)[\w-]*=", re.I)
ALLOWED = "a plain path, file://, s3://, gs:// or az://"
_READ = f"{ALLOWED}; only to read: https:// or hf://"


@dataclass(frozen=True)
class Location:
    """Location that a URL names. `url` is its canonical form; `folder` is set for local ones, `bucket` for others."""

    url: str
    scheme: str
    folder: Path | None = None
    bucket: str | None = None

    @property
    def read_only(self) -> bool:
        """Return true if the location cannot be written."""
        return self.scheme in WEB_SCHEMES

    @property
    def prefix(self) -> str:
        """Return the key prefix of a bucket's URL, without its last slash; empty for the whole bucket."""
        return unquote(urlsplit(self.url).path).strip("/") if self.bucket else ""


def key_url(scheme: str, bucket: str, key: str) -> str:
    """Return the URL of a key, with special characters (`#`, `?`, `%`) quoted."""
    quoted = key.replace("%", "%25").replace("#", "%23").replace("?", "%3F")
    return f"{scheme}://{bucket}/{quoted}"


def carries_secret(name: str) -> bool:
    """Return true if a name looks like a signed URL, which must not be repeated in messages."""
    return _SECRET.search(name) is not None


def parse_url(url: str) -> Location:
    """Parse a URL or a plain path.

    Args:
        url: a plain path (relative ones are taken from the current folder), `file:///folder`, `s3://bucket/prefix`,
            `gs://bucket/prefix` or `az://container/prefix`; only to read, `https://server/folder`, `http://…`,
            `hf://datasets/OWNER/NAME[@REVISION]/folder` or `hf://OWNER/NAME/…`.

    Raises:
        ValueError: another scheme, credentials or a query, or no bucket; the message lists what is allowed.
    """
    scheme, colon, _ = url.partition(":")
    if not url.strip():
        raise ValueError(f"the URL is empty; use {_READ}")
    if "://" not in url and not (colon and scheme in ("pipe", "file")):
        if scheme in (*BUCKET_SCHEMES, *WEB_SCHEMES) and url.startswith(f"{scheme}:/"):
            raise ValueError(f"{scheme}:/ has one slash, and would be a local folder {scheme}:; write {scheme}://")
        return _local(Path(expand_home(url)))
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets that are no address, for instance; its message would repeat the URL
        raise ValueError(f"not a URL; use {_READ}") from None
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return _local(local_path(url[url.index("/", len("file://")) if "://" in url else len("file:") :]))
    if parts.scheme in WEB_SCHEMES:
        return _web(parts)
    if parts.scheme not in BUCKET_SCHEMES:
        raise ValueError(
            f"URL scheme {parts.scheme + ':'!r} is not supported (nothing is run through a shell); use {_READ}"
        )
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"a {parts.scheme}:// URL must not carry credentials, a query or a fragment; set the service's "
            "environment variables instead (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL). Where "
            "'?' or '#' is part of a folder's name, write %3F or %23"
        )
    if not parts.netloc:
        raise ValueError(f"{parts.scheme}://{parts.path}: no bucket; write {parts.scheme}://BUCKET/PREFIX")
    prefix = "/".join(part for part in parts.path.split("/") if part)
    return Location(f"{parts.scheme}://{parts.netloc}{'/' if prefix else ''}{prefix}", parts.scheme, None, parts.netloc)


def local_path(quoted: str) -> Path:
    """Return the path that the path of a file:// URL names, also where its bytes are not UTF-8."""
    return Path(unquote(quoted, errors="surrogateescape"))


def expand_home(path: str) -> str:
    """A path with its `~` expanded, once, for all that read it: what nothing expands would be a folder of that name.

    Raises:
        ValueError: there is no such home folder.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"found {path!r}, and no home folder of that name; write the path in full")
    return expanded


def checked_folder(path: str) -> str:
    """Return the path of a local folder with its `~` expanded; raise ValueError for a URL (for the config's
    validators)."""
    if url := named_url(path):
        raise ValueError(f"{url} is a URL, and it must be a local folder; copy what is there, or give a path")
    return expand_home(path)


def named_url(path: str | Path) -> str | None:
    """Return the URL that is written where a path is due, or None. `pathlib` makes a folder `s3:` of `s3://`."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(path))
    return f"{found[1]}://{str(path)[found.end() :].lstrip('/')}" if found else None


def readable_url(url: str) -> str:
    """Return `url` with its `~` expanded; raise ValueError if it cannot be read from (for the config's validators)."""
    parse_url(url)
    return expand_home(url)


def checked_url(url: str) -> str:
    """Return `url` unchanged; raise ValueError if it cannot be written to (for the config's validators)."""
    if parse_url(url).read_only:
        raise ValueError(f"{parse_url(url).scheme}:// is read only; use {ALLOWED}")
    return url


def _web(parts: SplitResult) -> Location:
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"{parts.scheme}:// with credentials, a query or a fragment is refused: signed addresses end up in files. "
            "Give the plain address; for hf:// set HF_TOKEN"
        )
    path = "/".join(part for part in parts.path.split("/") if part)
    if not parts.netloc:
        raise ValueError(f"{parts.scheme}://: no server; write {parts.scheme}://SERVER/FOLDER")
    least = 2 if parts.netloc == "datasets" else 1
    if parts.scheme == "hf" and len(path.split("/") if path else []) < least:
        raise ValueError("no repository; write hf://datasets/OWNER/NAME/FOLDER, or hf://OWNER/NAME/FOLDER")
    if parts.scheme == "hf" and parts.netloc in ("spaces", "buckets"):
        raise ValueError(f"hf://{parts.netloc}/ is not supported; use hf://datasets/OWNER/NAME or hf://OWNER/NAME")
    return Location(f"{parts.scheme}://{parts.netloc}{'/' if path else ''}{path}", parts.scheme, None, parts.netloc)


def _local(path: Path) -> Location:
    folder = Path(os.path.abspath(path))
    return Location(folder.as_uri(), "file", folder)
