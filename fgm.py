"""Flow Generator Matching (FGM, arXiv 2410.19310): distil a flow-matching model into a one-step generator.

A flow model carries noise to data along x_t = (1 - t) x0 + t noise by a velocity field u, in about 50 network
evaluations. FGM trains a generator x0 = g(z) that needs one. It is ONE functional with two players. On the
generator's samples let c = noise - x0, the paper's u_t(x_t | x0) of (3.5), and R_f = || f(x_t, t) - c ||^2,
the ReFlow loss (3.6) of a field f:

    minimise over g, maximise over v,    E[ R_u - R_v ],        u: the teacher's field, v: an online flow's.

The best v is the mean of c given x_t: the field v_t that the generator induces. There, by Pythagoras, the
functional is E || u - v_t ||^2, the paper's objective (4.1), (4.2); any other v gives less. So its gradient
in g at v = v_t is that of (4.1), an envelope theorem: (4.3) by (4.6) and Theorem 4.2. The paper's losses:

    L1 = || u - v ||^2  (4.11)     L2 = 2 <u - v, v - c>  (4.12)     FGM = L1 + L2  (4.10) = R_u - R_v

A step needs nothing but the ReFlow loss; one backward pass of the flow serves both players:

    x0 = g(z);  leaf = x0.detach().requires_grad_()
    reflow_loss(flow, leaf, noise, t).mean().backward()                   # the flow's gradients, and at leaf
    of_teacher = autograd.grad(reflow_loss(teacher, leaf, noise, t).mean(), leaf)[0]
    x0.backward(of_teacher - leaf.grad)                                   # the generator's gradients

The map, from the paper to this file:

    path x_t, section 3         interpolate         one-step generator, eq. (B.1)   OneStepGenerator
    ReFlow loss (3.6)           reflow_loss         sampling the teacher            sample_ode, Guided
    FGM losses (4.11), (4.12)   fgm_losses          t of appendices B.1 and B.2     logit_normal
    Algorithm 1                 distill             the teacher's training          train_flow
    is u a teacher? by (4.7)    defect              (4.7) and Theorem 4.2 (4.8)     tests/method

What the identity does not cover. L2 + l1_weight L1 = R_u - R_v + (l1_weight - 1) || u - v ||^2: at another
l1_weight (the paper's 0 on images) the flow still maximises R_u - R_v, but the generator minimises something
else, and the players share no functional. A weight of t alone, or another t for one player, leaves the best v
where it is: the gradient there is that of (4.1), so weighted. With a weight that depends on u or c it is not,
even at the best v; it still vanishes where v = u. A GAN adds a second game. Descent of one player against
ascent of the other may circle a saddle point and not reach it. (The min-max is not in the paper; RealUID,
arXiv 2509.22459, has it.) Algorithm 1 as printed alternates, with t uniform. Here both players move at once,
from the same samples; as in the paper's experiments by Adam, t logit-normal (stratified or quasi-random).

Conventions. t: [B], in [0, 1], float32 (float64 beside float64 data); t = 0 is data, t = 1 is noise. A
velocity is noise - x0, an Euler step from t to s is x + (s - t) v. A velocity network is any callable
net(x, t, **cond) -> v with v.shape == x.shape, differentiable in x (no torch.no_grad inside), which treats
samples independently and does not change x in place; one that is trained must be an nn.Module. Data have a
standard deviation of about 1. Losses are sums over the dimensions of a sample, one value per sample. This
file needs torch and numpy alone.
"""

import functools
import math
import time
import warnings
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn


class InputError(ValueError):
    """Something that the user gave is wrong; the message says what, and what to do."""


class Diverged(RuntimeError):
    """A loss or a gradient is no longer finite; the message names the term and the step."""


# ---- The path and the losses -------------------------------------------------------------------------------


def per_sample(t, x):
    """t [B], shaped to broadcast over x [B, ...]."""
    return t.view(-1, *[1] * (x.dim() - 1))  # [B] -> [B, 1, ..., 1]


def dot(a, b):
    """Inner product per sample: a, b [B, ...] -> [B]."""
    return (a * b).flatten(1).sum(1)  # [B, ...] -> [B, D] -> [B]


def interpolate(x0, noise, t):
    """The ReFlow path x_t = (1 - t) x0 + t noise (under the expectation in 3.6).

    x0, noise: [B, ...]. t: [B] in [0, 1], 0 is data. Returns x_t [B, ...]. Raises InputError (a ValueError)
    for other shapes, and on a CPU for t outside [0, 1] (on a GPU the check would stall its queue)."""
    if x0.shape != noise.shape:
        raise InputError(f"x0 and noise differ in shape: {list(x0.shape)} and {list(noise.shape)}")
    if t.shape != x0.shape[:1]:
        raise InputError(f"t must have shape [{len(x0)}], one value per sample, got {list(t.shape)}")
    if t.device.type == "cpu" and not ((t >= 0) & (t <= 1)).all():
        raise InputError(f"t must lie in [0, 1], got values from {t.min():g} to {t.max():g}")

    t = per_sample(t, x0)
    return (1 - t) * x0 + t * noise


def velocity(net, xt, t, **cond):
    """net(xt, t, **cond), float32 or better. xt: [B, ...], t: [B].

    A network whose weights are bfloat16 or float16 computes in these. Raises InputError if v is no tensor or
    has another shape than xt, and if xt needs a gradient that v does not have."""
    with precision_of(net, xt):
        v = net(xt, t, **cond)

    if not torch.is_tensor(v):
        raise InputError(f"a velocity network must return a tensor, got a {type(v).__name__}: wrap it in a "
                         "module that returns the tensor inside, v[0] or v.sample")
    if v.shape != xt.shape:
        raise InputError(f"a velocity must have its input's shape {list(xt.shape)}, got {list(v.shape)}")
    if torch.is_grad_enabled() and xt.requires_grad and not v.requires_grad:
        raise InputError("a velocity network must be differentiable in x: no torch.no_grad or detach inside")
    return v.to(torch.promote_types(v.dtype, torch.float32))


def reflow_error(net, x0, noise, t, **cond):
    """f - c, the error of a field on samples: net(x_t, t) - (noise - x0), [B, ...]; see reflow_loss."""
    return velocity(net, interpolate(x0, noise, t), t, **cond) - (noise - x0)


def reflow_loss(net, x0, noise, t, **cond):
    """R_f, the ReFlow loss || net(x_t, t) - (noise - x0) ||^2 (3.6). x0, noise: [B, ...], t: [B]. -> [B]."""
    error = reflow_error(net, x0, noise, t, **cond)
    return dot(error, error)


def fgm_losses(teacher, flow, x0, noise, t, *, weight=None, **cond):
    """The FGM losses L1 (4.11) and L2 (4.12); l1 + l2 is R_u - R_v (4.10).

    x0 = g(z) [B, ...] carries the generator's graph; noise [B, ...] and t [B] are drawn independently of z
    (Theorem 4.1 conditions on x0 alone). Gradients reach x0 through c = noise - x0 and through x_t, the input
    of both networks; none reaches the parameters of a teacher or flow that is an nn.Module. With activation
    checkpointing, call backward inside frozen(teacher, flow) as well. weight(t, u, c) -> [B] scales both, as
    a constant. Returns (l1 [B], l2 [B])."""
    with frozen(teacher, flow):
        u_error = reflow_error(teacher, x0, noise, t, **cond)  # u - c
        v_error = reflow_error(flow, x0, noise, t, **cond)  # v - c

    l1, l2 = l1_and_l2(u_error, v_error)
    factor = weights_of(weight, t, u_error, noise - x0)
    return factor * l1, factor * l2


def l1_and_l2(u_error, v_error):
    """L1 = || u - v ||^2 (4.11), L2 = 2 <u - v, v - c> (4.12), [B] each, of u - c and v - c, [B, ...]."""
    gap = u_error - v_error
    return dot(gap, gap), 2 * dot(gap, v_error)


def weights_of(weight, t, u_error, c):
    """weight(t, u, c) as a constant [B]; 1 without a weight. Raises InputError for another shape."""
    value = 1.0 if weight is None else weight(t, (u_error + c).detach(), c.detach())
    value = torch.as_tensor(value, dtype=u_error.dtype, device=u_error.device).detach()
    if value.dim() and value.shape != t.shape:
        raise InputError(f"weight must return [{len(t)}], one value per sample, got {list(value.shape)}")
    return value.expand(len(t))  # [] or [B] -> [B]


def sid_weight(t, u, c):
    """SiD's weight per sample (arXiv 2404.04057, eq. 24) in our terms, t^2 / mean |t (u - c)|.

    u, c: [B, ...], t: [B]. Returns [B]."""
    error = (per_sample(t, u) * (u - c)).abs().flatten(1).mean(1)  # [B, ...] -> [B, D] -> [B]
    return t**2 / error.clamp(min=1e-5)


def noise_weight(t, u, c):
    """exp(4 t) / 10, a heuristic for points. The mass of each mode is decided at high noise, where modes
    overlap; at low noise the flow is poorest where mass would have to pass, between the modes. t, returned:
    [B]."""
    return torch.exp(4 * t) / 10


@contextmanager
def frozen(*nets):
    """Passes made inside, forward and back, give gradients of the networks' inputs only."""
    modules = [net for net in nets if isinstance(net, nn.Module)]
    parameters = [p for net in modules for p in net.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def logit_normal(n, mean, std, device=None, generator=None):
    """t = sigmoid(mean + std * normal), float32 [n] in [0, 1]; a larger mean is noisier (B.1, B.2).

    Stratified over n intervals of equal probability, in rising order: pair with samples in random order."""
    uniform = (torch.arange(n, device=device) + torch.rand(n, device=device, generator=generator)) / n
    return torch.sigmoid(mean + std * normal_quantile(uniform))


def normal_quantile(uniform):
    """The standard normal's quantile function, finite at 0 and 1."""
    return torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))


# ---- Is this a teacher? ------------------------------------------------------------------------------------


@torch.no_grad()
def defect(net, x0, t, **cond):
    """E<u - c, u> / E|u|^2 on samples x0: 0 if u = net is the mean of c given x_t, as FGM takes it to be.

    This is the Flow Product Identity (4.7) with f = u; 1 means unrelated to c, 2 the opposite sign. It needs
    nothing but the teacher: x0 [B, ...] are its own samples, or the data that it was trained on; the path's
    noise is fresh, c = noise - x0. t: a number, or [B]. Far from 0 means that net is no teacher: noise was
    paired with data (OT-CFM, rectified flow), v has the wrong sign, t runs the other way, or the field is
    guided. Near 0 at one t proves nothing (each fault hides at one): take 0.2, 0.5, 0.8 and 0.95.
    Returns (defect, its standard error)."""
    t = t if torch.is_tensor(t) else constant_t(t, x0)
    noise = torch.randn_like(x0)
    u = velocity(net, interpolate(x0, noise, t), t, **cond)

    product, square = dot(u - (noise - x0), u), dot(u, u)  # [B] each
    ratio = product.mean() / square.mean()
    standard_error = (product - ratio * square).std() / len(x0) ** 0.5 / square.mean()  # of a ratio of means
    return ratio.item(), standard_error.item()


# ---- The one-step generator, the ODE sampler, guidance -----------------------------------------------------


def constant_t(value, x):
    """The same t for every sample of x: [B], float32, or float64 beside float64 data."""
    return torch.full((len(x),), value, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))


class OneStepGenerator(nn.Module):
    """x0 = c_skip z - c_out net(c_in z, t_star), eq. (B.1): a velocity network as one-step generator.

    c_out None means t_star. With c_in = c_skip and c_out = t_star it is the teacher's E[x0 | x_t] at t_star.
    Eq. (5.1) prints (1 - t*) z + t* v(t* z, t*), which steps away from the data where velocity is
    noise - data, as in (3.6), (B.1) and (C.1), and at t* = 1 is v alone. Raises InputError for t_star outside
    (0, 1]."""

    def __init__(self, net, t_star, c_in=1.0, c_skip=1.0, c_out=None):
        super().__init__()
        if not 0 < t_star <= 1:
            raise InputError(f"t_star must be in (0, 1], got {t_star!r}")

        self.net = net
        self.t_star, self.c_in, self.c_skip = t_star, c_in, c_skip
        self.c_out = t_star if c_out is None else c_out

    def forward(self, z, **cond):
        """z: [B, ...] standard normal. Returns x0 [B, ...]."""
        v = velocity(self.net, self.c_in * z, constant_t(self.t_star, z), **cond)
        return self.c_skip * z - self.c_out * v

    def coefficients(self):
        """What a sampler needs beside the weights."""
        return {"t_star": self.t_star, "c_in": self.c_in, "c_skip": self.c_skip, "c_out": self.c_out}


@torch.no_grad()
def sample_ode(net, noise, steps, solver="euler", **cond):
    """Integrate dx/dt = net(x, t) from noise at t = 1 to data at t = 0 in equal steps.

    noise: [B, ...]. Returns x0 [B, ...]. solver: "euler" (first order, one evaluation per step) or "heun"
    (second order, two; its last step is Euler's, as in EDM's Algorithm 1, so that t = 0 is never evaluated).
    Raises InputError for other solvers or steps < 1."""
    if steps < 1 or solver not in ("euler", "heun"):
        raise InputError(f'steps must be 1 or more and solver "euler" or "heun", got {steps} and {solver!r}')

    x = noise
    for i in range(steps):
        t, s = 1 - i / steps, 1 - (i + 1) / steps
        v = velocity(net, x, constant_t(t, x), **cond)
        if solver == "heun" and i + 1 < steps:
            v = (v + velocity(net, x + (s - t) * v, constant_t(s, x), **cond)) / 2
        x = x + (s - t) * v
    return x


class Guided(nn.Module):
    """Classifier-free guidance as a velocity network, v_null + scale (v_cond - v_null), in one batched call.

    null: the tensors that replace those of cond in the second half of the batch, [B, ...], or [1, ...] for
    all samples alike; the rest is the same in both. Raises InputError if cond lacks one of them."""

    def __init__(self, net, scale, null):
        super().__init__()
        self.net, self.scale, self.null = net, scale, null

    def forward(self, x, t, **cond):
        missing = [name for name in self.null if not torch.is_tensor(cond.get(name))]
        if missing:
            raise InputError(f"guidance replaces the tensors {sorted(self.null)}, the call lacks {missing}")
        if self.scale == 1:
            return self.net(x, t, **cond)

        both = dict(cond)
        for name, value in cond.items():
            if torch.is_tensor(value):
                other = torch.as_tensor(self.null.get(name, value)).to(value)
                both[name] = torch.cat([value, other.expand_as(value)])  # [B, ...] -> [2B, ...]

        v = velocity(self.net, torch.cat([x, x]), torch.cat([t, t]), **both)  # [2B, ...]
        v_cond, v_null = v.chunk(2)  # [2B, ...] -> 2 x [B, ...]
        return v_null + self.scale * (v_cond - v_null)

    def compile(self, **settings):
        self.net.compile(**settings)


# ---- Errors from inside a network, in plain words ----------------------------------------------------------

CUT_OFF = ("a network's gradients are cut off: it must have no torch.no_grad or detach inside, and "
           "activation checkpointing must be off, or that of torch.utils.checkpoint with use_reentrant=False")
DTYPES = "samples, conditions and weights must be float32, on one device"
ADVICE = {  # by what torch says from deep inside a pass
    "use_reentrant=True": CUT_OFF, "None of the inputs have requires_grad": CUT_OFF,
    "does not require grad": CUT_OFF, "same dtype": DTYPES, "should be the same": DTYPES,
}


@contextmanager
def advised():
    """Around a training loop: what ADVICE knows, and torch's warning of lost gradients, are InputErrors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "None of the inputs have requires_grad=True")
        try:
            yield
        except (RuntimeError, UserWarning) as error:
            for words, advice in ADVICE.items():
                if words in str(error):
                    raise InputError(f"{advice} ({error})") from error
            raise


# ---- Algorithm 1 -------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """What the networks take in one pass, beside the generator's samples: B rows of an update's draws."""

    noise: torch.Tensor  # [B, ...], of the path, independent of the generator's z
    t: torch.Tensor  # [B], of the generator's loss
    flow_t: torch.Tensor  # [B], of the flow's loss
    one_t: bool  # whether these two are the same
    seeds: torch.Tensor  # [B], int64, which chose cond
    cond: dict  # what the networks take beside x and t
    autocast: object  # the context of the networks' passes


@advised()
def distill(teacher, generator, flow, shape, *, steps, batch, micro_batch=None, conditions=None, lr=2e-5,
            flow_lr=None, betas=(0.0, 0.999), eps=1e-8, lr_warmup=0, lr_decay=0.0, clip=None,
            t_generator=(0.0, 2.0), t_flow=(0.0, 2.0), l1_weight=1.0, weight=None, loss_scale=1.0,
            flow_updates=1, extra=None, ema_decay=0.999, seed=0, precision="auto", run=None):
    """Algorithm 1: distil teacher into generator, with the online flow `flow`.

    generator (a OneStepGenerator) and flow start as copies of the teacher and are changed; all three are put
    into evaluation mode. The teacher must be the same in every process. shape: that of one sample.
    conditions(seeds) -> cond: the conditions that int64 seeds [B] choose. The generator minimises
    loss_scale * (L2 + l1_weight * L1): l1_weight 1 is R_u - R_v, the exact gradient of (4.1) at the best v, 0
    the paper's practice on images, 2 - 2 alpha SiD's alpha (arXiv 2404.04057).
    weight(t, u, c) -> [B] scales L1 and L2 as a constant; if of t alone, the gradient at the best v is
    exactly that of (4.1), so weighted.
    t ~ logit-normal(*t_generator) in the generator's loss, (*t_flow) in the flow's. flow_lr None: lr.
    flow_updates: the flow's updates in a step, each from new samples; the generator moves with the last one,
    from the same samples. extra: an nn.Module that adds a loss to each player and trains with the flow (the
    GAN of appendix B.2). Its flow_loss(flow, x0, seeds, cond) -> [B] is called right after the flow's own
    pass; its generator_loss, of the same arguments, is multiplied by loss_scale but not by weight.
    A step costs 8 units (a forward pass 1, backward to an input 1, to weights, too, 2), 9 with another
    l1_weight, 10 where the players' t differ or with extra (besides its own).
    The log's terms: flow_loss is R_v; bound is R_u - R_v, whose mean is at most (4.1), and equal to it where
    the flow has caught up; l1 is L1. Returns (generator, seconds): its weights are the moving average.
    train_flow says the rest."""
    if not isinstance(generator, OneStepGenerator):
        raise InputError("generator must be a OneStepGenerator(net, t_star), not a "
                         f"{type(generator).__name__}")
    check_networks(generator=generator.net, flow=flow)
    check_apart(teacher=teacher, generator=generator, flow=flow, extra=extra)

    flow_lr = lr if flow_lr is None else flow_lr
    settings = dict(
        steps=steps, batch=batch, lr=lr, flow_lr=flow_lr, betas=betas, eps=eps, lr_warmup=lr_warmup,
        lr_decay=lr_decay, clip=clip, t_generator=t_generator, t_flow=t_flow, l1_weight=l1_weight,
        weight=weight, loss_scale=loss_scale, flow_updates=flow_updates, ema_decay=ema_decay, seed=seed,
        precision=precision, shape=list(shape), **generator.coefficients())
    passes, micro = micro_batches(batch, micro_batch)
    device = next(generator.parameters()).device
    autocast, run = bf16_passes(precision, device), run or Run()
    conditions = (lambda seeds: {}) if conditions is None else conditions
    for net in (teacher, generator, flow):
        if isinstance(net, nn.Module):
            net.eval()  # no dropout in Algorithm 1

    followers = {"flow": flow} if extra is None else {"flow": flow, "extra": extra}
    learners = {name: Learner(net, flow_lr, betas, eps, clip) for name, net in followers.items()}
    learners["generator"] = Learner(generator, lr, betas, eps, clip, ema_decay)

    one_t = tuple(t_flow) == tuple(t_generator) and extra is None
    one_backward = one_t and l1_weight == 1  # of the flow, which serves both players

    for step in run.steps("distill", steps, learners, settings):
        lr_factor, terms = schedule(step, steps, lr_warmup, lr_decay), defaultdict(list)

        for update in range(flow_updates):  # each moves the flow, the last one the generator, too
            last = update == flow_updates - 1
            draws = Draws(batch, device, seed, DISTILLATION, step, update)
            z, noise, t, seeds = draws.for_update(shape, *(t_generator if last else t_flow))
            flow_t = draws.sample_t(*t_flow) if last and not one_t else t

            for i in range(0, len(t), micro):
                rows = slice(i, i + micro)
                cond = chosen_by(seeds[rows], "conditions", conditions)
                inputs = Inputs(noise[rows], t[rows], flow_t[rows], one_t, seeds[rows], cond, autocast)
                with autocast, torch.set_grad_enabled(last):
                    x0 = generator(z[rows], **cond)
                if step == update == i == 0:
                    check_scale("what the generator makes", x0, least=0.2**2 * (1 - generator.t_star))
                    if not last:  # tried now, so that a teacher's fault is found before the flow has moved
                        shared_backward(teacher, flow, x0, inputs, weight)
                        flow.zero_grad(set_to_none=False)

                if not last:
                    _, losses = flow_gradients(flow, x0, inputs, extra)
                elif one_backward:
                    gradient, losses = shared_backward(teacher, flow, x0, inputs, weight)
                else:
                    gradient, losses = separate_gradients(
                        teacher, flow, x0, inputs, l1_weight, weight, extra)

                if last:
                    x0.backward(loss_scale * gradient)
                    run.log_by_t(inputs.t, bound=losses["bound"])
                run.log_by_t(inputs.flow_t, flow_loss=losses["flow_loss"])
                for name, loss in losses.items():
                    terms[name].append(loss)

            moving = learners if last else followers
            norms = {f"{name}_gradient": learners[name].update(lr_factor, passes) for name in moving}

        run.log(**{name: torch.cat(losses) for name, losses in terms.items()}, **norms)

    for learner in learners.values():
        learner.finish()
    return generator, run.seconds


def shared_backward(teacher, flow, x0, inputs, weight):
    """Lines 2 and 3 of the four: R_v backward into the flow's parameters and to x0 [B, ...], R_u to x0.

    The graphs of flow and teacher never live together. Returns the gradient at x0 of the mean of
    weight (R_u - R_v), and the losses, unweighted, [B] each."""
    leaf = x0.detach().requires_grad_()
    with inputs.autocast:
        v_error = reflow_error(flow, leaf, inputs.noise, inputs.t, **inputs.cond)  # v - c
    r_v = dot(v_error, v_error)
    r_v.mean().backward()  # the flow's gradients, and leaf's

    with frozen(teacher):
        with inputs.autocast:
            u_error = reflow_error(teacher, leaf, inputs.noise, inputs.t, **inputs.cond)  # u - c
        r_u = dot(u_error, u_error)
        (of_teacher,) = torch.autograd.grad(r_u.mean(), leaf)

    factor = weights_of(weight, inputs.t, u_error, inputs.noise - leaf)
    l1, _ = l1_and_l2(u_error, v_error)
    gradient = per_sample(factor, leaf) * (of_teacher - leaf.grad)
    return gradient, detached(flow_loss=r_v, bound=r_u - r_v, l1=l1)


def flow_gradients(flow, x0, inputs, extra, keep_graph=False):
    """The mean of R_v (3.6), and of extra's loss, backward into the parameters of flow and extra.

    x0: [B, ...], without the generator's graph. Returns v - c [B, ...], and the losses, [B] each."""
    with inputs.autocast:
        v_error = reflow_error(flow, x0, inputs.noise, inputs.flow_t, **inputs.cond)  # v - c
        losses = {"flow_loss": dot(v_error, v_error)}
        if extra is not None:
            losses["extra_flow_loss"] = extra.flow_loss(flow, x0, inputs.seeds, inputs.cond)

    sum(losses.values()).mean().backward(retain_graph=keep_graph)
    return v_error, detached(**losses)


def separate_gradients(teacher, flow, x0, inputs, l1_weight, weight, extra):
    """The gradients of both losses of Algorithm 1 as printed; neither player has moved yet.

    Where both have one t, v is evaluated once. Returns the gradient at x0 [B, ...] of the mean of
    weight (L2 + l1_weight L1), plus that of extra's loss, and the losses, unweighted, [B] each."""
    leaf = x0.detach().requires_grad_()
    v_error, losses = flow_gradients(flow, leaf, inputs, extra, keep_graph=inputs.one_t)

    # The generator's losses (4.11), (4.12). With one t the flow's graph has trainable weights, and activation
    # checkpointing must find them so again.
    with frozen(teacher, None if inputs.one_t else flow):
        with inputs.autocast:
            u_error = reflow_error(teacher, leaf, inputs.noise, inputs.t, **inputs.cond)  # u - c
            if not inputs.one_t:
                v_error = reflow_error(flow, leaf, inputs.noise, inputs.t, **inputs.cond)  # v - c
        l1, l2 = l1_and_l2(u_error, v_error)
        factor = weights_of(weight, inputs.t, u_error, inputs.noise - leaf)
        (gradient,) = torch.autograd.grad((factor * (l2 + l1_weight * l1)).mean(), leaf)
    losses |= detached(bound=l1 + l2, l1=l1)

    if extra is not None:
        with frozen(flow, extra):
            with inputs.autocast:
                extra_loss = extra.generator_loss(flow, leaf, inputs.seeds, inputs.cond)
            if extra_loss.requires_grad:  # not where extra teaches the flow alone
                gradient = gradient + torch.autograd.grad(extra_loss.mean(), leaf)[0]
        losses |= detached(extra=extra_loss)
    return gradient, losses


def detached(**losses):
    return {name: loss.detach() for name, loss in losses.items()}


# ---- The teacher, by ReFlow (3.6) --------------------------------------------------------------------------


@advised()
def train_flow(net, data, *, steps, batch, micro_batch=None, lr=2e-5, betas=(0.9, 0.999), eps=1e-8,
               lr_warmup=0, lr_decay=0.0, clip=None, t_flow=(0.0, 2.0), ema_decay=0.999, seed=0,
               precision="auto", run=None):
    """Train net as a flow model of data with the ReFlow loss (3.6).

    data(seeds) -> (x0 [B, ...], cond), on the network's device: the samples and conditions that int64 seeds
    [B], on the CPU, choose. batch is global, micro_batch what a process takes at a time (None: its share).
    The learning rate rises over lr_warmup steps and falls to 0 over the last share lr_decay of all; clip
    bounds the norm of a gradient. t ~ logit-normal(*t_flow). run: what surrounds the loop. Every step seeds
    torch's default generators. ema_decay None: no average. net stays in training or evaluation mode, as it
    is. Returns (net, seconds): its weights are the moving average. Raises InputError (a ValueError) for what
    users get wrong, Diverged for a non-finite loss or gradient."""
    check_networks(net=net)
    settings = dict(
        steps=steps, batch=batch, lr=lr, betas=betas, eps=eps, lr_warmup=lr_warmup, lr_decay=lr_decay,
        clip=clip, t_flow=t_flow, ema_decay=ema_decay, seed=seed, precision=precision)
    passes, micro = micro_batches(batch, micro_batch)
    device = next(net.parameters()).device
    autocast, run = bf16_passes(precision, device), run or Run()
    learner = Learner(net, lr, betas, eps, clip, ema_decay)

    for step in run.steps("teacher", steps, {"teacher": learner}, settings):
        draws = Draws(batch, device, seed, TEACHER, step)
        t, seeds = draws.sample_t(*t_flow), draws.seeds()
        noise, losses = None, []  # noise, once the shape is known: of all micro-batches at once

        for i in range(0, len(t), micro):
            x0, cond = chosen_by(seeds[i : i + micro], "data", data)
            noise = draws.normal(x0.shape[1:]) if noise is None else noise
            if step == i == 0:
                check_scale("the data", x0)
            with autocast:
                loss = reflow_loss(net, x0, noise[i : i + micro], t[i : i + micro], **cond)
            loss.mean().backward()
            losses.append(loss.detach())

        gradient = learner.update(schedule(step, steps, lr_warmup, lr_decay), passes)
        run.log_by_t(t, flow_loss=torch.cat(losses))
        run.log(flow_loss=torch.cat(losses), flow_gradient=gradient)

    learner.finish()
    return net, run.seconds


# ---- A network in training, and the run around a loop ------------------------------------------------------


def schedule(step, steps, warmup, decay):
    """Learning-rate factor: up over the first warmup steps, constant, down to 0 over the last share decay."""
    return min(1.0, (step + 1) / max(warmup, 1), (steps - step) / max(round(decay * steps), 1))


class Learner:
    """A module's trainable parameters with Adam and, given an ema_decay, their moving average (EMA).

    All processes start from the first one's weights (FSDP2's shards agree already) and average their
    gradients."""

    def __init__(self, module, lr, betas, eps, clip=None, ema_decay=None):
        self.module, self.lr, self.clip, self.ema_decay = module, lr, clip, ema_decay
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.updates = 0
        dtypes = {p.dtype for p in self.parameters.values()}
        if dtypes not in ({torch.float32}, {torch.float64}):
            raise InputError(f"a {type(module).__name__} in training needs trainable parameters, all in "
                             f"float32 (others are too coarse for small steps), and has {dtypes or 'none'}")
        if world_size() > 1:
            for value in replicated([*module.parameters(), *module.buffers()]):
                dist.broadcast(value.detach(), 0)

        self.adam = torch.optim.Adam(self.parameters.values(), lr=lr, betas=betas, eps=eps, fused=True)
        for p in self.parameters.values():
            p.grad = torch.zeros_like(p)
            # Without momentum the first moment is the gradient itself, and needs no memory of its own.
            first = torch.zeros_like(p) if betas[0] else p.grad
            zero = torch.zeros((), device=p.device)
            self.adam.state[p] = {"step": zero, "exp_avg": first, "exp_avg_sq": torch.zeros_like(p)}
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()} if ema_decay else {}

    def update(self, lr_factor, passes):
        """One Adam step at lr_factor * lr by the mean gradient, then the moving average. passes: how many
        backward passes of each process the gradients add up. Returns the gradient's norm before clipping."""
        gradients = [p.grad for p in self.parameters.values()]
        if passes > 1:
            torch._foreach_div_(gradients, passes)
        replicas = replicated(gradients)
        if world_size() > 1 and replicas:  # one message; FSDP2 has averaged sharded ones
            whole = torch.cat([gradient.flatten() for gradient in replicas])
            dist.all_reduce(whole)
            parts = whole.div_(world_size()).split([gradient.numel() for gradient in replicas])
            torch._foreach_copy_(replicas, [part.view_as(g) for part, g in zip(parts, replicas, strict=True)])
        norm = nn.utils.get_total_norm(gradients)
        if self.clip:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip, norm)

        for group in self.adam.param_groups:
            group["lr"] = lr_factor * self.lr
        self.adam.step()
        self.adam.zero_grad(set_to_none=False)
        self.updates += 1

        if self.ema:
            decay = min(self.ema_decay, (1 + self.updates) / (10 + self.updates))
            weights = [p.detach() for p in self.parameters.values()]
            torch._foreach_lerp_(list(self.ema.values()), weights, 1 - decay)
        return gathered(norm)

    def finish(self):
        """The moving average as weights, and no gradients."""
        self.swap()
        self.module.zero_grad()

    @torch.no_grad()
    def swap(self):
        """Exchange the parameters and their average."""
        for name, average in self.ema.items():
            held = self.parameters[name].clone()
            self.parameters[name].copy_(average)
            average.copy_(held)


class Run:
    """What surrounds a training loop. This one only watches; training/run.py's logs, saves and resumes."""

    def steps(self, phase, steps, learners, settings):
        """Yield the step numbers. learners: {name: Learner}, all that changes."""
        self.phase, began = phase, time.perf_counter()
        for self.step in range(steps):
            yield self.step
        self.seconds = time.perf_counter() - began

    def log(self, **terms):
        """Scalars, or losses [B], in the order in which a fault would spread. Raises Diverged."""
        for name, value in terms.items():
            if not value.isfinite().all():
                raise Diverged(f"{self.phase} diverged: {name} is not finite at step {self.step}")

    def log_by_t(self, t, **losses):
        """Losses [B] at the times t [B]."""


# ---- What users get wrong, told before a weight moves ------------------------------------------------------


def check_networks(**nets):
    """Raises InputError unless these can be trained."""
    if not torch.is_grad_enabled():
        raise InputError("training needs gradients: call it outside of torch.no_grad and inference_mode")
    for name, net in nets.items():
        if not isinstance(net, nn.Module) or next(net.parameters(), None) is None:
            raise InputError(f"{name} is trained: it must be an nn.Module with parameters, not a "
                             f"{type(net).__name__}; a module's forward may call any function")


def check_apart(**nets):
    """Raises InputError if networks share a parameter that is trained, for want of a deepcopy, say."""
    owners = defaultdict(dict)  # {address of a parameter's memory: {network: whether it trains it}}
    for name, net in nets.items():
        for p in net.parameters() if isinstance(net, nn.Module) else ():
            names = owners[p.data_ptr() or p]  # a sharded one has no address
            names[name] = p.requires_grad
            if len(names) > 1 and any(names.values()):
                raise InputError(f"{' and '.join(names)} share parameters: give each a copy (copy.deepcopy)")


def check_scale(name, x0, least=0.2):
    """Warns unless the standard deviation of x0 [B, ...] is about 1.

    A generator's first samples are means of what the data could be at t_star, not data. Where these have a
    standard deviation s, such means have about s^2 (1 - t_star)."""
    deviation = x0.detach().float().std().item()
    if not least <= deviation <= 5:
        warnings.warn(f"{name} has a standard deviation of {deviation:.3g}, and FGM expects about 1: rescale "
                      "the data", stacklevel=4)


def chosen_by(seeds, name, function):
    """function(seeds): conditions, or for "data" (x0 [B, ...], conditions). Raises InputError for others."""
    if not callable(function):
        raise InputError(f"{name} must be a function of int64 seeds [B], not a {type(function).__name__}")
    try:
        chosen = function(seeds)
    except IndexError as error:
        raise InputError(f"{name}(seeds) raised an IndexError ({error}): seeds are random numbers of "
                         "any size, so take row seeds % n of n") from error

    if name == "data" and not (isinstance(chosen, tuple) and len(chosen) == 2):
        raise InputError("data(seeds) must return (x0, cond): a tensor [B, ...] and a dict, {} for none")
    if name == "data" and (not torch.is_tensor(chosen[0]) or chosen[0].shape[:1] != seeds.shape):
        raise InputError(f"data(seeds) must give x0 as a tensor with one row for each seed, {len(seeds)}")
    cond = chosen[1] if name == "data" else chosen
    if not isinstance(cond, dict):
        raise InputError(f"{name}(seeds) must give conditions as a dict, not a {type(cond).__name__}")
    for key, value in cond.items():
        if torch.is_tensor(value) and (not value.dim() or len(value) != len(seeds)):
            raise InputError(f"{name}(seeds) must give {key} one row for each seed, [{len(seeds)}, ...], not "
                             f"{list(value.shape)}")
    return chosen


# ---- Processes, precision, random draws --------------------------------------------------------------------


def process_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def gathered(tensor):
    """The whole of a tensor that may be sharded; a collective call."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def replicated(tensors):
    """Those that FSDP2 has not sharded."""
    return [tensor for tensor in tensors if not hasattr(tensor, "full_tensor")]


def precision_of(net, x):
    """The context of a network's pass: autocast to bfloat16 or float16, if some of its weights are that.

    Raises InputError where weights and x are float32 and float64."""
    parameters = net.parameters() if isinstance(net, nn.Module) else ()
    dtypes = {p.dtype for p in parameters}
    if len(dtypes) == 1 and dtypes | {x.dtype} == {torch.float32, torch.float64}:
        raise InputError(f"a {type(net).__name__} with weights in {dtypes.pop()} was given samples in "
                         f"{x.dtype}: make both float32, by net.float() or x.float()")
    low = dtypes & {torch.bfloat16, torch.float16}
    return torch.autocast(x.device.type, low.pop(), cache_enabled=False) if low else nullcontext()


def wants_bf16(precision, device):
    """Whether passes run in bfloat16; weights, optimiser, t and losses stay in float32 either way."""
    if precision not in ("auto", "fp32", "bf16"):
        raise InputError(f"precision must be auto, fp32 or bf16, got {precision!r}")
    available = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16" or (precision == "auto" and available)


def bf16_passes(precision, device):
    """The context of a training loop's passes. It caches no weights: inside an outer autocast region cached
    ones would stay those of the first step."""
    enabled = wants_bf16(precision, device)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def micro_batches(batch, micro_batch=None):
    """(passes, micro-batch): batch is micro-batch x accumulation x processes. Raises InputError if not."""
    share, rest = divmod(batch, world_size())
    micro = micro_batch or max(share, 1)
    if rest or micro < 1 or share < micro or share % micro:
        raise InputError(f"the global batch {batch} is not micro-batch x accumulation x processes "
                         f"with micro-batch {micro} and {world_size()} processes")
    return share // micro, micro


TEACHER, DISTILLATION, SCORES = 0, 2, 9  # what a draw is for, the second entry of its key


@functools.cache
def sobol_points(n, dims, device):
    return torch.quasirandom.SobolEngine(dims, scramble=True, seed=0).draw(n).to(device)


class Draws:
    """The random numbers of one update, a function of key (seed, purpose, step, ...), batch, kind of device.

    So a resumed run needs no stored generator states, and any number of processes shares the same batch:
    each draws the whole and keeps its rows. torch's default generators (dropout) are seeded, too, a process
    its own."""

    def __init__(self, batch, device, *key):
        self.batch, self.device = batch, torch.device(device)
        self.random = np.random.default_rng(key)
        self.generator = torch.Generator(device).manual_seed(int(self.random.integers(2**63)))
        torch.manual_seed(int(self.random.integers(2**62)) + process_rank())

        share = batch // world_size()
        self.rows = slice(process_rank() * share, (process_rank() + 1) * share)

    def normal(self, shape):
        whole = torch.randn(self.batch, *shape, device=self.device, generator=self.generator)
        return whole[self.rows].clone()

    def sample_t(self, mean, std):
        return logit_normal(self.batch, mean, std, self.device, self.generator)[self.rows]

    def for_update(self, shape, mean, std):
        """What one update of Algorithm 1 draws: z and noise [B, *shape], t [B], seeds [B].

        In few dimensions quasi-random: Sobol points, shifted by one random vector (modulo 1) per update."""
        d = math.prod(shape)
        if d > 4:
            return self.normal(shape), self.normal(shape), self.sample_t(mean, std), self.seeds()
        shift = torch.rand(2 * d + 1, device=self.device, generator=self.generator)
        points = (sobol_points(self.batch, 2 * d + 1, self.device) + shift) % 1  # [batch, 2D + 1]
        z, noise, t = normal_quantile(points[self.rows]).split([d, d, 1], dim=1)  # each [B, D] or [B, 1]
        t = torch.sigmoid(mean + std * t[:, 0])
        return z.reshape(-1, *shape), noise.reshape(-1, *shape), t, self.seeds()  # [B, D] -> [B, *shape]

    def seeds(self):
        """A random int64 per sample, on the CPU, that chooses its data or condition: seed % n."""
        return torch.from_numpy(self.random.integers(2**63, size=self.batch))[self.rows]
