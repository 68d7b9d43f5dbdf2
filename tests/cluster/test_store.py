"""A real S3 server: every operation of a store against it, and the server's own start and end."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from regen_dist.data.storage.connection import StoreLimits
from regen_dist.data.storage.store import Store
from regen_dist.errors import AccessDenied, BackendError, DataError, ObjectMissing, StoreUnavailable
from tests.helpers.machine import runs, wait_until_gone
from tests.helpers.storecontract import DATA, StoreContract
from tests.helpers.stores import READER, Proxied, use
from tools.local_services.s3 import ObjectServer, start_store

SECRET = "SENTINEL0123456789"
QUICK = StoreLimits(stall_s=0.5, deadline_s=1.0, connect_s=0.5)


class TestBucket(StoreContract):
    @pytest.fixture
    def store(self, bucket_url: str) -> Store:
        return Store(bucket_url)


def test_neighbours_come_by_one_request(bucket_url: str, proxied: Proxied) -> None:
    Store(bucket_url).put("one.bin", DATA)
    ranges = [(offset, 900) for offset in range(0, 100_000, 1000)]
    with proxied() as proxy:
        store = Store(bucket_url)
        store.get_ranges("one.bin", ranges, join_bytes=100)
        assert [request.range for request in proxy.requests] == ["bytes=0-99899"]
        proxy.clear()
        store.get_ranges("one.bin", ranges, join_bytes=99)
        assert len(proxy.requests) == 100


def test_a_large_file_goes_in_parts_and_a_small_one_at_once(bucket_url: str, proxied: Proxied, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(20 << 20))
    with proxied() as proxy:
        store = Store(bucket_url)
        store.put_file("large", path)
        assert sum(request.method == "PUT" for request in proxy.requests) == 3
        proxy.clear()
        store.put("small", bytes(1 << 20))
        assert [request.method for request in proxy.requests] == ["PUT"]


def test_a_listing_names_a_tag_that_changes_with_the_bytes(bucket_url: str) -> None:
    store = Store(bucket_url)
    store.put("one.bin", b"123")
    before = store.list_found()["one.bin"]
    store.put("one.bin", b"124")
    after = store.list_found()["one.bin"]
    assert (before.size, after.size) == (3, 3)
    assert before.etag
    assert before.etag != after.etag


def test_more_objects_than_a_page_holds(bucket_url: str) -> None:
    store = Store(bucket_url)
    for number in range(1100):
        store.put(f"many/{number:04d}", b"")
    assert list(store.list("many/")) == [f"many/{number:04d}" for number in range(1100)]
    assert len(store.list("many/01")) == 100


def test_an_object_that_is_replaced_while_it_is_read(bucket_url: str, tmp_path: Path) -> None:
    store = Store(bucket_url)
    store.put("one.bin", DATA)
    pieces = store.stream("one.bin", piece_bytes=50_000)
    assert next(pieces) == DATA[:50_000]
    store.put("one.bin", DATA[::-1])
    with pytest.raises(DataError, match=r"one\.bin: it was replaced"):
        next(pieces)


def test_what_an_identity_may_not_do_is_refused(
    bucket_url: str, object_store: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(bucket_url).put("one.bin", b"1")
    use(monkeypatch, object_store.environment(READER))
    store = Store(bucket_url)
    assert store.get("one.bin") == b"1"
    for write in (lambda: store.put("two", b""), lambda: store.put_new("two", b""), lambda: store.delete("one.bin")):
        with pytest.raises(AccessDenied, match=r"access denied when trying to (write|delete)"):
            write()
    assert store.list() == {"one.bin": 1}


def test_a_missing_bucket_is_told(bucket_url: str) -> None:
    store = Store("s3://not-there/prefix")
    for operation in (store.list, lambda: store.get("x"), lambda: store.put("x", b""), lambda: store.put_new("x", b"")):
        with pytest.raises(ObjectMissing, match=r"no bucket 'not-there' at the endpoint 127\.0\.0\.1:\d+ \(AWS_ENDP"):
            operation()
    with pytest.raises(ObjectMissing, match="no bucket"):
        store.delete("x")


def _operations(store: Store, folder: Path) -> list[Callable[[], object]]:
    return [
        lambda: store.get("x"), lambda: store.get_ranges("x", [(0, 5), (50, 5)], join_bytes=0), store.list,
        lambda: store.size("x"), lambda: store.put("x", b"1"), lambda: store.put("x", bytes(9 << 20)),
        lambda: store.put_new("x", b"1"), lambda: store.delete("x"), lambda: store.download("x", folder / "x"),
        lambda: store.sha256("x"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"AWS_SECRET_ACCESS_KEY": SECRET}, AccessDenied),
        ({"AWS_ACCESS_KEY_ID": SECRET}, AccessDenied),
        ({"AWS_SESSION_TOKEN": SECRET}, DataError),
        ({"AWS_ENDPOINT_URL": f"http://user:{SECRET}@127.0.0.1:9"}, StoreUnavailable),
    ],
)
def test_no_error_shows_a_secret(
    change: dict[str, str], error: type[DataError], bucket_url: str, object_store: ObjectServer,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    environment = object_store.environment() | change
    use(monkeypatch, environment)
    secrets = [SECRET] + [environment[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    store = Store(bucket_url, StoreLimits(stall_s=0.2, deadline_s=0.2, connect_s=0.2))
    told = [repr(store)]
    for operation in _operations(store, tmp_path):
        with pytest.raises(error) as caught:
            operation()
        assert len(str(caught.value).splitlines()) == 1
        assert caught.value.__cause__ is None
        told += [str(caught.value), repr(caught.value), *traceback.format_exception(caught.value)]
    assert pickle.loads(pickle.dumps(store)).url == store.url
    everything = "\n".join(told) + str(pickle.dumps(store))
    assert [secret for secret in secrets if secret in everything] == []
    assert "Authorization" not in everything
    assert "Signature=" not in everything
    assert os.listdir(tmp_path) == []


def test_denied_says_what_was_looked_at(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with pytest.raises(AccessDenied, match=r"HTTP 403 SignatureDoesNotMatch.*AWS_ACCESS_KEY_ID with AWS_SECRET"):
        Store(bucket_url).get("one.bin")


def test_a_server_that_is_not_there_is_given_up_in_time(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for operation in (lambda: Store(bucket_url, QUICK).get("x"), lambda: Store(bucket_url, QUICK).put("x", b"1")):
        begun = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"no connection|connection broke") as caught:
            operation()
        assert 0.5 < time.monotonic() - begun < 10
        assert "127.0.0.1:9 (AWS_ENDPOINT_URL)" in str(caught.value)


def _read(url: str, code: dict[type[BaseException], int]) -> None:
    try:
        Store(url).get("one.bin")
    except tuple(code) as error:
        os._exit(next(number for kind, number in code.items() if isinstance(error, kind)))
    os._exit(0)


@pytest.mark.parametrize(("start", "expected"), [("spawn", 0), ("forkserver", 0), ("fork", 7)])
def test_stores_in_other_processes(bucket_url: str, start: str, expected: int) -> None:
    """A fork would wait for ever in obstore; it is told instead."""
    Store(bucket_url).put("one.bin", b"1")
    child = multiprocessing.get_context(start).Process(target=_read, args=(bucket_url, {BackendError: 7}))  # type: ignore[attr-defined]
    child.start()
    child.join(60)
    assert child.exitcode == expected


def test_a_killed_upload_leaves_no_object(bucket_url: str, proxied: Proxied, tmp_path: Path, root: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(30 << 20))
    code = "import sys, pathlib; from regen_dist.data.storage.store import Store; "
    code += "Store(sys.argv[1]).put_file('a/large', pathlib.Path(sys.argv[2]))"
    with proxied() as proxy:
        proxy.add("late", "partNumber=3", seconds=60)
        child = subprocess.Popen([sys.executable, "-c", code, bucket_url, str(path)], cwd=root)
        deadline = time.monotonic() + 60
        while not proxy.injected and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert proxy.injected["late"] == 1
    store = Store(bucket_url)
    assert (store.list(), store.size("a/large")) == ({}, None)
    store.put_file("a/large", path)  # and the next try is not in its way
    assert store.size("a/large") == 30 << 20


# The server itself: what it keeps, and that it never outlives who started it.


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
