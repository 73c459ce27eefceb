"""What users get wrong: one InputError that says what and what to do, before a weight has moved."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn

import fgm

DATA = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """What every network here is inside; label shifts x."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2))

    def forward(self, x, t, label=None):
        if label is not None:
            x = x + label[:, None] / 10
        return self.layers(torch.cat([x, t[:, None]], 1))


class Changed(nn.Module):
    """Net, called as a function says."""

    def __init__(self, net, function):
        super().__init__()
        self.net, self.function = net, function

    def forward(self, x, t):
        return self.function(self.net, x, t)


class Output:
    def __init__(self, sample):
        self.sample = sample


def returns_tuple(net):
    return Changed(net, lambda net, x, t: (net(x, t), None))


def returns_object(net):
    return Changed(net, lambda net, x, t: Output(net(x, t)))


def without_gradient(net):
    return Changed(net, lambda net, x, t: net(x, t).detach())


def one_column(net):
    return Changed(net, lambda net, x, t: net(x, t)[:, :1])


def closure(net):
    return lambda x, t: net(x, t)


def frozen(net):
    return net.requires_grad_(False)


def same(net):
    return net


def state(*nets):
    modules = [net for net in nets if isinstance(net, nn.Module)]
    return [value.detach().clone() for net in modules for value in net.state_dict().values()]


def distil(teacher=same, net=same, flow=same, generator=None, **settings):
    """Two steps of distillation; where they raise, no network may have changed."""
    torch.manual_seed(0)
    plain = [Net() for _ in range(3)]
    nets = [change(one) for change, one in zip((teacher, net, flow), plain, strict=True)]
    make = generator or (lambda net: fgm.OneStepGenerator(net, 0.5))
    before = state(*nets)
    try:
        return fgm.distill(nets[0], make(nets[1]), nets[2], (2,),
                           **dict(steps=2, batch=8, lr=1e-2, ema_decay=None) | settings)
    except fgm.InputError:
        after = state(*nets)
        assert len(after) >= 8 and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        raise


def train(data, net=same, **settings):
    """Two steps of a teacher's training; where they raise, the network may not have changed."""
    torch.manual_seed(0)
    net = net(Net())
    before = state(net)
    try:
        return fgm.train_flow(net, data, **dict(steps=2, batch=8, lr=1e-2) | settings)
    except fgm.InputError:
        assert all(torch.equal(a, b) for a, b in zip(before, state(net), strict=True))
        raise


def rows(seeds):
    return DATA[seeds % len(DATA)]


def refused(message):
    return pytest.raises(fgm.InputError, match=message)


def test_what_is_right_runs_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distil()
        distil(conditions=lambda seeds: {"label": seeds % 3}, flow_updates=2)
        train(lambda seeds: (rows(seeds), {"label": seeds % 3}))


# ---- Networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flow_updates", [1, 3])
@pytest.mark.parametrize("place", ["teacher", "net", "flow"])
@pytest.mark.parametrize("change, message", [
    (returns_tuple, r"must return a tensor, got a tuple: wrap it in a module .* v\[0\] or v.sample"),
    (returns_object, r"must return a tensor, got a Output: wrap it in a module .* v\[0\] or v.sample"),
    (one_column, r"its input's shape \[8, 2\], got \[8, 1\]"),
])
def test_what_a_velocity_returns(change, message, place, flow_updates):
    with refused(message):
        distil(**{place: change}, flow_updates=flow_updates)


@pytest.mark.parametrize("change", [returns_tuple, returns_object])
def test_what_a_velocity_returns_elsewhere(change):
    net, x, t = change(Net()), torch.randn(4, 2), torch.rand(4)
    with refused("wrap it in a module"):
        train(lambda seeds: (rows(seeds), {}), change)
    for call in (lambda: fgm.sample_ode(net, x, 3), lambda: fgm.defect(net, x, 0.5),
                 lambda: fgm.OneStepGenerator(net, 0.5)(x), lambda: fgm.reflow_loss(net, x, x, t)):
        with refused("wrap it in a module"):
            call()


@pytest.mark.parametrize("place", ["teacher", "net", "flow"])
def test_networks_that_cut_gradients_off(place):
    with refused("no torch.no_grad or detach inside"):
        distil(**{place: without_gradient})


def test_a_closure_where_weights_are_trained():
    with refused("flow is trained: it must be an nn.Module with parameters, not a function"):
        distil(flow=closure)
    with refused("generator is trained: it must be an nn.Module with parameters, not a function"):
        distil(net=closure)
    with refused("net is trained: it must be an nn.Module with parameters, not a function"):
        train(lambda seeds: (rows(seeds), {}), closure)
    with refused("flow is trained: .* not a Identity"):  # a module, but without parameters
        distil(flow=lambda net: nn.Identity())


def test_a_closure_as_teacher_is_as_good_as_its_network():
    generators = [distil(teacher=change)[0] for change in (same, closure)]
    assert all(torch.equal(a, b) for a, b in zip(*map(state, generators), strict=True))


@pytest.mark.parametrize("generator, name", [(same, "Net"), (closure, "function")])
def test_a_bare_network_as_generator(generator, name):
    with refused(rf"generator must be a OneStepGenerator\(net, t_star\), not a {name}"):
        distil(generator=generator)


@pytest.mark.parametrize("place", ["net", "flow"])
@pytest.mark.parametrize("change, held", [
    (frozen, "none"), (nn.Module.bfloat16, "torch.bfloat16"), (nn.Module.half, "torch.float16"),
])
def test_networks_that_cannot_be_trained(place, change, held):
    message = f"needs trainable parameters, all in float32 .*, and has .*{held}"
    with refused(message):
        distil(**{place: change})
    with refused(message):
        train(lambda seeds: (rows(seeds), {}), change)


@pytest.mark.parametrize("more", [{}, {"flow_updates": 2}, {"l1_weight": 0.0}, {"t_flow": (1.0, 1.0)}])
def test_distillation_without_gradients(more):
    for context in (torch.no_grad, torch.inference_mode):
        with context(), refused("call it outside of torch.no_grad and inference_mode"):
            distil(**more)
        with context(), refused("call it outside of torch.no_grad and inference_mode"):
            train(lambda seeds: (rows(seeds), {}))


# ---- Precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, precision", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_a_teacher_in_half_precision_works(dtype, precision):
    """It is as near to the float32 one as its rounding: in velocity, samples and what is distilled from it.

    All that comes out is float32."""
    torch.manual_seed(0)
    teacher = Net()
    half = copy.deepcopy(teacher).to(dtype)
    x, t = torch.randn(500, 2), torch.rand(500)

    exact, rounded = fgm.velocity(teacher, x, t), fgm.velocity(half, x, t)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() < 3 * precision * exact.norm()

    exact, rounded = fgm.sample_ode(teacher, x, 10), fgm.sample_ode(half, x, 10)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() < 3 * precision * exact.norm()

    assert {p.dtype for p in half.parameters()} == {dtype}

    start = Net()
    weights = []
    for one in (teacher, half):
        generator = fgm.OneStepGenerator(copy.deepcopy(start), 0.5)
        fgm.distill(one, generator, copy.deepcopy(start), (2,), steps=5, batch=64, lr=1e-3, ema_decay=None)
        weights.append(torch.cat([p.detach().flatten() for p in generator.parameters()]))
    moved = weights[0] - torch.cat([p.detach().flatten() for p in start.parameters()])
    assert moved.norm() > 0.01
    assert 0 < (weights[1] - weights[0]).norm() < 0.2 * moved.norm()


def test_float64_against_float32():
    message = "a Net with weights in torch.float64 .* samples in torch.float32: make both float32, by net"
    for place in ("teacher", "net", "flow"):
        with refused(message):
            distil(**{place: nn.Module.double})
    with refused(message):
        train(lambda seeds: (rows(seeds), {}), nn.Module.double)

    net, x = Net().double(), torch.randn(4, 2)
    for call in (lambda: fgm.sample_ode(net, x, 3), lambda: fgm.defect(net, x, 0.5),
                 lambda: fgm.OneStepGenerator(net, 0.5)(x)):
        with refused(message):
            call()
    assert fgm.sample_ode(net, x.double(), 3).dtype == torch.float64  # both are as good as float32 for both

    with refused(r"a Net with weights in torch.float32 .* samples in torch.float64: .* x.float\(\)"):
        train(lambda seeds: (rows(seeds).double(), {}))
    with refused("must be float32, on one device"):  # a closure hides its weights
        distil(teacher=lambda net: closure(net.double()))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.int64])
def test_data_in_other_numbers_are_converted(kind):
    """The numbers are the same in float32."""
    whole = (3 * DATA).round()
    nets = [train(lambda seeds, x=x: (x[seeds % 100], {}))[0] for x in (whole, whole.to(kind))]
    assert all(torch.equal(a, b) for a, b in zip(*map(state, nets), strict=True))


# ---- Data and conditions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("conditions, message", [
    ({"label": torch.arange(8)}, "conditions must be a function of int64 seeds .*, not a dict"),
    (torch.arange(8), "conditions must be a function of int64 seeds .*, not a Tensor"),
    (lambda seeds: seeds % 3, r"conditions\(seeds\) must give conditions as a dict, not a Tensor"),
    (lambda seeds: None, r"conditions\(seeds\) must give conditions as a dict, not a NoneType"),
    (lambda seeds: {"label": torch.arange(5)}, r"must give label one row for each seed, .8, ...., not .5."),
    (lambda seeds: {"label": torch.arange(5)[seeds]}, "IndexError .*random .* take row seeds % n of n"),
    (lambda seeds: {"label": torch.arange(5).numpy()[seeds]}, "IndexError .*take row seeds % n of n"),
])
@pytest.mark.parametrize("flow_updates", [1, 2])
def test_conditions(conditions, message, flow_updates):
    with refused(message):
        distil(conditions=conditions, flow_updates=flow_updates)


@pytest.mark.parametrize("data, message", [
    (DATA, "data must be a function of int64 seeds .*, not a Tensor"),
    (torch.utils.data.DataLoader(DATA), "data must be a function of int64 seeds .*, not a DataLoader"),
    (rows, r"must return \(x0, cond\): a tensor \[B, ...\] and a dict, {} for none"),
    (lambda seeds: [rows(seeds), {}], r"must return \(x0, cond\)"),
    (lambda seeds: (rows(seeds), seeds % 3), r"data\(seeds\) must give conditions as a dict, not a Tensor"),
    (lambda seeds: (rows(seeds), None), "as a dict, not a NoneType"),
    (lambda seeds: (rows(seeds), {"label": torch.arange(5)}), "must give label one row for each seed"),
    (lambda seeds: (DATA[:5], {}), "x0 as a tensor with one row for each seed, 8"),
    (lambda seeds: (DATA[0, 0], {}), "x0 as a tensor with one row for each seed, 8"),
    (lambda seeds: (rows(seeds).numpy(), {}), "x0 as a tensor with one row for each seed, 8"),
    (lambda seeds: (DATA[seeds], {}), "IndexError .*take row seeds % n of n"),
])
def test_data(data, message):
    with refused(message):
        train(data)


def test_two_rows_are_not_taken_for_data_and_conditions():
    with refused(r"must return \(x0, cond\)"):
        train(rows, batch=2)


def test_an_error_of_the_users_own_function_stays_as_it_is():
    def conditions(seeds):
        raise KeyError("no such file")

    with pytest.raises(KeyError, match="no such file"):
        distil(conditions=conditions)


@pytest.mark.parametrize("scale, warned", [(100, True), (5.5, True), (4, False), (0.3, False), (0.15, True)])
def test_scale(scale, warned):
    """Of data, and of what the generator makes: a warning that shows the caller's line, once."""
    x0 = (DATA - DATA.mean()) / DATA.std() * scale

    def made_by_a_generator():
        distil(generator=lambda net: fgm.OneStepGenerator(net, 0.5, c_skip=scale, c_out=0.0), batch=512,
               flow_updates=2)

    for call, name in [(lambda: train(lambda seeds: (x0[seeds % 100], {}), batch=512), "the data"),
                       (made_by_a_generator, "what the generator makes")]:
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            call()
        assert len(raised) == warned
        for warning in raised:
            message = str(warning.message)
            deviation = float(re.search(r"standard deviation of (\S+), ", message)[1])
            assert message.startswith(name) and "FGM expects about 1: rescale the data" in message
            assert deviation == pytest.approx(scale, rel=0.1)
            assert warning.filename == __file__


@pytest.mark.parametrize("batch, micro_batch", [(0, None), (8, 3), (8, 16)])
def test_batches(batch, micro_batch):
    with refused(f"the global batch {batch} is not micro-batch x accumulation x processes"):
        distil(batch=batch, micro_batch=micro_batch)


# ---- Activation checkpointing of one's own -----------------------------------------------------------------


class Recompute(torch.autograd.Function):
    """As in guided-diffusion: it asks for the gradients of all parameters, frozen ones as well."""

    @staticmethod
    def forward(ctx, layers, x, *parameters):
        ctx.layers, ctx.x, ctx.parameters = layers, x, parameters
        with torch.no_grad():
            return layers(x)

    @staticmethod
    def backward(ctx, at_output):
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            gradients = torch.autograd.grad(ctx.layers(x), [x, *ctx.parameters], at_output)
        return None, *gradients


class Recomputing(Net):
    def forward(self, x, t):
        return Recompute.apply(self.layers, torch.cat([x, t[:, None]], 1), *self.layers.parameters())


def recomputing(net):
    other = Recomputing()
    other.load_state_dict(net.state_dict())
    return other


def test_checkpointing_by_an_own_function():
    """Refused where parameters are frozen; elsewhere the weights are those without."""
    message = "checkpointing must be off, or that of torch.utils.checkpoint with use_reentrant=False"
    for flow_updates in (1, 2):
        with refused(message):
            distil(teacher=recomputing, flow_updates=flow_updates)
    with refused(message):
        distil(flow=recomputing, t_flow=(1.0, 1.0))

    plain, recomputed = distil()[0], distil(net=recomputing, flow=recomputing)[0]
    assert all(torch.equal(a, b) for a, b in zip(state(plain), state(recomputed), strict=True))
    plain, recomputed = (train(lambda seeds: (rows(seeds), {}), change)[0] for change in (same, recomputing))
    assert all(torch.equal(a, b) for a, b in zip(state(plain), state(recomputed), strict=True))
