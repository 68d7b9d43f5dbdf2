"""The demo stops its training once, goes on by the same command, and skips what is done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import typer

from regen_dist.config import load_config
from regen_dist.config.embedder import EmbedderConfig
from regen_dist.errors import EXIT_RESUME
from tests.helpers.jobs import wait_until
from tests.helpers.machine import wait_until_gone
from tools import demo, stages

ROOT = Path(__file__).parents[3]
CONFIG = Path("configs/demo/embedder.yaml")

# Stands in for `regen train`: a step every 20 ms, code 75 when it finds the file STOP; a second start goes on. The
# first HELD starts make MOST steps, and wait there for the file.
TRAINING = """
import json, os, pathlib, signal, sys, time
run, total = pathlib.Path(sys.argv[1]), int(sys.argv[2])
run.mkdir(parents=True, exist_ok=True)
record, stop = run / "metrics.jsonl", run / "STOP"
stop.unlink(missing_ok=True)
lines = [json.loads(line) for line in record.read_text().splitlines()] if record.is_file() else []
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
step = max((line["step"] for line in lines), default=0)
held = sum(line["kind"] == "event" for line in lines) < int(os.environ.get("HELD", "0"))
pause_at = step + int(os.environ["MOST"]) if held else total
file = record.open("a", buffering=1)
file.write(json.dumps({"kind": "event", "step": step, "event": "start"}) + "\\n")
while step < total:
    if stop.exists():
        sys.exit(75)
    if step == pause_at:
        time.sleep(0.02)
        continue
    step += 1
    file.write(json.dumps({"kind": "train", "step": step}) + "\\n")
    time.sleep(0.02)
"""


@pytest.fixture
def config() -> EmbedderConfig:
    return load_config(CONFIG, ["train.steps=60"])


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run folder of a stand-in for the training."""
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    monkeypatch.setattr(stages, "regen", lambda *arguments: [sys.executable, str(script), *arguments])
    monkeypatch.setattr(stages, "_POLL_S", 0.02)
    return tmp_path / "run"


def hold(monkeypatch: pytest.MonkeyPatch, starts: int, most: int) -> None:
    """Have the first starts of the training wait for the file STOP after so many steps."""
    monkeypatch.setenv("HELD", str(starts))
    monkeypatch.setenv("MOST", str(most))


def starts(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["kind"] == "event"]


def test_a_cpu_without_bf16_trains_fewer_steps_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without: float32 and fewer steps than the config's; what the user asks for comes after it, and counts."""
    monkeypatch.setattr(stages, "working_precision", lambda: "fp32")
    own = demo._machine_overrides()
    assert load_config(CONFIG, own).train.steps == demo.FP32_TRAIN_STEPS < load_config(CONFIG, []).train.steps
    assert load_config(CONFIG, own).engine.precision == "fp32"
    assert load_config(CONFIG, [*own, "train.steps=60"]).train.steps == 60
    monkeypatch.setattr(stages, "working_precision", lambda: "bf16")
    assert demo._machine_overrides() == []


def test_stops_once_and_goes_on(
    training: Path, config: EmbedderConfig, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(monkeypatch, starts=1, most=45)
    demo._train([str(training), "60"], config, training)
    first, second = starts(training)
    assert first == 0
    assert 30 <= second <= 45
    assert stages.last_step(training) == 60
    demo._train([str(training), "60"], config, training)
    assert len(starts(training)) == 2
    assert "has all its 60 steps" in capfd.readouterr().out


def test_a_run_that_was_resumed_is_not_stopped_again(
    training: Path, config: EmbedderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(monkeypatch, starts=2, most=15)
    assert stages.run_until([str(training), "60"], training, 10) == (EXIT_RESUME, True)
    assert stages.run_until([str(training), "60"], training, stages.last_step(training) + 10) == (EXIT_RESUME, True)
    demo._train([str(training), "60"], config, training)
    assert len(starts(training)) == 3


def test_a_signal_is_handed_on_and_ends_the_demo(training: Path) -> None:
    def signal_in_the_middle() -> None:
        while not stages.last_step(training):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=signal_in_the_middle, daemon=True).start()
    with pytest.raises(typer.Exit) as ended:
        demo._train([str(training), "6000"], load_config(CONFIG, ["train.steps=6000"]), training)
    assert ended.value.exit_code == EXIT_RESUME
    assert len(starts(training)) == 1


def test_a_signal_that_comes_while_the_command_starts_reaches_it(
    training: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = subprocess.Popen

    def signalled(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return start(*arguments, **options)

    monkeypatch.setattr(stages.subprocess, "Popen", signalled)
    code, on_purpose = stages.run_until([str(training), "6000"], training, None)
    assert code in (128 + signal.SIGTERM, EXIT_RESUME)  # it was told before or after it could listen
    assert not on_purpose


@pytest.mark.parametrize(("number", "nohup", "code"), [("SIGTERM", 0, 143), ("SIGKILL", 0, -9), ("SIGHUP", 1, 0)])
def test_no_command_is_left_running(tmp_path: Path, number: str, nohup: int, code: int) -> None:
    """A stage ends with the demo that is asked to end, or killed; a demo under nohup outlives its terminal."""
    mark, done = tmp_path / "pid", tmp_path / "done"
    stage = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep({1 if nohup else 60})"
    program = f"""
import signal, sys
from tools import stages
if {nohup}:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
stages.regen = lambda *arguments: [sys.executable, "-c", {stage!r}]
try:
    {"ended = stages.run_until(['train'], stages.Path(), None)" if nohup else "stages.run(['shards'])"}
except stages.typer.Exit as ended:
    sys.exit(ended.exit_code)
if {nohup} and ended.code:
    sys.exit(ended.code)
open({str(done)!r}, "w").close()
"""
    demo = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_until(lambda: mark.is_file() and bool(mark.read_text()), lambda: "the stage did not start")
    demo.send_signal(signal.Signals[number])
    assert demo.wait(30) == code
    wait_until_gone([int(mark.read_text())])
    assert done.exists() == bool(nohup)


def test_a_failure_ends_the_demo_with_its_code(training: Path, config: EmbedderConfig) -> None:
    with pytest.raises(typer.Exit) as ended:
        demo._train([str(training), "not a number"], config, training)
    assert ended.value.exit_code == 1
