"""Images in one step: EDM's U-Net as a flow teacher, distilled by FGM (arXiv 2410.19310, section 5.1).

    python cifar.py --cond --data digits             # real 8x8 digits: minutes on a laptop, without GPU
    python cifar.py --cond --quick                   # CIFAR-10 at 16x16 in about 45 minutes, without GPU
    python cifar.py --cond                           # CIFAR-10, the paper's settings; for GPUs
    python cifar.py --cond --teacher edm-cifar10-32x32-cond-vp.pkl       # start from a published EDM network
    torchrun --nproc-per-node 8 cifar.py --cond      # the same run, sharded over 8 GPUs
    python cifar.py --sample 64 --out runs/digits-cond                   # draw from a finished run

One run does what is missing and keeps what is there: teacher, distillation, samples, scores, pictures; run
again, it resumes. Network: images/unet.py; data: images/data.py; scores: images/scores.py; method: fgm.py.
"""

import argparse
import copy
import json
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import fgm
from fgm import InputError
from images import data as images
from images import memory, scores
from images import unet as edm
from images.unet import EDMUNet, build, image_shape, load_edm, load_network, load_teacher  # noqa: F401
from training import flags, run, sizes
from training.flags import Setting
from training.gan import GAN

# ---- Settings ----------------------------------------------------------------------------------------------

# The paper's settings (section 5.1, appendix B.1) and EDM's network, for CIFAR-10 and other images of that
# size; ours are the warm-up, the teacher's t and beta1 of 0.9, and the start, whose t* is not in section 5.1:
# t_star = c_in = c_skip = c_out = 2.5 / 3.5 is SiD's (arXiv 2404.04057), the best of four on digits.
PAPER = dict(
    model_channels=128, channel_mult=[2, 2, 2], num_blocks=4, attention=[16], dropout=0.13, flip=True,
    teacher_kimg=20_000, teacher_lr=2e-5, teacher_ema=0.999, teacher_t=(0.0, 2.0), kimg=20_000, batch=512,
    lr=2e-5, flow_lr=2e-5, lr_warmup=100, lr_decay=0.0, clip=None, ema=0.999, t_star=0.714, c_in=0.714,
    c_skip=0.714, l1_weight=0.0, weight="none", t_generator=(0.0, 2.0), t_flow=(0.0, 2.0), loss_scale=1.0,
    flow_updates=1, data="cifar10", samples=50_000, save_every=500, log_every=50,
    picture_every=500,
)
# Measured on scikit-learn's digits, on a laptop's budget.
DIGITS = PAPER | dict(
    model_channels=32, channel_mult=[1, 2], num_blocks=1, attention=[4], dropout=0.0, flip=False,
    teacher_kimg=192, teacher_lr=2e-3, kimg=216, batch=128, lr=2e-4, flow_lr=4e-4, lr_decay=0.6, ema=0.995,
    l1_weight=1.0, weight="sid", samples=10_000,
)
DIGITS_UNCONDITIONAL = DIGITS | dict(kimg=288)
# For photographs: about 45 minutes on 2 CPU cores, on a GPU ten, in large steps, not to wait for launches.
QUICK = PAPER | dict(
    resolution=16, model_channels=32, channel_mult=[1, 2, 2], num_blocks=1, attention=[8], dropout=0.0,
    teacher_kimg=280, teacher_lr=2e-3, teacher_ema=0.998, kimg=200, batch=128, lr=2e-4, flow_lr=4e-4,
    lr_decay=0.4, ema=0.995, l1_weight=1.0, weight="sid", samples=5000, save_every=200, picture_every=200,
)
QUICK_ON_GPU = QUICK | dict(
    resolution=32, model_channels=64, num_blocks=2, attention=[16], teacher_kimg=1000, kimg=300, batch=512,
)

DATA_FLAGS = {
    "data": Setting(str, None, "cifar10, digits, or a folder with one sub-folder per class"),
    "resolution": Setting(int, flags.COUNT, "crop and resize the images of a folder, or shrink cifar10"),
    "cond": Setting(bool, None, "class-conditional networks (table 2 of the paper)"),
    "flip": Setting(argparse.BooleanOptionalAction, None, "horizontal flips when the teacher trains"),
}
OUT_FLAGS = {
    "out": Setting(str, None, "output folder (default: runs/DATA, with -cond if conditional)"),
    "paper": Setting(bool, None, "the paper's settings on any data"),
    "quick": Setting(bool, None, "a small network, trained briefly, for photographs: 16x16 on a "
                                 "CPU, 32x32 on a GPU"),
}
TEACHER_FLAGS = {
    "teacher": Setting(str, None, "a network file of ours, or a published EDM pickle, to distil"),
    "model_channels": Setting(int, "[4, 1e5]", "width of the first level"),
    "channel_mult": Setting(int, "[1, 1000]", "widths of the levels as multiples of that", "+"),
    "num_blocks": Setting(int, "[1, 1000]", "residual blocks per level"),
    "attention": Setting(int, flags.COUNT, "resolutions with attention", "*"),
    "dropout": Setting(float, "[0, 1)", "when the teacher trains"),
    "teacher_kimg": Setting(float, flags.POSITIVE, "thousand images to train the teacher on"),
    **flags.TEACHER_FLAGS,
    "teacher_ema": Setting(float, flags.RANGES["ema_decay"], "of the teacher's moving average",
                           metavar="DECAY"),
}
METHOD_FLAGS = {
    "kimg": Setting(float, flags.POSITIVE, "thousand images to distil with"),
    "gan": Setting(float, flags.POSITIVE, "a GAN on the training images, too: its weight in the generator's "
                                        "loss, both per element, a fifth of that in the flow's (digits: 0.1)",
                   metavar="WEIGHT"),
}
SCORE_FLAGS = {
    "samples": Setting(int, "[2, 1e9]", "images that each score is measured on"),
    "fid": Setting(bool, None, "Inception FID by torch-fidelity against the training images; "
                               "under 50,000 samples it is labelled fid-5k, ..."),
    "inception_weights": Setting(str, None, "for --fid without a download", metavar="FILE"),
}
SAMPLE_FLAGS = {
    "sample": Setting(int, flags.COUNT, "draw N images from the run in OUT or --generator FILE", metavar="N"),
    "generator": Setting(str, None, "a generator.safetensors, all that sampling needs", metavar="FILE"),
    "ode_steps": Setting(int, flags.COUNT, "draw from the teacher with K Euler steps instead", metavar="K"),
    "classes": Setting(int, "[0, 1e9]", "draw these in turn, not each as often as in the data", "+"),
    "npz": Setting(bool, None, "also write the images as a uint8 array"),
}


def defaults(given):
    """The settings for the data that the command line names, and with --quick for the device."""
    if given.quick:
        gpu = given.device.startswith("cuda") if given.device else torch.cuda.is_available()
        fast_bf16 = torch.cpu.get_capabilities().get("amx_bf16", False)
        return QUICK_ON_GPU if gpu else QUICK | dict(precision="bf16" if fast_bf16 else "auto")
    if given.data != "digits" or given.paper:
        return PAPER
    return DIGITS if given.cond else DIGITS_UNCONDITIONAL


def arguments():
    parser = flags.Parser(
        prog="cifar.py",
        description="Train, distil, sample and score a one-step image generator (FGM, arXiv 2410.19310).",
        epilog="The defaults shown are the paper's, but for --lr-warmup, --teacher-t and the start, which it "
               "does not state; the teacher's Adam has a beta1 of 0.9, not 0. See also --data digits --help.")
    groups = {
        "data": DATA_FLAGS,
        "run": OUT_FLAGS | flags.RUN_FLAGS | flags.PICTURE_FLAG,
        "teacher and network (EDM, arXiv 2206.00364; section 5.1)": TEACHER_FLAGS,
        "distillation (Algorithm 1; section 5.1, appendix B.1)": METHOD_FLAGS | flags.DISTILLATION_FLAGS,
        "scores": SCORE_FLAGS,
        "drawing samples from a finished run": SAMPLE_FLAGS,
    }
    for title, settings in groups.items():
        flags.add_flags(parser.add_argument_group(title).add_argument, settings)
    always = {name: ["sample"] for name in SAMPLE_FLAGS if name != "sample"} | {"inception_weights": ["fid"]}
    meaningful = [*SAMPLE_FLAGS, "out", "data", "cond", "teacher", "seed", "device"]
    args = parser.parse_with(
        defaults, lambda args: always | ({"teacher": ["ode_steps"]} if args.sample else {}),
        {"sample": meaningful, "generator": {*meaningful} - {"data", "cond", "ode_steps"},
         "teacher": {action.dest for action in parser._actions} - TEACHER_FLAGS.keys()})
    if args.quick and args.paper:
        parser.error("--quick and --paper contradict each other: give one of them")
    if args.quick and args.data == "digits":
        parser.error("--quick is for photographs: --data digits is quick as it is")
    return args


def out_folder(args):
    beside = Path(args.generator).parent if args.generator else None
    return Path(args.out or beside or Path("runs") / (Path(args.data).name + "-cond" * args.cond))


# ---- Drawing samples from a finished run -------------------------------------------------------------------


def draw_from_files(args, device):
    """--sample: images of a finished run, or of a network file alone.

    Raises InputError for a file that is missing or no generator (with --ode-steps no teacher), and for
    classes that it does not have."""
    out = out_folder(args)
    if args.ode_steps:
        path = Path(args.teacher or out / "teacher.safetensors")
    else:
        path = Path(args.generator or out / "generator.safetensors")
    if not path.exists():
        raise InputError(f"{path} does not exist: the run has not finished, or --out names another folder")
    net, description = load_network(path)
    if ("generator" in description) == bool(args.ode_steps):
        raise InputError(f"{path} is a one-step generator, no teacher" if args.ode_steps else
                         f"{path} is no generator; with --ode-steps K it can be sampled as a teacher")
    names = description["classes"] if description["network"]["label_dim"] else []
    if args.classes and max(args.classes) >= len(names):
        raise InputError(f"--classes must lie in 0..{len(names) - 1}" if names
                         else "--classes needs a conditional network")
    net = net.to(device)
    if args.ode_steps:
        kind, sampler = f"{args.ode_steps}-steps", partial(fgm.sample_ode, net, steps=args.ode_steps)
    else:
        kind, sampler = "one-step", fgm.OneStepGenerator(net, **description["generator"])

    began = time.perf_counter()
    pixels, labels = images.draw_images(sampler, args.sample, image_shape(description["network"]),
                                        description["class_counts"], device, args.seed, args.classes,
                                        what="drawing")
    seconds = time.perf_counter() - began
    if fgm.process_rank() > 0:
        return
    target = run.open_folder(out) / f"samples-{kind}"
    images.save_grid(f"{target}.png", pixels[:1000])
    if args.npz:
        arrays = pixels.permute(0, 2, 3, 1).numpy()  # [N, C, R, R] -> [N, R, R, C]
        with run.atomically(f"{target}.npz") as temporary:
            np.savez(temporary, images=arrays, labels=labels.numpy(), classes=names)
    shown = " of " * bool(args.classes) + ", ".join(names[i] for i in args.classes or ())
    print(f"{len(pixels)} images{shown} in {seconds:.2f} s: {target}.png" + f", {target}.npz" * args.npz)


# ---- The steps of a run ------------------------------------------------------------------------------------


def initial_network(args, real, label_dim):
    """The network that everything starts from, and its description: --teacher's, or a fresh one."""
    if args.teacher:
        return load_teacher(args.teacher, real, args.cond)
    channels, resolution = real.pixels.shape[1:3]
    levels = [resolution >> level for level in range(len(args.channel_mult))]
    if args.attention != PAPER["attention"] and not set(args.attention) <= set(levels):
        raise InputError(f"--attention: the network's resolutions are {levels} (none: --attention alone)")
    network = dict(
        img_resolution=resolution, in_channels=channels, out_channels=channels, label_dim=label_dim,
        model_channels=args.model_channels, channel_mult=args.channel_mult, num_blocks=args.num_blocks,
        attn_resolutions=args.attention, dropout=args.dropout)
    torch.manual_seed(args.seed)
    return build(network), network


def check_scores(args, real, device, judge):
    """A score that cannot be measured fails here, on all processes, and not at the end."""
    if len(real.pixels) < 4:
        raise InputError(f"the data has {len(real.pixels)} images; its scores need at least 4")

    def check():
        if judge.exists() and not args.overwrite and real.pixels.shape[-1] > scores.SMALL:
            scores.NetworkJudge.load(judge, real, args.cond, device)
        if args.fid:
            scores.fid(real.pixels[:32], real.pixels[-32:], args.inception_weights, device)

    run.first_process(check)


def scorer_of(args, real, device, judge):
    """What scores this run's samples, on the first process; None on the others. A collective call."""
    made = []
    run.first_process(lambda: made.append(scores.Scores(
        real, args.cond, args.flip, device, judge, args.samples)))
    return made[0] if made else None


def main():
    args = arguments()
    device = run.setup(args.device)
    if args.sample:
        return draw_from_files(args, device)
    sizes.check_sizes(args, device)

    # Data, networks, folder.
    real = images.load_images(args.data, args.resolution, args.cond)
    class_counts = real.class_counts() if args.cond else []
    label_dim = len(class_counts)
    net, network = initial_network(args, real, label_dim)
    shape = image_shape(network)
    sizes.check_sizes(args, device, math.prod(shape))
    out = run.open_folder(out_folder(args))
    judge = out / "judge.safetensors"
    check_scores(args, real, device, judge)  # before --overwrite removes anything
    net = net.to(device)
    memory.settle_micro_batch(args, net, shape, label_dim)
    teacher, flow = copy.deepcopy(net), copy.deepcopy(net)
    for module in (teacher, flow, net):
        run.shard(module, [block for block in module.modules() if isinstance(block, edm.Block)])
    data, conditions = images.data_functions(real, label_dim, args.flip, device)
    gan = None
    if args.gan:
        torch.manual_seed(args.seed)
        gan = GAN(edm.keep_features(flow), data, args.t_flow, args.gan, 5 * args.gan).to(device)
        run.shard(gan.head)
    description = {"network": network, "data": args.data, "classes": real.classes,
                   "class_counts": class_counts}
    folder_run = run.folder_run(args, out)
    folder_run.fingerprint = {"data": args.data, "images": real.fingerprint(), "network": network,
                              "teacher": args.teacher, "flip": args.flip}
    if args.overwrite and not args.teacher and fgm.process_rank() == 0:
        (out / "teacher.safetensors").unlink(missing_ok=True)
    generator = fgm.OneStepGenerator(net, args.t_star, args.c_in, args.c_skip, args.c_out)
    settings = flags.distillation_settings(args, math.ceil(args.kimg * 1000 / args.batch))

    # One distillation step now: what would stop it should not do so after the teacher's training.
    fgm.distill(teacher, generator, flow, shape, conditions=conditions, extra=copy.deepcopy(gan),
                **settings | {"steps": 1, "compile": False})
    seconds = {"teacher": 0.0}

    # The teacher, by ReFlow (3.6).
    if not args.teacher:
        teacher, seconds["teacher"] = fgm.train_flow(
            teacher.train(), data, steps=math.ceil(args.teacher_kimg * 1000 / args.batch),
            ema_decay=args.teacher_ema, run=folder_run, **flags.teacher_settings(args))
    run.save_weights(teacher, out / "teacher.safetensors", {"about": json.dumps(description)})

    # Distillation, Algorithm 1: all three networks start as the teacher.
    for module in (net, flow):
        module.load_state_dict(teacher.state_dict())

    draw = partial(images.draw_images, shape=shape, class_counts=class_counts, device=device, seed=args.seed)

    def draw_fast(sampler, n, in_turn):
        classes = range(label_dim) if in_turn else None
        with torch.autocast(device.type, torch.bfloat16, enabled=fgm.wants_bf16(args.precision, device)):
            return draw(sampler, n, classes=classes)[0]

    folder_run.picture = scores.pictures(out, real.pixels, teacher, draw_fast, min(args.samples, 500))
    folder_run.fingerprint |= {"teacher_weights": run.fingerprint_of(teacher), "gan": args.gan}
    generator, seconds["distillation"] = fgm.distill(
        teacher, generator, flow, shape, conditions=conditions, extra=gan, run=folder_run, **settings)
    description |= {"generator": generator.coefficients()}
    run.save_weights(generator.net, out / "generator.safetensors", {"about": json.dumps(description)})

    # Samples, scores, pictures.
    began, scorer = time.perf_counter(), scorer_of(args, real, device, judge)
    steps = (1, 10, 50, 100) if args.fid else (1, 10, 50)
    samplers = {number: partial(fgm.sample_ode, teacher, steps=number) for number in steps}
    rows = score(args, real, device, scorer, samplers | {"one step": generator}, draw, out)
    seconds["scores"] = time.perf_counter() - began
    if scorer:
        write_results(args, description, real, scorer, rows, seconds, out)
        print_results(args, real, scorer, rows, seconds, out)


# ---- Scores ------------------------------------------------------------------------------------------------


def score(args, real, device, scorer, samplers, draw, out):
    """Draw from all samplers with the same seeds, and write a picture of each. A collective call.

    samplers: {steps of the teacher, or "one step": sampler}; draw: images.draw_images without what is the
    same for all. Returns {the same name: {score: value}}, on the first process alone."""
    rows, shown = {}, {}
    for name, sampler in samplers.items():
        began = time.perf_counter()
        pixels, labels = draw(sampler, args.samples, what=f"scoring: {title(name)}")
        drawing = time.perf_counter() - began
        grid, _ = draw(sampler, min(100, args.samples), classes=range(len(real.classes)))  # to be looked at
        if scorer:
            rows[name], shown[title(name)] = scorer.of(pixels, labels) | {"seconds": drawing}, grid
            if args.fid:
                rows[name]["fid"] = scores.fid(real.pixels, pixels, args.inception_weights, device)
    images.save_samples(out, shown)
    return rows


def title(name):
    """What a sampler is called in table and pictures: "one step", "teacher, 50 steps"."""
    return name if name == "one step" else f"teacher, {name} step{'s' * (name > 1)}"


TITLES = {"judge_frechet": "judge Frechet distance", "pixel_frechet": "pixel Frechet distance"}


def metric_name(args, score):
    """What a distance is called; FID is that of 50,000 samples or more alone."""
    if score != "fid":
        return TITLES[score]
    return "FID" if args.samples >= 50_000 else f"fid-{args.samples / 1000:g}k"


def write_results(args, description, real, scorer, rows, seconds, out):
    """config.json and metrics.json."""
    main = "fid" if args.fid else scorer.main
    run.write_results(out, description | {"settings": vars(args) | {"out": str(out)}}, {
        "metric": metric_name(args, main), "samples": args.samples,
        "against": f"{len(real.pixels)} training images of {args.data}",
        "labels": "drawn as often as the data has each class" if args.cond else "none",
        "detector": "torch-fidelity Inception-v3" if args.fid else scorer.detector,
        "teacher": {str(name): row[main] for name, row in rows.items() if name != "one step"},
        "one_step": rows["one step"][main],
        "noise_floor": scorer.of_data, "noise_floor_of": scorer.split,
        "rows": {str(name): row for name, row in rows.items()}, "seconds": seconds,
    })


FORMATS = {"accuracy": ".2%", "worst_class": ".2%", "seconds": ".1f"}  # in the table; of others .4f


def print_results(args, real, scorer, rows, seconds, out):
    """The table of scores. After the main distance: what another draw of the samples would move it by."""
    data = f"{args.data} (conditional)" if args.cond else args.data
    print(f"{data}: {args.samples:,} samples against {len(real.pixels):,} training images of "
          f"{real.pixels.shape[-1]}x{real.pixels.shape[-1]}")
    columns = {name: metric_name(args, name) for name in ("fid", *TITLES)}
    columns |= {name: name.replace("_", " ") for name in FORMATS}
    columns = {name: heading for name, heading in columns.items() if name in rows["one step"]}
    widths = {name: max(12, len(heading) + 4) for name, heading in columns.items()}
    print(f"  {'':21}" + "".join(f"{heading:>{widths[name]}}" for name, heading in columns.items()))

    lines = {title(name): row for name, row in rows.items()}
    for what, row in {scorer.split: scorer.of_data, **lines}.items():
        cells = {name: f"{row[name]:{FORMATS.get(name, '.4f')}}" for name in columns
                 if row.get(name) is not None}
        if row.get("noise") is not None:
            cells[scorer.main] += f" +- {row['noise']:.4f}"
        print(f"  {what:21}" + "".join(f"{cells.get(name, ''):>{widths[name]}}" for name in columns))

    print("  " + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
          + f"; pictures and metrics.json in {out}")


if __name__ == "__main__":
    run.command(main)
