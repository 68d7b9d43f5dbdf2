"""`regen checkpoint` as it is typed: what it prints, what it deletes, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.config import save_config
from regen_dist.errors import CheckpointError, ConfigError
from regen_dist.inference.sampler import TextToVideoModel
from regen_dist.observe.heartbeat import Beat, beat_path, write_beat
from tests.helpers.checkpoints import save_checkpoint, saved_run, small_state
from tests.helpers.t2v import cache_for, saved_t2v
from tests.helpers.tiny import tiny_run
from tools.checkpoint import app

METRICS = {10: 20.0, 20: 25.0, 30: 24.0, 40: 22.5}


def _regen(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four checkpoints of two ranks, the second the best; step 10 pinned; one that was never committed."""
    config = tiny_run(tmp_path_factory.mktemp("checkpoint"))
    save_config(config, config.folder)
    folder = CheckpointFolder(config.checkpoints)
    for step, value in METRICS.items():
        save_checkpoint(folder, step, small_state(float(step)), ranks=2, metrics={"psnr_db": value})
    folder.pin(10)
    folder.write_shard(50, "rank-00000-of-00002.safetensors", small_state())
    return config.folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(made, tmp_path / "runs" / "tiny"))


def _folder(run: Path) -> CheckpointFolder:
    return CheckpointFolder(run / "checkpoints")


def _damage(run: Path, step: int, *, size: bool) -> str:
    shard = sorted((run / "checkpoints" / f"step-{step:08d}").glob("rank-*"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data[:-1] if size else data)
    return shard.name


class TestList:
    """What there is."""

    def test_the_table(self, run: Path) -> None:
        """Steps, samples, marks, status; what was never committed below, with the way to clear it."""
        shown = _regen("list", run).output
        rows = {line.split()[0]: line for line in shown.splitlines() if line[:6].strip().isdigit()}
        assert all(len(line) <= 80 for line in shown.splitlines() if not line.startswith("file:")), "it fits"
        assert list(rows) == ["10", "20", "30", "40"]
        assert "pinned" in rows["10"]
        assert "best" in rows["20"]
        assert "25" in rows["20"]
        assert "latest" in rows["40"]
        assert all("ok" in row for row in rows.values())
        assert "never committed: step-00000050.tmp" in shown

    def test_json(self, run: Path) -> None:
        """The same as data, for scripts."""
        found = json.loads(_regen("list", run, "--json").output)
        assert found["url"].endswith("/tiny/checkpoints")
        first = found["checkpoints"][0]
        assert (first["step"], first["samples"], first["ranks"], first["files"]) == (10, 40, 2, 2)
        assert (first["marks"], first["problems"], first["metrics"]) == (["pinned"], [], {"psnr_db": 20.0})
        assert first["bytes"] == sum(path.stat().st_size for path in run.glob("checkpoints/step-00000010/rank*"))
        assert list(found["debris"]) == ["step-00000050.tmp"]
        assert found["pointer_problem"] is None

    def test_damage_shows(self, run: Path) -> None:
        """A file that was cut and a manifest that was changed are told; sizes alone are looked at."""
        name = _damage(run, 20, size=True)
        manifest = run / "checkpoints" / "step-00000030" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"samples": 120', '"samples": 121'))
        (run / "checkpoints" / "latest").write_text("step-00000099\n")
        found = json.loads(_regen("list", run, "--json").output)
        problems = {each["step"]: each["problems"] for each in found["checkpoints"]}
        assert problems[10] == problems[40] == []
        assert problems[20][0].startswith(f"{name} has ")
        assert "does not match its own checksum" in problems[30][0]
        assert "step 99, which is not there" in found["pointer_problem"]
        shown = _regen("list", run).output
        assert "which is not there" in shown
        assert f"step 20: {problems[20][0]}" in shown
        assert shown.count("damaged") == 3, "two rows, and the reason of one of them"

    def test_a_checkpoint_folder_itself(self, run: Path) -> None:
        """The folder or URL of the checkpoints serves where the run folder is out of reach."""
        for place in (run / "checkpoints", (run / "checkpoints").as_uri()):
            assert "latest" in _regen("list", place).output

    def test_checkpoints_elsewhere(self, tmp_path: Path) -> None:
        """A run whose config has a URL for its checkpoints lists those."""
        config = saved_run(tmp_path / "runs", checkpoint__url=(tmp_path / "store").as_uri())
        found = json.loads(_regen("list", config.folder, "--json").output)
        assert [each["step"] for each in found["checkpoints"]] == [7]

    def test_a_run_without_checkpoints(self, tmp_path: Path) -> None:
        """Is no error: there are none. A folder that is not there is one."""
        save_config(tiny_run(tmp_path), tmp_path / "fresh")
        assert "holds no committed checkpoint" in _regen("list", tmp_path / "fresh").output
        with pytest.raises(CheckpointError, match=r"there is no folder .*typo"):
            _regen("list", tmp_path / "typo")


class TestVerify:
    """Every byte."""

    def test_all_is_well(self, run: Path) -> None:
        """A line for each committed checkpoint, exit code 0."""
        lines = _regen("verify", run).stdout.splitlines()
        assert [line.split(":")[0] for line in lines] == [f"step {step}" for step in METRICS]
        assert all(": ok, 2 files" in line for line in lines)
        assert _regen("verify", run, "--step", 30).stdout.splitlines() == [lines[2]]

    def test_a_flipped_byte_is_found(self, run: Path) -> None:
        """Where the size is right too. Every damaged file is named, of every checkpoint; exit code 4."""
        names = _damage(run, 20, size=False), _damage(run, 40, size=True)
        (run / "checkpoints" / "step-00000030" / "manifest.json").write_text("{")
        with pytest.raises(CheckpointError) as caught:
            _regen("verify", run)
        text = str(caught.value)
        assert caught.value.exit_code == 4
        assert text.startswith("3 problems in ")
        assert f"step 20: {names[0]} does not have the SHA-256" in text
        assert f"step 40: {names[1]} has " in text
        assert "step 30: checkpoint " in text
        assert _regen("verify", run, "--step", 10).stdout.startswith("step 10: ok")

    def test_a_step_that_is_not_there(self, run: Path, tmp_path: Path) -> None:
        """Is an error that lists those that are; so is a run that has none."""
        with pytest.raises(CheckpointError, match=r"no committed checkpoint of step 50; there are: 10, 20, 30, 40"):
            _regen("verify", run, "--step", 50)
        save_config(tiny_run(tmp_path), tmp_path / "fresh")
        with pytest.raises(
            CheckpointError, match=r"holds no committed checkpoint; give the run folder or the URL of a run"
        ):
            _regen("verify", tmp_path / "fresh")


class TestPrune:
    """What is not kept goes; what is, stays."""

    def test_by_the_config(self, run: Path) -> None:
        """The last two (the config's policy) and the pinned one stay, and debris goes."""
        size = sum(path.stat().st_size for path in (run / "checkpoints" / "step-00000020").glob("rank*"))
        shown = _regen("prune", run).output
        assert _folder(run).steps() == [10, 30, 40]
        assert _folder(run).debris() == {}
        assert f"deleted: step 20, {size:,} bytes" in shown
        assert "deleted: step-00000050.tmp (never committed)" in shown

    def test_a_dry_run_deletes_nothing(self, run: Path) -> None:
        """It says what would be deleted, and the folder is as it was."""
        before = sorted(run.rglob("*"))
        assert "would be deleted: step 20" in _regen("prune", run, "--dry-run").output
        assert sorted(run.rglob("*")) == before

    def test_changes_of_the_policy(self, run: Path) -> None:
        """Options take the place of what the config says."""
        _folder(run).unpin(10)
        _regen("prune", run, "--keep-last", 2, "--keep-best", 1)
        assert _folder(run).steps() == [20, 30, 40]
        _regen("prune", run, "--keep-every", 20)
        assert _folder(run).steps() == [20, 30, 40]
        _regen("prune", run, "--keep-every", 0)
        assert _folder(run).steps() == [30, 40]

    def test_two_good_ones_stay(self, run: Path) -> None:
        """A damaged checkpoint does not count as one that is kept."""
        _damage(run, 40, size=True)
        _folder(run).unpin(10)
        _regen("prune", run, "--keep-last", 2)
        assert {20, 30} <= set(_folder(run).steps())

    def test_a_run_that_trains_is_left_alone(self, run: Path) -> None:
        """A fresh heartbeat means that the run deletes by its own policy; an old one, or one of a rank that has ended,
        means nothing."""
        beat = Beat(
            rank=1, host="host", namespace="", pid=1, step=40, begun=40, place=0, phase="forward", left="", why="",
            stood_s=0.0, number=1, written=time.time(),
        )  # fmt: skip
        write_beat(run, beat)
        with pytest.raises(CheckpointError, match=r"is training \(its newest heartbeat is \d+ s old\)"):
            _regen("prune", run)
        with pytest.raises(CheckpointError, match="is training"):
            _regen("prune", run / "checkpoints", "--keep-last", 2)
        assert _folder(run).steps() == [10, 20, 30, 40]
        os.utime(beat_path(run, 1), (time.time() - 61, time.time() - 61))
        _regen("prune", run)
        assert _folder(run).steps() == [10, 30, 40]
        write_beat(run, beat.ending(""))
        _regen("prune", run)

    def test_without_the_run_the_policy_must_be_told(self, run: Path, tmp_path: Path) -> None:
        """Where only the checkpoints are known, nothing is deleted by a default."""
        os.rename(run / "checkpoints", tmp_path / "alone")
        with pytest.raises(ConfigError, match="say --keep-last"):
            _regen("prune", tmp_path / "alone")
        _regen("prune", tmp_path / "alone", "--keep-last", 3)
        assert CheckpointFolder(tmp_path / "alone").steps() == [10, 20, 30, 40]
        _regen("prune", tmp_path / "alone", "--keep-last", 2)
        assert CheckpointFolder(tmp_path / "alone").steps() == [10, 30, 40]


def test_pin_and_unpin(run: Path) -> None:
    """A pinned checkpoint stays through prune; unpinned it goes; one that is not there cannot be pinned."""
    assert "step 20" in _regen("pin", run, 20).output
    _regen("prune", run)
    assert 20 in _folder(run).steps()
    assert "no longer pinned" in _regen("unpin", run, 20).output
    assert "was not pinned" in _regen("unpin", run, 20).output
    _regen("prune", run)
    assert 20 not in _folder(run).steps()
    with pytest.raises(CheckpointError, match="has no manifest"):
        _regen("pin", run, 20)


def test_export_and_import(tmp_path: Path) -> None:
    """The way of a model from one run to the next; each step says what it wrote."""
    source = saved_run(tmp_path / "runs")
    out = tmp_path / "model"
    shown = _regen("export", source.folder, "--out", out, "--no-statistics", "--weights", "plain").output
    assert "the plain weights of tiny at step 7 as float32" in shown
    assert "README.md, config.json, config.yaml" in shown
    bare = yaml.safe_load((out / "config.yaml").read_text()) | {"origin": None}
    (out / "config.yaml").write_text(yaml.safe_dump(bare))
    shown = _regen("export", out, "--out", tmp_path / "copy", "--weights", "plain").output
    assert f"the plain weights of {out}, of unknown origin, as float32" in shown
    listed = _regen("import", out, source.folder / "config.yaml", "name=next", "model.conditioning.omega=9").output
    assert "Note: model.conditioning.omega is 9.0, the weights were trained with 10.0" in listed
    command = f"regen train {source.folder / 'config.yaml'} name=next model.conditioning.omega=9"
    assert f"step 0 has the weights of {out}; train on with `{command}`" in listed
    assert _folder(tmp_path / "runs" / "next").steps() == [0]


def test_export_and_import_of_text_to_video(tmp_path: Path) -> None:
    """With its latent space, so that the new run can generate at once; options that do not count are told."""
    source, out = saved_t2v(tmp_path / "runs"), tmp_path / "model"
    shown = _regen("export", source.folder, "--out", out, "--no-statistics").output
    assert "the ema weights of tiny_t2v at step 7 as float32" in shown
    assert "Note: a text-to-video model has the statistics of its caches" in shown
    assert "Note: the transformer alone; --embedder makes it a pipeline" in shown
    assert "statistics of its caches" not in _regen("export", source.folder, "--out", out, "--force").output
    (out / "latent_space").rename(tmp_path / "aside")
    with pytest.raises(CheckpointError, match="latent_space is not there"):
        _regen("import", out, source.folder / "config.yaml", "name=next")
    (tmp_path / "aside").rename(out / "latent_space")
    _regen("import", out, source.folder / "config.yaml", "name=next")
    found = [tmp_path / "runs" / name / "latent_space" / "facts.json" for name in ("tiny_t2v", "next")]
    assert found[0].read_bytes() == found[1].read_bytes()
    assert TextToVideoModel.load(tmp_path / "runs" / "next").facts()["step"] == 0


def test_import_tells_of_caches_of_other_encoders(tmp_path: Path) -> None:
    """The shapes fit, and a run of imported weights goes on with any data; but other latents mean something else."""
    own, other = saved_run(tmp_path / "own"), saved_run(tmp_path / "other", model__encoder__out_blocks=2)
    source, out, shown = saved_t2v(tmp_path / "runs", own), tmp_path / "model", list[str]()
    _regen("export", source.folder, "--out", out, "--no-statistics")
    for name, embedder in (("same", own), ("others", other)):
        cache = cache_for(embedder, tmp_path / name)
        shown.append(_regen("import", out, source.folder / "config.yaml", f"name={name}", f"data.url={cache}").output)
    assert "Note" not in shown[0]
    assert f"Note: the latents in {tmp_path / 'others'} are of another encoder" in shown[1]
    assert "text embeddings" not in shown[1]
