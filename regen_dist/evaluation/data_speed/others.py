"""The same samples through plain `webdataset.WebDataset`, which reads whole tars one after the other."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path

from regen_dist.config.urls import parse_url
from regen_dist.data.dataset.catalogue import open_dataset
from regen_dist.data.dataset.index import VIDEO_EXTENSIONS
from regen_dist.data.objects.connection import Limits, open_backend
from regen_dist.evaluation.data_speed.turns import Turn, measured, turn_of

_VALID_S = 3600


def presigned(url: str) -> list[str]:
    """An HTTP address for each shard of a dataset in a bucket, which needs no keys for an hour. WebDataset opens it by
    curl."""
    import obstore

    names = [entry.name for entry in open_dataset(url).manifest.shards]
    signed = obstore.sign(open_backend(parse_url(url), Limits()), "GET", names, timedelta(seconds=_VALID_S))  # type: ignore[call-overload]
    return list(signed)


def piped(url: str) -> list[str] | None:
    """A command for each shard that WebDataset pipes it from: `aws s3 cp`. None where there is no `aws`."""
    program = shutil.which("aws", path=str(Path(sys.executable).parent)) or shutil.which("aws")
    if program is None:
        return None
    command = f"pipe:{shlex.quote(program)} s3 cp --quiet"
    return [f"{command} {shlex.quote(f'{url}/{entry.name}')} -" for entry in open_dataset(url).manifest.shards]


def by_webdataset(addresses: Sequence[str], store: int | None = None) -> Turn:
    """Bytes of videos per second through `WebDataset` over these addresses."""
    import webdataset

    with measured(store) as costs:
        dataset: Iterable[dict[str, object]] = webdataset.WebDataset(list(addresses), shardshuffle=False)
        found = [_video_bytes(sample) for sample in dataset]
    return turn_of(sum(found), costs, samples=len(found))


def _video_bytes(sample: dict[str, object]) -> int:
    return sum(len(part) for name, part in sample.items() if name in VIDEO_EXTENSIONS and isinstance(part, bytes))
