"""`regen describe`: the command, and its tables for one number of GPUs or side by side for several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regen_dist.jsontext import json_text
from regen_dist.tables import Column, Table, numbers
from tools.describe.facts import EXCHANGED, gather, with_clips_per_gpu

if TYPE_CHECKING:
    from regen_dist.config import AnyRunConfig

_DEFAULT_WORLD_SIZE = 8


def describe(
    config: Annotated[Path, typer.Argument(help="A YAML file under configs/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Config overrides, as a.b=value.")] = None,
    world_size: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="GPUs that ZeRO-3 shards over [default: 8, or 1 for engine.kind=plain]. Several times: side by side.",
        ),
    ] = None,
    clips_per_gpu: Annotated[
        int | None,
        typer.Option(min=1, help="Clips (rows) at once on each GPU: sets train.accumulation, for each number of GPUs."),
    ] = None,
    mfu: Annotated[
        float,
        typer.Option(
            min=0.001,
            max=1.0,
            help="Share of the GPUs' peak that the model's operations reach; published 14B runs: 0.23 to 0.33.",
        ),
    ] = 0.28,
    peak_tflops: Annotated[
        float | None, typer.Option(min=0.001, help="Of one GPU [default: an H100's in bf16, 989].")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs per node, joined by NVLink.")] = 8,
    nvlink_gbps: Annotated[
        float, typer.Option(min=0.001, help="Gigabits per second of one GPU in one direction, within a node.")
    ] = 3600.0,
    network_gbps: Annotated[
        float, typer.Option(min=0.001, help="Gigabits per second of one node in one direction.")
    ] = 3200.0,
    dollars_per_gpu_hour: Annotated[float, typer.Option(min=0.0, help="The price.")] = 3.0,
    size: Annotated[
        str | None,
        typer.Option(metavar="HEIGHTxWIDTH", help="Text to video: height and width in pixels [default: 192x320]."),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="Text to video: frames of a video, in clips of 33 [default: by data.clips]."),
    ] = None,
    text_tokens: Annotated[
        int | None, typer.Option(min=1, help="Text to video: tokens of a caption [default: 256].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Print latent shapes, parameters and FLOPs of a config, and its requirements on GPUs: memory, communication, time
    and cost in dollars. The model is built on the meta device. MFU, bandwidths and the price are assumptions set by the
    options. A text-to-video config also shows the cost of a video by the embedder of its latents.

    Examples:

    regen describe configs/embedder/regen_k32.yaml --world-size 64 data.size='[256, 256]'

    regen describe configs/t2v/5b.yaml --world-size 64 --size 384x640 --frames 264
    """
    from regen_dist.config import load_config
    from regen_dist.models.memory import Assumptions
    from regen_dist.observe.hardware import GPU_PEAK_TFLOPS
    from tools.describe.video import chosen_video

    loaded = load_config(config, overrides or [])
    peak = GPU_PEAK_TFLOPS["H100"] if peak_tflops is None else peak_tflops
    assumed = Assumptions(mfu, peak, gpus_per_node, nvlink_gbps, network_gbps, dollars_per_gpu_hour)
    video = chosen_video(size, frames, text_tokens)
    each = []
    for ranks in world_size or [_default_world_size(loaded)]:
        chosen = loaded if clips_per_gpu is None else with_clips_per_gpu(loaded, ranks, clips_per_gpu)
        each.append(gather(chosen, ranks, assumed, video))
    if as_json:
        by_size = {"by_world_size": {str(facts["world_size"]): facts for facts in each}}
        print(json_text(each[0] if len(each) == 1 else by_size, indent=2))
    else:
        show(each)


def _default_world_size(config: AnyRunConfig) -> int:
    return 1 if config.engine.kind == "plain" else _DEFAULT_WORLD_SIZE


# Formatting of numbers.


def flops_text(count: int) -> str:
    """Format FLOPs; a multiply-add counts as two."""
    return scaled(count, 1000, (" FLOP", " KFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP", " EFLOP"))


def bytes_text(count: int) -> str:
    """Format memory in powers of 1024."""
    return scaled(count, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def decimal_bytes(count: int) -> str:
    """Format traffic in powers of 1000, like bandwidths."""
    return scaled(count, 1000, (" B", " kB", " MB", " GB", " TB"))


def scaled(count: float, base: int, units: tuple[str, ...]) -> str:
    """Format about three significant digits with the largest unit that keeps the number at 1 or above."""
    power = 0
    while count >= base and power < len(units) - 1:
        count, power = count / base, power + 1
    return f"{count:.0f}{units[0]}" if power == 0 else f"{count:.2f}{units[power]}"


# Table rows that describe the model.

Row = tuple[str, ...]


def shape_rows(facts: dict[str, Any]) -> list[Row]:
    """Return the rows of input, latents and transformer."""
    return _clip_rows(facts) if facts["unit"] == "clip" else _row_rows(facts)


def _clip_rows(facts: dict[str, Any]) -> list[Row]:
    channels, frames, height, width = facts["input_shape"]
    latent_channels, rows, columns = facts["latent_shape"]
    decoder = facts["decoder"]
    table: list[Row] = [
        ("input", f"{frames} frames of {channels} x {height} x {width}"),
        ("latent", f"{facts['latent_frames']} latent frames of {latent_channels} channels, {rows} x {columns}"),
        ("temporal compression k", f"{facts['temporal_compression']}"),
        ("values in per value kept", f"{facts['compression']:.0f}"),
        ("bits of latent per pixel (bf16)", f"{facts['bits_per_pixel']:.3f}"),
    ]
    if decoder:
        size = f"{decoder['blocks']} blocks x width {decoder['width']} x {decoder['heads']} heads"
        return [*table, ("decoder", size), ("decoder tokens per clip", f"{facts['tokens_per_clip']:,}")]
    return [*table, ("decoder", "convolutions, the mirrored encoder")]


def _row_rows(facts: dict[str, Any]) -> list[Row]:
    video, transformer, clips = facts["video"], facts["transformer"], facts["clips"]
    channels, rows, columns = facts["latent_shape"]
    shape = f"{transformer['blocks']} blocks x width {transformer['width']} x {transformer['heads']} heads"
    return [
        ("row", f"{clips} clip{'s' if clips > 1 else ''}"),
        ("video (at k = 32)", f"{video['frames']} frame{'s' if video['frames'] > 1 else ''} of {_sides(video)}"),
        ("latent", f"{facts['latent_frames']} latent frames of {channels} channels, {rows} x {columns}"),
        ("tokens per row", f"{facts['tokens_per_row']:,}"),
        ("text", f"{facts['text_tokens']:,} tokens of width {facts['text_width']}"),
        ("transformer", shape),
    ]


def embedder_tables(facts: dict[str, Any]) -> dict[str, list[Row]]:
    """Return the cost of one forward pass for a video by embedder of its latents; empty for an embedder config."""
    if "by_embedder" not in facts:
        return {}
    video = facts["video"]
    header = ("embedder", "latent frames", "tokens", "forward", "operations")
    title = f"A forward pass for {video['frames']} frames of {_sides(video)}, by embedder"
    return {title: [header, *map(_embedder_row, facts["by_embedder"])]}


def _embedder_row(one: dict[str, Any]) -> Row:
    k = one["temporal_compression"]
    name = f"k = {k}" if one["embedder"] == "regen" else f"conventional, {k}x"
    flops, ratio = flops_text(one["forward_flops"]), 1 / one["flops_ratio"]
    return name, f"{one['latent_frames']}", f"{one['tokens']:,}", flops, f"x {ratio:.2f}"


def _sides(video: dict[str, Any]) -> str:
    return " x ".join(map(str, video["size"]))


def operation_rows(facts: dict[str, Any]) -> list[Row]:
    """Return the FLOPs of one sample by part, and of a step."""
    unit = facts["unit"]
    forward, recomputed = facts[f"forward_flops_per_{unit}"], facts[f"recomputed_flops_per_{unit}"]
    rows: list[Row] = [(f"forward, {name}, per {unit}", flops_text(count)) for name, count in forward.items() if count]
    if recomputed:
        rows.append((f"computed again by checkpointing, per {unit}", flops_text(recomputed)))
    rows.append((f"training, per {unit}", flops_text(facts[f"training_flops_per_{unit}"])))
    return [*rows, ("training, per step of the global batch", flops_text(facts["training_flops_per_step"]))]


def show(each: list[dict[str, Any]]) -> None:
    """Print the facts for each number of GPUs."""
    from rich.console import Console

    console = Console()
    first, hashes = each[0], {facts["config_hash"] for facts in each}
    shown = f", config {first['config_hash'][:12]}" if len(hashes) == 1 else ""  # accumulation is part of the config
    tables = {
        **_model_tables(first, f"{first['name']} ({first['kind']}{shown})"),
        **(_machine_tables(first) if len(each) == 1 else {}),
    }
    for title, rows in tables.items():
        _table(title, rows).show(console)
    if len(each) > 1:
        sizes = ", ".join(str(facts["world_size"]) for facts in each[:-1])
        title = f"{first['name']} on {sizes} and {each[-1]['world_size']} GPUs (estimate)"
        _table(title, _compared_rows(each)).show(console)
    console.print(_assumed_text(first["assumptions"], first["unit"]))


def _table(title: str, rows: list[Row]) -> Table:
    return Table([Column(fixed=True), *numbers(*[""] * (len(rows[0]) - 1))], rows, title=title, min_width=72)


def _model_tables(facts: dict[str, Any], title: str) -> dict[str, list[Row]]:
    """Return the rows that do not depend on the number of GPUs, by table title."""
    return {
        title: shape_rows(facts),
        **embedder_tables(facts),
        "Parameters": [(name, scaled(count, 1000, ("", "K", "M", "B"))) for name, count in facts["parameters"].items()],
        "Operations (multiplication and addition count as two)": operation_rows(facts),
    }


def _machine_tables(facts: dict[str, Any]) -> dict[str, list[Row]]:
    """Return the rows for one number of GPUs, by table title."""
    memory, ranks = facts["memory_bytes_per_gpu"], facts["world_size"]
    tables: dict[str, list[Row]] = {
        f"Memory per GPU while training on {ranks} (estimate)": [
            *((name, bytes_text(size)) for name, size in memory.items()),
            ("total", bytes_text(sum(memory.values()))),
        ],
        f"A step on {ranks} (estimate)": _chosen(facts, [*_step_rows(facts), *_wire_rows(facts), *_TIME_ROWS]),
        f"A run on {ranks} (estimate)": _chosen(facts, _RUN_ROWS),
    }
    return tables


def _compared_rows(each: list[dict[str, Any]]) -> list[Row]:
    named = [("GPUs", lambda facts: str(facts["world_size"])), *_step_rows(each[0]), *_MEMORY_ROWS]
    columns = [_chosen(facts, [*named, *_wire_rows(each[0]), *_TIME_ROWS, *_RUN_ROWS]) for facts in each]
    return [(row[0][0], *(value for _, value in row)) for row in zip(*columns, strict=True)]


def _chosen(facts: dict[str, Any], rows: list[tuple[str, Callable[[dict[str, Any]], str]]]) -> list[Row]:
    return [(name.format(unit=facts["unit"]), text(facts)) for name, text in rows]


def _step_rows(facts: dict[str, Any]) -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    return [*(_SHARED_ROWS if facts["sequence_parallel"] > 1 else []), *_STEP_ROWS]


def _wire_rows(facts: dict[str, Any]) -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    shared = [(f"sent: {EXCHANGED}", _sent(EXCHANGED))] if facts["sequence_parallel"] > 1 else []
    return [*shared, *_WIRE_ROWS]


def _memory(*beginnings: str) -> Callable[[dict[str, Any]], str]:
    """Return a function that sums the memory terms with these name prefixes; without any, all terms."""
    return lambda facts: bytes_text(
        sum(size for name, size in facts["memory_bytes_per_gpu"].items() if name.startswith(beginnings or ""))
    )


def _states(facts: dict[str, Any]) -> str:
    return bytes_text(
        sum(size for name, size in facts["memory_bytes_per_gpu"].items() if not name.startswith(_NOT_STATES))
    )


def _sent(purpose: str) -> Callable[[dict[str, Any]], str]:
    return lambda facts: decimal_bytes(facts["sent_bytes_per_gpu_and_step"][purpose])


def _hidden(facts: dict[str, Any]) -> str:
    cost = facts["cost"]
    share = cost["communication_s"] / cost["computation_s"]
    return f"{share:.1%}" if cost["communication_can_hide"] else f"{share:.0%}: too long"


_BUFFERS = ("weights gathered", "gradients on their way")
_NOT_STATES = (*_BUFFERS, "activations")

_SHARED_ROWS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("GPUs that share each {unit}", lambda facts: str(facts["sequence_parallel"]))
]
_STEP_ROWS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("{unit}s at once on each GPU", lambda facts: str(facts[f"{facts['unit']}s_per_gpu"])),
    ("train.accumulation", lambda facts: str(facts["accumulation"])),
]
_MEMORY_ROWS = [
    ("memory: states, sharded", _states),
    ("memory: gathered weights, buckets", _memory(*_BUFFERS)),
    ("memory: activations", _memory("activations")),
    ("memory of each GPU", _memory()),
    ("host memory of each rank: checkpoints", lambda facts: bytes_text(facts["host_memory_bytes_per_rank"])),
]
_WIRE_ROWS = [
    ("sent: weights gathered", _sent("weights gathered")),
    ("sent: gradients reduced", _sent("gradients reduced")),
    ("sent: small weights, after the update", _sent("small weights gathered after the update")),
    (
        "sent by each GPU in a step",
        lambda facts: decimal_bytes(sum(facts["sent_bytes_per_gpu_and_step"].values())),
    ),
    ("sent by each node over the network", lambda facts: decimal_bytes(facts["cost"]["network_bytes_per_node"])),
]
_TIME_ROWS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("communication", lambda facts: f"{facts['cost']['communication_s']:.3f} s"),
    ("of it latency of the collectives", lambda facts: f"{facts['cost']['latency_s']:.3f} s"),
    ("communication / computation", _hidden),
    ("step", lambda facts: f"{facts['cost']['step_s']:.3f} s"),
    ("MFU", lambda facts: f"{facts['cost']['mfu']:.2f}"),
    ("HFU (with what is computed again)", lambda facts: f"{facts['cost']['hfu']:.2f}"),
]
_RUN_ROWS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("steps (train.steps)", lambda facts: f"{facts['cost']['steps']:,}"),
    ("days", lambda facts: f"{facts['cost']['days']:,.1f}"),
    ("GPU hours", lambda facts: f"{facts['cost']['gpu_hours']:,.0f}"),
    ("dollars", lambda facts: f"{facts['cost']['dollars']:,.0f}"),
]


def _assumed_text(assumed: dict[str, Any], unit: str) -> str:
    return (
        f"Assumed: MFU {assumed['mfu']:g} of {assumed['peak_tflops']:g} TFLOP/s; every step on full {unit}s;\n"
        f"{assumed['gpus_per_node']} GPUs a node, {assumed['nvlink_gbps']:g} Gbit/s each; "
        f"{assumed['network_gbps']:g} Gbit/s between nodes;\n"
        f"{assumed['nvlink_hop_us']:g} and {assumed['network_hop_us']:g} microseconds a hop inside a node and between "
        "nodes;\n"
        f"{assumed['dollars_per_gpu_hour']:g} dollars for a GPU and hour."
    )
