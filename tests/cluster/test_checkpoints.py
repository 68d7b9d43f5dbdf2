"""Checkpoints in an object store, on real ranks: the promises of a disk, though nothing can be renamed there."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from regen_dist.checkpoint.folder import CheckpointFolder, newest_good
from regen_dist.checkpoint.manifest import CheckpointManifest
from regen_dist.checkpoint.saver import Saver
from regen_dist.checkpoint.shards import shard_name
from regen_dist.config.embedder import EmbedderConfig
from regen_dist.config.run import CheckpointConfig
from regen_dist.data.storage.connection import StoreLimits
from regen_dist.data.storage.store import Store
from regen_dist.distributed.ranks import Ranks, chunk, process_group, read_environment
from regen_dist.errors import AccessDenied, CheckpointError, StoreUnavailable
from regen_dist.observe.record import read_record
from regen_dist.training import run as training
from tests.helpers.checkpoints import KINDS, Answer, Case, Damage, ask, save_checkpoint, small_state
from tests.helpers.proxy import FaultProxy
from tests.helpers.ranks import run_ranks, start_ranks
from tests.helpers.stores import use
from tests.helpers.tiny import tiny_dataset, tiny_run
from tools.checkpoint import app
from tools.local_services.s3 import ObjectServer

STEPS, EVERY, KILLED_AFTER = 10, 2, 5
ELASTIC = 1e-4  # of losses after a change of ranks: float32 sums in another order
DOWN = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}  # nobody listens there
WRONG = {"AWS_SECRET_ACCESS_KEY": "wrong"}
PATIENT = StoreLimits(stall_s=2.0, deadline_s=10.0, connect_s=1.0)
HURRIED = StoreLimits(stall_s=0.5, deadline_s=2.0, connect_s=0.5)
HURRIED_READ = {"data__read__stall_s": HURRIED.stall_s, "data__read__deadline_s": HURRIED.deadline_s}


class Job(NamedTuple):
    """A run, with variables of its own; SIGKILL ends every rank before the step after `killed_after`."""

    config: EmbedderConfig
    environment: Mapping[str, str] = {}
    killed_after: int | None = None


def _train(jobs: list[Job]) -> list[int]:
    """One rank: train one run after the other; returns their exit codes."""
    from regen_dist.training.loop import Trainer

    ranks, train_step, codes = read_environment(), Trainer.train_step, []
    training.process_group = lambda ranks, needed: nullcontext()  # type: ignore[assignment,misc]
    with process_group(ranks, needed=True):
        for job in jobs:

            def step(self: Trainer, killed_after: int | None = job.killed_after) -> Any:
                if self.step == killed_after:
                    os.kill(os.getpid(), signal.SIGKILL)
                return train_step(self)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Trainer, "train_step", step)
                for name, value in job.environment.items():
                    patch.setenv(name, value)
                codes.append(training.train(job.config))
    return codes


class Shop(NamedTuple):
    """A folder of runs, and the URL under which they save."""

    folder: Path
    url: str
    configs: dict[str, EmbedderConfig]

    def checkpoints(self, name: str) -> CheckpointFolder:
        return CheckpointFolder(self.configs[name].checkpoints, PATIENT)

    def losses(self, name: str) -> list[float]:
        lines = read_record(self.folder / name / "metrics.jsonl", "train")
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        return [line["loss"] for line in lines]

    def tensors(self, name: str, step: int) -> dict[str, Tensor]:
        """Everything in a checkpoint, gathered and flat."""
        folder = self.checkpoints(name)
        manifest = folder.manifest(step)
        sizes = {name: (0, prod(shape)) for name, shape in manifest.shapes.items()}
        wanted = {f"{kind}/{name}": size for kind in KINDS for name, size in sizes.items()}
        return dict(folder.reader(manifest).read_all(wanted))

    def copy(self, source: str, target: str) -> None:
        """A run and its checkpoints under another name."""
        shutil.copytree(self.folder / source, self.folder / target)
        objects = Store(f"{self.url}/{source}")
        for name in objects.list():
            Store(f"{self.url}/{target}").put(name, objects.get(name))


@pytest.fixture(scope="module")
def url(object_store: ObjectServer) -> Iterator[str]:
    """Where this file's runs save; this process and its children have the keys."""
    with pytest.MonkeyPatch.context() as patch:
        use(patch, object_store.environment())
        yield f"s3://{object_store.bucket}/checkpoints-{uuid4().hex[:8]}"


@pytest.fixture(scope="module")
def shop(object_store: ObjectServer, url: str, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Runs of two starts of two ranks under ZeRO-3: `local` saves on a disk and nothing happens to it; `killed` is
    killed and resumed, `left` is how it was found, and `alone` a copy of that; of what `faulty` saves, step 4 and
    step 6 are not taken."""
    folder = tmp_path_factory.mktemp("checkpoints")
    data = tiny_dataset(folder / "data")

    def config(name: str, place: str | None, **changes: Any) -> EmbedderConfig:
        values = {"engine__kind": "zero3", "train__steps": STEPS, "checkpoint__every": EVERY, "checkpoint__url": place}
        return tiny_run(folder, data, name=name, **{**values, **HURRIED_READ, **changes})

    configs = {"local": config("local", None)}
    configs |= {name: config(name, url) for name in ("killed", "left", "faulty")}
    configs["alone"] = config("alone", url, engine__kind="plain")
    shop = Shop(folder, url, configs)
    with pytest.raises(RuntimeError, match="without a result"):
        run_ranks(_train, 2, [Job(configs["local"]), Job(configs["killed"], killed_after=KILLED_AFTER)])
    for name in ("left", "alone"):
        shop.copy("killed", name)
    with FaultProxy(object_store.ports["s3"]) as proxy:
        proxy.add("status", f"step-00000004/{shard_name(1, 2)}")
        proxy.add("status", "step-00000006/manifest.json")
        faulty = Job(configs["faulty"], {"AWS_ENDPOINT_URL": proxy.endpoint})
        assert run_ranks(_train, 2, [Job(configs["killed"]), faulty]) == [[0, 0], [0, 0]]
        assert proxy.injected["status"] >= 4, "each was tried again until the deadline"
    return shop


def test_a_killed_run_goes_on_bit_for_bit(shop: Shop) -> None:
    """SIGKILL of both ranks, new processes, the same command: losses, weights, moments and averages are those of a run
    that saved on a disk and that nothing happened to."""
    left = newest_good(shop.checkpoints("left"), checksums=True)
    assert left is not None
    assert 0 < left.step <= KILLED_AFTER
    events = [line for line in read_record(shop.folder / "killed" / "metrics.jsonl", "event") if "world_size" in line]
    assert [(line["step"], line["world_size"]) for line in events] == [(0, 2), (left.step, 2)]
    assert shop.losses("killed") == shop.losses("local")
    found, expected = shop.tensors("killed", STEPS), shop.tensors("local", STEPS)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert shop.checkpoints("killed").steps() == [STEPS - EVERY, STEPS]
    assert shop.checkpoints("killed").debris() == {}


def test_a_store_that_takes_nothing_for_a_while_does_not_stop_a_run(shop: Shop) -> None:
    """A shard of one rank, then a manifest, is refused until the deadline: training goes on, each failure is recorded,
    what lay there of it is cleared, and later saves succeed."""
    saves = {line["step"]: line for line in read_record(shop.folder / "faulty" / "metrics.jsonl", "checkpoint")}
    assert list(saves) == list(range(EVERY, STEPS + 1, EVERY))
    assert [step for step, line in saves.items() if line["problem"]] == [4, 6]
    assert saves[4]["problem"].startswith("rank 1: ")
    assert all("could not write it in" in saves[step]["problem"] for step in (4, 6))
    folder = shop.checkpoints("faulty")
    assert folder.steps() == [STEPS - EVERY, STEPS]
    assert folder.debris() == {}
    assert shop.losses("faulty") == shop.losses("local")
    assert folder.manifest(STEPS).files == shop.checkpoints("killed").manifest(STEPS).files


def test_another_number_of_ranks_reads_the_same_state(shop: Shop) -> None:
    """Saved by two, resumed by one, straight from the bucket: the losses follow, and what is saved is nearly equal."""
    assert training.train(shop.configs["alone"]) == 0
    folder = shop.checkpoints("alone")
    assert folder.manifest(STEPS).world_size == 1
    assert shop.losses("alone") == pytest.approx(shop.losses("local"), abs=ELASTIC)
    found, expected = shop.tensors("alone", STEPS), shop.tensors("local", STEPS)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=ELASTIC)


@pytest.mark.parametrize(("environment", "error"), [(DOWN, StoreUnavailable), (WRONG, AccessDenied)])
def test_a_store_that_does_not_answer_is_no_empty_one(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], error: type[Exception]
) -> None:
    """At the start of a run that has checkpoints: its own error, exit code 3; nothing is begun from scratch, whatever
    `--fresh` says."""
    record = shop.folder / "left" / "metrics.jsonl"
    before = record.read_bytes()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = shop.configs["left"].model_copy(update={"engine": shop.configs["alone"].engine})
    with pytest.raises(error) as caught:
        training.train(config, fresh=True)
    assert caught.value.exit_code == 3  # type: ignore[attr-defined]
    assert record.read_bytes() == before


def _regen(*arguments: object) -> tuple[str, BaseException | None]:
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})
    return result.output, result.exception


def test_the_command_line_lists_and_verifies_them(shop: Shop) -> None:
    """Checkpoints given by the run folder and by the URL; a flipped byte of an object is named."""
    listed, error = _regen("list", shop.folder / "killed")
    assert error is None
    assert all(str(step) in listed for step in (STEPS - EVERY, STEPS))
    place = f"{shop.url}/killed"
    assert place in _regen("list", "--json", place)[0]
    verified, error = _regen("verify", place)
    assert error is None
    assert f"step {STEPS}: ok, 2 files" in verified
    shop.copy("killed", "flipped")
    name = f"step-{STEPS:08d}/{shard_name(1, 2)}"
    Damage(name, "flipped", -1).inflict(Store(f"{shop.url}/flipped"))
    verified, error = _regen("verify", f"{shop.url}/flipped")
    assert isinstance(error, CheckpointError)
    assert f"step {STEPS}: {shard_name(1, 2)} does not have the SHA-256" in str(error)
    assert f"step {STEPS - EVERY}: ok" in verified


EXITS = [(0, phase) for phase in ("clear", "shard", "vote", "manifest", "pointer", "prune")]
EXITS += [(1, "shard"), (1, "vote")]
# The other rank's file may be there too, or not.
SHARDS_LEFT = {"clear": [0], "shard": [0, 1], "vote": [1, 2], "manifest": [2], "pointer": [2], "prune": [2]}
EXIT_CODE = 9


def _save(url: str, step: int, who: int, where: str) -> str:
    """One rank: save; but rank `who` ends at the phase `where`. Returns what became of it."""
    ranks = read_environment()

    def phase(name: str) -> None:
        if (ranks.rank, name) == (who, where):
            os._exit(EXIT_CODE)

    with process_group(ranks, needed=True):
        saver = Saver(CheckpointFolder(url, PATIENT), ranks, CheckpointConfig(), phase)
        saver.save(_manifest(step, ranks), _pieces(step, ranks))
        outcome = saver.settle()
        assert outcome is not None
        return outcome.problem


def _manifest(step: int, ranks: Ranks) -> CheckpointManifest:
    return CheckpointManifest(
        step=step, samples=4 * step, config_hash="hash", version="test",
        topology={"world_size": ranks.world_size, "engine": "test", "precision": "fp32"}, state={}, metrics={},
        rollbacks=[], shapes={key.split("/", 1)[1]: list(tensor.shape) for key, tensor in small_state().items()},
    )  # fmt: skip


def _pieces(step: int, ranks: Ranks) -> dict[str, Tensor]:
    pieces = {}
    for key, tensor in small_state(float(step)).items():
        low, high = chunk(tensor.numel(), ranks.world_size, ranks.rank)
        pieces[key] = tensor.flatten()[low:high]
    return pieces


@pytest.mark.parametrize(("who", "where"), EXITS)
def test_a_writer_that_dies_leaves_the_newest_whole(url: str, who: int, where: str) -> None:
    """`os._exit` at each phase: the run goes on from what was committed, never from parts; what is left is known as
    debris, and the next save clears it."""
    place = f"{url}/exit-{who}-{where}"
    folder = CheckpointFolder(place, PATIENT)
    for step in (1, 2):
        save_checkpoint(folder, step, small_state(float(step)), ranks=2)
    with start_ranks(_save, 2, place, 3, who, where) as ranks:
        assert ranks.exit_codes()[who] == EXIT_CODE
    committed, newest = where in ("pointer", "prune"), 3 if where == "prune" else 2
    assert folder.steps() == [1, 2, 3][: 3 if committed else 2]
    manifest = newest_good(folder, checksums=True)
    assert manifest is not None
    assert manifest.step == newest
    assert folder.reader(manifest).whole("ema/weight").unique().tolist() == [float(newest)]
    held = [name for name in folder.store.list("step-00000003/") if name.endswith(".safetensors")]
    assert len(held) in SHARDS_LEFT[where]
    assert list(folder.debris()) == (["step-00000003"] if held and not committed else [])
    saver = Saver(folder, Ranks(), CheckpointConfig())
    saver.save(_manifest(4, Ranks()), _pieces(4, Ranks()))
    outcome = saver.settle()
    assert outcome is not None
    assert outcome.problem == ""
    assert folder.debris() == {}
    after = newest_good(folder, checksums=True)
    assert after is not None
    assert after.step == 4


def test_a_store_that_is_down_fails_saves_until_it_is_back(url: str, object_store: ObjectServer) -> None:
    """Every request of a save refused, from the first to clear debris on: the error says so, soon after the deadline;
    what was there stays; when the store is back the same saver saves again, and nothing of the failed one is left."""
    place = f"{url}/down"
    with FaultProxy(object_store.ports["s3"]) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        saver = Saver(CheckpointFolder(place, HURRIED), Ranks(), CheckpointConfig())
        problems = []
        for step in (1, 2, 3):
            proxy.clear()
            if step == 2:
                proxy.add("status")
            saver.save(_manifest(step, Ranks()), _pieces(step, Ranks()))
            outcome = saver.settle()
            assert outcome is not None
            problems.append(outcome.problem)
            assert outcome.seconds < 10.0
    assert [bool(problem) for problem in problems] == [False, True, False]
    assert "check that the store is up" in problems[1]
    folder = CheckpointFolder(place, PATIENT)
    assert folder.steps() == [1, 3]
    assert folder.debris() == {}


OLDER, NEWEST = 4, 8
FILES = ["manifest.json", shard_name(0, 2), shard_name(1, 2)]


@pytest.fixture(scope="module")
def answers(url: str) -> dict[str, tuple[Answer, Answer]]:
    """Answers of two ranks to damaged objects, and to a store that is down or denies access; one start."""
    folder = CheckpointFolder(f"{url}/damaged", PATIENT)
    for step in (OLDER, NEWEST):
        save_checkpoint(folder, step, small_state(float(step)), ranks=2)
    sizes = folder.store.list()
    cases = {"whole": Case(), "down": Case(environment=DOWN), "denied": Case(environment=WRONG)}
    for name in [*(f"step-{NEWEST:08d}/{file}" for file in FILES), "latest"]:
        cases[f"deleted {name}"] = Case((Damage(name, "deleted"),))
        cases[f"cut {name}"] = Case((Damage(name, "cut", sizes[name] // 2),))
        for at in (0, sizes[name] // 2, sizes[name] - 2):
            cases[f"flipped {name} {at}"] = Case((Damage(name, "flipped", at, 3),))
    cases["none"] = Case(tuple(Damage(f"step-{step:08d}/{FILES[2]}", "flipped", -1) for step in (OLDER, NEWEST)))
    told = run_ranks(ask, 2, f"{url}/damaged", list(cases.values()), HURRIED)
    return dict(zip(cases, zip(*told, strict=True), strict=True))


def test_damaged_objects_fall_back(answers: dict[str, tuple[Answer, Answer]]) -> None:
    """Deleted, cut, one bit flipped: both ranks say the same, with the file's name, and the one before is used; a bad
    pointer costs nothing; with none good, both refuse."""
    assert answers["whole"][0][:4] == (NEWEST, [], "", 0)
    for case, (first, second) in answers.items():
        assert first[:4] == second[:4], case
        assert max(first.seconds, second.seconds) < 10.0, case
        if "step-" in case:
            assert first.step == OLDER, case
            assert case.split()[1].split("/")[1] in first.said[0], case
        elif "latest" in case:
            assert first.step == NEWEST, case
    refused = answers["none"][0]
    assert refused.exit_code == 4
    assert "--fresh" in refused.error


@pytest.mark.parametrize(("case", "error"), [("down", "StoreUnavailable"), ("denied", "AccessDenied")])
def test_a_store_in_trouble_is_no_damage(answers: dict[str, tuple[Answer, Answer]], case: str, error: str) -> None:
    """Its own error on both ranks, exit code 3: never "no checkpoint", and never an older one."""
    for told in answers[case]:
        assert told.step is None
        assert told.said == []
        assert told.exit_code == 3
        assert told.error.startswith(f"{error}: ")
