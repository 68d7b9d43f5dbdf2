"""The README of an exported text-to-video model."""

from __future__ import annotations

from math import prod

from regen_dist.checkpoint.export import MODEL_FILE
from regen_dist.config.exported import OriginConfig, T2VExportConfig
from regen_dist.config.section import SPATIAL_COMPRESSION
from regen_dist.config.t2v import LATENT_PATCH
from regen_dist.inference.card import LICENSE, WEIGHTS, origin_rows, page, table
from regen_dist.inference.space_files import SPACE_FOLDER, LatentSpace


def t2v_card(
    config: T2VExportConfig,
    origin: OriginConfig,
    shapes: dict[str, list[int]],
    space: LatentSpace,
    *,
    pipeline: bool = False,
) -> str:
    """The README of an export, in Markdown.

    Args:
        config: of the export.
        origin: the checkpoint that it was taken from.
        shapes: of its parameters.
        space: in which it works.
        pipeline: whether its embedder and text encoder are in the folder.
    """
    sections = {
        "What it is": _facts(config, origin, shapes, space),
        "Generating with it": _generating(pipeline),
        "Latents and text": _space(space),
        "License": LICENSE,
    }
    return page(f"{origin.run}, a text-to-video model", sections)


def _facts(config: T2VExportConfig, origin: OriginConfig, shapes: dict[str, list[int]], space: LatentSpace) -> str:
    model, flow, count = config.model, config.diffusion, sum(map(prod, shapes.values()))
    rows = [f"{clips * space.num_frames} frames" for clips in sorted(config.clips)] or ["images alone"]
    return table(
        {
            "model": "a diffusion transformer on a video embedder's latents: two latent frames for each clip of "
            f"{space.num_frames} frames",
            "parameters": f"{count:,} in {len(shapes)} tensors, stored as {config.dtype}",
            "size": f"{model.blocks} blocks, width {model.width}, {model.heads} heads",
            "trained on": f"{', '.join(rows)} at {space.fps:g} frames a second; others run",
            "sides": f"multiples of {LATENT_PATCH * SPATIAL_COMPRESSION} pixels",
            "prediction": f"velocity of a rectified flow, {config.precision} weights; by default {flow.steps} steps of "
            f"{flow.sampler} at guidance {flow.guidance:g}",
            "weights": WEIGHTS[config.weights],
            **origin_rows(origin, "rows"),
        }
    )


def _generating(pipeline: bool) -> str:
    kind = "DiffusionPipeline" if pipeline else "AutoModel"
    what = "The pipeline" if pipeline else "The transformer alone"
    use = 'print(found("a prompt").frames.shape)' if pipeline else "print(type(found))"
    return (
        "With the package `regen-dist`, and the embedder whose latents these are, which decodes them:\n\n"
        '```\nregen generate "a prompt" --run THIS_FOLDER --embedder EMBEDDER --out FOLDER\n```\n\n'
        f"`{MODEL_FILE}` can be read by any reader of safetensors; `config.yaml` says what to build.\n\n"
        f"{what}, with diffusers and without that package (the folder holds the code):\n\n```python\n"
        f"from diffusers import {kind}\n\n"
        f'found = {kind}.from_pretrained("PATH/OF/THIS/FOLDER", trust_remote_code=True)\n{use}\n```'
    )


def _space(space: LatentSpace) -> str:
    encoder, text = space.facts["encoder"], space.facts["text"] or {}
    return (
        f"`{SPACE_FOLDER}/` holds the mean and std of each latent channel, which the model works without and a decoder "
        "needs back (`LatentScale.restore`), the embedding of the empty caption, and how the caches were made.\n\n"
        f"- embedder: run {encoder.get('run', 'unknown')}, step {encoder.get('step', 'unknown')}, "
        f"fingerprint `{encoder.get('fingerprint', 'unknown')}`\n"
        f"- text encoder: {text.get('encoder', 'unknown')}, fingerprint `{text.get('fingerprint', 'unknown')}`, width "
        f"{text.get('width', 'unknown')}\n"
        f"- cache fingerprint: `{space.facts['fingerprint']}`"
    )
