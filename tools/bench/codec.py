"""`regen bench codec`: cost of encoding and decoding, compared with other video codecs."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import typer

from launcher.supervise import die_with
from regen_dist.jsontext import json_text
from regen_dist.observe.hardware import forget_peak, process_memory_bytes
from regen_dist.programs import python
from regen_dist.tables import Column, Table, numbers
from tools import stages
from tools.bench.codec_systems import (
    CONFIGS,
    DTYPES,
    REFERENCES,
    ClipSize,
    Coder,
    System,
    check_frames,
    chosen_systems,
    named_system,
    own_config,
    parse_size,
)
from tools.bench.common import Figure, opening_facts, spread, write_record
from tools.shards.progress import stopping_cleanly

_SIZES = ["17x64x64", "33x64x64", "17x128x128"]
_COUNTED = ["17x256x256", "33x512x512"]


def codec(
    out: Annotated[Path, typer.Option(help="Folder of the JSON and the table.")] = Path("runs/bench/codec"),
    size: Annotated[
        list[str] | None,
        typer.Option(help=f"A clip that passes through, FRAMESxHEIGHTxWIDTH; several times. [{', '.join(_SIZES)}]"),
    ] = None,
    counted: Annotated[
        list[str] | None,
        typer.Option(help=f"A clip whose operations are counted without running it. [{', '.join(_COUNTED)}]"),
    ] = None,
    systems: Annotated[str, typer.Option(help="Regular expression: the codecs that take part.")] = ".",
    repeats: Annotated[int, typer.Option(help="Passes of each that are timed, after a first.", min=0)] = 2,
    rounds: Annotated[int, typer.Option(help="How often all of it is done, by new processes.", min=1)] = 1,
    threads: Annotated[int, typer.Option(help="Of every codec.", min=1)] = 1,
    limit_seconds: Annotated[float, typer.Option(help="Of one codec at one size, loading included.", min=1.0)] = 300.0,
    limit_gib: Annotated[float, typer.Option(help="Of memory that one codec may take.", min=0.5)] = 12.0,
    packages: Annotated[
        Path | None,
        typer.Option(
            help="Folder with packages that are not installed, such as magvit2-pytorch.", exists=True, file_okay=False
        ),
    ] = None,
) -> None:
    """Measure the cost of encoding and decoding the same clip: this project's codecs (full, fast, nano), those of
    diffusers and magvit2-pytorch, with random weights, one process each. A codec that is not installed or exceeds the
    limits gets a row with the reason.

    Example: regen bench codec --size 17x64x64 --systems 'fast|Cosmos'
    """
    from rich.console import Console

    from regen_dist.config import config_hash

    console, found = Console(stderr=True), chosen_systems(systems)
    run, count = ([parse_size(text) for text in texts] for texts in (size or _SIZES, counted or _COUNTED))
    more = str(packages.resolve()) if packages else ""
    limits = CodecLimits(limit_seconds, limit_gib, threads, repeats, stages.working_precision(), more)
    own = [each.name for each in found if each.is_own]
    facts = opening_facts() | {"versions": _versions(packages), "precision": limits.precision, "rounds": rounds}
    facts |= {"threads": threads, "repeats": repeats, "limit_seconds": limit_seconds, "limit_gib": limit_gib}
    facts["config_hashes"] = {name: config_hash(own_config(CONFIGS / f"{name}.yaml", "fp32")) for name in own}
    out.mkdir(parents=True, exist_ok=True)
    with stopping_cleanly(continues=False):
        facts["rows"] = measure_all(found, run, count, limits, rounds=rounds, report_progress=console.print)
    write_record(out, "codec", facts, table(facts))


def _versions(packages: Path | None) -> dict[str, str]:
    """Return the versions of the packages compared with."""
    from importlib.metadata import distributions

    places = [*sys.path, *([str(packages)] if packages else [])]
    found = {each.metadata["Name"]: each.version for each in distributions(path=places)}
    return {name: found.get(name, "not installed") for name in ("diffusers", "magvit2-pytorch")}


# Figures of `regen bench codec` as Markdown tables.
#
# Behind each figure, in parentheses, how many times as much it is as that of this project's fast codec at the same
# temporal compression and size.

DECODER_TARGET = 3e12  # operations of a step of the fast preset at `TARGET_SIZE`
TARGET_SIZE = [17, 256, 256]
_COSMOS = "AutoencoderKLCosmos"
_HEAD: list[Column | str] = [
    "codec", *numbers("k"), "latents",
    *numbers("bits per pixel", "parameters", "encode FLOP", "decode FLOP", "encode s", "decode s", "encode memory",
             "decode memory"),
    "",
]  # fmt: skip
_SLOPES: list[Column | str] = [
    "codec",
    "from",
    "to",
    *numbers("pixels", "encode s", "decode s", "encode memory", "decode memory"),
]
Row = Mapping[str, Any]
Format = Callable[[float], str]
_TERA: Format = lambda value: f"{value / 1e12:.3g} T"  # noqa: E731
_SECONDS: Format = lambda value: f"{value:.2f}"  # noqa: E731
_MEGABYTES: Format = lambda value: f"{value / 1e6:.0f} MB"  # noqa: E731
_FIGURES: list[tuple[tuple[str, ...], Format]] = [  # keys of a row that lead to each, in the order of the table
    (("parameters",), lambda value: f"{value / 1e6:.1f} M"),
    (("encode_flops",), _TERA),
    (("decode_flops",), _TERA),
    (("encode", "cpu_s", "median"), _SECONDS),
    (("decode", "cpu_s", "median"), _SECONDS),
    (("encode", "peak_bytes"), _MEGABYTES),
    (("decode", "peak_bytes"), _MEGABYTES),
]
_RUN = 3  # the first of them that is had by running


def _value(row: Row, keys: Sequence[str]) -> float | None:
    """Return the figure of a row at the end of these keys; None where it has none."""
    found: Any = row
    for key in keys:
        found = None if found is None else found.get(key)
    return None if found is None else float(found)


def table(facts: Mapping[str, Any]) -> str:
    """Format targets, sizes and slopes."""
    rows = facts["rows"]
    met = [
        (what, f"{figure:.2f}", f"≤ {most:g}", "yes" if figure <= most else "**no**")
        for what, figure, most in targets(rows)
    ]
    sizes = [list(size) for size in dict.fromkeys(tuple(row["size"]) for row in rows)]
    heading = Table(["target", *numbers("figure", "limit"), "met"], met).to_markdown()
    return "\n".join([heading, *(_size_table(rows, size) for size in sizes), _slopes(rows)])


def codec_figures(facts: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield the figures by which two records are compared: CPU seconds of this project's codecs."""
    for row in facts["rows"]:
        for call in _CALLS:
            if row["own"] and call in row:
                yield Figure(f"{row['system']} {_named(row)} {call}_cpu_s", row[call]["cpu_s"]["median"], False)


def targets(rows: Sequence[Row]) -> Iterator[tuple[str, float, float]]:
    """Yield each target: name, figure and upper limit; without those that were not measured."""
    for row in rows:
        if row["size"] == TARGET_SIZE and row["system"] in REFERENCES.values() and "decode_flops" in row:
            what = f"{row['system']}: TFLOP of a decoder step at 17x256x256"
            yield what, row["decode_flops"] / 1e12, DECODER_TARGET / 1e12
    for row in rows:
        own = _reference(rows, row) if row["system"].startswith(_COSMOS) else None
        for name, keys in (("FLOP", ("encode_flops",)), ("CPU seconds", ("encode", "cpu_s", "median"))):
            if own is not None and (ours := _value(own, keys)) is not None and (theirs := _value(row, keys)):
                what = f"{own['system']}: {name} of the encoder at {_named(own)}, of those of {row['system']}"
                yield what, ours / theirs, 1.0


def _size_table(rows: Sequence[Row], size: list[int]) -> str:
    own = [row for row in rows if row["size"] == size]
    title = f"**{size[0]} frames of {size[1]}x{size[2]}**"
    if not any("encode" in row for row in own):
        title += " (counted, not run)"
    return f"{title}\n\n" + Table(_HEAD, [_line(row, _reference(rows, row)) for row in own]).to_markdown()


def _line(row: Row, reference: Row | None) -> list[str]:
    latents = " + ".join("x".join(map(str, shape)) for shape in row.get("latents", ())) or "–"
    cells = [row["system"], str(row["temporal_compression"]), latents]
    cells.append(f"{row['bits_per_pixel']:.3g}" if "bits_per_pixel" in row else "")
    for keys, format_figure in _FIGURES:
        figure, ours = _value(row, keys), None if reference in (None, row) else _value(reference or {}, keys)
        relative = f" ({figure / ours:.2g}×)" if figure is not None and ours else ""
        cells.append("–" if figure is None else format_figure(figure) + relative)
    return [*cells, row.get("problem") or row.get("not_counted") or ""]


def _named(row: Row) -> str:
    return "x".join(map(str, row["size"]))


def _reference(rows: Sequence[Row], row: Row) -> Row | None:
    """Return our fast codec at the row's temporal compression and size."""
    wanted = REFERENCES.get(row["temporal_compression"])
    return next((each for each in rows if each["system"] == wanted and each["size"] == row["size"]), None)


def _slopes(rows: Sequence[Row]) -> str:
    """Return the cost of the largest size relative to the smallest, and to as many frames of the smallest size."""
    found = []
    for name in dict.fromkeys(row["system"] for row in rows):
        run = sorted((row for row in rows if row["system"] == name and "decode" in row), key=_pixels)
        for row in run[1:]:
            pairs = [(_value(row, keys), _value(run[0], keys)) for keys, _ in _FIGURES[_RUN:]]
            ratios = (f"{figure / smallest:.2f}×" if figure and smallest else "–" for figure, smallest in pairs)
            found.append((name, _named(run[0]), _named(row), f"{_pixels(row) / _pixels(run[0]):.2f}×", *ratios))
    return Table(_SLOPES, found).to_markdown()


def _pixels(row: Row) -> int:
    return prod(row["size"])


# One codec at one size per process, so that its memory can be measured.
#
#     python -m tools.bench.codec '{"do": "measure", "system": "nano", "sizes": ["17x64x64"]}'
#
# Each result is printed immediately, one JSON object per line, so that a killed process loses only what
# follows.

_AGAIN_WITHIN_S = 30.0  # a pass that takes longer needs no second: what is done once weighs little in it


class CodecJob(NamedTuple):
    """Job of one process.

    Args:
        do: "measure" or "count".
        system: name of the codec.
        sizes: sizes of the clips; a single one for "measure".
        precision: "fp32" or "bf16".
        threads: threads of torch.
        repeats: timed passes, after one warm-up.
        limit_bytes: memory limit; 0: none.
        packages: folder with packages that are not installed, or "".
    """

    do: str
    system: str
    sizes: list[str]
    precision: str = "fp32"
    threads: int = 1
    repeats: int = 2
    limit_bytes: int = 0
    packages: str = ""


class Spent(NamedTuple):
    """Cost of one call: wall and CPU seconds, and additional bytes of memory."""

    wall_s: float
    cpu_s: float
    peak_bytes: int


def main(arguments: list[str]) -> None:
    """Run the job described by the first argument and print its results."""
    job = CodecJob(**json.loads(arguments[0]))
    if job.packages:
        sys.path.append(job.packages)
    if job.limit_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (job.limit_bytes, job.limit_bytes))
    torch.set_num_threads(job.threads)
    system = named_system(job.system)
    for size in map(parse_size, job.sizes):
        try:
            if job.do == "count":
                print_result(size=str(size), counted=system.count(size).facts(size))
            else:
                measure(system, size, job)
        except ImportError as error:
            print_result(size=str(size), problem=f"not installed: {system.needs or error.name} ({error})")
        except Exception as error:  # noqa: BLE001 - any error is the codec's result in the table
            print_result(size=str(size), problem=reason(error))


def print_result(**facts: Any) -> None:
    """Print one result as a line of JSON, for the parent process."""
    sys.stdout.write(json_text(facts) + "\n")
    sys.stdout.flush()


def reason(error: Exception) -> str:
    """Return the first line of a codec's error message, at most 160 characters."""
    text = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return "out of the memory that is allowed"
    return f"{type(error).__name__}: {text}"[:160]


def measure(system: System, size: ClipSize, job: CodecJob) -> None:
    """Encode and decode in turn; print the cost of every call."""
    begun = time.perf_counter()
    coder = system.coder(job.precision)
    video = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    video = video if system.is_own else video.to(DTYPES[job.precision])
    base = process_memory_bytes("VmRSS")
    print_result(built_s=time.perf_counter() - begun, base_bytes=base)
    with torch.no_grad():
        for number in range(1 + job.repeats):
            spent_s = one_pass(coder, video, base, number)
            if number == 0 and spent_s > _AGAIN_WITHIN_S:
                break


def one_pass(coder: Coder, video: torch.Tensor, base: int, number: int) -> float:
    """Encode and decode once; returns the seconds of both."""
    latents, encoding = spent(lambda: coder.encode(video), base)
    print_result(encode=encoding._asdict(), number=number)
    frames, decoding = spent(lambda: coder.decode(latents), base)
    check_frames(frames, video.shape[2])
    print_result(decode=decoding._asdict(), number=number)
    return encoding.wall_s + decoding.wall_s


def spent(call: Callable[[], Any], base: int) -> tuple[Any, Spent]:
    """Return a call's result and its cost."""
    forget_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return result, Spent(wall, cpu, max(process_memory_bytes("VmHWM") - base, 0))


if __name__ == "__main__":
    main(sys.argv[1:])


# Every codec at every size, each in a process of its own, in turn.

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_CALLS = ("encode", "decode")


@dataclass(frozen=True)
class CodecLimits:
    """Limits and settings of a process.

    Attributes:
        seconds: timeout, loading included.
        gib: memory limit.
        threads: threads of torch.
        repeats: timed passes, after one warm-up.
        precision: "fp32" or "bf16".
        packages: folder with packages that are not installed, or "".
    """

    seconds: float
    gib: float
    threads: int
    repeats: int
    precision: str
    packages: str = ""

    def job(self, do: Literal["count", "measure"], system: System, sizes: Sequence[ClipSize]) -> CodecJob:
        """Return the job description for the process."""
        asked = [str(size) for size in sizes]
        limit = int(self.gib * 2**30)
        return CodecJob(do, system.name, asked, self.precision, self.threads, self.repeats, limit, self.packages)


def measure_all(
    systems: Sequence[System],
    sizes: Sequence[ClipSize],
    counted: Sequence[ClipSize],
    limits: CodecLimits,
    *,
    rounds: int,
    report_progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Measure each size and codec; codecs that are only `counted` at a size have no seconds.

    Args:
        systems: the codecs.
        sizes: sizes at which they run.
        counted: sizes at which their operations are counted, too.
        limits: limits of each process.
        rounds: number of repetitions of everything.
        report_progress: called with progress messages.
    """
    rows: dict[tuple[ClipSize, str], dict[str, Any]] = {}
    for size in [*sizes, *counted]:
        for each in systems:
            facts = {"own": each.is_own, "temporal_compression": each.temporal_compression, "size": list(size)}
            rows[size, each.name] = {"system": each.name, **facts}
    for system in systems:
        report_progress(f"counting {system.name}")
        for size, found in _counts(system, list(dict.fromkeys([*sizes, *counted])), limits):
            rows[size, system.name] |= found
    passes: dict[tuple[ClipSize, str], list[dict[str, Any]]] = {}
    for number in range(rounds):
        for size in sizes:
            for system in systems:
                report_progress(f"round {number + 1} of {rounds}: {system.name} at {size}")
                passes.setdefault((size, system.name), []).extend(run(limits.job("measure", system, [size]), limits))
    for key, results in passes.items():
        rows[key] |= summary(results)
    return list(rows.values())


def run(job: CodecJob, limits: CodecLimits) -> list[dict[str, Any]]:
    """Return the results of a process; the last one gives the reason if it was killed or ended without output."""
    command = python("-W", "ignore", "-m", __name__, json_text(job._asdict()))
    environment = os.environ | dict.fromkeys(_THREAD_VARIABLES, str(limits.threads))
    pipe = subprocess.PIPE
    ending = die_with(os.getpid())  # this command may be killed
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, preexec_fn=ending) as process:
        try:
            out, errors = process.communicate(timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
            return [*_lines(out), {"problem": f"past the limit of {limits.seconds:g} s"}]
        except BaseException:
            process.kill()
            raise
    found = list(_lines(out))
    if process.returncode:
        found.append({"problem": f"ended with code {process.returncode}: {(errors.strip().splitlines() or ['-'])[-1]}"})
    return found


def _lines(out: str) -> Iterator[dict[str, Any]]:
    """Yield whole lines; a killed process may leave a partial one."""
    for line in out.splitlines(keepends=True):
        if line.startswith("{") and line.endswith("}\n"):
            yield json.loads(line)


def _counts(system: System, sizes: list[ClipSize], limits: CodecLimits) -> Iterator[tuple[ClipSize, dict[str, Any]]]:
    """Yield the counted operations of a codec at each size, or the reason why there are none."""
    results = run(limits.job("count", system, sizes), limits)
    counted = {line["size"]: line for line in results if "size" in line}
    ended = next((line["problem"] for line in reversed(results) if "problem" in line), "no output")
    for size in sizes:
        line = counted.get(str(size), {"problem": ended})
        yield size, line["counted"] if "counted" in line else {"not_counted": line["problem"]}


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise all passes of a codec at a size: median seconds, peak memory, and errors.

    The first pass of a process does not count, unless it is the only one.
    """
    found: dict[str, Any] = {}
    for call in _CALLS:
        lines = [line for line in results if call in line]
        later = [line[call] for line in lines if line["number"]] or [line[call] for line in lines]
        if later:
            found[call] = {name: spread([each[name] for each in later]) for name in ("wall_s", "cpu_s")}
            found[call] |= {"peak_bytes": max(line[call]["peak_bytes"] for line in lines), "passes": len(later)}
    problems = [line["problem"] for line in results if "problem" in line]
    base = [line["base_bytes"] for line in results if "base_bytes" in line]
    return found | ({"base_bytes": max(base)} if base else {}) | ({"problem": problems[0]} if problems else {})
