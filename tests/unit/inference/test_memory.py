"""Encoding and decoding a video holds no more of it when it is longer: neither tensors nor frames."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from regen_dist.inference.codec import Codec
from regen_dist.inference.frames import Frame
from regen_dist.inference.long_video import Speed, decode_stream, encode_groups, make_plan
from regen_dist.models.embedder import build_model
from tests.helpers.tiny import tiny_run

SIDES = (16, 24)
GROUP = 2


class Held(NamedTuple):
    """At most, while a video passed through."""

    tensor_bytes: int
    frames: int


class Tensors(TorchDispatchMode):
    """Counts the bytes of all tensors that were made inside of it and still live; views count again."""

    def __init__(self) -> None:
        super().__init__()
        self._living, self.most = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self._living.update({each: each.nbytes for each in tree_leaves(made) if isinstance(each, Tensor)})
        self.most = max(self.most, sum(self._living.values()))
        return made


class Source:
    """Frames of a video, and how many of them live at most."""

    def __init__(self, count: int) -> None:
        self._count, self._living, self.most = count, weakref.WeakValueDictionary[int, Frame](), 0

    def __iter__(self) -> Iterator[Frame]:
        for number in range(self._count):
            frame = np.full((*SIDES, 3), number % 256, np.uint8)
            self._living[number] = frame
            self.most = max(self.most, len(self._living))
            yield frame


@pytest.fixture(scope="module")
def codec() -> Codec:
    config = tiny_run()
    return Codec(build_model(config.model), config, torch.device("cpu"))


def _held(codec: Codec, count: int, *, keep_windows: bool = False) -> Held:
    source, plan, done = Source(count), make_plan(count, codec.num_frames, group=GROUP), 0
    with Tensors() as tensors:
        groups = encode_groups(codec, source, plan, Speed())
        kept = list(groups) if keep_windows else groups
        for (finished,) in decode_stream(codec, kept, plan, [np.arange(float(count))], sides=SIDES, steps=1):
            done += len(finished)
    assert done == count
    return Held(tensors.most, source.most)


def test_memory_does_not_grow_with_the_length(codec: Codec) -> None:
    """More than twice the frames: the same tensors at most, and no more frames than a group of windows has."""
    short, long = _held(codec, 17), _held(codec, 41)
    assert short.tensor_bytes > GROUP * 9 * 3 * SIDES[0] * SIDES[1]
    assert long.tensor_bytes <= short.tensor_bytes
    assert short.frames <= long.frames <= GROUP * codec.num_frames + 2


def test_what_is_kept_is_seen(codec: Codec) -> None:
    """So the test above would see it."""
    short, long = (_held(codec, count, keep_windows=True) for count in (17, 41))
    assert long.tensor_bytes > short.tensor_bytes


def test_a_part_of_a_very_long_video_is_planned_at_once() -> None:
    """A day at 60 frames a second: the share of a group is found without a look at every window."""
    plan = make_plan(24 * 3600 * 60, 17, group=4)
    group = range(len(plan.starts) - 8, len(plan.starts) - 4)
    positions = np.arange(float(plan.starts[group[0]]), float(plan.starts[group[-1]] + 17))
    shares = plan.share(group, positions)
    assert shares[1:-1].tolist() == [1.0] * (len(positions) - 2)
    assert (shares[0], shares[-1]) == (0.5, 0.5)
