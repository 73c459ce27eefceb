"""A network of your own: train it as a flow, check it, distil it to one step, score both, on a Swiss roll.

    cp fgm.py examples/own_network.py SOMEWHERE     # it needs fgm.py, torch and scikit-learn, nothing else
    python own_network.py                           # half a minute on one core
    torchrun --nproc-per-node 2 own_network.py      # the same numbers from two processes

or, where it lies, from the folder of fgm.py: python -m examples.own_network.
"""

from copy import deepcopy

import torch
from sklearn.datasets import make_swiss_roll

import fgm


class Net(torch.nn.Module):
    """A velocity network: x [B, 2], t [B] -> noise - x0, [B, 2]."""

    def __init__(self):
        super().__init__()
        hidden = [torch.nn.Linear(3, 128), torch.nn.SiLU(), torch.nn.Linear(128, 128), torch.nn.SiLU()]
        self.layers = torch.nn.Sequential(*hidden, torch.nn.Linear(128, 2))

    def forward(self, x, t):
        return self.layers(torch.cat([x, t[:, None]], 1))  # [B, 3] -> [B, 2]


def energy_distance(x, y):
    """0 between equal distributions. x: [N, 2], y: [M, 2]."""
    xy, xx, yy = (torch.cdist(a, b).mean().item() for a, b in ((x, y), (x, x), (y, y)))
    return 2 * xy - xx - yy


def main(steps=2000):
    if torch.distributed.is_torchelastic_launched():  # torchrun: the processes share each batch
        torch.distributed.init_process_group()
    torch.manual_seed(0)
    data = torch.from_numpy(make_swiss_roll(20_000, random_state=0)[0][:, [0, 2]]).float() / 7  # [20000, 2]

    # Train. data(seeds) -> (x0, cond): int64 seeds [B] choose samples and conditions; here there are none.
    settings = dict(steps=steps, batch=512, lr_decay=0.5)
    teacher, _ = fgm.train_flow(Net(), lambda seeds: (data[seeds % len(data)], {}), lr=2e-3, **settings)

    # Check. The defect is 0 for an exact velocity, about 0.1 for a trained one. Where noise was paired with
    # data, the sign is wrong or t runs the other way, it is from 0.3 to 2 at some of these t.
    samples = fgm.sample_ode(teacher, torch.randn(4000, 2), steps=50)
    defects = {t: fgm.defect(teacher, samples, t) for t in (0.2, 0.5, 0.8, 0.95)}

    # Distil. Generator and online flow start as copies of the teacher.
    generator = fgm.OneStepGenerator(deepcopy(teacher), t_star=0.8)
    flow = deepcopy(teacher)
    generator, _ = fgm.distill(teacher, generator, flow, (2,), lr=1e-3, flow_lr=2e-3, **settings)

    # Score.
    z, real = torch.randn(3000, 2), data[:3000]
    distances = {
        "teacher, 1 step": energy_distance(fgm.sample_ode(teacher, z, steps=1), real),
        "teacher, 50 steps": energy_distance(fgm.sample_ode(teacher, z, steps=50), real),
        "one step": energy_distance(generator(z).detach(), real),
    }

    if fgm.process_rank() == 0:
        for t, (value, error) in defects.items():
            print(f"defect of the teacher at t = {t}: {value:.3f} +- {error:.3f}")
        for name, distance in distances.items():
            print(f"{name}: {distance:.4f}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
