"""From what was measured to the figures of `regen bench checkpoint`, and their Markdown table.

Everything is in seconds, so a ratio says how many times as long something takes; each is formed within a round, and
the median stands beside the least and the most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from regen_dist.evaluation.checkpoint_speed.blocking import Saving
from regen_dist.evaluation.data_speed.turns import spread
from regen_dist.evaluation.figures import Figure

BLOCKED_TARGET = 0.05  # of one step, beside one bare copy of the state
STATE_BYTES = 16  # a parameter: master weight, moving average and two moments in float32
_HEAD = ["| measured | figure | ratio (lowest to highest) | target |", "| --- | ---: | ---: | ---: |"]
_AGAINST = {"save": "plain files", "load": "plain reads"}
_IN_BUCKET = {"save": "bucket: plain objects", "load": "bucket: plain gets"}
_CHOSEN = "ours, from choosing to loaded, "
LACKS = {
    "torch.distributed.checkpoint": "no checksums, so a flipped byte is loaded; files are synced and its metadata is "
    "written last, but nothing says which step to go on from; loads at any number of ranks",
    "DeepSpeed": "without the moving average (12 bytes a parameter); no checksums; files are not synced, and `latest` "
    "is written before all ranks are done; loads at the same number of ranks alone",
}
Turns = list[dict[str, Any]]


def figure(values: Sequence[float]) -> dict[str, Any]:
    """Median, both ends, and every value."""
    return {**spread(values), "values": list(values)}


def state_section(parameters: int, written_bytes: int, files: int) -> dict[str, Any]:
    """Bytes written beside the state's size."""
    state = STATE_BYTES * parameters
    return {
        "parameters": parameters,
        "state_bytes": state,
        "written_bytes": written_bytes,
        "files": files,
        "ratio": written_bytes / state,
    }


def training_section(
    asynchronous: Sequence[Saving], synchronous: Sequence[Saving], copies_s: Sequence[float]
) -> dict[str, Any]:
    """What saving costs a run, one `Saving` and one bare copy of the state a round."""
    rounds = list(zip(asynchronous, copies_s, strict=True))
    beside = [(run, save) for run in asynchronous for save in run.saves if save.beside]
    return {
        "target": f"standing still at most {BLOCKED_TARGET:.0%} of one step and one copy of the state",
        "step_s": figure([value for run in (*asynchronous, *synchronous) for value in run.quiet_s]),
        "copy_s": figure(copies_s),
        "asynchronous": {
            **_told(asynchronous),
            "first_blocked_s": figure([run.first_blocked_s for run in asynchronous]),
            "still_of_step": figure([save.still_s / run.step_s for run, _ in rounds for save in run.saves]),
            "allowed_of_step": figure([_allowed_s(run, copy_s) / run.step_s for run, copy_s in rounds]),
            "still_of_allowed": figure(
                [save.still_s / _allowed_s(run, copy_s) for run, copy_s in rounds for save in run.saves]
            ),
            "steps_beside": figure([save.beside for run in asynchronous for save in run.saves]),
            "step_beside_of_step": figure([save.beside_s / save.beside / run.step_s for run, save in beside] or [1.0]),
        },
        "synchronous": _told(synchronous),
        "asynchronous_of_synchronous": figure(
            [_cost(one) / _cost(other) for one, other in zip(asynchronous, synchronous, strict=True)]
        ),
    }


def _told(runs: Sequence[Saving]) -> dict[str, Any]:
    def each(value: Any) -> dict[str, Any]:
        return figure([value(run, save) for run in runs for save in run.saves])

    def of(name: str) -> dict[str, Any]:
        return each(lambda run, save: getattr(save, name))

    return {
        "blocked_s": of("blocked_s"),
        "still_s": of("still_s"),
        "seconds": of("seconds"),
        "cost_s": each(lambda run, save: run.cost_s(save)),
        "cost_of_step": each(lambda run, save: run.cost_s(save) / run.step_s),
    }


def _allowed_s(run: Saving, copy_s: float) -> float:
    return BLOCKED_TARGET * run.step_s + copy_s


def _cost(run: Saving) -> float:
    return median(run.cost_s(save) for save in run.saves)


def cases_section(kind: str, cases: Mapping[str, Turns]) -> dict[str, Any]:
    """Seconds and bytes of each way to save or to load, and each beside the plain files; a bucket's beside its own.

    Args:
        kind: "save" or "load".
        cases: the turns of each.
    """
    found: dict[str, Any] = {"against": _AGAINST[kind], "cases": {}, "ratios": {}}
    for name, turns in cases.items():
        extra = {fact: figure([turn["facts"][fact] for turn in turns]) for fact in turns[0]["facts"]}
        seconds = figure([turn["seconds"] for turn in turns])
        found["cases"][name] = {"seconds": seconds, "bytes": median(turn["amount"] for turn in turns), **extra}
        base = _IN_BUCKET[kind] if name.startswith("bucket") else _AGAINST[kind]
        if name != base:
            found["ratios"][name] = times_as_long(turns, cases[base])
    if kind == "load":
        whole = [cases[f"{_CHOSEN}{how}"] for how in ("checksums verified", "sizes compared")]
        found["checksums_add_s"] = figure([a["seconds"] - b["seconds"] for a, b in zip(*whole, strict=True)])
    return found


def times_as_long(turns: Turns, others: Turns) -> dict[str, Any]:
    """How many times as long `turns` take as `others`, round by round."""
    return figure([turn["seconds"] / other["seconds"] for turn, other in zip(turns, others, strict=True)])


def table(facts: Mapping[str, Any]) -> str:
    """All figures, and what the others do not do."""
    state = facts["state"]
    size = f"{state['state_bytes'] / 1e6:.0f} MB"
    rows = [
        *_training_rows(facts["training"], size),
        [
            f"bytes written, for a state of {size} ({STATE_BYTES} bytes a parameter)",
            f"{state['written_bytes'] / 1e6:.1f} MB",
            f"{state['ratio']:.4f}",
            "",
        ],
        *_case_rows("saving", facts["save"], f"{facts['ranks']} ranks"),
        *(
            row
            for ranks, section in facts["load"].items()
            for row in _case_rows("loading", section, f"{ranks} rank(s)")
        ),
    ]
    lacks = [f"- {name}: {text}." for name, text in LACKS.items()]
    return "\n".join([*_HEAD, *("| " + " | ".join(row) + " |" for row in rows), "", *lacks]) + "\n"


def _training_rows(training: Mapping[str, Any], size: str) -> Iterator[list[str]]:
    ours, waited = training["asynchronous"], training["synchronous"]
    allowed = f"≤ {ours['allowed_of_step']['median']:.1%} of a step ({BLOCKED_TARGET:.0%} and one copy)"
    yield ["one undisturbed training step", _seconds(training["step_s"]), "", ""]
    yield [f"one bare copy of the state, {size}", _seconds(training["copy_s"]), "", ""]
    still = f"{_share(ours['still_of_step'])} of a step"
    yield ["asynchronous save: training stands still", _seconds(ours["still_s"]), still, allowed]
    yield ["… beside what the target allows", "", _ratio(ours["still_of_allowed"]), "≤ 1"]
    beside = f"steps while the thread writes ({ours['steps_beside']['median']:g} a save), beside an undisturbed one"
    yield [beside, "", _ratio(ours["step_beside_of_step"]), ""]
    for name, run in (("asynchronous", ours), ("synchronous", waited)):
        yield [
            f"{name} save: all that it costs the run",
            _seconds(run["cost_s"]),
            f"{_share(run['cost_of_step'])} of a step",
            "",
        ]


def _case_rows(verb: str, section: Mapping[str, Any], who: str) -> Iterator[list[str]]:
    for name, case in section["cases"].items():
        ratio = section["ratios"].get(name)
        yield [
            f"{verb} by {who}: {name}",
            f"{_seconds(case['seconds'])}, {case['bytes'] / 1e6:.0f} MB{_beside(case)}",
            _ratio(ratio) if ratio else "",
            "",
        ]
    if "checksums_add_s" in section:
        yield [f"{verb} by {who}: verifying checksums adds", _seconds(section["checksums_add_s"]), "", ""]


def _beside(case: Mapping[str, Any]) -> str:
    return f"; syncing then takes {case['sync_s']['median']:.3f} s" if "sync_s" in case else ""


def _seconds(found: Mapping[str, float]) -> str:
    return f"{found['median']:.3f} s"


def _share(found: Mapping[str, float]) -> str:
    return f"{found['median']:.1%} ({found['min']:.1%} to {found['max']:.1%})"


def _ratio(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def figures(facts: Mapping[str, Any]) -> Iterator[Figure]:
    """What two records are compared by."""
    training = facts["training"]
    yield Figure("a step, s", training["step_s"]["median"], False, noise=0.25)
    for kind in ("asynchronous", "synchronous"):
        yield Figure(f"{kind} save costs, s", training[kind]["cost_s"]["median"], False, noise=0.5)
    sections = {f"saving by {facts['ranks']} ranks": facts["save"]}
    sections |= {f"loading by {ranks} rank(s)": section for ranks, section in facts["load"].items()}
    for verb, section in sections.items():
        for name, ratio in section["ratios"].items():
            if name.startswith(("ours", "bucket: ours")):
                yield Figure(f"{verb}, {name}, beside {section['against']}", ratio["median"], False, noise=0.25)
    yield Figure("bytes written over the state's", facts["state"]["ratio"], False, noise=0.01)
