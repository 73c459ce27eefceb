"""What a distillation step costs against the network passes that it cannot avoid, and what sampling, scaling, logging and memory cost.

    python bench.py                     # a few minutes on 2 CPU cores; on a GPU also bf16 and the share of the peak rate
    python bench.py --only step sampling --json bench.json
    python bench.py --compile           # adds rows with torch.compile

Every row is a ratio of two things measured in the same run, in turns; the median of the repeats and their range are printed.
"""

import ctypes
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import cifar
import fgm
import sd3
import tiny_sd3

ROOT = Path(__file__).parent
PARTS = ("step", "memory", "sampling", "scaling", "running")
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16 FLOP/s by the makers' data sheets

# ----------------------------------------------------------------------------------------------------------------------
# The subjects: (teacher, flow, net, shape, batch, conditions)
# ----------------------------------------------------------------------------------------------------------------------


def toy(device, batch=4096):
    nets = [fgm.VelocityMLP().to(device) for _ in range(3)]
    return *nets, (2,), batch, None


def edm(device, batch, **network):
    nets = [cifar.build(network).to(device).eval() for _ in range(3)]
    shape = (network["in_channels"], network["img_resolution"], network["img_resolution"])
    return *nets, shape, batch, lambda seeds: {"class_labels": F.one_hot(seeds % 10, 10).float().to(device)}


def digits(device, batch=128):
    return edm(device, batch, img_resolution=8, in_channels=1, out_channels=1, label_dim=10, **{name: cifar.DIGITS[key] for name, key in (
        ("model_channels", "model_channels"), ("channel_mult", "channel_mult"), ("num_blocks", "num_blocks"), ("attn_resolutions", "attention"))})  # fmt: skip


def cifar10(device, batch=None):
    return edm(device, batch or (256 if device.type == "cuda" else 8), img_resolution=32, in_channels=3, out_channels=3, label_dim=10)


def miniature(device, batch=48, rank=0, bf16=False, checkpointing=None, config=tiny_sd3.TRANSFORMER, size=4, tokens=272):
    from diffusers import SD3Transformer2DModel

    with tempfile.TemporaryDirectory() as folder:
        SD3Transformer2DModel(**config).save_pretrained(Path(folder) / "transformer")
        teacher, flow, net = sd3.networks(Path(folder), rank, device.type == "cuda" if checkpointing is None else checkpointing, bf16, device)
    text = {"encoder_hidden_states": (tokens, config["joint_attention_dim"]), "pooled_projections": (config["pooled_projection_dim"],)}
    null = {name: torch.randn(1, *shape, device=device) for name, shape in text.items()}
    conditions = lambda seeds: {name: torch.randn(len(seeds), *shape, device=device) for name, shape in text.items()}  # noqa: E731
    return fgm.guided(teacher, 4.0, null), flow, net, (16, size, size), batch, conditions


SUBJECTS = {
    "toy MLP, batch 4096": toy,
    "EDM U-Net, digits, batch 128": digits,
    "miniature SD3, three networks, batch 48": miniature,
    "miniature SD3, LoRA 16, batch 48": lambda device: miniature(device, rank=16),
}

# ----------------------------------------------------------------------------------------------------------------------
# Timing
# ----------------------------------------------------------------------------------------------------------------------


def keep_memory():
    """Tell glibc not to hand freed memory back to the system: faulting it in again costs a sixth of a pass, at one side of a ratio and not the other."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-4, 0)  # M_MMAP_MAX
    except (OSError, AttributeError):
        pass  # another C library, with other habits


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def intervals(marks):
    """Seconds from mark to mark but the first, which finds caches and memory as others left them."""
    return [b - a for a, b in zip(marks[1:-1], marks[2:], strict=True)]


def step_times(subject, steps, **settings):
    """Seconds of each of fgm.distill's steps but the first, told apart by its calls for conditions: two a step."""
    teacher, flow, net, shape, batch, conditions = subject
    marks = []

    def timed(seeds):
        marks.append(now())
        return conditions(seeds) if conditions else {}

    defaults = dict(log_every=10**9, precision="fp32")
    fgm.distill(teacher, fgm.OneStepGenerator(net, 0.97), flow, shape, steps=steps + 2, batch=batch, conditions=timed, lr=1e-6, **(defaults | settings))
    return intervals(marks[::2])


def bare_passes(subject, precision="fp32"):
    """A function that makes the passes of one step and nothing else: generator forward; flow forward and backward; generator forward and backward;
    teacher and flow forward and gradient of the input."""
    teacher, flow, net, shape, batch, conditions = subject
    device = next(net.parameters()).device
    x, gradient = torch.randn(batch, *shape, device=device), torch.randn(batch, *shape, device=device)
    t, cond = torch.rand(batch, device=device), conditions(torch.arange(batch)) if conditions else {}

    def passes():
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            with torch.no_grad():
                net(x, t, **cond)
            flow(x, t, **cond).backward(gradient.to(torch.bfloat16 if precision == "bf16" else torch.float32))
            with fgm.frozen(teacher, flow):
                leaf = x.clone().requires_grad_()
                outputs = net(x, t, **cond), teacher(leaf, t, **cond), flow(leaf, t, **cond)
                torch.autograd.backward(outputs, [gradient.to(v.dtype) for v in outputs])
        for one in (flow, net):
            for p in one.parameters():
                p.grad = None

    return passes


def pass_times(passes, number):
    """Seconds of each of a number of passes, after one that is not counted."""
    marks = [now()]
    for _ in range(number + 1):
        passes()
        marks.append(now())
    return intervals(marks)


def spread(values):
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ratio(first, second, repeats, warm=1):
    """Seconds of first() over those of second(), in turns. Each returns its seconds, or None to be timed from outside."""

    def seconds(function):
        began = now()
        own = function()
        return now() - began if own is None else own

    for _ in range(warm):
        first(), second()
    pairs = [(seconds(first), seconds(second)) for _ in range(repeats)]
    return spread([a / b for a, b in pairs]) | {"first_s": statistics.median(a for a, _ in pairs), "second_s": statistics.median(b for _, b in pairs)}


# ----------------------------------------------------------------------------------------------------------------------
# The rows
# ----------------------------------------------------------------------------------------------------------------------


def step_rows(device, repeats, compiled, full):
    subjects = dict(SUBJECTS)
    if device.type == "cuda" or full:
        subjects["EDM U-Net, CIFAR-10 size"] = cifar10
    precisions = ["fp32", "bf16"] if fgm.wants_bf16("auto", device) else ["fp32"]
    for name, make in subjects.items():
        for precision in precisions:
            for with_compile in (False, True) if compiled else (False,):
                torch.manual_seed(0)
                subject = make(device)
                passes, row = bare_passes(subject, precision), f"step / bare passes: {name}, {precision}" + ", compiled" * with_compile
                if with_compile:
                    for net in subject[:3]:
                        net.compile()
                number = max(3, round(0.5 / statistics.median(pass_times(passes, 3))))  # half a second of each, in turns
                step = lambda s=subject, n=number, p=precision: statistics.median(step_times(s, n, precision=p))  # noqa: E731
                found = ratio(step, lambda p=passes, n=number: statistics.median(pass_times(p, n)), repeats)
                found["images_per_s"] = subject[4] / found["first_s"]
                if device.type == "cuda":
                    with FlopCounterMode(display=False) as counter:
                        passes()
                    found["tflops"] = counter.get_total_flops() / found["first_s"] / 1e12
                    peak = next((value for key, value in PEAK.items() if key in torch.cuda.get_device_name()), None)
                    found["share_of_bf16_peak"] = found["tflops"] * 1e12 / peak if peak else None
                yield row, found


def peak_bytes(work, device):
    """The most memory that work() and what it makes occupy at a time: the GPU's own count, on a CPU the allocations that the profiler sees."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


def memory_rows(device, repeats):
    """A step of two micro-batches against sd3.py's estimate, networks and optimiser included."""
    bf16 = fgm.wants_bf16("auto", device)
    for rank in (0, 16):
        for checkpointing in (False, True):

            def work(rank=rank, checkpointing=checkpointing):
                subject = miniature(device, 32, rank, bf16, checkpointing)
                step_times(subject, 1, precision="bf16" if bf16 else "fp32", micro_batch=16)

            peak = peak_bytes(work, device)
            estimate = sum(sd3.memory_estimate(tiny_sd3.TRANSFORMER, rank, checkpointing, bf16, 16, 4, 4, 272, 4.0, 1, True).values())
            what = f"{'LoRA 16' if rank else 'three networks'}{', checkpointing' if checkpointing else ''}"
            yield f"peak memory / estimate: miniature SD3, {what}", spread([peak / estimate]) | {"peak_bytes": peak, "estimate_bytes": estimate}


def sampling_rows(device, repeats):
    teacher, _, net, shape, _, conditions = digits(device)
    generator = fgm.OneStepGenerator(net, 0.97)
    for batch in (1, 256):
        z, cond = torch.randn(batch, *shape, device=device), conditions(torch.arange(batch))

        def many(z=z, cond=cond):
            fgm.sample_ode(teacher, z, 50, **cond)

        def one(z=z, cond=cond):
            with torch.no_grad():
                generator(z, **cond)

        def call(z=z, cond=cond):
            with torch.no_grad():
                net(z, fgm.times(0.97, z), **cond)

        def ten(function):
            return lambda: [function() for _ in range(10)] and None

        found = ratio(many, ten(one), repeats)
        yield f"50-step teacher / one step: digits, batch {batch}", {key: value * 10 if key in ("median", "least", "most") else value for key, value in found.items()}
        yield f"one-step sampler / its network call: digits, batch {batch}", ratio(ten(one), ten(call), repeats)


def scaling_rows(device, repeats):
    small = digits(device, 32)
    for times in (2, 4, 8):
        large = (*small[:4], 32 * times, small[5])
        found = ratio(lambda s=large: statistics.median(step_times(s, 3)), lambda: statistics.median(step_times(small, 3)), repeats)
        found |= {key: found[key] / times for key in ("median", "least", "most")}
        yield f"cost of an image, batch {32 * times} / batch 32: digits", found
    rates = {}
    threads = torch.get_num_threads()
    for processes in (1, 2):
        with tempfile.TemporaryDirectory() as out:
            arguments = ["cifar.py", "--data", "digits", "--cond", "--teacher-kimg", "0.128", "--kimg", "2.56", "--log-every", "5", "--samples", "20", "--out", out]
            launcher = [sys.executable] + ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] * (processes > 1)
            subprocess.run([*launcher, *arguments], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(max(1, threads // processes))}, check=True, capture_output=True)
            lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
            rates[processes] = [line["images_per_s"] for line in lines if line["phase"] == "distill"][1:]
    yield "seconds an image, 2 processes / 1, same batch and cores: digits", spread([a / b for a, b in zip(rates[1], rates[2], strict=True)])


def running_rows(device, repeats):
    """Extra time of steps that log, save or draw, spread over cifar.py's default intervals, as a share of run time."""
    share = {"logging": [], "checkpoints": [], "pictures": []}
    subject = digits(device)
    labels = torch.arange(100)

    def picture(step, generator):
        pixels, _ = cifar.draw(generator, len(labels), subject[3], 10, device)
        fgm.save_grid(Path(folder) / "picture.png", pixels)

    kinds = ("logging", 50, dict(log_every=3)), ("checkpoints", 500, dict(save_every=3)), ("pictures", 500, dict(picture_every=3, picture=picture))
    for _ in range(repeats):
        for what, interval, settings in kinds:
            with tempfile.TemporaryDirectory() as folder:
                times = step_times(subject, 9, out=folder, **(dict(save_every=10**9) | settings))
            special, plain = times[1::3], times[0::3] + times[2::3]
            share[what].append((statistics.median(special) - statistics.median(plain)) / (interval * statistics.median(plain)))
    yield "logging + checkpoints + pictures / run time: digits", spread([sum(parts) for parts in zip(*share.values(), strict=True)]) | share


def main():
    parser = fgm.Parser(prog="bench.py", description="Measure what the project's code costs.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts alone")
    parser.add_argument("--repeats", type=fgm.COUNT, default=5, help="of each ratio")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--full", action="store_true", help="also the EDM U-Net at CIFAR-10 size on a CPU")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--json", metavar="FILE", help="write the table there too")
    args = parser.parse_args()
    device, rows = fgm.setup(args.device), {}
    keep_memory()
    sd3.quiet()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {args.repeats} repeats\n{'':72}{'median':>9}{'range':>18}{'seconds':>22}")
    parts = {"step": lambda: step_rows(device, args.repeats, args.compile, args.full), "memory": lambda: memory_rows(device, args.repeats),
             "sampling": lambda: sampling_rows(device, args.repeats), "scaling": lambda: scaling_rows(device, args.repeats),
             "running": lambda: running_rows(device, args.repeats)}  # fmt: skip
    for part in args.only:
        for row, found in parts[part]():
            rows[row] = found
            seconds = f"{found['first_s']:.4f} / {found['second_s']:.4f}" if "first_s" in found else ""
            more = f"  {found['tflops']:.0f} TFLOP/s, {found['share_of_bf16_peak'] or 0:.0%} of the bf16 peak" if "tflops" in found else ""
            print(f"{row:72}{found['median']:9.3f}{found['least']:9.3f} -{found['most']:7.3f}{seconds:>22}{more}", flush=True)
    if args.json:
        fgm.write_json(args.json, {"device": name, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    fgm.run(main)
