"""`regen bench` data, step, t2v, checkpoint and all at their smallest: whole figures that agree, no speeds."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regen_dist.config import to_yaml
from regen_dist.config.datasets import DataConfig
from regen_dist.config.t2v import LatentDataConfig
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.loading.clip_loader import clip_batches
from regen_dist.data.loading.datasets import LatentSet, TrainingSet
from regen_dist.data.loading.latent_loader import read_entry
from regen_dist.data.synthetic.dataset import build_synthetic
from regen_dist.data.synthetic.shapes import SyntheticOptions
from regen_dist.inference.encoder import FrozenEncoder
from tests.helpers.ranks import run_regen
from tests.helpers.tiny import tiny_model, tiny_run, tiny_t2v
from tools.bench import data_cases
from tools.bench.checkpoint import STATE_BYTES
from tools.bench.checkpoint import table as checkpoint_table
from tools.bench.step import table as step_table
from tools.bench.t2v import CACHE, ENCODER, MEMORY, READER, encoding, prepare, texts_of
from tools.bench.t2v import table as t2v_table


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve clips of moving shapes, in two shards."""
    folder = tmp_path_factory.mktemp("shapes")
    build_synthetic(folder, SyntheticOptions(number=12, seed=0, side=48, frames=20, samples_per_shard=6), workers=0)
    return folder


def test_decoding_alone_decodes_the_loaders_clips(shapes: Path) -> None:
    config = DataConfig(url=str(shapes), size=(32, 32), short_side="fit", stride=(1, 2))
    stretch = data_cases.Workload(config, num_frames=5, batch=3, batches=2, workers=2, seed=1)
    batches = clip_batches(stretch.open(), accumulation=1, rank=0, world_size=1, cursor=0)
    loaded = [batch.video.numpy() for batch in islice(batches, stretch.first, stretch.first + 4)]
    batches.close()
    for worker in range(2):
        alone = [clip.decode() for clip in data_cases.clips_of(stretch, worker)]
        assert np.array_equal(np.stack(alone), np.concatenate(loaded[worker::2]))


def test_both_sides_count_every_clip(shapes: Path) -> None:
    config = DataConfig(url=str(shapes), size=(32, 32), short_side="fit")
    stretch = data_cases.Workload(config, num_frames=5, batch=3, batches=2, workers=2)
    for turn in (data_cases.from_memory(stretch), data_cases.through_loader(stretch)):
        assert turn.amount == 12
        assert turn.seconds > 0
        assert turn.facts["own_cpu_s"] >= 0


def test_a_start_is_told_in_parts(shapes: Path, tmp_path: Path) -> None:
    found = data_cases.first_batch(str(shapes), tmp_path, crop=32, num_frames=5, batch=2)
    assert 0 < found["import_s"] + found["open_s"] + found["batch_s"] <= found["seconds"]
    assert list((tmp_path / "catalogues").glob("*.npy")), "it opened the dataset with this cache"


# `regen bench step` and `regen bench all` at their smallest: all figures are there, and nothing else is left. No speed
# is asserted.


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Options that make it small."""
    files = {"embedder": tiny_run(), "t2v": tiny_t2v(), "sharded": tiny_t2v(train__accumulation=2)}
    for name, config in files.items():
        (tmp_path / f"{name}.yaml").write_text(to_yaml(config))
    return [*(f"--{name}={tmp_path / name}.yaml" for name in files), "--side=32", "--steps=1", "--repeats=1"]


def test_utilisation_and_the_profile_by_way_of_all(small: list[str], tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    command = ["bench", "all", "--only=step", f"--out={out}", "--", *small, "--only=utilisation"]
    assert run_regen(*command, log=log, timeout_s=240.0) == 0, log.read_text()
    facts = json.loads((out / "all.json").read_text())["step"]
    assert {path.name for path in (out / "step").iterdir()} == {"step.json", "step.md"}
    assert (out / "step/step.md").read_text() == step_table(facts)
    assert facts["machine"].keys() >= {"device", "cores", "packages"}
    assert all(len(run["config_hash"]) == 64 for run in facts["runs"].values())
    found = facts["utilisation"]
    names = {"embedder", "text to video"}
    assert found["profile"].keys() == names
    assert found["cases"].keys() == names | {f"{name}, activations recomputed" for name in names}
    for case in found["cases"].values():
        assert 0 < case["mfu"]["median"] < 1
        assert case["flops_per_step"] > 0
    for name in names:
        recomputed = found["cases"][f"{name}, activations recomputed"]
        assert found["profile"][name]["groups"]["noise"] > 0, "the generator's stretch is marked"
        assert recomputed["parameters"] == found["cases"][name]["parameters"]


def test_ranks_share_the_batch_and_leave_their_figures(small: list[str], tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    code = run_regen("bench", "step", *small, f"--out={out}", "--only=sharding", log=log, timeout_s=240.0)
    assert code == 0, log.read_text()
    found = json.loads((out / "step.json").read_text())["sharding"]
    assert found["cases"].keys() == found["memory"].keys() == {"one process", "ZeRO-3, two ranks"}
    assert found["cpu_ratios"]["ZeRO-3, two ranks"]["median"] > 0
    for memory in found["memory"].values():
        assert memory["resident_bytes"] > 0
        (activations,) = [size for name, size in memory["terms"].items() if name.startswith("activations of")]
        assert memory["tensor_bytes"] > activations > 0
        assert sum(memory["terms"].values()) == memory["estimated_bytes"]


# `regen bench t2v` at its smallest: all figures are there, and every way feeds the same. No speed is asserted.


VIDEOS, SIDE, CLIPS = 6, 32, 2


def test_the_command_writes_all_figures_and_leaves_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "t2v.yaml").write_text(to_yaml(tiny_t2v(data__clips=[1, CLIPS], train__accumulation=2)))
    (tmp_path / "embedder.yaml").write_text(to_yaml(tiny_run()))
    out, log = tmp_path / "out", tmp_path / "log"
    code = run_regen(
        "bench", "t2v", tmp_path / "t2v.yaml", "--embedder", tmp_path / "embedder.yaml", "--out", out,
        f"--videos={VIDEOS}", f"--side={SIDE}", "--seconds=0.1", "--repeats=2", log=log, timeout_s=240.0,
    )  # fmt: skip
    assert code == 0, log.read_text()
    assert {path.name for path in out.iterdir()} == {"t2v.json", "t2v.md"}
    facts = json.loads((out / "t2v.json").read_text())
    assert (out / "t2v.md").read_text() == t2v_table(facts)
    assert facts["machine"].keys() >= {"device", "cores", "packages"}
    assert len(facts["config_hash"]) == len(facts["embedder_hash"]) == 64
    assert facts["data"]["frames"] == CLIPS * 5, "rows of the most clips"
    assert 0 < facts["data"]["text_bytes"] < facts["data"]["cache_bytes"]
    training = facts["training"]
    assert training["cases"].keys() == {MEMORY, CACHE, ENCODER, READER}
    assert training["ratios"].keys() == training["by_cpu"].keys() == {MEMORY, ENCODER}
    for case in training["cases"].values():
        assert len(case["turns"]) == 2
        assert 0 <= case["data_wait"] <= 1


def test_videos_encoded_in_the_loop_are_what_the_cache_holds(tmp_path: Path) -> None:
    """The comparison is of equal work: the same rows, but for the rounding to bf16."""
    embedder = tiny_run()
    made = prepare(tmp_path, embedder, videos=VIDEOS, side=SIDE, clips=CLIPS, text_width=16)
    cached = LatentSet(LatentDataConfig(url=str(made.cache), clips=(CLIPS,)), batch_global=4, seed=0)
    source = DataConfig(url=str(made.videos), size=(SIDE, SIDE), flip=False, workers=0)
    videos = TrainingSet(source, num_frames=CLIPS * embedder.model.num_frames, batch_global=4, seed=0)
    encoder = FrozenEncoder.load(made.embedder, device=torch.device("cpu"))
    dataset = open_dataset(made.cache)
    entries = {row.id: read_entry(cached.facts, row, dataset.read(row)) for row in map(dataset.row, range(VIDEOS))}
    batches = encoding(videos, encoder, texts_of(cached), accumulation=1)
    for batch in islice(batches, 2):
        assert batch.text is not None
        for place, number in enumerate(batch.sample_ids.tolist()):
            entry = entries[number]
            assert entry.text is not None
            for made_now, stored in ((batch.content[place], entry.content), (batch.motion[place], entry.motion)):
                torch.testing.assert_close(made_now, stored.float(), rtol=2**-7, atol=2**-9)
            assert torch.equal(batch.text[place, : len(entry.text)], entry.text.float())
    batches.close()


# `regen bench checkpoint` at its smallest: all figures are there and agree with each other. No speed is asserted.


SAVING = {"bare copy", "plain files", "ours", "torch.distributed.checkpoint", "DeepSpeed"}
LOADING = {"plain reads", "ours", "torch.distributed.checkpoint", "DeepSpeed"}
CHOOSING = {f"ours, from choosing to loaded, {how}" for how in ("sizes compared", "checksums verified")}
BUCKET = {"save": {"bucket: plain objects", "bucket: ours"}, "load": {"bucket: plain gets", "bucket: ours"}}
BASES = {"save": {"plain files", "bucket: plain objects"}, "load": {"plain reads", "bucket: plain gets"}}
ROUNDS, REPEATS = 1, 2


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Result of the command, at a model whose state is large beside a file's header."""
    folder = tmp_path_factory.mktemp("bench")
    model = tiny_model(decoder__width=128).model_dump(mode="json")
    run = tiny_run(
        model=model, engine__kind="zero3", engine__precision="bf16", train__steps=9, checkpoint__every=3,
        train__batch_global=2,
    )  # fmt: skip
    (folder / "tiny.yaml").write_text(to_yaml(run))
    rounds = (f"--rounds={ROUNDS}", f"--repeats={REPEATS}")
    log = folder / "log"
    code = run_regen(
        "bench", "checkpoint", folder / "tiny.yaml", "--out", folder / "out", *rounds, log=log, timeout_s=280.0
    )
    assert code == 0, log.read_text()
    return folder / "out"


@pytest.fixture(scope="module")
def facts(out: Path) -> dict[str, Any]:
    return json.loads((out / "checkpoint.json").read_text())


def test_only_the_figures_are_left(out: Path, facts: dict[str, Any]) -> None:
    """No run, checkpoint or clip stays, and the table is that of the figures."""
    assert {path.name for path in out.iterdir()} == {"checkpoint.json", "checkpoint.md"}
    assert (out / "checkpoint.md").read_text() == checkpoint_table(facts)


def test_it_says_where_and_with_what_it_was_measured(facts: dict[str, Any]) -> None:
    assert facts["machine"].keys() >= {"device", "cores", "packages"}
    assert len(facts["config_hash"]) == 64
    assert (facts["ranks"], facts["rounds"], facts["repeats"]) == (2, ROUNDS, REPEATS)


def test_the_bytes_written_are_the_state(facts: dict[str, Any]) -> None:
    """Within one percent, by the run's manifest and by the ranks that saved alone; and what the others write."""
    state, saved = facts["state"], {name: case["bytes"] for name, case in facts["save"]["cases"].items()}
    assert state["state_bytes"] == STATE_BYTES * state["parameters"]
    assert state["ratio"] == pytest.approx(1, abs=0.01)
    assert saved["ours"] == pytest.approx(state["written_bytes"], rel=1e-4)
    assert saved["bare copy"] == saved["plain files"] == state["state_bytes"]
    assert saved["torch.distributed.checkpoint"] >= state["state_bytes"]
    assert saved["DeepSpeed"] >= 12 * state["parameters"], "masters and moments"


def test_every_way_has_every_turn_and_a_ratio(facts: dict[str, Any]) -> None:
    sections = {"save": [facts["save"]], "load": list(facts["load"].values())}
    assert facts["save"]["cases"].keys() == SAVING | BUCKET["save"]
    assert facts["load"]["2"]["cases"].keys() == LOADING | CHOOSING | BUCKET["load"]
    assert facts["load"]["1"]["cases"].keys() == (LOADING | CHOOSING | BUCKET["load"]) - {"DeepSpeed"}
    for kind, each in sections.items():
        for section in each:
            assert section["ratios"].keys() == section["cases"].keys() - BASES[kind]
            for case in section["cases"].values():
                assert len(case["seconds"]["values"]) == ROUNDS * REPEATS
                assert 0 < case["seconds"]["min"] <= case["seconds"]["median"] <= case["seconds"]["max"]
                assert case["bytes"] > 0


def test_a_run_tells_what_its_saves_cost(facts: dict[str, Any]) -> None:
    """One save can be judged of each run of nine steps that saves after the third, sixth and ninth."""
    training = facts["training"]
    for mode in ("asynchronous", "synchronous"):
        assert len(training[mode]["still_s"]["values"]) == ROUNDS
        blocked, still = training[mode]["blocked_s"]["values"], training[mode]["still_s"]["values"]
        assert all(0 < a < b for a, b in zip(blocked, still, strict=True)), "the copy is a part of standing still"
    waited = training["synchronous"]
    assert all(a <= b for a, b in zip(waited["seconds"]["values"], waited["still_s"]["values"], strict=True))
    assert len(training["step_s"]["values"]) > 2 * ROUNDS
    assert training["asynchronous"]["allowed_of_step"]["min"] > 0.05


def test_every_way_of_loading_brought_back_the_state(facts: dict[str, Any]) -> None:
    """At both numbers of ranks; DeepSpeed refuses the other number, which is what the table says of it."""
    assert facts["restored_alike"] is True
    assert "world size" in facts["deepspeed_elsewhere"]
