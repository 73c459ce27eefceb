"""What a distillation step costs: against its bare network passes, and against SiD's loop.

    python bench.py                                 # a few minutes on 2 CPU cores
    python bench.py --compile --json bench.json     # also with torch.compile

On a GPU also the U-Net of CIFAR-10's size, bfloat16, and the peak memory.

Every row is a ratio of two things, measured in turns in the same run: median and range of the repeats.
"""

import itertools
import statistics
import tempfile
import time
import warnings
from collections import namedtuple
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import fgm
import tiny_sd3
import toy2d
from images import unet as edm
from text2image import transformer as sd3_transformer
from text2image.pipeline import quiet
from training import flags
from training.files import open_folder, write_json
from training.flags import Setting
from training.processes import compile_networks, setup
from training.run import command

# ---- The subjects: what fgm.distill takes, new in every call -----------------------------------------------


# Three networks, the shape of a sample, the batch, and conditions(seeds) -> cond.
Subject = namedtuple("Subject", "teacher flow net shape batch conditions")


def toy(device, batch=4096):
    networks = [toy2d.VelocityMLP().to(device) for _ in range(3)]
    return Subject(*networks, (2,), batch, lambda seeds: {})


def unet(device, batch, size, channels, **network):
    network |= dict(img_resolution=size, in_channels=channels, out_channels=channels, label_dim=10)
    networks = [edm.build(network).to(device).eval() for _ in range(3)]
    labels = torch.eye(10, device=device)
    return Subject(
        *networks, (channels, size, size), batch, lambda seeds: {"class_labels": labels[seeds % 10]})


def miniature(device, batch=48, lora_rank=0, checkpointing=None, config=tiny_sd3.TRANSFORMER):
    """SD3's transformer with guidance, by a diffusers config, on latents of 4x4 and texts of 272 tokens.

    lora_rank 0: three networks. checkpointing None: on a GPU."""
    from diffusers import SD3Transformer2DModel

    if checkpointing is None:
        checkpointing = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        SD3Transformer2DModel(**config).save_pretrained(f"{folder}/transformer")
        teacher, flow, net = sd3_transformer.networks(Path(folder), lora_rank, checkpointing, False, device)

    def text(n):
        embeds = torch.randn(n, 272, config["joint_attention_dim"], device=device)
        pooled = torch.randn(n, config["pooled_projection_dim"], device=device)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    guided = fgm.Guided(teacher, 4.0, text(1))
    return Subject(guided, flow, net, (16, 4, 4), batch, lambda seeds: text(len(seeds)))


SUBJECTS = {
    "toy MLP, batch 768": partial(toy, batch=768),
    "toy MLP, batch 4096": toy,
    "EDM U-Net, digits, batch 128": partial(
        unet, batch=128, size=8, channels=1, model_channels=32, channel_mult=[1, 2], num_blocks=1,
        attn_resolutions=[4]),
    "miniature SD3, three networks, batch 48": miniature,
    "miniature SD3, LoRA 16, batch 48": partial(miniature, lora_rank=16),
}
ON_A_GPU = {"EDM U-Net, CIFAR-10 size": partial(unet, batch=256, size=32, channels=3)}

# ---- What a step is measured against -----------------------------------------------------------------------


def bare_passes(subject, precision="fp32"):
    """A function that makes the passes of one step and nothing else: generator and flow forward and backward,
    and the teacher forward and back to its input."""
    device = next(subject.net.parameters()).device
    bf16 = fgm.bf16_passes(precision, device)
    x = torch.randn(subject.batch, *subject.shape, device=device)
    gradient = torch.randn_like(x)
    t = torch.rand(subject.batch, device=device)
    cond = subject.conditions(torch.arange(subject.batch))

    def passes():
        leaf = x.clone().requires_grad_()
        with bf16:
            x0 = subject.net(x, t, **cond)
        with fgm.frozen(subject.teacher):
            for field in (subject.flow, subject.teacher):
                with bf16:
                    v = field(leaf, t, **cond)
                v.backward(gradient.to(v.dtype))
                del v
        x0.backward(gradient.to(x0.dtype))
        subject.flow.zero_grad()
        subject.net.zero_grad()

    return passes


def sid_step(teacher, generator, flow, learners, draw, bf16):
    """A step of SiD's published loop (arXiv 2404.04057) on L1 + L2 with its weight, as it is described: two
    phases, each with samples and noise of its own.

    draw(phase) -> (z, noise, t, cond), fresh in each phase. learners: of flow and generator. Returns losses
    [B] and norms of gradients by name, as fgm.distill logs them."""
    z, noise, t, cond = draw(0)
    with bf16:
        with torch.no_grad():
            x0 = generator(z, **cond)
        flow_loss = fgm.reflow_loss(flow, x0, noise, t, **cond)
    flow_loss.mean().backward()
    flow_norm = learners[0].update(1.0, 1)

    z, noise, t, cond = draw(1)
    with fgm.frozen(teacher, flow):
        with bf16:
            x0 = generator(z, **cond)
            l1, l2 = fgm.fgm_losses(teacher, flow, x0, noise, t, weight=fgm.sid_weight, **cond)
        (l1 + l2).mean().backward()
    norm = learners[1].update(1.0, 1)
    return {"flow_loss": flow_loss, "l1": l1, "l2": l2, "flow_gradient": flow_norm, "gradient": norm}


# ---- Times -------------------------------------------------------------------------------------------------

TURN = 0.5  # seconds that one side of a ratio takes at least, before it is the other's turn
RATE = 1e-6  # the learning rate: the networks must hardly change


def now():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def intervals(marks):
    """Seconds between the marks, without the first, which finds caches and memory as others left them."""
    return [b - a for a, b in zip(marks[1:-1], marks[2:], strict=True)]


def step_times(subject, steps, precision, weight=None):
    """Seconds of each of fgm.distill's steps. A step begins when it asks for its conditions."""
    marks = []

    def timed_conditions(seeds):
        marks.append(now())
        return subject.conditions(seeds)

    generator = fgm.OneStepGenerator(subject.net, 0.97)
    fgm.distill(subject.teacher, generator, subject.flow, subject.shape, steps=steps + 2, batch=subject.batch,
                conditions=timed_conditions, lr=RATE, weight=weight, precision=precision)
    return intervals(marks)


def sid_times(subject, steps, precision):
    """Seconds of each of SiD's steps, with fgm.distill's draws, optimisers, average and checks of losses."""
    device, generator = next(subject.net.parameters()).device, fgm.OneStepGenerator(subject.net, 0.97)
    bf16 = fgm.bf16_passes(precision, device)
    learners = [fgm.Learner(subject.flow, RATE, (0.0, 0.999), 1e-8),
                fgm.Learner(generator, RATE, (0.0, 0.999), 1e-8, ema_decay=0.999)]
    run, marks = fgm.Run(), []

    def draw(phase):
        draws = fgm.Draws(subject.batch, device, run.step, phase)
        z, noise, t, seeds = draws.for_update(subject.shape, 0.0, 2.0)
        return z, noise, t, subject.conditions(seeds)

    for _ in run.steps("distill", steps + 2, {}, {}):
        marks.append(now())
        run.log(**sid_step(subject.teacher, generator, subject.flow, learners, draw, bf16))
    return intervals(marks)


def pass_times(passes, number):
    """Seconds of each of a number of passes, after one that is not counted."""
    marks = [now()]
    for _ in range(number + 1):
        passes()
        marks.append(now())
    return intervals(marks)


def ratio(first, second, repeats):
    """Seconds of first() over seconds of second(), medians of the times that each returns, in turns.

    One turn more than repeats is made, the first, which is not counted."""
    pairs = []
    for _ in range(repeats + 1):
        pairs.append((statistics.median(first()), statistics.median(second())))
    pairs = pairs[1:]

    first_s, second_s = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = [a / b for a, b in pairs]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
            "first_s": first_s, "second_s": second_s}


# ---- The command -------------------------------------------------------------------------------------------


def measure(device, args):
    """Yields the name of every row and the row, {"median", "least", "most", ...}."""
    on_gpu = device.type == "cuda"
    subjects = SUBJECTS | ON_A_GPU if on_gpu else SUBJECTS
    precisions = ["fp32", "bf16"] if fgm.wants_bf16("auto", device) else ["fp32"]
    compiled = [False, True] if args.compile else [False]

    for name, precision, compile in itertools.product(subjects, precisions, compiled):
        torch.manual_seed(0)
        subject = subjects[name](device)
        title = f"{name}, {precision}"
        passes = bare_passes(subject, precision)
        with FlopCounterMode(display=False) as counter:  # it cannot count torch.autograd.grad
            passes()
        if compile:
            title += ", compiled"
            compile_networks(subject.teacher, subject.flow, subject.net)

        number = max(3, round(TURN / statistics.median(pass_times(passes, 3))))
        step = partial(step_times, subject, number, precision)
        row = ratio(step, partial(pass_times, passes, number), args.repeats)
        row["tflops"] = counter.get_total_flops() / 1e12 / row["first_s"]
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            step()
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        yield f"step / bare passes: {title}", row

        weighted = partial(step, weight=fgm.sid_weight)
        sid = partial(sid_times, subject, number, precision)
        yield f"SiD's loop / step: {title}", ratio(sid, weighted, args.repeats)


FLAGS = {
    "repeats": Setting(int, flags.COUNT, "repeats of each ratio"),
    "compile": Setting(bool, None, "measure also with torch.compile"),
    "device": Setting(str, None, "cpu or cuda (default: cuda if there is one)"),
    "json": Setting(flags.path, None, "write the table to this file, too", metavar="FILE"),
}


def main():
    parser = flags.Parser({"settings": FLAGS}, prog="bench.py", description="Measure what the code costs.")
    args = parser.parse_with(lambda given: {"repeats": 5})
    device = setup(args.device)
    if args.json:
        open_folder(Path(args.json).parent)  # raises now, not when all is measured
    quiet()
    warnings.filterwarnings("ignore", "what the generator makes")  # of networks that are not trained

    hardware = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    print(f"{hardware}, torch {torch.__version__}, {args.repeats} repeats")
    print(f"{'':72}{'median':>9}{'range':>18}{'seconds':>22}")

    rows = {}
    for name, row in measure(device, args):
        rows[name] = row
        seconds = f"{row['first_s']:.4f} / {row['second_s']:.4f}"
        line = f"{name:72}{row['median']:9.3f}{row['least']:9.3f} -{row['most']:7.3f}{seconds:>22}"
        if "tflops" in row:
            line += f"  {row['tflops']:.3g} TFLOP/s"
        if "peak_gb" in row:
            line += f"  {row['peak_gb']:.1f} GB"
        print(line)
    if args.json:
        write_json(args.json, {"device": hardware, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    command(main)
