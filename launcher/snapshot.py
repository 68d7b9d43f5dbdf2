"""The code that a job runs: a copy made when it is submitted, so that a job that starts again next week runs it too."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from regen_dist.config.version import VERSION_FILE, code_version

ROOT = Path(__file__).resolve().parents[1]
_PARTS = ("regen_dist", "launcher", "tools", "configs", "pyproject.toml")
_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def take_snapshot(folder: Path, root: Path = ROOT) -> Path:
    """Copy the code to `folder/HASH`; the same code is copied once.

    With it go `VERSION` (what `code_version` says of it there) and, from a git checkout, `changes.patch`: what differs
    from the commit.

    Args:
        folder: for all snapshots of a run.
        root: of the checkout or installation.
    """
    place = folder / _fingerprint(root)
    if place.is_dir():
        return place
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".snapshot-"))
    try:
        for part in _existing(root):
            if part.is_dir():
                shutil.copytree(part, temporary / part.name, ignore=_IGNORED)
            else:
                shutil.copy2(part, temporary / part.name)
        (temporary / VERSION_FILE).write_text(code_version() + "\n", encoding="utf-8")
        (temporary / "changes.patch").write_text(_changes(root), encoding="utf-8")
        temporary.chmod(0o755)
        os.replace(temporary, place)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not place.is_dir():  # another submission may have been quicker
            raise
    return place


def _fingerprint(root: Path) -> str:
    digest = hashlib.sha256()
    for part in _existing(root):
        for path in sorted(part.rglob("*")) if part.is_dir() else [part]:
            if path.is_file() and not _is_ignored(path.relative_to(root)):
                digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _existing(root: Path) -> list[Path]:
    return [root / name for name in _PARTS if (root / name).exists()]


def _is_ignored(path: Path) -> bool:
    return path.suffix == ".pyc" or any(part == "__pycache__" or part.startswith(".") for part in path.parts)


def _changes(root: Path) -> str:
    """What differs from the commit; empty where this is no checkout, or git is not here."""
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "diff", "HEAD", "--", *(path.name for path in _existing(root))]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
