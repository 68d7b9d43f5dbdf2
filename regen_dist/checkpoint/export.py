"""Exported models, usable without their run and without DeepSpeed; and the loading of trained models from exports and
runs. An export is a folder with one safetensors file and a config.

EXPORT/model.safetensors    all parameters, unsharded, under the model's own names
EXPORT/config.yaml          model config and origin of the weights (config/exported.py)
EXPORT/statistics.json      embedder only, optional: mean and std of each latent channel (inference/latent_space.py)
EXPORT/latent_space/        text-to-video only: description of its latents and texts (inference/latent_space.py)
EXPORT/README.md            the model card
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from regen_dist.checkpoint.claims import Claims
from regen_dist.checkpoint.folder import CheckpointFolder, newest_good
from regen_dist.checkpoint.manifest import CheckpointManifest
from regen_dist.checkpoint.shards import nonfinite, shard_name
from regen_dist.config import AnyRunConfig, EmbedderConfig, config_hash, embedder_only, load_saved_config, save_config
from regen_dist.config.embedder import ModelConfig
from regen_dist.config.exported import (
    EXPORT_CONFIG_FILE,
    AnyExportConfig,
    CommonExportConfig,
    ExportConfig,
    T2VExportConfig,
    load_any_export_config,
    load_export_config,
    load_t2v_export_config,
)
from regen_dist.config.files import t2v_only
from regen_dist.config.run import Section
from regen_dist.config.t2v import T2VModelConfig
from regen_dist.config.version import code_version
from regen_dist.data.storage.connection import limits_of
from regen_dist.data.storage.local import file_sha256
from regen_dist.distributed.engine import WEIGHTS
from regen_dist.distributed.optimizer import OPTIMIZERS
from regen_dist.errors import CheckpointError
from regen_dist.models.embedder import Baseline, Regen, build_model
from regen_dist.models.perceptual import PatchDiscriminator
from regen_dist.models.t2v import TextToVideo
from regen_dist.shared_files import sync

MODEL_FILE, STATISTICS_FILE, CARD_FILE = "model.safetensors", "statistics.json", "README.md"
Weights = Literal["ema", "plain"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_NAMED = 4  # number of parameters that a message lists


def is_export(folder: Path) -> bool:
    """Return true if a folder is an exported model rather than a run."""
    return (folder / MODEL_FILE).is_file()


def open_run(run: Path) -> tuple[AnyRunConfig, CheckpointFolder]:
    """Return the config of a run and its checkpoint folder: the one in `run`, even if it was moved, or the config's
    checkpoint URL.

    Raises:
        ConfigError: the folder is not a run.
    """
    config = load_saved_config(run)
    url = run / "checkpoints" if config.checkpoint.url is None else config.checkpoints
    return config, CheckpointFolder(url, limits_of(config.data.read))


def find_checkpoint(folder: CheckpointFolder, step: int | None = None, *, checksums: bool) -> CheckpointManifest:
    """Return the checkpoint of a step, or the newest good one.

    Args:
        folder: checkpoint folder of the run.
        step: step of the checkpoint; None selects the newest good one.
        checksums: verify the checksum of every file, not only its size.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if step is None:
        newest = newest_good(folder, checksums=checksums)
        if newest is None:
            raise CheckpointError(
                f"{folder.url} has no checkpoint yet; train it with `regen train`, or wait for its first "
                "checkpoint.every"
            )
        return newest
    if step not in (steps := folder.steps()):
        held = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"{folder.url} has no checkpoint of step {step}; there are: {held}")
    manifest = folder.manifest(step)
    if problems := folder.problems(manifest, checksums=checksums):
        raise CheckpointError(f"the checkpoint of step {step} in {folder.url} is damaged: {'; '.join(problems)}")
    return manifest


def checkpoint_weights(
    folder: CheckpointFolder, manifest: CheckpointManifest, weights: Weights, prefix: str = ""
) -> dict[str, Tensor]:
    """Return the unsharded float32 parameters whose names begin with `prefix`: the EMA ones, or those of the last step.
    The others are not read."""
    kind = "ema" if weights == "ema" else "master"
    shapes = {name: shape for name, shape in manifest.shapes.items() if name.startswith(prefix)}
    wanted = {f"{kind}/{name}": (0, prod(shape)) for name, shape in shapes.items()}
    flat = folder.reader(manifest).read_all(wanted)
    found = {key.split("/", 1)[1]: tensor.view(shapes[key.split("/", 1)[1]]) for key, tensor in flat}
    check_finite(found, f"the {weights} weights of step {manifest.step} in {folder.url}")
    return found


def check_finite(weights: Mapping[str, Tensor], what: str) -> None:
    """Raise CheckpointError if a weight is not finite; `what` describes the weights in the message."""
    if broken := nonfinite(weights):
        raise CheckpointError(
            f"{what} are not finite in {len(broken)} of {len(weights)} parameters, among them {broken[0]}: training "
            "had diverged. Use an earlier checkpoint (--step), or continue training from one with a lower optimizer.lr"
        )


def write_model(path: Path, weights: Mapping[str, Tensor], dtype: str) -> str:
    """Write the weights as `float32` or `bfloat16`, synced to disk, and return the file's SHA-256; raise
    CheckpointError if a converted weight is not finite."""
    stored = {name: tensor.to(_DTYPES[dtype]).contiguous() for name, tensor in weights.items()}
    check_finite(stored, f"the weights as {dtype}")
    try:
        save_file(stored, path, {"format": "pt"})
    except SafetensorError as error:  # only its text says that the disk is full
        raise CheckpointError(f"{path} cannot be written: {error}; make room there, or name another place") from None
    sync(path)
    return file_sha256(path)


def read_model(folder: Path, config: CommonExportConfig, prefix: str = "") -> dict[str, Tensor]:
    """Return the weights of an exported model whose names begin with `prefix`, in the stored dtype. Other tensors are
    not loaded; the checksum covers the whole file.

    Raises:
        CheckpointError: the file is missing, damaged, or its SHA-256 differs from the config's.
    """
    path = folder / MODEL_FILE
    try:
        if config.sha256 is not None and file_sha256(path) != config.sha256:
            raise CheckpointError(
                f"{path} does not have the SHA-256 in its config: copy it again; or, if it was changed on "
                f"purpose, remove the line `sha256` from {folder / EXPORT_CONFIG_FILE}"
            )
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a dict
            found = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; copy it again, or export the run again") from error
    check_finite(found, f"the weights in {path}")
    return found


def check_weights(folder: Path, config: CommonExportConfig, weights: Weights | None) -> None:
    """Raise CheckpointError if an export holds other weights than those requested; None accepts any."""
    if weights not in (None, config.weights):
        raise CheckpointError(
            f"{folder} holds the {config.weights} weights alone; export the run again with --weights {weights}"
        )


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shape of every parameter of an exported model without reading weights."""
    path = folder / MODEL_FILE
    try:
        with safe_open(path, framework="pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; copy it again, or export the run again") from error


def model_shapes(config: ModelConfig | T2VModelConfig) -> dict[str, list[int]]:
    """Return the shape of every parameter of the model that a config describes; nothing is allocated."""
    return {name: list(param.shape) for name, param in _on_meta(config).named_parameters()}


def discriminator_shapes(config: AnyRunConfig) -> dict[str, list[int]] | None:
    """Return the shape of every parameter of the discriminator that a config asks for; None where it asks for none."""
    if not isinstance(config, EmbedderConfig) or config.train.losses.adversarial.weight == 0:
        return None
    with torch.device("meta"):
        parameters = PatchDiscriminator(config.train.losses.adversarial).named_parameters()
    return {name: list(param.shape) for name, param in parameters}


def check_shapes(found: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Compare parameters by name and shape.

    Raises:
        CheckpointError: they differ; the message lists the first few. `what` describes the found ones.
    """
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not in the model" for name in found if name not in wanted]
    problems += [
        f"{name} has the shape {list(found[name])}, the model's has {list(shape)}"
        for name, shape in wanted.items()
        if name in found and list(found[name]) != list(shape)
    ]
    if problems:
        more = f", and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise CheckpointError(f"{what} do not fit the config's model: {'; '.join(problems[:_NAMED])}{more}")


@overload
def build_with_weights(config: ModelConfig, weights: Mapping[str, Tensor], what: str) -> Regen | Baseline: ...


@overload
def build_with_weights(config: T2VModelConfig, weights: Mapping[str, Tensor], what: str) -> TextToVideo: ...


def build_with_weights(
    config: ModelConfig | T2VModelConfig, weights: Mapping[str, Tensor], what: str
) -> Regen | Baseline | TextToVideo:
    """Build the model that a config describes from these weights, without a copy; raise CheckpointError if they do not
    fit. `what` describes the weights in the message."""
    model = _on_meta(config)
    shapes = {name: list(param.shape) for name, param in model.named_parameters()}
    check_shapes({name: tensor.shape for name, tensor in weights.items()}, shapes, what)
    model.load_state_dict(weights, assign=True)
    return model


def _on_meta(config: ModelConfig | T2VModelConfig) -> Regen | Baseline | TextToVideo:
    with torch.device("meta"):
        return build_model(config)


# --- import: an exported model becomes checkpoint 0 of a run, from which any number of ranks train ---

# Settings that do not change what the weights compute: the attention kernel, training-only noise, and the defaults of
# generation.
_FREE = {
    "model.decoder.attention.backend",
    "model.attention.backend",
    "model.latent.noise_std",
    "model.linear_start",
    "diffusion.guidance",
}


def import_model(export: Path, config: AnyRunConfig, prepare: Callable[[], None] = lambda: None) -> list[str]:
    """Commit checkpoint 0 of the run that `config` describes: masters and EMA are the exported weights, the moments
    are zero, and no data was seen.

    Args:
        export: exported model.
        config: config of the new run.
        prepare: writes what else the run folder needs. It is called before the commit, after which the same import is
            refused.

    Returns:
        settings that differ between the export and the config and change what the weights compute.

    Raises:
        CheckpointError: the export is damaged or does not fit the config's model, or the run has checkpoints.
        RunBusy: a process trains the run.
    """
    Claims(config).refuse_if_taken()  # its first save may be in progress
    exported = load_any_export_config(export)
    _check_kind(export, exported, config)
    shapes = model_shapes(config.model)
    check_shapes(stored_shapes(export), shapes, f"the parameters in {export}")
    folder = CheckpointFolder(config.checkpoints, limits_of(config.data.read))
    if steps := folder.steps():
        raise CheckpointError(
            f"{folder.url} holds {len(steps)} checkpoints, the newest of step {steps[-1]}; give the run another name"
        )
    folder.begin(0)
    name = shard_name(0, 1)
    facts = folder.write_shard(0, name, _pieces(read_model(export, exported), OPTIMIZERS[config.optimizer.kind].state))
    save_config(config, config.folder)
    prepare()
    folder.commit(_manifest(export, exported, config, shapes).with_files({name: facts}))
    return differences(exported, config)


def differences(exported: AnyExportConfig, config: AnyRunConfig) -> list[str]:
    """Describe the model and diffusion settings that differ from those of the weights' training."""
    pairs: list[tuple[str, Section, Section]] = [("model", exported.model, config.model)]
    if config.model.kind != "magvit2":
        pairs.append(("diffusion", exported.diffusion, config.diffusion))
    found = []
    for section, before, now in pairs:
        then, here = (dict(_leaves(each.model_dump(mode="json"), section)) for each in (before, now))
        found += [
            f"{name} is {here.get(name)}, the weights were trained with {then.get(name)}"
            for name in {**then, **here}
            if name not in _FREE and then.get(name) != here.get(name)
        ]
    return found


def _check_kind(export: Path, exported: AnyExportConfig, config: AnyRunConfig) -> None:
    """Refuse an export of another task. REGEN and the baseline are distinguished later, by their parameters."""
    if (exported.model.kind == "t2v") != (config.task == "t2v"):
        raise CheckpointError(
            f"{export} holds a model of kind {exported.model.kind}, the config is of task {config.task}; give a config "
            "of the same kind of run"
        )


def _leaves(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", value


def _pieces(weights: dict[str, Tensor], moments: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the complete state as the shard of a single rank; the zeros are expanded views without memory."""
    flat = {name: tensor.to(torch.float32).reshape(-1) for name, tensor in weights.items()}
    pieces = {f"{kind}/{name}": tensor for kind in WEIGHTS for name, tensor in flat.items()}
    zero = torch.zeros(1)
    return pieces | {f"{kind}/{name}": zero.expand(len(tensor)) for kind in moments for name, tensor in flat.items()}


def _manifest(
    export: Path, exported: AnyExportConfig, config: AnyRunConfig, shapes: dict[str, list[int]]
) -> CheckpointManifest:
    origin = None if exported.origin is None else exported.origin.model_dump(mode="json")
    imported = {"from": str(export), "weights": exported.weights, "origin": origin}
    return CheckpointManifest(
        step=0,
        samples=0,
        config_hash=config_hash(config),
        version=code_version(),
        topology={"world_size": 1, "engine": "import", "precision": config.engine.precision},
        state={"num_updates": 0, "data_shift": 0, "guards": {}, "data": None, "imported": imported},
        metrics={},
        rollbacks=[],
        shapes=shapes,
    )


# Loading of trained models, from the newest good checkpoint of a run folder or from an exported model.

Config = TypeVar("Config", ExportConfig, T2VExportConfig)
_OMITTED = ("samples", "data", "metrics")  # fields of an origin that records of generated files leave out


@dataclass(frozen=True)
class SavedModel(Generic[Config]):
    """Trained model whose weights are not read yet.

    Args:
        path: the run folder, or the exported model.
        config: the export config: model settings and choice of weights.
        run: config of the run; None for an export.
        folder: checkpoints of the run; None for an export.
    """

    path: Path
    config: Config
    run: AnyRunConfig | None = None
    folder: CheckpointFolder | None = None

    @cached_property
    def manifest(self) -> CheckpointManifest | None:
        """Return the newest good checkpoint of a run; None for an export. Raise CheckpointError if there is none."""
        return None if self.folder is None else find_checkpoint(self.folder, checksums=False)

    @property
    def step(self) -> int:
        """Return the optimizer steps of its training; 0 for an export without an origin."""
        if self.manifest is not None:
            return self.manifest.step
        return 0 if self.config.origin is None else self.config.origin.step

    @property
    def name(self) -> str:
        """Return the name of its training run; the folder's name for an export without an origin."""
        if self.run is not None:
            return self.run.name
        return self.path.name if self.config.origin is None else self.config.origin.run

    @property
    def data(self) -> Mapping[str, Any] | None:
        """Facts about the data it was trained on, as its checkpoint or export has them."""
        if self.manifest is not None:
            return self.manifest.state.get("data")
        return None if self.config.origin is None else self.config.origin.data

    @property
    def config_hash(self) -> str | None:
        """Return the hash of the run's config; None for an export without an origin."""
        if self.run is not None:
            return config_hash(self.run)
        return None if self.config.origin is None else self.config.origin.config_hash

    @property
    def what(self) -> str:
        """Return a description of the parameters for messages."""
        if self.folder is None or self.manifest is None:
            return f"the parameters in {self.path}"
        return f"the parameters of step {self.manifest.step} in {self.folder.url}"

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """Read the unsharded parameters whose names begin with `prefix`; the others are not loaded.

        Raises:
            CheckpointError: there is no checkpoint, it or the export's file is damaged, or a weight is not finite.
        """
        if self.folder is None or self.manifest is None:
            return read_model(self.path, self.config, prefix)
        return checkpoint_weights(self.folder, self.manifest, self.config.weights, prefix)

    def facts(self) -> dict[str, Any]:
        """Return the origin of the weights for records. It is the same for a run and its unrounded export; an export
        without an origin is identified by its checksum."""
        if self.manifest is not None:
            return {
                "run": self.name,
                "step": self.manifest.step,
                "weights": self.config.weights,
                "dtype": "float32",
                "config_hash": self.manifest.config_hash,
                "saved_at": self.manifest.saved_at,
                "version": self.manifest.version,
            }
        origin = self.config.origin
        source = {"run": self.name, "sha256": self.config.sha256} if origin is None else origin.model_dump(mode="json")
        facts = {"weights": self.config.weights, "dtype": self.config.dtype} | source
        return {name: value for name, value in facts.items() if name not in _OMITTED}


def find_embedder(path: str | Path, weights: Weights | None = None) -> SavedModel[ExportConfig]:
    """Find a trained embedder in a run folder or an exported model.

    Args:
        path: a run folder, or an export of `regen checkpoint export`.
        weights: the EMA weights (`ema`) or those of the last step (`plain`); None selects the EMA weights of a run,
            and whichever an export holds.

    Raises:
        CheckpointError: an export has other weights than those requested, or is a text-to-video model.
        ConfigError: the folder is neither a run of an embedder nor an export.
    """
    path = Path(path)
    if is_export(path):
        return _exported(path, load_export_config(path), weights)
    config, folder = open_run(path)
    return SavedModel(path, ExportConfig.of(embedder_only(config, str(path)), weights or "ema"), config, folder)


def find_t2v(path: str | Path, weights: Weights | None = None) -> SavedModel[T2VExportConfig]:
    """Find a trained text-to-video model; arguments and errors as for `find_embedder`."""
    path = Path(path)
    if is_export(path):
        return _exported(path, load_t2v_export_config(path), weights)
    config, folder = open_run(path)
    return SavedModel(path, T2VExportConfig.of(t2v_only(config, str(path)), weights or "ema"), config, folder)


def _exported(path: Path, config: Config, weights: Weights | None) -> SavedModel[Config]:
    check_weights(path, config, weights)
    return SavedModel(path, config)
