"""Files that an export has beside its weights, so that diffusers can open the folder in place.

EXPORT/config.json                                     arguments and name of the class
EXPORT/diffusion_pytorch_model.safetensors.index.json  index: all weights are in model.safetensors
EXPORT/regen_….py                                      the class, with everything that it needs from this package

A text-to-video model with its embedder and text encoder is also a pipeline:

EXPORT/model_index.json     its parts, which are in:
EXPORT/transformer/         config.json, code, and the weights again (as a hard link, where the file system has them)
EXPORT/vae/                 the embedder, exported
EXPORT/text_encoder/        code, and copies of the encoder's files in encoder/
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from regen_dist.checkpoint.export import MODEL_FILE
from regen_dist.config.exported import ExportConfig, T2VExportConfig
from regen_dist.config.files import write_text_atomically
from regen_dist.errors import CheckpointError
from regen_dist.inference.hub.inlining import own_module, pipeline_module
from regen_dist.inference.latent_space import LatentSpace, LatentStatistics
from regen_dist.jsontext import json_text
from regen_dist.models.text import TextEncoder
from regen_dist.models.text.files import ENCODER_FOLDER
from regen_dist.observe.hardware import choose_device, inference_dtype
from regen_dist.shared_files import sync

CONFIG_FILE, INDEX_FILE = "config.json", "diffusion_pytorch_model.safetensors.index.json"
PIPELINE_FILE, TRANSFORMER, EMBEDDER, TEXT_ENCODER = "model_index.json", "transformer", "vae", "text_encoder"
_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_BYTES = {"float32": 4, "bfloat16": 2}


def write_embedder_files(
    folder: Path, config: ExportConfig, shapes: Mapping[str, list[int]], statistics: LatentStatistics | None
) -> None:
    """Add the files with which `diffusers.AutoModel.from_pretrained` opens an exported embedder."""
    if config.model.encoder.kind == "diffusers":  # its encoder is a model of diffusers already, and not in this export
        return
    values = {
        "_class_name": "VideoEmbedder",
        "auto_map": write_code(folder, own_module(), "VideoEmbedder"),
        "model": config.model.model_dump(mode="json"),
        "diffusion": config.diffusion.model_dump(mode="json"),
        "precision": config.precision,
        "noise_std": config.model.latent.noise_std,
        **_scales(statistics),
    }
    _write_json(folder / CONFIG_FILE, values)
    _write_json(folder / INDEX_FILE, _index(config.dtype, shapes))


def write_transformer_files(
    folder: Path, config: T2VExportConfig, shapes: Mapping[str, list[int]], space: LatentSpace
) -> None:
    """Add the files with which `diffusers.AutoModel.from_pretrained` opens an exported text-to-video model."""
    _write_json(folder / CONFIG_FILE, _transformer(folder, config, space))
    _write_json(folder / INDEX_FILE, _index(config.dtype, shapes))


def write_pipeline_files(folder: Path, config: T2VExportConfig, space: LatentSpace, text: TextEncoder) -> None:
    """Add the files with which `diffusers.DiffusionPipeline.from_pretrained` opens an exported text-to-video model; the
    embedder is in `vae/` already."""
    transformer, encoder = folder / TRANSFORMER, folder / TEXT_ENCODER
    for part in (transformer, encoder):
        part.mkdir()
    _write_json(transformer / CONFIG_FILE, _transformer(transformer, config, space))
    _second_name(folder / MODEL_FILE, transformer / _WEIGHTS_FILE)
    write_code(encoder, pipeline_module(), "PromptEncoder")
    copy_text_encoder(text, encoder)
    write_code(folder, pipeline_module(), "TextToVideoPipeline")
    ours, theirs = (Path(module[0]).stem for module in (pipeline_module(), own_module()))
    index = {
        "_class_name": [ours, "TextToVideoPipeline"],
        TRANSFORMER: [ours, "TextToVideoTransformer"],
        EMBEDDER: [theirs, "VideoEmbedder"],
        TEXT_ENCODER: [ours, "PromptEncoder"],
    }
    _write_json(folder / PIPELINE_FILE, index)


def _transformer(folder: Path, config: T2VExportConfig, space: LatentSpace) -> dict[str, Any]:
    """Write a transformer's code into the folder and return the content of its config.json."""
    return {
        "_class_name": "TextToVideoTransformer",
        "auto_map": write_code(folder, pipeline_module(), "TextToVideoTransformer"),
        "model": config.model.model_dump(mode="json"),
        "diffusion": config.diffusion.model_dump(mode="json"),
        "clips": list(config.clips),
        "precision": config.precision,
        "space": space.to_json(),
        "null_text": space.null_text.text.tolist(),
    }


def copy_text_encoder(text: TextEncoder, folder: Path) -> None:
    """Copy a text encoder's files, which never change, into the folder of a pipeline's part."""
    (folder / ENCODER_FOLDER).mkdir(exist_ok=True)
    for path in text.files:
        shutil.copyfile(path, folder / ENCODER_FOLDER / path.name)
        sync(folder / ENCODER_FOLDER / path.name)


def _second_name(file: Path, link: Path) -> None:
    try:
        os.link(file, link)
    except OSError:  # a file system without hard links
        shutil.copyfile(file, link)
        sync(link)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_text_atomically(path, json_text(values, indent=2) + "\n")


def _index(dtype: str, shapes: Mapping[str, list[int]]) -> dict[str, Any]:
    size = sum(map(prod, shapes.values())) * _BYTES[dtype]
    return {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(sorted(shapes), MODEL_FILE)}


def _scales(statistics: LatentStatistics | None) -> dict[str, Any]:
    """Mean and std of the content and motion channels, and one overall factor, as in diffusers' autoencoders."""
    spread = None if statistics is None else statistics.clips or statistics.images
    if spread is None:
        return {"latents_mean": None, "latents_std": None, "scaling_factor": 1.0}
    parts = [spread.content, spread.motion or spread.content]
    mean, std = (torch.stack([getattr(part, name) for part in parts]) for name in ("mean", "std"))  # [2, C]
    over_all = (std.square() + (mean - mean.mean()).square()).mean().sqrt()
    return {"latents_mean": mean.tolist(), "latents_std": std.tolist(), "scaling_factor": float(1 / over_all)}


# Opening and saving, common to all models for diffusers.


_LOADING = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def in_trained_precision(kind: Any, path: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """Add a model's training dtype to the options of `from_pretrained`, unless they name one."""
    if options.get("torch_dtype") is not None or options.get("dtype") is not None:
        return options
    found = kind.load_config(path, **{name: options[name] for name in _LOADING if name in options})
    dtype = inference_dtype(found.get("precision", "bf16"), choose_device())
    return {name: value for name, value in options.items() if name != "dtype"} | {"torch_dtype": dtype}


def refuse_export(folder: str | Path) -> None:
    """Raise CheckpointError if a folder holds an exported model: whatever was saved there, its index would go on to
    name the old weights, and its `config.yaml` their origin."""
    if (Path(folder) / MODEL_FILE).is_file():
        raise CheckpointError(f"{folder} holds an exported model; save into another folder")


def write_code(folder: str | Path, module: tuple[str, str], kind: str) -> dict[str, str]:
    """Write a module of code (its name and text) into a folder; returns the `auto_map` by which diffusers finds the
    class in it."""
    name, text = module
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_text_atomically(Path(folder) / name, text)
    return {"AutoModel": f"{Path(name).stem}.{kind}"}
