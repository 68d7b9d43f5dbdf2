"""The model card (README) of an exported model."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from regen_dist.checkpoint.export import MODEL_FILE
from regen_dist.config.exported import ExportConfig, OriginConfig, T2VExportConfig
from regen_dist.config.run import SPATIAL_COMPRESSION
from regen_dist.config.t2v import LATENT_PATCH
from regen_dist.inference.latent_space import SPACE_FOLDER, LatentSpace, LatentSpread, LatentStatistics
from regen_dist.tables import Table

_KINDS = {
    "regen": "REGEN: a causal convolutional encoder and a generative (diffusion transformer) decoder",
    "magvit2": "the MAGVIT-v2 style baseline: a causal convolutional encoder and a mirrored decoder",
    "frozen": "REGEN's generative (diffusion transformer) decoder on the latents of an autoencoder of diffusers, which "
    "is not in this folder: `config.yaml` says where it is (`model.encoder.path`)",
}
WEIGHTS = {"ema": "the moving average (EMA) of the weights", "plain": "the weights of the last step"}
LICENSE = (
    "No license was chosen yet: who publishes this model says here under which it may be used, and what the training "
    "data allows."
)
SNIPPET = """\
import torch
from regen_dist.inference.codec import Codec

codec = Codec.load("{folder}")  # or a run folder; needs no DeepSpeed
clip = torch.rand(1, 3, codec.num_frames, {height}, {width}) * 2 - 1  # [B, 3, k + 1, H, W] in [-1, 1]
latents = codec.encode(clip)  # content and motion, [B, {channels}, H / 8, W / 8] each
times = torch.tensor([0.0, 0.5, 1.0]{whole})  # in frames from the clip's first
frames = codec.decode(latents, times, steps=1)  # [B, 3, len(times), H, W] in [-1, 1]
print(tuple(latents.content.shape), tuple(frames.shape))
"""

FOR_DIFFUSERS = """\
import torch
from diffusers import AutoModel

model = AutoModel.from_pretrained("{folder}", trust_remote_code=True)
video = torch.rand(1, 3, {frames}, {height}, {width}) * 2 - 1  # [B, 3, T, H, W] in [-1, 1]
latents = model.encode(video).latent_dist.mode()  # [B, {channels}, F, H / 8, W / 8]: content and motion of each clip
print(tuple(model.decode(latents, num_frames={frames}).sample.shape))
"""


def usage_snippet(config: ExportConfig, folder: str, size: tuple[int, int]) -> str:
    """Python code that loads the model from `folder`, encodes a clip of (height, width) and decodes it."""
    baseline = config.model.kind == "magvit2"  # it knows whole frames alone
    text = SNIPPET.replace("[0.0, 0.5, 1.0]{whole}", "[0.0, 1.0, 2.0]" if baseline else "[0.0, 0.5, 1.0]")
    if config.model.encoder.frozen:
        text = text.replace("content and motion", "the first latent frame, and all others as channels")
        text = text.replace(", [B, {channels}, H / 8, W / 8] each", "")
    return text.format(folder=folder, height=size[0], width=size[1], channels=config.model.latent.channels)


def model_card(
    config: ExportConfig,
    origin: OriginConfig,
    shapes: dict[str, list[int]],
    size: tuple[int, int],
    statistics: LatentStatistics | None,
) -> str:
    """The README of an exported embedder, in Markdown; `size` is the (height, width) of its training videos."""
    sections = {"Loading it": _loading(config, size), "Latent statistics": _statistics(statistics)}
    return _write_card("a video embedder", config, origin, shapes, _facts(config, size), sections)


def _write_card(
    what: str,
    config: ExportConfig | T2VExportConfig,
    origin: OriginConfig,
    shapes: Mapping[str, list[int]],
    facts: Mapping[str, str],
    sections: Mapping[str, str],
) -> str:
    """Return a card: what the model is, from `facts`, its weights and its origin; its own sections; the license.

    Args:
        what: kind of the model, for the title.
        facts: facts of this kind of model; the first is followed by the number of parameters.
        sections: Markdown by heading.
    """
    (model, kind), *others = facts.items()
    # The identity of the data is kept as text, in which several datasets are a list as Python prints it.
    trained_on = origin.data.get("dataset fingerprint", "not known").translate(dict.fromkeys(map(ord, "[]'")))
    samples = "clips" if isinstance(config, ExportConfig) else "rows"
    rows = {
        model: kind,
        "parameters": f"{sum(map(prod, shapes.values())):,} in {len(shapes)} tensors, stored as {config.dtype}",
        **dict(others),
        "weights": WEIGHTS[config.weights],
        "run": f"{origin.run}, step {origin.step:,}, after {origin.samples:,} {samples}, saved {origin.saved_at}",
        "config hash": f"`{origin.config_hash}`",
        "made by": f"regen-dist {origin.version}",
        "data fingerprint": f"`{trained_on}`",
        "validation": ", ".join(f"{name} {value:.4g}" for name, value in origin.metrics.items()) or "none was recorded",
    }
    table = Table(["", ""], list(rows.items())).to_markdown().rstrip("\n")
    text = "\n\n".join(
        f"## {name}\n\n{body}" for name, body in {"What it is": table, **sections, "License": LICENSE}.items()
    )
    return f"# {origin.run}, {what}\n\n{text}\n"


def _facts(config: ExportConfig, size: tuple[int, int]) -> dict[str, str]:
    model, cell = config.model, config.model.encoder.spatial
    what = f"content and motion, each {model.latent.channels} channels"
    if model.encoder.frozen:
        what = f"{model.latent_frames} latent frames of the autoencoder, each {model.latent.channels} channels"
    rows = {
        "model": _KINDS["frozen" if model.encoder.frozen else model.kind],
        "temporal compression k": f"{model.temporal_compression}: a clip is {model.num_frames} frames, the first and "
        f"k that follow (or an image: one frame)",
        "latents": f"{what} of H/{cell} x W/{cell} for a clip of H x W pixels",
        "trained at": f"{size[0]} x {size[1]} pixels",
    }
    if model.kind != "magvit2":
        rows["prediction"] = (
            f"{config.diffusion.target} on the path {config.diffusion.path}, {config.precision} weights"
        )
    return rows


def _loading(config: ExportConfig, size: tuple[int, int]) -> str:
    folder, (height, width), model = "PATH/OF/THIS/FOLDER", size, config.model
    own = (
        f"With the package `regen-dist`; sides of clips must be multiples of {model.encoder.spatial}.\n\n"
        f"```python\n{usage_snippet(config, folder, size)}```\n\n"
        "`regen reconstruct VIDEO --run THIS_FOLDER --out FOLDER` takes a video of any length. "
        f"`{MODEL_FILE}` can be read by any reader of safetensors; `config.yaml` says what to build."
    )
    if model.encoder.frozen:  # without files for diffusers
        return own
    alone = FOR_DIFFUSERS.format(
        folder=folder, frames=model.num_frames, height=height, width=width, channels=model.latent.channels
    )
    return f"{own}\n\nWith diffusers, without that package (the folder holds the code):\n\n```python\n{alone}```"


def _statistics(statistics: LatentStatistics | None) -> str:
    if statistics is None:
        return "They were not measured (`--no-statistics`)."
    parts = {"clips": statistics.clips, "images": statistics.images}
    lines = [f"- {_spread(name, part)}" for name, part in parts.items() if part is not None]
    return "\n".join(
        ["Mean and std of each channel are in `statistics.json` (`codec.statistics`). Over all channels:", "", *lines]
    )


def _spread(name: str, part: LatentSpread) -> str:
    latents = {"content": part.content, "motion": part.motion}
    ranges = [
        f"{latent}: means {each.mean.min():.3f} to {each.mean.max():.3f}, std {each.std.min():.3f} to "
        f"{each.std.max():.3f}"
        for latent, each in latents.items()
        if each is not None
    ]
    return f"{part.num_clips} {name}; " + "; ".join(ranges)


# The README of an exported text-to-video model.


def t2v_card(
    config: T2VExportConfig,
    origin: OriginConfig,
    shapes: dict[str, list[int]],
    space: LatentSpace,
    *,
    pipeline: bool = False,
) -> str:
    """The README of an exported text-to-video model, in Markdown; as a `pipeline` with embedder and text encoder."""
    sections = {"Generating with it": generating(pipeline=pipeline), "Latents and text": _space(space)}
    return _write_card("a text-to-video model", config, origin, shapes, _t2v_facts(config, space), sections)


def _t2v_facts(config: T2VExportConfig, space: LatentSpace) -> dict[str, str]:
    model, flow = config.model, config.diffusion
    rows = [f"{clips * space.num_frames} frames" for clips in sorted(config.clips)] or ["images alone"]
    return {
        "model": "a diffusion transformer on a video embedder's latents: two latent frames for each clip of "
        f"{space.num_frames} frames",
        "size": f"{model.blocks} blocks, width {model.width}, {model.heads} heads",
        "trained on": f"{', '.join(rows)} at {space.fps:g} frames a second; others run",
        "sides": f"multiples of {LATENT_PATCH * SPATIAL_COMPRESSION} pixels",
        "prediction": f"velocity of a rectified flow, {config.precision} weights; by default {flow.steps} steps of "
        f"{flow.sampler} at guidance {flow.guidance:g}",
    }


def generating(*, pipeline: bool) -> str:
    """Return the section of a text-to-video model's card on how to generate, also as a `pipeline` of diffusers."""
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
