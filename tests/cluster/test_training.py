"""From real video to a run that was killed and went on, all of it in an object store and by the command line."""

from __future__ import annotations

import shutil
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from regen_dist.config import load_config, to_yaml
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.storage.store import Store
from regen_dist.errors import AccessDenied, CheckpointError
from regen_dist.observe.record import read_record
from regen_dist.training.run import train
from tests.helpers.checkpoints import newest
from tests.helpers.machine import descendants, wait_until_gone
from tests.helpers.ranks import run_regen, run_regen_ranks, said, start_regen, wait_for_step
from tests.helpers.stores import use
from tests.helpers.tiny import tiny_run
from tests.helpers.video import moving_square, write_video
from tools.local_services.s3 import ObjectServer

STEPS, SAVE_EVERY, BATCH, SAMPLES = 16, 4, 4, 12


@dataclass
class Workshop:
    """A folder for runs and logs, and a dataset in the store."""

    folder: Path
    url: str
    store: ObjectServer

    @property
    def config(self) -> Path:
        return self.folder / "tiny.yaml"

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def regen(self, *arguments: object, log: str) -> int:
        return run_regen(*arguments, log=self.folder / f"{log}.log")

    def said(self, log: str) -> str:
        return (self.folder / f"{log}.log").read_text()


@pytest.fixture(scope="module")
def shop(object_store: ObjectServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """Three real videos, built and verified by the command line straight into the store."""
    folder = tmp_path_factory.mktemp("training")
    shop = Workshop(folder, f"s3://{object_store.bucket}/training-{uuid4().hex[:8]}", object_store)
    for seed in (1, 2, 3):
        write_video(folder / "videos" / f"{seed}.mp4", moving_square(96, 48, 64, seed=seed))
    with pytest.MonkeyPatch.context() as patch:
        use(patch, object_store.environment())
        patch.setenv("REGEN_CACHE", str(folder / "cache"))
        build = ("shards", "build", folder / "videos", "--out", shop.url, "--segment-seconds", 1, "--short-side", 48)
        assert shop.regen(*build, "--min-frames", 20, "--samples-per-shard", 5, log="build") == 0, shop.said("build")
        made = tiny_run(
            folder / "runs", shop.url, data__workers=1, data__stride=[1, 2], engine__kind="zero3",
            engine__precision="bf16", train__steps=STEPS, checkpoint__every=SAVE_EVERY, train__trace_samples=True,
        )  # fmt: skip
        shop.config.write_text(to_yaml(made))
        yield shop


@pytest.fixture(scope="module")
def undisturbed(shop: Workshop) -> Path:
    """A run that nothing happens to."""
    logs = shop.folder / "undisturbed"
    assert run_regen_ranks("train", shop.config, "name=undisturbed", logs=logs) == [0, 0], said(logs)
    return shop.run("undisturbed")


@pytest.fixture(scope="module")
def killed(shop: Workshop) -> Path:
    """A copy of a run of two ranks as SIGKILL left it, and the run itself, finished by the same command."""
    command, run = ("train", shop.config, "name=killed"), shop.run("killed")
    process = start_regen(*command, "--ranks", 2, log=shop.folder / "killed.log")
    try:
        wait_for_step(run, SAVE_EVERY + 2, process)
        started = descendants(process.pid)
        assert len(started) >= 6, "two ranks, and of each a server of processes, and a worker"
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    wait_until_gone(started)
    shutil.copytree(run, shop.run("left"))
    assert run_regen_ranks(*command, logs=shop.folder / "killed_again") == [0, 0]
    return run


def trained_on(run: Path, ranks: int) -> list[list[int]]:
    """The ids of every global batch; fails when a step is missing or noted twice."""
    notes = [read_record(run / "samples" / f"rank-{rank:05d}.jsonl", "samples") for rank in range(ranks)]
    for lines in notes:
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [[sample for line in lines for sample in line["ids"]] for lines in zip(*notes, strict=True)]


def losses(run: Path) -> list[float]:
    lines = read_record(run / "metrics.jsonl", "train")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def test_what_was_built_is_whole(shop: Workshop) -> None:
    assert shop.regen("shards", "verify", shop.url, "--deep", log="verify") == 0, shop.said("verify")
    assert f"{SAMPLES} samples in " in shop.said("verify")


def test_an_undisturbed_run_sees_every_sample_once_an_epoch(shop: Workshop, undisturbed: Path) -> None:
    stream = [sample for batch in trained_on(undisturbed, 2) for sample in batch]
    ids = sorted(open_dataset(shop.url).ids.tolist())
    assert len(ids) == SAMPLES
    epochs = [stream[start : start + SAMPLES] for start in range(0, STEPS * BATCH - SAMPLES + 1, SAMPLES)]
    assert len(epochs) == 5
    assert all(sorted(epoch) == ids for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_a_killed_run_trains_on_exactly_the_samples_of_an_undisturbed_one(
    shop: Workshop, undisturbed: Path, killed: Path
) -> None:
    """SIGKILL in the middle: ranks and workers go with the launcher (see `killed`); the same command continues from the
    last checkpoint; no step trains on anything else, and the losses are the same bit for bit."""
    saved = newest(shop.run("left"))
    assert SAVE_EVERY <= saved.step < STEPS
    assert f"resumed at step {saved.step} on 2 rank(s)" in said(shop.folder / "killed_again")[0]
    assert trained_on(killed, 2) == trained_on(undisturbed, 2)
    assert losses(killed) == losses(undisturbed)


def test_another_number_of_ranks_goes_on_with_the_same_samples(shop: Workshop, undisturbed: Path, killed: Path) -> None:
    run = shop.run("alone")
    shutil.copytree(shop.run("left"), run)
    saved = newest(run)
    before = [read_record(run / "samples" / f"rank-{rank:05d}.jsonl") for rank in (0, 1)]
    assert train(load_config(shop.config, ["name=alone", *HERE])) == 0
    assert '"world_size": 1' in (run / "metrics.jsonl").read_text()
    lines = read_record(run / "samples" / "rank-00000.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    whole = trained_on(undisturbed, 2)
    assert [line["ids"] for line in lines[saved.step :]] == whole[saved.step :]
    assert [line["ids"] for line in lines[: saved.step]] == [line["ids"] for line in before[0][: saved.step]]
    other = read_record(run / "samples" / "rank-00001.jsonl")
    assert other == before[1][: saved.step], "what a rank noted that is no more ends at the checkpoint"


@pytest.fixture(scope="module")
def changed(shop: Workshop) -> str:
    """The same videos but one, as another dataset."""
    (shop.folder / "fewer").mkdir()
    for seed in (1, 2):
        shutil.copy(shop.folder / "videos" / f"{seed}.mp4", shop.folder / "fewer")
    url = f"{shop.url}-changed"
    build = ("shards", "build", shop.folder / "fewer", "--out", url, "--segment-seconds", 1, "--short-side", 48)
    assert shop.regen(*build, "--min-frames", 20, "--workers", 0, log="changed") == 0
    return url


HERE = ["engine.kind=plain", "data.workers=0"]  # one rank, in this process
REFUSED = {
    "data.stride": (["data.stride=[1]"], r"data\.stride was \[1, 2\], is \[1\]"),
    "train.seed": (["train.seed=4"], r"train\.seed was 3, is 4"),
    "data.flip": (["data.flip=false"], r"data\.flip was True, is False"),
    "batch_global": (["train.batch_global=8"], r"train\.batch_global was 4, is 8"),
}


@pytest.mark.parametrize("option", list(REFUSED))
def test_changed_options_refuse_to_resume(shop: Workshop, killed: Path, option: str) -> None:
    overrides, told = REFUSED[option]
    before = (killed / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=told) as caught:
        train(load_config(shop.config, ["name=killed", *HERE, *overrides]))
    assert str(caught.value).count(" was ") == 1, "nothing else has changed"
    assert (killed / "metrics.jsonl").read_bytes() == before


def test_a_changed_dataset_refuses_to_resume(shop: Workshop, killed: Path, changed: str) -> None:
    code = shop.regen(
        "train", shop.config, "name=killed", "engine.kind=plain", f"data.url={changed}", "train.seed=5", log="refused"
    )
    assert code == CheckpointError.exit_code == 4
    old, new = open_dataset(shop.url).fingerprint, open_dataset(changed).fingerprint
    assert f"dataset fingerprint was ['{old}'], is ['{new}']; train.seed was 3, is 5" in shop.said("refused")
    assert "Traceback" not in shop.said("refused")


def test_a_dataset_that_was_moved_goes_on(shop: Workshop, killed: Path) -> None:
    """The identity is the data's, not the place's."""
    store, url = Store(shop.url), f"{shop.url}-moved"
    for name in store.list():
        Store(url).put(name, store.get(name))
    run = shop.run("moved")
    shutil.copytree(killed, run)
    assert train(load_config(shop.config, ["name=moved", f"data.url={url}", f"train.steps={STEPS + 1}", *HERE])) == 0
    assert read_record(run / "metrics.jsonl", "train")[-1]["step"] == STEPS + 1


def secrets_in(folder: Path, secrets: list[bytes]) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 50
    return [path for path in files if any(secret in path.read_bytes() for secret in secrets)]


WRONG: dict[str, dict[str, str]] = {
    "secret": {"AWS_SECRET_ACCESS_KEY": "SENTINEL-wrong-secret-key"},
    "key": {"AWS_ACCESS_KEY_ID": "SENTINEL-wrong-access-key"},
    "token": {"AWS_ACCESS_KEY_ID": "SENTINEL-expired", "AWS_SESSION_TOKEN": "SENTINEL-token"},
}


@pytest.mark.parametrize("wrong", list(WRONG))
def test_wrong_credentials_are_one_clear_error(shop: Workshop, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """However many samples may be bad, nothing stands in for a store that lets nobody in."""
    for name, value in WRONG[wrong].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        AccessDenied, match=r"access denied when trying to .* AWS_ACCESS_KEY_ID with AWS_SECRET"
    ) as caught:
        train(load_config(shop.config, ["name=denied", "data.max_bad_share=1", *HERE]))
    assert caught.value.exit_code == 3
    assert "SENTINEL" not in "".join(traceback.format_exception(caught.value))
    assert not (shop.run("denied") / "config.yaml").exists()


def test_credentials_are_written_nowhere(
    shop: Workshop, undisturbed: Path, killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those that are right (in run folders, logs, configs, records, checkpoints, the cache, and every object of
    the dataset) nor those that are wrong (in errors, with --debug and without)."""
    right = [text.encode() for each in shop.store.identities for text in (each.access_key, each.secret_key)]
    objects = Store(shop.url)
    names = list(objects.list())
    assert {"plan.json", "manifest.json"} < set(names)
    assert [name for name in names if any(secret in objects.get(name) for secret in right)] == []
    for name, value in {**WRONG["secret"], **WRONG["key"]}.items():
        monkeypatch.setenv(name, value)
    build = ("shards", "build", shop.folder / "videos", "--out", f"{shop.url}-denied", "--workers", 0)
    assert shop.regen("train", shop.config, "name=denied", "engine.kind=plain", log="denied_train") == 3
    assert shop.said("denied_train").count("error: ") == 1
    assert "Traceback" not in shop.said("denied_train")
    for name, command in {"build": build, "verify": ("shards", "verify", shop.url)}.items():
        assert shop.regen("--debug", *command, log=f"denied_{name}") != 0
        assert "AccessDenied: " in shop.said(f"denied_{name}"), shop.said(f"denied_{name}")
    assert secrets_in(shop.folder, [*right, b"SENTINEL"]) == []
