"""Processes that begin with torch and DeepSpeed already imported: a start of ranks costs what they do, not seconds.

They are forked from a server, one for this process, that has imported the modules and has done nothing else: it has a
single thread (every rank checks that), it never opened a store (obstore's threads do not survive a fork), and no OpenMP
region ran in it. It is apart from `multiprocessing`'s own server, from which the library's loaders fork theirs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import popen_forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.forkserver import ForkServer, read_signed
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

# Modules that are installed, so that the server finds them wherever it is started; all that a rank of a small run
# imports, also where it does so late: DeepSpeed when its engine is built, torch when an optimizer is.
_PRELOAD = [
    "deepspeed",
    "deepspeed.module_inject.auto_ep_config",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.ops.triton_ops.group_gemm_triton",
    "matplotlib",
    "regen_dist.training.run",
    "safetensors.torch",
    "setuptools",
    "torch._dynamo",
    "torch.utils.flop_counter",
]
_ENVIRONMENT = {  # what these modules read while they are imported
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",  # numpy's and torch's pools have no threads then
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's allocator neither
}


class _Server(ForkServer):
    """The server of this module; stands in for the module `forkserver` where a process is launched."""

    read_signed = staticmethod(read_signed)


_server = _Server()
_server.set_forkserver_preload(_PRELOAD)


class _Popen(popen_forkserver.Popen):
    def _launch(self, process: Any) -> None:
        with _changed_environment(), mock.patch.object(popen_forkserver, "forkserver", _server):
            super()._launch(process)  # type: ignore[misc]


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process: BaseProcess) -> Any:
        return _Popen(process)


class RankContext(ForkServerContext):
    """A context of `multiprocessing` whose processes are forked from the server of this module."""

    Process = _Process  # type: ignore[assignment]


@contextmanager
def _changed_environment() -> Iterator[None]:
    """While the server may be started: it has this process's variables, and those above."""
    with mock.patch.dict(os.environ, _ENVIRONMENT):
        yield


def check_server() -> None:
    """In a process that was forked from the server: that it was sound to do so.

    Raises:
        RuntimeError: the server has threads, of which a fork keeps only one, and all their locks.
    """
    names = []
    for task in os.scandir(f"/proc/{os.getppid()}/task"):
        with open(f"{task.path}/comm", encoding="utf-8") as file:
            names.append(file.read().strip())
    if len(names) != 1:
        raise RuntimeError(f"the server that ranks are forked from has the threads {names}; it must have one")
