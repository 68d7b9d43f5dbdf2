"""Text to video under ZeRO-3: two ranks train as one does and resume bit for bit; the 5B model is made sharded."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from regen_dist.config import T2VConfig, load_config
from regen_dist.inference.frames import SourceVideo
from regen_dist.models.flops import count_row_flops
from regen_dist.observe.record import read_record
from tests.dist.conftest import START_S, Runs
from tests.helpers.checkpoints import saved_run
from tests.helpers.ranks import Job, run_ranks, train_jobs
from tests.helpers.t2v import WordEncoder, cache_for
from tests.helpers.tiny import tiny_t2v

pytestmark = pytest.mark.timeout(1200)

STEPS, STOP, SHORT = 14, 6, 4
FP32, ELASTIC = 1e-5, 1e-4  # see test_zero3.py and test_resume.py
COMMON: dict[str, Any] = {
    "train__steps": STEPS,
    "engine__kind": "zero3",
    "engine__persistence_threshold": 500,  # some parameters are gathered, some stay
    "model__text_width": WordEncoder.width,
    "data__clips": (1, 2),
    "data__image_fraction": 0.3,
    "data__text_dropout": 0.3,
    "diffusion__given_content": 0.3,
    "diffusion__given_clips": 0.3,
    "train__trace_samples": True,
}
PLAIN: dict[str, Any] = {"engine__kind": "plain"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every run of this file, in few starts of ranks; the names say what they are."""
    folder = tmp_path_factory.mktemp("t2v")
    embedder = saved_run(folder)
    cache = cache_for(embedder, folder / "cache", videos=12, clips=[1, 2, 3], size=(32, 48))

    def made(name: str, **changes: Any) -> T2VConfig:
        return tiny_t2v(folder, cache, name=name, **{**COMMON, **changes})

    looked_at: dict[str, Any] = {
        "train__steps": SHORT, "train__validate_every": SHORT, "generation__embedder": str(embedder.folder),
        "generation__prompts": 2,
    }  # fmt: skip
    by_two = [
        Job(made("zero3")),
        Job(made("halted"), stop_after=STOP),
        Job(made("accumulated", train__accumulation=2, train__steps=SHORT)),
        Job(made("recomputed", engine__activation_checkpointing=True, train__steps=SHORT)),
        Job(made("looked_at", **looked_at)),
    ]
    by_one = [Job(made("plain", **PLAIN)), Job(made("plain_looked_at", **PLAIN, **looked_at))]
    with ThreadPoolExecutor() as pool:  # a single rank leaves a core idle, and two wait for each other
        list(pool.map(_run, (2, 1), (by_two, by_one)))
    for copy in ("two_to_two", "two_to_one"):
        shutil.copytree(folder / "halted", folder / copy)
    with ThreadPoolExecutor() as pool:
        list(pool.map(_run, (2, 1), ([Job(made("two_to_two"))], [Job(made("two_to_one"))])))
    return Runs(folder, {}, {})


def _run(world_size: int, jobs: list[Job]) -> list[Any]:
    return run_ranks(train_jobs, world_size, jobs, timeout_s=START_S)


def test_two_ranks_and_one_process_give_the_same_losses(runs: Runs) -> None:
    """Rows of one and two clips and images, some without their text: ZeRO-3 on two ranks and plain PyTorch in one
    process compute the same, from the same global batches."""
    two, one = runs.losses("zero3"), runs.losses("plain")
    assert len(two) == len(one) == STEPS
    assert runs.batches("zero3") == runs.batches("plain")
    torch.testing.assert_close(two, one, rtol=0, atol=FP32)
    assert two.diff().abs().median() > 100 * FP32


def test_weights_agree(runs: Runs) -> None:
    """Masters and their average end at the same place."""
    two, one = runs.tensors("zero3", STEPS), runs.tensors("plain", STEPS)
    for name in two:
        if name.startswith(("master/", "ema/")):
            torch.testing.assert_close(
                two[name], one[name], rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("name", ["accumulated", "recomputed"])
def test_how_the_step_is_computed_changes_nothing(runs: Runs, name: str) -> None:
    """Two micro-batches a step; activations that are made again."""
    torch.testing.assert_close(runs.losses(name), runs.losses("zero3")[:SHORT], rtol=0, atol=2e-5)


def test_resuming_is_bit_exact(runs: Runs) -> None:
    """Stopped after six steps, gone on by new processes: every loss, batch, weight, moment and average is that of one
    go, bit for bit."""
    assert torch.equal(runs.losses("two_to_two"), runs.losses("zero3"))
    assert runs.batches("two_to_two") == runs.batches("zero3")
    after, expected = runs.tensors("two_to_two", STEPS), runs.tensors("zero3", STEPS)
    assert after.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(after[name], expected[name])]
    starts = [line["step"] for line in _events(runs, "two_to_two") if line.get("event") == "start"]
    assert starts == [0, STOP]


def test_resuming_at_another_number_of_ranks(runs: Runs) -> None:
    """Saved by two ranks, gone on by one: the same batches, losses as near as float32 sums in another order."""
    assert runs.batches("two_to_one") == runs.batches("zero3")
    torch.testing.assert_close(runs.losses("two_to_one"), runs.losses("zero3"), rtol=0, atol=ELASTIC)


def test_validation_generates_videos(runs: Runs) -> None:
    """From the captions of validation samples, by two ranks as by one; the loss of fixed rows is in the record, the
    videos and a picture in the run folder."""
    found = {}
    for name in ("looked_at", "plain_looked_at"):
        (line,) = read_record(runs.folder / name / "metrics.jsonl", "validation")
        assert line["step"] == SHORT
        found[name] = line["loss"]
        folder = runs.folder / name / "generated" / f"step-{SHORT:08d}"
        assert sorted(path.name for path in folder.iterdir()) == ["00.mp4", "01.mp4", "captions.txt"]
        assert len((folder / "captions.txt").read_text().splitlines()) == 2
        video = SourceVideo(folder / "01.mp4")
        assert (video.num_frames, video.height, video.width, float(video.rate)) == (10, 32, 48, 8.0)
        assert (runs.folder / name / "pictures" / f"step-{SHORT:08d}.png").is_file()
    assert found["looked_at"] == pytest.approx(found["plain_looked_at"], abs=ELASTIC)


def test_the_run_keeps_its_latent_space(runs: Runs) -> None:
    """What generating takes beside the weights, the same from all of them."""
    texts = {(runs.folder / name / "latent_space" / "facts.json").read_bytes() for name in ("zero3", "plain")}
    assert len(texts) == 1


def _events(runs: Runs, name: str) -> list[dict[str, Any]]:
    return read_record(runs.folder / name / "metrics.jsonl", "event")


# The 5B text-to-video model as ZeRO-3 builds it: sharded while it is made, a block at its full width.


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

    from regen_dist.distributed.ranks import read_environment
    from regen_dist.distributed.zero3 import _import_deepspeed, deepspeed_settings
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

    from regen_dist.distributed.ranks import process_group, read_environment
    from regen_dist.distributed.zero3 import _import_deepspeed, deepspeed_settings
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
