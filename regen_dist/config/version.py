"""The version of this code, and how configs saved by older versions are read."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from regen_dist import __version__

VERSION_FILE = "VERSION"  # beside the packages where code was copied for a job


@cache
def code_version() -> str:
    """The package's version, and where it runs from a git checkout the commit: "0.1.0+g0123456789ab", with ".dirty"
    when files differ from it. A copy that was made for a job says what its original said."""
    root = Path(__file__).resolve().parents[2]
    if (root / VERSION_FILE).is_file():
        return (root / VERSION_FILE).read_text(encoding="utf-8").strip()
    if not (root / ".git").exists():
        return __version__
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):  # no git here, or a folder that it refuses to read
        return __version__
    return f"{__version__}+g{commit}{'.dirty' if changed else ''}"


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def fill_later_fields(values: dict[str, Any]) -> None:
    """Set, in a saved config, the fields that came after it and whose default is not what it was trained with."""
    model = values.get("model")
    if isinstance(model, dict) and model.get("kind", "regen") == "regen":
        decoder = model.setdefault("decoder", {})
        if isinstance(decoder, dict):
            decoder.setdefault("local", False)
