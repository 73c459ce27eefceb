"""Checkpoints of the learners of fgm.py, which any number of processes can resume.

A checkpoint is a folder: whole tensors in safetensors files, which the first process writes, checkpoint.json
with the rest, and a checksum of both. Nothing in it is ever executed. There are no generator states:
fgm.Draws makes every random number from (seed, step).
"""

import functools
import json
import shutil
from contextlib import ExitStack, nullcontext

import numpy as np
import torch

from fgm import InputError, gathered, process_rank
from training.files import atomically, file_digest

FILE_BYTES = 1e9  # of tensors in a file: they, and then its content, are whole in host memory


def described(value):
    """A setting as JSON can hold it: an array as lists, a function by its name, a partial by its parts.

    Raises InputError for what JSON cannot hold."""

    def plain(value):
        if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
            return value.tolist()
        if isinstance(value, functools.partial):
            return [value.func, value.args, value.keywords]
        if callable(value):
            return getattr(value, "__qualname__", type(value).__qualname__)
        raise InputError(f"a checkpoint cannot keep the setting {value!r}: give numbers, texts, lists, dicts")

    try:
        return json.loads(json.dumps(value, default=plain))
    except TypeError as error:  # of a key
        raise InputError(f"a checkpoint cannot keep a setting ({error})") from error


def state_tensors(learners):
    """All state of {name: fgm.Learner}, a flat dict that a checkpoint is written from, or read into."""
    state = {}
    for name, learner in learners.items():
        state |= {f"{name}.ema.{key}": value for key, value in learner.ema.items()}
        state |= {f"{name}.buffer.{key}": value for key, value in learner.module.named_buffers()}
        for key, p in learner.parameters.items():
            state[f"{name}.parameter.{key}"] = p.detach()
            for kind, moment in learner.adam.state[p].items():
                if kind != "step" and moment is not p.grad:
                    state[f"{name}.{kind}.{key}"] = moment
    return state


def checkpoints(folder, phase):
    """The checkpoints of a phase, oldest first; nothing else that may lie beside them."""
    return sorted(folder.glob(f"{phase}-" + 9 * "[0-9]"))


def checksum(folder):
    """Of the names and contents of a checkpoint's files."""
    paths = [folder / "checkpoint.json", *sorted(folder.glob("*.safetensors"))]
    return json.dumps({path.name: file_digest(path) for path in paths})


def save(folder, phase, step, learners, settings, seconds):
    """Write folder/PHASE-STEP atomically, keep it and the one before.

    Returns its path. Raises InputError if it cannot be written. A collective call."""
    target, first = folder / f"{phase}-{step:09d}", process_rank() == 0
    updates = {name: learner.updates for name, learner in learners.items()}
    content = {"step": step, "updates": updates, "seconds": seconds, "settings": settings}
    with atomically(target) if first else nullcontext() as temporary:
        if first:
            temporary.mkdir()
            (temporary / "checkpoint.json").write_text(json.dumps(content, indent=1) + "\n")
        write_tensors(state_tensors(learners), temporary)
        if first:
            (temporary / "checksum").write_text(checksum(temporary))
    for old in checkpoints(folder, phase)[:-2] if first else ():
        shutil.rmtree(old)
    return target


def write_tensors(state, folder):
    """Write the whole of tensors that may be sharded as folder/NUMBER.safetensors. A collective call."""
    from safetensors.torch import save as to_bytes

    part, number, last = {}, 1, list(state)[-1]
    for name, tensor in state.items():
        whole = gathered(tensor)
        if process_rank() == 0:
            part[name] = whole.to("cpu", copy=True).contiguous()  # a copy: they must not share memory
            if name == last or sum(value.nbytes for value in part.values()) >= FILE_BYTES:
                (folder / f"{number:05d}.safetensors").write_bytes(to_bytes(part))
                part, number = {}, number + 1


def load(folder, phase, learners, settings, resume):
    """Put the newest checkpoint of a phase into the learners. Returns (step, seconds so far), or (0, 0.0).

    resume: "same" raises InputError if the settings differ from the checkpoint's, and names them; "any" says
    so and goes on. A damaged or foreign checkpoint raises InputError and leaves everything as it was: on the
    first process, which alone reads all to check it."""
    found = checkpoints(folder, phase)
    if not found:
        return 0, 0.0
    newest, before = found[-1], found[-2].name if len(found) > 1 else "the start"
    refusal = f"{newest} is damaged or not a checkpoint of this run; remove it to go on from {before}"
    try:
        if process_rank() == 0 and checksum(newest) != (newest / "checksum").read_text():
            raise ValueError("a file is missing or changed")
        saved = json.loads((newest / "checkpoint.json").read_text())
        step, seconds, then = saved["step"], saved["seconds"], dict(saved["settings"])
        updates = {name: saved["updates"][name] for name in learners}
        names = [name for name in sorted({*settings, *then}) if settings.get(name) != then.get(name)]
        changed = ", ".join(f"{name} {then.get(name)} -> {settings.get(name)}" for name in names)
        if changed and resume == "same":
            raise InputError(f"{folder.parent} holds a {phase} run with other settings ({changed}): --resume "
                             "goes on all the same, --overwrite starts again, --out names another folder")
        if changed and process_rank() == 0:
            print(f"resuming {phase} with changed settings: {changed}")
        read_tensors(state_tensors(learners), newest)
    except InputError:
        raise
    except Exception as error:  # safetensors raises what it likes; whatever it was, this cannot be used
        raise InputError(f"{refusal} ({error})") from error
    for name, learner in learners.items():
        learner.updates = updates[name]
        for moments in learner.adam.state.values():
            moments["step"].fill_(learner.updates)
    return step, seconds


def read_tensors(state, folder):
    """Read what write_tensors wrote into tensors that may be sharded. Changes nothing unless all will fit."""
    from safetensors import safe_open

    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("*.safetensors"))]
        held = {name: file for file in files for name in file.keys()}
        more = [name for name in held if ".parameter." in name and name not in state]
        shapes = {name: held[name].get_slice(name).get_shape() for name in state}
        if more or shapes != {name: list(tensor.shape) for name, tensor in state.items()}:
            raise ValueError("it is of other tensors")
        for name, tensor in state.items():
            whole = held[name].get_tensor(name).to(tensor.device)
            if hasattr(tensor, "device_mesh"):
                from torch.distributed.tensor import distribute_tensor

                place = tensor.device_mesh, tensor.placements
                whole = distribute_tensor(whole, *place, src_data_rank=None)  # each process keeps its part
            tensor.copy_(whole)
