"""Data in the plane: five sets of samples, and Gaussian mixtures, whose flow is known in closed form."""

import math

import numpy as np
import torch

from fgm import InputError

# ---- The five sets -----------------------------------------------------------------------------------------

DATA = ("8gaussians", "checkerboard", "moons", "spiral", "rings")


def toy_data(name, n, seed=0):
    """n samples of a 2-D data set of about unit variance, [n, 2] float32. Raises InputError for others."""
    random = np.random.default_rng([seed, n])
    angle, radius, noise = random.uniform(0, 1, n), random.uniform(0, 1, n), random.normal(size=(n, 2))
    which = random.integers(24, size=n)
    if name == "8gaussians":
        turn, length, spread = which % 8 / 8, 1.5, 0.1
    elif name == "spiral":
        length = (1 + 3 * np.sqrt(angle)) / 2
        turn, length, spread = length, length * 0.9, 0.07
    elif name == "rings":
        turn, length, spread = angle, 0.6 * (1 + which % 3), 0.05
    elif name == "moons":
        x = np.stack([np.cos(math.pi * angle) - 0.5, np.sin(math.pi * angle) - 0.25], 1)
        x[which % 2 == 1] *= -1
        return torch.from_numpy(1.3 * x + 0.07 * noise).float()
    elif name == "checkerboard":
        column = which % 4
        row = 2 * (which // 4 % 2) + column % 2
        return torch.from_numpy(0.9 * np.stack([column + angle - 2, row + radius - 2], 1)).float()
    else:
        raise InputError(f"unknown data set {name!r}; there are {', '.join(DATA)}")
    x = np.stack([length * np.cos(2 * math.pi * turn), length * np.sin(2 * math.pi * turn)], 1)
    return torch.from_numpy(x + spread * noise).float()


# ---- The exact flow of a Gaussian mixture ------------------------------------------------------------------


class GaussianMixture:
    """Data distributed as sum_k weights[k] N(means[k], covs[k]): its marginal velocity (3.2) in closed form.

    weights: [K], normalised here. means: [K, D]; gradients flow through them. covs: [K, D, D], zero (a point
    mass) allowed. Raises InputError for other shapes, negative weights or weights that sum to zero,
    covariances that are not symmetric positive semi-definite."""

    def __init__(self, weights, means, covs):
        weights, means, covs = (torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, covs))
        shape = means.shape
        if means.dim() != 2 or weights.shape != shape[:1] or covs.shape != (*shape, shape[1]):
            raise InputError("weights, means, covs must have shapes [K], [K, D], [K, D, D]")
        if not (weights >= 0).all() or not 0 < weights.sum() < math.inf:
            raise InputError(f"weights must be non-negative, with a finite sum > 0, got {weights.tolist()}")
        self.weights, self.means = weights / weights.sum(), means
        slack = 1e-6 * covs.abs().amax().clamp(min=1e-12)
        symmetric = (covs - covs.mT).abs().amax() <= slack < math.inf
        if symmetric:
            values, self.axes = torch.linalg.eigh(covs)  # [K, D], [K, D, D]: covs = axes diag(values) axes^T
        if not symmetric or values.min() < -slack:
            raise InputError(f"covs must be symmetric positive semi-definite, got {covs.tolist()}")
        self.variances = values.clamp(min=0)

    def sample(self, n, generator=None):
        """n samples, [n, D] float32."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        shape = n, self.means.shape[1]
        e = torch.randn(shape, dtype=torch.float64, device=self.means.device, generator=generator)
        scaled = (self.variances[k].sqrt() * e)[..., None]  # [n, D] -> [n, D, 1]
        return (self.means[k] + (self.axes[k] @ scaled)[..., 0]).float()  # [n, D, D] @ [n, D, 1] -> [n, D]

    def velocity(self, x, t):
        """E[noise - x0 | x_t = x] (3.2), in float64. x: [B, D], t: [B] in (0, 1]. Returns [B, D], x's dtype.

        In component k, x_t has mean (1 - t) m and variance s = (1 - t)^2 variance + t^2 along each axis. With
        d the offset along the axes, E[noise | x_t, k] = t d / s, E[x0 | x_t, k] = m + (1 - t) variance d / s.
        Raises InputError for t outside (0, 1]."""
        if t.shape != x.shape[:1] or not ((t > 0) & (t <= 1)).all():
            raise InputError(f"t must have shape [{len(x)}] and lie in (0, 1], got {t.tolist()[:3]}, ...")
        t = t.double().view(-1, 1, 1)  # [B] -> [B, 1, 1]
        offset = x.double()[:, None] - (1 - t) * self.means  # [B, K, D]
        d = torch.einsum("kij,bki->bkj", self.axes, offset)  # [B, K, D], along the axes
        s = (1 - t) ** 2 * self.variances + t**2  # [B, K, D]
        log_share = self.weights.log() - 0.5 * (d**2 / s + s.log()).sum(2)  # [B, K]
        share = torch.softmax(log_share, dim=1)  # [B, K]: p(k | x_t)
        along = (t - (1 - t) * self.variances) * d / s  # [B, K, D]
        v = torch.einsum("kij,bkj->bki", self.axes, along) - self.means  # [B, K, D]
        return (share[..., None] * v).sum(1).to(x.dtype)  # [B, K, D] -> [B, D]
