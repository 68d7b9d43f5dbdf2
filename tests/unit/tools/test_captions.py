"""`regen shards captions`: the first captions of a dataset, in its order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.index import SampleFacts
from regen_dist.data.format.manifest import write_manifest
from regen_dist.data.format.writing import NewSample, ShardLimits, ShardWriter, index_name
from regen_dist.data.storage.store import Store
from regen_dist.data.synthetic.dataset import build_synthetic
from regen_dist.data.synthetic.shapes import SyntheticOptions
from regen_dist.errors import DataError
from regen_dist.evaluation.miniature_scores import held_out_clips, held_out_samples
from regen_dist.inference.frames import SourceVideo
from tools import shards

CAPTIONS = ("a red\n square", None, "", "a blue disc", "ein grüner Kreis", "a yellow star")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write(tmp_path / "data", CAPTIONS)


def write(folder: Path, captions: tuple[str | None, ...]) -> Path:
    """Samples of a few bytes in shards of two; nothing here looks at the videos."""
    store = Store(folder)
    with ShardWriter(store, "part", ShardLimits(samples=2)) as writer:
        for number, caption in enumerate(captions):
            described = SampleFacts(5, 32, 32, 8.0, f"{number}.mp4", caption)
            writer.add(NewSample(f"{number:06d}", b"video", described))
    write_manifest(store, [index_name("part", number) for number in range(writer.shards)], "build", {})
    return folder


def run(*arguments: object) -> str:
    result = CliRunner().invoke(shards.app, ["captions", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_one_a_line_in_the_order_of_the_dataset(dataset: Path, tmp_path: Path) -> None:
    assert len(open_dataset(dataset)) == len(CAPTIONS)
    said = run(dataset, "--out", tmp_path / "new" / "prompts.txt", "--number", 3)
    assert (tmp_path / "new" / "prompts.txt").read_text().splitlines() == [
        "a red square", "a blue disc", "ein grüner Kreis"
    ]  # fmt: skip
    assert "3 captions" in said
    assert "fewer" not in said


def test_first_frames(tmp_path: Path) -> None:
    """By the numbers that the captions have as prompts; each is its video's, pixel for pixel."""
    options = SyntheticOptions(number=4, seed=2, side=32, frames=5)
    build_synthetic(tmp_path / "data", options, workers=0)
    run(tmp_path / "data", "--out", tmp_path / "prompts.txt", "--number", 3, "--first-frames", tmp_path / "first")
    prompts = (tmp_path / "prompts.txt").read_text().splitlines()
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == [f"0000{number}.png" for number in range(3)]
    dataset = open_dataset(tmp_path / "data")
    for number, clip in enumerate(held_out_clips(dataset, held_out_samples(dataset, 3), None)):
        assert clip.caption == prompts[number]
        assert np.array_equal(np.asarray(Image.open(tmp_path / "first" / f"0000{number}.png")), clip.frames[0])


def test_first_clips(tmp_path: Path) -> None:
    """The first frames of each video as a video of its own; a video that is shorter is named."""
    options = SyntheticOptions(number=3, seed=2, side=32, frames=8)
    build_synthetic(tmp_path / "data", options, workers=0)
    common = (tmp_path / "data", "--out", tmp_path / "prompts.txt", "--first-clips", tmp_path / "first")
    run(*common, "--clip-frames", 5)
    dataset = open_dataset(tmp_path / "data")
    for number, clip in enumerate(held_out_clips(dataset, held_out_samples(dataset, 3), None)):
        written = np.stack(list(SourceVideo(tmp_path / "first" / f"{number:05d}.mp4").frames()))
        assert written.shape == (5, 32, 32, 3)
        assert np.abs(written.astype(int) - clip.frames[:5]).mean() < 2  # 4:2:0 rounds colours once more
    with pytest.raises(DataError, match="has 8 frames, fewer than the 9 of --clip-frames"):
        run(*common, "--clip-frames", 9)


def test_it_says_when_there_are_fewer(dataset: Path, tmp_path: Path) -> None:
    assert "4 captions" in (said := run(dataset, "--out", tmp_path / "prompts.txt"))
    assert "fewer than the 200" in said


def test_a_dataset_without_captions(tmp_path: Path) -> None:
    silent = write(tmp_path / "silent", (None, ""))
    with pytest.raises(DataError, match="no sample has a caption"):
        run(silent, "--out", tmp_path / "prompts.txt")
    assert not (tmp_path / "prompts.txt").exists()
