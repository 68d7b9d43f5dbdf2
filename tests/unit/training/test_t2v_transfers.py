"""Work that a step of text to video does once: copies to the device, and the places of the texts' tokens. Counted on
the meta device, where a copy from the host is as visible as on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from regen_dist.data.loading import latent_loader
from regen_dist.data.loading.clip_loader import ClipBatch
from regen_dist.data.loading.latent_loader import LatentBatch
from regen_dist.distributed.engine import PlainEngine
from regen_dist.distributed.ranks import Ranks
from regen_dist.models import attention_kernels
from regen_dist.models.attention_kernels import attend_reference
from regen_dist.training.run import build_task
from tests.helpers.latents import write_cache
from tests.helpers.machine import META, MetaRanks
from tests.helpers.tiny import tiny_run, tiny_t2v, wake

ATEN = torch.ops.aten


class Copies(TorchDispatchMode):
    """Lists every copy from the host: dtype there and on the device, shape, and whether the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[torch.dtype, torch.dtype, tuple[int, ...], bool]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = function(*args, **kwargs)
        if function in (ATEN._to_copy.default, ATEN.copy_.default):
            source = args[0] if function is ATEN._to_copy.default else args[1]
            waits = not (kwargs.get("non_blocking") or (function is ATEN.copy_.default and len(args) > 2 and args[2]))
            if source.device.type == "cpu" and made.is_meta:
                self.found.append((source.dtype, made.dtype, tuple(made.shape), waits))
        return made


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("transfers") / "cache", clips=[1, 2, 0])


def _copies(task: Any, batch: Any) -> Copies:
    """Of the second step: what belongs to the run, not to the batch, was copied in the first."""
    engine = PlainEngine(task.config, MetaRanks(), task.build)
    task.loss(engine, batch, 3).total.backward()
    with Copies() as copies:
        task.loss(engine, batch, 4).total.backward()
    return copies


@pytest.mark.parametrize("clips", [2, 0], ids=["clips", "images"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_batch_is_copied_once_as_stored_and_nobody_waits(cache: Path, clips: int, precision: str) -> None:
    config = tiny_t2v("runs", cache, data__text_dropout=0.4, diffusion__given_content=0.5, engine__precision=precision)
    task: Any = build_task(config, META)
    with NextBatch(task) as read:
        stored = (read.content.dtype, read.text.dtype)
    content, motion = torch.zeros(4, max(clips, 1), 8, 4, 4), torch.zeros(4, clips, 8, 4, 4)
    batch = LatentBatch(
        content.to(stored[0]), motion.to(stored[0]), torch.zeros(4, 5, 16, dtype=stored[1]),
        torch.ones(4, 5, dtype=torch.bool), torch.arange(4), torch.ones(4, dtype=torch.int64),
    )  # fmt: skip
    bf16, whole, truth = torch.bfloat16, torch.int64, torch.bool
    expected = [
        (bf16, (4, max(clips, 1), 8, 4, 4)), (bf16, (4, clips, 8, 4, 4)), (bf16, (4, 5, 16)), (truth, (4, 5)),
        (whole, (4,)), (whole, (4,)),
    ]  # fmt: skip
    assert _copies(task, batch).found == [(dtype, dtype, shape, False) for dtype, shape in expected]


class NextBatch:
    """The first batch that the loader reads, whose thread ends with the context."""

    def __init__(self, task: Any) -> None:
        self.batches = latent_loader.latent_batches(task.data, accumulation=1, rank=0, world_size=1, cursor=0)

    def __enter__(self) -> Any:
        return next(self.batches)

    def __exit__(self, *_: object) -> None:
        self.batches.close()


def test_an_embedders_batch_is_copied_once_too() -> None:
    task: Any = build_task(tiny_run(diffusion__train_frames=3), META)
    batch = ClipBatch(torch.zeros(2, 3, 5, 16, 24, dtype=torch.uint8), torch.arange(2), torch.ones(2).long())
    video, ids = (torch.uint8, torch.uint8, (2, 3, 5, 16, 24), False), (torch.int64, torch.int64, (2,), False)
    assert _copies(task, batch).found == [video, ids, ids]


def test_batches_are_page_locked_where_there_is_a_gpu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task: Any = build_task(tiny_t2v("runs", cache), META)
    locked: list[torch.dtype] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        locked.append(tensor.dtype)
        return tensor

    with NextBatch(task):
        assert not locked
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    with NextBatch(task):
        assert locked[:6] == [torch.bfloat16] * 3 + [torch.bool] + [torch.int64] * 2


class _Waits(TorchDispatchMode):
    """Counts operations whose result's size, or value, the host waits for on a GPU."""

    WAITING = (ATEN.nonzero.default, ATEN._local_scalar_dense.default, ATEN.masked_select.default)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = function is ATEN.index.Tensor and any(
            each is not None and each.dtype == torch.bool for each in args[1]
        )
        self.count += function in self.WAITING or by_mask
        return function(*args, **(kwargs or {}))


def _varlen(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, *longest: int) -> Tensor:
    """Of texts and rows of equal lengths, without a wait of its own."""
    batch = len(starts_q) - 1
    q, k, v = (each.unflatten(0, (batch, -1)).transpose(1, 2) for each in (q, k, v))
    return attend_reference(q, k, v).transpose(1, 2).flatten(0, 1)


@pytest.fixture
def flash() -> Iterator[None]:
    """Substitutes of FlashAttention's functions, for any device."""
    package = mock.Mock(flash_attn_varlen_func=_varlen, __name__="flash_attn")
    package.flash_attn_func = lambda *given: attend_reference(*(each.transpose(1, 2) for each in given)).transpose(1, 2)
    with mock.patch.object(attention_kernels, "require_flash", return_value=package):
        yield


@pytest.mark.parametrize(("backend", "once"), [("flash", 1), ("sdpa", 0), ("eager", 0), ("reference", 0)])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.usefixtures("flash")
def test_the_host_waits_for_the_texts_once_a_pass(cache: Path, backend: str, once: int, recomputed: bool) -> None:
    """However many blocks there are, and whether they are computed again in the backward pass."""
    config = tiny_t2v(
        "runs", cache, engine__activation_checkpointing=recomputed, model__attention__backend=backend, model__blocks=3
    )
    task: Any = build_task(config, torch.device("cpu"))
    model = task.build()
    text = torch.zeros(2, 5, config.model.text_width)
    with _Waits() as waits:
        model(torch.zeros(2, 8, 2, 4, 4), torch.ones(2), text, torch.ones(2, 5)).sum().backward()
    assert waits.count == once


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@torch.no_grad()
def test_the_loss_is_that_of_a_batch_in_float32(cache: Path, precision: str) -> None:
    """To the bit: what is stored is bf16, and all arithmetic on latents is float32."""
    config = tiny_t2v("runs", cache, data__text_dropout=0.4, engine__precision=precision)
    task: Any = build_task(config, torch.device("cpu"))
    engine = PlainEngine(config, Ranks(), task.build)
    wake(engine.module)
    with NextBatch(task) as batch:
        floats = batch._replace(content=batch.content.float(), motion=batch.motion.float(), text=batch.text.float())
        assert torch.equal(task.loss(engine, batch, 3).total, task.loss(engine, floats, 3).total)
