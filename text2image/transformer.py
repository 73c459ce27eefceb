"""Stable Diffusion 3's transformer (MM-DiT) as a velocity network, in two memory recipes.

The recipes: three transformers (teacher, online flow, generator), or one frozen base with two LoRA adapters.
The transformer itself is diffusers' SD3Transformer2DModel, unchanged.
"""

from contextlib import contextmanager

import torch
from torch import nn

from text2image.pipeline import load_network
from training.processes import shard

# ---- SD3's transformer as a velocity network ---------------------------------------------------------------

FEATURE_BLOCK = 2  # from 0; appendix B.2 lets the discriminator see "layer 2"


class SD3Velocity(nn.Module):
    """An SD3Transformer2DModel as net(x, t, encoder_hidden_states=..., pooled_projections=...) -> v.

    x, v: [B, 16, H, W], t: [B]. SD3's sigma is our t, its timestep is 1000 t (kept in float32: bfloat16 turns
    970 into 968), and its output is noise - x0. With keep_features, .features [B, H W / 4, D] are the image
    tokens after block 2 of the last call, and .t [B] is its t."""

    def __init__(self, transformer, keep_features=False):
        super().__init__()
        self.net, self.features, self.t = transformer, None, None
        if keep_features:
            transformer.transformer_blocks[FEATURE_BLOCK].register_forward_hook(self.keep)

    def keep(self, block, inputs, output):
        self.features = output[1]

    def compile(self, **settings):
        """torch.compile each block by itself, and each layer around them: checkpointing, the switch between
        adapters, and hooks (FSDP's, keep) stay outside of the graphs."""
        for part in (*self.net.children(), *self.net.transformer_blocks):
            if "forward" not in vars(part):  # not compiled yet: two adapters share it
                part.forward = torch.compile(part.forward, **settings)

    def forward(self, x, t, encoder_hidden_states, pooled_projections, skip_layers=None):
        self.t = t
        return self.net(
            hidden_states=x, timestep=1000 * t, encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections, skip_layers=skip_layers, return_dict=False)[0]

    def features_of(self, x, t, **cond):
        """The image tokens after block 2 for another input, [B, H W / 4, D], by a pass that stops there.

        .features and .t, those of the last call, stay as they are."""
        features_before, t_before = self.features, self.t
        later_blocks = list(range(FEATURE_BLOCK + 1, len(self.net.transformer_blocks)))
        v = self(x, t, **cond, skip_layers=later_blocks)

        # FSDP gathers the outermost weights for a backward pass only if it starts at the network's output,
        # so the output has to be part of the result, though it adds nothing.
        features = self.features + 0 * v.mean()
        self.features, self.t = features_before, t_before
        return features


# ---- One base, two adapters --------------------------------------------------------------------------------

ADAPTERS = ("flow", "generator")


class Switch:
    """Says which adapter the LoRALinear layers of one network add: "flow", "generator", or None for none."""

    def __init__(self):
        self.adapter = None

    @contextmanager
    def set_to(self, adapter):
        """Within, the layers add this adapter."""
        before, self.adapter = self.adapter, adapter
        try:
            yield
        finally:
            self.adapter = before


class LoRALinear(nn.Module):
    """A frozen linear layer plus up(down(x)) of the switch's adapter (arXiv 2106.09685 with alpha = rank)."""

    def __init__(self, base, lora_rank, switch):
        super().__init__()
        self.base, self.switch = base, switch
        inputs, outputs = base.in_features, base.out_features
        self.down = nn.ModuleDict({name: nn.Linear(inputs, lora_rank, bias=False) for name in ADAPTERS})
        self.up = nn.ModuleDict({name: nn.Linear(lora_rank, outputs, bias=False) for name in ADAPTERS})
        for name in ADAPTERS:
            nn.init.normal_(self.down[name].weight, std=inputs**-0.5)
            nn.init.zeros_(self.up[name].weight)

    def forward(self, x):
        adapter = self.switch.adapter
        if adapter is None:
            return self.base(x)
        return self.base(x) + self.up[adapter](self.down[adapter](x))


def add_lora(transformer, lora_rank):
    """Freeze a transformer and give its linear layers, all but those of the norms, a LoRA pair for each
    adapter. Returns their Switch."""
    transformer.requires_grad_(False)
    switch = Switch()
    for block in transformer.transformer_blocks:
        for path, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear) and not path.startswith("norm"):
                block.set_submodule(path, LoRALinear(layer, lora_rank, switch))
    return switch


class Adapter(nn.Module):
    """A shared SD3Velocity with one adapter on (name None: none, which is the teacher).

    Its parameters are those of its adapter alone. shared: the velocity; paths: the adapted layers."""

    def __init__(self, velocity, switch, name):
        super().__init__()
        object.__setattr__(self, "shared", velocity)  # not as a submodule: its weights are not the adapter's
        self.switch, self.name = switch, name
        layers = {}
        if name:
            layers = {path: layer for path, layer in velocity.net.named_modules()
                      if isinstance(layer, LoRALinear)}
        self.paths = list(layers)
        self.down = nn.ModuleList(layer.down[name] for layer in layers.values())
        self.up = nn.ModuleList(layer.up[name] for layer in layers.values())

    def forward(self, x, t, **cond):
        with self.switch.set_to(self.name):
            return self.shared(x, t, **cond)

    def features_of(self, x, t, **cond):
        with self.switch.set_to(self.name):
            return self.shared.features_of(x, t, **cond)

    def compile(self, **settings):
        self.shared.compile(**settings)

    @property
    def features(self):
        return self.shared.features

    @property
    def t(self):
        return self.shared.t


# ---- The three networks of Algorithm 1 ---------------------------------------------------------------------


def checkpoint_blocks(transformer, switch):
    """Recompute each block in the backward pass, with the adapter that was on in the forward pass."""

    def checkpointed(block, *inputs):
        adapter = switch.adapter

        def recompute(*inputs):
            with switch.set_to(adapter):
                return block(*inputs)

        return torch.utils.checkpoint.checkpoint(recompute, *inputs, use_reentrant=False)

    transformer.enable_gradient_checkpointing(checkpointed)


def networks(folder, lora_rank, checkpointing, bf16, device, keep_features=False):
    """(teacher, online flow, net of the generator) of a pipeline's folder, sharded over the processes.

    lora_rank None or 0: three transformers; otherwise one, with two LoRA adapters. keep_features: of the
    online flow. What never trains is held in bfloat16 if bf16; what trains is held in float32."""

    def load(dtype, keep_features):
        return SD3Velocity(load_network(folder, "transformer", dtype).to(device), keep_features)

    frozen_dtype, switch = torch.bfloat16 if bf16 else torch.float32, Switch()
    if lora_rank:
        shared = load(frozen_dtype, keep_features)
        switch = add_lora(shared.net, lora_rank)
        velocities = (shared.to(device),)
    else:
        teacher = load(frozen_dtype, False).requires_grad_(False)
        velocities = (teacher, load(torch.float32, keep_features), load(torch.float32, False))

    for velocity in velocities:
        if checkpointing:
            checkpoint_blocks(velocity.net, switch)
        shard(velocity, velocity.net.transformer_blocks, bf16)

    if lora_rank:
        return tuple(Adapter(shared, switch, name) for name in (None, *ADAPTERS))
    return velocities
