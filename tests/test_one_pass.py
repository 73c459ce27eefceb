"""One pass for both updates moves every weight as separate passes on the same draws do."""

import pytest
import torch
import torch.nn.functional as F

import fgm
import toy2d

SCALE = 1e9  # Adam's epsilon and lr: far above the gradients, so that a step moves each weight by -gradient


class Critic(torch.nn.Module):
    """An extra loss on features that the flow's last pass left behind, as the GAN's."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(2, 1)

    def flow_loss(self, flow, x0, seeds, cond):
        return F.softplus(self.head(flow.seen)[:, 0])

    def generator_loss(self, flow, x0, seeds, cond):
        flow(x0, fgm.constant_t(0.3, x0), **cond)
        return F.softplus(-self.head(flow.seen)[:, 0])


class Watched(toy2d.VelocityMLP):
    def forward(self, x, t, shift):
        self.seen = super().forward(x + shift, t)
        return self.seen


def conditions(seeds):
    return {"shift": (seeds % 5)[:, None] / 5}  # [B] -> [B, 1]


def networks():
    torch.manual_seed(0)
    nets = [Watched(width=32, depth=2) for _ in range(3)]
    for net in nets:
        torch.nn.init.normal_(net.net[-1].weight, std=0.2)
    return *nets, Critic()


def separate_gradients(l1_weight, weight, t_generator, t_flow, use_extra, loss_scale):
    """By two passes of the generator and of the flow, from the public losses alone."""
    teacher, net, flow, critic = networks()
    generator = fgm.OneStepGenerator(net, 0.6)
    draws = fgm.Draws(12, "cpu", 0, fgm.GENERATOR, 0)
    z, noise, t, seeds = draws.for_update((2,), *t_generator)
    t_of_flow = t if t_flow == t_generator else draws.sample_t(*t_flow)
    cond = conditions(seeds)
    with torch.no_grad():
        x0 = generator(z, **cond)
    loss = fgm.reflow_loss(flow, x0, noise, t_of_flow, **cond)
    if use_extra:
        loss = loss + critic.flow_loss(flow, x0, seeds, cond)
    loss.mean().backward()
    with fgm.frozen(flow, critic):
        x0 = generator(z, **cond)
        l1, l2 = fgm.fgm_losses(teacher, flow, x0, noise, t, weight=weight, **cond)
        loss = l2 + l1_weight * l1
        if use_extra:
            loss = loss + critic.generator_loss(flow, x0, seeds, cond)
        (loss_scale * loss.mean()).backward()
    nets = [net, flow, critic] if use_extra else [net, flow]
    return [torch.cat([p.grad.flatten() for p in one.parameters()]) for one in nets]


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("weight", ["none", "sid", "noise"])
@pytest.mark.parametrize("t_flow", [(0.5, 2.0), (-1.0, 2.0)])
@pytest.mark.parametrize("use_extra", [False, True])
def test_one_pass_moves_the_weights_as_separate_passes(micro_batch, weight, t_flow, use_extra):
    settings = dict(l1_weight=-0.4, weight=fgm.WEIGHTS[weight], t_generator=(0.5, 2.0), t_flow=t_flow,
                    loss_scale=3.0)
    teacher, net, flow, critic = networks()
    nets = [net, flow, critic] if use_extra else [net, flow]
    before = [torch.cat([p.detach().flatten() for p in one.parameters()]) for one in nets]
    fgm.distill(
        teacher, fgm.OneStepGenerator(net, 0.6), flow, (2,), steps=1, batch=12, micro_batch=micro_batch,
        lr=SCALE, eps=SCALE, conditions=conditions, extra=critic if use_extra else None, ema_decay=None,
        **settings)
    expected = separate_gradients(use_extra=use_extra, **settings)
    for one, start, gradient in zip(nets, before, expected, strict=True):
        moved = torch.cat([p.detach().flatten() for p in one.parameters()]) - start
        assert gradient.norm() > 0.1
        assert (moved + gradient).norm() < 1e-6 * gradient.norm()
