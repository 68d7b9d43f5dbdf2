"""Speed and memory of the models: the embedders, eight blocks of the 5B transformer, and the whole of it."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from regen_dist.config import EmbedderConfig, load_embedder_config
from regen_dist.config.t2v import T2VConfig
from regen_dist.data.format.manifest import MANIFEST
from regen_dist.data.loading.clip_loader import ClipBatch
from regen_dist.distributed.engine import Engine
from regen_dist.distributed.ranks import Ranks, process_group, read_environment
from regen_dist.distributed.zero3 import build_engine
from regen_dist.errors import RegenError
from regen_dist.models.embedder import Regen, build_model
from regen_dist.models.flops import RowFlops, count_row_flops
from regen_dist.models.memory import memory_bytes
from regen_dist.observe.hardware import peak_tflops
from regen_dist.programs import regen as regen_command
from regen_dist.training.run import build_task
from tools.bench.common import run_side_by_side
from tools.bench.compression_measure import TRAINED, CropSize, load_clips, measure_arm
from tools.bench.compression_runs import (
    CompressionArm,
    baseline,
    num_steps,
    paced_config,
    regen,
    training_facts,
    training_pace,
)
from tools.gpu_check.machine import Machine, PartLeftOut
from tools.gpu_check.zero3 import SMALL_EMBEDDER, embedder_config, row_config

_TOP = 8  # kernels that a profile names
_GIB = 2**30
_MEMORY_TOLERANCE = 0.15  # of the estimate of `regen describe`
_ROW_FRAMES, _TEXT = 8, 256  # latent frames of a row of four clips, and tokens of its caption


def embedders(machine: Machine) -> dict[str, Any]:
    """Return clips per second of encoder and decoder, the most expensive kernels of a training step, and the number of
    its synchronisations with the device."""
    small = machine.size((), (*SMALL_EMBEDDER, "model.decoder.blocks=2", "data.size=[16, 32]"))
    names = ("regen_k32", "fast_k32")
    found = {name: _embedder(machine, embedder_config(machine, name, "plain", small)) for name in names}
    summary = [
        f"{name}: encodes {each['encode_clips_per_s']:.3g}, decodes {each['decode_clips_per_s']:.3g} clips/s, "
        f"{each['synchronisations']} synchronisations a step"
        for name, each in found.items()
    ]
    return {**found, "summary": "; ".join(summary)}


def _embedder(machine: Machine, config: EmbedderConfig) -> dict[str, Any]:
    machine.forget_peak()
    speeds = _codec_speed(machine, config)
    task = build_task(config, machine.device)
    engine, frames = build_engine(config, Ranks(), task.build), config.model.num_frames
    batch = ClipBatch(torch.randint(0, 256, (1, 3, frames, *config.data.size), dtype=torch.uint8), torch.tensor([0]))

    def step() -> None:
        engine.backward(task.loss(engine, batch, 0).value, is_last=True)
        engine.step(1e-4)

    seconds = machine.seconds(step)
    return {
        **speeds,
        "step_s": seconds,
        "synchronisations": _synchronisations(machine, step),
        "kernels": _kernels(machine, step),
    }


@torch.no_grad()
def _codec_speed(machine: Machine, config: EmbedderConfig) -> dict[str, float]:
    torch.manual_seed(0)
    model = build_model(config.model).to(machine.device, machine.dtype).eval()
    assert isinstance(model, Regen), "both configs are of REGEN"
    shape = (1, 3, config.model.num_frames, *config.data.size)
    video = torch.randn(shape, device=machine.device, dtype=machine.dtype).clamp(-1, 1)
    noise, t, times = torch.randn_like(video), torch.ones(1, device=machine.device), model.frame_times(video)
    latents = model.encode(video)
    if not bool(torch.isfinite(model.denoise(noise, t, latents, times)).all()):
        raise RegenError(f"{config.name}: a fresh model decodes values that are not finite")
    return {
        "encode_clips_per_s": 1 / machine.seconds(lambda: model.encode(video)),
        "decode_clips_per_s": 1 / machine.seconds(lambda: model.denoise(noise, t, latents, times)),
    }


def _synchronisations(machine: Machine, step: Callable[[], object]) -> int:
    """Return how often the host waits for the device in a step; 0 on the CPU."""
    if not machine.is_cuda:
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


def _kernels(machine: Machine, step: Callable[[], object]) -> dict[str, float]:
    """Return the shares of a step's time of its longest kernels (on the CPU: operators)."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if machine.is_cuda else [])]
    with profile(activities=activities) as recorded:
        step()
        machine.wait()
    of_one = "self_device_time_total" if machine.is_cuda else "self_cpu_time_total"
    rows = recorded.key_averages()
    if machine.is_cuda:  # operators carry the time of their kernels, and annotations that of what they span
        rows = [each for each in rows if each.device_type.name != "CPU" and not each.is_user_annotation]
    seconds: dict[str, float] = {each.key: getattr(each, of_one) for each in rows}
    whole = sum(seconds.values()) or 1.0
    return {name: seconds[name] / whole for name in sorted(seconds, key=lambda name: -seconds[name])[:_TOP]}


def t2v_blocks(machine: Machine) -> dict[str, Any]:
    """Run forward and backward pass of eight blocks on rows of four clips; return model FLOPs as a share of the
    device's peak (MFU), and including recomputation (HFU)."""
    config, rows = row_config(machine, "plain", 8, activation_checkpointing=True), machine.size(4, 1)
    counted, inputs = _counted(machine, config), _row(machine, config, rows)
    model = _recomputing(config).to(machine.device, machine.dtype)

    def step() -> None:
        model(*inputs).square().mean().backward()
        model.zero_grad(set_to_none=True)

    seconds = machine.seconds(step)
    peak = peak_tflops(machine.device, machine.dtype) * 1e12
    mfu = rows * (counted.num_training_flops - counted.recomputed_flops) / seconds / peak
    hfu = rows * counted.num_training_flops / seconds / peak
    if not 0 < mfu < hfu < machine.size(1.0, 2.0):  # the CPU's own peak is measured, and moves
        raise RegenError(f"MFU {mfu:.2f} and HFU {hfu:.2f} cannot be: the count or the peak ({peak:.3g}) is wrong")
    summary = f"MFU {mfu:.2f}, HFU {hfu:.2f} of {peak / 1e12:.3g} TFLOP/s, {rows} row{'s' if rows > 1 else ''}"
    return {"mfu": mfu, "hfu": hfu, "seconds": seconds, "peak_tflops": peak / 1e12, "summary": summary}


def t2v_5b(machine: Machine) -> dict[str, Any]:
    """One step of the whole model by ZeRO-3 with one rank: its peak of memory beside the estimate."""
    config = row_config(machine, "zero3", 32, activation_checkpointing=True)
    terms = memory_bytes(_counted(machine, config), config.engine, world_size=1, clips_per_gpu=1)
    estimated = sum(terms.values())
    if machine.is_cuda and estimated > (free := torch.cuda.mem_get_info(machine.device)[0]):
        raise PartLeftOut(f"needs {estimated / _GIB:.0f} GiB by `regen describe`, {free / _GIB:.0f} GiB are free")
    ranks = read_environment({})
    with process_group(ranks, needed=True):
        measured = _peak(machine, lambda: _one_step(machine, config, ranks))
    ratio = measured / estimated
    if not abs(ratio - 1) <= _MEMORY_TOLERANCE:
        raise RegenError(
            f"peak {measured / _GIB:.2f} GiB, {ratio:.2f} times the estimate of {estimated / _GIB:.2f} GiB"
        )
    summary = f"peak {measured / _GIB:.2f} GiB, {ratio:.2f} times the estimate"
    return {"peak": measured, "estimate": estimated, "ratio": ratio, "terms": terms, "summary": summary}


def _peak(machine: Machine, work: Callable[[], object]) -> int:
    """Return the peak bytes of tensors."""
    if not machine.is_cuda:
        from tools.bench.step_rank import tensor_peak

        return tensor_peak(work)
    machine.forget_peak()
    work()
    return torch.cuda.max_memory_allocated(machine.device)


def _one_step(machine: Machine, config: T2VConfig, ranks: Ranks) -> Engine:
    engine = build_engine(config, ranks, lambda: _recomputing(config))
    for _ in range(2):
        engine.backward(engine(*_row(machine, config, 1)).square().mean(), is_last=True)
        engine.step(1e-4)
    return engine


def _recomputing(config: T2VConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model(config.model)
    model.set_activation_checkpointing(config.engine.activation_checkpointing)
    return model


def _counted(machine: Machine, config: T2VConfig) -> RowFlops:
    size = machine.size((24, 40), (4, 6))
    precision: Any = machine.precision
    return count_row_flops(config.model, _ROW_FRAMES, size, _TEXT, precision=precision, activation_checkpointing=True)


def _row(machine: Machine, config: T2VConfig, rows: int) -> tuple[Tensor, ...]:
    """Return random latents, times, texts and masks."""
    size, device = machine.size((24, 40), (4, 6)), machine.device
    x = torch.randn(rows, config.model.latent_channels, _ROW_FRAMES, *size, device=device)
    text = torch.randn(rows, _TEXT, config.model.text_width, device=device)
    return x, torch.full((rows,), 0.5, device=device), text, torch.ones(rows, _TEXT, dtype=torch.bool, device=device)


# REGEN and its baseline, trained for some minutes each on the demo's film, beside each other on filmed video.

_CONFIG, _CLIPS = Path("configs/bench/gpu_check.yaml"), Path("configs/bench/compression_clips.yaml")
_VIDEOS, _FILM, _TESTS = Path("runs/videos"), "bbb.mp4", ("bikes.mp4", "carphone.mp4")
_COMPRESSIONS = (16, 32)
_PROBE = (12, 6), (4, 1)  # steps of the timing run and of its warm-up: on a GPU, on the CPU
_NEVER = 10**9
_TRIES, _LEAST_SHARE = 3, 0.75  # trainings at most for an arm, and the share of its time that one must have taken


def training(machine: Machine) -> dict[str, Any]:
    """Train REGEN and the baseline as it was published, at both compressions, and measure them where none was trained:
    the mean PSNR of one-step reconstructions."""
    own = _own(machine)
    base = load_embedder_config(_CONFIG, own)
    _make_shards(machine, base)
    tests, size = load_clips(_CLIPS, _VIDEOS), CropSize(base.data.size, 128)
    found: dict[str, Any] = {}
    for arm in (kind(k) for k in _COMPRESSIONS for kind in (regen, baseline)):
        steps = _trained(machine, own, base, arm)
        run, kept = machine.folder / "arms" / arm.name, machine.folder / "measures" / f"{arm.name}.json"
        quality = measure_arm(run, tests, {TRAINED: size}, kept, (1,))[TRAINED]["1"]
        facts = training_facts(run)
        shown = {name: facts[name] for name in ("seconds", "clips", "flops", "loss", "skipped", "parameters")}
        found[arm.name] = {"steps": steps, "psnr_db": quality["psnr_db"], "measures": quality, **shown}
        print(f"{arm.label}: {steps} steps, {quality['psnr_db']:.2f} dB", flush=True)
    lines = []
    for k in _COMPRESSIONS:
        ours, theirs = (found[arm(k).name]["psnr_db"] for arm in (regen, baseline))
        lines.append(f"k = {k}: REGEN {ours:.2f} dB, baseline {theirs:.2f} dB, {ours - theirs:+.2f} dB in one step")
    return {"minutes": machine.minutes, "arms": found, "summary": "; ".join(lines)}


def _own(machine: Machine) -> list[str]:
    """Return the config overrides."""
    small = [*SMALL_EMBEDDER, "model.decoder.blocks=1", "data.size=[32, 32]", "data.validation_size=[32, 32]"]
    small += ["train.batch_global=2", "data.workers=0", "engine.precision=fp32"]
    return [f"data.url={machine.folder / 'shards'}", f"output={machine.folder / 'arms'}", *machine.size([], small)]


def _make_shards(machine: Machine, base: EmbedderConfig) -> None:
    """Build the shards of the film at 128 pixels and the test clips, if they do not exist yet."""
    names = [each for name in (_FILM, *_TESTS) for each in ("--only", name)]
    _run(machine, "fetch", ["fetch-videos", "--out", str(_VIDEOS), *names])
    url = str(base.data.url)
    if not (Path(url) / MANIFEST).is_file():
        part = machine.size([], ["--max-seconds", "20"])
        _run(machine, "shards", ["shards", "build", str(_VIDEOS / _FILM), "--out", url, "--short-side", "128", *part])


def _trained(machine: Machine, own: Sequence[str], base: EmbedderConfig, arm: CompressionArm) -> int:
    """Train an arm for the minutes; return the number of steps. One that was trained and measured before stays."""

    def command(name: str, steps: int, more: Sequence[str]) -> None:
        changes = paced_config(arm.overrides(base), steps, base.optimizer.warmup_steps)
        quiet = [f"train.validate_every={_NEVER}", *more]
        _run(machine, name, ["train", str(_CONFIG), *own, *changes, *quiet])

    def train(steps: int) -> float:
        shutil.rmtree(run, ignore_errors=True)
        command(arm.name, steps, [])
        return float(training_facts(run)["seconds"])

    run, measured = machine.folder / "arms" / arm.name, machine.folder / "measures" / f"{arm.name}.json"
    if measured.exists():
        return int(training_facts(run)["steps"])
    probes, (probed, warm) = machine.folder / "probes", machine.size(*_PROBE)
    rhythm = ["train.log_every=1", f"checkpoint.every={_NEVER}", f"output={probes}"]
    command(f"{arm.name}-probe", probed, rhythm)
    return train_for(60 * machine.minutes, training_pace(probes / arm.name, warm)["wall_s"], train)


def train_for(seconds: float, pace: float, train: Callable[[int], float]) -> int:
    """Train for about as long as asked; return the number of steps.

    A timing run of a few steps may be far off (kernels that are being tuned, other programs on the machine). A training
    that took less than three quarters of the time is repeated from its start, at the pace that it had, at most twice.

    Args:
        seconds: time of the training's steps.
        pace: seconds of a step, from a timing run.
        train: trains from the start for a number of steps; returns the seconds that they took.
    """
    steps = 0
    for _ in range(_TRIES):
        steps = num_steps(seconds / 60, pace)
        took = train(steps)
        if took >= _LEAST_SHARE * seconds:
            break
        pace = took / steps
    return steps


def _run(machine: Machine, name: str, arguments: Sequence[str]) -> None:
    """Run one `regen` command, with its log."""
    run_side_by_side({name: regen_command(*arguments)}, logs=machine.folder / "logs", at_once=1)
