from __future__ import annotations

import re
from pathlib import Path

import pytest

from regen_dist.config.urls import checked_url, parse_url

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("url", "expected", "bucket"),
    [
        ("/data/shards/", "file:///data/shards", None),
        ("file:///data/a%20b", "file:///data/a%20b", None),
        ("file://localhost/data", "file:///data", None),
        ("s3://bucket/prefix//deep/", "s3://bucket/prefix/deep", "bucket"),
        ("s3://bucket", "s3://bucket", "bucket"),
        ("gs://bucket/x", "gs://bucket/x", "bucket"),
        ("az://container/x", "az://container/x", "container"),
    ],
)
def test_one_spelling_of_each(url: str, expected: str, bucket: str | None) -> None:
    place = parse_url(url)
    assert (place.url, place.bucket) == (expected, bucket)
    assert checked_url(url) == url


def test_paths_are_taken_from_here_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert parse_url("a:b/c").folder == tmp_path / "a:b" / "c"
    assert parse_url("~/data").folder == tmp_path / "home" / "data"


@pytest.mark.parametrize(
    "url",
    [
        "pipe:cat x",
        "pipe://cat",
        "http://",
        "https://host/x?sig=a",
        "hf://datasets/me",
        "hf://me",
        "ftp://host/x",
        "file:relative",
        "file://host/x",
    ],
)
def test_everything_else_is_refused(url: str) -> None:
    allowed = "s3://|http://SERVER|plain address|hf://datasets/OWNER"
    with pytest.raises(ValueError, match=r"not supported|no server|a query|no repository") as caught:
        parse_url(url)
    assert re.search(allowed, str(caught.value))


@pytest.mark.parametrize(
    "url",
    [
        f"s3://name:{SECRET}@bucket/x",
        f"s3://{SECRET}@bucket/x",
        f"s3://bucket/x?X-Amz-Signature={SECRET}",
        f"gs://bucket/x#{SECRET}",
        f"https://host/{SECRET}?sig={SECRET}",
        f"s3://[{SECRET}/x",
    ],
)
def test_secrets_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match=r"credentials|not supported|not a URL") as caught:
        parse_url(url)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("url", ["s3:/bucket/x", "gs:/bucket", "https:/host/x"])
def test_one_slash_is_no_folder_here(url: str) -> None:
    with pytest.raises(ValueError, match=f"has one slash.*write {url.partition('/')[0]}//"):
        parse_url(url)


@pytest.mark.parametrize("url", ["s3:///prefix", "", "  "])
def test_a_bucket_and_a_path_are_needed(url: str) -> None:
    with pytest.raises(ValueError, match=r"no bucket|empty"):
        parse_url(url)
