"""The console command: quick help, an example in every help text, errors without a traceback, from any folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from launcher.cluster import load_cluster
from launcher.pipelines.schema import load_pipeline, with_inputs
from launcher.submit import command_request
from regen_dist import __version__
from regen_dist.config import load_config
from regen_dist.errors import DataError, refusal
from regen_dist.programs import regen
from tests.helpers.commands import run_here
from tools.bench.codec_systems import CONFIGS, own_config
from tools.bench.compression_measure import load_clips
from tools.cli import app

ROOT = Path(__file__).parents[3]


def _regen(*arguments: str, run: Any = run_here) -> subprocess.CompletedProcess[str]:
    return run(regen(*arguments), cwd=ROOT, capture_output=True, text=True)


def _commands(group: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Name and help of every command, groups included."""
    context = group.make_context("regen", [], resilient_parsing=True)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if hasattr(command, "list_commands"):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command.help or ""


COMMANDS = list(_commands(get_command(app)))


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, tools.cli\n"
        "heavy = {'torch', 'deepspeed', 'wandb', 'av', 'pyarrow', 'matplotlib', 'skimage', 'numpy', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("name", "text"), COMMANDS, ids=lambda value: value.split("\n")[0][:30])
def test_every_command_shows_an_example(name: str, text: str) -> None:
    assert f"regen {name}" in text, f"the help of `regen {name}` has no example that starts with it"


def test_an_error_of_the_user_is_one_message_and_its_exit_code() -> None:
    done = _regen("config", "show", "configs/embedder/nano.yaml", "train.stepz=1", run=subprocess.run)
    assert done.returncode == 2
    assert done.stderr.startswith("error: configs/embedder/nano.yaml: 1 problem\n  command line: train.stepz: ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("reconstruct", "s3://bucket/a.mp4", "--out", "made"),
        ("reconstruct", "a.mp4", "--out", "s3://bucket/made"),
        ("shards", "frames", "https://server/a/", "--out", "made"),
        ("checkpoint", "export", "run", "--out", "gs://bucket/made"),
    ],
)
def test_a_url_where_a_path_is_due(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Results were written to a local folder called `s3:`."""
    done = run_here(regen(*arguments), cwd=tmp_path)
    (url,) = (word for word in arguments if "://" in word)
    assert done.returncode == 2
    assert f"{url.rstrip('/')} is a URL, and this takes a path on this machine" in done.stderr
    assert not list(tmp_path.iterdir())


def test_home_is_expanded_where_the_shell_leaves_it(tmp_path: Path) -> None:
    """A folder called `~` was made."""
    (tmp_path / "pictures").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "pictures" / "0.png")
    arguments = ("shards", "frames", "pictures", "--fps", "24", "--out=~/videos")
    done = run_here(regen(*arguments), cwd=tmp_path, env={**os.environ, "HOME": str(tmp_path / "home")})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "home" / "videos" / "pictures.mkv").is_file()
    assert not (tmp_path / "~").exists()


def test_stdout_without_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    done = _regen("check", "--help", run=subprocess.run)
    assert (done.returncode, done.stderr) == (0, "")
    assert r"[a.b=c \u2026]" in done.stdout


def test_stdout_without_room() -> None:
    """One line and an exit code, not Python's "Exception ignored" and 120."""
    command = regen("config", "show", "configs/embedder/nano.yaml")
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr == "error: No space left on device; make room on that disk, and run the same again\n"


def test_stdout_without_a_reader() -> None:
    """`regen … | true`: exit code 1, and nothing on stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    command = regen("config", "show", "configs/embedder/nano.yaml")
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "")


def test_stderr_without_a_reader() -> None:
    """Warnings that nobody reads end no command, and an error keeps its exit code."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(regen("config", "show", "none.yaml"), stderr=pipe, check=False)
    assert done.returncode == 2


def test_a_working_folder_that_was_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError) as caught:
        Path.cwd()
    assert "the current folder was deleted" in (refusal(caught.value) or "")


def test_debug_shows_where_an_error_comes_from() -> None:
    done = _regen("--debug", "config", "show", "absent.yaml")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "absent.yaml: no such file" in done.stderr


def test_config_show_prints_what_a_run_would_save(tmp_path: Path) -> None:
    shown = _regen("config", "show", "configs/embedder/nano.yaml", "train.steps=7")
    (tmp_path / "config.yaml").write_text(shown.stdout)
    again = _regen("config", "show", str(tmp_path))
    assert shown.stdout == again.stdout
    assert shown.stdout.startswith("# config hash ")
    assert "steps: 7" in shown.stdout


def test_config_diff_names_the_keys_that_differ() -> None:
    done = _regen("config", "diff", "configs/embedder/nano.yaml", "configs/embedder/nano_magvit2.yaml")
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["name: 'nano' -> 'nano_magvit2'", "model.kind: 'regen' -> 'magvit2'"]
    assert _regen("config", "diff", "configs/embedder/nano.yaml", "configs/embedder/nano.yaml").returncode == 0


def test_version_and_no_command() -> None:
    assert _regen("--version").stdout == f"regen-dist {__version__}\n"
    nothing = _regen()
    assert nothing.returncode == 2
    assert "Usage: regen" in nothing.stdout + nothing.stderr


# The command works from any folder; a wheel, which would lack the presets, is not built.

CLIPS = Path("configs/bench/compression_clips.yaml")


def test_presets_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own folder comes first."""
    monkeypatch.chdir(tmp_path)
    demo = load_config("configs/demo/embedder.yaml")
    assert load_cluster("slurm").kind == "slurm"
    assert load_pipeline(Path("configs/pipelines/paper.yaml")).steps
    own = tmp_path / "configs" / "demo" / "embedder.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(f"extends: {ROOT}/configs/demo/embedder.yaml\nname: mine\n")
    assert (demo.name != "mine", load_config("configs/demo/embedder.yaml").name) == (True, "mine")


def test_inputs_of_a_pipeline_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As configs are; the user's own file comes first, and another content is another step."""
    preset = Path("configs/preencode/nano.yaml")
    order = command_request("job", tmp_path, ["config"], load_cluster("local"), "local")
    monkeypatch.chdir(tmp_path)
    ours = with_inputs(order, [preset]).fingerprint
    assert ours == with_inputs(order, [ROOT / preset]).fingerprint != order.fingerprint
    preset.parent.mkdir(parents=True)
    preset.write_text(f"extends: {ROOT}/{preset}\nstride: 7\n")
    assert with_inputs(order, [preset]).fingerprint != ours


def test_configs_that_commands_name_themselves_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that stand in the programs, read from another folder, by what reads them there."""
    monkeypatch.chdir(tmp_path)
    named = {
        Path(found)
        for program in sorted((ROOT / "tools").rglob("*.py"))
        for found in re.findall(r'Path\(\s*"(configs/[^"{]*\.yaml)"', program.read_text())
    }
    assert len(named) > 8
    pipelines = {path for path in named if path.parent.name == "pipelines"}
    for path in named - {CLIPS} - pipelines:
        assert load_config(path).name, path
    assert all(load_pipeline(path).steps for path in pipelines)
    with pytest.raises(DataError, match=r"carphone\.mp4"):  # the list was read; the videos are not here
        load_clips(CLIPS, tmp_path)
    assert own_config(CONFIGS / "fast_k4.yaml", "fp32").name


def test_completion_is_offered() -> None:
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).output


def test_no_wheel_is_built(tmp_path: Path) -> None:
    """The reason and the command that works are told."""
    ended = subprocess.run(
        [sys.executable, "setup.py", "bdist_wheel", "-d", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode != 0
    assert "would lack configs/" in ended.stderr
    assert "pip install -e ." in ended.stderr
    assert not list(tmp_path.iterdir())
