"""Common base of the benches: turns, costs, figures, and the comparison of two records."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from regen_dist.errors import DataError
from regen_dist.tables import Column, Table, numbers


def split_arguments(config: Path, overrides: Sequence[str], default: Path) -> tuple[Path, list[str]]:
    """Separate the optional config from overrides: a first argument that is not a config is an override of the default
    one."""
    given = "=" not in str(config)
    return config if given else default, [*([] if given else [str(config)]), *overrides]


# Figures that a bench declares for its record, so that two records can be compared: each with the better direction
# and its noise.

NOISE = 0.1  # default relative noise of a figure: machines are shared


class Figure(NamedTuple):
    """One number of a record.

    Attributes:
        name: name within its bench; the same in every record.
        value: value in this record.
        higher_is_better: true for speeds, false for times and bytes.
        noise: the share by which it differs between two runs of the same code.
    """

    name: str
    value: float
    higher_is_better: bool
    noise: float = NOISE


Declared = Callable[[Mapping[str, Any]], Iterable[Figure]]
MEASURED: list[Column | str] = [
    "measured",
    *numbers("figure", "ratio (lowest to highest)", "target"),
]  # columns of most benches


class ChangeKind(StrEnum):
    """Meaning of a figure's change."""

    WORSE = "worse"
    BETTER = "better"
    SAME = ""
    MISSING = "not in both"


class Change(NamedTuple):
    """One figure in two records; None where a record lacks it."""

    bench: str
    name: str
    old: float | None
    new: float | None
    kind: ChangeKind

    @property
    def ratio(self) -> float | None:
        """New value over old."""
        return None if self.new is None or not self.old else self.new / self.old


def changes(
    old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]], declared: Mapping[str, Declared]
) -> list[Change]:
    """Return the change of every figure that is in both records.

    Args:
        old, new: facts by bench.
        declared: figures declared by each bench.

    Raises:
        DataError: no bench is in both, or a record has another format.
    """
    both = [bench for bench in declared if bench in old and bench in new]
    if not both:
        raise DataError(
            f"the records have no bench in common: {', '.join(old) or 'none'} in the old one, "
            f"{', '.join(new) or 'none'} in the new one; compare files that `regen bench all` wrote"
        )
    return [change for bench in both for change in _of_bench(bench, declared[bench], old[bench], new[bench])]


def table(found: Iterable[Change]) -> str:
    """A row for each figure: those that got worse first, then those that got better."""
    order = list(ChangeKind)
    rows = sorted(found, key=lambda change: order.index(change.kind))
    return Table(
        ["bench", "figure", *numbers("old", "new", "new / old"), "change"], list(map(_row, rows))
    ).to_markdown()


def _of_bench(bench: str, declared: Declared, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterable[Change]:
    before, after = (_figures(bench, declared, facts) for facts in (old, new))
    for name in before | after:
        one, other = before.get(name), after.get(name)
        yield Change(bench, name, one and one.value, other and other.value, _change_kind(one, other))


def _figures(bench: str, declared: Declared, facts: Mapping[str, Any]) -> dict[str, Figure]:
    try:
        return {figure.name: figure for figure in declared(facts)}
    except (KeyError, TypeError) as error:
        raise DataError(f"a record of the bench {bench!r} is not of this version ({error!r}); measure anew") from error


def _change_kind(old: Figure | None, new: Figure | None) -> ChangeKind:
    if old is None or new is None or not old.value:
        return ChangeKind.MISSING
    gain = new.value / old.value if new.higher_is_better else old.value / max(new.value, 1e-12)
    if gain < 1 - new.noise:
        return ChangeKind.WORSE
    return ChangeKind.BETTER if gain > 1 / (1 - new.noise) else ChangeKind.SAME


def _row(change: Change) -> list[str]:
    values = [_shown(change.old), _shown(change.new), _shown(change.ratio)]
    return [change.bench, change.name, *values, change.kind.value]


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}"


# Measurements that are compared are taken in turn, over and over, so that what disturbs the machine disturbs them all
# alike. Ratios are formed within a round.


@dataclass(frozen=True)
class Turn:
    """One measurement: `amount` (clips, bytes or samples) in `seconds`, and what else was seen on the way."""

    amount: float
    seconds: float
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Amount per second."""
        return self.amount / self.seconds


Case = Callable[[], Turn]
Rounds = dict[str, list[Turn]]


def in_turn(
    cases: Mapping[str, Case], repeats: int, on_turn: Callable[[str, Turn], None] = lambda name, turn: None
) -> Rounds:
    """Run every case once, then again, `repeats` times; `on_turn(name, turn)` is called after each."""
    rounds: Rounds = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            turn = case()
            rounds[name].append(turn)
            on_turn(name, turn)
    return rounds


def spread_text(found: Mapping[str, float]) -> str:
    """Format a `spread`."""
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def summary(turns: Sequence[Turn]) -> dict[str, Any]:
    """A case's rate over the rounds, and the medians of what else was seen."""
    facts = {name: median(turn.facts[name] for turn in turns) for name in turns[0].facts}
    return {
        "per_s": spread([turn.rate for turn in turns]),
        "amount": median(turn.amount for turn in turns),
        "seconds": median(turn.seconds for turn in turns),
        **facts,
    }


def ratio(turns: Sequence[Turn], others: Sequence[Turn]) -> dict[str, float]:
    """Return the speedup of `turns` over `others`, round by round."""
    return spread([turn.rate / other.rate for turn, other in zip(turns, others, strict=True)])


@contextmanager
def measured(store: int | None) -> Iterator[dict[str, float]]:
    """Measure the cost of a block; filled in at its end: `seconds`; `own_cpu_s`, CPU seconds of this process and of its
    workers that live through the whole block; `store_cpu_s`, of the process `store`."""
    own = [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]
    costs: dict[str, float] = {}
    watched = {"own_cpu_s": own} | ({"store_cpu_s": [store]} if store else {})
    before = {name: sum(map(cpu_seconds, each)) for name, each in watched.items()}
    begun = time.perf_counter()
    yield costs
    costs["seconds"] = time.perf_counter() - begun
    costs |= {name: sum(map(cpu_seconds, each)) - before[name] for name, each in watched.items()}


def turn_of(amount: float, costs: Mapping[str, float], **facts: float) -> Turn:
    """Return the turn of the costs that `measured` recorded."""
    return Turn(amount, costs["seconds"], {name: costs[name] for name in costs if name != "seconds"} | facts)


def cpu_seconds(process: int) -> float:
    """Return the CPU seconds of a running process so far, with all threads and its ended children."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
