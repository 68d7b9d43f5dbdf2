"""Manifest of a dataset: `manifest.json`, written last. A folder without it is unfinished."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from regen_dist.data.format.index import SCHEMA_VERSION, read_index
from regen_dist.data.storage.store import Store
from regen_dist.errors import BucketMissing, DataError, ObjectMissing
from regen_dist.jsontext import json_text

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "manifest.json"
Kind = Literal["build", "index", "synthetic", "latents"]
_READS_AT_ONCE = 16
MOST_LISTED = 10_000  # skipped sources and notes, each: every rank reads the manifest
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Skip(_Record):
    """Source, or segment of one, that was skipped, with the reason."""

    source: str
    segment: int | None = None
    reason: str


class Note(_Record):
    """Note on how the samples of a source differ from its file: "KIND: what was done"."""

    source: str
    note: str


class ShardEntry(_Record):
    """Shard in the manifest: sizes in bytes, SHA-256 in hex of the tar and of its index."""

    name: str
    size: int
    sha256: str
    index: str
    index_sha256: str
    samples: int


class Totals(_Record):
    """Sums over a dataset."""

    shards: int
    samples: int
    frames: int
    seconds: float
    bytes: int


class SampleDigests(_Record):
    """Digests of the samples' properties in the indices, in row order: of the captions, and of all others (source,
    frames, sides, frame rate, motion)."""

    captions: str
    facts: str


class DatasetManifest(_Record):
    """Contents of a dataset.

    `kind` is the command that made it, `options` its options, `skipped` the sources left out, `notes` the conversions:
    at most the first `MOST_LISTED` of each. Where there are more, `skipped_counts` and `note_counts` have the number of
    all by reason and by kind, and the indices of the shards list them.
    `shards_url` is the location of the tars if they are not beside their indices. `fingerprint` covers the samples'
    bytes and their order; `described` their properties, None in manifests older than this field (the function
    `described` below computes it).
    """

    schema_version: int
    kind: Kind
    fingerprint: str
    totals: Totals
    shards: tuple[ShardEntry, ...]
    options: dict[str, Any]
    skipped: tuple[Skip, ...]
    shards_url: str | None = None
    notes: tuple[Note, ...] = ()
    described: SampleDigests | None = None
    skipped_counts: dict[str, int] | None = None
    note_counts: dict[str, int] | None = None

    @property
    def num_skipped(self) -> int:
        """Number of sources and segments that were left out."""
        return len(self.skipped) if self.skipped_counts is None else sum(self.skipped_counts.values())

    def reasons(self) -> dict[str, int]:
        """Return the number of sources and segments left out by reason, as `Counts` merges them, the largest first."""
        if self.skipped_counts is None:
            return Counts(skip.reason for skip in self.skipped).numbers
        return _largest_first(self.skipped_counts)

    def conversions(self) -> dict[str, int]:
        """Return the number of converted sources by the kind of the conversion."""
        return Counts(map(_kind, self.notes)).numbers if self.note_counts is None else _largest_first(self.note_counts)

    def boundaries(self) -> str:
        """Return a digest of the shard boundaries: the number of samples of each shard."""
        counts = ",".join(str(entry.samples) for entry in self.shards)
        return hashlib.blake2b(counts.encode(), digest_size=16).hexdigest()


def read_manifest(store: Store) -> DatasetManifest:
    """Read the manifest of a folder; raise DataError if there is none or it has another schema version."""
    return parse_manifest(store, manifest_bytes(store))


def finished_manifest(store: Store) -> DatasetManifest | None:
    """Return the manifest of a folder; None if there is none, or a damaged one, which is written anew."""
    data = _stored(store)
    try:
        return None if data is None else parse_manifest(store, data)
    except DataError:
        return None


def _stored(store: Store) -> bytes | None:
    """Return the stored bytes of the manifest; None if there is none, by one request: another task may remove it."""
    try:
        return store.get(MANIFEST)
    except ObjectMissing as error:
        if isinstance(error, BucketMissing):
            raise
        return None


def manifest_bytes(store: Store) -> bytes:
    """Return the stored bytes of the manifest; raise DataError if there is none."""
    try:
        return store.get(MANIFEST)
    except ObjectMissing as error:
        if isinstance(error, BucketMissing) or not store.can_list:
            raise
        raise DataError(
            f"{store.url}: there is no {MANIFEST}, so no finished dataset. Build one with `regen shards build SOURCE "
            f"--out {store.url}`, a cache of latents with `regen preencode`, or index tars that are there with `regen "
            f"shards index {store.url}`"
        ) from None


def parse_manifest(store: Store, data: bytes) -> DatasetManifest:
    """Parse the bytes of a manifest."""
    try:
        raw = json.loads(data)
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{store.url}/{MANIFEST}: schema version {version}, this program reads {SCHEMA_VERSION}; build the "
                f"shards again"
            )
        return DatasetManifest.model_validate(raw)
    except (ValidationError, ValueError) as error:
        raise DataError(
            f"{store.url}/{MANIFEST}: damaged ({str(error).splitlines()[0]}); run the build again"
        ) from error


def only_latents(manifest: DatasetManifest, url: str) -> None:
    """Raise DataError if a dataset holds videos."""
    if manifest.kind != "latents":
        raise DataError(
            f"{url} holds videos, not latents (it was made by `regen shards {manifest.kind}`); make a cache of it with "
            "`regen preencode`, and give that cache"
        )


def only_videos(manifest: DatasetManifest, url: str) -> None:
    """Raise DataError if a dataset holds latents."""
    if manifest.kind == "latents":
        raise DataError(
            f"{url} holds latents that `regen preencode` made, not videos; give the dataset of videos, or train a "
            "text-to-video model on it (task: t2v)"
        )


def write_manifest(
    store: Store,
    indices: Sequence[str],
    kind: Kind,
    options: dict[str, Any],
    skipped: Iterable[Skip] = (),
    shards_url: str | None = None,
) -> DatasetManifest:
    """Collect the facts of the named indices, in this order, and write the manifest.

    Raises:
        DataError: an index is missing or damaged, or none holds a sample.
    """
    entries, totals, digest, described = [], _Sums(), Fingerprint(), _Descriptions()
    left_out, left_out_counts, notes, note_counts = list[Skip](), Counts(), list[Note](), Counts()
    before = dict[Note, None]()  # notes of the shard before this one, in which its first source may have begun

    def leave_out(some: Iterable[Skip]) -> None:
        for skip in some:
            left_out_counts.add(skip.reason)
            if len(left_out) < MOST_LISTED:
                left_out.append(skip)

    leave_out(skipped)
    for name, data in read_all(store, indices):
        table, facts = read_index(data)
        leave_out(Skip(**skip) for skip in facts["skipped"])
        these = dict.fromkeys(Note(**note) for note in facts.get("notes", ()))
        new = [note for note in these if note not in before]
        before = these
        note_counts.update(map(_kind, new))
        notes += new[: MOST_LISTED - len(notes)]
        if table.num_rows:
            entries.append(_entry(name, data, facts, table.num_rows))
            totals.add(table, facts["size"])
            digest.add(table)
            described.add(table)
    if not entries:
        first = listed(left_out, left_out_counts.total)
        raise DataError(f"{store.url}: no sample is left; correct the sources or the options:\n{first}")
    manifest = DatasetManifest(
        schema_version=SCHEMA_VERSION,
        kind=kind,
        fingerprint=digest.hex(),
        totals=totals.over(len(entries)),
        shards=tuple(entries),
        options=options,
        skipped=tuple(left_out),
        shards_url=shards_url,
        notes=tuple(notes),
        described=described.digests(),
        skipped_counts=left_out_counts.numbers if left_out_counts.total > len(left_out) else None,
        note_counts=note_counts.numbers if note_counts.total > len(notes) else None,
    )
    # Fields that few manifests need are left out of the others: older programs refuse what they do not know.
    unneeded = {name for name in ("skipped_counts", "note_counts") if getattr(manifest, name) is None}
    data = to_json(manifest.model_dump(mode="json", exclude=unneeded))
    if _stored(store) != data:
        store.put(MANIFEST, data)
    return manifest


def read_all(store: Store, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Read small objects with parallel requests, in the order of their names; few are held at a time."""
    with ThreadPoolExecutor(_READS_AT_ONCE) as threads:
        for start in range(0, len(names), 4 * _READS_AT_ONCE):
            some = names[start : start + 4 * _READS_AT_ONCE]
            yield from zip(some, threads.map(store.get, some), strict=True)


class Fingerprint:
    """Identity of a dataset: schema version, ids and checksums in row order, independent of the shards."""

    def __init__(self) -> None:
        self._ids = hashlib.blake2b(f"regen-dataset-{SCHEMA_VERSION}".encode(), digest_size=16)
        self._checksums = hashlib.blake2b(digest_size=16)

    def add(self, table: pa.Table) -> None:
        """Add the next rows."""
        self._ids.update(np.ascontiguousarray(table["id"].to_numpy()).tobytes())
        self._checksums.update("".join(table["checksum"].to_pylist()).encode())

    def hex(self) -> str:
        """Return the digest of all rows so far."""
        both = self._ids.copy()
        both.update(self._checksums.digest())
        return both.hexdigest()


def described(store: Store, manifest: DatasetManifest) -> SampleDigests:
    """Return the manifest's field `described`; computed from the indices if the manifest is older than the field."""
    if manifest.described is not None:
        return manifest.described
    found = _Descriptions()
    for _, data in read_all(store, [entry.index for entry in manifest.shards]):
        found.add(read_index(data)[0])
    return found.digests()


class _Descriptions:
    """Digests by column, independent of the shards."""

    _FACTS = ("source", "frames", "height", "width", "fps", "motion")

    def __init__(self) -> None:
        self._columns = {name: hashlib.blake2b(digest_size=16) for name in ("caption", *self._FACTS)}

    def add(self, table: pa.Table) -> None:
        """Add the next rows."""
        import pyarrow as pa

        for name, digest in self._columns.items():
            column = table[name]
            if pa.types.is_string(column.type):
                digest.update(b"".join(_delimited(text) for text in column.to_pylist()))
            else:
                known = column.fill_null(float("nan")) if pa.types.is_floating(column.type) else column
                digest.update(np.ascontiguousarray(known.to_numpy()).tobytes())

    def digests(self) -> SampleDigests:
        """Return the digests of all rows so far."""
        facts = hashlib.blake2b(b"".join(self._columns[name].digest() for name in self._FACTS), digest_size=16)
        return SampleDigests(captions=self._columns["caption"].hexdigest(), facts=facts.hexdigest())


def _delimited(text: str | None) -> bytes:
    """Encode a text, or None, unambiguously, also in a concatenation."""
    data = b"" if text is None else text.encode()
    return f"{-1 if text is None else len(data)}:".encode() + data


class _Sums:
    def __init__(self) -> None:
        self.samples, self.frames, self.seconds, self.bytes = 0, 0, 0.0, 0

    def add(self, table: pa.Table, size: int) -> None:
        frames, fps = table["frames"].to_numpy(), table["fps"].to_numpy()
        self.samples, self.bytes = self.samples + table.num_rows, self.bytes + size
        self.frames, self.seconds = self.frames + int(frames.sum()), self.seconds + float((frames / fps).sum())

    def over(self, shards: int) -> Totals:
        return Totals(
            shards=shards, samples=self.samples, frames=self.frames, seconds=round(self.seconds, 3), bytes=self.bytes
        )


def _entry(index: str, data: bytes, facts: dict[str, Any], samples: int) -> ShardEntry:
    return ShardEntry(
        name=facts["name"],
        size=facts["size"],
        sha256=facts["sha256"],
        index=index,
        index_sha256=hashlib.sha256(data).hexdigest(),
        samples=samples,
    )


def to_json(value: Any) -> bytes:
    """Return readable, canonical JSON."""
    return (json_text(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _kind(note: Note) -> str:
    return note.note.partition(":")[0]


class Counts:
    """Number of occurrences of each text. Texts that differ only in numbers and file names are merged under their
    general form; one that is always the same is given in full."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._groups: dict[str, tuple[str, int]] = {}  # by general form: the form shown, and the number
        self.update(texts)

    @property
    def total(self) -> int:
        """Number of all texts."""
        return sum(count for _, count in self._groups.values())

    @property
    def numbers(self) -> dict[str, int]:
        """Numbers by text, the most frequent first."""
        found: Counter[str] = Counter()
        for shown, count in self._groups.values():
            found[shown] += count
        return _largest_first(found)

    def update(self, texts: Iterable[str]) -> None:
        """Count further texts."""
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Count a further text."""
        general = re.sub(r"\d+(\.\d+)?", "N", re.sub(r"\S+\.[A-Za-z]\w{1,4}\b", "…", text))
        if general not in self._groups and len(self._groups) == MOST_LISTED:
            general = text = "other reasons"
        shown, count = self._groups.get(general, (text, 0))
        self._groups[general] = text if text == shown else general, count + 1


def _largest_first(numbers: dict[str, int]) -> dict[str, int]:
    return dict(sorted(numbers.items(), key=lambda each: (-each[1], each[0])))


def listed(skipped: Sequence[Skip], number: int | None = None) -> str:
    """Format the first of `number` (by default all) skipped sources, a line each."""
    number = len(skipped) if number is None else number
    lines = [
        one_line(f"  {skip.source}{'' if skip.segment is None else f' segment {skip.segment}'}: {skip.reason}")
        for skip in skipped[:10]
    ]
    return "\n".join(lines + ([f"  and {number - 10:,} more"] if number > 10 else []))


def one_line(text: str) -> str:
    """Escape control characters and line ends, which file names may hold, as Python writes them."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


# --- claiming a folder for a dataset: the request is written first; a folder that holds anything else is not changed
# ---

PLAN = "plan.json"  # written first: marks a folder as this build's, and holds the request
_NAMED = 4  # differences listed for each part


def claim(store: Store, identity: dict[str, Any], *, by: str = "regen shards", out: str = "--out") -> None:
    """Claim a folder that is empty, or was begun with this same `identity` (JSON with "kind" and "schema_version").

    Several processes may claim the same folder at once: one writes the plan, the others find it.

    Args:
        by: name of the command in messages.
        out: its option that names the folder.

    Raises:
        DataError: the folder holds something else; nothing was changed.
    """
    theirs = read_plan(store)
    if theirs is None:  # listed only now, because a finished dataset may have a million objects
        found = list(store.list())
        if not found and store.put_new(PLAN, to_json(identity)):
            return
        theirs = read_plan(store)  # written by another process in the meantime
        if theirs is None:
            raise DataError(
                f"{store.url}: holds files that no command of `{by}` made ({', '.join(found[:3])}); choose an empty "
                f"{out}. Nothing was changed"
            )
    different = changes(theirs, identity)
    if different:
        raise DataError(
            f"{store.url}: holds a dataset of another request ({'; '.join(different)}). Give the same "
            f"options to finish it, or another {out}; nothing was changed"
        )


def read_plan(store: Store) -> dict[str, Any] | None:
    """Read the existing plan; None if there is none, or another program wrote it."""
    try:
        plan = json.loads(store.get(PLAN))
    except (ObjectMissing, ValueError):
        return None
    return plan if isinstance(plan, dict) and "schema_version" in plan else None


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Describe how the existing identity differs from the requested one."""
    found = []
    for part in sorted(old.keys() | new.keys()):
        before, after = old.get(part), new.get(part)
        if isinstance(before, dict) and isinstance(after, dict):
            names = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
            found += [
                f"{part}.{name}: {before.get(name, 'absent')} there, {after.get(name, 'absent')} now"
                for name in names[:_NAMED]
            ]
        elif before != after:
            found.append(f"{part}: {before} there, {after} now")
    return found
