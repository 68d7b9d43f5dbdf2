"""The server itself: what it keeps, and that it never outlives who started it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from regen_dist.data.storage.store import Store
from tests.helpers.objects import use
from tests.helpers.processes import runs, wait_until_gone
from tools.local_services.s3 import start_store


def test_a_server_serves_again_what_lies_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start_store(tmp_path, bucket="first") as server:
        use(monkeypatch, server.environment())
        Store("s3://first/x").put("one.bin", b"1" * 1000)
        server.create_bucket("second")
        server.create_bucket("second")
        assert Store("s3://second").list() == {}
    assert server.process.poll() is not None
    with start_store(tmp_path, bucket="first", identities=server.identities) as again:
        monkeypatch.setenv("AWS_ENDPOINT_URL", again.endpoint)
        assert Store("s3://first/x").get("one.bin") == b"1" * 1000


def test_a_server_ends_with_its_parent(tmp_path: Path, root: Path) -> None:
    code = (
        "import sys, time, pathlib; from tools.local_services.s3 import start_store\n"
        "with start_store(pathlib.Path(sys.argv[1])) as server:\n"
        "    print(server.process.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=root, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    server = int(parent.stdout.readline())
    assert runs(server)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until_gone([server], 30.0)
