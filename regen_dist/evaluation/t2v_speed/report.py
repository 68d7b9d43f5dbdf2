"""The figures of `regen bench t2v` as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from regen_dist.evaluation.figures import Figure
from regen_dist.evaluation.t2v_speed.suite import CACHE, MEMORY, READER

_HEAD = [
    "| training from | steps/s (lowest to highest) | waits for batches | the cache's speed against it | by CPU time | "
    "target |",
    "| --- | ---: | ---: | ---: | ---: | ---: |",
]
_SIZES = ["| on disk | bytes | of the videos |", "| --- | ---: | ---: |"]


def table(facts: Mapping[str, Any]) -> str:
    """Speeds, then sizes."""
    rows = [*_HEAD, *_speeds(facts["training"]), "", *_SIZES, *_sizes(facts["data"])]
    return "\n".join(rows) + "\n"


def _speeds(section: Mapping[str, Any]) -> Iterator[str]:
    for name, case in section["cases"].items():
        compared = [section[kind].get(name) for kind in ("ratios", "by_cpu")]
        against = " | ".join(_spread(found) if found else "" for found in compared)
        target = f"≥ {section['target']:g}" if name == MEMORY else ""
        waits = f"{case['data_wait']:.1%}" if name != READER else ""
        yield f"| {name} | {_spread(case['per_s'])} | {waits} | {against} | {target} |"


def _sizes(data: Mapping[str, Any]) -> Iterator[str]:
    videos = data["source_bytes"]
    parts = {
        f"{data['videos']} videos of {data['frames']} frames of {data['side']}x{data['side']}": videos,
        "their pixels": data["pixel_bytes"],
        CACHE: data["cache_bytes"],
        "text embeddings in it": data["text_bytes"],
    }
    for name, size in parts.items():
        yield f"| {name} | {size:,} | {size / videos:.2f} |"


def _spread(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def figures(facts: Mapping[str, Any]) -> Iterator[Figure]:
    """What two records are compared by. Ratios within a round move less than rates."""
    for name, case in facts["training"]["cases"].items():
        yield Figure(f"{name}, steps/s", case["per_s"]["median"], True, noise=0.25)
    for name, found in facts["training"]["by_cpu"].items():
        yield Figure(f"latent cache against {name}, by CPU time", found["median"], True)
    yield Figure("bytes of the cache", facts["data"]["cache_bytes"], False, noise=0.01)
