"""Sweeps: one run for each value of a key, as one array."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from launcher.cluster import ClusterConfig
from launcher.submitting import Order, train_task
from regen_dist.config import AnyRunConfig, load_config
from regen_dist.config.yamlfile import parse_yaml
from regen_dist.errors import ConfigError

_SUFFIX = "-sweep"


def expand(config: Path, overrides: Sequence[str], sweeps: Sequence[str]) -> list[tuple[AnyRunConfig, str]]:
    """The config of every run of a sweep, and the name of the run that all of them change.

    Each is named after what is its own: `nano` swept over `optimizer.lr=1e-3,3e-3` gives `nano-lr1e-3`, `nano-lr3e-3`.

    Args:
        config: a YAML file.
        overrides: of every run.
        sweeps: `a.b=value,value`; several give every combination.

    Raises:
        ConfigError: a sweep cannot be read, has one value, or gives two runs of one name; or a run's config is wrong.
    """
    base = load_config(config, overrides).name
    runs = []
    for chosen in itertools.product(*map(_choices, sweeps)):
        name = "-".join([base, *(f"{key.rpartition('.')[2]}{_plain(text)}" for key, text in chosen)])
        own = [*(f"{key}={text}" for key, text in chosen), f"name={name}"]
        runs.append((load_config(config, [*overrides, *own]), base))
    names = [run.name for run, _ in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"two runs of the sweep would be named {', '.join(twice)}; give values that differ in letters"
        )
    return runs


def _choices(sweep: str) -> list[tuple[str, str]]:
    """`a.b=[1, 2],[3, 4]` as its key with each of its values, as they were written."""
    key, equals, text = sweep.partition("=")
    values = _split(text)
    if not equals or not key or len(values) < 2:
        raise ConfigError(
            f"--sweep {sweep}: found {len(values)} value(s); write a.b=value,value, as optimizer.lr=1e-3,3e-3"
        )
    return [(key, value) for value in values]


def _split(text: str) -> list[str]:
    """At the commas that stand in no bracket and in no quotes, as YAML sees them."""
    try:
        parse_yaml(f"[{text}]")
    except yaml.YAMLError as error:
        raise ConfigError(f"--sweep …={text}: not valid YAML: {' '.join(str(error).split())}") from None
    node: Any = yaml.compose(f"[{text}]", Loader=yaml.SafeLoader)
    return [f"[{text}]"[each.start_mark.index : each.end_mark.index] for each in node.value]


def _plain(text: str) -> str:
    """A value as part of a name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("_")


def sweep_order(runs: Sequence[tuple[AnyRunConfig, str]], cluster: ClusterConfig, cluster_name: str) -> Order:
    """The runs as one array. Each keeps its own folder; the array's stands beside them, by the name NAME-sweep."""
    configs = tuple(config for config, _ in runs)
    name = f"{runs[0][1]}{_SUFFIX}"
    base = configs[0].folder.absolute().parent / name
    return Order(name, "sweep", base, tuple(map(train_task, configs)), cluster, cluster_name, configs)
