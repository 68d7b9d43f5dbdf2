"""`regen generate` as it is typed: prompts, shares, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner, Result

from regen_dist.errors import ConfigError, DataError
from regen_dist.inference import generate as prompts_module
from tests.helpers.checkpoints import saved_run
from tests.helpers.t2v import WordEncoder, saved_t2v
from tools.cli import app
from tools.generate import parse_size

LONG = "one two three four five six seven eight"


class Made(NamedTuple):
    """Run folders."""

    embedder: Path
    run: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("generate")
    embedder = saved_run(folder)
    return Made(embedder.folder, saved_t2v(folder, embedder).folder)


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text encoder that the caches were made with."""
    monkeypatch.setattr(prompts_module, "load_text_encoder", lambda space, path, device: WordEncoder())


def _regen(made: Made, out: Path, *arguments: object, env: dict[str, str] | None = None) -> Result:
    given = ["generate", "--run", made.run, "--embedder", made.embedder, "--out", out, "--steps", 1, *arguments]
    result = CliRunner().invoke(app, [*map(str, given)], env={"COLUMNS": "200"} | (env or {}))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def _numbers(out: Path) -> list[int]:
    return sorted(int(path.stem) for path in out.glob("*.mp4"))


def test_prompts_of_the_command_line(made: Made, tmp_path: Path) -> None:
    """Numbered in turn; it says what is made, with which weights; a second call makes nothing."""
    shown = _regen(made, tmp_path, "a red square", "a dog", "--guidance", 3, "--seed", 5).output
    assert (
        "tiny_t2v, ema weights of step 7: 2 prompts, 5 frames of 32x32 at 8 fps, 1 steps of euler, guidance 3" in shown
    )
    assert "2 generated" in shown
    assert _numbers(tmp_path) == [0, 1]
    record = json.loads((tmp_path / "00001.json").read_text())
    assert (record["prompt"], record["settings"]["seed"]) == ("a dog", 5)
    assert record["paths"] == {"run": str(made.run), "embedder": str(made.embedder), "text_encoder": None}
    again = _regen(made, tmp_path, "a red square", "a dog", "--guidance", 3, "--seed", 5).output
    assert "0 generated; 2 were there" in again


@pytest.mark.parametrize("arguments", [["caf\udce9"], ["a dog", "--negative", "caf\udce9"]])
def test_a_prompt_that_is_not_utf8_is_refused(made: Made, tmp_path: Path, arguments: list[str]) -> None:
    """As it comes from a terminal in Latin-1; no tokenizer takes it."""
    with pytest.raises(ConfigError, match=r"'caf\\udce9' is not UTF-8"):
        _regen(made, tmp_path, *arguments)


def test_shares_of_a_file(made: Made, tmp_path: Path) -> None:
    """Task 1 of 2 makes the odd ones; a rank of a job does so unasked, unless told otherwise."""
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"prompt {number}\n" for number in range(5)))
    rank = {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
    for name, arguments, env, numbers in (
        ("task", ["--task", "1/2"], {}, [1, 3]),
        ("rank", [], rank, [2]),
        ("both", ["--task", "0/4"], rank, [0, 4]),
    ):
        _regen(made, tmp_path / name, "--prompts", file, "--frames", 2, *arguments, env=env)
        assert _numbers(tmp_path / name) == numbers
        assert (
            json.loads((tmp_path / name / f"{numbers[-1]:05d}.json").read_text())["prompt"] == f"prompt {numbers[-1]}"
        )


def test_options_reach_the_settings(made: Made, tmp_path: Path) -> None:
    arguments = (
        "--size", "48x32", "--frames", 1, "--fps", 12, "--sampler", "heun", "--negative", "bad", "--decode-steps", 2,
        "--weights", "plain",
    )  # fmt: skip
    _regen(made, tmp_path, "a dog", *arguments)
    record = json.loads((tmp_path / "00000.json").read_text())
    assert record["settings"] == {
        "height": 48, "width": 32, "frames": 1, "fps": 12.0, "steps": 1, "guidance": 2.0, "sampler": "heun",
        "decode_steps": 2, "seed": 0, "negative": "bad",
    }  # fmt: skip
    assert record["model"]["weights"] == "plain"
    assert (tmp_path / "00000.png").is_file()
    assert "untrained weights of step 0" in _regen(made, tmp_path, "a dog", "--untrained").output


def test_samples_are_shared(made: Made, tmp_path: Path) -> None:
    """Every sample of every prompt once, whichever task makes it; names by prompt on demand."""
    for task in range(2):
        shown = _regen(made, tmp_path / "out", "a dog", "a cat", "--samples", 3, "--task", f"{task}/2").output
        assert f"task {task}/2: 3 of 6 videos" in shown
    names = [f"0000{n}-{sample}" for n in range(2) for sample in range(3)]
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.mp4")) == names
    _regen(made, tmp_path / "by_prompt", "a dog", "--samples", 2, "--layout", "vbench", "--sampler", "dpmpp_2m")
    assert sorted(path.name for path in (tmp_path / "by_prompt").iterdir()) == ["a dog-0.mp4", "a dog-1.mp4"]
    assert (tmp_path / "by_prompt-records" / "a dog-1.json").is_file()


def test_what_training_or_settings_do_not_bear_out_is_told(made: Made, tmp_path: Path) -> None:
    """A row longer than any of training, also by a low frame rate; a negative prompt without guidance. Nothing is said
    of images and of usual rows."""
    longer = "Note: rows of 4 clips are sampled, the model was trained on 1 at most"
    for arguments, told in ((["--frames", 20], longer), (["--frames", 2, "--fps", 0.5], longer)):
        assert told in _regen(made, tmp_path, "a dog", *arguments).output
    assert (
        "the negative prompt changes nothing"
        in _regen(made, tmp_path, "a dog", "--negative", "bad", "--guidance", 1).output
    )
    for arguments in (["--frames", 1], ["--negative", "bad"], ["--guidance", 1]):
        assert "Note" not in _regen(made, tmp_path, "a dog", *arguments).output


def test_a_prompt_that_is_cut_is_told(made: Made, tmp_path: Path) -> None:
    shown = _regen(made, tmp_path, LONG).output
    assert "warning: a prompt has more tokens than the text encoder takes and was cut: one two" in shown


def test_what_is_refused(made: Made, tmp_path: Path) -> None:
    """No prompts, two kinds of them, an empty file, a size in other words."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n")
    with pytest.raises(ConfigError, match="one of both"):
        _regen(made, tmp_path)
    with pytest.raises(ConfigError, match="one of both"):
        _regen(made, tmp_path, "a dog", "--prompts", file)
    with pytest.raises(DataError, match="holds no prompt"):
        _regen(made, tmp_path, "--prompts", file)
    with pytest.raises(ConfigError, match="write HEIGHTxWIDTH in pixels, such as 192x320"):
        parse_size("192")
    assert parse_size("192x320") == (192, 320)
    with pytest.raises(ConfigError, match="write I/N"):  # of a variable that is not set: not all prompts
        _regen(made, tmp_path, "a dog", "--task", "")
