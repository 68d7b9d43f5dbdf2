"""Checks that a run can resume: its claims, its checkpoints, its model and the order of its data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from regen_dist.checkpoint.claims import Claims
from regen_dist.checkpoint.manifest import CheckpointManifest, foreign_run_reason, parse_manifest
from regen_dist.checks.data import READING, dataset_manifest
from regen_dist.checks.findings import Finding, Target, error, note
from regen_dist.config import AnyRunConfig, EmbedderConfig, T2VConfig, load_saved_config
from regen_dist.config.identity import facts_identity, latent_identity, order_changes, order_identity
from regen_dist.data.storage.store import Store
from regen_dist.errors import CheckpointError, ConfigError, DataError, NoGoodCheckpoint, ObjectMissing, RunBusy
from regen_dist.observe.record import read_record

_ENCODER = "encoder"  # a frozen encoder's fingerprint, as models/diffusers_encoder.py names it, which needs torch


def busy(config: AnyRunConfig, target: Target) -> Iterator[Finding]:
    """Check that no process, however it was started, trains the same run or writes the same checkpoints."""
    try:
        Claims(config, READING).refuse_if_taken()
    except RunBusy as caught:
        yield error("name", str(caught), RunBusy)
    except DataError:  # the store is out of reach, which another check reports
        return


def resume(config: AnyRunConfig, target: Target) -> Iterator[Finding]:
    """Check whether a run is already complete, or has a state that this config cannot resume from."""
    if config.checkpoint.url in target.down:
        return
    try:
        manifest = newest_checkpoint(config.checkpoints)
    except CheckpointError as caught:
        yield note("checkpoint.url", f"{caught}; the run goes on from the newest checkpoint that is whole")
        return
    except DataError:  # the store is out of reach, which another check reports
        target.down.add(config.checkpoint.url)
        return
    if manifest is None:
        gone = [] if target.fresh else list(lost(config))
        if gone and not any(name.endswith("/manifest.json") for name in Store(config.checkpoints, READING).list()):
            yield from gone
        return
    if manifest.step >= config.train.steps:
        yield note("train.steps", f"nothing is left to do: all {config.train.steps} steps are done")
    if foreign := foreign_run_reason(config, manifest):
        yield error("name", foreign, CheckpointError)
    yield from _another_network(config, manifest)
    if (before := manifest.state["data"]) is not None:
        yield from another_order(config, manifest, _identity(config, before, target))


def newest_checkpoint(url: str) -> CheckpointManifest | None:
    """Read the manifest of the checkpoint that `latest` names; None where there is none.

    Raises:
        CheckpointError: the checkpoint is damaged.
        DataError: the store does not answer.
    """
    store = Store(url, READING)
    try:
        name = store.get("latest").decode("utf-8", "replace").strip()
        path = f"{name}/manifest.json"
        return parse_manifest(store.get(path), f"checkpoint {store.url}/{path}")
    except ObjectMissing:
        return None


def lost(config: AnyRunConfig) -> Iterator[Finding]:
    """Check that the record names no checkpoint, where there is none: a folder that is not mounted or was emptied is
    not a new run."""
    path = config.folder / "metrics.jsonl"
    lines = read_record(path, "checkpoint") if path.is_file() else []
    if saved := [line["step"] for line in lines if not line["problem"]]:
        text = (
            f"{path} records a checkpoint of step {saved[-1]}, but {config.checkpoints} holds none. Is that folder "
            "mounted, and checkpoint.url the one it was? Restore them, or start the run from scratch with --fresh"
        )
        yield error("checkpoint.url", text, NoGoodCheckpoint)


def _another_network(config: AnyRunConfig, manifest: CheckpointManifest) -> Iterator[Finding]:
    """Compare the model and the discriminator that the config describes with the checkpoint's."""
    try:
        from regen_dist.checkpoint.export import discriminator_shapes, model_shapes
    except ImportError as caught:
        yield note("model", f"the model was not compared with the checkpoint's, which takes torch ({caught})")
        return
    yield from another_model(config, manifest, model_shapes(config.model))
    yield from another_discriminator(config, manifest, discriminator_shapes(config))


def another_model(
    config: AnyRunConfig, manifest: CheckpointManifest, shapes: Mapping[str, list[int]]
) -> Iterator[Finding]:
    """Check that the parameters of the config's model have the names and shapes of the checkpoint's."""
    if manifest.shapes == shapes:
        return
    changed = _changed_sections(config)
    which = f" ({', '.join(changed)} of {config.folder}/config.yaml differ)" if changed else ""
    text = (
        f"{_where(config, manifest)} was saved by another model{which}; give the run another name, or restore the "
        "model section"
    )
    yield error("model", text, CheckpointError)


def another_discriminator(
    config: AnyRunConfig, manifest: CheckpointManifest, shapes: Mapping[str, list[int]] | None
) -> Iterator[Finding]:
    """Check that a discriminator goes on as the same; it may begin anew or be dropped (None)."""
    saved = manifest.state.get("companion")
    if shapes is None or saved is None or saved["shapes"] == shapes:
        return
    text = (
        f"{_where(config, manifest)} holds another discriminator; restore train.losses.adversarial.channels and "
        ".layers, or give the run another name"
    )
    yield error("train.losses.adversarial", text, CheckpointError)


def another_order(config: AnyRunConfig, manifest: CheckpointManifest, identity: Mapping[str, str]) -> Iterator[Finding]:
    """Check that the data comes in the order of the checkpoint's run; imported weights go on with any data."""
    before: dict[str, str] | None = manifest.state["data"]
    if before is not None and (changed := order_changes(before, identity)):
        text = (
            f"the run cannot go on from {_where(config, manifest)}, because the order of its data has changed: "
            f"{'; '.join(changed)}. Restore that, or give the run another name"
        )
        yield error("data", text, CheckpointError)


def _where(config: AnyRunConfig, manifest: CheckpointManifest) -> str:
    return f"the checkpoint of step {manifest.step} in {config.checkpoints}"


def _changed_sections(config: AnyRunConfig) -> Sequence[str]:
    """Model keys that differ from the config in the run folder, if there is one."""
    try:
        before = load_saved_config(config.folder).model.model_dump(mode="json")
    except ConfigError:  # of another version, or not there
        return []
    now = config.model.model_dump(mode="json")
    return [f"model.{key}" for key in sorted({*before, *now}) if before.get(key) != now.get(key)]


def _identity(config: AnyRunConfig, before: dict[str, str], target: Target) -> dict[str, str]:
    try:
        manifests = [target.once("manifest", url, dataset_manifest) for url in config.data.sources]
        prints = [str(each["fingerprint"]) for each in manifests]
        facts = facts_identity([(each.get("described") or {}).get("facts") for each in manifests])
    except (DataError, KeyError, ValueError, AttributeError):  # reported by another check; the rest is compared
        prints, facts = None, {}
    known = ["dataset fingerprint"] if not prints else []
    if isinstance(config, EmbedderConfig) and config.model.encoder.frozen and _ENCODER in before:
        known.append(_ENCODER)  # takes the weights; the run compares it
    return _order_of(config, prints or []) | facts | {name: before.get(name, "unknown") for name in known}


def _order_of(config: AnyRunConfig, prints: Sequence[str]) -> dict[str, str]:
    train = config.train
    if isinstance(config, T2VConfig):
        return latent_identity(config.data, prints, batch_global=train.batch_global, seed=train.seed)
    return order_identity(
        config.data, prints, num_frames=config.model.num_frames, batch_global=train.batch_global, seed=train.seed
    )
