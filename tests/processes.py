"""What workers of several processes have in common."""

from __future__ import annotations

import gc

import torch.distributed as dist


def leave_group() -> None:
    """Ends a worker's part in its process group.

    What hangs on the group, as DDP's reducer, lies in cycles and goes first: a thread of it that wants Python's lock
    while Python itself is ending aborts the process.
    """
    gc.collect()
    dist.destroy_process_group()
