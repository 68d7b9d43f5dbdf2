"""`os._exit` at every phase of saving, on rank 0 and on rank 1, in one run that is started again after each death."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from regen_dist.config.embedder import EmbedderConfig
from tests.helpers.checkpoints import folder_of, newest
from tests.helpers.comeback import Ending, assert_equal, ending, first_lines, small_run, undisturbed
from tests.helpers.ranks import start_ranks
from tests.helpers.tiny import tiny_dataset

STEPS = 16
DIED = 43  # the exit code of a rank that died where it should
STRAY = "stray"  # a file that is put into debris


class Death(NamedTuple):
    """A rank ends when the writer comes to a phase of the second save of a start. Phase "middle" is half of the shard.

    Args:
        rank: which.
        phase: of the writer (`checkpoint.saver`).
        debris: whether something lies under the temporary name then; None where it depends on how far the other rank
            came.
        goes_on_from: 0 where the second save does not count; 1 where it does.
        committed: whether the second save is a checkpoint that can be read.
    """

    rank: int
    phase: str
    debris: bool | None
    goes_on_from: int = 0
    committed: bool = False


# The pointer is what says from where a run goes on: before it moves, a checkpoint that is whole is made again.
DEATHS = [
    Death(0, "clear", debris=False),
    Death(0, "shard", debris=None),
    Death(0, "middle", debris=True),
    Death(0, "vote", debris=True),
    Death(0, "manifest", debris=True),
    Death(0, "rename", debris=True),
    Death(0, "pointer", debris=False, committed=True),
    Death(0, "prune", debris=False, goes_on_from=1, committed=True),
    Death(1, "clear", debris=None),
    Death(1, "shard", debris=None),
    Death(1, "middle", debris=True),
    Death(1, "vote", debris=True),
]
SOME = [death for death in DEATHS if (death.rank, death.phase) in {(1, "middle"), (0, "rename"), (0, "pointer")}]


def _train_and_die(config: EmbedderConfig, death: Death | None) -> int:
    """Train, in a rank; it dies as told."""
    from regen_dist.training import checkpoints, run

    if death is not None and death.rank == int(os.environ["RANK"]):
        checkpoints.Saver = _doomed(checkpoints.Saver, death.phase)  # type: ignore[misc,assignment]
    return run.train(config)


def _doomed(saver: Any, last: str) -> Any:
    """A maker of `Saver` whose second save meets its end in the phase `last`."""
    saves = 0

    def make(*args: Any, phase: Any = lambda name: None, **others: Any) -> Any:
        def meet(name: str) -> None:
            nonlocal saves
            phase(name)
            saves += name == "clear"
            if saves == 2 and name == last:
                os._exit(DIED)
            if saves == 2 and name == "shard" and last == "middle":
                _die_in_the_middle_of_a_shard()

        return saver(*args, phase=meet, **others)

    return make


def _die_in_the_middle_of_a_shard() -> None:
    from regen_dist.checkpoint import folder

    write_shard = folder.write_shard

    class Half:
        def __init__(self, file: Any, size: int) -> None:
            self.file, self.left = file, size // 2

        def write(self, data: Any) -> None:
            self.file.write(data[: self.left])
            self.left -= len(data)
            if self.left <= 0:
                self.file.flush()
                os._exit(DIED)

    def half(file: Any, pieces: Any) -> Any:
        return write_shard(Half(file, 4 * sum(piece.numel() for piece in pieces.values())), pieces)  # type: ignore[arg-type]

    folder.write_shard = half


def _start_and_die(config: EmbedderConfig, death: Death, logs: Path) -> None:
    """One start, until the rank has died and the other one has noticed."""
    with start_ranks(_train_and_die, 2, config, death, logs=logs) as started:
        codes = started.exit_codes(timeout_s=150)
    said = (logs / f"rank_{death.rank}.log").read_text()
    assert codes[death.rank] == DIED, f"{death} did not come: {codes}\n{said}"
    assert codes[1 - death.rank] == 1, "the other rank ends with an error by itself"


def _come_back(config: EmbedderConfig, deaths: list[Death], logs: Path) -> Ending:
    """A run with all these deaths, and then an undisturbed start to its end."""
    folder, goes_on_from = folder_of(config.folder), 0
    for number, death in enumerate(deaths):
        _start_and_die(config, death, logs / str(number))
        _check_start(logs / str(number), goes_on_from)
        first, second = goes_on_from + 1, goes_on_from + 2  # the saves of this start
        goes_on_from = (first, second)[death.goes_on_from]
        assert newest(config.folder).step == goes_on_from, death
        assert folder.pointer() == goes_on_from, death
        assert (second in folder.steps()) == death.committed, death
        temporary = f"step-{second:08d}.tmp"
        if death.debris is not None:
            assert set(folder.debris()) == ({temporary} if death.debris else set()), death
        assert set(folder.debris()) <= {temporary}, f"{death}: what the deaths before left is cleared"
        assert not list(config.folder.rglob(STRAY)), f"{death}: what the deaths before left is cleared"
        for name in folder.debris():
            (config.folder / "checkpoints" / name / STRAY).touch()
    _finish(config, logs / "last")
    _check_start(logs / "last", goes_on_from)
    assert not folder.debris()
    assert not list(config.folder.rglob(STRAY))
    assert folder.steps() == [STEPS - 1, STEPS], "retention counts as if nothing had happened"
    return ending(config)


def _finish(config: EmbedderConfig, logs: Path) -> None:
    with start_ranks(_train_and_die, 2, config, None, logs=logs) as started:
        assert started.results() == [0, 0]


def _check_start(logs: Path, step: int) -> None:
    (line,) = first_lines(logs)
    words = f"resumed at step {step} on 2 rank(s)" if step else "starting at step 0 on 2 rank(s)"
    assert line.endswith(words), line


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Ending]:
    """Folder, data, and what the undisturbed run came to."""
    folder = tmp_path_factory.mktemp("deaths")
    data = tiny_dataset(folder / "data")
    return folder, data, undisturbed(small_run(folder, data, "undisturbed", train__steps=STEPS))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("asynchronous", "deaths"), [(True, DEATHS), (False, SOME)], ids=["asynchronous", "waiting"])
def test_a_writer_that_dies_loses_nothing_that_was_committed(
    expected: tuple[Path, Path, Ending], tmp_path: Path, asynchronous: bool, deaths: list[Death]
) -> None:
    """At every phase: the newest committed checkpoint is whole and the one that the next start goes on from; what was
    not committed is told apart and cleared by the next save; in the end every loss, weight, moment and average equals
    that of the undisturbed run, bit for bit."""
    folder, data, whole = expected
    name = "asynchronous" if asynchronous else "waiting"
    config = small_run(folder, data, name, train__steps=STEPS, checkpoint__asynchronous=asynchronous)
    assert_equal(_come_back(config, deaths, tmp_path), whole)
