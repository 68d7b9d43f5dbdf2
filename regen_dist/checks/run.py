"""All checks of a config, run independently: a failing check does not hide the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from regen_dist.checks.data import KIND, data, dataset_problem, frozen_encoder, latents, manifest_of
from regen_dist.checks.findings import Finding, Target, error, refuse, run_concurrently
from regen_dist.checks.kernels import compiler, convolutions, decoding_embedder, kernels, losses, packages, ranks
from regen_dist.checks.resume import busy, resume
from regen_dist.config import AnyRunConfig
from regen_dist.config.preencode import PreencodeConfig
from regen_dist.errors import DataError, RegenError

Check = Callable[[AnyRunConfig, Target], Iterator[Finding]]
PROCESS: Sequence[Check] = (
    packages,
    ranks,
    kernels,
    convolutions,
    compiler,
)  # before anything is built
CHECKS: Sequence[Check] = (*PROCESS, losses, data, frozen_encoder, latents, decoding_embedder, busy, resume)


def check_runs(
    configs: Sequence[AnyRunConfig], target: Target, checks: Sequence[Check] = CHECKS
) -> list[tuple[Finding, ...]]:
    """Return, for each config in order, the errors that `regen train` would stop at, and the notes.

    Nothing is written. Stores are asked once for all configs.
    """

    def check_all(config: AnyRunConfig) -> tuple[Finding, ...]:
        return tuple(dict.fromkeys(finding for check in checks for finding in _found(check, config, target)))

    return run_concurrently(check_all, configs)


def refuse_process(config: AnyRunConfig, target: Target) -> None:
    """Raise the first reason why a run cannot be built in this process: what `regen check` finds beforehand."""
    refuse(finding for check in PROCESS for finding in check(config, target))


def check_preencode(config: PreencodeConfig, target: Target) -> tuple[Finding, ...]:
    """Return the errors that `regen preencode` would stop at: no videos, or no embedder with a good checkpoint."""
    return tuple(_preencode(config, target))


def _preencode(config: PreencodeConfig, target: Target) -> Iterator[Finding]:
    if not target.will_be_there(config.data):
        if wrong := target.once("dataset", config.data, dataset_problem):
            yield error("data", wrong, DataError)
        elif (manifest_of(config.data, target) or {}).get("kind") == KIND:
            yield error("data", f"{config.data} holds latents, not videos; give the dataset of videos", DataError)
    if target.will_be_there(config.embedder):
        return
    try:
        from regen_dist.checkpoint.export import find_embedder
    except ImportError:  # no torch on this machine
        if not (Path(config.embedder) / "config.yaml").is_file():
            yield error("embedder", f"{config.embedder} is neither a run nor an exported model; correct the path")
        return
    try:
        _ = find_embedder(config.embedder, config.weights).manifest
    except RegenError as caught:
        yield error("embedder", str(caught), type(caught))


def _found(check: Check, config: AnyRunConfig, target: Target) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(check(config, target))
    except RegenError as caught:
        found.append(error(config.name, str(caught), type(caught)))
    return found
