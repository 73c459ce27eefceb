"""Means over the path's noise without sampling: Gauss-Hermite nodes, and the exact velocity of a few samples.

Where the generator's z takes K fixed values with equal weight, its path at t is exactly the mixture of K
Gaussians with means (1 - t) x0_k and covariance t^2 I. So the velocity v_t that it induces is known in closed
form, with gradients through the means. What remains is an integral over the noise; the nodes take it to
machine precision. The tests of the theorems and section 4 of toy2d.ipynb rest on this."""

import numpy as np
import torch

from points.data import GaussianMixture


def noise_nodes(n=100):
    """Gauss-Hermite nodes and weights of a standard normal in the plane, float64: [n*n, 2], [n*n]."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    x, w = torch.from_numpy(x), torch.from_numpy(w / w.sum())
    return torch.cartesian_prod(x, x), torch.cartesian_prod(w, w).prod(1)


def with_every_noise(samples, t):
    """All pairs of K samples [K, 2] and N nodes, at one t: (samples, noise, weights, times), [K*N, ...] each.

    The sum of weights * values is the mean of values over samples and noise."""
    noise, weights = noise_nodes()
    k, n = len(samples), len(noise)
    times = torch.full((k * n,), t, dtype=torch.float64)
    return samples.repeat_interleave(n, 0), noise.repeat(k, 1), weights.repeat(k) / k, times


def induced_velocity(x0):
    """The exact velocity v_t (3.2) of the path of the samples x0 [K, D], equally likely: net(x, t) -> v."""
    k, d = x0.shape
    return GaussianMixture(torch.ones(k), x0, torch.zeros(k, d, d)).velocity
