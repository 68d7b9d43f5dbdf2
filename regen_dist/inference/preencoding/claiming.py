"""Claiming a cache's folder, and whether what lies in it was made of these very videos.

Earlier versions recorded the bytes of the videos alone, neither captions nor shards. Their caches are read
and finished like others once their entries were compared with the videos' indices.
"""

from __future__ import annotations

from typing import Any

from regen_dist.data.dataset.catalogue import Dataset
from regen_dist.data.dataset.claim import PLAN, changes, claim, read_plan
from regen_dist.data.dataset.index import read_index
from regen_dist.data.dataset.manifest import read_all, to_json
from regen_dist.data.objects.store import Store
from regen_dist.errors import DataError
from regen_dist.inference.preencoding.inputs import Inputs
from regen_dist.inference.preencoding.shard import samples_in, stem_of

_OLD_SOURCE = {"fingerprint"}  # what caches said of their videos before captions and shards were recorded
_NAMED = 3


def claim_cache(store: Store, inputs: Inputs) -> None:
    """Make sure that the folder is ours, as `claim`. A plan of before is brought up to date, if all that lies there was
    made of these videos.

    Raises:
        DataError: the folder holds something else.
    """
    plan = read_plan(store)
    if plan is not None and _is_old(plan.get("source")):
        source = check_source(store, plan["source"], inputs)
        if not changes(plan, inputs.identity | {"source": source}):
            store.put(PLAN, to_json(inputs.identity))
    claim(store, inputs.identity, by="regen preencode", out="output")


def check_source(store: Store, recorded: Any, inputs: Inputs) -> dict[str, Any]:
    """The part of the identity that what a cache recorded of its videos is to be equal to.

    Raises:
        DataError: the cache is one of before, of the same videos' bytes, and its entries are not those of these videos.
    """
    source: dict[str, Any] = inputs.identity["source"]
    if not _is_old(recorded):
        return source
    if recorded["fingerprint"] == source["fingerprint"]:
        check_entries(store, inputs.dataset)
    return {"fingerprint": source["fingerprint"]}


def check_entries(store: Store, dataset: Dataset) -> None:
    """DataError unless each finished shard holds the videos of its source shard, no other, with their captions."""
    suffix, shards = "-000000.parquet", dataset.manifest.shards
    names = [name for name in store.list("latents-") if name.endswith(suffix)]
    for name, data in read_all(store, names):
        number = int(name.removesuffix(suffix).removeprefix(stem_of(0)[:-6]))
        table, facts = read_index(data)
        made = dict(zip(table["key"].to_pylist(), table["caption"].to_pylist(), strict=True))
        left_out = {skip["source"] for skip in facts["skipped"]}
        videos = {each.key: each.caption for each in samples_in(dataset, number)} if number < len(shards) else {}
        wrong = sorted((made.keys() | left_out) ^ videos.keys())
        what = "is of other videos"
        if not wrong:
            wrong = [key for key, caption in made.items() if caption != videos[key]]
            what = "has other captions"
        if wrong:
            raise DataError(
                f"{store.url}/{name}: {what} than shard {number} of {dataset.store.url} ({', '.join(wrong[:_NAMED])}"
                f"{', …' if len(wrong) > _NAMED else ''}), so the videos were built again since; give another output, "
                "or remove this cache. Nothing was changed"
            )


def _is_old(recorded: Any) -> bool:
    return isinstance(recorded, dict) and recorded.keys() == _OLD_SOURCE
