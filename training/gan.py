"""The GAN of appendix B.2, optional: a head on the online flow's features tells real from generated data."""

import math

import torch
from torch import nn
from torch.nn import functional as F

import fgm
from training.processes import noise_from

FOR_NOISE, FOR_T = 1, 2  # what is drawn from a seed that also chooses the condition


class GAN(nn.Module):
    """A light convolutional head on hidden states of the online flow tells noised real data from noised
    generated ones (appendix B.2, there latents and block 2 of SD3's transformer).

    t is drawn from the flow's own distribution (SD3's: at low noise). In the flow's update the features of
    generated data are those of the pass that the flow loss has just made, flow.features at flow.t; those of
    real data, and the generator's, are flow.features_of(x, t, **cond). The paper states no reduction; arXiv
    2405.14867, which it follows, averages FGM's loss and the GAN's over the D numbers of a sample. Ours are
    sums, so that the GAN's gets the factor D: FGM / D + weight * GAN, D times. Summed over its logits instead
    (1 / 256 of D at SD3's patch size), its gradient at x0 would be about a thousandth of L2's.

    real(seeds) -> (x0 [B, ...], cond): the real data that int64 seeds [B] choose. Features are maps
    [B, width, h, w], or tokens [B, h w, width] of a grid (h, w)."""

    def __init__(self, width, real, t_gan, generator_weight, discriminator_weight, grid=None):
        super().__init__()
        inner = min(width, 256)
        groups = math.gcd(8, inner)
        self.head = nn.Sequential(
            nn.Conv2d(width, inner, 3, padding=1), nn.GroupNorm(groups, inner), nn.SiLU(),
            nn.Conv2d(inner, inner, 3, stride=2, padding=1), nn.GroupNorm(groups, inner), nn.SiLU(),
            nn.Conv2d(inner, 1, 3, padding=1))
        self.grid, self.real, self.t_gan = grid, real, t_gan
        self.weights = generator_weight, discriminator_weight

    def logit(self, features):
        if self.grid:
            features = features.mT.unflatten(2, self.grid)  # [B, h w, D] -> [B, D, h, w]
        return self.head(features.float()).mean((1, 2, 3))  # [B, 1, h / 2, w / 2] -> [B]

    def features(self, flow, x0, t, seeds, cond):
        """Hidden states of x0, noised to t with noise that seeds choose."""
        noise = noise_from(seeds ^ FOR_NOISE, x0.shape[1:], x0.device)
        return flow.features_of(fgm.interpolate(x0, noise, t), t, **cond)

    def flow_loss(self, flow, x0, seeds, cond):
        data, data_cond = self.real(seeds)
        real = self.features(flow, data, flow.t, seeds, data_cond)
        loss = F.softplus(self.logit(flow.features)) + F.softplus(-self.logit(real))
        return x0[0].numel() * self.weights[1] * loss

    def generator_loss(self, flow, x0, seeds, cond):
        normal = noise_from(seeds ^ FOR_T, (1,), x0.device)[:, 0]  # [B, 1] -> [B]
        t = torch.sigmoid(self.t_gan[0] + self.t_gan[1] * normal)
        loss = F.softplus(-self.logit(self.features(flow, x0, t, seeds, cond)))
        return x0[0].numel() * self.weights[0] * loss
