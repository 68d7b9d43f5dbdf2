"""What ZeRO-3 sends: bytes of each GPU in one optimizer step, and how long the wires need for them.

In every micro-batch ("ZeRO", Rajbhandari et al., 2020, Sec. 7.2.2) weights are gathered twice, for the forward and for
the backward pass, in the working precision, and all gradients are reduced to their owners, in that which
`EngineConfig.reduces_in` names. What activation checkpointing computes again shares its gather with the backward pass
that follows at once. Small weights stay whole, and are gathered once, after the update. It is an upper bound: DeepSpeed
keeps up to 10^9 elements gathered and looks ahead (stage3_max_live_parameters, stage3_max_reuse_distance), so that some
weights need no second gather.
"""

from __future__ import annotations

from collections.abc import Sequence

from regen_dist.config.schema import EngineConfig

REDUCE_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in elements: gradients that are reduced at once
_GATHERS = 2  # of a large weight in a micro-batch
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
    """Gathers and reductions that a GPU takes part in, in one optimizer step; of as many bytes as `sent_bytes` tells.

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
        gpus_per_node: of each node.
        nvlink_hop_us, network_hop_us: of a step inside a node and between nodes.
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
        engine: how many GPUs share a row, the precision, and whether activations are computed again.
        tokens: of a row.
        width: of the transformer.
        blocks: of the transformer.
        samples: of the step that each group of GPUs shares.
        local: whether each block has a local convolution, which exchanges the tokens there and back once more.
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
        nvlink_gbps: of one GPU in one direction, gigabits per second.
        network_gbps: of all interfaces of one node in one direction, gigabits per second.
    """
    return max(sent / (nvlink_gbps * _GIGABIT), network / (network_gbps * _GIGABIT))
