"""From the members of a tar that others wrote to samples: split as WebDataset does, each video looked into."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from regen_dist.data.dataset.index import VIDEO_EXTENSIONS, Described, Sample, indexed, sample_id, split_member
from regen_dist.data.dataset.manifest import Note, Skip
from regen_dist.data.making.tarscan import printable
from regen_dist.data.video.conversion import LeftOut
from regen_dist.data.video.reader import VideoReader
from regen_dist.errors import DataError

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


class _Unusable(Exception):
    """Why there is no sample."""


def wanted(member: tarfile.TarInfo) -> bool:
    """Whether a member's bytes are needed: a video, or a text that may hold its caption."""
    extension = split_member(member.name)[1]
    if _is_video(extension):
        return member.size <= LARGEST_VIDEO_BYTES
    return extension in ("txt", "json") and member.size <= _LARGEST_TEXT_BYTES


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
                raise _Unusable("the key came before in this shard; pack the members of a sample next to each other")
            found, notes = _sample(shard, group, left_out)
            seen.add(group.key)
        except _Unusable as reason:
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
    """What WebDataset passes over, or names by nothing: `__meta__` members, `.DS_Store` and the like, names without
    a dot."""
    folder, _, file = name.rpartition("/")
    first = (folder or file).split("/")[0]
    return file.startswith(".") or "." not in file or (first.startswith("__") and first.endswith("__"))


def _is_video(extension: str) -> bool:
    return extension.rpartition(".")[2] in VIDEO_EXTENSIONS


def _sample(shard: str, group: _Group, left_out: LeftOut) -> tuple[Sample, tuple[str, ...]]:
    if group.repeated:
        raise _Unusable(f"two members are called {printable(group.repeated)}")
    member, data = _video(group)
    try:
        member.name.encode()
    except UnicodeEncodeError as error:
        raise _Unusable("its name is not UTF-8") from error
    caption = _caption(group)
    try:
        with VideoReader(data) as reader:
            info = reader.info()
            notes, breaks, lost = reader.notes, reader.breaks(), reader.table.lost
    except DataError as error:
        raise _Unusable(str(error)) from error
    if reason := left_out.reason(notes):
        raise _Unusable(reason)
    if lost:
        raise _Unusable(f"it is damaged: {lost} packets cannot be decoded; `regen shards build` keeps what can")
    if breaks:
        raise _Unusable(f"{next(iter(breaks.values()))}; cut it there, for example with `regen shards build`")
    facts = Described(info.frames, info.height, info.width, info.fps, source=member.name, caption=caption)
    return replace(indexed(group.key, shard, member, data, facts), id=sample_id(f"{shard}/{group.key}")), notes


def _video(group: _Group) -> tuple[tarfile.TarInfo, bytes]:
    """The video of a sample: KEY.mp4 goes before KEY.left.mp4; two that are alike in this leave none."""
    videos = [extension for extension in group.members if _is_video(extension)]
    plain = [extension for extension in videos if extension in VIDEO_EXTENSIONS]
    chosen = plain or videos
    if not chosen:
        raise _Unusable(f"it has no video, only {', '.join(map(printable, sorted(group.members)))}")
    if len(chosen) > 1:
        raise _Unusable(f"it has several videos: {', '.join(map(printable, sorted(chosen)))}")
    member, data = group.members[chosen[0]]
    if data is None:
        raise _Unusable(
            f"its video has {member.size} bytes, more than {LARGEST_VIDEO_BYTES}; cut it with `regen shards build`"
        )
    return member, data


def _caption(group: _Group) -> str | None:
    """What `txt` holds, else `caption` or `text` of `json`; None where there is neither."""
    for extension, read in (("txt", _plain_caption), ("json", _described_caption)):
        data = group.members.get(extension, (None, None))[1]
        try:
            caption = read(data).strip() if data is not None else ""
        except (ValueError, RecursionError) as error:
            raise _Unusable(f"its {extension} cannot be read: {error}") from error
        if caption:
            return caption.encode("utf-8", "replace").decode()  # JSON can carry halves of characters
    return None


def _plain_caption(data: bytes) -> str:
    return data.decode("utf-8-sig")


def _described_caption(data: bytes) -> str:
    facts = json.loads(data)
    values = [facts.get(key) for key in _CAPTION_KEYS] if isinstance(facts, dict) else []
    return next((value for value in values if isinstance(value, str) and value.strip()), "")
