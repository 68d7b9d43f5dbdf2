"""`python -m launcher`: the same as `regen submit`."""

from __future__ import annotations

import os
import sys

import launcher.pipelines.cli  # noqa: F401 - adds its command
from launcher.cli import app
from regen_dist.errors import RegenError
from regen_dist.programs import start_safely


def main() -> None:
    """Entry point: a RegenError becomes one message on stderr and its exit code."""
    start_safely()
    try:
        app(prog_name="python -m launcher")
    except RegenError as error:
        if os.environ.get("REGEN_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
