"""What bench.py measures fgm.distill's step against: its bare passes, the former release's step, SiD's."""

import torch

import fgm


def bare_passes(teacher, flow, net, shape, batch, conditions, precision="fp32"):
    """A function that makes the passes of one step and nothing else: generator and flow forward and backward,
    and the teacher forward and back to its input."""
    device = next(net.parameters()).device
    bf16 = fgm.bf16_passes(precision, device)
    x, gradient = torch.randn(batch, *shape, device=device), torch.randn(batch, *shape, device=device)
    t, cond = torch.rand(batch, device=device), conditions(torch.arange(batch))

    def passes():
        leaf = x.clone().requires_grad_()
        with bf16:
            x0 = net(x, t, **cond)
        with fgm.frozen(teacher):
            for field in (flow, teacher):
                with bf16:
                    v = field(leaf, t, **cond)
                v.backward(gradient.to(v.dtype))
                del v
        x0.backward(gradient.to(x0.dtype))
        flow.zero_grad()
        net.zero_grad()

    return passes


def train(step, teacher, flow, net, shape, batch, conditions, steps, precision, watch):
    """Steps of a loop with fgm.distill's draws, optimisers and average; watch() is called before each.

    step(teacher, generator, flow, learners, draw, bf16) -> {name: loss [B] or gradient norm}; draw(phase)
    -> (z, noise, t, cond), fresh in each phase of a step; learners: of flow and generator."""
    device, generator = next(net.parameters()).device, fgm.OneStepGenerator(net, 0.97)
    bf16 = fgm.bf16_passes(precision, device)
    learners = [fgm.Learner(flow, 1e-6, (0.0, 0.999), 1e-8)]
    learners.append(fgm.Learner(generator, 1e-6, (0.0, 0.999), 1e-8, ema_decay=0.999))
    run = fgm.Run()

    def draw(phase):
        z, noise, t, seeds = fgm.Draws(batch, device, run.step, phase).for_update(shape, 0.0, 2.0)
        return z, noise, t, conditions(seeds)

    for _ in run.steps("distill", steps, {}, {}):
        watch()
        run.log(**step(teacher, generator, flow, learners, draw, bf16))


def former_step(teacher, generator, flow, learners, draw, bf16):
    """A step of the former release at l1_weight 1: both networks' graphs live together, and the flow's is
    differentiated twice, for its own loss and for L1 + L2."""
    z, noise, t, cond = draw(0)
    with bf16:
        x0 = generator(z, **cond)
    leaf = x0.detach().requires_grad_()
    with fgm.frozen(teacher):
        with bf16:
            xt = fgm.interpolate(leaf, noise, t)
            u, v = fgm.velocity(teacher, xt, t, **cond), fgm.velocity(flow, xt, t, **cond)
            target = noise - leaf
            error = v - target.detach()
            flow_loss = fgm.dot(error, error)  # (3.6)
            l1, l2 = fgm.dot(u - v, u - v), 2 * fgm.dot(u - v, v - target)  # (4.11), (4.12)
        flow_loss.mean().backward(retain_graph=True)
        (at_x0,) = torch.autograd.grad((l1 + l2).mean(), leaf)
    x0.backward(at_x0)
    flow_norm, norm = (learner.update(1.0, 1) for learner in learners)
    return {"flow_loss": flow_loss, "l1": l1, "l2": l2, "flow_gradient": flow_norm, "gradient": norm}


def sid_step(teacher, generator, flow, learners, draw, bf16):
    """A step of SiD's published loop (arXiv 2404.04057) on L1 + L2 with its weight, as it is described: two
    phases, each with samples and noise of its own."""
    z, noise, t, cond = draw(0)
    with bf16:
        with torch.no_grad():
            x0 = generator(z, **cond)
        flow_loss = fgm.reflow_loss(flow, x0, noise, t, **cond)
    flow_loss.mean().backward()
    flow_norm = learners[0].update(1.0, 1)
    z, noise, t, cond = draw(1)
    with fgm.frozen(teacher, flow):
        with bf16:
            x0 = generator(z, **cond)
            l1, l2 = fgm.fgm_losses(teacher, flow, x0, noise, t, weight=fgm.sid_weight, **cond)
        (l1 + l2).mean().backward()
    norm = learners[1].update(1.0, 1)
    return {"flow_loss": flow_loss, "l1": l1, "l2": l2, "flow_gradient": flow_norm, "gradient": norm}
