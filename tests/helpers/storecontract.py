"""What a `Store` promises, wherever its objects lie. Subclasses give the fixture `store`."""

from __future__ import annotations

import hashlib
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from regen_dist.data.storage.store import Store
from regen_dist.errors import DataError, ObjectCut, ObjectMissing

DATA = bytes(range(256)) * 400  # 102,400 bytes


class StoreContract:
    def test_bytes_come_back_whole_and_by_range(self, store: Store) -> None:
        store.put("one.bin", DATA)
        assert store.get("one.bin") == DATA
        assert store.get_range("one.bin", 1000, 5) == DATA[1000:1005]
        assert store.get_range("one.bin", 10, 0) == b""
        assert store.sha256("one.bin") == hashlib.sha256(DATA).hexdigest()
        assert b"".join(store.stream("one.bin", piece_bytes=30_000)) == DATA
        assert [len(piece) for piece in store.stream("one.bin", piece_bytes=50_000)] == [50_000, 50_000, 2400]
        assert (store.size("one.bin"), store.size("two.bin")) == (len(DATA), None)

    @pytest.mark.parametrize("join_bytes", [0, 100, 1 << 20])
    def test_ranges_come_back_in_the_order_asked_for(self, store: Store, join_bytes: int) -> None:
        store.put("one.bin", DATA)
        ranges = [(50_000, 7), (0, 300), (300, 10), (250, 100), (9, 0), (102_399, 1), (50_000, 7), (400, 20_000)]
        found = store.get_ranges("one.bin", ranges, join_bytes=join_bytes)
        assert found == [DATA[offset : offset + size] for offset, size in ranges]
        assert store.get_ranges("one.bin", []) == []
        assert store.get_ranges("one.bin", [(5, 0)]) == [b""]

    def test_an_empty_object_is_one(self, store: Store) -> None:
        store.put("empty", b"")
        assert (store.get("empty"), store.list(), list(store.stream("empty"))) == (b"", {"empty": 0}, [])

    @pytest.mark.parametrize("ranges", [[(3, 10)], [(30, 10)], [(0, 2), (30, 10)], [(0, 2), (4, 2)]])
    def test_a_range_past_the_end_is_a_cut_object(self, store: Store, ranges: list[tuple[int, int]]) -> None:
        store.put("one.bin", b"12345")
        with pytest.raises(ObjectCut, match=r"one\.bin"):
            store.get_ranges("one.bin", ranges)
        with pytest.raises(ObjectCut, match=r"one\.bin"):
            store.get_ranges("one.bin", ranges, join_bytes=0)

    def test_a_missing_object_says_so_everywhere(self, store: Store, tmp_path: Path) -> None:
        for read in (
            lambda: store.get("two.bin"), lambda: store.get_range("two.bin", 0, 1), lambda: store.sha256("two.bin"),
            lambda: store.download("two.bin", tmp_path / "two"), lambda: list(store.stream("two.bin")),
        ):  # fmt: skip
            with pytest.raises(ObjectMissing, match=r"two\.bin: not found") as caught:
                read()
            assert len(str(caught.value).splitlines()) == 1
        assert not (tmp_path / "two").exists()

    def test_names_are_listed_by_prefix(self, store: Store) -> None:
        names = ["a", "d-e", "d/y", "dd/z", "deep/er/still", "with space & more/ü+%20#.tar"]
        for size, name in enumerate(names):
            store.put(name, bytes(size))
        assert store.list() == {name: size for size, name in enumerate(names)}
        assert list(store.list("d")) == ["d-e", "d/y", "dd/z", "deep/er/still"]
        assert list(store.list("d/")) == ["d/y"]
        assert list(store.list("deep/e")) == ["deep/er/still"]
        assert (store.list("x"), store.list("x/y")) == ({}, {})
        assert store.get(names[-1]) == bytes(len(names) - 1)
        assert Store(f"{store.url}/deep").list() == {"er/still": 4}
        assert Store(f"{store.url}/absent").list() == {}

    @pytest.mark.parametrize("name", ["../x", "/etc/hostname", "a//b", "a/../../b", ""])
    def test_names_stay_inside(self, store: Store, name: str) -> None:
        with pytest.raises(DataError, match="not a name"):
            store.get(name)
        with pytest.raises(DataError, match="not a name"):
            store.put(name, b"")

    def test_an_object_is_replaced_and_removed(self, store: Store) -> None:
        store.put("one.bin", b"old")
        store.put("one.bin", b"newer")
        assert store.get("one.bin") == b"newer"
        store.delete("one.bin")
        store.delete("one.bin")
        assert store.list() == {}

    def test_only_one_creates(self, store: Store) -> None:
        with ThreadPoolExecutor(8) as threads:
            tries = list(threads.map(lambda number: store.put_new("claims/3", bytes([number])), range(8)))
        assert sum(tries) == 1
        assert store.get("claims/3") == bytes([tries.index(True)])
        assert not store.put_new("claims/3", b"late")
        assert list(store.list()) == ["claims/3"]

    def test_a_staged_file_moves_in_whole(self, store: Store) -> None:
        data = os.urandom(20 << 20)  # several parts, where there are parts
        with store.staging("deep/large.tar") as path:
            path.write_bytes(data)
            assert store.list() == {}
            store.put_file("deep/large.tar", path)
        assert not path.exists()
        assert store.list() == {"deep/large.tar": len(data)}
        assert store.get_range("deep/large.tar", 10 << 20, 100) == data[10 << 20 :][:100]
        assert store.sha256("deep/large.tar") == hashlib.sha256(data).hexdigest()

    def test_a_download_is_the_same_file(self, store: Store, tmp_path: Path) -> None:
        store.put("one.bin", DATA)
        target = tmp_path / "copy"
        target.write_bytes(b"old")
        assert store.download("one.bin", target) == len(DATA)
        assert target.read_bytes() == DATA

    def test_it_crosses_to_other_processes(self, store: Store) -> None:
        store.put("one.bin", b"1")
        copy = pickle.loads(pickle.dumps(store))
        assert (copy.url, copy.limits, copy.get("one.bin")) == (store.url, store.limits, b"1")
