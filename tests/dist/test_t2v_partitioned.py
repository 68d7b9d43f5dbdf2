"""The 5B text-to-video model as ZeRO-3 builds it: sharded while it is made, a block at its full width."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from regen_dist.config import T2VConfig
from regen_dist.config import load_config
from regen_dist.models.flops import count_row_flops
from tests.helpers.ranks import run_ranks

ROOT = Path(__file__).parents[2]
WORLD_SIZE = 2
LARGE_WORLD = 512
FEW_TOKENS = (2, (2, 4), 3)  # latent frames, cells, text tokens


class Built(NamedTuple):
    """What one rank has after the model was built, and what the model computes.

    Args:
        shards: elements of this rank's piece of each parameter.
        whole: elements of each parameter.
        left_bytes: of the parameters themselves, beside the pieces.
        largest: absolute value in this rank's piece of each parameter.
        dtypes: of the pieces.
        block_out: root mean square of what the block makes of a few tokens.
    """

    shards: dict[str, int]
    whole: dict[str, int]
    left_bytes: int
    largest: dict[str, float]
    dtypes: set[str]
    block_out: float


@pytest.fixture(scope="module")
def built() -> list[Built]:
    config = load_config(ROOT / "configs/t2v/5b.yaml", ["model.blocks=1"])
    return run_ranks(_build, WORLD_SIZE, config)


def test_each_rank_holds_half(built: list[Built]) -> None:
    """Of every parameter of an embedding, a block and a head at the width of the 5B, in the working precision; nothing
    is left of the whole ones. Together they are what `regen describe` counts."""
    config = load_config(ROOT / "configs/t2v/5b.yaml", ["model.blocks=1"])
    assert isinstance(config, T2VConfig)
    counted = count_row_flops(config.model, *FEW_TOKENS)
    for rank in built:
        assert sorted(rank.whole.values()) == sorted(counted.parameter_sizes)
        assert {name: 2 * count for name, count in rank.shards.items()} == rank.whole
        assert rank.left_bytes < 100
        assert rank.dtypes == {"torch.bfloat16"}


def test_what_starts_closed_is_zero_in_every_shard(built: list[Built]) -> None:
    """Initialisation happened before a parameter was cut: gates, heads and the output of the attention to text are
    zero, gains of norms are one, and everything else is neither."""
    for rank in built:
        zeros = {name for name, value in rank.largest.items() if value == 0}
        closed = (
            "modulation.linear",
            "final_modulation.linear",
            "place.project",
            "head",
            "blocks.0.cross_attention.out",
        )
        assert zeros == {f"{part}.{kind}" for part in closed for kind in ("weight", "bias")} | {"blocks.0.table"}
        norms = {name: value for name, value in rank.largest.items() if ".norm_" in name}
        assert set(norms.values()) == {1.0}
        assert len(norms) == 4


def test_the_block_really_runs(built: list[Built]) -> None:
    """Gathered again on both ranks: the same finite result."""
    outs = {rank.block_out for rank in built}
    assert len(outs) == 1
    assert 0.1 < outs.pop() < 10


def test_a_rank_of_512_holds_its_share_alone() -> None:
    """The same model in one of 512 ranks, of which the others are pretended (collectives do nothing): what it holds is
    a 512th, up to one element a parameter."""
    config = load_config(ROOT / "configs/t2v/5b.yaml", ["model.blocks=1", "train.accumulation=1"])
    (shards,) = run_ranks(_build_among_many, 1, config)
    for name, (own, whole) in shards.items():
        assert own == -(-whole // LARGE_WORLD), name
    assert sum(whole for _, whole in shards.values()) > 250e6


def _build_among_many(config: T2VConfig) -> dict[str, tuple[int, int]]:
    """Elements of this rank's piece and of the whole of each parameter; runs in the one rank that there is."""
    import os

    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from regen_dist.distributed.zero3 import _import_deepspeed
    from regen_dist.distributed.zero3 import deepspeed_settings
    from regen_dist.distributed.ranks import read_environment
    from regen_dist.models.embedder import build_model

    os.environ |= {"RANK": "3", "WORLD_SIZE": str(LARGE_WORLD)}
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=LARGE_WORLD)
    deepspeed = _import_deepspeed(read_environment())
    with deepspeed.zero.Init(config_dict_or_path=deepspeed_settings(config, LARGE_WORLD)):
        parameters: dict[str, Any] = dict(build_model(config.model).named_parameters())
    return {name: (each.ds_tensor.numel(), each.ds_numel) for name, each in parameters.items()}


def _build(config: T2VConfig) -> Built:
    """Runs in the ranks."""
    import torch

    from regen_dist.distributed.zero3 import _import_deepspeed
    from regen_dist.distributed.zero3 import deepspeed_settings
    from regen_dist.distributed.ranks import process_group
    from regen_dist.distributed.ranks import read_environment
    from regen_dist.models.embedder import build_model

    ranks = read_environment()
    with process_group(ranks, needed=True):
        deepspeed = _import_deepspeed(ranks)
        torch.manual_seed(0)
        with deepspeed.zero.Init(config_dict_or_path=deepspeed_settings(config, ranks.world_size)):
            model = build_model(config.model)
        parameters: dict[str, Any] = dict(model.named_parameters())
        pieces = {name: each.ds_tensor for name, each in parameters.items()}
        return Built(
            shards={name: piece.numel() for name, piece in pieces.items()},
            whole={name: each.ds_numel for name, each in parameters.items()},
            left_bytes=sum(each.data.untyped_storage().nbytes() for each in parameters.values()),
            largest={name: float(piece.abs().max()) for name, piece in pieces.items()},
            dtypes={str(piece.dtype) for piece in pieces.values()},
            block_out=_run_block(config, model.blocks[0]),
        )


def _run_block(config: T2VConfig, block: Any) -> float:
    """The size of what the block makes of tokens of size one, with open gates."""
    import deepspeed
    import torch

    from regen_dist.models.attention import rotary_angles
    from regen_dist.models.t2v import token_positions

    frames, (h, w), text_tokens = FEW_TOKENS
    grid, width = (frames, h // 2, w // 2), config.model.width
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(1, count, width, generator=generator).bfloat16() for count in (4, text_tokens))
    mask = torch.ones(1, text_tokens, dtype=torch.bool)
    positions = rotary_angles(token_positions(grid, torch.device("cpu")), width // config.model.heads)
    with torch.no_grad(), deepspeed.zero.GatheredParameters(list(block.parameters())):
        out = block(x, torch.ones(1, 1, 6, width).bfloat16(), text, mask, positions, grid)
    assert out.shape == x.shape
    return float(out.float().square().mean().sqrt())
