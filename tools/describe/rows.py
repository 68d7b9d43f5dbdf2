"""Rows of text of the tables that say what a model is."""

from __future__ import annotations

from typing import Any

from tools.describe.units import flops_text

Row = tuple[str, ...]


def shape_rows(facts: dict[str, Any]) -> list[Row]:
    """What goes in, what the latents are, and the transformer."""
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
    """One forward pass for a video, by the embedder that makes its latents; of an embedder's own config none."""
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
    """Operations of one sample by part, and of a step."""
    unit = facts["unit"]
    forward, recomputed = facts[f"forward_flops_per_{unit}"], facts[f"recomputed_flops_per_{unit}"]
    rows: list[Row] = [(f"forward, {name}, per {unit}", flops_text(count)) for name, count in forward.items() if count]
    if recomputed:
        rows.append((f"computed again by checkpointing, per {unit}", flops_text(recomputed)))
    rows.append((f"training, per {unit}", flops_text(facts[f"training_flops_per_{unit}"])))
    return [*rows, ("training, per step of the global batch", flops_text(facts["training_flops_per_step"]))]
