"""Sources of a dataset: videos in folders and buckets, or named by lists, in a fixed order, with their sizes.

Nothing is opened here: sizes come from listings, so that every task of an array finds the same sources at little cost.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from regen_dist.config.urls import BUCKET_SCHEMES, WEB_SCHEMES, carries_secret, key_url, local_path, parse_url
from regen_dist.data.build.lists import (
    CAPTION_LINES,
    FOLDER_LISTS,
    METADATA,
    PLAIN,
    VIDEO_LINES,
    CaptionRow,
    Columns,
    ReadList,
    first_of,
    is_list,
    plain_name,
    read_captions,
    read_lines,
    read_list,
    refuse,
)
from regen_dist.data.build.tarscan import printable
from regen_dist.data.format.index import VIDEO_EXTENSIONS
from regen_dist.data.format.manifest import Skip, listed
from regen_dist.data.storage.connection import StoreLimits, key_problem
from regen_dist.data.storage.object_store import ObjectInfo
from regen_dist.data.storage.store import Store
from regen_dist.errors import DataError, ObjectDenied

# Beside what shards hold as it is (`--keep`): what else of videos ffmpeg decodes, by the names of cameras and archives.
_MORE_EXTENSIONS = ("3gp", "flv", "gif", "m2ts", "mts", "mxf", "ogv", "vob", "wmv")
VIDEO_SUFFIXES = frozenset(f".{extension}" for extension in (*VIDEO_EXTENSIONS, *_MORE_EXTENSIONS))
_REQUESTS_AT_ONCE = 32
_ASKING = StoreLimits(stall_s=10.0, deadline_s=20.0)  # a web server for a size: what gives no answer now is dead
_NOT_UTF8 = "unreadable: its name is not UTF-8; rename it"
_NO_FILE = "unreadable: it is a pipe or a device; copy what it gives to a file"
_WORTH_LISTING = 1000  # so many objects of one folder are sized by listing it: a request gives a thousand


@dataclass(frozen=True, slots=True)
class VideoSource:
    """A video to build from.

    Args:
        name: name in the dataset: the path inside what was given. Never an absolute path.
        folder: URL of the store that it is in.
        file: its name in there.
        size: bytes, as listed.
        caption: caption that a list gives.
        text: a file beside it (name in `folder`) that holds its caption, where no list gives one.
        text_mark: changes with the bytes of that file: their hash, or the tag that the store gives them.
    """

    name: str
    folder: str
    file: str
    size: int
    caption: str | None = None
    text: str | None = None
    text_mark: str = ""

    @property
    def local(self) -> Path | None:
        """Its path, where it is a local file."""
        return local_path(urlsplit(self.folder).path) / self.file if self.folder.startswith("file:") else None

    @property
    def place(self) -> str:
        """Return its location, a path or a URL."""
        return str(self.local or f"{self.folder}/{self.file}")

    @property
    def suffix(self) -> str:
        """Ending of its name in small letters, with the dot."""
        return PurePosixPath(self.file).suffix.lower()


class Sources(NamedTuple):
    """All sources in their order, and what was left out before anything was opened."""

    found: tuple[VideoSource, ...]
    skipped: tuple[Skip, ...]

    @property
    def size_bytes(self) -> int:
        """Sum of the listed sizes."""
        return sum(source.size for source in self.found)

    def identity(self) -> dict[str, int | str]:
        """Number, bytes, and a digest of names, sizes and captions in order: another text is another dataset."""
        digest = hashlib.blake2b(digest_size=16)
        for one in self.found:
            digest.update(repr((one.name, one.size, one.caption, one.text, one.text_mark)).encode())
        return {"files": len(self.found), "bytes": self.size_bytes, "digest": digest.hexdigest()}


def find_sources(
    places: Sequence[str | Path], captions: str | Path | None = None, columns: Columns | None = None
) -> Sources:
    """The videos of all places, each once, in order of the places, and by name inside a folder.

    Args:
        places: video files, folders, prefixes of buckets, and lists (`lists.read_list`), as paths or URLs. What a
            list names is relative to its own folder or URL.
        captions: a list that gives captions to videos by path inside the folder or by file name, with or without its
            ending.
        columns: names of the columns of lists; None: `video` and `caption`, and METADATA's in a folder's own list.

    Raises:
        DataError: a place is missing, a list has wrong rows, there is no video at all, or no caption fits any.
    """
    missing = [
        str(place) for place in places if "://" not in str(place) and not os.path.exists(os.path.expanduser(place))
    ]
    if missing:
        raise DataError(f"no such file or folder: {', '.join(missing)}; check the paths")
    local = (Path(place).expanduser() for place in places if "://" not in str(place))
    if odd := [str(path) for path in local if not path.is_file() and not path.is_dir()]:
        raise DataError(f"{', '.join(odd)}: {_NO_FILE}")
    found: dict[str, VideoSource] = {}
    skipped: list[Skip] = []
    for place in places:
        for source in _in_list(str(place), columns) if is_list(place) else _below(str(place), columns):
            if isinstance(source, Skip):
                skipped.append(source)
            elif found.setdefault(source.place, source) is not source and is_list(place):
                skipped.append(Skip(source=source.name, reason="named twice: only the first is used"))
    if not found:
        left_out = f"; left out:\n{listed(skipped)}" if skipped else "; give another folder, or a list of videos"
        raise DataError(f"no videos ({', '.join(sorted(VIDEO_SUFFIXES))}) in {', '.join(map(str, places))}{left_out}")
    if captions is None:
        return Sources(tuple(found.values()), tuple(skipped))
    listed_captions, uncaptioned = read_captions(captions, columns or PLAIN)
    skipped += [Skip(source=str(captions).rpartition("/")[2], reason=uncaptioned)] if uncaptioned else []
    return _captioned(list(found.values()), listed_captions, str(captions), skipped)


def _below(place: str, columns: Columns | None) -> Iterator[VideoSource | Skip]:
    """The videos of a folder or a prefix in order of their names, or those that the folder's own list names; or the one
    that the place names."""
    folder, file = _place(place)
    if file:
        if printable(file) != file:
            yield Skip(source=printable(file), reason=_NOT_UTF8)
            return
        found, unreadable = _neighbours(folder, file), dict[str, str]()
    else:
        found, unreadable = _files_below(folder)
        sizes = {name: one.size for name, one in found.items()}
        if (rows := _own_rows(folder, sizes, columns)) is not None:
            yield from _skip_unlisted(folder, sizes, list(_listed(*rows)))
            return
        yield from (Skip(source=name, reason=why) for name, why in unreadable.items() if _is_video(name))
    texts = Texts(found)
    for name in [file] if file else sorted(name for name in found if _is_video(name)):
        matching = texts.matching(name)
        text = matching[0] if matching else None
        if len(matching) < 2:
            mark = _text_mark(folder, text, found[text].etag) if text else ""
            yield VideoSource(name, folder, name, found[name].size, text=text, text_mark=mark)
        else:
            both = ", ".join(matching)
            yield Skip(source=name, reason=f"ambiguous caption: {both} differ in case alone; rename one")


class Texts:
    """The text files of a listing, by the videos whose captions they may hold.

    A text belongs to the video of the same name up to the ending. Cameras, cards and people also write CLIP.TXT, or
    clip.txt beside Clip.MP4: where no text is called as a video is, one that differs in case alone (or in how accents
    are encoded) is taken, unless another video is called just like it.
    """

    def __init__(self, names: Iterable[str]) -> None:
        paths = [PurePosixPath(name) for name in names]
        self._videos = {path.with_suffix("") for path in paths if _is_video(str(path))}
        self._texts: dict[tuple[PurePosixPath, str], list[PurePosixPath]] = defaultdict(list)
        for path in paths:
            if path.suffix.lower() == ".txt":
                self._texts[self._key(path)].append(path)

    @staticmethod
    def _key(path: PurePosixPath) -> tuple[PurePosixPath, str]:
        return path.parent, unicodedata.normalize("NFC", path.stem).casefold()

    def matching(self, name: str) -> list[str]:
        """The text of a video; none, or several between which nothing decides."""
        video = PurePosixPath(name)
        near = sorted(self._texts.get(self._key(video), ()), key=lambda path: (path.suffix != ".txt", str(path)))
        if same := [path for path in near if path.stem == video.stem]:
            return [str(same[0])]
        return [str(path) for path in near if path.with_suffix("") not in self._videos]


def _text_mark(folder: str, name: str, etag: str | None) -> str:
    """Return a mark that changes with a text. Local files are read: captions are short, and modification times are
    unreliable."""
    store = Store(folder)
    if store.folder is None:
        return etag or str(store.size(name))
    try:
        return hashlib.blake2b((store.folder / name).read_bytes(), digest_size=16).hexdigest()
    except OSError:
        return "unreadable"  # the source is left out when it is surveyed


def _neighbours(folder: str, file: str) -> dict[str, ObjectInfo]:
    """A single video and the texts beside it. In a bucket the likely names are asked for, not all."""
    store = Store(folder)
    if store.folder is not None:
        names = [each.name for each in store.folder.iterdir() if each.suffix.lower() in VIDEO_SUFFIXES | {".txt"}]
        return {name: ObjectInfo(size, None) for name, size in _sizes(folder, [file, *names]).items()}
    if not store.can_list:
        return {name: ObjectInfo(size, None) for name, size in _sizes(folder, [file]).items()}
    asked = [file, *_likely_texts(file)]
    return {name: found for name in asked if (found := _looked_up(store, name)) is not None}


def _own_rows(folder: str, sizes: dict[str, int], columns: Columns | None) -> tuple[str, str, ReadList] | None:
    """The folder, its own list (`metadata.jsonl`, or `videos.txt` with `prompts.txt`) and that list's rows; None when
    it has none."""
    for name in FOLDER_LISTS:
        if name in sizes:
            return folder, f"{folder}/{name}", read_list(_spelled(folder, name), columns or METADATA)
    videos, captions = (next((name for name in names if name in sizes), None) for names in (VIDEO_LINES, CAPTION_LINES))
    if videos is None or captions is None:
        return None
    return folder, f"{folder}/{videos}", ReadList(read_lines(_spelled(folder, videos), _spelled(folder, captions)))


def _spelled(folder: str, name: str) -> str:
    local = Store(folder).folder
    return f"{folder}/{name}" if local is None else str(local / name)


def _skip_unlisted(
    folder: str, sizes: dict[str, int], named: Sequence[VideoSource | Skip]
) -> Iterator[VideoSource | Skip]:
    """Yield the sources of a folder's own list, and a skip for each other video."""
    yield from named
    given = {source.place for source in named if isinstance(source, VideoSource)}
    for name in sorted(name for name in sizes if _is_video(name)):
        if VideoSource(name, folder, name, 0).place not in given:
            yield Skip(source=name, reason="not named: the folder's list of videos leaves it out")


def _place(place: str) -> tuple[str, str]:
    """URL of a folder, and the file in it when one file is meant."""
    store = Store(place)
    parent, _, name = store.url.rpartition("/")
    if store.folder is not None:
        return (Store(store.folder.parent).url, store.folder.name) if store.folder.is_file() else (store.url, "")
    if _is_video(name):
        for spelled in dict.fromkeys((name, unquote(name))):
            if spelled in _sizes(parent, [spelled]):
                return parent, spelled
        if not store.can_list:
            raise DataError(f"{store.url}: there is no such file, or the server does not give it; check the address")
    return store.url, ""


def _in_list(place: str, columns: Columns | None) -> Iterator[VideoSource | Skip]:
    """The videos that a list names, in its order."""
    base, _ = _place(place) if "://" not in place else (Store(place).url.rpartition("/")[0], "")
    return _listed(base, place, read_list(place, columns or PLAIN))


def _listed(base: str, place: str, found: ReadList) -> Iterator[VideoSource | Skip]:
    """The videos of the rows of a list. DataError for all rows that name none; but links to the web rot, those that
    lead to no file are left out."""
    rows = found.rows
    if found.uncaptioned:
        yield Skip(source=place.rpartition("/")[2], reason=found.uncaptioned)
    located: dict[CaptionRow, tuple[str, str]] = {}
    wrong: dict[CaptionRow, str] = {}
    by_folder: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        try:
            folder, file = located[row] = _locate(base, row.video)
            by_folder[folder].append(file)
        except DataError as error:
            wrong[row] = str(error)
    sizes = dict(_sizes_of_all(by_folder))
    gone = {row for row, (folder, file) in located.items() if file not in sizes[folder]}
    dead = {row for row in gone if not Store(located[row][0]).can_list}
    wrong |= {row: f"there is no {row.video}" for row in gone - dead}
    refuse(place, [f"{row.where}: {wrong[row]}" for row in rows if row in wrong])
    for row, (folder, file) in located.items():
        if row in dead:
            yield Skip(source=_name(base, row.video, file), reason="dead link: the server does not have or give it")
        else:
            yield VideoSource(_name(base, row.video, file), folder, file, sizes[folder][file], row.caption)


def _locate(base: str, video: str) -> tuple[str, str]:
    """Folder and file of what a list names; `base` is the URL of the list's own folder."""
    scheme = video.partition("://")[0]
    if scheme in BUCKET_SCHEMES and scheme != video:
        bucket, _, key = video.removeprefix(f"{scheme}://").partition("/")
        return _located(scheme, bucket, key)
    if scheme in WEB_SCHEMES and scheme != video:
        return _split_web_url(video)
    if "://" in video or video.startswith(("/", "~", "pipe:")):
        return _split(str(Store(video).folder))
    if base.startswith("file:"):
        return _split(os.path.abspath(f"{Store(base).folder}/{video}"))
    place = parse_url(base)
    key = posixpath.normpath(f"{place.prefix}/{video}").lstrip("/")
    if key.startswith(".."):
        raise DataError(f"{video} leads out of the bucket; name a file inside it")
    return _located(place.scheme, place.bucket or "", key)


def _split_web_url(video: str) -> tuple[str, str]:
    """Folder and file of an address, as a browser shows it: `%20` is a space."""
    try:
        place = parse_url(video)
    except ValueError as error:
        raise DataError(str(error)) from None
    folder, _, file = place.url.rpartition("/")
    if file == place.bucket or not place.prefix:
        raise DataError(f"{place.url} names a server, not a file; add the path of a file")
    return Store(folder).url, unquote(file)


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
    """Return the dataset's name for an entry of a list, without paths of this machine."""
    video = str(local_path(urlsplit(video).path)) if video.startswith("file:") else video
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
    if store.read_only and not (store.can_list and len(files) >= _WORTH_LISTING):
        return {file: size for file in files if (size := _web_size(store, file)) is not None}
    if len(files) >= _WORTH_LISTING:
        listed = store.list()
        return {file: listed[file] for file in files if file in listed}
    return {file: found.size for file in files if (found := _looked_up(store, file)) is not None}


def _looked_up(store: Store, file: str) -> ObjectInfo | None:
    """Size and tag of one object of a bucket. Where that is denied the listing says whether it exists: it is left out
    later, with the reason."""
    try:
        return store.info(file)
    except ObjectDenied:
        return store.list_found(file).get(file)


def _web_size(store: Store, file: str) -> int | None:
    try:
        return Store(store.url, _ASKING).size(file)
    except ObjectDenied:
        return None


def _files_below(folder: str) -> tuple[dict[str, ObjectInfo], dict[str, str]]:
    """Size and tag of every file below a folder or prefix, hidden ones left out; and objects that cannot be read by
    their keys, with why."""
    store = Store(folder)
    if not store.can_list:
        own = _sizes(folder, [*FOLDER_LISTS, *VIDEO_LINES, *CAPTION_LINES])
        if not own:
            store.list()  # which says that there is no listing
        return {name: ObjectInfo(size, None) for name, size in own.items()}, {}
    if store.folder is None:
        listing = store.list_all()
        seen = {name: one for name, one in listing.found.items() if "/." not in f"/{name}"}
        return seen, listing.unreadable
    found, unreadable = {}, {}

    def refuse_folder(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be read: {error.strerror}; check its owner and mode")

    visited = set()
    for top, folders, names in os.walk(store.folder, onerror=refuse_folder, followlinks=True):
        if (place := os.path.realpath(top)) in visited:  # a link to a folder above, or to one that was seen
            folders.clear()
            continue
        visited.add(place)
        folders[:] = sorted(each for each in folders if not each.startswith("."))  # such as .Trash-1000
        for path in (Path(top, name) for name in names if not name.startswith(".")):
            if (
                path.suffix.lower() in VIDEO_SUFFIXES | {".txt"} or path.name in FOLDER_LISTS
            ):  # a dangling link is a source that cannot be read
                name = path.relative_to(store.folder).as_posix()
                if printable(name) != name:
                    unreadable[printable(name)] = _NOT_UTF8
                    continue
                if path.exists() and not path.is_file():
                    unreadable[name] = _NO_FILE
                    continue
                size = path.stat().st_size if path.exists() else 0
                found[name] = ObjectInfo(size, None)
    return found, unreadable


def _captioned(found: Sequence[VideoSource], captions: dict[str, str], place: str, skipped: Sequence[Skip]) -> Sources:
    """The sources with the captions of a list, each that of the name that calls it most exactly. Names of no video are
    counted among what is left out.

    Raises:
        DataError: no name calls a video, or one calls videos of several folders alike.
    """
    left, own, wrong = dict(captions), dict[VideoSource, str](), list[str]()
    all_names = [_called(source) for source in found]
    for exactness in range(len(all_names[0])):
        videos: dict[str, list[VideoSource]] = defaultdict(list)
        for source, names in zip(found, all_names, strict=True):
            if names[exactness] in left:
                videos[names[exactness]].append(source)
        for name, sources in videos.items():
            caption = left.pop(name)
            for source in sources:
                own.setdefault(source, caption)
            if len({source.place.rpartition("/")[0] for source in sources}) > 1:
                wrong.append(f"{name} is {first_of([source.place for source in sources])}: give the path in the folder")
    if len(left) == len(captions):
        raise DataError(
            f"no caption belongs to a video: captions name {first_of([*left])}, the videos are "
            f"{first_of([one.name for one in found])}; name videos by their path in the folder or their file name"
        )
    refuse(place, wrong)
    if left:
        reason = f"no video: {len(left)} captions without a video ({first_of([*left])})"
        skipped = (*skipped, Skip(source=place.rpartition("/")[2], reason=reason))
    return Sources(tuple(replace(one, caption=one.caption or own.get(one)) for one in found), tuple(skipped))


def _called(source: VideoSource) -> tuple[str, ...]:
    """Names by which a list may refer to a video, the most exact first: path or file name, with or without ending."""
    path = PurePosixPath(plain_name(source.name))
    return str(path), str(path.with_suffix("")), path.name, path.stem


def _is_video(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES


def _likely_texts(name: str) -> list[str]:
    """Names of the text that may hold the caption of a single video in a bucket."""
    stem = PurePosixPath(name).with_suffix("")
    stems = dict.fromkeys((stem, stem.with_name(stem.name.lower()), stem.with_name(stem.name.upper())))
    return [f"{one}{suffix}" for one in stems for suffix in (".txt", ".TXT", ".Txt")]
