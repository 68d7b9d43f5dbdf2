"""Checks that a config can run on the ranks and devices of its target, with the networks that it names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from regen_dist.checks.findings import Finding, Target, error
from regen_dist.config import AnyRunConfig, T2VConfig
from regen_dist.config.identity import check_partition_size, clips_per_rank
from regen_dist.errors import BackendError, ConfigError, RegenError, missing_extra
from regen_dist.registry import Site, is_installed, problems

_NVIDIA = Path("/proc/driver/nvidia/gpus")


def ranks(config: AnyRunConfig, target: Target) -> Iterator[Finding]:
    """Check that the batch divides evenly over the ranks, and the ranks into those that share a copy of the weights."""
    for key, check in (("train.batch_global", clips_per_rank), ("engine.zero.partition_size", check_partition_size)):
        try:
            check(config, target.world_size)
        except ConfigError as caught:
            yield error(key, str(caught))


def kernels(config: AnyRunConfig, target: Target) -> Iterator[Finding]:
    """Check that attention and optimizer run on the available device, and that their packages are installed."""
    key, backend = _backend(config)
    kind, site = config.optimizer.kind, _site(config, target)
    yield from (error(key, text, BackendError) for text in problems("attention.backend", backend, site, key))
    yield from (error("optimizer.kind", text, BackendError) for text in problems("optimizer.kind", kind, site))


def packages(config: AnyRunConfig, target: Target) -> Iterator[Finding]:
    """Check that the optional packages that the run imports are installed."""
    for key, user, package in optional_packages(config):
        if target.packages and not is_installed(package):
            yield error(key, missing_extra(user, package), BackendError)


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


def convolutions(config: AnyRunConfig, target: Target) -> Iterator[Finding]:
    """Check that the cuDNN of this Python computes an embedder's convolutions in half precision correctly."""
    site = _site(config, target)
    if isinstance(config, T2VConfig) or site.device != "cuda" or not site.packages or site.precision != "bf16":
        return
    try:
        import torch

        from regen_dist.models.layers import require_cudnn
    except ImportError:  # no torch on this machine
        return
    try:
        if torch.version.cuda is not None:
            require_cudnn("cuda", torch.bfloat16)
    except BackendError as caught:
        yield error("engine.precision", str(caught), BackendError)


def compiler(config: AnyRunConfig, target: Target) -> Iterator[Finding]:
    """Check that torch.compile finds what it makes machine code with: Triton for a GPU, a C++ compiler for a CPU."""
    if not config.engine.compile or not target.packages:
        return
    if _site(config, target).device == "cuda":
        if not is_installed("triton"):
            text = "engine.compile needs Triton on a GPU; install triton, or set engine.compile=false"
            yield error("engine.compile", text, BackendError)
        return
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        text = f"engine.compile needs a C++ compiler on a CPU, {name} is not there; install g++, or set CXX, or "
        yield error("engine.compile", f"{text}engine.compile=false", BackendError)


def losses(config: AnyRunConfig, target: Target) -> Iterator[Finding]:
    """Check that the feature network of the perceptual loss can be read."""
    if isinstance(config, T2VConfig) or config.train.losses.perceptual.weight == 0:
        return
    settings, key = config.train.losses.perceptual, "train.losses.perceptual.network"
    if settings.network is None or target.will_be_there(settings.network):
        return
    try:
        import torch

        from regen_dist.models.perceptual import load_perceptual
    except ImportError:  # no torch on this machine
        if not Path(os.path.expanduser(settings.network)).is_file():
            yield error(key, f"{key}={settings.network} is no file; correct the path")
        return
    smallest = min(min(size) for size in config.data.sizes)
    try:
        load_perceptual(settings.network, torch.device("cpu"), sha256=settings.sha256, smallest=smallest)
    except ConfigError as caught:
        yield error(key, str(caught))


def decoding_embedder(config: AnyRunConfig, target: Target) -> Iterator[Finding]:
    """Check that the embedder that decodes generated videos at validations has weights; `checks.data` compares its
    latents."""
    path = config.generation.embedder if isinstance(config, T2VConfig) else None
    if path is None or target.will_be_there(path) or not (Path(path) / "config.yaml").is_file():
        return
    try:
        from regen_dist.checkpoint.export import find_embedder
    except ImportError:  # no torch on this machine
        return
    try:
        _ = find_embedder(path).manifest
    except RegenError as caught:
        yield error("generation.embedder", f"generation.embedder: {caught}", type(caught))


def _site(config: AnyRunConfig, target: Target) -> Site:
    has_gpus = _NVIDIA.is_dir() if target.has_gpus is None else target.has_gpus
    engine = config.engine
    return Site("cuda" if has_gpus else "cpu", engine.precision, engine.kind, target.world_size, target.packages)


def _backend(config: AnyRunConfig) -> tuple[str, str]:
    """Config key of the attention kernel, and its value; "" for a model without attention."""
    if isinstance(config, T2VConfig):
        return "model.attention.backend", config.model.attention.backend
    attends = config.model.kind == "regen"
    return "model.decoder.attention.backend", config.model.decoder.attention.backend if attends else ""
