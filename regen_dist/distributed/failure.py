"""Exit of a rank that fails: it reports the error at once and waits for no other rank.

The others may be inside a collective that this rank will never join. NCCL's orderly way of leaving a group waits for
the kernels of such collectives, and so does the interpreter's exit: the error would look like a hang. So the error is
printed before anything else, the group is aborted, and the process ends. The launcher, or srun, ends the other ranks.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from regen_dist.errors import EXIT_OK, RegenError

ABORT_S = 10.0  # limit for an abort of the group, which ends its kernels on the GPU
_INTERRUPTED = 128 + 2  # as a shell counts SIGINT
_told: list[BaseException] = []  # errors that were printed


def tell(error: BaseException, rank: int = 0, world_size: int = 1) -> None:
    """Print an error on stderr, once: one that a user can fix as its message, any other with its traceback.

    Args:
        error: the error; a SystemExit prints nothing.
        rank: rank of this process; printed if there are several.
        world_size: number of ranks.
    """
    if isinstance(error, SystemExit) or any(error is each for each in _told):
        return
    _told.append(error)
    who = f"rank {rank}: " if world_size > 1 else ""
    plain = isinstance(error, RegenError) and os.environ.get("REGEN_DEBUG") != "1"
    text = f"error: {error}" if plain else "".join(traceback.format_exception(error)).rstrip()
    sys.stderr.write(f"{who}{text}\n")  # in one piece: ranks may share the terminal
    sys.stderr.flush()


def has_failed() -> bool:
    """Return whether this process has printed an error that ends it: what closes then must not wait for others."""
    return bool(_told)


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
        tell(error)
        _end(_INTERRUPTED)
    except BaseException as error:  # noqa: BLE001 - it is reported, and the process ends
        tell(error)
        _end(error.exit_code if isinstance(error, RegenError) else 1)


def _end(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
