"""Tars of others in a bucket: indexed in place or from the outside, verified, read."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from regen_dist.data.build.foreign import index_tars
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.manifest import MANIFEST, DatasetManifest
from regen_dist.data.inspect.check import verify_dataset
from regen_dist.data.storage.store import Store
from regen_dist.errors import AccessDenied, DataError
from tests.helpers.foreign import members, write_shards
from tests.helpers.objects import READER, Proxied, use
from tests.helpers.proxy import Kind
from tools import shards
from tools.local_services.s3 import ObjectServer


@pytest.fixture
def tars(tmp_path: Path, bucket_url: str) -> list[Path]:
    """Three tars, here and under a folder of the bucket's prefix."""
    written = write_shards(tmp_path / "tars")
    for tar in written:
        Store(bucket_url).put_file(f"train/{tar.name}", tar)
    return written


def check_reading(url: str | Path, tars: list[Path]) -> DatasetManifest:
    """Every sample is the member of its tar."""
    dataset = open_dataset(url)
    whole = {f"train/{tar.name}": members(tar) for tar in tars}
    rows = [dataset.sample(row) for row in range(len(dataset))]
    assert [row.key for row in rows] == [f"{number:06d}" for number in range(12)]
    for row in rows:
        assert dataset.read(row) == whole[row.shard][row.member]
    return dataset.manifest


def test_tars_in_a_bucket(bucket_url: str, tars: list[Path]) -> None:
    run = CliRunner()
    shown = run.invoke(shards.app, ["index", bucket_url, "--workers", "2"], catch_exceptions=False)
    assert "12 samples" in shown.output
    assert "3 shards (3 indexed now), 0 left out" in shown.output
    check_reading(bucket_url, tars)
    assert "train/00000.index.parquet" in Store(bucket_url).list()
    again = run.invoke(shards.app, ["index", bucket_url, "--workers", "0"], catch_exceptions=False)
    assert "(0 indexed now)" in again.output
    shown = run.invoke(shards.app, ["verify", bucket_url, "--deep", "--workers", "2"], catch_exceptions=False)
    assert "every frame decodes: 12 samples in 3 shards" in shown.output
    sheet = str(tars[0].parent / "sheet.png")
    shown = run.invoke(shards.app, ["inspect", bucket_url, "--sheet", sheet], catch_exceptions=False)
    assert "caption words" in shown.output
    assert Path(sheet).exists()


def test_what_is_bad_in_a_bucket(bucket_url: str, tars: list[Path]) -> None:
    store = Store(bucket_url)
    index_tars(bucket_url, workers=0)
    damaged = open_dataset(bucket_url).sample(5)
    data = bytearray(tars[1].read_bytes())
    data[damaged.offset + damaged.size // 2] ^= 0x40
    store.put("train/00001.tar", bytes(data))
    store.put("train/00002.tar", tars[2].read_bytes()[:3000])
    store.delete("train/00000.tar")
    found = verify_dataset(bucket_url, workers=0).bad
    assert found[0].startswith("train/00000.tar: missing")
    assert found[1] == "train/00001.tar: the bytes differ from those that were written"
    assert found[2].startswith(f"sample {damaged.key} in train/00001.tar: ")
    assert found[3].startswith("train/00002.tar: 3000 bytes, the manifest says ")
    assert len(verify_dataset(bucket_url, "quick").bad) == 2
    with pytest.raises(DataError, match=r"1 of 2 tars cannot be used.*\n  train/00002\.tar: it ends at byte 3000"):
        index_tars(bucket_url, workers=0)
    assert MANIFEST not in store.list()


def test_a_bucket_that_may_only_be_read(
    bucket_url: str, tars: list[Path], object_store: ObjectServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = Store(bucket_url).list()
    use(monkeypatch, object_store.environment(READER))
    with pytest.raises(AccessDenied):
        index_tars(bucket_url, workers=0)
    index_tars(bucket_url, tmp_path / "index", workers=0)
    assert check_reading(tmp_path / "index", tars).shards_url == bucket_url
    assert verify_dataset(tmp_path / "index", "deep", workers=0).bad == ()
    assert Store(bucket_url).list() == before
    assert READER.secret_key not in (tmp_path / "index" / MANIFEST).read_text()


@pytest.mark.parametrize("kind", ["reset", "short", "status"])
def test_faults_of_the_network_change_nothing(bucket_url: str, tars: list[Path], proxied: Proxied, kind: Kind) -> None:
    """A body that is cut on its way is no broken tar."""
    good = index_tars(bucket_url, workers=0).manifest
    for tar in tars:
        Store(bucket_url).delete(f"train/{tar.stem}.index.parquet")
    with proxied() as proxy:
        fault = proxy.add(kind, ".tar", every=2)
        made = index_tars(bucket_url, workers=0)
        assert (made.manifest, made.shards_made) == (good, 3)
        assert verify_dataset(bucket_url, "deep", workers=0).bad == ()
        assert fault.struck >= 3
