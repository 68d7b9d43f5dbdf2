"""Indices for WebDataset tars that others wrote: each tar is read once, its videos are looked into, nothing is copied.

A sample is what WebDataset takes for one: neighbouring members whose names agree up to the first dot of the file's
name. Keys of such tars are often numbers that start anew in every shard, so a sample's id comes from the shard's name
and the key together: it stays when other shards are added or removed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from regen_dist.data.dataset.claim import PLAN
from regen_dist.data.dataset.index import SCHEMA_VERSION, Sample, read_index, write_index
from regen_dist.data.dataset.manifest import MANIFEST, Manifest, Note, Skip, read_all, to_json, write_manifest
from regen_dist.data.making.members import NOTHING, samples_in, wanted
from regen_dist.data.making.tarscan import BrokenTar, Pieces, scan_members
from regen_dist.data.objects.store import Store, remove_leftovers
from regen_dist.data.pool import worker_pool
from regen_dist.data.video.conversion import LeftOut
from regen_dist.errors import DataError

if TYPE_CHECKING:
    from regen_dist.data.pool import Progress

_COMPRESSED = (
    "it is compressed: samples are read by byte ranges, which a compressed tar does not have; unpack it (videos are "
    "compressed already) and index that"
)
_COMPRESSED_NAMES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class IndexedTars(NamedTuple):
    """What `index_tars` made: the manifest, how many indices this call wrote, and the tars that were left out."""

    manifest: Manifest
    shards_made: int
    broken: tuple[Skip, ...]


def index_tars(
    url: str | Path,
    out: str | Path | None = None,
    *,
    workers: int | None = None,
    skip_broken: bool = False,
    unwanted: LeftOut = NOTHING,
    progress: Progress = lambda stage, done, total: None,
) -> IndexedTars:
    """Make (or finish) the dataset of the tars below `url`: an index beside each, the manifest last.

    Args:
        url: folder or URL; every `*.tar` below it is a shard, whatever folder it is in.
        out: where the indices go when `url` cannot be written to; the tars stay where they are.
        workers: processes; all cores by default, 0 works in this process.
        skip_broken: leave out the tars that cannot be read to their end, and finish without them.
        unwanted: which videos are left out; all others stay as they are in the tars, and are converted when they are
            read.
        progress: called with ("index", done, total).

    Raises:
        DataError: there are no tars, `out` holds something else, a tar is broken, or no sample is left.
    """
    source, store = Store(url), Store(url if out is None else out)
    apart = source.url if source.url != store.url else None
    listing = source.list_all()
    tars = {name: each.size for name, each in listing.found.items() if name.endswith(".tar")}
    broken = [Skip(source=name, reason=_COMPRESSED) for name in listing.found if name.endswith(_COMPRESSED_NAMES)]
    broken += [
        Skip(source=name, reason=why)
        for name, why in listing.unreadable.items()
        if name.endswith((".tar", *_COMPRESSED_NAMES))
    ]
    if not tars and not broken:
        raise DataError(f"{source.url}: there is no *.tar below it; give the folder that holds the shards")
    _claim(store, [index_name(name) for name in tars], apart)
    todo = _unfinished(store, tars, unwanted)
    if todo and MANIFEST in store.list(MANIFEST):
        store.delete(MANIFEST)  # it speaks of indices that are about to change
    calls = ((name, (source, store, name, unwanted)) for name in todo)
    progress("index", len(tars) - len(todo), len(tars))
    with worker_pool(workers) as pool:
        for done, (name, problem) in enumerate(pool.run(index_tar, calls), len(tars) - len(todo) + 1):
            broken += [Skip(source=name, reason=problem)] if problem else []
            progress("index", done, len(tars))
    left_out = {skip.source for skip in broken}
    if broken and not skip_broken:
        raise DataError(_refusal(broken, len(tars.keys() | left_out)))
    indices = [index_name(name) for name in tars if name not in left_out]
    manifest = write_manifest(
        store, indices, "index", {"skip_broken": skip_broken} | unwanted.recorded(), broken, apart
    )
    return IndexedTars(manifest, len(todo) - len(left_out & tars.keys()), tuple(broken))


def index_tar(source: Store, store: Store, name: str, unwanted: LeftOut = NOTHING) -> str:
    """Read one tar and write its index. Returns why there is none, or nothing."""
    samples: list[Sample] = []
    skipped: list[Skip] = []
    notes: list[Note] = []
    with Pieces(source, name) as pieces:
        try:
            for found in samples_in(name, scan_members(pieces, wanted), unwanted):
                if isinstance(found, Skip):
                    skipped.append(found)
                elif isinstance(found, Note):
                    notes.append(found)
                else:
                    samples.append(found)
        except BrokenTar as error:
            return str(error)
        skipped += _behind_the_end(name, pieces)
        facts: dict[str, Any] = {"name": name, "sha256": pieces.sha256(), "size": pieces.position}
    facts |= {"units": len(samples) + len(skipped), "skipped": [skip.model_dump() for skip in skipped]}
    facts["options"] = unwanted.recorded()
    facts["notes"] = [note.model_dump() for note in notes]
    store.put(index_name(name), write_index(samples, facts))
    return ""


def index_name(tar: str) -> str:
    """Name of the index of a tar. Not `X.parquet`: img2dataset and its like keep their own table under that name."""
    return f"{tar.removesuffix('.tar')}.index.parquet"


def _claim(store: Store, indices: Sequence[str], shards_url: str | None) -> None:
    """Make sure that nothing is overwritten that this command did not make."""
    found = store.list()
    plan = _plan(store.get(PLAN)) if PLAN in found else None
    if plan is not None:
        made_by, tars = plan.get("kind", "build"), plan.get("shards_url")
        if made_by != "index":
            raise DataError(
                f"{store.url}: already has an index, made by `regen shards {made_by}`; train from it as it is, or give "
                "another --out. Nothing was changed"
            )
        if tars != shards_url:
            raise DataError(
                f"{store.url}: holds the index of other tars ({tars or 'those beside it'}, now "
                f"{shards_url or 'those beside it'}); give another --out. Nothing was changed"
            )
        if store.folder is not None:
            remove_leftovers(store.folder)
        return
    theirs = [name for name in (PLAN, MANIFEST, *indices) if name in found]
    if theirs:
        raise DataError(
            f"{store.url}: holds files that `regen shards index` would overwrite and did not make "
            f"({', '.join(theirs[:3])}); give another --out. Nothing was changed"
        )
    plan = {"kind": "index", "schema_version": SCHEMA_VERSION, "shards_url": shards_url}
    if not store.put_new(PLAN, to_json(plan)):
        _claim(store, indices, shards_url)  # another process was quicker; it may have claimed it for something else


def _plan(data: bytes) -> dict[str, Any] | None:
    """A plan of ours; None when another program wrote it."""
    try:
        plan = json.loads(data)
    except ValueError:
        return None
    return plan if isinstance(plan, dict) and "schema_version" in plan else None


def _unfinished(store: Store, tars: dict[str, int], unwanted: LeftOut) -> list[str]:
    """The tars without an index that speaks of a tar of this name and size, and leaves the same out."""
    found = store.list()
    there = {index_name(name): name for name in tars if index_name(name) in found}
    finished = set()
    for index, data in read_all(store, list(there)):
        try:
            facts = read_index(data)[1]
        except DataError:
            continue  # damaged or of another version: made again
        options = facts.get("options", NOTHING.recorded())
        if (facts["name"], facts["size"], options) == (there[index], tars[there[index]], unwanted.recorded()):
            finished.add(there[index])
    return [name for name in tars if name not in finished]


def _behind_the_end(name: str, pieces: Pieces) -> list[Skip]:
    """Members that were appended behind the archive's end, as `cat a.tar b.tar` does: no tar reader sees them."""
    end = pieces.position
    if all(piece == bytes(len(piece)) for piece in pieces.rest()):
        return []
    return [Skip(source=name, reason=f"what lies behind the archive's end at byte {end} is read by no program")]


def _refusal(broken: Sequence[Skip], tars: int) -> str:
    lines = [f"  {skip.source}: {skip.reason}" for skip in broken]
    return "\n".join(
        [
            f"{len(broken)} of {tars} tars cannot be used; the others are indexed, there is no manifest yet. Mend them "
            "and run the same command again, or leave them out with --skip-broken:",
            *lines,
        ]
    )
