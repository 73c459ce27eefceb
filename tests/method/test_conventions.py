"""fgm.py: path, generator, sampler, guidance, settings, draws, mixture: conventions and closed forms."""

import math

import pytest
import torch

import fgm
from points.data import GaussianMixture


def gaussian(mean, std):
    return GaussianMixture([1.0], [[mean, -mean]], std**2 * torch.eye(2)[None]).velocity


def test_path_at_both_ends():
    x0, noise = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.equal(fgm.interpolate(x0, noise, torch.zeros(4)), x0)
    assert torch.equal(fgm.interpolate(x0, noise, torch.ones(4)), noise)
    error = torch.tensor([3.0, 4.0, 0.0])
    loss = fgm.reflow_loss(lambda x, t: noise - x0 + error, x0, noise, torch.rand(4))
    torch.testing.assert_close(loss, torch.full((4,), 25.0))


def test_generator_is_b1():
    generator = fgm.OneStepGenerator(lambda x, t: x * t[:, None] + 1, 0.97, c_in=0.8)
    z = torch.randn(5, 2)
    torch.testing.assert_close(generator(z), z - 0.97 * (0.8 * z * 0.97 + 1))
    assert generator.coefficients() == {"t_star": 0.97, "c_in": 0.8, "c_skip": 1.0, "c_out": 0.97}


def test_generator_starts_near_the_data():
    """At t_star = 1 a point mass at m is hit exactly: v = noise - m (the sign of B.1, not of 5.1)."""
    v = GaussianMixture([1.0], [[2.0, -3.0]], torch.zeros(1, 2, 2)).velocity
    x0 = fgm.OneStepGenerator(v, 1.0)(torch.randn(6, 2))
    torch.testing.assert_close(x0, torch.tensor([[2.0, -3.0]]).expand(6, 2))


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver, order):
    """For N(m, s^2) the ODE's solution is x0 = m + s noise in closed form."""
    noise = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = torch.tensor([1.5, -1.5]) + 0.5 * noise
    errors = [(fgm.sample_ode(gaussian(1.5, 0.5), noise, k, solver) - exact).norm() for k in (64, 128)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_guidance():
    def net(x, t, c):
        return x * c

    x, t, c = torch.randn(4, 2), torch.rand(4), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    null = {"c": torch.tensor([[0.5]])}
    torch.testing.assert_close(fgm.Guided(net, 4.0, null)(x, t, c=c), x * (0.5 + 4 * (c - 0.5)))
    torch.testing.assert_close(fgm.Guided(net, 1.0, null)(x, t, c=c), x * c)
    with pytest.raises(ValueError, match=r"guidance replaces the tensors \['c'\], the call lacks \['c'\]"):
        fgm.Guided(net, 4.0, {"c": 0.5})(x, t, c=2.0)  # not a tensor: it would not be replaced


@pytest.mark.parametrize("t", [0.05, 0.5, 1.0])
def test_mixture_velocity_from_the_score(t):
    """v = -(x + t score) / (1 - t) for t < 1, and at t = 1 v = x - E[x0].

    The density is that of torch.distributions, its score by autograd."""
    covs = torch.tensor([[[0.5, 0.2], [0.2, 0.3]], [[0.1, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    target = GaussianMixture([1.0, 3.0], [[1.0, 0.0], [-1.0, 2.0]], covs)
    x = torch.randn(32, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    times = torch.full((32,), t, dtype=torch.float64)
    noised = (1 - t) ** 2 * covs + t**2 * torch.eye(2, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal((1 - t) * target.means, noised)
    density = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(target.weights), normal)
    score = torch.autograd.grad(density.log_prob(x).sum(), x)[0]
    expected = x - target.weights @ target.means if t == 1 else -(x + t * score) / (1 - t)
    torch.testing.assert_close(target.velocity(x, times), expected, rtol=1e-9, atol=1e-9)


def test_draws_do_not_depend_on_micro_batches_and_differ_by_step():
    a, b, c = (fgm.Draws(8, "cpu", 0, 1, step) for step in (5, 5, 6))
    first = a.normal((3,))
    assert torch.equal(first, b.normal((3,))) and not torch.equal(first, c.normal((3,)))
    assert torch.equal(a.seeds(), b.seeds())


X, T = torch.zeros(4, 2), torch.full((4,), 0.5)
LEANING = torch.tensor([[[1.0, 0.5], [0.0, 1.0]]])


def column(t, u, c):
    return t[:, None]


@pytest.mark.parametrize("call, message", [
    (lambda: fgm.interpolate(X, X, T * math.nan), "t must lie in"),
    (lambda: fgm.interpolate(X, X, T[:, None]), r"t must have shape \[4\]"),
    (lambda: fgm.reflow_loss(gaussian(0, 1), X, X[:, :1], T), r"\[4, 2\] and \[4, 1\]"),
    (lambda: fgm.fgm_losses(gaussian(0, 1), gaussian(1, 1), X, X, T, weight=column),
     r"weight must return \[4\], one value per sample, got \[4, 1\]"),
    (lambda: fgm.OneStepGenerator(torch.nn.Identity(), 0.0), "t_star"),
    (lambda: fgm.sample_ode(gaussian(0, 1), X, 0), "steps"),
    (lambda: fgm.sample_ode(gaussian(0, 1), X, 5, "rk4"), "solver"),
    (lambda: GaussianMixture([-1.0, 2.0], torch.zeros(2, 2), torch.zeros(2, 2, 2)), "weights"),
    (lambda: GaussianMixture([1.0], torch.zeros(1, 2), -torch.eye(2)[None]), "semi-definite"),
    (lambda: GaussianMixture([1.0], torch.zeros(1, 2), LEANING), "symmetric"),
    (lambda: GaussianMixture([1.0], torch.zeros(1, 2), torch.zeros(1, 3, 3)), "shapes"),
    (lambda: gaussian(0, 1)(X, 0 * T), r"\(0, 1\]"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
