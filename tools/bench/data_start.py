"""Seconds from nothing to the first batch, in a process of its own (`python -m` of this module).

Nothing of the library is imported at the top: importing it is part of what is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from regen_dist.jsontext import json_text

_BEGUN = time.perf_counter()


def first_batch(url: str, cache: Path, *, crop: int, num_frames: int, batch: int) -> dict[str, float]:
    """Start a program that opens the dataset and takes one batch from two workers.

    Args:
        cache: folder of the catalogue; where it holds the dataset's, that is used.

    Returns:
        seconds: `import_s` (the library and torch), `open_s` (the dataset), `batch_s` (workers, bytes, decoding) and
        `seconds`, the whole program.
    """
    options = {"url": url, "crop": crop, "num_frames": num_frames, "batch": batch}
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-P", "-m", __name__, json_text(options)],
        env=os.environ | {"REGEN_CACHE": str(cache)},
        capture_output=True,
        check=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return {"seconds": time.perf_counter() - begun, **found}


def _measure(url: str, crop: int, num_frames: int, batch: int) -> dict[str, float]:
    from regen_dist.config.datasets import DataConfig
    from regen_dist.data.loading.clip_loader import clip_batches
    from regen_dist.data.loading.datasets import TrainingSet

    imported = time.perf_counter()
    config = DataConfig(url=url, size=(crop, crop), short_side="fit", workers=2)
    data = TrainingSet(config, num_frames=num_frames, batch_global=batch, seed=0)
    opened = time.perf_counter()
    batches = clip_batches(data, accumulation=1, rank=0, world_size=1, cursor=0)
    next(batches)
    there = time.perf_counter()
    batches.close()
    return {"import_s": imported - _BEGUN, "open_s": opened - imported, "batch_s": there - opened}


if __name__ == "__main__":
    print(json_text(_measure(**json.loads(sys.argv[1]))))
