"""`regen bench t2v` at its smallest: all figures are there, and every way feeds the same. No speed is asserted."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import torch

from regen_dist.config import to_yaml
from regen_dist.config.datasets import DataConfig
from regen_dist.config.t2v import LatentDataConfig
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.loading.datasets import LatentSet, TrainingSet
from regen_dist.data.loading.latent_loader import read_entry
from regen_dist.inference.encoder import FrozenEncoder
from tests.helpers.ranks import run_regen
from tests.helpers.tiny import tiny_run, tiny_t2v
from tools.bench.t2v import CACHE, ENCODER, MEMORY, READER, encoding, prepare, texts_of
from tools.bench.t2v import table as t2v_table

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
