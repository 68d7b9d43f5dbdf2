"""What cannot run on the ranks and devices that a run gets is found before it starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from regen_dist.checks.findings import Target
from regen_dist.checks.kernels import kernels, ranks
from regen_dist.checks.run import PROCESS, check_runs
from regen_dist.config.embedder import EmbedderConfig
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import RegenError
from regen_dist.training.run import train
from tests.helpers.tiny import tiny_run


def run(**changes: Any) -> EmbedderConfig:
    return tiny_run("runs", **{"engine__kind": "zero3", **changes})


def texts(found: Any) -> list[str]:
    return [each.text for each in found]


def test_a_batch_that_does_not_fit_the_ranks() -> None:
    told = texts(ranks(run(), Target(3)))
    assert told == [
        "train.batch_global 4 over train.accumulation 1 is 4 samples at a time, not a multiple of 3 ranks; ranks that "
        "fit: 1, 2, 4"
    ]


def test_copies_of_the_weights_that_do_not_fit_the_ranks() -> None:
    told = list(ranks(run(engine={"kind": "zero3", "zero": {"partition_size": 4}}, train__batch_global=12), Target(6)))
    assert texts(told) == [
        "engine.zero.partition_size 4 does not divide the 6 ranks; set it to the GPUs of a node, or to 1"
    ]
    assert told[0].key == "engine.zero.partition_size"


def test_one_process_engine_on_several_ranks() -> None:
    told = texts(ranks(run(engine__kind="plain"), Target(2)))
    assert len(told) == 1
    assert "engine.kind=plain trains in one process, found 2 ranks; set engine.kind=zero3" in told[0]


@pytest.mark.parametrize(
    ("gpus", "changes", "told"),
    [
        (0, {"model__decoder__attention": {"backend": "flash"}}, "backend=flash needs a CUDA device, found cpu"),
        (
            1,
            {"model__decoder__attention": {"backend": "flash"}},
            "computes in bf16, found fp32; set engine.precision=bf16",
        ),
        (
            0,
            {"optimizer__kind": "fused_adam"},
            "fused_adam (apex) needs a CUDA device, found cpu; set optimizer.kind",
        ),
        (1, {"optimizer__kind": "cpu_adam"}, "cpu_adam keeps its state on the CPU, the model is on cuda"),
        (0, {"optimizer__kind": "cpu_adam", "engine__kind": "plain"}, "cpu_adam is DeepSpeed's; set engine.kind=zero3"),
    ],
)
def test_what_cannot_run_on_the_device(
    gpus: int, changes: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regen_dist.registry.is_installed", lambda *_: True)
    found = texts(kernels(run(**changes), Target(has_gpus=bool(gpus))))
    assert len(found) == 1
    assert told in found[0]


def test_what_runs_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regen_dist.registry.is_installed", lambda *_: True)
    on_gpus = {"model__decoder__attention": {"backend": "flash"}, "engine__precision": "bf16"}
    assert texts(kernels(run(optimizer__kind="fused_adam", **on_gpus), Target(has_gpus=True))) == []
    assert texts(kernels(run(optimizer__kind="cpu_adam"), Target(has_gpus=False))) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model__decoder__attention": {"backend": "flash"}, "engine__precision": "bf16"}, "the package flash-attn"),
        ({"optimizer__kind": "fused_adam"}, "NVIDIA apex, which is built from source"),
    ],
)
def test_a_package_that_is_missing(
    changes: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyPI's apex, which is another package, is none. What another Python has cannot be seen from here."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = texts(kernels(run(**changes), Target(has_gpus=True)))
    assert len(found) == 1
    assert told in found[0]
    assert texts(kernels(run(**changes), Target(has_gpus=True, packages=False))) == []


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ({"model__decoder__attention": {"backend": "flash"}}, 1),
        ({"optimizer__kind": "fused_adam"}, 1),
        ({"optimizer__kind": "cpu_adam", "engine__kind": "plain"}, 1),
        ({"engine__kind": "plain"}, 2),
        ({"train__batch_global": 3}, 2),
    ],
    ids=str,
)
def test_training_refuses_what_the_check_finds(changes: dict[str, Any], world_size: int) -> None:
    """By the same words and exit code, before anything is built."""
    found = [*check_runs([run(**changes)], Target(world_size, has_gpus=False), PROCESS)[0]]
    with pytest.raises(RegenError) as caught:
        train(run(**changes), Ranks(0, world_size))
    assert (str(caught.value), caught.value.exit_code) == (found[0].text, found[0].exit_code)
