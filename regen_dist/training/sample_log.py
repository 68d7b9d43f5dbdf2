"""What each rank notes of its samples: the bad ones, once each, and on demand the id of every clip trained on."""

from __future__ import annotations

from regen_dist.config.job import CommonConfig
from regen_dist.data.reading.stand_ins import BadSample
from regen_dist.distributed.ranks import Ranks
from regen_dist.observe.record import Record, read_record
from regen_dist.observe.warning import warn
from regen_dist.training.tasks import Batch


class SampleLog:
    """One rank's notes: `bad_samples/rank-00000.jsonl` and, with `train.trace_samples`, `samples/rank-00000.jsonl`.

    A resumed run drops the notes of the steps that it does again; rank 0 does so for ranks that are no more, too. What
    any rank has noted before is not noted again.
    """

    def __init__(self, config: CommonConfig, ranks: Ranks, step: int) -> None:
        self._name = f"rank-{ranks.rank:05d}.jsonl"
        self._bad, self._trace = config.folder / "bad_samples", config.folder / "samples"
        self._traces, self._ranks = config.train.trace_samples, ranks
        self._records: dict[str, Record] = {}
        self._told: set[str] = set()
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Go on after `step`: the notes of later ones are dropped."""
        self.close()
        self._step, self._records = step, {}
        self._known = self._read_known()
        for path in [*self._trace.glob("rank-*.jsonl"), *self._bad.glob("rank-*.jsonl")]:
            rank = int(path.stem.partition("-")[2])
            if rank == self._ranks.rank or (self._ranks.is_main and rank >= self._ranks.world_size):
                Record(path, step).close()
        if self._traces:
            self._open("samples")

    def write(self, step: int, micro: int, batch: Batch) -> None:
        """Note a micro-batch of `step` (counted from 1)."""
        if "samples" in self._records:
            self._records["samples"].write("samples", step, {"micro": micro, "ids": batch.sample_ids.tolist()})
        for sample in batch.bad:
            self._note(step, sample)
        if batch.problem and batch.problem not in self._told:
            self._told.add(batch.problem)
            warn(batch.problem)

    def close(self) -> None:
        for record in self._records.values():
            record.close()

    def _note(self, step: int, sample: BadSample) -> None:
        if (sample.shard, sample.key) in self._known:
            return
        self._known.add((sample.shard, sample.key))
        self._open("bad_samples").write("bad_sample", step, sample._asdict())
        warn(f"sample {sample.key} in {sample.shard} is bad, another stands in for it: {sample.reason}")

    def _open(self, kind: str) -> Record:
        if kind not in self._records:
            folder = self._trace if kind == "samples" else self._bad
            self._records[kind] = Record(folder / self._name, self._step)
        return self._records[kind]

    def _read_known(self) -> set[tuple[str, str]]:
        lines = [line for path in self._bad.glob("rank-*.jsonl") for line in read_record(path)]
        return {(line["shard"], line["key"]) for line in lines if line["step"] <= self._step}
