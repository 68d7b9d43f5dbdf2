"""The datasets that are measured: made once in a local folder by the shard tools, then copied into the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regen_dist.data.dataset.catalogue import open_dataset
from regen_dist.data.dataset.manifest import MANIFEST
from regen_dist.data.making.build import build_shards
from regen_dist.data.making.moving_shapes import SyntheticOptions
from regen_dist.data.making.plan import BuildOptions
from regen_dist.data.making.synthetic import build_synthetic
from regen_dist.data.objects.store import Store
from regen_dist.errors import DataError

SHORT_SIDE = 128
_SECONDS_OF_A_FILE = 180.0


def make_clips(folder: Path, videos: Path | None) -> dict[str, Any]:
    """A dataset of four-second samples of 128 pixels at `folder`, from the videos of a folder, or of moving shapes
    where that is None; finished if begun. Says what is in it."""
    if videos is not None:
        options = BuildOptions(short_side=SHORT_SIDE, scenes=False, max_seconds=_SECONDS_OF_A_FILE, shard_mb=8)
        build_shards([videos], folder, options)
    else:
        build_synthetic(folder, SyntheticOptions(number=96, seed=0, side=SHORT_SIDE, frames=96, samples_per_shard=32))
    dataset = open_dataset(folder)
    return {
        "videos": "synthetic: moving shapes" if videos is None else "real",
        "sources": sorted({Path(source).name for source in dataset.table()["source"].to_pylist()}) if videos else [],
        "samples": len(dataset),
        "mean_bytes": sum(dataset.records["size"].tolist()) / len(dataset),
        "fingerprint": dataset.fingerprint,
    }


def copy_dataset(source: str | Path, target: str) -> None:
    """Every object of a finished dataset, the manifest last; nothing happens when the same one is there.

    Raises:
        DataError: `target` holds another dataset.
    """
    here, there = Store(source), Store(target)
    manifest = here.get(MANIFEST)
    if there.size(MANIFEST) is not None:
        if there.get(MANIFEST) != manifest:
            raise DataError(f"{target}: holds another dataset; remove it, or give another --url. Nothing was changed")
        return
    for name in (each for each in here.list() if each != MANIFEST):
        there.put(name, here.get(name))
    there.put(MANIFEST, manifest)
