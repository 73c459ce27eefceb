"""Teachers: fgm.defect tells which network is one; the wrappers of examples/ make one of other libraries'."""

import copy

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import fgm
from examples import wrappers
from points.data import GaussianMixture

MIXTURE = GaussianMixture(  # its second component is flat
    [1.0, 3.0], [[1.0, 0.0], [-1.0, 2.0]], [[[0.5, 0.2], [0.2, 0.3]], [[0.1, 0.0], [0.0, 0.0]]])


# ---- The defect: 0 for a velocity --------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.05, 0.5, 1.0, torch.linspace(0.01, 1, 20_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_defect_of_the_exact_velocity_is_0(dtype, t):
    """At every t, and for a t [B] that varies."""
    torch.manual_seed(0)
    value, error = fgm.defect(MIXTURE.velocity, MIXTURE.sample(20_000).to(dtype), t)
    assert 0 < error < 0.2
    assert abs(value) < 5 * error


def test_standard_error_is_the_spread_over_repeats():
    """Of a wrong sign's defect: E <-u - c, -u> = 2 E |u|^2, by (4.7)."""
    torch.manual_seed(0)
    repeats = [fgm.defect(lambda x, t: -MIXTURE.velocity(x, t), MIXTURE.sample(500), 0.2) for _ in range(400)]
    values, errors = torch.tensor(repeats).T
    assert 0.85 < errors.mean() / values.std() < 1.15  # the spread of 400 repeats is known to 3.5 %
    assert abs(values.mean() - 2) < 5 * values.std() / 20


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


@pytest.mark.parametrize("t", [0.1, 0.9])
@pytest.mark.parametrize("net, linear_form", [
    (paired, lambda t: ((1 - S) / ((1 - t) * S + t), -MEAN)),  # a and k of u = a y + k
    (wrong_sign, lambda t: (-slope(t), MEAN)),
    (t_reversed, lambda t: (slope(1 - t), (slope(1 - t) * (1 - 2 * t) - 1) * MEAN)),
], ids=["paired", "wrong sign", "t reversed"])
def test_defect_of_a_fault_is_that_of_the_closed_form(net, linear_form, t):
    """Which is far from 0 at these t; each fault has others at which it does not show."""
    torch.manual_seed(0)
    value, error = fgm.defect(net, MEAN + S * torch.randn(50_000, 2), t)
    assert error < 0.03
    assert abs(value - defect_of_linear(*linear_form(t), t)) < 5 * error
    assert abs(value) > max(0.1, 15 * error)


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


ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
STEPS = wrappers.steps_of(ALPHAS_CUMPROD)


def torchcfm_images(t, x, y):
    """torchcfm.models.unet.UNetModelWrapper."""
    assert y.shape == t.shape
    return data_minus_noise(MIXTURE, x, t)


def flow_matching(*, x, t):
    """What flow_matching.solver.ODESolver calls, by names."""
    return data_minus_noise(MIXTURE, x, t)


def diffusers_network(sample, timestep, class_labels):
    assert class_labels.shape == timestep.shape
    return wrappers.Output(-data_minus_noise(MIXTURE, sample, 1 - timestep / 1000))


def epsilon(x, step):
    """The noise of the step's x, known from the score."""
    assert step.dtype == torch.int64 and (step == step[0]).all()
    a = ALPHAS_CUMPROD[step[0]]
    return -(1 - a).sqrt() * score(MIXTURE, x, a.sqrt(), (1 - a).sqrt())


@pytest.mark.parametrize("wrapped, cond", [
    (wrappers.FromTorchCFM(lambda xt: data_minus_noise(MIXTURE, xt[:, :-1], xt[:, -1])), {}),
    (wrappers.FromTorchCFMImages(torchcfm_images), {"y": torch.arange(64)}),
    (wrappers.FromFlowMatching(flow_matching), {}),
    (wrappers.FromDiffusers(diffusers_network), {"class_labels": torch.arange(64)}),
    (wrappers.FromEpsilon(epsilon, STEPS), {}),
], ids=["torchcfm", "torchcfm images", "flow_matching", "diffusers", "epsilon"])
@pytest.mark.parametrize("value", [0.1, 0.5, 0.9])
def test_a_wrapped_network_is_the_exact_velocity(wrapped, cond, value):
    """Of a noise prediction it is that at the nearest of its steps, which lie at most 0.0048 apart in t."""
    torch.manual_seed(0)
    x = 2 * torch.randn(64, 2, dtype=torch.float64)
    t = fgm.constant_t(value, x)
    v = fgm.velocity(wrapped, x, t, **cond)

    if wrapped.steps is not None:
        t = STEPS[(STEPS - value).abs().argmin()].expand(64)
        assert abs(t[0] - value) < 0.0024
    expected = MIXTURE.velocity(x, t)
    assert (v - expected).abs().max() < 1e-9 * expected.abs().max()


# ---- Wrappers: diffusers' networks -------------------------------------------------------------------------


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


@pytest.mark.parametrize("make", [unet, dit])
def test_a_wrapped_network_of_diffusers(make):
    """It is the direct call, and can be distilled."""
    torch.manual_seed(0)
    net = make().eval()
    x, t, labels = torch.randn(5, 1, 8, 8), torch.linspace(0, 1, 5), torch.arange(5)
    direct = net(x, torch.tensor([0.0, 250, 500, 750, 1000]), class_labels=labels).sample
    assert direct.std() > 0.01
    teacher = wrappers.FromDiffusers(net)
    assert torch.equal(fgm.velocity(teacher, x, t, class_labels=labels), direct)

    flow, generator = copy.deepcopy(teacher), fgm.OneStepGenerator(copy.deepcopy(teacher), t_star=0.8)
    fgm.distill(teacher, generator, flow, (1, 8, 8), steps=2, batch=4, lr=1e-3, ema_decay=None,
                conditions=lambda seeds: {"class_labels": seeds % 10})
    for moved in (flow, generator.net):  # by two steps of Adam
        pairs = zip(moved.parameters(), teacher.parameters(), strict=True)
        assert 5e-4 < max((p - q).abs().max() for p, q in pairs) < 5e-3
