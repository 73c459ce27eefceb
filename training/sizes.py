"""Whether what a command line asks for can fit into memory at all, told before anything is allocated."""

from contextlib import suppress
from pathlib import Path

import psutil
import torch

import fgm
from fgm import InputError

CPU = torch.device("cpu")


def memory_of(device):
    """Bytes of memory of a GPU; of this machine, or of the container that we run in, for a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    total = psutil.virtual_memory().total
    with suppress(OSError, ValueError):  # no such file, or "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def check_memory(what, needed, device=CPU):
    """Raise InputError if `what` needs more bytes than the device has."""
    if needed > (there := memory_of(device)):
        raise InputError(f"{what} would need {needed / 1e9:,.1f} GB of memory or more, "
                         f"the {device.type} has {there / 1e9:,.1f} GB")


def check_sizes(args, device, values=1, kept=0, scored=None):
    """Raise InputError if --batch does not divide, or if it or --samples cannot fit into memory.

    A lower bound. values: numbers in a sample; kept: numbers that a network keeps of it for its backward
    pass; scored: bytes for a sample that is scored (None: its values as uint8, float32 and float64)."""
    micro = args.micro_batch or max(1, args.batch // fgm.world_size())
    drawn = 2 * 4 * values * args.batch  # noise, twice
    slices = 64 * args.batch // (micro * fgm.world_size())  # Python's objects
    check_memory(f"--batch {args.batch}", drawn + 4 * kept * min(micro, args.batch) + slices, device)
    check_memory(f"--samples {args.samples}", (scored or 13 * values) * args.samples)
    fgm.micro_batches(args.batch, args.micro_batch)
