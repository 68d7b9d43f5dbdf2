"""The parts of `regen gpu-check`: their names, what each proves, and how long it may take. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from regen_dist.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """One part, which runs in a process of its own.

    Args:
        name: that `--only` takes.
        function: that makes it, `module:name` below `tools.gpu_check`.
        proves: in one line (docs/gpu.md says more).
        limit_s: seconds that it may take before it is ended; it counts as failed then.
    """

    name: str
    function: str
    proves: str
    limit_s: float = 120.0


PARTS = (
    Part("versions", "machine:versions", "driver, CUDA, cuDNN, NCCL; a group of one rank and its gloo twin"),
    Part("attention", "attention:attention", "every kernel against the textbook, forward and backward; TFLOP/s"),
    Part("convolutions", "convolutions:convolutions", "bf16 Conv3d against float32, beyond 1.8e9 elements too"),
    Part("optimizers", "optimizers:optimizers", "fused AdamW and FusedAdam against AdamW, saved and resumed"),
    Part("zero3", "zero3:zero3", "ZeRO-3 of one rank against the plain engine; prefetch; save and restore", 180.0),
    Part("embedders", "speed:embedders", "clips/s of encoder and decoder, profile, synchronisations of a step", 180.0),
    Part("t2v-blocks", "speed:t2v_blocks", "eight blocks of the 5B transformer: MFU and HFU"),
    Part("t2v-5b", "speed:t2v_5b", "the whole 5B model, one row: peak memory against `regen describe`", 180.0),
    Part("ranks", "ranks:ranks", "a rank that raises amid a collective ends the job in seconds, with its traceback"),
    Part("tests", "suite:tests", "the tests that are marked `cuda`", 180.0),
)

_TRAIN_S, _ARMS = 900.0, 4  # beside the minutes themselves: the film, probes, measuring


def training_part(minutes: float) -> Part:
    """What `--train` adds: REGEN and its baseline at two compressions, so many minutes each."""
    proves = "REGEN and its baseline at k = 16 and 32: one-step PSNR on filmed video that none was trained on"
    return Part("train", "training:training", proves, _TRAIN_S + _ARMS * 60 * minutes * 1.5)


def chosen_parts(names: list[str] | None) -> tuple[Part, ...]:
    """The parts of these names, in their own order; all of them by default.

    Raises:
        ConfigError: there is no such part.
    """
    known = [part.name for part in PARTS]
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise ConfigError(f"--only {', '.join(unknown)}: no such part; there are {', '.join(known)}")
    return tuple(part for part in PARTS if not names or part.name in names)
