"""Reading the pickles in which EDM's networks are published, trusting nothing in them.

A pickle is a program. The interpreter here knows only the opcodes and functions that these files need, and
makes plain values and the classes below of them: nothing in a file reaches torch or numpy. A tensor stays a
description until its shape has been checked against its bytes in the file, and against the network.
"""

import io
import math
import os
import pickletools
from typing import NamedTuple

import numpy as np
import torch

from fgm import InputError

LARGEST = 2**31  # bytes of a file; published are 0.25e9
OPERATIONS = 400_000  # opcodes of a file, those in its tensors' headers included; published have some 100,000
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


class Bounded:
    """A file that refuses to read beyond its end, before it allocates what was asked for."""

    def __init__(self, file, size):
        self.file, self.left = file, size

    def read(self, size):
        if size > self.left:
            raise EOFError("it is cut short")
        self.left -= size
        return self.file.read(size)

    def readline(self):
        line = self.file.readline()
        self.left -= len(line)
        return line


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
        """{name: Tensor} of the parameters and buffers of this module and those inside."""
        found = {}
        for prefix, module in self.modules():
            own = module.state["_parameters"] | module.state["_buffers"]
            found |= {prefix + name: value for name, value in own.items() if value is not None}
        if any(type(value) is not Tensor for value in found.values()):
            raise InputError("a parameter in it is no tensor")
        contents = {id(value.storage.content): value.storage.content for value in found.values()}
        if sum(value.nbytes() for value in found.values()) > sum(map(len, contents.values())):
            raise InputError("its tensors claim more bytes than it holds")
        return found


class Dtype(NamedTuple):
    """A numpy dtype, one of SCALARS."""

    name: str


class Storage(NamedTuple):
    """The numbers of dtype in content, a bytes object, from position to its end."""

    dtype: torch.dtype
    content: bytes
    position: int
    numbers: int


class Tensor(NamedTuple):
    """A view of a storage, checked to lie within it and to have no gaps."""

    storage: Storage
    offset: int
    size: tuple
    stride: tuple

    def nbytes(self):
        return math.prod(self.size) * self.storage.dtype.itemsize

    def read(self):
        """The tensor itself: one copy of its part of the file."""
        first = self.storage.position + self.offset * self.storage.dtype.itemsize
        content = bytearray(memoryview(self.storage.content)[first:first + self.nbytes()])
        return torch.frombuffer(content, dtype=self.storage.dtype).as_strided(self.size, self.stride)


# ------------------------------------------------------------------------------------------------------------
# The functions that a file may call
# ------------------------------------------------------------------------------------------------------------


def persistent_object(meta):
    """torch_utils.persistence's constructor, without the source text in meta["module_src"]."""
    return Module(meta["class_name"], meta["state"])


def module_dict():
    return Module("ModuleDict")


def ordered_dict():
    return {}


def dtype(name, align=False, copy=True):
    if type(name) is not str or name not in SCALARS:
        raise InputError(f"it holds a number of dtype {shown(name)}; known are {', '.join(SCALARS)}")
    return Dtype(name)


def scalar(kind, content):
    """A numpy scalar as a Python number."""
    if type(kind) is not Dtype or type(content) is not bytes or len(content) != int(kind.name[1]):
        raise InputError("it holds a number that does not fit its dtype")
    return np.frombuffer(content, f"<{kind.name}")[0].item()


def tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    if type(storage) is not Storage or type(size) is not tuple or type(stride) is not tuple:
        raise InputError("a tensor in it has no storage, size or stride")
    numbers = [offset, *size, *stride]
    if len(size) != len(stride) or len(size) > 4 or any(type(n) is not int or n < 0 for n in numbers):
        raise InputError("a tensor in it has an impossible offset, size or stride")
    span = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 in size or span != math.prod(size) or offset + span > storage.numbers:
        raise InputError("a tensor in it has gaps, or reaches outside its storage")
    return Tensor(storage, offset, size, stride)


def parameter(data, requires_grad=False, hooks=None):
    return data


# ------------------------------------------------------------------------------------------------------------
# The interpreter
# ------------------------------------------------------------------------------------------------------------

NUMBERS_AND_TEXTS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}


def find(module, name, names):
    """What a global stands for."""
    if type(module) is not str or type(name) is not str:
        raise InputError("it names a global by what is no text")
    if f"{module}.{name}" not in names:
        what = shown(f"{module}.{name}")
        raise InputError(f"it names {what}, which no EDM network needs; nothing was executed")
    return names[f"{module}.{name}"]


def add_items(target, items):
    """Put items into a list, a set, or (key, value, key, ...) a dict. Only texts are keys: the hash of a
    deeply nested tuple overflows the stack, and whole numbers can be chosen to have all the same hash."""
    keys = {list: [], set: items, dict: items[::2]}.get(type(target))
    if keys is None or any(type(key) is not str for key in keys):
        raise InputError(f"it puts into a {type(target).__name__} what no EDM network does")
    if type(target) is list:
        target.extend(items)
    elif type(target) is set:
        target.update(items)
    else:
        target.update(zip(keys, items[1::2], strict=True))


def set_state(target, state):
    """What BUILD may set: the state of a module, once; and of a dtype, what it has anyway."""
    if type(target) is Module and target.state is None:
        target.state = Module(target.class_name, state).state
    elif type(target) is not Dtype or state[1] not in ("<", "|", "=") or state[2:5] != (None, None, None):
        raise InputError(f"it sets the state of a {type(target).__name__} to what no EDM network has")


class Unpickler:
    """Reads pickles: load. The operations of all that one Unpickler reads count together."""

    def __init__(self):
        self.operations, self.storages = 0, {}  # {id of the bytes: Storage}: each is read only once
        self.functions = {
            "torch_utils.persistence._reconstruct_persistent_obj": persistent_object,
            "torch.nn.modules.container.ModuleDict": module_dict, "collections.OrderedDict": ordered_dict,
            "torch._utils._rebuild_parameter": parameter, "torch._utils._rebuild_tensor_v2": tensor,
            "torch.storage._load_from_bytes": self.storage, "numpy.dtype": dtype,
            "numpy.core.multiarray.scalar": scalar, "numpy._core.multiarray.scalar": scalar,
        }

    def storage(self, content):
        """The Storage that torch.save wrote in its legacy format: five small pickles, then the numbers."""
        if type(content) is not bytes:
            raise InputError("a tensor in it has no bytes")
        if id(content) in self.storages:
            return self.storages[id(content)]
        file = Bounded(io.BytesIO(content), len(content))
        magic, version, machine, stored, keys = (self.load(file, STORAGES) for _ in range(5))
        word, kind, key, _, numbers, view = stored  # _ is the device
        right = (magic, version) == LEGACY_FORMAT and machine["little_endian"] is True and word == "storage"
        right = right and type(kind) is torch.dtype and type(key) is str and keys == [key] and view is None
        if not right:
            raise InputError("a tensor in it is not in the format of EDM's files")
        written = int.from_bytes(file.read(8), "little")
        if type(numbers) is not int or written != numbers or numbers * kind.itemsize != file.left:
            raise InputError(f"a tensor in it claims {written} numbers of {kind} and has {file.left} bytes")
        self.storages[id(content)] = Storage(kind, content, len(content) - file.left, numbers)
        return self.storages[id(content)]

    def load(self, file, names):
        """The value of the next pickle in a Bounded file; names: what its globals stand for."""
        stack, outer, memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(file):
            self.operations += 1
            if self.operations > OPERATIONS:
                raise InputError(f"it has more than {OPERATIONS} operations, more than any EDM network")
            name = opcode.name
            if name in NUMBERS_AND_TEXTS:
                stack.append(argument)
            elif name in CONSTANTS:
                stack.append(CONSTANTS[name])
            elif name in EMPTY:
                stack.append(EMPTY[name]())
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "MARK":
                outer.append(stack)
                stack = []
            elif name == "TUPLE":
                items, stack = tuple(stack), outer.pop()
                stack.append(items)
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                start = len(stack) - int(name[-1])
                stack[start:] = [tuple(stack[start:])]
            elif name in ("APPENDS", "ADDITEMS", "SETITEMS"):
                items, stack = stack, outer.pop()
                add_items(stack[-1], items)
            elif name == "APPEND":
                item = stack.pop()
                add_items(stack[-1], [item])
            elif name == "SETITEM":
                value, key = stack.pop(), stack.pop()
                add_items(stack[-1], [key, value])
            elif name == "GLOBAL":
                stack.append(find(*argument.split(" "), names))
            elif name == "STACK_GLOBAL":
                word, module = stack.pop(), stack.pop()
                stack.append(find(module, word, names))
            elif name in ("REDUCE", "NEWOBJ"):
                arguments, function = stack.pop(), stack.pop()
                if type(arguments) is not tuple:
                    raise InputError("it calls a function without a tuple of arguments")
                stack.append(function(*arguments))  # only find puts anything on the stack that can be called
            elif name == "BUILD":
                state = stack.pop()
                set_state(stack[-1], state)
            elif name == "STOP":
                if len(stack) != 1 or outer:
                    raise InputError("it ends before its values do")
                return stack[0]
            elif name == "BINPERSID" and names is STORAGES:
                continue  # what it says of the storage stays on the stack
            elif name not in ("PROTO", "FRAME"):
                raise InputError(f"it uses the pickle opcode {name}, which no EDM network needs")


def read_pickle(path):
    """The value of a published pickle. Raises InputError, or whatever a damaged file makes fail."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST:
            raise InputError(f"it has {size} bytes, published EDM networks at most {LARGEST}")
        unpickler, file = Unpickler(), Bounded(file, size)
        content = unpickler.load(file, unpickler.functions)
        if file.left:
            raise InputError(f"{file.left} bytes follow its end")
        return content
