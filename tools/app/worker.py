"""Worker process of the app: one job, read from its folder, its result written to the folder `output` in it.

Started by `JobRunner`. It prints one JSON object a line, and ends when its parent does: its standard input is a pipe
that nobody writes to.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from regen_dist.errors import DataError, RegenError
from regen_dist.jsontext import json_text
from tools.app.runner import OUTPUT, REQUEST


def report(**values: Any) -> None:
    """Print a report, which `JobRunner` reads.

    Args:
        values: `what` is done, with `done` of `total` units; or the `error` that ends the job.
    """
    print(json_text(values), flush=True)


def reconstruct(request: dict[str, Any], out: Path) -> None:
    """Reconstruct an uploaded video, as `regen reconstruct` does, with the contact sheet and the measures."""
    from regen_dist.evaluation.metrics import Options
    from regen_dist.evaluation.reconstruct import reconstruct as job
    from regen_dist.inference.codec import Codec
    from regen_dist.inference.frames import SourceVideo
    from tools.reconstruct import decoder_label, model_facts

    source = SourceVideo(Path(request["source"]), short_side=request["short_side"], max_frames=request["max_frames"])
    height, width = source.stored
    if height * width > request["max_pixels"]:  # by the first frame: the container may have said something else
        raise DataError(
            f"the video's frames have {width}x{height} pixels, more than the {request['max_pixels'] / 1e6:.3g} million "
            "that are allowed; scale it down first"
        )
    model = Path(request["model"])
    report(what="loading the model")
    codec = Codec.load(model)
    options = Options(steps=request["steps"], fps=request["fps"], seed=request["seed"])
    total = source.num_frames
    report(what="frames", done=0, total=total)
    job(
        source, codec, out, options, label=decoder_label(codec, options.steps), model=model_facts(model, codec),
        progress=lambda frame: report(what="frames", done=frame, total=total),
    )  # fmt: skip


def generate(request: dict[str, Any], out: Path) -> None:
    """Generate videos of a prompt, as `regen generate` does; with an image they begin with it."""
    from regen_dist.inference.codec import Codec
    from regen_dist.inference.generate import Layout, Prompt, load_text_encoder, resolve_settings
    from regen_dist.inference.generate import generate as job
    from regen_dist.inference.given_media import read_image
    from regen_dist.inference.sampler import TextToVideoModel

    report(what="loading the models")
    model = TextToVideoModel.load(request["model"])
    settings = resolve_settings(
        model, steps=request["steps"], guidance=request["guidance"], seed=request["seed"], negative=request["negative"]
    )
    image = read_image(Path(request["source"]), (settings.height, settings.width)) if request["source"] else None
    codec = Codec.load(request["embedder"], device=model.device)
    names = Layout(request["samples"])
    job(
        model, codec, lambda: load_text_encoder(model.space, request["text"], model.device),
        names.expanded([Prompt(0, request["prompt"])]), out, settings, batch=1, layout=names, given=image,
        paths={"run": request["model"], "embedder": request["embedder"], "text_encoder": request["text"]},
        progress=lambda what, done, total: report(what=f"videos {what}", done=done, total=total),
    )  # fmt: skip


_JOBS = {"reconstruct": reconstruct, "generate": generate}


def main(folder: Path) -> int:
    """Do the job of a folder; return the exit code."""

    def end_with_parent() -> None:
        os.read(0, 1)  # not sys.stdin, whose lock would be held when the interpreter ends
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()
    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    try:
        _JOBS[request["kind"]](request, folder / OUTPUT)
    except RegenError as error:
        report(error=str(error).replace(str(folder / OUTPUT), "the result").replace(f"{folder}/", ""))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
