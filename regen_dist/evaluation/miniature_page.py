"""Page of the miniature: one self-contained index.html, which can be sent and kept as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from regen_dist.data.synthetic.shapes import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    Attributes,
    parse_caption,
)
from regen_dist.evaluation.miniature_scores import (
    ATTRIBUTES,
    MEASURES,
    NOTHING,
    TARGETS,
    WRONG_CAPTIONS,
    Confusion,
    ScoredVideos,
)
from regen_dist.evaluation.report import PAGE, Curve, draw_curves, page_environment, replace_file
from regen_dist.evaluation.shapes import Reading
from regen_dist.observe.record import read_record

_VALUES = {"colour": tuple(COLOURS), "shape": tuple(SHAPES), "direction": tuple(DIRECTIONS)}


@dataclass(frozen=True)
class _Cell:
    """A share with its interval, as displayed; `met` says whether it reaches its target, where there is one."""

    share: str
    low: str
    high: str
    met: bool | None


@dataclass(frozen=True)
class _ScoreRow:
    """An arm in the table."""

    name: str
    main: bool
    number: int
    cells: list[_Cell]


@dataclass(frozen=True)
class _ShownSample:
    """A video on the page: its data URI, and the words of its reading, each with whether it is right."""

    arm: str
    image: str
    words: list[tuple[str, bool]]


@dataclass(frozen=True)
class _Grid:
    """Confusion table: `rows` hold the wanted value and, for each column, count and share of the row."""

    attribute: str
    columns: tuple[str, ...]
    rows: list[tuple[str, list[tuple[int, float]]]]


def write_page(
    out: Path,
    report: Mapping[str, Any],
    arms: Sequence[ScoredVideos],
    captions: Sequence[str],
    runs: Mapping[str, Path],
) -> Path:
    """Write `index.html` in one move.

    Args:
        out: existing folder.
        report: content of scores.json.
        arms: the arms after reading, with the videos of `captions`.
        captions: captions whose videos are shown.
        runs: name to run folder, for the curves; curves that a run lacks are left out.

    Returns:
        The page's path.
    """
    rows = [_row(arm, report) for arm in arms]
    text = (
        page_environment()
        .get_template("miniature.html.j2")
        .render(
            report=report,
            measures=MEASURES,
            targets={name: f"{target:.0%}" for name, target in TARGETS.items()},
            rows=rows,
            main=next((row for row in rows if row.main), None),
            gallery=[(caption, _videos(arms, caption)) for caption in captions],
            curves={name: found for name, run in runs.items() if (found := _curves(run))},
            grids={
                arm.name: [_grid(name, confusion) for name, confusion in arm.confusions.items()]
                for arm in arms
                if arm.name != WRONG_CAPTIONS
            },
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )
    replace_file(out / PAGE, lambda file: file.write_text(text, encoding="utf-8"))
    return out / PAGE


def _row(arm: ScoredVideos, report: Mapping[str, Any]) -> _ScoreRow:
    main, scores = arm.name == report["targets_are_for"], arm.scores
    cells = []
    for name in MEASURES:
        low, high = (f"{100 * end:.0f}" for end in scores[name].interval())
        met = scores[name].value >= TARGETS[name] if main else None
        cells.append(_Cell(f"{scores[name].value:.1%}", low, high, met))
    return _ScoreRow(arm.name, main, len(arm.videos), cells)


def _videos(arms: Sequence[ScoredVideos], caption: str) -> list[_ShownSample]:
    """Video of each arm for a caption; arms without one are left out."""
    wanted, found = parse_caption(caption), []
    for arm in arms:
        reading = arm.reading_of(caption)
        if reading is not None and caption in arm.previews:
            found.append(_ShownSample(arm.name, arm.previews[caption], _words(reading, wanted)))
    return found


def _words(reading: Reading, wanted: Attributes) -> list[tuple[str, bool]]:
    if reading == (None, None, None):
        return [(NOTHING, False)]
    read = {name: getattr(reading, name) for name in ATTRIBUTES}
    return [(word or f"no {name}", word == getattr(wanted, name)) for name, word in read.items()]


def _curves(run: Path) -> list[Curve]:
    record = run / "metrics.jsonl"
    return draw_curves(read_record(record)) if record.is_file() else []


def _grid(attribute: str, confusion: Confusion) -> _Grid:
    values = _VALUES[attribute]
    columns = (*values, NOTHING)
    rows = []
    for wanted in values:
        counts = confusion.get(wanted, {})
        total = max(1, sum(counts.values()))
        rows.append((wanted, [(counts.get(read, 0), counts.get(read, 0) / total) for read in columns]))
    return _Grid(attribute, columns, rows)
