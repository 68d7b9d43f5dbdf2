"""How long a run takes and what it costs, at a utilisation that the user states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regen_dist.models.communication import network_bytes, ring_seconds, wire_seconds

_DAY_S, _HOUR_S = 86_400, 3_600


@dataclass(frozen=True)
class Assumptions:
    """What is not measured but stated. The defaults are the data sheet of a node of eight H100 SXM, and a price.

    Args:
        mfu: model FLOPs utilisation: operations of the model, three forward passes a clip, over what the GPUs could do
            at best. What activation checkpointing computes again is no progress, and does not count.
        peak_tflops: of one GPU (H100 SXM, bf16 without sparsity).
        gpus_per_node: GPUs that are joined by `nvlink_gbps`; nodes are joined by `network_gbps`.
        nvlink_gbps: of one GPU in one direction, gigabits per second.
        network_gbps: of all interfaces of one node in one direction, gigabits per second.
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
    """Of one optimizer step, and of a run of `steps`.

    Args:
        world_size: GPUs.
        model_flops: operations of a step of the global batch: forward and backward, nothing computed again.
        recomputed_flops: operations of a step that are done a second time.
        sent_bytes: that each GPU sends in a step.
        steps: of the run.
        assumed: what the user states.
        collectives: of a step, each of which passes once around all GPUs.
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
        """The assumed one, or what the wires leave of it."""
        return self.assumed.mfu * self.computation_s / self.step_s

    @property
    def hfu(self) -> float:
        """Hardware FLOPs utilisation: with what is computed again."""
        return self.mfu * (self.model_flops + self.recomputed_flops) / self.model_flops

    @property
    def gpu_hours(self) -> float:
        """Of the whole run."""
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
