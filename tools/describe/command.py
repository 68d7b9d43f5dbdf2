"""`regen describe`: the command-line interface."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regen_dist.jsontext import json_text

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
    from tools.describe.facts import gather, with_clips_per_gpu
    from tools.describe.tables import show
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
