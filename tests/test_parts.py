"""Path, generator, sampler, guidance, mixture, distance: conventions and closed forms."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fgm


def gaussian(mean, std):
    return fgm.GaussianMixture([1.0], [[mean, -mean]], std**2 * torch.eye(2)[None]).velocity


def test_path_at_both_ends():
    x0, noise = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.equal(fgm.interpolate(x0, noise, torch.zeros(4)), x0)
    assert torch.equal(fgm.interpolate(x0, noise, torch.ones(4)), noise)
    error = torch.tensor([3.0, 4.0, 0.0])
    loss = fgm.reflow_loss(lambda x, t: noise - x0 + error, x0, noise, torch.rand(4))
    torch.testing.assert_close(loss, torch.full((4,), 25.0))


def test_generator_is_b1():
    generator = fgm.OneStepGenerator(lambda x, t: x * per(t) + 1, 0.97, c_in=0.8)
    z = torch.randn(5, 2)
    torch.testing.assert_close(generator(z), z - 0.97 * (0.8 * z * 0.97 + 1))
    assert generator.coefficients() == {"t_star": 0.97, "c_in": 0.8, "c_skip": 1.0, "c_out": 0.97}


def per(t):
    return t[:, None]


def test_generator_starts_near_the_data():
    """At t_star = 1 a point mass at m is hit exactly: v = noise - m (the sign of B.1, not of 5.1)."""
    v = fgm.GaussianMixture([1.0], [[2.0, -3.0]], torch.zeros(1, 2, 2)).velocity
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
    torch.testing.assert_close(fgm.guided(net, 4.0, null)(x, t, c=c), x * (0.5 + 4 * (c - 0.5)))
    torch.testing.assert_close(fgm.guided(net, 1.0, null)(x, t, c=c), x * c)
    with pytest.raises(ValueError, match="guidance replaces"):
        fgm.guided(net, 4.0, null)(x, t)


def mixture():
    covs = [[[0.5, 0.2], [0.2, 0.3]], [[0.1, 0.0], [0.0, 0.0]]]
    return fgm.GaussianMixture([1.0, 3.0], [[1.0, 0.0], [-1.0, 2.0]], covs), torch.tensor(covs, dtype=torch.float64)


@pytest.mark.parametrize("t", [0.05, 0.5, 1.0])
def test_mixture_velocity_from_the_score(t):
    """v = -(x + t score) / (1 - t) for t < 1, and at t = 1 v = x - E[x0]; the density by torch.distributions, its score by autograd."""
    target, covs = mixture()
    x = torch.randn(32, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    times = torch.full((32,), t, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal((1 - t) * target.means, (1 - t) ** 2 * covs + t**2 * torch.eye(2, dtype=torch.float64))
    density = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(target.weights), normal)
    score = torch.autograd.grad(density.log_prob(x).sum(), x)[0]
    expected = x - target.weights @ target.means if t == 1 else -(x + t * score) / (1 - t)
    torch.testing.assert_close(target.velocity(x, times), expected, rtol=1e-9, atol=1e-9)


def test_mixture_far_away_and_near_zero():
    target, _ = mixture()
    x = torch.tensor([[1e6, -1e6], [0.3, 0.1]])
    for t in (1e-6, 1e-3, 1.0):
        times = torch.full((2,), t)
        v32, v64 = target.velocity(x, times), target.velocity(x.double(), times.double())
        assert v32.dtype == torch.float32 and v64.isfinite().all()
        torch.testing.assert_close(v32.double(), v64, rtol=1e-5, atol=1e-5)


def test_mixture_samples():
    target, covs = mixture()
    x = target.sample(200_000, torch.Generator().manual_seed(0)).double()
    mean = target.weights @ target.means
    spread = target.means - mean
    cov = (target.weights[:, None, None] * (covs + spread[:, :, None] * spread[:, None])).sum(0)
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.015)
    torch.testing.assert_close(torch.cov(x.T), cov, rtol=0, atol=0.02)


def test_energy_distance_against_the_definition():
    x, y = fgm.toy_data("moons", 900, 1).double(), 1.2 * fgm.toy_data("rings", 800, 2).double()
    xy, xx, yy = torch.cdist(x, y), torch.cdist(x, x), torch.cdist(y, y)
    direct = 2 * xy.mean() - xx.sum() / (900 * 899) - yy.sum() / (800 * 799)
    assert fgm.energy_distance(x, y) == pytest.approx(direct.item(), rel=5e-3)
    assert abs(fgm.energy_distance(fgm.toy_data("moons", 20_000, 1), fgm.toy_data("moons", 20_000, 2))) < 5e-4


@pytest.mark.parametrize("name", fgm.DATA)
def test_data_sets_are_about_unit(name):
    x = fgm.toy_data(name, 50_000)
    assert x.mean(0).abs().max() < 0.4 and 0.5 < x.std() < 1.5


def test_draws_do_not_depend_on_micro_batches_and_differ_by_step():
    a, b, c = (fgm.Draws(8, "cpu", 0, 1, step) for step in (5, 5, 6))
    first = a.normal((3,))
    assert torch.equal(first, b.normal((3,))) and not torch.equal(first, c.normal((3,)))
    assert torch.equal(a.seeds(), b.seeds())


X, T = torch.zeros(4, 2), torch.full((4,), 0.5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fgm.interpolate(X, X, T + 1), "t must lie in"),
        (lambda: fgm.interpolate(X, X, T * math.nan), "t must lie in"),
        (lambda: fgm.interpolate(X, X, T[:, None]), r"t must have shape \[4\]"),
        (lambda: fgm.reflow_loss(gaussian(0, 1), X, X[:, :1], T), r"\[4, 2\] and \[4, 1\]"),
        (lambda: fgm.reflow_loss(lambda x, t: x[:, :1], X, X, T), r"got \[4, 1\]"),
        (lambda: fgm.fgm_losses(lambda x, t: x[:1], lambda x, t: x, X, X, T), r"got \[1, 2\]"),
        (lambda: fgm.OneStepGenerator(torch.nn.Identity(), 0.0), "t_star"),
        (lambda: fgm.OneStepGenerator(torch.nn.Identity(), 1.5), "t_star"),
        (lambda: fgm.sample_ode(gaussian(0, 1), X, 0), "steps"),
        (lambda: fgm.sample_ode(gaussian(0, 1), X, 5, "rk4"), "solver"),
        (lambda: fgm.GaussianMixture([-1.0, 2.0], torch.zeros(2, 2), torch.zeros(2, 2, 2)), "weights"),
        (lambda: fgm.GaussianMixture([0.0, 0.0], torch.zeros(2, 2), torch.zeros(2, 2, 2)), "weights"),
        (lambda: fgm.GaussianMixture([1.0], torch.zeros(1, 2), -torch.eye(2)[None]), "semi-definite"),
        (lambda: fgm.GaussianMixture([1.0], torch.zeros(1, 2), torch.tensor([[[1.0, 0.5], [0.0, 1.0]]])), "symmetric"),
        (lambda: fgm.GaussianMixture([1.0], torch.zeros(1, 2), torch.zeros(1, 3, 3)), "shapes"),
        (lambda: gaussian(0, 1)(X, 0 * T), r"\(0, 1\]"),
        (lambda: fgm.toy_data("circles", 10), "unknown data set"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_noise_of_a_seed_is_its_own():
    """Alone, in company, and for seeds that differ only above 32 bits."""
    seeds = torch.tensor([5, 6, 5 + 2**32, 2**62])
    noise = fgm.noise_from(seeds, (4, 500), "cpu")
    assert torch.equal(noise[1:2], fgm.noise_from(seeds[1:2], (4, 500), "cpu"))
    correlation = torch.corrcoef(noise.flatten(1)) - torch.eye(4)
    assert correlation.abs().max() < 0.1 and abs(noise.std().item() - 1) < 0.05


def test_frechet_distance_of_known_gaussians():
    n = torch.randn(200_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = n @ torch.tensor([[1.0, 0.5], [0.0, 1.0]]).double(), 1 + 2 * n
    root = torch.linalg.svdvals(torch.tensor([[1.0, 0.5], [0.0, 1.0]]).double()).sum()  # tr (A^T A)^(1/2)
    expected = 2 + (2 + 0.25) + 8 - 2 * 2 * root.item()
    assert fgm.frechet_distance(a, b) == pytest.approx(expected, rel=0.01) and fgm.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_grid_places_images_row_by_row(tmp_path):
    from PIL import Image

    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 2, 2) * 50
    fgm.save_grid(tmp_path / "grid.png", images, columns=2, least=4)
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "grid.png").convert("L"))).long()
    expected = torch.tensor([[0, 50], [100, 0]]).repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(pixels, expected)


def test_import_is_light():
    code = "import sys, fgm; print(sorted({'diffusers', 'transformers', 'sklearn', 'matplotlib', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(fgm.__file__).parent, capture_output=True, text=True, check=True).stdout.strip() == "[]"
