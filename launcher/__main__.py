"""`python -m launcher`: the same as `regen submit`."""

from __future__ import annotations

import launcher.pipelines.cli  # noqa: F401 - adds its command
from launcher.cli import app
from regen_dist.errors import errors_in_one_line
from regen_dist.observe.terminal import shield_stderr
from regen_dist.programs import flushing_stdout, print_any_text, start_safely


def main() -> None:
    """Entry point: user-facing errors become one message on stderr and an exit code."""
    start_safely()
    print_any_text()
    shield_stderr()
    with errors_in_one_line(), flushing_stdout():
        app(prog_name="python -m launcher")


if __name__ == "__main__":
    main()
