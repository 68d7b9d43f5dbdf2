"""Facts of `regen describe` as plain values."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from regen_dist.config import AnyRunConfig, EmbedderConfig
    from regen_dist.config.embedder import DecoderConfig, ModelConfig
    from regen_dist.config.run import CommonConfig, Recomputation
    from regen_dist.config.t2v import T2VModelConfig
    from regen_dist.models.flops import ClipFlops, FlopReport
    from regen_dist.models.memory import Assumptions
    from tools.describe.video import DescribedVideo

Config = TypeVar("Config", bound="CommonConfig")
EXCHANGED = "tokens exchanged for attention"  # key of `sent_bytes_per_gpu_and_step` under sequence parallelism


def gather(
    config: AnyRunConfig, world_size: int, assumed: Assumptions | None = None, video: DescribedVideo | None = None
) -> dict[str, Any]:
    """Return everything that `regen describe` prints, as plain values: shapes, counts, FLOPs, bytes, time and dollars.

    Args:
        config: embedder config, whose samples are clips, or text-to-video config, whose samples are rows of clips.
        world_size: number of GPUs.
        assumed: assumptions that are not measured.
        video: video for which a text-to-video config is described.

    Raises:
        ConfigError: the global batch cannot be divided over `world_size` ranks, or an embedder was given a video.
    """
    from regen_dist.config import config_hash
    from regen_dist.config.identity import clips_per_rank
    from regen_dist.models.memory import host_bytes, memory_bytes

    per_gpu, train = clips_per_rank(config, world_size), config.train
    counted, shapes = _counted(config, video)
    unit = counted.unit
    return {
        "name": config.name,
        "kind": config.model.kind,
        "unit": unit,
        "config_hash": config_hash(config),
        "world_size": world_size,
        "sequence_parallel": config.engine.sequence_parallel,
        f"{unit}s_per_gpu": per_gpu,
        "accumulation": train.accumulation,
        "batch_global": train.batch_global,
        **shapes,
        "parameters": {**counted.parameters, "total": counted.num_parameters},
        f"forward_flops_per_{unit}": {**counted.forward_flops, "total": counted.num_forward_flops},
        f"training_flops_per_{unit}": counted.num_training_flops,
        f"recomputed_flops_per_{unit}": counted.recomputed_flops,
        "training_flops_per_step": counted.num_training_flops * train.batch_global,
        "memory_bytes_per_gpu": memory_bytes(
            counted, config.engine, world_size=world_size, clips_per_gpu=per_gpu, accumulation=train.accumulation
        )
        | _loss_memory(config, counted, per_gpu),
        "host_memory_bytes_per_rank": host_bytes(counted.parameter_sizes, config.engine, world_size=world_size),
        **_costs(config, counted, world_size, assumed),
    }


def _loss_memory(config: AnyRunConfig, counted: FlopReport, clips_per_gpu: int) -> dict[str, int]:
    """Bytes per GPU of the terms of `train.losses`; none where they are off."""
    from regen_dist.config import T2VConfig

    if isinstance(config, T2VConfig) or not config.train.losses.any:
        return {}
    from regen_dist.models.flops import ClipFlops
    from regen_dist.models.memory import loss_memory_bytes

    assert isinstance(counted, ClipFlops), "what a clip was counted as"
    channels, _, height, width = counted.clip_shape
    return loss_memory_bytes(config.train.losses, (channels, counted.decoded_frames, height, width), clips_per_gpu)


def with_clips_per_gpu(config: Config, world_size: int, clips: int) -> Config:
    """Return the config with the `train.accumulation` that puts this many clips (or rows) at a time on each of
    `world_size` GPUs, or on each group of GPUs that share them.

    Raises:
        ConfigError: the global batch is not a multiple of the clips of all GPUs.
    """
    from regen_dist.config.identity import num_readers
    from regen_dist.errors import ConfigError

    train, shared = config.train, config.engine.sequence_parallel
    at_once = num_readers(config, world_size) * clips
    accumulation, rest = divmod(train.batch_global, at_once)
    if rest:
        groups = f", of which {shared} share them" if shared > 1 else ""
        raise ConfigError(
            f"train.batch_global {train.batch_global} is not a multiple of {at_once} {_units(config)} "
            f"({clips} at once on each of {world_size} GPUs{groups}); change --clips-per-gpu or --world-size, or set "
            f"train.batch_global={(accumulation + 1) * at_once}"
        )
    return config.model_copy(update={"train": train.model_copy(update={"accumulation": accumulation})})


def _units(config: CommonConfig) -> str:
    from regen_dist.config import T2VConfig

    return "rows" if isinstance(config, T2VConfig) else "clips"


def _counted(config: AnyRunConfig, video: DescribedVideo | None) -> tuple[FlopReport, dict[str, Any]]:
    """Return the FLOP report of one sample, and its shapes."""
    from regen_dist.config import T2VConfig
    from regen_dist.errors import ConfigError
    from tools.describe.video import DescribedVideo, row_account, row_shapes

    if isinstance(config, T2VConfig):
        video = video or DescribedVideo()
        row = row_account(config, video)
        return row, row_shapes(config, row, video)
    if video is not None:
        raise ConfigError(
            "--size, --frames and --text-tokens are for configs of text to video; of an embedder set data.size"
        )
    largest = max(config.data.sizes, key=lambda size: size[0] * size[1])
    engine = config.engine
    how = engine.precision, engine.activation_checkpointing, engine.sequence_parallel, config.diffusion.train_frames
    clip = _account(config.model, largest, *how)
    return clip, _clip_shapes(config, clip)


@lru_cache(maxsize=32)
def _account(
    model: ModelConfig,
    size: tuple[int, int],
    precision: Any,
    checkpointing: Recomputation,
    shared: int,
    decoded: int | None,
) -> ClipFlops:
    from regen_dist.models.flops import count_flops

    return count_flops(
        model, size,
        decoded=decoded, precision=precision, activation_checkpointing=checkpointing, sequence_parallel=shared,
    )  # fmt: skip


def _costs(config: AnyRunConfig, counted: FlopReport, world_size: int, assumed: Assumptions | None) -> dict[str, Any]:
    from regen_dist.config.identity import clips_per_rank
    from regen_dist.models.memory import Assumptions, Cost, exchanged_bytes, num_collectives, sent_bytes

    train, assumed = config.train, assumed or Assumptions()
    sent = sent_bytes(counted.parameter_sizes, config.engine, world_size=world_size, accumulation=train.accumulation)
    if config.engine.sequence_parallel > 1:
        transformer, tokens = _transformer(config, counted)
        samples = train.accumulation * clips_per_rank(config, world_size)
        sent[EXCHANGED] = exchanged_bytes(
            config.engine, tokens=tokens, width=transformer.width, blocks=transformer.blocks, samples=samples,
            local=getattr(transformer, "local", False),
        )  # fmt: skip
    cost = Cost(
        world_size=world_size,
        model_flops=(counted.num_training_flops - counted.recomputed_flops) * train.batch_global,
        recomputed_flops=counted.recomputed_flops * train.batch_global,
        sent_bytes=sum(sent.values()),
        steps=train.steps,
        assumed=assumed,
        collectives=num_collectives(counted.parameter_sizes, config.engine, accumulation=train.accumulation),
    )
    return {"sent_bytes_per_gpu_and_step": sent, "assumptions": asdict(assumed), "cost": cost.facts()}


def _clip_shapes(config: EmbedderConfig, counted: ClipFlops) -> dict[str, Any]:
    decoder = config.model.decoder
    is_transformer = config.model.kind == "regen"
    return {
        "temporal_compression": config.model.temporal_compression,
        "input_shape": list(counted.clip_shape),
        "latent_frames": config.model.latent_frames,
        "latent_shape": list(counted.latent_shape),
        "compression": counted.compression,
        "bits_per_pixel": counted.bits_per_pixel,
        "decoder": {"blocks": decoder.blocks, "width": decoder.width, "heads": decoder.heads}
        if is_transformer
        else None,
        "tokens_per_clip": _tokens(config.model, counted) if is_transformer else None,
    }


def _tokens(model: ModelConfig, counted: ClipFlops) -> int:
    """Return the tokens of the decoder's blocks: one per 8x8 pixels and decoded frame, plus those of in-context
    latents."""
    from regen_dist.config.run import SPATIAL_COMPRESSION
    from regen_dist.models.flops import NUM_LATENT_FRAMES

    in_context = NUM_LATENT_FRAMES if model.conditioning.kind == "in_context" else 0
    rows, columns = (side // SPATIAL_COMPRESSION for side in counted.clip_shape[-2:])
    return (counted.decoded_frames + in_context) * rows * columns


def _transformer(config: AnyRunConfig, counted: FlopReport) -> tuple[DecoderConfig | T2VModelConfig, int]:
    """Return the transformer whose rows GPUs can share, and the number of tokens of a row."""
    from regen_dist.config import T2VConfig
    from regen_dist.models.flops import ClipFlops, RowFlops

    if isinstance(config, T2VConfig):
        assert isinstance(counted, RowFlops), "what a row was counted as"
        return config.model, counted.num_tokens
    assert isinstance(counted, ClipFlops), "what a clip was counted as"
    return config.model.decoder, _tokens(config.model, counted)
