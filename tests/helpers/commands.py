"""`python -m MODULE ARGUMENTS` in this process: without the seconds that a new one spends on its imports."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

_run, _PYTHON = subprocess.run, sys.executable
_one_check_at_a_time = threading.Lock()  # a command in this process changes its output and its environment


def run_here(
    command: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Call the `main` of a command's module, with its arguments, folder and environment; return what it printed, and
    its end as an exit code. Anything but a module of this Python is run as a process.

    It may stand in the place of `subprocess.run` where the library starts such a command. At least one test of a
    command must start the process: that alone shows that it can be started, and what it imports.
    """
    if command[0] != _PYTHON or "-m" not in command[:4]:
        return _run(command, cwd=cwd, env=env, **more)
    words = command[command.index("-m") + 1 :]
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    before, words_before = dict(os.environ), sys.argv
    with chdir(cwd or "."), redirect_stdout(out), redirect_stderr(err):
        try:
            sys.argv = list(words)
            _set_environment(before if env is None else env)
            code = _exit_code(words[0])
        finally:
            sys.argv = words_before
            _set_environment(before)
    printed = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(command, code, *printed)


def regen_here(*arguments: object, cwd: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """`regen ARGUMENTS` by `run_here`, and in the same way the `regen check` and `regen describe` that a submission
    starts: `describe` imports torch, which takes longer than all else."""

    def run(command: Sequence[str], **more: Any) -> subprocess.CompletedProcess[str]:
        if command[0] != _PYTHON:
            return _run(command, **more)
        with _one_check_at_a_time:  # the steps of a pipeline are checked by several threads
            return run_here(command, **more)

    with mock.patch.object(subprocess, "run", run):
        return run_here([_PYTHON, "-m", "tools.cli", *map(str, arguments)], cwd=cwd, env=env)


def _set_environment(variables: Mapping[str, str]) -> None:
    """Never empty in between: other threads may read it."""
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)


def _exit_code(module: str) -> int:
    try:
        import_module(module).main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:  # noqa: BLE001 - as a process would end
        traceback.print_exc()
        return 1
    return 0
