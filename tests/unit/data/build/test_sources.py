"""The sources that a build finds: folders, files, lists, captions. No video is opened."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import unicodedata
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from regen_dist.data.build.lists import CaptionRow, read_list
from regen_dist.data.build.sources import Sources, find_sources
from regen_dist.data.storage.store import Store
from regen_dist.errors import DataError

Form = Literal["NFC", "NFD"]


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A folder whose "videos" are three bytes each."""
    for name in ("b.mp4", "a #1%20.MKV", "deep/c.webm", "deep/.hidden.mp4", "notes.txt", "deep/c.jpg"):
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"abc")
    return tmp_path / "videos"


def names(found: Sources) -> list[str]:
    return [source.name for source in found.found]


def write_list(path: Path, rows: list[dict[str, str | None]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def test_folders_give_their_videos_by_name(videos: Path) -> None:
    found = find_sources([videos])
    assert names(found) == ["a #1%20.MKV", "b.mp4", "deep/c.webm"]
    assert [source.local for source in found.found] == [videos / name for name in names(found)]
    assert [source.size for source in found.found] == [3, 3, 3]


def test_each_video_comes_once_in_order_of_the_places(videos: Path) -> None:
    assert names(find_sources([videos / "b.mp4", videos / "deep", videos])) == ["b.mp4", "c.webm", "a #1%20.MKV"]
    assert names(find_sources([videos.as_uri()])) == names(find_sources([videos]))


def test_a_dangling_link_is_a_source_that_cannot_be_read(videos: Path) -> None:
    (videos / "z.mp4").symlink_to(videos / "absent.mp4")
    assert names(find_sources([videos]))[-1] == "z.mp4"


def test_a_pipe_is_left_out(videos: Path) -> None:
    """Opening one waits for somebody who writes into it: the build hung."""
    os.mkfifo(videos / "pipe.mp4")
    found = find_sources([videos])
    assert [skip.source for skip in found.skipped if "it is a pipe" in skip.reason] == ["pipe.mp4"]
    assert "pipe.mp4" not in [source.name for source in found.found]
    with pytest.raises(DataError, match=r"pipe\.mp4: unreadable: it is a pipe"):
        find_sources([videos / "pipe.mp4"])


def test_linked_folders_are_followed_once(videos: Path, tmp_path: Path) -> None:
    """Links to folders are followed as links to files are; a link back to a folder above ends there."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.mp4").write_bytes(b"abc")
    (videos / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(videos)
    assert names(find_sources([videos])) == ["a #1%20.MKV", "b.mp4", "deep/c.webm", "linked/d.mp4"]


def test_what_lies_in_a_hidden_folder_is_not_taken(videos: Path) -> None:
    """A file manager keeps there what was deleted."""
    (videos / ".Trash-1000" / "files").mkdir(parents=True)
    (videos / ".Trash-1000" / "files" / "gone.mp4").write_bytes(b"abc")
    assert names(find_sources([videos])) == ["a #1%20.MKV", "b.mp4", "deep/c.webm"]


def test_a_name_that_is_not_utf8_is_left_out(videos: Path) -> None:
    """A manifest cannot hold it; one such file does not keep the others out."""
    with open(os.fsencode(videos) + b"/bad\xff\xfename.mp4", "wb") as file:
        file.write(b"abc")
    found = find_sources([videos])
    assert names(found) == ["a #1%20.MKV", "b.mp4", "deep/c.webm"]
    ((name, why),) = ((each.source, each.reason) for each in found.skipped)
    assert name.isascii()
    assert "not UTF-8; rename it" in why
    with pytest.raises(DataError, match="not UTF-8; rename it"):
        find_sources([os.fsdecode(os.fsencode(videos) + b"/bad\xff\xfename.mp4")])


def test_the_folder_above_may_have_any_name(tmp_path: Path) -> None:
    """Only names inside the dataset must be UTF-8."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"abc")
    (found,) = find_sources([folder]).found
    assert found.local == folder / "a.mp4"
    assert Store(found.folder).get("a.mp4") == b"abc"


def test_what_is_missing_is_told_at_once(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file or folder: .*x\.mp4, .*y"):
        find_sources([videos, tmp_path / "x.mp4", tmp_path / "y"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no videos"):
        find_sources([tmp_path / "empty"])
    with pytest.raises(DataError, match="pipe:"):
        find_sources(["pipe://cat"])


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_lists_name_videos_with_captions(videos: Path, kind: str) -> None:
    rows: list[dict[str, str | None]] = [
        {"video": "deep/c.webm", "caption": 'a "quoted", caption\nof two lines'},
        {"video": str(videos / "b.mp4"), "caption": None},
        {"video": (videos / "a #1%20.MKV").as_uri(), "caption": " spaces "},
    ]
    found = find_sources([write_list(videos / f"list.{kind}", rows)])
    assert names(found) == ["deep/c.webm", "b.mp4", "a #1%20.MKV"]
    assert [source.caption for source in found.found] == ['a "quoted", caption\nof two lines', None, "spaces"]
    assert [source.size for source in found.found] == [3, 3, 3]


def test_a_list_may_point_outside_its_folder_and_tells_no_absolute_path(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    rows: list[dict[str, str | None]] = [{"video": "../videos/b.mp4"}, {"video": str(videos / "deep" / "c.webm")}]
    found = find_sources([write_list(tmp_path / "lists" / "l.csv", rows)])
    assert names(found) == ["../videos/b.mp4", "c.webm"]
    assert str(tmp_path) not in repr(found.identity())
    assert [source.local for source in found.found] == [videos / "b.mp4", videos / "deep" / "c.webm"]


def test_a_list_by_a_file_url(videos: Path) -> None:
    place = write_list(videos / "a list #1.csv", [{"video": "b.mp4", "caption": "b"}])
    assert [source.caption for source in find_sources([place.as_uri()]).found] == ["b"]


def test_a_video_named_twice_is_used_once(videos: Path) -> None:
    found = find_sources([write_list(videos / "l.csv", [{"video": "b.mp4"}, {"video": "./b.mp4"}])])
    assert names(found) == ["b.mp4"]
    assert [(skip.source, skip.reason) for skip in found.skipped] == [
        ("./b.mp4", "named twice: only the first is used")
    ]


def test_all_wrong_rows_of_a_list_are_told_with_their_lines(videos: Path) -> None:
    lines = [
        '{"video": "b.mp4"}',
        "",
        "{",
        "[1]",
        '{"caption": "x"}',
        '{"video": 7}',
        '{"video": "b.mp4", "caption": 1}',
    ]
    (videos / "l.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        find_sources([videos / "l.jsonl"])
    message = str(caught.value)
    assert "5 rows are wrong" in message
    for line in ("line 3: not JSON", "line 4: not a JSON object", "line 5: it has no video", "line 6: its video is 7"):
        assert line in message
    assert "line 7: its caption is 1" in message
    (videos / "l.csv").write_text('video,caption\nb.mp4,"two\nlines"\nb.mp4,a,b\n,no video\n')
    with pytest.raises(DataError, match=r"(?s)2 rows.*line 4: more fields than columns.*line 5: it has no video"):
        find_sources([videos / "l.csv"])


def test_rows_that_name_nothing_are_told_together(videos: Path) -> None:
    rows: list[dict[str, str | None]] = [
        {"video": "b.mp4"},
        {"video": "gone.mp4"},
        {"video": "pipe:cat b.mp4"},
        {"video": "s3://key:secret@bucket/b.mp4"},
        {"video": "http://server/b.mp4?signature=secret"},
    ]
    with pytest.raises(DataError) as caught:
        find_sources([write_list(videos / "l.parquet", rows)])
    message = str(caught.value)
    assert "4 rows are wrong" in message
    assert "row 2: there is no gone.mp4" in message
    assert all(f"row {number}: " in message for number in (3, 4, 5))
    assert "secret" not in message


def test_what_is_no_list_is_told(videos: Path) -> None:
    for name, data, message in (
        ("l.csv", b"file,text\nb.mp4,x\n", "every row needs a video; the columns are file, text"),
        ("l.csv", b"", "every row needs a video; the columns are none"),
        ("l.csv", b"video\n", "the list is empty"),
        ("l.csv", b"video\n\xff\n", r"cannot be read as a list: not UTF-8 \(byte 6\); save it as UTF-8"),
        ("l.csv", b"video;caption\nb.mp4;x;y\n", "more fields than columns; put a text that holds the separator"),
        ("l.csv", b'video,caption\nb.mp4,x\nb.mp4,"a" b\n', "the row that begins at line 3: .* write each quote twice"),
        ("l.csv", b'video,caption\nb.mp4,"x\nb.mp4,y\n', "the row that begins at line 2: unexpected end of data"),
        ("l.parquet", b"PAR1 no", "cannot be read as a list"),
        ("l.jsonl", b"\n\n", "the list is empty"),
    ):
        (videos / name).write_bytes(data)
        with pytest.raises(DataError, match=message):
            read_list(videos / name)


def test_a_spreadsheet_s_byte_order_mark_is_not_part_of_the_column(videos: Path) -> None:
    (videos / "l.csv").write_bytes("﻿video,caption\nb.mp4,été\n".encode())
    assert read_list(videos / "l.csv").rows[0][1:] == ("b.mp4", "été")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_spreadsheet_s_separator_is_that_of_its_first_line(videos: Path, separator: str) -> None:
    text = f'video{separator}caption\r\nb.mp4{separator}"a, b; c\td"\r\n'
    (videos / "l.csv").write_bytes(text.encode("utf-8-sig"))
    assert read_list(videos / "l.csv").rows == [CaptionRow("line 2", "b.mp4", "a, b; c\td")]


def test_captions_for_folders_by_path_or_by_name(videos: Path) -> None:
    rows: list[dict[str, str | None]] = [
        {"video": "c.webm", "caption": "by name"},
        {"video": "deep/c.webm", "caption": "by path"},
        {"video": "b.mp4", "caption": "b"},
        {"video": "absent.mp4", "caption": "nothing"},
    ]
    found = find_sources([videos], write_list(videos / "captions.jsonl", rows))
    assert {source.name: source.caption for source in found.found} == {
        "a #1%20.MKV": None,
        "b.mp4": "b",
        "deep/c.webm": "by path",
    }
    assert [(skip.source, skip.reason) for skip in found.skipped] == [
        ("captions.jsonl", "no video: 1 captions without a video (absent.mp4)")
    ]


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("in_list", ["NFC", "NFD"])
def test_a_name_is_the_same_however_it_is_spelled(tmp_path: Path, on_disk: Form, in_list: Form) -> None:
    """Accents as one character or two (macOS), `./` in front as `find` prints it."""
    name = unicodedata.normalize(on_disk, "café/é.mp4")
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(b"abc")
    rows: list[dict[str, str | None]] = [{"video": unicodedata.normalize(in_list, "./café/é.mp4"), "caption": "coffee"}]
    found = find_sources([tmp_path], write_list(tmp_path / "c.csv", rows))
    assert [(source.name, source.caption) for source in found.found] == [(name, "coffee")]
    assert found.skipped == ()
    rows.append({"video": "café/é.mp4", "caption": "tea"})
    with pytest.raises(DataError, match=r"line 3: another caption for café/é\.mp4"):
        find_sources([tmp_path], write_list(tmp_path / "c.csv", rows))


def test_captions_that_fit_nothing_or_contradict_are_refused(videos: Path) -> None:
    with pytest.raises(DataError, match="no caption belongs to a video"):
        find_sources([videos], write_list(videos / "c.csv", [{"video": "other.mp4", "caption": "hello"}]))
    with pytest.raises(DataError, match="every row needs a video and a caption"):
        find_sources([videos], write_list(videos / "c.csv", [{"video": "b.mp4", "text": "hello"}]))
    with pytest.raises(DataError, match=r"no row has a caption"):
        find_sources([videos], write_list(videos / "c.csv", [{"video": "b.mp4", "caption": ""}]))
    rows: list[dict[str, str | None]] = [{"video": "b.mp4", "caption": text} for text in ("one", "another")]
    with pytest.raises(DataError, match=r"line 3: another caption for b\.mp4"):
        find_sources([videos], write_list(videos / "c.csv", rows))


def test_a_file_name_in_several_folders_is_no_name(videos: Path) -> None:
    """Both videos got the caption. A path is one, also where a file in another folder is called so."""
    (videos / "c.webm").write_bytes(b"abc")
    (videos / "deep" / "b.mp4").write_bytes(b"abc")
    rows: list[dict[str, str | None]] = [{"video": "c.webm", "caption": "c"}, {"video": "deep/b", "caption": "deep b"}]
    found = find_sources([videos], write_list(videos / "c.csv", rows))
    assert [source.caption for source in found.found] == [None, None, "c", "deep b", None]
    with pytest.raises(DataError, match=r"c is .*videos/deep/c\.webm, .*videos/c\.webm: give the path in the folder"):
        find_sources([videos / "deep", videos], write_list(videos / "c.csv", [{"video": "c", "caption": "c"}]))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_an_empty_cell_is_a_video_without_caption(videos: Path, kind: str) -> None:
    """And no reason to refuse the list: in tables of numbers too, where it is NaN."""
    rows: list[dict[str, Any]] = [{"video": "b.mp4", "caption": math.nan}, {"video": "deep/c.webm", "caption": "c"}]
    place = videos / f"list.{kind}"
    if kind == "json":
        place.write_text(json.dumps(rows))
    else:
        write_list(place, rows if kind == "jsonl" else [rows[0] | {"caption": None}, rows[1]])
    for found in (find_sources([place]), find_sources([videos], place)):
        assert {source.caption for source in found.found} == {None, "c"}
        ((name, why),) = ((skip.source, skip.reason) for skip in found.skipped)
        assert name == place.name
        assert re.fullmatch(r"no captions: 1 of 2 rows have none \((line|row) [12]\)", why)


def test_texts_beside_videos_are_found(videos: Path) -> None:
    (videos / "deep" / "c.txt").write_text("a caption")
    found = find_sources([videos]).found
    assert [source.text for source in found] == [None, None, "deep/c.txt"]
    assert find_sources([videos / "deep" / "c.webm"]).found[0].text == "c.txt"


@pytest.mark.parametrize(
    ("video", "text"),
    [
        ("Video.MP4", "video.txt"),
        ("VIDEO.mp4", "Video.txt"),
        ("ViDeO.mp4", "vIdEo.TxT"),
        ("clip.mp4", "CLIP.TXT"),
        ("caf\u00e9.mp4", "cafe\u0301.txt"),
        ("STRASSE.mp4", "stra\u00dfe.txt"),
    ],
)
def test_texts_whose_names_differ_in_case_alone_are_found(tmp_path: Path, video: str, text: str) -> None:
    """In a folder, and beside a video that is named by itself."""
    (tmp_path / video).write_bytes(b"video")
    (tmp_path / text).write_text("a caption")
    assert [source.text for source in find_sources([tmp_path]).found] == [text]
    assert [source.text for source in find_sources([tmp_path / video]).found] == [text]


def test_a_text_belongs_to_the_video_of_its_very_name(tmp_path: Path) -> None:
    """Another video that differs in case does not take it; between two texts nothing decides, so it is refused."""
    for name in ("a.mp4", "A.mp4", "a.txt", "Both.mp4", "both.txt", "BOTH.txt", "deep/A.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = find_sources([tmp_path])
    assert {source.name: source.text for source in found.found} == {"A.mp4": None, "a.mp4": "a.txt", "deep/A.mp4": None}
    assert [(skip.source, skip.reason) for skip in found.skipped] == [
        ("Both.mp4", "ambiguous caption: BOTH.txt, both.txt differ in case alone; rename one")
    ]


def test_videos_of_cameras_and_archives_are_found(tmp_path: Path) -> None:
    """All that ffmpeg decodes and that people call videos; nothing in a folder is passed over by its ending alone."""
    names = ["a.gif", "b.VOB", "c.mts", "d.m2ts", "e.wmv", "f.flv", "g.3gp", "h.mxf", "i.ogv"]
    for name in [*names, "readme.md", "x.png"]:
        (tmp_path / name).write_bytes(b"x")
    assert [source.name for source in find_sources([tmp_path]).found] == names


def test_another_text_of_the_same_length_is_another_dataset(videos: Path) -> None:
    """Known by its bytes, not by when it was written."""
    text = videos / "deep" / "c.txt"
    text.write_text("a red cat")
    before = find_sources([videos]).identity()
    text.write_text("a red cat")
    assert find_sources([videos]).identity() == before
    text.write_text("a red dog")
    assert find_sources([videos]).identity() != before


def test_the_identity_follows_names_sizes_and_captions(videos: Path, tmp_path: Path) -> None:
    before = find_sources([videos]).identity()
    (tmp_path / "moved").mkdir()
    videos.rename(tmp_path / "moved" / "videos")
    videos = tmp_path / "moved" / "videos"
    assert find_sources([videos]).identity() == before
    (videos / "b.txt").write_text("caption")
    captioned = find_sources([videos]).identity()
    (videos / "b.mp4").write_bytes(b"longer")
    assert len({str(one) for one in (before, captioned, find_sources([videos]).identity())}) == 3
