"""Teachers: fgm.defect tells which network is one; the wrappers of examples/ make one of other libraries'."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import fgm
from examples import wrappers
from points.data import GaussianMixture

TIMES = (0.05, 0.2, 0.5, 0.8, 0.95, 1.0)


# ---- The defect: 0 for a velocity --------------------------------------------------------------------------


def eight_gaussians():
    angle = torch.arange(8) * math.pi / 4
    means = 1.5 * torch.stack([angle.cos(), angle.sin()], 1)  # [8, 2]
    return GaussianMixture([1.0] * 8, means, 0.01 * torch.eye(2).expand(8, 2, 2))


def one_flat_component():
    covs = [[[0.5, 0.2], [0.2, 0.3]], [[0.1, 0.0], [0.0, 0.0]]]
    return GaussianMixture([1.0, 3.0], [[1.0, 0.0], [-1.0, 2.0]], covs)


def three_dimensions():
    covs = torch.diag_embed(torch.tensor([[0.1, 0.2, 0.3], [1.0, 0.01, 0.5], [0.3, 0.3, 0.3]]))
    return GaussianMixture([1.0, 2.0, 1.0], [[1.0, 0, 0], [0, -1.0, 0.5], [-1.0, 1.0, -1.0]], covs)


MIXTURES = [eight_gaussians, one_flat_component, three_dimensions]


@pytest.mark.parametrize("mixture", [make() for make in MIXTURES], ids=[make.__name__ for make in MIXTURES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_defect_of_the_exact_velocity_is_0(mixture, dtype):
    """At every t, on samples of the data and on the teacher's own."""
    torch.manual_seed(0)
    own = fgm.sample_ode(mixture.velocity, torch.randn(4000, mixture.means.shape[1], dtype=dtype), 100)
    for x0 in (mixture.sample(20_000).to(dtype), own):
        for t in TIMES:
            value, error = fgm.defect(mixture.velocity, x0, t)
            assert 0 < error < 0.2
            assert abs(value) < 5 * error, t


def test_defect_of_a_t_for_each_sample():
    """t: [B] may vary; conditions reach the network."""
    mixture = eight_gaussians()
    torch.manual_seed(0)
    x0 = mixture.sample(20_000)

    def shifted(x, t, shift):
        return mixture.velocity(x, t) + shift

    t = torch.linspace(0.01, 1, len(x0))
    value, error = fgm.defect(shifted, x0, t, shift=torch.zeros(len(x0), 1))
    assert error < 0.05 and abs(value) < 5 * error
    value, error = fgm.defect(shifted, x0, t, shift=torch.full((len(x0), 1), 2.0))
    assert value > 0.3 > 20 * error


@pytest.mark.parametrize("sign, expected", [(1, 0), (-1, 2)])  # E <-u - c, -u> = 2 E |u|^2, by (4.7)
@pytest.mark.parametrize("t", [0.2, 0.95])
def test_standard_error_is_the_spread_over_repeats(t, sign, expected):
    mixture = one_flat_component()
    torch.manual_seed(0)

    def net(x, t):
        return sign * mixture.velocity(x, t)

    repeats = [fgm.defect(net, mixture.sample(500), t) for _ in range(400)]
    values, errors = torch.tensor(repeats).T
    assert 0.85 < errors.mean() / values.std() < 1.15  # the spread of 400 repeats is known to 3.5 %
    assert abs(values.mean() - expected) < 5 * values.std() / 20


# ---- The defect: far from 0 for what is none, by closed forms ----------------------------------------------

MEAN, S = torch.tensor([0.5, -1.0]), 0.4  # data N(MEAN, S^2) in two dimensions


def slope(t):
    """v(x, t) = slope (x - (1 - t) MEAN) - MEAN is the velocity of independent noise."""
    return (t - (1 - t) * S**2) / (t**2 + (1 - t) ** 2 * S**2)


def paired(x, t):
    """Noise paired with data by optimal transport, x0 = MEAN + S noise.

    Then x_t = (1 - t) MEAN + ((1 - t) S + t) noise tells the noise, and noise - x0 = (1 - S) noise - MEAN."""
    t = fgm.per_sample(t, x)
    return (1 - S) / ((1 - t) * S + t) * (x - (1 - t) * MEAN) - MEAN


def exact(x, t):
    t = fgm.per_sample(t, x)
    return slope(t) * (x - (1 - t) * MEAN) - MEAN


def wrong_sign(x, t):
    return -exact(x, t)


def t_reversed(x, t):
    return exact(x, 1 - t)


def defect_of_linear(a, k, t):
    """That of u = a y + k, with y = x_t - (1 - t) MEAN and x0 = MEAN + S e for independent noise and e.

    In two dimensions E |y|^2 / 2 = q, E <y, noise> / 2 = t, E <y, S e> / 2 = (1 - t) S^2."""
    q = (1 - t) ** 2 * S**2 + t**2
    product = 2 * a * (a * q - t + (1 - t) * S**2) + k @ (k + MEAN)
    return (product / (2 * a**2 * q + k @ k)).item()


def linear_form(net, t):
    """a and k of u = a y + k for the four fields above."""
    if net is paired:
        return (1 - S) / ((1 - t) * S + t), -MEAN
    if net is wrong_sign:
        return -slope(t), MEAN
    if net is t_reversed:
        return slope(1 - t), (slope(1 - t) * (1 - 2 * t) - 1) * MEAN
    return slope(t), -MEAN


@pytest.mark.parametrize("t", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("net", [exact, paired, wrong_sign, t_reversed])
def test_defect_is_that_of_the_closed_form(net, t):
    torch.manual_seed(0)
    x0 = MEAN + S * torch.randn(50_000, 2)
    expected = defect_of_linear(*linear_form(net, t), t)
    value, error = fgm.defect(net, x0, t)
    assert error < 0.03
    assert abs(value - expected) < 5 * error


def test_faults_are_far_from_0():
    """With 4,000 samples. Each fault has a t at which it does not show: so look at several."""
    torch.manual_seed(0)
    x0 = MEAN + S * torch.randn(4000, 2)
    far = [(paired, 0.1, 0.342), (paired, 0.7, -0.231), (paired, 0.9, -0.244),
           (wrong_sign, 0.1, 2.0), (wrong_sign, 0.5, 2.0), (wrong_sign, 0.9, 2.0),
           (t_reversed, 0.1, 0.815), (t_reversed, 0.7, 0.157), (t_reversed, 0.9, 0.561)]
    for net, t, expected in far:
        assert defect_of_linear(*linear_form(net, t), t) == pytest.approx(expected, abs=1e-3)
        value, error = fgm.defect(net, x0, t)
        assert abs(value) > max(0.1, 15 * error), (net.__name__, t, value, error)

    for net, t in [(exact, 0.3), (t_reversed, 0.5)]:
        assert defect_of_linear(*linear_form(net, t), t) == pytest.approx(0, abs=1e-6)
    assert abs(defect_of_linear(*linear_form(paired, 0.3), 0.3)) < 0.02


def test_own_samples_of_faulty_mixtures():
    """Where the user has nothing but the teacher: samples by its own 50 steps."""
    mixture = eight_gaussians()
    fields = {"sign": lambda x, t: -mixture.velocity(x, t),
              "reversed": lambda x, t: mixture.velocity(x, (1 - t).clamp(min=1e-3))}
    torch.manual_seed(0)
    for name, net in fields.items():
        x0 = fgm.sample_ode(net, torch.randn(4000, 2), 50)
        values = [fgm.defect(net, x0, t) for t in (0.2, 0.5, 0.8, 0.95)]
        assert max(abs(value) - 10 * error for value, error in values) > 0.3, (name, values)


# ---- Wrappers: stand-ins with the calling conventions of other libraries -----------------------------------


def score(mixture, x, scale, sigma):
    """Gradient of the log density of scale x0 + sigma noise, by torch.distributions. x: [B, D], float64."""
    covs = scale**2 * mixture.axes @ torch.diag_embed(mixture.variances) @ mixture.axes.mT
    parts = MultivariateNormal(scale * mixture.means, covs + sigma**2 * torch.eye(x.shape[1]).double())
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        density = MixtureSameFamily(Categorical(mixture.weights), parts).log_prob(x)
        return torch.autograd.grad(density.sum(), x)[0]


def data_minus_noise(mixture, x, t):
    """E[x0 - noise | x_t], for x_t = t x0 + (1 - t) noise: t = 0 is noise. x: [B, D], t: [B], all alike."""
    t = t[0].item()
    at_x = score(mixture, x, t, 1 - t)
    return (x + (1 - t) ** 2 * at_x) / t + (1 - t) * at_x


class TorchCFM(nn.Module):
    """torchcfm.models.MLP."""

    def forward(self, x):
        return data_minus_noise(MIXTURE, x[:, :-1], x[:, -1])


class TorchCFMImages(nn.Module):
    """torchcfm.models.unet.UNetModelWrapper."""

    def forward(self, t, x, y=None, *args, **kwargs):
        assert y.shape == t.shape
        return data_minus_noise(MIXTURE, x, t)


class FlowMatching(nn.Module):
    """What flow_matching.solver.ODESolver calls, by names."""

    def forward(self, *, x, t, **extras):
        return data_minus_noise(MIXTURE, x, t)


class Diffusers(nn.Module):
    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        assert class_labels.shape == timestep.shape
        return wrappers.Output(-data_minus_noise(MIXTURE, sample, 1 - timestep / 1000))


class Epsilon(nn.Module):
    """The noise of the step's x, known from the score."""

    def forward(self, x, step):
        assert step.dtype == torch.int64 and (step == step[0]).all()
        a = ALPHAS_CUMPROD[step[0]]
        return -(1 - a).sqrt() * score(MIXTURE, x, a.sqrt(), (1 - a).sqrt())


MIXTURE = one_flat_component()
ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


@pytest.mark.parametrize("wrapped, cond", [
    (wrappers.FromTorchCFM(TorchCFM()), {}),
    (wrappers.FromTorchCFMImages(TorchCFMImages()), {"y": torch.arange(64)}),
    (wrappers.FromFlowMatching(FlowMatching()), {}),
    (wrappers.FromDiffusers(Diffusers()), {"class_labels": torch.arange(64)}),
], ids=["torchcfm", "torchcfm images", "flow_matching", "diffusers"])
@pytest.mark.parametrize("value", [0.1, 0.5, 0.9])
def test_a_wrapped_network_is_the_exact_velocity(wrapped, cond, value):
    torch.manual_seed(0)
    x = 2 * torch.randn(64, 2, dtype=torch.float64)
    t = fgm.constant_t(value, x)
    expected = MIXTURE.velocity(x, t)
    assert (fgm.velocity(wrapped, x, t, **cond) - expected).abs().max() < 1e-9 * expected.abs().max()


def test_a_wrapped_noise_prediction_is_the_exact_velocity_at_the_nearest_step():
    """DDPM's 1,000 steps lie at most 0.0048 apart in t, the first at 0.0099, the last at 0.9937.

    So for t between these two the step's t is at most 0.0024 off, and the velocity at most 1.5 %."""
    wrapped = wrappers.FromEpsilon(Epsilon(), wrappers.steps_of(ALPHAS_CUMPROD))
    steps = wrappers.steps_of(ALPHAS_CUMPROD)
    assert (steps[0], steps[-1]) == (pytest.approx(0.0099, abs=1e-4), pytest.approx(0.9937, abs=1e-4))
    assert (steps.diff() > 0).all() and steps.diff().max() < 0.0048

    torch.manual_seed(0)
    x0, noise = MIXTURE.sample(64).double(), torch.randn(64, 2, dtype=torch.float64)
    for value in (0.0, 0.05, 0.3, 0.5, 0.9, 0.99, 1.0):
        t = fgm.constant_t(value, x0)
        x = fgm.interpolate(x0, noise, t)
        v = fgm.velocity(wrapped, x, t)
        nearest = steps[(steps - value).abs().argmin()]
        assert abs(nearest - value) < 0.0024 or value in (0.0, 1.0)
        at_step = MIXTURE.velocity(x, nearest.expand(64))
        assert (v - at_step).abs().max() < 1e-9 * at_step.abs().max()
        if 0 < value < 1:
            at_t = MIXTURE.velocity(x, t)
            assert (v - at_t).norm() < 0.015 * at_t.norm()


def test_the_schedule_of_diffusers_is_the_one_that_is_meant():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler()
    x0, noise = torch.randn(7, 2), torch.randn(7, 2)
    step = torch.tensor([0, 5, 100, 500, 900, 998, 999])
    t = wrappers.steps_of(scheduler.alphas_cumprod)[step]
    ours = fgm.interpolate(x0.double(), noise.double(), t)
    ours = ours / (t**2 + (1 - t) ** 2).sqrt()[:, None]
    assert (ours - scheduler.add_noise(x0, noise, step)).abs().max() < 1e-5


# ---- Wrappers: diffusers' networks, and sequences ----------------------------------------------------------


def unet():
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 16), layers_per_block=1,
        norm_num_groups=8, num_class_embeds=10, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))


def dit():
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10)


class Sequences(nn.Module):
    """[B, 1, L], with t as a second channel."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(2, 8, 3, padding=1), nn.SiLU(), nn.Conv1d(8, 1, 3, padding=1))

    def forward(self, x, t):
        return self.layers(torch.cat([x, t.view(-1, 1, 1).expand_as(x)], 1))


def class_labels(seeds):
    return {"class_labels": seeds % 10}


@pytest.mark.parametrize("make", [unet, dit])
def test_a_wrapped_network_of_diffusers_is_its_direct_call(make):
    torch.manual_seed(0)
    net = make().eval()
    x, t, labels = torch.randn(5, 1, 8, 8), torch.linspace(0, 1, 5), torch.arange(5)
    direct = net(x, torch.tensor([0.0, 250, 500, 750, 1000]), class_labels=labels).sample
    assert direct.std() > 0.01
    assert torch.equal(fgm.velocity(wrappers.FromDiffusers(net), x, t, class_labels=labels), direct)


@pytest.mark.parametrize("make, shape, conditions", [
    (lambda: wrappers.FromDiffusers(unet()), (1, 8, 8), class_labels),
    (lambda: wrappers.FromDiffusers(dit()), (1, 8, 8), class_labels),
    (Sequences, (1, 16), None),
], ids=["unet", "dit", "sequences"])
def test_such_networks_are_distilled(make, shape, conditions):
    """A step moves the weights of generator and flow, not the teacher's, and leaves all finite."""
    torch.manual_seed(0)
    teacher = make()
    flow, before = copy.deepcopy(teacher), copy.deepcopy(teacher)
    generator = fgm.OneStepGenerator(copy.deepcopy(teacher), t_star=0.8)
    fgm.distill(teacher, generator, flow, shape, steps=2, batch=4, lr=1e-3, ema_decay=None,
                conditions=conditions)

    change = {}
    for name, net in {"teacher": teacher, "flow": flow, "generator": generator.net}.items():
        pairs = list(zip(net.parameters(), before.parameters(), strict=True))
        assert all(p.isfinite().all() for p, _ in pairs)
        change[name] = max((p - q).abs().max().item() for p, q in pairs)
    assert change["teacher"] == 0
    assert 5e-4 < change["flow"] < 5e-3 and 5e-4 < change["generator"] < 5e-3  # two steps of Adam at 1e-3

    x0 = generator(torch.randn(3, *shape), **(conditions(torch.arange(3)) if conditions else {}))
    assert x0.shape == (3, *shape) and x0.isfinite().all()


def test_the_file_of_wrappers_runs(capsys):
    wrappers.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["defect", "at", "t", "=", "0.2", "0.5", "0.8", "0.95"]
    defects = {line[:25].strip(): [float(number) for number in line[25:].split()] for line in lines[1:]}
    assert len(defects) == 6
    for name, values in defects.items():
        if "wrapped" in name:
            assert max(map(abs, values)) < 0.05, name
        else:
            assert max(map(abs, values)) > 0.5, name
