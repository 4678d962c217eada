"""Waiting for other ranks, with a limit: a peer that hangs ends the run by name, not in silence."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

TIMEOUT = 300.0
"""Seconds that a rank waits for another, if nothing else is said."""


class Stuck(RuntimeError):
    """Another rank did not answer in time; the message says who waited, and where."""


def watch(group: dist.ProcessGroup, timeout: float) -> None:
    """Has NCCL end the process of a rank that waits longer in this group, and gloo beside it end
    the wait; nothing without NCCL.
    """
    if _of_gpus(group):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), group)


def all_reduce(
    x: Tensor,
    group: dist.ProcessGroup,
    where: str,
    timeout: float,
    op: Any = dist.ReduceOp.SUM,
) -> Tensor:
    """All-reduce in place. Raises Stuck as `settle` does."""
    settle(dist.all_reduce(x, op, group=group, async_op=True), group, where, timeout)
    return x


def settle(work: Any, group: dist.ProcessGroup, where: str, timeout: float) -> None:
    """Waits for an operation of a group. Raises Stuck, naming the ranks and `where`, after so many
    seconds. On a GPU the host goes on at once, and the group has the timeout (`watch`): NCCL's own
    watchdog, or gloo where it is hosts that wait.
    """
    try:
        if _of_gpus(group):
            work.wait()  # with a time to wait it would be the host that stands still
            return
        done = work.wait(timedelta(seconds=timeout))
    except RuntimeError as error:
        if isinstance(error, dist.DistBackendError) or "timed out" not in str(error).lower():
            raise
        done = False
    if done is False:
        me = dist.get_rank()
        others = [str(rank) for rank in dist.get_process_group_ranks(group) if rank != me]
        raise Stuck(f"rank {me} waited {timeout:g} s for rank {' or '.join(others)} at {where}")


def _of_gpus(group: dist.ProcessGroup) -> bool:
    # A group of both kinds of device calls itself cpu:gloo,cuda:nccl.
    return "nccl" in dist.get_backend(group)
