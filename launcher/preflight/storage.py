"""Checks of folders, checkpoint stores and tracking credentials."""

from __future__ import annotations

import netrc
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from launcher.preflight.findings import PreflightFinding, Subject, by_run, make_note, problem
from regen_dist.checks.data import READING
from regen_dist.checks.findings import run_concurrently
from regen_dist.config import AnyRunConfig, T2VConfig
from regen_dist.config.urls import parse_url
from regen_dist.data.storage.connection import StoreLimits
from regen_dist.data.storage.store import Store
from regen_dist.errors import DataError, StoreUnavailable

# Folders of a job: writable, and visible to all nodes.


def folders(subject: Subject) -> Iterator[PreflightFinding]:
    """Check that the job can write its files. A file is created and removed, which also finds quotas and read-only
    mounts, unlike permissions."""
    request = subject.request
    option = "output=FOLDER" + (" (of `regen submit run`: --output FOLDER)" if request.kind == "run" else "")
    for folder in dict.fromkeys([request.base, *(task.folder for task in request.tasks)]):
        if why := unwritable(folder):
            yield problem(f"the run folder {folder} cannot be written to: {why}; choose another by {option}")


def shared(subject: Subject) -> Iterator[PreflightFinding]:
    """Check that everything nodes exchange through files lies in the shared folder."""
    common = subject.request.cluster.shared
    if not subject.on_slurm or common is None:
        return
    if not common.is_dir():
        yield problem(f"cluster key shared: there is no folder {common} on this machine; mount it, or correct the key")
        return
    for what, folder in _exchanged(subject):
        if not folder.resolve().is_relative_to(common.resolve()):
            yield problem(
                f"{what} {folder} is not in {common}, which all nodes share (cluster key shared); move it there"
            )
    here = Path.cwd()
    if not here.is_relative_to(common.resolve()):
        yield make_note(f"this folder, {here}, is not in {common}: relative paths in the job mean nothing on its nodes")


def _exchanged(subject: Subject) -> list[tuple[str, Path]]:
    """Return each folder once, with its purpose."""
    request = subject.request
    named = [(f"the run folder of {task.name}", str(task.folder)) for task in request.tasks]
    for config in subject.configs:
        named += [("the data", url) for url in config.data.sources]
        named += [("the validation data", url) for url in [config.data.validation_url] if url]
        named += [("checkpoint.url", config.checkpoint.url)] if config.checkpoint.url else []
        if isinstance(config, T2VConfig) and config.generation.embedder:
            named.append(("generation.embedder", config.generation.embedder))
    local = [(what, parse_url(url).folder) for what, url in named]
    return list(dict.fromkeys((what, folder) for what, folder in local if folder is not None))


def unwritable(folder: Path) -> str:
    """Return why no file can be created in a folder or its nearest existing parent; "" if one can."""
    existing = nearest(folder)
    try:
        with tempfile.TemporaryFile(dir=existing):
            return ""
    except OSError as error:
        return f"{existing}: {error.strerror}"


def nearest(path: Path) -> Path:
    """Return a folder, or its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return path


WRITING = StoreLimits(stall_s=4.0, deadline_s=24.0, connect_s=4.0)  # one request gets a third of the deadline


def checkpoints(subject: Subject) -> Iterator[PreflightFinding]:
    """Check that a test object can be written and deleted at the checkpoint location. Existing objects are not
    touched."""
    first: dict[str | None, AnyRunConfig] = {}  # first run of each checkpoint location
    for config in subject.configs:
        first.setdefault(config.checkpoint.url, config)
    chosen = list(first.values())
    for wrong in run_concurrently(lambda config: _unwritable(config.checkpoints), chosen):
        if wrong:
            yield problem(wrong)


def _unwritable(url: str) -> str:
    place = parse_url(url)
    if place.folder is not None:
        why = unwritable(place.folder)
        return f"checkpoints cannot be written to {place.folder}: {why}; set checkpoint.url" if why else ""
    return _probe(url)


def _probe(url: str) -> str:
    """Write and delete an object in a bucket; return the error, or ""."""
    name = f"preflight-{secrets.token_hex(8)}"
    try:
        Store(url, READING).size(name)  # fails faster than a write if the store is down
        store = Store(url, WRITING)
        try:
            store.put(name, b"written before a job is submitted, and deleted at once\n")
        except StoreUnavailable:  # the object may have been written all the same
            store.delete(name)
            raise
    except DataError as error:
        return f"checkpoints cannot be written: {error}"
    try:
        store.delete(name)
    except DataError as error:
        return f"checkpoints can be written but not deleted, and {store.url}/{name} is left there now: {error}"
    return ""


# Credentials for metric tracking.

_SERVICE = "https://api.wandb.ai"


def wandb_key(subject: Subject) -> Iterator[PreflightFinding]:
    """Check that there is a key for wandb.mode=online."""
    given = {**os.environ, **subject.request.cluster.environment}

    def find(config: AnyRunConfig) -> Iterator[PreflightFinding]:
        if config.wandb.mode == "online" and not given.get("WANDB_API_KEY") and not _in_netrc(given):
            yield problem(
                f"wandb.mode=online, but there is no key: WANDB_API_KEY is not set, and {_netrc(given)} has none for "
                f"{_host(given)}; run `wandb login`, or set wandb.mode=offline"
            )

    yield from by_run(subject.configs, find)


def _in_netrc(given: dict[str, str]) -> bool:
    try:
        return netrc.netrc(_netrc(given)).authenticators(_host(given)) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _netrc(given: dict[str, str]) -> Path:
    return Path(os.path.expanduser(given.get("NETRC") or "~/.netrc"))


def _host(given: dict[str, str]) -> str:
    return urlsplit(given.get("WANDB_BASE_URL") or _SERVICE).hostname or ""
