"""Text-to-video model with the interface of a diffusers pipeline: a transformer, a text encoder, and the pipeline that
joins them with the embedder, `pipeline("a prompt", num_frames=…, guidance_scale=…).frames`.

Legend: B prompts, C latent channels, F latent frames, h x w latent cells, M text tokens, D their width, T frames of a
video, H x W pixels.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from regen_dist.config.exported import T2VExportConfig
from regen_dist.config.run import SamplerName
from regen_dist.config.t2v import FlowConfig, T2VModelConfig, TextConfig
from regen_dist.data.format.latents import TextEmbedding
from regen_dist.errors import ConfigError
from regen_dist.inference.codec import Window
from regen_dist.inference.generate import Prompt, as_in_cache, sample_rows
from regen_dist.inference.generation_settings import GenerationSettings, frame_positions, resolve_settings
from regen_dist.inference.hub.folder import copy_text_encoder, in_trained_precision, refuse_export, write_code
from regen_dist.inference.hub.inlining import pipeline_module
from regen_dist.inference.latent_space import LatentSpace, parse_statistics
from regen_dist.inference.long_video import row_frames
from regen_dist.inference.sampler import TextToVideoModel
from regen_dist.jsontext import json_text
from regen_dist.models.encoder import Latents
from regen_dist.models.t2v import TextToVideo
from regen_dist.models.text.encoder import TextEncoder
from regen_dist.pixels import to_frames


@dataclass
class Velocity(BaseOutput):  # type: ignore[misc]
    """Output of `TextToVideoTransformer`: `sample` [B, C, F, h, w]."""

    sample: Tensor


@dataclass
class GeneratedVideos(BaseOutput):  # type: ignore[misc]
    """Output of `TextToVideoPipeline`: the videos' `frames`, in the requested form, and frames a second."""

    frames: Any
    fps: float


class TextToVideoTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A trained text-to-video transformer with its latent space. Computes in the dtype of its weights, which is that of
    training unless `torch_dtype` is given.

    Args:
        model: the `T2VModelConfig`, as plain values.
        diffusion: the `FlowConfig`, as plain values.
        space: the latent space, as in `latent_space/facts.json`.
        null_text: the embedding of the empty caption, [M][D].
        clips: lengths of the rows in training.
        precision: precision of training, `bf16` or `fp32`.
        auto_map: module and name under which diffusers finds this class.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        model: dict[str, Any],
        diffusion: dict[str, Any],
        space: dict[str, Any],
        null_text: list[list[float]],
        clips: Sequence[int] = (),
        precision: str = "bf16",
        auto_map: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        exported = T2VExportConfig(
            model=T2VModelConfig(**model), diffusion=FlowConfig(**diffusion), clips=tuple(clips),
            precision=precision,  # type: ignore[arg-type]
        )  # fmt: skip
        inner = TextToVideo(exported.model)
        for name, part in inner.named_children():  # under the names that their weights have in an export
            self.add_module(name, part)
        self.__dict__["exported"], self.__dict__["inner"] = exported, inner
        self.__dict__["latent_space"] = _space(space, null_text)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Any:
        """Load an exported folder or a repository on the hub; options as in diffusers' `ModelMixin`."""
        return super().from_pretrained(path, **in_trained_precision(cls, path, options))

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **options: Any) -> None:
        """Write the config and, beside it, the module of code that opens the model; raise CheckpointError if the
        folder holds an exported model."""
        refuse_export(save_directory)
        self.register_to_config(auto_map=write_code(save_directory, pipeline_module(), type(self).__name__))
        super().save_config(save_directory, push_to_hub=push_to_hub, **options)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Velocity | tuple[Tensor]:
        """The velocity of the rectified flow, float32.

        Args:
            hidden_states: normalised latents x_t, [B, C, F, h, w].
            timestep: diffusion time [B] in (0, 1].
            encoder_hidden_states: text embeddings, [B, M, D].
            encoder_attention_mask: [B, M], true where a text token counts; all by default.
            return_dict: return an object instead of a tuple.
        """
        text = encoder_hidden_states
        mask = torch.ones_like(text[:, :, 0]) if encoder_attention_mask is None else encoder_attention_mask
        velocity = self.inner(hidden_states, timestep, text, mask)
        return Velocity(sample=velocity) if return_dict else (velocity,)


class PromptEncoder(ModelMixin):  # type: ignore[misc]
    """Text encoder of a pipeline, any that transformers loads, with its tokenizer."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.model = encoder.model
        self.__dict__["encoder"] = encoder

    @classmethod
    def from_pretrained(cls, path: str | Path, torch_dtype: torch.dtype | None = None, **options: Any) -> PromptEncoder:
        """Load the encoder in a folder; in float32 by default, because T5 overflows in float16."""
        return cls(TextEncoder.load(TextConfig(encoder=str(path)), "cpu", torch_dtype or torch.float32))

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Copy the encoder's files and the module of code."""
        write_code(save_directory, pipeline_module(), type(self).__name__)
        copy_text_encoder(self.encoder, Path(save_directory))


class TextToVideoPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Pipeline from prompts to videos, equal to `regen generate`: the same prompt number and seed give the same video.

    Args:
        transformer: samples latents for a text.
        vae: the embedder of these latents.
        text_encoder: the encoder of the training captions.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(self, transformer: Any, vae: Any, text_encoder: Any) -> None:
        super().__init__()
        parts = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder}
        self.register_modules(**parts)
        for name, part in parts.items():  # the file in its folder, from wherever diffusers loaded it
            self.register_to_config(**{name: (type(part).__module__.rpartition(".")[2], type(part).__name__)})

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: SamplerName | None = None,
        num_decode_steps: int = 1,
        seed: int = 0,
        generator: torch.Generator | None = None,
        output_type: Literal["np", "pt", "pil", "uint8"] = "np",
        return_dict: bool = True,
    ) -> GeneratedVideos | tuple[Any]:
        """Generate a video for every prompt.

        Args:
            prompt: one or several prompts; their numbers, from 0, key their noise.
            negative_prompt: text that guidance leads away from; the empty caption by default.
            height, width: size in pixels, multiples of 16; that of training by default.
            num_frames: T, 1 for images; the longest row of training by default.
            fps: frames a second; that of training by default.
            num_inference_steps, guidance_scale, sampler: sampling of the latents; as in the config by default.
            num_decode_steps: sampling steps of the embedder's decoder.
            seed: seed of all noise.
            generator: generator to draw the seed from instead.
            output_type: form of the frames: `np` float32 [B, T, H, W, 3] in [0, 1], `uint8` the same in 0 to 255, `pt`
                a tensor [B, T, 3, H, W] in [0, 1], `pil` lists of pictures.
            return_dict: return an object with `frames` and `fps` instead of a tuple of the frames.

        Raises:
            ConfigError: a prompt has no text, the negative prompt is no text, or a size, number or form is invalid.
        """
        if output_type not in _FORMS:
            raise ConfigError(f"output_type is {output_type!r}; it can be {', '.join(_FORMS)}")
        if (height is None) != (width is None):
            raise ConfigError(f"height is {height} and width is {width}; give both, or none")
        prompts = _prompts(prompt)
        if not isinstance(negative_prompt, str | None):  # diffusers' own pipelines take a list, too
            raise ConfigError(
                f"negative_prompt is {negative_prompt!r}; give one text, which all prompts share, or call the pipeline "
                "once for each prompt"
            )
        seed = seed if generator is None else _drawn_seed(generator)
        model = PipelineModel(self.transformer, self._execution_device)
        settings = resolve_settings(
            model, size=None if height is None or width is None else (height, width), frames=num_frames, fps=fps,
            steps=num_inference_steps, guidance=guidance_scale, sampler=sampler, decode_steps=num_decode_steps,
            seed=seed, negative=negative_prompt,
        )  # fmt: skip
        texts, null = self._embedded(prompts, negative_prompt, model.space)
        numbered = [Prompt(number, text) for number, text in enumerate(prompts)]
        rows = sample_rows(model, numbered, texts, null, settings)
        frames = np.stack([self._frames(rows, number, settings, model.space.fps) for number in range(len(prompts))])
        self.maybe_free_model_hooks()
        made = _FORMS[output_type](frames)
        return GeneratedVideos(frames=made, fps=settings.fps) if return_dict else (made,)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write a folder that `DiffusionPipeline.from_pretrained` opens without this package.

        Raises:
            CheckpointError: the folder holds an exported model.
        """
        refuse_export(save_directory)
        name, text = pipeline_module()
        super().save_pretrained(save_directory, **options)
        index = Path(save_directory) / self.config_name
        found = json.loads(index.read_text(encoding="utf-8"))
        found["_class_name"] = [Path(name).stem, type(self).__name__]
        index.write_text(json_text(found, indent=2) + "\n", encoding="utf-8")
        (Path(save_directory) / name).write_text(text, encoding="utf-8")

    def _embedded(self, prompts: list[str], negative: str | None, space: LatentSpace) -> tuple[list[Tensor], Tensor]:
        """Embeddings [M, D] of the prompts and of the negative prompt, rounded as in training; warns of cut ones."""
        most = (space.facts["text"] or {}).get("max_tokens")
        encoder = self.text_encoder.encoder if most is None else self.text_encoder.encoder.cut_at(int(most))
        for text in (*prompts, negative or ""):
            if encoder.cuts(text):
                logging.getLogger("diffusers").warning(
                    f"a prompt has more tokens than the text encoder takes and was cut: {text[:80]}…"
                )
        texts = [as_in_cache(each) for each in encoder.encode(prompts)]
        return texts, space.null_text.text if negative is None else as_in_cache(encoder.encode([negative])[0])

    def _frames(self, rows: Sequence[Latents], number: int, settings: GenerationSettings, fps: float) -> Any:
        """Decode the frames of one prompt, uint8 [T, H, W, 3]."""
        row = [Latents(*(part[number : number + 1] for part in latents)) for latents in rows]
        fixed = {"seed": settings.seed, "sample_id": number, "steps": settings.decode_steps}
        decoder = RowDecoder(self.vae)
        if settings.is_image:
            return to_frames(decoder.decode_windows([Window(row[0], 0.0, 1)], torch.zeros(1), **fixed)[0])
        made = row_frames(decoder, row, frame_positions(settings, fps), **fixed)
        return np.stack([frame for part in made for frame in part])


class PipelineModel(TextToVideoModel):
    """Adapter that calls a pipeline's transformer as diffusers does, so that its hooks run."""

    def __init__(self, transformer: Any, device: torch.device) -> None:
        super().__init__(
            transformer.inner, transformer.exported, transformer.latent_space, device, {}, dtype=transformer.dtype
        )
        self.transformer = transformer

    def predict(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return self.transformer(x, t, text, mask, return_dict=False)[0]  # type: ignore[no-any-return]


class RowDecoder:
    """Adapter that decodes adjacent windows with a `VideoEmbedder`, from any module."""

    kind = "regen"

    def __init__(self, vae: Any) -> None:
        self.vae, self.num_frames = vae, vae.num_frames

    def encode(self, clips: Tensor) -> Latents:
        return Latents(*self.vae.encode(clips).latent_dist.mode().unbind(2))

    def decode_windows(self, windows: list[Window], times: Tensor, *, steps: int, seed: int, sample_id: int) -> Tensor:
        start, image = windows[0].start, windows[0].length == 1
        parts = [part for each in windows for part in (each.latents[:1] if image else each.latents)]
        made: Tensor = self.vae.decode(
            torch.stack(parts, 2), times=times.double() - start, start=start, num_inference_steps=steps, seed=seed,
            sample_ids=[sample_id],
        ).sample  # fmt: skip
        return made


def _drawn_seed(generator: Any) -> int:
    if not isinstance(generator, torch.Generator):  # diffusers' own pipelines take a list, too
        raise ConfigError(
            f"generator is a {type(generator).__name__}; give one torch.Generator, from which the seed of all prompts "
            "is drawn, or call the pipeline once for each prompt"
        )
    return int(torch.randint(2**31, (1,), generator=generator, device=generator.device))


def _prompts(given: Any) -> list[str]:
    """Return one or several prompts as a list, after checking that each is a text with words in it."""
    prompts = list(given) if isinstance(given, list | tuple) else [given]
    if not prompts or not all(isinstance(each, str) and each.strip() for each in prompts):
        raise ConfigError(f"prompt is {given!r}; give a text with words in it, or a list of at least one such text")
    return prompts


def _pictures(videos: Any) -> Any:
    from PIL import Image

    return [[Image.fromarray(frame) for frame in video] for video in videos]


_FORMS = {
    "np": lambda videos: videos.astype(np.float32) / 255,
    "uint8": lambda videos: videos,
    "pt": lambda videos: torch.from_numpy(videos).movedim(-1, 2).float() / 255,
    "pil": _pictures,
}


def _space(facts: Mapping[str, Any], null_text: Sequence[Sequence[float]]) -> LatentSpace:
    """Build the latent space from a config."""
    kept = {name: value for name, value in facts.items() if name != "statistics"}
    with torch.device("cpu"):  # also when weights are first created on the meta device
        text = torch.tensor(null_text)
        statistics = parse_statistics(facts["statistics"], "the model's config")
        return LatentSpace(kept, statistics, TextEmbedding(text, torch.ones(len(text), dtype=torch.bool)))
