"""REGEN and its baseline, trained for some minutes each on the demo's film, beside each other on filmed video."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launcher.arms import run_side_by_side
from regen_dist.config import RunConfig, load_embedder_config
from regen_dist.data.dataset.manifest import MANIFEST
from regen_dist.evaluation.compression.arms import Arm, baseline, regen
from regen_dist.evaluation.compression.budget import num_steps, pace, paced, training_facts
from regen_dist.evaluation.compression.clips import load_clips
from regen_dist.evaluation.compression.measuring import TRAINED, Size, measure_arm
from regen_dist.programs import regen as regen_command
from tools.gpu_check.machine import Machine
from tools.gpu_check.zero3 import SMALL_ENCODER

_CONFIG, _CLIPS = Path("configs/bench/gpu_check.yaml"), Path("configs/bench/compression_clips.yaml")
_VIDEOS, _FILM, _TESTS = Path("runs/videos"), "bbb.mp4", ("bikes.mp4", "carphone.mp4")
_COMPRESSIONS = (16, 32)
_PROBED_STEPS, _WARM_STEPS = 12, 6
_NEVER = 10**9


def training(machine: Machine) -> dict[str, Any]:
    """Train REGEN and the baseline as it was published, at both compressions, and measure them where none was trained:
    the mean PSNR of one-step reconstructions."""
    own = _own(machine)
    base = load_embedder_config(_CONFIG, own)
    _make_shards(machine, base)
    tests, size = load_clips(_CLIPS, _VIDEOS), Size(base.data.size, 128)
    found = {}
    for arm in (kind(k) for k in _COMPRESSIONS for kind in (regen, baseline)):
        steps = _trained(machine, own, base, arm)
        run, kept = machine.folder / "arms" / arm.name, machine.folder / "measures" / f"{arm.name}.json"
        measured = measure_arm(run, tests, {TRAINED: size}, kept, (1,))
        quality = measured[TRAINED]["1"]
        found[arm.name] = {"steps": steps, "psnr_db": quality["psnr_db"], "measures": quality, **_facts(run)}
        print(f"{arm.label}: {steps} steps, {quality['psnr_db']:.2f} dB", flush=True)
    return {"minutes": machine.minutes, "arms": found, "summary": "; ".join(_told(k, found) for k in _COMPRESSIONS)}


def _told(k: int, found: dict[str, Any]) -> str:
    ours, theirs = (found[arm(k).name]["psnr_db"] for arm in (regen, baseline))
    return f"k = {k}: REGEN {ours:.2f} dB, baseline {theirs:.2f} dB, {ours - theirs:+.2f} dB in one step"


def _own(machine: Machine) -> list[str]:
    """Changes to the config."""
    small = [SMALL_ENCODER, "model.conditioning.width=16", "model.decoder.width=32", "model.decoder.heads=2"]
    small += ["model.decoder.blocks=1", "data.size=[32, 32]", "data.validation_size=[32, 32]", "train.batch_global=2"]
    small += ["data.workers=0", "engine.precision=fp32"]
    return [f"data.url={machine.folder / 'shards'}", f"output={machine.folder / 'arms'}", *machine.size([], small)]


def _make_shards(machine: Machine, base: RunConfig) -> None:
    """The film at 128 pixels, and the clips for the tests, where they are not there yet."""
    names = [each for name in (_FILM, *_TESTS) for each in ("--only", name)]
    _run(machine, "fetch", ["fetch-videos", "--out", str(_VIDEOS), *names])
    url = str(base.data.url)
    if not (Path(url) / MANIFEST).is_file():
        part = machine.size([], ["--max-seconds", "20"])
        _run(machine, "shards", ["shards", "build", str(_VIDEOS / _FILM), "--out", url, "--short-side", "128", *part])


def _trained(machine: Machine, own: Sequence[str], base: RunConfig, arm: Arm) -> int:
    """Train an arm for as many steps as fit into the minutes, by the clock; returns how many. A short run before tells
    how long a step takes."""

    def command(name: str, steps: int, more: Sequence[str]) -> None:
        changes = paced(arm.overrides(base), steps, base.optimizer.warmup_steps)
        quiet = [f"train.validate_every={_NEVER}", *more]
        _run(machine, name, ["train", str(_CONFIG), *own, *changes, *quiet])

    probes = machine.folder / "probes"
    rhythm = ["train.log_every=1", f"checkpoint.every={_NEVER}", f"output={probes}"]
    command(f"{arm.name}-probe", _PROBED_STEPS, rhythm)
    steps = num_steps(machine.minutes, pace(probes / arm.name, _WARM_STEPS)["wall_s"])
    command(arm.name, steps, [])
    return steps


def _facts(run: Path) -> dict[str, Any]:
    facts = training_facts(run)
    return {name: facts[name] for name in ("seconds", "clips", "flops", "loss", "skipped", "parameters")}


def _run(
    machine: Machine, name: str, arguments: Sequence[str], *, done: Callable[[str], None] = lambda _: None
) -> None:
    """One `regen` command, with its log."""
    run_side_by_side({name: regen_command(*arguments)}, logs=machine.folder / "logs", at_once=1, done=done)
