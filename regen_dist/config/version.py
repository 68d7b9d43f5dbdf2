"""Version of this code, and compatibility with configs saved by older versions."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from regen_dist import __version__

VERSION_FILE = "VERSION"  # beside the packages in a copy of the code made for a job


@cache
def code_version() -> str:
    """Return the package's version, with the commit in a git checkout: "0.1.0+g0123456789ab", plus ".dirty" if files
    differ from it. A copy made for a job returns the version of its original."""
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
    """Set the fields of a saved config that were added later with a default other than its actual value."""
    model = values.get("model")
    if isinstance(model, dict) and model.get("kind", "regen") == "regen":
        decoder = model.setdefault("decoder", {})
        if isinstance(decoder, dict):
            decoder.setdefault("local", False)
