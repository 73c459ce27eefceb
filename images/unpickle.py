"""Reading the pickles in which EDM's networks are published, executing nothing in them.

A pickle is a program. Here it runs on Python's own machine for pickles; the names in it stand for the
functions below, and there are no others. What they make is inert: numbers, texts, tensors, and Modules. The
bytes of a tensor go through torch's own loader of weights alone.

The machine is pickle's in Python, pickle._Unpickler, for the one in C would set any object's state. A file
that is made to do harm can take for ever, or all memory, or end the process by an overflow of its stack; it
cannot run anything.
"""

import io
import math
import pickle
from pathlib import Path

import numpy as np
import torch

from fgm import InputError

LARGEST = 2**31  # bytes of a file; published are 0.25e9
SCALARS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


def shown(value):
    """A foreign value for a message: only its type unless text or number, for it may nest without end."""
    if type(value) is str:
        return ascii(value[:100])[:100]
    number = value is None or type(value) in (int, float, bool)
    return ascii(value)[:100] if number else f"a {type(value).__name__}"


class Module:
    """What an instance of a published pickle's own classes becomes: its state, and none of its code."""

    def __init__(self, class_name, state=None):
        if type(class_name) is not str or not class_name.isidentifier():
            raise InputError("it names a class by what is no name")
        self.class_name, self.state = class_name, state

    def modules(self, prefix="", met=None):
        """Yields (prefix of its tensors' names, module) for this module and those inside."""
        met = set() if met is None else met
        if id(self) in met:  # in itself, or along very many paths
            raise InputError("a module in it has two places")
        met.add(id(self))
        yield prefix, self
        for name, child in self.state["_modules"].items():
            if child is not None:
                yield from child.modules(f"{prefix}{name}.", met)

    def tensors(self):
        """{name: tensor, a view} of the parameters and buffers of this module and those inside."""
        found = {}
        for prefix, module in self.modules():
            own = module.state["_parameters"] | module.state["_buffers"]
            found |= {prefix + name: value for name, value in own.items() if value is not None}
        if any(type(value) is not torch.Tensor for value in found.values()):
            raise InputError("a parameter in it is no tensor")
        return found


# ---- What a file may call ----------------------------------------------------------------------------------


def dtype(name, align=False, copy=True):
    if name not in SCALARS:
        raise InputError(f"it holds a number of dtype {shown(name)}; known are {', '.join(SCALARS)}")
    return np.dtype(f"<{name}")


def scalar(kind, content):
    """A numpy scalar as a Python number."""
    (number,) = np.frombuffer(content, kind)
    return number.item()


def storage(content):
    """The numbers [N] of a storage that torch.save wrote."""
    try:
        stored = torch.load(io.BytesIO(content), "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError("what poses as a tensor's bytes in it is none; nothing was executed") from error
    return torch.empty(0, dtype=stored.dtype).set_(stored)


def tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    """A view of a storage, without gaps; torch checks that it lies within."""
    span = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if span != math.prod(size):
        raise InputError("a tensor in it has gaps")
    return storage.as_strided(size, stride, offset)


FUNCTIONS = {
    "torch_utils.persistence._reconstruct_persistent_obj":  # without the source text in meta["module_src"]
        lambda meta: Module(meta["class_name"], meta["state"]),
    "torch.nn.modules.container.ModuleDict": lambda: Module("ModuleDict"),
    "collections.OrderedDict": lambda: {},
    "torch.storage._load_from_bytes": storage,
    "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
    "torch._utils._rebuild_tensor_v2": tensor, "numpy.dtype": dtype,
    "numpy.core.multiarray.scalar": scalar, "numpy._core.multiarray.scalar": scalar,
}

# ---- The machine -------------------------------------------------------------------------------------------


class Unpickler(pickle._Unpickler):
    def find_class(self, module, name):
        if f"{module}.{name}" not in FUNCTIONS:
            what = shown(f"{module}.{name}")
            raise InputError(f"it names {what}, which no EDM network needs; nothing was executed")
        return FUNCTIONS[f"{module}.{name}"]

    def load_build(self):
        """Sets the state of a module; that of a dtype is what it has anyway."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Module:
            target.state = state
        elif not isinstance(target, np.dtype) or state[1] not in ("<", "|", "="):
            raise InputError(f"it sets the state of a {type(target).__name__} to what no EDM network has")

    dispatch = pickle._Unpickler.dispatch | {
        pickle.BUILD[0]: load_build, pickle.NEWOBJ[0]: pickle._Unpickler.load_reduce}


def read_pickle(path):
    """The value of a published pickle. Raises InputError, or whatever a damaged file makes fail."""
    size = Path(path).stat().st_size
    if size > LARGEST:
        raise InputError(f"it has {size} bytes, published EDM networks at most {LARGEST}")
    return Unpickler(io.BytesIO(Path(path).read_bytes())).load()
