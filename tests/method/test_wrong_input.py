"""What users get wrong: one InputError that says what and what to do, before a weight has moved."""

import warnings
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn

import fgm

DATA = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
HALF_WAY = partial(fgm.OneStepGenerator, t_star=0.5)


class Net(nn.Module):
    """What every network here is inside; label shifts x."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2))

    def forward(self, x, t, label=None):
        if label is not None:
            x = x + label[:, None] / 10
        return self.layers(torch.cat([x, t[:, None]], 1))


def returning(function):
    """Changes a network: its velocity v becomes function(v)."""

    def change(net):
        net.register_forward_hook(lambda module, inputs, v: function(v))
        return net

    return change


def closure(net):
    return lambda x, t: net(x, t)


def same(net):
    return net


def state(*nets):
    modules = [net for net in nets if isinstance(net, nn.Module)]
    return [value.detach().clone() for net in modules for value in net.state_dict().values()]


@contextmanager
def unmoved(*nets):
    """Where the block raises, no weight of nets may have changed."""
    before = state(*nets)
    try:
        yield
    except fgm.InputError:
        assert all(torch.equal(a, b) for a, b in zip(before, state(*nets), strict=True))
        raise


def distil(teacher=same, net=same, flow=same, generator=HALF_WAY, **settings):
    """Two steps of distillation; where they raise, no network may have changed."""
    torch.manual_seed(0)
    nets = [change(Net()) for change in (teacher, net, flow)]
    with unmoved(*nets):
        return fgm.distill(nets[0], generator(nets[1]), nets[2], (2,),
                           **dict(steps=2, batch=8, lr=1e-2, ema_decay=None) | settings)


def train(data, net=same, **settings):
    """Two steps of a teacher's training; where they raise, the network may not have changed."""
    torch.manual_seed(0)
    net = net(Net())
    with unmoved(net):
        return fgm.train_flow(net, data, **dict(steps=2, batch=8, lr=1e-2) | settings)


def rows(seeds):
    return DATA[seeds % len(DATA)]


def labelled(seeds):
    return rows(seeds), {"label": seeds % 3}


def refused(message):
    return pytest.raises(fgm.InputError, match=message)


def test_what_is_right_runs_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distil()
        distil(conditions=lambda seeds: {"label": seeds % 3}, flow_updates=2)
        train(labelled)


# ---- Networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place, change, message", [
    ("teacher", returning(lambda v: (v, v)), r"got a tuple: wrap it in a module .* v\[0\] or v.sample"),
    ("flow", returning(lambda v: v[:, :1]), r"its input's shape \[8, 2\], got \[8, 1\]"),
    ("teacher", returning(torch.Tensor.detach), "no torch.no_grad or detach inside"),
    ("flow", closure, "(flow|net) is trained: it must be an nn.Module with parameters, not a function"),
    ("net", nn.Module.bfloat16, "needs trainable parameters, all in float32 .*, and has .*torch.bfloat16"),
    ("flow", lambda net: net.requires_grad_(False), "needs trainable parameters, .*, and has .*none"),
    ("teacher", nn.Module.double, "weights in torch.float64 .* samples in torch.float32: make both float32"),
])
@pytest.mark.parametrize("flow_updates", [1, 2])
def test_networks(place, change, message, flow_updates):
    with refused(message):
        distil(**{place: change}, flow_updates=flow_updates)
    with refused(message):
        train(lambda seeds: (rows(seeds), {}), change)


def test_a_bare_network_as_generator():
    with refused(r"generator must be a OneStepGenerator\(net, t_star\), not a Net"):
        distil(generator=same)


@pytest.mark.parametrize("call", [distil, lambda: train(labelled)])
def test_training_without_gradients(call):
    with torch.no_grad(), refused("call it outside of torch.no_grad and inference_mode"):
        call()


def test_a_closure_as_teacher_is_as_good_as_its_network():
    generators = [distil(teacher=change)[0] for change in (same, closure)]
    assert all(torch.equal(a, b) for a, b in zip(*map(state, generators), strict=True))


def test_a_teacher_in_bfloat16_works():
    """Its velocity is float32, and the same but for rounding."""
    torch.manual_seed(0)
    net, x, t = Net(), torch.randn(500, 2), torch.rand(500)
    exact, rounded = fgm.velocity(net, x, t), fgm.velocity(net.bfloat16(), x, t)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() < 3 * 2**-8 * exact.norm()
    distil(teacher=nn.Module.bfloat16)


# ---- Data and conditions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("conditions, message", [
    (torch.arange(8), "conditions must be a function of int64 seeds .*, not a Tensor"),
    (lambda seeds: seeds % 3, r"conditions\(seeds\) must give conditions as a dict, not a Tensor"),
    (lambda seeds: {"label": torch.arange(5)}, r"must give label one row for each seed, .8, ...., not .5."),
    (lambda seeds: {"label": torch.arange(5)[seeds]}, "IndexError .*random .* take row seeds % n of n"),
])
def test_conditions(conditions, message):
    with refused(message):
        distil(conditions=conditions)


@pytest.mark.parametrize("data, message", [
    (rows, r"must return \(x0, cond\): a tensor \[B, ...\] and a dict, {} for none"),
    (lambda seeds: (DATA[:5], {}), "x0 as a tensor with one row for each seed, 2"),
])
def test_data(data, message):
    """In batches of two, which must not be taken for data and conditions."""
    with refused(message):
        train(data, batch=2)


@pytest.mark.parametrize("scale, of_data, of_generator", [
    (5.5, True, True), (4, False, False), (0.3, False, False), (0.1, True, False), (0.01, True, True)])
def test_scale(scale, of_data, of_generator):
    """Of data, and of what the generator makes, which may be less varied: a warning that shows the caller's
    line, once."""
    x0 = (DATA - DATA.mean()) / DATA.std() * scale
    generator = partial(HALF_WAY, c_skip=scale, c_out=0.0)
    calls = {"the data": (of_data, lambda: train(lambda seeds: (x0[seeds % 100], {}), batch=512)),
             "what the generator makes": (
                 of_generator, lambda: distil(generator=generator, batch=512, flow_updates=2))}
    for name, (warned, call) in calls.items():
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            call()
        assert len(raised) == warned
        for warning in raised:
            assert str(warning.message).startswith(f"{name} has a standard deviation of ")
            assert "FGM expects about 1: rescale the data" in str(warning.message)
            assert warning.filename == __file__
