"""Where the time of a training step goes: torch's profiler over a few steps, its operators put into a few groups.

A group gets the time that an operator spends in itself. What lies inside a marked stretch (`record_function`) belongs
to the stretch, whatever operators it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch.profiler import ProfilerActivity, profile

PRODUCTS, ATTENTION, CONVOLUTIONS = "matrix products", "attention", "convolutions"
NORMS, ACTIVATIONS, ELEMENTWISE = "norms and modulation", "activations", "elementwise, casts and copies"
NOISE, UPDATE, BATCHES, REST = "noise", "optimizer, clipping, EMA", "batch assembly", "Python and the rest"
GROUPS = (PRODUCTS, ATTENTION, CONVOLUTIONS, NORMS, ACTIVATIONS, ELEMENTWISE, NOISE, UPDATE, BATCHES, REST)
STRETCHES = {"noise": NOISE, "update": UPDATE, "batches": BATCHES}  # by the name that is recorded
_PARTS = {  # of an operator's name, in this order
    ATTENTION: ("bmm", "softmax", "scaled_dot_product", "attention"),
    CONVOLUTIONS: ("conv",),
    PRODUCTS: ("mm", "mkl_linear", "mkldnn_linear"),
    NORMS: ("layer_norm", "rms_norm", "rsqrt", "addcmul"),
    ACTIVATIONS: ("gelu", "silu", "sin", "cos", "tanh"),
}
_TOP = 12  # operators that are named one by one


class Event(Protocol):
    """What is used of the profiler's events."""

    name: str
    self_cpu_time_total: float  # microseconds
    cpu_parent: Any


def group_of(event: Event) -> str:
    """The group of one event: of the stretch that it lies in, else by its operator."""
    place: Any = event
    while place is not None:
        if place.name in STRETCHES:
            return STRETCHES[place.name]
        place = place.cpu_parent
    if not event.name.startswith(("aten::", "mkldnn", "Inductor", "cpp_fused")):
        return REST
    name = event.name.removeprefix("aten::")
    return next((group for group, parts in _PARTS.items() if any(part in name for part in parts)), ELEMENTWISE)


def shares(events: Iterable[Event]) -> dict[str, float]:
    """The share of all time that each group takes."""
    seconds = dict.fromkeys(GROUPS, 0.0)
    for event in events:
        seconds[group_of(event)] += event.self_cpu_time_total
    whole = sum(seconds.values())
    return {group: each / whole for group, each in seconds.items()}


def profiled(step: Callable[[], object], steps: int) -> dict[str, Any]:
    """The shares of `steps` steps by group, and the operators that take most."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            step()
    events: list[Any] = list(recorded.events() or ())
    return {"steps": steps, "groups": shares(events), "operators": _operators(events)}


def _operators(events: Iterable[Event]) -> dict[str, float]:
    """Shares of the operators that take most, each with its group."""
    seconds: dict[str, float] = {}
    for event in events:
        name = f"{event.name} ({group_of(event)})"
        seconds[name] = seconds.get(name, 0.0) + event.self_cpu_time_total
    whole = sum(seconds.values())
    top = sorted(seconds, key=lambda name: -seconds[name])[:_TOP]
    return {name: seconds[name] / whole for name in top}
