"""`regen app` in a real browser: Chromium without a window uploads, reconstructs, cancels, generates and browses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from regen_dist.config.t2v import TextConfig
from regen_dist.inference.frames import SourceVideo
from regen_dist.models.text import TextEncoder, make_small_encoder
from regen_dist.programs import regen
from tests.helpers.checkpoints import saved_run
from tests.helpers.t2v import CPU, WordEncoder, saved_t2v
from tests.helpers.video import moving_square, write_video

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
REQUIRED = os.environ.get("REGEN_REQUIRE_CHROMIUM") == "1"
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync",
         "--disable-component-update", "--no-first-run")  # fmt: skip
JOB_MS = 240_000  # in which a job must end, also on a loaded machine
JOB_ENDS = re.compile("is done|failed|was cancelled")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with a tiny embedder and a tiny text-to-video run, whose small text encoder is real."""
    folder = tmp_path_factory.mktemp("app")
    embedder = saved_run(folder / "runs")
    made = saved_t2v(folder / "runs", embedder).folder
    make_small_encoder(["a red circle moves left"], folder / "text", width=WordEncoder.width, heads=2)
    text = TextEncoder.load(TextConfig(encoder=str(folder / "text"), max_tokens=16), CPU)
    path = made / "latent_space" / "facts.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"text": text.facts()}))
    lines = [{"kind": "train", "step": step, "loss": 1 / step, "time": 0.0} for step in range(1, 9)]
    (made / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    uploads = folder / "given"
    write_video(uploads / "short.mp4", moving_square(9, 48, 64))
    write_video(uploads / "long.mp4", moving_square(120, 128, 192))
    write_video(uploads / "4k.mp4", np.zeros((1, 2160, 3840, 3), np.uint8))
    (uploads / "note.txt").write_text("no video\n")
    (uploads / "empty.mp4").touch()
    (uploads / "heavy.mp4").write_bytes(bytes(3 * 2**20))
    Image.new("RGB", (32, 32), (200, 40, 40)).save(uploads / "first.png")
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The app on a free port of loopback, ended by SIGTERM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--runs", folder / "runs", "--out", folder / "out", "--port", port, "--max-upload-mb", 2)
    log = folder / "app.log"
    with log.open("w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "True"}
        environment |= dict.fromkeys(("ALL_PROXY", "HTTP_PROXY", "http_proxy"), "http://127.0.0.1:9")  # of no use
        server = subprocess.Popen(regen("app", *map(str, options)), stdout=file, stderr=file, env=environment)
    try:
        for _ in range(1200):
            if "Ctrl-C ends it" in log.read_text() or server.poll() is not None:
                break
            time.sleep(0.1)
        assert f"http://127.0.0.1:{port}/" in log.read_text()
        yield f"http://127.0.0.1:{port}/"
        server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0, log.read_text()
        assert list((folder / "out" / "work").iterdir()) == []
    finally:
        with suppress(ProcessLookupError):
            server.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium by playwright; skipped where either is missing, unless REGEN_REQUIRE_CHROMIUM=1."""
    missing = "Debian's chromium is not installed (apt-get install chromium)" if CHROMIUM is None else ""
    try:
        import gradio  # noqa: F401
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        missing = f"{error.name} is not installed (pip install '.[dev,app]')"
    if missing:
        pytest.fail(missing) if REQUIRED else pytest.skip(missing)
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield found
        found.close()


def _says(page: Page, pattern: str | re.Pattern[str], timeout_ms: int = 60_000) -> str:
    """Wait until the status line matches; return it."""
    status = page.locator("#status").filter(has_text=re.compile(pattern))
    status.wait_for(timeout=timeout_ms)
    return status.inner_text()


def _upload(page: Page, where: str, path: Path | dict[str, Any]) -> None:
    """Give a file to the page, in place of the one before."""
    chooser = page.locator(f"{where} input[type=file]")
    if not chooser.count():  # a file is there
        page.locator(f"{where} button[aria-label='Clear']").first.click()
    chooser.set_input_files(path)


def test_the_page_in_a_browser(browser: Any, folder: Path, address: str) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.get_by_role("button", name="Reconstruct", exact=True).wait_for()
    _bad_uploads(page, folder)
    _reconstruct_and_cancel(page, folder)
    _generate_from_an_image(page, folder)
    _browse(page)
    _no_file_of_the_disk(page, folder, address)
    hosts = {url.split("/")[2] for url in asked if url.startswith("http")}
    assert hosts == {address.split("/")[2]}  # no font, script or report of another server


def _bad_uploads(page: Page, folder: Path) -> None:
    given = folder / "given"
    for name, message in (
        ("note.txt", "note.txt is not a video that can be read"),
        ("4k.mp4", "4k.mp4 has 3840x2160 pixels, more than the 2.07 million that are allowed"),
        ("empty.mp4", "empty.mp4 is empty"),
    ):
        _upload(page, "#video", given / name)
        _says(page, message)
    _upload(page, "#video", given / "heavy.mp4")
    page.get_by_text(re.compile("exceed the maximum allowed size of 2")).wait_for()
    outside = {"name": "../../../escaped.mp4", "mimeType": "video/mp4", "buffer": (given / "short.mp4").read_bytes()}
    _upload(page, "#video", outside)
    _says(page, "escaped.mp4: 9 frames, 0.38 seconds, 64x48")
    assert all(each.is_relative_to(folder / "out" / "uploads") for each in folder.rglob("*escaped*"))


def _reconstruct_and_cancel(page: Page, folder: Path) -> None:
    """The upload named `../…` is reconstructed; a longer one is cancelled while frames are counted."""
    start = page.get_by_role("button", name="Reconstruct", exact=True)
    page.get_by_label("Shorter side in pixels").click()
    page.get_by_role("option", name="as it is").click()
    start.click()
    assert "Job 1 (reconstruct) is done" in _says(page, JOB_ENDS, JOB_MS)
    assert re.search(r"PSNR\s+\d\d\.\d\d dB", page.locator("#measures").inner_text())
    assert page.locator("video").first.evaluate(
        "v => new Promise(r => v.readyState ? r(1) : v.onloadeddata = () => r(1))"
    )
    made = folder / "out" / "results" / "0001-reconstruct"
    assert SourceVideo(made / "reconstruction.mp4").num_frames == 9
    _upload(page, "#video", folder / "given" / "long.mp4")
    _says(page, "long.mp4: 120 frames")
    page.get_by_label("Decoder steps").first.fill("16")
    start.click()
    _says(page, r"Job 2 \(reconstruct\): frames \d+ of 120", JOB_MS)
    began = time.monotonic()
    page.get_by_role("button", name="Cancel", exact=True).click()
    _says(page, r"Job 2 \(reconstruct\) was cancelled; its files are removed")
    assert time.monotonic() - began < 15
    assert list((folder / "out" / "work").iterdir()) == []
    assert [each.name for each in (folder / "out" / "results").iterdir()] == ["0001-reconstruct"]


def _generate_from_an_image(page: Page, folder: Path) -> None:
    page.get_by_role("tab", name="Generate").click()
    _upload(page, "#image", folder / "given" / "note.txt")
    _says(page, "note.txt is not a picture that can be read")
    _upload(page, "#image", folder / "given" / "first.png")
    _says(page, "first.png: 32x32")
    page.get_by_label("Prompt", exact=True).fill("a red circle moves left")
    page.get_by_role("button", name="Generate", exact=True).click()
    assert "Job 3 (generate) is done" in _says(page, JOB_ENDS, JOB_MS)
    page.locator("#generated video, #generated button").first.wait_for()
    made = folder / "out" / "results" / "0003-generate"
    assert SourceVideo(made / "00000.mp4").num_frames == 5
    record = json.loads((made / "00000.json").read_text())
    assert (record["prompt"], record["given"]["kind"]) == ("a red circle moves left", "image")


def _browse(page: Page) -> None:
    page.get_by_role("tab", name="Runs").click()
    page.get_by_label("Run", exact=True).click()
    page.get_by_role("option", name="tiny_t2v").click()
    page.locator("#curves svg[aria-label='Training loss']").wait_for()


def _no_file_of_the_disk(page: Page, folder: Path, address: str) -> None:
    """Files by their address: what the app made is served; nothing else of this machine is, nor a job at work."""
    made = folder / "out" / "results" / "0001-reconstruct" / "metrics.json"
    assert page.request.get(f"{address}gradio_api/file={made}").ok
    (folder / "out" / "work" / "x.mp4").write_bytes(b"half")
    climbing = folder / "out" / "results" / ".." / ".." / "given" / "first.png"
    for path in ("/etc/passwd", folder / "given" / "first.png", climbing, folder / "out" / "work" / "x.mp4",
                 folder / "runs" / "tiny" / "config.yaml"):  # fmt: skip
        assert page.request.get(f"{address}gradio_api/file={path}").status in (403, 404), path
    (folder / "out" / "work" / "x.mp4").unlink()
