"""Flow Generator Matching (FGM, arXiv 2410.19310): distil a flow-matching model into a generator that needs one network evaluation.

    python fgm.py                                  # 8 Gaussians: train a teacher, distil it, score both; about a minute on a laptop
    python fgm.py --data checkerboard              # or moons, spiral, rings
    python fgm.py --l1-weight 0 --out runs/l2      # the paper's practice on images: L2 alone
    torchrun --nproc-per-node 2 fgm.py             # the same run, sharded over two processes

The method. A flow model transports noise to data along x_t = (1 - t) x0 + t noise with a velocity field u_t, learned by

    ReFlow   E || net(x_t, t) - (noise - x0) ||^2                                                                         (3.6)

and samples by integrating it, 50 network evaluations or so. A one-step generator x0 = g(z) induces a path p_t and a velocity
field v_t of its own. FGM makes v_t equal to the teacher's u_t everywhere, which makes g's samples follow the teacher's data:

    minimise E || u_t(x_t) - v_t(x_t) ||^2  over g,  with  x_t = (1 - t) g(z) + t noise                                    (4.1)

v_t is unknown, and depends on g in a way that cannot be differentiated. The Flow Product Identity (4.7) removes that
derivative; what remains are two losses with the gradient of (4.1), in which v is an online flow that is merely evaluated:

    L1 = || u - v ||^2   (4.11)       L2 = 2 <u - v, v - (noise - x0)>   (4.12)       FGM = L1 + L2   (4.10)

Algorithm 1 alternates: one ReFlow update of the online flow on fresh samples of g, one FGM update of g.

Conventions. t is float32 of shape [B] in [0, 1]; t = 0 is data, t = 1 is noise. A velocity is noise - x0, and an Euler step from
t to s is x + (s - t) v. A velocity network is any callable net(x, t, **cond) -> v with v.shape == x.shape. Losses are sums over
the dimensions of a sample, one value a sample. Equation numbers are the paper's.
"""

import argparse
import copy
import json
import math
import os
import shutil
import sys
import time
import warnings
import zlib
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")  # a checkpoint of one process is what we intend


class InputError(ValueError):
    """Something that the user gave is wrong; the message says what, and what to do."""


class Diverged(RuntimeError):
    """A loss or a gradient is no longer finite; the message names the term, the step and the last good checkpoint."""


# ----------------------------------------------------------------------------------------------------------------------
# The path and the losses
# ----------------------------------------------------------------------------------------------------------------------


def per_sample(t, x):
    """t [B], shaped to multiply x [B, ...]."""
    return t.view(-1, *[1] * (x.dim() - 1))  # [B] -> [B, 1, ..., 1]


def dot(a, b):
    """Inner product of each sample: a, b [B, ...] -> [B]."""
    return (a * b).flatten(1).sum(1)  # [B, ...] -> [B, D] -> [B]


def interpolate(x0, noise, t):
    """The ReFlow path x_t = (1 - t) x0 + t noise (section 3, above 3.6).

    x0, noise: [B, ...]. t: [B] in [0, 1], 0 is data. Returns x_t [B, ...]. Raises InputError (a ValueError) for other shapes, and for t
    outside [0, 1] where looking at it costs nothing (on an accelerator it would stall the queue)."""
    if x0.shape != noise.shape:
        raise InputError(f"x0 and noise must have the same shape, got {list(x0.shape)} and {list(noise.shape)}")
    if t.shape != x0.shape[:1]:
        raise InputError(f"t must have shape [{len(x0)}], one value a sample, got {list(t.shape)}")
    if t.device.type == "cpu":
        least, most = t.aminmax()
        if not (least >= 0 and most <= 1):
            raise InputError(f"t must lie in [0, 1], got values from {least:g} to {most:g}")
    t = per_sample(t, x0)
    return (1 - t) * x0 + t * noise


def velocity(net, xt, t, **cond):
    """net(xt, t, **cond) in float32 or better, its shape checked. xt: [B, ...], t: [B]. Raises InputError where v.shape != xt.shape."""
    v = net(xt, t, **cond)
    if v.shape != xt.shape:
        raise InputError(f"a velocity network must return the shape of its input {list(xt.shape)}, got {list(v.shape)}")
    return v.to(torch.promote_types(v.dtype, torch.float32))


def reflow_loss(net, x0, noise, t, **cond):
    """The ReFlow loss || net(x_t, t) - (noise - x0) ||^2 (3.6). x0, noise: [B, ...], t: [B]. Returns [B]."""
    error = velocity(net, interpolate(x0, noise, t), t, **cond) - (noise - x0)
    return dot(error, error)


def fgm_losses(teacher, flow, x0, noise, t, *, weight=None, **cond):
    """The two FGM losses (4.11), (4.12); L1 + L2 has the gradient of (4.1) by Theorem 4.2, where flow is the velocity of g's own path.

    x0 = g(z) [B, ...] carries the generator's graph; noise [B, ...] and t [B] must be drawn afresh, independent of z (Theorem 4.1
    conditions on x0 alone). Gradients reach x0 through noise - x0 and through x_t, the input of both networks; none reaches the parameters
    of teacher or flow if they are nn.Modules; with activation checkpointing, call backward inside frozen(teacher, flow) as well.
    weight(t, u, c) -> [B] optionally scales both losses, as a constant. Returns (l1 [B], l2 [B])."""
    with frozen(teacher, flow):
        xt = interpolate(x0, noise, t)
        u = velocity(teacher, xt, t, **cond)
        v = velocity(flow, xt, t, **cond)
    c = noise - x0  # the conditional velocity u_t(x_t | x0)
    l1 = dot(u - v, u - v)  # (4.11)
    l2 = 2 * dot(u - v, v - c)  # (4.12)
    if weight is not None:
        w = weight(t, u.detach(), c.detach())
        l1, l2 = w * l1, w * l2
    return l1, l2


def sid_weight(t, u, c):
    """The per-sample weight of SiD (arXiv 2404.04057, eq 24) in our terms: t^2 / mean |t (u - c)|. u, c: [B, ...], t: [B]. Returns [B]."""
    return t**2 / (per_sample(t, u) * (u - c)).abs().flatten(1).mean(1).clamp(min=1e-5)  # [B, ...] -> [B, D] -> [B]


WEIGHTS = {"none": None, "sid": sid_weight}  # what the image drivers' --weight names


@contextmanager
def frozen(*nets):
    """Within, the parameters of those nets that are modules need no gradient: a backward pass through them computes input gradients only."""
    parameters = [p for net in nets if isinstance(net, nn.Module) for p in net.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def logit_normal(n, mean, std, device=None, generator=None):
    """n times t = sigmoid(mean + std * normal), float32 [n] in [0, 1]; a larger mean is noisier (section 5.1, B.1, B.2)."""
    return torch.sigmoid(mean + std * torch.randn(n, device=device, generator=generator))


# ----------------------------------------------------------------------------------------------------------------------
# The one-step generator, the ODE sampler, guidance
# ----------------------------------------------------------------------------------------------------------------------


def times(value, x):
    """The constant time value for each sample of x: [B], float32, or float64 beside float64 data."""
    return torch.full((len(x),), value, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))


class OneStepGenerator(nn.Module):
    """x0 = c_skip z - c_out net(c_in z, t_star) (B.1), a velocity network used as a one-step generator; c_out None means t_star.

    Equation (5.1) prints another sign, (1 - t*) z + t* v(t* z, t*). With velocity = noise - data, as in (3.6), (B.1) and (C.1), that would
    step away from the data; (B.1) is the one that starts near it. Raises InputError unless t_star is in (0, 1]."""

    def __init__(self, net, t_star, c_in=1.0, c_skip=1.0, c_out=None):
        super().__init__()
        if not 0 < t_star <= 1:
            raise InputError(f"t_star must lie in (0, 1], got {t_star}")
        self.net = net
        self.t_star, self.c_in, self.c_skip = t_star, c_in, c_skip
        self.c_out = t_star if c_out is None else c_out

    def forward(self, z, **cond):
        """z: [B, ...] standard normal. Returns x0 [B, ...]."""
        return self.c_skip * z - self.c_out * velocity(self.net, self.c_in * z, times(self.t_star, z), **cond)

    def coefficients(self):
        """What a sampler needs beside the weights."""
        return {"t_star": self.t_star, "c_in": self.c_in, "c_skip": self.c_skip, "c_out": self.c_out}


@torch.no_grad()
def sample_ode(net, noise, steps, solver="euler", **cond):
    """Integrate dx/dt = net(x, t) from noise at t = 1 to data at t = 0 in equal steps. noise: [B, ...]. Returns x0 [B, ...].

    solver: "euler" (first order, one evaluation a step) or "heun" (second order, two; its last step is Euler's, as in EDM's Algorithm 1,
    so that t = 0 is never evaluated). Raises InputError for other solvers or steps < 1."""
    if steps < 1 or solver not in ("euler", "heun"):
        raise InputError(f'steps must be 1 or more and solver "euler" or "heun", got {steps} and {solver!r}')
    x = noise
    for i in range(steps):
        t, s = 1 - i / steps, 1 - (i + 1) / steps
        v = velocity(net, x, times(t, x), **cond)
        if solver == "heun" and i + 1 < steps:
            v = (v + velocity(net, x + (s - t) * v, times(s, x), **cond)) / 2
        x = x + (s - t) * v
    return x


class guided(nn.Module):
    """Classifier-free guidance as a velocity network, v_null + scale (v_cond - v_null), both halves in one batched call.

    null: a dict whose entries replace those of cond in the second half; tensors [B, ...], or [1, ...] for all samples alike. What null
    does not name is the same in both halves. Raises InputError for a null entry that the call's cond lacks."""

    def __init__(self, net, scale, null):
        super().__init__()
        self.net, self.scale, self.null = net, scale, null

    def forward(self, x, t, **cond):
        if not self.null.keys() <= cond.keys():
            raise InputError(f"guidance replaces {sorted(self.null)}, but the network was called with {sorted(cond)}")
        if self.scale == 1:
            return self.net(x, t, **cond)
        both = {}
        for name, value in cond.items():
            if torch.is_tensor(value):
                other = torch.as_tensor(self.null.get(name, value), dtype=value.dtype, device=value.device)
                value = torch.cat([value, other.expand_as(value)])  # [B, ...] -> [2B, ...]
            both[name] = value
        v_cond, v_null = self.net(torch.cat([x, x]), torch.cat([t, t]), **both).chunk(2)  # [2B, ...] -> 2 x [B, ...]
        return v_null.float() + self.scale * (v_cond.float() - v_null.float())


# ----------------------------------------------------------------------------------------------------------------------
# Processes, precision, random draws
# ----------------------------------------------------------------------------------------------------------------------


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def setup(device=None):
    """Join the other processes if torchrun started us, and return the device of this one ("cuda" where there is one, unless told)."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))  # the others wait while one downloads or scores
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return device


WHOLE = 10_000_000  # parameters: a network below this is gathered at once, since many small messages cost more than the memory they save


def shard(net, blocks=(), bf16=False):
    """Shard a network over all processes (FSDP2), block by block if it is large; with one process, leave it as it is. Copy networks before, not after.

    bf16: gather weights in bfloat16; gradients are reduced in float32 and inputs left alone, so that t stays float32."""
    if world() > 1:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mixed = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else {}
        policy = MixedPrecisionPolicy(**mixed, cast_forward_inputs=False)
        large = sum(p.numel() for p in net.parameters()) >= WHOLE
        for part in [*blocks, net] if large else [net]:
            fully_shard(part, mp_policy=policy)
    return net


def full(tensor):
    """The whole of a tensor that may be sharded; every process must call."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def wants_bf16(precision, device):
    """"auto" is bfloat16 on GPUs that have it and float32 elsewhere; weights, optimiser, t and losses stay in float32 either way."""
    if precision not in ("auto", "fp32", "bf16"):
        raise InputError(f'precision must be "auto", "fp32" or "bf16", got {precision!r}')
    return precision == "bf16" or (precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())


class Draws:
    """The random numbers of one update, a function of the key (seed, phase, step, ...) and of nothing else.

    So a resumed run needs no stored generator states, and the global batch is the same however many processes share it: each draws
    the whole batch and keeps its own rows. torch's default generators (dropout) are seeded too, differently on each process."""

    def __init__(self, batch, device, *key):
        device, self.random = torch.device(device), np.random.default_rng(key)
        self.generator = torch.Generator(device).manual_seed(int(self.random.integers(2**63)))
        (torch.cuda if device.type == "cuda" else torch.default_generator).manual_seed(int(self.random.integers(2**62)) + rank())
        share = batch // world()
        self.batch, self.device, self.rows = batch, device, slice(rank() * share, (rank() + 1) * share)

    def normal(self, shape):
        return torch.randn(self.batch, *shape, device=self.device, generator=self.generator)[self.rows]

    def times(self, mean, std):
        return logit_normal(self.batch, mean, std, self.device, self.generator)[self.rows]

    def seeds(self):
        """One random integer a sample, int64 on the CPU, from which data, labels, prompts, ... are chosen: seed % number."""
        return torch.from_numpy(self.random.integers(2**63, size=self.batch))[self.rows]


def noise_from(seeds, shape, device):
    """Standard normal noise [B, *shape] for int64 seeds [B] >= 0; a row depends on its seed alone, whatever the batch, the processes or the device."""
    rows = [np.random.default_rng(int(seed)).standard_normal(shape, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(rows)).to(device)  # B x [*shape] -> [B, *shape]


def micro_batches(batch, micro_batch):
    """The slices of this process's share of a global batch: batch = micro-batch x accumulation x processes. Raises InputError otherwise."""
    share, rest = divmod(batch, world())
    micro = micro_batch or share
    if rest or share % micro:
        raise InputError(f"the global batch {batch} is not micro-batch x accumulation x processes with micro-batch {micro} and {world()} processes")
    return [slice(i, i + micro) for i in range(0, share, micro)]


# ----------------------------------------------------------------------------------------------------------------------
# A network in training: Adam, moving average, checkpoints
# ----------------------------------------------------------------------------------------------------------------------


class Learner:
    """A module's trainable parameters with Adam and, if ema_decay is given, their exponential moving average with warm-up."""

    def __init__(self, module, lr, betas, eps, clip=None, ema_decay=None):
        self.module, self.lr, self.clip, self.ema_decay = module, lr, clip, ema_decay
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self.parameters or any(p.dtype not in (torch.float32, torch.float64) for p in self.parameters.values()):
            raise InputError("a network in training needs trainable parameters, in float32: bfloat16 weights would not move at these learning rates")
        self.adam = torch.optim.Adam(self.parameters.values(), lr=lr, betas=betas, eps=eps, fused=world() == 1)
        for p in self.parameters.values():
            step = torch.zeros((), dtype=torch.float32, device=p.device if world() == 1 else "cpu")
            self.adam.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()} if ema_decay else {}
        self.updates = 0

    def update(self, scale):
        """One Adam step at learning rate scale * lr, then the average. Returns the gradient norm (before clipping), a scalar on the device."""
        for group in self.adam.param_groups:
            group["lr"] = scale * self.lr
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        if self.clip:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip, norm)
        self.adam.step()
        self.adam.zero_grad()
        self.updates += 1
        if self.ema:
            decay = min(self.ema_decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.parameters.values()], 1 - decay)
        return full(norm)

    @torch.no_grad()
    def swap(self):
        """Exchange the parameters and their average."""
        for name, average in self.ema.items():
            held = self.parameters[name].clone()
            self.parameters[name].copy_(average)
            average.copy_(held)

    def tensors(self):
        """All state, as a flat dict of tensors that a checkpoint is written from and read into."""
        state = {f"ema.{name}": value for name, value in self.ema.items()}
        state |= {f"buffer.{name}": value for name, value in self.module.named_buffers()}
        for name, p in self.parameters.items():
            moments = self.adam.state[p]
            state |= {f"parameter.{name}": p.detach(), f"exp_avg.{name}": moments["exp_avg"], f"exp_avg_sq.{name}": moments["exp_avg_sq"]}
        return state


def write_json(path, content):
    """Write a JSON file whole or not at all."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def save_weights(net, path, metadata=None):
    """Write a network's parameters and buffers as safetensors, whole or not at all; every process must call. metadata: strings for its header."""
    from safetensors.torch import save_file

    state = {name: full(value.detach()).cpu().contiguous() for name, value in net.state_dict().items()}
    if rank() == 0:
        save_file(state, f"{path}.tmp", metadata)
        os.replace(f"{path}.tmp", path)


def checksums(folder):
    """{file: [bytes, crc32]} of the tensor files in a checkpoint, the reading shared between the processes."""
    files = sorted(folder.glob("*.safetensors"))
    mine = {f.name: [f.stat().st_size, zlib.crc32(f.read_bytes())] for f in files[rank() :: world()]}
    parts = [None] * world()
    if world() > 1:
        dist.all_gather_object(parts, mine)
    else:
        parts = [mine]
    return {name: value for part in parts for name, value in part.items()}


def save_checkpoint(folder, phase, step, learners, settings, seconds):
    """Write folder/PHASE-STEP, under a temporary name that is renamed when complete, and remove all but it and the one before.

    Tensors go to safetensors files, one a process (torch.distributed.checkpoint), so any number of processes can resume; step, settings and
    checksums to checkpoint.json. There are no generator states: Draws makes every random number from (seed, step)."""
    import torch.distributed.checkpoint as dcp

    target, temporary = folder / f"{phase}-{step:09d}", folder / f"tmp-{phase}-{step:09d}"
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    if world() > 1:
        dist.barrier()
    state = {f"{name}.{key}": value.contiguous() for name, learner in learners.items() for key, value in learner.tensors().items()}
    try:
        dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True), no_dist=world() == 1)
        files = checksums(temporary)
        if rank() == 0:
            updates = {name: learner.updates for name, learner in learners.items()}
            write_json(temporary / "checkpoint.json", {"step": step, "updates": updates, "seconds": seconds, "settings": settings, "files": files})
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            for old in sorted(folder.glob(f"{phase}-*"))[:-2]:
                shutil.rmtree(old)
    except (OSError, dcp.CheckpointException) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = next((str(failure) for failure, _ in error.failures.values()), "") if isinstance(error, dcp.CheckpointException) else str(error)
        raise InputError(f"cannot write the checkpoint {target} ({reason.splitlines()[0]}); earlier ones are untouched: free some space and run again") from error


def load_checkpoint(folder, phase, learners, settings, resume):
    """Put the newest checkpoint of a phase into the learners. Returns (step, seconds so far), (0, 0.0) if there is none.

    resume: "same" raises InputError if the settings differ from the checkpoint's, and names them; "any" says so and goes on; "no" removes what is
    there. A damaged or foreign checkpoint raises InputError and leaves everything as it was; nothing in one is ever executed."""
    import torch.distributed.checkpoint as dcp

    found = sorted(folder.glob(f"{phase}-*"))
    if resume == "no" and rank() == 0:
        for old in found:
            shutil.rmtree(old)
    if resume == "no" or not found:
        return 0, 0.0
    newest = found[-1]
    refusal = f"{newest} is damaged or not a checkpoint of this run; remove it to go on from {found[-2].name if len(found) > 1 else 'the start'}"
    try:
        saved = json.loads((newest / "checkpoint.json").read_text())
        intact = saved["files"] == checksums(newest)
        step, seconds, updates, before = int(saved["step"]), float(saved["seconds"]), dict(saved["updates"]), dict(saved["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{refusal} ({type(error).__name__})") from error
    if not intact:
        raise InputError(f"{refusal} (a file is missing or changed)")
    now = json.loads(json.dumps(settings))
    changed = [f"{name} {before.get(name)} -> {now.get(name)}" for name in sorted({*now, *before}) if now.get(name) != before.get(name)]
    if changed and resume == "same":
        raise InputError(f"{folder.parent} holds a {phase} run with other settings ({', '.join(changed)}): resume it all the same, overwrite it, or name another folder")
    if changed and rank() == 0:
        print(f"resuming {phase} with changed settings: {', '.join(changed)}")
    targets = {f"{name}.{key}": value for name, learner in learners.items() for key, value in learner.tensors().items()}
    state = {name: value.contiguous() for name, value in targets.items()}  # a copy where the memory format is channels-last
    try:
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(newest)), no_dist=world() == 1)
    except Exception as error:  # the reader raises what it likes; whatever it was, this file cannot be used
        raise InputError(f"{refusal} ({type(error).__name__})") from error
    for name, value in state.items():
        if value is not targets[name]:
            targets[name].copy_(value)
    for name, learner in learners.items():
        learner.updates = updates[name]
        for moments in learner.adam.state.values():
            moments["step"].fill_(learner.updates)
    return step, seconds


class Log:
    """Means over the last log_every steps, to log.jsonl and a progress bar; nothing leaves the device in between.

    For every term it also keeps, on the device, the first step at which it was not finite."""

    BINS = 10

    def __init__(self, out, phase, start, steps, batch, device):
        self.path, self.phase, self.batch = out and out / "log.jsonl", phase, batch
        self.bar = tqdm(total=steps, initial=start, desc=phase, disable=True if rank() else None, mininterval=0.5)
        self.bins = torch.zeros(2, self.BINS, device=device)
        self.names, self.sums, self.first_bad, self.step, self.since = None, None, None, start, time.perf_counter()
        if self.path and rank() == 0 and self.path.exists():  # drop what was logged after the checkpoint that we resume from
            lines = [line for line in self.path.read_text().splitlines() if json.loads(line)["phase"] != phase or json.loads(line)["step"] <= start]
            self.path.write_text("".join(line + "\n" for line in lines))

    def by_time(self, t, loss):
        bins = (t * self.BINS).long().clamp(max=self.BINS - 1)
        self.bins.index_add_(1, bins, torch.stack([loss.detach().float(), torch.ones_like(t)]))

    def add(self, step, **terms):
        """terms: scalars on the device, in the order in which a fault would spread."""
        values = torch.stack([value.detach().float() for value in terms.values()])
        if self.names is None:
            self.names, self.sums = list(terms), torch.zeros_like(values)
            self.first_bad = torch.full_like(values, math.inf)
        self.sums += values
        self.first_bad = torch.where(values.isfinite(), self.first_bad, self.first_bad.clamp(max=step))
        self.bar.update()

    def check(self, last_good):
        """Raises Diverged if any term was not finite at any step so far."""
        first_bad = self.first_bad.clone()
        if world() > 1:
            dist.all_reduce(first_bad, dist.ReduceOp.MIN)
        if first_bad.isfinite().any():
            worst = int(first_bad.argmin())
            where = f"the last good checkpoint is {last_good}" if last_good else "there is no checkpoint yet"
            raise Diverged(f"{self.phase} diverged: {self.names[worst]} is not finite at step {int(first_bad[worst])}; {where}")

    def write(self, step, last_good, **more):
        self.check(last_good)
        sums, bins = self.sums / (step - self.step) / world(), self.bins.clone()
        if world() > 1:
            dist.all_reduce(sums)
            dist.all_reduce(bins)
        seconds = time.perf_counter() - self.since
        record = {"phase": self.phase, "step": step, "kimg": step * self.batch / 1000}
        record |= dict(zip(self.names, sums.tolist(), strict=True)) | more
        record["flow_loss_by_t"] = [total / count if count else None for total, count in zip(*bins.tolist(), strict=True)]
        record["images_per_s"] = (step - self.step) * self.batch / seconds
        self.bar.set_postfix({name: f"{record[name]:.3g}" for name in self.names[:3]}, refresh=False)
        if self.path and rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        self.sums.zero_()
        self.bins.zero_()
        self.step, self.since = step, time.perf_counter()


def check_settings(**settings):
    """Raises InputError for a value of steps, batch, learning rate, ... that cannot be meant."""
    for name, value in settings.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} must be a positive number, got {value}")


def schedule(step, steps, warmup, decay):
    """Learning-rate factor: up over the first warmup steps, constant, down to 0 over the last decay steps."""
    return min(1.0, (step + 1) / max(warmup, 1), (steps - step) / max(decay, 1))


# ----------------------------------------------------------------------------------------------------------------------
# Training: the teacher by ReFlow (3.6), the generator by Algorithm 1
# ----------------------------------------------------------------------------------------------------------------------


def train_flow(net, data, *, steps, batch, micro_batch=None, lr=2e-5, betas=(0.0, 0.999), eps=1e-8, lr_warmup=0, lr_decay=0, clip=None,
               t_flow=(0.0, 2.0), ema_decay=0.999, seed=0, precision="auto", compile=False,
               out=None, resume="same", save_every=1000, log_every=100, notes=None):  # fmt: skip
    """Train net as a flow model of data with the ReFlow loss (3.6). Returns net, holding the moving average of its weights, and the seconds spent.

    data(seeds) -> (x0 [B, ...], cond): the samples and conditions that int64 seeds [B] choose, on the network's device. batch is global: micro_batch x
    accumulation x processes. t ~ logit-normal(*t_flow). out: the folder of log.jsonl and checkpoints/ (None: neither); resume: see load_checkpoint;
    notes: further settings that a resumed run must share. Raises InputError (a ValueError) for bad settings, Diverged for a non-finite term."""
    check_settings(steps=steps, batch=batch, micro_batch=micro_batch, lr=lr, clip=clip, save_every=save_every, log_every=log_every)
    settings = dict(steps=steps, batch=batch, lr=lr, betas=betas, eps=eps, lr_warmup=lr_warmup, lr_decay=lr_decay, clip=clip,
                    t_flow=t_flow, ema_decay=ema_decay, seed=seed, precision=precision, **(notes or {}))  # fmt: skip
    slices = micro_batches(batch, micro_batch)
    device = next(net.parameters()).device
    bf16 = wants_bf16(precision, device)
    learner = Learner(net, lr, betas, eps, clip, ema_decay)
    learners = {"teacher": learner}
    folder = out and Path(out) / "checkpoints"
    start, seconds = load_checkpoint(folder, "teacher", learners, settings, resume) if out else (0, 0.0)
    last_good, began = (folder / f"teacher-{start:09d}" if start else None), time.perf_counter() - seconds
    if compile:
        net.compile()
    log = Log(out and Path(out), "teacher", start, steps, batch, device)
    for step in range(start, steps):
        draws = Draws(batch, device, seed, 0, step)
        t, seeds, total = draws.times(*t_flow), draws.seeds(), 0
        x0, cond = data(seeds)
        noise = draws.normal(x0.shape[1:])
        for rows in slices:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = reflow_loss(net, x0[rows], noise[rows], t[rows], **{name: value[rows] for name, value in cond.items()})
            (loss.mean() / len(slices)).backward()
            total = total + loss.detach().mean() / len(slices)
            log.by_time(t[rows], loss)
        norm = learner.update(schedule(step, steps, lr_warmup, lr_decay))
        log.add(step, flow_loss=total, flow_gradient=norm)
        if (step + 1) % log_every == 0 or step + 1 == steps:
            log.write(step + 1, last_good)
        if out and ((step + 1) % save_every == 0 or step + 1 == steps):
            log.check(last_good)
            save_checkpoint(folder, "teacher", step + 1, learners, settings, time.perf_counter() - began)
            last_good = folder / f"teacher-{step + 1:09d}"
    log.bar.close()
    seconds = time.perf_counter() - began if start < steps else seconds
    learner.swap()
    return net, seconds


def gradient_at_x0(k, teacher, flow, x0, noise, t, bf16, weight, cond):
    """For the log: root mean square over samples of the norm of dL1/dx0 (k = 0) or dL2/dx0 (k = 1), by passes of its own, which torch.compile needs."""
    leaf = x0.detach().requires_grad_()
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=bf16):
        loss = fgm_losses(teacher, flow, leaf, noise, t, weight=weight, **cond)[k]
    return torch.autograd.grad(loss.sum(), leaf)[0].norm() / len(x0) ** 0.5


def distill(teacher, generator, flow, shape, *, steps, batch, micro_batch=None, conditions=None,
            lr=2e-5, flow_lr=None, betas=(0.0, 0.999), eps=1e-8, lr_warmup=0, lr_decay=0, clip=None,
            t_generator=(0.0, 2.0), t_flow=(0.0, 2.0), l1_weight=0.0, weight=None, loss_scale=1.0, flow_updates=1, extra=None,
            ema_decay=0.999, seed=0, precision="auto", compile=False,
            out=None, resume="same", save_every=1000, log_every=100, picture_every=None, picture=None, notes=None):  # fmt: skip
    """Algorithm 1: distil teacher into generator. Returns the generator, holding the moving average of its weights, and the seconds spent.

    generator (a OneStepGenerator) and flow start as copies of the teacher and are changed; shape is that of one sample. conditions(seeds) -> cond draws
    the condition of int64 seeds [B]. t ~ logit-normal(*t_generator) in the FGM loss, (*t_flow) in the flow's. The generator minimises
    loss_scale * (L2 + l1_weight * L1): l1_weight 1 is the exact gradient of (4.1), 0 the paper's practice on images, and 2 - 2 alpha is SiD's alpha
    (arXiv 2404.04057). weight: a function such as sid_weight. flow_updates: of the online flow for one of the generator.
    extra: an nn.Module with flow_loss(flow, x0, seeds, cond) and generator_loss(flow, x0, seeds, cond), [B] each, added to the two losses; its
    parameters train with the flow's settings (the GAN of B.2). picture(step, generator): called with the averaged weights. Others: see train_flow."""
    check_settings(steps=steps, batch=batch, micro_batch=micro_batch, lr=lr, flow_lr=flow_lr, clip=clip, loss_scale=loss_scale,
                   flow_updates=flow_updates, save_every=save_every, log_every=log_every, picture_every=picture_every)  # fmt: skip
    flow_lr = flow_lr or lr
    settings = dict(steps=steps, batch=batch, lr=lr, flow_lr=flow_lr, betas=betas, eps=eps, lr_warmup=lr_warmup, lr_decay=lr_decay, clip=clip,
                    t_generator=t_generator, t_flow=t_flow, l1_weight=l1_weight, weight=weight and weight.__name__, loss_scale=loss_scale,
                    flow_updates=flow_updates, ema_decay=ema_decay, seed=seed, precision=precision,
                    **generator.coefficients(), **(notes or {}))  # fmt: skip
    slices = micro_batches(batch, micro_batch)
    device = next(generator.parameters()).device
    bf16 = wants_bf16(precision, device)
    conditions = conditions or (lambda seeds: {})
    learners = {"generator": Learner(generator, lr, betas, eps, clip, ema_decay), "flow": Learner(flow, flow_lr, betas, eps, clip)}
    if extra is not None:
        learners["extra"] = Learner(extra, flow_lr, betas, eps, clip)
    folder = out and Path(out) / "checkpoints"
    start, seconds = load_checkpoint(folder, "distill", learners, settings, resume) if out else (0, 0.0)
    last_good, began = (folder / f"distill-{start:09d}" if start else None), time.perf_counter() - seconds
    if compile:
        for net in (teacher, generator.net, flow):
            if isinstance(net, nn.Module):
                net.compile()
    log = Log(out and Path(out), "distill", start, steps, batch, device)
    for step in range(start, steps):
        scale = schedule(step, steps, lr_warmup, lr_decay)
        logging = (step + 1) % log_every == 0 or step + 1 == steps

        # The online flow: ReFlow (3.6) on fresh samples of the generator.
        for k in range(flow_updates):
            draws = Draws(batch, device, seed, 1, step, k)
            z, noise, t, seeds, flow_total = draws.normal(shape), draws.normal(shape), draws.times(*t_flow), draws.seeds(), 0
            for rows in slices:
                cond = conditions(seeds[rows])
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16), torch.no_grad():
                    x0 = generator(z[rows], **cond)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    loss = flow_loss = reflow_loss(flow, x0, noise[rows], t[rows], **cond)
                    if extra is not None:
                        loss = loss + extra.flow_loss(flow, x0, seeds[rows], cond)
                (loss.mean() / len(slices)).backward()
                flow_total = flow_total + flow_loss.detach().mean() / len(slices)
                log.by_time(t[rows], flow_loss)
            flow_norm = learners["flow"].update(scale)
            if extra is not None:
                learners["extra"].update(scale)

        # The generator: FGM (4.10) against the teacher and the online flow, which are merely evaluated.
        draws = Draws(batch, device, seed, 2, step)
        z, noise, t, seeds, l1_total, l2_total = draws.normal(shape), draws.normal(shape), draws.times(*t_generator), draws.seeds(), 0, 0
        with frozen(teacher, flow, extra):
            for rows in slices:
                cond = conditions(seeds[rows])
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    x0 = generator(z[rows], **cond)
                    l1, l2 = fgm_losses(teacher, flow, x0, noise[rows], t[rows], weight=weight, **cond)
                    loss = l2 + l1_weight * l1 if l1_weight else l2
                    if extra is not None:
                        loss = loss + extra.generator_loss(flow, x0, seeds[rows], cond)
                (loss_scale * loss.mean() / len(slices)).backward()
                l1_total = l1_total + l1.detach().mean() / len(slices)
                l2_total = l2_total + l2.detach().mean() / len(slices)
            at_x0 = [gradient_at_x0(k, teacher, flow, x0, noise[rows], t[rows], bf16, weight, cond) for k in range(2)] if logging else []
            generator_norm = learners["generator"].update(scale)

        log.add(step, flow_loss=flow_total, flow_gradient=flow_norm, l1=l1_total, l2=l2_total, generator_gradient=generator_norm)
        if logging:
            log.write(step + 1, last_good, l1_gradient_at_x0=at_x0[0].item(), l2_gradient_at_x0=at_x0[1].item())
        if out and ((step + 1) % save_every == 0 or step + 1 == steps):
            log.check(last_good)
            save_checkpoint(folder, "distill", step + 1, learners, settings, time.perf_counter() - began)
            last_good = folder / f"distill-{step + 1:09d}"
        if picture and (step + 1) % (picture_every or steps) == 0:
            learners["generator"].swap()
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                picture(step + 1, generator)
            learners["generator"].swap()
    log.bar.close()
    seconds = time.perf_counter() - began if start < steps else seconds
    learners["generator"].swap()
    return generator, seconds


# ----------------------------------------------------------------------------------------------------------------------
# The exact flow of a Gaussian mixture
# ----------------------------------------------------------------------------------------------------------------------


class GaussianMixture:
    """Data distributed as sum_k weights[k] N(means[k], covs[k]), whose marginal velocity (3.2) is known in closed form.

    weights: [K], normalised here. means: [K, D]; gradients flow through them. covs: [K, D, D], zero (a point mass) allowed. Raises InputError
    for negative weights or weights that sum to zero, other shapes, covariances that are not symmetric positive semi-definite."""

    def __init__(self, weights, means, covs):
        weights, means, covs = (torch.as_tensor(value, dtype=torch.float64) for value in (weights, means, covs))
        if means.dim() != 2 or weights.shape != means.shape[:1] or covs.shape != (*means.shape, means.shape[1]):
            shapes = [list(value.shape) for value in (weights, means, covs)]
            raise InputError(f"weights, means, covs must have shapes [K], [K, D], [K, D, D], got {shapes}")
        if not (weights >= 0).all() or not weights.sum() > 0:
            raise InputError(f"weights must be non-negative with a positive sum, got {weights.tolist()}")
        self.weights, self.means = weights / weights.sum(), means
        values, self.axes = torch.linalg.eigh(covs)  # [K, D], [K, D, D]: covs[k] = axes diag(values) axes^T
        slack = 1e-6 * covs.abs().amax().clamp(min=1e-12)
        if not torch.allclose(covs, covs.mT, rtol=0, atol=slack.item()) or values.min() < -slack:
            raise InputError(f"covariances must be symmetric positive semi-definite, got eigenvalues down to {values.min():g} or asymmetry in {covs.tolist()}")
        self.variances = values.clamp(min=0)

    def sample(self, n, generator=None):
        """n samples, [n, D] float32."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        e = torch.randn(n, self.means.shape[1], dtype=torch.float64, device=self.means.device, generator=generator)
        return (self.means[k] + (self.axes[k] @ (self.variances[k].sqrt() * e)[..., None])[..., 0]).float()  # [n, D, D] @ [n, D, 1] -> [n, D]

    def velocity(self, x, t):
        """E[noise - x0 | x_t = x] (3.2). x: [B, D], t: [B] in (0, 1]. Returns [B, D] in x's dtype; computed in float64.

        In component k, x_t has mean (1 - t) m and variance s = (1 - t)^2 variance + t^2 along each axis, so with d the offset along the axes
        E[noise | x_t, k] = t d / s and E[x0 | x_t, k] = m + (1 - t) variance d / s. Nothing is divided by t. Raises InputError for t outside (0, 1]."""
        if t.shape != x.shape[:1] or not ((t > 0) & (t <= 1)).all():
            raise InputError(f"t must have shape [{len(x)}] and lie in (0, 1], got {list(t.shape)}, from {t.min():g} to {t.max():g}")
        time = t.double().view(-1, 1, 1)  # [B] -> [B, 1, 1]
        offset = x.double()[:, None] - (1 - time) * self.means  # [B, K, D]
        d = torch.einsum("kij,bki->bkj", self.axes, offset)  # [B, K, D], along the axes
        s = (1 - time) ** 2 * self.variances + time**2  # [B, K, D]
        share = torch.softmax(self.weights.log() - 0.5 * (d**2 / s + s.log()).sum(2), dim=1)  # [B, K]: p(k | x_t)
        v = torch.einsum("kij,bkj->bki", self.axes, (time - (1 - time) * self.variances) * d / s) - self.means  # [B, K, D]
        return (share[..., None] * v).sum(1).to(x.dtype)  # [B, K, D] -> [B, D]


# ----------------------------------------------------------------------------------------------------------------------
# The toy: five 2-D data sets, a small network, a distance
# ----------------------------------------------------------------------------------------------------------------------

DATA = ("8gaussians", "checkerboard", "moons", "spiral", "rings")


def toy_data(name, n, seed=0):
    """n samples of a 2-D data set of about unit variance, [n, 2] float32. Raises InputError for a name not in DATA."""
    random = np.random.default_rng([seed, n])
    angle, radius, noise = random.uniform(0, 1, n), random.uniform(0, 1, n), random.normal(size=(n, 2))
    which = random.integers(24, size=n)
    if name == "8gaussians":
        turn, length, spread = which % 8 / 8, 1.5, 0.1
    elif name == "spiral":
        length = (1 + 3 * np.sqrt(angle)) / 2
        turn, length, spread = length, length * 0.9, 0.07
    elif name == "rings":
        turn, length, spread = angle, 0.6 * (1 + which % 3), 0.05
    elif name == "moons":
        x = np.stack([np.cos(math.pi * angle) - 0.5, np.sin(math.pi * angle) - 0.25], 1)
        x[which % 2 == 1] *= -1
        return torch.from_numpy(1.3 * x + 0.07 * noise).float()
    elif name == "checkerboard":
        column = which % 4
        row = 2 * (which // 4 % 2) + column % 2
        return torch.from_numpy(0.9 * np.stack([column + angle - 2, row + radius - 2], 1)).float()
    else:
        raise InputError(f"unknown data set {name!r}; there are {', '.join(DATA)}")
    x = np.stack([length * np.cos(2 * math.pi * turn), length * np.sin(2 * math.pi * turn)], 1)
    return torch.from_numpy(x + spread * noise).float()


class VelocityMLP(nn.Module):
    """A velocity network for vectors: x [B, D], t [B] -> [B, D]; t enters as cos and sin of pi t, 2 pi t, ..., freqs pi t."""

    def __init__(self, dim=2, width=128, depth=4, freqs=8):
        super().__init__()
        self.register_buffer("frequencies", math.pi * torch.arange(1, freqs + 1))
        widths = [dim + 2 * freqs] + [width] * depth
        layers = [layer for i in range(depth) for layer in (nn.Linear(widths[i], widths[i + 1]), nn.SiLU())]
        self.net = nn.Sequential(*layers, nn.Linear(width, dim))

    def forward(self, x, t):
        angle = t[:, None] * self.frequencies.to(t.dtype)  # [B, freqs]
        return self.net(torch.cat([x, angle.cos(), angle.sin()], 1))


def energy_distance(x, y, directions=32):
    """Energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| of 2-D samples x [N, 2], y [M, 2]: 0 only between equal distributions.

    Unbiased (it may come out slightly negative), exact in n log n by sorting: |a| is pi/2 times the mean of |<a, direction>| over all
    directions. It needs no bandwidth, and its noise floor falls as 1/n, where that of the Wasserstein-2 distance falls as 1/sqrt(n)."""
    angle = math.pi * torch.arange(directions, dtype=torch.float64) / directions
    axes = torch.stack([angle.cos(), angle.sin()])  # [2, directions]

    def pairs(p):  # sum over ordered pairs of |a - b|, for each direction: [directions, N] -> [directions]
        ordered, n = p.sort(1).values, p.shape[1]
        return 2 * ((2 * torch.arange(n, dtype=torch.float64) - n + 1) * ordered).sum(1)

    px, py = (axes.T @ x.double().cpu().T), (axes.T @ y.double().cpu().T)  # [directions, N], [directions, M]
    n, m, xx, yy = len(x), len(y), pairs(px), pairs(py)
    xy = (pairs(torch.cat([px, py], 1)) - xx - yy) / 2
    return (math.pi / 2 * (2 * xy / (n * m) - xx / (n * (n - 1)) - yy / (m * (m - 1))).mean()).item()


def frechet_distance(a, b):
    """Frechet distance |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) between Gaussians fitted to features a [N, D] and b [M, D]."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, axes = torch.linalg.eigh(cov_a)
    root = axes * values.clamp(min=0).sqrt() @ axes.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action):
        silent = action.default is None or action.nargs == 0  # no default, or a switch
        return action.help if silent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """One line on stderr and exit status 2 for a bad command line."""

    def __init__(self, **settings):
        super().__init__(formatter_class=Help, **settings)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")

    def parse_with(self, choose):
        """The command line, with the defaults choose(what was given) -> dict, which --help shows too."""
        known, _ = self.parse_known_args([argument for argument in sys.argv[1:] if argument not in ("-h", "--help")])
        self.set_defaults(**choose(known))
        return self.parse_args()


def positive(number):
    """An argparse type: a finite int or float above 0."""

    def parse(text):
        value = number(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
        return value

    parse.__name__ = number.__name__
    return parse


COUNT, AMOUNT = positive(int), positive(float)


def add_run_flags(add):
    """The flags of a run; add: a parser's or group's add_argument. See also run_settings."""
    add("--resume", action="store_true", help="go on with the run in OUT even if settings changed")
    add("--overwrite", action="store_true", help="start again in OUT")
    add("--seed", type=int, default=0, help="of weights and all random draws")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="of the passes; auto is bf16 on a GPU that has it")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--save-every", type=COUNT, metavar="STEPS", help="steps between checkpoints")
    add("--log-every", type=COUNT, metavar="STEPS", help="steps between lines of log.jsonl")


def add_distillation_flags(add):
    """The flags of Algorithm 1, whose defaults differ from driver to driver. See also distillation_settings."""
    add("--batch", type=COUNT, help="global batch: micro-batch x accumulation x processes")
    add("--micro-batch", type=COUNT, help="samples that a process handles at a time (default: its share of the batch)")
    add("--lr", type=AMOUNT, help="of the generator")
    add("--flow-lr", type=AMOUNT, help="of the online flow")
    add("--lr-warmup", type=int, metavar="STEPS", help="over which the learning rates rise")
    add("--lr-decay", type=float, metavar="SHARE", help="last share of each phase over which the learning rates fall to 0 (default: %(default).3g)")
    add("--clip", type=AMOUNT, metavar="NORM", help="clip every gradient to this norm")
    add("--ema", type=float, metavar="DECAY", help="of the generator's moving average")
    add("--no-ema", action="store_const", const=None, dest="ema", help="use the last weights instead")
    add("--t-star", type=float, help="t* of the generator (B.1)")
    add("--c-in", type=float, help="c_in of the generator (B.1)")
    add("--l1-weight", type=float, help="1: exact gradient (4.10); 0: the paper's practice on images; -0.4: SiD's alpha 1.2")
    add("--weight", choices=WEIGHTS, help="per-sample weight of the FGM loss; sid: arXiv 2404.04057, eq 24")
    add("--t-generator", type=float, nargs=2, metavar=("MEAN", "STD"), help="logit-normal of t in the FGM loss")
    add("--t-flow", type=float, nargs=2, metavar=("MEAN", "STD"), help="logit-normal of t in the flow's loss, the teacher's and the GAN's")
    add("--loss-scale", type=AMOUNT, help="of the generator's loss")
    add("--flow-updates", type=COUNT, help="of the online flow for each of the generator")


def run_settings(args, out):
    """What the flags above mean to train_flow and distill alike."""
    resume = "no" if args.overwrite else "any" if args.resume else "same"
    return dict(batch=args.batch, micro_batch=args.micro_batch, lr_warmup=args.lr_warmup, clip=args.clip, t_flow=tuple(args.t_flow), seed=args.seed,
                precision=args.precision, compile=args.compile, out=out, resume=resume, save_every=args.save_every, log_every=args.log_every)  # fmt: skip


def distillation_settings(args, steps, out):
    """What the flags above mean to distill."""
    return run_settings(args, out) | dict(steps=steps, lr=args.lr, flow_lr=args.flow_lr, lr_decay=round(args.lr_decay * steps), ema_decay=args.ema,
                                          t_generator=tuple(args.t_generator), l1_weight=args.l1_weight, weight=WEIGHTS[args.weight],
                                          loss_scale=args.loss_scale, flow_updates=args.flow_updates)  # fmt: skip


def open_folder(path):
    """The folder, made if need be. Raises InputError if it cannot be written."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / ".writable").touch()
        (Path(path) / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to the output folder {path}: {error.strerror}") from error
    return Path(path)


def to_float(pixels):
    """uint8 0..255 -> float32 -1..1."""
    return pixels.float() / 127.5 - 1


def to_uint8(x):
    """float -1..1 -> uint8 0..255, values outside clipped."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def read_image(path):
    """A PIL image in RGB, whatever the file's mode. Raises InputError, naming the file, if it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read the image {path} ({error}); mend or remove it") from error


def save_grid(path, images, columns=10, least=32):
    """uint8 images [N, C, H, W], C 1 or 3, as one PNG; small ones are enlarged by a whole factor to `least` pixels or more."""
    from PIL import Image

    n, c, h, w = images.shape
    rows, zoom = math.ceil(n / columns), math.ceil(least / h)
    canvas = torch.zeros(rows * columns, c, h, w, dtype=torch.uint8)
    canvas[:n] = images
    canvas = canvas.view(rows, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)  # [N, C, H, W] -> [rows H, columns W, C]
    canvas = canvas.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    Image.fromarray(canvas.expand(-1, -1, 3).numpy()).save(path)


def run(main):
    """Call a driver's main() and turn what the user can mend into one line on stderr: exit status 2 for bad input, 1 for divergence."""
    try:
        main()
    except (InputError, Diverged) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    if dist.is_initialized():
        dist.barrier()  # without it a process that leaves at once can abort: gloo's threads still let go of tensors, for which they need Python
        dist.destroy_process_group()


def seconds_to_draw(draw, repeats):
    """Median wall time of draw()."""
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        draw()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
    return sorted(spent)[repeats // 2]


# Swept on the five data sets, for a minute on a laptop.
TOY = dict(teacher_steps=3000, teacher_lr=2e-3, steps=3600, batch=1024, lr=2e-3, flow_lr=4e-3, lr_warmup=100, lr_decay=2 / 3, clip=1.0, ema=0.99, t_star=0.8, c_in=1.0,
           l1_weight=1.0, weight="none", t_generator=(0.0, 2.0), t_flow=(0.0, 2.0), loss_scale=1.0, flow_updates=1, samples=50_000, save_every=1000,
           log_every=100)  # fmt: skip


def arguments():
    parser = Parser(prog="fgm.py", description="Distil a 2-D flow model into a one-step generator (FGM, arXiv 2410.19310).")
    add = parser.add_argument
    add("--data", default="8gaussians", choices=DATA, help="what the teacher learns")
    add("--out", help="output folder (default: runs/DATA)")
    add("--teacher-steps", type=COUNT, help="training steps of the teacher")
    add("--teacher-lr", type=AMOUNT, help="of the teacher")
    add("--steps", type=COUNT, help="distillation steps")
    add("--samples", type=COUNT, help="samples that each distance is measured on")
    add_distillation_flags(parser.add_argument_group("distillation (Algorithm 1)").add_argument)
    add_run_flags(parser.add_argument_group("run").add_argument)
    return parser.parse_with(lambda known: TOY)


def main():
    args = arguments()
    device = setup(args.device)
    torch.manual_seed(args.seed)
    generator = OneStepGenerator(VelocityMLP().to(device), args.t_star, args.c_in)
    micro_batches(args.batch, args.micro_batch)
    out = open_folder(args.out or f"runs/{args.data}")
    notes = {"data": args.data}

    began = time.perf_counter()
    train, test = toy_data(args.data, 200_000, args.seed).to(device), toy_data(args.data, args.samples, args.seed + 1)
    net = generator.net
    teacher, flow = copy.deepcopy(net), copy.deepcopy(net)
    for network in (teacher, flow, net):
        shard(network)
    teacher, teacher_seconds = train_flow(
        teacher, lambda seeds: (train[(seeds % len(train)).to(device)], {}), steps=args.teacher_steps, lr=args.teacher_lr, betas=(0.9, 0.999),
        lr_decay=round(args.lr_decay * args.teacher_steps), notes=notes, **run_settings(args, out))  # fmt: skip
    net.load_state_dict(teacher.state_dict())
    flow.load_state_dict(teacher.state_dict())
    generator, distill_seconds = distill(teacher, generator, flow, (2,), notes=notes, **distillation_settings(args, args.steps, out))
    save_weights(teacher, out / "teacher.safetensors")
    save_weights(generator.net, out / "generator.safetensors")

    scoring = time.perf_counter()
    z = Draws(args.samples * world(), device, args.seed, 9).normal((2,))
    with torch.no_grad():
        samples = {f"teacher, {k} step{'s' * (k > 1)}": sample_ode(teacher, z, k) for k in (1, 2, 5, 10, 50)} | {"one-step generator": generator(z)}
        scores = {name: energy_distance(x, test) for name, x in samples.items()}
        floors = [energy_distance(toy_data(args.data, args.samples, args.seed + 2 + i), test) for i in range(5)]
        floor = (sum(f**2 for f in floors) / len(floors)) ** 0.5
        slow = seconds_to_draw(lambda: sample_ode(teacher, z[:10_000], 50), 3)
        fast = seconds_to_draw(lambda: generator(z[:10_000]), 21)
    teacher_scores = {str(k): scores[f"teacher, {k} step{'s' * (k > 1)}"] for k in (1, 2, 5, 10, 50)}
    seconds = {"teacher": teacher_seconds, "distillation": distill_seconds, "scores": time.perf_counter() - scoring, "all": time.perf_counter() - began}
    if rank() == 0:
        write_json(out / "metrics.json", {"metric": "energy distance", "samples": args.samples, "teacher": teacher_scores, "one_step": scores["one-step generator"],
                                          "noise_floor": floor, "seconds": seconds, "draw_10000_s": {"50": slow, "one_step": fast}})  # fmt: skip
        write_json(out / "config.json", {"settings": vars(args) | {"out": str(out)}, "network": {"dim": 2, "width": 128, "depth": 4, "freqs": 8},
                                         "generator": generator.coefficients(), "torch": torch.__version__, "processes": world()})  # fmt: skip
        draw_pictures(out / "samples.png", {"data": test, "teacher, 1 step": samples["teacher, 1 step"], "teacher, 50 steps": samples["teacher, 50 steps"],
                                            "one-step generator": samples["one-step generator"]})  # fmt: skip
        print(f"{args.data}: energy distance to the data x 1000, {args.samples:,} samples")
        print(f"  {'data against data (floor, rms of 5)':36} {1000 * floor:9.3f}")
        for name, score in scores.items():
            print(f"  {name:36} {1000 * score:9.3f}")
        print("  " + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))
        print(f"  10,000 samples: {slow:.3f} s with 50 steps, {fast:.4f} s with one, {slow / fast:.0f} times faster; see {out}/samples.png")


def draw_pictures(path, panels):
    """A row of scatter plots. panels: {title: samples [N, 2]}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(3 * len(panels), 3.2), layout="constrained")
    for axis, (title, x) in zip(axes, panels.items(), strict=True):
        axis.scatter(*x[:10_000].cpu().T, s=0.5, alpha=0.4, linewidths=0)
        axis.set(title=title, xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), xticks=[], yticks=[], aspect="equal")
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
