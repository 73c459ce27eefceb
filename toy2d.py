"""The 2-D suite: five data sets, a small velocity network, the energy distance.

    python toy2d.py                                # rings: train a teacher, distil it, score both
    python toy2d.py --data checkerboard --movie    # or moons, spiral, 8gaussians (the hard one); with a movie
    python toy2d.py --data all                     # all five, a table each
    python toy2d.py --l1-weight 0 --out runs/l2    # the paper's practice on images: L2 alone
    torchrun --nproc-per-node 2 toy2d.py           # the same run, sharded over two processes

toy2d.ipynb verifies the theory on these data sets and shows how distillation goes right and wrong.
"""

import copy
import math
import time
from pathlib import Path

import torch
from torch import nn

import fgm
from points.data import DATA, toy_data
from points.pictures import draw_frame, draw_panels, frame_steps, write_movie
from training import flags
from training.flags import Setting
from training.processes import compile_networks, setup, shard
from training.progress import bar, make_scorer
from training.report import spent, teacher_title
from training.run import command, fingerprint_of, folder_run, save_weights, with_sum, write_results

# ---- Network and distance ----------------------------------------------------------------------------------


class VelocityMLP(nn.Module):
    """A velocity network for vectors of about unit variance: x [B, D], t [B] -> [B, D].

    v = ((2t - 1) x - sqrt(q) F) / q with q = t^2 + (1 - t)^2, the variance of x_t: the velocity of Gaussian
    data minus a correction of unit size, as EDM preconditions a denoiser (arXiv 2206.00364). F sees random
    Fourier features of x (arXiv 2006.10739), without which an MLP learns sharp edges last, and those of t."""

    def __init__(self, dim=2, width=128, depth=4, freqs=32, times=8):
        super().__init__()
        self.register_buffer("x_frequencies", math.pi * torch.randn(dim, freqs))  # half a cycle per unit
        self.register_buffer("t_frequencies", math.pi * torch.arange(1, times + 1))
        widths = [dim + 2 * freqs + 2 * times] + [width] * depth
        layers = [layer for i in range(depth) for layer in (nn.Linear(widths[i], widths[i + 1]), nn.SiLU())]
        self.net = nn.Sequential(*layers, nn.Linear(width, dim))
        nn.init.zeros_(self.net[-1].weight)

    def forward(self, x, t):
        t = t[:, None]  # [B] -> [B, 1]
        q = t**2 + (1 - t) ** 2
        scaled = x / q.sqrt()
        phase = (scaled[:, :, None] * self.x_frequencies).sum(1)  # [B, D, freqs] -> [B, freqs]
        angle = t * self.t_frequencies.to(t.dtype)  # [B, times]
        features = torch.cat([scaled, phase.cos(), phase.sin(), angle.cos(), angle.sin()], 1)
        return (2 * t - 1) / q * x - self.net(features) / q.sqrt()


def energy_distance(x, y, directions=32):
    """Energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| of 2-D samples x [N, 2], y [M, 2].

    0 only between equal distributions (but for the 32 directions that stand for all). Unbiased (it may come
    out slightly negative), by sorting in n log n: |a| is pi/2 times the mean of |<a, direction>| over all
    directions. No bandwidth is needed; the noise floor falls as 1/n, that of Wasserstein-2 as 1/sqrt(n)."""
    angle = math.pi * torch.arange(directions, dtype=torch.float64) / directions
    axes = torch.stack([angle.cos(), angle.sin()], 1)  # [directions, 2]
    px, py = axes @ x.double().cpu().T, axes @ y.double().cpu().T  # [directions, N], [directions, M]
    n, m = len(x), len(y)

    xx, yy = sum_of_distances(px), sum_of_distances(py)
    xy = (sum_of_distances(torch.cat([px, py], 1)) - xx - yy) / 2
    by_direction = 2 * xy / (n * m) - xx / (n * (n - 1)) - yy / (m * (m - 1))  # [directions]
    return (math.pi / 2 * by_direction.mean()).item()


def sum_of_distances(p):
    """The sum of |a - b| over all ordered pairs of numbers in each row of p [R, N]: [R]."""
    ordered, n = p.sort(1).values, p.shape[1]
    rank = torch.arange(n, dtype=torch.float64)
    return 2 * ((2 * rank - n + 1) * ordered).sum(1)


# ---- The command -------------------------------------------------------------------------------------------

# Swept on the five data sets, for a minute on a laptop.
DEFAULTS = dict(
    teacher_steps=3000, teacher_lr=4e-3, teacher_t=(0.0, 1.2), steps=5000, batch=768, lr=1e-3, flow_lr=4e-3,
    lr_warmup=100, lr_decay=2 / 3, clip=1.0, ema=0.998, t_star=0.5, c_in=1.0, c_skip=1.0, l1_weight=1.0,
    weight="noise", t_generator=(0.5, 2.0), t_flow=(0.5, 2.0), loss_scale=1.0, flow_updates=1,
    samples=50_000, save_every=1000, log_every=100, picture_every=500, device="cpu", data="rings",
)
FLAGS = {  # by their group in --help
    "data, teacher and scores": {
        "data": Setting(str, [*DATA, "all"], "what the teacher learns; 8gaussians is the hard one; all: each "
                                             "in turn, in OUT/DATA"),
        "teacher_steps": Setting(int, flags.COUNT, "training steps of the teacher"),
        **flags.TEACHER_FLAGS,
        "samples": Setting(int, "[2, 1e6]", "samples that each distance is measured on"),
    },
    "run": {
        "out": Setting(flags.path, None, "output folder (default: runs/DATA)"),
        **flags.RUN_FLAGS,
        "device": Setting(str, None, "cpu or cuda; a GPU is no faster here"),
        "movie": Setting(bool, None, "write movie.gif, the generator's samples over training"),
    },
    "distillation (Algorithm 1)": {
        "steps": Setting(int, flags.COUNT, "distillation steps"),
        **flags.EVERYDAY_FLAGS,
    },
    "advanced": flags.ADVANCED_FLAGS,
}
TRAINING_SAMPLES = 200_000
SCORED = 20_000  # samples at most of a score in the log
ODE_STEPS = (1, 2, 5, 10, 50)
HEUN_STEPS = 25  # 49 evaluations


def arguments():
    about = "Distil a 2-D flow model into a one-step generator (FGM, arXiv 2410.19310)."
    parser = flags.Parser(FLAGS, prog="toy2d.py", description=about)
    return parser.parse_with(lambda given: DEFAULTS)


def main():
    args = arguments()
    device = setup(args.device)
    try_one_step(args, device)
    out = Path(args.out or f"runs/{args.data}")
    folders = {args.data: out}
    if args.data == "all":
        folders = {name: out / name for name in DATA}

    # All folders are locked before the first run starts.
    runs = {name: folder_run(args, folder, unit="steps") for name, folder in folders.items()}
    for name, run in runs.items():
        train_and_score(args, name, device, run)


def make_networks(args, device):
    """(teacher, generator, online flow) as a run begins with them."""
    torch.manual_seed(args.seed)
    net = VelocityMLP().to(device)
    teacher, flow = copy.deepcopy(net), copy.deepcopy(net)
    for network in (teacher, flow, net):
        shard(network)
    return teacher, fgm.OneStepGenerator(net, args.t_star, args.c_in, args.c_skip, args.c_out), flow


def try_one_step(args, device):
    """One distillation step with networks that are then thrown away: what would stop it should do so before
    --overwrite has removed the run before."""
    fgm.distill(*make_networks(args, device), (2,), **flags.distillation_settings(args, steps=1))


def train_and_score(args, name, device, run):
    """Train a teacher of the data set, distil it, score both."""
    teacher, generator, flow = make_networks(args, device)
    if args.compile:
        compile_networks(teacher, generator.net, flow)
    data = toy_data(name, TRAINING_SAMPLES, args.seed).to(device)

    run.fingerprint = {"data": name}
    teacher, teacher_seconds = fgm.train_flow(
        teacher, lambda seeds: (data[(seeds % len(data)).to(device)], {}), steps=args.teacher_steps,
        run=run, **flags.teacher_settings(args))

    generator.net.load_state_dict(teacher.state_dict())
    flow.load_state_dict(teacher.state_dict())
    run.fingerprint = {"data": name, "teacher_weights": fingerprint_of(teacher)}
    run.picture = make_picture(args, name, data, teacher, run.out)
    if args.movie:
        run.picture_every = frame_steps(args.steps)[0]
    generator, distillation_seconds = fgm.distill(
        teacher, generator, flow, (2,), run=run, **flags.distillation_settings(args, args.steps))

    save_weights(teacher, run.out / "teacher.safetensors")
    save_weights(generator.net, run.out / "generator.safetensors")
    seconds = {"teacher": teacher_seconds, "distillation": distillation_seconds}
    score(args, name, device, teacher, generator, seconds, run.out)


def make_picture(args, name, data, teacher, out):
    """A picture(step, generator) for FolderRun: scores for the log and, with --movie, a frame."""
    n = min(args.samples, SCORED)
    test = toy_data(name, n, args.seed + 1)
    z = fgm.Draws(n, data.device, args.seed, fgm.SCORES).normal((2,))
    score_of = make_scorer(teacher, lambda sampler: energy_distance(sampler(z), test))

    def picture(step, generator):
        if args.movie and step not in frame_steps(args.steps):
            return None
        if args.movie:
            draw_frame(out / "movie", step, generator, data, args.seed)
        return score_of(step, generator)

    return picture


def score(args, name, device, teacher, generator, seconds, out):
    """Draw from teacher and generator with the same noise, write scores and pictures, print the table.

    seconds: {phase: seconds} so far. Every process draws; the first alone scores."""
    began = time.perf_counter()
    test = toy_data(name, args.samples, args.seed + 1)
    z = fgm.Draws(args.samples * fgm.world_size(), device, args.seed, fgm.SCORES).normal((2,))
    with bar("scoring"), torch.no_grad():
        by_steps = {steps: fgm.sample_ode(teacher, z, steps) for steps in ODE_STEPS}
        heun = fgm.sample_ode(teacher, z, HEUN_STEPS, "heun")
        one_step = generator(z)
        slow = seconds_to_draw(lambda: fgm.sample_ode(teacher, z[:10_000], 50), 3)
        fast = seconds_to_draw(lambda: generator(z[:10_000]), 21)
    if fgm.process_rank() > 0:
        return

    floors = [energy_distance(toy_data(name, args.samples, args.seed + 2 + i), test) for i in range(5)]
    metrics = {
        "metric": "energy distance",
        "samples": args.samples,
        "noise_floor": (sum(floor**2 for floor in floors) / len(floors)) ** 0.5,
        "teacher": {str(steps): energy_distance(x, test) for steps, x in by_steps.items()},
        "teacher_heun": {str(HEUN_STEPS): energy_distance(heun, test)},
        "one_step": energy_distance(one_step, test),
        "draw_10000_s": {"50": slow, "one_step": fast},
    }

    panels = {"data": test, "teacher, 1 step": by_steps[1], "teacher, 50 steps": by_steps[50]}
    draw_panels(out / "samples.png", panels | {"one step": one_step})
    if args.movie:
        write_movie(out / "movie", out / "movie.gif", frame_steps(args.steps))

    metrics["seconds"] = with_sum(seconds | {"scores": time.perf_counter() - began})
    config = {
        "settings": vars(args) | {"data": name, "out": str(out)},
        "generator": generator.coefficients(),
        "network": {"dim": 2, "width": 128, "depth": 4, "freqs": 32, "times": 8},
    }
    write_results(out, config, metrics)
    print_table(name, metrics, out)


def seconds_to_draw(draw, repeats):
    """Median wall time of draw()."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        draw()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times)[repeats // 2]


def print_table(name, metrics, out):
    """The scores of one data set, a row each."""
    rows = {"data against data (floor, rms of 5)": metrics["noise_floor"]}
    for steps, value in metrics["teacher"].items():
        rows[teacher_title(int(steps))] = value
    rows[f"teacher, {HEUN_STEPS} Heun steps"] = metrics["teacher_heun"][str(HEUN_STEPS)]
    rows["one-step generator"] = metrics["one_step"]

    print(f"{name}: energy distance to the data x 1000, {metrics['samples']:,} samples")
    for label, value in rows.items():
        print(f"  {label:36} {1000 * value:9.3f}")
    print(f"  {spent(metrics['seconds'])}")
    slow, fast = metrics["draw_10000_s"]["50"], metrics["draw_10000_s"]["one_step"]
    print(f"  10,000 samples: {slow:.3f} s with 50 steps, {fast:.4f} s with one, "
          f"{slow / fast:.0f} times faster; see {out}/samples.png")


if __name__ == "__main__":
    command(main)
