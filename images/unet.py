"""EDM's U-Net as a velocity network.

It is the DDPM++ network of Song et al. 2021 (arXiv 2011.13456) as configured by Karras et al. 2022 (EDM,
arXiv 2206.00364).
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

import fgm
from fgm import InputError

# ---- Layers ------------------------------------------------------------------------------------------------


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
    """A linear layer that starts as EDM's do."""
    layer = nn.Linear(features_in, features_out, bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class GroupNorm(nn.GroupNorm):
    """The output has the input's dtype, and the statistics are in float32. CUDA's autocast would make the
    output float32.

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


# ---- The network -------------------------------------------------------------------------------------------


class EDMUNet(nn.Module):
    """EDM's CIFAR-10 network, parameter for parameter the published one without the prefix "model.".

    Raises InputError for a resolution that cannot be halved often enough, and for widths that cannot be
    normalised in groups.

    Features, which a GAN's head looks at, are the end of the encoder, [B, feature_width, r, r]. features_of
    computes them alone. Where keep_features is set, a whole pass leaves them in .features, and its t in .t.
    """

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

        # The embedding of time and label. Published files also hold a layer for the augmentation that EDM
        # trains with, which does nothing for images as they are.
        embedding = model_channels * channel_mult_emb
        half = model_channels // 2
        frequencies = 10000 ** (-torch.arange(half) / (half - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.map_label = linear(label_dim, model_channels) if label_dim else None
        self.map_augment = linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = linear(model_channels, embedding)
        self.map_layer1 = linear(embedding, embedding)

        # The encoder, from the full resolution down. widths: of the skips that it leaves for the decoder.
        shared = dict(embedding=embedding, dropout=dropout)
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

        # The decoder, back up.
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

    def forward(self, x, noise_labels, class_labels=None, features_only=False):
        """x: [B, in_channels, R, R]. noise_labels: [B], the time t where the network is a velocity.
        class_labels: [B, label_dim], one-hot.

        Returns [B, out_channels, R, R], or with features_only the features. Raises InputError for images of
        another shape and for missing class labels."""
        if x.shape[1:] != self.input_shape:
            expected = list(self.input_shape)
            raise InputError(f"the network takes images of shape {expected}, got {list(x.shape[1:])}")
        if self.label_dim and (class_labels is None or class_labels.shape != (len(x), self.label_dim)):
            raise InputError(f"the network needs class_labels of shape [{len(x)}, {self.label_dim}]")

        angle = noise_labels[:, None] * self.frequencies  # [B, model_channels / 2]
        embedding = torch.cat([angle.sin(), angle.cos()], 1)  # [B, model_channels]
        if self.label_dim:
            embedding = embedding + self.map_label(class_labels * math.sqrt(self.label_dim))
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
        """The features of x at the time t, without the decoder."""
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

    @property
    def features(self):
        """What the last pass of net kept; see EDMUNet."""
        return self.net.features

    def features_of(self, x, t, **cond):
        return self(x, t, features_only=True, **cond)

    def forward(self, x, t, features_only=False, **cond):
        """x: [B, C, R, R], t: [B]. Returns the velocity, as x, or with features_only the features of net."""
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


def build(network):
    """A velocity network from its description, a dict: EDMUNet's arguments, and for an EDMVelocity around it
    "edm_sigma_data". It keeps the dict as .description."""
    arguments = {name: value for name, value in network.items() if name != "edm_sigma_data"}
    net = EDMUNet(**arguments)
    if "edm_sigma_data" in network:
        net = EDMVelocity(net, network["edm_sigma_data"])
    net.description = network
    return net
