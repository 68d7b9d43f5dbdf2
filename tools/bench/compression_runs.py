"""The trainings of `regen bench compression`: how fast each arm is, which learning rates, then the arms themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.arms import run_side_by_side
from regen_dist.config import RunConfig, load_saved_config, save_config
from regen_dist.config.files import write_text_atomically
from regen_dist.errors import ConfigError
from regen_dist.evaluation.compression.arms import Arm, tuned_at
from regen_dist.evaluation.compression.budget import (
    best_rate,
    is_trained,
    num_steps,
    pace,
    paced,
    training_facts,
    validation_psnr_db,
)
from regen_dist.jsontext import json_text
from tools import stages

_PROBED_STEPS, _WARM_STEPS = 8, 3
_RATES = (0.5, 1.0, 2.0, 4.0)  # of the config's learning rate
_TUNED_SHARE = 0.25  # of an arm's steps, for each rate that is tried
_NEVER = 10**9


@dataclass(frozen=True)
class Runs:
    """All trainings of one table, in the folder `out`.

    Args:
        config, own: what every arm starts from, and the changes to it.
        base: the same, loaded.
        out: of everything.
        minutes: of one core, for each arm.
        at_once: arms side by side.
        say: told what happens.
    """

    config: Path
    own: Sequence[str]
    base: RunConfig
    out: Path
    minutes: float
    at_once: int
    say: Callable[[str], None]

    def folder(self, arm: Arm) -> Path:
        """Of an arm's run."""
        return self.out / "arms" / arm.name

    def kept(self, arm: Arm) -> Path:
        """Where its measures are kept."""
        return self.out / "measures" / f"{arm.name}.json"

    def claim(self) -> None:
        """Make the folder that of this config and these minutes.

        Raises:
            ConfigError: it is of others: what was trained there would not compare with what is trained now.
        """
        told = self.out / "minutes.json"
        if not told.is_file():
            save_config(self.base, self.out)
            write_text_atomically(told, json_text(self.minutes) + "\n")
        minutes = json.loads(told.read_text(encoding="utf-8"))
        if minutes != self.minutes:
            raise ConfigError(
                f"the arms in {self.out} have {minutes:g} minutes each, now {self.minutes:g} are asked for; give "
                f"--minutes-per-arm {minutes:g}, or another --out"
            )
        if load_saved_config(self.out) != self.base:
            raise ConfigError(
                f"the arms in {self.out} start from another config, see {self.out / 'config.yaml'}; give the same "
                "config and overrides, or another --out"
            )

    def pace(self, arms: Sequence[Arm], *, tune: bool) -> dict[str, dict[str, float]]:
        """How long a step of each arm takes and how many it gets, measured once: later calls find the same."""
        path, wanted = self.out / "pace.json", _unique([*arms, *(_tuned(arms) if tune else ())])
        known: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        new = [arm for arm in wanted if arm.name not in known]
        self._run("probes", {arm.name: self._probe(arm) for arm in new})
        for arm in new:
            measured = pace(self.out / "probes" / arm.name, _WARM_STEPS)
            known[arm.name] = {**measured, "steps": num_steps(self.minutes, measured["cpu_s"])}
            self.say(f"{arm.name}: {measured['cpu_s']:.3f} s a step, {known[arm.name]['steps']} steps")
        write_text_atomically(path, json_text(known, indent=1) + "\n")
        return known

    def tune(self, arms: Sequence[Arm], *, tune: bool) -> dict[str, dict[str, Any]]:
        """The learning rates of the arms, by the name of the arm of k = 16 at which each was chosen (`tuned_at`), by as
        many short runs for each. Where they are not tuned, they are the config's.
        """
        lr, path = self.base.optimizer.lr, self.out / "tuning.json"
        if not tune:
            return {arm.name: {"lr": lr, "at_edge": False, "tried": []} for arm in _tuned(arms)}
        known: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        tried = {arm: [lr * factor for factor in _RATES] for arm in _tuned(arms) if arm.name not in known}
        self._run(
            "tuning", {_tuning_name(arm, lr): self._tuning(arm, lr) for arm, rates in tried.items() for lr in rates}
        )
        for arm, rates in tried.items():
            folder = self.out / "tuning_runs"
            results = [{"lr": lr, "psnr_db": validation_psnr_db(folder / _tuning_name(arm, lr))} for lr in rates]
            known[arm.name] = best_rate(results)
            self.say(f"{arm.name}: learning rate {known[arm.name]['lr']:.2g}")
        write_text_atomically(path, json_text(known, indent=1) + "\n")
        return known

    def train(self, arms: Sequence[Arm], tuning: Mapping[str, Mapping[str, Any]]) -> None:
        """Train what is not trained."""
        steps = {name: int(each["steps"]) for name, each in self._known_pace().items()}
        left = [arm for arm in arms if not is_trained(self.folder(arm), steps[arm.name])]
        commands = {}
        for arm in left:
            changes = paced(arm.overrides(self.base), steps[arm.name], self.base.optimizer.warmup_steps)
            commands[arm.name] = self._command([*changes, f"optimizer.lr={tuning[tuned_at(arm).name]['lr']}"])
        self._run("arms", commands)

    def facts(self, arm: Arm) -> dict[str, Any]:
        """What the JSON says of an arm, but for its measures."""
        told = {name: getattr(arm, name) for name in ("kind", "k", "variant", "label", "against")}
        training = training_facts(self.folder(arm))
        return {
            **told,
            "overrides": arm.overrides(self.base),
            "pace": self._known_pace()[arm.name],
            "training": training,
        }

    def _known_pace(self) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = json.loads((self.out / "pace.json").read_text(encoding="utf-8"))
        return found

    def _probe(self, arm: Arm) -> list[str]:
        changes = paced(arm.overrides(self.base), _PROBED_STEPS, self.base.optimizer.warmup_steps)
        rhythm = ["train.log_every=1", f"train.validate_every={_NEVER}", f"checkpoint.every={_NEVER}"]
        return self._command([*changes, *rhythm, f"output={self.out / 'probes'}"])

    def _tuning(self, arm: Arm, lr: float) -> list[str]:
        steps = max(2, int(_TUNED_SHARE * self._known_pace()[arm.name]["steps"]))
        changes = paced(arm.overrides(self.base), steps, self.base.optimizer.warmup_steps)
        own = [f"optimizer.lr={lr}", f"name={_tuning_name(arm, lr)}", f"output={self.out / 'tuning_runs'}"]
        return self._command([*changes, *own])

    def _command(self, changes: Sequence[str]) -> list[str]:
        return stages.command(["train", str(self.config), *self.own, *changes])

    def _run(self, what: str, commands: Mapping[str, Sequence[str]]) -> None:
        if not commands:
            return
        self.say(f"{what}: {len(commands)} to train, {self.at_once} at a time")
        run_side_by_side(
            commands, logs=self.out / "logs" / what, at_once=self.at_once, done=lambda name: self.say(f"done: {name}")
        )


def _tuned(arms: Iterable[Arm]) -> list[Arm]:
    """The arms at which the learning rates of these are chosen."""
    return _unique(map(tuned_at, arms))


def _unique(arms: Iterable[Arm]) -> list[Arm]:
    return list({arm.name: arm for arm in arms}.values())


def _tuning_name(arm: Arm, lr: float) -> str:
    return f"{arm.name}-lr{lr:.2g}"
