"""Blocks through torch.compile: the same gradients, the same names, and runs that go on with it and without."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regen_dist.checks.findings import Target
from regen_dist.checks.kernels import compiler
from regen_dist.config.run import EngineConfig
from regen_dist.distributed import single_process
from regen_dist.distributed.single_process import blocks_of, compile_blocks
from regen_dist.models.embedder import build_model
from regen_dist.observe.record import read_record
from regen_dist.training.run import build_trainer, train
from tests.helpers.latents import write_cache
from tests.helpers.tiny import tiny_model, tiny_t2v, tiny_t2v_model, wake


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are traced, forward and backward pass, and no machine code is made of them."""
    monkeypatch.setattr(single_process, "BACKEND", "aot_eager")


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_gradients_of_compiled_blocks_are_those_without() -> None:
    """By real machine code, of two blocks, which are compiled once."""
    config = tiny_t2v_model(blocks=2, attention__backend="sdpa")
    model = build_model(config)
    wake(model)
    inputs = torch.randn(1, 8, 2, 4, 4), torch.ones(1) / 2, torch.randn(1, 3, config.text_width), torch.ones(1, 3)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(*inputs).square().mean().backward()
        return [each.grad.clone() for each in model.parameters() if each.grad is not None]

    plain, names = gradients(), list(model.state_dict())
    compile_blocks(model)
    compiled = gradients()
    assert _graphs() == 1
    assert list(model.state_dict()) == names
    assert len(compiled) == len(plain)
    for one, two in zip(plain, compiled, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("recomputed", [False, True])
def test_every_block_of_an_embedder_is_compiled(recomputed: bool) -> None:
    """Of encoder and decoder, of clips and images, also where they are recomputed."""
    model = build_model(tiny_model(decoder__attention={"pattern": "window", "window": [2, 1, 2]}))
    model.set_activation_checkpointing(recomputed)
    wake(model)
    clip = torch.randn(1, 3, 5, 16, 16)
    expected = model(clip, clip, torch.ones(1))[0]
    compile_blocks(model)
    assert len(blocks_of(model)) == len(model.encoder.layers) + len(model.decoder.blocks)  # type: ignore[union-attr, arg-type]
    found = model(clip, clip, torch.ones(1))[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.square().mean().backward()
    assert _graphs() >= 4


@pytest.mark.usefixtures("quick")
def test_a_run_goes_on_compiled_and_not(tmp_path: Path) -> None:
    """Three steps each: compiled, then not, then compiled, give the losses of a run that never was."""
    cache = write_cache(tmp_path / "cache", clips=[1] * 8)
    changes: dict[str, Any] = {"engine__kind": "plain", "data__clips": [1], "train__validate_every": 100}

    def run(name: str, steps: int, compiled: bool) -> Any:
        config = tiny_t2v(tmp_path, cache, name=name, train__steps=steps, engine__compile=compiled, **changes)
        assert train(config) == 0
        return config

    config = [run("changing", 1, True), run("changing", 2, False), run("changing", 3, True)][-1]
    assert _graphs() >= 1
    whole = run("whole", 3, False)
    losses = [
        [line["loss"] for line in read_record(each.folder / "metrics.jsonl", "train")] for each in (config, whole)
    ]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    trainers = [build_trainer(each, _ranks()) for each in (config, whole)]
    try:
        names = [list(each.engine.pieces()) for each in trainers]
        assert names[0] == names[1]
        assert not any("_orig_mod" in name for name in names[0])
    finally:
        for each in trainers:
            each.close()


def _ranks() -> Any:
    from regen_dist.distributed.ranks import Ranks

    return Ranks()


@pytest.mark.parametrize(
    ("engine", "found"),
    [
        ({"kind": "zero3", "compile": True}, r"compile: under kind 'zero3' .*engine\.compile=false, or engine\.kind"),
        (
            {"kind": "plain", "compile": True, "activation_checkpointing": "selective"},
            r"attention cannot be separated; set engine\.activation_checkpointing",
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused(engine: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        EngineConfig.model_validate(engine)


@pytest.mark.parametrize(("has_gpus", "found"), [(False, r"C\+\+ compiler .*no-such-compiler"), (True, "Triton")])
def test_a_machine_without_a_compiler_is_refused_at_the_start(
    has_gpus: bool, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_t2v(engine__kind="plain", engine__compile=True)
    target = Target(1, has_gpus=has_gpus)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("regen_dist.checks.kernels.is_installed", lambda name: name != "triton")
    ((finding,),) = [tuple(compiler(config, target))]
    assert re.search(found + r".*engine\.compile=false", str(finding))
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr("regen_dist.checks.kernels.is_installed", lambda name: True)
    assert not list(compiler(config, target))
