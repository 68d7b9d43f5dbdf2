"""The miniature's pipeline on a real Slurm with a real store: from drawn videos to scores of what was generated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from launcher.pipelines.schema import Pipeline, exists, load_pipeline
from regen_dist.config import to_yaml
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.evaluation.miniature_scores import REAL, RECONSTRUCTED, WRONG_CAPTIONS
from regen_dist.observe.record import read_record
from tests.helpers.jobs import Submitter, attempts, losses, told
from tests.helpers.stores import use
from tests.helpers.tiny import tiny_model, tiny_run
from tools.local_services.s3 import ObjectServer
from tools.local_services.slurm import SlurmCluster

ROOT = Path(__file__).parents[2]
FILE = "configs/pipelines/miniature_hard.yaml"  # it has every step of miniature.yaml, and one more
SIDE, EMBEDDER_STEPS, T2V_STEPS, PROMPTS = 32, 6, 6, 4
FOLDERS = {
    "generated": "guided",
    "first frame given": "given",
    "first clip given": "continued",
    "guidance off": "unguided",
    "untrained model": "untrained",
}


class Miniature:
    """The smallest models that have every part, and what the pipeline's file is told of them."""

    def __init__(self, folder: Path, store: ObjectServer) -> None:
        self.work, self.data = folder / "runs" / "mini", f"s3://{store.bucket}/miniature-{uuid4().hex[:8]}"
        run = tiny_run(model=tiny_model(16).model_dump(mode="json"), checkpoint__every=3)
        (folder / "embedder.yaml").write_text(to_yaml(run))
        (folder / "t2v.yaml").write_text(yaml.safe_dump(_t2v()))
        variables = {
            "data": self.data, "precision": "fp32", "side": SIDE, "videos": 12, "videos_per_shard": 6,
            "evaluations": "1,3", "held_out": 6, "embedder": folder / "embedder.yaml", "embedder_steps": EMBEDDER_STEPS,
            "t2v": folder / "t2v.yaml", "t2v_steps": T2V_STEPS, "prompts": PROMPTS,
        }  # fmt: skip
        ranks = {"embedder.cluster.tasks_per_node": 1, "t2v.cluster.tasks_per_node": 1, "t2v.cluster.nodes": 2}
        arrays = {
            f"{step}.array": 1 for step in ("shards", "generate", "given", "continued", "unguided", "untrained")
        }  # less to start; that of latents is left
        self.changes = [
            f"output={self.work.parent}",
            f"name={self.work.name}",
            *(f"variables.{name}={value}" for name, value in variables.items()),
            *(f"steps.{key}={value}" for key, value in (ranks | arrays).items()),
        ]

    def pipeline(self) -> Pipeline:
        return load_pipeline(ROOT / FILE, self.changes)


def _t2v() -> dict[str, Any]:
    return {
        "task": "t2v",
        "name": "t2v",
        "model": {"blocks": 2, "heads": 2, "width": 32, "text_width": 64, "attention": {"backend": "eager"}},
        "data": {"url": "absent", "clips": [2]},
        "diffusion": {"steps": 2, "given_content": 0.2, "given_clips": 0.1},
        "generation": {"prompts": 2},
        "optimizer": {"warmup_steps": 2},
        "train": {"steps": 1, "batch_global": 4, "log_every": 1, "validate_every": T2V_STEPS, "peak_tflops": 0.1},
        "checkpoint": {"every": 3},
    }


@pytest.fixture(scope="module")
def miniature(object_store: ObjectServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Miniature]:
    with pytest.MonkeyPatch.context() as patch:
        use(patch, object_store.environment())
        folder = tmp_path_factory.mktemp("miniature")
        patch.setenv("REGEN_CACHE", str(folder / "cache"))
        yield Miniature(folder, object_store)


def test_from_drawn_videos_to_scores(miniature: Miniature, slurm: SlurmCluster) -> None:
    """Every step ends well, the text-to-video training on two nodes; the second submission has nothing to do."""
    regen_submit = Submitter(ROOT, slurm.environment())
    command = ["pipeline", FILE, "--cluster", "loopback", *miniature.changes]
    first = regen_submit(*command, "--wait", timeout_s=900.0)
    assert first.returncode == 0, "\n".join([first.stdout, first.stderr, *map(told, _failed(miniature.work))])
    assert set(losses(miniature.work / "t2v")) == set(range(1, T2V_STEPS + 1))
    assert len(attempts(miniature.work / "t2v")[0].start.nodes) == 2
    assert len(read_record(miniature.work / "t2v" / "metrics.jsonl", "validation")) > 0
    _check_data(miniature)
    _check_scores(miniature)
    again = regen_submit(*command)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == "nothing is left to do"
    assert len(again.stdout.splitlines()) == len(miniature.pipeline().steps) + 1


def _failed(work: Path) -> list[Path]:
    """Folders of the tasks that have not ended well."""
    folders = sorted({path.parents[1] for path in work.glob("**/launch/starts.jsonl")})
    return [folder for folder in folders if (end := attempts(folder)[-1].end) is None or end.why != "done"]


def _check_data(miniature: Miniature) -> None:
    """Videos and latents lie in the store, an entry for each video."""
    for videos, latents, number in (("train", "latents_train", 12), ("held_out", "latents_held_out", 6)):
        source, cache = (open_dataset(f"{miniature.data}/{name}") for name in (videos, latents))
        assert len(source) == len(cache) == number
        assert sorted(source.records["id"]) == sorted(cache.records["id"])
    assert exists(f"{miniature.data}/latents_train/null.safetensors")
    assert open_dataset(f"{miniature.data}/latents_train").manifest.totals.shards == 2


def _check_scores(miniature: Miniature) -> None:
    """Every arm was read: the real videos well, the untrained model's badly."""
    prompts = (miniature.work / "prompts.txt").read_text().splitlines()
    for folder in FOLDERS.values():
        made = [json.loads(path.read_text()) for path in sorted((miniature.work / "generated" / folder).glob("*.json"))]
        assert [each["prompt"] for each in made] == prompts
    scores = json.loads((miniature.work / "report" / "scores.json").read_text())
    assert scores["not_made"] == {}
    assert {*FOLDERS, REAL, RECONSTRUCTED, WRONG_CAPTIONS} == set(scores["arms"])
    shares = {name: arm["scores"]["all three"]["share"] for name, arm in scores["arms"].items()}
    assert shares[REAL] == 1.0
    assert shares["untrained model"] < 1.0
    assert scores["targets_are_for"] == "generated"
    assert scores["first_frames"]["first frame given"]["videos"] == PROMPTS
    assert scores["continued"]["first clip given"]["added_frames"] == 17
    assert scores["arms"][REAL]["seams"]["videos"] == PROMPTS
    assert {row["evaluations"] for row in scores["solvers"]["rows"]} == {1, 3}
    assert "<html" in (miniature.work / "report" / "index.html").read_text()
