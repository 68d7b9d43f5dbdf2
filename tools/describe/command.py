"""`regen describe`: the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from regen_dist.config import RunConfig

_DEFAULT_WORLD_SIZE = 8


def describe(
    config: Annotated[Path, typer.Argument(help="A YAML file under configs/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the config, as a.b=value.")] = None,
    world_size: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="GPUs that ZeRO-3 shards over [default: 8, or 1 for engine.kind=plain]. Several times: side by side.",
        ),
    ] = None,
    clips_per_gpu: Annotated[
        int | None,
        typer.Option(min=1, help="Clips at once on each GPU: sets train.accumulation, for each number of GPUs."),
    ] = None,
    mfu: Annotated[
        float, typer.Option(min=0.001, max=1.0, help="Share of the GPUs' peak that the model's operations reach.")
    ] = 0.4,
    peak_tflops: Annotated[
        float | None, typer.Option(min=0.001, help="Of one GPU [default: an H100's in bf16, 989].")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs that are joined by NVLink.")] = 8,
    nvlink_gbps: Annotated[
        float, typer.Option(min=0.001, help="Gigabits per second of one GPU in one direction, within a node.")
    ] = 3600.0,
    network_gbps: Annotated[
        float, typer.Option(min=0.001, help="Gigabits per second of one node in one direction.")
    ] = 3200.0,
    dollars_per_gpu_hour: Annotated[float, typer.Option(min=0.0, help="The price.")] = 3.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Print latent shapes, parameters and FLOPs of a config, and what it needs of GPUs: memory, communication, time and
    dollars. The model is built on the meta device. MFU, bandwidths and the price are assumptions that you state.

    Example: regen describe configs/embedder/regen_k32.yaml --world-size 64 data.size='[256, 256]'
    """
    from regen_dist.config import load_config
    from regen_dist.models.cost import Assumptions
    from regen_dist.observe.hardware import GPU_PEAK_TFLOPS
    from tools.describe.facts import gather, with_clips_per_gpu
    from tools.describe.tables import show

    loaded = load_config(config, overrides or [])
    peak = GPU_PEAK_TFLOPS["H100"] if peak_tflops is None else peak_tflops
    assumed = Assumptions(mfu, peak, gpus_per_node, nvlink_gbps, network_gbps, dollars_per_gpu_hour)
    each = []
    for ranks in world_size or [_default_world_size(loaded)]:
        chosen = loaded if clips_per_gpu is None else with_clips_per_gpu(loaded, ranks, clips_per_gpu)
        each.append(gather(chosen, ranks, assumed))
    if as_json:
        by_size = {"by_world_size": {str(facts["world_size"]): facts for facts in each}}
        print(json.dumps(each[0] if len(each) == 1 else by_size, indent=2))
    else:
        show(each)


def _default_world_size(config: RunConfig) -> int:
    return 1 if config.engine.kind == "plain" else _DEFAULT_WORLD_SIZE
