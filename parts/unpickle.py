"""Reading the pickles in which EDM's networks are published, trusting nothing in them.

A pickle is a program. Here it runs on Python's own machine for pickles, of which it gets the opcodes that
these files need; the names in it stand for the functions below. Nothing reaches torch or numpy before it has
been checked.

The machine is pickle's in Python, pickle._Unpickler. A file can end the one in C, pickle.Unpickler, and
nothing that it calls could prevent it: the hash of a deeply nested tuple, as a key, overflows the stack,
and ten bytes that name memo place 2^28 make it allocate 4 GB.
"""

import io
import math
import os
import pickle
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from fgm import InputError

LARGEST = 2**31  # bytes of a file; published are 0.25e9
READS = 300_000  # of a file, one or more an opcode; published have some 130,000
ENTRIES, LONGEST = 100_000, 200  # a file can name one module along very many paths, and very long ones

SCALARS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
STORAGES = {
    "torch.DoubleStorage": torch.float64, "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16, "torch.BFloat16Storage": torch.bfloat16,
}
LEGACY_FORMAT = 0x1950A86A20F9469CFC6C, 1001  # torch.save's magic number and version


def shown(value):
    """A foreign value for a message: only its type unless text or number, for it may nest without end."""
    if type(value) is str:
        return ascii(value[:100])[:100]
    number = value is None or type(value) in (int, float, bool)
    return ascii(value)[:100] if number else f"a {type(value).__name__}"


class Module:
    """What an instance of a published pickle's own classes becomes: its state, and none of its code."""

    def __init__(self, class_name, state=None):
        if type(class_name) is not str or not class_name.isidentifier() or len(class_name) > LONGEST:
            raise InputError("it names a class by what is no name")
        if state is not None and type(state) is not dict:
            raise InputError(f"the state of a {class_name} in it is no dict")
        self.class_name, self.state = class_name, state

    def modules(self):
        """[(prefix of its tensors' names, module)] of this module and those inside."""
        waiting, found, entries = [("", self)], [], 0
        while waiting:
            prefix, module = waiting.pop()
            found.append((prefix, module))
            children = module.state["_modules"]
            names = [*children, *module.state["_parameters"], *module.state["_buffers"]]
            entries += len(names)
            if entries > ENTRIES or any(len(prefix) + len(name) > LONGEST for name in names):
                raise InputError(f"it has over {ENTRIES} modules or tensors, or a name over {LONGEST}")
            waiting += [(f"{prefix}{name}.", child) for name, child in children.items() if child is not None]
        return found

    def tensors(self):
        """{name: tensor, a view} of the parameters and buffers of this module and those inside."""
        found = {}
        for prefix, module in self.modules():
            own = module.state["_parameters"] | module.state["_buffers"]
            found |= {prefix + name: value for name, value in own.items() if value is not None}
        if any(type(value) is not torch.Tensor for value in found.values()):
            raise InputError("a parameter in it is no tensor")
        storages = {value.data_ptr(): value.untyped_storage().nbytes() for value in found.values()}
        if sum(value.nbytes for value in found.values()) > sum(storages.values()):
            raise InputError("its tensors claim more bytes than it holds")
        return found


# ------------------------------------------------------------------------------------------------------------
# What a file may call
# ------------------------------------------------------------------------------------------------------------


class Dtype(NamedTuple):
    """A numpy dtype, one of SCALARS."""

    name: str


def dtype(name, align=False, copy=True):
    if type(name) is not str or name not in SCALARS:
        raise InputError(f"it holds a number of dtype {shown(name)}; known are {', '.join(SCALARS)}")
    return Dtype(name)


def scalar(kind, content):
    """A numpy scalar as a Python number."""
    if type(kind) is not Dtype or type(content) is not bytes or len(content) != int(kind.name[1]):
        raise InputError("it holds a number that does not fit its dtype")
    return np.frombuffer(content, f"<{kind.name}")[0].item()


def storage(outer, content):
    """The numbers [N] that torch.save wrote in its legacy format, five small pickles before them.

    outer: the Bounded file that content comes from, of which each byte is read here only once."""
    if type(content) is not bytes:
        raise InputError("a tensor in it has no bytes")
    outer.inside -= len(content)
    if outer.inside < 0:
        raise InputError("its tensors are read from the same bytes again and again")
    file = Bounded(io.BytesIO(content), len(content), outer.reads)
    magic, version, machine, stored, keys = (Unpickler(file, STORAGES).load() for _ in range(5))
    word, kind, key, _, numbers, view = stored  # _ is the device
    right = (magic, version) == LEGACY_FORMAT and machine["little_endian"] is True and word == "storage"
    right = right and type(kind) is torch.dtype and type(key) is str and keys == [key] and view is None
    if not right:
        raise InputError("a tensor in it is not in the format of EDM's files")
    written = int.from_bytes(file.read(8), "little")
    if type(numbers) is not int or written != numbers or numbers * kind.itemsize != file.left:
        raise InputError(f"a tensor in it claims {written} numbers of {kind} and has {file.left} bytes")
    return torch.frombuffer(bytearray(file.read(file.left)), dtype=kind)


def tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    """A view of a storage, checked to lie within it and to have no gaps."""
    if type(storage) is not torch.Tensor or type(size) is not tuple or type(stride) is not tuple:
        raise InputError("a tensor in it has no storage, size or stride")
    numbers = [offset, *size, *stride]
    if len(size) != len(stride) or len(size) > 4 or any(type(n) is not int or n < 0 for n in numbers):
        raise InputError("a tensor in it has an impossible offset, size or stride")
    span = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 in size or span != math.prod(size) or offset + span > storage.numel():
        raise InputError("a tensor in it has gaps, or reaches outside its storage")
    return storage.as_strided(size, stride, offset)


FUNCTIONS = {  # and torch.storage._load_from_bytes
    "torch_utils.persistence._reconstruct_persistent_obj":  # without the source text in meta["module_src"]
        lambda meta: Module(meta["class_name"], meta["state"]),
    "torch.nn.modules.container.ModuleDict": lambda: Module("ModuleDict"),
    "collections.OrderedDict": lambda: {},
    "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
    "torch._utils._rebuild_tensor_v2": tensor, "numpy.dtype": dtype,
    "numpy.core.multiarray.scalar": scalar, "numpy._core.multiarray.scalar": scalar,
}

# ------------------------------------------------------------------------------------------------------------
# The machine
# ------------------------------------------------------------------------------------------------------------


class Bounded:
    """A file of size bytes that refuses to be read beyond its end, before it allocates what was asked for,
    and more often than the iterator reads has items."""

    def __init__(self, file, size, reads):
        self.file, self.left, self.inside, self.reads = file, size, size, reads

    def read(self, size):
        if size > self.left:
            raise EOFError("it is cut short")
        if next(self.reads, None) is None:
            raise InputError(f"its operations take more than {READS} reads, more than any EDM network's")
        self.left -= size
        return self.file.read(size)

    def readline(self):
        line = self.file.readline()
        self.left -= len(line)
        return line


class Opcodes(dict):
    """{code: method of the machine} of the opcodes that EDM's files need."""

    def __missing__(self, code):
        raise InputError(f"it uses the pickle opcode {code}, which no EDM network needs")


class Unpickler(pickle._Unpickler):
    """Reads one pickle from a Bounded file: load. names: what its globals stand for."""

    def __init__(self, file, names):
        super().__init__(file)
        self.names = names
        if names is STORAGES:
            self.persistent_load = tuple  # a storage's description, as it stands; elsewhere there is none

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.names:
            what = shown(f"{module}.{name}")
            raise InputError(f"it names {what}, which no EDM network needs; nothing was executed")
        return self.names[f"{module}.{name}"]

    def skip_frame(self):
        self.read(8)  # its length: every read goes to the file, and counts

    def call(self):
        """REDUCE, NEWOBJ. Only find_class gives what can be called."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(arguments) is not tuple:
            raise InputError("it calls a function without a tuple of arguments")
        self.append(function(*arguments))

    def build(self):
        """BUILD sets the state of a module, once; and of a dtype, what it has anyway."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Module and target.state is None:
            target.state = Module(target.class_name, state).state
        elif type(target) is not Dtype or state[1] not in ("<", "|", "=") or state[2:5] != (None, None, None):
            raise InputError(f"it sets the state of a {type(target).__name__} to what no EDM network has")

    def put(self, items):
        """Put items into a set, or (key, value, key, ...) into a dict. Only texts are keys: others can be
        chosen whose hashes take for ever, overflow the stack, or are all the same."""
        target = self.stack[-1]
        keys = {set: items, dict: items[::2]}.get(type(target))
        if keys is None or any(type(key) is not str for key in keys):
            raise InputError(f"it puts into a {type(target).__name__} what no EDM network does")
        target.update(items if type(target) is set else zip(keys, items[1::2], strict=True))

    def put_many(self):
        self.put(self.pop_mark())

    def put_one(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.put([key, value])

    needed = """PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE
        BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
        EMPTY_LIST APPEND APPENDS EMPTY_DICT EMPTY_SET MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL
        STACK_GLOBAL BINPERSID"""
    dispatch = Opcodes({
        pickle.FRAME[0]: skip_frame, pickle.REDUCE[0]: call, pickle.NEWOBJ[0]: call, pickle.BUILD[0]: build,
        pickle.SETITEM[0]: put_one, pickle.SETITEMS[0]: put_many, pickle.ADDITEMS[0]: put_many,
    })
    for name in needed.split():
        code = getattr(pickle, name)[0]
        dispatch[code] = pickle._Unpickler.dispatch[code]


def read_pickle(path):
    """The value of a published pickle. Raises InputError, or whatever a damaged file makes fail."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST:
            raise InputError(f"it has {size} bytes, published EDM networks at most {LARGEST}")
        file = Bounded(file, size, iter(range(READS)))
        names = FUNCTIONS | {"torch.storage._load_from_bytes": partial(storage, file)}
        content = Unpickler(file, names).load()
        if file.left:
            raise InputError(f"{file.left} bytes follow its end")
        return content
