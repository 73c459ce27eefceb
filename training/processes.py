"""Waiting for the first of several processes, however long its work takes."""

import functools
from datetime import timedelta

import torch.distributed as dist

from fgm import InputError, process_rank, world_size


@functools.cache
def without_limit():
    """A group of all processes whose exchanges may take a month; usual ones end after a time limit."""
    try:
        return dist.new_group(backend="gloo", timeout=timedelta(days=30))
    except RuntimeError as error:
        raise InputError("the first process has gone") from error


def first_process(work):
    """work() on the first process, however long it takes; its InputError is raised on all. A collective call.

    Returns on all what work does. Raises InputError on the others if the first process vanishes."""
    group, said = without_limit() if world_size() > 1 else None, [None, None]
    if process_rank() == 0:
        try:
            said[0] = work()
        except (InputError, OSError) as error:
            said[1] = str(error)
    if group:
        try:
            dist.broadcast_object_list(said, group=group)
        except RuntimeError as error:
            raise InputError(f"{'the first' if process_rank() else 'another'} process has gone") from error
    if said[1]:
        raise InputError(said[1])
    return said[0]


def wait_for_first():
    """Wait until the first process comes here too, hours if need be. A collective call."""
    first_process(lambda: None)
