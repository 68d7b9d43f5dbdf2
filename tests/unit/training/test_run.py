"""Runs that resume: another config, another folder or name, and only where their checkpoint belongs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from launcher.retry import PERMANENT
from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.config import load_config, load_saved_config
from regen_dist.config.embedder import EmbedderConfig
from regen_dist.config.identity import read_or_create_run_id, read_run_id
from regen_dist.errors import (
    EXIT_RESUME,
    CheckpointError,
    ConfigError,
    DataError,
    NoGoodCheckpoint,
    StoreUnavailable,
)
from regen_dist.observe.record import read_record
from regen_dist.training.embedder import EmbedderTask
from regen_dist.training.run import replace_config, train
from regen_dist.training.stopping import SignalInbox
from tests.helpers.checkpoints import saved_run
from tests.helpers.latents import write_cache
from tests.helpers.machine import fill, small_disk
from tests.helpers.tiny import tiny_run, tiny_t2v
from tools.checkpoint import app


@pytest.fixture(scope="module")
def data(tiny_shards: Path) -> Path:
    return tiny_shards


def _told(run: Path) -> list[str]:
    return [line["event"] for line in read_record(run / "metrics.jsonl", "event")]


def test_a_prolonged_run_tells_every_key_and_the_jump_of_the_rate(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the terminal and in the record, once; the earlier configs are there under their steps."""
    first = tiny_run(tmp_path, data, train__steps=2)
    second = tiny_run(tmp_path, data, train__steps=4, optimizer__lr=3e-3)
    assert train(first) == 0
    assert train(first) == 0
    assert not [text for text in _told(first.folder) if "config" in text]
    assert train(second) == 0
    changed, rate, kept = [text for text in _told(first.folder) if "config" in text]
    assert changed == "the config changed after step 2: optimizer.lr: 0.001 → 0.003; train.steps: 2 → 4"
    assert rate == "the learning rate of step 3 is 0.003, by the earlier config it was 0.001; step 2 had 0.001"
    assert kept == f"the earlier config is {first.folder / 'config-00000002.yaml'}"
    assert changed in capsys.readouterr().err.replace("\n", "")
    assert load_saved_config(first.folder) == second
    assert load_config(first.folder / "config-00000002.yaml") == first


def test_several_changes_at_one_step_keep_every_config(tmp_path: Path) -> None:
    """None takes the place of another, and going back to an earlier one writes no copy of a copy."""
    configs = [tiny_run(tmp_path, optimizer__lr=lr) for lr in (1e-3, 2e-3, 3e-3, 2e-3, 1e-3)]
    for config in configs:
        replace_config(config, 4)
    folder = configs[0].folder
    assert load_saved_config(folder) == configs[-1]
    names = sorted(path.name for path in folder.glob("config-*.yaml"))
    assert names == ["config-00000004-2.yaml", "config-00000004-3.yaml", "config-00000004.yaml"]
    rates = {load_config(folder / name).optimizer.lr for name in names}
    assert rates == {1e-3, 2e-3, 3e-3}


def test_what_leaves_the_rate_alone_says_nothing_of_it(tmp_path: Path) -> None:
    replace_config(tiny_run(tmp_path), 0)
    changed, kept = replace_config(tiny_run(tmp_path, train__log_every=5), 3)
    assert changed == "the config changed after step 3: train.log_every: 1 → 5"
    assert kept.endswith("config-00000003.yaml")


def test_a_config_of_another_version_is_kept_though_it_cannot_be_compared(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    replace_config(config, 0)
    (config.folder / "config.yaml").write_text("of: old\n")
    told = replace_config(config, 3)[0]
    assert "it cannot be compared" in told
    assert (config.folder / "config-00000003.yaml").read_text() == "of: old\n"
    assert load_saved_config(config.folder) == config


def test_a_full_disk_is_told_and_ends_nothing(tmp_path: Path) -> None:
    """The config that is there stays whole."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        first = tiny_run(disk)
        replace_config(first, 0)
        fill(disk)
        told = replace_config(tiny_run(disk, optimizer__lr=2e-3), 3)
        assert any("warning: " in text and "No space left on device" in text for text in told)
        assert any("optimizer.lr: 0.001 → 0.002" in text for text in told)
        assert load_saved_config(first.folder) == first


def test_what_a_killed_writer_left_in_the_folder_of_a_run_is_removed(tmp_path: Path) -> None:
    """Where it has been idle for long: a writer on another machine may be at work."""
    folder = tiny_run(tmp_path).folder
    code = """if True:
        import os, signal, sys
        from pathlib import Path
        from regen_dist.config.files import write_text_atomically
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        write_text_atomically(Path(sys.argv[1]) / "config.yaml", "")"""
    assert subprocess.run([sys.executable, "-c", code, folder], check=False).returncode == -signal.SIGKILL
    (left,) = folder.iterdir()
    replace_config(tiny_run(tmp_path), 0)
    assert left.exists()
    os.utime(left, (0, 0))
    replace_config(tiny_run(tmp_path), 0)
    assert sorted(path.name for path in folder.iterdir()) == ["config.hash", "config.yaml"]


# A run resumes only where its checkpoint belongs.


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train__seed": 4}, r"train\.seed was 3, is 4"),
        ({"train__batch_global": 8}, r"train\.batch_global was 4, is 8"),
        ({"model__decoder__blocks": 1}, "saved by another model"),
    ],
)
def test_changed_data_order_or_model_is_refused_and_named(
    tmp_path: Path, data: Path, changes: dict[str, Any], told: str
) -> None:
    """Going on would train on other clips, or put weights where they do not belong, without a word. The run keeps
    its own config, which its checkpoint is read by."""
    first = tiny_run(tmp_path, data, train__steps=1)
    assert train(first) == 0
    with pytest.raises(CheckpointError, match=told):
        train(tiny_run(tmp_path, data, train__steps=2, **changes))
    assert load_saved_config(first.folder) == first


def test_validation_data_that_is_not_there_ends_a_run_at_its_start(tmp_path: Path, data: Path) -> None:
    """Not at the first validation, with what was trained until then. A run that is done needs none."""
    config = tiny_run(tmp_path, data, train__steps=1, data__validation_url=str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"none: there is no manifest\.json"):
        train(config)
    assert not list(config.folder.glob("metrics.jsonl"))
    assert train(tiny_run(tmp_path, data, train__steps=1)) == 0
    assert train(config) == 0


@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_error_in_a_validation_loses_no_checkpoint(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """It is saved before. A validation that succeeds puts its figures into the checkpoint of its step, also
    where the next start makes up for it."""
    config = tiny_run(tmp_path, data, train__steps=6, train__validate_every=2, checkpoint__every=2)
    config = config.model_copy(
        update={"checkpoint": config.checkpoint.model_copy(update={"asynchronous": asynchronous, "keep_last": 9})}
    )
    validate, left = EmbedderTask.validate, [True, False]

    def fail_second(self: EmbedderTask, *arguments: Any) -> Any:
        if left and not left.pop(0):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return validate(self, *arguments)

    monkeypatch.setattr(EmbedderTask, "validate", fail_second)
    with pytest.raises(torch.OutOfMemoryError):
        train(config)
    folder = CheckpointFolder(str(config.checkpoints))
    assert folder.steps() == [2, 4]
    assert train(config) == 0
    lines = read_record(config.folder / "metrics.jsonl", "validation")
    psnr = {line["step"]: line["psnr_db"] for line in lines}
    assert {step: folder.manifest(step).metrics["psnr_db"] for step in folder.steps()} == {
        2: psnr[2], 4: psnr[4], 6: psnr[6]
    }  # fmt: skip


def test_a_run_that_is_asked_to_stop_does_not_validate_first(tmp_path: Path, data: Path) -> None:
    """A validation may outlast the time that is left; the next start makes up for it, before its first step."""
    config, inbox = tiny_run(tmp_path, data, train__steps=2, train__validate_every=1), SignalInbox()
    inbox.first = "SIGUSR2"
    assert train(config, earlier=inbox) == EXIT_RESUME
    assert CheckpointFolder(str(config.checkpoints)).steps() == [1]
    assert read_record(config.folder / "metrics.jsonl", "validation") == []
    assert train(config) == 0
    lines = read_record(config.folder / "metrics.jsonl", "validation")
    assert [(line["step"], line["seconds"] > 0) for line in lines] == [(1, True), (2, True)]
    assert CheckpointFolder(str(config.checkpoints)).manifest(1).metrics["psnr_db"] == lines[0]["psnr_db"]


def test_a_store_that_is_away_at_the_last_save_is_no_error_of_the_checkpoint(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher starts the run again, which it does not after an error that would come again, such as a full disk."""
    config, inbox = tiny_run(tmp_path, data, train__steps=2), SignalInbox()
    inbox.first = "SIGUSR2"

    def no_answer(*_: Any) -> None:
        raise StoreUnavailable("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "write_shard", no_answer)
        with pytest.raises(StoreUnavailable, match=r"step 1 was not saved: rank 0: the store is away") as caught:
            train(config, earlier=inbox)
    assert caught.value.exit_code not in PERMANENT
    assert train(config) == 0


def test_a_start_from_a_validated_step_does_not_validate_it_again(tmp_path: Path, data: Path) -> None:
    assert train(tiny_run(tmp_path, data, train__steps=1, train__validate_every=1)) == 0
    assert train(tiny_run(tmp_path, data, train__steps=2, train__validate_every=1)) == 0
    lines = read_record(tmp_path / "tiny" / "metrics.jsonl", "validation")
    assert [line["step"] for line in lines] == [1, 2]


def test_another_embedder_ends_text_to_video_at_its_start(tmp_path: Path) -> None:
    """One that was trained on after the cache was made, for example."""
    embedder, cache = saved_run(tmp_path), write_cache(tmp_path / "cache")
    with pytest.raises(CheckpointError, match="is not the one that the latents were made with"):
        train(tiny_t2v(tmp_path, cache, generation__embedder=str(embedder.folder)))
    assert not (tmp_path / "tiny_t2v" / "metrics.jsonl").exists()


def test_more_steps_go_on_from_the_checkpoint(tmp_path: Path, data: Path) -> None:
    """What may change does: the same run with more steps goes on, and does not start again."""
    assert train(tiny_run(tmp_path, data, train__steps=1)) == 0
    assert train(tiny_run(tmp_path, data, train__steps=2)) == 0
    record = (tmp_path / "tiny" / "metrics.jsonl").read_text()
    assert record.count('"kind": "train"') == 2


def test_a_folder_of_checkpoints_that_is_gone_is_no_new_run(tmp_path: Path, data: Path) -> None:
    """Not mounted, or emptied: the record tells that there was a checkpoint, so starting from scratch must be asked
    for."""
    config = tiny_run(tmp_path, data, train__steps=1)
    assert train(config) == 0
    shutil.rmtree(config.folder / "checkpoints")
    with pytest.raises(NoGoodCheckpoint, match=r"metrics\.jsonl records a checkpoint of step 1, .* mounted.*--fresh"):
        train(config)
    assert train(config, fresh=True) == 0
    assert train(config) == 0


# A run goes on from its own checkpoints alone, whatever its name is.


def _run(tmp_path: Path, data: Path, output: str, steps: int = 1, **changes: Any) -> EmbedderConfig:
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
