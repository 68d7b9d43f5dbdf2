"""Checks that a config can run on the ranks and devices of its target."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from regen_dist.checks.findings import Finding, Target, error
from regen_dist.config import AnyRunConfig, T2VConfig
from regen_dist.config.identity import clips_per_rank
from regen_dist.errors import BackendError, ConfigError, missing_extra

_NVIDIA = Path("/proc/driver/nvidia/gpus")


def ranks(config: AnyRunConfig, target: Target) -> Iterator[Finding]:
    """Check that the batch divides evenly over the ranks."""
    try:
        clips_per_rank(config, target.world_size)
    except ConfigError as caught:
        yield error("train.batch_global", str(caught))


def kernels(config: AnyRunConfig, target: Target) -> Iterator[Finding]:
    """Check that attention and optimizer run on the available device, and that their packages are installed."""
    has_gpus = _NVIDIA.is_dir() if target.has_gpus is None else target.has_gpus
    yield from _attention(config, target, has_gpus)
    yield from _optimizer(config, target, has_gpus)


def packages(config: AnyRunConfig, target: Target) -> Iterator[Finding]:
    """Check that the optional packages that the run imports are installed."""
    for key, user, package in optional_packages(config):
        if target.packages and not is_installed(package):
            yield error(key, missing_extra(user, package), BackendError)


def require_packages(config: AnyRunConfig) -> None:
    """Raise BackendError for the first optional package of a run that is not installed."""
    for _, user, package in optional_packages(config):
        if not is_installed(package):
            raise BackendError(missing_extra(user, package))


def optional_packages(config: AnyRunConfig) -> Iterator[tuple[str, str, str]]:
    """Yield the config key, its user in words, and the name of each optional package (`errors.EXTRAS`) of a run."""
    yield "data.url", "data.url, a dataset,", "pyarrow"
    if config.model.kind != "t2v":
        yield "data.url", "data.url, a dataset of videos,", "av"
    if config.wandb.mode != "disabled":
        yield "wandb.mode", f"wandb.mode={config.wandb.mode}", "wandb"
    if config.tensorboard.enabled:
        yield "tensorboard.enabled", "tensorboard.enabled=true", "tensorboard"
    if config.model.kind == "regen" and config.model.encoder.kind == "diffusers":
        yield "model.encoder.kind", "model.encoder.kind=diffusers", "diffusers"


def _attention(config: AnyRunConfig, target: Target, has_gpus: bool) -> Iterator[Finding]:
    key, backend = _backend(config)
    if backend != "flash":
        return
    fix = f"set {key}=sdpa"
    if not has_gpus:
        yield error(key, f"{key}=flash needs GPUs, and the job has none; {fix}", BackendError)
    elif config.engine.precision != "bf16":
        yield error(key, f"{key}=flash computes in bf16; set engine.precision=bf16, or {fix}", BackendError)
    if target.packages and not is_installed("flash_attn"):
        yield error(key, f"{key}=flash needs the package flash-attn; install it, or {fix}", BackendError)


def _backend(config: AnyRunConfig) -> tuple[str, str]:
    """Config key of the attention kernel, and its value; "" for a model without attention."""
    if isinstance(config, T2VConfig):
        return "model.attention.backend", config.model.attention.backend
    attends = config.model.kind == "regen"
    return "model.decoder.attention.backend", config.model.decoder.attention.backend if attends else ""


def _optimizer(config: AnyRunConfig, target: Target, has_gpus: bool) -> Iterator[Finding]:
    key, kind, fix = "optimizer.kind", config.optimizer.kind, "set optimizer.kind=adamw"
    if kind == "fused_adam" and not has_gpus:
        yield error(key, f"{key}=fused_adam (apex) needs GPUs, and the job has none; {fix}", BackendError)
    if kind == "fused_adam" and target.packages and not is_installed("apex", "optimizers"):
        text = (
            f"{key}=fused_adam needs NVIDIA apex, which is built from source (see environment.yml; PyPI's `apex` is "
            f"another package); or {fix}"
        )
        yield error(key, text, BackendError)
    if kind == "cpu_adam" and has_gpus:
        yield error(key, f"{key}=cpu_adam is for models on the CPU, and the job has GPUs; {fix}", BackendError)
    if kind == "cpu_adam" and config.engine.kind == "plain":
        yield error(key, f"{key}=cpu_adam is DeepSpeed's; set engine.kind=zero3, or {fix}", BackendError)


def is_installed(package: str, part: str = "") -> bool:
    """Return whether a package can be found without importing it (by a part that distinguishes it from another package
    of the same name)."""
    found = find_spec(package)
    places = found.submodule_search_locations if found else None
    return any((Path(place) / part).exists() for place in places or ())
