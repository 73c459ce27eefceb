"""Checkpoints of the learners of fgm.py, which any number of processes can resume.

A checkpoint is a folder: whole tensors in safetensors files, which the first process writes, and
checkpoint.json with the rest. Nothing in it is ever executed. There are no generator states: fgm.Draws makes
every random number from (seed, step).
"""

import functools
import json
import shutil
from contextlib import ExitStack, nullcontext

import numpy as np
import torch

from fgm import InputError, gathered, process_rank
from training.files import atomically, read_json, reason, write_json

FILE_BYTES = 1e9  # of tensors in one file, which are in host memory twice while it is written


def as_json(value):
    """A setting as JSON can hold it: an array as lists, a function by its name, a partial by its parts.

    Raises InputError for what JSON cannot hold."""

    def default(value):
        if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
            return value.tolist()
        if isinstance(value, functools.partial):
            return [value.func, value.args, value.keywords]
        if callable(value):
            return getattr(value, "__qualname__", type(value).__qualname__)
        raise InputError(f"a checkpoint cannot keep the setting {value!r}: give numbers, texts, lists, dicts")

    try:
        return json.loads(json.dumps(value, default=default))
    except TypeError as error:  # a dict's key
        raise InputError(f"a checkpoint cannot keep a setting: {error}") from error


def state_tensors(learners):
    """All state of {name: fgm.Learner} as a flat dict, which a checkpoint is written from or read into."""
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


# ---- Writing -----------------------------------------------------------------------------------------------


def save(folder, phase, step, learners, settings, seconds):
    """Write folder/PHASE-STEP, and remove all but this one and the one before. A collective call.

    Returns its path. Raises InputError if it cannot be written."""
    path = folder / f"{phase}-{step:09d}"
    is_first = process_rank() == 0
    updates = {name: learner.updates for name, learner in learners.items()}

    with atomically(path) if is_first else nullcontext() as temporary:
        if is_first:
            temporary.mkdir()
            content = {"step": step, "updates": updates, "seconds": seconds, "settings": settings}
            write_json(temporary / "checkpoint.json", content)
        write_tensors(state_tensors(learners), temporary)

    if is_first:
        for old in checkpoints(folder, phase)[:-2]:
            shutil.rmtree(old)
    return path


def write_tensors(state, folder):
    """Write the whole of tensors that may be sharded as folder/NUMBER.safetensors. A collective call."""
    from safetensors.torch import save as to_bytes

    part, number, last = {}, 1, list(state)[-1]
    for name, tensor in state.items():
        whole = gathered(tensor)
        if process_rank() > 0:
            continue

        part[name] = whole.to("cpu", copy=True).contiguous()  # a copy because they must not share memory
        if name == last or sum(value.nbytes for value in part.values()) >= FILE_BYTES:
            (folder / f"{number:05d}.safetensors").write_bytes(to_bytes(part))
            part, number = {}, number + 1


# ---- Reading -----------------------------------------------------------------------------------------------


def load(folder, phase, learners, settings, resume):
    """Put the newest checkpoint of a phase into the learners. Returns (step, seconds so far), or (0, 0.0).

    resume: "same" raises InputError if the settings differ from the checkpoint's; "any" says so and goes on.
    A damaged or foreign checkpoint raises InputError and leaves the learners as they were."""
    paths = checkpoints(folder, phase)
    if not paths:
        return 0, 0.0

    newest = paths[-1]
    try:
        saved = read_json(newest / "checkpoint.json")
        step, seconds = saved["step"], saved["seconds"]
        updates = {name: saved["updates"][name] for name in learners}
        if not all(isinstance(number, int | float) for number in [step, seconds, *updates.values()]):
            raise ValueError("step, seconds and updates must be numbers")
        changes = changed_settings(saved["settings"], settings)
        if not changes or resume == "any":
            read_tensors(state_tensors(learners), newest)
    except Exception as error:  # safetensors raises errors of many kinds
        before = paths[-2].name if len(paths) > 1 else "the start"
        raise InputError(f"{newest} is damaged or not a checkpoint of this run; remove it to go on from "
                         f"{before} ({reason(error)})") from error

    if changes and resume != "any":
        raise InputError(f"{folder.parent} holds a {phase} run with other settings ({changes}): --resume "
                         "goes on all the same, --overwrite starts again, --out names another folder")
    if changes and process_rank() == 0:
        print(f"resuming {phase} with changed settings: {changes}")

    for name, learner in learners.items():
        learner.updates = updates[name]
        for moments in learner.adam.state.values():
            moments["step"].fill_(learner.updates)
    return step, seconds


def changed_settings(before, now):
    """The settings that differ between two dicts, as a text such as "lr 0.1 -> 0.2, seed 1 -> 2"."""
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name)} -> {now.get(name)}" for name in names)


def read_tensors(state, folder):
    """Read what write_tensors wrote into tensors that may be sharded. Changes nothing unless all fit."""
    from safetensors import safe_open

    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("*.safetensors"))]
        file_of = {name: file for file in files for name in file.keys()}
        surplus = [name for name in file_of if ".parameter." in name and name not in state]
        shapes = {name: file_of[name].get_slice(name).get_shape() for name in state}
        if surplus or shapes != {name: list(tensor.shape) for name, tensor in state.items()}:
            raise ValueError("it holds other tensors")

        for name, tensor in state.items():
            whole = file_of[name].get_tensor(name).to(tensor.device)
            if hasattr(tensor, "device_mesh"):
                from torch.distributed.tensor import distribute_tensor

                mesh, placements = tensor.device_mesh, tensor.placements
                whole = distribute_tensor(whole, mesh, placements, src_data_rank=None)  # each its own part
            tensor.copy_(whole)
