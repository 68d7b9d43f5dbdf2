"""The part of a pretrained model that reads text, whatever the architecture: weights out of safetensors, no foreign
code."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from regen_dist.errors import CheckpointError
from regen_dist.models.text.files import EncoderFiles, quiet_transformers

_PARTS = ("text_model", "language_model")  # of models that read something else, too
_POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


def load_model(files: EncoderFiles, dtype: torch.dtype) -> nn.Module:
    """The text encoder of a folder, in `dtype`, on the CPU: of an encoder and decoder the encoder, of a model of text
    and images the text's part; a causal language model as it is.

    Raises:
        CheckpointError: it cannot be loaded, or lacks weights.
    """
    with quiet_transformers() as transformers:
        try:
            model, found = _class(transformers, files).from_pretrained(
                str(files.folder), use_safetensors=True, local_files_only=True, trust_remote_code=False, dtype=dtype,
                output_loading_info=True,
            )  # fmt: skip
        except (OSError, ValueError, KeyError, RuntimeError, AttributeError, ImportError, SafetensorError) as error:
            raise CheckpointError(
                f"the text encoder in {files.folder} cannot be loaded: {str(error).strip() or repr(error)}; fetch or "
                "copy its files again"
            ) from error
    part, prefix = _text_part(model)
    missing = sorted(name for name in found["missing_keys"] if name.startswith(prefix) and "pooler" not in name)
    if missing:
        raise CheckpointError(
            f"the weights in {files.folder} are not those of a text encoder as {files.config.name} describes it: "
            f"{len(missing)} tensors are missing, among them {missing[0]}"
        )
    return part


def most_positions(model: nn.Module) -> int | None:
    """How many tokens the model has learned positions for; None where positions are relative or computed."""
    found = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS
    ]
    return min(found, default=None)


def _class(transformers: Any, files: EncoderFiles) -> Any:
    if files.is_t5:
        return transformers.T5EncoderModel
    config = transformers.AutoConfig.from_pretrained(str(files.folder), local_files_only=True, trust_remote_code=False)
    known = transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
    return transformers.AutoModelForTextEncoding if type(config) in known else transformers.AutoModel


def _text_part(model: Any) -> tuple[nn.Module, str]:
    """The module that takes token ids and gives hidden states, and what the names of its weights begin with."""
    if getattr(model.config, "is_encoder_decoder", False):
        part = model.get_encoder()
        if part is not model:
            return part, _prefix(model, part)
    for name in _PARTS if hasattr(model.config, "text_config") else ():
        if isinstance(part := getattr(model, name, None), nn.Module):
            return part, f"{name}."
    return model, ""


def _prefix(model: nn.Module, part: nn.Module) -> str:
    return next((f"{name}." for name, module in model.named_modules() if module is part and name), "")
