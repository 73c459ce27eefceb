"""Images in one step: EDM's U-Net as a flow teacher, distilled by FGM (arXiv 2410.19310, section 5.1).

    python cifar.py --cond --data digits             # real 8x8 digits: minutes on a laptop, without GPU
    python cifar.py --cond --quick                   # CIFAR-10 at 16x16 in about 45 minutes, without GPU
    python cifar.py --cond                           # CIFAR-10, the paper's settings; for GPUs
    python cifar.py --cond --teacher edm-cifar10-32x32-cond-vp.pkl       # start from a published EDM network
    torchrun --nproc-per-node 8 cifar.py --cond      # the same run, sharded over 8 GPUs
    python cifar.py --sample 64 --out runs/digits-cond                   # draw from a finished run

A run trains a teacher, distils it, draws samples, scores them and writes pictures. The same command, called
again, goes on where it stopped. Network: images/unet.py; files of networks: images/published.py; data:
images/data.py; scores: images/scores.py; method: fgm.py.
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
from images import scores
from images.published import image_shape, load_edm, load_network, load_teacher  # noqa: F401
from images.unet import Block, EDMUNet, build, keep_features  # noqa: F401
from training import checkpoint, files, flags, processes, report, run
from training.flags import COUNT, POSITIVE, Setting
from training.gan import GAN

# ---- Settings ----------------------------------------------------------------------------------------------

# The paper's settings (section 5.1, appendix B.1) and EDM's network, for CIFAR-10 and other images of that
# size. The paper does not state the warm-up, the teacher's t and beta1 (0.9 here), nor the start. Ours is
# SiD's (arXiv 2404.04057), the best of four on digits: t_star = c_in = c_skip = c_out = 2.5 / 3.5.
PAPER = dict(
    model_channels=128, channel_mult=[2, 2, 2], num_blocks=4, attention=[16], dropout=0.13, flip=True,
    teacher_kimg=20_000, teacher_lr=2e-5, teacher_ema=0.999, teacher_t=(0.0, 2.0), kimg=20_000, batch=512,
    lr=2e-5, flow_lr=2e-5, lr_warmup=100, lr_decay=0.0, clip=None, ema=0.999, t_star=0.714, c_in=0.714,
    c_skip=0.714, l1_weight=0.0, weight="none", t_generator=(0.0, 2.0), t_flow=(0.0, 2.0), loss_scale=1.0,
    flow_updates=1, data="cifar10", samples=50_000, save_every=500, log_every=50,
    picture_every=500,
)
# Measured on a laptop's budget, with a small network.
SMALL = PAPER | dict(
    model_channels=32, num_blocks=1, dropout=0.0, teacher_lr=2e-3, batch=128, lr=2e-4, flow_lr=4e-4,
    ema=0.995, l1_weight=1.0, weight="sid",
)
DIGITS = SMALL | dict(
    channel_mult=[1, 2], attention=[4], flip=False, teacher_kimg=192, kimg=288, lr_decay=0.6, samples=10_000,
)
DIGITS_WITH_LABELS = DIGITS | dict(kimg=216)
# For photographs: about 45 minutes on 2 CPU cores. On a GPU the steps are larger, so that none waits for
# kernel launches.
QUICK = SMALL | dict(
    resolution=16, channel_mult=[1, 2, 2], attention=[8], teacher_kimg=280, teacher_ema=0.998, kimg=200,
    lr_decay=0.4, samples=5000, save_every=200, picture_every=200,
)
QUICK_ON_GPU = QUICK | dict(
    resolution=32, model_channels=64, num_blocks=2, attention=[16], teacher_kimg=1000, kimg=300, batch=512,
)

FLAGS = {  # by their group in --help
    "data": {
        "data": Setting(flags.path, None, "cifar10, digits, or a folder with one sub-folder per class"),
        "resolution": Setting(int, COUNT, "crop and resize the images of a folder, or shrink cifar10"),
        "cond": Setting(bool, None, "class-conditional networks (table 2 of the paper)"),
        "flip": Setting(argparse.BooleanOptionalAction, None, "horizontal flips when the teacher trains"),
        "hold_out": Setting(bool, None, "train on four fifths of the images; tell whether samples copy them"),
    },
    "run": {
        "out": Setting(flags.path, None, "output folder (default: runs/DATA, with -cond if conditional)"),
        "paper": Setting(bool, None, "the paper's settings on any data"),
        "quick": Setting(bool, None, "a small network, trained briefly: 16x16 on a CPU, 32x32 on a GPU"),
        **flags.RUN_FLAGS, **flags.PICTURE_FLAG,
    },
    "teacher and network (EDM, arXiv 2206.00364; section 5.1)": {
        "teacher": Setting(flags.path, None, "a network file of ours, or a published EDM pickle, to distil"),
        "model_channels": Setting(int, "[4, 1e5]", "width of the first level"),
        "channel_mult": Setting(int, "[1, 1000]", "widths of the levels as multiples of that", "+"),
        "num_blocks": Setting(int, "[1, 1000]", "residual blocks per level"),
        "attention": Setting(int, COUNT, "resolutions with attention", "*"),
        "dropout": Setting(float, "[0, 1)", "when the teacher trains"),
        "teacher_kimg": Setting(float, POSITIVE, "thousand images to train the teacher on"),
        **flags.TEACHER_FLAGS,
        "teacher_ema": Setting(float, flags.DECAY, "decay of the teacher's moving average", metavar="DECAY"),
    },
    "distillation (Algorithm 1; section 5.1, appendix B.1)": {
        "kimg": Setting(float, POSITIVE, "thousand images to distil with"),
        "gan": Setting(float, POSITIVE, "add a GAN on the training images: its weight in the generator's "
                       "loss", metavar="WEIGHT"),
        "gan_discriminator": Setting(float, POSITIVE, "its weight in the online flow's loss (default: five "
                                     "times --gan)", metavar="WEIGHT"),
        **flags.EVERYDAY_FLAGS,
    },
    "scores": {
        "samples": Setting(int, "[2, 1e9]", "images scored"),
        "fid": Setting(bool, None, "Inception FID by torch-fidelity against the training images; "
                                   "under 50,000 samples it is labelled fid-5k, ..."),
        "inception_weights": Setting(flags.path, None, "for --fid without a download", metavar="FILE"),
    },
    "drawing samples from a finished run": {
        "sample": Setting(int, COUNT, "draw N images from a finished run instead of training", metavar="N"),
        "generator": Setting(flags.path, None, "a generator.safetensors to draw from", metavar="FILE"),
        "ode_steps": Setting(int, COUNT, "draw from the teacher with K Euler steps instead", metavar="K"),
        "classes": Setting(int, "[0, 1e9]", "draw these in turn, not each as often as in the data", "+"),
        "npz": Setting(bool, None, "also write the images as a uint8 array"),
    },
    "advanced": flags.ADVANCED_FLAGS,
}
NEEDS = {"generator": ["sample"], "ode_steps": ["sample"], "classes": ["sample"], "npz": ["sample"],
         "inception_weights": ["fid"], "gan_discriminator": ["gan"]}


def defaults(given):
    """The settings for the data that the command line names, and with --quick for the device."""
    if given.quick:
        gpu = given.device.startswith("cuda") if given.device else torch.cuda.is_available()
        fast_bf16 = torch.cpu.get_capabilities().get("amx_bf16", False)
        return QUICK_ON_GPU if gpu else QUICK | dict(precision="bf16" if fast_bf16 else "auto")
    if given.data != "digits" or given.paper:
        return PAPER
    return DIGITS_WITH_LABELS if given.cond else DIGITS


def arguments():
    parser = flags.Parser(
        FLAGS, prog="cifar.py",
        description="Train, distil, sample and score a one-step image generator (FGM, arXiv 2410.19310).",
        epilog="The defaults shown are the paper's, but for --lr-warmup, --teacher-t and the start, which it "
               "does not state; the teacher's Adam has a beta1 of 0.9, not 0. See also --data digits --help.")
    args = parser.parse_with(defaults, NEEDS)
    if args.quick and args.paper:
        parser.error("--quick and --paper contradict each other: give one of them")
    if args.generator and args.ode_steps:
        parser.error("--ode-steps draws from a teacher and --generator names a one-step generator: give one")
    return args


def out_folder(args):
    """The output folder. Raises InputError if it lies inside the data folder, where it would be read as data.
    """
    data = Path(args.data).resolve()
    if args.out:
        out = Path(args.out)
    elif args.generator:
        out = Path(args.generator).parent
    else:
        out = Path("runs") / (f"{data.name}-cond" if args.cond else data.name)
    if args.data not in ("cifar10", "digits") and out.resolve().is_relative_to(data):
        raise InputError(f"the output folder {out} lies in the data folder {args.data}: name another --out")
    return out


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

    net, about = load_network(path)
    net = net.to(device)
    if ("generator" in about) == bool(args.ode_steps):
        raise InputError(f"{path} does not fit: with --ode-steps it must be a teacher, without a generator")
    if args.ode_steps:
        kind, sampler = f"{args.ode_steps}-steps", partial(fgm.sample_ode, net, steps=args.ode_steps)
    else:
        kind, sampler = "one-step", fgm.OneStepGenerator(net, **about["generator"])

    names = about["classes"] if about["network"]["label_dim"] else []
    if args.classes and max(args.classes) >= len(names):
        raise InputError(f"--classes counts from 0, and the network was trained on {len(names)} classes")

    began = time.perf_counter()
    pixels, labels = images.draw_images(
        sampler, args.sample, image_shape(about["network"]), about["class_counts"], device, args.seed,
        args.classes, title="drawing")
    seconds = time.perf_counter() - began
    if fgm.process_rank() > 0:
        return

    target = files.open_folder(out) / f"samples-{kind}"
    written = [f"{target}.png"]
    images.save_grid(written[0], pixels[:1000])
    if args.npz:
        written.append(f"{target}.npz")
        arrays = pixels.permute(0, 2, 3, 1).numpy()  # [N, C, R, R] -> [N, R, R, C]
        with files.atomically(written[1]) as temporary:
            np.savez(temporary, images=arrays, labels=labels.numpy(), classes=names)
    print(f"{len(pixels)} images in {seconds:.2f} s: {', '.join(written)}")


# ---- The steps of a run ------------------------------------------------------------------------------------


def hold_out(real):
    """Images in two parts: four fifths to train on, and a fifth that nothing is trained on, with each class
    as often. Raises InputError for too few images."""
    held, training = images.split(real.labels, len(real.labels) // 5)
    if len(held) < 2 or 0 in real.rows(training).class_counts():
        raise InputError("--hold-out needs at least ten images, and two of each class")
    return real.rows(training), real.rows(held)


def initial_network(args, real, label_dim):
    """The network that everything starts from, and its description: --teacher's, or a fresh one."""
    if args.teacher:
        return load_teacher(args.teacher, real, args.cond, args.hold_out)

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


def check_teacher(args, teacher, shape, class_counts, device):
    """report.teacher_defect of a given teacher, on 64 samples that it draws in 50 steps."""
    indices = torch.arange(64)
    noise = processes.noise_from(args.seed * 2**32 + indices, shape, device)
    cond = images.condition(images.labels_of(indices, class_counts), len(class_counts), device)
    x0 = fgm.sample_ode(teacher, noise, 50, **cond)
    return report.teacher_defect(args.teacher, teacher, x0, args.seed, **cond)


def main():
    args = arguments()
    device = processes.setup(args.device)
    if args.sample:
        return draw_from_files(args, device)
    fgm.micro_batches(args.batch, args.micro_batch)
    if args.micro_batch is None and device.type == "cuda":
        args.micro_batch = processes.largest_divisor(args.batch // fgm.world_size(), 128)
    out = out_folder(args)

    # The data and their scores: what cannot be scored is refused now, and not at the end.
    real, held_out = images.load_images(args.data, args.resolution, args.cond), None
    if args.hold_out:
        real, held_out = hold_out(real)
    if len(real.pixels) < 4:
        raise InputError(f"{args.data} has {len(real.pixels)} images, and its scores need at least 4")
    class_counts = real.class_counts() if args.cond else []
    fid_features = None
    if args.fid:
        fid_features = partial(scores.inception_features, weights=args.inception_weights, device=device)
        processes.first_process(lambda: fid_features(real.pixels[:4]))

    # The networks.
    net, network = initial_network(args, real, len(class_counts))
    net, shape = net.to(device), image_shape(network)
    teacher, flow = copy.deepcopy(net), copy.deepcopy(net)
    for module in (teacher, flow, net):
        processes.shard(module, [block for block in module.modules() if isinstance(block, Block)])
    data, conditions = images.data_functions(real, len(class_counts), args.flip, device)
    gan = None
    if args.gan:
        torch.manual_seed(args.seed)
        weights = args.gan, args.gan_discriminator or 5 * args.gan
        gan = GAN(keep_features(flow), data, args.t_flow, *weights).to(device)
        processes.shard(gan.head)

    about = {"network": network, "data": args.data, "images": real.fingerprint(), "classes": real.classes,
             "class_counts": class_counts}
    generator = fgm.OneStepGenerator(net, args.t_star, args.c_in, args.c_skip, args.c_out)
    settings = flags.distillation_settings(args, math.ceil(args.kimg * 1000 / args.batch))

    # One distillation step now: what would stop it should not do so after the teacher's training, nor after
    # --overwrite has removed the run before.
    fgm.distill(teacher, generator, flow, shape, conditions=conditions, extra=copy.deepcopy(gan),
                **settings | {"steps": 1})
    if args.compile:
        processes.compile_networks(teacher, flow, net)

    folder_run = run.folder_run(args, out)
    folder_run.fingerprint = {"images": about["images"], "network": network, "flip": args.flip}
    if args.overwrite and not args.teacher and fgm.process_rank() == 0:
        (out / "teacher.safetensors").unlink(missing_ok=True)
    begun = {phase for phase in run.PHASES if checkpoint.checkpoints(folder_run.folder, phase)}
    if begun == {"distill"} and not args.teacher and not args.resume:
        raise InputError(f"{out} holds a run that was given its --teacher: give it again, or --overwrite, or "
                         "name another --out")

    # The teacher, by ReFlow (3.6), or a given one.
    seconds, defect = {"teacher": 0.0}, None
    if args.teacher:
        defect = check_teacher(args, teacher, shape, class_counts, device)
    else:
        teacher, seconds["teacher"] = fgm.train_flow(
            teacher.train(), data, steps=math.ceil(args.teacher_kimg * 1000 / args.batch),
            ema_decay=args.teacher_ema, run=folder_run, **flags.teacher_settings(args))
        run.save_weights(teacher, out / "teacher.safetensors", {"about": json.dumps(about)})

    # Distillation, Algorithm 1: all three networks start as the teacher.
    for module in (net, flow):
        module.load_state_dict(teacher.state_dict())
    draw = partial(images.draw_images, shape=shape, class_counts=class_counts, device=device, seed=args.seed)

    def draw_fast(sampler, n, in_turn):
        classes = range(len(class_counts)) if in_turn else None
        with torch.autocast(device.type, torch.bfloat16, enabled=fgm.wants_bf16(args.precision, device)):
            return draw(sampler, n, classes=classes)[0]

    folder_run.picture = scores.make_picture(out, real.pixels, teacher, draw_fast, min(args.samples, 500))
    folder_run.fingerprint |= {"teacher_weights": run.fingerprint_of(teacher), "gan": gan and gan.weights}
    generator, seconds["distillation"] = fgm.distill(
        teacher, generator, flow, shape, conditions=conditions, extra=gan, run=folder_run, **settings)
    if args.teacher:  # not before a run with another teacher in OUT would have been refused
        run.save_weights(teacher, out / "teacher.safetensors", {"about": json.dumps(about)})
    about |= {"generator": generator.coefficients()}
    run.save_weights(generator.net, out / "generator.safetensors", {"about": json.dumps(about)})

    # Samples, scores, pictures. The first process alone scores.
    began, scorer = time.perf_counter(), None
    if fgm.process_rank() == 0:
        judge = scores.judge_of(real, args.cond, args.flip, device, out / "judge.safetensors")
        scorer = scores.Scores(real, args.cond, judge, args.samples, fid_features, held_out, args.flip)
    processes.wait_for_first()

    steps = (1, 10, 50, 100) if args.fid else (1, 10, 50)
    samplers = {report.teacher_title(n): partial(fgm.sample_ode, teacher, steps=n) for n in steps}
    rows = score(args, scorer, samplers | {"one step": generator}, draw, len(real.classes), out)
    seconds["scores"] = time.perf_counter() - began
    if scorer:
        write_results(args, about, scorer, rows, defect, seconds, out)


# ---- Scores ------------------------------------------------------------------------------------------------


def score(args, scorer, samplers, draw, classes, out):
    """Draw from all samplers with the same seeds, and write a picture of each. A collective call.

    samplers: {"teacher, 50 steps", ..., "one step": sampler}; draw: images.draw_images without what is the
    same for all; scorer: None but on the first process. Returns {the same name: {score: value}}, there."""
    rows, grids = {}, {}
    for name, sampler in samplers.items():
        began = time.perf_counter()
        pixels, labels = draw(sampler, args.samples, title=f"scoring: {name}")
        seconds = time.perf_counter() - began
        grid, _ = draw(sampler, min(100, args.samples), classes=range(classes))  # to be looked at
        if scorer:
            grids[name] = grid
            rows[name] = scorer.of(pixels, labels) | {"seconds": seconds}
            if args.hold_out and name in ("teacher, 50 steps", "one step"):
                rows[name] |= scorer.copies(pixels)
    if scorer:
        images.save_samples(out, {"data": scorer.real.in_turn(100)} | grids)
    return rows


def score_title(args, score):
    """What a score is called; FID is that of 50,000 samples or more alone."""
    if score == "fid":
        return "FID" if args.samples >= 50_000 else f"fid-{args.samples / 1000:g}k"
    if score == "noise":
        return "+- of the first"  # what another draw of the samples would move the first distance by
    return score.replace("_frechet", " Frechet distance")


def write_results(args, about, scorer, rows, defect, seconds, out):
    """Write config.json and metrics.json, and print the table."""
    main, pixels = "fid" if args.fid else scorer.main, scorer.real.pixels
    metrics = {
        "metric": score_title(args, main), **report.metrics_of(rows, main, args.samples, defect, seconds),
        "against": f"{len(pixels)} training images of {args.data}",
        "labels": "drawn as often as the data has each class" if args.cond else "none",
        "detector": "torch-fidelity Inception-v3" if args.fid else scorer.detector,
        "noise_floor": scorer.of_data, "noise_floor_of": scorer.data_title,
    }
    run.write_results(out, about | {"settings": vars(args) | {"out": str(out)}}, metrics)

    data = f"{args.data} (conditional)" if args.cond else args.data
    print(f"{data}: {args.samples:,} samples against {len(pixels):,} training images of "
          f"{pixels.shape[-1]}x{pixels.shape[-1]}")
    table = {scorer.data_title: scorer.of_data} | rows
    report.print_scores({
        title: {score_title(args, score): value for score, value in row.items()}
        for title, row in table.items()})
    report.print_end(defect, seconds, out)


if __name__ == "__main__":
    run.command(main)
