"""Two records of the benches side by side: what got slower, what got faster, and what is noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from regen_dist.errors import DataError
from regen_dist.evaluation.figures import Figure

Declared = Callable[[Mapping[str, Any]], Iterable[Figure]]
_HEAD = ["| bench | figure | old | new | new / old | verdict |", "| --- | --- | ---: | ---: | ---: | --- |"]


class Verdict(StrEnum):
    """What a change of a figure means."""

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
    verdict: Verdict

    @property
    def ratio(self) -> float | None:
        """New over old."""
        return None if self.new is None or not self.old else self.new / self.old


def changes(
    old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]], declared: Mapping[str, Declared]
) -> list[Change]:
    """Every figure of the benches that stand in both records.

    Args:
        old, new: facts by bench.
        declared: what each bench says its figures are.

    Raises:
        DataError: no bench stands in both, or a record is of another shape.
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
    order = list(Verdict)
    rows = sorted(found, key=lambda change: order.index(change.verdict))
    return "\n".join([*_HEAD, *map(_row, rows)]) + "\n"


def _of_bench(bench: str, declared: Declared, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterable[Change]:
    before, after = (_figures(bench, declared, facts) for facts in (old, new))
    for name in before | after:
        one, other = before.get(name), after.get(name)
        yield Change(bench, name, one and one.value, other and other.value, _verdict(one, other))


def _figures(bench: str, declared: Declared, facts: Mapping[str, Any]) -> dict[str, Figure]:
    try:
        return {figure.name: figure for figure in declared(facts)}
    except (KeyError, TypeError) as error:
        raise DataError(f"a record of the bench {bench!r} is not of this version ({error!r}); measure anew") from error


def _verdict(old: Figure | None, new: Figure | None) -> Verdict:
    if old is None or new is None or not old.value:
        return Verdict.MISSING
    gain = new.value / old.value if new.higher_is_better else old.value / max(new.value, 1e-12)
    if gain < 1 - new.noise:
        return Verdict.WORSE
    return Verdict.BETTER if gain > 1 / (1 - new.noise) else Verdict.SAME


def _row(change: Change) -> str:
    values = [_shown(change.old), _shown(change.new), _shown(change.ratio)]
    return "| " + " | ".join([change.bench, change.name, *values, change.verdict.value]) + " |"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}"
