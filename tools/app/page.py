"""The page of `regen app`: three tabs over the job runner and the listing. Holds no logic but that of widgets."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from regen_dist.errors import ConfigError, RegenError
from regen_dist.evaluation.reconstruction_table import RECONSTRUCTION_MEASURES
from regen_dist.tables import Table
from tools.app.runner import Job, JobRunner, checked, shown_name
from tools.app.uploads import (
    Limits,
    ListedModel,
    RunView,
    check_picture,
    check_video,
    choose_model,
    copy_page,
    find_models,
    report_pages,
    run_folders,
    uploaded_file,
    view_run,
)

SHOWN = "shown"  # folder of copies of runs' pictures and report pages
LONGEST_PROMPT = 1000
_POLL_S = 0.3
_SIDES = ["128", "192", "256", "480", "as it is"]
_BOUNDS = {"steps": (1, 100), "frames a second": (1, 120), "samples": (1, 8), "guidance": (0, 30), "seed": (0, 2**31)}
_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_SHOWN_ONLY: dict[str, Any] = {"interactive": False, "buttons": ["download", "fullscreen"]}  # no sharing elsewhere
_CSS = """
:root, .dark { --faint: var(--body-text-color-subdued); --line: var(--border-color-primary); --accent: #3b62d6; }
.banner { padding: .5em .8em; border-radius: 6px; border: 1px solid var(--border-color-primary); }
.banner.error { border-color: #c0392b; color: #c0392b; } .banner.done { border-color: #2c8a4b; }
.banner progress { width: 12em; vertical-align: middle; margin-left: .6em; }
.curves { display: flex; flex-wrap: wrap; gap: 1em; } .curves figure { width: 24em; margin: 0; }
.curves svg { width: 100%; height: auto; } iframe.report { width: 100%; height: 75vh; border: 1px solid #8884; }
"""
# No font of a server elsewhere: the page works without internet.
_THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


@dataclass
class AppState:
    """Settings and the job runner of one app.

    Args:
        runs: folder whose runs and exports are offered.
        runner: the job runner.
        limits: bounds on uploads.
        text: text encoder, if it is not where the caches record it.
        models: models that were found; renewed by `refreshed`.
    """

    runs: Path
    runner: JobRunner
    limits: Limits
    text: str | None = None
    models: list[ListedModel] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.models = find_models(self.runs)

    def refreshed(self, task: str) -> list[str]:
        """Look for models again, and return the names of those of a task."""
        self.models = find_models(self.runs)
        return self.names(task)

    def names(self, task: str) -> list[str]:
        """Names of the models of a task."""
        return [each.name for each in self.models if each.task == task]

    def defaults_of(self, name: str | None) -> tuple[str | None, int, float]:
        """Embedder, sampler steps and guidance that a text-to-video model was trained with. Where its embedder is not
        there, the first one."""
        model = next((each for each in self.models if each.task == "t2v" and each.name == name), None)
        fitting = [each.name for each in self.models if model and each.task == "embedder" and each.run == model.run]
        embedder = next(iter(fitting or self.names("embedder")), None)
        return embedder, model.steps if model else 20, model.guidance if model else 1.0

    def reconstruction(self, file: str | None, model: str, steps: float, fps: float | None, side: str) -> Job:
        """Check the values of the first tab, and start its job. Raises RegenError where one is not allowed."""
        source = uploaded_file(file, self.runner.uploads, self.limits)
        check_video(source, self.limits)
        checked({"steps": steps, "frames a second": fps or None}, _bounds("steps", "frames a second"))
        if side not in _SIDES:
            raise ConfigError(f"the shorter side is {side!r}; choose one of {', '.join(_SIDES)}")
        chosen = choose_model(self.models, model, "embedder")
        request = {
            "model": str(chosen.folder), "steps": int(steps), "fps": float(fps) if fps else None, "seed": 0,
            "short_side": int(side) if side.isdecimal() else None, "max_frames": self.limits.num_frames,
            "max_pixels": self.limits.pixels,
        }  # fmt: skip
        return self.runner.start("reconstruct", request, source)

    def generation(
        self, prompt: str, negative: str, image: str | None, model: str, embedder: str, samples: float, steps: float,
        guidance: float, seed: float | None,
    ) -> Job:  # fmt: skip
        """Check the values of the second tab, and start its job; an empty seed is 0. Raises RegenError where one is not
        allowed."""
        for name, text in (("prompt", prompt), ("negative prompt", negative)):
            if len(text) > LONGEST_PROMPT:
                raise ConfigError(f"the {name} has {len(text)} characters; at most {LONGEST_PROMPT} are allowed")
        if not prompt.strip():
            raise ConfigError("the prompt is empty; describe the video")
        checked({"samples": samples, "steps": steps, "guidance": guidance, "seed": seed},
                _bounds("samples", "steps", "guidance", "seed"))  # fmt: skip
        source = uploaded_file(image, self.runner.uploads, self.limits) if image else None
        if source is not None:
            check_picture(source, self.limits)
        request = {
            "model": str(choose_model(self.models, model, "t2v").folder),
            "embedder": str(choose_model(self.models, embedder, "embedder").folder),
            "prompt": prompt.strip(), "negative": negative.strip() or None, "samples": int(samples),
            "steps": int(steps), "guidance": float(guidance), "seed": int(seed or 0), "text": self.text,
        }  # fmt: skip
        return self.runner.start("generate", request, source)


def _bounds(*names: str) -> dict[str, tuple[float, float]]:
    return {name: _BOUNDS[name] for name in names}


def banner(text: str, kind: str = "") -> str:
    """Line of the page's status; `kind` is "", `error` or `done`."""
    return f'<div class="banner {kind}" role="status">{html.escape(text)}</div>'


def job_banner(job: Job) -> str:
    """Status line of a job."""
    title = f"Job {job.number} ({job.kind})"
    if job.state == "running":
        count = f" {job.done} of {job.total}" if job.total else " …"
        bar = f'<progress value="{job.share:.3f}"></progress>' if job.total else ""
        return f'<div class="banner" role="status">{title}: {html.escape(job.what)}{count}{bar}</div>'
    if job.state == "done":
        return banner(f"{title} is done: {job.folder.name}", "done")
    if job.state == "cancelled":
        return banner(f"{title} was cancelled; its files are removed.")
    return banner(f"{title} failed: {job.message}", "error")


def _followed(
    start: Callable[[], Job], results: Callable[[Path], tuple[Any, ...]], width: int
) -> Iterator[tuple[Any, ...]]:
    """Start a job and yield the status and `width` results until it ends."""
    nothing = (None,) * width
    try:
        job = start()
    except RegenError as error:
        yield banner(str(error), "error"), *nothing
        return
    while not job.ended.wait(_POLL_S):
        yield job_banner(job), *nothing
    yield job_banner(job), *(results(job.folder) if job.state == "done" else nothing)


def reconstruction_results(folder: Path) -> tuple[str, str, str]:
    """Side-by-side video, contact sheet and table of measures of a finished reconstruction."""
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return str(folder / "side_by_side.mp4"), str(folder / "contact_sheet.png"), measures_table(found)


def measures_table(found: Mapping[str, Any]) -> str:
    """Markdown table of the measures of a reconstruction."""
    video = found["video"]
    latent_bytes = found["latent_bits_per_pixel"] * video["frames"] * video["height"] * video["width"] / 8
    values = {
        **{each.title: each.shown(found[each.key]) for each in RECONSTRUCTION_MEASURES},
        "bits of latent per pixel": f"{found['latent_bits_per_pixel']:.3f}, 1:{found['compression']:.0f} of raw RGB",
        "size of the latents": f"{latent_bytes / 1024:.1f} KiB, 16 bits a value",
        "video": f"{video['frames']} frames of {video['width']}x{video['height']}",
        "decoder": found["label"],
    }
    notes = [("note", note) for note in (*video["notes"], *found["notes"])]
    return Table(["measure", "value"], [*values.items(), *notes]).to_markdown()


def build_page(state: AppState) -> gr.Blocks:
    """Build the page with its three tabs."""
    with gr.Blocks(title="REGEN", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        with gr.Row(equal_height=True):
            status = gr.HTML(banner("No job is running."), elem_id="status")
            cancel = gr.Button("Cancel", variant="stop", scale=0, min_width=120)
        with gr.Tab("Reconstruct"):
            _reconstruct_tab(state, status, page)
        with gr.Tab("Generate"):
            _generate_tab(state, status, page)
        with gr.Tab("Runs"):
            _runs_tab(state, page)

        def stop() -> str:
            job = state.runner.cancel()
            return banner("No job is running.") if job is None else job_banner(job)

        def follow() -> Iterator[str]:
            job = state.runner.job
            while job is not None and not job.ended.wait(_POLL_S):
                yield job_banner(job)
            yield banner("No job is running.") if job is None else job_banner(job)

        cancel.click(stop, None, status, concurrency_limit=None, **_QUIET)
        page.load(follow, None, status, concurrency_limit=None, **_QUIET)
    return page


def _reconstruct_tab(state: AppState, status: gr.HTML, page: gr.Blocks) -> None:
    models = state.names("embedder")
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            file = gr.File(label="Video", elem_id="video", height=150)
            gr.Markdown(f"<small>{state.limits.text()}</small>")
            model = gr.Dropdown(models, value=models[0] if models else None, label="Model")
            steps = gr.Slider(1, 16, value=1, step=1, label="Decoder steps")
            fps = gr.Number(value=0, label="Frames a second (0: the source's)")
            side = gr.Dropdown(_SIDES, value="192", label="Shorter side in pixels")
            start = gr.Button("Reconstruct", variant="primary")
        with gr.Column(scale=3):
            video = gr.Video(
                label="Source and reconstruction, side by side", interactive=False, autoplay=True, loop=True
            )
            sheet = gr.Image(label="Frames, reconstruction, and the error", show_label=False, **_SHOWN_ONLY)
            table = gr.Markdown(elem_id="measures")
    page.load(lambda: gr.Dropdown(state.refreshed("embedder")), None, model, **_QUIET)

    def check(path: str | None) -> str:
        try:
            source = uploaded_file(path, state.runner.uploads, state.limits)
            facts = check_video(source, state.limits)
        except RegenError as error:
            return banner(str(error), "error")
        size = f"{facts.num_frames} frames, {facts.seconds:.2f} seconds, {facts.width}x{facts.height}"
        return banner(f"{shown_name(source.name)}: {size}")

    def run(*values: Any) -> Iterator[tuple[Any, ...]]:
        yield from _followed(lambda: state.reconstruction(*values), reconstruction_results, 3)

    file.upload(check, file, status, **_QUIET)
    start.click(
        run, [file, model, steps, fps, side], [status, video, sheet, table],
        concurrency_limit=None, **_QUIET,
    )  # fmt: skip


def _generate_tab(state: AppState, status: gr.HTML, page: gr.Blocks) -> None:
    models, embedders = state.names("t2v"), state.names("embedder")
    first = models[0] if models else None
    own, own_steps, own_guidance = state.defaults_of(first)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            prompt = gr.Textbox(label="Prompt", lines=2, max_length=LONGEST_PROMPT)
            negative = gr.Textbox(label="Negative prompt", max_length=LONGEST_PROMPT)
            image = gr.File(label="First frame (PNG, JPEG, WebP; optional)", elem_id="image", height=150)
            model = gr.Dropdown(models, value=first, label="Text-to-video model")
            embedder = gr.Dropdown(embedders, value=own, label="Its embedder")
            samples = gr.Slider(1, 8, value=1, step=1, label="Samples")
            steps = gr.Slider(1, 100, value=own_steps, step=1, label="Sampler steps")
            guidance = gr.Slider(0, 30, value=own_guidance, step=0.5, label="Guidance (1: none)")
            seed = gr.Number(value=0, precision=0, label="Seed")
            start = gr.Button("Generate", variant="primary")
            if not models:
                gr.Markdown(f"No text-to-video run or export lies under `{state.runs}`.")
        with gr.Column(scale=3):
            videos = gr.Gallery(label="Generated", columns=2, elem_id="generated", **_SHOWN_ONLY)
    page.load(lambda: gr.Dropdown(state.refreshed("t2v")), None, model, **_QUIET)
    page.load(lambda: gr.Dropdown(state.refreshed("embedder")), None, embedder, **_QUIET)

    def results(folder: Path) -> tuple[list[str]]:
        return ([str(each) for each in sorted([*folder.glob("*.mp4"), *folder.glob("*.png")])],)

    def check(path: str | None) -> str:
        try:
            found = uploaded_file(path, state.runner.uploads, state.limits)
            height, width = check_picture(found, state.limits)
        except RegenError as error:
            return banner(str(error), "error")
        return banner(f"{shown_name(found.name)}: {width}x{height}; videos begin with it, cropped to their size")

    def run(*values: Any) -> Iterator[tuple[Any, ...]]:
        yield from _followed(lambda: state.generation(*values), results, 1)

    image.upload(check, image, status, **_QUIET)
    model.change(state.defaults_of, model, [embedder, steps, guidance], **_QUIET)
    start.click(
        run, [prompt, negative, image, model, embedder, samples, steps, guidance, seed], [status, videos],
        concurrency_limit=None, **_QUIET,
    )  # fmt: skip


def _runs_tab(state: AppState, page: gr.Blocks) -> None:
    shown = state.runner.folder / SHOWN
    refresh = gr.Button("Refresh", size="sm")
    table = gr.Dataframe(headers=["run", "state", "step", "of", "loss", "note"], interactive=False, label="Jobs")
    note = gr.HTML()
    with gr.Row():
        run = gr.Dropdown([], label="Run", elem_id="run")
        report = gr.Dropdown([], label="Report page", elem_id="report")
    curves = gr.HTML(elem_id="curves")
    pictures = gr.Gallery(label="Pictures of its validation", columns=1, visible=False, **_SHOWN_ONLY)
    videos = gr.Gallery(label="Videos that it generated", columns=4, visible=False, **_SHOWN_ONLY)
    config = gr.Code(label="config.yaml", language="yaml", visible=False)
    frame = gr.HTML(elem_id="page")

    def lists() -> tuple[Any, ...]:
        rows, text = _job_rows(state.runs)
        runs, pages = list(run_folders(state.runs)), list(report_pages(state.runs))
        return rows, text, gr.Dropdown(runs, value=None), gr.Dropdown(pages, value=None)

    def show(name: str | None) -> tuple[Any, ...]:
        if not name:
            return "", *(gr.update(visible=False),) * 3
        try:
            found = view_run(state.runs, name, shown)
        except (RegenError, OSError) as error:
            return banner(str(error), "error"), *(gr.update(visible=False),) * 3
        return _run_updates(found)

    def open_page(name: str | None) -> str:
        if not name:
            return ""
        try:
            path = copy_page(state.runs, name, shown)
        except (RegenError, OSError) as error:
            return banner(str(error), "error")
        address = html.escape(f"/gradio_api/file={path}")
        link = f'<a href="{address}" target="_blank">open {html.escape(name)} by itself</a>'
        return f'{link}<iframe class="report" src="{address}" title="{html.escape(name)}"></iframe>'

    refresh.click(lists, None, [table, note, run, report], **_QUIET)
    page.load(lists, None, [table, note, run, report], **_QUIET)
    run.change(show, run, [curves, pictures, videos, config], **_QUIET)
    report.change(open_page, report, frame, **_QUIET)


def _job_rows(runs: Path) -> tuple[list[list[Any]], str]:
    """Rows of `regen jobs` for the table, and what could not be found out."""
    from launcher.jobs.table import list_jobs

    try:
        found, problems = list_jobs(runs)
    except RegenError as error:
        return [], banner(str(error), "error")
    rows = [
        [row.run, row.state, row.step, row.steps, None if row.loss is None else f"{row.loss:.4g}", row.note]
        for row in found
    ]
    return rows, "".join(banner(each) for each in problems)


def _run_updates(found: RunView) -> tuple[Any, ...]:
    pictures, videos = ([str(each) for each in media] for media in (found.pictures, found.videos))
    return (
        f'<div class="curves">{found.curves}</div>' if found.curves else banner("This run has no figures yet."),
        gr.update(value=pictures, visible=bool(pictures)),
        gr.update(value=videos, visible=bool(videos)),
        gr.update(value=found.config, visible=bool(found.config)),
    )


def launch(page: gr.Blocks, state: AppState, host: str, port: int) -> str:
    """Serve the page in threads of this process, and return its address.

    Raises:
        ConfigError: the port is taken.
    """
    runner = state.runner
    shown = runner.folder / SHOWN
    shown.mkdir(exist_ok=True)
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, share=False, quiet=True, inbrowser=False, prevent_thread_lock=True,
            ssr_mode=False, footer_links=[], run_history=False, enable_monitoring=False, mcp_server=False, pwa=False,
            allowed_paths=[str(runner.results), str(shown)], blocked_paths=[str(runner.folder / "work")],
            max_file_size=state.limits.num_bytes, show_error=True, strict_cors=True, theme=_THEME, css=_CSS,
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"{host}:{port} cannot be bound ({error}); give another port with --port") from error
    return str(address)
