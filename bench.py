"""What a distillation step costs: against its bare network passes, the former step, SiD's loop; its memory;
logging.

    python bench.py                     # a few minutes on 2 CPU cores; on a GPU also bf16 and the peak rate
    python bench.py --compile --only step memory --json bench.json     # with rows for torch.compile

Every row is a ratio of two things measured in the same run, in turns: median and range of the repeats.
"""

import ctypes
import itertools
import json
import statistics
import tempfile
import time
from collections import namedtuple
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import cifar
import fgm
import tiny_sd3
import toy2d
from images import data as images
from images import scores
from images import unet as edm
from images.memory import free_bytes, kept_per_image, largest_micro_batch
from text2image import transformer as mmdit
from text2image.pipeline import quiet
from training import loops
from training.flags import COUNT, Parser, Setting, add_flags
from training.run import FolderRun, command, open_folder, setup, write_json

# ---- The subjects: what fgm.distill takes, new in every call -----------------------------------------------

Subject = namedtuple("Subject", "teacher flow net shape batch conditions")


def toy(device, batch=4096):
    nets = [toy2d.VelocityMLP().to(device) for _ in range(3)]
    return Subject(*nets, (2,), batch, lambda seeds: {})


def unet(device, batch, size, channels, **network):
    network |= dict(img_resolution=size, in_channels=channels, out_channels=channels, label_dim=10)
    nets = [edm.build(network).to(device).eval() for _ in range(3)]
    labels = torch.eye(10, device=device)
    return Subject(*nets, (channels, size, size), batch, lambda seeds: {"class_labels": labels[seeds % 10]})


def digits(device, batch=128):
    settings = {name: cifar.DIGITS[name] for name in ("model_channels", "channel_mult", "num_blocks")}
    return unet(device, batch, 8, 1, attn_resolutions=cifar.DIGITS["attention"], **settings)


def cifar10(device):
    subject = unet(device, 256 if device.type == "cuda" else 16, 32, 3)
    weights = 4 * sum(p.numel() for p in subject.net.parameters())
    needs = weights, kept_per_image(subject.net, subject.shape, 10, bf16=False), False
    return subject._replace(batch=largest_micro_batch(subject.batch, free_bytes(device), *needs, graphs=3))


def miniature(device, batch=48, lora_rank=0, bf16=False, checkpointing=None, config=tiny_sd3.TRANSFORMER):
    """SD3's transformer with guidance, by a diffusers config, on latents of 4x4 and texts of 272 tokens.

    lora_rank 0: three networks. checkpointing None: on a GPU."""
    from diffusers import SD3Transformer2DModel

    checkpointing = device.type == "cuda" if checkpointing is None else checkpointing
    with tempfile.TemporaryDirectory() as folder:
        SD3Transformer2DModel(**config).save_pretrained(f"{folder}/transformer")
        teacher, flow, net = mmdit.networks(Path(folder), lora_rank, checkpointing, bf16, device)
    tokens, pooled = (272, config["joint_attention_dim"]), (config["pooled_projection_dim"],)

    def text(n):
        embeds, summary = (torch.randn(n, *shape, device=device) for shape in (tokens, pooled))
        return {"encoder_hidden_states": embeds, "pooled_projections": summary}

    guided = fgm.Guided(teacher, 4.0, text(1))
    return Subject(guided, flow, net, (16, 4, 4), batch, lambda seeds: text(len(seeds)))


SUBJECTS = {
    "toy MLP, batch 768": partial(toy, batch=768),
    "toy MLP, batch 4096": toy,
    "EDM U-Net, digits, batch 128": digits,
    "miniature SD3, three networks, batch 48": miniature,
    "miniature SD3, LoRA 16, batch 48": partial(miniature, lora_rank=16),
}

# ---- Time and memory ---------------------------------------------------------------------------------------


TURN = 0.5  # seconds that one side of a ratio takes at least, before it is the other's turn


def keep_memory():
    """Tell glibc to keep freed memory: faulting it in again costs one side of a ratio a sixth of a pass."""
    with suppress(OSError, AttributeError):  # another C library has other habits
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-4, 0)  # M_MMAP_MAX


def now():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def intervals(marks):
    """Seconds from mark to mark but the first, which finds caches and memory as others left them."""
    return [b - a for a, b in zip(marks[1:-1], marks[2:], strict=True)]


def step_times(subject, steps, **settings):
    """Seconds of fgm.distill's steps but the first and last, told apart by its calls for conditions."""
    teacher, flow, net, shape, batch, conditions = subject
    marks = []

    def timed(seeds):
        marks.append(now())
        return conditions(seeds)

    settings = dict(steps=steps + 2, batch=batch, conditions=timed, lr=1e-6, precision="fp32") | settings
    fgm.distill(teacher, fgm.OneStepGenerator(net, 0.97), flow, shape, **settings)
    return intervals(marks)


def loop_times(step, subject, steps, precision="fp32"):
    """Seconds of steps of a loop of training/loops.py but the first and last."""
    marks = []
    loops.train(step, *subject, steps + 2, precision, lambda: marks.append(now()))
    return intervals(marks)


def pass_times(passes, number):
    """Seconds of each of a number of passes, after one that is not counted."""
    marks = [now()]
    for _ in range(number + 1):
        passes()
        marks.append(now())
    return intervals(marks)


def spread(values):
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ratio(first, second, repeats):
    """Seconds of first() / seconds of second(), medians of the times that each returns, in turns, after one
    turn that is not counted."""
    pairs = [(statistics.median(first()), statistics.median(second())) for _ in range(repeats + 1)][1:]
    first_s, second_s = (statistics.median(side) for side in zip(*pairs, strict=True))
    return spread([a / b for a, b in pairs]) | {"first_s": first_s, "second_s": second_s}


def peak_bytes(work, device):
    """The most memory that work() occupies at a time: the GPU's count, on a CPU what the profiler sees."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        profiled.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


# ---- The rows: generators of (name, {"median", "least", "most", ...}) --------------------------------------

def step_rows(device, args):
    subjects = SUBJECTS
    if device.type == "cuda" or args.full:
        subjects = subjects | {"EDM U-Net, CIFAR-10 size": cifar10}
    precisions = ["fp32", "bf16"] if fgm.wants_bf16("auto", device) else ["fp32"]
    compiled = (False, True) if args.compile else (False,)
    for name, precision, compile in itertools.product(subjects, precisions, compiled):
        torch.manual_seed(0)
        subject = subjects[name](device)
        batch = "" if "batch" in name else f", batch {subject.batch}"  # what fits
        what = f"{name}{batch}, {precision}" + ", compiled" * compile
        passes = loops.bare_passes(*subject, precision)
        with FlopCounterMode(display=False) as counter:  # it cannot count torch.autograd.grad
            passes()
        torch._functorch.config.donated_buffer = False  # of a compiled graph that is differentiated twice
        for net in subject[:3] if compile else ():
            net.compile()
        number = max(3, round(TURN / statistics.median(pass_times(passes, 3))))
        step = partial(step_times, subject, number, precision=precision)
        found = ratio(step, partial(pass_times, passes, number), args.repeats)
        tflops = counter.get_total_flops() / 1e12 / found["first_s"]
        found |= {"images_per_s": subject.batch / found["first_s"], "tflops": tflops}
        yield f"step / bare passes: {what}", found
        former = partial(loop_times, loops.former_step, subject, number, precision)
        yield f"former step / step: {what}", ratio(former, step, args.repeats)
        sid = partial(loop_times, loops.sid_step, subject, number, precision)
        weighted = partial(step, weight=fgm.sid_weight)
        yield f"SiD's loop / step: {what}", ratio(sid, weighted, args.repeats)


def memory_rows(device, args):
    """Of a step at l1_weight 1, gradients and optimisers included, networks not."""
    precision = "bf16" if fgm.wants_bf16("auto", device) else "fp32"
    full = device.type == "cuda" or args.full
    name, subject = ("CIFAR-10 size", cifar10(device)) if full else ("digits", digits(device))
    peak = peak_bytes(partial(step_times, subject, 1, precision=precision), device)
    former = peak_bytes(partial(loop_times, loops.former_step, subject, 1, precision), device)
    found = spread([peak / former]) | {"peak_bytes": peak, "former_bytes": former}
    yield f"peak memory, step / former step: EDM U-Net, {name}, batch {subject.batch}", found


def running_rows(device, args):
    """Extra time of steps that log, save or draw, over cifar.py's default intervals, as a share of all."""
    subject, share, never = digits(device), {"logging": [], "checkpoints": [], "pictures": []}, 10**9
    settings = {"log_every": 3}, {"save_every": 3}, {"picture_every": 3}
    for _ in range(args.repeats):
        for what, special in zip(share, settings, strict=True):
            with tempfile.TemporaryDirectory() as folder:
                run = FolderRun(folder, **{"save_every": never, "log_every": never} | special)
                if what == "pictures":
                    run.picture = scores.pictures(
                        run.out, images.load_images("digits").pixels, subject.teacher,
                        lambda net, n, _: images.draw_images(net, n, subject.shape, [1] * 10, device)[0], 500)
                times = step_times(subject, 9, run=run)
            usual = statistics.median(times[0::3] + times[2::3])
            extra = statistics.median(times[1::3]) - usual
            share[what].append(extra / usual / cifar.PAPER[next(iter(special))])
    found = spread([sum(shares) for shares in zip(*share.values(), strict=True)])
    yield "logging + checkpoints + pictures / run time: digits", found | share


PARTS = dict(step=step_rows, memory=memory_rows, running=running_rows)
FLAGS = {
    "only": Setting(str, list(PARTS), "these parts alone", "+"),
    "repeats": Setting(int, COUNT, "of each ratio"),
    "compile": Setting(bool, None, "also with torch.compile"),
    "full": Setting(bool, None, "also the EDM U-Net at CIFAR-10 size on a CPU"),
    "device": Setting(str, None, "cpu or cuda (default: cuda if there is one)"),
    "json": Setting(str, None, "write the table there too", metavar="FILE"),
}


def main():
    parser = Parser(prog="bench.py", description="Measure what the project's code costs.")
    add_flags(parser.add_argument, FLAGS)
    args = parser.parse_with(lambda given: {"only": list(PARTS), "repeats": 5})
    device, rows = setup(args.device), {}
    if args.json:
        open_folder(Path(args.json).parent)  # raises now, not when all is measured
    keep_memory()
    quiet()
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {threads} threads"
    print(f"{name}, torch {torch.__version__}, {args.repeats} repeats")
    print(f"{'':72}{'median':>9}{'range':>18}{'seconds':>22}")
    for part in args.only:
        for row, found in PARTS[part](device, args):
            rows[row] = found
            seconds = f"{found['first_s']:.4f} / {found['second_s']:.4f}" if "first_s" in found else ""
            line = f"{row:72}{found['median']:9.3f}{found['least']:9.3f} -{found['most']:7.3f}{seconds:>22}"
            rate = f"  {found['tflops']:.3g} TFLOP/s" if "tflops" in found else ""
            print(line + rate, flush=True)
    if args.json:
        write_json(args.json, {"device": name, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    command(main)
