"""Keys, answers and services that a SeaweedFS does not show, by small servers that do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from regen_dist.config.urls import BUCKET_SCHEMES
from regen_dist.data.storage import object_store
from regen_dist.data.storage.connection import LOOKED_AT, StoreLimits, key_problem
from regen_dist.data.storage.store import Store
from regen_dist.errors import AccessDenied, BackendError, DataError, ObjectDenied, StoreUnavailable
from tests.helpers.stores import BUCKET, FakeStore, fake_store, use

URL = f"s3://{BUCKET}"
LIMITS = StoreLimits(stall_s=20.0, deadline_s=20.0)
ODD = ["v//b.mp4", "v/./c.mp4", "v/../d.mp4", "v/e\nf.mp4", "v/tab\t.mp4", "v/x//"]
PLAIN = ["v/a.mp4", "v/a b+c&d.mp4", "v/é#?%20.mp4", "v/e\\f.mp4", "v/z/deep.mp4", "w/other.mp4"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStore]:
    with fake_store() as store:
        use(monkeypatch, store.environment())
        yield store


@pytest.mark.parametrize("page", [1000, 3, 1])
@pytest.mark.parametrize("odd", [*([key] for key in ODD), ODD], ids=repr)
def test_an_odd_key_hides_no_other(server: FakeStore, odd: list[str], page: int) -> None:
    server.objects, server.page = {key: key.encode() for key in [*PLAIN, *odd]}, page
    listing = Store(f"{URL}/v", LIMITS).list_all()
    assert list(listing.unreadable) == sorted(key[2:] for key in odd)
    assert {name: found.size for name, found in listing.found.items()} == {
        key[2:]: len(key.encode()) for key in PLAIN if key.startswith("v/")
    }
    store = Store(URL, LIMITS)
    assert set(store.list("v/")) == {key for key in PLAIN if key.startswith("v/")}
    assert store.list("v/a") == {key: len(key.encode()) for key in PLAIN if key.startswith("v/a")}
    for key in PLAIN:
        assert store.get(key) == key.encode()


def test_folders_with_odd_signs_in_their_urls(server: FakeStore) -> None:
    server.objects = {"a#b?/v.mp4": b"1", "a#b?//w.mp4": b"2"}
    listing = Store(f"{URL}/a%23b%3F", LIMITS).list_all()
    assert (list(listing.found), listing.unreadable) == (
        ["v.mp4"],
        {"/w.mp4": "its key has an empty part ('//'): rename it"},
    )


def test_a_long_listing_repeats_the_page_that_failed(server: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a whole it takes longer than the deadline, which is each request's."""
    server.objects, server.page = dict.fromkeys(["v//odd", *(f"v/{number:02d}" for number in range(20))], b"1"), 1
    asked, real = [], object_store._get

    def get(*arguments: Any) -> bytes:
        asked.append(arguments)
        time.sleep(0.1)
        if len(asked) == 18:
            raise OSError("status code: 503 <Code>SlowDown</Code>")
        return real(*arguments)

    monkeypatch.setattr(object_store, "_get", get)
    assert len(Store(f"{URL}/v", StoreLimits(stall_s=1.0, deadline_s=1.0)).list()) == 20
    assert len(asked) == 22


@pytest.mark.parametrize("odd", [[], ["run//x"]])
def test_the_mark_of_an_empty_folder_is_no_object(server: FakeStore, odd: list[str]) -> None:
    """The consoles of services write it: a folder that was made there can be built into."""
    server.objects = dict.fromkeys(["run/", *odd], b"")
    assert Store(f"{URL}/run", LIMITS).list() == {}


@pytest.mark.parametrize(
    ("key", "problem"),
    [("a/b", ""), ("/a", ""), ("a/", ""), ("a//b", "empty part"), ("a/../b", "'..'"), ("\x7f", "control")],
)
def test_which_keys_cannot_be_read(key: str, problem: str) -> None:
    assert problem in key_problem(key)
    assert bool(problem) == bool(key_problem(key))


def test_without_keys_to_sign_with_the_message_says_what_to_do(
    server: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listing again needs credentials as such; boto3's chain is asked where the environment has none."""
    server.objects = dict.fromkeys([*PLAIN, *ODD], b"")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert len(Store(URL, LIMITS).list()) == len(PLAIN)
    from regen_dist.data.storage import object_store as bucket

    monkeypatch.delenv("AWS_SKIP_SIGNATURE")
    monkeypatch.setattr(bucket, "_credentials", _no_boto)
    with pytest.raises(BackendError, match="pip install boto3"):
        Store(URL, LIMITS).list()


def _no_boto(place: object) -> None:
    raise BackendError("pip install boto3")


def test_a_wrong_region_is_named(server: FakeStore) -> None:
    """AWS answers 400 AuthorizationHeaderMalformed; a HEAD has no body, so a GET is asked."""
    server.region = "eu-west-1"
    store = Store(f"{URL}/v", LIMITS)
    for call in (store.list, lambda: store.get("a.mp4"), lambda: store.size("a.mp4")):
        with pytest.raises(DataError, match="AWS_REGION is us-east-1, set AWS_REGION to eu-west-1"):
            call()


def test_a_store_without_tags_is_read(server: FakeStore) -> None:
    """Gateways that give no ETag: there is nothing to pin a version by."""
    server.objects, server.tags = {"a.tar": bytes(range(200))}, False
    assert Store(URL, LIMITS).info("a.tar") == (200, None)
    assert b"".join(Store(URL, LIMITS).stream("a.tar", 64)) == bytes(range(200))


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        ((403, "InvalidObjectState"), DataError, "archived"),
        ((403, "AccessDenied"), ObjectDenied, "access denied"),
        ((403, "ExpiredToken"), AccessDenied, "access denied"),
        ((400, "ExpiredToken"), AccessDenied, "access denied.*ExpiredToken"),
        ((400, "KMS.DisabledException"), DataError, "KMS.DisabledException"),
        ((404, "NoSuchKey"), DataError, "not found"),
    ],
)
def test_what_a_refused_object_means(
    server: FakeStore, answer: tuple[int, str], kind: type[DataError], words: str
) -> None:
    server.objects, server.refused = {"a.mp4": b"1"}, {"a.mp4": answer}
    for call in (lambda: Store(URL, LIMITS).get("a.mp4"), lambda: list(Store(URL, LIMITS).stream("a.mp4"))):
        with pytest.raises(DataError, match=words) as caught:
            call()
        assert type(caught.value) is kind or (kind is DataError and not isinstance(caught.value, AccessDenied))


def test_a_request_that_came_too_slowly_is_made_again(server: FakeStore) -> None:
    """S3 answers 400 RequestTimeout to an upload that stalled; its own clients repeat it."""
    server.objects, server.refused = {"a.mp4": b"1"}, {"a.mp4": (400, "RequestTimeout")}
    with pytest.raises(StoreUnavailable, match="RequestTimeout"):
        Store(URL, StoreLimits(stall_s=1.0, deadline_s=1.0)).get("a.mp4")
    assert len(server.requests) > 1


def test_conditional_writes_keep_to_azures_rule_for_metadata(server: FakeStore) -> None:
    """A C# identifier; and the name must come back when the answer of a write was lost."""
    store = Store(f"az://{BUCKET}/run", StoreLimits(stall_s=20.0, deadline_s=60.0))
    assert store.put_new("claim", b"1")
    assert not store.put_new("claim", b"2")
    server.lost_answers = 1
    assert store.put_new("other", b"3")
    assert server.lost_answers == 0
    assert server.objects == {"run/claim": b"1", "run/other": b"3"}
    assert all(name.isalpha() and name.islower() for named in server.metadata.values() for name in named)


def test_each_service_has_the_names_of_its_credentials() -> None:
    """Without them the message about missing credentials would itself fail."""
    assert set(LOOKED_AT) == set(BUCKET_SCHEMES)
