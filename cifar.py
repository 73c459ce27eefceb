"""Images in one step: EDM's U-Net as a flow teacher, distilled by FGM (arXiv 2410.19310, sections 5.1 and B.1), sampled and scored.

    python cifar.py --cond --data digits                       # real 8x8 digits, no network, no GPU: minutes on a laptop
    python cifar.py --cond                                     # CIFAR-10, the paper's settings; for GPUs
    python cifar.py --cond --teacher edm-cifar10-32x32-cond-vp.pkl     # start from a published EDM network
    torchrun --nproc-per-node 8 cifar.py --cond                # the same run, sharded over 8 GPUs
    python cifar.py --data my/images --resolution 32           # a folder with one sub-folder a class
    python cifar.py --sample 64 --out runs/digits-cond         # draw from a finished run

One run does what is missing and keeps what is there: teacher, distillation, samples, scores, pictures; run again, it resumes.
"""

import argparse
import copy
import io
import json
import math
import pickle
import time
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import fgm
from fgm import InputError, to_float, to_uint8

# ----------------------------------------------------------------------------------------------------------------------
# EDM's U-Net: the DDPM++ network of Song et al. 2021 (arXiv 2011.13456) as configured by Karras et al. 2022 (arXiv 2206.00364)
# ----------------------------------------------------------------------------------------------------------------------


class Conv(nn.Conv2d):
    """A 1x1 or 3x3 convolution, before it a 2x2 average ("down") or doubling of the pixels ("up")."""

    def __init__(self, channels_in, channels_out, kernel, resample=None, gain=1.0):
        super().__init__(channels_in, channels_out, kernel, padding=kernel // 2)
        nn.init.xavier_uniform_(self.weight, gain)
        nn.init.zeros_(self.bias)
        self.resample = resample
        if resample:
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))  # published files hold it; both functions below are that box

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
    """A residual block with the embedding added in the middle and, optionally, one head of self-attention at the end."""

    def __init__(self, channels_in, channels_out, embedding, resample=None, attention=False, dropout=0.0):
        super().__init__()
        self.dropout = dropout
        self.norm0 = group_norm(channels_in)
        self.conv0 = Conv(channels_in, channels_out, 3, resample)
        self.affine = linear(embedding, channels_out)
        self.norm1 = group_norm(channels_out)
        self.conv1 = Conv(channels_out, channels_out, 3, gain=1e-5)
        self.skip = Conv(channels_in, channels_out, 1, resample) if resample or channels_in != channels_out else nn.Identity()
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
            qkv = self.qkv(self.norm2(x)).reshape(b, 1, c, 3, height * width)  # [B, 3C, H, W] -> [B, 1, C, 3, HW], q, k, v interleaved
            q, k, v = (part.mT.contiguous() for part in qkv.unbind(3))  # 3 x [B, 1, C, HW] -> 3 x [B, 1, HW, C]
            h = F.scaled_dot_product_attention(q, k, v)  # softmax in float32 in every kernel
            x = (x + self.proj(h.mT.reshape(b, c, height, width))) * math.sqrt(0.5)  # [B, 1, HW, C] -> [B, C, H, W]
        return x


class EDMUNet(nn.Module):
    """EDM's CIFAR-10 network, parameter for parameter that of the published weights (without the preconditioner's "model." prefix).

    forward(x, noise_labels, class_labels=None, augment_labels=None): x [B, in_channels, R, R]; noise_labels [B], the time t when the network
    is a velocity; class_labels [B, label_dim], one-hot; augment_labels [B, augment_dim] or None. Returns [B, out_channels, R, R].
    Raises InputError for a shape that does not fit, or missing class labels."""

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0, model_channels=128, channel_mult=(2, 2, 2),
                 channel_mult_emb=4, num_blocks=4, attn_resolutions=(16,), dropout=0.13):  # fmt: skip
        super().__init__()
        if img_resolution % 2 ** (len(channel_mult) - 1):
            raise InputError(f"resolution {img_resolution} cannot be halved {len(channel_mult) - 1} times")
        self.input_shape, self.label_dim = (in_channels, img_resolution, img_resolution), label_dim
        embedding = model_channels * channel_mult_emb
        shared = dict(embedding=embedding, dropout=dropout)
        half = model_channels // 2
        self.register_buffer("frequencies", 10000 ** (-torch.arange(half) / (half - 1)), persistent=False)
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
                self.enc[f"{size}x{size}_block{i}"] = Block(width, model_channels * mult, attention=size in attn_resolutions, **shared)
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
                self.dec[f"{size}x{size}_block{i}"] = Block(width + widths.pop(), model_channels * mult, attention=attention, **shared)
                width = model_channels * mult
        self.dec[f"{size}x{size}_aux_norm"] = group_norm(width)
        self.dec[f"{size}x{size}_aux_conv"] = Conv(width, out_channels, 3, gain=1e-5)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        if x.shape[1:] != self.input_shape:
            raise InputError(f"the network takes images of shape {list(self.input_shape)}, got {list(x.shape[1:])}")
        if self.label_dim and (class_labels is None or class_labels.shape != (len(x), self.label_dim)):
            raise InputError(f"the network needs class_labels of shape [{len(x)}, {self.label_dim}]")
        angle = noise_labels[:, None] * self.frequencies  # [B, model_channels / 2]
        embedding = torch.cat([angle.sin(), angle.cos()], 1)  # [B, model_channels]
        if self.label_dim:
            embedding = embedding + self.map_label(class_labels * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            embedding = embedding + self.map_augment(augment_labels)
        embedding = F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))  # [B, channel_mult_emb * model_channels]
        x = x.contiguous(memory_format=torch.channels_last)  # what convolutions are fastest in; it passes from layer to layer
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


# ----------------------------------------------------------------------------------------------------------------------
# Published EDM networks as flow teachers
# ----------------------------------------------------------------------------------------------------------------------


class EDMVelocity(nn.Module):
    """The velocity network of an EDM denoiser D(y; s) = c_skip y + c_out F(c_in y, ln(s) / 4) (arXiv 2206.00364, table 1), net being F.

    With s = t / (1 - t), E[x0 | x_t] = D(x_t / (1 - t); s), so v = (x_t - D) / t. Inserting c_skip, c_out, c_in and q = t^2 + sigma_data^2 (1 - t)^2,
    v = x_t (t - sigma_data^2 (1 - t)) / q - sigma_data / sqrt(q) F(x_t / sqrt(q), ln(s) / 4): nothing cancels at small t, and t = 1 is finite.
    The noise level that F is told is kept within the [0.002, 80] that it was trained on."""

    def __init__(self, net, sigma_data=0.5):
        super().__init__()
        self.net, self.sigma_data = net, sigma_data

    def forward(self, x, t, **cond):
        sigma = (t / (1 - t)).clamp(0.002, 80)
        time, variance = fgm.per_sample(t, x), self.sigma_data**2
        q = time**2 + variance * (1 - time) ** 2
        output = self.net(x / q.sqrt(), sigma.log() / 4, **cond).to(x.dtype)
        return x * (time - variance * (1 - time)) / q - self.sigma_data / q.sqrt() * output


class Record:
    """What a published pickle's own classes become: their state, and none of their code."""

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


class EDMUnpickler(pickle.Unpickler):
    """Reads the pickles of EDM without running the Python source in them; refuses every global that such a file has no need of."""

    def find_class(self, module, name):
        harmless = {
            ("torch_utils.persistence", "_reconstruct_persistent_obj"): lambda meta: Record(meta["class_name"], meta["state"]),
            ("torch.nn.modules.container", "ModuleDict"): Record,
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data,
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            ("torch.storage", "_load_from_bytes"): lambda content: torch.load(io.BytesIO(content), map_location="cpu", weights_only=True),
            ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "scalar"): np.float64(0).__reduce__()[0],
            ("numpy._core.multiarray", "scalar"): np.float64(0).__reduce__()[0],
        }
        if (module, name) not in harmless:
            raise InputError(f"it names {module}.{name}, which no EDM network needs; nothing was executed")
        return harmless[module, name]


def load_edm(path):
    """The velocity network (EDMVelocity) of a published EDM pickle {"ema": EDMPrecond}, with an EDMUNet inside. Float32, on the CPU, evaluation mode.

    Nothing inside the file is executed. Raises InputError for a file that is missing, cut short, names any global beyond those of such files,
    or holds another network (NCSN++ and ADM have other layers)."""
    return read_edm(path)[0]


def read_edm(path):
    """load_edm's network, and its description as build() takes it."""
    try:
        with open(path, "rb") as file:
            content = EDMUnpickler(file).load()
        outer = content["ema"]
        inner = outer.state["_modules"]["model"]
        if outer.class_name != "EDMPrecond" or inner.class_name != "SongUNet":
            raise InputError(f"it holds {outer.class_name}({inner.class_name}); supported is EDMPrecond(SongUNet), DDPM++")
        weights = {name: value.float() for name, value in inner.tensors().items()}
        network = edm_config(weights, outer.state) | {"edm_sigma_data": float(outer.state["sigma_data"])}
        velocity = build(network)
        velocity.net.load_state_dict(weights)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"{path} cannot be used: {error}") from error
    except Exception as error:  # a foreign pickle can fail in any way at all
        raise InputError(f"{path} is not an EDM network, or is damaged ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})") from error
    return velocity.eval(), network


def edm_config(weights, outer):
    """EDMUNet's arguments, read off the names and shapes of the weights; outer: the preconditioner's values."""
    if "map_layer0.weight" not in weights or any("aux_skip" in name or value.shape[-2:] == (4, 4) for name, value in weights.items()):
        raise InputError("it holds NCSN++ (VE) or another network; supported is DDPM++ (VP)")
    resolution, channels, label_dim = int(outer["img_resolution"]), int(outer["img_channels"]), int(outer["label_dim"])
    model_channels = weights["map_layer0.weight"].shape[1]
    blocks = [name.split(".")[1] for name in weights if name.startswith("enc.") and "_block" in name and name.endswith("conv1.weight")]  # "16x16_block0"
    sizes = sorted({int(block.split("x")[0]) for block in blocks}, reverse=True)
    attention = [size for size in sizes if f"enc.{size}x{size}_block0.qkv.weight" in weights]
    return dict(
        img_resolution=resolution, in_channels=channels, out_channels=channels, label_dim=label_dim,
        augment_dim=weights["map_augment.weight"].shape[1] if "map_augment.weight" in weights else 0, model_channels=model_channels,
        channel_mult=[weights[f"enc.{size}x{size}_block0.conv1.weight"].shape[0] // model_channels for size in sizes],
        channel_mult_emb=weights["map_layer0.weight"].shape[0] // model_channels, num_blocks=len(blocks) // len(sizes),
        attn_resolutions=attention, dropout=0.0)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Network files: weights and, in the safetensors header, all that is needed to use them
# ----------------------------------------------------------------------------------------------------------------------


def build(network):
    """A velocity network from its description: EDMUNet's arguments, "edm_sigma_data" beside them if EDM's preconditioner surrounds it."""
    network = dict(network)
    sigma_data = network.pop("edm_sigma_data", None)
    net = EDMUNet(**network)
    return net if sigma_data is None else EDMVelocity(net, sigma_data)


def load_network(path):
    """A network file of ours. Returns (net in evaluation mode, its description). Raises InputError if it is missing, cut short or foreign."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            net = build(about["network"])
            net.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    except OSError as error:
        raise InputError(f"cannot read {path}: {error}") from error
    except (SafetensorError, TypeError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is not a network file of cifar.py, or is damaged ({type(error).__name__}: {str(error).splitlines()[0]})") from error
    return net.eval(), about


def load_teacher(path, images, cond):
    """A teacher and its description from our safetensors or an EDM pickle. Raises InputError if it does not fit the images or the conditioning."""
    if str(path).endswith(".pkl"):
        net, network = read_edm(path)
    else:
        net, about = load_network(path)
        network = about["network"]
    shape = (network["in_channels"], network["img_resolution"], network["img_resolution"])
    if shape != tuple(images.pixels.shape[1:]):
        raise InputError(f"{path} makes images of shape {list(shape)}, the data has {list(images.pixels.shape[1:])}")
    if network["label_dim"] != (len(images.classes) if cond else 0):
        kind = f"conditional on {network['label_dim']} classes" if network["label_dim"] else "unconditional"
        raise InputError(f"{path} is {kind}, asked for is {f'conditional on {len(images.classes)} classes (--cond)' if cond else 'unconditional (no --cond)'}")
    return net, network


# ----------------------------------------------------------------------------------------------------------------------
# Data: one uint8 tensor
# ----------------------------------------------------------------------------------------------------------------------


class Images(NamedTuple):
    """pixels: uint8 [N, C, R, R]; labels: int64 [N], indices into classes."""

    pixels: torch.Tensor
    labels: torch.Tensor
    classes: list


def load_images(data, resolution=None, cond=False):
    """The training images of "cifar10" (downloaded on first use), "digits" (scikit-learn's, no network), or a folder with one sub-folder a class.

    Folders: greyscale, palette and alpha become RGB; resolution: centre-crop to a square and resize to it. Raises InputError, naming the file,
    for images that cannot be read or, without resolution, are not all of one square size; and for data sets that cannot be had."""
    if data == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()  # 1,797 images of values 0..16
        pixels = torch.from_numpy(np.round(digits.images * 255 / 16).astype(np.uint8))[:, None]  # [N, 8, 8] -> [N, 1, 8, 8]
        images = Images(pixels, torch.from_numpy(digits.target).long(), [str(i) for i in range(10)])
    elif data == "cifar10":
        images = cifar10()
    else:
        images = image_folder(Path(data), resolution)
    if cond and len(images.classes) < 2:
        raise InputError(f"--cond needs at least two classes, {data} has {len(images.classes)}")
    if resolution and images.pixels.shape[-1] != resolution:
        raise InputError(f"{data} has resolution {images.pixels.shape[-1]}; --resolution is for folders")
    return images


def cifar10():
    from torchvision.datasets import CIFAR10

    root = Path.home() / ".cache" / "cifar10"
    error = None
    if fgm.rank() == 0:
        try:
            CIFAR10(root, download=True)
        except (OSError, RuntimeError) as failure:  # urllib's errors are OSErrors
            error = str(failure)
    if fgm.world() > 1:
        errors = [error]
        dist.broadcast_object_list(errors)
        error = errors[0]
    if error:
        raise InputError(f"cannot download CIFAR-10 to {root} ({error}); try --data digits (no download), or --data DIR for a folder of images")
    dataset = CIFAR10(root)
    pixels = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()  # [N, 32, 32, 3] -> [N, 3, 32, 32]
    return Images(pixels, torch.tensor(dataset.targets), dataset.classes)


def image_folder(root, resolution):
    from PIL import Image, ImageOps

    if not root.is_dir():
        raise InputError(f"unknown data set {str(root)!r}: neither cifar10, digits nor a folder")
    classes = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
    suffixes = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
    pixels, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in suffixes):
            image = fgm.read_image(path)
            if resolution:
                image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.BOX if min(image.size) >= resolution else Image.Resampling.BICUBIC)
            elif image.width != image.height or (pixels and image.width != pixels[0].shape[0]):
                first = f"{pixels[0].shape[1]}x{pixels[0].shape[0]}" if pixels else "square"
                raise InputError(f"{path} is {image.width}x{image.height}, not {first}; --resolution R makes all images one size")
            pixels.append(np.asarray(image))
            labels.append(label)
    if not pixels or len(set(labels)) < len(classes):
        empty = [name for label, name in enumerate(classes) if label not in set(labels)]
        what = f"no images in its sub-folder {empty[0]}" if empty else "no sub-folders; it needs one a class, with the images inside"
        raise InputError(f"{root} has {what}")
    return Images(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels), classes)  # [N, R, R, 3] -> [N, 3, R, R]


# ----------------------------------------------------------------------------------------------------------------------
# Sampling and scores
# ----------------------------------------------------------------------------------------------------------------------


def draw(sampler, n, shape, label_dim, device, seed=0, classes=None, batch=500):
    """n images of sampler(noise, **cond) -> x0, uint8 [n, *shape] on the CPU of every process, and their labels [n].

    Image i is of class classes[i % len(classes)] (all classes in turn unless given). The processes share each batch; a last batch that does not
    fill is filled with images that are dropped, because sharded networks must be called by all."""
    classes = torch.tensor(range(label_dim or 1) if classes is None else classes)
    share, images = math.ceil(min(batch, n) / fgm.world()), []
    for begin in range(0, n, share * fgm.world()):
        indices = begin + fgm.rank() * share + torch.arange(share)
        cond = {"class_labels": F.one_hot(classes[indices % len(classes)], label_dim).float().to(device)} if label_dim else {}
        with torch.no_grad():
            part = to_uint8(sampler(fgm.noise_from(seed * 2**32 + indices, shape, device), **cond))
        if fgm.world() > 1:
            parts = [torch.empty_like(part) for _ in range(fgm.world())]
            dist.all_gather(parts, part)
            part = torch.cat(parts)  # processes x [share, C, R, R] -> [batch, C, R, R]
        images.append(part.cpu())
    return torch.cat(images)[:n], classes[torch.arange(n) % len(classes)]


def pixel_frechet(real, fake):
    """Fréchet distance on the raw pixels (-1..1) of uint8 images [N, C, R, R]."""
    return fgm.frechet_distance(to_float(real).flatten(1), to_float(fake).flatten(1))  # [N, C, R, R] -> [N, D]


def noise_floor(images):
    """Fréchet distance between two random halves of the data."""
    order = torch.randperm(len(images.pixels), generator=torch.Generator().manual_seed(0))
    half = len(order) // 2
    return pixel_frechet(images.pixels[order[:half]], images.pixels[order[half:]])


class Judge:
    """A support vector classifier trained on real images: do samples look like their label? own_accuracy: its 5-fold accuracy on real images."""

    def __init__(self, images, limit=5000):
        from sklearn.model_selection import cross_val_score
        from sklearn.svm import SVC

        some = torch.randperm(len(images.pixels), generator=torch.Generator().manual_seed(0))[:limit]
        x, y = to_float(images.pixels[some]).flatten(1).numpy(), images.labels[some].numpy()  # [N, C, R, R] -> [N, D]
        self.own_accuracy = float(cross_val_score(SVC(C=10), x, y, cv=5).mean())
        self.classifier = SVC(C=10).fit(x, y)

    def accuracy(self, pixels, labels):
        """(share of samples classified as their label, the smallest such share of any class)."""
        right = torch.from_numpy(self.classifier.predict(to_float(pixels).flatten(1).numpy())) == labels  # [N, C, R, R] -> [N, D] -> [N]
        return right.float().mean().item(), min(right[labels == c].float().mean().item() for c in labels.unique())


class Pixels(torch.utils.data.Dataset):
    """uint8 images [N, C, R, R] as torch-fidelity takes them, in RGB."""

    def __init__(self, pixels):
        self.pixels = pixels.expand(-1, 3, -1, -1)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.pixels[i]


def fid(real, fake, weights, device):
    """Fréchet Inception distance by torch-fidelity; weights: a file for its Inception network, None to download it. Raises InputError without either."""
    from torch_fidelity import calculate_metrics

    try:
        if weights:
            torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity would execute what is inside
        scores = calculate_metrics(input1=Pixels(fake), input2=Pixels(real), fid=True, cuda=device.type == "cuda", verbose=False,
                                   feature_extractor_weights_path=weights)  # fmt: skip
    except Exception as error:  # a foreign file can fail in any way at all
        what = f"the Inception weights {weights} cannot be used" if weights else "the Inception weights cannot be downloaded; give --inception-weights FILE"
        raise InputError(f"no FID: {what} ({str(error).splitlines()[0]})") from error
    return scores["frechet_inception_distance"]


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------

# The paper's settings (section 5.1, B.1) and EDM's network, for CIFAR-10 and other images of that size. The paper does not say where its CIFAR-10 generator
# starts: t_star = c_in = c_skip = c_out = 2.5 / 3.5, SiD's start (arXiv 2404.04057) in our terms, was the best on digits.
PAPER = dict(model_channels=128, channel_mult=[2, 2, 2], num_blocks=4, attention=[16], dropout=0.13, flip=True, teacher_kimg=20_000, teacher_lr=2e-5, teacher_ema=0.999,
             batch=512, kimg=20_000, lr=2e-5, flow_lr=2e-5, lr_warmup=100, lr_decay=0.0, clip=None, ema=0.999, t_star=0.714, c_in=0.714, c_skip=0.714, l1_weight=0.0,
             weight="none", t_generator=(0.0, 2.0), t_flow=(0.0, 2.0), loss_scale=1.0, flow_updates=1, samples=50_000, save_every=500, log_every=50,
             picture_every=500)  # fmt: skip
# Measured on scikit-learn's digits, on a laptop's budget.
DIGITS = PAPER | dict(model_channels=32, channel_mult=[1, 2], num_blocks=1, attention=[4], dropout=0.0, flip=False, teacher_kimg=192, teacher_lr=2e-3,
                      batch=128, kimg=192, lr=2e-4, flow_lr=4e-4, lr_decay=0.6, ema=0.995, weight="sid", l1_weight=-0.4, samples=10_000)  # fmt: skip
DIGITS_UNCONDITIONAL = DIGITS | dict(kimg=256)


def defaults(given):
    """The settings for the data that the command line names."""
    if given.data != "digits" or given.paper:
        return PAPER
    return DIGITS if given.cond else DIGITS_UNCONDITIONAL


def arguments():
    parser = fgm.Parser(prog="cifar.py", description="Train, distil, sample and score a one-step image generator (FGM, arXiv 2410.19310).",
                        epilog="The defaults shown are the paper's; add --data digits to see those of the digits.")  # fmt: skip
    add = parser.add_argument_group("data").add_argument
    add("--data", default="cifar10", help="cifar10, digits, or a folder with one sub-folder a class")
    add("--resolution", type=fgm.COUNT, help="crop and resize the images of a folder to this size")
    add("--cond", action="store_true", help="class-conditional networks (table 2 of the paper)")
    add("--flip", action=argparse.BooleanOptionalAction, help="horizontal flips when the teacher trains")
    add = parser.add_argument_group("run").add_argument
    add("--out", help="output folder (default: runs/DATA, with -cond if conditional)")
    fgm.add_run_flags(add)
    add("--picture-every", type=fgm.COUNT, metavar="STEPS", help="distillation steps between pictures")
    add("--paper", action="store_true", help="the paper's settings on any data")
    add = parser.add_argument_group("teacher and network (EDM, arXiv 2206.00364; section 5.1)").add_argument
    add("--teacher", help="a network file of ours, or a published EDM pickle, instead of training one")
    add("--model-channels", type=fgm.COUNT, help="width of the first level")
    add("--channel-mult", type=fgm.COUNT, nargs="+", help="widths of the levels as multiples of that")
    add("--num-blocks", type=fgm.COUNT, help="residual blocks a level")
    add("--attention", type=int, nargs="*", help="resolutions with attention")
    add("--dropout", type=float, help="when the teacher trains")
    add("--teacher-kimg", type=fgm.AMOUNT, help="thousand images to train the teacher on")
    add("--teacher-lr", type=fgm.AMOUNT, help="of the teacher")
    add("--teacher-ema", type=float, metavar="DECAY", help="of the teacher's moving average")
    add = parser.add_argument_group("distillation (Algorithm 1; section 5.1, B.1)").add_argument
    add("--kimg", type=fgm.AMOUNT, help="thousand images to distil with")
    fgm.add_distillation_flags(add)
    add("--c-skip", type=float, help="c_skip of the generator (B.1); c_out is t*")
    add = parser.add_argument_group("scores").add_argument
    add("--samples", type=fgm.COUNT, help="images that each score is measured on")
    add("--fid", action="store_true", help="Inception FID by torch-fidelity against the training images; under 50,000 samples it is labelled fid-5k, ...")
    add("--inception-weights", metavar="FILE", help="for --fid without a download")
    add = parser.add_argument_group("drawing samples from a finished run").add_argument
    add("--sample", type=fgm.COUNT, metavar="N", help="draw N images from the run in OUT, or from --generator FILE")
    add("--generator", metavar="FILE", help="a generator.safetensors, which is all that sampling needs")
    add("--steps", type=fgm.COUNT, metavar="K", help="draw from the teacher with K Euler steps instead")
    add("--classes", type=int, nargs="+", help="draw these classes in turn")
    add("--npz", action="store_true", help="also write the images as a uint8 array")
    return parser.parse_with(defaults)


def draw_from_files(args, device):
    """--sample: images of a finished run, or of a network file alone."""
    out = Path(args.out) if args.out else Path(args.generator).parent if args.generator else default_out(args)
    name = "teacher.safetensors" if args.steps else "generator.safetensors"
    path = Path(args.teacher if args.steps and args.teacher else args.generator if args.generator and not args.steps else out / name)
    if not path.exists():
        raise InputError(f"{path} does not exist: the run has not finished, or --out names another folder")
    net, about = load_network(path)
    if not args.steps and "generator" not in about:
        raise InputError(f"{path} is no generator; with --steps K it can be sampled as a teacher")
    label_dim, shape = about["network"]["label_dim"], (about["network"]["in_channels"], *[about["network"]["img_resolution"]] * 2)
    if args.classes and not all(0 <= c < label_dim for c in args.classes):
        raise InputError(f"--classes must lie in 0..{label_dim - 1}" if label_dim else f"--classes: {path} is unconditional")
    net = net.to(device)
    generator = fgm.OneStepGenerator(net, **about["generator"]) if not args.steps else None
    sampler = generator or (lambda noise, **cond: fgm.sample_ode(net, noise, args.steps, **cond))
    began = time.perf_counter()
    pixels, labels = draw(sampler, args.sample, shape, label_dim, device, args.seed, args.classes)
    seconds = time.perf_counter() - began
    if fgm.rank() == 0:
        target = fgm.open_folder(out) / f"samples-{f'{args.steps}-steps' if args.steps else 'one-step'}"
        fgm.save_grid(f"{target}.png", pixels[:1000])
        if args.npz:
            np.savez(f"{target}.npz", images=pixels.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())  # [N, C, R, R] -> [N, R, R, C]
        print(f"{len(pixels)} images in {seconds:.2f} s: {target}.png" + (f", {target}.npz" if args.npz else ""))


def default_out(args):
    return Path("runs") / (Path(args.data).name + ("-cond" if args.cond else ""))


def main():
    args = arguments()
    device = fgm.setup(args.device)
    if args.sample:
        return draw_from_files(args, device)
    images = load_images(args.data, args.resolution, args.cond)
    n, channels, resolution = images.pixels.shape[:3]
    label_dim = len(images.classes) if args.cond else 0
    if args.teacher:
        net, network = load_teacher(args.teacher, images, args.cond)
    else:
        network = dict(img_resolution=resolution, in_channels=channels, out_channels=channels, label_dim=label_dim, model_channels=args.model_channels,
                       channel_mult=args.channel_mult, num_blocks=args.num_blocks, attn_resolutions=args.attention, dropout=args.dropout)  # fmt: skip
        torch.manual_seed(args.seed)
        net = build(network)
    fgm.OneStepGenerator(net, args.t_star, args.c_in, args.c_skip)  # raises now, not after an hour of training, if they are wrong
    fgm.micro_batches(args.batch, args.micro_batch)
    out = fgm.open_folder(args.out or default_out(args))
    judge = Judge(images) if fgm.rank() == 0 else None
    if args.fid and fgm.rank() == 0:
        fid(images.pixels[:32], images.pixels[32:64], args.inception_weights, device)  # fails now, not after the training, if it cannot be measured

    net = net.to(device)
    teacher, flow = copy.deepcopy(net), copy.deepcopy(net)
    for one in (teacher, flow, net):
        fgm.shard(one, [block for block in one.modules() if isinstance(block, Block)])
    steps = {phase: math.ceil(kimg * 1000 / args.batch) for phase, kimg in (("teacher", args.teacher_kimg), ("distill", args.kimg))}
    pixels, labels = images.pixels.to(device), images.labels.to(device)

    def one_hot(index):
        return {"class_labels": F.one_hot(labels[index], label_dim).float()} if label_dim else {}

    def data(seeds):
        index = (seeds % n).to(device)
        x = to_float(pixels[index])
        if args.flip:
            x = torch.where(fgm.per_sample((seeds // n % 2).to(device) == 1, x), x.flip(3), x)
        return x, one_hot(index)

    notes = {"data": args.data, "network": network, "teacher": args.teacher}
    teacher_seconds = 0.0
    if not args.teacher:
        teacher, teacher_seconds = fgm.train_flow(
            teacher.train(), data, steps=steps["teacher"], lr=args.teacher_lr, betas=(0.9, 0.999), lr_decay=round(args.lr_decay * steps["teacher"]),
            ema_decay=args.teacher_ema, notes=notes, **fgm.run_settings(args, out))  # fmt: skip
    about = {"network": network, "data": args.data, "classes": images.classes}
    fgm.save_weights(teacher, out / "teacher.safetensors", {"about": json.dumps(about)})
    for one in (net, flow, teacher.eval()):
        one.load_state_dict(teacher.state_dict())
        one.eval()  # no dropout in Algorithm 1
    generator = fgm.OneStepGenerator(net, args.t_star, args.c_in, args.c_skip)
    shape = (channels, resolution, resolution)

    def picture(step, generator):
        grid, _ = draw(generator, 100, shape, label_dim, device, args.seed)
        if fgm.rank() == 0:
            fgm.save_grid(out / f"distill-{step:07d}.png", grid)

    generator, distill_seconds = fgm.distill(
        teacher, generator, flow, shape, conditions=lambda seeds: one_hot((seeds % n).to(device)), picture=picture, picture_every=args.picture_every,
        notes=notes, **fgm.distillation_settings(args, steps["distill"], out))  # fmt: skip
    fgm.save_weights(generator.net, out / "generator.safetensors", {"about": json.dumps(about | {"generator": generator.coefficients()})})
    score(args, device, images, judge, teacher, generator, about, {"teacher": teacher_seconds, "distillation": distill_seconds}, out)


def score(args, device, images, judge, teacher, generator, about, seconds, out):
    """Draw from the teacher and the generator with the same seeds; write metrics.json, config.json and pictures, and print the table."""
    label_dim, shape = about["network"]["label_dim"], tuple(images.pixels.shape[1:])
    samplers = {k: (lambda noise, k=k, **cond: fgm.sample_ode(teacher, noise, k, **cond)) for k in ((1, 10, 50, 100) if args.fid else (1, 10, 50))}
    samplers["one step"] = generator
    metric = "pixel Frechet distance"
    if args.fid:
        metric = "FID" if args.samples >= 50_000 else f"fid-{args.samples / 1000:g}k"
    rows, began = {}, time.perf_counter()
    for name, sampler in samplers.items():
        started = time.perf_counter()
        pixels, labels = draw(sampler, args.samples, shape, label_dim, device, args.seed)
        spent = time.perf_counter() - started
        if fgm.rank() == 0:
            row = {"pixel_frechet": pixel_frechet(images.pixels, pixels), "seconds": spent}
            if label_dim:
                row["accuracy"], row["worst_class"] = judge.accuracy(pixels, labels)
            if args.fid:
                row["fid"] = fid(images.pixels, pixels, args.inception_weights, device)
            rows[name] = row
            fgm.save_grid(out / f"{'one-step' if sampler is generator else f'teacher-{name}-steps'}.png", pixels[:100])
    if fgm.rank():
        return
    key = "fid" if args.fid else "pixel_frechet"
    floor = noise_floor(images)
    seconds |= {"scores": time.perf_counter() - began}
    fgm.write_json(out / "config.json", about | {"generator": generator.coefficients(), "torch": torch.__version__, "processes": fgm.world(),
                                                 "settings": vars(args) | {"out": str(out)}})  # fmt: skip
    fgm.write_json(out / "metrics.json", {
        "metric": metric, "against": f"{len(images.pixels)} training images of {args.data}", "samples": args.samples,
        "detector": "torch-fidelity Inception-v3" if args.fid else "raw pixels", "teacher": {str(k): row[key] for k, row in rows.items() if k != "one step"},
        "one_step": rows["one step"][key], "noise_floor_two_halves": floor, "judge_own_accuracy": judge.own_accuracy,
        "rows": {str(k): row for k, row in rows.items()}, "seconds": seconds})  # fmt: skip
    print(f"{args.data}{' (conditional)' if label_dim else ''}: {args.samples:,} samples against {len(images.pixels):,} training images")
    print(f"  {'':18}{metric:>24}{'accuracy':>10}{'worst class':>13}{'seconds':>9}" if label_dim else f"  {'':18}{metric:>24}{'seconds':>9}")
    print(f"  {'data, two halves':18}{floor:24.4f}" + (f"{judge.own_accuracy:10.2%}" if label_dim else "") + "   (pixel Frechet distance)" * args.fid)
    for name, row in rows.items():
        label = name if name == "one step" else f"teacher, {name} step{'s' * (name > 1)}"
        print(f"  {label:18}{row[key]:24.4f}" + (f"{row['accuracy']:10.2%}{row['worst_class']:13.2%}" if label_dim else "") + f"{row['seconds']:9.1f}")
    print("  " + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()) + f"; pictures and metrics.json in {out}")


if __name__ == "__main__":
    fgm.run(main)
