"""Which code this is."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

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
