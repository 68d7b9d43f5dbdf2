"""Trainings of the compression benchmark: arms, budgets, what is trained and when, and commands side by side."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from regen_dist.config import EmbedderConfig, load_embedder_config, save_config
from regen_dist.errors import ConfigError, TrainingError
from regen_dist.models.flops import count_flops
from tests.helpers.checkpoints import saved_run
from tests.helpers.jobs import wait_until
from tests.helpers.machine import wait_until_gone
from tests.helpers.tiny import tiny_dataset, tiny_model, tiny_run
from tools.bench import compression_runs
from tools.bench.common import run_side_by_side
from tools.bench.compression_runs import (
    COMPRESSIONS,
    LEAST_STEPS,
    MARGIN_TARGETS_DB,
    PAPER_DB,
    VARIANTS,
    CompressionArm,
    Runs,
    all_arms,
    baseline,
    best_rate,
    chosen_arms,
    is_trained,
    linear_code,
    num_steps,
    paced_config,
    paper_form,
    paper_form_alone,
    regen,
    regen_alone,
    stages_of,
    training_facts,
    training_pace,
    tuned_at,
    validation_psnr_db,
)

ROOT = Path(__file__).parents[4]
CONFIG = ROOT / "configs" / "bench" / "compression.yaml"
BASE = load_embedder_config(CONFIG)


def _config(arm: CompressionArm) -> EmbedderConfig:
    return load_embedder_config(CONFIG, arm.overrides(BASE))


def test_every_arm_is_a_valid_config_of_its_kind_and_compression() -> None:
    arms = list(all_arms())
    configs = [_config(arm) for arm in arms]
    assert len({arm.name for arm in arms}) == len(arms) == 32
    trained = [config for arm, config in zip(arms, configs, strict=True) if arm.trains]
    assert len({config.model for config in trained}) == len(trained) == 28
    for arm, config in zip(arms, configs, strict=True):
        assert (config.model.kind, config.model.temporal_compression) == (arm.kind, arm.k)
    same = {"name": "", "model": BASE.model}
    assert len({config.model_copy(update=same) for config in trained}) == 1, "the model alone differs"


@pytest.mark.parametrize("k", COMPRESSIONS)
def test_both_kinds_have_the_same_encoder_and_latents(k: int) -> None:
    ours, theirs = (_config(arm).model for arm in (regen(k), baseline(k)))
    assert (ours.encoder, ours.latent, ours.linear_start) == (theirs.encoder, theirs.latent, theirs.linear_start)


@pytest.mark.parametrize("k", COMPRESSIONS)
def test_the_linear_code_is_regens_and_each_kind_is_trained_with_and_without_it(k: int) -> None:
    arms = [arm for arm in all_arms() if arm.k == k and arm.trains and arm not in VARIANTS]
    has_code = {arm.name: _config(arm).model.decoder.linear for arm in arms}
    assert has_code == {
        f"regen-k{k}": True,
        f"magvit2-k{k}": False,
        f"regen-k{k}-no_linear": False,
        f"magvit2-k{k}-linear": True,
        f"regen-k{k}-paper": True,
        f"regen-k{k}-paper-no_linear": False,
    }


@pytest.mark.parametrize("k", COMPRESSIONS)
def test_the_linear_code_alone_is_regen_that_stays_where_it_begins(k: int) -> None:
    alone, beside = linear_code(k), regen(k)
    assert alone.against == beside.name
    ours, theirs = _config(alone), _config(beside)
    assert ours.optimizer.lr < 1e-9 * theirs.optimizer.lr
    same = {"name": "", "optimizer": theirs.optimizer}
    assert ours.model_copy(update=same) == theirs.model_copy(update=same)


@pytest.mark.parametrize("code", [True, False])
def test_the_papers_form_has_no_local_convolutions_and_a_rate_of_its_own(code: bool) -> None:
    arm = (paper_form if code else paper_form_alone)(8)
    assert not _config(arm).model.decoder.local
    assert tuned_at(arm) == (paper_form if code else paper_form_alone)(16)
    assert tuned_at(arm) != tuned_at((regen if code else regen_alone)(8))


@pytest.mark.parametrize("variant", [arm for arm in all_arms() if arm.against and arm.trains], ids=lambda arm: arm.name)
def test_a_variant_differs_in_one_thing_from_the_arm_that_it_stands_beside(variant: CompressionArm) -> None:
    beside = next(arm for arm in all_arms() if arm.name == variant.against)
    ours, theirs = (_config(arm).model.model_dump(mode="json") for arm in (variant, beside))
    sections = {
        "conditioning": ours["conditioning"],
        "attention": ours["decoder"].pop("attention"),
        "decoder": ours["decoder"],
    }
    others = {
        "conditioning": theirs["conditioning"],
        "attention": theirs["decoder"].pop("attention"),
        "decoder": theirs["decoder"],
    }
    assert sum(sections[name] != others[name] for name in sections) == 1
    assert ours["kind"] == theirs["kind"]


def test_arms_are_chosen_by_their_whole_names() -> None:
    assert [arm.name for arm in chosen_arms("regen-k16|magvit2-k4")] == ["magvit2-k4", "regen-k16"]
    assert len(chosen_arms(".*")) == 32
    with pytest.raises(ConfigError, match="matches no arm; there are regen-k4, "):
        chosen_arms("regen")
    with pytest.raises(ConfigError, match="no regular expression"):
        chosen_arms("(")


def test_only_regen_itself_is_measured_in_more_steps() -> None:
    assert {arm.name for arm in all_arms() if len(arm.steps) > 1} == {f"regen-k{k}" for k in COMPRESSIONS}


def test_a_config_with_too_few_stages_is_refused() -> None:
    base = load_embedder_config(CONFIG, CompressionArm("regen", 8).overrides(BASE))
    assert len(stages_of(base, 8)) == 3
    with pytest.raises(ConfigError, match="has 3 stages; an encoder of k = 16 is made of the first 4"):
        stages_of(base, 16)


def test_targets_are_the_papers_margins() -> None:
    for k, target in MARGIN_TARGETS_DB.items():
        theirs, ours = PAPER_DB["MCL-JCV"][k]
        assert ours - theirs == pytest.approx(target, abs=0.05)


# Steps for a time, the rhythm of short runs, the choice of a learning rate, and what a training took.


def _record(run: Path, *lines: tuple[int, float, float]) -> None:
    """Lines of training: step, seconds a step by the clock, and of the process."""
    run.mkdir(parents=True, exist_ok=True)
    facts = {"kind": "train", "loss": 0.5, "skipped": 0}
    texts = [json.dumps({**facts, "step": step, "step_s": wall, "cpu_step_s": cpu}) for step, wall, cpu in lines]
    (run / "metrics.jsonl").write_text("\n".join(texts))


def test_steps_fill_the_time() -> None:
    assert num_steps(10, 0.4) == 1500
    assert num_steps(0.001, 5.0) == LEAST_STEPS


def test_a_short_run_warms_up_for_a_tenth() -> None:
    assert paced_config(["a=1"], 1000, 30) == ["a=1", "train.steps=1000", "optimizer.warmup_steps=30"]
    assert paced_config([], 50, 30)[1] == "optimizer.warmup_steps=5"
    assert paced_config([], 4, 30)[1] == "optimizer.warmup_steps=1"


def test_the_pace_is_the_median_after_the_warm_steps(tmp_path: Path) -> None:
    _record(tmp_path, (1, 9.0, 8.0), (2, 2.0, 1.0), (3, 3.0, 1.25), (4, 30.0, 1.5))
    assert training_pace(tmp_path, 1) == {"cpu_s": 1.25, "wall_s": 3.0}


def test_the_best_rate_says_whether_a_better_one_may_lie_beyond() -> None:
    tried = [{"lr": 1e-3, "psnr_db": 20.0}, {"lr": 2e-3, "psnr_db": 21.0}, {"lr": 4e-3, "psnr_db": 20.5}]
    assert best_rate(tried) == {"lr": 2e-3, "at_edge": False, "tried": tried}
    assert best_rate(tried[:2])["at_edge"]
    assert not best_rate(tried[:1])["at_edge"]


def test_a_run_is_trained_when_its_last_step_is_saved(tmp_path: Path) -> None:
    assert not is_trained(tmp_path, 7)
    config = tiny_run(tmp_path)
    save_config(config, config.folder)
    assert not is_trained(config.folder, 7)
    saved_run(tmp_path, step=7)
    assert is_trained(config.folder, 7)
    assert not is_trained(config.folder, 8)


@pytest.mark.parametrize("kind", ["regen", "magvit2"])
def test_training_is_told_with_its_time_and_operations(tmp_path: Path, kind: str) -> None:
    config = tiny_run(tmp_path, model=tiny_model(kind=kind).model_dump(mode="json"), diffusion__train_frames=2)
    save_config(config, config.folder)
    _record(config.folder, (10, 2.0, 1.0), (25, 4.0, 2.0))
    found = training_facts(config.folder)
    assert (found["steps"], found["clips"], found["seconds"], found["cpu_seconds"]) == (25, 100, 80.0, 40.0)
    counted = count_flops(config.model, config.data.size)
    trained = count_flops(config.model, config.data.size, decoded=2)
    assert found["flops"] == 100 * trained.num_training_flops
    assert (trained == counted) == (kind == "magvit2")
    assert found["encode_flops"] + found["decode_flops"] == counted.num_forward_flops
    assert found["parameters"] == counted.parameters


def test_rates_are_chosen_on_the_validation_data(tmp_path: Path) -> None:
    config = saved_run(tmp_path, tiny_dataset(tmp_path), data__validation_url=str(tmp_path / "shards"))
    assert 5 < validation_psnr_db(config.folder) < 60


# The trainings of `regen bench compression`: which are made, with what, and that none is made twice.

ARMS = chosen_arms("regen-k4|magvit2-k4|regen-k16-full-no_linear")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Sequence[str]]]:
    """The commands of every batch of trainings; none is run, each takes half a second a step."""
    batches: list[dict[str, Sequence[str]]] = []

    def run(commands: Mapping[str, Sequence[str]], **_: Any) -> None:
        batches.append(dict(commands))

    monkeypatch.setattr(compression_runs, "run_side_by_side", run)
    monkeypatch.setattr(compression_runs, "training_pace", lambda run, warm: {"cpu_s": 0.5, "wall_s": 0.6})
    monkeypatch.setattr(compression_runs, "is_trained", lambda run, steps: run.name == "regen-k4")
    rates = {"0.00075": 20.0, "0.0015": 21.0, "0.003": 19.0, "0.006": 18.0}
    monkeypatch.setattr(
        compression_runs, "validation_psnr_db", lambda run: rates[f"{float(run.name.partition('-lr')[2]):.2g}"]
    )
    return batches


def _runs(out: Path, minutes: float = 2.0) -> Runs:
    own = (f"output={out}/arms",)
    return Runs(CONFIG, own, load_embedder_config(CONFIG, own), out, minutes, 2, lambda text: None)


def test_every_arm_is_paced_tuned_and_trained_once(tmp_path: Path, started: list[dict[str, Sequence[str]]]) -> None:
    runs = _runs(tmp_path)
    for _ in range(2):
        runs.claim(tune=True)
        runs.pace(ARMS, tune=True)
        tuning = runs.tune(ARMS, tune=True)
    probes, tuned = started
    assert set(probes) == {arm.name for arm in ARMS} | {"regen-k16", "magvit2-k16", "regen-k16-no_linear"}
    assert len(tuned) == 12, "as many rates for each"
    assert all("train.steps=60" in command for command in tuned.values()), "a quarter of 240"
    assert {name: found["lr"] for name, found in tuning.items()} == {
        "regen-k16": 0.0015,
        "magvit2-k16": 0.0015,
        "regen-k16-no_linear": 0.0015,
    }
    runs.train(ARMS, tuning)
    trained = started[-1]
    assert set(trained) == {"magvit2-k4", "regen-k16-full-no_linear"}
    for command in trained.values():
        assert {"train.steps=240", "optimizer.warmup_steps=24", "optimizer.lr=0.0015"} <= set(command)
        config = load_embedder_config(CONFIG, list(command[command.index(str(CONFIG)) + 1 :]))
        assert str(config.folder).startswith(str(tmp_path / "arms"))


def test_without_tuning_the_rate_is_the_configs(tmp_path: Path, started: list[dict[str, Sequence[str]]]) -> None:
    runs = _runs(tmp_path)
    runs.pace(ARMS, tune=False)
    assert set(started[0]) == {arm.name for arm in ARMS}
    assert runs.tune(ARMS, tune=False)["regen-k16-no_linear"] == {"lr": 1.5e-3, "at_edge": False, "tried": []}
    assert len(started) == 1


def test_another_budget_or_config_needs_another_folder(tmp_path: Path) -> None:
    runs = _runs(tmp_path)
    runs.claim(tune=True)
    runs.claim(tune=True)
    with pytest.raises(ConfigError, match=r"have 2 minutes each, now 3 are asked for; give --minutes-per-arm 2"):
        replace(runs, minutes=3.0).claim(tune=True)
    with pytest.raises(ConfigError, match="start from another config"):
        replace(
            runs, base=runs.base.model_copy(update={"data": runs.base.data.model_copy(update={"flip": False})})
        ).claim(tune=True)
    assert json.loads((tmp_path / "minutes.json").read_text()) == 2.0


def test_tuned_and_untuned_arms_need_folders_of_their_own(tmp_path: Path) -> None:
    """Beside arms that were trained at tuned rates, others at the config's would stand in one table."""
    tuned, plain = _runs(tmp_path / "tuned"), _runs(tmp_path / "plain")
    for runs in (tuned, plain):
        runs.claim(tune=True)
        runs.claim(tune=False)
    (tuned.out / "tuning.json").write_text("{}")
    (plain.out / "arms").mkdir()
    with pytest.raises(ConfigError, match="have tuned learning rates; leave out --no-tune"):
        tuned.claim(tune=False)
    with pytest.raises(ConfigError, match="have the learning rate of the config; give --no-tune"):
        plain.claim(tune=True)
    tuned.claim(tune=True)
    plain.claim(tune=False)


def test_measures_and_runs_have_their_places(tmp_path: Path) -> None:
    runs, arm = _runs(tmp_path), CompressionArm("regen", 8)
    assert runs.folder(arm) == tmp_path / "arms" / "regen-k8"
    assert runs.kept(arm) == tmp_path / "measures" / "regen-k8.json"


def test_a_longer_budget_takes_pace_and_rates_of_the_shorter(tmp_path: Path) -> None:
    """Steps follow the longer time; what the folder has measured itself stays."""
    short, long = tmp_path / "1", tmp_path / "4"
    short.mkdir()
    (short / "pace.json").write_text(json.dumps({"regen-k16": {"wall_s": 0.6, "cpu_s": 0.5, "steps": 120}}))
    (short / "tuning.json").write_text(json.dumps({"regen-k16": {"lr": 0.002}}))
    long.mkdir()
    runs = _runs(long, minutes=4)
    runs.take_over(short)
    assert json.loads((long / "pace.json").read_text())["regen-k16"] == {"wall_s": 0.6, "cpu_s": 0.5, "steps": 480}
    (long / "tuning.json").write_text(json.dumps({"regen-k16": {"lr": 0.001}}))
    runs.take_over(short)
    assert json.loads((long / "tuning.json").read_text())["regen-k16"]["lr"] == 0.001


# Commands side by side: all run, failures are named together, each has its log.


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_every_command_runs_with_its_share_of_the_cores_and_its_own_log(tmp_path: Path) -> None:
    done: list[str] = []
    show = "import os; print('threads', os.environ['OMP_NUM_THREADS'])"
    run_side_by_side({"a": _python(show), "b": _python(show)}, logs=tmp_path / "logs", at_once=2, done=done.append)
    assert sorted(done) == ["a", "b"]
    for name in ("a", "b"):
        assert (tmp_path / "logs" / f"{name}.log").read_text().startswith("threads ")


def test_a_failure_is_named_after_the_others_have_run(tmp_path: Path) -> None:
    commands = {"bad": _python("raise SystemExit(7)"), "good": _python(f"open({str(tmp_path / 'ran')!r}, 'w')")}
    with pytest.raises(TrainingError, match=r"1 of 2 runs failed: bad \(exit code 7"):
        run_side_by_side(commands, logs=tmp_path, at_once=1)
    assert (tmp_path / "ran").exists()


def test_an_interruption_ends_what_runs_and_starts_nothing_more(tmp_path: Path) -> None:
    started, saved, later = (tmp_path / name for name in ("started", "saved", "later"))
    runs = _python(
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(saved)!r}, 'w'), sys.exit(75)))\n"
        f"open({str(started)!r}, 'w')\n"
        "for _ in range(1200): time.sleep(0.1)"  # a signal just before one long sleep would be handled at its end
    )

    def interrupt() -> None:
        while not started.exists():
            time.sleep(0.02)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    began, done = time.monotonic(), list[str]()
    commands = {"first": runs, "second": _python(f"open({str(later)!r}, 'w')")}
    with pytest.raises(KeyboardInterrupt):
        run_side_by_side(commands, logs=tmp_path, at_once=1, done=done.append)
    assert saved.exists()
    assert not later.exists()
    assert done == [], "what was ended is not done"
    assert time.monotonic() - began < 60


def test_a_killed_bench_leaves_no_training_behind(tmp_path: Path) -> None:
    """SIGKILL of the bench: the kernel ends what it has started."""
    code = (
        "import sys; from pathlib import Path; from tools.bench.common import run_side_by_side\n"
        "wait = 'import os, time; print(os.getpid(), flush=True); time.sleep(300)'\n"
        "run_side_by_side({'a': [sys.executable, '-c', wait]}, logs=Path(sys.argv[1]), at_once=1)\n"
    )
    log = tmp_path / "a.log"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) as bench:
        try:
            wait_until(lambda: log.is_file() and log.read_text().strip().isdigit(), lambda: "it did not start")
        finally:
            bench.kill()
    pid = int(log.read_text())
    wait_until_gone([pid])
