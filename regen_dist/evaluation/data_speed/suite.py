"""All measurements of `regen bench data`, with what each is compared with and the ratio that it should reach."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from regen_dist.config.schema import DataConfig, ReadConfig
from regen_dist.data.dataset.catalogue import open_dataset
from regen_dist.evaluation.data_speed import clips as clipping
from regen_dist.evaluation.data_speed import fetching, others, planning, starting
from regen_dist.evaluation.data_speed.turns import Case, Rounds, Turn, in_turn, ratio, spread, summary

CLIPS_TARGET, BYTES_TARGET, WAIT_TARGET = 0.9, 0.8, 0.02
CROPS = (64, 128)
_BATCH = 8
_PLANNED = (1_000_000, 100_000_000)


@dataclass(frozen=True)
class Suite:
    """What is measured, and how long.

    Args:
        folder: the dataset of clips on a local disk.
        clips_url, small_url: the datasets in the store.
        num_frames: of a clip.
        read: how bytes are read for clips.
        seconds: about how long one measurement of clips takes.
        repeats: rounds.
        store: process id of the store where it is on this machine.
        told: hears of each measurement.
    """

    folder: Path
    clips_url: str
    small_url: str
    num_frames: int
    read: ReadConfig
    seconds: float
    repeats: int
    store: int | None
    told: Callable[[str, Turn], None]

    def clips(self) -> list[dict[str, Any]]:
        """Clips through the loader, from the folder and from the store, against decoding alone; for each crop."""
        return [self._clips(crop) for crop in CROPS]

    def _clips(self, crop: int) -> dict[str, Any]:
        local = self._stretch(str(self.folder), crop)
        remote = local._replace(config=local.config.model_copy(update={"url": self.clips_url}))
        cases: dict[str, Case] = {
            "decoding alone, from memory": lambda: clipping.from_memory(local),
            "loader, local folder": lambda: clipping.through_loader(local),
            "loader, store": lambda: clipping.through_loader(remote, self.store),
        }
        rounds = in_turn(cases, self.repeats, self.told)
        alone, folder, store = rounds.values()
        ratios = {"loader, local folder": ratio(folder, alone), "loader, store": ratio(store, alone)}
        if self.store is not None:
            elsewhere = [without_store(turn, local.workers) for turn in store]
            ratios["loader, store, had its CPU time been another machine's"] = ratio(elsewhere, alone)
        return {
            "what": f"{self.num_frames} frames of {crop}x{crop}",
            "unit": "clips",
            "settings": {**_plain(local), "config": local.config.model_dump(mode="json")},
            "against": "decoding alone, from memory",
            "target": CLIPS_TARGET,
            **_compared(rounds, ratios),
        }

    def _stretch(self, url: str, crop: int) -> clipping.Stretch:
        """As many batches as take about `seconds`; the first decoding of all tells how many."""
        config = DataConfig(url=url, size=(crop, crop), short_side="fit", read=self.read)
        workers = len(os.sched_getaffinity(0))
        stretch = clipping.Stretch(config, self.num_frames, _BATCH, 2, workers)
        return stretch._replace(
            batches=max(2, round(clipping.from_memory(stretch).rate * self.seconds / _BATCH / workers))
        )

    def small(self) -> dict[str, Any]:
        """Bytes by our fetcher against obstore alone; one request a sample, so that both ask for the same ranges."""
        url, store = self.small_url, self.store
        dataset = open_dataset(url)
        mixed, in_order = fetching.shuffled_rows(dataset), list(range(len(dataset)))
        apart = ReadConfig(join_kb=0)
        with TemporaryDirectory() as cache:
            cached = apart.model_copy(update={"cache": cache})
            fetching.by_fetcher(url, cached, mixed)
            cases: dict[str, Case] = {
                "obstore, a call a sample": lambda: fetching.by_obstore(url, apart, mixed, store),
                "fetcher, shuffled": lambda: fetching.by_fetcher(url, apart, mixed, store),
                "obstore, a call a shard": lambda: fetching.by_obstore_many(url, apart, mixed, store),
                "fetcher, shuffled, joining": lambda: fetching.by_fetcher(url, ReadConfig(), mixed, store),
                "fetcher, in order, joining": lambda: fetching.by_fetcher(url, ReadConfig(), in_order, store),
                "fetcher, from the warm cache": lambda: fetching.by_fetcher(url, cached, mixed, store),
            }
            rounds = in_turn(cases, self.repeats, self.told)
        alone = faster(rounds["obstore, a call a sample"], rounds["obstore, a call a shard"])
        ratios = {name: ratio(turns, alone) for name, turns in rounds.items() if name.startswith("fetcher")}
        settings = {"samples": len(dataset), "bytes": dataset.manifest.totals.bytes, "requests": apart.requests}
        return {
            "what": "bytes of small samples",
            "unit": "bytes",
            "settings": settings,
            "against": "obstore alone, the faster way of each round",
            "target": BYTES_TARGET,
            **_compared(rounds, ratios),
        }

    def others(self) -> dict[str, Any]:
        """The same samples by plain WebDataset."""
        url, store = self.small_url, self.store
        dataset = open_dataset(url)
        mixed, in_order = fetching.shuffled_rows(dataset), list(range(len(dataset)))
        signed, piped = others.presigned(url), others.piped(url)
        cases: dict[str, Case] = {
            "WebDataset, curl": lambda: others.by_webdataset(signed, store),
            "fetcher, in order": lambda: fetching.by_fetcher(url, ReadConfig(), in_order, store),
            "fetcher, shuffled": lambda: fetching.by_fetcher(url, ReadConfig(), mixed, store),
        }
        if piped is not None:
            cases["WebDataset, pipe:aws s3 cp"] = lambda: others.by_webdataset(piped, store)
        rounds = in_turn(cases, self.repeats, self.told)
        plain = rounds["WebDataset, curl"]
        ratios = {name: ratio(turns, plain) for name, turns in rounds.items() if turns is not plain}
        return {
            "what": "bytes of the same samples by WebDataset",
            "unit": "bytes",
            "settings": {"samples": len(dataset), "shards": len(dataset.manifest.shards)},
            "left_out": [] if piped else ["pipe:aws s3 cp: there is no `aws`; pip install 'regen-dist[bench]'"],
            "against": "WebDataset, curl",
            **_compared(rounds, ratios),
        }

    def order(self) -> list[dict[str, Any]]:
        """Planning one epoch."""
        found = []
        for samples in _PLANNED:
            for mixed in (False, True):
                costs = planning.plan(samples, mixed=mixed)
                kind = "6 buckets x 3 datasets" if mixed else "one line"
                self.told(f"planning, {kind}", Turn(samples, costs["seconds"]))
                found.append({"samples": samples, "kind": kind, "batch": planning.BATCH, **costs})
        return found

    def start(self) -> dict[str, Any]:
        """From nothing to the first batch, with and without a catalogue on this machine."""
        found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
        for _ in range(self.repeats):
            with TemporaryDirectory() as cache:
                for state, each in found.items():
                    each.append(
                        starting.first_batch(
                            self.clips_url, Path(cache), crop=CROPS[0], num_frames=self.num_frames, batch=_BATCH
                        )
                    )
                    self.told(f"first batch, {state} catalogue", Turn(1, each[-1]["seconds"]))
        return {state: {name: spread([one[name] for one in each]) for name in each[0]} for state, each in found.items()}


def without_store(turn: Turn, cores: int) -> Turn:
    """What a turn would have been, had the store's CPU time been that of another machine: all cores were busy, so the
    workers would have had it."""
    return Turn(turn.amount, turn.seconds - turn.facts["store_cpu_s"] / cores, turn.facts)


def faster(*several: Sequence[Turn]) -> list[Turn]:
    """The fastest turn of each round."""
    return [max(each, key=lambda turn: turn.rate) for each in zip(*several, strict=True)]


def _compared(rounds: Rounds, ratios: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    return {"cases": {name: summary(turns) for name, turns in rounds.items()}, "ratios": dict(ratios)}


def _plain(stretch: clipping.Stretch) -> dict[str, Any]:
    return {name: getattr(stretch, name) for name in ("num_frames", "batch", "batches", "workers", "seed")}
