"""One rank of `regen bench checkpoint`: `python -m regen_dist.evaluation.checkpoint_speed.rank --help`.

At the number of ranks that the bench is about it saves and loads; at any other, in the same folder, it loads what was
saved. Rank 0 leaves what it measured in `ranks-N.json`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regen_dist.config import RunConfig, embedder_only, load_saved_config
from regen_dist.distributed.engine import build_engine
from regen_dist.distributed.failing import ending_at_once
from regen_dist.distributed.ranks import Ranks, process_group, read_environment
from regen_dist.evaluation.checkpoint_speed.cases import Measured
from regen_dist.evaluation.data_speed.turns import Case, Rounds, in_turn
from regen_dist.jsontext import json_text
from regen_dist.models import build_model

_READS = ("plain reads", "plain gets")  # they load nothing into the engine


def result_file(folder: Path, ranks: int) -> Path:
    """Where rank 0 leaves the figures of so many ranks."""
    return folder / f"ranks-{ranks}.json"


def log_file(folder: Path, ranks: int) -> Path:
    """What rank 0 printed."""
    return folder / f"ranks-{ranks}.log"


def main() -> None:
    """Measure as the rank that the environment describes."""
    parser = argparse.ArgumentParser(description="One rank of `regen bench checkpoint`.")
    parser.add_argument("folder", type=Path, help="with the run's saved config; for the checkpoints and the figures")
    parser.add_argument("--url", help="a folder in a bucket, to be measured too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--load", action="store_true", help="load alone, what other ranks saved here")
    given = parser.parse_args()
    ranks = read_environment()
    if ranks.is_main:
        _print_to(log_file(given.folder, ranks.world_size))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with ending_at_once(), process_group(ranks, needed=True):
        found = measure(
            embedder_only(load_saved_config(given.folder), str(given.folder)),
            ranks,
            given.folder,
            given.url,
            given.repeats,
            given.load,
        )
        if ranks.is_main:
            result_file(given.folder, ranks.world_size).write_text(json_text(found) + "\n", encoding="utf-8")


def measure(
    config: RunConfig, ranks: Ranks, folder: Path, url: str | None, repeats: int, load_only: bool
) -> dict[str, Any]:
    """What `saves` and `loads` of `Measured` take, turn by turn, and whether all loads brought the same state."""
    engine = build_engine(config, ranks, partial(_build, config))
    measured = Measured(config, engine, ranks, folder, url)
    found: dict[str, Any] = {"ranks": ranks.world_size, "parameters": _parameters(engine.shapes())}
    expected: dict[str, str] = {}
    if not load_only:
        _fill(measured, seed=ranks.rank)
        expected = measured.digests()
        found["save"] = _plain(_warm_in_turn(measured.saves(), repeats))
    cases = measured.loads()
    digests = {name: _digests_after(measured, case) for name, case in cases.items() if not name.endswith(_READS)}
    digests.get("DeepSpeed", {}).pop("ema", None)  # it does not know of it
    expected = expected or digests["torch.distributed.checkpoint"]  # written and read by code that is not ours
    differs = any(expected[kind] != digest for each in digests.values() for kind, digest in each.items())
    found["restored_alike"] = not ranks.agree(differs)
    found["load"] = _plain(in_turn(cases, repeats))
    if "DeepSpeed" not in cases:
        found["deepspeed_says"] = measured.deepspeed_elsewhere()
    return found


def _digests_after(measured: Measured, case: Case) -> dict[str, str]:
    """What a way of loading leaves in an engine whose state was spoilt before. This turn does not count."""
    for piece in measured.engine.pieces().values():
        piece.detach().zero_()
    case()
    return measured.digests()


def _warm_in_turn(cases: Mapping[str, Case], repeats: int) -> Rounds:
    """A first round, in which buffers are made, does not count."""
    in_turn(cases, 1)
    return in_turn(cases, repeats)


@torch.no_grad()
def _fill(measured: Measured, seed: int) -> None:
    """Random state: what is loaded can be told from what was never saved."""
    generator = torch.Generator().manual_seed(seed)
    for piece in measured.engine.pieces().values():
        piece.detach().copy_(torch.rand(piece.shape, generator=generator))


def _build(config: RunConfig) -> nn.Module:
    torch.manual_seed(config.train.seed)
    return build_model(config.model)


def _parameters(shapes: Mapping[str, list[int]]) -> int:
    return sum(int(torch.Size(shape).numel()) for shape in shapes.values())


def _plain(rounds: Rounds) -> dict[str, list[dict[str, Any]]]:
    return {name: [asdict(turn) for turn in turns] for name, turns in rounds.items()}


def _print_to(log: Path) -> None:
    """All that this process and its libraries print: the terminal is the command's."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)


if __name__ == "__main__":
    main()
