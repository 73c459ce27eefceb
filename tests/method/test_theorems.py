"""The Flow Product Identity (4.7) and Theorem 4.2, to machine precision.

z takes K fixed codes with equal weight, so for any generator g the induced path p_t is exactly the Gaussian
mixture with means (1 - t) g(z_k) and covariance t^2 I, and its velocity v is known in closed form, with
gradients. The path noise is integrated by tensor Gauss-Hermite nodes."""

import pytest
import torch

import fgm
from points.data import GaussianMixture
from points.quadrature import induced_velocity, with_every_noise
from toy2d import VelocityMLP

K, D = 5, 2


def make_generator(seed, width=16):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(D, width), torch.nn.Tanh(), torch.nn.Linear(width, D)).double()


def make_target(seed):
    random = torch.Generator().manual_seed(seed)
    roots = 0.5 * torch.randn(3, D, D, generator=random, dtype=torch.float64)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    means = 1.5 * torch.randn(3, D, generator=random, dtype=torch.float64)
    return GaussianMixture(weights, means, roots @ roots.mT + 0.05 * torch.eye(D))


def fixed_samples():
    """The samples x0 [K, D] of a generator, as a constant."""
    torch.manual_seed(3)
    return make_generator(0)(torch.randn(K, D, dtype=torch.float64)).detach()


def relative_error(generator, target, t, losses):
    """|| true gradient of (4.1) - gradient of losses || / || true ||."""
    torch.manual_seed(7)
    codes = torch.randn(K, D, dtype=torch.float64)
    codes_, noise_, weights, times = with_every_noise(codes, t)
    parameters = list(generator.parameters())

    xt = fgm.interpolate(generator(codes_), noise_, times)
    gap = target.velocity(xt, times) - induced_velocity(generator(codes))(xt, times)
    true = torch.autograd.grad((weights * fgm.dot(gap, gap)).sum(), parameters)

    online = induced_velocity(generator(codes).detach())
    found = losses(target.velocity, online, generator(codes_), noise_, times)
    ours = torch.autograd.grad((weights * found).sum(), parameters)
    flat = [torch.cat([g.flatten() for g in grads]) for grads in (true, ours)]
    return ((flat[0] - flat[1]).norm() / flat[0].norm()).item()


@pytest.mark.parametrize("t", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("seed", [0, 1])
def test_theorem_4_2(seed, t):
    generator, target = make_generator(seed), make_target(seed + 10)
    assert relative_error(generator, target, t, lambda *a: sum(fgm.fgm_losses(*a))) < 1e-10


def wrong_sign(teacher, flow, x0, noise, t):
    l1, l2 = fgm.fgm_losses(teacher, flow, x0, noise, t)
    return l1 - l2


def wrong_factor(teacher, flow, x0, noise, t):
    l1, l2 = fgm.fgm_losses(teacher, flow, x0, noise, t)
    return l1 + l2 / 2


def detached_target(teacher, flow, x0, noise, t):
    xt = fgm.interpolate(x0, noise, t)
    gap = teacher(xt, t) - flow(xt, t)
    return fgm.dot(gap, gap) + 2 * fgm.dot(gap, flow(xt, t) - (noise - x0.detach()))


def detached_input(teacher, flow, x0, noise, t):
    xt = fgm.interpolate(x0.detach(), noise, t)
    gap = teacher(xt, t) - flow(xt, t)
    return fgm.dot(gap, gap) + 2 * fgm.dot(gap, flow(xt, t) - (noise - x0))


@pytest.mark.parametrize("mutant", [wrong_sign, wrong_factor, detached_target, detached_input])
def test_a_wrong_loss_is_noticed(mutant):
    assert relative_error(make_generator(0), make_target(10), 0.5, mutant) > 1e-2


def four_lines(teacher, flow, x0, noise, t):
    """R_u - R_v, the functional that the head of fgm.py states."""
    return fgm.reflow_loss(teacher, x0, noise, t) - fgm.reflow_loss(flow, x0, noise, t)


def players_swapped(teacher, flow, x0, noise, t):
    return four_lines(flow, teacher, x0, noise, t)


@pytest.mark.parametrize("t", [0.3, 0.9])
def test_theorem_4_2_is_the_envelope_theorem_of_the_functional(t):
    """At the best v, the gradient of E[R_u - R_v] with v held fixed is that of (4.1)."""
    assert relative_error(make_generator(0), make_target(10), t, four_lines) < 1e-10
    assert relative_error(make_generator(0), make_target(10), t, players_swapped) > 1


def random_pairs(n=256):
    """x0, noise: [n, 2], t: [n]."""
    torch.manual_seed(0)
    x0, noise = torch.randn(n, D, dtype=torch.float64), torch.randn(n, D, dtype=torch.float64)
    return x0, noise, 0.05 + 0.9 * torch.rand(n, dtype=torch.float64)


def test_l1_plus_l2_is_one_functional():
    """L1 + L2 = R_u - R_v (4.10) for any u and v: per sample, and in the gradient at x0."""
    x0, noise, t = random_pairs()
    x0.requires_grad_()
    teacher, flow = make_target(1).velocity, make_target(2).velocity
    fgm_loss = sum(fgm.fgm_losses(teacher, flow, x0, noise, t))
    functional = four_lines(teacher, flow, x0, noise, t)
    torch.testing.assert_close(fgm_loss, functional, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(loss.sum(), x0)[0] for loss in (fgm_loss, functional)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    assert gradients[0].norm() > 1


@pytest.mark.parametrize("t", [0.3, 0.6, 0.9])
def test_the_functional_is_below_4_1_and_equal_at_its_maximum(t):
    """E[R_u - R_v] is (4.1) at v = v_t, and less by E || v - v_t ||^2 for any other v (Pythagoras)."""
    x0, target = fixed_samples(), make_target(10)
    x0_, noise_, weights, times = with_every_noise(x0, t)
    xt, best = fgm.interpolate(x0_, noise_, times), induced_velocity(x0)

    def mean_square(first, second):
        gap = first(xt, times) - second(xt, times)
        return (weights * fgm.dot(gap, gap)).sum()

    def functional(flow):
        return (weights * four_lines(target.velocity, flow, x0_, noise_, times)).sum()

    distance = mean_square(target.velocity, best)
    torch.testing.assert_close(functional(best), distance, rtol=1e-9, atol=0)
    shifted = GaussianMixture(torch.ones(K), x0 + 0.1, torch.zeros(K, D, D)).velocity
    for other in (make_target(2).velocity, target.velocity, shifted):
        lag = mean_square(best, other)
        assert lag > 1e-3
        torch.testing.assert_close(functional(other), distance - lag, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("moved", [0.0, 0.5, 1.0, -0.5])
def test_where_l1_lies_beside_the_functional(moved):
    """The mean of L1 - (R_u - R_v) is 2 E<v - v_t, v - u>: 0 at v_t and at u, below 0 between them."""
    x0, u = fixed_samples(), make_target(10).velocity
    x0_, noise_, weights, times = with_every_noise(x0, 0.5)

    def flow(x, t):
        return (1 - moved) * induced_velocity(x0)(x, t) + moved * u(x, t)

    l1, _ = fgm.fgm_losses(u, flow, x0_, noise_, times)
    gap = (weights * (l1 - four_lines(u, flow, x0_, noise_, times))).sum()
    xt = fgm.interpolate(x0_, noise_, times)
    v, best, teacher = flow(xt, times), induced_velocity(x0)(xt, times), u(xt, times)
    expected = 2 * (weights * fgm.dot(v - best, v - teacher)).sum()
    torch.testing.assert_close(gap, expected, rtol=1e-9, atol=1e-9)
    distance = (weights * fgm.dot(teacher - best, teacher - best)).sum()
    torch.testing.assert_close(gap, 2 * moved * (moved - 1) * distance, rtol=1e-9, atol=1e-9)
    assert distance > 0.1


@pytest.mark.parametrize("t", [0.3, 0.6, 0.9])
def test_flow_product_identity(t):
    """E f(x_t) . v(x_t) = E f(x_t) . (noise - x0) (4.7), for f = a mixture's velocity, nonlinear in x_t."""
    x0, f = fixed_samples(), make_target(10).velocity
    x0_, noise_, weights, times = with_every_noise(x0, t)
    xt = fgm.interpolate(x0_, noise_, times)
    left = (weights * fgm.dot(f(xt, times), induced_velocity(x0)(xt, times))).sum()
    right = (weights * fgm.dot(f(xt, times), noise_ - x0_)).sum()
    assert abs(left - right) < 1e-11 * abs(left)


def test_identity_needs_fresh_noise():
    """With z itself as path noise, x0 and noise are dependent and (4.7) fails: the sums differ widely."""
    torch.manual_seed(3)
    z = torch.randn(200_000, D, dtype=torch.float64)
    x0, f, t = 0.8 * z, make_target(4).velocity, torch.full((len(z),), 0.5, dtype=torch.float64)
    exact = GaussianMixture(torch.ones(1), torch.zeros(1, D), 0.64 * torch.eye(D)[None])  # of x0
    v = exact.velocity

    def gap(noise):
        xt = fgm.interpolate(x0, noise, t)
        difference = fgm.dot(f(xt, t), v(xt, t) - (noise - x0))
        return abs(difference.mean()) / (difference.std() / len(z) ** 0.5)

    assert gap(torch.randn_like(z)) < 5
    assert gap(z) > 20


def test_sid_identity():
    """2 <u - v, (u - c) - alpha (u - v)> = L2 + (2 - 2 alpha) L1 (SiD, arXiv 2404.04057)."""
    x0, noise, t = random_pairs()
    teacher, flow = make_target(1).velocity, make_target(2).velocity
    l1, l2 = fgm.fgm_losses(teacher, flow, x0, noise, t)
    xt = fgm.interpolate(x0, noise, t)
    u, v, c = teacher(xt, t), flow(xt, t), noise - x0
    for alpha in (0.5, 1.0, 1.2):
        sid = 2 * fgm.dot(u - v, (u - c) - alpha * (u - v))
        torch.testing.assert_close(sid, l2 + (2 - 2 * alpha) * l1, rtol=1e-12, atol=1e-12)


def test_no_gradient_reaches_teacher_or_flow():
    teacher, flow = VelocityMLP(), VelocityMLP()
    x0 = torch.randn(8, 2, requires_grad=True)
    l1, l2 = fgm.fgm_losses(teacher, flow, x0, torch.randn(8, 2), torch.rand(8))
    (l1 + l2).sum().backward()
    assert x0.grad.norm() > 0
    assert all(p.grad is None and p.requires_grad for net in (teacher, flow) for p in net.parameters())
