"""`regen bench solvers`: score of generated moving shapes for each solver and number of evaluations."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_args

import typer

from regen_dist.config.run import SamplerName
from regen_dist.errors import ConfigError
from regen_dist.jsontext import json_text
from regen_dist.tables import Table, numbers
from tools.generate import parse_size
from tools.shards.progress import progress_bar, stopping_cleanly

if TYPE_CHECKING:
    from regen_dist.inference.codec import Codec
    from regen_dist.inference.generate import Prompt
    from regen_dist.inference.sampler import TextToVideoModel
    from regen_dist.models.text import TextEncoder

_EVALUATIONS = "3,5,9,15,25"
_FILE = "solvers.json"
_TIMED = "seconds_per_video.json"  # beside the videos, for a later call, which keeps them


class SolverSetting(NamedTuple):
    """A solver and its steps. `evaluations` counts calls of the model, the two of guidance as one."""

    sampler: SamplerName
    steps: int

    @property
    def evaluations(self) -> int:
        """Evaluations of a video: Heun takes two for each step but the last."""
        return 2 * self.steps - 1 if self.sampler == "heun" else self.steps


def solvers(
    run: Annotated[Path, typer.Option(help="Run of a text-to-video model on moving shapes, or an exported model.")],
    embedder: Annotated[Path, typer.Option(help="Run or export of the embedder of its training latents.")],
    prompts: Annotated[Path, typer.Option(help="Text file with one caption of a moving shape per line.")],
    out: Annotated[Path, typer.Option(help=f"Folder of the videos and of {_FILE}.")] = Path("runs/bench/solvers"),
    evaluations: Annotated[
        str, typer.Option(help="Odd numbers of evaluations of the model for each video, comma-separated.")
    ] = _EVALUATIONS,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels; what it was trained on, if known.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the config's by default.")] = None,
    number: Annotated[int, typer.Option(help="Maximum number of prompts.", min=1)] = 200,
    text: Annotated[str | None, typer.Option(help="Text encoder, if not where the caches record it.")] = None,
) -> None:
    """Generate videos of the same captions, from the same noise, with every solver at the same numbers of evaluations,
    and read them with a detector that has learned nothing. Existing videos are kept.

    Example: regen bench solvers --run runs/miniature/t2v --embedder runs/miniature/model --prompts
    runs/miniature/prompts.txt --out runs/miniature/solvers
    """
    from rich.console import Console

    from regen_dist.config.files import write_text_atomically
    from regen_dist.inference.codec import Codec
    from regen_dist.inference.generate import load_text_encoder, read_prompts
    from regen_dist.inference.sampler import TextToVideoModel
    from regen_dist.observe.hardware import describe_machine

    planned = planned_settings(evaluations)
    sides = None if size is None else parse_size(size)
    model, codec = TextToVideoModel.load(run), Codec.load(embedder)
    wanted, encoder, rows = read_prompts(prompts)[:number], load_text_encoder(model.space, text, model.device), []
    with stopping_cleanly(), progress_bar() as progress:
        for done, setting in enumerate(planned):
            progress("solvers", done, len(planned))
            rows.append(_measured(model, codec, encoder, wanted, setting, out, sides, guidance))
    record = {"prompts": len(wanted), "model": model.facts(), "rows": rows, "machine": describe_machine()}
    write_text_atomically(out / _FILE, json_text(record, indent=1) + "\n")
    _table(rows).show(Console())
    typer.echo(f"Written: {out / _FILE}")


def planned_settings(evaluations: str) -> list[SolverSetting]:
    """Every solver at every number of evaluations.

    Raises:
        ConfigError: a number is not odd, or not a number.
    """
    counts = [part.strip() for part in evaluations.split(",")]
    wrong = [part for part in counts if not part.isdecimal() or int(part) % 2 == 0]
    if wrong:
        raise ConfigError(
            f"--evaluations: {', '.join(map(repr, wrong))}; give odd numbers of at least 1, such as {_EVALUATIONS}: "
            "Heun takes two evaluations for each step but the last"
        )
    names: tuple[SamplerName, ...] = get_args(SamplerName)
    found = [
        SolverSetting(name, (count + 1) // 2 if name == "heun" else count)
        for name in names
        for count in sorted(map(int, counts))
    ]
    return list(dict.fromkeys(found))


def _measured(
    model: TextToVideoModel,
    codec: Codec,
    encoder: TextEncoder,
    wanted: Sequence[Prompt],
    setting: SolverSetting,
    out: Path,
    sides: tuple[int, int] | None,
    guidance: float | None,
) -> dict[str, Any]:
    """Generate the videos of one setting, read them, and return their row of the record."""
    from regen_dist.config.files import write_text_atomically
    from regen_dist.evaluation.miniature_scores import generated_clips, read_arm
    from regen_dist.inference.generate import generate
    from regen_dist.inference.generation_settings import resolve_settings

    folder = out / f"{setting.sampler}-{setting.steps:02d}"
    settings = resolve_settings(model, size=sides, steps=setting.steps, sampler=setting.sampler, guidance=guidance)
    began = time.monotonic()
    found = generate(model, codec, lambda: encoder, wanted, folder, settings)
    seconds, timed = time.monotonic() - began, folder / _TIMED
    if found.made:
        write_text_atomically(timed, json_text(seconds / len(found.made)) + "\n")
    names = [f"{prompt.number:05d}" for prompt in wanted]
    arm = read_arm(folder.name, generated_clips(folder, names), {})
    return {
        "sampler": setting.sampler,
        "steps": setting.steps,
        "evaluations": setting.evaluations,
        "seconds_per_video": json.loads(timed.read_text(encoding="utf-8")) if timed.is_file() else None,
        "scores": {name: share.to_json() for name, share in arm.scores.items()},
    }


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the shares that are right, one setting per row."""
    names = rows[0]["scores"]
    lines = [
        [row["sampler"], str(row["evaluations"]), *(f"{share['share']:.1%}" for share in row["scores"].values())]
        for row in sorted(rows, key=lambda row: row["evaluations"])
    ]
    return Table(
        ["solver", *numbers("evaluations", *names)], lines, title="read right, by solver and evaluations of the model"
    )
