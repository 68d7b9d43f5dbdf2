"""Export of a run's model: verified, and either complete or absent."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Literal

import torch

from regen_dist.checkpoint.export import (
    CARD_FILE,
    MODEL_FILE,
    STATISTICS_FILE,
    Weights,
    check_shapes,
    check_weights,
    checkpoint_weights,
    find_checkpoint,
    find_embedder,
    is_export,
    model_shapes,
    open_run,
    read_model,
    write_model,
)
from regen_dist.checkpoint.manifest import CheckpointManifest
from regen_dist.config import AnyRunConfig, EmbedderConfig, T2VConfig
from regen_dist.config.datasets import DataConfig
from regen_dist.config.exported import (
    EXPORT_CONFIG_FILE,
    AnyExportConfig,
    ExportConfig,
    OriginConfig,
    T2VExportConfig,
    load_any_export_config,
)
from regen_dist.config.files import write_text_atomically
from regen_dist.data.pool import Progress
from regen_dist.data.storage.local import full_disk
from regen_dist.errors import CheckpointError, DataError
from regen_dist.inference.card import generating, model_card, t2v_card
from regen_dist.inference.codec import Codec
from regen_dist.inference.encoder import check_embedder
from regen_dist.inference.generate import check_text_encoder, load_text_encoder
from regen_dist.inference.hub.folder import (
    EMBEDDER,
    PIPELINE_FILE,
    TEXT_ENCODER,
    write_embedder_files,
    write_pipeline_files,
    write_transformer_files,
)
from regen_dist.inference.latent_space import (
    LatentSpace,
    LatentStatistics,
    measure_statistics,
    read_space,
    read_statistics,
)
from regen_dist.shared_files import IDLE_S, remove_leftovers, sync, temporary_beside


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Args:
        step: step of the checkpoint; None takes the newest good one.
        weights: the averaged weights, or those of the last step.
        dtype: dtype of the stored weights; None takes float32, or for an exported model its own.
        statistics_clips: clips that an embedder's latent statistics are measured on; 0 leaves the statistics out.
            A text-to-video model takes the statistics of its caches.
        data: URL of the clips for the statistics; None takes the run's training data.
        force: replace the exported model that is in the target folder.
        embedder: run or export of the embedder whose latents a text-to-video model uses, which makes the export a
            diffusers pipeline; None takes the config's `generation.embedder`, if set.
        text: folder of that pipeline's text encoder; None takes the one that the caches were made with.
    """

    step: int | None = None
    weights: Weights = "ema"
    dtype: Literal["float32", "bfloat16"] | None = None
    statistics_clips: int = 64
    data: str | None = None
    force: bool = False
    embedder: Path | None = None
    text: str | None = None


def export_model(
    run: Path, out: Path, options: ExportOptions, progress: Progress = lambda what, done, total: None
) -> AnyExportConfig:
    """Write the model of a run's checkpoint into the folder `out`, which appears complete or not at all. A model that
    was exported before is copied, with the files that this version adds for diffusers.

    Every byte of the checkpoint is first compared with its checksum; an embedder's statistics are measured with the
    weights as stored. Returns the facts that the export records about itself.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or `out` is not empty; or the run of a
            text-to-video model has lost its latent space.
        ConfigError: `run` is not a run.
        DataError: the clips for the statistics cannot be read, or the disk is full.
    """
    _check_target(out, options.force)
    if is_export(run):
        return _export_again(run, out, options)
    config, folder = open_run(run)
    progress("verify", 0, 1)
    manifest = find_checkpoint(folder, options.step, checksums=True)
    check_shapes(manifest.shapes, model_shapes(config.model), f"the parameters of step {manifest.step} in {folder.url}")
    progress("verify", 1, 1)
    with _staged_folder(out, options.force) as made:
        weights = checkpoint_weights(folder, manifest, options.weights)
        digest = write_model(made / MODEL_FILE, weights, options.dtype or "float32")
        del weights
        exported = _described(config, manifest, options, digest)
        write_text_atomically(made / EXPORT_CONFIG_FILE, exported.to_yaml())
        write_text_atomically(made / CARD_FILE, _complete(run, made, config, exported, manifest, options, progress))
    return exported


def _export_again(folder: Path, out: Path, options: ExportOptions) -> AnyExportConfig:
    """Copy an exported model."""
    config = load_any_export_config(folder)
    check_weights(folder, config, options.weights)
    unsupported = {"--step": options.step is not None, "--data": options.data is not None}
    unsupported["--dtype"] = options.dtype not in (None, config.dtype)
    if given := [name for name, found in unsupported.items() if found]:
        raise CheckpointError(
            f"{folder} is an exported model, which is copied as it is; leave {', '.join(given)} out, or export its run"
        )
    weights = read_model(folder, config)  # verified
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    check_shapes(shapes, model_shapes(config.model), f"the parameters in {folder}")
    with _staged_folder(out, options.force) as made:
        for name in (EXPORT_CONFIG_FILE, MODEL_FILE, CARD_FILE, STATISTICS_FILE):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, made / name)
                sync(made / name)
        if isinstance(config, ExportConfig):
            write_embedder_files(made, config, shapes, read_statistics(folder / STATISTICS_FILE))
        else:
            _complete_t2v(made, config, shapes, read_space(folder), _with_own_parts(folder, options))
            if (made / PIPELINE_FILE).is_file() and (made / CARD_FILE).is_file():
                card = (made / CARD_FILE).read_text(encoding="utf-8")
                write_text_atomically(
                    made / CARD_FILE, card.replace(generating(pipeline=False), generating(pipeline=True))
                )
    return config


def _with_own_parts(folder: Path, options: ExportOptions) -> ExportOptions:
    """Return options that make a pipeline of an exported pipeline, with its own embedder and text encoder where no
    others are given."""
    if not (folder / PIPELINE_FILE).is_file():
        return options
    text = options.text or str(folder / TEXT_ENCODER)
    return replace(options, embedder=options.embedder or folder / EMBEDDER, text=text)


def _described(
    config: AnyRunConfig, manifest: CheckpointManifest, options: ExportOptions, digest: str
) -> AnyExportConfig:
    origin = OriginConfig(
        run=config.name,
        step=manifest.step,
        samples=manifest.samples,
        config_hash=manifest.config_hash,
        version=manifest.version,
        saved_at=manifest.saved_at,
        data=manifest.state.get("data") or {},
        metrics={name: value for name, value in manifest.metrics.items() if isfinite(value)},
    )
    exported: AnyExportConfig = (
        ExportConfig.of(config, options.weights)
        if isinstance(config, EmbedderConfig)
        else T2VExportConfig.of(config, options.weights)
    )
    return exported.model_copy(update={"dtype": options.dtype or "float32", "sha256": digest, "origin": origin})


def _complete(
    run: Path, made: Path, config: AnyRunConfig, exported: AnyExportConfig, manifest: CheckpointManifest,
    options: ExportOptions, progress: Progress,
) -> str:  # fmt: skip
    """Add what a model of this kind needs beside its weights; returns its card."""
    assert exported.origin is not None, "it was described with one"
    if isinstance(exported, T2VExportConfig):
        assert isinstance(config, T2VConfig), "what is exported is of the run's kind"
        embedder = options.embedder or _embedder_of(config)
        space = read_space(run)
        _complete_t2v(made, exported, manifest.shapes, space, replace(options, embedder=embedder))
        return t2v_card(exported, exported.origin, manifest.shapes, space, pipeline=(made / PIPELINE_FILE).is_file())
    assert isinstance(config, EmbedderConfig), "what is exported is of the run's kind"
    statistics = _statistics(made, config, options, progress) if options.statistics_clips else None
    if statistics is not None:
        write_text_atomically(made / STATISTICS_FILE, statistics.to_text())
    write_embedder_files(made, exported, manifest.shapes, statistics)
    return model_card(exported, exported.origin, manifest.shapes, config.data.sizes[0], statistics)


def _embedder_of(config: T2VConfig) -> Path | None:
    """Return the embedder that a run generates with, if it can be part of a pipeline."""
    if config.generation.embedder is None:
        return None
    embedder = Path(config.generation.embedder)
    return None if find_embedder(embedder).config.model.encoder.frozen else embedder


def _complete_t2v(
    made: Path, exported: T2VExportConfig, shapes: dict[str, list[int]], space: LatentSpace, options: ExportOptions
) -> None:
    """Add the latent space and what diffusers needs; with an embedder, all of a pipeline."""
    space.write(made)
    write_transformer_files(made, exported, shapes, space)
    if options.embedder is None:
        return
    cpu = torch.device("cpu")
    found = find_embedder(options.embedder)
    if found.config.model.encoder.frozen:
        raise CheckpointError(
            f"{options.embedder} has somebody else's encoder, which no export holds, so that diffusers could not open "
            "the pipeline; leave --embedder out, which exports the transformer alone"
        )
    export_model(options.embedder, made / EMBEDDER, ExportOptions(weights=found.config.weights, statistics_clips=0))
    # The copy is checked: a run that trains may have saved another checkpoint meanwhile.
    check_embedder(Codec.load(made / EMBEDDER, device=cpu), space.facts["encoder"], str(options.embedder))
    text = load_text_encoder(space, options.text, cpu)
    check_text_encoder(text, space)
    write_pipeline_files(made, exported, space, text)


def _statistics(made: Path, config: EmbedderConfig, options: ExportOptions, progress: Progress) -> LatentStatistics:
    data = config.data
    if options.data is not None:  # clips cut in the same way, of another dataset
        data = DataConfig.model_validate(data.model_dump() | {"url": options.data, "mixture": ()})
    codec = Codec.load(made)
    try:
        return measure_statistics(
            codec, data, num_clips=options.statistics_clips, seed=config.train.seed,
            progress=lambda done, total: progress("statistics", done, total),
        )  # fmt: skip
    except DataError as error:
        raise DataError(
            f"the clips for the latent statistics cannot be read; give --data URL, where such clips are, or "
            f"--no-statistics: {error}"
        ) from error


def _check_target(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; give a folder that is empty or not there yet")
    if os.path.ismount(out) or (out.is_dir() and out.samefile(os.curdir)):
        what = "a mount point" if os.path.ismount(out) else "the working folder"
        raise CheckpointError(f"{out} is {what}, whose place no new folder can take; give a folder in it: {out}/model")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (is_export(out) and (out / EXPORT_CONFIG_FILE).is_file()):  # transformers have a model.safetensors, too
        raise CheckpointError(f"{out} holds something else than an exported model; give another folder")
    if not force:
        raise CheckpointError(f"{out} holds an exported model; give another folder, or --force to replace it")


@contextmanager
def _staged_folder(out: Path, force: bool) -> Iterator[Path]:
    """New folder beside `out` that replaces it when the block succeeds and is removed when it fails; by the next export
    beside it where this one is killed."""
    out = Path(os.path.realpath(out))  # a link stays, and so does the disk that it leads to
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out.parent, idle_s=IDLE_S)
    made = temporary_beside(out)
    made.mkdir()
    try:
        with full_disk(out.parent, str(out)):
            yield made
            sync(made)
            _check_target(out, force)  # again: it took a while
            _replace_folder(made, out)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _replace_folder(made: Path, out: Path) -> None:
    """Rename `made` to `out`; an older export there is `made` afterwards. They change places in one step. Where the
    disk has none, the older one is first moved aside, and is restored when the rename fails."""
    if not out.exists():
        os.replace(made, out)
    elif not _exchange(made, out):
        aside = made.with_suffix(".old")
        os.replace(out, aside)
        try:
            os.replace(made, out)
        except OSError:
            os.replace(aside, out)
            raise
        os.replace(aside, made)
    sync(out.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places, by renameat2(AT_FDCWD, …, RENAME_EXCHANGE) of Linux; False where it refuses."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(-100, os.fsencode(one), -100, os.fsencode(other), 2) == 0
