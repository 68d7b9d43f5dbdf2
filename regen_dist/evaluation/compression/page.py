"""The page of the comparison: one `index.html` that holds all that it shows."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from regen_dist.evaluation.compression.arms import (
    COMPRESSIONS,
    CONTENT_AWARE,
    IN_CONTEXT,
    baseline,
    baseline_with_code,
    regen,
    regen_alone,
)
from regen_dist.evaluation.compression.features import FEATURE, NAME
from regen_dist.evaluation.compression.leads import Facts, margins
from regen_dist.evaluation.compression.measuring import DOUBLE, TRAINED
from regen_dist.evaluation.compression.plots import Plot
from regen_dist.evaluation.compression.tables import MISSED, not_measured, tables
from regen_dist.evaluation.report import PAGE, page_environment, replace_file
from regen_dist.evaluation.sheet import sheet_frames, write_sheet
from regen_dist.inference.frames import Frame

_COLUMNS = 5
_QUALITY = 82  # of WebP


@dataclass(frozen=True)
class Sheet:
    """Frames side by side, as a data URI."""

    title: str
    image: str


def write_page(out: Path, facts: Facts, plots: Sequence[Plot], kept: Mapping[str, Path]) -> Path:
    """Write `index.html` in one move.

    Args:
        out: folder that is there.
        facts: what is in compression.json.
        plots: of it.
        kept: arm to the file with its decoded frames.

    Returns:
        The page's path.
    """
    text = (
        page_environment()
        .get_template("compression.html.j2")
        .render(
            facts=facts, tables=tables(facts), margins=margins(facts), missed=MISSED, plots=plots,
            sheets=_sheets(facts, kept), not_measured=not_measured(facts), frechet=f"{NAME}: {FEATURE}",
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )  # fmt: skip
    replace_file(out / PAGE, lambda file: file.write_text(text, encoding="utf-8"))
    return out / PAGE


def _sheets(facts: Facts, kept: Mapping[str, Path]) -> list[Sheet]:
    """Of each k both kinds, with and without the linear code, on the same clips; then both ways of conditioning at
    twice the resolution."""
    kinds = (baseline, regen_alone, baseline_with_code, regen)
    wanted = [(tuple(arm(k).name for arm in kinds), TRAINED, f"k = {k}") for k in COMPRESSIONS]
    wanted.append(((IN_CONTEXT, CONTENT_AWARE), DOUBLE, "twice the training resolution"))
    found = []
    for arms, size, title in wanted:
        frames = {name: _frames(kept[name], size) for name in arms if name in kept}
        labels = {name: facts["arms"][name]["label"] for name in frames}
        for place in sorted(set.intersection(*map(set, frames.values()))) if frames else ():
            found.append(_sheet(f"{title}: {_stretch(facts, place)}", {labels[n]: frames[n][place] for n in frames}))
    return found


def _frames(kept: Path, size: str) -> dict[int, dict[str, Frame]]:
    """By the stretch's number: `source` and `made`."""
    found: dict[int, dict[str, Frame]] = {}
    with np.load(kept, allow_pickle=False) as arrays:
        for name in arrays.files:
            of, place, part = name.split("/")
            if of == size:
                found.setdefault(int(place), {})[part] = arrays[name]
    return found


def _stretch(facts: Facts, place: int) -> str:
    stretch: Mapping[str, Any] = facts["tests"]["stretches"][place]
    return f"{stretch['video']}, from frame {stretch['first']}"


def _sheet(title: str, arms: Mapping[str, Mapping[str, Frame]]) -> Sheet:
    """The source, then what each arm made of it; arms of one k, so of the same frames."""
    source = next(iter(arms.values()))["source"]
    numbers = sheet_frames(len(source), _COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sheet.png"
        made = {label: [each["made"][n] for n in numbers] for label, each in arms.items()}
        write_sheet(path, numbers, [source[n] for n in numbers], made, errors=False)
        return Sheet(title, _data_uri(path))


def _data_uri(path: Path) -> str:
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.save(buffer, "WEBP", quality=_QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
