"""EDM's U-Net as a velocity network, published EDM networks as flow teachers, and network files.

The U-Net is the DDPM++ network of Song et al. 2021 (arXiv 2011.13456) as configured by Karras et al. 2022
(EDM, arXiv 2206.00364).
"""

import contextlib
import json
import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import fgm
from fgm import InputError
from images.unpickle import read_pickle, shown
from training import flags
from training.files import reason
from training.sizes import check_memory

# ---- The network -------------------------------------------------------------------------------------------


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


class GroupNorm(nn.GroupNorm):
    """To its input's dtype, with statistics in float32; CUDA's autocast would make the output float32.

    On a CPU it computes in float32: the bfloat16 kernel takes two to three times as long on the channels-last
    tensors that convolutions give."""

    def __init__(self, channels):
        groups = min(32, channels // 4)
        if channels % groups:
            raise InputError(f"{channels} channels do not divide into {groups} groups; take multiples of 32")
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x):
        dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x.to(dtype), self.num_groups, weight, bias, self.eps).to(x.dtype)


class Block(nn.Module):
    """A residual block with the embedding added in the middle and, optionally, one head of self-attention."""

    def __init__(self, channels_in, channels_out, embedding, resample=None, attention=False, dropout=0.0):
        super().__init__()
        self.dropout = dropout
        self.norm0 = GroupNorm(channels_in)
        self.conv0 = Conv(channels_in, channels_out, 3, resample)
        self.affine = linear(embedding, channels_out)
        self.norm1 = GroupNorm(channels_out)
        self.conv1 = Conv(channels_out, channels_out, 3, gain=1e-5)
        self.skip = nn.Identity()
        if resample or channels_in != channels_out:
            self.skip = Conv(channels_in, channels_out, 1, resample)
        self.attention = attention
        if attention:
            self.norm2 = GroupNorm(channels_out)
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
    [B, augment_dim] or None. Returns [B, out_channels, R, R], or with features_only the end of the encoder,
    [B, feature_width, r, r]; keep_features leaves that of the last whole pass in .features. Raises InputError
    for a shape that does not fit, or missing class labels."""

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0,
                 model_channels=128, channel_mult=(2, 2, 2), channel_mult_emb=4, num_blocks=4,
                 attn_resolutions=(16,), dropout=0.13):
        super().__init__()
        if img_resolution % 2 ** (len(channel_mult) - 1):
            raise InputError(f"resolution {img_resolution} cannot be halved {len(channel_mult) - 1} times")
        if model_channels % 2:
            raise InputError(f"model_channels must be even, got {model_channels}")
        self.input_shape, self.label_dim = (in_channels, img_resolution, img_resolution), label_dim
        self.keep_features, self.features, self.t = False, None, None
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

        self.feature_width = width
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
        self.dec[f"{size}x{size}_aux_norm"] = GroupNorm(width)
        self.dec[f"{size}x{size}_aux_conv"] = Conv(width, out_channels, 3, gain=1e-5)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None, features_only=False):
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
        if x.device.type == "cpu":  # CUDA's group norm would make every tensor contiguous again
            x = x.contiguous(memory_format=torch.channels_last)  # fastest for convolutions; layers keep it
        skips = []
        for block in self.enc.values():
            x = block(x, embedding) if isinstance(block, Block) else block(x)
            skips.append(x)
        if features_only:
            return x
        if self.keep_features:
            self.features, self.t = x, noise_labels
        for name, block in self.dec.items():
            if "_block" in name:
                x = torch.cat([x, skips.pop()], 1)
            if "aux_norm" in name:
                x = F.silu(block(x))
            else:
                x = block(x, embedding) if isinstance(block, Block) else block(x)
        return x

    def features_of(self, x, t, **cond):
        return self(x, t, features_only=True, **cond)


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

    features = property(lambda self: self.net.features)
    features_of = EDMUNet.features_of

    def forward(self, x, t, features_only=False, **cond):
        self.t = t
        sigma = (t / (1 - t)).clamp(0.002, 80)
        time, variance = fgm.per_sample(t, x), self.sigma_data**2
        q = time**2 + variance * (1 - time) ** 2
        if features_only:
            return self.net(x / q.sqrt(), sigma.log() / 4, features_only=True, **cond)
        output = self.net(x / q.sqrt(), sigma.log() / 4, **cond).to(x.dtype)
        return x * (time - variance * (1 - time)) / q - self.sigma_data / q.sqrt() * output


def keep_features(velocity):
    """From now on a velocity network keeps .features and .t of its last pass. Returns the features' width."""
    net = velocity.net if isinstance(velocity, EDMVelocity) else velocity
    net.keep_features = True
    return net.feature_width


# ---- Networks from descriptions and weights that are not trusted -------------------------------------------

COUNT = int, flags.COUNT
DESCRIPTION = {  # of a network: what each entry is and may be
    "img_resolution": COUNT, "in_channels": COUNT, "out_channels": COUNT, "model_channels": (int, "[4, 1e9]"),
    "label_dim": (int, "[0, 1e9]"), "augment_dim": (int, "[0, 1e9]"), "channel_mult": (list, flags.COUNT),
    "channel_mult_emb": COUNT, "num_blocks": (int, "[1, 1000]"), "attn_resolutions": (list, flags.COUNT),
    "dropout": (float, "[0, 1)"), "edm_sigma_data": (float, "(0, 1e3)"),
}
COEFFICIENTS = {name: (float, flags.RANGES[name]) for name in ("t_star", "c_in", "c_skip", "c_out")}


def check_values(what, values, table, *required):
    """Raises InputError unless values is a dict with the required names and none beyond the table's, each of
    its kind there (int; list of int; float or int) and in its interval."""
    if type(values) is not dict or not {*required} <= values.keys() <= table.keys():
        raise InputError(f"its {what} needs {', '.join(required)}, may have {', '.join(table)}, "
                         f"and is {shown(values)}")
    for name, value in values.items():
        kind, allowed = table[name]
        numbers = value if type(value) is kind is list else [value]
        if any(type(number) not in ((int, float) if kind is float else (int,)) for number in numbers):
            raise InputError(f"its {name} is {shown(value)}")
        for number in numbers:
            flags.check_setting(name, number, allowed)


def build(network):
    """A velocity network from its description: EDMUNet's arguments, plus "edm_sigma_data" for EDMVelocity.

    It keeps that as .description. Raises InputError, before it allocates, if it cannot fit into memory."""
    settings = dict(network)
    sigma_data = settings.pop("edm_sigma_data", None)
    with torch.device("meta"):
        weights = sum(p.numel() for p in EDMUNet(**settings).parameters())
    check_memory("the network", 4 * weights)
    net = EDMUNet(**settings)
    net = net if sigma_data is None else EDMVelocity(net, sigma_data)
    net.description = network
    return net


def build_with_weights(network, shapes, read):
    """build(network) in evaluation mode with the weights that a file has: their shapes {name: shape}, and
    read(name), one as a tensor. Raises an error, before it allocates, unless the two fit each other."""
    check_values(
        "network", network, DESCRIPTION, "img_resolution", "in_channels", "out_channels", "label_dim")
    if network["in_channels"] != network["out_channels"]:
        raise InputError("in_channels and out_channels must be equal")
    blocks = network.get("num_blocks", 4) * len(network.get("channel_mult", (2, 2, 2)))
    if 10 * blocks > len(shapes):
        raise InputError(f"it claims {blocks} blocks in the encoder and has {len(shapes)} tensors in all")
    for name in [name for name in shapes if name.endswith("resample_filter")]:
        if shapes[name] != (1, 1, 2, 2) or (read(name) != 0.25).any():
            raise InputError("its resampling filter is not supported; supported is [1, 1], a mean of 2x2")
    with torch.device("meta"):  # torch compares names and shapes
        build(network).load_state_dict({name: torch.empty(shape) for name, shape in shapes.items()})
    net = build(network)
    for name, value in net.state_dict().items():
        if not value.copy_(read(name)).isfinite().all():
            raise InputError(f"{name} in it holds NaN or infinite numbers")
    return net.eval()


@contextlib.contextmanager
def refusals(path, kind):
    """Whatever goes wrong inside ends in InputError: a foreign file can fail in any way at all."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise OSError(0, "it is no regular file")  # opening a FIFO would wait for ever
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except InputError as error:
        raise InputError(f"{path} cannot be used: {str(error)[:400]}") from error
    except Exception as error:
        what = ascii(f"{type(error).__name__}: {reason(error)}"[:200])[1:-1]
        raise InputError(f"{path} is no {kind}, or is damaged ({what})") from error


# ---- Published EDM networks as flow teachers ---------------------------------------------------------------

FIXED = {  # attributes of the layers, whose other values would change the velocity and no weight's shape
    "num_heads": (0, 1), "skip_scale": (math.sqrt(0.5),), "eps": (1e-6,), "adaptive_scale": (False,),
    "max_positions": (10000,), "endpoint": (True,),
}


def load_edm(path):
    """The velocity network (EDMVelocity) of a published EDM pickle {"ema": EDMPrecond}, an EDMUNet inside.

    Float32, on the CPU, in evaluation mode. Nothing inside the file is executed. Raises InputError for a file
    that is missing, cut short, names any global beyond those of such files, or holds another network (NCSN++
    and ADM have other layers)."""
    with refusals(path, "EDM network"):
        outer = read_pickle(path)["ema"]
        inner = outer.state["_modules"]["model"]
        check_variant(outer, inner)
        weights = {f"net.{name}": tensor for name, tensor in inner.tensors().items()}  # names in EDMVelocity
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        return build_with_weights(edm_config(shapes, outer.state), shapes, weights.get)


def check_variant(outer, inner):
    """Raises InputError for other preconditioners and networks, and names what EDMUNet does not do."""
    kinds = sorted({outer.class_name, inner.class_name} - {"EDMPrecond", "SongUNet"})
    for prefix, module in inner.modules():
        if module.class_name == "FourierEmbedding":
            kinds.append("the Fourier embedding of NCSN++")
        if "aux_" in prefix and not ("aux_norm" in prefix or "aux_conv" in prefix):
            kinds.append("skip or residual connections of NCSN++ between resolutions")
        changed = [name for name in FIXED if module.state.get(name, FIXED[name][0]) not in FIXED[name]]
        kinds += [f"{name} = {shown(module.state[name])}" for name in changed]
    if kinds:
        held = f"{outer.class_name}({inner.class_name})"
        raise InputError(f"it holds {held} with {', '.join(dict.fromkeys(kinds))}, which is not supported; "
                         "supported is EDMPrecond(SongUNet) as DDPM++ (VP)")


def edm_config(shapes, outer):
    """The description of a DDPM++ network, from {name: shape} and the preconditioner's values."""
    embedding, model_channels = shapes["net.map_layer0.weight"]
    convs = [name for name in shapes if name.startswith("net.enc.") and name.endswith("conv1.weight")]
    blocks = [name.split(".")[2] for name in convs if "_block" in name]  # "16x16_block0"
    sizes = sorted({int(block.split("x")[0]) for block in blocks}, reverse=True)
    first = {size: f"net.enc.{size}x{size}_block0" for size in sizes}
    return dict(
        img_resolution=outer["img_resolution"], in_channels=outer["img_channels"],
        out_channels=outer["img_channels"], label_dim=outer["label_dim"],
        augment_dim=shapes.get("net.map_augment.weight", (0, 0))[1],
        model_channels=model_channels,
        channel_mult=[shapes[f"{first[size]}.conv1.weight"][0] // model_channels for size in sizes],
        channel_mult_emb=embedding // model_channels, num_blocks=len(blocks) // len(sizes),
        attn_resolutions=[size for size in sizes if f"{first[size]}.qkv.weight" in shapes],
        dropout=0.0, edm_sigma_data=outer["sigma_data"],
    )


# ---- Network files: weights and, in the safetensors header under "about", all that is needed to use them ---


def image_shape(network):
    """The shape [C, R, R] of the images of a network, from its description."""
    return network["in_channels"], network["img_resolution"], network["img_resolution"]


def load_network(path):
    """A network file of ours. Returns the net in evaluation mode and its description: a dict with "network",
    "data", "classes" and, of a generator, "generator". Raises InputError if missing, cut short or foreign."""
    from safetensors import safe_open

    with refusals(path, "network file of cifar.py"), safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["about"])
        if "generator" in description:
            check_values("generator", description["generator"], COEFFICIENTS, "t_star")
        slices = {name: file.get_slice(name) for name in file.keys()}
        if {part.get_dtype() for part in slices.values()} - {"F64", "F32", "F16", "BF16"}:
            raise InputError("its weights are no floating-point numbers")
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        net = build_with_weights(description["network"], shapes, file.get_tensor)
        names, label_dim = description["classes"], description["network"]["label_dim"]
        counts = description.setdefault("class_counts", [1] * label_dim)  # older files: all classes alike
        right = type(names) is type(counts) is list and len(counts) == label_dim in (0, len(names))
        if not right or any(type(name) is not str for name in names) or \
                any(type(count) is not int or not 0 < count < 1e9 for count in counts):
            raise InputError("its classes and class_counts are not a name and a number for each class")
        return net, description


def load_teacher(path, images, cond):
    """A teacher and its description, from our safetensors or an EDM pickle.

    Raises InputError if it does not fit the images, the conditioning or, where it names them, the classes."""
    if str(path).endswith(".pkl"):
        net, names = load_edm(path), images.classes  # a pickle names none
    else:
        net, description = load_network(path)
        if "generator" in description:
            raise InputError(f"{path} is a one-step generator, no teacher")
        names = description["classes"]
    network = net.description
    shape, data_shape = list(image_shape(network)), list(images.pixels.shape[1:])
    if shape != data_shape:
        raise InputError(f"{path} makes images of shape {shape}, the data has {data_shape}")
    held, wanted = network["label_dim"], len(images.classes) if cond else 0
    if held != wanted:
        kinds = [f"conditional on {n} classes" if n else "unconditional" for n in (held, wanted)]
        raise InputError(f"{path} is {kinds[0]}, asked for is {kinds[1]} (see --cond)")
    if cond and names != images.classes:
        raise InputError(f"{path} has the classes {ascii(names)[:200]}, in this order, the data "
                         f"{ascii(images.classes)[:200]}")
    return net, network
