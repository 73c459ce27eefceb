"""EDM's U-Net as a velocity network, published EDM networks as flow teachers, and network files.

The U-Net is the DDPM++ network of Song et al. 2021 (arXiv 2011.13456) as configured by Karras et al. 2022
(EDM, arXiv 2206.00364).
"""

import io
import json
import math
import pickle
from collections import OrderedDict

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import fgm
from fgm import InputError

# ------------------------------------------------------------------------------------------------------------
# The network
# ------------------------------------------------------------------------------------------------------------


class Conv(nn.Conv2d):
    """A 1x1 or 3x3 convolution, before it a 2x2 average ("down") or doubling of the pixels ("up")."""

    def __init__(self, channels_in, channels_out, kernel, resample=None, gain=1.0):
        super().__init__(channels_in, channels_out, kernel, padding=kernel // 2)
        nn.init.xavier_uniform_(self.weight, gain)
        nn.init.zeros_(self.bias)
        self.resample = resample
        if resample:  # published files hold this box filter, which both resamplings below apply
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x):
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return super().forward(x)


def linear(features_in, features_out, bias=True):
    layer = nn.Linear(features_in, features_out, bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class Block(nn.Module):
    """A residual block with the embedding added in the middle and, optionally, one head of self-attention."""

    def __init__(self, channels_in, channels_out, embedding, resample=None, attention=False, dropout=0.0):
        super().__init__()
        self.dropout = dropout
        self.norm0 = group_norm(channels_in)
        self.conv0 = Conv(channels_in, channels_out, 3, resample)
        self.affine = linear(embedding, channels_out)
        self.norm1 = group_norm(channels_out)
        self.conv1 = Conv(channels_out, channels_out, 3, gain=1e-5)
        self.skip = nn.Identity()
        if resample or channels_in != channels_out:
            self.skip = Conv(channels_in, channels_out, 1, resample)
        self.attention = attention
        if attention:
            self.norm2 = group_norm(channels_out)
            self.qkv = Conv(channels_out, 3 * channels_out, 1, gain=math.sqrt(0.2))
            self.proj = Conv(channels_out, channels_out, 1, gain=1e-5)

    def forward(self, x, embedding):
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self.norm1(h + self.affine(embedding)[:, :, None, None]))  # [B, C] -> [B, C, 1, 1]
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + self.skip(x)) * math.sqrt(0.5)
        if self.attention:
            b, c, height, width = x.shape
            qkv = self.qkv(self.norm2(x))
            qkv = qkv.reshape(b, 1, c, 3, height * width)  # [B, 3C, H, W] -> [B, 1, C, 3, HW], interleaved
            q, k, v = (part.mT.contiguous() for part in qkv.unbind(3))  # 3 x [B, 1, C, HW] -> [B, 1, HW, C]
            h = F.scaled_dot_product_attention(q, k, v)  # softmax in float32 in every kernel
            h = h.mT.reshape(b, c, height, width)  # [B, 1, HW, C] -> [B, C, H, W]
            x = (x + self.proj(h)) * math.sqrt(0.5)
        return x


class EDMUNet(nn.Module):
    """EDM's CIFAR-10 network, parameter for parameter the published one without the prefix "model.".

    forward(x, noise_labels, class_labels=None, augment_labels=None): x [B, in_channels, R, R]; noise_labels
    [B], the time t when the network is a velocity; class_labels [B, label_dim], one-hot; augment_labels
    [B, augment_dim] or None. Returns [B, out_channels, R, R]. Raises InputError for a shape that does not
    fit, or missing class labels."""

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0,
                 model_channels=128, channel_mult=(2, 2, 2), channel_mult_emb=4, num_blocks=4,
                 attn_resolutions=(16,), dropout=0.13):
        super().__init__()
        if img_resolution % 2 ** (len(channel_mult) - 1):
            raise InputError(f"resolution {img_resolution} cannot be halved {len(channel_mult) - 1} times")
        self.input_shape, self.label_dim = (in_channels, img_resolution, img_resolution), label_dim
        embedding = model_channels * channel_mult_emb
        shared = dict(embedding=embedding, dropout=dropout)
        half = model_channels // 2
        frequencies = 10000 ** (-torch.arange(half) / (half - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.map_label = linear(label_dim, model_channels) if label_dim else None
        self.map_augment = linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = linear(model_channels, embedding)
        self.map_layer1 = linear(embedding, embedding)

        self.enc = nn.ModuleDict()
        width, widths = model_channels, []
        for level, mult in enumerate(channel_mult):
            size = img_resolution >> level
            if level == 0:
                self.enc[f"{size}x{size}_conv"] = Conv(in_channels, width, 3)
            else:
                self.enc[f"{size}x{size}_down"] = Block(width, width, resample="down", **shared)
            widths.append(width)
            for i in range(num_blocks):
                attention = size in attn_resolutions
                block = Block(width, model_channels * mult, attention=attention, **shared)
                self.enc[f"{size}x{size}_block{i}"] = block
                width = model_channels * mult
                widths.append(width)

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            size = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{size}x{size}_in0"] = Block(width, width, attention=True, **shared)
                self.dec[f"{size}x{size}_in1"] = Block(width, width, **shared)
            else:
                self.dec[f"{size}x{size}_up"] = Block(width, width, resample="up", **shared)
            for i in range(num_blocks + 1):
                attention = i == num_blocks and size in attn_resolutions
                block = Block(width + widths.pop(), model_channels * mult, attention=attention, **shared)
                self.dec[f"{size}x{size}_block{i}"] = block
                width = model_channels * mult
        self.dec[f"{size}x{size}_aux_norm"] = group_norm(width)
        self.dec[f"{size}x{size}_aux_conv"] = Conv(width, out_channels, 3, gain=1e-5)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        if x.shape[1:] != self.input_shape:
            expected = list(self.input_shape)
            raise InputError(f"the network takes images of shape {expected}, got {list(x.shape[1:])}")
        if self.label_dim and (class_labels is None or class_labels.shape != (len(x), self.label_dim)):
            raise InputError(f"the network needs class_labels of shape [{len(x)}, {self.label_dim}]")
        angle = noise_labels[:, None] * self.frequencies  # [B, model_channels / 2]
        embedding = torch.cat([angle.sin(), angle.cos()], 1)  # [B, model_channels]
        if self.label_dim:
            embedding = embedding + self.map_label(class_labels * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            embedding = embedding + self.map_augment(augment_labels)
        embedding = F.silu(self.map_layer0(embedding))  # [B, channel_mult_emb * model_channels]
        embedding = F.silu(self.map_layer1(embedding))
        x = x.contiguous(memory_format=torch.channels_last)  # fastest for convolutions; every layer keeps it
        skips = []
        for block in self.enc.values():
            x = block(x, embedding) if isinstance(block, Block) else block(x)
            skips.append(x)
        for name, block in self.dec.items():
            if "_block" in name:
                x = torch.cat([x, skips.pop()], 1)
            if "aux_norm" in name:
                x = F.silu(block(x))
            else:
                x = block(x, embedding) if isinstance(block, Block) else block(x)
        return x


class EDMVelocity(nn.Module):
    """The velocity network of an EDM denoiser D (arXiv 2206.00364, table 1), net being its F:

        D(y; s) = c_skip y + c_out F(c_in y, ln(s) / 4)

    With s = t / (1 - t), E[x0 | x_t] = D(x_t / (1 - t); s), so v = (x_t - D) / t. With c_skip, c_out, c_in,

        v = x_t (t - sigma_data^2 (1 - t)) / q - sigma_data / sqrt(q) F(x_t / sqrt(q), ln(s) / 4)

    where q = t^2 + sigma_data^2 (1 - t)^2: nothing cancels at small t, and t = 1 is finite. The noise level
    that F is given is kept within the [0.002, 80] that it was trained on."""

    def __init__(self, net, sigma_data=0.5):
        super().__init__()
        self.net, self.sigma_data = net, sigma_data

    def forward(self, x, t, **cond):
        sigma = (t / (1 - t)).clamp(0.002, 80)
        time, variance = fgm.per_sample(t, x), self.sigma_data**2
        q = time**2 + variance * (1 - time) ** 2
        output = self.net(x / q.sqrt(), sigma.log() / 4, **cond).to(x.dtype)
        return x * (time - variance * (1 - time)) / q - self.sigma_data / q.sqrt() * output


# ------------------------------------------------------------------------------------------------------------
# Published EDM networks as flow teachers
# ------------------------------------------------------------------------------------------------------------


class PickledModule:
    """What an instance of a published pickle's own classes becomes: its state, and none of its code."""

    def __init__(self, class_name="", state=None):
        self.class_name, self.state = class_name, state or {}

    def __setstate__(self, state):
        self.state = state

    def tensors(self, prefix=""):
        """{name: tensor} of the parameters and buffers of this module and those inside."""
        own = {**self.state["_parameters"], **self.state["_buffers"]}
        found = {prefix + name: value.detach() for name, value in own.items() if value is not None}
        for name, module in self.state["_modules"].items():
            if module is not None:
                found |= module.tensors(f"{prefix}{name}.")
        return found


def pickled_module(meta):
    return PickledModule(meta["class_name"], meta["state"])


def pickled_parameter(data, requires_grad, hooks):
    return data


def pickled_storage(content):
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


NUMPY_SCALAR = np.float64(0).__reduce__()[0]
HARMLESS_GLOBALS = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): pickled_module,
    ("torch.nn.modules.container", "ModuleDict"): PickledModule,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_parameter"): pickled_parameter,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): pickled_storage,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "scalar"): NUMPY_SCALAR,
    ("numpy._core.multiarray", "scalar"): NUMPY_SCALAR,
}


class EDMUnpickler(pickle.Unpickler):
    """Reads EDM's pickles without running the Python source in them; refuses all globals they do not need."""

    def find_class(self, module, name):
        if (module, name) not in HARMLESS_GLOBALS:
            raise InputError(f"it names {module}.{name}, which no EDM network needs; nothing was executed")
        return HARMLESS_GLOBALS[module, name]


def load_edm(path):
    """The velocity network (EDMVelocity) of a published EDM pickle {"ema": EDMPrecond}, an EDMUNet inside.

    Float32, on the CPU, in evaluation mode. Nothing inside the file is executed. Raises InputError for a file
    that is missing, cut short, names any global beyond those of such files, or holds another network (NCSN++
    and ADM have other layers)."""
    return read_edm(path)[0]


def read_edm(path):
    """load_edm's network, and its description as build() takes it."""
    try:
        with open(path, "rb") as file:
            content = EDMUnpickler(file).load()
        outer = content["ema"]
        inner = outer.state["_modules"]["model"]
        if outer.class_name != "EDMPrecond" or inner.class_name != "SongUNet":
            held = f"{outer.class_name}({inner.class_name})"
            raise InputError(f"it holds {held}; supported is EDMPrecond(SongUNet), DDPM++")
        weights = {name: value.float() for name, value in inner.tensors().items()}
        network = edm_config(weights, outer.state) | {"edm_sigma_data": float(outer.state["sigma_data"])}
        velocity = build(network)
        velocity.net.load_state_dict(weights)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"{path} cannot be used: {error}") from error
    except Exception as error:  # a foreign pickle can fail in any way at all
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise InputError(f"{path} is not an EDM network, or is damaged ({reason})") from error
    return velocity.eval(), network


def edm_config(weights, outer):
    """EDMUNet's arguments, from the names and shapes of the weights; outer: the preconditioner's values."""
    other = any("aux_skip" in name or value.shape[-2:] == (4, 4) for name, value in weights.items())
    if "map_layer0.weight" not in weights or other:
        raise InputError("it holds NCSN++ (VE) or another network; supported is DDPM++ (VP)")
    embedding, model_channels = weights["map_layer0.weight"].shape
    channels = int(outer["img_channels"])
    augmented = "map_augment.weight" in weights
    convs = [name for name in weights if name.startswith("enc.") and name.endswith("conv1.weight")]
    blocks = [name.split(".")[1] for name in convs if "_block" in name]  # "16x16_block0"
    sizes = sorted({int(block.split("x")[0]) for block in blocks}, reverse=True)
    first = {size: f"enc.{size}x{size}_block0" for size in sizes}
    return dict(
        img_resolution=int(outer["img_resolution"]),
        in_channels=channels,
        out_channels=channels,
        label_dim=int(outer["label_dim"]),
        augment_dim=weights["map_augment.weight"].shape[1] if augmented else 0,
        model_channels=model_channels,
        channel_mult=[weights[f"{first[size]}.conv1.weight"].shape[0] // model_channels for size in sizes],
        channel_mult_emb=embedding // model_channels,
        num_blocks=len(blocks) // len(sizes),
        attn_resolutions=[size for size in sizes if f"{first[size]}.qkv.weight" in weights],
        dropout=0.0,
    )


# ------------------------------------------------------------------------------------------------------------
# Network files: weights and, in the safetensors header under "about", all that is needed to use them
# ------------------------------------------------------------------------------------------------------------


def build(network):
    """A velocity network from its description: EDMUNet's arguments, plus "edm_sigma_data" for EDMVelocity."""
    network = dict(network)
    sigma_data = network.pop("edm_sigma_data", None)
    net = EDMUNet(**network)
    return net if sigma_data is None else EDMVelocity(net, sigma_data)


def image_shape(network):
    """The shape [C, R, R] of the images of a network, from its description."""
    return network["in_channels"], network["img_resolution"], network["img_resolution"]


def load_network(path):
    """A network file of ours. Returns the net in evaluation mode and its description: a dict with "network",
    "data", "classes" and, of a generator, "generator". Raises InputError if missing, cut short or foreign."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            description = json.loads(file.metadata()["about"])
            net = build(description["network"])
            net.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    except OSError as error:
        raise InputError(f"cannot read {path}: {error}") from error
    except (SafetensorError, TypeError, KeyError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise InputError(f"{path} is not a network file of cifar.py, or is damaged ({reason})") from error
    return net.eval(), description


def load_teacher(path, images, cond):
    """A teacher and its description, from our safetensors or an EDM pickle.

    Raises InputError if it does not fit the images or the conditioning."""
    if str(path).endswith(".pkl"):
        net, network = read_edm(path)
    else:
        net, description = load_network(path)
        network = description["network"]
    shape, data_shape = list(image_shape(network)), list(images.pixels.shape[1:])
    if shape != data_shape:
        raise InputError(f"{path} makes images of shape {shape}, the data has {data_shape}")
    label_dim, classes = network["label_dim"], len(images.classes)
    if label_dim != (classes if cond else 0):
        held = f"conditional on {label_dim} classes" if label_dim else "unconditional"
        wanted = f"conditional on {classes} classes (--cond)" if cond else "unconditional (no --cond)"
        raise InputError(f"{path} is {held}, asked for is {wanted}")
    return net, network
