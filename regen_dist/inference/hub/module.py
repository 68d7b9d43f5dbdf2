"""Module of code that is exported beside the weights."""

from __future__ import annotations

from functools import cache

from regen_dist.inference.hub.inlining import PACKAGE, Symbol, inlined

_HUB, _INFERENCE, _CONFIG = f"{PACKAGE}.inference.hub", f"{PACKAGE}.inference", f"{PACKAGE}.config.exported"
_EMBEDDER = (Symbol(f"{_HUB}.embedder", "VideoEmbedder"),)
_PIPELINE = tuple(
    Symbol(f"{_HUB}.pipeline", name) for name in ("TextToVideoPipeline", "TextToVideoTransformer", "PromptEncoder")
)
# Methods that read or write runs and exports of this package.
_LEFT_OUT = {
    Symbol(f"{_INFERENCE}.codec", "Codec"): ("load", "_of_run", "_of_export"),
    Symbol(f"{_INFERENCE}.sampler", "TextToVideoModel"): ("load", "_of_run", "_of_export", "facts"),
    Symbol(f"{_INFERENCE}.latent_space", "LatentSpace"): ("of", "to_json", "write"),
    Symbol(f"{_INFERENCE}.latent_space", "LatentStatistics"): ("to_text",),
    Symbol(_CONFIG, "CommonExportConfig"): ("to_yaml",),
    Symbol(_CONFIG, "ExportConfig"): ("of",),
    Symbol(_CONFIG, "T2VExportConfig"): ("of",),
}
_TITLE = """\
REGEN, {what} (arXiv 2503.08665), for diffusers. Apache-2.0.

Written by `regen checkpoint export` out of the sources of regen-dist: change those."""


@cache
def own_module() -> tuple[str, str]:
    """File name and text of the module that opens exported embedders."""
    return inlined(_EMBEDDER, _LEFT_OUT, _TITLE.format(what="a video embedder with a generative decoder"))


@cache
def pipeline_module() -> tuple[str, str]:
    """File name and text of the module that opens exported text-to-video models."""
    return inlined(_PIPELINE, _LEFT_OUT, _TITLE.format(what="text to video on the latents of its embedder"))
