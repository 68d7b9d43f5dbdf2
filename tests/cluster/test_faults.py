"""A store through a proxy that makes faults: the right bytes, or one clear error, in bounded time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regen_dist.data.storage.connection import StoreLimits
from regen_dist.data.storage.store import Store
from regen_dist.errors import AccessDenied, ObjectMissing, StoreUnavailable
from tests.helpers.proxy import FaultProxy, Kind
from tests.helpers.stores import Proxied

LIMITS = StoreLimits(stall_s=0.3, deadline_s=6.0, connect_s=1.0)
SHORT = StoreLimits(stall_s=0.2, deadline_s=0.6, connect_s=0.5)
DATA = os.urandom(400_000)
RANGES = [(number * 100_000, 50_000) for number in range(4)]
PARTS = [DATA[offset : offset + size] for offset, size in RANGES]


def _downloaded(store: Store) -> bytes:
    with store.staging("copy") as path:
        store.download("one.bin", path)
        return path.read_bytes()


READS: dict[str, tuple[Callable[[Store], Any], Any]] = {
    "get": (lambda store: store.get("one.bin"), DATA),
    "get_ranges": (lambda store: store.get_ranges("one.bin", RANGES, join_bytes=0), PARTS),
    "joined": (lambda store: store.get_ranges("one.bin", RANGES), PARTS),
    "download": (_downloaded, DATA),
}
FAULTS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "503": ("status", {"status": 503, "times": 2}),
    "dropped": ("drop", {"times": 1}),
    "reset": ("reset", {"times": 2}),
    "short": ("short", {"times": 1}),
    "stall": ("stall", {"times": 1, "seconds": 30.0}),
    "late": ("late", {"times": 1, "seconds": 30.0}),
    "slow": ("slow", {"times": 1, "bytes_per_s": 800_000}),  # slower than the stall limit for the whole
}


@pytest.fixture
def one(bucket_url: str) -> str:
    """The URL of a folder that holds `one.bin`."""
    Store(bucket_url).put("one.bin", DATA)
    return bucket_url


@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize("read", list(READS))
def test_bytes_are_right_under_each_fault(read: str, fault: str, one: str, proxied: Proxied) -> None:
    operation, expected = READS[read]
    kind, settings = FAULTS[fault]
    with proxied() as proxy:
        proxy.add(kind, "GET /", **settings)
        begun = time.monotonic()
        assert operation(Store(one, LIMITS)) == expected
        assert time.monotonic() - begun < LIMITS.deadline_s + 3
        assert proxy.injected[kind] >= 1


def test_only_the_rest_of_a_body_is_asked_for_again(one: str, proxied: Proxied) -> None:
    with proxied() as proxy:
        proxy.add("reset", "one.bin", times=1, after=200_000)
        assert Store(one, LIMITS).get_range("one.bin", 0, 400_000) == DATA
        first, second = proxy.requests
    assert first.range == "bytes=0-399999"
    assert 0 < int(second.range.removeprefix("bytes=").split("-")[0]) <= 200_000


def test_a_stall_costs_its_limit_and_a_slow_body_none(one: str, proxied: Proxied) -> None:
    with proxied() as proxy:
        proxy.add("slow", "one.bin", times=1, bytes_per_s=500_000)
        assert Store(one, LIMITS).get("one.bin") == DATA
        assert len(proxy.requests) == 1


ENDLESS: dict[str, tuple[Kind, dict[str, Any], str]] = {
    "503": ("status", {"status": 503}, "HTTP 503( SlowDown)?"),
    "reset": ("reset", {"after": 0}, "the connection broke"),
    "dropped": ("drop", {}, "the connection broke"),
    "late": ("late", {"seconds": 30.0}, "no bytes came in time|the connection broke"),
    "stall": ("stall", {"seconds": 30.0, "after": 0}, "no bytes came in time"),
}


@pytest.mark.parametrize(
    ("read", "fault"), [*(("get", fault) for fault in ENDLESS), ("download", "503"), ("download", "stall")]
)
def test_a_store_that_never_answers_is_given_up_at_the_deadline(
    read: str, fault: str, one: str, proxied: Proxied, tmp_path: Path
) -> None:
    kind, settings, words = ENDLESS[fault]
    with proxied() as proxy:
        proxy.add(kind, **settings)
        store, begun = Store(one, SHORT), time.monotonic()
        with pytest.raises(StoreUnavailable, match=rf"{one}/one\.bin: could not read it in \d+ s \(last: ({words})\)"):
            store.get("one.bin") if read == "get" else store.download("one.bin", tmp_path / "copy")
        waited_s = time.monotonic() - begun
        assert SHORT.deadline_s * 0.5 < waited_s < 2 * SHORT.deadline_s + 2
        assert proxy.injected[kind] >= 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [(404, ObjectMissing, "not found"), (403, AccessDenied, "HTTP 403 AccessDenied")],
)
def test_an_answer_that_is_final_is_not_asked_for_again(
    status: int, error: type[Exception], words: str, one: str, proxied: Proxied
) -> None:
    with proxied() as proxy:
        proxy.add("status", status=status)
        for operation in (READS["get"][0], READS["get_ranges"][0]):
            with pytest.raises(error, match=words):
                operation(Store(one, LIMITS))
        assert len(proxy.requests) <= 1 + len(RANGES)


def test_wrong_bytes_are_not_the_stores_to_see(one: str, proxied: Proxied) -> None:
    """They come as they are: this is what the checksum of every sample is for."""
    with proxied() as proxy:
        proxy.add("wrong", "one.bin", times=1)
        got = Store(one, LIMITS).get("one.bin")
    assert [number for number in range(len(DATA)) if got[number] != DATA[number]] == [len(DATA) // 2]


WRITE_FAULTS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "503": ("status", {"status": 503, "times": 2}),
    "dropped": ("drop", {"times": 2}),
    "short": ("short", {"times": 1, "after": 1}),
}


@pytest.mark.parametrize("fault", list(WRITE_FAULTS))
@pytest.mark.parametrize("size", [1000, 10 << 20])
def test_writes_are_whole_under_each_fault(size: int, fault: str, bucket_url: str, proxied: Proxied) -> None:
    kind, settings = WRITE_FAULTS[fault]
    data = os.urandom(size)
    with proxied() as proxy:
        proxy.add(kind, **settings)
        Store(bucket_url, LIMITS).put("one.bin", data)
        assert proxy.injected[kind] >= 1
    assert Store(bucket_url).get("one.bin") == data


@pytest.mark.parametrize("match", ["POST", "PUT", "uploadId"])
def test_every_step_of_an_upload_may_lose_its_answer(match: str, bucket_url: str, proxied: Proxied) -> None:
    data = os.urandom(20 << 20)
    with proxied() as proxy:
        proxy.add("drop", match, times=1)
        proxy.add("drop", f"{match} ", every=4, times=2)
        Store(bucket_url, LIMITS).put("one.bin", data)
        assert proxy.injected["drop"] >= 1
    assert Store(bucket_url).get("one.bin") == data


def test_a_server_that_takes_its_time_to_store_is_not_a_stall(bucket_url: str, proxied: Proxied) -> None:
    with proxied() as proxy:
        proxy.add("late", "PUT", times=1, seconds=3 * LIMITS.stall_s)
        Store(bucket_url, LIMITS).put("one.bin", b"1")
        assert len(proxy.requests) == 1


@pytest.mark.parametrize("fault", ["drop", "late"])
def test_a_creation_whose_answer_is_lost_is_still_ours(fault: Kind, bucket_url: str, proxied: Proxied) -> None:
    with proxied() as proxy:
        proxy.add(fault, "PUT", times=1, seconds=3.0)  # late: longer than a third of the deadline
        store = Store(bucket_url, LIMITS)
        assert store.put_new("claim", b"mine")
        assert proxy.injected[fault] == 1
        assert not store.put_new("claim", b"yours")
    assert Store(bucket_url).get("claim") == b"mine"


@pytest.mark.parametrize("fault", ["drop", "short", "status", "stall"])
def test_listing_and_removing_under_faults(fault: Kind, one: str, proxied: Proxied) -> None:
    def spoil(proxy: FaultProxy, match: str) -> None:
        proxy.clear()
        proxy.add(fault, match, times=1, seconds=10.0, after=0)

    with proxied() as proxy:
        store = Store(one, LIMITS)
        spoil(proxy, "GET")
        assert store.list() == {"one.bin": len(DATA)}
        assert proxy.injected[fault] == 1
        spoil(proxy, "HEAD")
        assert store.size("one.bin") == len(DATA)
        spoil(proxy, "POST")
        store.delete("one.bin")
        assert proxy.injected[fault] == 1
    assert Store(one).list() == {}
