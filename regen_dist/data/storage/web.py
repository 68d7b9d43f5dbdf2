"""Web addresses: `https://` and `http://`, and repositories of the Hugging Face hub (`hf://`). All are read only.

obstore reads their files like objects of a bucket: ranges, redirects, bodies that are cut and go on. It sends
credentials to the first host alone, never to another one that a redirect names (measured with obstore 0.12).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from regen_dist.config.urls import Location
from regen_dist.errors import AccessDenied, DataError, ObjectCut, ObjectDenied, ObjectMissing, StoreUnavailable

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

_HUB = "https://huggingface.co"
NO_RANGES = (
    "the server sends no ranges of bytes, by which samples are read (python -m http.server is such a one): copy the "
    "dataset to a disk, or serve it by another server (nginx, an object store)"
)


@dataclass(frozen=True)
class Repository:
    """A place in a repository of the hub: `kind` is "dataset" or "model", `folder` may be empty."""

    kind: str
    name: str
    revision: str
    folder: str

    @classmethod
    def of(cls, place: Location) -> Repository:
        """The place that `hf://datasets/OWNER/NAME[@REVISION]/FOLDER`, or without `datasets/`, names."""
        parts = [unquote(part) for part in place.url.removeprefix("hf://").split("/")]
        kind, parts = ("dataset", parts[1:]) if parts[0] == "datasets" else ("model", parts)
        name, _, revision = parts[1].partition("@")
        return cls(kind, f"{parts[0]}/{name}", revision or "main", "/".join(parts[2:]))

    @property
    def files_url(self) -> str:
        """Return the base URL of its files."""
        top = "datasets/" if self.kind == "dataset" else ""
        folder = f"/{quote(self.folder)}" if self.folder else ""
        return f"{hub()}/{top}{quote(self.name)}/resolve/{quote(self.revision, safe='')}{folder}"


def hub() -> str:
    """Address of the hub: HF_ENDPOINT, or huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or _HUB).rstrip("/")


def open_web(place: Location, client: ClientConfig, retries: RetryConfig) -> ObjectStore:
    """The files under a web address or in a repository."""
    from obstore.store import HTTPStore

    hugging = place.scheme == "hf"
    url = Repository.of(place).files_url if hugging else place.url
    client = {**client, "allow_http": url.startswith("http://")}
    if hugging and (token := _token()):
        client["default_headers"] = {"authorization": f"Bearer {token}"}
    return HTTPStore.from_url(url, client_options=client, retry_config=retries)


def list_repository(place: Location, folder: str) -> Iterator[tuple[str, int, str]]:
    """Name below `place`, size in bytes and tag of every file below a folder of it; nothing where there is no such
    folder."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
    from huggingface_hub.hf_api import RepoFile

    here = Repository.of(place)
    top = f"{here.folder}/" if here.folder else ""
    try:
        tree = HfApi(endpoint=hub(), token=_token() or False).list_repo_tree(
            here.name, f"{top}{folder}".strip("/") or None, recursive=True, revision=here.revision, repo_type=here.kind
        )
        for one in tree:
            if isinstance(one, RepoFile):
                yield one.path.removeprefix(top), one.size, one.blob_id
    except EntryNotFoundError:
        return
    except HfHubHTTPError as error:  # its text quotes the address alone
        raise explained_status(error.response.status_code, place, "") from None
    except HFValidationError:
        raise DataError(f"{place.url}: {here.name!r} is not the name of a repository; check the address") from None
    except ValueError:  # its answer is no JSON
        raise DataError(
            f"{place.url}: {hub()} answered with something else than a listing (a login page of the network, a proxy); "
            "check HF_ENDPOINT and the network"
        ) from None
    except (OSError, *HfHubHTTPError.__bases__) as error:  # no answer: of httpx or httpx2, by the version of the hub
        raise _unavailable(place.url, 0.0, type(error).__name__) from None


def _token() -> str | None:
    from huggingface_hub import get_token

    token: str | None = get_token()
    return token


def explained_web(error: Exception, place: Location, name: str, waited_s: float) -> DataError:
    """The meaning of an error of obstore, for a file of the web. StoreUnavailable where the server gives no answer."""
    text, where = str(error), f"{place.url}/{name}"
    found = re.search(r"status code: (\d{3})\b", text)
    if found or isinstance(error, FileNotFoundError):
        return explained_status(int(found[1]) if found else 404, place, name, waited_s)
    if "following redirect" in text:
        return DataError(f"{where}: its redirects do not end; open the address in a browser, and give the last one")
    if sends_whole(text):
        return DataError(f"{where}: {NO_RANGES}")
    if any(sign in text for sign in ("kind: Interrupted", "kind: Decode", "RangeNotSupported")):
        return ObjectCut(f"{where}: every try of {waited_s:.0f} s ended early; the file is cut there: replace it")
    if isinstance(error, ValueError):
        return DataError(f"{place.url}: {name!r} is not a name that a file can have")
    return _unavailable(where, waited_s, "no answer")


def sends_whole(text: str) -> bool:
    """Return true for the error of obstore about a server that answers with the whole file where a range was asked
    for. (Where the rest of a body that was cut is asked for, it begins otherwise.)"""
    return text.startswith("Operation not supported: Range request") or "non-partial response" in text


def explained_status(status: int, place: Location, name: str, waited_s: float = 0.0) -> DataError:
    """The meaning of an answer that is an error."""
    where = f"{place.url}/{name}" if name else place.url
    if status in (404, 410):
        return ObjectMissing(f"{where}: not found (HTTP {status}); check the address")
    if status in (401, 403) and place.scheme == "hf":
        return AccessDenied(
            f"{where}: access denied (HTTP {status}); set HF_TOKEN or run `hf auth login`, and accept the terms of the "
            "repository on its page"
        )
    if status in (401, 403):
        return ObjectDenied(f"{where}: access denied (HTTP {status}); web addresses are read without credentials")
    if status == 416:
        return ObjectCut(f"{where}: shorter than it was when its size was asked for; read it again")
    if status < 500 and status not in (408, 425, 429):
        return DataError(f"{where}: the server refused to send it (HTTP {status})")
    return _unavailable(where, waited_s, f"HTTP {status}")


def _unavailable(where: str, waited_s: float, reason: str) -> StoreUnavailable:
    return StoreUnavailable(
        f"{where}: no usable answer in {waited_s:.0f} s (last: {reason}); check the address and the network, then run "
        "the same again"
    )
