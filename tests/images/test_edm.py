"""Files that are not trusted: published pickles, and network files of ours, made to do harm."""

import contextlib
import io
import json
import math
import os
import pickle
import pickletools
import random
import resource
import struct
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_cifar import edm_pickle, small_net  # noqa: F401 (a fixture)
from torch import nn

import fgm
from images.unet import load_edm, load_network

MUTATIONS = int(os.environ.get("FGM_MUTATIONS", 100))  # by hand: 2000


def attributes():
    """All that a pickle could have set: the attributes of what the files name."""
    named = [torch._utils._rebuild_tensor_v2, torch._utils._rebuild_parameter, torch.storage._load_from_bytes]
    named += [torch.FloatStorage, np.dtype, np.float64, OrderedDict, nn.ModuleDict]
    return [{name: id(value) for name, value in vars(thing).items()} for thing in named]


@contextlib.contextmanager
def limits_of_memory():
    """1 GB beyond what the process has; torch and numpy stay as they are."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    before, old = attributes(), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + 10**9, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)
    assert attributes() == before


def refusal(load, path):
    """The one line with which a file is refused. A value that were followed without end would not return."""
    with limits_of_memory(), pytest.raises(fgm.InputError) as refused:
        load(path)
    message = str(refused.value)
    assert message.isprintable() and len(message) < 700 and "MemoryError" not in message
    return message


# ------------------------------------------------------------------------------------------------------------
# Hostile pickles
# ------------------------------------------------------------------------------------------------------------


TENSOR, LOADER = "torch._utils._rebuild_tensor_v2", "torch.storage._load_from_bytes"
DICT = "torch.nn.modules.container.ModuleDict"


def plain(value):
    """Opcodes of a value of Python's own; texts in it are memoized from 0 on."""
    return pickle.dumps(value, 3)[2:-1]


def call(function, *arguments):
    """Opcodes of a call; arguments: opcodes, or plain values."""
    module, _, name = function.rpartition(".")
    parts = [value if type(value) is Code else plain(value) for value in arguments]
    return Code(f"c{module}\n{name}\n(".encode() + b"".join(parts) + b"tR")


def memoized(code, index):
    return Code(code + b"q" + bytes([index]))


class Code(bytes):
    """Opcodes that leave one value on the stack."""

    def __add__(self, other):
        return Code(bytes(self) + bytes(other))


def named(function):
    return Code("c{}\n{}\n".format(*function.rsplit(".", 1)).encode())


def mapping(**values):
    return Code(b"}" + b"".join(plain(name) + value + b"s" for name, value in values.items()))


def stored(kind="FloatStorage", numbers=4, claimed=None, view=None, key=b"X\x01\x00\x00\x000", keys=None):
    """torch.save's legacy format, by hand."""
    claimed = numbers if claimed is None else claimed
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    parts = plain("storage"), named(f"torch.{kind}"), key, plain("cpu"), plain(claimed), plain(view)
    whole = b"".join([*head, b"\x80\x02(", *parts, b"tQ.\x80\x02", keys or b"]" + key + b"a", b"."])
    return whole + struct.pack("<q", claimed) + bytes(4 * numbers)


def storage(**changes):
    return call(LOADER, stored(**changes))


def tensor(offset=0, size=(2, 2), stride=(2, 1), **changes):
    return call("torch._utils._rebuild_tensor_v2", storage(**changes), offset, size, stride, False, mapping())


def newer_format():
    file = io.BytesIO()
    torch.save(torch.ones(4), file)
    return file.getvalue()


def module(parameters=b"}", modules=b"}", name="SongUNet", **values):
    state = mapping(_parameters=parameters, _buffers=b"}", _modules=modules, **values)
    meta = mapping(class_name=plain(name), state=state)
    return call(PERSISTENT, meta)


def network(inner):
    """A file with inner as the network."""
    return mapping(ema=module(modules=mapping(model=inner), name="EDMPrecond"))


DTYPE = call("numpy.dtype", "f8", False, True)
OBJECT_FIELD = (3, "|", None, ("a",), {"a": 0}, 8, 1, 0)
ENDLESS = Code(b")" + b"q\x01h\x01\x86" * 60)  # a tuple of itself twice, 60 times
DEEP = Code(b")" + b"\x85" * 150_000)
PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
GOOD = "KeyError: 'ema'"  # harmless, so that the file is refused for having no network
HOSTILE = {
    "system": (call("posix.system", "true"), "posix.system"),
    "eval": (call("builtins.eval", "1"), "builtins.eval"),
    "getattr": (call("builtins.getattr", "a", "upper"), "builtins.getattr"),
    "torch.load": (call("torch.load", "/etc/passwd"), "torch.load"),
    "numpy's constructor": (named("numpy._core.multiarray._reconstruct"), "_reconstruct"),
    "attack in a tensor": (call(LOADER, b"cposix\nsystem\n."), "poses as a tensor"),
    "void dtype": (call("numpy.dtype", "V8", False, True), "dtype 'V8'"),
    "object dtype": (call("numpy.dtype", "O8", False, True), "dtype 'O8'"),
    "dtype that claims an object field": (DTYPE + plain(OBJECT_FIELD) + b"b", GOOD),
    "big-endian dtype": (DTYPE + plain((3, ">", None, None, None, -1, -1, 0)) + b"b", "Float64DType"),
    "scalar of no dtype": (call("numpy.core.multiarray.scalar", "f8", bytes(8)), GOOD),
    "short scalar": (call("numpy.core.multiarray.scalar", DTYPE, bytes(7)), "buffer size must be a multiple"),
    "attribute of torch's function": (named(TENSOR) + mapping(a=b"N") + b"b", "the state of a function"),
    "attribute of OrderedDict": (named("collections.OrderedDict") + mapping(a=b"N") + b"b", "a function"),
    "attribute of an OrderedDict": (call("collections.OrderedDict") + mapping(a=b"N") + b"b", "of a dict"),
    "attribute of ModuleDict": (named(DICT) + mapping() + b"b", "the state of a function"),
    "attribute of numpy.dtype": (named("numpy.dtype") + mapping(a=b"N") + b"b", "the state of a function"),
    "attribute of the loader": (named(LOADER) + mapping(a=b"N") + b"b", "the state of a function"),
    "item of a function": (named(TENSOR) + plain("a") + b"Ns", "does not support item assignment"),
    "item of a module": (module() + plain("a") + b"Ns", "does not support item assignment"),
    "class name with escapes": (module(name="\x1b[2J\nx"), "no name"),
    "global that is no text": (Code(b")K\x01\x93"), "requires str"),
    "deep global": (DEEP + plain("a") + b"\x93", "requires str"),
    "call without a tuple": (named("numpy.dtype") + plain("f8") + b"R", "dtype 'f'"),
    "bytes as arguments": (named(TENSOR) + plain(bytes(100)) + b"R", "TypeError"),
    "tensor as arguments": (named(TENSOR) + tensor() + b"R", "TypeError"),
    "call of a number": (Code(b"K\x01)R"), "not callable"),
    "huge memo index": (Code(b"Nr\xff\xff\xff\x7f"), GOOD),
    "missing memo index": (Code(b"j\xff\xff\xff\x7f"), "Memo value not found"),
    "huge frame": (Code(b"\x95" + struct.pack("<Q", 2**62) + b"N"), GOOD),
    "bytes beyond the end": (Code(b"\x8e" + struct.pack("<Q", 2**33)), "EOFError"),
    "more bytes than memory": (Code(b"\x8e" + struct.pack("<Q", 2**62)), "EOFError"),
    "text beyond the end": (Code(b"\x8d" + struct.pack("<Q", 2**33)), "EOFError"),
    "bytearray": (Code(b"\x96" + struct.pack("<Q", 1) + b"x"), GOOD),
    "call by INST": (Code(b"(iposix\nsystem\n"), "posix.system"),
    "call by OBJ": (Code(b"(cposix\nsystem\no"), "posix.system"),
    "keyword arguments": (named("numpy.dtype") + b")}\x92", "TypeError"),
    "extension": (Code(b"\x82\x01"), "unregistered extension"),
    "persistent object": (Code(b"NQ"), "unsupported persistent id"),
    "out-of-band buffer": (Code(b"\x97"), "out-of-band"),
    "doubling": (Code(b"N2"), "EDM network"),
    "endless value": (ENDLESS, GOOD),
    "endless dtype": (call("numpy.dtype", ENDLESS), "dtype a tuple"),
    "endless global": (ENDLESS + plain("a") + b"\x93", "requires str"),
    "endless class name": (call(PERSISTENT, mapping(class_name=ENDLESS, state=b"}")), "no name"),
    "empty stack": (Code(b"0" * 3), "IndexError"),
    "tuple without a mark": (Code(b"t"), "IndexError"),
    "deep tuple": (DEEP, GOOD),
    "deep list": (Code(b"]" * 100_000 + b"a" * 99_999), GOOD),
    "deep marks": (Code(b"(" * 150_000), "IndexError"),
    "list in itself": (Code(b"]\x94h\x00a"), GOOD),
    "negative size": (tensor(size=(2, -2)), "has gaps"),
    "negative stride": (tensor(stride=(2, -1)), "has gaps"),
    "negative offset": (tensor(offset=-1), "invalid storage offset"),
    "size of no number": (tensor(size=(2, 2.0)), "TypeError"),
    "size of bools": (tensor(size=(True, 2)), "TypeError"),
    "many dimensions": (tensor(size=(1,) * 65, stride=(1,) * 65), GOOD),
    "size without stride": (tensor(stride=()), "shorter"),
    "size in a list": (tensor(size=[2, 2]), GOOD),
    "tensor without storage": (call(TENSOR, None, 0, (1,), (1,)), "AttributeError"),
    "huge size": (tensor(size=(2**62, 2**62), stride=(2**62, 1)), "overflowed"),
    "huge stride": (tensor(stride=(2**62, 1)), "has gaps"),
    "one number as many": (tensor(size=(2**20, 2**20), stride=(0, 0)), "has gaps"),
    "offset outside": (tensor(offset=1), "out of bounds"),
    "huge offset": (tensor(offset=2**2000), "Overflow"),
    "storage of more than it has": (storage(claimed=2**40), "allocate memory"),
    "storage of less than it has": (storage(claimed=3), GOOD),
    "storage of a negative number": (storage(numbers=0, claimed=-1), "RuntimeError"),
    "storage as a view": (storage(view=("0", 0, 4)), GOOD),
    "storage of another type": (storage(kind="QInt8Storage"), "NotImplementedError"),
    "storage in a text": (call(LOADER, "text"), "bytes-like object"),
    "storage of no bytes": (call(LOADER, b""), "EOFError"),
    "storage in torch's newer format": (call(LOADER, newer_format()), GOOD),
    "harmless tensor": (tensor(), GOOD),
    "harmless scalar": (call("numpy.core.multiarray.scalar", DTYPE, bytes(8)), GOOD),
}


@pytest.mark.parametrize("code, message", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_pickles_are_refused(code, message, tmp_path):
    path = tmp_path / "hostile.pkl"
    path.write_bytes(b"\x80\x04" + mapping(hidden=code) + b".")
    assert message in refusal(load_edm, path)


ITSELF = memoized(call(DICT), 1) + mapping(
    _parameters=b"}", _buffers=b"}", _modules=mapping(a=b"h\x01", b=b"h\x01")
) + b"b"
TREE = module()
for level in range(1, 41):  # plain memoizes as 0
    TREE = module(modules=mapping(a=memoized(TREE, level), b=bytes([104, level])))
WIDE = memoized(mapping(**{f"{i:x}": b"N" for i in range(5_000)}, x=b"h\x01", y=b"h\x01"), 2)
WIDENING = memoized(call(DICT), 1) + mapping(
    _parameters=b"}", _buffers=b"}", _modules=WIDE
) + b"b"
LAYERS = mapping(**{"map_layer0.weight": tensor(), "enc.8x8_block0.conv1.weight": tensor()})
SIZES = dict(img_resolution=ENDLESS, img_channels=plain(1), label_dim=plain(0), sigma_data=plain(0.5))
EDM_OF_ENDLESS = mapping(ema=module(modules=mapping(model=module(LAYERS)), name="EDMPrecond", **SIZES))
STRUCTURES = {
    "no dict": (plain([1]), "damaged"),
    "no network": (mapping(), "damaged"),
    "two values": (Code(b"NN"), "not subscriptable"),
    "open mark": (Code(b"(N"), "not subscriptable"),
    "a number as network": (network(plain(3)), "damaged"),
    "module without a state": (network(call(DICT)), "damaged"),
    "parameter that is none": (network(module(mapping(a=plain(3)))), "no tensor"),
    "parameters in a list": (network(module(b"]")), "damaged"),
    "child that is none": (network(module(modules=mapping(a=plain(3)))), "damaged"),
    "module in itself": (network(module(modules=mapping(a=ITSELF))), "has two places"),
    "module in itself beside many": (network(module(modules=mapping(a=WIDENING))), "has two places"),
    "modules on 2^40 paths": (network(TREE), "has two places"),
    "name with escapes": (network(module(mapping(**{"\x1b[2J": tensor()}))), "damaged"),
    "endless attribute": (network(module(skip_scale=ENDLESS)), "skip_scale = a tuple"),
    "endless resolution": (EDM_OF_ENDLESS, "its img_resolution is a tuple"),
    "another class": (network(module(name="Generator")), "EDMPrecond(Generator)"),
}


@pytest.mark.parametrize("code, message", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_hostile_structures_are_refused(code, message, tmp_path):
    path = tmp_path / "hostile.pkl"
    path.write_bytes(b"\x80\x04" + code + b".")
    assert message in refusal(load_edm, path)


# ------------------------------------------------------------------------------------------------------------
# Published networks of other kinds
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner, outer, message", [
    ("SongUNet", "VPPrecond", "VPPrecond"),
    ("SongUNet", "VEPrecond", "VEPrecond"),
    ("DhariwalUNet", "iDDPMPrecond", "DhariwalUNet, iDDPMPrecond"),
    ("DhariwalUNet", "EDMPrecond", "DhariwalUNet"),
])
def test_other_classes_are_named(inner, outer, message, edm_pickle):  # noqa: F811
    assert message in refusal(load_edm, edm_pickle(small_net(), inner, outer))


@pytest.mark.parametrize("taps", [[1, 2], [1, 3, 3, 1], [1, 2, 1]])
def test_other_resampling_filters_are_refused(taps, edm_pickle):  # noqa: F811
    net, taps = small_net(), torch.tensor(taps, dtype=torch.float32)
    for layer in net.modules():
        if "resample_filter" in dict(layer.named_buffers(recurse=False)):
            layer.resample_filter = taps.outer(taps)[None, None] / taps.sum() ** 2
    assert "its resampling filter is not supported; supported is [1, 1]" in refusal(load_edm, edm_pickle(net))


class FourierEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("freqs", torch.ones(8))


def test_layers_of_ncsnpp_are_named(edm_pickle):  # noqa: F811
    net = small_net()
    net.map_noise, net.enc["4x4_aux_residual"] = FourierEmbedding(), nn.Conv2d(1, 16, 3)
    message = refusal(load_edm, edm_pickle(net))
    assert "skip or residual connections of NCSN++ between resolutions, the Fourier embedding of" in message


@pytest.mark.parametrize("name, value, right", [
    ("num_heads", 4, False), ("num_heads", 1, True), ("skip_scale", 1.0, False),
    ("skip_scale", 0.5**0.5, True), ("eps", 1e-5, False), ("adaptive_scale", True, False),
    ("endpoint", False, False), ("max_positions", 100, False),
])
def test_layers_that_compute_otherwise_are_refused(name, value, right, edm_pickle):  # noqa: F811
    net = small_net()
    for block in [*net.enc.values(), *net.dec.values()]:
        block.dropout = value
    path = edm_pickle(net)
    text = b"\x8c" + bytes([len(name)]) + name.encode()  # in the file, what was dropout has this name
    path.write_bytes(pickletools.optimize(path.read_bytes().replace(b"\x8c\x07dropout", text)))  # new frames
    if right:
        load_edm(path)
    else:
        assert f"{name} = {value}, which is not supported" in refusal(load_edm, path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_and_layouts_are_read(dtype, edm_pickle):  # noqa: F811
    net = small_net().to(dtype).to(memory_format=torch.channels_last)
    loaded = load_edm(edm_pickle(net)).net.state_dict()
    assert all(torch.equal(loaded[name], value.float()) for name, value in net.state_dict().items())


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_weights_that_are_not_finite_are_refused(value, edm_pickle, tmp_path):  # noqa: F811
    net = small_net().double()
    net.map_layer1.weight.data[3, 4] = value
    assert "map_layer1.weight in it holds NaN or infinite" in refusal(load_edm, edm_pickle(net))
    path = network_file(tmp_path / "file.safetensors", tensors=net.state_dict())
    assert "map_layer1.weight in it holds NaN or infinite" in refusal(load_network, path)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -0.5, 1e30])
def test_values_of_the_preconditioner_are_checked(value, edm_pickle):  # noqa: F811
    path = edm_pickle(small_net())
    before, name, after = path.read_bytes().partition(b"sigma_data")
    after = after.replace(struct.pack("<d", 0.5), struct.pack("<d", value), 1)
    path.write_bytes(before + name + after)
    assert "edm_sigma_data must be in (0, 1e3)" in refusal(load_edm, path)


@pytest.mark.parametrize("old, new, message", [
    ("use_fp16", "sigma_data", "its edm_sigma_data is False"),
    ("use_fp16", "label_dim", "its label_dim is False"),
    ("sigma_max", "img_resolution", "its img_resolution is inf"),
])
def test_types_of_the_preconditioner_are_checked(old, new, message, edm_pickle):  # noqa: F811
    path = edm_pickle(small_net())
    content = path.read_bytes()
    for name, other in ((new, "x"), (old, new)):
        name, other = (bytes([len(text)]) + text.encode() for text in (name, other))
        content = content.replace(name, other, 1)
    path.write_bytes(pickletools.optimize(content))
    assert message in refusal(load_edm, path)


# ------------------------------------------------------------------------------------------------------------
# Network files
# ------------------------------------------------------------------------------------------------------------

NETWORK = dict(
    img_resolution=8, in_channels=1, out_channels=1, label_dim=0, model_channels=16, channel_mult=[1, 2],
    num_blocks=1, attn_resolutions=[4], dropout=0.0,
)


GENERATOR = dict(t_star=0.9, c_in=1.0, c_skip=0, c_out=0.9)


def network_file(path, tensors=None, about=None, generator=..., **changes):
    """A network file of ours, with changes to the description of the network; ... leaves an entry out."""
    network = {name: value for name, value in (NETWORK | changes).items() if value is not ...}
    if about is None:
        about = {"network": network, "data": "digits", "classes": []}
    if generator is not ...:
        about["generator"] = generator
    save_file(tensors or small_net().state_dict(), path, {"about": json.dumps(about)})
    return path


def with_tensors(**changes):
    return dict(tensors=small_net().state_dict() | changes)


DESCRIPTIONS = [
    dict(about=[1]), dict(about={}), dict(about={"network": []}), dict(about={"network": None}),
    dict(colour=3), dict(about={"network": NETWORK, "generator": {}}), dict(img_resolution=...),
    dict(label_dim=...), dict(img_resolution="8"), dict(img_resolution=8.0), dict(img_resolution=2**40),
    dict(img_resolution=9), dict(img_resolution=16), dict(img_resolution=0), dict(label_dim=None),
    dict(label_dim=10**12), dict(label_dim=10**6), dict(label_dim=-1), dict(augment_dim=10**6),
    dict(in_channels=True), dict(in_channels=10**9, out_channels=10**9), dict(out_channels=2),
    dict(in_channels=4096, out_channels=4096), dict(num_blocks=[1]),
    dict(num_blocks=10**7), dict(num_blocks=100),
    dict(num_blocks=2), dict(num_blocks=0), dict(num_blocks=-1), dict(channel_mult=2),
    dict(channel_mult=[1, "2"]), dict(channel_mult=[1, math.nan]),
    dict(channel_mult=[1, [2]]), dict(channel_mult=[1] * 10**5), dict(channel_mult=[1, 10**9]),
    dict(channel_mult=[]), dict(channel_mult={}), dict(attn_resolutions="4"), dict(attn_resolutions=[None]),
    dict(attn_resolutions=[8]), dict(model_channels=math.nan), dict(model_channels=math.inf),
    dict(model_channels=10**9), dict(model_channels=10**5), dict(model_channels=10**4000),
    dict(model_channels=17), dict(model_channels=2), dict(channel_mult_emb=10**6), dict(channel_mult_emb=100),
    dict(dropout=math.nan), dict(dropout=1), dict(dropout="0"), dict(dropout=None),
    dict(edm_sigma_data=math.nan), dict(edm_sigma_data="0.5"), dict(edm_sigma_data=0),
    dict(edm_sigma_data=None), dict(edm_sigma_data=0.5),
    dict(generator="0.9"), dict(generator=None), dict(generator={}), dict(generator={"c_in": 1.0}),
    *(dict(generator={"t_star": value}) for value in ("0.9", None, math.nan, -1, 2, True, [0.9], 10**4000)),
    *(dict(generator={"t_star": 0.9, "c_out": value}) for value in ("0.9", None, math.nan, math.inf, -1)),
    dict(generator={"t_star": 0.9, "net": 1.0}),
    *(dict(about={"network": NETWORK, "classes": names}) for names in ("abc", None, {}, [1], [["a"]])),
    dict(about={"network": NETWORK, "classes": ["a"], "class_counts": [1]}),
    with_tensors(x=torch.ones(1)), dict(tensors={"x": torch.ones(1)}),
    with_tensors(**{"enc.4x4_down.conv0.resample_filter": torch.ones(1, 1, 2, 2)}),
    with_tensors(**{"map_layer1.bias": torch.zeros(64, dtype=torch.int32)}),
]


@pytest.mark.parametrize("changes", DESCRIPTIONS, ids=lambda changes: str(changes)[:60])
def test_hostile_network_files_are_refused(changes, tmp_path):
    refusal(load_network, network_file(tmp_path / "hostile.safetensors", **changes))


def test_network_files_without_a_description_are_refused(tmp_path):
    for metadata in (None, {}, {"about": ""}, {"about": "[" * 10**5}, {"about": "9" * 10**5}):
        path = tmp_path / "hostile.safetensors"
        save_file(small_net().state_dict(), path, metadata)
        assert "no network file of cifar.py" in refusal(load_network, path)


def test_good_network_files_are_read(tmp_path):
    for changes in ({}, dict(generator=GENERATOR), dict(dropout=0)):
        net, description = load_network(network_file(tmp_path / "good.safetensors", **changes))
        assert not net.training and description["network"].items() >= (NETWORK | {"dropout": 0}).items()
        assert_same(net, small_net())


@pytest.mark.parametrize("load", [load_edm, load_network])
def test_what_is_no_file_is_refused(load, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, "/dev/zero", "/dev/stdin", tmp_path / "missing"):
        assert "cannot read" in refusal(load, path)
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**40)
    if load is load_edm:  # safetensors maps the file, which allocates nothing
        assert "1099511627776 bytes" in refusal(load, tmp_path / "sparse")


# ------------------------------------------------------------------------------------------------------------
# Mutations
# ------------------------------------------------------------------------------------------------------------


def assert_same(net, original, but=None):
    state, expected = net.state_dict(), original.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state if name != but)


def mutated(content, place, generator):
    """content with a fault at place: a byte or bit changed, bytes left out, repeated, put in, or cut."""
    whole, length = bytearray(content), generator.choice([1, 2, 4, 8, 100])
    kind = generator.choice(["byte", "bit", "leave out", "repeat", "put in", "cut"])
    if kind == "byte":
        whole[place] = generator.randrange(256)
    elif kind == "bit":
        whole[place] ^= 1 << generator.randrange(8)
    elif kind == "leave out":
        del whole[place:place + length]
    elif kind == "repeat":
        whole[place:place] = whole[place:place + length]
    elif kind == "put in":
        whole[place:place] = generator.randbytes(length)
    else:
        del whole[place:]
    return bytes(whole)


def fuzz(load, path, original):
    """Each mutation is refused, or read with all weights of the original. Only the tensor among whose numbers
    the fault lies may have others. Nine faults of ten lie outside of the numbers."""
    content, generator, owners = path.read_bytes(), random.Random(0), {}
    for name, value in original.state_dict().items():
        numbers = value.numpy().tobytes()
        start = content.index(numbers)
        owners |= dict.fromkeys(range(start, start + len(numbers)), name)
    structure = [place for place in range(len(content)) if place not in owners]
    assert_same(load(path), original)
    for _ in range(MUTATIONS):
        anywhere = generator.random() < 0.1
        place = generator.randrange(len(content)) if anywhere else generator.choice(structure)
        path.write_bytes(mutated(content, place, generator))
        try:
            net = load(path)
        except fgm.InputError as refused:
            assert str(refused).isprintable()
        else:
            assert_same(net, original, but=owners.get(place))


def test_mutated_pickles(edm_pickle):  # noqa: F811
    net = small_net(label_dim=3)
    with limits_of_memory():
        fuzz(lambda path: load_edm(path).net, edm_pickle(net), net)


def test_mutated_network_files(tmp_path):
    net = small_net(label_dim=3)
    about = {"network": NETWORK | {"label_dim": 3}, "classes": list("abc"), "class_counts": [1, 2, 3]}
    path = network_file(tmp_path / "file.safetensors", net.state_dict(), about, GENERATOR)
    with limits_of_memory():
        fuzz(lambda path: load_network(path)[0], path, net)
