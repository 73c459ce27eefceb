"""A run around the loops of fgm.py: processes, and a folder with log, checkpoints and pictures.

Nothing here knows what is trained. FolderRun is the object that fgm.train_flow and fgm.distill take as run=.
"""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import fgm
from fgm import Diverged, InputError, gathered, process_rank, world_size
from training import checkpoint, flags, progress
from training.bars import bar
from training.files import atomically, finite, lock, open_folder, save_tensors, write_json
from training.processes import first_process, wait_for_first, without_limit

# ---- A command ---------------------------------------------------------------------------------------------


def folder_run(args, out):
    """The run in folder out that the flags describe."""
    resume = "no" if args.overwrite else "any" if args.resume else "same"
    return FolderRun(out, resume, args.save_every, args.log_every, getattr(args, "picture_every", None))


STOPPED = "stopped; the same command goes on from the last checkpoint"


def command(main):
    """Call a command's main() and turn what the user can fix into one line on stderr and an exit status.

    2: bad input, or something that cannot be read or written; 1: divergence; 130 and 143: Ctrl-C, SIGTERM.
    Where there are several processes it does not return."""

    def terminate(number, frame):
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, terminate)
    status, message = 1, None
    try:
        main()
        wait_for_first()
        status = 0
    except InputError as error:
        status, message = 2, error
    except OSError as error:
        status, message = 2, f"cannot read or write ({error}); that mended, the same command goes on"
    except Diverged as error:
        message = error
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
        if not known:
            raise
        status, message = 2, f"out of memory, lower --micro-batch, --samples or the network's size ({error})"
    except KeyboardInterrupt:
        status, message = 130, STOPPED
    except SystemExit as error:
        status = error.code or 0
        if status == 143:
            message = STOPPED
        elif not isinstance(status, int):  # sys.exit("a text")
            status, message = 1, status
    finally:
        FolderRun.unlock()
    if message:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    if dist.is_initialized():
        # At once: a thread of gloo's that lets go of its last tensor only when Python is already ending
        # aborts the process. Without a fault all leave together.
        if not status:
            dist.barrier()
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


# ---- Processes and random numbers --------------------------------------------------------------------------

TIME_LIMIT = timedelta(hours=2)  # of one exchange between processes; a wait for the first one has none


def setup(device=None):
    """Join the other processes if torchrun started us, and return this one's device (default: a GPU's)."""
    name = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", name):
        raise InputError(f"--device {name}: cpu, cuda or cuda:N are possible")
    device = torch.device(name)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise InputError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices")
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIME_LIMIT)
        without_limit()  # now, while all are here
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    return device


GATHERED_WHOLE = 1e9  # bytes of weights; below, every process keeps them all


def shard(net, blocks=(), bf16=False):
    """Share a large network between all processes, block by block (FSDP2); copy networks before, not after.

    Its weights are gathered for every pass; of a smaller one each process keeps all. bf16: gather weights in
    bfloat16; gradients are reduced in float32, and inputs are not cast, so that t stays float32."""
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    if world_size() > 1 and size >= GATHERED_WHOLE:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mixed = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else {}
        policy = MixedPrecisionPolicy(**mixed, cast_forward_inputs=False)
        mesh = init_device_mesh(next(net.parameters()).device.type, (world_size(),))
        for part in [*blocks, net]:
            fully_shard(part, mesh=mesh, mp_policy=policy)
    return net


def moved(tensor, device):
    """A CPU's tensor on a device; to a GPU without waiting for what that has yet to do."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def noise_from(seeds, shape, device):
    """Standard normal noise [B, *shape], float32, for int64 seeds [B] of 0 or more: a row depends on its own
    seed alone, the key of a Philox generator (Salmon et al., 2011)."""
    generators = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds.tolist()]
    rows = [generator.standard_normal(shape, np.float32) for generator in generators]
    return moved(torch.from_numpy(np.stack(rows)), device)


# ---- What a run writes and reads ---------------------------------------------------------------------------


def about_this_run():
    """What a number was measured with: command, commit (None outside git), versions, hardware."""
    describe = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    versions |= {name: sys.modules[name].__version__ for name in ("diffusers", "transformers")
                 if name in sys.modules}
    device = f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if torch.cuda.is_initialized():
        device = torch.cuda.get_device_name()
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command, "commit": commit, "versions": versions, "hardware": device,
            "processes": world_size()}


def write_results(out, config, metrics):
    """config.json and metrics.json, which also say by what they were made."""
    write_json(out / "config.json", config | {"torch": torch.__version__, "processes": world_size()})
    write_json(out / "metrics.json", metrics | about_this_run())


def read_json(path):
    """The object in a JSON file. Raises InputError if it cannot be read or holds something else."""
    try:
        content = json.loads(Path(path).read_bytes())  # of any encoding that JSON allows
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path} ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it must hold a JSON object")
    return content


def fingerprint_of(net):
    """A checksum of a network's parameters and buffers. A collective call."""
    value = 0
    for name, tensor in sorted(net.state_dict().items()):
        whole = gathered(tensor.detach()).cpu().contiguous()
        value = zlib.crc32(whole.view(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), value))
    return f"{value:08x}"


def save_weights(net, path, metadata=None):
    """Write a network's parameters and buffers as safetensors. A collective call."""
    state = {}
    for name, value in net.state_dict().items():
        whole = gathered(value.detach())
        if not whole.isfinite().all():
            raise Diverged(f"{path} was not written: its weights are not finite, first in {name}")
        if process_rank() == 0:
            state[name] = whole.to("cpu", copy=True).contiguous()  # of tied ones, too, a copy each
    if process_rank() == 0:
        save_tensors(state, path, metadata)


# ---- The run in a folder -----------------------------------------------------------------------------------


class FolderRun(fgm.Run):
    """A run in the folder out, which it locks: log.jsonl, checkpoints/, pictures, progress bar. See fgm.Run.

    resume: "same" goes on with what is there if its settings are ours, and raises InputError otherwise; "any"
    goes on whatever changed; "no" removes RESULTS and the checkpoints of all phases now. fingerprint: further
    settings that a resumed run must share. picture(step, generator), if given, is called every picture_every
    steps and at the end of a distillation, with the averaged weights in place and without gradients; a dict
    of numbers that it returns goes into the log. The others wait for the first process then, however long it
    scores. progress.png is drawn then, unless it was a moment ago."""

    PHASES = ("teacher", "distill")
    T_BINS = 10
    RESULTS = (
        "generator.safetensors", "lora.safetensors", "judge.safetensors", "pipeline/model_index.json",
        "metrics.json", "config.json", "log.jsonl", "progress.png", "samples.png", "one-step.png",
        *(f"teacher-{k}-step{'s' * (k > 1)}.png" for k in (1, 10, 28, 50, 100)), "movie.gif",
        "distill-" + 7 * "[0-9]" + ".png", "movie/" + 9 * "[0-9]" + ".png")
    locks = {}  # {folder: the open file that is locked}, of this process

    def __init__(self, out, resume="same", save_every=1000, log_every=100, picture_every=None, picture=None,
                 fingerprint=None):
        for name, value in {"save_every": save_every, "log_every": log_every}.items():
            flags.check_setting(name, value, flags.COUNT, whole=True)
        self.out, self.resume = open_folder(out), resume
        self.save_every, self.log_every, self.picture_every = save_every, log_every, picture_every
        self.picture, self.fingerprint = picture, fingerprint or {}
        self.folder = self.out / "checkpoints"
        self.check_shared()
        first_process(self.take_folder)

    def check_shared(self):
        """Raises InputError unless all processes see the same folder: they write its checkpoints together."""
        if world_size() == 1:
            return
        name = first_process(lambda: tempfile.mkdtemp(prefix=".shared-", dir=self.out))
        seen = [None] * world_size()
        dist.all_gather_object(seen, (self.out / Path(name).name).exists())
        first_process(lambda: os.rmdir(name))
        if not all(seen):
            apart = seen.index(False)
            raise InputError(f"{self.out} is not one folder for all processes: process {apart} does not see "
                             "what process 0 writes; name an --out on a disk that all machines share")

    def take_folder(self):
        """Lock the folder and, to start again, remove what earlier runs left. Raises InputError if in use."""
        self.folder.mkdir(exist_ok=True)
        where = self.out.resolve()
        if where in self.locks:  # this process's own: a notebook's cell, called again
            self.locks.pop(where).close()
        file = open(self.out / ".lock", "w")
        try:
            free = lock(file)
        except (OSError, ImportError) as error:
            free = True
            if not self.locks:  # said once
                print(f"cannot lock {self.out} ({error}): see to it that no other run is at work there",
                      file=sys.stderr)
        if not free:
            file.close()
            raise InputError(f"another run is at work in {self.out}: wait, or name another --out")
        self.locks[where] = file
        for inner in [path for name in self.RESULTS for path in self.out.glob(name)]:
            if inner.is_dir():
                raise InputError(f"{inner} is a folder, where a file is to be written: move it away")
        for left in self.folder.glob(".tmp-*"):  # by a run that was killed
            shutil.rmtree(left)
        if self.resume == "no":
            for old in [path for phase in self.PHASES for path in checkpoint.checkpoints(self.folder, phase)]:
                shutil.rmtree(old)
            for old in [path for name in self.RESULTS for path in self.out.glob(name)]:
                old.unlink()

    @classmethod
    def unlock(cls):
        """Give back all folders of this process."""
        while cls.locks:
            cls.locks.popitem()[1].close()

    def steps(self, phase, steps, learners, settings):
        """The steps that are left, and what is due after each: picture, log, checkpoint. See fgm.Run."""
        settings = checkpoint.described(settings | self.fingerprint)
        start, before = checkpoint.load(self.folder, phase, learners, settings, self.resume)
        began = time.perf_counter() - before
        wait_for_first()
        self.phase, self.batch, self.scores, self.draw_after = phase, settings["batch"], {}, 0.0
        self.last_good = self.folder / f"{phase}-{start:09d}" if start else None
        self.open_log(start)
        title = "distillation" if phase == "distill" else phase
        with bar(title, steps * self.batch, start * self.batch) as self.bar:
            for self.step in range(start, steps):
                yield self.step
                done, last = self.step + 1, self.step + 1 == steps
                self.bar.update(self.batch)
                drawing = self.picture and "generator" in learners
                drawing = drawing and (last or done % (self.picture_every or steps) == 0)
                saving = last or done % self.save_every == 0
                logging = last or drawing or done % self.log_every == 0
                if drawing or saving or logging:
                    self.check()
                if drawing:
                    self.draw(learners["generator"], done)
                if logging:
                    self.write_log(done)
                if drawing and (last or time.perf_counter() > self.draw_after):
                    self.draw_progress()
                if saving:
                    spent = time.perf_counter() - began
                    self.last_good = checkpoint.save(self.folder, phase, done, learners, settings, spent)
                    wait_for_first()
        self.seconds = time.perf_counter() - began if start < steps else before

    def draw(self, learner, step):
        """Let picture() look at the averaged weights."""
        learner.swap()
        with torch.no_grad():
            self.scores = checkpoint.described(self.picture(step, learner.module) or {})
        for part in learner.module.modules():
            if hasattr(part, "reshard"):
                part.reshard()  # FSDP2 keeps the outermost weights gathered after passes without gradients
        learner.swap()
        wait_for_first()

    def draw_progress(self):
        """progress.png, from the log; the next one when this took at most 1 % of the time until then."""
        if process_rank() == 0 and self.phase == "distill":
            began = time.perf_counter()
            with atomically(self.out / "progress.png") as temporary:
                progress.draw(self.out / "log.jsonl", temporary)
            self.draw_after = began + 100 * (time.perf_counter() - began)

    def open_log(self, start):
        """Drop what was logged after the checkpoint of step start."""
        self.begin_line(start)
        path = self.out / "log.jsonl"
        if process_rank() == 0 and path.exists():
            kept = [line for line in path.read_text(errors="replace").splitlines() if self.holds(line, start)]
            with atomically(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept))

    def holds(self, line, start):
        """Whether a line of the log is one (the disk may have been full) and not of steps that come again."""
        try:
            record = json.loads(line)
            return record["phase"] != self.phase or record["step"] <= start
        except (ValueError, KeyError, TypeError):
            return False

    def begin_line(self, step):
        self.logged, self.since, self.means, self.bins = step, time.perf_counter(), [], {}

    def log(self, **terms):
        """Does not wait for a GPU: check() raises Diverged later, and names the step."""
        self.names = list(terms)
        self.means.append(torch.stack([value.detach().float().mean() for value in terms.values()]))

    def log_by_t(self, t, **losses):
        """Losses [B] by name at the times t [B]: their means by T_BINS bins of t, NAME_by_t in the log."""
        place = (t * self.T_BINS).long().clamp(max=self.T_BINS - 1)
        for name, loss in losses.items():
            if name not in self.bins:
                self.bins[name] = torch.zeros(2, self.T_BINS, device=t.device)  # sums, counts
            loss = loss.detach().float()
            self.bins[name].index_add_(1, place, torch.stack([loss, torch.ones_like(loss)]))

    def step_means(self):
        """Of every step since the last line of the log, over all processes: [steps, terms]. Collective."""
        means = torch.stack(self.means)
        if world_size() > 1:
            dist.all_reduce(means)
        return means / world_size()

    def check(self):
        """Raises Diverged, after a last line of the log, if a scalar of a step was not finite. Collective."""
        broken = (~self.step_means().isfinite()).nonzero().tolist()  # in the order of steps, then of terms
        if broken:
            step, name = self.logged + broken[0][0], self.names[broken[0][1]]
            self.write_log(self.step + 1)
            self.draw_progress()
            kept = self.last_good and f"the last good checkpoint is {self.last_good}"
            raise Diverged(f"{self.phase} diverged: {name} is not finite at step {step}; "
                           f"{kept or 'there is no checkpoint yet'}")

    def write_log(self, step):
        """One line of log.jsonl: means over the steps since the line before, over all processes.

        distance_error is the standard error of the mean of distance, from the means of the steps."""
        means = self.step_means()
        record = {"phase": self.phase, "step": step, "kimg": step * self.batch / 1000}
        record |= dict(zip(self.names, means.mean(0).tolist(), strict=True))
        if "distance" in self.names and len(means) > 1:
            values = means[:, self.names.index("distance")]
            record["distance_error"] = values.std().item() / len(values) ** 0.5
        record |= self.scores
        for name, bins in self.bins.items():
            if world_size() > 1:
                dist.all_reduce(bins)
            sums, counts = bins.tolist()
            record[f"{name}_by_t"] = [a / n if n else None for a, n in zip(sums, counts, strict=True)]
        record["images_per_s"] = len(means) * self.batch / (time.perf_counter() - self.since)
        self.bar.set_postfix({name: f"{record[name]:.3g}" for name in self.names[:3]}, refresh=False)
        if process_rank() == 0:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(finite(record)) + "\n")
        self.scores = {}
        self.begin_line(step)
