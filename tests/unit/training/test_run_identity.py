"""A run goes on from its own checkpoints alone, whatever its name is."""

from __future__ import annotations

import re
import shlex
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.config.embedder import RunConfig
from regen_dist.config.identity import read_or_create_run_id, read_run_id
from regen_dist.errors import CheckpointError, ConfigError
from regen_dist.training.run import train
from tests.helpers.tiny import tiny_dataset, tiny_run
from tools.checkpoint import app


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data"))


def _run(tmp_path: Path, data: Path, output: str, steps: int = 1, **changes: Any) -> RunConfig:
    saved = {"checkpoint__url": str(tmp_path / "saved"), "checkpoint__every": 1}
    return tiny_run(tmp_path / output, data, **{"train__steps": steps, **saved, **changes})


def test_an_id_is_made_once(tmp_path: Path) -> None:
    """Of many that ask at once all get the same; something else in its place is named."""
    found: list[str] = []
    barrier = threading.Barrier(8)

    def ask() -> None:
        barrier.wait()
        found.append(read_or_create_run_id(tmp_path / "new" / "run"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 8
    assert re.fullmatch(r"[0-9a-f]{16}", found[0])
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["run_id"]
    assert read_or_create_run_id(tmp_path / "other") != found[0]
    (tmp_path / "other" / "run_id").write_text("mine")
    with pytest.raises(ConfigError, match="which is no id"):
        read_or_create_run_id(tmp_path / "other")


def test_another_run_of_the_same_name_is_refused(tmp_path: Path, data: Path) -> None:
    """Same name, same checkpoint.url, another output: it is not "done". The message has the command by which it goes on
    all the same, and with that it does."""
    first, other = _run(tmp_path, data, "one"), _run(tmp_path, data, "new one", 2)
    assert train(first) == 0
    own = read_run_id(first.folder)
    assert CheckpointFolder(first.checkpoints).manifest(1).run_id == own
    with pytest.raises(CheckpointError, match=f"is of another run: it has the id {own}, .* none yet") as error:
        train(other)
    assert not (other.folder / "metrics.jsonl").exists()
    (command,) = re.findall(r"`(regen checkpoint adopt .*)`", str(error.value))
    done = CliRunner().invoke(app, shlex.split(command)[2:])
    assert done.exit_code == 0, done.output
    assert "goes on from step 1" in done.output
    assert train(other) == 0
    assert CheckpointFolder(other.checkpoints).manifest(2).run_id == own


def test_two_runs_that_both_have_trained(tmp_path: Path, data: Path) -> None:
    one = _run(tmp_path, data, "one")
    other = _run(tmp_path, data, "other", checkpoint__url=None)
    assert train(one) == train(other) == 0
    with pytest.raises(CheckpointError, match=f"the run folder .* has {read_run_id(other.folder)}"):
        train(_run(tmp_path, data, "other", 2))


def test_whatever_may_go_on_goes_on(tmp_path: Path, data: Path) -> None:
    """Resumed; its folder moved; its checkpoints copied into another folder; saved before there were ids."""
    assert train(_run(tmp_path, data, "one", 1)) == 0
    assert train(_run(tmp_path, data, "one", 2)) == 0
    shutil.move(tmp_path / "one", tmp_path / "moved")
    assert train(_run(tmp_path, data, "moved", 3)) == 0
    inside = {"checkpoint__url": None}
    shutil.copytree(tmp_path / "saved" / "tiny", tmp_path / "copied" / "tiny" / "checkpoints")
    copied = _run(tmp_path, data, "copied", 4, **inside)
    assert train(copied) == 0
    assert read_run_id(copied.folder) == read_run_id(tmp_path / "moved" / "tiny")
    folder = CheckpointFolder(tmp_path / "saved" / "tiny")
    for step in folder.steps():
        manifest = folder.manifest(step)
        folder.update_manifest(manifest, run_id="")
        assert replace(manifest, run_id="") == folder.manifest(step)
    assert train(_run(tmp_path, data, "new", 4)) == 0
    assert folder.manifest(4).run_id == read_run_id(tmp_path / "new" / "tiny")
