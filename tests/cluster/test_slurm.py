"""The suite's own Slurm does what a site's does, keeps to loopback, and leaves nothing behind."""

from __future__ import annotations

import operator
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import submitit

from regen_dist.errors import BackendError
from tests.helpers.machine import descendants, runs, wait_until_gone
from tests.helpers.slurm import accounted, said, state, submit, wait_for, wait_until
from tests.helpers.stores import use
from tools.local_services.slurm import SlurmCluster, start_slurm

LOOPBACK, LISTENS = "0100007F", "0A"  # in /proc/net/tcp
DETACHES_ITSELF = "(setsid sh -c 'echo $$; exec sleep 300' &); sleep 300"  # prints its process id


def test_tasks_on_two_nodes_know_their_place_and_find_each_other(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Ranks come from SLURM_PROCID, hosts have names of their own, and the first one's name resolves on all."""
    tell = "echo $SLURM_PROCID $SLURM_NTASKS $SLURMD_NODENAME $(hostname) $(getent hosts node1 | cut -d' ' -f1)"
    job = submit(slurm, tmp_path, f"srun sh -c {shlex.quote(tell)}", "--nodes=2", "--ntasks-per-node=1")
    assert wait_for(slurm, job) == "COMPLETED"
    told = sorted(said(tmp_path, job))
    assert told == ["0 2 node1 node1 127.0.0.1", "1 2 node2 node2 127.0.0.1"]


def test_gpus_are_given_out_and_no_more_than_there_are(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Two jobs that need both GPUs of a node do not run together; three of two are refused at once."""
    script = "echo $CUDA_VISIBLE_DEVICES; while [ ! -e go ]; do sleep 0.1; done"
    first, second = (
        submit(slurm, tmp_path, script, "--gpus-per-node=2", "--nodelist=node1", "--cpus-per-task=1") for _ in range(2)
    )
    wait_for(slurm, first, "RUNNING")
    reason = ["--noheader", f"--jobs={second}", "--format=%T %r"]
    wait_until(
        lambda: slurm.run("squeue", *reason) == "PENDING Resources", lambda: slurm.run("squeue", *reason), timeout_s=30
    )
    (tmp_path / "go").touch()
    for job in (first, second):
        assert wait_for(slurm, job) == "COMPLETED"
        assert said(tmp_path, job) == ["0,1"]
    with pytest.raises(BackendError, match=r"sbatch .*Requested node configuration is not available"):
        submit(slurm, tmp_path, "true", "--gpus-per-node=3")


def test_accounting_knows_how_jobs_ended(slurm: SlurmCluster, tmp_path: Path) -> None:
    """State and exit code of each: what tells a job that failed from one that was cancelled or ran into its limit."""
    well = submit(slurm, tmp_path, "true")
    badly = submit(slurm, tmp_path, "exit 75")
    killed = submit(slurm, tmp_path, "kill -9 $$")
    cancelled = submit(slurm, tmp_path, "sleep 100")
    wait_for(slurm, cancelled, "RUNNING")
    slurm.run("scancel", cancelled)
    assert accounted(slurm, well, "State", "ExitCode") == ["COMPLETED", "0:0"]
    assert accounted(slurm, badly, "State", "ExitCode") == ["FAILED", "75:0"]
    assert accounted(slurm, killed, "State", "ExitCode") == ["FAILED", "0:9"]
    assert accounted(slurm, cancelled, "State")[0].startswith("CANCELLED")


def test_an_array_and_what_depends_on_it(slurm: SlurmCluster, tmp_path: Path) -> None:
    """`afterok` runs after all tasks went well; after one that failed the next is cancelled, not kept for ever."""
    good = submit(slurm, tmp_path, "echo $SLURM_ARRAY_TASK_ID", "--array=0-2")
    bad = submit(slurm, tmp_path, "[ $SLURM_ARRAY_TASK_ID != 1 ]", "--array=0-2")
    after_good, after_bad = (
        submit(slurm, tmp_path, "cat *_*.out", f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")
        for job in (good, bad)
    )
    assert wait_for(slurm, after_good) == "COMPLETED"
    assert sorted(said(tmp_path, after_good)) == ["0", "1", "2"]
    assert wait_for(slurm, after_bad) == "CANCELLED"
    assert [wait_for(slurm, f"{bad}_{task}") for task in range(3)] == ["COMPLETED", "FAILED", "COMPLETED"]


def test_a_requeued_job_runs_again_and_knows_it(slurm: SlurmCluster, tmp_path: Path) -> None:
    """The same id, with SLURM_RESTART_COUNT: what resuming rests on."""
    job = submit(slurm, tmp_path, 'echo run ${SLURM_RESTART_COUNT:-0}; [ -n "$SLURM_RESTART_COUNT" ] || sleep 100')
    wait_until(lambda: said(tmp_path, job) == ["run 0"], lambda: state(slurm, job))
    slurm.run("scontrol", "requeue", job)
    assert wait_for(slurm, job, "COMPLETED") == "COMPLETED"
    assert said(tmp_path, job) == ["run 0", "run 1"]


def test_a_job_of_high_preempts_one_of_main_which_hears_of_it_first(slurm: SlurmCluster, tmp_path: Path) -> None:
    """The signal that the job asked for, time to save, the requeue, and the second run once the other is done."""
    script = """
        echo run ${SLURM_RESTART_COUNT:-0}
        [ -z "$SLURM_RESTART_COUNT" ] || exit 0
        trap 'echo told; sleep 1; echo saved' USR1
        sleep 100 & wait; sleep 100 & wait
    """
    low = submit(slurm, tmp_path, script, "--nodes=2", "--exclusive", "--signal=B:USR1@60", "--requeue")
    wait_until(lambda: said(tmp_path, low) == ["run 0"], lambda: state(slurm, low))
    high = submit(slurm, tmp_path, f"cat {low}.out", "--partition=high", "--nodes=2", "--exclusive")
    assert wait_for(slurm, high) == "COMPLETED"
    assert said(tmp_path, high) == ["run 0", "told", "saved"]
    assert wait_for(slurm, low, "COMPLETED") == "COMPLETED"
    assert said(tmp_path, low) == ["run 0", "told", "saved", "run 1"]
    ends = ["--noheader", "--allocations", "--duplicates", f"--jobs={low}", "--format=State"]
    wait_until(
        lambda: slurm.run("sacct", *ends).split() == ["PREEMPTED", "COMPLETED"], lambda: slurm.run("sacct", *ends)
    )


def test_a_node_without_power_is_noticed_and_its_job_runs_elsewhere(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Nobody tells the controller: it finds out, and requeues the job on a node that is left."""
    job = submit(slurm, tmp_path, 'echo $SLURMD_NODENAME; [ -n "$SLURM_RESTART_COUNT" ] || exec sleep 100')
    wait_until(lambda: bool(said(tmp_path, job)), lambda: state(slurm, job))
    lost, other = sorted(slurm.nodes, key=said(tmp_path, job)[0].__ne__)
    slurm.end_node(lost)
    try:
        assert wait_for(slurm, job, "COMPLETED") == "COMPLETED"
        assert said(tmp_path, job) == [lost, other]
    finally:
        slurm.start_node(lost)
    wait_until(
        lambda: slurm.run("sinfo", "-hN", "-pmain", f"-n{lost}", "-o%T") == "idle", lambda: slurm.run("sinfo", "-N")
    )


def test_submitit_submits_and_gets_the_result(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library that the launcher rests on: one job, and an array."""
    use(monkeypatch, slurm.environment())
    executor = submitit.AutoExecutor(tmp_path / "%j", cluster="slurm")
    executor.update_parameters(timeout_min=5, slurm_partition="main")
    assert executor.submit(operator.mul, 6, 7).result() == 42
    assert [job.result() for job in executor.map_array(operator.add, [1, 2], [10, 20])] == [11, 22]


def test_a_second_cluster_keeps_to_loopback_and_leaves_nothing_behind(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Beside the suite's own: its daemons, a step that is started from outside, and a job that detaches itself."""
    before = set(descendants(os.getpid()))
    with start_slurm(tmp_path / "c") as second:
        job = submit(second, tmp_path, DETACHES_ITSELF)
        wait_until(lambda: bool(said(tmp_path, job)), lambda: state(second, job))
        step = threading.Thread(
            target=second.run, args=("srun", "--output", tmp_path / "step", "sh", "-c", "echo $$; sleep 3")
        )
        step.start()
        wait_until(lambda: (tmp_path / "step").exists() and bool((tmp_path / "step").read_text()), lambda: "no step")
        ours = set(descendants(os.getpid())) - before
        addresses = listening(ours)
        step.join()
    assert {"slurmctld", "slurmdbd", "slurmd", "srun"} <= {name for name, found in addresses.items() if found}
    assert set().union(*addresses.values()) == {LOOPBACK}
    wait_until_gone([*ours, int(said(tmp_path, job)[0])], 0.0)
    assert "UP" in slurm.run("scontrol", "ping")


@pytest.mark.usefixtures("slurm_packages")
def test_everything_ends_when_the_process_that_started_it_is_killed(tmp_path: Path, root: Path) -> None:
    """Nobody is left to clear up; a job that detached itself ends too, and the link to a long name is removed."""
    code = (
        "import pathlib, sys, time; from tools.local_services.slurm import start_slurm\n"
        "with start_slurm(pathlib.Path(sys.argv[1]), accounting=False) as cluster:\n"
        "    print(cluster.design.folder, flush=True)\n"
        "    cluster.run('sbatch', '--output', sys.argv[2], '--wrap', sys.argv[3])\n"
        "    time.sleep(300)\n"
    )
    output = tmp_path / "out"
    arguments = [tmp_path / "so long a name that it needs a link", output, DETACHES_ITSELF]
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=root, stdout=subprocess.PIPE, text=True
    ) as parent:
        try:
            assert parent.stdout is not None
            link = Path(parent.stdout.readline().strip())
            assert link.is_symlink()
            wait_until(lambda: output.exists() and output.read_text().endswith("\n"), lambda: f"{parent.poll()}")
            started = {*descendants(parent.pid), int(output.read_text())}
        finally:
            parent.kill()
    wait_until_gone(list(started))
    assert not link.parent.exists()


@pytest.mark.usefixtures("slurm_packages")
def test_the_command_makes_a_shell_a_client_until_it_is_interrupted(tmp_path: Path, root: Path) -> None:
    """The printed lines can be sourced as it is, from a folder whose name Slurm itself would not take."""
    folder = tmp_path / "a folder, with a name"
    command = [sys.executable, "-m", "tools.local_services.slurm", str(folder), "--nodes", "1", "--no-accounting"]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert "node1" in process.stdout.readline()
            source = process.stdout.readline().partition("#")[0]
            shell = f"{source}\nsinfo --noheader --format='%P %T %G'"
            told = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
            started = descendants(process.pid)
        finally:
            process.send_signal(signal.SIGINT)
    assert process.returncode == 0
    assert told.stdout.splitlines() == ["main* idle gpu:2", "high idle gpu:2"]
    wait_until_gone(started, 0.0)


def listening(processes: set[int]) -> dict[str, set[str]]:
    """The addresses on which processes listen, by their names, as the kernel writes them."""
    tables = [path.read_text().splitlines()[1:] for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))]
    sockets = [line.split() for table in tables for line in table]
    by_inode = {f"socket:[{each[9]}]": each[1].partition(":")[0] for each in sockets if each[3] == LISTENS}
    addresses: dict[str, set[str]] = {}
    for process in filter(runs, processes):
        opened = {os.readlink(each) for each in Path(f"/proc/{process}/fd").iterdir()}
        name = Path(f"/proc/{process}/comm").read_text().strip()
        addresses.setdefault(name, set()).update(by_inode[each] for each in opened & by_inode.keys())
    return addresses
