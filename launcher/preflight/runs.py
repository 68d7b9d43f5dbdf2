"""The runs themselves: whether they are running, done, or could not go on from what they have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launcher.job import JOB_FILE, LAUNCH, Job, newest_job
from launcher.preflight.findings import Finding, Subject, by_run, note, problem, side_by_side
from launcher.preflight.storage import READING, dataset_manifest
from launcher.waiting import is_alive
from regen_dist.checkpoint.belonging import foreign_run
from regen_dist.checkpoint.claims import Claims
from regen_dist.checkpoint.manifest import Manifest, parse_manifest
from regen_dist.config import AnyRunConfig, T2VConfig, load_saved_config
from regen_dist.config.identity import latent_identity, order_changes, order_identity
from regen_dist.config.schema import ModelConfig
from regen_dist.config.t2v import T2VModelConfig
from regen_dist.data.objects.store import Store
from regen_dist.errors import CheckpointError, ConfigError, DataError, ObjectMissing, RegenError, RunBusy
from regen_dist.observe.record import read_record


def alive(subject: Subject) -> Iterator[Finding]:
    """No job works in the same folders."""
    wanted = {task.folder for task in subject.order.tasks}
    for base in dict.fromkeys([subject.order.base, *sorted(wanted), *_sweeps(subject.order.base.parent)]):
        try:
            job = newest_job(base)
            shared = _shared(job, base, subject) if job else []
            lives = job is not None and bool(shared) and is_alive(job)
        except RegenError as error:
            yield note(f"whether the newest job in {base} still runs could not be told: {error}")
            continue
        if job is not None and lives:
            which = "it" if len(wanted) == 1 else ", ".join(folder.name for folder in shared[:3])
            yield problem(
                f"job {job.id()} ({job.cluster_name}) runs or waits for {which} already, in {base}; wait for it, or "
                f"end it first: `regen jobs stop {base}`"
            )


def claimed(subject: Subject) -> Iterator[Finding]:
    """No process trains the same runs, or writes the same checkpoints, by whatever it was started."""
    yield from by_run(subject.configs, _claimed)


def _claimed(config: AnyRunConfig) -> Iterator[Finding]:
    try:
        Claims(config, READING).refuse_living()
    except RunBusy as error:
        yield problem(str(error))
    except DataError:  # the store is out of reach, which another check tells
        return


def _shared(job: Job, base: Path, subject: Subject) -> list[Path]:
    """The folders of a job that this one would work in, too."""
    wanted = [task.folder for task in subject.order.tasks]
    return [base] if base == subject.order.base else [task.folder for task in job.tasks if task.folder in wanted]


def _sweeps(folder: Path) -> list[Path]:
    """Arrays of training whose runs lie in this folder."""
    return sorted({path.parents[2] for path in folder.glob(f"*-sweep/{LAUNCH}/*/{JOB_FILE}")})


def standing(subject: Subject) -> Iterator[Finding]:
    """What a run has done already: all of it, or something that this config cannot go on from."""
    fresh = any("--fresh" in task.command for task in subject.order.tasks)
    down: set[str | None] = set()  # stores; of many runs, not each shall wait for one
    yield from by_run(subject.configs, lambda config: _standing(config, down, fresh=fresh))


def _standing(config: AnyRunConfig, down: set[str | None], *, fresh: bool) -> Iterator[Finding]:
    if config.checkpoint.url in down:
        return
    try:
        manifest = newest_checkpoint(config.checkpoints)
    except CheckpointError as error:
        yield note(f"{error}; the run goes on from the newest checkpoint that is whole")
        return
    except DataError:  # the store is out of reach, which another check tells
        down.add(config.checkpoint.url)
        return
    if manifest is None:
        yield from () if fresh else _lost(config)
        return
    if manifest.step >= config.train.steps:
        yield note(f"nothing is left to do: all {config.train.steps} steps are done")
    if foreign := foreign_run(config, manifest):
        yield problem(foreign)
    yield from _refusals(config, manifest)


def newest_checkpoint(url: str) -> Manifest | None:
    """What the checkpoint that `latest` names says of itself; None where there is none.

    Raises:
        CheckpointError: it is damaged.
        DataError: the store does not answer.
    """
    store = Store(url, READING)
    try:
        name = store.get("latest").decode("utf-8", "replace").strip()
        path = f"{name}/manifest.json"
        return parse_manifest(store.get(path), f"checkpoint {store.url}/{path}")
    except ObjectMissing:
        return None


def _lost(config: AnyRunConfig) -> Iterator[Finding]:
    """The record tells of checkpoints, and there are none."""
    path = config.folder / "metrics.jsonl"
    lines = read_record(path, "checkpoint") if path.is_file() else []
    saved = [line["step"] for line in lines if not line["problem"]]
    if saved and not any(name.endswith("/manifest.json") for name in Store(config.checkpoints, READING).list()):
        yield problem(
            f"{path} tells of a checkpoint of step {saved[-1]}, but {config.checkpoints} holds none. Is that folder "
            "mounted, and checkpoint.url the one it was? Restore them, or start the run from scratch with --fresh"
        )


def _refusals(config: AnyRunConfig, manifest: Manifest) -> Iterator[Finding]:
    """What every rank would say at its start."""
    where = f"the checkpoint of step {manifest.step} in {config.checkpoints}"
    if changed := _model_changes(config):
        yield problem(
            f"{where} was saved by another model ({', '.join(changed)} of {config.folder}/config.yaml differ); give "
            "the run another name, or restore the model section"
        )
    before: dict[str, str] | None = manifest.state["data"]
    if before is None:  # imported weights: any data will do
        return
    if changed := order_changes(before, _identity(config, before)):
        yield problem(
            f"the run cannot go on from {where}, because the order of its data has changed: {'; '.join(changed)}. "
            "Restore that, or give the run another name"
        )


def _identity(config: AnyRunConfig, before: dict[str, str]) -> dict[str, str]:
    try:
        prints = [str(each["fingerprint"]) for each in side_by_side(dataset_manifest, config.data.sources)]
    except (DataError, KeyError, ValueError):  # which another check tells; compared is the rest
        prints = None
    found = _order_of(config, prints or [])
    name = "dataset fingerprint"
    return found if prints else found | {name: before.get(name, "not told")}


def _order_of(config: AnyRunConfig, prints: Sequence[str]) -> dict[str, str]:
    train = config.train
    if isinstance(config, T2VConfig):
        return latent_identity(config.data, prints, batch_global=train.batch_global, seed=train.seed)
    return order_identity(
        config.data, prints, num_frames=config.model.num_frames, batch_global=train.batch_global, seed=train.seed
    )


def _model_changes(config: AnyRunConfig) -> Sequence[str]:
    """Keys of the model by which its parameters differ from those that the run was started with, as far as the config
    in its folder tells."""
    try:
        saved = load_saved_config(config.folder).model
    except ConfigError:  # of another version, or not there
        return []
    before, now = parameter_keys(saved), parameter_keys(config.model)
    return [f"model.{key}" for key in sorted({*before, *now}) if before.get(key) != now.get(key)]


def parameter_keys(model: ModelConfig | T2VModelConfig) -> dict[str, Any]:
    """The sections of a model's config, without what leaves names and shapes of its parameters as they are."""
    values = model.model_dump(mode="json")
    if isinstance(model, T2VModelConfig):
        del values["attention"]  # heads stay: queries and keys are normed by them
        return values
    values["latent"].pop("noise_std")
    values.pop("linear_start")
    if model.kind == "magvit2":  # of the two it has the linear code alone
        del values["conditioning"]
        return values | {"decoder": {"linear": model.decoder.linear}}
    for key in ("heads", "attention"):
        values["decoder"].pop(key)
    if model.conditioning.kind == "in_context":  # takes nothing else
        return values | {"conditioning": {"kind": "in_context"}}
    for key in ("omega", "first_frame_rule"):
        values["conditioning"].pop(key)
    return values
