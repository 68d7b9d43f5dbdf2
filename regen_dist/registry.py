"""Registries: tables from the values of a choice of the config (attention backend, optimizer, engine, task, text
encoder) to what they build.

A new value is one file with what it builds, one line in its registry, and its name in the config's Literal. What it
needs of its machine stands in `REQUIREMENTS`. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

from regen_dist.errors import BackendError, missing_extra

# Requirements of the config's choices: the device, the ranks and the packages that a value needs.
#
# Training asks here at its start and `regen check` before it, on a machine that may have neither GPUs nor torch:
# nothing is imported. A value without an entry runs anywhere.


@dataclass(frozen=True)
class Site:
    """Circumstances in which a value of a choice is to run.

    Args:
        device: type of each rank's device, "cpu" or "cuda".
        precision: precision of the working weights: "bf16", "fp16" or "fp32".
        engine: kind of the engine.
        num_ranks: ranks of the run.
        packages: true if the ranks run in this Python, so that its packages count.
    """

    device: str = "cpu"
    precision: str = "bf16"
    engine: str = "plain"
    num_ranks: int = 1
    packages: bool = True


Requirement = Callable[[str, Site], Iterator[str]]  # config key and site to "problem; remedy"


def flash(key: str, site: Site) -> Iterator[str]:
    """FlashAttention: a CUDA device, half precision, and one of its packages."""
    if site.device != "cuda":
        yield f"{key}=flash needs a CUDA device, found {site.device}; set {key}=sdpa"
    elif site.precision not in ("bf16", "fp16"):
        yield f"{key}=flash computes in bf16, found {site.precision}; set engine.precision=bf16, or {key}=sdpa"
    if site.packages and not any(map(is_installed, ("flash_attn", "flash_attn_interface"))):
        yield f"{key}=flash needs the package flash-attn; install it, or set {key}=sdpa"


def fused_adam(key: str, site: Site) -> Iterator[str]:
    """apex's FusedAdam: a CUDA device, and NVIDIA's apex."""
    if site.device != "cuda":
        yield f"{key}=fused_adam (apex) needs a CUDA device, found {site.device}; set {key}=adamw"
    if site.packages and not is_installed("apex", "optimizers"):
        yield (
            f"{key}=fused_adam needs NVIDIA apex, which is built from source (see environment.yml; PyPI's `apex` is "
            f"another package); or set {key}=adamw"
        )


def cpu_adam(key: str, site: Site) -> Iterator[str]:
    """DeepSpeed's CPU Adam: a model on the CPU, under ZeRO-3."""
    if site.device != "cpu":
        yield f"{key}=cpu_adam keeps its state on the CPU, the model is on {site.device}; set {key}=adamw"
    if site.engine != "zero3":
        yield f"{key}=cpu_adam is DeepSpeed's; set engine.kind=zero3, or {key}=adamw"


def one_process(key: str, site: Site) -> Iterator[str]:
    """Plain PyTorch: one rank."""
    if site.num_ranks > 1:
        yield f"{key}=plain trains in one process, found {site.num_ranks} ranks; set {key}=zero3"


def text_encoder(key: str, site: Site) -> Iterator[str]:
    """Any text encoder: transformers."""
    if site.packages and not is_installed("transformers"):
        yield missing_extra("a text encoder", "transformers")


def t5_encoder(key: str, site: Site) -> Iterator[str]:
    """A T5 with its own tokenizer: sentencepiece, too."""
    yield from text_encoder(key, site)
    if site.packages and not is_installed("sentencepiece"):
        yield missing_extra("a text encoder", "sentencepiece")


REQUIREMENTS: Mapping[tuple[str, str], Requirement] = {
    ("attention.backend", "flash"): flash,
    ("engine.kind", "plain"): one_process,
    ("optimizer.kind", "cpu_adam"): cpu_adam,
    ("optimizer.kind", "fused_adam"): fused_adam,
    ("text.encoder", "auto"): text_encoder,
    ("text.encoder", "t5"): t5_encoder,
}


def problems(choice: str, value: str, site: Site, key: str = "") -> Iterator[str]:
    """Yield why a value cannot run at a site, each with its remedy.

    Args:
        choice: key of the choice, as its registry has it.
        value: value of the choice.
        site: machine and Python that run it.
        key: key of the config in the messages, where it is longer.
    """
    requirement = REQUIREMENTS.get((choice, value))
    if requirement is not None:
        yield from requirement(key or choice, site)


def is_installed(package: str, part: str = "") -> bool:
    """Return whether a package can be found without importing it (by a part that distinguishes it from another package
    of the same name)."""
    found = find_spec(package)
    places = found.submodule_search_locations if found else None
    return any((Path(place) / part).exists() for place in places or ())


Builder = TypeVar("Builder")
AnyEntry = TypeVar("AnyEntry", bound="Entry[Any]")


@dataclass(frozen=True)
class Entry(Generic[Builder]):
    """One value of a choice.

    Args:
        build: the builder: makes the value's object, or computes it.
        state: the kinds of tensors that it adds to a checkpoint for every parameter.
    """

    build: Builder
    state: tuple[str, ...] = ()


class Registry(Mapping[str, AnyEntry]):
    """The values of one choice of the config.

    Args:
        key: key of the config.
        entries: an entry for each value.
    """

    def __init__(self, key: str, entries: Mapping[str, AnyEntry]) -> None:
        self.key, self._entries = key, dict(entries)

    def __getitem__(self, name: str) -> AnyEntry:
        if name not in self._entries:
            raise BackendError(f"{self.key}={name} is not known; set it to one of {', '.join(self._entries)}")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def available(self, name: str, site: Site) -> AnyEntry:
        """The entry of a value that can run at a site.

        Raises:
            BackendError: it cannot, with the reason and the remedy.
        """
        entry = self[name]
        if reason := self.reason(name, site):
            raise BackendError(reason)
        return entry

    def reason(self, name: str, site: Site) -> str:
        """Return the reason why a value cannot run at a site; empty if it can."""
        return next(problems(self.key, name, site), "")
