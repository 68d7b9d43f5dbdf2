"""The page of a run: `index.html` with the table, the videos, the contact sheets and the training curves.

The folder holds all that it shows and refers to nothing outside, so it can be moved, zipped or served as it is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import jinja2

from regen_dist.errors import DataError
from regen_dist.evaluation.curves import draw_curves
from regen_dist.evaluation.reconstruction import METRICS, RECONSTRUCTION, SHEET, SIDE_BY_SIDE
from regen_dist.observe.record import read_record

PAGE, MEDIA, TEMPLATES = "index.html", "media", Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Row:
    """One line of the table: a decoder and how well it did. `trained` tells ours from the trivial ones."""

    label: str
    trained: bool
    psnr_db: float
    ssim: float | None
    vmaf: float | None


@dataclass(frozen=True)
class _Shown:
    """One reconstruction on the page, with links relative to it."""

    label: str
    metrics: Mapping[str, Any]
    side_by_side: str
    reconstruction: str
    sheet: str


def read_metrics(folder: Path) -> dict[str, Any]:
    """What `regen reconstruct` wrote into a folder. Raises DataError when it is not complete."""
    missing = [name for name in (METRICS, SIDE_BY_SIDE, RECONSTRUCTION, SHEET) if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)}: run `regen reconstruct … --out {folder}` again")
    found: dict[str, Any] = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    return found


def comparison(reports: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows of the table: every reconstruction, then the trivial decoders of the first report that measured them."""
    rows = [Row(report["label"], True, report["psnr_db"], report["ssim"], report["vmaf"]) for report in reports]
    trivial: Mapping[str, Any] = next((report["trivial"] for report in reports if "trivial" in report), {})
    return rows + [Row(r["label"], False, r["psnr_db"], r["ssim"], r["vmaf"]) for r in trivial.values()]


def write_report(out: Path, *, title: str, run: Path, reconstructions: Sequence[Path]) -> Path:
    """Write the page; `index.html` comes last and in one move.

    Args:
        out: folder, made if need be; what is in it under the same names is replaced.
        title: of the page.
        run: run folder, for the curves and the config; what it lacks is left out.
        reconstructions: folders that `regen reconstruct` wrote, at least one.

    Returns:
        The page's path.

    Raises:
        DataError: a reconstruction is not complete, or there is none.
    """
    if not reconstructions:
        raise DataError("a report needs at least one folder that `regen reconstruct` wrote")
    reports = [read_metrics(folder) for folder in reconstructions]
    (out / MEDIA).mkdir(parents=True, exist_ok=True)
    shown = [_show(folder, report, out) for folder, report in zip(reconstructions, reports, strict=True)]
    record = run / "metrics.jsonl"
    config = run / "config.yaml"
    page = (
        page_environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            rows=comparison(reports),
            first=reports[0],
            shown=shown,
            curves=draw_curves(read_record(record)) if record.is_file() else [],
            config=config.read_text(encoding="utf-8") if config.is_file() else "",
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )
    replace_file(out / PAGE, lambda file: file.write_text(page, encoding="utf-8"))
    return out / PAGE


def _show(folder: Path, report: Mapping[str, Any], out: Path) -> _Shown:
    """Copy what a reconstruction shows into the report's own folder."""
    links = {}
    for name in (SIDE_BY_SIDE, RECONSTRUCTION, SHEET):
        target = out / MEDIA / f"{folder.name}_{name}"
        replace_file(target, partial(shutil.copyfile, folder / name))
        links[name] = f"{MEDIA}/{target.name}"
    return _Shown(report["label"], report, links[SIDE_BY_SIDE], links[RECONSTRUCTION], links[SHEET])


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under another name, then move it into place."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def page_environment() -> jinja2.Environment:
    """Templates of pages: what they show is escaped, and what they miss is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["figure"] = _figure
    return environment


def _figure(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
