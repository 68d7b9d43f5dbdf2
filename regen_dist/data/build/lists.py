"""Lists of videos and captions as people keep them: CSV, JSON, JSONL or Parquet, or lines of two text files."""

from __future__ import annotations

import csv
import io
import json
import os
import reprlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

from regen_dist.config.urls import parse_url
from regen_dist.data.storage.store import Store
from regen_dist.errors import DataError

LIST_SUFFIXES = frozenset({".csv", ".json", ".jsonl", ".parquet"})
# Of a folder as finetrainers, diffusion-pipe and VideoFolder of `datasets` lay it out: the first that is there.
FOLDER_LISTS = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "metadata.json", "captions.json")
VIDEO_LINES = ("videos.txt", "video.txt")  # a path a line; and in the same order
CAPTION_LINES = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
_SHOWN, _NAMED = 20, 5
_LONGEST_FIELD = (1 << 31) - 1  # of a CSV, in characters; Python's own limit is 131072, and long captions exist


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a list: the first of each that a row has counts."""

    video: tuple[str, ...] = ("video",)
    caption: tuple[str, ...] = ("caption",)

    @classmethod
    def parse(cls, text: str) -> Columns:
        """Columns from `video=path,caption=text`; DataError for anything else. Either may be left out."""
        given: dict[str, tuple[str, ...]] = {}
        for part in text.split(","):
            name, _, column = (each.strip() for each in part.partition("="))
            if name not in ("video", "caption") or not column or name in given:
                raise DataError(f"--columns {text}: {part!r} is not understood; write video=COLUMN,caption=COLUMN")
            given[name] = (column,)
        return cls(**given)


PLAIN = Columns()
METADATA = Columns(("file_name", "video", "path"), ("caption", "text", "prompt"))


class CaptionRow(NamedTuple):
    """A row of a list. `where` is how messages call it ("line 7"), `caption` None where there is none."""

    where: str
    video: str
    caption: str | None


class ReadList(NamedTuple):
    """The rows of a list, and which of them have no caption, where the list has any; empty otherwise."""

    rows: list[CaptionRow]
    uncaptioned: str = ""


def is_list(place: str | Path) -> bool:
    """Return true if a path or URL names a list, by its ending."""
    return PurePosixPath(str(place)).suffix.lower() in LIST_SUFFIXES


def read_list(place: str | Path, columns: Columns = PLAIN, *, need_caption: bool = False) -> ReadList:
    """Read a list: a local file, or an object of a store. A caption may be empty, whatever `need_caption` says of its
    column.

    Raises:
        DataError: it cannot be read, a column is missing, or rows are wrong: all of them, each with its line.
    """
    data = _bytes_of(place)
    needed = (columns.video, columns.caption) if need_caption else (columns.video,)
    rows, wrong, found = [], [], dict[str, None]()
    try:
        for where, values in _raw_rows(PurePosixPath(str(place)).suffix.lower(), data, columns, needed, found):
            problem = values if isinstance(values, str) else _problem(values, columns)
            if problem or isinstance(values, str):
                wrong.append(f"{where}: {problem}")
            else:
                rows.append(CaptionRow(where, _cell(values, columns.video), _cell(values, columns.caption) or None))
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(place, error)) from error
    except (ValueError, csv.Error, OSError) as error:  # pyarrow's errors are ValueErrors or OSErrors
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{place}: cannot be read as a list: {first_line}") from error
    refuse(place, wrong)
    if not rows:
        raise DataError(
            f"{place}: the list is empty; it needs the column {_named(columns.video)}, and may have the column "
            f"{_named(columns.caption)}"
        )
    wanted = need_caption or columns.caption not in (PLAIN.caption, METADATA.caption)
    if wanted and not any(row.caption for row in rows):
        raise DataError(f"{place}: no row has a {_named(columns.caption)}; check the column or --columns")
    return ReadList(rows, _uncaptioned(found, columns, rows))


def _uncaptioned(found: Iterable[str], columns: Columns, rows: Sequence[CaptionRow]) -> str:
    others = [name for name in found if name not in columns.video]
    if not others:
        return ""
    if set(others) & set(columns.caption):
        empty = [row.where for row in rows if row.caption is None]
        return f"no captions: {len(empty)} of {len(rows)} rows have none ({first_of(empty)})" if empty else ""
    return (
        f"no captions: none of its columns ({', '.join(others)}) is called {_named(columns.caption)}; --columns "
        "video=COLUMN,caption=COLUMN names another"
    )


def read_lines(videos: str | Path, captions: str | Path) -> list[CaptionRow]:
    """The rows of two files with a path and a caption a line, in the same order; DataError when their lengths
    differ."""
    texts = []
    for place in (videos, captions):
        try:
            texts.append(_bytes_of(place).decode("utf-8-sig").removesuffix("\n").split("\n"))
        except UnicodeDecodeError as error:
            raise DataError(_not_utf8(place, error)) from error
    paths, lines = texts
    while len(paths) > 1 and not paths[-1].strip():  # empty lines at the end; but the last captions may be empty
        paths.pop()
    while len(lines) > len(paths) and not lines[-1].strip():
        lines.pop()
    if len(paths) != len(lines):
        raise DataError(
            f"{videos} has {len(paths)} lines and {captions} {len(lines)}: each video needs its line of caption"
        )
    refuse(videos, [f"line {number}: it has no video" for number, path in enumerate(paths, 1) if not path.strip()])
    pairs = enumerate(zip(paths, lines, strict=True), 1)
    return [CaptionRow(f"line {number}", path.strip(), caption.strip() or None) for number, (path, caption) in pairs]


def refuse(place: str | Path, wrong: list[str]) -> None:
    """One DataError for all that is wrong in a list; nothing when there is nothing."""
    if wrong:
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        lines = "\n".join(f"  {line}" for line in wrong[:_SHOWN] + more)
        raise DataError(f"{place}: {len(wrong)} rows are wrong; fix or remove them:\n{lines}")


def read_captions(place: str | Path, columns: Columns = PLAIN) -> tuple[dict[str, str], str]:
    """Captions by video name (`plain_name`) from a list with both columns, and which rows have none; DataError as for
    `read_list`, and when one video has two captions."""
    captions: dict[str, str] = {}
    wrong = []
    found = read_list(place, columns, need_caption=True)
    for row in found.rows:
        if row.caption is not None and captions.setdefault(plain_name(row.video), row.caption) != row.caption:
            wrong.append(f"{row.where}: another caption for {row.video}")
    refuse(place, wrong)
    return captions, found.uncaptioned


def plain_name(name: str) -> str:
    """A video's name in one spelling: accents as single characters (NFC; macOS writes two), no `./` in front."""
    return unicodedata.normalize("NFC", name).removeprefix("./")


def first_of(names: Sequence[str]) -> str:
    """Format the first of many names on one line."""
    return ", ".join(names[:_NAMED]) + ", …" * (len(names) > _NAMED)


def _bytes_of(place: str | Path) -> bytes:
    local = Store(place).folder if str(place).startswith("file:") else None
    place = place if local is None else local  # a URL, in which a space is %20
    folder, _, name = str(place).rpartition("/") if "://" in str(place) else ("", "", "")
    if folder:
        return Store(folder).get(unquote(name) if parse_url(str(place)).read_only else name)
    try:
        return Path(os.path.expanduser(place)).read_bytes()
    except OSError as error:
        raise DataError(
            f"{place}: cannot be read: {error.strerror or error}; check the path, its owner and mode"
        ) from error


def _raw_rows(
    suffix: str, data: bytes, columns: Columns, needed: Sequence[Sequence[str]], found: dict[str, None]
) -> Iterator[tuple[str, dict[Any, Any] | str]]:
    """Yield the position of each row and its values, or its problem; the names of all columns are added to `found`."""
    if suffix == ".parquet":
        yield from _parquet_rows(data, columns, needed, found)
    elif suffix == ".csv":
        csv.field_size_limit(_LONGEST_FIELD)
        text = data.decode("utf-8-sig")
        names = text.partition("\n")[0]
        separator = next((each for each in ",;\t" if each in names), ",")  # spreadsheets also write the other two
        file = io.StringIO(text, newline="")
        reader = csv.DictReader(file, delimiter=separator, strict=True, skipinitialspace=True)
        _need(needed, reader.fieldnames or ())
        found |= dict.fromkeys(reader.fieldnames or ())
        last = reader.line_num
        try:
            for values in reader:
                yield f"line {reader.line_num}", values
                last = reader.line_num
        except csv.Error as error:
            raise ValueError(
                f"the row that begins at line {last + 1}: {error}; in a text in quotes, write each quote twice"
            ) from error
    elif suffix == ".jsonl":
        # Not splitlines: a caption may hold U+2028, which JSON leaves as it is.
        for number, line in enumerate(data.decode("utf-8-sig").split("\n"), 1):
            if line.strip():
                yield f"line {number}", _noted(_object(line), found)
    elif suffix == ".json":
        rows = _json_rows(json.loads(data.decode("utf-8-sig")), columns)
        yield from ((where, _noted(values, found)) for where, values in rows)
    else:
        raise ValueError(f"lists end in {', '.join(sorted(LIST_SUFFIXES))}")


def _json_rows(rows: object, columns: Columns) -> Iterator[tuple[str, dict[Any, Any] | str]]:
    """The rows of an array of objects, or of one object that gives each path its caption, or several: the first."""
    if isinstance(rows, dict):
        for video, values in rows.items():
            caption = values[0] if isinstance(values, list) and values else values
            yield f"entry {video!r}", {columns.video[0]: video, columns.caption[0]: caption}
        return
    if not isinstance(rows, list):
        raise ValueError("a JSON list is an array of objects, or one object of captions by path")
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row if isinstance(row, dict) else "not a JSON object"


def _parquet_rows(
    data: bytes, columns: Columns, needed: Sequence[Sequence[str]], found: dict[str, None]
) -> Iterator[tuple[str, dict[Any, Any]]]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(io.BytesIO(data))
    _need(needed, file.schema_arrow.names)
    found |= dict.fromkeys(file.schema_arrow.names)
    wanted = [name for name in (*columns.video, *columns.caption) if name in file.schema_arrow.names]
    rows = (values for batch in file.iter_batches(columns=wanted) for values in batch.to_pylist())
    for number, values in enumerate(rows, 1):
        yield f"row {number}", values


def _noted(values: dict[Any, Any] | str, found: dict[str, None]) -> dict[Any, Any] | str:
    if isinstance(values, dict):
        found |= dict.fromkeys(values)
    return values


def _need(needed: Sequence[Sequence[str]], found: Sequence[str]) -> None:
    if any(not set(names) & set(found) for names in needed):
        raise ValueError(
            f"every row needs a {' and a '.join(map(_named, needed))}; the columns are {', '.join(found) or 'none'}; "
            "other names are given by --columns video=COLUMN,caption=COLUMN"
        )


def _named(names: Sequence[str]) -> str:
    return " or ".join(names)


def _cell(values: dict[Any, Any], names: Sequence[str]) -> str:
    text = str(_value(values, names) or "").strip()
    return text.encode("utf-8", "replace").decode()  # JSON can carry halves of characters


def _value(values: dict[Any, Any], names: Sequence[str]) -> object:
    found = (values.get(name) for name in names)
    return next((value for value in found if value is not None and value == value), None)  # not NaN: an empty cell


def _object(line: str) -> dict[Any, Any] | str:
    try:
        values = json.loads(line)
    except ValueError as error:
        return f"not JSON: {error}"
    return values if isinstance(values, dict) else "not a JSON object"


def _problem(values: dict[Any, Any], columns: Columns) -> str:
    """Describe the problem with the values of a row; empty if there is none."""
    if None in values:
        return "more fields than columns; put a text that holds the separator into quotes"
    for names in (columns.video, columns.caption):
        value = _value(values, names)
        if value is not None and not isinstance(value, str):
            return f"its {_named(names)} is {reprlib.repr(value)}, not a text"
    return "" if _cell(values, columns.video) else f"it has no {_named(columns.video)}"


def _not_utf8(place: str | Path, error: UnicodeDecodeError) -> str:
    return f"{place}: cannot be read as a list: not UTF-8 (byte {error.start}); save it as UTF-8"
