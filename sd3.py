"""Stable Diffusion 3 in one step: its MM-DiT distilled by FGM (arXiv 2410.19310, section 5.2, appendix B.2).

    python tiny_sd3.py --out runs/tiny-sd3          # a miniature SD3, no GPU, no network ...
    python sd3.py --model runs/tiny-sd3             # ... and the whole method on it
    torchrun --nproc-per-node 8 sd3.py              # SD3-medium, the paper's settings
    python sd3.py --lora 64 --micro-batch 1         # SD3-medium on one GPU: one base, two adapters
    python sd3.py --sample "a red fox in the snow" --n 4 --out runs/sd3     # draw from a finished run

The run writes OUT/pipeline; afterwards only diffusers is needed:

    pipe = StableDiffusion3Pipeline.from_pretrained("OUT/pipeline")
    image = pipe("a red fox in the snow", num_inference_steps=1, guidance_scale=0).images[0]

Prompts are encoded once (text2image/prompts.py), the networks are made in one of two memory recipes
(text2image/transformer.py), distilled (fgm.py), exported and scored (text2image/pipeline.py).

The models differ like this:

    in the model's name     --guidance          blocks, norms of q and k, second attention
    3-medium                4, the paper's      24, no, no
    3.5-medium              4.5, its card's     24, yes, in the first 13
    3.5-large               3.5, its card's     38, yes, no
    turbo                   1: none, its card's

All of them sample with shift 3, which is in their scheduler. FGM's own times are --t-flow and --t-generator.
"""

import argparse
import math
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import fgm
from fgm import InputError
from images.data import save_grid, save_samples
from text2image import pipeline
from text2image.digits import copy_scores, digit_of, has_held_out, is_miniature, judge
from text2image.pipeline import empty_network, find_model, free_memory
from text2image.prompts import cached_embeddings, digest_of, find_prompts, read_json_lines, text_of
from text2image.real import cached_latents, load_real
from text2image.transformer import networks
from training import checkpoint, files, flags, processes, report, run
from training.files import open_folder
from training.flags import COUNT, Setting
from training.gan import GAN
from training.progress import make_scorer

# ---- Settings ----------------------------------------------------------------------------------------------

# The paper's settings (section 5.2, appendix B.2); it gives no length, EMA decay or warm-up: those are ours.
PAPER = dict(
    model="stabilityai/stable-diffusion-3-medium-diffusers", height=1024, width=1024, out="runs/sd3",
    save_every=250, log_every=10, picture_every=250, guidance=4.0, kimg=1920, batch=192, lr=5e-6,
    flow_lr=5e-6, lr_warmup=0, lr_decay=0.0, clip=None, ema=0.999, t_star=0.97, c_in=0.8, l1_weight=0.0,
    weight="none", t_generator=(2.4, 1.0), t_flow=(-1.0, 2.0), loss_scale=100.0,
    flow_updates=1, gan_generator=1e-2, gan_discriminator=5e-2, samples=8, n=4)
# Measured on the miniature of tiny_sd3.py, on a laptop's budget.
TINY = PAPER | dict(
    height=32, width=32, save_every=100, picture_every=100, kimg=3.2, batch=24, lr=2e-3, flow_lr=4e-3,
    lr_warmup=20, lr_decay=0.7, ema=0.95, l1_weight=0.5, t_generator=(0.0, 2.0), t_flow=(0.0, 2.0),
    samples=500)
# With --real: L2 alone and the t of the flow, both as in the paper; the GAN takes its t from there. Whether
# the weights are larger than the paper's is unknown, since it does not say if its losses are sums or means.
TINY_WITH_GAN = TINY | dict(
    kimg=4.8, l1_weight=0.0, t_flow=PAPER["t_flow"], gan_generator=0.5, gan_discriminator=5.0)
# By what a model's name holds; the last that fits counts.
GUIDANCE = {"3.5-medium": 4.5, "3.5-large": 3.5, "turbo": 1.0}

FLAGS = {  # by their group in --help
    "model and prompts": {
        "model": Setting(flags.path, None, "hub id, or folder of a StableDiffusion3Pipeline"),
        "prompts": Setting(flags.path, None, "txt or jsonl (default: the model's prompts.txt, or a built-in "
                                             "grammar)", metavar="FILE"),
        "embeddings": Setting(flags.path, None, "cache of encoded prompts (default: OUT/embeddings)",
                              metavar="DIR"),
        "height": Setting(int, COUNT, "of the images, in pixels"),
        "width": Setting(int, COUNT, "of the images, in pixels"),
    },
    "run": {
        "out": Setting(flags.path, None, "output folder"), **flags.RUN_FLAGS, **flags.PICTURE_FLAG,
        "checkpointing": Setting(argparse.BooleanOptionalAction, None,
                                 "recompute activations in the backward pass (default: on a GPU)"),
    },
    "distillation": {
        "lora": Setting(int, COUNT, "one base and two LoRA adapters, not three networks; lora.safetensors "
                                    "works with the scheduler of OUT/pipeline alone", metavar="RANK"),
        "guidance": Setting(float, "[1, 1000]", "classifier-free guidance of the teacher; 1: none"),
        "kimg": Setting(float, flags.POSITIVE, "thousand images to distil with"),
        **flags.EVERYDAY_FLAGS,
    },
    "GAN (appendix B.2)": {
        "real": Setting(flags.path, None, "real images with captions in metadata.jsonl, metadata.csv or "
                                          "NAME.txt; turns the GAN on", metavar="DIR"),
        "gan_generator": Setting(float, "[0, 1e9]", "weight in the generator's loss, both per element"),
        "gan_discriminator": Setting(float, "[0, 1e9]", "weight in the flow's loss, both per element"),
    },
    "scores, and drawing samples from a finished run": {
        "samples": Setting(int, "[2, 1e9]", "images scored"),
        "sample": Setting(str, None, "draw images of PROMPT from a finished run instead of training",
                          metavar="PROMPT"),
        "n": Setting(int, "[1, 1e6]", "number of images for --sample"),
        "ode_steps": Setting(int, COUNT, "draw from the run's teacher in K steps with guidance", metavar="K"),
        "geneval": Setting(flags.path, None, "draw 4 images per prompt into OUT/geneval, laid out for "
                                             "GenEval's scorer", metavar="METADATA.jsonl"),
    },
    # A diffusers pipeline can only hold c_skip 1 and c_out t*.
    "advanced": {name: setting for name, setting in flags.ADVANCED_FLAGS.items()
                 if name not in ("c_skip", "c_out")},
}
OF_TEACHER = ("model", "guidance", "height", "width")  # what --sample takes over from the run in OUT
NEEDS = {"n": ["sample"], "ode_steps": ["sample", "geneval"], "gan_generator": ["real"],
         "gan_discriminator": ["real"]}


def defaults(given):
    """The settings that are not given: to draw images those of the run in OUT, on a miniature TINY, else the
    paper's with the guidance of the model."""
    config = Path(given.out) / "config.json"
    if (given.sample or given.geneval) and config.exists():
        of_run = files.read_json(config).get("settings", {})
        return PAPER | {name: of_run[name] for name in OF_TEACHER if name in of_run}
    if is_miniature(given.model):
        return TINY_WITH_GAN if given.real else TINY

    settings = dict(PAPER)
    for part, guidance in GUIDANCE.items():
        if part in Path(given.model).name:
            settings["guidance"] = guidance
    if given.lora:  # a step takes minutes
        settings |= dict(save_every=25, log_every=5, picture_every=25)
    return settings


def arguments():
    parser = flags.Parser(
        FLAGS, prog="sd3.py",
        description="Distil Stable Diffusion 3 into a one-step pipeline (FGM, arXiv 2410.19310).",
        epilog="The defaults are the paper's where it gives a value; --kimg, --ema, intervals, --samples and "
               "t in the GAN (--t-flow) are ours. With a folder of tiny_sd3.py as --model they are the "
               "miniature's, and others with --real.")
    parser.set_defaults(**PAPER)
    args = parser.parse_with(defaults, NEEDS)
    if args.sample and args.geneval:
        raise InputError("--sample and --geneval draw different images: give one of them")
    if args.height % 16 or args.width % 16:
        raise InputError(f"height and width must be divisible by 16, got {args.height} and {args.width}")
    return args


# ---- Drawing from a finished run ---------------------------------------------------------------------------


def draw_from_run(args, device, dtype):
    """--sample and --geneval: images of the run in OUT, or with --ode-steps of its teacher."""
    out, size = Path(args.out), (args.height, args.width)
    if args.ode_steps:
        folder, steps, guidance = find_model(args.model), args.ode_steps, args.guidance
    else:
        folder, steps, guidance = out / "pipeline", 1, 0
    if not (folder / "model_index.json").exists():
        raise InputError(f"{folder} holds no pipeline: the run has not finished, or --out names another one")

    def images_of(prompts):
        return pipeline.draw(folder, prompts, steps, guidance, size, device, dtype, args.seed, batch=4)[0]

    if args.sample:
        images = torch.stack(list(images_of([args.sample] * args.n)))
        save_grid(open_folder(out) / "sample.png", images, min(args.n, 8))
        print(f"{args.n} images: {out}/sample.png")
    else:
        records = read_json_lines(args.geneval)
        if not records:
            raise InputError(f"{args.geneval} holds no prompts")
        prompts = [text_of(record, "prompt", args.geneval) for record in records for _ in range(4)]
        target = out / (f"geneval-{steps}-steps" if args.ode_steps else "geneval")
        pipeline.write_geneval(records, images_of(prompts), target)
        print(f"{len(records)} prompts, 4 images each, in {target}")


# ---- The parts of a run ------------------------------------------------------------------------------------


class Source(NamedTuple):
    """What a run starts from."""

    folder: Path  # of the pipeline
    config: dict  # of its transformer
    width: int  # of its transformer's hidden states
    size: tuple  # (H, W) of an image
    shape: tuple  # of a latent
    prompts: list
    paths: list  # of the real images, or none
    captions: list  # theirs
    device: torch.device
    dtype: torch.dtype  # of what is not trained, and of what is exported

    def spread(self, n):
        """The indices of n prompts from all over the list."""
        return torch.arange(n) * len(self.prompts) // n


def read_source(args, device, dtype):
    """The Source that the flags name, checked as far as it can be without loading anything.

    Fills in the settings that depend on the device. Raises InputError."""
    fgm.micro_batches(args.batch, args.micro_batch)
    if args.micro_batch is None and device.type == "cuda":
        args.micro_batch = processes.largest_divisor(args.batch // fgm.world_size(), 4)
    if args.checkpointing is None:
        args.checkpointing = device.type == "cuda"

    folder = find_model(args.model)
    config = empty_network(folder, "transformer").config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if args.lora and args.lora > width:
        raise InputError(f"--lora {args.lora} is more than the width of the model's layers: "
                         f"give {width} or less")
    size = args.height, args.width
    shape = pipeline.latent_shape(folder, size)
    prompts = find_prompts(args.prompts, folder)
    if is_miniature(folder):
        for prompt in prompts:
            digit_of(prompt)  # raises now, not at the scores, for one that names no digit
    paths, captions = load_real(args.real) if args.real else ([], [])
    return Source(folder, config, width, size, shape, prompts, paths, captions, device, dtype)


def make_networks(args, source, null, real):
    """(guided teacher, generator, online flow, GAN or None) as a run begins with them.

    null: the empty prompt, as the transformer takes it; real(seeds): the GAN's real data, None without it."""
    torch.manual_seed(args.seed)
    teacher, flow, net = networks(
        source.folder, args.lora, args.checkpointing, source.dtype == torch.bfloat16, source.device,
        keep_features=real is not None)
    gan = None
    if real is not None:
        grid = [side // source.config["patch_size"] for side in source.shape[1:]]
        gan = GAN(source.width, real, args.t_flow, args.gan_generator, args.gan_discriminator, grid)
        gan.to(source.device)
        processes.shard(gan.head)
    generator = fgm.OneStepGenerator(net, args.t_star, args.c_in)
    return fgm.Guided(teacher, args.guidance, null), generator, flow, gan


TEXT_TOKENS = 77 + 256  # CLIP's and T5's: no prompt is longer


def try_one_step(args, source):
    """One step of the run on random data, and one image decoded, with networks that are then thrown away.

    So what cannot be loaded, or does not fit into memory, is found before all prompts are encoded."""

    def text(n):
        kind = dict(device=source.device, dtype=source.dtype)
        tokens = torch.randn(n, TEXT_TOKENS, source.config["joint_attention_dim"], **kind)
        pooled = torch.randn(n, source.config["pooled_projection_dim"], **kind)
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    def real(seeds):
        return torch.randn(len(seeds), *source.shape, device=source.device), text(len(seeds))

    teacher, generator, flow, gan = make_networks(args, source, text(1), real if args.real else None)
    _, micro_batch = fgm.micro_batches(args.batch, args.micro_batch)
    settings = flags.distillation_settings(args, steps=1)
    settings |= {"batch": micro_batch * fgm.world_size(), "micro_batch": micro_batch}
    fgm.distill(teacher, generator, flow, source.shape, eps=1e-6, extra=gan,
                conditions=lambda seeds: text(len(seeds)), **settings)
    list(pipeline.decode(source.folder, torch.randn(1, *source.shape), source.device, source.dtype))


def real_data(args, source, out):
    """real(seeds) -> (latents, cond) for the GAN: images and captions, encoded by the source pipeline."""
    folder, device, dtype = source.folder, source.device, source.dtype
    embeddings = cached_embeddings(folder, source.captions, out / "captions", device, dtype)
    latents = cached_latents(folder, source.paths, source.size, out / "latents", device, dtype)

    def real(seeds):
        chosen = seeds % len(source.paths)
        return latents(chosen)["latents"].float(), embeddings(chosen)

    return real


def make_draw_latents(args, source, embeddings):
    """draw_latents(sampler, n) -> latents [n, 16, h, w] of n prompts from all over the list, by noise of the
    seeds 0 to n - 1."""

    def draw_latents(sampler, n):
        latents = []
        with fgm.bf16_passes(args.precision, source.device), torch.no_grad():
            for seeds in torch.arange(n).split(args.micro_batch or n):
                cond = embeddings(source.spread(n)[seeds])
                noise = processes.noise_from(seeds, source.shape, source.device)
                latents.append(sampler(noise, **cond))
        return torch.cat(latents)

    return draw_latents


def check_teacher(args, source, teacher, embeddings, draw_latents):
    """report.teacher_defect of the teacher without guidance, on a few of its own samples.

    A guided velocity is no mean and cannot be told so."""
    n = 32 if is_miniature(source.folder) else 4
    x0 = draw_latents(partial(fgm.sample_ode, teacher.net, steps=28), n)
    with fgm.bf16_passes(args.precision, source.device):
        return report.teacher_defect(args.model, teacher.net, x0, args.seed, **embeddings(source.spread(n)))


def make_run(args, source, teacher, draw_latents, out):
    """The run in OUT: its pictures, its score on a miniature, and what a resumed run must share with it."""
    few = min(args.samples, 32)
    prompts = [source.prompts[i] for i in source.spread(few)]

    def decoded(latents):
        return torch.stack(list(pipeline.decode(source.folder, latents, source.device, source.dtype)))

    def distance(sampler):
        return judge(decoded(draw_latents(sampler, few)), prompts)[1]

    scorer = make_scorer(teacher, distance)

    def picture(step, generator):
        latents = draw_latents(generator, 8)
        if fgm.process_rank() == 0:
            save_grid(out / f"distill-{step:07d}.png", decoded(latents))
        return scorer(step, generator) if is_miniature(source.folder) else {}

    folder_run = run.folder_run(args, out)
    folder_run.picture = picture
    real_files = [[path.relative_to(args.real).as_posix(), path.stat().st_size] for path in source.paths]
    folder_run.fingerprint = {
        "lora": args.lora, "prompts": digest_of(source.prompts), "guidance": args.guidance,
        "height": args.height, "width": args.width, "gan": [args.gan_generator, args.gan_discriminator],
        "real": digest_of([real_files, source.captions]) if args.real else None,
        "teacher_weights": run.fingerprint_of(teacher.net.shared if args.lora else teacher.net)}
    return folder_run


# ---- Scores ------------------------------------------------------------------------------------------------


def score(args, source, out):
    """Draw with unmodified diffusers, and write pictures: {sampler: {score: value}}.

    The samplers are the source pipeline, with 28 steps and with 1, and OUT/pipeline. On the miniature digits
    are judged, and other models have no metric here (see --geneval). Seconds are those of the transformer."""
    samplers = {
        "teacher, 28 steps": (source.folder, 28, args.guidance),
        "teacher, 1 step": (source.folder, 1, args.guidance),
        "one step": (out / "pipeline", 1, 0)}
    miniature = is_miniature(source.folder)
    prompts = [source.prompts[i % len(source.prompts)] for i in range(args.samples)]
    rows, samples = {}, {}

    for name, (folder, steps, guidance) in samplers.items():
        images, seconds = pipeline.draw(
            folder, prompts, steps, guidance, source.size, source.device, source.dtype, args.seed,
            batch=50 if miniature else 4, title=f"scoring: {name}")
        images = torch.stack(list(images))
        rows[name] = {"seconds_per_image": seconds / len(images)}
        samples[name] = images[:240:8] if miniature else images[:8]
        if miniature:
            rows[name]["following"], rows[name]["pixel_frechet"] = judge(images, prompts)
            if has_held_out(source.folder):
                rows[name] |= copy_scores(images)
    save_samples(out, samples)
    return rows


def write_results(args, rows, coefficients, defect, seconds, out):
    """Write config.json and metrics.json, and print the table."""
    metric = "pixel_frechet" if "pixel_frechet" in rows["one step"] else "seconds_per_image"
    metrics = {"metric": metric, **report.metrics_of(rows, metric, args.samples, defect, seconds)}
    run.write_results(out, {"generator": coefficients, "settings": vars(args)}, metrics)

    print(f"{args.model}: {args.samples} samples")
    report.print_scores(rows)
    report.print_end(defect, seconds, out)


# ---- The command -------------------------------------------------------------------------------------------


def main():
    args = arguments()
    device = processes.setup(args.device)
    pipeline.quiet()
    dtype = torch.bfloat16 if fgm.wants_bf16(args.precision, device) else torch.float32
    if args.sample or args.geneval:
        return processes.first_process(lambda: draw_from_run(args, device, dtype))

    # The source pipeline, prompts and real images; prompts and images are encoded once.
    source, out = read_source(args, device, dtype), open_folder(args.out)
    if args.overwrite or not checkpoint.checkpoints(out / "checkpoints", "distill"):
        try_one_step(args, source)
        free_memory()
    cache = args.embeddings or out / "embeddings"
    embeddings = cached_embeddings(source.folder, source.prompts, cache, device, dtype)
    real = real_data(args, source, out) if args.real else None

    # The networks, whether the teacher is one, and Algorithm 1.
    teacher, generator, flow, gan = make_networks(args, source, embeddings.null, real)
    draw_latents, defect = make_draw_latents(args, source, embeddings), None
    if args.model != PAPER["model"]:
        defect = check_teacher(args, source, teacher, embeddings, draw_latents)
    if args.compile:
        processes.compile_networks(teacher, generator.net, flow)
    folder_run = make_run(args, source, teacher, draw_latents, out)  # locks OUT as long as it exists
    _, distill_seconds = fgm.distill(
        teacher, generator, flow, source.shape, eps=1e-6, extra=gan, run=folder_run,
        conditions=lambda seeds: embeddings(seeds % len(source.prompts)),
        **flags.distillation_settings(args, math.ceil(args.kimg * 1000 / args.batch)))

    # The files.
    coefficients = generator.coefficients()
    run.save_weights(generator.net, out / "generator.safetensors")
    pipeline.export(source.folder, generator, args.lora, dtype, out, source.shape)
    folder_run.picture = None  # it holds the teacher
    del teacher, flow, generator, gan  # the device is for the pipelines now
    free_memory()

    # The scores.
    if fgm.process_rank() == 0:
        trained_on = (f"{args.kimg:g} thousand samples for {len(source.prompts)} prompts, and on "
                      f"{len(source.paths)} images")
        pipeline.write_card(args.model, source.size, coefficients, trained_on, out)
        began = time.perf_counter()
        rows = score(args, source, out)
        seconds = {"distillation": distill_seconds, "scores": time.perf_counter() - began}
        write_results(args, rows, coefficients, defect, seconds, out)


if __name__ == "__main__":
    run.command(main)
