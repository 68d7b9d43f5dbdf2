"""Whether metrics can be sent to where the config wants them."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from launcher.preflight.findings import Finding, Subject, by_run, problem
from regen_dist.config import AnyRunConfig

_SERVICE = "https://api.wandb.ai"


def wandb_key(subject: Subject) -> Iterator[Finding]:
    """A key is there for wandb.mode=online."""
    given = {**os.environ, **subject.order.cluster.environment}

    def look(config: AnyRunConfig) -> Iterator[Finding]:
        if config.wandb.mode == "online" and not given.get("WANDB_API_KEY") and not _in_netrc(given):
            yield problem(
                f"wandb.mode=online, but there is no key: WANDB_API_KEY is not set, and {_netrc(given)} has none for "
                f"{_host(given)}; run `wandb login`, or set wandb.mode=offline"
            )

    yield from by_run(subject.configs, look)


def _in_netrc(given: dict[str, str]) -> bool:
    try:
        return netrc.netrc(_netrc(given)).authenticators(_host(given)) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _netrc(given: dict[str, str]) -> Path:
    return Path(given.get("NETRC") or "~/.netrc").expanduser()


def _host(given: dict[str, str]) -> str:
    return urlsplit(given.get("WANDB_BASE_URL") or _SERVICE).hostname or ""
