"""Waiting for the first of several processes, however long its work takes.

In a collective call of torch.distributed the others would be ended after the process group's time limit.
"""

import itertools
import time

import torch.distributed as dist

from fgm import InputError, process_rank, world_size

WAITS = itertools.count()  # numbers the calls of wait_for_first, which are the same on all processes


def wait_for_first(fault=None):
    """Wait until the first process comes here too, hours if need be. A collective call.

    Raises InputError on the others if the first process, which never waits, comes with a fault."""
    if world_size() == 1:
        return
    store, key = dist.distributed_c10d._get_default_store(), f"wait-for-first-{next(WAITS)}"
    if process_rank() == 0:
        store.set(key, fault or "")
        return
    try:
        while not store.check([key]):
            time.sleep(0.1)
        fault = store.get(key).decode()
    except dist.DistNetworkError:  # the store was the first process's own
        fault = "the first process has gone"
    if fault:
        raise InputError(fault)


def first_process(work):
    """work() on the first process, however long it takes; its InputError is raised on all. A collective call.

    Returns what work does on the first process, None on the others."""
    result = None
    if process_rank() == 0:
        try:
            result = work()
        except (InputError, OSError) as error:
            wait_for_first(str(error))
            raise InputError(str(error)) from error
    wait_for_first()
    return result
