"""One step: it moves every weight as separate passes on the same draws do, at the cost that is stated."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

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


def separate_passes(l1_weight, weight, t_generator, t_flow, use_extra, loss_scale):
    """(gradients, terms of the log) by two passes of the generator and of the flow, from the public losses
    alone."""
    teacher, net, flow, critic = networks()
    generator = fgm.OneStepGenerator(net, 0.6)
    draws = fgm.Draws(12, "cpu", 0, fgm.DISTILLATION, 0, 0)
    z, noise, t, seeds = draws.for_update((2,), *t_generator)
    shared = t_flow == t_generator and not use_extra
    t_of_flow = t if shared else draws.sample_t(*t_flow)
    cond = conditions(seeds)
    with torch.no_grad():
        x0 = generator(z, **cond)
    loss = fgm.reflow_loss(flow, x0, noise, t_of_flow, **cond)
    terms = {"flow_loss": loss.detach()}
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

    with torch.no_grad():
        r_u, r_v = (fgm.reflow_loss(field, x0, noise, t, **cond) for field in (teacher, flow))
        terms |= {"bound": r_u - r_v, "l1": fgm.fgm_losses(teacher, flow, x0, noise, t, **cond)[0]}
    nets = [net, flow, critic] if use_extra else [net, flow]
    return [torch.cat([p.grad.flatten() for p in one.parameters()]) for one in nets], terms


class Watcher(fgm.Run):
    def log(self, **terms):
        self.terms = terms


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("weight", [None, fgm.sid_weight])
@pytest.mark.parametrize("t_flow", [(0.5, 2.0), (-1.0, 2.0)])
@pytest.mark.parametrize("use_extra", [False, True])
@pytest.mark.parametrize("l1_weight", [1.0, -0.4])
def test_a_step_moves_the_weights_as_separate_passes(micro_batch, weight, t_flow, use_extra, l1_weight):
    settings = dict(l1_weight=l1_weight, weight=weight, t_generator=(0.5, 2.0), t_flow=t_flow, loss_scale=3.0)
    teacher, net, flow, critic = networks()
    nets = [net, flow, critic] if use_extra else [net, flow]
    before = [torch.cat([p.detach().flatten() for p in one.parameters()]) for one in nets]
    run = Watcher()
    fgm.distill(
        teacher, fgm.OneStepGenerator(net, 0.6), flow, (2,), steps=1, batch=12, micro_batch=micro_batch,
        lr=SCALE, eps=SCALE, conditions=conditions, extra=critic if use_extra else None, ema_decay=None,
        run=run, **settings)
    gradients, terms = separate_passes(use_extra=use_extra, **settings)
    for name, term in terms.items():
        torch.testing.assert_close(run.terms[name], term, rtol=1e-4, atol=1e-5)
    for one, start, gradient in zip(nets, before, gradients, strict=True):
        moved = torch.cat([p.detach().flatten() for p in one.parameters()]) - start
        assert gradient.norm() > 0.1
        assert (moved + gradient).norm() < 1e-6 * gradient.norm()
        assert all(p.grad is None for p in one.parameters())


class Checkpointed(torch.nn.Module):
    """A network that recomputes its activations in the backward pass."""

    def __init__(self, net, use_reentrant):
        super().__init__()
        self.net, self.use_reentrant = net, use_reentrant

    def forward(self, x, t, shift):
        return checkpoint(self.net, x, t, shift, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("more", [
    dict(), dict(l1_weight=-0.4), dict(t_flow=(-1.0, 2.0)), dict(flow_updates=2, micro_batch=4)])
def test_networks_with_activation_checkpointing_of_their_own(more):
    """The same weights as without. Reentrant checkpointing, which gives no gradients at an input, and none at
    all where the input needs none, is refused for any network that would lose by it."""

    def trained(*use_reentrant):
        teacher, net, flow, _ = networks()
        nets = [net if use is None else Checkpointed(net, use)
                for net, use in zip((teacher, net, flow), use_reentrant, strict=True)]
        generator = fgm.OneStepGenerator(nets[1], 0.6)
        fgm.distill(nets[0], generator, nets[2], (2,), steps=2, batch=12, conditions=conditions, **more)
        return torch.cat([p.detach().flatten() for p in generator.parameters()])

    assert torch.equal(trained(None, None, None), trained(False, False, False))
    for use_reentrant in [(True, None, None), (None, True, None), (True, True, True)]:
        with pytest.raises(fgm.InputError, match="with use_reentrant=False"):
            trained(*use_reentrant)


def test_reentrant_checkpointing_is_refused_where_a_teacher_trains():
    net, x0 = Checkpointed(networks()[0], True), torch.randn(12, 2)
    with pytest.raises(fgm.InputError, match="with use_reentrant=False"):
        fgm.train_flow(net, lambda seeds: (x0, {"shift": torch.zeros(12, 1)}), steps=1, batch=12)


class Counting(toy2d.VelocityMLP):
    """Counts the samples of its passes, forward and backward."""

    def __init__(self):
        super().__init__(width=8, depth=1)
        self.forwards, self.backwards = 0, 0

    def forward(self, x, t):
        self.forwards += len(x)
        v = super().forward(x, t)
        if v.requires_grad:
            v.register_hook(self.back)
        return v

    def back(self, at_output):
        self.backwards += len(at_output)


@pytest.mark.parametrize("more, passes", [
    (dict(), [(1, 1), (1, 1), (1, 1)]),  # 8 units: a backward pass is 1 for the teacher, 2 for the others
    (dict(l1_weight=0.0), [(1, 1), (1, 1), (1, 2)]),  # 9
    (dict(t_flow=(-1.0, 2.0)), [(1, 1), (1, 1), (2, 2)]),  # 10
    (dict(flow_updates=3), [(1, 1), (3, 1), (3, 3)]),
])
def test_passes_of_a_step(more, passes):
    """(forward, backward) passes of teacher, generator and flow in one step: what a second step adds."""

    def passes_of(steps):
        nets = [Counting() for _ in range(3)]
        teacher, net, flow = nets
        fgm.distill(teacher, fgm.OneStepGenerator(net, 0.6), flow, (2,), steps=steps, batch=12, micro_batch=4,
                    **more)
        return [(net.forwards / 12, net.backwards / 12) for net in nets]

    first, both = passes_of(1), passes_of(2)
    added = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(first, both, strict=True)]
    assert added == [pytest.approx(number) for number in passes]


def change(before, net):
    return max((a - b).abs().max() for a, b in zip(before, net.parameters(), strict=True)).item()


def test_within_an_outer_autocast_region_the_generator_learns():
    """Such a region keeps a cache of cast weights, in which those of the first step would stay for ever."""

    def trained(outside):
        teacher, net, flow, _ = networks()
        generator = fgm.OneStepGenerator(net, 0.6)
        with outside:
            fgm.distill(teacher, generator, flow, (2,), steps=3, batch=12, conditions=conditions, lr=1e-2,
                        precision="bf16", ema_decay=None)
        return [p.detach().clone() for p in generator.parameters()]

    plain = trained(contextlib.nullcontext())
    assert change(plain, networks()[1]) > 1e-3
    for enabled in (False, True):
        inside = trained(torch.autocast("cpu", torch.bfloat16, enabled=enabled))
        assert max((a - b).norm() / b.norm() for a, b in zip(inside, plain, strict=True)) < 0.02


def test_networks_that_share_memory_are_refused():
    """Also where the parameters are other objects; and an extra loss that would train the teacher."""
    teacher, net, flow, critic = networks()
    generator = fgm.OneStepGenerator(net, 0.6)
    settings = dict(steps=1, batch=12, conditions=conditions)
    before = [p.detach().clone() for p in teacher.parameters()]
    critic.features = teacher
    with pytest.raises(fgm.InputError, match="teacher and extra share parameters"):
        fgm.distill(teacher, generator, flow, (2,), extra=critic, **settings)
    teacher.requires_grad_(False)
    critic.features = None
    flow.load_state_dict(teacher.state_dict(), assign=True)
    with pytest.raises(fgm.InputError, match="teacher and flow share parameters"):
        fgm.distill(teacher, generator, flow.requires_grad_(True), (2,), **settings)
    assert change(before, teacher) == 0
