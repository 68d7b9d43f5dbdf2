"""Reasons why a run cannot go on are found before it starts: checkpoints lost, of another model, of other data."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from regen_dist.checkpoint.export import model_shapes
from regen_dist.checkpoint.manifest import CheckpointManifest, to_text
from regen_dist.checks import resume as resuming
from regen_dist.checks.findings import Target
from regen_dist.checks.resume import resume
from regen_dist.checks.run import check_runs
from regen_dist.config import save_config
from regen_dist.config.embedder import EmbedderConfig
from regen_dist.config.identity import facts_identity, order_identity
from regen_dist.errors import StoreUnavailable
from regen_dist.models.diffusers_encoder import ENCODER_FACT
from tests.helpers.networks import frozen_model
from tests.helpers.tiny import tiny_run


def texts(found: Any, level: str = "error") -> list[str]:
    return [each.text for each in found if each.level == level]


def record(config: EmbedderConfig, *lines: dict[str, Any]) -> None:
    config.folder.mkdir(parents=True, exist_ok=True)
    (config.folder / "metrics.jsonl").write_text("".join(json.dumps({"step": 1, **line}) + "\n" for line in lines))


def step(seconds: float) -> dict[str, Any]:
    return {"kind": "train", "step_s": seconds}


def saved(seconds: float, problem: str | None = None) -> dict[str, Any]:
    return {"kind": "checkpoint", "seconds": seconds, "bytes": 1000, "problem": problem}


def committed(config: EmbedderConfig, step: int, data: dict[str, str] | None) -> None:
    """A checkpoint of a run, as far as its manifest goes."""
    folder = Path(config.checkpoints) / f"step-{step:08d}"
    folder.mkdir(parents=True)
    manifest = CheckpointManifest(
        step=step, samples=0, config_hash="", version="", topology={"world_size": 1}, state={"data": data}, metrics={},
        rollbacks=[], shapes=model_shapes(config.model),
    )  # fmt: skip
    (folder / "manifest.json").write_text(to_text(manifest))
    (folder.parent / "latest").write_text(folder.name)
    save_config(config, config.folder)


def identity(config: EmbedderConfig) -> dict[str, str]:
    train = config.train
    return order_identity(
        config.data, ["abc"], num_frames=config.model.num_frames, batch_global=train.batch_global, seed=train.seed
    )


def test_a_run_that_is_done_is_a_note(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, train__steps=8)
    committed(config, 8, identity(config))
    found = list(resume(config, Target()))
    assert [each.text for each in found] == ["nothing is left to do: all 8 steps are done"]
    assert found[0].level == "note"
    assert list(resume(tiny_run(tmp_path, train__steps=9), Target())) == []


def test_data_in_another_order(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    committed(config, 4, identity(config))
    told = texts(resume(tiny_run(tmp_path, train__batch_global=8, train__seed=9), Target()))
    assert len(told) == 1
    assert "train.batch_global was 4, is 8; train.seed was 3, is 9. Restore that" in told[0]


def test_other_data_of_the_same_url(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, tmp_path / "data")
    committed(config, 4, identity(config))
    (tmp_path / "data").mkdir()
    manifest = {"schema_version": 2, "fingerprint": "def"}
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    told = texts(resume(config, Target()))
    assert len(told) == 1
    assert "dataset fingerprint was ['abc'], is ['def']" in told[0]


def test_a_new_index_of_the_same_data(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, tmp_path / "data")
    committed(config, 4, identity(config) | facts_identity(["these"]))
    (tmp_path / "data").mkdir()
    manifest = {"schema_version": 2, "fingerprint": "abc"}
    for described, told in ((None, []), ({"facts": "these"}, []), ({"facts": "others"}, ["['these'], is ['others']"])):
        (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest | {"described": described}))
        found = texts(resume(config, Target()))
        assert len(found) == len(told)
        assert all(part in text for part, text in zip(told, found, strict=True))


def test_weights_that_were_imported_go_on_with_any_data(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    committed(config, 0, None)
    assert list(resume(tiny_run(tmp_path, train__seed=9), Target())) == []


def test_a_frozen_encoder_is_left_to_the_run(tmp_path: Path) -> None:
    """Its fingerprint, which takes the weights, is among the facts of the checkpoint."""
    config = tiny_run(tmp_path, model=frozen_model("wan", tmp_path))
    committed(config, 4, identity(config) | {ENCODER_FACT: "abc"})
    assert list(resume(config, Target())) == []


def test_another_model(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    committed(config, 4, identity(config))
    told = texts(resume(tiny_run(tmp_path, model__decoder__width=64), Target()))
    assert len(told) == 1
    assert "was saved by another model (model.decoder of" in told[0]
    assert list(resume(tiny_run(tmp_path, model__decoder__attention={"backend": "eager"}), Target())) == []


def test_a_damaged_checkpoint_is_a_note(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    committed(config, 4, identity(config))
    (Path(config.checkpoints) / "step-00000004" / "manifest.json").write_text("{")
    found = list(resume(config, Target()))
    assert [each.level for each in found] == ["note"]
    assert "is damaged" in found[0].text


def test_checkpoints_that_are_lost(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    record(config, step(1.0), saved(1.0))
    told = texts(resume(config, Target()))
    assert len(told) == 1
    assert "records a checkpoint of step 1, but" in told[0]
    assert list(resume(config, Target(fresh=True))) == []


def test_a_store_that_is_down_is_not_waited_for_by_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def down(url: str) -> None:
        asked.append(url)
        time.sleep(0.1)  # so that those beside it have begun
        raise StoreUnavailable("no answer")

    monkeypatch.setattr(resuming, "newest_checkpoint", down)
    swept = [tiny_run(tmp_path, name=f"run{n}", checkpoint__url="s3://down/runs") for n in range(40)]
    assert check_runs(swept, Target(), [resume]) == [()] * 40
    assert 1 <= len(asked) <= 16


@pytest.mark.parametrize(
    ("changes", "is_another"),
    [
        ({"model__decoder__heads": 4}, False),
        ({"model__conditioning__omega": 3.0}, False),
        ({"model__latent__noise_std": 0.5}, False),
        ({"model__decoder__blocks": 3}, True),
        ({"model__conditioning__time": "learned"}, True),
        ({"model__decoder__linear": False}, True),
        ({"model__latent__channels": 4}, True),
    ],
    ids=str,
)
def test_a_model_is_another_where_its_parameters_are(changes: dict[str, Any], is_another: bool, tmp_path: Path) -> None:
    """Names and shapes count, as at the start of a run; settings that leave them alone do not."""
    config = tiny_run(tmp_path)
    committed(config, 4, None)
    assert bool(texts(resume(tiny_run(tmp_path, **changes), Target()))) == is_another
