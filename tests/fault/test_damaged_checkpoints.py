"""Files of checkpoints that are gone, cut, or changed by a single bit: what two ranks make of them, together."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import pytest

from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.checkpoint.shards import shard_name
from regen_dist.data.storage.connection import StoreLimits
from tests.fault.conftest import SAVE_EVERY, STEPS, losses
from tests.helpers.checkpoints import Answer, Case, Damage, ask, flip, folder_of, newest, save_checkpoint, small_state
from tests.helpers.ranks import run_ranks, run_regen_ranks, said

OLDER, NEWEST = 4, 8
FOLDER, BEFORE = f"step-{NEWEST:08d}", f"step-{OLDER:08d}"
SHARDS = [shard_name(rank, 2) for rank in range(2)]
FILES = ["manifest.json", *SHARDS]
SOON_S = 10.0
NO_LONGER_GOOD = {
    "a flipped byte and a cut": [
        Damage(f"{FOLDER}/{SHARDS[1]}", "flipped", -1), Damage(f"{BEFORE}/{SHARDS[0]}", "cut", 9),
    ],
    "no manifests": [Damage(f"{FOLDER}/manifest.json", "deleted"), Damage(f"{BEFORE}/manifest.json", "deleted")],
    "nothing but shards and half a pointer": [
        Damage(f"{FOLDER}/manifest.json", "deleted"), Damage(f"{BEFORE}/manifest.json", "deleted"),
        Damage("latest", "cut", 6),
    ],
    "cut manifests and no pointer": [
        Damage(f"{FOLDER}/manifest.json", "cut", 100), Damage(f"{BEFORE}/manifest.json", "cut", 0),
        Damage("latest", "deleted"),
    ],
}  # fmt: skip


def _damages(sizes: dict[str, int]) -> list[Damage]:
    """Every file of the newest checkpoint, and the pointer: gone, cut, and with one bit flipped in many places."""
    found = [Damage("latest", "deleted"), *(Damage("latest", "cut", at) for at in (0, 6, 12))]
    found += [Damage("latest", "flipped", at, bit) for at in range(sizes["latest"]) for bit in range(8)]
    for name in [f"{FOLDER}/{file}" for file in FILES]:
        size = sizes[name]
        places = [0, 7, 8, *range(9, size - 1, size // 12), size - 1]
        found += [Damage(name, "deleted"), *(Damage(name, "cut", at) for at in (0, 8, size // 2, size - 1))]
        found += [Damage(name, "flipped", at, at % 8) for at in places]
    return found


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Damage, ...], tuple[Answer, Answer]]:
    """What each of two ranks answers to each damage, by one start of them."""
    folder = CheckpointFolder(tmp_path_factory.mktemp("damaged") / "checkpoints")
    for step in (OLDER, NEWEST):
        save_checkpoint(folder, step, small_state(float(step)), ranks=2)
    damages = [(damage,) for damage in _damages(folder.store.list())]
    damages += [tuple(together) for together in NO_LONGER_GOOD.values()]
    told = run_ranks(ask, 2, folder.url, [Case(each) for each in [(), *damages]], StoreLimits())
    assert [each[0].step for each in told] == [NEWEST, NEWEST], "nothing is wrong with it"
    assert told[0][0].said == told[1][0].said == []
    return dict(zip(damages, zip(told[0][1:], told[1][1:], strict=True), strict=True))


Answers = dict[tuple[Damage, ...], tuple[Answer, Answer]]


def _alone(answers: Answers, name: str) -> dict[Damage, Answer]:
    """Rank 0's answers where one file alone is damaged."""
    return {damages[0]: told for damages, (told, _) in answers.items() if [each.name for each in damages] == [name]}


def test_all_ranks_say_the_same_and_soon(answers: Answers) -> None:
    """Whatever happened: the same step, the same words, the same error, within seconds."""
    for damages, (first, second) in answers.items():
        assert first[:4] == second[:4], damages
        assert max(first.seconds, second.seconds) < SOON_S, damages


@pytest.mark.parametrize("file", FILES)
def test_the_one_before_is_used(answers: Answers, file: str) -> None:
    """The file and what is wrong with it are named."""
    found = _alone(answers, f"{FOLDER}/{file}")
    assert len(found) > 15
    for damage, told in found.items():
        assert told.step == OLDER, damage
        reason, then = told.said
        assert file in reason, damage
        assert FOLDER in reason or f"step {NEWEST}" in reason, damage
        if file in SHARDS:
            wrong = {"deleted": "is missing", "cut": f"has {damage.at} bytes", "flipped": "does not have the SHA-256"}
            assert f"{file} {wrong[damage.kind]}" in reason, damage
        assert f"at step {OLDER}, the newest good checkpoint" in then


def test_a_damaged_pointer_costs_nothing(answers: Answers) -> None:
    """The newest itself is used, because it is whole; what is wrong with the pointer is said, where it matters."""
    found = _alone(answers, "latest")
    assert len(found) > 100
    for damage, told in found.items():
        assert (told.step, told.error) == (NEWEST, ""), damage
    told = found[Damage("latest", "cut", 6)]
    assert "latest is damaged: it says 'step-0'" in told.said[0]
    elsewhere = found[Damage("latest", "flipped", 12, 3)]
    assert "step-00000000 has no manifest.json" in elsewhere.said[0]


@pytest.mark.parametrize("case", NO_LONGER_GOOD)
def test_none_good_is_an_error_and_no_new_start(answers: Answers, case: str) -> None:
    """On every rank, with every reason, and the way out."""
    damages = tuple(NO_LONGER_GOOD[case])
    for told in answers[damages]:
        assert told.step is None
        assert told.exit_code == 4
        assert told.error.startswith("NoGoodCheckpoint: ")
        assert "--fresh" in told.error
        if "no manifests" not in case and "nothing" not in case:
            assert all(damage.name.split("/")[-1] in told.error for damage in damages if damage.name != "latest")


def _copy(source: Path, name: str) -> Path:
    return Path(shutil.copytree(source, source.with_name(name)))


def _hashes(folder: Path) -> dict[str, str]:
    """Of every file but the ranks' logs and signs of life."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if not (name := path.relative_to(folder).as_posix()).startswith(("logs/", "heartbeats/", "stacks/"))
    }


def test_a_run_goes_on_from_the_one_before(config: Path, undisturbed: list[float]) -> None:
    """One byte of one shard of the newest checkpoint: both ranks say which, the run does the last steps again, and ends
    as the undisturbed one, bit for bit."""
    run = _copy(config.parent / "runs" / "undisturbed", "flipped")
    shard = run / "checkpoints" / f"step-{STEPS:08d}" / SHARDS[1]
    flip(shard, shard.stat().st_size // 2)
    before = folder_of(run).manifest(STEPS).files
    logs = config.with_name("flipped")
    assert run_regen_ranks("train", config, "name=flipped", logs=logs) == [0, 0]
    for text in said(logs):
        assert text.count(f"{SHARDS[1]} does not have the SHA-256 in the manifest") == 1
    assert f"resumed at step {STEPS - SAVE_EVERY} on 2 rank(s)" in said(logs)[0]
    assert losses(run) == undisturbed
    assert newest(run).step == STEPS
    assert newest(run).files == before, "the very same bytes"


def test_a_run_with_none_good_refuses_and_begins_anew_when_told(config: Path, undisturbed: list[float]) -> None:
    """Exit code 4 and nothing is changed; with --fresh it starts from scratch, says so, and finishes."""
    run = _copy(config.parent / "runs" / "undisturbed", "none_good")
    for shard in run.glob(f"checkpoints/*/{SHARDS[0]}"):
        flip(shard)
    before, command, logs = _hashes(run), ("train", config, "name=none_good"), config.with_name("none_good")
    assert len(folder_of(run).steps()) == 2
    assert run_regen_ranks(*command, logs=logs) == [4, 4]
    for text in said(logs):
        (error,) = [line for line in text.splitlines() if re.match(r"(rank \d: )?error: ", line)]
        assert "--fresh" in error
        assert error.count(f"{SHARDS[0]} does not have the SHA-256") == 2
        assert "Traceback" not in text
    assert _hashes(run) == before
    assert run_regen_ranks(*command, "--fresh", logs=logs) == [0, 0]
    assert all("starting from scratch, as --fresh asks" in text for text in said(logs))
    assert losses(run) == undisturbed
    assert newest(run).step == STEPS


def test_what_sizes_do_not_show_is_found_when_it_is_read(config: Path, undisturbed: list[float]) -> None:
    """With checkpoint.verify=sizes, a byte in the header of rank 1's shard is noticed by rank 1 alone, when it loads:
    both ranks hear of it, compare checksums after all, and go on from the checkpoint before."""
    run = _copy(config.parent / "runs" / "undisturbed", "sizes")
    flip(run / "checkpoints" / f"step-{STEPS:08d}" / SHARDS[1], 20)
    logs = config.with_name("sizes")
    assert run_regen_ranks("train", config, "name=sizes", "checkpoint.verify=sizes", logs=logs) == [0, 0]
    for text in said(logs):
        assert f"{SHARDS[1]} does not have the SHA-256" in text
        assert "Traceback" not in text
    assert f"resumed at step {STEPS - SAVE_EVERY} on 2 rank(s)" in said(logs)[0]
    assert losses(run) == undisturbed
