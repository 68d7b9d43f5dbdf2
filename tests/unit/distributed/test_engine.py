"""The plain engine, reference of ZeRO-3: its arithmetic, and its blocks through torch.compile."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regen_dist.checks.findings import Target
from regen_dist.checks.kernels import compiler
from regen_dist.checks.run import refuse_process
from regen_dist.config.run import EngineConfig
from regen_dist.distributed import engine as engines
from regen_dist.distributed.engine import PlainEngine, blocks_of, compile_blocks
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import ConfigError
from regen_dist.models.embedder import build_model
from regen_dist.observe.record import read_record
from regen_dist.training.run import build_trainer, train
from tests.helpers.latents import write_cache
from tests.helpers.tiny import tiny_model, tiny_run, tiny_t2v, tiny_t2v_model, wake


class Net(nn.Module):
    """Two layers, and one that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.idle = nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def _engine(**changes: Any) -> PlainEngine:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Net()

    return PlainEngine(tiny_run(**changes), Ranks(), build)


def _data(seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))


def _step(engine: PlainEngine, *batches: Tensor, lr: float = 1e-2) -> Any:
    for number, batch in enumerate(batches):
        engine.backward((engine(batch) - 1).square().mean(), is_last=number + 1 == len(batches))
    return engine.step(lr)


def _snapshot(engine: PlainEngine) -> dict[str, Tensor]:
    return {name: piece.clone() for name, piece in engine.pieces().items()}


def test_accumulation_equals_one_large_batch() -> None:
    """Two micro-batches of a step give the update of one batch with all their samples."""
    whole, halves = _engine(), _engine(train__accumulation=2)
    for seed in range(3):
        batch = _data(seed)
        result, other = _step(whole, batch), _step(halves, batch[:2], batch[2:])
        assert other.grad_norm == pytest.approx(result.grad_norm, rel=1e-5)
    for name, piece in whole.pieces().items():
        torch.testing.assert_close(halves.pieces()[name], piece, rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped_to_the_norm() -> None:
    """A gradient above the limit is scaled to it, one below is left; the norm that is told is the one before."""
    for scale, clip in ((1.0, 0.01), (1.0, 100.0)):
        engine = _engine(optimizer__clip_norm=clip)
        result = _step(engine, _data(scale=scale))
        first_moment = torch.cat([piece for name, piece in engine.named_moments() if name.startswith("exp_avg/")])
        used = float(first_moment.norm()) / (1 - engine.config.optimizer.betas[0])
        assert used == pytest.approx(min(clip, result.grad_norm), rel=1e-3)
    assert result.grad_norm < 100.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_with_a_bad_gradient_changes_nothing(bad: float) -> None:
    """Weights, moments, EMA and the number of updates stay as they were, the gradients are gone, and the next step is
    the one that would have come without it."""
    engine, clean = _engine(), _engine()
    for each in (engine, clean):
        _step(each, _data())
    before = _snapshot(engine)
    engine.backward(engine(_data(1)).sum() * bad, is_last=True)
    result = engine.step(1e-2)
    assert not result.applied
    assert engine.num_updates == 1
    after = engine.pieces()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in engine.module.parameters())
    for each in (engine, clean):
        assert _step(each, _data(2)).applied
    assert all(torch.equal(a, b) for a, b in zip(engine.pieces().values(), clean.pieces().values(), strict=True))


def test_ema_formula() -> None:
    """ema <- d ema + (1 - d) weights with d = min(decay, (1 + n) / (10 + n)) at update n."""
    engine = _engine(train__ema_decay=0.25)
    expected = {name: master.clone() for name, master in engine.named_masters()}
    for update in range(1, 6):
        _step(engine, _data(update))
        decay = min(0.25, (1 + update) / (10 + update))
        for name, master in engine.named_masters():
            expected[name] = decay * expected[name] + (1 - decay) * master
    for name, average in engine.ema.items():
        torch.testing.assert_close(average, expected[name], rtol=1e-5, atol=1e-7)
        assert name.startswith("idle") or not torch.equal(average, dict(engine.named_masters())[name])


def test_bf16_keeps_masters_in_float32() -> None:
    """Working weights are the rounded masters; updates too small for bf16 add up in the masters."""
    engine = _engine(engine__precision="bf16")
    start = _snapshot(engine)
    for seed in range(3):
        engine.backward((engine(_data(seed).bfloat16()).float() - 1).square().mean(), is_last=True)
        engine.step(1e-6)
    masters = dict(engine.named_masters())
    assert not torch.equal(masters["a.weight"], start["master/a.weight"])
    for name, parameter in engine.module.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert masters[name].dtype == torch.float32
        assert torch.equal(parameter.flatten(), masters[name].bfloat16())


def test_micro_batches_add_up_in_float32() -> None:
    """The same as under ZeRO-3: sums in bf16 lose what is small beside them."""
    engine = _engine(engine__precision="bf16", train__accumulation=64, train__batch_global=64)
    single = []
    for number in range(64):
        engine.backward((engine(_data(number).bfloat16()).float() - 1).square().mean(), is_last=number == 63)
        alone = _engine(engine__precision="bf16", train__accumulation=64, train__batch_global=64)
        alone.backward((alone(_data(number).bfloat16()).float() - 1).square().mean(), is_last=True)
        single.append(torch.cat([gradient for _, gradient in alone.named_gradients()]))
    found = torch.cat([gradient for _, gradient in engine.named_gradients()])
    torch.testing.assert_close(found, torch.stack(single).sum(0), rtol=1e-5, atol=1e-7)
    assert engine.step(1e-2).applied
    assert not any(gradient.any() for _, gradient in engine.named_gradients())


class _Source:
    """Pieces in memory, read as a checkpoint's are."""

    def __init__(self, pieces: dict[str, Tensor]) -> None:
        self._pieces = pieces

    def read_all(self, wanted: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, Tensor]]:
        return ((key, self._pieces[key][low:high]) for key, (low, high) in wanted.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_restored_state_goes_on_bit_for_bit(precision: str) -> None:
    """Three steps, a new engine from the pieces, two more: equal to five steps in every piece and every output."""

    def data() -> Iterator[Tensor]:
        return (_data(seed).to(torch.bfloat16 if precision == "bf16" else torch.float32) for seed in range(5))

    straight, first = _engine(engine__precision=precision), _engine(engine__precision=precision)
    batches = list(data())
    for batch in batches:
        _step(straight, batch)
    for batch in batches[:3]:
        _step(first, batch)
    second = _engine(engine__precision=precision)
    second.restore(_Source(_snapshot(first)), first.num_updates)
    assert torch.equal(second(batches[0]), first(batches[0]))
    for batch in batches[3:]:
        _step(second, batch)
    assert second.num_updates == straight.num_updates
    for name, piece in straight.pieces().items():
        assert torch.equal(second.pieces()[name], piece), name


def test_more_ranks_are_refused() -> None:
    """One process cannot pretend to be two: the message says which engine can, before anything is built."""
    with pytest.raises(ConfigError, match=r"found 2 ranks; set engine\.kind=zero3"):
        refuse_process(tiny_run(), Target(world_size=2))


@pytest.mark.parametrize(("precision", "shared"), [("fp32", True), ("bf16", False)])
def test_float32_weights_are_their_own_masters(precision: str, shared: bool) -> None:
    """No second copy, which a step would have to write too; in bf16 there must be one."""
    engine = _engine(engine__precision=precision)
    _step(engine, _data().to(engine.module.a.weight.dtype))
    masters, weights = dict(engine.named_masters()), dict(engine.module.named_parameters())
    for name, weight in weights.items():
        assert (masters[name].data_ptr() == weight.data_ptr()) is shared
        torch.testing.assert_close(masters[name].view_as(weight).to(weight.dtype), weight, rtol=0, atol=0)


def test_small_gradients_are_not_scaled() -> None:
    """A norm below the limit changes nothing, whatever the limit."""
    one, other = (_engine(optimizer__clip_norm=limit) for limit in (10.0, 1e6))
    for engine in (one, other):
        assert _step(engine, _data()).grad_norm < 10.0
    for name, piece in one.pieces().items():
        assert torch.equal(other.pieces()[name], piece), name


# Blocks through torch.compile: the same gradients, the same names, and runs that go on with it and without.


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_gradients_of_compiled_blocks_are_those_without() -> None:
    """Real machine code for two blocks, which are compiled once."""
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


@pytest.mark.usefixtures("fresh_compiler")
def test_every_block_of_an_embedder_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of encoder and decoder, recomputed in the backward pass; no machine code is made of them."""
    monkeypatch.setattr(engines, "BACKEND", "aot_eager")
    model = build_model(tiny_model(decoder__attention={"pattern": "window", "window": [2, 1, 2]}))
    model.set_activation_checkpointing(True)
    wake(model)
    clip = torch.randn(1, 3, 5, 16, 16)
    expected = model(clip, clip, torch.ones(1))[0]
    compile_blocks(model)
    blocks = [*model.encoder.layers, *model.decoder.blocks]  # type: ignore[union-attr, misc]
    assert [*blocks_of(model)] == blocks
    assert all(each._compiled_call_impl is not None for each in blocks)
    found = model(clip, clip, torch.ones(1))[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.square().mean().backward()
    assert _graphs() >= 4


@pytest.mark.usefixtures("fresh_compiler")
def test_a_run_goes_on_compiled_and_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps each: compiled, then not, then compiled, give the losses of a run that never was. Blocks are traced,
    and no machine code is made of them."""
    monkeypatch.setattr(engines, "BACKEND", "eager")
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


@pytest.mark.usefixtures("fresh_compiler")
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


@pytest.mark.usefixtures("fresh_compiler")
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
