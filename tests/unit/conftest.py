"""Acts that take longer than most tests are done once: building commands, and a dataset for all workers."""

from __future__ import annotations

import os
from fcntl import LOCK_EX, flock
from functools import cache
from pathlib import Path

import pytest
import typer.main
import typer.testing

# typer builds all subcommands at every call.
typer.main.get_command = typer.testing._get_command = cache(typer.main.get_command)


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight samples of 24 frames (see `tiny_dataset`), made by the first worker. Read it, do not change it."""
    from tests.helpers.tiny import tiny_dataset

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with (folder / "tiny.lock").open("w") as lock:
        flock(lock, LOCK_EX)
        if not (folder / "tiny").exists():
            tiny_dataset(folder / "tiny.tmp")
            (folder / "tiny.tmp").rename(folder / "tiny")
    return folder / "tiny" / "shards"
