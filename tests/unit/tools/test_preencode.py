"""`regen preencode`: the whole way through, and one clear error for each wrong input."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from regen_dist.config import save_config
from regen_dist.config.preencode import load_preencode_config
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.errors import CheckpointError, ConfigError, DataError, RegenError
from regen_dist.models.text import TextEncoder
from tests.helpers.checkpoints import saved_run
from tests.helpers.preencoding import StandInText, Video, write_videos
from tests.helpers.tiny import tiny_run
from tools.cli import app

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file: three videos in two shards, one of them damaged."""
    folder = tmp_path_factory.mktemp("preencode")
    videos = [Video(12, caption="a red square"), Video(3), Video(6, damaged=True)]
    values = {
        "embedder": str(saved_run(folder).folder),
        "data": str(write_videos(folder, videos, samples_per_shard=2)),
        "output": str(folder / "out"),
        "text": {"encoder": "stand-in"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


@pytest.fixture(autouse=True)
def text(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a config's text encoder is."""
    monkeypatch.setattr(TextEncoder, "load", lambda config, device: StandInText())


def _run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["preencode", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_command(config: Path, tmp_path: Path) -> None:
    output = f"output={tmp_path / 'out'}"
    first = _run(config, output, "--task", "1/2")
    assert "1 shards made now; 1 of 2 are left to other tasks" in first
    second = _run(config, output, "--task", "0/2")
    assert "2 clips and 1 image in " in second
    assert "2 entries in 2 shards" not in second  # the damaged video's shard holds nothing
    assert "2 entries in 1 shard (1 made now), 1 video and 4 frames left out" in second
    assert "  video-2: it cannot be opened" in second
    assert "% of the pixels (0.03 MB)" in second
    again = _run(config, output)
    assert "(0 made now)" in again
    assert " a second" not in again
    assert "2 entries encoded again; all agree" in _run(config, output, "--verify", 16)


def test_captions_that_are_cut_are_told(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandInText, "cuts", lambda self, caption: len(caption.split()) > 2)
    result = CliRunner().invoke(app, ["preencode", str(config), f"output={tmp_path / 'out'}"])
    assert "warning: 1 captions have more tokens than text.max_tokens keeps, and were cut" in result.stderr


def test_verify_names_what_is_wrong(config: Path, tmp_path: Path) -> None:
    _run(config, f"output={tmp_path}")
    sample = open_dataset(tmp_path).sample(0)
    tar = tmp_path / sample.shard
    data = bytearray(tar.read_bytes())
    data[sample.offset + sample.size - 1] ^= 1
    tar.write_bytes(data)
    with pytest.raises(DataError, match=r"1 of 2 entries in .* are not what is made now:\nsample video-0 in latents"):
        _run(config, f"output={tmp_path}", "--verify", 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["embedder=runs/none"], ConfigError, "not a run folder"),
        (["data=nowhere"], DataError, r"there is no manifest\.json"),
        (["--task", "2/2"], ConfigError, "2 tasks are numbered 0 to 1"),
        (["--verify", "4"], DataError, "not finished"),
        (["buckets=[[40, 32]]"], ConfigError, "must be multiples of 16, as text to video takes them"),
        (["stride=0", "batch=3"], ConfigError, r"(?s)2 problems.*stride: found 0.*did you mean batch_clips"),
    ],
)
def test_wrong_inputs(
    config: Path, tmp_path: Path, arguments: list[str], error: type[RegenError], message: str
) -> None:
    with pytest.raises(error, match=message):
        _run(config, f"output={tmp_path / 'out'}", *arguments)
    assert not (tmp_path / "out").exists()


def test_a_run_without_checkpoints(config: Path, tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    save_config(run, run.folder)
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        _run(config, f"output={tmp_path / 'out'}", f"embedder={run.folder}")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "preencode").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_valid(path: Path) -> None:
    loaded = load_preencode_config(path)
    assert all(side % 16 == 0 for size in loaded.buckets for side in size)
