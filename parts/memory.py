"""What a U-Net's run needs of a device's memory, from passes of two images, before the large ones."""

import math
import weakref
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fgm
from parts.images import images_at_once


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations within it make and that still live: now and, at most,
    peak. Tensors from before do not count."""

    def __init__(self, before):
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if torch.is_tensor(result):
                self.count(result.untyped_storage())
        if operation == torch.ops.aten.convolution.default:  # it may copy its input to another layout
            self.peak = max(self.peak, self.now + args[0].nbytes)
        return results

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def forget():
            self.known.discard(key)
            self.now -= size

        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, forget)


class Needs(NamedTuple):
    """What a U-Net needs, in bytes: its weights; per image, what passes keep for their backward passes, when
    the teacher trains (with dropout) and when it does not, and the peak of a pass without gradients."""

    weights: float
    training: float
    kept: float
    drawing: float


def needs(net, shape, label_dim, bf16, images=2):
    """The Needs of a U-Net, not sharded, found by passes of two images; leaves it in evaluation mode."""
    device = next(net.parameters()).device
    x, t = torch.zeros(images, *shape, device=device), torch.ones(images, device=device)
    cond = {"class_labels": torch.zeros(images, label_dim, device=device)} if label_dim else {}
    before = [x, t, *cond.values(), *net.parameters(), *net.buffers()]
    # Of weights, in bfloat16, which the graph keeps; those of biases and norms are small.
    copies = 2 * sum(p.numel() for p in net.parameters() if p.dim() > 1) if bf16 else 0

    def count(net, gradients):
        with torch.set_grad_enabled(gradients), LiveBytes(before) as live:
            with torch.autocast(device.type, torch.bfloat16, enabled=gradients and bf16):
                output = net(x, t, **cond)
            counted = live.now - copies if gradients else live.peak
            del output  # with its graph
        return counted / images

    weights, training = 4 * sum(p.numel() for p in net.parameters()), count(net.train(), True)
    return Needs(weights, training, count(net.eval(), True), count(net.eval(), False))


def phases(need, bf16, micro_batch, drawn, ema=True):
    """Bytes that a process needs at the peaks of a run of cifar.py: {phase: bytes}.

    drawn: images that it draws at a time, in float32; Inception's needs are not counted. A distillation
    step's peak is where the graphs of all three networks live, beside the gradients of two. Adam keeps two
    moments of the teacher, one of the others, whose beta1 is 0. Networks that are sharded need less."""
    networks, average = 3 * need.weights, need.weights if ema else 0
    copies = need.weights / 2 if bf16 else 0
    return {
        "a teacher step": networks + 4 * need.weights + copies + micro_batch * need.training,
        "a distillation step": networks + 4 * need.weights + average + 3 * (copies + micro_batch * need.kept),
        "scoring": networks + average + drawn * need.drawing,
    }


def free_bytes(device):
    """The free memory of a GPU, the least of all processes; of a CPU, which may swap, infinity."""
    if device.type == "cpu":
        return math.inf
    free = torch.tensor(torch.cuda.mem_get_info(device)[0], device=device)
    if fgm.world_size() > 1:
        dist.all_reduce(free, dist.ReduceOp.MIN)
    return free.item()


def largest_micro_batch(share, available, need, bf16, ema=True):
    """The largest divisor of share with which the steps leave a tenth of the bytes available, or 1."""
    for micro_batch in range(share, 1, -1):
        peak = max(phases(need, bf16, micro_batch, 0, ema).values())
        if share % micro_batch == 0 and peak <= 0.9 * available:
            return micro_batch
    return 1


def settle_micro_batch(args, net, shape, label_dim):
    """Print what a run of cifar.py needs by phase; where no micro-batch is given, take one that fits.

    net: the U-Net, not sharded. A collective call."""
    device, processes, ema = next(net.parameters()).device, fgm.world_size(), args.ema is not None
    bf16, available = fgm.wants_bf16(args.precision, device), free_bytes(device)
    need = needs(net, shape, label_dim, bf16)
    if args.micro_batch is None:
        args.micro_batch = largest_micro_batch(args.batch // processes, available, need, bf16, ema)
    drawn = math.ceil(min(images_at_once(shape), args.samples) / processes)
    found = phases(need, bf16, args.micro_batch, drawn, ema)
    if args.teacher:
        del found["a teacher step"]
    peak = max(found, key=found.get)
    if fgm.process_rank() == 0:
        listed = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in found.items())
        print(f"memory per process, estimated: {found[peak] / 1e9:.2f} GB, in {peak} ({listed}), "
              f"with micro-batch {args.micro_batch}")
        if found[peak] > available:
            print(f"that is more than the {available / 1e9:.0f} GB that are free on the device: "
                  "try a smaller --micro-batch or network, or more processes")
