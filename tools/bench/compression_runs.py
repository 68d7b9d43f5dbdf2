"""Trainings of `regen bench compression`: speed of each arm, learning rates, then the arms themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from regen_dist.checkpoint.export import find_checkpoint, open_run
from regen_dist.config import EmbedderConfig, embedder_only, load_saved_config, save_config
from regen_dist.config.files import write_text_atomically
from regen_dist.data.loading.validation import validation_clip
from regen_dist.errors import CheckpointError, ConfigError
from regen_dist.inference.codec import Codec
from regen_dist.jsontext import json_text
from regen_dist.models.flops import count_flops, training_flops_per_clip
from regen_dist.observe.record import read_record
from regen_dist.pixels import to_float, to_frames
from regen_dist.programs import regen as program
from tools.bench.common import claim_minutes, run_side_by_side
from tools.bench.compression_measure import Decoded, mean_psnr_db

# Arms of the comparison: model, counterpart, and the paper's result.
#
# An arm is an ordinary run with other overrides of one config, so encoder, latents, data and optimizer are the same.

Kind = Literal["regen", "magvit2"]
COMPRESSIONS = (4, 8, 16, 32)
ABLATED = 16  # the temporal compression at which learning rates are tuned and variants are compared

STEPS = (1, 2, 4, 8)

_FULL = ("model.decoder.attention.pattern=full", "model.decoder.attention.backend=sdpa")
_NO_LINEAR = ("model.decoder.linear=false",)
_PAPER = ("model.decoder.local=false",)
_UNTRAINED = ("optimizer.lr=1e-12",)


@dataclass(frozen=True)
class CompressionArm:
    """One training run. `against` is the arm that it differs from in one thing only."""

    kind: Kind
    k: int
    variant: str = ""
    changes: tuple[str, ...] = ()
    what: str = ""
    against: str = ""

    @property
    def name(self) -> str:
        """Name of its run."""
        return f"{self.kind}-k{self.k}" + (f"-{self.variant}" if self.variant else "")

    @property
    def label(self) -> str:
        """Label in tables and pictures."""
        kind = "REGEN" if self.kind == "regen" else "MAGVIT-v2"
        return f"{kind}, k = {self.k}" + (f", {self.what}" if self.what else "")

    @property
    def steps(self) -> tuple[int, ...]:
        """Sampling steps at which it is measured: variants and the single-step baseline decode in one."""
        return STEPS if self.kind == "regen" and not self.variant else STEPS[:1]

    @property
    def trains(self) -> bool:
        """False for an arm that stays where it begins."""
        return self.changes != _UNTRAINED

    @property
    def has_code(self) -> bool:
        """True if its decoder has the linear code."""
        return _NO_LINEAR[0] not in self.changes

    def overrides(self, base: EmbedderConfig) -> list[str]:
        """Return the overrides that distinguish it from the common config.

        Raises:
            ConfigError: the config has too few stages for this temporal compression.
        """
        stages = stages_of(base, self.k)
        return [
            f"name={self.name}",
            f"model.kind={self.kind}",
            f"model.temporal_compression={self.k}",
            f"model.encoder.stages={json_text(stages)}",
            *self.changes,
        ]


def regen(k: int) -> CompressionArm:
    """Return REGEN as implemented in this project, with the linear code."""
    return CompressionArm("regen", k)


def baseline(k: int) -> CompressionArm:
    """Return the baseline as published, without the linear code: the reference of the paper's margins."""
    return CompressionArm("magvit2", k, changes=_NO_LINEAR)


def regen_alone(k: int) -> CompressionArm:
    """Return REGEN without the linear code."""
    return CompressionArm("regen", k, "no_linear", _NO_LINEAR, "without the linear code", regen(k).name)


def baseline_with_code(k: int) -> CompressionArm:
    """Return the baseline with the linear code."""
    return CompressionArm("magvit2", k, "linear", (), "with our linear code", baseline(k).name)


def paper_form(k: int) -> CompressionArm:
    """Return REGEN with the paper's decoder: no local mixing."""
    return CompressionArm("regen", k, "paper", _PAPER, "the paper's form", regen(k).name)


def paper_form_alone(k: int) -> CompressionArm:
    """Return REGEN as in the paper: neither local mixing nor the linear code."""
    what = "the paper's form, without the linear code"
    return CompressionArm("regen", k, "paper-no_linear", (*_PAPER, *_NO_LINEAR), what, regen_alone(k).name)


def linear_code(k: int) -> CompressionArm:
    """Return the start of every arm with the linear code, fitted and not trained: what a decoder must improve on."""
    return CompressionArm("regen", k, "untrained", _UNTRAINED, "the linear code alone, not trained", regen(k).name)


def tuned_at(arm: CompressionArm) -> CompressionArm:
    """Return the arm at which this arm's learning rate is chosen: same kind and form, with or without the linear code
    alike."""
    where = {"regen": (regen_alone, regen), "magvit2": (baseline, baseline_with_code)}
    forms = (paper_form_alone, paper_form) if _PAPER[0] in arm.changes else where[arm.kind]
    return forms[arm.has_code](ABLATED)


# Without the linear code, which would hide what they do: with it a short training hardly leaves where it began.
VARIANTS = (
    CompressionArm(
        "regen", ABLATED, "full-no_linear", (*_FULL, *_NO_LINEAR), "full attention, without the linear code",
        regen_alone(ABLATED).name,
    ),
    CompressionArm(
        "regen", ABLATED, "in_context-no_linear", ("model.conditioning.kind=in_context", *_FULL, *_NO_LINEAR),
        "latents in context, full attention, without the linear code", f"regen-k{ABLATED}-full-no_linear",
    ),
    CompressionArm(
        "regen", ABLATED, "learned_time-no_linear", ("model.conditioning.time=learned", *_NO_LINEAR),
        "learned time embedding, without the linear code", regen_alone(ABLATED).name,
    ),
    CompressionArm(
        "regen", ABLATED, "no_first_frame_rule-no_linear",
        ("model.conditioning.first_frame_rule=false", *_NO_LINEAR),
        "without the first-frame rule and the linear code", regen_alone(ABLATED).name,
    ),
)  # fmt: skip

# Over the baseline in one step, dB of PSNR: the paper's margins on MCL-JCV.
MARGIN_TARGETS_DB = {8: 3.6, 16: 3.8, 32: 5.7}
# At twice the training resolution, over latents in context (the paper's conditioning ablation has 29.41 and 23.39 dB).
IN_CONTEXT_TARGET_DB = 6.0
CONTENT_AWARE, IN_CONTEXT = f"regen-k{ABLATED}-full-no_linear", f"regen-k{ABLATED}-in_context-no_linear"
# One-step PSNR in dB, (baseline, REGEN); at k = 4 of videos of 512x512.
PAPER_DB = {
    "MCL-JCV": {8: (29.14, 32.74), 16: (26.62, 30.41), 32: (22.97, 28.71)},
    "DAVIS": {8: (24.75, 29.34), 16: (21.21, 26.27), 32: (18.23, 23.49)},
    "512x512": {4: (31.49, 32.94)},
}


def all_arms() -> Iterator[CompressionArm]:
    """Yield both kinds at every temporal compression, each with and without the linear code, likewise the paper's form
    of REGEN and the linear code alone, then the variants."""
    for k in COMPRESSIONS:
        yield from (regen(k), baseline(k))
    for k in COMPRESSIONS:
        yield from (regen_alone(k), baseline_with_code(k))
    for k in COMPRESSIONS:
        yield from (paper_form(k), paper_form_alone(k))
    for k in COMPRESSIONS:
        yield linear_code(k)
    yield from VARIANTS


def chosen_arms(pattern: str) -> list[CompressionArm]:
    """Return the arms whose whole name matches a regular expression.

    Raises:
        ConfigError: the expression is invalid or matches none.
    """
    try:
        found = [arm for arm in all_arms() if re.fullmatch(pattern, arm.name)]
    except re.error as error:
        raise ConfigError(f"--arms {pattern!r} is no regular expression: {error}; give another") from error
    if not found:
        names = ", ".join(arm.name for arm in all_arms())
        raise ConfigError(f"--arms {pattern!r} matches no arm; there are {names}")
    return found


def stages_of(base: EmbedderConfig, k: int) -> list[dict[str, int]]:
    """Return the first stages of the config's encoder that together give the temporal compression k.

    Raises:
        ConfigError: there are too few, or one of them does not downsample in time.
    """
    number, stages = k.bit_length() - 1, base.model.encoder.stages
    if len(stages) < number or any(stage.temporal == 1 for stage in stages[:number]):
        raise ConfigError(
            f"model.encoder.stages has {len(stages)} stages; an encoder of k = {k} is made of the first {number}, each "
            "with temporal: 2"
        )
    return [stage.model_dump() for stage in stages[:number]]


# Step budget of an arm, its learning rate, and the facts of its training.

LEAST_STEPS = 4
TUNED_ON = 16  # clips of the validation data


def training_pace(run: Path, warm: int) -> dict[str, float]:
    """Return the median seconds per step after `warm` steps of a short run that logged every step: `cpu_s` of its
    process, `wall_s` by the clock. On an otherwise idle core they are equal."""
    lines = read_record(run / "metrics.jsonl", "train")[warm:]
    named = {"cpu_s": "cpu_step_s", "wall_s": "step_s"}
    return {name: median(line[key] for line in lines) for name, key in named.items()}


def num_steps(minutes: float, seconds_per_step: float) -> int:
    """Return the number of steps that fit into the time, at least `LEAST_STEPS`."""
    return max(LEAST_STEPS, int(60 * minutes / seconds_per_step))


def paced_config(overrides: Sequence[str], steps: int, warmup_steps: int) -> list[str]:
    """Return the overrides of a run of this many steps; its warm-up is at most a tenth of it."""
    return [*overrides, f"train.steps={steps}", f"optimizer.warmup_steps={min(warmup_steps, max(1, steps // 10))}"]


def best_rate(tried: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return the learning rate with the highest PSNR, and whether it is at an edge of the tried range (a better one may
    then lie beyond).

    Args:
        tried: `lr` and `psnr_db` of each.
    """
    rates = sorted(each["lr"] for each in tried)
    best = max(tried, key=lambda each: each["psnr_db"])["lr"]
    return {
        "lr": best,
        "at_edge": len(rates) > 1 and best in (rates[0], rates[-1]),
        "tried": [dict(each) for each in tried],
    }


def validation_psnr_db(run: Path) -> float:
    """One-step PSNR in dB of a run on its validation data, the mean over clips: what learning rates are chosen by."""
    config, codec = embedder_only(load_saved_config(run), str(run)), Codec.load(run)
    batch = validation_clip(config.data, num_frames=codec.num_frames, most=TUNED_ON)
    source = to_float(batch.video)
    made = codec.decode(codec.encode(source), torch.arange(codec.num_frames), sample_ids=batch.sample_ids.tolist())
    return mean_psnr_db(Decoded(to_frames(a), to_frames(b)) for a, b in zip(source, made, strict=True))


def is_trained(run: Path, steps: int) -> bool:
    """Return whether a run has the checkpoint of its last step."""
    try:
        _, folder = open_run(run)
        return find_checkpoint(folder, checksums=False).step >= steps
    except (ConfigError, CheckpointError):  # not begun, or not saved yet
        return False


def training_facts(run: Path) -> dict[str, Any]:
    """Return facts of an arm's training and model.

    `seconds` and `cpu_seconds` are wall and CPU time of its steps, without validation and saving; `flops` are those of
    forward and backward passes, `encode_flops` and `decode_flops` those of a clip in one step.
    """
    config = embedder_only(load_saved_config(run), str(run))
    lines = read_record(run / "metrics.jsonl", "train")
    steps = lines[-1]["step"]
    clips, counted = steps * config.train.batch_global, count_flops(config.model, config.data.size)
    encode = counted.forward_flops["encoder"]
    return {
        "lr": config.optimizer.lr,
        "steps": steps,
        "clips": clips,
        "seconds": _total(lines, "step_s"),
        "cpu_seconds": _total(lines, "cpu_step_s"),
        "flops": clips * training_flops_per_clip(config.model, config.data.size, decoded=config.diffusion.train_frames),
        "loss": lines[-1]["loss"],
        "skipped": lines[-1]["skipped"],
        "parameters": counted.parameters,
        "encode_flops": encode,
        "decode_flops": counted.num_forward_flops - encode,
        "bits_per_pixel": counted.bits_per_pixel,
    }


def _total(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    """Return the sum over all steps; a line holds the mean since the previous line."""
    begun = [0, *(line["step"] for line in lines)]
    return float(sum(line[name] * (line["step"] - before) for line, before in zip(lines, begun, strict=False)))


_PROBED_STEPS, _WARM_STEPS = 8, 3
_RATES = (0.5, 1.0, 2.0, 4.0)  # of the config's learning rate
_TUNED_SHARE = 0.25  # of an arm's steps, for each rate that is tried
_NEVER = 10**9
_PACE, _TUNING = "pace.json", "tuning.json"  # by arm: speed and steps; the learning rate, where rates are tuned


@dataclass(frozen=True)
class Runs:
    """All trainings of one table, in the folder `out`.

    Args:
        config, own: common config and its overrides.
        base: the loaded config.
        out: folder of all outputs.
        minutes: minutes on one core per arm.
        at_once: number of arms trained at a time.
        log: called with progress messages.
    """

    config: Path
    own: Sequence[str]
    base: EmbedderConfig
    out: Path
    minutes: float
    at_once: int
    log: Callable[[str], None]

    def folder(self, arm: CompressionArm) -> Path:
        """Return the folder of an arm's run."""
        return self.out / "arms" / arm.name

    def kept(self, arm: CompressionArm) -> Path:
        """Return the cache file of its measures."""
        return self.out / "measures" / f"{arm.name}.json"

    def claim(self, *, tune: bool) -> None:
        """Claim the folder for this config, budget and choice of learning rates.

        Raises:
            ConfigError: it belongs to others, whose trainings would not be comparable.
        """
        if not (self.out / "minutes.json").is_file():
            save_config(self.base, self.out)
        claim_minutes(self.out, self.minutes, "--minutes-per-arm")
        if load_saved_config(self.out) != self.base:
            raise ConfigError(
                f"the arms in {self.out} start from another config, see {self.out / 'config.yaml'}; give the same "
                "config and overrides, or another --out"
            )
        tuned, trained = (self.out / _TUNING).is_file(), (self.out / "arms").is_dir()
        if tuned != tune and (tuned or trained):
            raise ConfigError(
                f"the arms in {self.out} have {'tuned learning rates' if tuned else 'the learning rate of the config'}"
                f"; {'leave out' if tuned else 'give'} --no-tune, or another --out"
            )

    def take_over(self, shorter: Path) -> None:
        """Take the pace and the learning rates of a shorter budget's folder, where this folder has none of its own."""
        if not (self.out / _PACE).is_file():
            paces = _read_kept(shorter / _PACE)
            own = {name: each | {"steps": self._steps(name, each["cpu_s"])} for name, each in paces.items()}
            _keep(self.out / _PACE, own)
        if not (self.out / _TUNING).is_file() and (shorter / _TUNING).is_file():
            _keep(self.out / _TUNING, _read_kept(shorter / _TUNING))

    def pace(self, arms: Sequence[CompressionArm], *, tune: bool) -> dict[str, dict[str, float]]:
        """Return seconds per step and number of steps of each arm, measured once; later calls return the same."""
        known, wanted = _read_kept(self.out / _PACE), _unique([*arms, *(_tuned(arms) if tune else ())])
        new = [arm for arm in wanted if arm.name not in known]
        self._run("probes", {arm.name: self._probe(arm) for arm in new})
        for arm in new:
            measured = training_pace(self.out / "probes" / arm.name, _WARM_STEPS)
            known[arm.name] = {**measured, "steps": self._steps(arm.name, measured["cpu_s"])}
            self.log(f"{arm.name}: {measured['cpu_s']:.3f} s a step, {known[arm.name]['steps']} steps")
        _keep(self.out / _PACE, known)
        return known

    def tune(self, arms: Sequence[CompressionArm], *, tune: bool) -> dict[str, dict[str, Any]]:
        """Return the learning rates by the arm of k = 16 at which each was chosen (`tuned_at`), from short runs.
        Without tuning they are the config's.
        """
        lr, known = self.base.optimizer.lr, _read_kept(self.out / _TUNING)
        if not tune:
            return {arm.name: {"lr": lr, "at_edge": False, "tried": []} for arm in _tuned(arms)}
        tried = {arm: [lr * factor for factor in _RATES] for arm in _tuned(arms) if arm.name not in known}
        self._run(
            "tuning", {_tuning_name(arm, lr): self._tuning(arm, lr) for arm, rates in tried.items() for lr in rates}
        )
        for arm, rates in tried.items():
            folder = self.out / "tuning_runs"
            results = [{"lr": lr, "psnr_db": validation_psnr_db(folder / _tuning_name(arm, lr))} for lr in rates]
            known[arm.name] = best_rate(results)
            self.log(f"{arm.name}: learning rate {known[arm.name]['lr']:.2g}")
        _keep(self.out / _TUNING, known)
        return known

    def train(self, arms: Sequence[CompressionArm], tuning: Mapping[str, Mapping[str, Any]]) -> None:
        """Train what is not trained."""
        steps = {name: int(each["steps"]) for name, each in _read_kept(self.out / _PACE).items()}
        left = [arm for arm in arms if not is_trained(self.folder(arm), steps[arm.name])]
        commands = {}
        for arm in left:
            changes = paced_config(arm.overrides(self.base), steps[arm.name], self.base.optimizer.warmup_steps)
            rate = [f"optimizer.lr={tuning[tuned_at(arm).name]['lr']}"] if arm.trains else []
            commands[arm.name] = self._command([*changes, *rate])
        self._run("arms", commands)

    def facts(self, arm: CompressionArm) -> dict[str, Any]:
        """Return the facts of an arm for the JSON, without its measures."""
        fields = {name: getattr(arm, name) for name in ("kind", "k", "variant", "label", "against")}
        own = {"overrides": arm.overrides(self.base), "pace": _read_kept(self.out / _PACE)[arm.name]}
        return fields | own | {"training": training_facts(self.folder(arm))}

    def _steps(self, name: str, seconds_per_step: float) -> int:
        untrained = {linear_code(k).name for k in COMPRESSIONS}
        return LEAST_STEPS if name in untrained else num_steps(self.minutes, seconds_per_step)

    def _probe(self, arm: CompressionArm) -> list[str]:
        changes = paced_config(arm.overrides(self.base), _PROBED_STEPS, self.base.optimizer.warmup_steps)
        rhythm = ["train.log_every=1", f"train.validate_every={_NEVER}", f"checkpoint.every={_NEVER}"]
        return self._command([*changes, *rhythm, f"output={self.out / 'probes'}"])

    def _tuning(self, arm: CompressionArm, lr: float) -> list[str]:
        steps = max(2, int(_TUNED_SHARE * _read_kept(self.out / _PACE)[arm.name]["steps"]))
        changes = paced_config(arm.overrides(self.base), steps, self.base.optimizer.warmup_steps)
        own = [f"optimizer.lr={lr}", f"name={_tuning_name(arm, lr)}", f"output={self.out / 'tuning_runs'}"]
        return self._command([*changes, *own])

    def _command(self, changes: Sequence[str]) -> list[str]:
        return program("train", str(self.config), *self.own, *changes)

    def _run(self, what: str, commands: Mapping[str, Sequence[str]]) -> None:
        if not commands:
            return
        self.log(f"{what}: {len(commands)} to train, {self.at_once} at a time")
        run_side_by_side(
            commands, logs=self.out / "logs" / what, at_once=self.at_once, done=lambda name: self.log(f"done: {name}")
        )


def _read_kept(path: Path) -> dict[str, dict[str, Any]]:
    """Return facts by arm, as `_keep` wrote them; empty without the file."""
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _keep(path: Path, facts: Mapping[str, Any]) -> None:
    write_text_atomically(path, json_text(facts, indent=1) + "\n")


def _tuned(arms: Iterable[CompressionArm]) -> list[CompressionArm]:
    """Return the arms at which the learning rates of these are chosen."""
    return _unique(tuned_at(arm) for arm in arms if arm.trains)


def _unique(arms: Iterable[CompressionArm]) -> list[CompressionArm]:
    return list({arm.name: arm for arm in arms}.values())


def _tuning_name(arm: CompressionArm, lr: float) -> str:
    return f"{arm.name}-lr{lr:.2g}"
