"""Communication, time, price and memory of training, estimated from a model's counts and what the user states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from regen_dist.config.losses import AdversarialConfig, LossesConfig
from regen_dist.config.run import EngineConfig
from regen_dist.models.flops import FlopReport, count_pass
from regen_dist.models.perceptual import PatchDiscriminator, load_perceptual
from regen_dist.pixels import clip_ssim

# Communication of ZeRO-3: bytes that each GPU sends in one optimizer step, and the time that the wires need for them.
#
# In every micro-batch ("ZeRO", Rajbhandari et al., 2020, Sec. 7.2.2) weights are gathered twice, for the forward and
# for the backward pass, in the working precision, and all gradients are reduced to their owners, in that which
# `EngineConfig.reduces_in` names. What activation checkpointing computes again shares its gather with the backward
# pass that follows at once. Small weights stay whole, and are gathered once, after the update. It is an upper bound:
# DeepSpeed keeps up to 10^9 elements gathered and looks ahead (stage3_max_live_parameters,
# stage3_max_reuse_distance), so that some weights need no second gather.

REDUCE_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in elements: gradients that are reduced at once
_GATHERS = 2  # gathers of a large weight in a micro-batch
_GIGABIT = 1e9 / 8  # bytes


def sent_bytes(
    parameter_sizes: Sequence[int], engine: EngineConfig, *, world_size: int, accumulation: int
) -> dict[str, int]:
    """Bytes that one GPU sends in one optimizer step, by what for; it receives as many.

    Of S bytes that are gathered from N GPUs, or reduced to them, each sends (N-1)/N S (ring algorithms).

    Args:
        parameter_sizes: elements of each parameter.
        engine: `plain` has one rank, which sends nothing.
        world_size: GPUs that the states are sharded over.
        accumulation: micro-batches of a step.
    """
    small = sum(size for size in parameter_sizes if size <= engine.persistence_threshold)
    elements = {
        "weights gathered": accumulation * _GATHERS * (sum(parameter_sizes) - small),
        "gradients reduced": accumulation * sum(parameter_sizes),
        "small weights gathered after the update": small,
    }
    width, reduced = (2 if each == "bf16" else 4 for each in (engine.precision, engine.reduces_in(world_size)))
    return {
        name: (reduced if name == "gradients reduced" else width) * count * (world_size - 1) // world_size
        for name, count in elements.items()
    }


def num_collectives(parameter_sizes: Sequence[int], engine: EngineConfig, *, accumulation: int) -> int:
    """Gathers and reductions that a GPU takes part in, in one optimizer step; of as many bytes as `sent_bytes` returns.

    DeepSpeed gathers weights ahead until they fill `engine.zero.prefetch_bucket`, and reduces gradients by the bucket.
    A weight that is larger than the bucket is gathered alone. What ranks exchange that share rows is not in it.

    Args:
        parameter_sizes: elements of each parameter, in the order of use.
        engine: `plain` has one rank, which sends nothing.
        accumulation: micro-batches of a step.
    """
    if engine.kind == "plain":
        return 0
    large = [size for size in parameter_sizes if size > engine.persistence_threshold]
    gathers, filled = 0, engine.zero.prefetch_bucket + 1
    for size in large:
        if filled + size > engine.zero.prefetch_bucket:
            gathers, filled = gathers + 1, 0
        filled += size
    reductions = -(-sum(parameter_sizes) // REDUCE_BUCKET)
    return accumulation * (_GATHERS * gathers + reductions) + (len(large) < len(parameter_sizes))


def ring_seconds(world_size: int, gpus_per_node: int, *, nvlink_hop_us: float, network_hop_us: float) -> float:
    """Time that a collective of no bytes takes around a ring of all GPUs: a step for each but one of them, as many of
    them between nodes as there are nodes but one.

    Args:
        world_size: GPUs.
        gpus_per_node: GPUs of each node.
        nvlink_hop_us, network_hop_us: duration of a step inside a node and between nodes.
    """
    between = -(-world_size // gpus_per_node) - 1
    return ((world_size - 1 - between) * nvlink_hop_us + between * network_hop_us) / 1e6


def exchanged_bytes(
    engine: EngineConfig, *, tokens: int, width: int, blocks: int, samples: int, local: bool = False
) -> int:
    """Bytes that one GPU sends in one optimizer step to those that share its rows of tokens.

    In every block queries, keys, values and what attention makes of them: of each GPU's part of the row all but its own
    part of the heads, in the forward and the backward pass, and where activations are computed again. The prediction,
    which is gathered once, is not in it: it is narrow.

    Args:
        engine: number of GPUs that share a row, precision, and recomputation of activations.
        tokens: tokens of a row.
        width: width of the transformer.
        blocks: blocks of the transformer.
        samples: samples of a step that each group of GPUs shares.
        local: true if each block has a local convolution, which exchanges the tokens there and back once more.
    """
    shared, passes = engine.sequence_parallel, 3 if engine.activation_checkpointing else 2
    elements = (6 if local else 4) * passes * blocks * samples * tokens * width
    return (2 if engine.precision == "bf16" else 4) * elements * (shared - 1) // shared**2


def network_bytes(sent: int, *, world_size: int, gpus_per_node: int) -> int:
    """Bytes that each node sends over its network interfaces, where each of its GPUs sends `sent`.

    A ring passes through the GPUs of a node one after the other and leaves it once, whichever GPU that is: as many
    bytes leave the node as one GPU sends.
    """
    return sent if world_size > gpus_per_node else 0


def wire_seconds(sent: int, network: int, *, nvlink_gbps: float, network_gbps: float) -> float:
    """Time that the slowest wire of a ring needs: links between the GPUs of a node, or the node's network interfaces.

    Latency is not in it (see `ring_seconds`), nor anything that keeps a collective from the full bandwidth.

    Args:
        sent: bytes that one GPU sends to the next.
        network: bytes that one node sends to the next.
        nvlink_gbps: bandwidth of one GPU in one direction, gigabits per second.
        network_gbps: bandwidth of all interfaces of one node in one direction, gigabits per second.
    """
    return max(sent / (nvlink_gbps * _GIGABIT), network / (network_gbps * _GIGABIT))


_DAY_S, _HOUR_S = 86_400, 3_600


@dataclass(frozen=True)
class Assumptions:
    """Assumptions that are stated, not measured. The defaults are the data sheet of a node of eight H100 SXM, and a
    price.

    Args:
        mfu: model FLOPs utilisation: operations of the model, three forward passes a clip, over the GPUs' peak.
            Operations that activation checkpointing repeats are no progress and do not count.
        peak_tflops: peak of one GPU (H100 SXM, bf16 without sparsity).
        gpus_per_node: GPUs that are joined by `nvlink_gbps`; nodes are joined by `network_gbps`.
        nvlink_gbps: bandwidth of one GPU in one direction, gigabits per second.
        network_gbps: bandwidth of all interfaces of one node in one direction, gigabits per second.
        dollars_per_gpu_hour: the price.
        nvlink_hop_us, network_hop_us: latency of a step of a ring inside a node and between nodes, in microseconds;
            NCCL's own table (src/graph/tuning.cc: ring, Simple).
    """

    mfu: float = 0.28  # published runs of 14B parameters reach 0.23 to 0.33
    peak_tflops: float = 989.0
    gpus_per_node: int = 8
    nvlink_gbps: float = 3600.0
    network_gbps: float = 3200.0
    dollars_per_gpu_hour: float = 3.0
    nvlink_hop_us: float = 3.4
    network_hop_us: float = 9.6


@dataclass(frozen=True)
class Cost:
    """Cost of one optimizer step, and of a run of `steps`.

    Args:
        world_size: number of GPUs.
        model_flops: operations of a step of the global batch: forward and backward, nothing computed again.
        recomputed_flops: operations of a step that are done a second time.
        sent_bytes: bytes that each GPU sends in a step.
        steps: steps of the run.
        assumed: assumptions that the user states.
        collectives: number of collectives in a step, each of which passes once around all GPUs.
    """

    world_size: int
    model_flops: int
    recomputed_flops: int
    sent_bytes: int
    steps: int
    assumed: Assumptions
    collectives: int = 0

    @property
    def network_bytes(self) -> int:
        """Bytes that each node sends to another in a step."""
        return network_bytes(self.sent_bytes, world_size=self.world_size, gpus_per_node=self.assumed.gpus_per_node)

    @property
    def communication_s(self) -> float:
        """Time of a step on the wires: for the bytes, and for the latency of every collective."""
        links = {"nvlink_gbps": self.assumed.nvlink_gbps, "network_gbps": self.assumed.network_gbps}
        return wire_seconds(self.sent_bytes, self.network_bytes, **links) + self.latency_s

    @property
    def latency_s(self) -> float:
        """Part of `communication_s` that no bandwidth shortens."""
        around = ring_seconds(
            self.world_size, self.assumed.gpus_per_node,
            nvlink_hop_us=self.assumed.nvlink_hop_us, network_hop_us=self.assumed.network_hop_us,
        )  # fmt: skip
        return self.collectives * around

    @property
    def computation_s(self) -> float:
        """Time of a step at the assumed MFU."""
        return self.model_flops / (self.world_size * self.assumed.peak_tflops * 1e12 * self.assumed.mfu)

    @property
    def step_s(self) -> float:
        """Time of a step, if all of the communication is hidden behind the computation, or the other way round."""
        return max(self.computation_s, self.communication_s)

    @property
    def mfu(self) -> float:
        """MFU: the assumed one, or the share of it that the wires allow."""
        return self.assumed.mfu * self.computation_s / self.step_s

    @property
    def hfu(self) -> float:
        """Hardware FLOPs utilisation: including recomputed operations."""
        return self.mfu * (self.model_flops + self.recomputed_flops) / self.model_flops

    @property
    def gpu_hours(self) -> float:
        """GPU hours of the whole run."""
        return self.steps * self.step_s * self.world_size / _HOUR_S

    def facts(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "network_bytes_per_node": self.network_bytes,
            "communication_s": self.communication_s,
            "latency_s": self.latency_s,
            "collectives": self.collectives,
            "computation_s": self.computation_s,
            "communication_can_hide": self.communication_s <= self.computation_s,
            "step_s": self.step_s,
            "mfu": self.mfu,
            "hfu": self.hfu,
            "steps": self.steps,
            "days": self.steps * self.step_s / _DAY_S,
            "gpu_hours": self.gpu_hours,
            "dollars": self.gpu_hours * self.assumed.dollars_per_gpu_hour,
        }


# ZeRO-3 memory per GPU, term by term ("ZeRO", Rajbhandari et al., 2020, Sec. 3; AdamW in mixed precision).

# DeepSpeed's defaults, in elements, which the engine does not change.
_LIVE = 1_000_000_000  # stage3_max_live_parameters: weights that may be gathered at once


def memory_bytes(
    model: FlopReport,
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
    # DeepSpeed's bucket has the precision of the reduction, and on GPUs its copy exists as long as that lasts.
    bucket = reduced * (REDUCE_BUCKET + copied) if on_gpu else (low + 2 * reduced) * copied
    second = low * -(-model.num_parameters // engine.zero.partition_size) if engine.zero.partition_size > 1 else 0
    activations = clips_per_gpu * model.activation_bytes
    gradients = (4 if zero3 or not mixed else low + 4) * share  # in fp32 for the update, whatever they are reduced in
    copies = 4 * share if mixed else 0  # of gradients in bf16, by the update
    terms = {
        f"weights ({engine.precision}, sharded)": low * share,
        "gradients (fp32, sharded)": max(gradients - _replaced(activations, copies, engine, accumulation), 0),
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


def host_bytes(parameter_sizes: Sequence[int], engine: EngineConfig, *, world_size: int) -> int:
    """Page-locked host memory of each rank while checkpoints are written: the copy of its share of masters, EMA and two
    moments, in fp32, each piece rounded up to a power of two by torch's allocator. It is kept for the next checkpoint,
    and cannot be swapped out."""
    shards = world_size if engine.kind == "zero3" else 1
    pieces = (4 * -(-size // shards) for size in parameter_sizes)  # bytes of each
    return 4 * sum(1 << (size - 1).bit_length() for size in pieces if size)


def _replaced(activations: int, copies: int, engine: EngineConfig, accumulation: int) -> int:
    """Return the bytes of activations that are gone once there are gradients. ZeRO-3 reserves memory for all gradients
    from the start (fp32, whatever they are reduced in); sums of micro-batches outlive a backward pass. Recomputed
    activations return, but not in the update, which makes the fp32 copies of gradients in bf16 (`copies` bytes)."""
    if engine.kind != "plain" or accumulation > 1:
        return 0
    return min(activations, copies) if engine.activation_checkpointing else activations


# Memory of the networks of `train.losses`, beside the model's.

_STATES = 5  # float32 numbers a parameter: weight, gradient, two moments, and the flat gradient that ranks average
_R1 = 3  # passes that a penalty of gradients keeps: the pass itself, and its gradient with a graph of its own


def loss_memory_bytes(losses: LossesConfig, clip: tuple[int, int, int, int], clips_per_gpu: int) -> dict[str, int]:
    """Bytes per GPU by what for; empty where the terms are off. Nothing of it is sharded.

    Args:
        losses: losses of the config.
        clip: channels, frames, height and width that the decoder gives.
        clips_per_gpu: clips of one micro-batch.

    Raises:
        ConfigError: the perceptual network's file cannot be read.
    """
    terms: dict[str, int] = {}
    if losses.adversarial.weight > 0:
        states, activations = _discriminator(losses.adversarial, clip)
        # Sources and reconstructions together, for its own loss; afterwards the reconstructions, for the model's.
        passes = 1 + (_R1 if losses.adversarial.regularisation == "r1" else 1)
        terms["discriminator (fp32, on every GPU)"] = states
        terms["activations of the discriminator"] = passes * clips_per_gpu * activations
    if losses.perceptual.weight > 0:
        weights, activations = _perceptual(losses, clip)
        terms["perceptual network (fp32, on every GPU)"] = weights
        terms["activations of the perceptual network"] = clips_per_gpu * activations
    if losses.ssim.weight > 0:
        terms["activations of SSIM"] = clips_per_gpu * _ssim(clip)
    return terms


def _ssim(clip: tuple[int, int, int, int]) -> int:
    """Bytes that the SSIM of one clip keeps."""
    with torch.device("meta"):
        source, made = torch.empty(1, *clip), torch.empty(1, *clip, requires_grad=True)
    return count_pass(nn.Module(), lambda: clip_ssim(source, made), activation_checkpointing=False).activation_bytes


def _discriminator(config: AdversarialConfig, clip: tuple[int, int, int, int]) -> tuple[int, int]:
    """Bytes of its states, and what one pass of one clip keeps for the backward pass."""
    with torch.device("meta"):
        module = PatchDiscriminator(config)
        video = torch.empty(1, *clip, requires_grad=True)
    kept = count_pass(module, lambda: module(video), activation_checkpointing=False).activation_bytes
    return _STATES * 4 * sum(parameter.numel() for parameter in module.parameters()), kept


def _perceptual(losses: LossesConfig, clip: tuple[int, int, int, int]) -> tuple[int, int]:
    """Bytes of its weights, and what the compared frames of one clip keep."""
    settings = losses.perceptual
    assert settings.network is not None, "what the config refuses"
    network = load_perceptual(settings.network, torch.device("cpu"), sha256=settings.sha256)
    _, frames, height, width = clip
    compared = frames if settings.frames is None else min(settings.frames, frames)
    return network.num_bytes, compared * network.activation_bytes(height, width)
