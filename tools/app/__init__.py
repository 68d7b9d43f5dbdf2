"""`regen app`: a page on this machine to reconstruct videos, generate them, and browse runs."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from regen_dist.errors import ConfigError, needing_extra

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve_app(
    runs: Annotated[Path, typer.Option(help="Folder whose runs and exports are offered.")] = Path("runs"),
    out: Annotated[Path, typer.Option(help="The app's own folder: uploads and results.")] = Path("runs/app"),
    port: Annotated[int, typer.Option(help="Port.", min=1, max=65535)] = 7860,
    host: Annotated[str, typer.Option(help="Address to listen on; this machine alone by default.")] = "127.0.0.1",
    max_upload_mb: Annotated[int, typer.Option(help="Largest upload in MB.", min=1)] = 200,
    max_seconds: Annotated[float, typer.Option(help="Longest video in seconds.", min=0.1)] = 60.0,
    text: Annotated[str | None, typer.Option(help="Text encoder, if not where the caches record it.")] = None,
) -> None:
    """Serve a page on this machine: reconstruct an uploaded video, generate from a prompt or an image, browse runs.

    Jobs run one at a time. Ctrl-C ends the app and what it runs.

    Example: regen app --runs runs --port 7860
    """
    if not runs.is_dir():
        raise ConfigError(f"there is no folder {runs} of runs; give it with --runs, or make it for the results")
    # Before gradio is imported, which reads them: nothing is reported to anyone, and uploads lie in our own folder.
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(out.absolute() / "uploads"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    environment = dict(os.environ)  # of jobs, which may read models through a proxy
    os.environ |= {"NO_PROXY": "*", "no_proxy": "*"}  # gradio asks its own address whether it answers
    with needing_extra("regen app"):
        from tools.app.page import AppState, build_page, launch
    from tools.app.runner import JobRunner
    from tools.app.uploads import Limits

    limits = Limits(num_bytes=max_upload_mb * 2**20, seconds=max_seconds, num_frames=round(30 * max_seconds))
    state = AppState(runs, JobRunner(out, environment=environment), limits, text)
    page = build_page(state)
    try:
        address = launch(page, state, host, port)
        print(f"{address}  ({limits.text()} an upload; Ctrl-C ends it)", flush=True)
        if host not in _LOOPBACK:
            print(f"warning: {host} is not loopback: whoever reaches this port can upload and run jobs", flush=True)
        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        ended.wait()
    finally:
        state.runner.close()
        page.close(verbose=False)
