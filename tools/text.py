"""`regen text`: create, convert and inspect text encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(name="text", help="Create, convert or inspect a text encoder.", no_args_is_help=True)


@app.command()
def make(
    data: Annotated[str, typer.Argument(help="Folder or URL of a dataset with captions.", metavar="DATA")],
    out: Annotated[Path, typer.Option(help="Folder of the encoder; empty, or created by this same command.")],
    vocabulary: Annotated[int, typer.Option(help="Maximum number of tokens.")] = 1024,
    width: Annotated[int, typer.Option(help="Width of the embeddings.")] = 64,
    layers: Annotated[int, typer.Option(help="Layers of the T5.")] = 2,
    heads: Annotated[int, typer.Option(help="Attention heads of the T5.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
) -> None:
    """Train a tokenizer on a dataset's captions and write it with a small randomly initialised T5, for tests and for
    captions with a small vocabulary.

    Example: regen text make runs/shapes --out runs/text
    """
    from regen_dist.models.text import make_small_encoder

    captions = _captions(data)
    sizes = {"vocabulary": vocabulary, "width": width, "layers": layers, "heads": heads, "seed": seed}
    if make_small_encoder(captions, out, **sizes):
        typer.echo(f"{out}: a text encoder of width {width}, from {len(captions):,} different captions")
    else:
        typer.echo(f"{out}: complete already, from the same {len(captions):,} captions; nothing to do")


@app.command()
def convert(
    encoder: Annotated[str, typer.Argument(help="Folder, or a name on the Hugging Face hub.", metavar="ENCODER")],
    out: Annotated[Path, typer.Option(help="Folder of the encoder; empty, or created by this same command.")],
    dtype: Annotated[
        Literal["same", "bfloat16", "float32"], typer.Option(help="Dtype of the weights; bfloat16 halves float32.")
    ] = "same",
) -> None:
    """Convert an encoder with pickled weights (pytorch_model.bin) to safetensors, the only format read elsewhere. The
    pickles are opened in a subprocess that accepts only tensors; of a T5, only the encoder is kept.

    Example: regen text convert google/t5-v1_1-xxl --out runs/t5-xxl --dtype bfloat16
    """
    from regen_dist.models.text import convert_encoder

    if convert_encoder(encoder, out, dtype):
        typer.echo(f"{out}: the encoder with safetensors; use it by text.encoder={out}")
    else:
        typer.echo(f"{out}: complete already; nothing to do")


@app.command()
def show(
    encoder: Annotated[str, typer.Argument(help="Folder, or a name on the Hugging Face hub.", metavar="ENCODER")],
    caption: Annotated[str, typer.Argument(help="A caption.", metavar="CAPTION")],
    max_tokens: Annotated[int, typer.Option(help="Longer captions are cut.", min=1)] = 256,
) -> None:
    """Show a caption's tokens and the shape of its embedding.

    Example: regen text show runs/text "a small red circle moves up"
    """
    from regen_dist.config.t2v import TextConfig
    from regen_dist.models.text import TextEncoder
    from tools.generate import check_text

    check_text(caption)
    text = TextEncoder.load(TextConfig(encoder=encoder, max_tokens=max_tokens))
    (embedding,) = text.encode([caption])
    typer.echo(f"tokens: {' '.join(text.pieces(caption))}")
    length, width = embedding.shape
    typer.echo(f"embedding: {length} tokens x {width}, root mean square {embedding.square().mean().sqrt():.3f}")
    typer.echo(f"fingerprint: {text.fingerprint}")


def _captions(url: str) -> list[str]:
    """Return a dataset's distinct captions; DataError if it has none."""
    from regen_dist.data.format.catalogue import open_dataset
    from regen_dist.errors import DataError

    captions = sorted({caption for caption in open_dataset(url).table()["caption"].to_pylist() if caption})
    if not captions:
        raise DataError(f"{url}: no sample has a caption, which a text encoder is made from; use another dataset")
    return captions
