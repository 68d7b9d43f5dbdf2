"""`regen shards inspect`: numbers, histograms and the contact sheet."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from regen_dist.data.build.foreign import index_tars
from regen_dist.data.format import manifest as manifests
from regen_dist.data.format.catalogue import Dataset, open_dataset
from regen_dist.data.format.index import SampleFacts
from regen_dist.data.format.manifest import Counts, Note, Skip, read_manifest, write_manifest
from regen_dist.data.format.writing import NewSample, ShardLimits, ShardWriter, index_name
from regen_dist.data.inspect import overview
from regen_dist.data.inspect.contact import choose_rows, write_contact_sheet
from regen_dist.data.inspect.overview import Bar, Tally, make_overview
from regen_dist.data.storage.store import Store
from tests.helpers.datasets import clip, flip_byte, write_tar
from tools import shards

CAPTIONS = ["a square", None, "a square that crosses a gradient from left to right", "  one two  three "]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built dataset: ten samples of five shapes from four sources in four shards."""
    folder = tmp_path_factory.mktemp("inspected")
    store = Store(folder)
    shapes = [(8, 32, 48), (12, 32, 48), (8, 48, 32), (1, 48, 48), (8, 64, 96)]
    with ShardWriter(store, "shard", ShardLimits(samples=3)) as writer:
        for number in range(10):
            frames, height, width = shapes[number % 5]
            video = clip(frames, height, width, seed=number, fps=24 if number % 2 else 30)
            described = SampleFacts(
                frames,
                height,
                width,
                24.0 if number % 2 else 30.0,
                source=f"source {number % 4}.mp4",
                caption=CAPTIONS[number % 4],
                motion=number / 10 if number < 6 else None,
            )
            writer.add(NewSample(f"key-{number}", video, described))
        writer.skip(Skip(source="short.mp4", segment=2, reason="7 frames, fewer than --min-frames 20"))
        writer.skip(Skip(source="short.mp4", segment=5, reason="11 frames, fewer than --min-frames 20"))
        writer.skip(Skip(source="still.mp4", reason="nothing moves"))
    write_manifest(store, [index_name("shard", number) for number in range(writer.shards)], "build", {"crf": 18})
    return folder


def bars(dataset: Dataset) -> dict[str, dict[str, int]]:
    shown = make_overview(dataset).histograms
    return {name: {bar.label: bar.count for bar in each.bars} for name, each in shown.items()}


def test_the_numbers(folder: Path) -> None:
    made = make_overview(open_dataset(folder))
    assert (made.sources, made.captions, made.kind, made.totals.samples) == (4, 7, "build", 10)
    assert made.left_out == (("N frames, fewer than --min-frames N", 2), ("nothing moves", 1))
    assert bars(open_dataset(folder)) == {
        "frames": {"1": 2, "8": 6, "12": 2},
        "short side": {"32": 6, "48": 2, "64": 2},
        "height x width": {"32x48": 4, "48x32": 2, "48x48": 2, "64x96": 2},
        "fps": {"24": 5, "30": 5},
        "motion": {"0": 1, "0.1": 1, "0.2": 1, "0.3": 1, "0.4": 1, "0.5": 1},
        "caption words": {"2": 3, "3": 2, "10": 2},
    }
    frames = made.histograms["frames"]
    assert (frames.low, frames.median, frames.high) == (1, 8, 12)


def test_piece_by_piece_gives_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither all rows nor all texts are held at a time."""
    whole = make_overview(open_dataset(folder))
    monkeypatch.setattr(overview, "_ROWS_AT_ONCE", 3)
    monkeypatch.delattr(Dataset, "table")
    seen: list[tuple[str, int, int]] = []
    assert make_overview(open_dataset(folder), lambda *step: seen.append(step)) == whole
    assert seen == [("inspect", done, 4) for done in range(1, 5)]


def test_a_tally_counts_as_numpy_does() -> None:
    values = np.random.default_rng(0).lognormal(4, 1, 20_000)
    tally, at_once = Tally(1), Tally(1)
    for part in np.array_split(values, 7):
        tally.add(part)
    at_once.add(values)
    assert tally.histogram() == at_once.histogram()
    shown = tally.histogram()
    rounded = np.round(values, 1)
    assert shown.median == np.quantile(rounded, 0.5, method="inverted_cdf")
    assert (shown.low, shown.high) == (rounded.min(), rounded.max())
    assert sum(bar.count for bar in shown.bars) == tally.total == 20_000
    assert len(shown.bars) <= 12
    assert shown.bars[-1].label.endswith(" and more")
    for bar in shown.bars[1:-1]:
        low, high = map(float, bar.label.split("-"))
        assert bar.count == ((rounded >= low - 1e-9) & (rounded < high - 1e-9)).sum(), bar


def test_bars_of_whole_numbers() -> None:
    tally = Tally()
    tally.add(np.arange(100, 200))
    tally.add(np.array([100_000]))
    shown = tally.histogram(whole=True)
    assert shown.bars[0] == Bar("100-119", 20)
    assert [bar.count for bar in shown.bars[:5]] == [20] * 5
    assert shown.bars[-1] == Bar("300 and more", 1)
    few = Tally()
    few.add(np.arange(11))
    assert few.histogram(whole=True).bars[:3] == (Bar("0-1", 2), Bar("2-3", 2), Bar("4-5", 2))
    assert Tally().histogram().bars == ()


def test_the_most_frequent_come_first() -> None:
    tally = Tally()
    tally.add(np.repeat([1, 2, 3, 4], [1, 5, 3, 2]))
    assert tally.most_frequent(2, str).bars == (Bar("2.0", 5), Bar("3.0", 3), Bar("2 others", 3))
    assert len(tally.most_frequent(4, str).bars) == 4


def test_reasons_are_put_together() -> None:
    reasons = ["same content as a/b.mp4", "same content as d.mkv", "3 frames", "3 frames", "it ends at byte 7"]
    assert list(Counts(reasons).numbers.items()) == [
        ("3 frames", 2),
        ("same content as …", 2),
        ("it ends at byte 7", 1),
    ]


def test_a_long_list_of_what_was_left_out_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest, which every rank reads, names the first alone, and has the number of all."""
    store = Store(tmp_path)
    with ShardWriter(store, "shard", ShardLimits(samples=1)) as writer:
        for number in range(2):
            writer.add(NewSample(f"key-{number}", clip(8, 32, 32), SampleFacts(8, 32, 32, 24.0, source="long.mp4")))
            writer.note(Note(source="long.mp4", note="HDR: tone-mapped"))
            for segment in range(3):
                writer.skip(Skip(source="a.mp4", segment=segment, reason=f"too short: {segment} frames"))
    names = [index_name("shard", number) for number in range(writer.shards)]
    first = [Skip(source="b.mp4", reason="nothing moves")]
    whole = write_manifest(store, names, "build", {}, first)
    assert (len(whole.skipped), whole.num_skipped, whole.skipped_counts) == (7, 7, None)
    assert "_counts" not in (tmp_path / "manifest.json").read_text(), "older programs refuse fields that they lack"
    monkeypatch.setattr(manifests, "MOST_LISTED", 2)
    write_manifest(store, names, "build", {}, first)
    cut = read_manifest(store)
    assert cut.skipped == whole.skipped[:2]
    assert cut.reasons() == whole.reasons() == {"too short: N frames": 6, "nothing moves": 1}
    assert cut.num_skipped == 7
    assert cut.notes == whole.notes == (Note(source="long.mp4", note="HDR: tone-mapped"),)  # one source in two shards
    assert make_overview(open_dataset(tmp_path)).left_out == (("too short: N frames", 6), ("nothing moves", 1))


def test_chosen_rows_are_spread() -> None:
    assert choose_rows(100, 5) == [10, 30, 50, 70, 90]
    assert choose_rows(3, 12) == [0, 1, 2]
    drawn = choose_rows(100, 5, seed=1)
    assert drawn == choose_rows(100, 5, seed=1) == sorted(set(drawn))
    assert drawn != choose_rows(100, 5, seed=2)


def test_the_sheet_shows_the_frames(folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(folder)
    path = tmp_path / "new" / "sheet.png"
    write_contact_sheet(dataset, path, range(0, 10, 3))
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    colourful = (picture.max(-1) - picture.min(-1) > 25).any(0)
    runs = np.flatnonzero(np.diff(np.concatenate([[0], colourful.astype(int), [0]])))
    assert len(runs) >= 6  # pictures stand in columns of their own
    assert picture.shape[0] > 400
    assert [file.name for file in path.parent.iterdir()] == ["sheet.png"]
    before = path.read_bytes()
    write_contact_sheet(dataset, path, range(0, 10, 3))
    assert path.read_bytes() == before


def test_a_bad_sample_does_not_spoil_the_sheet(tmp_path: Path) -> None:
    long = "word " * 300 + "x" * 5000
    for number in range(2):
        write_tar(
            tmp_path / f"{number}.tar", [{"__key__": f"{'k' * 300}{number}", "mp4": clip(seed=number), "txt": long}]
        )
    index_tars(tmp_path, workers=0)
    dataset = open_dataset(tmp_path)
    write_contact_sheet(dataset, tmp_path / "whole.png", [0, 1])
    flip_byte(tmp_path / "1.tar", dataset.sample(1).offset)
    write_contact_sheet(dataset, tmp_path / "damaged.png", [0, 1])
    whole, damaged = (np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("whole.png", "damaged.png"))
    assert whole.shape == damaged.shape
    assert whole.shape[1] < 2000
    red = (damaged[..., 0] > 150) & (damaged[..., 1] < 100)
    assert red.sum() > 50
    assert not red[:, : red.shape[1] // 2 - 20].any()


def run(*arguments: str) -> str:
    result = CliRunner().invoke(shards.app, ["inspect", *arguments], catch_exceptions=False, env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_shows_aligned_bars(folder: Path, tmp_path: Path) -> None:
    shown = run(str(folder), "--sheet", str(tmp_path / "sheet.png"), "--samples", "4")
    assert "10 from 4 sources" in shown
    assert "crf=18" in shown
    assert "of 7 samples" in shown
    lines = [line for line in shown.splitlines() if "%" in line]
    assert len({len(line) for line in lines}) == 1
    assert "      8  ██████████████████████████████  6  60.0%" in lines
    assert "frames  1 to 12, median 8" in shown
    assert "  2  N frames, fewer than --min-frames N" in shown
    assert f"Contact sheet: {tmp_path / 'sheet.png'}" in shown.splitlines()[-1]
    assert Image.open(tmp_path / "sheet.png").format == "PNG"


def test_the_default_sheet_is_not_in_the_dataset(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGEN_CACHE", str(tmp_path))
    before = sorted(folder.iterdir())
    path = Path(run(str(folder), "--samples", "1").splitlines()[-1].removeprefix("Contact sheet: "))
    assert path.parent == tmp_path / "sheets"
    assert path.exists()
    assert sorted(folder.iterdir()) == before
    assert "Contact sheet" not in run(str(folder), "--samples", "0")


def test_json_is_all_that_is_printed(folder: Path, tmp_path: Path) -> None:
    numbers = json.loads(run(str(folder), "--json"))
    assert numbers["totals"]["samples"] == 10
    assert numbers["histograms"]["fps"]["bars"] == [{"label": "24", "count": 5}, {"label": "30", "count": 5}]
    assert numbers["left_out"]["nothing moves"] == 1
    assert json.loads(run(str(folder), "--json", "--samples", "1", "--sheet", str(tmp_path / "x.png"))) == numbers
    assert (tmp_path / "x.png").exists()
