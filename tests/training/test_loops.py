"""The loops of fgm.py as a user calls them: what they learn, and with what optimiser."""

import copy

import pytest
import torch

import fgm
import toy2d
from training import checkpoint
from training.run import FolderRun


def networks(seed=0):
    torch.manual_seed(seed)
    teacher = toy2d.VelocityMLP(width=16, depth=2)
    return teacher, fgm.OneStepGenerator(copy.deepcopy(teacher), 0.8), copy.deepcopy(teacher)


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def distilled(**settings):
    teacher, generator, flow = networks()
    settings = {"steps": 8, "batch": 12, "lr": 1e-3, "l1_weight": 1.0} | settings
    return weights(fgm.distill(teacher, generator, flow, (2,), **settings)[0])


def test_train_flow_learns_a_gaussian():
    """The velocity of data N(0, s^2) is x (t - (1 - t) s^2) / (t^2 + (1 - t)^2 s^2): here 1.2 x."""
    torch.manual_seed(0)
    data = 0.5 * torch.randn(50_000, 2)
    net = toy2d.VelocityMLP(width=32, depth=2)
    settings = dict(steps=400, batch=256, lr=3e-3, betas=(0.9, 0.999), lr_decay=0.5, ema_decay=0.99)
    net, _ = fgm.train_flow(net, lambda seeds: (data[seeds % len(data)], {}), **settings)

    t = torch.full((4000,), 0.5)
    x = fgm.interpolate(data[:4000], torch.randn(4000, 2), t)
    error, exact = net(x, t) - 1.2 * x, 1.2 * x
    assert fgm.dot(error, error).mean() < 0.02 * fgm.dot(exact, exact).mean()


def test_log_and_checkpoints_change_nothing(tmp_path):
    assert torch.equal(distilled(), distilled(run=FolderRun(tmp_path, save_every=3, log_every=2)))


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_a_learner_is_adam_and_keeps_no_moment_that_is_never_used(beta1):
    net = torch.nn.Linear(9, 7)
    other = copy.deepcopy(net)
    learner = fgm.Learner(net, 1e-2, (beta1, 0.999), 1e-8, clip=0.1)
    adam = torch.optim.Adam(other.parameters(), lr=1e-2, betas=(beta1, 0.999), fused=True)
    for _ in range(5):
        x = torch.randn(8, 9)
        net(x).square().mean().backward()
        learner.update(1.0, passes=1)
        other(x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        adam.step()
        adam.zero_grad()
    assert torch.equal(weights(net), weights(other))
    saved = {name.partition(".")[2] for name in checkpoint.state_tensors({"net": learner})}
    moments = ("exp_avg", "exp_avg_sq") if beta1 else ("exp_avg_sq",)
    assert saved == {f"{kind}.{name}" for kind in ("parameter", *moments) for name in ("weight", "bias")}
