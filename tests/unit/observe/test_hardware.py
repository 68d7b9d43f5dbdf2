"""Facts of the machine, and the device that a process was promised or an explanation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import BackendError
from regen_dist.observe import hardware
from regen_dist.observe.hardware import (
    GPU_PEAKS,
    accelerator,
    choose_device,
    has_native_bf16,
    known_peak,
    summarise_machine,
)
from regen_dist.programs import GPUS_PER_NODE


@pytest.mark.parametrize(
    ("line", "does"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_tile", True),
        ("flags\t\t: fpu avx512f amx_bf16", True),
        ("Features\t: fp asimd i8mm bf16", True),
        ("flags\t\t: fpu sse2 avx2 avx512f avx512_vnni", False),
        ("model name\t: bf16 in its name", False),
    ],
)
def test_bf16_is_read_from_the_flags(tmp_path: Path, line: str, does: bool) -> None:
    """AMX, AVX-512 BF16 and ARM's extension count; a CPU without them takes ten times as long in bf16."""
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\n{line}\n")
    assert has_native_bf16(path) is does


def test_a_system_that_does_not_tell_is_not_warned_of(tmp_path: Path) -> None:
    """No /proc: nothing is known against it."""
    assert has_native_bf16(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA GH200 480GB", "GH200"), ("NVIDIA GB200", "GB200"), ("NVIDIA B200", "B200"),
        ("NVIDIA H200", "H200"), ("NVIDIA H200 NVL", "H200 NVL"), ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A10G", "A10G"), ("NVIDIA A10", "A10"), ("NVIDIA L40S", "L40S"), ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "4090"), ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA H20", None), ("NVIDIA RTX A1000", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None),
    ],
)  # fmt: skip
def test_a_gpu_has_the_peak_of_its_own_kind(name: str, entry: str | None) -> None:
    """Kinds of one chip differ (an H100 on PCIe has three quarters of one on SXM), and A10 is in A100."""
    assert known_peak(name) is (None if entry is None else GPU_PEAKS[entry])


def test_a_measured_peak_is_not_that_of_the_first_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads the library of a GPU, which may take longer than the whole measurement."""
    clock, durations = [0.0], iter([0.5])

    def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        clock[0] += next(durations, 1e-3)
        return a

    monkeypatch.setattr(torch.Tensor, "__matmul__", multiply)
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: clock[0])
    assert hardware.peak_tflops(torch.device("cpu"), torch.float32) == pytest.approx(2 * 512**3 / 1e-3 / 1e12)


def test_every_peak_has_its_source_and_tensor_cores_are_the_faster_ones() -> None:
    for peak in GPU_PEAKS.values():
        assert peak.source
        assert peak.bf16 is None or peak.bf16 > 1.9 * peak.fp32


# A process computes on the GPU that it was promised, or says why it cannot.


NONE = Path("/nowhere")


def _gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_one_visible_gpu_is_number_0_whichever_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `--gpus-per-task` and `--gpu-bind` show each task its own one."""
    _gpus(monkeypatch, 1)
    assert [Ranks(rank, 8, rank).device for rank in (0, 3, 7)] == [torch.device("cuda", 0)] * 3


def test_each_rank_has_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpus(monkeypatch, 4)
    assert [choose_device(rank).index for rank in range(4)] == [0, 1, 2, 3]
    with pytest.raises(BackendError, match=r"local rank 4 sees 4 GPUs"):
        choose_device(4)


def test_gpus_that_were_asked_for_and_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old driver, a build without CUDA, hidden devices: each with its reason, never the CPU instead."""
    _gpus(monkeypatch, 0)
    asked = {GPUS_PER_NODE: "8"}
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BackendError, match=r"^8 GPU.*built without CUDA"):
        choose_device(0, asked, NONE)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(BackendError, match=r"CUDA_VISIBLE_DEVICES='' hides"):
        choose_device(0, {**asked, "CUDA_VISIBLE_DEVICES": ""}, NONE)

    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\n(found version 11040).")

    monkeypatch.setattr(torch.cuda, "init", refuse)
    with pytest.raises(BackendError, match=r"driver on your system is too old \(found version 11040\)"):
        choose_device(0, asked, NONE)


def test_gpus_that_the_driver_has_are_not_passed_by(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a launcher nobody asked; the driver says that there are some. Hidden on purpose, they are not missed."""
    _gpus(monkeypatch, 0)
    for name in ("0000:17:00.0", "0000:2a:00.0"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    with pytest.raises(BackendError, match=r"^this machine has 2 NVIDIA GPU"):
        choose_device(0, {}, tmp_path)
    assert choose_device(0, {"CUDA_VISIBLE_DEVICES": ""}, tmp_path).type == "cpu"
    assert choose_device(0, {GPUS_PER_NODE: "0"}, NONE).type == "cpu"


def test_what_is_told_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder@U16-I1-N08)\n"
        "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1)\n"
    )
    gpu = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    monkeypatch.setattr(hardware, "_nccl_version", lambda: "2.27.5")
    told = accelerator(torch.device("cuda", 0), tmp_path)
    assert told["driver"] == "570.86.15"
    assert summarise_machine(told) == (
        f"NVIDIA H100 80GB HBM3 (80 GiB): torch {torch.__version__}, driver 570.86.15, CUDA 12.8, cuDNN 9.15.1, "
        "NCCL 2.27.5"
    )
    assert accelerator(torch.device("cpu"), NONE)["device"] == "cpu"


def test_hardware_figures_are_plausible() -> None:
    """A measured CPU peak between a thousandth of and ten TFLOP/s; memory of a process with torch in it."""
    assert 1e-3 < hardware.peak_tflops(torch.device("cpu"), torch.float32, seconds=0.05) < 10
    assert 50e6 < hardware.memory_bytes(torch.device("cpu")) < 100e9
