"""Networks in files: EDM's published pickles as flow teachers, and the network files of cifar.py.

No file is trusted. A pickle is a program; here its names stand for the few functions below and for nothing
else, so that nothing from the file is executed. A file made to do harm can still waste time and memory.
"""

import io
import json
import math
import pickle
from pathlib import Path

import numpy as np
import torch

from fgm import InputError, OneStepGenerator
from images.unet import build
from training.files import refusals

# ---- A network from a description and weights --------------------------------------------------------------


def build_with_weights(network, shapes, read):
    """build(network) in evaluation mode, with a file's weights.

    shapes: {name: shape} of the tensors in the file; read(name) gives one. Raises an error, before it
    allocates anything, unless the description makes a network that the weights fit."""
    with torch.device("meta"):  # nothing is allocated there; torch compares names and shapes
        build(network).load_state_dict({name: torch.empty(shape) for name, shape in shapes.items()})

    net = build(network)
    for name, value in net.state_dict().items():
        value.copy_(read(name))
        if not value.isfinite().all():
            raise InputError(f"{name} in it holds numbers that are not finite")
    return net.eval()


# ---- Reading a published pickle ----------------------------------------------------------------------------


class Module:
    """An instance of a class that the pickle brings along: its name and its state, and none of its code."""

    def __init__(self, class_name, state=None):
        self.class_name, self.state = class_name, state

    def modules(self, prefix=""):
        """Yields (prefix of its tensors' names, module) for this module and those inside."""
        yield prefix, self
        for name, child in self.state["_modules"].items():
            if child is not None:
                yield from child.modules(f"{prefix}{name}.")

    def tensors(self):
        """{name: tensor} of the parameters and buffers of this module and those inside."""
        tensors = {}
        for prefix, module in self.modules():
            own = module.state["_parameters"] | module.state["_buffers"]
            tensors |= {prefix + name: value for name, value in own.items() if value is not None}
        return tensors


def persistent_module(meta):
    """meta["module_src"] is the source text that is not executed."""
    return Module(meta["class_name"], meta["state"])


def storage(content):
    """The numbers [N] of a storage that torch.save wrote."""
    stored = torch.load(io.BytesIO(content), "cpu", weights_only=True)
    return torch.empty(0, dtype=stored.dtype).set_(stored)


def tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    """A view of a storage; torch checks that it lies within."""
    return storage.as_strided(size, stride, offset)


def number_type(name, align=False, copy=True):
    """A numpy dtype of the numbers that EDM's files hold."""
    if name not in ("f4", "f8", "i4", "i8"):
        raise InputError("it holds numbers of a type that no EDM network has")
    return np.dtype(f"<{name}")


def scalar(dtype, content):
    """A numpy scalar as a Python number."""
    return np.frombuffer(content, dtype, count=1).item()


ALLOWED = {
    "torch_utils.persistence._reconstruct_persistent_obj": persistent_module,
    "torch.nn.modules.container.ModuleDict": lambda: Module("ModuleDict"),
    "collections.OrderedDict": dict,
    "torch.storage._load_from_bytes": storage,
    "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
    "torch._utils._rebuild_tensor_v2": tensor,
    "numpy.dtype": number_type,
    "numpy.core.multiarray.scalar": scalar,
    "numpy._core.multiarray.scalar": scalar,
}


class Unpickler(pickle._Unpickler):
    """Python's own machine for pickles, because the one in C would set the state of any object."""

    def find_class(self, module, name):
        if f"{module}.{name}" not in ALLOWED:
            raise InputError(f"it names {module}.{name}, which no EDM network needs; nothing was executed")
        return ALLOWED[f"{module}.{name}"]

    def load_build(self):
        """Sets the state of a module. A dtype's says only that its bytes are in the usual order."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Module):
            target.state = state
        elif not isinstance(target, np.dtype) or state[1] == ">":
            raise InputError(f"it sets the state of a {type(target).__name__}, as no EDM network does")

    dispatch = pickle._Unpickler.dispatch | {
        pickle.BUILD[0]: load_build,
        pickle.NEWOBJ[0]: pickle._Unpickler.load_reduce,  # a call, whether of a class or of a function
    }


# ---- Published EDM networks as flow teachers ---------------------------------------------------------------

FIXED = {  # attributes of layers that change the velocity but no weight's shape, and what EDMUNet does
    "num_heads": (0, 1), "skip_scale": (math.sqrt(0.5),), "eps": (1e-6,), "adaptive_scale": (False,),
    "max_positions": (10000,), "endpoint": (True,),
}


def load_edm(path):
    """The velocity network (EDMVelocity) of a published EDM pickle {"ema": EDMPrecond}, an EDMUNet inside.

    Float32, on the CPU, in evaluation mode. Raises InputError for a file that is missing or damaged, that
    names anything beyond ALLOWED, or that holds another network (NCSN++ and ADM have other layers)."""
    with refusals(path, "EDM network"):
        outer = Unpickler(io.BytesIO(Path(path).read_bytes())).load()["ema"]
        inner = outer.state["_modules"]["model"]
        check_variant(outer, inner)
        weights = {f"net.{name}": tensor for name, tensor in inner.tensors().items()}  # names in EDMVelocity
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        return build_with_weights(edm_description(shapes, outer.state), shapes, weights.get)


def check_variant(outer, inner):
    """Raises InputError for other preconditioners and networks, and names what EDMUNet does not do."""
    differences = sorted({outer.class_name, inner.class_name} - {"EDMPrecond", "SongUNet"})
    for prefix, module in inner.modules():
        if module.class_name == "FourierEmbedding":
            differences.append("the Fourier embedding of NCSN++")
        if "aux_" in prefix and "aux_norm" not in prefix and "aux_conv" not in prefix:
            differences.append("skip or residual connections of NCSN++ between resolutions")
        for name, values in FIXED.items():
            if module.state.get(name, values[0]) not in values:
                differences.append(f"{name} other than {values[-1]:g}")
    if differences:
        raise InputError(f"it has {', '.join(dict.fromkeys(differences))}, which is not supported; "
                         "EDMPrecond(SongUNet) as DDPM++ (VP) is")


def edm_description(shapes, outer):
    """The description of a DDPM++ network, from {name: shape} and the preconditioner's values."""
    embedding, model_channels = shapes["net.map_layer0.weight"]
    convs = [name for name in shapes if name.startswith("net.enc.") and name.endswith("conv1.weight")]
    blocks = [name.split(".")[2] for name in convs if "_block" in name]  # "16x16_block0"
    sizes = sorted({int(block.split("x")[0]) for block in blocks}, reverse=True)
    first = {size: f"net.enc.{size}x{size}_block0" for size in sizes}

    return dict(
        img_resolution=outer["img_resolution"],
        in_channels=outer["img_channels"],
        out_channels=outer["img_channels"],
        label_dim=outer["label_dim"],
        augment_dim=shapes.get("net.map_augment.weight", (0, 0))[1],
        model_channels=model_channels,
        channel_mult=[shapes[f"{first[size]}.conv1.weight"][0] // model_channels for size in sizes],
        channel_mult_emb=embedding // model_channels,
        num_blocks=len(blocks) // len(sizes),
        attn_resolutions=[size for size in sizes if f"{first[size]}.qkv.weight" in shapes],
        dropout=0.0,
        edm_sigma_data=outer["sigma_data"],
    )


# ---- Network files: weights, and in the safetensors header, under "about", all that is needed to use them --


def image_shape(network):
    """The shape [C, R, R] of the images of a network, from its description."""
    return network["in_channels"], network["img_resolution"], network["img_resolution"]


def load_network(path):
    """A network file of cifar.py: the net in evaluation mode, and what the file says of it, a dict with
    "network" (its description), "data", "images" (their fingerprint), "classes", "class_counts" and, of a
    generator, "generator" (the coefficients of OneStepGenerator). Raises InputError if it is missing, damaged
    or foreign."""
    from safetensors import safe_open

    with refusals(path, "network file of cifar.py"), safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        net = build_with_weights(about["network"], shapes, file.get_tensor)

        label_dim = about["network"]["label_dim"]
        counts = about.setdefault("class_counts", [1] * label_dim)  # older files: all classes alike
        if len(counts) != label_dim or not all(type(count) is int and count > 0 for count in counts):
            raise InputError("its class_counts are not positive integers, one for each class")
        names = about.get("classes")
        if not isinstance(names, list) or label_dim not in (0, len(names)):
            raise InputError("its classes are not a name for each class")
        if "generator" in about:
            coefficients = OneStepGenerator(net, **about["generator"]).coefficients()
            if not all(math.isfinite(value) for value in coefficients.values()):
                raise InputError("its generator has coefficients that are not finite")
    return net, about


def load_teacher(path, images, cond, hold_out=False):
    """A teacher and its description, from a network file or an EDM pickle.

    Raises InputError if it does not fit the images, the conditioning or, where it names them, the classes;
    with hold_out also unless the file says that it was trained on these images alone."""
    if str(path).endswith(".pkl"):
        net, about = load_edm(path), {"classes": images.classes}  # a pickle names none
    else:
        net, about = load_network(path)
        if "generator" in about:
            raise InputError(f"{path} is a one-step generator, no teacher")
    names = about["classes"]

    network = net.description
    shape, data_shape = list(image_shape(network)), list(images.pixels.shape[1:])
    if shape != data_shape:
        raise InputError(f"{path} makes images of shape {shape}, the data has {data_shape}")

    label_dim = len(images.classes) if cond else 0
    if network["label_dim"] != label_dim:
        raise InputError(f"{path} is conditional on {network['label_dim']} classes, asked for is {label_dim} "
                         "(0: unconditional; see --cond)")
    if cond and names != images.classes:
        raise InputError(f"{path} has the classes {ascii(names)[:200]}, in this order, the data "
                         f"{ascii(images.classes)[:200]}")
    if hold_out and about.get("images") != images.fingerprint():
        raise InputError(f"{path} may have been trained on images that are held out: with --hold-out give a "
                         "teacher that a run with --hold-out on the same data has trained")
    return net, network
