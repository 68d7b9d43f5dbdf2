from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from regen_dist.data.storage.connection import StoreLimits
from regen_dist.data.storage.local import free_bytes
from regen_dist.data.storage.object_store import ByteSpan, join_ranges
from regen_dist.data.storage.store import Store
from regen_dist.errors import AccessDenied, BackendError, DataError, DiskFull, ObjectCut, ObjectMissing
from regen_dist.shared_files import remove_leftovers
from tests.helpers.storecontract import StoreContract
from tests.helpers.stores import use

SECRET = "hunter2"


class TestLocalFolder(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return Store(tmp_path / "a folder%20ü")


@pytest.mark.parametrize("spelling", ["{}", "file://{}", "{}/"])
def test_every_spelling_of_a_folder(tmp_path: Path, spelling: str) -> None:
    store = Store(spelling.format(tmp_path / "folder"))
    store.put("one.bin", b"1")
    assert (tmp_path / "folder" / "one.bin").read_bytes() == b"1"


def test_a_write_that_fails_leaves_the_old_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.put("one.bin", b"old")

    def broken_disk(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", broken_disk)
    with pytest.raises(DataError, match="Input/output error"):
        store.put("one.bin", b"new")
    assert store.get("one.bin") == b"old"
    assert os.listdir(tmp_path) == ["one.bin"]


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store, source = Store(tmp_path / "out"), Store(tmp_path / "in")
    source.put("one.bin", b"1")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for write in (lambda: store.put("one.bin", b"1"), lambda: store.put_new("one.bin", b"1")):
            with pytest.raises(DiskFull, match=r"one\.bin: the disk of .* is full \(\d+ bytes free\)"):
                write()
        with pytest.raises(DiskFull, match="copy: the disk of"):
            source.download("one.bin", tmp_path / "out" / "copy")
    with pytest.raises(DiskFull, match="shard"), store.staging("shard.tar"):
        full()  # the caller's own writing, as a shard's
    assert os.listdir(tmp_path / "out") == []


def test_on_a_disk_that_is_full(tmp_path: Path, root: Path) -> None:
    """The same on a real one: two megabytes of memory, mounted where only the child sees it."""
    child = textwrap.dedent(
        f"""
        import os, sys
        sys.path.insert(0, {str(root)!r})
        from regen_dist.data.storage.store import Store
        from regen_dist.errors import DiskFull
        store = Store({str(tmp_path)!r})
        store.put("old", b"x" * 1000)
        for write in (
            lambda: store.put("new", b"x" * 3_000_000),
            lambda: store.put_new("new", b"x" * 3_000_000),
            lambda: Store("/usr/bin").download(os.path.basename(os.path.realpath("/usr/bin/bash")), store.folder / "sh")
            if os.path.getsize("/usr/bin/bash") > 2_000_000 else store.put("new", b"x" * 3_000_000),
        ):
            try:
                write()
            except DiskFull as error:
                print(error)
            else:
                raise SystemExit("it was written")
        print(sorted(os.listdir(store.folder)))
        """
    )
    mount = f'mount -t tmpfs -o size=2m none \'{tmp_path}\' || exit 42; exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, sys.executable, child],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if done.returncode == 42 or "unshare" in done.stderr:
        pytest.skip(f"no mount of one's own on this machine: {done.stderr.strip()}")
    *said, left = done.stdout.splitlines()
    assert (len(said), left, done.returncode) == (3, "['old']", 0), done.stdout + done.stderr
    assert all("is full" in line for line in said)


def test_a_disk_without_hard_links_still_creates_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    store = Store(tmp_path)
    assert [store.put_new("claim", b"1"), store.put_new("claim", b"2")] == [True, False]
    assert (store.get("claim"), os.listdir(tmp_path)) == (b"1", ["claim"])


@pytest.mark.parametrize("links", [True, False])
def test_every_write_reaches_the_disk_before_it_counts(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file and its folder's entry, also where a new object is made without hard links."""

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    synced: set[int] = set()
    sync = os.fsync

    def noted(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(os, "fsync", noted)
    (tmp_path / "source").write_bytes(b"1")
    store = Store(tmp_path / "store")
    for name, write in (
        ("put", lambda: store.put("put/one", b"1")),
        ("put_file", lambda: store.put_file("put_file/one", tmp_path / "source")),
        ("put_new", lambda: store.put_new("put_new/one", b"1")),
    ):
        write()
        path = tmp_path / "store" / name / "one"
        assert {path.stat().st_ino, path.parent.stat().st_ino} <= synced, name


def test_containers_with_one_process_id_do_not_write_to_one_file(tmp_path: Path) -> None:
    """Each is process 1 of its own; they claim the same folder at once."""
    code = f"""if True:
        import os
        from pathlib import Path
        from regen_dist.data.storage.local import LocalFolder
        os.getpid = lambda: 1
        with LocalFolder(Path({str(tmp_path)!r})).staging("plan.json") as temporary:
            print(temporary)"""
    names = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(names) == 2


def test_leftovers_of_a_killed_write_are_removed_and_nothing_else(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    dead, alive = f".shard-000000.tar.0.{gone.pid}.tmp", f".shard-000001.tar.0.{os.getppid()}.tmp"
    for name in (dead, alive, ".notes.tmp", "shard-000000.tar"):
        (tmp_path / name).write_bytes(b"")
    assert list(Store(tmp_path).list()) == [".notes.tmp", "shard-000000.tar"]
    assert remove_leftovers(tmp_path, idle_s=60) == []
    assert remove_leftovers(tmp_path) == [dead]
    assert sorted(os.listdir(tmp_path)) == sorted([alive, ".notes.tmp", "shard-000000.tar"])
    (tmp_path / dead).mkdir()
    (tmp_path / dead / "half").touch()
    assert remove_leftovers(tmp_path) == [dead]
    assert free_bytes(tmp_path / "not" / "there") > 0


def test_what_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.put("one.bin", b"1")

    def refuse(*_: object, **__: object) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")  # root may read everything, so it is made

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(AccessDenied, match=r"one\.bin: cannot read it: Permission denied"):
        store.get("one.bin")
    with pytest.raises(DataError, match="cannot read it"):
        Store(tmp_path.parent).get_range(tmp_path.name, 0, 1)


@pytest.mark.parametrize("url", ["pipe:cat /etc/passwd", "pipe://cat", "ftp://host/x", "file:relative"])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(DataError, match="not supported"):
        Store(url)


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(DataError, match="must not carry credentials") as caught:
        Store(f"s3://name:{SECRET}@bucket/prefix")
    assert SECRET not in str(caught.value)
    assert Store("s3://bucket/prefix/").url == "s3://bucket/prefix"


def test_limits_can_be_set_later() -> None:
    store = Store("s3://bucket/prefix", StoreLimits(stall_s=1.0))
    store.limits = StoreLimits(deadline_s=5.0)
    assert store.limits == StoreLimits(stall_s=10.0, deadline_s=5.0, connect_s=5.0)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"AWS_EC2_METADATA_DISABLED": "true"}, r"no credentials were found.*AWS_ACCESS_KEY_ID.*AWS_PROFILE"),
        ({"AWS_METADATA_ENDPOINT": "http://127.0.0.1:9"}, r"no credentials were found"),
        ({"AWS_SECRET_ACCESS_KEY": SECRET}, r"only one of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY is set"),
    ],
)
def test_no_credentials_are_told_at_once(
    environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, environment)
    begun = time.monotonic()
    with pytest.raises(AccessDenied, match=words) as caught:
        Store("s3://bucket/prefix").get("one.bin")
    assert time.monotonic() - begun < 10
    assert SECRET not in str(caught.value)


def test_a_profile_needs_boto3(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, {"AWS_PROFILE": "cluster"})
    monkeypatch.setitem(sys.modules, "boto3", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "obstore.auth.boto3", raising=False)
    with pytest.raises(BackendError, match="pip install boto3"):
        Store("s3://bucket/prefix").get("one.bin")


@pytest.mark.parametrize(
    ("url", "environment", "words"),
    [
        ("az://container/x", {}, "Account must be specified.*AZURE_STORAGE_ACCOUNT_NAME"),
        ("az://container/x", {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_ACCOUNT_KEY": SECRET}, "AZURE_STORAGE"),
        ("gs://bucket/x", {"GOOGLE_SERVICE_ACCOUNT": f"/{SECRET}"}, "checked GOOGLE_APPLICATION_CREDENTIALS"),
        ("gs://bucket/x", {"GOOGLE_SERVICE_ACCOUNT_KEY": f'{{"private_key": "{SECRET}"}}'}, "checked GOOGLE_APPL"),
    ],
)
def test_the_other_services_say_what_they_look_at(
    url: str, environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, environment)
    with pytest.raises(AccessDenied, match=words) as caught:
        Store(url, StoreLimits(deadline_s=2.0, stall_s=1.0, connect_s=1.0)).get("one.bin")
    assert SECRET not in str(caught.value)


class _Blobs(BaseHTTPRequestHandler):
    """Server of the part of Azure's protocol that one read needs."""

    def do_GET(self) -> None:
        found = self.path == "/container/x/one.bin"
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", "3" if found else "0")
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Mon, 23 Nov 2026 10:00:00 GMT")
        self.end_headers()
        self.wfile.write(b"123" if found else b"")

    def log_message(self, format: str, *args: object) -> None:
        return


def test_azure_is_read_at_its_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Blobs) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        account = {"AZURE_STORAGE_ACCOUNT_NAME": "account", "AZURE_STORAGE_ACCOUNT_KEY": "c2VjcmV0"}
        endpoint = {"AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1"}
        use(monkeypatch, account | endpoint)
        store = Store("az://container/x", StoreLimits(deadline_s=5.0))
        assert store.get("one.bin") == b"123"
        with pytest.raises(ObjectMissing, match=r"az://container/x/two\.bin: not found"):
            store.get("two.bin")
        server.shutdown()


@pytest.mark.parametrize(
    ("url", "name", "value"),
    [
        *(("s3://bucket/x", f"AWS_ENDPOINT_URL{end}", value) for end in ("", "_S3") for value in ("", "host:9000")),
        ("s3://bucket/x", "AWS_ENDPOINT_URL", " http://127.0.0.1:9"),
        ("s3://bucket/x", "AWS_ACCESS_KEY_ID", "key\n"),
        ("az://container/x", "AZURE_STORAGE_ENDPOINT", "host:9000"),
    ],
)
def test_variables_that_obstore_cannot_use_are_named(
    url: str, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It panics at the first request, by an exception that is no Exception."""
    account = {"AZURE_STORAGE_ACCOUNT_NAME": "account", "AZURE_STORAGE_ACCOUNT_KEY": "c2VjcmV0"}
    use(monkeypatch, {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"} | account | {name: value})
    with pytest.raises(AccessDenied, match=f"{url}: {name} (is not the address of a server|holds a space)"):
        Store(url, StoreLimits(deadline_s=1.0)).get("one.bin")


def test_neighbours_share_a_request() -> None:
    ranges = [(100, 10), (0, 10), (15, 5), (12, 4), (300, 0), (110, 1)]
    assert join_ranges(ranges, 0) == [ByteSpan(0, 10, (1,)), ByteSpan(12, 20, (3, 2)), ByteSpan(100, 111, (0, 5))]
    assert join_ranges(ranges, 2) == [ByteSpan(0, 20, (1, 3, 2)), ByteSpan(100, 111, (0, 5))]
    assert join_ranges(ranges, 80) == [ByteSpan(0, 111, (1, 3, 2, 0, 5))]
    assert join_ranges([(0, 100), (10, 5), (101, 1)], 1) == [ByteSpan(0, 102, (0, 1, 2))]


def test_what_the_system_reads_in_parts_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux gives at most 2 GiB less a page at once, network disks less; kept videos may be larger."""
    Store(tmp_path).put("video", bytes(range(100)))
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: real(file, min(size, 7), offset))
    assert Store(tmp_path).get_ranges("video", [(10, 50), (3, 0)]) == [bytes(range(10, 60)), b""]
    with pytest.raises(ObjectCut, match="asked for 50 bytes at 60, got 40"):
        Store(tmp_path).get_range("video", 60, 50)


def test_a_link_to_a_folder_above_is_not_followed(tmp_path: Path) -> None:
    """Others are, also two to the same folder."""
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "sub" / "x").write_bytes(b"1")
    (tmp_path / "data" / "sub" / "latest").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data" / "sub")
    assert list(Store(tmp_path / "data").list()) == ["again/x", "sub/x"]


def test_what_is_deleted_while_a_folder_is_listed_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process deletes between reading the folder and looking at the file; a dangling link is refused."""
    store = Store(str(tmp_path))
    for name in ("a", "b"):
        store.put(name, b"x")
    walk = os.walk

    def walk_and_delete(top: Path, **options: object) -> Iterator[tuple[str, list[str], list[str]]]:
        found = list(walk(top, **options))  # type: ignore[call-overload]
        (tmp_path / "a").unlink()
        return iter(found)

    with monkeypatch.context() as patch:
        patch.setattr(os, "walk", walk_and_delete)
        assert list(store.list()) == ["b"]
    (tmp_path / "c").symlink_to(tmp_path / "absent")
    with pytest.raises(ObjectMissing, match=f"{tmp_path}/c: a link that leads nowhere"):
        store.list()
