"""Every value of a choice of the config has one entry in its registry, and a registry has nothing else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from safetensors.torch import load_file

from regen_dist.checkpoint.export import import_model
from regen_dist.config import EmbedderConfig, T2VConfig
from regen_dist.config.embedder import AttentionConfig, ModelConfig
from regen_dist.config.run import EngineConfig, OptimizerConfig, Section
from regen_dist.config.t2v import T2VModelConfig
from regen_dist.distributed.optimizer import OPTIMIZERS, Groups, OptimizerEntry
from regen_dist.distributed.zero3 import ENGINES
from regen_dist.errors import BackendError
from regen_dist.inference.export import ExportOptions, export_model
from regen_dist.models.attention_kernels import BACKENDS
from regen_dist.models.text.encoder import TEXT_ENCODERS
from regen_dist.models.text.files import EncoderKind
from regen_dist.registry import REQUIREMENTS, Entry, Registry, Site
from regen_dist.training.run import TASKS, train
from tests.helpers.checkpoints import folder_of, newest, saved_run
from tests.helpers.tiny import tiny_run

CHOICES: dict[tuple[type[Section], str], Registry[Any]] = {
    (AttentionConfig, "backend"): BACKENDS,
    (OptimizerConfig, "kind"): OPTIMIZERS,
    (EngineConfig, "kind"): ENGINES,
    (ModelConfig, "kind"): TASKS,
    (T2VModelConfig, "kind"): TASKS,
}
# Words that switch a branch of one function, and build nothing.
SWITCHES = {
    "EngineConfig.precision", "WandbConfig.mode", "CheckpointConfig.on_failure", "CheckpointConfig.verify",
    "CheckpointConfig.best_is", "SpikeConfig.action", "LatentStdConfig.action", "ConditioningConfig.kind",
    "ConditioningConfig.time", "AttentionConfig.pattern", "ModelConfig.linear_start", "DensityConfig.kind",
    "DiffusionConfig.path", "DiffusionConfig.target", "DiffusionConfig.weighting", "DiffusionConfig.sampler",
    "FlowConfig.sampler", "ZeroConfig.communication_dtype", "EncoderConfig.kind", "EncoderConfig.precision",
    "AdversarialConfig.loss", "AdversarialConfig.regularisation",
}  # fmt: skip


def _words(section: type[Section], field: str) -> tuple[str, ...]:
    annotation = section.model_fields[field].annotation
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _sections(section: type[Section]) -> Iterator[type[Section]]:
    """A section and all that lie in it."""
    yield section
    for field in section.model_fields.values():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, Section):
                yield from _sections(part)


def test_each_value_of_a_choice_has_one_entry() -> None:
    values: dict[int, list[str]] = {}
    for (section, field), registry in CHOICES.items():
        values.setdefault(id(registry), []).extend(_words(section, field))
    for registry in {id(each): each for each in CHOICES.values()}.values():
        assert sorted(registry) == sorted(values[id(registry)]), registry
    assert sorted(TEXT_ENCODERS) == sorted(get_args(EncoderKind)), "found in the encoder's folder, not in the config"


def test_each_requirement_is_of_a_value() -> None:
    keys = {(registry.key, value) for registry in [*CHOICES.values(), TEXT_ENCODERS] for value in registry}
    assert REQUIREMENTS.keys() <= keys


def test_a_new_choice_is_put_somewhere() -> None:
    """A field of words is a choice with a registry, or a switch that is named here."""
    found = {
        (section, field)
        for run in (EmbedderConfig, T2VConfig)
        for section in _sections(run)
        for field in section.model_fields
        if len(_words(section, field)) > 1 and all(isinstance(word, str) for word in _words(section, field))
    }
    missing = {f"{section.__name__}.{field}" for section, field in found - CHOICES.keys()}
    assert missing == SWITCHES


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = Site("cpu"), Site("cuda", packages=False)
    assert BACKENDS.reason("sdpa", cpu) == BACKENDS.reason("flash", cuda) == ""
    assert "needs a CUDA device" in BACKENDS.reason("flash", cpu)
    assert OPTIMIZERS.reason("cpu_adam", Site("cpu", engine="zero3")) == OPTIMIZERS.reason("fused_adam", cuda) == ""
    assert "set engine.kind=zero3" in OPTIMIZERS.reason("cpu_adam", cpu)
    assert "needs a CUDA device" in OPTIMIZERS.reason("fused_adam", cpu)
    assert ENGINES.reason("zero3", Site(num_ranks=4)) == ENGINES.reason("plain", cpu) == ""
    assert TEXT_ENCODERS.reason("t5", cpu) == TEXT_ENCODERS.reason("auto", cpu) == ""
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert "regen-dist[text]" in TEXT_ENCODERS.reason("t5", cpu)
    assert TEXT_ENCODERS.reason("auto", cpu) == TEXT_ENCODERS.reason("t5", Site(packages=False)) == ""
    assert "found 4 ranks" in ENGINES.reason("plain", Site(num_ranks=4))
    with pytest.raises(BackendError, match=r"a\.b=three is not known; set it to one of one, two"):
        _ = Registry("a.b", {"one": Entry(1), "two": Entry(2)})["three"]


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
def test_a_new_optimizer_is_one_entry(tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one line it trains, its own state goes into checkpoints, a resumed run ends where a straight one does, and
    imported weights begin with that state at zero: nothing but its entry knows of it."""

    def sgd(groups: Groups, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)

    more = {**OPTIMIZERS, "sgd": OptimizerEntry(sgd, state=("momentum_buffer",))}
    monkeypatch.setattr(OPTIMIZERS, "_entries", more)

    def config(name: str, steps: int) -> EmbedderConfig:
        run = tiny_run(tmp_path, tiny_shards, name=name, train__steps=steps, optimizer__warmup_steps=0,
                       optimizer__min_lr_ratio=1.0)  # fmt: skip
        return run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"kind": "sgd"})})

    for name, steps in (("straight", 4), ("resumed", 2), ("resumed", 4)):
        assert train(config(name, steps)) == 0
    readers = [folder_of(tmp_path / name).reader(newest(tmp_path / name)) for name in ("straight", "resumed")]
    shapes = newest(tmp_path / "straight").shapes
    for kind in ("master", "ema", "momentum_buffer"):
        for parameter in shapes:
            one, two = (reader.whole(f"{kind}/{parameter}") for reader in readers)
            assert torch.equal(one, two), f"{kind}/{parameter}"
    assert any(readers[0].whole(f"momentum_buffer/{parameter}").any() for parameter in shapes)
    export_model(saved_run(tmp_path / "source").folder, tmp_path / "model", ExportOptions(statistics_clips=0))
    import_model(tmp_path / "model", imported := config("imported", 4))
    keys = {key for shard in imported.folder.glob("checkpoints/step-*/*.safetensors") for key in load_file(shard)}
    assert {key.partition("/")[0] for key in keys} == {"master", "ema", "momentum_buffer"}
