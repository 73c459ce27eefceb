"""Stable Diffusion 3's transformer (MM-DiT) as a velocity network, in two memory recipes; the GAN on it.

The recipes: three transformers (teacher, online flow, generator), or one frozen base with two LoRA adapters.
The transformer itself is diffusers' SD3Transformer2DModel, unchanged.
"""

import contextlib

import torch
from torch import nn
from torch.nn import functional as F

import fgm
from parts.prompts import load_component
from parts.run import GATHERED_WHOLE, noise_from, shard

# ------------------------------------------------------------------------------------------------------------
# SD3's transformer as a velocity network
# ------------------------------------------------------------------------------------------------------------

FOR_NOISE, FOR_T = 1, 2  # what the GAN draws from a seed that also chooses the prompt
FEATURE_BLOCK = 2  # from 0; appendix B.2 lets the discriminator see "layer 2"


class SD3Velocity(nn.Module):
    """An SD3Transformer2DModel as net(x, t, encoder_hidden_states=..., pooled_projections=...) -> v.

    x, v: [B, 16, H, W], t: [B]. SD3's sigma is our t, its timestep 1000 t (kept in float32: bfloat16 turns
    970 into 968), its output noise - x0. With keep_features, the image tokens after block 2 of the last call,
    and its t, are kept in .features [B, H W / 4, D] and .t [B]."""

    def __init__(self, transformer, keep_features=False):
        super().__init__()
        self.net, self.features, self.t = transformer, None, None
        if keep_features:
            transformer.transformer_blocks[FEATURE_BLOCK].register_forward_hook(self.keep)

    def keep(self, block, inputs, output):
        self.features = output[1]

    def compile(self, **settings):
        """torch.compile each block by itself, and each layer around them: checkpointing, the adapters' switch
        and hooks (FSDP's, keep) stay outside of the graphs."""
        # A block meets 14 combinations of adapter, gradients and batch; by default dynamo gives up after 8.
        torch._dynamo.config.recompile_limit = 64
        for part in (*self.net.children(), *self.net.transformer_blocks):
            if "forward" not in vars(part):  # two adapters share it
                part.forward = torch.compile(part.forward, **settings)

    def forward(self, x, t, encoder_hidden_states, pooled_projections, skip_layers=None):
        self.t = t
        return self.net(
            hidden_states=x, timestep=1000 * t, encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections, skip_layers=skip_layers, return_dict=False)[0]

    def features_of(self, x, t, **cond):
        """The image tokens after block 2 for another input, by a pass that stops there.

        .features and .t, those of the last call, stay as they are."""
        kept = self.features, self.t
        skipped = list(range(FEATURE_BLOCK + 1, len(self.net.transformer_blocks)))
        v = self(x, t, **cond, skip_layers=skipped)
        # FSDP gathers the outermost weights for a backward pass only where it reaches the network's output.
        found = self.features + 0 * v.mean()
        self.features, self.t = kept
        return found


# ------------------------------------------------------------------------------------------------------------
# One base, two adapters
# ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def switched(switch, name):
    """Within, the adapter `name` (None: no adapter) is on."""
    before, switch["on"] = switch["on"], name
    try:
        yield
    finally:
        switch["on"] = before


class LoRALinear(nn.Module):
    """A frozen linear layer plus up(down(x)) of the adapter that is switched on (arXiv 2106.09685, alpha =
    rank).

    switch: {"on": name or None}, shared by all layers."""

    def __init__(self, base, lora_rank, names, switch):
        super().__init__()
        self.base, self.switch = base, switch
        inputs, outputs = base.in_features, base.out_features
        self.down = nn.ModuleDict({name: nn.Linear(inputs, lora_rank, bias=False) for name in names})
        self.up = nn.ModuleDict({name: nn.Linear(lora_rank, outputs, bias=False) for name in names})
        for name in names:
            nn.init.normal_(self.down[name].weight, std=inputs**-0.5)
            nn.init.zeros_(self.up[name].weight)

    def forward(self, x):
        y, on = self.base(x), self.switch["on"]
        return y if on is None else y + self.up[on](self.down[on](x))


def add_lora(transformer, lora_rank, names=("flow", "generator")):
    """Freeze a transformer; give every linear layer of its blocks' attention and feed-forward parts a LoRA
    pair for each name. Returns the switch of LoRALinear."""
    switch = {"on": None}
    transformer.requires_grad_(False)
    for block in transformer.transformer_blocks:
        for path, module in list(block.named_modules()):
            if isinstance(module, nn.Linear) and not path.startswith("norm"):
                parent, _, name = path.rpartition(".")
                setattr(block.get_submodule(parent), name, LoRALinear(module, lora_rank, names, switch))
    return switch


class Adapter(nn.Module):
    """A shared SD3Velocity with one adapter on (name None: all off, the teacher).

    Its parameters are those of its adapter alone; paths are the linear layers that these belong to."""

    def __init__(self, velocity, switch, name):
        super().__init__()
        self.shared = [velocity]  # in a list, so that the shared weights are nobody's parameters
        self.switch, self.name = switch, name
        modules = velocity.net.named_modules() if name else ()
        pairs = {path: module for path, module in modules if isinstance(module, LoRALinear)}
        self.paths = list(pairs)
        self.down = nn.ModuleList(module.down[name] for module in pairs.values())
        self.up = nn.ModuleList(module.up[name] for module in pairs.values())

    def forward(self, x, t, **cond):
        with switched(self.switch, self.name):
            return self.shared[0](x, t, **cond)

    def compile(self, **settings):
        self.shared[0].compile(**settings)

    features = property(lambda self: self.shared[0].features)
    t = property(lambda self: self.shared[0].t)

    def features_of(self, x, t, **cond):
        with switched(self.switch, self.name):
            return self.shared[0].features_of(x, t, **cond)


# ------------------------------------------------------------------------------------------------------------
# The three networks of Algorithm 1
# ------------------------------------------------------------------------------------------------------------


def checkpoint_blocks(transformer, switch):
    """Recompute each block in the backward pass, with the adapter that was on in the forward pass."""

    def checkpointed(block, *inputs):
        name = switch["on"]

        def recompute(*inputs):
            with switched(switch, name):
                return block(*inputs)

        return torch.utils.checkpoint.checkpoint(recompute, *inputs, use_reentrant=False)

    transformer.enable_gradient_checkpointing(checkpointed)


def networks(folder, lora_rank, checkpointing, bf16, device, keep_features=False):
    """(teacher, online flow, net of the generator) of a pipeline's folder, sharded over the processes.

    lora_rank None or 0: three transformers; otherwise one, with two LoRA adapters. keep_features: of the
    online flow. What never trains is held in bfloat16 where the passes are (bf16); what trains in float32."""

    def load(dtype, keep_features):
        transformer = load_component(folder, "transformer", dtype)
        return SD3Velocity(transformer.to(device), keep_features)

    frozen_dtype = torch.bfloat16 if bf16 else torch.float32
    if lora_rank:
        shared = load(frozen_dtype, keep_features)
        switch = add_lora(shared.net, lora_rank)
        shared.to(device)
        velocities = (shared,)
    else:
        switch = {"on": None}
        teacher = load(frozen_dtype, False).requires_grad_(False)
        velocities = (teacher, load(torch.float32, keep_features), load(torch.float32, False))
    for velocity in velocities:
        velocity.eval()
        if checkpointing:
            checkpoint_blocks(velocity.net, switch)
        shard(velocity, velocity.net.transformer_blocks, bf16)
    names = (None, "flow", "generator")
    return tuple(Adapter(shared, switch, name) for name in names) if lora_rank else velocities


def memory_estimate(config, lora_rank, checkpointing, bf16, micro_batch, height, width, text_tokens, guidance,
                    processes, ema, one_pass=True, shared=True):
    """Bytes a process needs at the peak of a step, by arithmetic: {what: bytes}.

    height, width: of the latents. one_pass: as fgm.distill's, whose gradients of flow and generator live
    together; shared: it shares the flow's pass as well. The peak is the start of the backward pass of the FGM
    losses, when the graphs of generator, flow and teacher live together, beside accumulated gradients. What a
    transformer block keeps for its backward pass, in numbers of its width d per token: normed inputs, q k v,
    attention, 4 d twice in the feed-forward part, ...: 21 with weights in training, 17 with adapters, 10
    frozen, when neither the inputs of linear layers nor what multiplies the modulation are needed; autocast's
    float32 norms add the 2 to 4. 8 more are in use inside a block's backward pass."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        net = SD3Transformer2DModel.from_config(config)
        weights = trained = sum(p.numel() for p in net.parameters())
        if lora_rank:
            add_lora(net, lora_rank, ("flow",))
            trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    if 4 * weights < GATHERED_WHOLE:
        processes = 1  # each holds a replica
    number = 2 if bf16 else 4  # bytes of an activation, and of a frozen weight

    # Frozen weights; weights and Adam's second moment (beta1 is 0) of flow and generator; one's average.
    state = weights * number + 2 * trained * 8 + trained * (4 if ema else 0)
    copies = 2 * weights * (1 if checkpointing else 2) if bf16 and not lora_rank and processes == 1 else 0
    unsharded = 2 * weights / config["num_layers"] * number if processes > 1 else 0

    d = config["num_attention_heads"] * config["attention_head_dim"]
    tokens = height * width // config["patch_size"] ** 2 + text_tokens
    in_training, frozen = (17 if lora_rank else 21) + bf16 * (2 if lora_rank else 4), 10 + bf16 * 2
    teachers = 2 if guidance != 1 else 1  # samples that the teacher sees for one of ours
    at_work = max(in_training + 8, teachers * (frozen + 8)) if checkpointing else teachers * 8
    flow = in_training if shared else frozen
    between = 2 + teachers if checkpointing else in_training + flow + teachers * frozen
    blocks = config["num_layers"] * tokens - text_tokens // 2  # the last block only reads the text
    return {
        "weights, Adam, EMA": state / processes,
        "gradients": trained * (8 if one_pass else 4) / processes,
        "bf16 copies of weights": copies,
        "unsharded blocks": unsharded,
        "activations": (blocks * between + tokens * at_work) * d * number * micro_batch,
    }


# ------------------------------------------------------------------------------------------------------------
# The GAN of appendix B.2, optional
# ------------------------------------------------------------------------------------------------------------


class GAN(nn.Module):
    """A light convolutional head on the online flow's block-2 hidden states tells noised real latents from
    noised generated ones (appendix B.2).

    t is drawn from the flow's own, low-noise distribution. In the flow's update the features of generated
    latents are those of the pass that the flow loss has just made; the real ones, and the generator's, leave
    the network after block 2. The paper states no reduction; the weights 1e-2 and 5e-2 are taken per element,
    as arXiv 2405.14867, which it follows, averages both losses:

        FGM / D + weight * GAN   is, D times,   FGM + D * weight * GAN,   D = 16 H W numbers in a latent.

    Our losses are sums over the D dimensions, hence the factor D here. Each number of x0 then feels both with
    a strength that does not depend on the size; summed over the logits instead (1 / 256 of D at SD3's patch
    size), the GAN's gradient at x0 would be about a thousandth of L2's. real: Rows of latents [16, H, W];
    embeddings: of their captions; grid: (H / 2, W / 2), the network's tokens."""

    def __init__(self, width, grid, real, embeddings, t_gan, generator_weight=1e-2,
                 discriminator_weight=5e-2):
        super().__init__()
        inner = min(width, 256)
        self.head = nn.Sequential(
            nn.Conv2d(width, inner, 3, padding=1), nn.GroupNorm(8, inner), nn.SiLU(),
            nn.Conv2d(inner, inner, 3, stride=2, padding=1), nn.GroupNorm(8, inner), nn.SiLU(),
            nn.Conv2d(inner, 1, 3, padding=1))
        self.grid, self.real, self.embeddings, self.t_gan = grid, real, embeddings, t_gan
        self.weights = generator_weight, discriminator_weight

    def logit(self, features):
        b, _, d = features.shape
        maps = features.mT.reshape(b, d, *self.grid).float()  # [B, HW/4, D] -> [B, D, H/2, W/2]
        return self.head(maps).mean((1, 2, 3))  # [B, 1, H/4, W/4] -> [B]

    def features(self, flow, x0, t, seeds, cond):
        """Hidden states of x0, noised to t with noise that seeds choose."""
        noise = noise_from(seeds ^ FOR_NOISE, x0.shape[1:], x0.device)
        return flow.features_of(fgm.interpolate(x0, noise, t), t, **cond)

    def flow_loss(self, flow, x0, seeds, cond):
        chosen = seeds % len(self.real)
        latents = self.real(chosen)["latents"].float()
        real = self.features(flow, latents, flow.t, seeds, self.embeddings(chosen))
        loss = F.softplus(self.logit(flow.features)) + F.softplus(-self.logit(real))
        return x0[0].numel() * self.weights[1] * loss

    def generator_loss(self, flow, x0, seeds, cond):
        normal = noise_from(seeds ^ FOR_T, (1,), x0.device)[:, 0]  # [B, 1] -> [B]
        t = torch.sigmoid(self.t_gan[0] + self.t_gan[1] * normal)
        loss = F.softplus(-self.logit(self.features(flow, x0, t, seeds, cond)))
        return x0[0].numel() * self.weights[0] * loss
