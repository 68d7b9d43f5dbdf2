"""The folders of a job: they can be written to, and all nodes see them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from launcher.preflight.findings import Finding, Subject, note, problem
from regen_dist.config import T2VConfig
from regen_dist.config.urls import parse_url


def folders(subject: Subject) -> Iterator[Finding]:
    """The job can leave its files. A file is made and removed again, which permissions alone do not tell (a quota, a
    disk that is mounted read-only)."""
    order = subject.order
    for folder in dict.fromkeys([order.base, *(task.folder for task in order.tasks)]):
        if why := unwritable(folder):
            yield problem(f"the run folder {folder} cannot be written to: {why}; choose another by output=FOLDER")


def shared(subject: Subject) -> Iterator[Finding]:
    """Everything that nodes exchange by files lies where all of them see it."""
    common = subject.order.cluster.shared
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
        yield note(f"this folder, {here}, is not in {common}: relative paths in the job mean nothing on its nodes")


def _exchanged(subject: Subject) -> list[tuple[str, Path]]:
    """Each folder once, and what it is."""
    order = subject.order
    named = [(f"the run folder of {task.name}", str(task.folder)) for task in order.tasks]
    for config in subject.configs:
        named += [("the data", url) for url in config.data.sources]
        named += [("the validation data", url) for url in [config.data.validation_url] if url]
        named += [("checkpoint.url", config.checkpoint.url)] if config.checkpoint.url else []
        if isinstance(config, T2VConfig) and config.generation.embedder:
            named.append(("generation.embedder", config.generation.embedder))
    local = [(what, parse_url(url).folder) for what, url in named]
    return list(dict.fromkeys((what, folder) for what, folder in local if folder is not None))


def unwritable(folder: Path) -> str:
    """Why no file can be made in a folder, or in the one above in which it would be made; "" when one can."""
    existing = nearest(folder)
    try:
        with tempfile.TemporaryFile(dir=existing):
            return ""
    except OSError as error:
        return f"{existing}: {error.strerror}"


def nearest(path: Path) -> Path:
    """A folder, or the first above it that is there."""
    while not path.exists():
        path = path.parent
    return path
