"""The module of code that is exported beside weights."""

from __future__ import annotations

from functools import cache

from regen_dist.inference.hub.inlining import PACKAGE, Symbol, inlined

_HUB, _INFERENCE = f"{PACKAGE}.inference.hub", f"{PACKAGE}.inference"
ROOTS = (Symbol(f"{_HUB}.embedder", "VideoEmbedder"),)
# What reads runs and exports of this package, and what writes them.
LEFT_OUT = {
    Symbol(f"{_INFERENCE}.codec", "Codec"): ("load", "_of_run", "_of_export"),
    Symbol(f"{PACKAGE}.config.exported", "CommonExportConfig"): ("to_yaml",),
    Symbol(f"{PACKAGE}.config.exported", "ExportConfig"): ("of",),
}
TITLE = """\
REGEN, a video embedder with a generative decoder (arXiv 2503.08665), for diffusers. Apache-2.0.

Written by `regen checkpoint export` out of the sources of regen-dist: change those. Annotations of functions may name
classes that are not in this file."""


@cache
def own_module() -> tuple[str, str]:
    """File name and text of the module that opens exported models."""
    return inlined(ROOTS, LEFT_OUT, TITLE)
