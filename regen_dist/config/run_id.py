"""The id of a run: random, kept in its folder, so that runs of one name are told apart. Imports no torch."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from regen_dist.config.files import write_text_atomically
from regen_dist.errors import ConfigError

RUN_ID_FILE = "run_id"
_RUN_ID = re.compile(r"[0-9a-f]{16}")


def read_or_create_run_id(folder: Path) -> str:
    """The id of the run in a folder, 16 hexadecimal characters; made where there is none, once for all that ask.

    Raises:
        ConfigError: the file holds something else.
    """
    found = read_run_id(folder)
    if found is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    path, made = folder / RUN_ID_FILE, secrets.token_hex(8)
    temporary = folder / f".{RUN_ID_FILE}.{made}.tmp"
    temporary.write_text(f"{made}\n", encoding="utf-8")
    try:
        os.link(temporary, path)
    except FileExistsError:  # another process was quicker
        return read_or_create_run_id(folder)
    except OSError:  # a disk without hard links
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return made


def read_run_id(folder: Path) -> str | None:
    """The id of the run in a folder; None where there is none yet.

    Raises:
        ConfigError: the file holds something else.
    """
    path = folder / RUN_ID_FILE
    try:
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    if not _RUN_ID.fullmatch(text):
        raise ConfigError(f"{path} holds {text[:40]!r}, which is no id of 16 hexadecimal characters; delete the file")
    return text


def write_run_id(folder: Path, run_id: str) -> None:
    """Make the run in a folder the one of this id."""
    write_text_atomically(folder / RUN_ID_FILE, f"{run_id}\n")
