"""ZeRO-3 memory per GPU, term by term ("ZeRO", Rajbhandari et al., 2020, Sec. 3; AdamW in mixed precision)."""

from __future__ import annotations

from regen_dist.config.schema import EngineConfig
from regen_dist.models.accounting import Account
from regen_dist.models.communication import REDUCE_BUCKET

# DeepSpeed's default, in elements, which the engine does not change.
_LIVE = 1_000_000_000  # stage3_max_live_parameters: weights that may be gathered at once


def memory_bytes(
    model: Account,
    engine: EngineConfig,
    *,
    world_size: int,
    clips_per_gpu: int,
    accumulation: int = 1,
    on_gpu: bool = True,
) -> dict[str, int]:
    """Bytes per GPU of each term while training.

    Args:
        model: counted with the precision and checkpointing of `engine`.
        engine: `plain` shards nothing.
        world_size: GPUs that the states are sharded over.
        clips_per_gpu: samples (clips, or rows of clips) of one micro-batch on one GPU.
        accumulation: micro-batches whose gradients are summed.
        on_gpu: a buffer takes its whole size there. In host memory it takes what was written to: of the bucket, as much
            as there are gradients; and gloo copies that once more.
    """
    zero3, mixed = engine.kind == "zero3", engine.precision == "bf16"
    shards = world_size if zero3 else 1
    share = -(-model.num_parameters // shards)
    low = 2 if mixed else 4
    copied = min(model.num_parameters, REDUCE_BUCKET)
    reduced = 4 if engine.reduces_in(world_size) == "fp32" else 2  # bytes
    # In fp32 beside a bucket in bf16, the copy is of twice the width, and on GPUs exists as long as the reduction.
    bucket = low * REDUCE_BUCKET + reduced * copied if on_gpu else (low + 2 * reduced) * copied
    second = low * -(-model.num_parameters // engine.zero.partition_size) if engine.zero.partition_size > 1 else 0
    activations = clips_per_gpu * model.activation_bytes
    gradients = (4 if zero3 or not mixed else low + 4) * share  # in fp32 for the update, whatever they are reduced in
    terms = {
        f"weights ({engine.precision}, sharded)": low * share,
        "gradients (fp32, sharded)": max(gradients - _replaced(activations, engine, accumulation), 0),
        "fp32 master weights (sharded)": 4 * share if zero3 or mixed else 0,
        "AdamW's two moments (fp32, sharded)": 8 * share,
        "EMA (fp32, sharded)": 4 * share,
        "fp32 gradients during the update": 4 * min(share, engine.zero.sub_group) if zero3 else 0,
        "weights gathered, at most": low * min(model.num_parameters, _LIVE) if shards > 1 else 0,
        "gradients on their way: a bucket, and its copy": bucket if zero3 else 0,
        "weights once more among a node's ranks (hpZ)": second if zero3 and shards > 1 else 0,
        f"activations of {clips_per_gpu} {model.unit}{'s' if clips_per_gpu != 1 else ''}": activations,
    }
    kept = {name: size for name, size in terms.items() if size}
    return (
        kept
        if shards > 1
        else {name.replace(", sharded", "").replace(" (sharded)", ""): size for name, size in kept.items()}
    )


def host_bytes(num_parameters: int, engine: EngineConfig, *, world_size: int) -> int:
    """Page-locked host memory of each rank while checkpoints are written: the copy of its share of masters, EMA and two
    moments, in fp32. It is kept for the next checkpoint, and cannot be swapped out."""
    return 16 * -(-num_parameters // (world_size if engine.kind == "zero3" else 1))


def _replaced(activations: int, engine: EngineConfig, accumulation: int) -> int:
    """Activations that are gone once there are gradients. ZeRO-3 has a place for all gradients from the start (fp32,
    whatever they are reduced in); sums of micro-batches outlive a backward pass; what is recomputed comes back."""
    frees = engine.kind == "plain" and accumulation == 1 and not engine.activation_checkpointing
    return activations if frees else 0
