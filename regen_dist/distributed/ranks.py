"""Place of this process among the ranks, the way it joins them, and their collectives."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from regen_dist.distributed.environment import read_rank_info
from regen_dist.distributed.rendezvous import abort_group, rendezvous_ranks, report_failure
from regen_dist.errors import BackendError, RegenError
from regen_dist.observe.hardware import choose_device

TIMEOUT = timedelta(minutes=30)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process's place: global rank, number of ranks, and rank on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    group: Any = field(default=None, compare=False, repr=False)  # None: the job's own, on the device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return choose_device(self.local_rank)

    def sum(self, values: list[float]) -> list[float]:
        """The sums over all ranks, in float64. A collective: every rank must call it."""
        if self.world_size == 1:
            return values
        device = self.device if self.group is None else torch.device("cpu")
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(tensor, group=self.group)
        return tensor.tolist()

    def agree(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank. A collective."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in the order of ranks; small picklable objects. A collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def raise_together(self, error: RegenError | None) -> None:
        """Raise on every rank when some rank has an error: the same one, that of the lowest rank. A collective."""
        for each in self.gather(error):
            if each is not None:
                raise each

    def on_main(self, job: Callable[[], Result]) -> Result:
        """Call `job` on rank 0 alone; every rank returns its result, or raises its error. A collective."""
        if self.world_size == 1:
            return job()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = job()
            except Exception as error:  # noqa: BLE001 - passed to all, then raised by all
                outcome[1] = error if isinstance(error, RegenError) else RegenError(f"{type(error).__name__}: {error}")
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]  # type: ignore[no-any-return]

    def apart(self) -> Ranks:
        """Return the same ranks with a gloo group of their own, for a thread that communicates while the main thread
        does. A collective."""
        return self if self.world_size == 1 else replace(self, group=dist.new_group(backend="gloo", timeout=TIMEOUT))

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.group)


def read_environment(environment: Mapping[str, str] = os.environ) -> Ranks:
    """The place that the environment gives this process (see `environment.read_rank_info`).

    Raises:
        ConfigError: the variables of torchrun, Slurm and Submitit disagree, or make no sense.
    """
    return Ranks(*read_rank_info(environment))


@contextmanager
def process_group(ranks: Ranks, needed: bool) -> Iterator[None]:
    """Join the other ranks for the duration of the block: NCCL on GPUs, gloo on CPUs. An error is printed at once, and
    then the group is left without waiting for the others (see `failure`)."""
    if not needed and ranks.world_size == 1:
        yield
        return
    _join(ranks)
    try:
        yield
    except BaseException as error:
        report_failure(error, ranks.rank, ranks.world_size)
        abort_group()
        raise
    dist.destroy_process_group()


def _join(ranks: Ranks) -> None:
    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world_size), LOCAL_RANK=str(ranks.local_rank))
    alone = ranks.world_size == 1
    device: torch.device | None = None
    problem = ""
    try:
        device = ranks.device
    except BackendError as error:
        if ranks.world_size == 1:
            raise
        problem = str(error)
    store = HashStore() if alone else rendezvous_ranks(ranks.rank, ranks.world_size, device, problem, TIMEOUT)
    assert device is not None, "rendezvous_ranks raises on every rank where one has no device"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # by which DeepSpeed chooses the device
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=TIMEOUT)


def chunk(size: int, world_size: int, rank: int) -> tuple[int, int]:
    """The half-open range of a flat parameter of `size` elements that a rank holds under ZeRO-3: even chunks, the last
    ones short."""
    length = -(-size // world_size)
    low = min(rank * length, size)
    return low, min(low + length, size)


def make_repeatable(device: torch.device, *, deterministic: bool) -> None:
    """Set up the process before its first kernel.

    On a CPU kernels are deterministic, and torch warns of one that were not. On a GPU `deterministic` restricts
    convolutions (cuDNN), matrix products (cuBLAS) and attention's backward pass (no atomic additions) to repeatable
    algorithms, and an operation that has none is an error: where torch merely warned of it, attention would stay as it
    is (aten/src/ATen/native/transformers/cuda/attention_backward.cu). Without it cuDNN tries its algorithms for each
    new shape, and keeps the fastest."""
    on_gpu = device.type == "cuda"
    if on_gpu and deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it at its first call
    # Like use_deterministic_algorithms, which in addition imports the compiler to set it there.
    torch.set_deterministic_debug_mode(("error" if deterministic else "default") if on_gpu else "warn")
    torch.backends.cudnn.deterministic = on_gpu and deterministic
    torch.backends.cudnn.benchmark = on_gpu and not deterministic
