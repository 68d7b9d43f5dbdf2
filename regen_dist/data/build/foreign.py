"""Indices for WebDataset tars that others wrote: each tar is read once, its videos are inspected, nothing is copied.

A sample is what WebDataset takes for one: neighbouring members whose names agree up to the first dot of the file's
name. Keys of such tars are often numbers that start anew in every shard, so a sample's id comes from the shard's name
and the key together: it stays when other shards are added or removed.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from regen_dist.data.build.tarscan import BrokenTar, Pieces, printable, scan_members
from regen_dist.data.format.index import (
    SCHEMA_VERSION,
    VIDEO_EXTENSIONS,
    Sample,
    SampleFacts,
    indexed,
    read_index,
    sample_id,
    split_member,
    write_index,
)
from regen_dist.data.format.manifest import (
    MANIFEST,
    PLAN,
    DatasetManifest,
    Note,
    Skip,
    read_all,
    read_plan,
    to_json,
    write_manifest,
)
from regen_dist.data.pool import worker_pool
from regen_dist.data.storage.store import Store
from regen_dist.data.video.conversion import LeftOut
from regen_dist.data.video.reader import VideoReader
from regen_dist.errors import DataError
from regen_dist.shared_files import remove_leftovers

if TYPE_CHECKING:
    from regen_dist.data.pool import Progress


# From the members of a tar that others wrote to samples: split as WebDataset does, each video inspected.

LARGEST_VIDEO_BYTES = 2 << 30  # a sample is read whole, by every reader
_LARGEST_TEXT_BYTES = 16 << 20
NOTHING = LeftOut()
_CAPTION_KEYS = ("caption", "text")


@dataclass
class _Group:
    """Neighbouring members with one key: by extension, with the bytes of those that were wanted."""

    key: str
    members: dict[str, tuple[tarfile.TarInfo, bytes | None]] = field(default_factory=dict)
    repeated: str = ""


class _UnusableSample(Exception):
    """Error with the reason why there is no sample."""


def is_wanted(member: tarfile.TarInfo) -> bool:
    """Return true if a member's bytes are needed: a video, or a text that may hold its caption."""
    extension = split_member(member.name)[1]
    if _is_video(extension):
        return member.size <= LARGEST_VIDEO_BYTES
    return extension.rpartition(".")[2] in ("txt", "json") and member.size <= _LARGEST_TEXT_BYTES


def samples_in(
    shard: str, members: Iterable[tuple[tarfile.TarInfo, bytes | None]], left_out: LeftOut = NOTHING
) -> Iterator[Sample | Skip | Note]:
    """The samples of a shard in order, each followed by how readers convert it; for what cannot be used, or is
    `left_out`, the reason.

    A sample's id is made of the shard's name and the key. Its source is the video's name in the tar.
    """
    seen: set[str] = set()
    for group in _groups(members):
        try:
            if group.key in seen:
                raise _UnusableSample(
                    "the key came before in this shard; pack the members of a sample next to each other"
                )
            found, notes = _sample(shard, group, left_out)
            seen.add(group.key)
        except _UnusableSample as reason:
            yield Skip(source=f"{shard}: {printable(group.key)}", reason=str(reason))
            continue
        yield found
        yield from (Note(source=f"{shard}: {printable(group.key)}", note=note) for note in notes)


def _groups(members: Iterable[tuple[tarfile.TarInfo, bytes | None]]) -> Iterator[_Group]:
    group = None
    for member, data in members:
        key, extension = split_member(member.name)
        if _is_hidden(member.name):
            continue
        if group is None or group.key != key:
            if group is not None:
                yield group
            group = _Group(key)
        if extension in group.members:
            group.repeated = member.name
        group.members[extension] = member, data
    if group is not None:
        yield group


def _is_hidden(name: str) -> bool:
    """Return true for members that WebDataset skips: `__meta__` members, `.DS_Store` and the like, names without a
    dot."""
    folder, _, file = name.rpartition("/")
    first = (folder or file).split("/")[0]
    return file.startswith(".") or "." not in file or (first.startswith("__") and first.endswith("__"))


def _no_file(member: tarfile.TarInfo) -> str:
    """Explain why a member that is called as a video is none; empty for folders, hidden and other members."""
    if _is_hidden(member.name) or not _is_video(split_member(member.name)[1]):
        return ""
    if member.islnk() or member.issym():
        return "a link: the video is not in its place; pack the tar with --dereference and --hard-dereference"
    return "a sparse file, which is not there as one range of bytes; pack the tar without --sparse" * member.isreg()


def _is_video(extension: str) -> bool:
    return extension.rpartition(".")[2] in VIDEO_EXTENSIONS


def _sample(shard: str, group: _Group, left_out: LeftOut) -> tuple[Sample, tuple[str, ...]]:
    if group.repeated:
        raise _UnusableSample(f"two members are called {printable(group.repeated)}; rename one of them")
    chosen, member, data = _video(group)
    try:
        member.name.encode()
    except UnicodeEncodeError as error:
        raise _UnusableSample("its name is not UTF-8") from error
    caption = _caption(group, chosen.rpartition(".")[0])
    try:
        with VideoReader(data) as reader:
            info = reader.info()
            notes, breaks, lost, cut = reader.notes, reader.breaks(), reader.table.lost, reader.table.cut
    except DataError as error:
        raise _UnusableSample(str(error)) from error
    if reason := left_out.reason(notes):
        raise _UnusableSample(reason)
    if lost:
        raise _UnusableSample(f"it is damaged: {lost} packets cannot be decoded; `regen shards build` keeps what can")
    if cut:
        raise _UnusableSample(
            "it is damaged: the file is cut off before its end; `regen shards build` keeps what is there"
        )
    if breaks:
        raise _UnusableSample(f"{next(iter(breaks.values()))}; cut it there, for example with `regen shards build`")
    facts = SampleFacts(info.frames, info.height, info.width, info.fps, source=member.name, caption=caption)
    return replace(indexed(group.key, shard, member, data, facts), id=sample_id(f"{shard}/{group.key}")), notes


def _video(group: _Group) -> tuple[str, tarfile.TarInfo, bytes]:
    """The video of a sample, with its extension: KEY.mp4 goes before KEY.left.mp4; two that are alike in this leave
    none."""
    videos = [extension for extension in group.members if _is_video(extension)]
    plain = [extension for extension in videos if extension in VIDEO_EXTENSIONS]
    chosen = plain or videos
    if not chosen:
        raise _UnusableSample(f"it has no video, only {', '.join(map(printable, sorted(group.members)))}")
    if len(chosen) > 1:
        raise _UnusableSample(f"it has several videos: {', '.join(map(printable, sorted(chosen)))}; keep one")
    member, data = group.members[chosen[0]]
    if data is None:
        raise _UnusableSample(
            f"its video has {member.size} bytes, more than {LARGEST_VIDEO_BYTES}; cut it with `regen shards build`"
        )
    return chosen[0], member, data


def _caption(group: _Group, inner: str) -> str | None:
    """Return the caption: the content of `txt`, else `caption` or `text` of `json`; None if there is neither.

    Of KEY.left.mp4, whose `inner` name is "left", KEY.left.txt and KEY.left.json go before KEY.txt and KEY.json.
    """
    kinds = (("txt", lambda data: data.decode("utf-8-sig")), ("json", _described_caption))
    own = [(f"{inner}.{extension}", read) for extension, read in kinds] if inner else []
    for extension, read in (*own, *kinds):
        data = group.members.get(extension, (None, None))[1]
        try:
            caption = read(data).strip() if data is not None else ""
        except (ValueError, RecursionError) as error:
            raise _UnusableSample(f"its {extension} cannot be read: {error}; write it as UTF-8 text or JSON") from error
        if caption:
            return caption.encode("utf-8", "replace").decode()  # JSON can carry halves of characters
    return None


def _described_caption(data: bytes) -> str:
    facts = json.loads(data)
    values = [_first_of(facts.get(key)) for key in _CAPTION_KEYS] if isinstance(facts, dict) else []
    return next((value for value in values if isinstance(value, str) and value.strip()), "")


def _first_of(value: object) -> object:
    """The first of several captions, as of lists (`lists.read_list`)."""
    return value[0] if isinstance(value, list) and value else value


_COMPRESSED = (
    "it is compressed: samples are read by byte ranges, which a compressed tar does not have; unpack it (videos are "
    "compressed already) and index that"
)
_COMPRESSED_NAMES = (
    *(".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4", ".tar.lzma", ".tar.z"),
    *(".tgz", ".tbz", ".tbz2", ".txz", ".tzst"),
)


class IndexedTars(NamedTuple):
    """Result of `index_tars`: the manifest, the number of indices that this call wrote, and the skipped tars."""

    manifest: DatasetManifest
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
        out: folder or URL of the indices if `url` cannot be written to; the tars stay in place.
        workers: processes; all cores by default, 0 works in this process.
        skip_broken: leave out the tars that cannot be read to their end, and finish without them.
        unwanted: the videos to leave out; all others stay as they are in the tars, and are converted when they are
            read.
        progress: called with ("index", done, total).

    Raises:
        DataError: there are no tars, `out` holds something else, a tar is broken, or no sample is left.
    """
    source, store = Store(url), Store(url if out is None else out)
    apart = source.url if source.url != store.url else None
    listing = source.list_all()
    named = {name: each.size for name, each in listing.found.items() if _is_tar(name)}
    tars = {name: size for name, size in named.items() if name.endswith(".tar") and printable(name) == name}
    broken = [Skip(source=printable(name), reason=_unusable_tar(name)) for name in named if name not in tars]
    broken += [Skip(source=name, reason=why) for name, why in listing.unreadable.items() if _is_tar(name)]
    if not tars and not broken:
        raise DataError(f"{source.url}: there is no *.tar below it; give the folder that holds the shards")
    _claim(store, [index_name(name) for name in tars], apart)
    marks = {name: listing.found[name].etag for name in tars}
    todo = _unfinished(store, tars, marks, unwanted)
    if todo:
        store.delete(MANIFEST)  # it speaks of indices that are about to change
    calls = ((name, (source, store, name, unwanted, marks[name])) for name in todo)
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


def index_tar(source: Store, store: Store, name: str, unwanted: LeftOut = NOTHING, mark: str | None = None) -> str:
    """Read one tar and write its index, which keeps `mark`, the store's tag. Returns why there is none, or nothing."""
    samples: list[Sample] = []
    skipped: list[Skip] = []
    notes: list[Note] = []

    def pass_over(member: tarfile.TarInfo) -> None:
        if reason := _no_file(member):
            skipped.append(Skip(source=f"{name}: {printable(member.name)}", reason=reason))

    with Pieces(source, name) as pieces:
        try:
            for found in samples_in(name, scan_members(pieces, is_wanted, pass_over), unwanted):
                if isinstance(found, Skip):
                    skipped.append(found)
                elif isinstance(found, Note):
                    notes.append(found)
                else:
                    samples.append(found)
        except BrokenTar as error:
            return str(error)
        skipped += _trailing_members(name, pieces)
        facts: dict[str, Any] = {"name": name, "sha256": pieces.sha256(), "size": pieces.position}
    facts |= {"units": len(samples) + len(skipped), "skipped": [skip.model_dump() for skip in skipped]}
    facts |= {"options": unwanted.recorded(), "mark": mark}
    facts["notes"] = [note.model_dump() for note in notes]
    store.put(index_name(name), write_index(samples, facts))
    return ""


def _is_tar(name: str) -> bool:
    return name.lower().endswith((".tar", *_COMPRESSED_NAMES))


def _unusable_tar(name: str) -> str:
    if name.lower().endswith(_COMPRESSED_NAMES):
        return _COMPRESSED
    return "its name is not UTF-8; rename it" if printable(name) != name else "its name must end in .tar; rename it"


def index_name(tar: str) -> str:
    """Name of the index of a tar. Not `X.parquet`: img2dataset and its like keep their own table under that name."""
    return f"{tar.removesuffix('.tar')}.index.parquet"


def _claim(store: Store, indices: Sequence[str], shards_url: str | None) -> None:
    """Make sure that nothing is overwritten that this command did not make."""
    plan = read_plan(store)
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
    found = store.list()
    theirs = [name for name in (PLAN, MANIFEST, *indices) if name in found]
    if theirs:
        raise DataError(
            f"{store.url}: holds files that `regen shards index` would overwrite and did not make "
            f"({', '.join(theirs[:3])}); give another --out. Nothing was changed"
        )
    plan = {"kind": "index", "schema_version": SCHEMA_VERSION, "shards_url": shards_url}
    if not store.put_new(PLAN, to_json(plan)):
        _claim(store, indices, shards_url)  # another process was quicker; it may have claimed it for something else


def _unfinished(store: Store, tars: dict[str, int], marks: dict[str, str | None], unwanted: LeftOut) -> list[str]:
    """The tars without an index that speaks of a tar of this name, size and mark, and leaves the same out."""
    found = store.list()
    there = {index_name(name): name for name in tars if index_name(name) in found}
    finished = set()
    for index, data in read_all(store, list(there)):
        try:
            facts = read_index(data)[1]
        except DataError:
            continue  # damaged or of another version: made again
        name, options = there[index], facts.get("options", NOTHING.recorded())
        same_mark = facts.get("mark") in (None, marks[name])  # older indices have none
        if same_mark and (facts["name"], facts["size"], options) == (name, tars[name], unwanted.recorded()):
            finished.add(name)
    return [name for name in tars if name not in finished]


def _trailing_members(name: str, pieces: Pieces) -> list[Skip]:
    """Members that were appended behind the archive's end, as `cat a.tar b.tar` does: no tar reader sees them."""
    end = pieces.position
    if all(piece == bytes(len(piece)) for piece in pieces.rest()):
        return []
    return [Skip(source=name, reason=f"what lies behind the archive's end at byte {end} is read by no program")]


def _refusal(broken: Sequence[Skip], tars: int) -> str:
    lines = [f"  {skip.source}: {skip.reason}" for skip in broken]
    return "\n".join(
        [
            f"{len(broken)} of {tars} tars cannot be used; the others are indexed, there is no manifest yet. Fix them "
            "and run the same command again, or leave them out with --skip-broken:",
            *lines,
        ]
    )
