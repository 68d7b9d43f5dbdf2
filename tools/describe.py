"""`regen describe`: what a config builds and what it costs, without building it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from regen_dist.config import RunConfig
    from regen_dist.models.accounting import Account

_DEFAULT_WORLD_SIZE = 8


def describe(
    config: Annotated[Path, typer.Argument(help="A YAML file under configs/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the config, as a.b=value.")] = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="GPUs that ZeRO-3 shards over [default: 8, or 1 for engine.kind=plain].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Print latent shapes, parameters, FLOPs and memory per GPU of a config. The model is built on the meta device.

    Example: regen describe configs/embedder/regen_k32.yaml --world-size 64 data.size='[256, 256]'
    """
    from regen_dist.config import load_config

    loaded = load_config(config, overrides or [])
    ranks = world_size or (1 if loaded.engine.kind == "plain" else _DEFAULT_WORLD_SIZE)
    facts = gather(loaded, ranks)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts)


def gather(config: RunConfig, world_size: int) -> dict[str, Any]:
    """Everything that `regen describe` prints, as plain values: shapes, counts, operations and bytes.

    Raises:
        ConfigError: the global batch cannot be divided over `world_size` ranks.
    """
    from regen_dist.config import config_hash
    from regen_dist.config.worldsize import clips_per_rank
    from regen_dist.models.accounting import account
    from regen_dist.models.memory import memory_bytes

    clips = clips_per_rank(config, world_size)
    checkpointing = config.engine.activation_checkpointing
    largest = max(config.data.sizes, key=lambda size: size[0] * size[1])
    counted = account(config.model, largest, precision=config.engine.precision, activation_checkpointing=checkpointing)
    return {
        "name": config.name,
        "kind": config.model.kind,
        "config_hash": config_hash(config),
        "world_size": world_size,
        "clips_per_gpu": clips,
        **_shapes(config, counted),
        "parameters": {**counted.parameters, "total": counted.num_parameters},
        "forward_flops_per_clip": {**counted.forward_flops, "total": counted.num_forward_flops},
        "training_flops_per_clip": counted.num_training_flops,
        "recomputed_flops_per_clip": counted.recomputed_flops,
        "training_flops_per_step": counted.num_training_flops * config.train.batch_global,
        "memory_bytes_per_gpu": memory_bytes(counted, config.engine, world_size=world_size, clips_per_gpu=clips),
    }


def _shapes(config: RunConfig, counted: Account) -> dict[str, Any]:
    decoder = config.model.decoder
    is_transformer = config.model.kind == "regen"
    return {
        "temporal_compression": config.model.temporal_compression,
        "input_shape": list(counted.clip_shape),
        "latent_frames": 2,
        "latent_shape": list(counted.latent_shape),
        "compression": counted.compression,
        "bits_per_pixel": counted.bits_per_pixel,
        "decoder": {"blocks": decoder.blocks, "width": decoder.width, "heads": decoder.heads}
        if is_transformer
        else None,
        "tokens_per_clip": counted.clip_shape[1] * counted.latent_shape[1] * counted.latent_shape[2]
        if is_transformer
        else None,
    }


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    for title, rows in _tables(facts).items():
        console.print(_table(title, rows))


def _table(title: str, rows: list[tuple[str, str]]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, min_width=72)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _tables(facts: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Rows of text, by the title of their table."""
    memory = facts["memory_bytes_per_gpu"]
    return {
        f"{facts['name']} ({facts['kind']}, config {facts['config_hash'][:12]})": _shape_rows(facts),
        "Parameters": [
            (name, _scaled(count, 1000, ("", "K", "M", "B"))) for name, count in facts["parameters"].items()
        ],
        "Operations (multiplication and addition count as two)": _operation_rows(facts),
        f"Memory per GPU while training on {facts['world_size']} (estimate)": [
            *((name, _bytes(size)) for name, size in memory.items()),
            ("total", _bytes(sum(memory.values()))),
        ],
    }


def _shape_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    channels, frames, height, width = facts["input_shape"]
    latent_channels, rows, columns = facts["latent_shape"]
    decoder = facts["decoder"]
    table = [
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


def _operation_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    forward = facts["forward_flops_per_clip"]
    rows = [(f"forward, {name}, per clip", _flops(count)) for name, count in forward.items()]
    if facts["recomputed_flops_per_clip"]:
        rows.append(("computed again by checkpointing, per clip", _flops(facts["recomputed_flops_per_clip"])))
    rows.append(("training, per clip", _flops(facts["training_flops_per_clip"])))
    return [*rows, ("training, per step of the global batch", _flops(facts["training_flops_per_step"]))]


def _flops(count: int) -> str:
    return _scaled(count, 1000, (" FLOP", " KFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP", " EFLOP"))


def _bytes(count: int) -> str:
    return _scaled(count, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def _scaled(count: float, base: int, units: tuple[str, ...]) -> str:
    """Three or so significant digits with the largest unit that keeps the number at 1 or above."""
    power = 0
    while count >= base and power < len(units) - 1:
        count, power = count / base, power + 1
    return f"{count:.0f}{units[0]}" if power == 0 else f"{count:.2f}{units[power]}"
