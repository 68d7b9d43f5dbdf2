"""The page of an evaluation: table with intervals, videos that play in step, curves of each frame, worst frames first.

One HTML file beside a folder of media; nothing is fetched from elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from regen_dist.evaluation.evaluate import MEASURES, MEDIA, why_missing
from regen_dist.evaluation.reconstruction_table import Measure
from regen_dist.evaluation.report import PAGE, page_environment, replace_file
from regen_dist.jsontext import json_text
from regen_dist.tables import Table, counted, numbers

JSON = "evaluation.json"
_WORST_SHOWN = 24
_COSTS = (
    ("parameters", "Parameters, millions", 1e-6, 2),
    ("encode_flops_per_frame", "Encoding, GFLOPs a frame", 1e-9, 2),
    ("decode_flops_per_frame", "Decoding, GFLOPs a frame", 1e-9, 2),
    ("working_memory_bytes", "Working memory beside the weights, MiB", 2.0**-20, 0),
)
MeasureRows = list[tuple[str, list[str], list[bool]]]  # title, a cell for each model, whether it is the best


def table(facts: Mapping[str, Any]) -> MeasureRows:
    """Rows of measures and costs, with a cell for each model: the mean, and the interval's half width if known."""
    rows: MeasureRows = []
    for measure in MEASURES:
        found = [model["summary"][measure.key] for model in facts["models"]]
        if any(each["mean"] is not None for each in found):
            rows.append((measure.title, [_cell(each, measure.digits) for each in found], _best(found, measure)))
    for key, title, scale, digits in _COSTS:
        values = [model["costs"][key] for model in facts["models"]]
        cells = ["–" if value is None else f"{value * scale:.{digits}f}" for value in values]
        rows.append((title, cells, [False] * len(cells)))
    return rows


def _cell(found: Mapping[str, Any], digits: int) -> str:
    if found["mean"] is None:
        return "–"
    text = f"{found['mean']:.{digits}f}"
    if found["low"] is None:
        return text
    return f"{text} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def _best(found: list[Mapping[str, Any]], measure: Measure) -> list[bool]:
    values = [each["mean"] * measure.better for each in found if each["mean"] is not None]
    return [bool(measure.better) and each["mean"] is not None and each["mean"] * measure.better == max(values)
            for each in found]  # fmt: skip


def markdown(facts: Mapping[str, Any]) -> str:
    """The table and the protocol's hashes as text."""
    labels = [model["label"] for model in facts["models"]]
    rows = [(title, *cells) for title, cells, _ in table(facts)]
    lines = [*identity(facts), *(f"- {line}" for line in why_missing(facts))]
    return Table(["measure", *numbers(*labels)], rows, note="\n".join(lines)).to_markdown()


def identity(facts: Mapping[str, Any]) -> list[str]:
    """Lines to compare between two evaluations: protocol, source frames, weights."""
    videos, frames = len(facts["videos"]), sum(video["frames"] for video in facts["videos"])
    lines = [
        f"- protocol {facts['protocol']['name']}: hash {facts['protocol_hash']}",
        f"- source frames: hash {facts['source_hash']}, {counted(frames, 'frame')} of {counted(videos, 'video')}",
    ]
    return lines + [f"- weights of {key}: {name}" for key, name in facts["weights"].items() if name]


def write_page(out: Path, facts: Mapping[str, Any]) -> Path:
    """Write the JSON, then the page in one move; returns the page's path."""
    replace_file(out / JSON, lambda file: file.write_text(json_text(facts, indent=1) + "\n", encoding="utf-8"))
    worst = sorted(
        (
            {"model": number, "video": index, **frame}
            for number, model in enumerate(facts["models"])
            for index, video in enumerate(model["videos"])
            for frame in video["worst"]
        ),
        key=lambda frame: frame["psnr_db"],
    )
    page = (
        page_environment()
        .get_template("evaluate.html.j2")
        .render(
            facts=facts, rows=table(facts), missing=why_missing(facts), identity=identity(facts),
            worst=[frame for model in range(len(facts["models"]))
                   for frame in [each for each in worst if each["model"] == model][:_WORST_SHOWN]],
            data=_embedded(facts),
        )
    )  # fmt: skip
    replace_file(out / PAGE, lambda file: file.write_text(page, encoding="utf-8"))
    return out / PAGE


def _embedded(facts: Mapping[str, Any]) -> Markup:
    """Data for the page's script, safe inside a script element."""
    videos = [
        {
            "name": video["name"], "frames": video["frames"], "fps": video["fps"],
            "size": [video["width"], video["height"]], "source": f"{MEDIA}/source/{quote(video['name'])}.mp4",
            "models": [
                {
                    "file": f"{MEDIA}/{quote(model['name'])}/{quote(video['name'])}.mp4",
                    "curves": model["videos"][number]["curves"],
                }
                for model in facts["models"]
            ],
        }
        for number, video in enumerate(facts["videos"])
    ]  # fmt: skip
    titles = {measure.key: measure.title for measure in MEASURES}
    text = json_text({"videos": videos, "models": [model["label"] for model in facts["models"]], "titles": titles})
    return Markup(text.replace("<", "\\u003c"))  # JSON without any tag
