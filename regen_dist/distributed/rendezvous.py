"""Rendezvous of the ranks, each of which reports its device first, because ranks with unsuitable devices would hang;
and the exit of a rank that fails."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from regen_dist.distributed.environment import join_timeout_s, left_over_advice
from regen_dist.errors import EXIT_OK, BackendError, RegenError
from regen_dist.jsontext import json_text

_MOST_NAMED = 8
_READ_S = 30.0
_NOTICE_S = 5.0
_POLL_S = 0.2


def rendezvous_ranks(
    rank: int, world_size: int, device: torch.device | None, problem: str, timeout: timedelta
) -> Store:
    """Return the store of the job (at MASTER_ADDR and MASTER_PORT), once all ranks have devices that fit together.

    Ranks that were never started are not waited for: see `join_timeout_s`.

    Args:
        rank, world_size: rank of this process, and number of ranks.
        device: device that this process computes on; None if it found none that it may use.
        problem: why; empty otherwise.
        timeout: longest wait for the other ranks' reports, once all are there.

    Raises:
        RegenError: the others do not appear.
        BackendError: some rank has no device, some have GPUs and others CPUs, or two have the same GPU; on every rank.
    """
    store = _connect(rank, world_size)
    store.set_timeout(timeout)
    store.set(f"device/{rank}", json_text(_own_report(device, problem)))
    if rank == 0:
        keys = [f"device/{each}" for each in range(world_size)]
        store.wait(keys)
        store.set("devices", find_mismatch([json.loads(report) for report in store.multi_get(keys)]))
    if mismatch := store.get("devices").decode():
        _wait_for_readers(store, rank, world_size)
        raise BackendError(mismatch)
    return PrefixStore("regen", store)


def _connect(rank: int, world_size: int) -> Store:
    """Return the store, once the others are there; after some seconds a line says which ranks are missing.

    Raises:
        RegenError: they did not come in time, the port is taken, or the address is missing or wrong.
    """
    seconds = join_timeout_s(os.environ)
    where = f"rank {rank} of {world_size}"
    text = f"{where} waits for the others, {seconds:g} s at most: "
    notice = threading.Timer(_NOTICE_S, lambda: print(text + left_over_advice(os.environ), file=sys.stderr, flush=True))
    notice.daemon = True
    notice.start()
    end = time.monotonic() + seconds
    try:
        _wait_for_server(rank, end)
        left = timedelta(seconds=max(end - time.monotonic(), 1.0))
        store: Store = next(rendezvous("env://", rank, world_size, timeout=left))[0]
    except (RuntimeError, ValueError, OSError) as error:  # raised by c10d; for a missing variable; by the network
        reason = str(error).strip().partition("\n")[0]
        raise RegenError(f"{where} did not meet the others ({reason}): {left_over_advice(os.environ)}") from error
    finally:
        notice.cancel()
    return store


def _wait_for_server(rank: int, end: float) -> None:
    """Try the address until a server listens there. c10d would print a trace of its own for every failure.

    Raises:
        OSError: no server does.
        ValueError: the port is no number.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    serves_itself = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while not serves_itself and address and port:  # a missing one is named by the rendezvous
        try:
            socket.create_connection((address, int(port)), timeout=max(end - time.monotonic(), 1.0)).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() >= end:
                raise OSError(f"nobody answers at {address}:{port}: {error}") from error
        time.sleep(_POLL_S)


def _wait_for_readers(store: Store, rank: int, world_size: int) -> None:
    """Keep rank 0, which serves the store, until all ranks have read, for a limited time."""
    read, end = store.add("read", 1), time.monotonic() + _READ_S
    while rank == 0 and read < world_size and time.monotonic() < end:
        time.sleep(0.05)
        read = store.add("read", 0)


def find_mismatch(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return the reason why ranks cannot work together; empty if they can.

    Args:
        reports: reports, one a rank: `host`, `device` ("cuda", "cpu" or empty), `gpu` (its unique id), `problem`.
    """
    if failed := [rank for rank, each in enumerate(reports) if each["problem"]]:
        return f"{_name_ranks(failed, reports)}: {reports[failed[0]]['problem']}"
    kinds = {kind: [rank for rank, each in enumerate(reports) if each["device"] == kind] for kind in ("cuda", "cpu")}
    if kinds["cuda"] and kinds["cpu"]:
        return (
            f"{len(kinds['cuda'])} ranks have a GPU and {len(kinds['cpu'])} do not: "
            f"{_name_ranks(kinds['cpu'], reports)}. Ask for GPUs on every node, and "
            "look at the driver of those nodes (nvidia-smi)"
        )
    used = Counter((each["host"], each["gpu"]) for each in reports if each["gpu"])
    if shared := [rank for rank, each in enumerate(reports) if used[each["host"], each["gpu"]] > 1]:
        return f"{_name_ranks(shared, reports)} share a GPU: each rank needs its own; start one rank per GPU"
    return ""


def _name_ranks(ranks: Sequence[int], reports: Sequence[Mapping[str, Any]]) -> str:
    named = ", ".join(f"rank {rank} on {reports[rank]['host']}" for rank in ranks[:_MOST_NAMED])
    return named + (f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else "")


def _own_report(device: torch.device | None, problem: str) -> dict[str, str]:
    gpu = ""
    if device is not None and device.type == "cuda":
        gpu = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    return {
        "host": socket.gethostname(), "device": "" if device is None else device.type, "gpu": gpu, "problem": problem,
    }  # fmt: skip


# Exit of a rank that fails: it reports the error at once and waits for no other rank.
#
# The others may be inside a collective that this rank will never join. NCCL's orderly way of leaving a group waits for
# the kernels of such collectives, and so does the interpreter's exit: the error would look like a hang. So the error is
# printed before anything else, the group is aborted, and the process ends. The launcher, or srun, ends the other ranks.


ABORT_S = 10.0  # limit for an abort of the group, which ends its kernels on the GPU
_INTERRUPTED = 128 + 2  # as a shell counts SIGINT
_reported: list[BaseException] = []  # errors that were printed


def report_failure(error: BaseException, rank: int = 0, world_size: int = 1) -> None:
    """Print an error on stderr, once: one that a user can fix as its message, any other with its traceback.

    Args:
        error: the error; a SystemExit prints nothing.
        rank: rank of this process; printed if there are several.
        world_size: number of ranks.
    """
    if isinstance(error, SystemExit) or any(error is each for each in _reported):
        return
    _reported.append(error)
    who = f"rank {rank}: " if world_size > 1 else ""
    plain = isinstance(error, RegenError) and os.environ.get("REGEN_DEBUG") != "1"
    text = f"error: {error}" if plain else "".join(traceback.format_exception(error)).rstrip()
    sys.stderr.write(f"{who}{text}\n")  # in one piece: ranks may share the terminal
    sys.stderr.flush()


def has_failed() -> bool:
    """Return whether this process has printed an error that ends it: what closes then must not wait for others."""
    return bool(_reported)


def abort_group() -> None:
    """Leave the process group without waiting for its collectives, in `ABORT_S` at most."""
    # A gloo group leaves nothing behind. Aborted first, it would break the connections of the other ranks, which could
    # then end before this one; the job's exit code is that of the first rank that ends.
    if not dist.is_initialized() or dist.get_backend() == "gloo":
        return
    # There is no public name for it in torch 2.10 to 2.13; `destroy_process_group` waits.
    thread = threading.Thread(target=dist.distributed_c10d._abort_process_group, name="abort", daemon=True)
    thread.start()
    thread.join(ABORT_S)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Run the program of a rank in the block. An error ends the process at once with its exit code, without the waits
    of the interpreter's end (GPU contexts, destructors of groups, threads). A requested exit, and success, end as
    usual."""
    try:
        yield
    except SystemExit as asked:
        if asked.code in (None, EXIT_OK):
            raise
        _end(asked.code if isinstance(asked.code, int) else 1)
    except KeyboardInterrupt as error:
        report_failure(error)
        _end(_INTERRUPTED)
    except BaseException as error:  # noqa: BLE001 - it is reported, and the process ends
        report_failure(error)
        _end(error.exit_code if isinstance(error, RegenError) else 1)


def _end(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
