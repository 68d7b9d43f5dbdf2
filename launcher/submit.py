"""Creation of jobs and their submission to a scheduler."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from launcher import local_executor, slurm
from launcher.attempts import HISTORY_FILE, archive, archive_history, attempts_since, read_history, submission_time
from launcher.cluster import ClusterConfig
from launcher.job import ID_FILE, LAUNCH, JobTask, Submission, TaskProgress, new_folder, write_job
from launcher.retry import is_complete, newest_step
from launcher.script import slurm_executor, slurm_tasks
from regen_dist.config import AnyRunConfig, config_hash, load_config, to_yaml
from regen_dist.config.files import write_text_atomically
from regen_dist.config.version import VERSION_FILE, code_version
from regen_dist.config.yaml_files import parse_yaml
from regen_dist.errors import EXIT_OK, EXIT_RESUME, BackendError, ConfigError, RegenError, RunBusy
from regen_dist.jsontext import json_text
from regen_dist.shared_files import IDLE_S, remove_leftovers, temporary_beside

# Code snapshots: a copy made at submission, so that a job that restarts next week runs the same code.

ROOT = Path(__file__).resolve().parents[1]
_PARTS = ("regen_dist", "launcher", "tools", "configs", "pyproject.toml")
_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def take_snapshot(folder: Path, root: Path = ROOT) -> Path:
    """Copy the code to `folder/HASH`; identical code is copied once.

    The copy includes `VERSION` (the result of `code_version`) and, from a git checkout, `changes.patch` (the difference
    from the commit).

    Args:
        folder: parent of all snapshots of a run.
        root: checkout or installation.
    """
    place = folder / _fingerprint(root)
    if place.is_dir():
        return place
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, idle_s=IDLE_S)
    temporary = temporary_beside(place)
    try:
        temporary.mkdir()
        for part in _existing(root):
            if part.is_dir():
                shutil.copytree(part, temporary / part.name, ignore=_IGNORED)
            else:
                shutil.copy2(part, temporary / part.name)
        (temporary / VERSION_FILE).write_text(code_version() + "\n", encoding="utf-8")
        (temporary / "changes.patch").write_bytes(_changes(root))
        os.replace(temporary, place)
    except OSError:
        if not place.is_dir():  # another submission may have created it first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return place


def _fingerprint(root: Path) -> str:
    digest = hashlib.sha256()
    for part in _existing(root):
        folders = os.walk(part, followlinks=True)  # as the copy does
        inside = [Path(folder, name) for folder, _, names in folders for name in names]
        for path in sorted(inside) if part.is_dir() else [part]:
            if path.is_file() and not _is_ignored(path.relative_to(root)):
                digest.update(os.fsencode(path.relative_to(root)) + f"\0{path.stat().st_size}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _existing(root: Path) -> list[Path]:
    return [root / name for name in _PARTS if (root / name).exists()]


def _is_ignored(path: Path) -> bool:
    return path.suffix == ".pyc" or any(part == "__pycache__" or part.startswith(".") for part in path.parts)


def _changes(root: Path) -> bytes:
    """Return the difference from the commit; empty outside a git checkout or without git."""
    if not (root / ".git").exists():
        return b""
    command = ["git", "-C", str(root), "diff", "HEAD", "--", *(path.name for path in _existing(root))]
    try:
        return subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return b""


@dataclass(frozen=True)
class SubmissionRequest:
    """Commands and cluster of a submission, before anything is written.

    Args:
        name: name of the job.
        base: folder of the job; its submissions are stored in `launch/` there.
        tasks: one task, or those of an array.
        cluster: the cluster, with the overrides of the command line.
        cluster_name: its name as the user gave it.
        configs: configs of training tasks, in task order; empty for other commands.
    """

    name: str
    kind: Literal["train", "run", "sweep"]
    base: Path
    tasks: tuple[JobTask, ...]
    cluster: ClusterConfig
    cluster_name: str
    configs: tuple[AnyRunConfig, ...] = ()
    parent_fingerprint: str = ""  # fingerprint of the request that this is a part of
    known: frozenset[tuple[str, bool]] = field(init=False, repr=False, compare=False)  # submissions at this time

    def __post_init__(self) -> None:
        object.__setattr__(self, "known", _submissions(self.base))

    @property
    def fingerprint(self) -> str:
        """Hash of commands and configs (hexadecimal); a new hash means a new job."""
        what = [[*task.command] for task in self.tasks] + [[config_hash(config)] for config in self.configs]
        return self.parent_fingerprint or hashlib.sha256(json_text(what).encode()).hexdigest()[:16]

    def part(self, tasks: Sequence[JobTask]) -> SubmissionRequest:
        """Return the same request for a subset of its tasks."""
        configs = tuple(c for task, c in zip(self.tasks, self.configs, strict=False) if task in tasks)
        return replace(self, tasks=tuple(tasks), configs=configs, parent_fingerprint=self.fingerprint)

    @property
    def distributed(self) -> bool:
        return bool(self.configs)

    def job(self, folder: Path, code: Path) -> Submission:
        """Return the request as a submission stored in `folder`."""
        return Submission(
            name=self.name, kind=self.kind, cluster=self.cluster, cluster_name=self.cluster_name, tasks=self.tasks,
            distributed=self.distributed, folder=folder, workdir=Path.cwd(), code=code,
            submitted=submission_time(task.launch for task in self.tasks), fingerprint=self.fingerprint,
        )  # fmt: skip


def train_task(config: AnyRunConfig, *, fresh: bool = False) -> JobTask:
    """Return a training task. It uses a copy of the resolved config in the run folder, so that a pending job does not
    change."""
    folder = config.folder.absolute()
    flags = ["--fresh"] if fresh else []
    progress = TaskProgress(checkpoints=_absolute(config.checkpoints), steps=config.train.steps)
    command = ("train", *flags, "--", str(folder / LAUNCH / "config.yaml"))
    return JobTask(name=config.name, folder=folder, command=command, progress=progress)


def _absolute(url: str) -> str:
    return url if "://" in url else str(Path(url).absolute())


def train_request(
    config: AnyRunConfig, cluster: ClusterConfig, cluster_name: str, *, fresh: bool = False
) -> SubmissionRequest:
    """Return the request of one training run."""
    task = train_task(config, fresh=fresh)
    return SubmissionRequest(config.name, "train", task.folder, (task,), cluster, cluster_name, (config,))


def fill_placeholders(text: str, number: int, tasks: int) -> str:
    """Replace `{task}` and `{tasks}` in a text by a task's index (from 0) and the number of tasks."""
    return text.replace("{task}", str(number)).replace("{tasks}", str(tasks))


def command_request(
    name: str, base: Path, command: Sequence[str], cluster: ClusterConfig, cluster_name: str, *, tasks: int = 1
) -> SubmissionRequest:
    """Return the request of any `regen` command, or of an array of them."""
    base = base.absolute()

    def one(number: int) -> JobTask:
        filled = tuple(fill_placeholders(each, number, tasks) for each in command)
        folder = base if tasks == 1 else base / "tasks" / f"{number:05d}"
        return JobTask(name=name if tasks == 1 else f"{name}[{number}]", folder=folder, command=filled)

    return SubmissionRequest(name, "run", base, tuple(map(one, range(tasks))), cluster, cluster_name)


def submit(request: SubmissionRequest, dependency: str | None = None) -> Submission:
    """Write the job's files and hand it to the scheduler. A refused submission leaves nothing behind but the copy of
    the code.

    Args:
        dependency: Slurm's dependency, such as "afterok:123".

    Raises:
        RegenError: Slurm refused the job, or it did not start on this machine, or it was submitted meanwhile.
    """
    code = take_snapshot(request.base / LAUNCH / "code")
    folder = claim_folder(request)
    job = request.job(folder, code)
    configs = {task.launch / "config.yaml": config for task, config in zip(job.tasks, request.configs, strict=False)}
    again = [task.launch for task in job.tasks if task.progress is None]  # a resubmitted command runs again
    with _put_back([*configs, *(launch / name for launch in again for name in (HISTORY_FILE, archive(folder.name)))]):
        for launch in again:
            archive_history(launch, folder.name)
        for path, config in configs.items():
            write_text_atomically(path, to_yaml(config))
        return submit_to_slurm(job, dependency)


def claim_folder(request: SubmissionRequest) -> Path:
    """Create the folder of a submission.

    Raises:
        RunBusy: another command has submitted this job, or is about to, since the request was made.
    """
    folder = new_folder(request.base)
    if others := sorted(name for name, _ in _submissions(request.base) - request.known if name != folder.name):
        folder.rmdir()
        raise RunBusy(
            f"{request.name}: another command submits it at this time ({request.base / LAUNCH / others[-1]}); see "
            "`regen jobs`, and submit it again if it is not there"
        )
    return folder


def _submissions(base: Path) -> frozenset[tuple[str, bool]]:
    """Return the name of every submission of a job, and whether a scheduler has taken it."""
    return frozenset((path.name, (path / ID_FILE).is_file()) for path in (base / LAUNCH).glob("[0-9]*"))


@contextmanager
def _put_back(paths: Sequence[Path]) -> Iterator[None]:
    """Give small files their earlier content if the job is not submitted. They are written before a scheduler is asked,
    because a job may start at once."""
    before = {path: path.read_bytes() if path.is_file() else None for path in paths}
    try:
        yield
    except BaseException:  # Ctrl-C and a full disk, too
        for path, content in before.items():
            if content is None:
                path.unlink(missing_ok=True)
            elif not path.is_file() or path.read_bytes() != content:  # on a full disk only what has changed
                path.write_bytes(content)
        raise


def submit_to_slurm(job: Submission, dependency: str | None = None) -> Submission:
    """Give a job to its scheduler; its folder and code snapshot must exist.

    Raises:
        RegenError: see `submit`.
    """
    with _put_back([task.stop_file for task in job.tasks]):
        for task in job.tasks:
            task.stop_file.unlink(missing_ok=True)
        write_job(job)
        try:
            if job.cluster.kind == "local":
                local_executor.start_locally(job)
            else:
                write_text_atomically(job.folder / ID_FILE, f"{_sbatch(job, dependency)}\n")
        except BaseException:
            shutil.rmtree(job.folder, ignore_errors=True)  # without it a job that Slurm has taken does not begin
            raise
    return job


def _sbatch(job: Submission, dependency: str | None) -> str:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    if not slurm.is_available():
        raise BackendError("sbatch not found: submit where Slurm is installed, or with --cluster local")
    executor = slurm_executor(job, dependency)
    try:
        return executor.submit_all(slurm_tasks(job))
    except (FailedJobError, FailedSubmissionError) as error:
        message = _sbatch_message(error)
        if slurm.is_unreachable(message):
            raise BackendError(
                f"Slurm did not answer: {message}; wait until `sinfo` answers, then submit again"
            ) from None
        raise BackendError(
            f"Slurm refused the job: {message}"
            "; change what it names in the cluster file or the options, then submit again"
        ) from None


def _sbatch_message(error: BaseException) -> str:
    """Extract sbatch's message from Submitit's exception; its cause names only command and exit code."""
    lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines() if line.strip()]
    return "; ".join(line for line in lines if "error:" in line) or (lines[0] if lines else repr(error))


def local_exit_code(job: Submission) -> int | None:
    """Return the exit code of a local job; None while it runs or if it was killed."""
    path = job.folder / local_executor.EXIT_FILE
    return int(path.read_text()) if path.is_file() else None


# Sweeps: one run per value of a key, as one array.

_SUFFIX = "-sweep"


def expand_sweep(config: Path, overrides: Sequence[str], sweeps: Sequence[str]) -> list[tuple[AnyRunConfig, str]]:
    """Return the config of every run of a sweep, with the name of the base run.

    Runs are named after their values: `nano` swept over `optimizer.lr=1e-3,3e-3` gives `nano-lr1e-3`, `nano-lr3e-3`.

    Args:
        config: a YAML file.
        overrides: applied to every run.
        sweeps: `a.b=value,value`; several give every combination.

    Raises:
        ConfigError: a sweep is malformed or has one value, two runs have the same name, or a config is invalid.
    """
    base = load_config(config, overrides).name
    runs = []
    for chosen in itertools.product(*map(_parse_sweep, sweeps)):
        name = "-".join([base, *(f"{key.rpartition('.')[2]}{_as_name(text)}" for key, text in chosen)])
        own = [*(f"{key}={text}" for key, text in chosen), f"name={name}"]
        runs.append((load_config(config, [*overrides, *own]), base))
    names = [run.name for run, _ in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"two runs of the sweep would be named {', '.join(twice)}; give values that differ in letters"
        )
    return runs


def _parse_sweep(sweep: str) -> list[tuple[str, str]]:
    """Split `a.b=[1, 2],[3, 4]` into pairs of its key and each value, as written."""
    key, equals, text = sweep.partition("=")
    values = _split(text)
    if not equals or not key or len(values) < 2:
        raise ConfigError(
            f"--sweep {sweep}: found {len(values)} value(s); write a.b=value,value, as optimizer.lr=1e-3,3e-3"
        )
    return [(key, value) for value in values]


def _split(text: str) -> list[str]:
    """Split at commas outside brackets and quotes, by YAML's rules."""
    try:
        parse_yaml(f"[{text}]")
    except yaml.YAMLError as error:
        raise ConfigError(f"--sweep …={text}: not valid YAML: {' '.join(str(error).split())}") from None
    node: Any = yaml.compose(f"[{text}]", Loader=yaml.SafeLoader)
    return [f"[{text}]"[each.start_mark.index : each.end_mark.index] for each in node.value]


def _as_name(text: str) -> str:
    """Return a value as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("_")


def sweep_request(
    runs: Sequence[tuple[AnyRunConfig, str]], cluster: ClusterConfig, cluster_name: str
) -> SubmissionRequest:
    """Return the request of all runs as one array. Runs keep their folders; the array's folder is NAME-sweep."""
    configs = tuple(config for config, _ in runs)
    name = f"{runs[0][1]}{_SUFFIX}"
    base = configs[0].folder.absolute().parent / name
    return SubmissionRequest(name, "sweep", base, tuple(map(train_task, configs)), cluster, cluster_name, configs)


# Waiting for a job.

_LOCAL_POLL_S, _SLURM_POLL_S = 0.3, 5.0


def wait_for(job: Submission) -> int:
    """Block until a job has ended; return 0, or the exit code of its first task that did not succeed."""
    while slurm.ask_patiently(lambda: is_alive(job)):
        time.sleep(_LOCAL_POLL_S if job.cluster.kind == "local" else _SLURM_POLL_S)
    if job.cluster.kind == "local":
        code = local_exit_code(job)
        return RegenError.exit_code if code is None else code
    return next((code for code in (last_exit_code(job, task) for task in job.tasks) if code), EXIT_OK)


def is_alive(job: Submission) -> bool:
    """Return whether a job is running or pending."""
    if job.cluster.kind == "local":
        return local_executor.is_running_locally(job)
    known = slurm.queue([job.id() or ""])
    # A requeued job is COMPLETED for a moment.
    return any(state not in slurm.ENDED for state, _ in known.values()) or any(
        _will_be_requeued(job, task) for task in job.tasks if known
    )


def _will_be_requeued(job: Submission, task: JobTask) -> bool:
    history = attempts_since(read_history(task.launch), job.submitted)
    return bool(history) and history[-1].end is not None and history[-1].end.again


def last_exit_code(job: Submission, task: JobTask) -> int:
    """Return the exit code of a task's newest start since its submission; 75 if it was interrupted without a record,
    or never started although something was left to do."""
    before = read_history(task.launch)
    history = attempts_since(before, job.submitted)
    if not history:
        steps = task.progress.steps if task.progress else None
        return EXIT_OK if is_complete(before, step=newest_step(task.progress), steps=steps) else EXIT_RESUME
    return EXIT_RESUME if history[-1].end is None else history[-1].end.code
