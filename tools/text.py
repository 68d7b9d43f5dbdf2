"""`regen text`: text encoders, making a small one, converting one, and looking at what one makes of a caption."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(name="text", help="Make or convert a text encoder; look at what one does.", no_args_is_help=True)


@app.command()
def make(
    data: Annotated[str, typer.Argument(help="Folder or URL of a dataset with captions.", metavar="DATA")],
    out: Annotated[Path, typer.Option(help="Folder of the encoder; empty, or made by this same command.")],
    vocabulary: Annotated[int, typer.Option(help="Tokens, at most.")] = 1024,
    width: Annotated[int, typer.Option(help="Of the embeddings.")] = 64,
    layers: Annotated[int, typer.Option(help="Of the T5.")] = 2,
    heads: Annotated[int, typer.Option(help="Of the T5.")] = 4,
    seed: Annotated[int, typer.Option(help="Another seed gives other weights.")] = 0,
) -> None:
    """Train a tokenizer on a dataset's captions and write it with a small T5 of random weights, for tests and for
    captions of few words.

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
    out: Annotated[Path, typer.Option(help="Folder of the encoder; empty, or made by this same command.")],
    dtype: Annotated[
        Literal["same", "bfloat16", "float32"], typer.Option(help="Of its weights; bfloat16 is half of float32.")
    ] = "same",
) -> None:
    """Write an encoder whose weights are pickled (pytorch_model.bin) with safetensors, which is all that is read
    elsewhere. The pickles are opened by a process of its own that takes tensors alone; of a T5 the encoder is kept.

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

    text = TextEncoder.load(TextConfig(encoder=encoder, max_tokens=max_tokens))
    (embedding,) = text.encode([caption])
    typer.echo(f"tokens: {' '.join(text.pieces(caption))}")
    length, width = embedding.shape
    typer.echo(f"embedding: {length} tokens x {width}, root mean square {embedding.square().mean().sqrt():.3f}")
    typer.echo(f"fingerprint: {text.fingerprint}")


def _captions(url: str) -> list[str]:
    """A dataset's different captions; DataError when it has none."""
    from regen_dist.data.format.catalogue import open_dataset
    from regen_dist.errors import DataError

    captions = sorted({caption for caption in open_dataset(url).table()["caption"].to_pylist() if caption})
    if not captions:
        raise DataError(f"{url}: no sample has a caption, of which a text encoder is made; give another dataset")
    return captions
