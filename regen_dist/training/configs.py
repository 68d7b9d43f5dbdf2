"""The config of a run folder when the run goes on by another: changes are reported, and the earlier one is kept.

RUN/config.yaml             the current one
RUN/config-00000400.yaml    the one before it, by which the run came to step 400
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regen_dist.config import AnyRunConfig, load_saved_config, save_config
from regen_dist.config.files import CONFIG_FILE, write_text_atomically
from regen_dist.errors import ConfigError
from regen_dist.training.metrics import learning_rate


def replace_config(config: AnyRunConfig, step: int) -> list[str]:
    """Make `config` the one of its run folder, from `step` on. Returns what to report: each key that has
    changed, and the learning rate before and after. If the disk takes no config, the run goes on, with a warning."""
    told: list[str] = []
    try:
        if (config.folder / CONFIG_FILE).is_file():
            told = _changes(config, step)
            if told:
                told.append(f"the earlier config is {_keep(config.folder, step)}")
        save_config(config, config.folder)
    except OSError as error:
        told.append(f"warning: {config.folder / CONFIG_FILE} is not the config of this start: {error}")
    return told


def _changes(config: AnyRunConfig, step: int) -> list[str]:
    try:
        earlier = load_saved_config(config.folder)
    except ConfigError as error:
        return [f"the config was replaced after step {step}; it cannot be compared: {error}"]
    old, new = (_flat(each.model_dump(mode="json")) for each in (earlier, config))
    keys = [key for key in {**old, **new} if old.get(key, _ABSENT) != new.get(key, _ABSENT)]
    told = [f"{key}: {old.get(key, _ABSENT)} → {new.get(key, _ABSENT)}" for key in keys]
    if not told:
        return []
    return [f"the config changed after step {step}: {'; '.join(told)}", *_rates(earlier, config, step)]


_ABSENT = "(none)"


def _rates(earlier: AnyRunConfig, config: AnyRunConfig, step: int) -> list[str]:
    """Compare the learning rate of the next step with the one by the earlier config; empty if they are the same."""
    now = learning_rate(config.optimizer, step, config.train.steps)
    would = learning_rate(earlier.optimizer, step, earlier.train.steps)
    before = learning_rate(earlier.optimizer, max(step - 1, 0), earlier.train.steps)
    if now == would and step < earlier.train.steps:
        return []
    last = f"; step {step} had {before:.4g}" if step else ""
    return [f"the learning rate of step {step + 1} is {now:.4g}, by the earlier config it was {would:.4g}{last}"]


def _keep(folder: Path, step: int) -> Path:
    """A copy of the config that is there, under a name that is free, or that holds the same."""
    text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
    stem, number = f"config-{step:08d}", 1
    while True:
        path = folder / (f"{stem}.yaml" if number == 1 else f"{stem}-{number}.yaml")
        if not path.exists():
            write_text_atomically(path, text)
            return path
        if path.read_text(encoding="utf-8") == text:
            return path
        number += 1


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
