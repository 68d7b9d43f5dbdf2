"""Builds of datasets that are killed, stopped, shared by processes, or run out of disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from regen_dist.data.build.build import build_shards
from regen_dist.data.build.foreign import index_tars
from regen_dist.data.build.segments import BuildOptions
from regen_dist.data.storage.store import Store
from regen_dist.data.synthetic.dataset import build_synthetic
from regen_dist.data.synthetic.shapes import SyntheticOptions
from tests.helpers.datasets import (
    FLAGS,
    PARTS,
    numbered,
    objects,
    run_builds,
    start_build,
    wait_for,
    write_sources,
    write_tar,
)
from tests.helpers.machine import descendants, wait_until_gone
from tests.helpers.video import moving_square, write_video


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of the helper, and after them some more: a build that is met at the first ones is far from its end."""
    folder = write_sources(tmp_path_factory.mktemp("sources"))
    for seed in range(4, 9):
        write_video(folder / f"wide and after it {seed}.mp4", moving_square(72, 96, 64, seed=seed))
    return folder


@pytest.fixture(scope="module")
def whole(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The dataset that one undisturbed process makes of the sources in parts."""
    folder = tmp_path_factory.mktemp("whole")
    assert build_shards([sources], folder, PARTS, workers=0).parts == 8
    return objects(folder)


def test_tasks_at_the_same_time_make_the_same_dataset(sources: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    flags: list[str | Path] = [sources, "--out", out, *FLAGS, "--workers", "0"]
    outputs = run_builds(*([*flags, "--task", f"{task}/3"] for task in range(3)))
    assert objects(out) == whole
    assert any("21 samples" in output for output in outputs)


def test_a_build_killed_at_any_moment_goes_on_and_makes_the_same_bytes(
    sources: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    for name in ("part-00000.plan.json", "part-00000-000000.parquet", "part-00002-000000.parquet"):
        process = start_build(sources, "--out", out, *FLAGS, "--workers", "1")
        wait_for(Store(out), name, process)
        process.kill()
        process.communicate()
    assert "manifest.json" not in Store(out).list()
    run_builds([sources, "--out", out, *FLAGS, "--workers", "1"])
    assert objects(out) == whole
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_build_that_is_asked_to_stop_says_how_to_go_on(
    sources: Path, tmp_path: Path, whole: dict[str, bytes], number: signal.Signals
) -> None:
    out = tmp_path / "out"
    process = start_build(sources, "--out", out, *FLAGS, "--workers", "1")
    wait_for(Store(out), "part-00000-000000.parquet", process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert "run the same command again" in output
    assert "Traceback" not in output
    assert not list(out.glob(".*"))
    run_builds([sources, "--out", out, *FLAGS, "--workers", "1"])
    assert objects(out) == whole


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half_written(sources: Path, tmp_path: Path) -> None:
    """On a disk of 200 KB, mounted in a namespace of its own."""
    code = """if True:
        import sys
        from dataclasses import replace
        from pathlib import Path
        from regen_dist.data.build.build import build_shards
        from tests.helpers.datasets import PARTS

        try:
            build_shards([sys.argv[1]], sys.argv[2], replace(PARTS, keep=True), workers=0)
        except Exception as error:
            print(type(error).__name__, error, sorted(path.name for path in Path(sys.argv[2]).glob(".*")))
    """
    noise = np.random.default_rng(1).integers(0, 255, (40, 96, 96, 3), np.uint8)
    big = write_video(tmp_path / "in" / "big.mp4", noise, crf=8)
    assert big.stat().st_size > 300_000
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"mount -t tmpfs -o size=200k none '{disk}' || exit 42; exec \"$@\""
    ran = subprocess.run(
        [
            "unshare",
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            script,
            *f"- {sys.executable} -c".split(),
            code,
            str(big),
            str(disk),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if ran.returncode == 42 or "unshare" in ran.stderr:
        pytest.skip(f"no small disk can be mounted here: {ran.stderr.strip()}")
    assert ran.stdout.startswith("DiskFull"), ran.stdout + ran.stderr
    assert "make room and run the same again" in ran.stdout
    assert ran.stdout.strip().endswith("[]")


def test_options_none_are_the_defaults_of_the_command(sources: Path, tmp_path: Path) -> None:
    run_builds([sources / "tall.mp4", "--out", tmp_path / "command", "--workers", "0"])
    build_shards([sources / "tall.mp4"], tmp_path / "library", BuildOptions(), workers=0)
    assert objects(tmp_path / "command") == objects(tmp_path / "library")


def test_a_killed_synthetic_build_is_finished_with_the_same_bytes(tmp_path: Path) -> None:
    options = SyntheticOptions(number=400, seed=11, side=32, frames=9, samples_per_shard=40)
    command = [sys.executable, "-m", "tools.cli", "shards", "synthetic", "--out", str(tmp_path / "killed")]
    command += ["--number", "400", "--seed", "11", "--side", "32", "--frames", "9", "--samples-per-shard", "40"]
    process = subprocess.Popen([*command, "--workers", "1"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "shapes-000001-000000.parquet").exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    workers = descendants(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until_gone(workers)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    again = build_synthetic(tmp_path / "killed", options, workers=0)
    assert 0 < again.shards_made < 10
    assert build_synthetic(tmp_path / "whole", options, workers=0).shards_made == 10
    assert objects(tmp_path / "killed") == objects(tmp_path / "whole")
    assert build_synthetic(tmp_path / "killed", options, workers=0).shards_made == 0


def test_a_killed_index_goes_on_where_it_was(tmp_path: Path) -> None:
    tars = 96  # each takes some milliseconds: the end must be far from the third on a busy machine, too
    for shard in range(tars):
        write_tar(tmp_path / "killed" / f"{shard:05d}.tar", numbered(8, start=8 * shard))
    shutil.copytree(tmp_path / "killed", tmp_path / "whole")
    program = "from tools.shards import app; app()"
    command = [sys.executable, "-c", program, "index", str(tmp_path / "killed"), "--workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while len(list((tmp_path / "killed").glob("*.index.parquet"))) < 3:
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.002)
    workers = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until_gone(workers)
    made = {name: data for name, data in objects(tmp_path / "killed").items() if name.endswith(".index.parquet")}
    assert 3 <= len(made) < tars
    assert "manifest.json" not in Store(tmp_path / "killed").list()
    (tmp_path / "killed" / ".00003.index.parquet.0.999999999.tmp").write_bytes(b"half of an ind")
    finished = index_tars(tmp_path / "killed", workers=0)
    after = objects(tmp_path / "killed")
    assert finished.shards_made <= tars - len(made)
    assert {name: after[name] for name in made} == made
    index_tars(tmp_path / "whole", workers=0)
    assert after == objects(tmp_path / "whole")
