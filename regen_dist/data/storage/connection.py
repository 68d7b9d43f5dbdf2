"""Connections to buckets and to the web through obstore: deadlines, retries, credentials, and translation of errors.

Credentials come from the standard environment variables and chains of each service. obstore's own messages may quote
a server's answer, which may quote keys: none of them is passed on, only the status and the short code inside.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from regen_dist.config.datasets import ReadConfig
from regen_dist.config.urls import WEB_SCHEMES, Location
from regen_dist.errors import (
    AccessDenied,
    BackendError,
    BucketMissing,
    DataError,
    ObjectCut,
    ObjectDenied,
    ObjectMissing,
    StoreUnavailable,
)

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig


LOOKED_AT = {
    "s3": "AWS_ACCESS_KEY_ID with AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), AWS_PROFILE, AWS_ROLE_ARN with "
    "AWS_WEB_IDENTITY_TOKEN_FILE, AWS_CONTAINER_CREDENTIALS_*, the instance's metadata",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, GOOGLE_SERVICE_ACCOUNT, the instance's metadata",
    "az": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, AZURE_CLIENT_ID with "
    "AZURE_TENANT_ID and AZURE_CLIENT_SECRET or AZURE_FEDERATED_TOKEN_FILE, the managed identity",
}
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")
_ADDRESS = re.compile(r"https?://[^\s/]+(/\S*)?")
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_CHAINS = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_DENIED = (
    *("AccessDenied", "AllAccessDisabled", "AuthFailure", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken"),
    *("SignatureDoesNotMatch",),
)
_DENIED_ONE = ("", "AccessDenied", "AllAccessDisabled", "AuthorizationPermissionMismatch")  # the user is known
_ARCHIVED = ("InvalidObjectState", "BlobArchived", "BlobBeingRehydrated")
_OTHER_REGION = (
    *("AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "InvalidRegion", "InvalidRegionName"),
    *("PermanentRedirect", "TemporaryRedirect"),
)
_METADATA = "http://169.254.169.254"
_METADATA_PATHS = ("/latest/api/token", "/latest/meta-data", "/computeMetadata/", "/metadata/identity")
_METADATA_S = 1.0  # it is one hop away, where there is one
_AGAIN = (408, 409, 425, 429)  # besides 5xx: the same request may be answered later
_AGAIN_CODES = ("IncompleteBody", "RequestTimeout")  # S3 answers 400 to a body that came too slowly, or was cut
_NEVER = 1_000_000  # retries: time bounds them, not their number
_KINDS = {
    "Timeout": "no bytes came in time",
    "Connect": "no connection",
    "Interrupted": "the connection broke",
    "Request": "the connection broke",
    "Decode": "the answer was cut",
}


@dataclass(frozen=True)
class StoreLimits:
    """Time limits of a store, in seconds.

    Args:
        stall_s: longest wait for the next bytes of an answer; then the rest is asked for again.
        deadline_s: limit of one call with all its retries, or of each piece of an object that is moved in pieces.
            A call may run over it by one wait.
        connect_s: longest wait for a connection.
    """

    stall_s: float = 10.0
    deadline_s: float = 120.0
    connect_s: float = 5.0


def limits_of(config: ReadConfig) -> StoreLimits:
    """Return the configured time limits of a store."""
    return StoreLimits(stall_s=config.stall_s, deadline_s=config.deadline_s)


def open_backend(place: Location, limits: StoreLimits, *, writing: bool = False) -> ObjectStore:
    """Open the bucket (with its prefix) that a URL names; raise AccessDenied if there are no credentials."""
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    if place.scheme in WEB_SCHEMES:
        return open_web(place, _client(limits, writing), _retries(limits, writing))
    _check_environment(place)
    more: dict[str, Any] = {}
    if place.scheme == "s3" and (provider := _s3_provider(place)) is not None:
        more = {"credential_provider": provider}
    try:
        return from_url(
            place.url, client_options=_client(limits, writing), retry_config=_retries(limits, writing), **more
        )
    except (BaseError, ValueError) as error:
        what = re.search(r"^Generic \w+ error: ([A-Z][\w ]{,60})$", str(error).splitlines()[0])
        raise AccessDenied(
            f"{place.url}: cannot be opened{f' ({what[1]})' if what else ''}; checked {LOOKED_AT[place.scheme]}"
        ) from None


def explain_store_error(error: Exception, place: Location, name: str, verb: str, waited_s: float) -> DataError:
    """Translate an error of obstore; StoreUnavailable if the same request may succeed later."""
    from obstore.exceptions import InvalidPathError, PermissionDeniedError, PreconditionError, UnauthenticatedError

    if place.scheme in WEB_SCHEMES:
        return explained_web(error, place, name, waited_s)
    text = str(error)
    status = int(found[1]) if (found := re.search(r"status code: (\d{3})\b", text)) else None
    code = (
        found[1] or found[2]
        if (found := re.search(r"<Code>([\w.]{1,60})</Code>|\(code: ([\w.]{1,60})\)", text))
        else ""
    )
    where = f"{place.url}/{name}"
    details = " ".join(part for part in (f"HTTP {status}" if status else "", code) if part)
    if any(path in text for path in _METADATA_PATHS):
        return no_credentials(place)
    if code in _ARCHIVED:
        return DataError(f"{where}: it is archived ({details}); restore it to a class that can be read, then run again")
    if code in _OTHER_REGION or "configured region" in text or (status is not None and 300 <= status < 400):
        return DataError(f"{where}: the bucket is in another region ({details or 'redirected'}){_region(text)}")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in (401, 403) or code in _DENIED:
        kind = ObjectDenied if status in (None, 403) and code in _DENIED_ONE else AccessDenied
        return kind(
            f"{where}: access denied when trying to {verb} ({details or 'no reason given'}); check that these keys may "
            f"do that, and what is set of {LOOKED_AT[place.scheme]}"
        )
    if code == "NoSuchBucket":
        return BucketMissing(f"{place.url}: there is no bucket {place.bucket!r}{_endpoint()}; check the URL")
    if status == 416:
        return ObjectCut(f"{where}: shorter than the range that was asked for; run `regen shards verify {place.url}`")
    if sends_whole(text):
        return DataError(f"{where}: {NO_RANGES}")
    if isinstance(error, PreconditionError):
        return DataError(f"{where}: it was replaced while it was read; read it again from the start")
    if isinstance(error, FileNotFoundError) or status == 404:
        return ObjectMissing(f"{where}: not found; check the URL, or run `regen shards verify {place.url}`")
    if isinstance(error, InvalidPathError | ValueError):
        return DataError(f"{place.url}: {name!r} is not a name that an object can have")
    if status == 400 and not code and place.scheme == "s3":  # HEAD has no body that would say more
        return DataError(
            f"{where}: the store refused to {verb} it ({details}){_endpoint()}; often the bucket is in another "
            f"region{_region(text)}"
        )
    if status is not None and status < 500 and status not in _AGAIN and code not in _AGAIN_CODES:
        return DataError(f"{where}: the store refused to {verb} it ({details}){_endpoint()}")
    return StoreUnavailable(
        f"{where}: could not {verb} it in {waited_s:.0f} s (last: {details or _kind(text)}){_endpoint()}; check that "
        "the store is up and can be reached, then run the same again"
    )


def key_problem(key: str) -> str:
    """Explain why a key of a bucket cannot be read; empty if it can."""
    parts = key.removeprefix("/").removesuffix("/").split("/")
    if "" in parts:
        return "its key has an empty part ('//')"
    if "." in parts or ".." in parts:
        return "its key has a part that is '.' or '..'"
    return "its key has a control character" if any(ord(each) < 32 or ord(each) == 127 for each in key) else ""


def checked_name(name: str, url: str) -> str:
    """Return `name` if it is inside the folder `url`; raise DataError otherwise."""
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise DataError(f"{url}: {name!r} is not a name that an object can have")
    return name


def no_credentials(place: Location) -> AccessDenied:
    """Return the error for a store without credentials."""
    hint = "; ~/.aws is read only when AWS_PROFILE is set" if place.scheme == "s3" else ""
    return AccessDenied(f"{place.url}: no credentials were found; checked {LOOKED_AT[place.scheme]}{hint}")


def _check_environment(place: Location) -> None:
    """Raise AccessDenied for variables of the service that obstore cannot use: it would panic at the first request."""
    prefix = {"s3": "AWS_", "az": "AZURE_"}.get(place.scheme, place.scheme)
    for name in (each for each in ENDPOINTS if each.startswith(prefix)):
        if not _ADDRESS.fullmatch(os.environ.get(name, "http://none")):
            raise AccessDenied(
                f"{place.url}: {name} is not the address of a server; write http://HOST:PORT or https://HOST, or unset "
                "it where there is none of your own"
            )
    for name in _KEYS if place.scheme == "s3" else ():
        if re.search(r"\s", os.environ.get(name, "")):
            raise AccessDenied(f"{place.url}: {name} holds a space or the end of a line; set it without")


def _client(limits: StoreLimits, writing: bool) -> ClientConfig:
    """Return the client options. Writing has no stall limit, because obstore counts sending as a stall, but less time
    for each request."""
    options: ClientConfig = {
        "allow_http": any(os.environ.get(name, "").startswith("http://") for name in ENDPOINTS),
        "connect_timeout": timedelta(seconds=limits.connect_s),
        "timeout": timedelta(seconds=limits.deadline_s / 3 if writing else limits.deadline_s),
    }
    if not writing:
        options["read_timeout"] = timedelta(seconds=limits.stall_s)
    return options


def _retries(limits: StoreLimits, writing: bool) -> RetryConfig:
    seconds = limits.deadline_s / 3 if writing else limits.deadline_s
    return {
        "backoff": {
            "init_backoff": timedelta(seconds=0.1),
            "max_backoff": timedelta(seconds=max(0.2, min(3.0, seconds / 4))),  # less than the first: it panics
            "base": 2,
        },
        "max_retries": _NEVER,
        "retry_timeout": timedelta(seconds=seconds),
    }


def _s3_provider(place: Location) -> object | None:
    """Return a provider that reads a profile; None if obstore finds credentials by itself. Raise at once if there are
    none: obstore would ask the instance's metadata until the deadline."""
    keys = [bool(os.environ.get(name)) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    if all(keys) or is_on("AWS_SKIP_SIGNATURE") or any(os.environ.get(name) for name in _CHAINS):
        return None
    if any(keys):
        raise AccessDenied(f"{place.url}: only one of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY is set; set both")
    if os.environ.get("AWS_PROFILE"):
        return profile_provider(place)
    if not _has_metadata():
        raise no_credentials(place)
    return None


def is_on(variable: str) -> bool:
    """Return true if a variable of the environment says yes, in the words that obstore takes."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y")


def profile_provider(place: Location) -> object:
    """boto3's chain of credentials, as a function that gives them; BackendError when boto3 is not installed."""
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise BackendError(
            f"{place.url}: profiles (AWS_PROFILE), and other credentials for what obstore cannot do, are read through "
            "boto3, which is not installed; run `pip install boto3`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    try:
        return Boto3CredentialProvider()
    except Exception as error:  # noqa: BLE001 - of botocore, which may not be imported here; its text may quote files
        raise AccessDenied(
            f"{place.url}: the profile that AWS_PROFILE names gives no credentials ({type(error).__name__}); check "
            "~/.aws/config and ~/.aws/credentials"
        ) from None


def _has_metadata() -> bool:
    """Return true if an instance's metadata service answers; takes a second if there is none."""
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    parts = urlsplit(os.environ.get("AWS_METADATA_ENDPOINT") or _METADATA)
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=_METADATA_S):
            return True
    except (OSError, ValueError):
        return False


def _region(text: str) -> str:
    found = re.search(r"<Region>([\w-]{1,40})</Region>|expecting (?:'|&apos;|&#39;)([\w-]{1,40})", text)
    theirs = found and (found[1] or found[2])
    ours = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return (
        f"{f': {theirs}' if theirs else ''}; AWS_REGION is {ours or 'not set (us-east-1 is taken)'}, set AWS_REGION to "
        f"{theirs or 'that of the bucket'}"
    )


def _endpoint() -> str:
    """The endpoint that was set, in words: host and port only."""
    for name in ENDPOINTS:
        if value := os.environ.get(name):
            return f" at the endpoint {urlsplit(value).netloc.rpartition('@')[2]} ({name})"
    return ""


def _kind(text: str) -> str:
    kinds = re.findall(r"kind: (\w+)", text)
    return next((words for kind in kinds if (words := _KINDS.get(kind))), "no usable answer")


# Web addresses: `https://` and `http://`, and repositories of the Hugging Face hub (`hf://`). All are read only.
#
# obstore reads their files like objects of a bucket: ranges, redirects, bodies that are cut and go on. It sends
# credentials to the first host alone, never to another one that a redirect names (measured with obstore 0.12).

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
