"""A run around the loops of fgm.py: a command, what it writes, and the run in a folder.

Nothing here knows what is trained. FolderRun is the object that fgm.train_flow and fgm.distill take as run=.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout

import fgm
from fgm import Diverged, InputError, gathered, process_rank, world_size
from training import checkpoint, progress
from training.files import atomically, finite, open_folder, save_tensors, write_json
from training.processes import first_process, wait_for_first

# ---- A command ---------------------------------------------------------------------------------------------

STOPPED = "stopped; the same command without --overwrite goes on from the last checkpoint, or starts again"


def command(main):
    """Call a command's main(). What the user can mend becomes one line on stderr and an exit status.

    2: bad input, or something that cannot be read or written; 1: divergence; 130 and 143: Ctrl-C, SIGTERM.
    Where there are several processes it does not return."""

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    with redirect_stdout(Console(sys.stdout)), redirect_stderr(Console(sys.stderr)):
        status, message = outcome(main)
        if message is not None:
            print(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)

        if dist.is_initialized():
            if status == 0:
                dist.barrier()
                dist.destroy_process_group()
            # A thread of gloo's that lets go of its last tensor when Python is already ending aborts the
            # process, so this one ends at once.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if status != 0:
        sys.exit(status)


def outcome(main):
    """Call main(). Returns (exit status, message for the user or None)."""
    try:
        main()
        wait_for_first()
        return 0, None
    except (InputError, OSError) as error:
        return 2, error
    except Diverged as error:
        return 1, error
    except KeyboardInterrupt:
        return 130, STOPPED
    except SystemExit as error:
        return error.code or 0, STOPPED if error.code == 143 else None
    except (MemoryError, RuntimeError) as error:
        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not out_of_memory and "allocate memory" not in str(error):
            raise
        return 2, f"out of memory, lower --micro-batch, --samples or the network's size ({error})"


class Console:
    """A stream that cannot stop a run. None, or a closed one: nothing is shown.

    A character that it cannot show becomes "?". Once a write has failed, because the reader has gone or the
    disk is full, everything more is dropped."""

    def __init__(self, stream):
        self.stream = open(os.devnull, "w") if stream is None or stream.closed else stream
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="replace", line_buffering=True)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, action, *arguments):
        try:
            action(*arguments)
        except OSError:
            # The stream leads nowhere from now on, with what it still holds: that would fail at the exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


# ---- What a run writes -------------------------------------------------------------------------------------


def about_this_run():
    """What a number was measured with: command, commit (empty outside git), versions, hardware."""
    describe = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=12"]
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()

    libraries = [name for name in ("torch", "numpy", "diffusers", "transformers") if name in sys.modules]
    versions = {name: sys.modules[name].__version__ for name in libraries}
    hardware = f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if torch.cuda.is_initialized():
        hardware = torch.cuda.get_device_name()
    command_line = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command_line, "commit": commit, "versions": versions, "hardware": hardware,
            "processes": world_size()}


def write_results(out, config, metrics):
    """config.json and metrics.json, which also say what made them."""
    write_json(out / "config.json", config | {"torch": torch.__version__, "processes": world_size()})
    write_json(out / "metrics.json", metrics | about_this_run())


def with_sum(seconds):
    """The seconds of a run's phases, {phase: seconds}, and under "all" their sum.

    A phase of an earlier call counts, too: a finished run that is called again reports what it took."""
    return seconds | {"all": sum(seconds.values())}


def fingerprint_of(net):
    """A checksum of a network's parameters and buffers. A collective call."""
    value = 0
    for name, tensor in sorted(net.state_dict().items()):
        whole = gathered(tensor.detach()).cpu().contiguous()
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(whole.view(-1).view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def save_weights(net, path, metadata=None):
    """Write a network's parameters and buffers as safetensors. A collective call.

    Raises Diverged if one of them is not finite."""
    state = {}
    for name, value in net.state_dict().items():
        whole = gathered(value.detach())
        if not whole.isfinite().all():
            raise Diverged(f"{path} was not written: its weights are not finite, first in {name}")
        if process_rank() == 0:
            state[name] = whole.to("cpu", copy=True).contiguous()  # a copy of each: some may share memory
    if process_rank() == 0:
        save_tensors(state, path, metadata)


# ---- The run in a folder -----------------------------------------------------------------------------------

RESULTS = (  # of all commands; what --overwrite removes, besides checkpoints. A new run draws the rest again.
    "generator.safetensors", "lora.safetensors", "judge.safetensors", "pipeline/model_index.json",
    "metrics.json", "config.json", "log.jsonl", "progress.png", "distill-" + 7 * "[0-9]" + ".png",
    "movie.gif", "movie/" + 9 * "[0-9]" + ".png",
)
PHASES = {"teacher": "training the teacher", "distill": "distilling"}  # and the titles of their bars
CURVES_EVERY = 60  # seconds between two drawings of progress.png, at least


def folder_run(args, out, unit="images"):
    """The run in folder out that the flags describe."""
    resume = "no" if args.overwrite else "any" if args.resume else "same"
    return FolderRun(out, resume, args.save_every, args.log_every, args.picture_every, unit=unit)


def is_due(step, steps, every):
    return step == steps or step % every == 0


class FolderRun(fgm.Run):
    """A run in the folder out, which it locks: log.jsonl, checkpoints/, pictures, progress bar. See fgm.Run.

    resume: "same" goes on with what is there if its settings are ours, and raises InputError otherwise; "any"
    goes on whatever changed; "no" removes RESULTS and the checkpoints of all phases now. fingerprint: further
    settings that a resumed run must share. unit: what the progress bar counts, "steps" or "images".
    picture(step, generator) is called every picture_every steps and at the end of a distillation, with the
    averaged weights in place and without gradients; the dict of numbers that it may return goes into the log.
    progress.png is drawn then, too, and at the end without a picture(). The other processes wait for the
    first one meanwhile; they must see the same folder."""

    def __init__(self, out, resume="same", save_every=1000, log_every=100, picture_every=None, picture=None,
                 fingerprint=None, unit="steps"):
        self.out, self.resume, self.unit = open_folder(out), resume, unit
        self.save_every, self.log_every, self.picture_every = save_every, log_every, picture_every
        self.picture, self.fingerprint = picture, fingerprint or {}

        self.folder = self.out / "checkpoints"
        first_process(self.take_folder)

    def take_folder(self):
        """Lock the folder, and remove what earlier runs left. Raises InputError if another run is at work."""
        # There is one lock of a folder in a process, so that a notebook's cell can be run again.
        self.lock = FileLock(self.out.resolve() / ".lock", timeout=0, is_singleton=True)
        try:
            self.lock.acquire()
        except Timeout as error:
            raise InputError(f"another run is at work in {self.out}: wait, or name another --out") from error
        except (OSError, NotImplementedError) as error:
            print(f"cannot lock {self.out} ({error}): make sure that no other run is at work there",
                  file=sys.stderr)

        self.folder.mkdir(exist_ok=True)
        for path in self.folder.glob(".tmp-*"):  # of a run that was killed
            shutil.rmtree(path)

        if self.resume == "no":
            for name in RESULTS:
                for path in self.out.glob(name):
                    path.unlink()  # where this fails, the checkpoints are still there
            for phase in PHASES:
                for path in checkpoint.checkpoints(self.folder, phase):
                    shutil.rmtree(path)

    def steps(self, phase, steps, learners, settings):
        """The steps that are left, and what is due after each: picture, log, checkpoint. See fgm.Run."""
        settings = checkpoint.as_json(settings | self.fingerprint)
        start, seconds = checkpoint.load(self.folder, phase, learners, settings, self.resume)
        began = time.perf_counter() - seconds
        wait_for_first()

        self.phase, self.batch, self.scores, self.curves_drawn = phase, settings["batch"], {}, -CURVES_EVERY
        self.last_good = self.folder / f"{phase}-{start:09d}" if start > 0 else None
        self.cut_log(start)
        self.window = LogWindow(start)
        has_pictures = self.picture is not None and "generator" in learners
        per_step = 1 if self.unit == "steps" else self.batch

        with progress.bar(PHASES[phase], steps * per_step, start * per_step, self.unit) as self.bar:
            for step in range(start, steps):
                self.step = step
                yield step

                self.bar.update(per_step)
                done = step + 1
                draws = has_pictures and is_due(done, steps, self.picture_every or steps)
                saves = is_due(done, steps, self.save_every)
                logs = draws or is_due(done, steps, self.log_every)

                if draws or saves or logs:
                    self.check()
                if draws:
                    self.draw(learners["generator"], done)
                if logs:
                    self.write_log(done)
                if done == steps or (draws and time.perf_counter() > self.curves_drawn + CURVES_EVERY):
                    self.draw_curves()
                if saves:
                    seconds = time.perf_counter() - began
                    self.last_good = checkpoint.save(self.folder, phase, done, learners, settings, seconds)
                    wait_for_first()
        self.seconds = seconds

    # -- pictures --

    def draw(self, learner, step):
        """Let picture() look at the averaged weights."""
        learner.swap()
        with torch.no_grad():
            self.scores = checkpoint.as_json(self.picture(step, learner.module) or {})

        for part in learner.module.modules():
            if hasattr(part, "reshard"):
                part.reshard()  # FSDP2 keeps the outermost weights gathered after passes without gradients
        learner.swap()
        wait_for_first()

    def draw_curves(self):
        """progress.png, from the log."""
        if process_rank() == 0 and self.phase == "distill":
            with atomically(self.out / "progress.png") as temporary:
                progress.figure_of(self.out / "log.jsonl").savefig(temporary, dpi=100)
            self.curves_drawn = time.perf_counter()

    # -- the log --

    def cut_log(self, start):
        """Drop the lines of this phase after step start, whose steps come again, and broken ones."""
        path = self.out / "log.jsonl"
        if process_rank() > 0 or not path.exists():
            return

        lines = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                if record["phase"] != self.phase or record["step"] <= start:
                    lines.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                pass  # a line cut off by a kill or a full disk
        with atomically(path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")

    def log(self, **terms):
        """Does not wait for a GPU: check() raises Diverged later, and names the step."""
        self.window.add(terms)

    def log_by_t(self, t, **losses):
        self.window.add_by_t(t, losses)

    def check(self):
        """Raises Diverged, after a last line of the log, if a term of a step was not finite. Collective."""
        faults = (~self.window.step_means().isfinite()).nonzero().tolist()  # by step, then by term
        if not faults:
            return

        row, column = faults[0]
        step, name = self.window.start + row, self.window.names[column]
        self.write_log(self.step + 1)
        self.draw_curves()
        advice = "there is no checkpoint yet"
        if self.last_good is not None:
            advice = f"the last good checkpoint is {self.last_good}"
        raise Diverged(f"{self.phase} diverged: {name} is not finite at step {step}; {advice}")

    def write_log(self, step):
        """One line of log.jsonl: means over the steps since the line before, over all processes.

        bound_error is the standard error of the mean of bound, from the means of the steps. Collective."""
        window, means = self.window, self.window.step_means()
        record = {"phase": self.phase, "step": step, "kimg": step * self.batch / 1000}
        record |= dict(zip(window.names, means.mean(0).tolist(), strict=True))
        if "bound" in window.names and len(means) > 1:
            bounds = means[:, window.names.index("bound")]
            record["bound_error"] = bounds.std().item() / len(bounds) ** 0.5
        record |= self.scores
        record |= {f"{name}_by_t": values for name, values in window.means_by_t().items()}
        record["images_per_s"] = len(means) * self.batch / (time.perf_counter() - window.began)

        self.bar.set_postfix({name: f"{record[name]:.3g}" for name in window.names[:3]}, refresh=False)
        if process_rank() == 0:
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(finite(record)) + "\n")
        self.scores = {}
        self.window = LogWindow(step)


class LogWindow:
    """The losses of the steps since the last line of the log, which was written after step start."""

    T_BINS = 10

    def __init__(self, start):
        self.start, self.began = start, time.perf_counter()
        self.names, self.steps, self.bins = [], [], {}

    def add(self, terms):
        """terms of one step: {name: a scalar, or losses [B]}."""
        self.names = list(terms)
        self.steps.append(torch.stack([value.detach().float().mean() for value in terms.values()]))

    def add_by_t(self, t, losses):
        """losses: {name: [B]}, at the times t [B]."""
        index = (t * self.T_BINS).long().clamp(max=self.T_BINS - 1)
        for name, loss in losses.items():
            if name not in self.bins:
                self.bins[name] = torch.zeros(2, self.T_BINS, device=t.device)  # sums and counts
            loss = loss.detach().float()
            self.bins[name].index_add_(1, index, torch.stack([loss, torch.ones_like(loss)]))

    def step_means(self):
        """The terms of every step, means over all processes: [steps, terms]. A collective call."""
        means = torch.stack(self.steps)
        if world_size() > 1:
            dist.all_reduce(means)
        return means / world_size()

    def means_by_t(self):
        """{name: means over all processes by bins of t, None where a bin is empty}. A collective call."""
        means = {}
        for name, bins in self.bins.items():
            if world_size() > 1:
                dist.all_reduce(bins)
            sums, counts = bins.tolist()
            means[name] = [a / n if n > 0 else None for a, n in zip(sums, counts, strict=True)]
        return means
