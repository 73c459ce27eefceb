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

What differs by --model (all sample with shift 3, which is the teacher's own and read from its scheduler; what
FGM draws t from are --t-flow and --t-generator):

    in the model's name     --guidance          blocks, norms of q and k, second attention
    3-medium                4, the paper's      24, no, no
    3.5-medium              4.5, its card's     24, yes, in the first 13
    3.5-large               3.5, its card's     38, yes, no
    turbo                   1: none, its card's
"""

import argparse
import math
import time
from collections import namedtuple
from pathlib import Path

import torch

import fgm
from fgm import InputError
from images.data import save_grid, save_samples
from text2image import hub, pipeline
from text2image.card import table, write_card
from text2image.digits import digit_of, is_miniature, judge
from text2image.prompts import contents, described, digest_of, encode_prompts, find_prompts, free_memory
from text2image.real import encode_images, load_real
from text2image.transformer import networks, print_memory
from training import flags, run
from training.files import open_folder
from training.flags import COUNT, Setting
from training.gan import GAN
from training.sizes import check_sizes

# ---- Settings ----------------------------------------------------------------------------------------------

# The paper's settings (section 5.2, appendix B.2); it gives no length, EMA decay or warm-up: those are ours.
PAPER = dict(
    model="stabilityai/stable-diffusion-3-medium-diffusers", height=1024, width=1024, out="runs/sd3",
    save_every=250, log_every=10, picture_every=250, guidance=4.0, kimg=1920, batch=192, lr=5e-6,
    flow_lr=5e-6, lr_warmup=0, lr_decay=0.0, clip=None, ema=0.999, t_star=0.97, c_in=0.8, c_skip=1.0,
    l1_weight=0.0, weight="none", t_generator=(2.4, 1.0), t_flow=(-1.0, 2.0), loss_scale=100.0,
    flow_updates=1, gan_generator=1e-2, gan_discriminator=5e-2, samples=8, n=4)
# Measured on the miniature of tiny_sd3.py, on a laptop's budget.
TINY = PAPER | dict(
    height=32, width=32, save_every=100, picture_every=100, kimg=3.2, batch=24, lr=2e-3, flow_lr=4e-3,
    lr_warmup=20, lr_decay=0.7, ema=0.95, l1_weight=0.5, t_generator=(0.0, 2.0), t_flow=(0.0, 2.0),
    samples=500)
GUIDANCE = {"turbo": 1.0, "3.5-medium": 4.5, "3.5-large": 3.5}  # by what a model's name holds; see above

FLAGS = {  # by their group in --help
    "model and prompts": {
        "model": Setting(str, None, "hub id, or folder of a StableDiffusion3Pipeline"),
        "prompts": Setting(str, None, "txt or jsonl (default: the model's prompts.txt or a built-in grammar)",
                           metavar="FILE"),
        "embeddings": Setting(str, None, "cache of encoded prompts (default: OUT/embeddings)", metavar="DIR"),
        "height": Setting(int, COUNT, "of the images, in pixels"),
        "width": Setting(int, COUNT, "of the images, in pixels"),
    },
    "run": {
        "out": Setting(str, None, "output folder"), **flags.RUN_FLAGS, **flags.PICTURE_FLAG,
        "paper": Setting(bool, None, "the paper's settings, not the miniature's, on a miniature too"),
        "checkpointing": Setting(argparse.BooleanOptionalAction, None,
                                 "recompute activations in the backward pass (default: on a GPU)"),
    },
    "distillation (on a GPU the default micro-batch is 4)": {
        "lora": Setting(int, COUNT, "one base and two LoRA adapters, not three networks; lora.safetensors "
                                    "works with the scheduler of OUT/pipeline alone", metavar="RANK"),
        "guidance": Setting(float, "[1, 1000]", "classifier-free guidance of the teacher; 1: none"),
        "kimg": Setting(float, flags.POSITIVE, "thousand images to distil with"),
        **flags.DISTILLATION_FLAGS,
    },
    "GAN (appendix B.2)": {
        "real": Setting(str, None, "real images, captions in metadata.jsonl, .csv or NAME.txt; turns the GAN "
                                   "on", metavar="DIR"),
        "gan_generator": Setting(float, "[0, 1e9]", "weight in the generator's loss, both per element"),
        "gan_discriminator": Setting(float, "[0, 1e9]", "weight in the flow's loss, both per element"),
    },
    "scores, and drawing samples from a finished run": {
        "samples": Setting(int, "[2, 1e9]", "images drawn for the scores"),
        "sample": Setting(str, None, "draw images of PROMPT from the run in OUT", metavar="PROMPT"),
        "n": Setting(int, "[1, 1e6]", "number of images for --sample"),
        "ode_steps": Setting(int, COUNT, "draw from the run's teacher in K steps with guidance", metavar="K"),
        "geneval": Setting(str, None, "draw 4 images per prompt into OUT/geneval, laid out for GenEval's "
                                      "scorer", metavar="METADATA.jsonl"),
    },
}


def defaults(given):
    """The settings that are not given: the paper's, with the model's guidance, or the miniature's; to draw
    images, those of the run in OUT, unless another teacher is named."""
    found = settings_of(given.out) if given.sample or given.geneval else {}
    if found and given.model in (PAPER["model"], found["model"]):
        return PAPER | found
    if is_miniature(given.model) and not given.paper:
        return TINY
    known = (scale for name, scale in GUIDANCE.items() if name in Path(given.model).name)
    often = dict(save_every=25, log_every=5, picture_every=25) if given.lora else {}  # a step takes minutes
    return PAPER | often | {"guidance": next(known, PAPER["guidance"])}


def settings_of(out):
    """Model, guidance and size of the run in out, {} without a config.json; InputError for a damaged one."""
    path = Path(out) / "config.json"
    if not path.exists():
        return {}
    try:
        settings = run.read_json(path)["settings"]
        kinds = {"model": str, "guidance": float, "height": int, "width": int}
        return {name: kind(settings[name]) for name, kind in kinds.items()}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path} is damaged: it does not tell the run's model and size") from error


def arguments():
    parser = flags.Parser(
        prog="sd3.py",
        description="Distil Stable Diffusion 3 into a one-step pipeline (FGM, arXiv 2410.19310).",
        epilog="The defaults are the paper's, but for what it does not give: --kimg, --ema, t in the GAN "
               "(--t-flow), intervals, samples. With a folder of tiny_sd3.py in --model, the miniature's.")
    for title, settings in FLAGS.items():
        flags.add_flags(parser.add_argument_group(title).add_argument, settings)
    parser.set_defaults(**PAPER)
    always = {"n": ["sample"], "ode_steps": ["sample", "geneval"], "gan_generator": ["real"],
              "gan_discriminator": ["real"]}
    of_teacher = dict.fromkeys(["model", "guidance", "height", "width"], ["ode_steps"])
    meaningful = [*of_teacher, "ode_steps", "out", "seed", "device", "precision"]
    args = parser.parse_with(
        defaults,
        lambda args: always | (of_teacher if args.sample or args.geneval else {}),
        {"sample": [*meaningful, "n"], "geneval": meaningful})
    if args.height % 16 or args.width % 16:
        raise InputError(f"height and width must be divisible by 16, got {args.height} and {args.width}")
    if args.c_skip != 1 or args.c_out not in (None, args.t_star):
        raise InputError("a diffusers pipeline can hold --c-skip 1 and the default --c-out, t*, alone")
    return args


# ---- The steps of main -------------------------------------------------------------------------------------


def draw_from_run(args, device, dtype):
    """--sample and --geneval: images of the run in OUT, or with --ode-steps of the teacher."""
    out = Path(args.out)
    if args.ode_steps:
        source, steps, guidance = hub.model_folder(args.model), args.ode_steps, args.guidance
    else:
        source, steps, guidance = out / "pipeline", 1, 0
    if not source.is_dir():
        raise InputError(f"{source} does not exist: the run has not finished, or --out names another folder")

    def draw(prompts):
        size = args.height, args.width
        return pipeline.draw(source, prompts, steps, guidance, size, device, dtype, args.seed, 4, "drawing")

    if args.geneval:
        target = out / (f"geneval-{steps}-steps" if args.ode_steps else "geneval")
        return pipeline.geneval(args.geneval, target, draw)
    images = torch.stack(list(draw([args.sample] * args.n)))
    save_grid(open_folder(out) / "sample.png", images, min(args.n, 8))
    print(f"{args.n} images: {out}/sample.png")


# The pipeline's folder, its transformer's configuration, the shape of a latent; prompts; real images.
Source = namedtuple("Source", "folder config shape prompts paths captions")


def read_source(args, device):
    """The Source that the flags name, all of it checked; defaults that depend on the device are filled in.

    A collective call. Raises InputError for what cannot be had, or is not as it must be."""
    if args.micro_batch is None and device.type == "cuda":
        args.micro_batch = 4
    if args.checkpointing is None:
        args.checkpointing = device.type == "cuda"
    check_sizes(args, device)
    folder = hub.model_folder(args.model)
    config, size = described(folder, "transformer").config, (args.height, args.width)
    shape = pipeline.latent_shape(folder, size)
    check_sizes(args, device, math.prod(shape), scored=2 * 3 * args.height * args.width)
    prompts = find_prompts(args.prompts, folder)
    for prompt in prompts if is_miniature(folder) else ():
        digit_of(prompt)  # raises now, not at the scores, for one that names no digit
    return Source(folder, config, shape, prompts, *(load_real(args.real) if args.real else ((), ())))


def make_gan(args, source, device, dtype, out):
    """The GAN on image files with their captions, both encoded by the source pipeline."""
    embeddings = encode_prompts(source.folder, source.captions, out / "captions", device, dtype)
    size, config = (args.height, args.width), source.config
    latents = encode_images(source.folder, source.paths, size, source.shape, out / "latents", device, dtype)

    def real(seeds):
        chosen = seeds % len(latents)
        return latents(chosen)["latents"].float(), embeddings(chosen)

    width = config["num_attention_heads"] * config["attention_head_dim"]
    grid = [side // config["patch_size"] for side in source.shape[1:]]
    gan = GAN(width, real, args.t_flow, args.gan_generator, args.gan_discriminator, grid).to(device)
    gan.content = digest_of([latents.names, source.captions])  # for the run's fingerprint
    run.shard(gan.head)
    return gan


def make_run(args, source, teacher, embeddings, gan, device, dtype, out):
    """The run in OUT: its pictures, its score, and what a resumed run must share with it."""
    prompts, few = source.prompts, min(args.samples, 32)

    def draw(sampler, n, first=0):
        """Latents [n, 16, h, w] of n prompts from all over the list, noise by seeds first, first + 1, ..."""
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16), torch.no_grad():
            return torch.cat([
                sampler(run.noise_from(i + first, source.shape, device), **embeddings(i * len(prompts) // n))
                for i in torch.arange(n).split(args.micro_batch or n)])

    def judged(images):
        return judge(images, [prompts[i * len(prompts) // few] for i in range(few)])[1]

    folder_run = run.folder_run(args, out)
    folder_run.picture = pipeline.pictures(
        source.folder, out, teacher, draw, few, dtype, judged if is_miniature(source.folder) else None)
    folder_run.fingerprint = {
        "model": str(args.model), "lora": args.lora, "prompts": digest_of(prompts), "guidance": args.guidance,
        "height": args.height, "width": args.width, "real": args.real,
        "real_content": gan and gan.content,
        "gan": [args.gan_generator, args.gan_discriminator],
        "teacher_weights": contents(source.folder, "transformer/*")}
    return folder_run


def score(args, source, embeddings, device, dtype, out):
    """Draw with unmodified diffusers, and write pictures: {sampler: {score: value}}.

    The samplers are the source pipeline, with 28 steps and with 1, and OUT/pipeline. On the miniature digits
    are judged; other models have no metric here (see --geneval). Seconds are those of the transformer."""
    samplers = {
        "teacher, 28 steps": (source.folder, 28, args.guidance),
        "teacher, 1 step": (source.folder, 1, args.guidance),
        "one step": (out / "pipeline", 1, 0)}
    rows, drawn, prompts, miniature = {}, {}, source.prompts, is_miniature(source.folder)
    text = (lambda indices: embeddings(indices % len(prompts))), embeddings.null
    size, batch = (args.height, args.width), 50 if miniature else 4
    for name, (folder, steps, guidance) in samplers.items():
        what = f"scoring: {name}"
        latents, seconds = pipeline.draw_latents(
            folder, *text, args.samples, steps, guidance, size, device, dtype, args.seed, batch, what)
        images = torch.stack(list(pipeline.decode(folder, latents, device, dtype, what)))
        rows[name] = {"seconds_per_image": seconds / len(images)}
        drawn[name] = images[:240:8] if miniature else images[:8]
        if miniature:
            chosen = [prompts[i % len(prompts)] for i in range(len(images))]
            rows[name]["following"], rows[name]["pixel_frechet"] = judge(images, chosen)
    save_samples(out, drawn)
    return rows


def report(args, rows, coefficients, seconds, out):
    """Write config.json and metrics.json, and print the table."""
    metric = "pixel_frechet" if "pixel_frechet" in rows["one step"] else "seconds_per_image"
    teacher = {"1": rows["teacher, 1 step"][metric], "28": rows["teacher, 28 steps"][metric]}
    run.write_results(out, {"generator": coefficients, "settings": vars(args)}, {
        "metric": metric, "samples": args.samples, "teacher": teacher, "one_step": rows["one step"][metric],
        "rows": rows, "seconds": seconds})
    print(f"{args.model}: {args.samples} samples; {metric} of one step: {rows['one step'][metric]:.4f}")
    print(*table(rows), sep="\n")
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    print(f"{spent}; pipeline, pictures and metrics.json in {out}")


# ---- The command -------------------------------------------------------------------------------------------


def main():
    args = arguments()
    device = run.setup(args.device)
    pipeline.quiet()
    bf16 = fgm.wants_bf16(args.precision, device)
    dtype = torch.bfloat16 if bf16 else torch.float32
    if args.sample or args.geneval:
        return run.first_process(lambda: draw_from_run(args, device, dtype))

    # The source pipeline, prompts and real images; prompts and images are encoded once.
    source, out = read_source(args, device), open_folder(args.out)
    if fgm.process_rank() == 0:
        print_memory(args, source.folder, source.config, source.shape, bf16, device)
    torch.manual_seed(args.seed)
    cache = args.embeddings or out / "embeddings"
    embeddings = encode_prompts(source.folder, source.prompts, cache, device, dtype)
    gan = make_gan(args, source, device, dtype, out) if args.real else None

    # The networks, and Algorithm 1.
    teacher, flow, net = networks(source.folder, args.lora, args.checkpointing, bf16, device, bool(args.real))
    teacher = fgm.Guided(teacher, args.guidance, embeddings.null)
    generator, distill_seconds = fgm.distill(
        teacher, fgm.OneStepGenerator(net, args.t_star, args.c_in), flow, source.shape, eps=1e-6, extra=gan,
        conditions=lambda seeds: embeddings(seeds % len(source.prompts)),
        run=make_run(args, source, teacher, embeddings, gan, device, dtype, out),
        **flags.distillation_settings(args, math.ceil(args.kimg * 1000 / args.batch)))

    # The files, and the scores.
    run.save_weights(generator.net, out / "generator.safetensors")
    pipeline.export(source.folder, generator, args.lora, dtype, out, source.shape)
    coefficients = generator.coefficients()
    del teacher, flow, net, generator, gan  # the device is for the pipelines now
    free_memory()
    if fgm.process_rank() == 0:
        began = time.perf_counter()
        rows = score(args, source, embeddings, device, dtype, out)
        seconds = {"distillation": distill_seconds, "scores": time.perf_counter() - began}
        report(args, rows, coefficients, seconds, out)
        write_card(source.folder, vars(args), coefficients, len(source.prompts), rows, out)


if __name__ == "__main__":
    run.command(main)
