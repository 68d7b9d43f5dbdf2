"""The figures of `regen bench codec` as Markdown tables.

Behind each figure, in parentheses, how many times as much it is as that of this project's fast codec at the same
temporal compression and size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from regen_dist.evaluation.codec_cost.systems import REFERENCES

DECODER_TARGET = 3e12  # operations of a step of the fast preset at `TARGET_SIZE`
TARGET_SIZE = [17, 256, 256]
_COSMOS = "AutoencoderKLCosmos"
_HEAD = [
    "| codec | k | latents | bits per pixel | parameters | encode FLOP | decode FLOP | encode s | decode s | "
    "encode memory | decode memory | |",
    "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
]
_SLOPES = ["| codec | from | to | pixels | encode s | decode s | encode memory | decode memory |"]
_SLOPES += ["| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"]
_TARGETS = ["| target | figure | limit | met |", "| --- | ---: | ---: | --- |"]
Row = Mapping[str, Any]
Figure = Callable[[Row], float | None]


def _seconds(call: str) -> Figure:
    return lambda row: row[call]["cpu_s"]["median"] if call in row else None


def _memory(call: str) -> Figure:
    return lambda row: row[call]["peak_bytes"] if call in row else None


def _counted(name: str) -> Figure:
    return lambda row: row.get(name)


def _tera(value: float) -> str:
    return f"{value / 1e12:.3g} T"


_FIGURES: list[tuple[Figure, Callable[[float], str]]] = [  # of a row, in the order of the table
    (_counted("parameters"), lambda value: f"{value / 1e6:.1f} M"),
    (_counted("encode_flops"), _tera),
    (_counted("decode_flops"), _tera),
    (_seconds("encode"), lambda value: f"{value:.2f}"),
    (_seconds("decode"), lambda value: f"{value:.2f}"),
    (_memory("encode"), lambda value: f"{value / 1e6:.0f} MB"),
    (_memory("decode"), lambda value: f"{value / 1e6:.0f} MB"),
]
_RUN = 3  # the first of them that is had by running


def table(facts: Mapping[str, Any]) -> str:
    """Targets, sizes, slopes."""
    rows = facts["rows"]
    parts = [_targets(rows)]
    parts += [_size_table(rows, size) for size in _sizes(rows)]
    return "\n\n".join([*("\n".join(part) for part in parts), "\n".join(_slopes(rows))]) + "\n"


def figures(facts: Mapping[str, Any]) -> dict[str, float]:
    """What is compared from run to run: CPU seconds of this project's codecs."""
    found = {}
    for row in facts["rows"]:
        for call in ("encode", "decode"):
            if row["own"] and call in row:
                found[f"{row['system']} {_named(row)} {call}_cpu_s"] = row[call]["cpu_s"]["median"]
    return found


def targets(rows: Sequence[Row]) -> Iterator[tuple[str, float, float]]:
    """What was to be reached: what it is, the figure, and the most that it may be; without those that were not had."""
    for row in rows:
        if row["size"] == TARGET_SIZE and row["system"] in REFERENCES.values() and "decode_flops" in row:
            what = f"{row['system']}: TFLOP of a decoder step at 17x256x256"
            yield what, row["decode_flops"] / 1e12, DECODER_TARGET / 1e12
    for row in rows:
        if row["system"].startswith(_COSMOS):
            yield from _encoders(row, _reference(rows, row))


def _encoders(cosmos: Row, own: Row | None) -> Iterator[tuple[str, float, float]]:
    """Our encoder beside Cosmos' at one size."""
    for name, of in (("FLOP", _counted("encode_flops")), ("CPU seconds", _seconds("encode"))):
        if own is not None and (ours := of(own)) is not None and (theirs := of(cosmos)):
            size = "x".join(map(str, own["size"]))
            yield (
                f"{own['system']}: {name} of the encoder at {size}, of those of {cosmos['system']}",
                ours / theirs,
                1.0,
            )


def _targets(rows: Sequence[Row]) -> list[str]:
    found = []
    for what, figure, most in targets(rows):
        found.append(f"| {what} | {figure:.2f} | ≤ {most:g} | {'yes' if figure <= most else '**no**'} |")
    return [*_TARGETS, *found]


def _sizes(rows: Sequence[Row]) -> list[list[int]]:
    return [list(size) for size in dict.fromkeys(tuple(row["size"]) for row in rows)]


def _size_table(rows: Sequence[Row], size: list[int]) -> list[str]:
    own = [row for row in rows if row["size"] == size]
    title = f"**{size[0]} frames of {size[1]}x{size[2]}**"
    if not any("encode" in row for row in own):
        title += " (counted, not run)"
    return [title, "", *_HEAD, *(_line(row, _reference(rows, row)) for row in own)]


def _line(row: Row, reference: Row | None) -> str:
    cells = [row["system"], str(row["temporal_compression"]), _latents(row)]
    cells.append(f"{row['bits_per_pixel']:.3g}" if "bits_per_pixel" in row else "")
    for of, shown in _FIGURES:
        cells.append(_cell(of(row), None if reference is None or reference is row else of(reference), shown))
    cells.append(_plain(row.get("problem") or row.get("not_counted") or ""))
    return f"| {' | '.join(cells)} |"


def _cell(figure: float | None, reference: float | None, shown: Callable[[float], str]) -> str:
    if figure is None:
        return "–"
    return shown(figure) + (f" ({figure / reference:.2g}×)" if reference else "")


def _latents(row: Row) -> str:
    shapes = row.get("latents", ())
    return " + ".join("x".join(map(str, shape)) for shape in shapes) or "–"


def _named(row: Row) -> str:
    return "x".join(map(str, row["size"]))


def _plain(text: str) -> str:
    return text.replace("|", "/")


def _reference(rows: Sequence[Row], row: Row) -> Row | None:
    """Our fast codec at the row's temporal compression and size."""
    wanted = REFERENCES.get(row["temporal_compression"])
    return next((each for each in rows if each["system"] == wanted and each["size"] == row["size"]), None)


def _slopes(rows: Sequence[Row]) -> list[str]:
    """How many times as much the largest size takes as the smallest, and as many frames of the smallest sides."""
    found = [*_SLOPES]
    for name in dict.fromkeys(row["system"] for row in rows):
        run = sorted((row for row in rows if row["system"] == name and "decode" in row), key=_pixels)
        for row in run[1:]:
            ratios = (_ratio(of(row), of(run[0])) for of, _ in _FIGURES[_RUN:])
            sizes = ("x".join(map(str, each["size"])) for each in (run[0], row))
            found.append(
                f"| {name} | {' | '.join(sizes)} | {_pixels(row) / _pixels(run[0]):.2f}× | {' | '.join(ratios)} |"
            )
    return found


def _ratio(figure: float | None, of: float | None) -> str:
    return f"{figure / of:.2f}×" if figure and of else "–"


def _pixels(row: Row) -> int:
    frames, height, width = row["size"]
    return int(frames * height * width)
