"""Whether every rank of a job has a GPU for itself."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.preflight.findings import Finding, Subject, note, problem


def ranks_and_gpus(subject: Subject) -> Iterator[Finding]:
    """Every rank has a GPU, and none idles."""
    cluster = subject.order.cluster
    if not subject.configs or not cluster.gpus_per_node:
        return
    ranks, gpus = cluster.ranks_per_node, cluster.gpus_per_node
    if ranks > gpus:
        yield problem(f"{ranks} ranks on a node of {gpus} GPU(s), and each needs one; set --tasks-per-node {gpus}")
    elif ranks < gpus:
        yield note(f"{gpus - ranks} of {gpus} GPUs of each node will idle: each rank uses one, and there are {ranks}")
