"""Checkpoints of runs in a bucket: one process writes, from any run folder, and `regen checkpoint` handles them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from regen_dist.checkpoint.claims import Claim, Patience, parse_holder, this_process
from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.config import to_yaml
from regen_dist.config.identity import read_run_id
from regen_dist.data.storage.store import Store
from regen_dist.errors import CheckpointError, RunBusy
from regen_dist.inference.codec import Codec
from regen_dist.jsontext import json_text
from tests.helpers.checkpoints import model_state, save_checkpoint, saved_run
from tests.helpers.jobs import wait_until
from tests.helpers.ranks import run_ranks, run_regen_alone, said, start_regen, wait_for_step
from tests.helpers.tiny import tiny_dataset, tiny_run
from tools.checkpoint import app

QUICK = Patience(beat_s=0.3, look_s=1.0, stale_s=2.5, poll_s=0.1)


def _config(tmp_path: Path, output: str, url: str, data: Path) -> Path:
    made = tiny_run(tmp_path / output, data, train__steps=4000, checkpoint__every=10, checkpoint__url=url)
    path = tmp_path / f"{output}.yaml"
    path.write_text(to_yaml(made))
    return path


def _claims(url: str) -> list[str]:
    return list(Store(f"{url}/tiny/claims").list())


def test_the_same_checkpoints_from_two_run_folders(bucket_url: str, tmp_path: Path) -> None:
    """Refused while the first trains, by who holds them; after SIGKILL as another run's; by an explicit word it goes
    on, at once."""
    data = tiny_dataset(tmp_path / "data")
    one, other = (_config(tmp_path, output, bucket_url, data) for output in ("one", "other"))
    logs = tmp_path / "second"
    run_ranks(time.time, 1)  # what the others are forked from is there before the first trains
    first = start_regen("train", one, log=tmp_path / "first.log")
    try:
        wait_for_step(tmp_path / "one" / "tiny", 15, first)
        assert run_regen_alone("train", other, logs=logs) == 8
        told = said(logs)[0]
        assert f"{bucket_url}/tiny: already being trained by rank 0 on {os.uname().nodename}" in told
        assert f"in the run folder {tmp_path}/one/tiny" in told
        assert run_regen_alone("checkpoint", "prune", f"{bucket_url}/tiny", "--keep-last", 2, logs=logs) == 8
        (name,) = _claims(bucket_url)
        holder = parse_holder(Store(f"{bucket_url}/tiny/claims").get(name))
        assert holder is not None
        os.kill(holder.pid, signal.SIGKILL)
        first.wait(60)
    finally:
        first.kill()
    assert _claims(bucket_url) == [name]
    assert run_regen_alone("train", other, logs=logs) == 4
    assert "is of another run" in said(logs)[0]
    assert run_regen_alone("checkpoint", "adopt", tmp_path / "other" / "tiny", f"{bucket_url}/tiny", logs=logs) == 0
    folder = CheckpointFolder(f"{bucket_url}/tiny")
    steps = (folder.pointer() or 0) + 10
    assert run_regen_alone("train", other, f"train.steps={steps}", logs=logs) == 0
    assert f"resumed at step {steps - 10}" in said(logs)[0]
    assert _claims(bucket_url) == []
    assert folder.manifest(steps).run_id == read_run_id(tmp_path / "other" / "tiny")
    assert folder.manifest(steps).run_id == read_run_id(tmp_path / "one" / "tiny")


def test_of_many_that_start_at_once_one_wins(bucket_url: str) -> None:
    """Conditional writes decide, over what a dead process of another machine has left; signs of life keep it."""
    dead = replace(this_process(Path("theirs")), boot="another", host="node7", written=0.0)
    Store(f"{bucket_url}/claims").put("00000001.json", json_text(asdict(dead)).encode())
    results: list[str] = []
    barrier = threading.Barrier(5)

    def start(number: int) -> None:  # each as if on a machine of its own
        me = replace(this_process(Path(f"run{number}")), boot=f"boot{number}", host=f"node{number}", token=f"t{number}")
        one = Claim(bucket_url, me, patience=QUICK, log=lambda text: None)
        barrier.wait()
        try:
            one.take()
            results.append("won")
            wait_until(lambda: len(results) == 5, lambda: results)  # whoever comes late finds it held
            one.check()
            one.release()
        except RunBusy:
            results.append("refused")

    threads = [threading.Thread(target=start, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["refused"] * 4 + ["won"]
    assert Store(f"{bucket_url}/claims").list() == {}


def test_a_process_that_was_killed_is_known_at_once(bucket_url: str) -> None:
    code = (
        "import sys, time; from pathlib import Path; from regen_dist.checkpoint.claims import Claim, this_process\n"
        "claim = Claim(sys.argv[1], this_process(Path('theirs'))); claim.take(); print('held', flush=True)\n"
        "time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", code, bucket_url], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        mine = Claim(bucket_url, this_process(Path("mine")))
        with pytest.raises(RunBusy, match=f"process {process.pid}"):
            mine.take()
        process.kill()
        process.wait()
    began = time.monotonic()
    mine.take()
    assert time.monotonic() - began < Patience().look_s, "it was not waited for"
    mine.release()


# `regen checkpoint` on a bucket: the same as on a disk.


def _regen(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_life_in_a_bucket(bucket_url: str, tmp_path: Path) -> None:
    """Listed, pinned, verified, damaged and found, pruned, exported, and imported into another run's prefix."""
    run = saved_run(tmp_path / "runs", checkpoint__url=bucket_url)
    folder = CheckpointFolder(run.checkpoints)
    for step in (8, 9, 10):
        save_checkpoint(folder, step, model_state(run, seed=step))
    folder.write_shard(11, "rank-00000-of-00001.safetensors", model_state(run))
    for place in (run.folder, run.checkpoints):
        found = json.loads(_regen("list", place, "--json"))
        assert [each["step"] for each in found["checkpoints"]] == [7, 8, 9, 10]
        assert list(found["debris"]) == ["step-00000011"]
    _regen("pin", run.checkpoints, 7)
    assert _regen("verify", run.checkpoints).count(": ok,") == 4
    name = "step-00000010/rank-00000-of-00001.safetensors"
    data = bytearray(folder.store.get(name))
    data[-1] ^= 1
    folder.store.put(name, bytes(data))
    with pytest.raises(CheckpointError, match=r"step 10: rank-00000-of-00001.*SHA-256"):
        _regen("verify", run.folder)
    out = tmp_path / "model"
    assert "at step 9" in _regen("export", run.folder, "--out", out, "--no-statistics")
    assert "step 8" in _regen("prune", run.folder)
    assert (folder.steps(), folder.debris()) == ([7, 9, 10], {})
    _regen("import", out, run.folder / "config.yaml", "name=next")
    other = CheckpointFolder(f"{bucket_url}/next")
    imported, expected = other.reader(other.manifest(0)), model_state(run, seed=9)
    for name in other.manifest(0).shapes:
        assert torch.equal(imported.whole(f"master/{name}"), expected[f"ema/{name}"])
    assert Codec.load(tmp_path / "runs" / "next", device=torch.device("cpu")).step == 0
