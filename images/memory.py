"""What a U-Net's distillation needs of a device's memory, from passes of a few images, before the large ones.

The teacher's training and drawing need less: the one keeps one graph where a distillation step keeps two or
three, the other none."""

import math

import torch
import torch.distributed as dist

import fgm


def kept_per_image(net, shape, label_dim, bf16):
    """Bytes that a pass of a U-Net, not sharded, keeps of each image for its backward pass."""
    device = next(net.parameters()).device

    def kept(images):
        x, t = torch.zeros(images, *shape, device=device), torch.ones(images, device=device)
        cond = {"class_labels": torch.zeros(images, label_dim, device=device)} if label_dim else {}
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                output = net(x, t, **cond)  # its graph lives, so that no address is used twice
        del output
        return sum(storages.values())

    return (kept(4) - kept(2)) / 2


def step_bytes(weights, kept, bf16, micro_batch, graphs, ema=True):
    """Bytes at the peak of a distillation step of networks that are not sharded.

    weights: bytes of a network's; kept: of an image in a graph, of which so many graphs live together. Beside
    three networks there are the gradients of two, one moment of each (beta1 is 0), and the average."""
    copies = weights / 2 if bf16 else 0
    return (7 + ema) * weights + graphs * (copies + micro_batch * kept)


def free_bytes(device):
    """The free memory of a GPU, the least of all processes; of a CPU, which may swap, infinity."""
    if device.type == "cpu":
        return math.inf
    torch.cuda.empty_cache()  # what torch keeps of freed memory is free
    free = torch.tensor(torch.cuda.mem_get_info(device)[0], device=device)
    if fgm.world_size() > 1:
        dist.all_reduce(free, dist.ReduceOp.MIN)
    return free.item()


def largest_micro_batch(share, available, *needs, **settings):
    """The largest divisor of share with which step_bytes leaves a tenth of the bytes available, or 1."""
    for micro_batch in range(share, 1, -1):
        if share % micro_batch == 0 and step_bytes(*needs, micro_batch, **settings) <= 0.9 * available:
            return micro_batch
    return 1


def settle_micro_batch(args, net, shape, label_dim):
    """Print what a run of cifar.py needs; where no micro-batch is given, take one that fits.

    net: the U-Net, not sharded. A collective call."""
    device = next(net.parameters()).device
    bf16, available = fgm.wants_bf16(args.precision, device), free_bytes(device)
    # The generator's; the teacher's and the flow's, or, for a GAN, the flow's and that of its features.
    graphs = 2 if (args.l1_weight == 1 or args.two_graphs) and not args.gan else 3
    needs = 4 * sum(p.numel() for p in net.parameters()), kept_per_image(net, shape, label_dim, bf16), bf16
    settings = dict(graphs=graphs, ema=args.ema is not None)
    if args.micro_batch is None:
        args.micro_batch = largest_micro_batch(args.batch // fgm.world_size(), available, *needs, **settings)
    needed = step_bytes(*needs, args.micro_batch, **settings)
    if fgm.process_rank() == 0:
        print(f"memory per process, estimated: {needed / 1e9:.2f} GB, in a distillation step with "
              f"micro-batch {args.micro_batch}")
        if needed > available:
            print(f"that is more than the {available / 1e9:.0f} GB that are free on the device: "
                  "try a smaller --micro-batch or network, or more processes")
