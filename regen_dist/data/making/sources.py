"""What a dataset is built from: videos in folders and buckets, or named by lists, in a fixed order, with their sizes.

Nothing is opened here: sizes come from listings, so that every task of an array finds the same sources at little cost.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from regen_dist.config.urls import BUCKET_SCHEMES, carries_secret, key_url, parse_url
from regen_dist.data.dataset.index import VIDEO_EXTENSIONS
from regen_dist.data.dataset.manifest import Skip, listed
from regen_dist.data.making.captions import Row, is_list, read_captions, read_rows, refuse
from regen_dist.data.objects.connection import key_problem
from regen_dist.data.objects.store import Store
from regen_dist.errors import DataError

VIDEO_SUFFIXES = frozenset(f".{extension}" for extension in VIDEO_EXTENSIONS)
_REQUESTS_AT_ONCE = 32
_WORTH_LISTING = 1000  # so many objects of one folder are sized by listing it: a request gives a thousand


@dataclass(frozen=True, slots=True)
class Source:
    """A video to build from.

    Args:
        name: how the dataset calls it: its path inside what was given. Never an absolute path.
        folder: URL of the store that it is in.
        file: its name in there.
        size: in bytes, as listed.
        caption: from a list.
        text: a file beside it (name in `folder`) that holds its caption, where no list gives one.
        text_size: of that file, in bytes.
    """

    name: str
    folder: str
    file: str
    size: int
    caption: str | None = None
    text: str | None = None
    text_size: int = 0

    @property
    def local(self) -> Path | None:
        """Its path, where it is a local file."""
        return Path(unquote(urlsplit(self.folder).path)) / self.file if self.folder.startswith("file:") else None

    @property
    def place(self) -> str:
        """Where it is: a path or a URL."""
        return str(self.local or f"{self.folder}/{self.file}")

    @property
    def suffix(self) -> str:
        """Ending of its name in small letters, with the dot."""
        return PurePosixPath(self.file).suffix.lower()


class Sources(NamedTuple):
    """All sources in their order, and what was left out before anything was opened."""

    found: tuple[Source, ...]
    skipped: tuple[Skip, ...]

    @property
    def size_bytes(self) -> int:
        """Sum of the listed sizes."""
        return sum(source.size for source in self.found)

    def identity(self) -> dict[str, int | str]:
        """Number, bytes, and a digest of names, sizes and captions in order."""
        digest = hashlib.blake2b(digest_size=16)
        for one in self.found:
            digest.update(repr((one.name, one.size, one.caption, one.text, one.text_size)).encode())
        return {"files": len(self.found), "bytes": self.size_bytes, "digest": digest.hexdigest()}


def find_sources(places: Sequence[str | Path], captions: str | Path | None = None) -> Sources:
    """The videos of all places, each once, in order of the places, and by name inside a folder.

    Args:
        places: video files, folders, prefixes of buckets, and lists (`captions.read_rows`), as paths or URLs. What a
            list names is relative to its own folder or URL.
        captions: a list that gives captions to videos by path inside the folder or by file name.

    Raises:
        DataError: a place is missing, a list has wrong rows, there is no video at all, or no caption fits any.
    """
    missing = [str(place) for place in places if "://" not in str(place) and not Path(place).expanduser().exists()]
    if missing:
        raise DataError(f"no such file or folder: {', '.join(missing)}")
    found: dict[str, Source] = {}
    skipped: list[Skip] = []
    for place in places:
        for source in _listed(str(place)) if is_list(place) else _below(str(place)):
            if isinstance(source, Skip):
                skipped.append(source)
            elif found.setdefault(source.place, source) is not source and is_list(place):
                skipped.append(Skip(source=source.name, reason="named twice: only the first is used"))
    if not found:
        left_out = f"; left out:\n{listed(skipped)}" if skipped else ""
        raise DataError(f"no videos ({', '.join(sorted(VIDEO_SUFFIXES))}) in {', '.join(map(str, places))}{left_out}")
    if captions is None:
        return Sources(tuple(found.values()), tuple(skipped))
    return _captioned(list(found.values()), read_captions(captions), skipped)


def _below(place: str) -> Iterator[Source | Skip]:
    """The videos of a folder or a prefix in order of their names; or the one that the place names."""
    folder, file = _place(place)
    if file:
        sizes = _sizes(folder, [file, *_beside(file)])
    else:
        sizes, unreadable = _files_below(folder)
        yield from (Skip(source=name, reason=why) for name, why in unreadable.items() if _is_video(name))
    for name in [file] if file else sorted(name for name in sizes if _is_video(name)):
        text = next((text for text in _beside(name) if text in sizes), None)
        yield Source(name, folder, name, sizes[name], text=text, text_size=sizes[text] if text else 0)


def _place(place: str) -> tuple[str, str]:
    """URL of a folder, and the file in it when one file is meant."""
    store = Store(place)
    parent, _, name = store.url.rpartition("/")
    if store.folder is not None:
        return (Store(store.folder.parent).url, store.folder.name) if store.folder.is_file() else (store.url, "")
    if _is_video(name):
        for spelled in dict.fromkeys((name, unquote(name))):
            if spelled in Store(parent).list(spelled):
                return parent, spelled
    return store.url, ""


def _listed(place: str) -> Iterator[Source]:
    """The videos that a list names, in its order. DataError for all its rows that name none."""
    base, _ = _place(place) if "://" not in place else (Store(place).url.rpartition("/")[0], "")
    located: dict[Row, tuple[str, str]] = {}
    wrong: dict[Row, str] = {}
    by_folder: dict[str, list[str]] = defaultdict(list)
    rows = read_rows(place)
    for row in rows:
        try:
            folder, file = located[row] = _locate(base, row.video)
            by_folder[folder].append(file)
        except DataError as error:
            wrong[row] = str(error)
    sizes = dict(_sizes_of_all(by_folder))
    wrong |= {row: f"there is no {row.video}" for row, (folder, file) in located.items() if file not in sizes[folder]}
    refuse(place, [f"{row.where}: {wrong[row]}" for row in rows if row in wrong])
    for row, (folder, file) in located.items():
        yield Source(_name(base, row.video, file), folder, file, sizes[folder][file], row.caption)


def _locate(base: str, video: str) -> tuple[str, str]:
    """Folder and file of what a list names; `base` is the URL of the list's own folder."""
    scheme = video.partition("://")[0]
    if scheme in BUCKET_SCHEMES and scheme != video:
        bucket, _, key = video.removeprefix(f"{scheme}://").partition("/")
        return _located(scheme, bucket, key)
    if "://" in video or video.startswith(("/", "~", "pipe:")):
        return _split(str(Store(video).folder))
    if base.startswith("file:"):
        return _split(os.path.abspath(f"{Store(base).folder}/{video}"))
    place = parse_url(base)
    key = posixpath.normpath(f"{place.prefix}/{video}").lstrip("/")
    if key.startswith(".."):
        raise DataError(f"{video} leads out of the bucket")
    return _located(place.scheme, place.bucket or "", key)


def _split(path: str) -> tuple[str, str]:
    folder, _, file = path.rpartition("/")
    return Store(folder or "/").url, file


def _located(scheme: str, bucket: str, key: str) -> tuple[str, str]:
    """Folder and file of a bucket's key, in which no character has a meaning but the slash."""
    if carries_secret(key):
        raise DataError("a signed URL: lists must not carry credentials; name the object alone")
    if problem := key_problem(key):
        raise DataError(f"{key!r}: {problem}: rename the object")
    folder, slash, file = key.rpartition("/")
    return Store(key_url(scheme, bucket, f"{folder}{slash}")).url, file


def _name(base: str, video: str, file: str) -> str:
    """How the dataset calls what a list names: no path of this machine is told."""
    video = unquote(urlsplit(video).path) if video.startswith("file:") else video
    here = str(Store(base).folder or base)
    if video.startswith(f"{here}/"):
        return video[len(here) + 1 :]
    return file if video.startswith(("/", "~")) else video


def _sizes_of_all(folders: dict[str, list[str]]) -> Iterable[tuple[str, dict[str, int]]]:
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as threads:
        # A folder of which much is wanted is one call; of others every file is one.
        calls = [
            (folder, files[start : start + step])
            for folder, files in folders.items()
            for step in [len(files) if len(files) >= _WORTH_LISTING or folder.startswith("file:") else 1]
            for start in range(0, len(files), step)
        ]
        sizes: dict[str, dict[str, int]] = defaultdict(dict)
        for (folder, _), found in zip(calls, threads.map(lambda call: _sizes(*call), calls), strict=True):
            sizes[folder] |= found
        return sizes.items()


def _sizes(folder: str, files: Sequence[str]) -> dict[str, int]:
    """Sizes of those of these files that are there."""
    store = Store(folder)
    if store.folder is not None:
        paths = ((file, store.folder / file) for file in files)
        return {file: path.stat().st_size for file, path in paths if path.is_file()}
    if len(files) >= _WORTH_LISTING:
        found = store.list()
    else:
        found = {name: size for file in files for name, size in store.list(file).items()}
    return {file: found[file] for file in files if file in found}


def _files_below(folder: str) -> tuple[dict[str, int], dict[str, str]]:
    """Size of every file below a folder or prefix, hidden ones left out; and objects that cannot be read by their keys,
    with why."""
    store = Store(folder)
    if store.folder is None:
        listing = store.list_all()
        seen = {name: one.size for name, one in listing.found.items() if not PurePosixPath(name).name.startswith(".")}
        return seen, listing.unreadable
    found = {}
    for top, _, names in os.walk(store.folder):
        for path in (Path(top, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() in VIDEO_SUFFIXES | {".txt"}:  # a dangling link is a source that cannot be read
                found[path.relative_to(store.folder).as_posix()] = path.stat().st_size if path.exists() else 0
    return found, {}


def _captioned(found: Sequence[Source], captions: dict[str, str], skipped: Sequence[Skip]) -> Sources:
    """The sources with the captions of a list; what they say of videos that are not there is left out."""
    names = {name for source in found for name in (source.name, PurePosixPath(source.name).name)}
    unused = [name for name in captions if name not in names]
    if len(unused) == len(captions):
        raise DataError(
            f"no caption belongs to a video: captions name {unused[:3]}, the videos are {sorted(names)[:3]}"
        )
    return Sources(
        tuple(_with_caption(source, captions) for source in found),
        (*skipped, *(Skip(source=name, reason="no video: a caption without a video") for name in unused)),
    )


def _with_caption(source: Source, captions: dict[str, str]) -> Source:
    caption = source.caption or captions.get(source.name, captions.get(PurePosixPath(source.name).name))
    return replace(source, caption=caption)


def _is_video(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES


def _beside(name: str) -> list[str]:
    """The text files that may hold a video's caption: cameras and their cards write CLIP.TXT or Clip.Txt, too."""
    stem = PurePosixPath(name).with_suffix("")
    stems = dict.fromkeys((stem, stem.with_name(stem.name.lower()), stem.with_name(stem.name.upper())))
    return [f"{one}{suffix}" for one in stems for suffix in (".txt", ".TXT", ".Txt")]
