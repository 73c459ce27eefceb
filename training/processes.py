"""Several processes that torchrun starts: joining them, sharing their work, waiting for the first one."""

import os
import re
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from fgm import InputError, process_rank, world_size

TIME_LIMIT = timedelta(hours=12)  # of one exchange; the others wait that long while the first process scores
GATHERED_WHOLE = 1e9  # bytes of weights; every process keeps all of a smaller network


def setup(device=None):
    """Join the other processes if torchrun started this one. Returns its device (default: a GPU, if any).

    Raises InputError for a device that does not exist."""
    name = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", name):
        raise InputError(f"--device {name}: cpu, cuda or cuda:N are possible")

    device = torch.device(name)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise InputError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True

    if "RANK" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIME_LIMIT)
    return device


def shard(net, blocks=(), bf16=False):
    """Share a large network between all processes, block by block (FSDP2). Copy networks before, not after.

    Its weights are gathered for every pass; every process keeps all of a network below GATHERED_WHOLE bytes.
    bf16: gather weights in bfloat16. Gradients are reduced in float32, and inputs are not cast, so that t
    stays float32."""
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    if world_size() == 1 or size < GATHERED_WHOLE:
        return

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    types = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else {}
    policy = MixedPrecisionPolicy(**types, cast_forward_inputs=False)
    mesh = init_device_mesh(next(net.parameters()).device.type, (world_size(),))
    for part in [*blocks, net]:
        fully_shard(part, mesh=mesh, mp_policy=policy)


def largest_divisor(share, limit):
    """The default micro-batch on a GPU: the largest divisor of a process's share of a batch up to a limit."""
    return max(n for n in range(1, min(share, limit) + 1) if share % n == 0)


def compile_networks(*nets):
    """torch.compile networks in place. A graph of theirs may be differentiated twice, and a network meets
    several sizes of batch, a block of SD3's 14 combinations of batch, gradients and adapter."""
    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for net in nets:
        net.compile()


def first_process(work):
    """Call work() on the first process and return on all what it returns. A collective call.

    Raises InputError on all if work() raises it or OSError, and if another process has ended."""
    result, error = None, None
    if process_rank() == 0:
        try:
            result = work()
        except (InputError, OSError) as failure:
            error = str(failure)

    if world_size() > 1:
        message = [result, error]
        try:
            dist.broadcast_object_list(message, device=torch.device("cpu"))
        except RuntimeError as failure:
            raise InputError("another process has ended: see its message") from failure
        result, error = message

    if error is not None:
        raise InputError(error)
    return result


def wait_for_first():
    """Wait until the first process comes here, too. A collective call."""
    first_process(lambda: None)


def to_device(tensor, device):
    """A CPU's tensor on a device. A GPU is not waited for."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def noise_from(seeds, shape, device):
    """Standard normal noise [B, *shape], float32, for int64 seeds [B] of 0 or more.

    A row depends on its own seed alone, which is the key of a Philox generator (Salmon et al., 2011)."""
    generators = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds.tolist()]
    rows = [generator.standard_normal(shape, np.float32) for generator in generators]
    return to_device(torch.from_numpy(np.stack(rows)), device)  # B rows of [*shape] -> [B, *shape]
