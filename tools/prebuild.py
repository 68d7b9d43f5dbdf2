"""`python -m tools.prebuild`: compiles, once and in one process, the operator that DeepSpeed needs on a CPU.

Without it, the first distributed run compiles while its ranks wait (one to two minutes). Where DeepSpeed finds a GPU
there is nothing to do. Run by the Makefile after every install.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from launcher.extensions import clear_stale_locks, extensions_folder
from regen_dist.errors import BackendError, RegenError


def prebuild() -> str:
    """Build the shared-memory collectives of DeepSpeed into `extensions_folder()`; returns one line on what was done.

    Raises:
        BackendError: there is no C++ compiler.
    """
    folder = extensions_folder()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # for ninja
    for lock in clear_stale_locks(folder):
        print(f"deleted the lock of a build that was killed: {lock}")
    if shutil.which("g++") is None and shutil.which("c++") is None:
        raise BackendError(
            "no C++ compiler found, and DeepSpeed compiles its CPU collectives. Install g++, then run again."
        )
    return _build(folder)


def _build(folder: Path) -> str:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    name = accelerator.device_name()
    if name != "cpu":
        return f"DeepSpeed runs on {name} here: nothing to compile ahead"
    start_s = time.monotonic()
    accelerator.create_op_builder("ShareMemCommBuilder").load(verbose=False)
    return f"DeepSpeed's CPU collectives are in {folder} ({time.monotonic() - start_s:.0f} s)"


def main() -> None:
    """Entry point: one line on stdout, or the error's exit code."""
    try:
        print(prebuild())
    except RegenError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
