"""A run around the loops of fgm.py: processes, and a folder with log, checkpoints and pictures.

Nothing here knows what is trained. FolderRun is the object that fgm.train_flow and fgm.distill take as run=.
"""

import fcntl
import functools
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
import zlib
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import fgm
from fgm import Diverged, InputError, gathered, process_rank, world_size
from parts import progress
from parts.bars import bar

# ------------------------------------------------------------------------------------------------------------
# A command
# ------------------------------------------------------------------------------------------------------------


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
    status, message = 0, None
    try:
        main()
    except (InputError, OSError) as error:
        status, message = 2, error
    except Diverged as error:
        status, message = 1, error
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
        if not known:
            raise
        status, message = 2, f"out of memory, lower --micro-batch, --samples or the network's size ({error})"
    except KeyboardInterrupt:
        status, message = 130, STOPPED
    except SystemExit as error:
        status = error.code
        message = STOPPED if status == 143 else None
    finally:
        FolderRun.unlock()
    if message:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    if status:
        sys.exit(status)
    if dist.is_initialized():
        # Processes leave together, and at once: a thread of gloo's that lets go of its last tensor only when
        # Python is already ending aborts the process.
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


# ------------------------------------------------------------------------------------------------------------
# Processes and random numbers
# ------------------------------------------------------------------------------------------------------------


def setup(device=None):
    """Join the other processes if torchrun started us, and return this one's device (default: a GPU's)."""
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise InputError(f"--device {device}: cpu, cuda or cuda:N are possible") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: cpu, cuda or cuda:N are possible")
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise InputError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices")
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(hours=2)  # the others wait while one downloads or scores
        dist.init_process_group(backend, timeout=timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    return device


def first_process(work):
    """work() on the first process, the others wait; its InputError is raised on all. A collective call."""
    error = None
    if process_rank() == 0:
        try:
            work()
        except (InputError, OSError) as failure:
            error = str(failure)
    if world_size() > 1:
        errors = [error]
        dist.broadcast_object_list(errors)
        error = errors[0]
    if error:
        raise InputError(error)


GATHERED_WHOLE = 1e9  # bytes of weights; below, every process keeps them all


def shard(net, blocks=(), bf16=False):
    """Share a network between all processes; leave it alone if there is one. Copy networks before, not after.

    A large one is sharded block by block (FSDP2), its weights gathered for every pass. Of a smaller one each
    process keeps a replica, and gradients are averaged after each backward pass. bf16: gather weights in
    bfloat16; gradients are reduced in float32, and inputs are not cast, so that t stays float32."""
    if world_size() > 1 and sum(p.numel() * p.element_size() for p in net.parameters()) < GATHERED_WHOLE:
        average_gradients(net)
    elif world_size() > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mixed = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else {}
        policy = MixedPrecisionPolicy(**mixed, cast_forward_inputs=False)
        mesh = init_device_mesh(next(net.parameters()).device.type, (world_size(),))
        for part in [*blocks, net]:
            fully_shard(part, mesh=mesh, mp_policy=policy)
    return net


def average_gradients(net):
    """At the end of every backward pass that reaches parameters of net, average their gradients over the
    processes, in one message. What earlier passes have accumulated is the same everywhere, and stays so."""
    reached = []

    def reach(p):
        if not reached:
            torch.autograd.Variable._execution_engine.queue_callback(exchange)
        reached.append(p)

    @torch.no_grad()
    def exchange():
        gradients = [p.grad for p in reached]
        reached.clear()
        whole = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(whole)
        parts = (whole / world_size()).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    for p in net.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(reach)


def moved(tensor, device):
    """A CPU's tensor on a device; to a GPU without waiting for what that has yet to do."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def scrambled(state):
    """SplitMix64's output function (Steele, Lea and Flood, 2014) of int64 states, modulo 2^64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ unsigned_shift(state, shift)) * (factor - 2**64)
    return state ^ unsigned_shift(state, 31)


def unsigned_shift(x, bits):
    """x >> bits with zeros from the left."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def noise_from(seeds, shape, device):
    """Standard normal noise [B, *shape] for int64 seeds [B]; a row depends on its own seed alone.

    Value j of a row is output j of a SplitMix64 generator that starts at the scrambled seed, as a quantile of
    the normal distribution: all at once, on the device."""
    seeds = moved(seeds, device)
    counter = torch.arange(1, math.prod(shape) + 1, device=device)
    bits = scrambled(scrambled(seeds)[:, None] + counter * (0x9E3779B97F4A7C15 - 2**64))  # [B] -> [B, values]
    uniform = (unsigned_shift(bits, 12).double() + 0.5) / 2**52  # never 0 or 1
    return torch.special.ndtri(uniform).float().view(-1, *shape)  # [B, values] -> [B, *shape]


# ------------------------------------------------------------------------------------------------------------
# Files: written atomically, read without executing anything
# ------------------------------------------------------------------------------------------------------------


def open_folder(path):
    """The folder, made if need be.

    Raises InputError if it cannot be written, or holds a folder where a file of ours is to be written."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / ".writable").touch()
        (Path(path) / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to the output folder {path}: {error.strerror}") from error
    for inner in Path(path).iterdir():
        if inner.suffix in (".json", ".jsonl", ".safetensors", ".png", ".npz") and inner.is_dir():
            raise InputError(f"{inner} is a folder, where a file is to be written: move it away")
    return Path(path)


@contextmanager
def atomically(path):
    """A temporary path to write to, renamed to path when all is written, removed otherwise.

    Raises InputError, naming path, where it cannot be written."""
    from safetensors import SafetensorError

    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}")  # keeps the extension, which tells PIL the format
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {path} ({getattr(error, 'strerror', None) or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def finite(content):
    """The same with None for every number that JSON does not know: nan and the infinities."""
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


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
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command, "commit": commit, "versions": versions, "hardware": device,
            "processes": world_size()}


def write_results(out, config, metrics):
    """config.json and metrics.json, which also say by what they were made."""
    write_json(out / "config.json", config | {"torch": torch.__version__, "processes": world_size()})
    write_json(out / "metrics.json", metrics | about_this_run())


def write_json(path, content):
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(finite(content), indent=1) + "\n")


def read_json(path):
    """The content of a JSON file. Raises InputError if it cannot be read."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({type(error).__name__})") from error


def save_tensors(tensors, path, metadata=None):
    """Write {name: tensor} as safetensors. metadata: strings for its header."""
    from safetensors.torch import save_file

    with atomically(path) as temporary:
        save_file(tensors, temporary, metadata)


def fingerprint_of(net):
    """A checksum of a network's parameters and buffers. A collective call."""
    value = 0
    for name, tensor in sorted(net.state_dict().items()):
        whole = gathered(tensor.detach()).cpu().contiguous()
        value = zlib.crc32(whole.view(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), value))
    return f"{value:08x}"


def save_weights(net, path, metadata=None):
    """Write a network's parameters and buffers as safetensors. A collective call."""
    whole = {name: gathered(value.detach()) for name, value in net.state_dict().items()}
    state = {name: value.to("cpu", copy=True).contiguous() for name, value in whole.items()}  # tied ones, too
    broken = [name for name, value in state.items() if not value.isfinite().all()]
    if broken:
        raise Diverged(f"{path} was not written: its weights are not finite, first in {broken[0]}")
    if process_rank() == 0:
        save_tensors(state, path, metadata)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------


def state_tensors(learners):
    """All state of {name: fgm.Learner}, a flat dict that a checkpoint is written from, or read into."""
    state = {}
    for name, learner in learners.items():
        state |= {f"{name}.ema.{key}": value for key, value in learner.ema.items()}
        state |= {f"{name}.buffer.{key}": value for key, value in learner.module.named_buffers()}
        for key, p in learner.parameters.items():
            state[f"{name}.parameter.{key}"] = p.detach()
            moments = {kind: value for kind, value in learner.adam.state[p].items() if kind != "step"}
            state |= {f"{name}.{kind}.{key}": value for kind, value in moments.items()}
    return state


def crc32_of(path):
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            value = zlib.crc32(chunk, value)
    return value


def checksums(folder):
    """{file: [bytes, crc32]} of the tensor files in a checkpoint, their reading shared by the processes."""
    files = sorted(folder.glob("*.safetensors"))
    files = files[process_rank() :: world_size()]
    mine = {f.name: [f.stat().st_size, crc32_of(f)] for f in files}
    parts = [mine]
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, mine)
    return {name: value for part in parts for name, value in part.items()}


def checksum(content):
    return zlib.crc32(json.dumps(finite(content), sort_keys=True).encode())


def checkpoints(folder, phase):
    """The checkpoints of a phase, oldest first; nothing else that may lie beside them."""
    return sorted(path for path in folder.glob(f"{phase}-*") if re.fullmatch(rf"{phase}-\d{{9}}", path.name))


@contextmanager
def unwrapped():
    """Raise what torch.distributed.checkpoint caught, SystemExit and Ctrl-C included, not its wrapping.

    Within, it does not warn of checkpoints by one process, which are what we intend then."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            yield
    except CheckpointException as error:
        raise next(failure for failure, _ in error.failures.values()) from None


FILE_BYTES = 1e9  # of a file in a checkpoint: its tensors, and then its content, are whole in host memory


def file_numbers(state):
    """{name: number of the file, from 1, that a process writes its part of this tensor to}."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in state.values()]
    ends = itertools.accumulate(sizes)
    return {name: 1 + int(end // FILE_BYTES) for name, end in zip(state, ends, strict=True)}


def save_checkpoint(folder, phase, step, learners, settings, seconds):
    """Write folder/PHASE-STEP under a temporary name, rename it when complete, keep it and the one before.

    Tensors go to safetensors files, each process's own (torch.distributed.checkpoint), so that any number of
    processes can resume; step, settings and checksums to checkpoint.json. There are no generator states:
    fgm.Draws makes every random number from (seed, step). Returns the path. Raises InputError if it cannot be
    written."""
    import torch.distributed.checkpoint as dcp

    target, temporary = folder / f"{phase}-{step:09d}", folder / f"tmp-{phase}-{step:09d}"
    state = {name: value.contiguous() for name, value in state_tensors(learners).items()}
    try:
        if process_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        if world_size() > 1:
            dist.barrier()
        writer = dcp.HuggingFaceStorageWriter(str(temporary), file_numbers(state), save_distributed=True)
        with unwrapped():
            dcp.save(state, storage_writer=writer, no_dist=world_size() == 1)
        files = checksums(temporary)
        if process_rank() == 0:
            updates = {name: learner.updates for name, learner in learners.items()}
            content = {"step": step, "updates": updates, "seconds": seconds, "settings": settings}
            content |= {"files": files}
            write_json(temporary / "checkpoint.json", content | {"crc32": checksum(content)})
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            for old in checkpoints(folder, phase)[:-2]:
                shutil.rmtree(old)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        raise InputError(f"cannot write the checkpoint {target} ({error}); earlier ones are untouched: "
                         "free some space and run again") from error
    return target


def described(value):
    """A setting as JSON can hold it: a function by its name, a lambda by its code, both with the numbers and
    texts that they close over; a partial by its parts. Raises InputError for what JSON cannot hold."""
    if isinstance(value, functools.partial):
        given = {name: described(part) for name, part in value.keywords.items()}
        return f"partial({described(value.func)}, {[described(part) for part in value.args]}, {given})"
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if not callable(value):
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise InputError(f"a checkpoint cannot keep the setting {value!r}: numbers, texts, or lists or "
                             "dicts of them") from error
        return value
    code = getattr(value, "__code__", None)
    if code is None:
        return getattr(value, "__name__", type(value).__name__)
    name = value.__name__
    if name == "<lambda>":
        name = f"lambda {zlib.crc32(repr(content_of(code)).encode()):08x}"
    closed_over = [cell.cell_contents for cell in value.__closure__ or ()]
    plain = [content for content in closed_over if isinstance(content, (bool, int, float, str))]
    return f"{name} with {plain}" if plain else name


def content_of(code):
    """What a code object does, without its address: of functions inside it, too."""
    constants = [content_of(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
    return code.co_code, tuple(constants), code.co_names


def load_checkpoint(folder, phase, learners, settings, resume):
    """Put the newest checkpoint of a phase into the learners. Returns (step, seconds so far), or (0, 0.0).

    resume: "same" raises InputError if the settings differ from the checkpoint's, and names them; "any" says
    so and goes on. A damaged or foreign checkpoint raises InputError and leaves everything as it was; nothing
    in one is ever executed."""
    import torch.distributed.checkpoint as dcp

    found = checkpoints(folder, phase)
    if not found:
        return 0, 0.0
    newest, before = found[-1], found[-2].name if len(found) > 1 else "the start"
    refusal = f"{newest} is damaged or not a checkpoint of this run; remove it to go on from {before}"
    try:
        saved = json.loads((newest / "checkpoint.json").read_text())
        claimed = saved.pop("crc32", None)
        intact = saved["files"] == checksums(newest) and claimed in (None, checksum(saved))
        step, seconds, then = int(saved["step"]), float(saved["seconds"]), dict(saved["settings"])
        updates = {name: int(saved["updates"][name]) for name in learners}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{refusal} ({type(error).__name__})") from error
    if not intact:
        raise InputError(f"{refusal} (a file is missing or changed)")
    now = json.loads(json.dumps(settings))
    names = [name for name in sorted({*now, *then}) if now.get(name) != then.get(name)]
    changed = ", ".join(f"{name} {then.get(name)} -> {now.get(name)}" for name in names)
    if changed and resume == "same":
        raise InputError(f"{folder.parent} holds a {phase} run with other settings ({changed}): --resume "
                         "goes on with it all the same, --overwrite starts again, --out names another folder")
    if changed and process_rank() == 0:
        print(f"resuming {phase} with changed settings: {changed}")
    targets = state_tensors(learners)
    state = {name: value.contiguous() for name, value in targets.items()}  # a copy of what is channels-last
    try:
        reader = dcp.HuggingFaceStorageReader(str(newest))
        parameters = [name for name in reader.read_metadata().state_dict_metadata if ".parameter." in name]
        if not set(parameters) <= state.keys():  # it would be read in part
            raise KeyError
        with unwrapped():
            dcp.load(state, storage_reader=reader, no_dist=world_size() == 1)
    except Exception as error:  # the reader raises what it likes; whatever it was, this file cannot be used
        raise InputError(f"{refusal} ({type(error).__name__})") from error
    for name, value in state.items():
        if value is not targets[name]:
            targets[name].copy_(value)
    for name, learner in learners.items():
        learner.updates = updates[name]
        for moments in learner.adam.state.values():
            moments["step"].fill_(learner.updates)
    return step, seconds


# ------------------------------------------------------------------------------------------------------------
# The run in a folder
# ------------------------------------------------------------------------------------------------------------


class FolderRun(fgm.Run):
    """A run in the folder out, which it locks: log.jsonl, checkpoints/, pictures, progress bar. See fgm.Run.

    resume: "same" goes on with what is there if its settings are ours, and raises InputError otherwise; "any"
    goes on whatever changed; "no" removes the checkpoints of all phases now. fingerprint: further settings
    that a resumed run must share. picture(step, generator), if given, is called every picture_every steps
    and at the end of a distillation, with the averaged weights in place and without gradients; a dict of
    numbers that it returns goes into the log. progress.png is drawn then, unless it was a moment ago."""

    PHASES = ("teacher", "distill")
    T_BINS = 10
    locks = {}  # {folder: its lock}, of this process

    def __init__(self, out, resume="same", save_every=1000, log_every=100, picture_every=None, picture=None,
                 fingerprint=None):
        for name, value in {"save_every": save_every, "log_every": log_every}.items():
            fgm.check_setting(name, value, fgm.COUNT, whole=True)
        self.out, self.resume = open_folder(out), resume
        self.save_every, self.log_every, self.picture_every = save_every, log_every, picture_every
        self.picture, self.fingerprint = picture, fingerprint or {}
        self.folder = self.out / "checkpoints"
        first_process(self.take_folder)

    def take_folder(self):
        """Lock the folder and, to start again, remove what earlier runs left. Raises InputError if in use."""
        self.folder.mkdir(exist_ok=True)
        where = self.out.resolve()
        if where in self.locks:  # this process's own: a notebook's cell, called again
            self.locks.pop(where).close()
        lock = open(self.out / ".lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise InputError(f"another run is at work in {self.out}: wait, or name another --out") from error
        self.locks[where] = lock
        if self.resume == "no":
            for old in [path for phase in self.PHASES for path in checkpoints(self.folder, phase)]:
                shutil.rmtree(old)
            for name in ("generator.safetensors", "metrics.json", "log.jsonl", "progress.png"):
                (self.out / name).unlink(missing_ok=True)

    @classmethod
    def unlock(cls):
        """Give back all folders of this process."""
        while cls.locks:
            cls.locks.popitem()[1].close()

    def steps(self, phase, steps, learners, settings):
        settings = {name: described(value) for name, value in (settings | self.fingerprint).items()}
        start, before = load_checkpoint(self.folder, phase, learners, settings, self.resume)
        began = time.perf_counter() - before
        self.phase, self.first_bad = phase, None
        self.last_good = self.folder / f"{phase}-{start:09d}" if start else None
        device = next(iter(next(iter(learners.values())).parameters.values())).device
        self.open_log(start, settings["batch"], device)
        title, batch = "distillation" if phase == "distill" else phase, settings["batch"]
        with bar(title, steps * batch, start * batch) as self.bar:
            try:
                yield from self.each_step(phase, range(start, steps), learners, settings, began)
            except Diverged:
                self.write_log(self.step + 1)
                self.draw_progress()
                raise
        self.seconds = time.perf_counter() - began if start < steps else before

    def each_step(self, phase, numbers, learners, settings, began):
        """The steps with these numbers, and what is due after each: picture, log, checkpoint."""
        steps = numbers.stop
        for self.step in numbers:
            done = self.step + 1
            drawing = self.picture and "generator" in learners
            drawing = drawing and (done % (self.picture_every or steps) == 0 or done == steps)
            saving = done % self.save_every == 0 or done == steps
            logging = drawing or done % self.log_every == 0 or done == steps
            self.looking = drawing or saving
            yield self.step
            self.bar.update(self.batch)
            if drawing:
                self.draw(learners["generator"], done)
            if logging:
                self.check()
                self.write_log(done)
            if drawing and (done == steps or time.perf_counter() > self.draw_after):
                self.draw_progress()
            if saving:
                self.check()
                seconds = time.perf_counter() - began
                self.last_good = save_checkpoint(self.folder, phase, done, learners, settings, seconds)

    def draw(self, learner, step):
        self.check()
        learner.swap()
        with torch.no_grad():
            found = self.picture(step, learner.module) or {}
        self.scores = {name: described(value) for name, value in found.items()}
        for part in learner.module.modules():
            if hasattr(part, "reshard"):
                part.reshard()  # FSDP2 keeps the outermost weights gathered after passes without gradients
        learner.swap()

    def draw_progress(self):
        """progress.png, from the log; the next one when this took at most 1 % of the time until then."""
        if process_rank() == 0 and self.phase == "distill":
            began = time.perf_counter()
            with atomically(self.out / "progress.png") as temporary:
                progress.draw(self.out / "log.jsonl", temporary)
            self.draw_after = began + 100 * (time.perf_counter() - began)

    def open_log(self, start, batch, device):
        self.batch, self.logged, self.since, self.extras = batch, start, time.perf_counter(), {}
        self.scores, self.draw_after = {}, 0.0
        self.sums, self.bins = 0, torch.zeros(2, self.T_BINS, device=device)
        path = self.out / "log.jsonl"
        if process_rank() == 0 and path.exists():  # drop what was logged after the checkpoint
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

    def log(self, **terms):
        """Does not wait for a GPU: check() raises Diverged later, and names the step."""
        values = torch.stack([value.detach().float().mean() for value in terms.values()])
        if self.first_bad is None:
            self.names, self.first_bad = list(terms), torch.full_like(values, math.inf)
        self.first_bad = torch.where(values.isfinite(), self.first_bad, self.first_bad.clamp(max=self.step))
        self.sums = self.sums + values

    def check(self):
        """Raises Diverged if any scalar was not finite at any step so far. A collective call."""
        first_bad = self.first_bad.clone()
        if world_size() > 1:
            dist.all_reduce(first_bad, dist.ReduceOp.MIN)
        if first_bad.isfinite().any():
            name, step = self.names[int(first_bad.argmin())], int(first_bad.min())
            kept = self.last_good and f"the last good checkpoint is {self.last_good}"
            raise Diverged(f"{self.phase} diverged: {name} is not finite at step {step}; "
                           f"{kept or 'there is no checkpoint yet'}")

    def log_by_t(self, t, loss):
        bins = (t * self.T_BINS).long().clamp(max=self.T_BINS - 1)
        self.bins.index_add_(1, bins, torch.stack([loss.detach().float(), torch.ones_like(t)]))

    def look_at(self, x0, **losses):
        """Where a picture or a checkpoint is due, because it costs a backward pass per loss: the norm of each
        loss's gradient at x0, root mean square over samples, for the next line of the log."""
        for name, loss in losses.items():
            if self.looking and loss.requires_grad:
                (gradient,) = torch.autograd.grad(loss.sum(), x0, retain_graph=True)
                self.extras[f"{name}_gradient_at_x0"] = gradient.norm() / len(x0) ** 0.5

    def write_log(self, step):
        """One line of log.jsonl: means over the steps since the line before, over all processes."""
        sums, bins = self.sums / (step - self.logged) / world_size(), self.bins.clone()
        if world_size() > 1:
            dist.all_reduce(sums)
            dist.all_reduce(bins)
        record = {"phase": self.phase, "step": step, "kimg": step * self.batch / 1000}
        record |= dict(zip(self.names, sums.tolist(), strict=True))
        record |= {name: value.item() for name, value in self.extras.items()} | self.scores
        record["flow_loss_by_t"] = [total / n if n else None for total, n in zip(*bins.tolist(), strict=True)]
        record["images_per_s"] = (step - self.logged) * self.batch / (time.perf_counter() - self.since)
        self.bar.set_postfix({name: f"{record[name]:.3g}" for name in self.names[:3]}, refresh=False)
        if process_rank() == 0:
            try:
                with open(self.out / "log.jsonl", "a") as file:
                    file.write(json.dumps(finite(record)) + "\n")
            except OSError as error:
                kept = f"; the last checkpoint is {self.last_good}" if self.last_good else ""
                raise InputError(f"cannot write {self.out / 'log.jsonl'} ({error.strerror}){kept}") from error
        self.sums, self.scores, self.extras = 0, {}, {}
        self.logged, self.since = step, time.perf_counter()
        self.bins.zero_()
