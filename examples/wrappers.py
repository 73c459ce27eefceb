"""Networks of other libraries as velocity networks of fgm.py, in six lines each.

fgm.py calls net(x, t, **cond) with x: [B, ...], t: [B] in [0, 1], t = 0 data and t = 1 noise, and expects the
velocity noise - x0. A wrapper translates. Copy the one that you need; teacher, flow and generator's network
then all wear it:

    teacher = FromTorchCFM(net)
    generator, flow = fgm.OneStepGenerator(copy.deepcopy(teacher), t_star=0.8), copy.deepcopy(teacher)

Networks for sequences [B, C, L], or of any other shape, need no wrapper: only the batch comes first.

    python -m examples.wrappers        # the defect of each, with its wrapper and without, in closed form
"""

import torch
from torch import nn

import fgm
from training.run import command


class Wrapper(nn.Module):
    """Holds net, so that its weights are trained, copied, moved and saved. steps: see FromEpsilon."""

    def __init__(self, net, steps=None):
        super().__init__()
        self.net, self.steps = net, steps


# ---- Flow models -------------------------------------------------------------------------------------------


class FromTorchCFM(Wrapper):
    """torchcfm's MLP: net(cat[x, t]) -> x0 - noise, for vectors x [B, D]; there t = 0 is noise."""

    def forward(self, x, t):
        return -self.net(torch.cat([x, 1 - t[:, None]], 1))  # [B, D + 1] -> [B, D]


class FromTorchCFMImages(Wrapper):
    """torchcfm's UNetModelWrapper: net(t, x, y=labels) -> x0 - noise; there t = 0 is noise."""

    def forward(self, x, t, **cond):
        return -self.net(1 - t, x, **cond)


class FromFlowMatching(Wrapper):
    """Meta's flow_matching: model(x=x, t=t) -> x0 - noise; there t = 0 is noise."""

    def forward(self, x, t, **cond):
        return -self.net(x=x, t=1 - t, **cond)


class FromDiffusers(Wrapper):
    """diffusers' UNet2DModel, DiTTransformer2DModel: net(x, 1000 t, class_labels=...).sample -> noise - x0.

    The layout of diffusers, trained as a flow, by fgm.train_flow say. Out channels must be as many as in."""

    def forward(self, x, t, **cond):
        return self.net(x, 1000 * t, **cond).sample


# ---- Diffusion models that predict the noise (DDPM) --------------------------------------------------------


class FromEpsilon(Wrapper):
    """net(x, step, **cond) -> the noise in x = sqrt(a) x0 + sqrt(1 - a) noise, with a = alphas_cumprod[step].

    FromEpsilon(net, steps_of(alphas_cumprod)). Takes the step with the signal-to-noise ratio nearest to t's,
    of which the last is a little below t = 1. For a network of diffusers add .sample to the call."""

    def forward(self, x, t, **cond):
        step = (t[:, None] - self.steps.to(t)).abs().argmin(1)  # [B, 1] - [steps] -> [B, steps] -> [B]
        t = fgm.per_sample(self.steps.to(t)[step], x)
        noise = self.net(x / (t**2 + (1 - t) ** 2).sqrt(), step, **cond)  # of unit variance, if x0 is
        return (noise - x) / (1 - t)


def steps_of(alphas_cumprod):
    """The t at which (1 - t) x0 + t noise has the signal-to-noise ratio of each step: [steps], rising."""
    sigma = (1 / alphas_cumprod.double() - 1).sqrt()
    return sigma / (1 + sigma)


# ---- Each on data for which the velocity is known ----------------------------------------------------------

MEAN, DEVIATION = 1.0, 0.5  # of the data, which are normal


def exact_velocity(x, t):
    """E[noise - x0 | x_t = x] for such data: linear in x."""
    t = fgm.per_sample(t, x)
    slope = (t - (1 - t) * DEVIATION**2) / (t**2 + (1 - t) ** 2 * DEVIATION**2)
    return slope * (x - (1 - t) * MEAN) - MEAN


class Output:
    """What diffusers returns."""

    def __init__(self, sample):
        self.sample = sample


def main():
    """Print the defect of each network, wrapped and as it is: 0 for a flow's velocity."""
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)

    def exact_noise(x, step):
        a = fgm.per_sample(alphas_cumprod[step], x)
        return (1 - a).sqrt() / (a * DEVIATION**2 + 1 - a) * (x - a.sqrt() * MEAN)

    def diffusers_net(x, timestep):
        return Output(exact_velocity(x, timestep / 1000))

    teachers = {
        "torchcfm, wrapped": FromTorchCFM(lambda xt: -exact_velocity(xt[:, :2], 1 - xt[:, 2])),
        "flow_matching, wrapped": FromFlowMatching(lambda x, t: -exact_velocity(x, 1 - t)),
        "flow_matching, as it is": lambda x, t: -exact_velocity(x, 1 - t),
        "diffusers, wrapped": FromDiffusers(diffusers_net),
        "noise predicted, wrapped": FromEpsilon(exact_noise, steps_of(alphas_cumprod)),
        "noise predicted, as it is": lambda x, t: exact_noise(x, (999 * t).long()),
    }
    times = (0.2, 0.5, 0.8, 0.95)
    torch.manual_seed(0)
    x0 = MEAN + DEVIATION * torch.randn(20_000, 2)

    print("defect at t =".ljust(25), *(f"{t:6}" for t in times))
    for name, net in teachers.items():
        print(name.ljust(25), *(f"{fgm.defect(net, x0, t)[0]:6.2f}" for t in times))


if __name__ == "__main__":
    command(main)
