"""Lists of videos and captions as people keep them: CSV, JSONL or Parquet with the columns `video` and `caption`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from regen_dist.data.objects.store import Store
from regen_dist.errors import DataError

LIST_SUFFIXES = frozenset({".csv", ".jsonl", ".parquet"})
_SHOWN = 20


class Row(NamedTuple):
    """A row of a list. `where` is how messages call it ("line 7"), `caption` None where there is none."""

    where: str
    video: str
    caption: str | None


def is_list(place: str | Path) -> bool:
    """Whether a path or URL names a list, by its ending."""
    return PurePosixPath(str(place)).suffix.lower() in LIST_SUFFIXES


def read_rows(place: str | Path, *, need_caption: bool = False) -> list[Row]:
    """The rows of a list: a local file, or an object of a store.

    Raises:
        DataError: it cannot be read, a column is missing, or rows are wrong: all of them, each with its line.
    """
    data = _bytes_of(place)
    columns = ("video", "caption") if need_caption else ("video",)
    rows, wrong = [], []
    try:
        for where, values in _raw_rows(PurePosixPath(str(place)).suffix.lower(), data, columns):
            problem = values if isinstance(values, str) else _problem(values, columns)
            if problem or isinstance(values, str):
                wrong.append(f"{where}: {problem}")
            else:
                rows.append(Row(where, values["video"].strip(), (values.get("caption") or "").strip() or None))
    except (ValueError, csv.Error, OSError) as error:  # pyarrow's errors are ValueErrors or OSErrors
        raise DataError(f"{place}: cannot be read as a list: {_first_line(error)}") from error
    refuse(place, wrong)
    if not rows:
        raise DataError(f"{place}: the list is empty; it needs the column video, and may have the column caption")
    return rows


def refuse(place: str | Path, wrong: list[str]) -> None:
    """One DataError for all that is wrong in a list; nothing when there is nothing."""
    if wrong:
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        lines = "\n".join(f"  {line}" for line in wrong[:_SHOWN] + more)
        raise DataError(f"{place}: {len(wrong)} rows are wrong; mend or remove them:\n{lines}")


def read_captions(place: str | Path) -> dict[str, str]:
    """Captions by video name from a list with both columns; DataError as for `read_rows`, and when one video has two
    captions."""
    captions: dict[str, str] = {}
    wrong = []
    for row in read_rows(place, need_caption=True):
        if captions.setdefault(row.video, row.caption or "") != (row.caption or ""):
            wrong.append(f"{row.where}: another caption for {row.video}")
    refuse(place, wrong)
    return captions


def _bytes_of(place: str | Path) -> bytes:
    folder, _, name = str(place).rpartition("/") if "://" in str(place) else ("", "", "")
    if folder:
        return Store(folder).get(name)
    try:
        return Path(place).expanduser().read_bytes()
    except OSError as error:
        raise DataError(f"{place}: cannot be read: {error.strerror or error}") from error


def _raw_rows(suffix: str, data: bytes, columns: Sequence[str]) -> Iterator[tuple[str, dict[Any, Any] | str]]:
    """Where each row is, and its values, or what is wrong with it."""
    if suffix == ".parquet":
        yield from _parquet_rows(data, columns)
    elif suffix == ".csv":
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        _need(columns, reader.fieldnames or ())
        for values in reader:
            yield f"line {reader.line_num}", values
    elif suffix == ".jsonl":
        # Not splitlines: a caption may hold U+2028, which JSON leaves as it is.
        for number, line in enumerate(data.decode("utf-8-sig").split("\n"), 1):
            if line.strip():
                yield f"line {number}", _object(line)
    else:
        raise ValueError(f"lists end in {', '.join(sorted(LIST_SUFFIXES))}")


def _parquet_rows(data: bytes, columns: Sequence[str]) -> Iterator[tuple[str, dict[Any, Any]]]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(io.BytesIO(data))
    _need(columns, file.schema_arrow.names)
    wanted = [name for name in ("video", "caption") if name in file.schema_arrow.names]
    rows = (values for batch in file.iter_batches(columns=wanted) for values in batch.to_pylist())
    for number, values in enumerate(rows, 1):
        yield f"row {number}", values


def _need(columns: Sequence[str], found: Sequence[str]) -> None:
    missing = [name for name in columns if name not in found]
    if missing:
        raise ValueError(f"every row needs a {' and a '.join(columns)}; the columns are {', '.join(found) or 'none'}")


def _object(line: str) -> dict[Any, Any] | str:
    try:
        values = json.loads(line)
    except ValueError as error:
        return f"not JSON: {error}"
    return values if isinstance(values, dict) else "not a JSON object"


def _problem(values: dict[Any, Any], columns: Sequence[str]) -> str:
    """What is wrong with the values of a row; empty for nothing."""
    if None in values:
        return "more fields than columns; put a text with commas into quotes"
    for name in ("video", "caption"):
        value = values.get(name)
        if value is not None and not isinstance(value, str):
            return f"its {name} is {value!r}, not a text"
        if name in columns and not (value or "").strip():
            return f"it has no {name}"
    return ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
